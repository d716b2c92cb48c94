"""`verippo bench NAME` on small sizes, without servers."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from verippo.kernels.logprob import linear_logprobs
from verippo.launch import cli
from verippo.launch.bench.attention_speed import AttentionBenchConfig
from verippo.launch.bench.logprob_speed import LogprobBenchConfig, full_logprobs
from verippo.launch.bench.measure import measure
from verippo.launch.bench.packing_speed import PackingBenchConfig
from verippo.launch.bench.sampling_speed import SamplerBenchConfig

MACHINE = {"cpu_cores", "memory_gib", "gpu", "torch", "numpy", "load", "command", "threads"}


def figures(command, capsys):
    cli.main(["bench", *command.split()])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(row) >= MACHINE for row in rows)
    return {row["figure"]: row for row in rows}


def test_speed_is_tokens_over_seconds_and_the_machine_is_named(make_model, capsys):
    command = "bench sampler --prompts 3 --prompt_tokens 5 --max_new_tokens 7 --repeats 2"
    cli.main([*command.split(), "--dtype", "fp32", "--model", str(make_model())])
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


def test_packing_has_a_limit_of_bytes_over_bandwidth(capsys):
    found = figures("packing --sizes 20x60,30x80 --prompt_tokens 20 --repeats 2", capsys)
    assert list(found) == ["check_rollouts", "pack", "share", "gae"]
    row = found["pack"]  # of the second size
    assert row["sequences"] == 30
    assert 30 * 40 <= row["tokens"] <= 30 * 120
    assert row["moved_bytes"] == 13 * row["tokens"]
    bandwidth = row["bandwidth_gb_per_second"] * 1e9
    assert row["limit_seconds"] == pytest.approx(row["moved_bytes"] / bandwidth, rel=0.01)
    assert found["gae"]["moved_bytes"] == 17 * row["tokens"]
    # 20 of the tokens of each sequence are its prompt
    assert found["check_rollouts"]["moved_bytes"] == 12 * row["tokens"] - 8 * 20 * 30


def test_logprobs_stand_beside_those_of_full_logits(capsys):
    sizes = "--num_tokens 40 --hidden_size 16 --vocabulary 300 --repeats 1"
    found = figures(f"logprobs {sizes}", capsys)
    assert list(found) == ["logprobs_of_known_slope", "linear_logprobs", "full_logprobs"]
    for row in found.values():
        assert row["operations"] == 6 * 40 * 16 * 300
        rate = row["gemm_gflops_per_second"] * 1e9
        assert row["limit_seconds"] == pytest.approx(row["operations"] / rate, rel=0.01)


def test_both_forms_of_logprobs_are_equal():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator)
    weight = torch.randn(11, 5, generator=generator)
    targets = torch.randint(11, (7,), generator=generator)
    ours = linear_logprobs(hidden, weight, targets)
    torch.testing.assert_close(full_logprobs(hidden, weight, targets), ours)


def test_operations_of_attention_worked_by_hand(capsys):
    # a sequence of 3 tokens has 1 + 2 + 3 = 6 pairs, one of 2 has 3; six products of
    # 2 * 4 operations a pair, for 2 heads
    found = figures(
        "attention --lengths 3,2 --heads 2 --kv_heads 1 --head_dim 4 --repeats 1", capsys
    )
    assert found["attention"]["operations"] == 6 * 2 * 4 * 2 * 9
    assert found["attention_forward"]["operations"] == 2 * 2 * 4 * 2 * 9
    assert found["attention"]["backend"] == "sdpa"


def test_memory_is_the_peak_over_that_before():
    cost = measure(lambda: np.ones(2**25).sum(), repeats=1)  # 256 MiB
    if cost.extra_bytes is not None:
        assert 0.9 * 2**28 < cost.extra_bytes < 1.3 * 2**28


def test_time_is_the_median():
    waits = iter([0.0, 0.05, 0.0, 0.2])  # the first call measures memory
    cost = measure(lambda: time.sleep(next(waits)), repeats=3)
    assert 0.05 <= cost.seconds < 0.2
    assert cost.fastest < 0.05


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (SamplerBenchConfig, {"model": "m", "repeats": 0}, "repeats=0: must be at least 1"),
        (LogprobBenchConfig, {"num_tokens": 0}, "num_tokens=0: must be at least 1"),
        (AttentionBenchConfig, {"lengths": "5,x"}, "lengths=5,x: must be positive numbers"),
        (AttentionBenchConfig, {"heads": 3, "kv_heads": 2}, "heads=3: must be a multiple of"),
        (PackingBenchConfig, {"sizes": "128"}, "sizes=128: must be like 128x1200"),
        (PackingBenchConfig, {"sizes": "1x300"}, "300 tokens: must be over twice prompt_tokens"),
        (PackingBenchConfig, {"sizes": "1x9000"}, "at most half of max_tokens_per_gpu=16384"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
