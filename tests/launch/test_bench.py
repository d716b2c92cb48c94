"""`verippo bench` on a small model, without servers."""

from __future__ import annotations

import json

import pytest

from verippo.launch import cli
from verippo.launch.bench import BenchConfig


def test_speed_is_tokens_over_seconds_and_the_machine_is_named(make_model, capsys):
    command = "bench --prompts 3 --prompt_tokens 5 --max_new_tokens 7 --repeats 2 --dtype fp32"
    cli.main([*command.split(), "--model", str(make_model())])
    (line,) = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert (row["figure"], row["engine"], row["dtype"]) == ("sampler", "local", "fp32")
    assert len(row["tokens"]) == len(row["seconds"]) == 2
    assert all(3 <= tokens <= 21 for tokens in row["tokens"])
    pairs = zip(row["tokens"], row["seconds"], strict=True)
    speeds = [tokens / seconds for tokens, seconds in pairs]
    # seconds are rounded to milliseconds
    assert row["tokens_per_second"] == pytest.approx(sum(speeds) / 2, rel=0.1)
    assert {"cpu_cores", "memory_gib", "gpu", "torch", "parameters", "command"} <= set(row)


def test_size_below_one_is_refused():
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        BenchConfig(model="m", repeats=0)
