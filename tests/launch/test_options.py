"""Names of options and commands: suggestions, groups of commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import verippo
from verippo.launch import cli

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (
            ["ppo", "--learning_rate", "1e-6"],
            "ppo has --policy_learning_rate and --critic_learning_rate",
        ),
        (["ppo", "--learning_rate=1e-6"], "ppo has --policy_learning_rate"),
        (["ppo", "--verifier.functio", "m:f"], "did you mean --verifier.function"),
        (["ppo", "--polic", "x"], "did you mean --policy"),
        (["ppo", "--kl.cofe", "1"], "did you mean --kl.coef"),
        (["problems", "--outptu", "x"], "did you mean --output?"),
        (["search", "--max_dept", "3"], "did you mean --max_depth"),
        (["eval", "--zzz"], "see verippo eval --help"),
    ],
)
def test_unknown_option_gets_a_suggestion(argv, hint, refused):
    line = refused(argv)
    assert f"unknown option {argv[1].partition('=')[0]}: " in line
    assert hint in line


def test_unknown_key_of_a_file_gets_a_suggestion(refused, tmp_path):
    (tmp_path / "c.yaml").write_text("sampling: {temperatur: 1.0}\n")
    line = refused(["ppo", "--config", tmp_path / "c.yaml"])
    assert "unknown option --sampling.temperatur: did you mean --sampling.temperature" in line


def test_entries_of_mappings_and_lists_are_no_unknown_options():
    from verippo.launch.option_check import check_names
    from verippo.launch.serve import ServeConfig
    from verippo.search.config import ProblemsConfig

    file = {"environment": {"CUDA_VISIBLE_DEVICES": "3"}}
    check_names("serve start", ServeConfig, ["--environment.X", "1"], [file])
    file = {"difficulty": {"models": [{"model": "m"}]}}
    check_names("problems", ProblemsConfig, ["--difficulty.models+", "x"], [file])


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_group_of_commands_has_a_help(option, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", option])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"serve {verb}" in out for verb in ("start", "status", "stop"))
    assert "  ppo " not in out


def test_status_and_stop_have_help_texts_of_their_own(capsys):
    texts = []
    for verb in ("status", "stop"):
        with pytest.raises(SystemExit):
            cli.main(["serve", verb, "--help"])
        texts.append(capsys.readouterr().out)
    assert "Lists the servers" in texts[0]
    assert "Stops the servers" in texts[1]
    assert "--stop_timeout_seconds" not in texts[0]
    assert "--stop_timeout_seconds" in texts[1]


def test_package_has_the_version_of_the_project():
    version = re.search(r'^version = "(.+)"$', PROJECT.read_text(), re.MULTILINE)[1]
    assert verippo.__version__ == version


def test_names_from_data_are_escaped_in_errors(refused, tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"\\u001b[2Jquestion\\n": "x"}]')
    argv = ["search", "--data", path, "--output", tmp_path / "out", "--llm.model", "m"]
    assert "it has \\x1b[2Jquestion" in refused([*argv, "--llm.base_url", "http://127.0.0.1:9/v1"])
