"""`verippo bench` on a small model, without servers."""

from __future__ import annotations

import json

import pytest

from verippo.launch import cli
from verippo.launch.bench import BenchConfig


def test_the_figure_is_the_tokens_drawn_over_the_seconds_taken_on_a_machine_that_is_described(
    make_model, capsys
):
    sizes = [
        "--prompts",
        "3",
        "--prompt_tokens",
        "5",
        "--max_new_tokens",
        "7",
        "--repeats",
        "2",
        "--dtype",
        "fp32",
    ]
    cli.main(["bench", "--model", str(make_model()), *sizes])
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["figure"], row["engine"], row["dtype"]) == ("sampler", "local", "fp32")
    assert len(row["tokens"]) == len(row["seconds"]) == 2
    assert all(3 <= tokens <= 21 for tokens in row["tokens"])
    speeds = [
        tokens / seconds for tokens, seconds in zip(row["tokens"], row["seconds"], strict=True)
    ]
    assert row["tokens_per_second"] == pytest.approx(
        sum(speeds) / 2, rel=0.1
    )  # seconds are rounded to milliseconds
    assert {"cpu_cores", "memory_gib", "gpu", "torch", "parameters", "command"} <= set(row)


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        BenchConfig(model="m", repeats=0)
