"""Runs with staleness=1: what they train on, and that they end with the same bits after faults."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.sampling.process_sampler import ProcessSampler
from verippo.core.training.engine import TrainEngine
from verippo.launch import cli
from verippo.rl.verifier import FunctionVerifier

SCORES = {"verifier.kind": "function", "verifier.function": "own_scores:score"}
STALE = {"staleness": 1, "correction.level": "token"} | SCORES
OWN_SCORES = """
def score(rollouts):
    return [sum(rollout.response_ids) % 7 / 7 for rollout in rollouts]
"""
OWN_ENGINE = """
import hashlib, json, os
import torch
from verippo.core.sampling.local_sampler import load_sampler

class Engine:
    def __init__(self, path, stops):
        self.sampler = load_sampler(path, dtype="fp32", device=torch.device("cpu"),
                                    stop_token_ids=stops, max_batch=8)
        self.weights = ""

    def update_weights(self, named_tensors, version):
        digest = hashlib.sha256()
        def read():
            for name, tensor in named_tensors:
                digest.update(tensor.numpy().tobytes())
                yield name, tensor
        self.sampler.update_weights(read(), version)
        self.weights = digest.hexdigest()
        self.write("push", version)

    def generate(self, prompts, params):
        self.write("sample", len(prompts))
        return self.sampler.generate(prompts, params)

    def write(self, what, number):
        with open(os.environ["ENGINE_LOG"], "a") as file:
            file.write(json.dumps([what, number, self.weights]) + "\\n")
"""


FAILING_ROLLOUT = """
from verippo.rl import rollout as original

CALLS = []

def rollout(sampler, prompts, sampling, *, tokenizer):
    CALLS.append(1)
    if len(CALLS) == 3:
        raise ValueError("no such tool")
    return original.rollout(sampler, prompts, sampling, tokenizer=tokenizer)
