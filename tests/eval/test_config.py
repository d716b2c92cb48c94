"""Checks of the configuration."""

from __future__ import annotations

import re

import pytest

from verippo.eval.config import EvalConfig
from verippo.launch import cli


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, "model is missing"),
        ({"base_url": None}, "set --base_url"),
        ({"engine": "local"}, "drop --base_url"),
        (
            {"engine": "local", "base_url": None, "top_p": 0.9},
            "top_p=0.9: the local engine samples the whole distribution",
        ),
        ({"engine": "local", "base_url": None, "endpoint": "chat"}, "no endpoint chat"),
        ({"runs": 5, "temperature": 0.0}, "runs=5 at temperature=0"),
        ({"runs": 0}, "runs=0: must be at least 1"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EvalConfig(
            **{"data": "d", "output": "o", "model": "m", "base_url": "http://x/v1", **options}
        )


def test_misplaced_option_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(
            [
                "eval",
                "--data",
                "x",
                "--output",
                "y",
                "--model",
                "m",
                "--base_url",
                "u",
                "--llm.temperature",
                "0.1",
            ]
        )
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err == "verippo: eval: llm.temperature=0.1: use --temperature instead\n"
    )
