"""A set-up that passes every check, and the doctor's lines about one."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from verippo.launch import cli

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def templated(tokenizer_folder, tmp_path_factory):
    """Folder of the little tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("templated")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(make_model, templated, tmp_path):
    """A copy of a little model, which the test may damage."""
    folder = shutil.copytree(make_model("qwen3"), tmp_path / "policy")
    shutil.copytree(templated, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def healthy(policy, problems_file, tmp_path):
    """Options of a PPO run whose checks all pass."""
    return {
        "policy": policy,
        "data": problems_file,
        "output": tmp_path / "made" / "out",
        "eval_fraction": 0.25,
        "verifier.kind": "exact",
        "steps": 3,
        "prompts_per_step": 4,
        "max_prompt_tokens": 200,
        "sampling.max_new_tokens": 16,
        "dtype": "fp32",
    }


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Runs the command: stage, options -> exit status, lines of stdout."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(stage, options):
        capsys.readouterr()
        argv = ["doctor", stage]
        argv += [f"--{name}={value}" for name, value in options.items()]
        try:
            cli.main(argv)
            status = 0
        except SystemExit as end:
            status = end.code
        shown = capsys.readouterr()
        print(shown.out, shown.err)
        return status, shown.out.splitlines()

    return run


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON: name, rows -> path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text(json.dumps(rows))
        return path

    return write
