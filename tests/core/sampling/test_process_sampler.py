from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from verippo.core.sampling import process_sampler
from verippo.core.sampling.local_sampler import load_sampler
from verippo.core.sampling.process_sampler import ProcessSampler
from verippo.core.sampling.sampler import Prompt, SamplingParams, draw_seed
from verippo.core.training.pretrained import load_causal_lm

STOPS = (2, 17, 60, 130)
PARAMS = SamplingParams(temperature=0.7, max_new_tokens=12)
PROMPTS = [
    Prompt(token_ids=[5 + n + k for k in range(size)], seed=draw_seed(3, n))
    for n, size in enumerate([3, 11, 1, 7, 20])
]


def settings(folder):
    return {
        "path": str(folder),
        "dtype": "fp32",
        "device": torch.device("cpu"),
        "stop_token_ids": STOPS,
        "max_batch": 3,
    }


def start(folder):
    options = settings(folder)
    return ProcessSampler(options.pop("path"), **options)


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("qwen3", tied=True, seed=4)


@pytest.fixture(scope="module")
def shared_sampler(folder):
    """A sampler for the tests that leave it working."""
    sampler = start(folder)
    yield sampler
    sampler.close()


@pytest.fixture
def sampler(folder):
    """A sampler that the test may break."""
    sampler = start(folder)
    yield sampler
    sampler.close()


def weights_of(folder):
    return list(load_causal_lm(str(folder), dtype="fp32").named_parameters())


def test_draws_are_the_local_samplers_bit_for_bit(shared_sampler, folder, make_model, monkeypatch):
    options = settings(folder)
    local = load_sampler(options.pop("path"), **options)
    assert shared_sampler.generate(PROMPTS, PARAMS) == local.generate(PROMPTS, PARAMS)
    # each parameter in a piece of its own
    monkeypatch.setattr(process_sampler, "BUCKET_BYTES", 1)
    for version, seed in ((7, 5), (8, 6)):
        weights = weights_of(make_model("qwen3", tied=True, seed=seed))
        shared_sampler.update_weights(weights, version)
        local.update_weights(weights, version)
        drawn = shared_sampler.generate(PROMPTS, PARAMS)
        assert drawn == local.generate(PROMPTS, PARAMS)
        assert {completion.version for completion in drawn} == {version}
    assert shared_sampler.generate([], PARAMS) == []


def test_mistakes_are_refused_as_by_the_local_sampler_and_end_nothing(shared_sampler, folder):
    with pytest.raises(ValueError, match="prompt 1 has token id 999, vocabulary is 320"):
        shared_sampler.generate([PROMPTS[0], Prompt(token_ids=[999])], PARAMS)
    weights = weights_of(folder)
    unknown = [weights[0], ("extra.weight", torch.ones(3)), *weights[1:]]
    with pytest.raises(ValueError, match=r"weight extra\.weight is not a parameter"):
        shared_sampler.update_weights(unknown, 1)
    with pytest.raises(ValueError, match="weights were not sent: "):
        shared_sampler.update_weights(weights[:-1], 1)
    assert len(shared_sampler.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_bug_in_the_child_shows_its_traceback(shared_sampler):
    with pytest.raises(RuntimeError, match=r"sampling process failed:\nTraceback[^$]*max_new_tok"):
        shared_sampler.generate(PROMPTS, None)


def test_model_that_cannot_be_loaded_is_one_error(tmp_path):
    sampler = start(tmp_path / "nothing")
    with pytest.raises((ValueError, RuntimeError), match="nothing"):
        sampler.update_weights([("a", torch.ones(2))], 0)
    sampler.close()


def test_killed_child_is_named_with_its_signal(sampler):
    sampler.generate(PROMPTS, PARAMS)
    os.kill(sampler._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended by SIGKILL: unless somebody sent it, memory"):
        sampler.generate(PROMPTS, PARAMS)
    with pytest.raises(RuntimeError, match="ended by SIGKILL"):
        sampler.update_weights([("a", torch.ones(2))], 1)


def test_signals_of_a_stop_leave_the_child_working(sampler):
    sampler.generate(PROMPTS, PARAMS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(sampler._process.pid, number)
    assert len(sampler.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_interrupt_ends_a_call_in_another_thread(sampler):
    errors = []

    def sample():
        try:
            sampler.generate(PROMPTS * 2000, SamplingParams(max_new_tokens=500))
        except RuntimeError as error:
            errors.append(str(error))

    sampler.generate(PROMPTS, PARAMS)
    thread = threading.Thread(target=sample)
    thread.start()
    time.sleep(0.5)
    sampler.interrupt()
    thread.join(10)
    assert not thread.is_alive()
    assert "ended by SIGKILL" in errors[0]


PARENT = """
import sys, torch
from verippo.core.sampling.process_sampler import ProcessSampler
from verippo.core.sampling.sampler import Prompt, SamplingParams
sampler = ProcessSampler(
    sys.argv[1], dtype="fp32", device=torch.device("cpu"), stop_token_ids=[], max_batch=1
)
sampler.generate([Prompt(token_ids=[5])], SamplingParams(max_new_tokens=1))
print(sampler._process.pid, flush=True)
sampler.generate([Prompt(token_ids=[5])] * 10000, SamplingParams(max_new_tokens=500))
"""


def test_child_ends_with_its_parent_amid_sampling(folder):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True
    )
    child = Path("/proc", parent.stdout.readline().strip())
    assert "serve" in (child / "cmdline").read_text()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while child.exists() and "serve" in (child / "cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
