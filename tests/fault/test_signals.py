"""SIGINT, SIGTERM and SIGUSR1 save the last finished step; the same command goes on from there."""

from __future__ import annotations

import random
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch

from verippo.core.training import checkpoint
from verippo.core.training.engine import TrainEngine
from verippo.launch import cli
from verippo.rl.verifier import ExactMatchVerifier

STEPS = {"sft": 9, "verifier": 9, "ppo": 7}


def stopped(argv, capsys):
    """Exit status, standard output and standard error of a command that a signal ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return caught.value.code, *capsys.readouterr()


def signal_at(monkeypatch, owner, name, number, call):
    """Sends a signal to this process inside the `call`-th call of a function."""
    real = getattr(owner, name)
    calls = []

    def function(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


# (stage, function, call of it, step that is then the last finished one)
PLACES = {
    "second micro-batch of a step": ("sft", (TrainEngine, "backward"), 8, 2),
    "optimizer step": ("sft", (TrainEngine, "step"), 5, 5),
    "optimizer step before an evaluation": ("sft", (TrainEngine, "step"), 6, 6),
    "verifier's micro-batch": ("verifier", (TrainEngine, "backward"), 7, None),
    "scoring": ("ppo", (ExactMatchVerifier, "score"), 4, 2),  # the first call is an evaluation
    "evaluation": ("ppo", (ExactMatchVerifier, "score"), 5, 3),
    "first mini-batch": ("ppo", (TrainEngine, "backward"), 17, None),
    "second mini-batch, after an update": ("ppo", (TrainEngine, "step"), 17, 3),
    "last step": ("ppo", (TrainEngine, "step"), 8 * 7, 7),
}


@pytest.mark.parametrize("place", PLACES)
def test_signal_at_any_place_resumes_bit_for_bit(
    place, runs, unbroken, check_same, rows_of, tmp_path, monkeypatch, capsys
):
    stage, target, call, step = PLACES[place]
    argv = runs.arguments(stage, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, *target, signal.SIGTERM, call)
        code, out, err = stopped(argv, capsys)
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("verippo:")]
    (saved,) = re.findall(r"step (\d+) is saved in", line)
    assert code == 0
    assert rows_of(tmp_path / "run")[-1]["step"] == int(saved)
    assert step is None or int(saved) == step
    command = line.partition("to go on: ")[2]
    assert shlex.split(command) == ["verippo", *argv]
    cli.main(argv)
    if step != STEPS[stage]:
        assert f"resuming after step {saved} of {STEPS[stage]}" in capsys.readouterr().out
    check_same(tmp_path / "run", unbroken(stage))


def test_signal_during_sampling_ends_it_at_once(
    runs, unbroken, check_same, tmp_path, monkeypatch, capsys
):
    from verippo.core.sampling.local_sampler import LocalSampler

    argv = runs.arguments("ppo", tmp_path / "run")
    real = LocalSampler.generate
    calls = []

    def slow(self, *args):
        calls.append(args)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(300)
        return real(self, *args)

    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(LocalSampler, "generate", slow)
        code, out, err = stopped(argv, capsys)
    assert time.monotonic() - begun < 100
    assert code == 0
    assert "SIGTERM: step 3 is saved in" in out
    cli.main(argv)
    check_same(tmp_path / "run", unbroken("ppo"))


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    runs, unbroken, check_same, tmp_path, monkeypatch, capsys
):
    argv = runs.arguments("sft", tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, TrainEngine, "step", signal.SIGINT, 5)
        code, _, err = stopped(argv, capsys)
    assert code == 130
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    assert f"interrupted: step 5 is saved in {path}; the same command resumes\n" in err
    with monkeypatch.context() as patch:
        signal_at(patch, TrainEngine, "step", signal.SIGINT, 2)
        code, _, err = stopped([*argv, "--resume", str(path)], capsys)
    assert code == 130
    assert "step 7 is saved in" in err
    assert "the same command with --resume auto resumes" in err  # it names step 5
    cli.main(argv)
    check_same(tmp_path / "run", unbroken("sft"))


def test_signal_in_the_first_step_says_that_nothing_is_saved(runs, tmp_path, monkeypatch, capsys):
    argv = runs.arguments("sft", tmp_path / "run", eval_fraction=0.0)
    with monkeypatch.context() as patch:
        signal_at(patch, TrainEngine, "backward", signal.SIGUSR1, 1)
        code, out, err = stopped(argv, capsys)
    assert code == 0
    assert "SIGUSR1: no step is finished, so that nothing is saved; to go on: verippo sft" in out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_start_without_a_checkpoint_says_that_it_starts_over(runs, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1}\n')
    cli.main(runs.arguments("sft", output, max_steps=1))
    assert "has metrics of an earlier start but no checkpoint: starting over" in (
        capsys.readouterr().out
    )


def test_failed_save_after_a_signal_is_an_error(runs, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "save", full)
    signal_at(monkeypatch, TrainEngine, "step", signal.SIGTERM, 2)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(runs.arguments("sft", tmp_path / "run", eval_fraction=0.0))


@pytest.mark.parametrize(("stage", "number"), [("sft", signal.SIGUSR1), ("ppo", signal.SIGINT)])
def test_signal_from_outside_at_any_moment(
    stage, number, runs, unbroken, check_same, start, wait_for_steps, tmp_path
):
    argv = runs.arguments(stage, tmp_path / "run")
    process = start("-m", "verippo.launch.cli", *argv)
    wait_for_steps(tmp_path / "run", 2, process)
    time.sleep(random.uniform(0.0, 0.3))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 0), err
    assert "Traceback" not in err
    line = f"{out}{err}"
    if "is saved in" in line:  # otherwise it was faster
        assert ("interrupted: step" if number == signal.SIGINT else "SIGUSR1: step") in line
    cli.main(argv)
    check_same(tmp_path / "run", unbroken(stage))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_while_loading_ends_at_once_with_a_line(
    number, runs, start, wait_for_handler, tmp_path
):
    argv = runs.arguments("ppo", tmp_path / "run")
    process = start("-m", "verippo.launch.cli", *argv)
    wait_for_handler(process.pid, number)
    time.sleep(random.uniform(0.0, 1.0))
    process.send_signal(number)
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == (130 if number == signal.SIGINT else 0), err
    line = f"{out}{err}"
    assert "no step was taken since this start" in line
    assert "Traceback" not in line
    name = "interrupted" if number == signal.SIGINT else number.name
    assert f"verippo: {name}: " in line


def test_users_own_draws_are_repeated_after_a_resume(
    runs, tmp_path, monkeypatch, capsys, rows_of, check_same
):
    """A rollout function that draws from the global generators resumes bit for bit."""
    (tmp_path / "drawing.py").write_text(
        "import random\nimport numpy, torch\nfrom dataclasses import replace\n"
        "from verippo.rl.rollout import rollout\n"
        "def draw(sampler, prompts, sampling, *, tokenizer):\n"
        "    for number in range(len(prompts)):\n"
        "        seed = int(torch.randint(99, (1,))) + random.randrange(99) + numpy.random.randint(99)\n"
        "        prompts[number] = replace(prompts[number], seed=seed)\n"
        "    return rollout(sampler, prompts, sampling, tokenizer=tokenizer)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = {"rollout_function": "drawing:draw", "steps": 5}
    cli.main(runs.arguments("ppo", tmp_path / "unbroken", **changes))
    argv = runs.arguments("ppo", tmp_path / "run", **changes)
    with monkeypatch.context() as patch:
        signal_at(patch, TrainEngine, "backward", signal.SIGTERM, 17)
        assert stopped(argv, capsys)[0] == 0
    torch.manual_seed(1)
    random.seed(1)
    cli.main(argv)
    check_same(tmp_path / "run", tmp_path / "unbroken")
    (newest, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert not list(Path(newest).glob("rng-*"))