"""


@pytest.fixture(scope="module", autouse=True)
def own_functions(tmp_path_factory):
    """The working directory, with functions of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_scores.py").write_text(OWN_SCORES)
    (folder / "own_engine.py").write_text(OWN_ENGINE)
    (folder / "failing_rollout.py").write_text(FAILING_ROLLOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.fixture(scope="module")
def unbroken_stale(runs, tmp_path_factory):
    """Folder of an uninterrupted run with staleness=1 on one rank."""
    folder = tmp_path_factory.mktemp("stale") / "run"
    cli.main(runs.arguments("ppo", folder, **STALE, log_samples_every=1))
    return folder


def arguments(runs, output, **changes):
    return runs.arguments("ppo", output, **STALE, log_samples_every=1, **changes)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_every_step_but_the_first_lags_one_version(unbroken_stale, rows_of):
    rows = rows_of(unbroken_stale)
    assert [row["rollout_staleness"] for row in rows] == [0, 1, 1, 1, 1, 1, 1]
    assert [row["weight_version"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(row["ratio_first_minibatch_max"] < 1e-6 for row in rows)
    # the correction has something to correct from the second step on
    assert rows[0]["sampler_logprob_gap_mean"] < 1e-5 < rows[1]["sampler_logprob_gap_mean"]
    assert rows[1]["correction_sample_size"] < 1


def test_policy_that_stands_still_makes_staleness_no_difference(runs, rows_of, tmp_path):
    """The critic's weights and every metric are then those of a run without."""
    still = {"policy_learning_rate": 0, "correction.level": "token", "steps": 4} | SCORES
    for staleness in (0, 1):
        argv = runs.arguments("ppo", tmp_path / str(staleness), staleness=staleness, **still)
        cli.main(argv)
    fresh, stale = (rows_of(tmp_path / name) for name in ("0", "1"))
    assert [row.pop("rollout_staleness") for row in fresh] == [0, 0, 0, 0]
    assert [row.pop("rollout_staleness") for row in stale] == [0, 1, 1, 1]
    assert fresh == stale
    assert rows_of(tmp_path / "0", "eval") == rows_of(tmp_path / "1", "eval")


def test_weights_that_sampled_are_those_of_the_step_before_last(
    runs, unbroken_stale, check_same, tmp_path, monkeypatch
):
    """An engine of the user's own, in a thread of the trainer, draws as the process does."""
    monkeypatch.setenv("ENGINE_LOG", str(tmp_path / "log"))
    factory = {"sampler.kind": "factory", "sampler.factory": "own_engine:Engine"}
    cli.main(arguments(runs, tmp_path / "run", **factory))
    check_same(tmp_path / "run", unbroken_stale)
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    held = {number: digest for what, number, digest in entries if what == "push"}
    assert len(set(held.values())) == 8
    num_prompts = 6
    drew = [digest for what, number, digest in entries if (what, number) == ("sample", num_prompts)]
    # step 1 and 2 by version 0, step n by version n - 2
    assert drew == [held[0], held[0], held[1], held[2], held[3], held[4], held[5]]
    evaluated = [digest for what, number, digest in entries if (what, number) == ("sample", 4)]
    assert evaluated == [held[0], held[3], held[6], held[7]]


def test_run_killed_twice_ends_with_the_same_bits(
    runs, unbroken_stale, check_same, start, wait_for_steps, tmp_path
):
    argv = arguments(runs, tmp_path / "run", save_every=2)
    for round_ in range(2):
        process = start("-m", "verippo.launch.cli", *argv)
        wait_for_steps(tmp_path / "run", 1 + 2 * round_, process)
        time.sleep(random.uniform(0.0, 0.4))
        process.kill()
        process.wait()
    cli.main(argv)
    check_same(tmp_path / "run", unbroken_stale)


PLACES = {
    "scoring": (FunctionVerifier, "score", 4),
    "evaluation": (FunctionVerifier, "score", 5),
    "first mini-batch": (TrainEngine, "backward", 17),
    "optimizer step": (TrainEngine, "step", 17),
    "wait for the background": (ProcessSampler, "update_weights", 3),
}


@pytest.mark.parametrize("place", PLACES)
def test_signal_at_any_place_resumes_bit_for_bit(
    place, runs, unbroken_stale, check_same, tmp_path, monkeypatch, capsys
):
    owner, name, call = PLACES[place]
    real = getattr(owner, name)
    calls = []

    def signalled(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    argv = arguments(runs, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    assert "is saved in" in out
    cli.main(argv)
    check_same(tmp_path / "run", unbroken_stale)


def test_signal_to_the_whole_group_spares_the_sampling_process(
    runs, unbroken_stale, check_same, start, wait_for_steps, tmp_path
):
    argv = arguments(runs, tmp_path / "run")
    process = start("-m", "verippo.launch.cli", *argv)
    wait_for_steps(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    cli.main(argv)
    check_same(tmp_path / "run", unbroken_stale)


def test_killed_sampling_process_ends_the_run_with_its_signal(runs, tmp_path, monkeypatch):
    real = ProcessSampler.update_weights

    def killing(self, named_tensors, version):
        if version == 2:
            self.interrupt()
        return real(self, named_tensors, version)

    monkeypatch.setattr(ProcessSampler, "update_weights", killing)
    with pytest.raises(RuntimeError, match="the sampling process was ended by SIGKILL"):
        cli.main(arguments(runs, tmp_path / "run"))


def test_failing_rollout_function_in_the_background_is_one_line(runs, tmp_path, capsys):
    argv = arguments(
        runs,
        tmp_path / "run",
        rollout_function="failing_rollout:rollout",
        eval_fraction=0.0,
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "verippo: ppo: no such tool"


def test_two_ranks_train_as_one_does_and_resume_bit_for_bit(
    runs, unbroken_stale, check_same, rows_of, start_ranks, wait_for_steps, tmp_path
):
    whole = tmp_path / "whole"
    for rank in start_ranks(arguments(runs, whole)):
        _, err = rank.communicate(timeout=900)
        assert rank.returncode == 0, err[-3000:]
    assert [row["rollout_staleness"] for row in rows_of(whole)] == [0, 1, 1, 1, 1, 1, 1]
    one, two = weights(unbroken_stale), weights(whole)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4

    broken = tmp_path / "broken"
    argv = arguments(runs, broken, save_every=2)
    ranks = start_ranks(argv)
    wait_for_steps(broken, 3, ranks[0])
    for rank in ranks:
        rank.kill()
        rank.wait()
    for rank in start_ranks(argv):
        _, err = rank.communicate(timeout=900)
        assert rank.returncode == 0, err[-3000:]
    check_same(broken, whole)


def test_longer_run_goes_on_after_the_end_of_a_shorter_one(runs, rows_of, tmp_path):
    cli.main(arguments(runs, tmp_path / "run", steps=2))
    cli.main(arguments(runs, tmp_path / "run", steps=4))
    assert [row["rollout_staleness"] for row in rows_of(tmp_path / "run")] == [0, 1, 0, 1]


def test_staleness_cannot_change_within_a_run(runs, tmp_path, capsys):
    cli.main(arguments(runs, tmp_path / "run", steps=1))
    with pytest.raises(SystemExit) as caught:
        cli.main(runs.arguments("ppo", tmp_path / "run", steps=2, **SCORES))
    assert caught.value.code == 2
    assert "staleness 1 -> 0: set them back" in capsys.readouterr().err


def test_waiting_rollouts_are_in_the_checkpoint(unbroken_stale):
    *kept, last = sorted((unbroken_stale / "checkpoints").glob("step-*"))
    assert kept
    for folder in kept:
        waiting = torch.load(folder / "rollouts.pt", weights_only=False)
        assert len(waiting) == 6
        step = int(folder.name.removeprefix("step-"))
        assert {rollout.version for rollout in waiting} == {step - 1}
    assert last.name == "step-00000007"
    assert torch.load(last / "rollouts.pt", weights_only=False) is None
