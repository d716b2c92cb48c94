"""Which weights sample which step, and what a checkpoint keeps of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import Problem
from verippo.rl.config import CorrectionConfig, PPOConfig, VerifierConfig
from verippo.rl.rollout import Rollout, rollout_prompts
from verippo.rl.rollout_source import rollout_source

CONFIG = PPOConfig(
    policy="p",
    data="d",
    output="o",
    steps=4,
    staleness=1,
    sampling=SamplingParams(max_new_tokens=5),
    correction=CorrectionConfig(level="token"),
    verifier=VerifierConfig(kind="exact"),
)


class Engine:
    """A sampler that holds nothing but the version of its weights, and a log of what it did."""

    def __init__(self):
        self.version = 0
        self.log = []
        self.may_sample = threading.Event()
        self.may_sample.set()
        self.failure = None

    def rollout(self, sampler, prompts, sampling, *, tokenizer):
        assert self.may_sample.wait(10)
        if self.failure:
            raise self.failure
        self.log.append(("sample", prompts[0].problem.index, self.version))
        return [
            Rollout(
                problem=p.problem,
                prompt_ids=p.token_ids,
                response_ids=[6],
                sampler_logprobs=[-0.1],
                text="x",
                version=self.version,
            )
            for p in prompts
        ]

    def push(self, version):
        self.log.append(("push", version))
        self.version = version


def source_of(engine, config=CONFIG):
    policy = SimpleNamespace(
        module=SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace(vocab_size=10)))
    )
    parts = SimpleNamespace(rollout=engine.rollout, sampler=None, tokenizer=None, policy=policy)

    def prompts(step):
        problems = [Problem(question="?", answer="!", index=step)] * 2
        return rollout_prompts(problems, [[5]] * 2, seed=0, step=step, samples=1)

    return rollout_source(config, parts, prompts=prompts, stop_if_asked=lambda: None)


def trained(source, engine, steps):
    """Runs steps as the loop does: (step of the prompts, version of the weights) of each."""
    seen = []
    for step in steps:
        rollouts = source.take(step)
        assert len(rollouts) == 2
        seen.append((rollouts[0].problem.index, rollouts[0].version))
        source.finish()
        engine.push(step)
    return seen


def test_without_staleness_each_step_is_sampled_by_the_step_befores_weights():
    engine = Engine()
    fresh = replace(CONFIG, staleness=0)
    assert trained(source_of(engine, fresh), engine, [1, 2, 3]) == [(1, 0), (2, 1), (3, 2)]


def test_with_staleness_one_each_step_after_the_first_lags_one_version():
    engine = Engine()
    assert trained(source_of(engine), engine, [1, 2, 3, 4]) == [(1, 0), (2, 0), (3, 1), (4, 2)]
    # sampled before the weights of the step that trained meanwhile arrived; nothing for step 5
    assert engine.log == [
        ("sample", 1, 0),
        ("sample", 2, 0),
        ("push", 1),
        ("sample", 3, 1),
        ("push", 2),
        ("sample", 4, 2),
        ("push", 3),
        ("push", 4),
    ]


def test_take_returns_while_the_next_step_is_sampled_and_finish_waits():
    engine = Engine()
    source = source_of(engine)
    trained(source, engine, [1])
    engine.may_sample.clear()
    assert source.take(2)[0].problem.index == 2
    assert ("sample", 3, 1) not in engine.log
    threading.Timer(0.2, engine.may_sample.set).start()
    source.finish()
    assert engine.log[-1] == ("sample", 3, 1)


@pytest.mark.parametrize("abandoned", [False, True])
def test_checkpoint_keeps_the_rollouts_of_the_next_step_to_be_trained(tmp_path, abandoned):
    engine = Engine()
    source = source_of(engine)
    trained(source, engine, [1, 2])
    if abandoned:  # a signal in step 3 before an update: the state is still that after step 2
        source.take(3)
    source.save(tmp_path, "rollouts")
    source.close()

    resumed_engine = Engine()
    resumed = source_of(resumed_engine)
    resumed.load(tmp_path, "rollouts")
    resumed_engine.push(2)
    assert trained(resumed, resumed_engine, [3, 4]) == [(3, 1), (4, 2)]
    assert resumed_engine.log[1] == ("sample", 4, 2)


def test_run_that_did_not_sample_ahead_goes_on_with_the_newest_weights(tmp_path):
    engine = Engine()
    source = source_of(engine, replace(CONFIG, steps=9))
    source.load(tmp_path, "rollouts")
    engine.push(4)
    assert trained(source, engine, [5, 6, 7]) == [(5, 4), (6, 4), (7, 5)]


@pytest.mark.parametrize("kind", [ValueError, ZeroDivisionError, SystemExit])
def test_failure_in_the_background_reaches_the_main_thread_as_itself(kind):
    engine = Engine()
    source = source_of(engine)
    trained(source, engine, [1])
    engine.failure = kind("no such tool")
    source.take(2)
    with pytest.raises(kind, match="no such tool") as caught:
        source.finish()
    assert caught.value is engine.failure


def test_rollouts_sampled_by_other_weights_are_refused():
    engine = Engine()
    source = source_of(engine)
    trained(source, engine, [1])
    engine.version = 5  # as a server that another run updates
    source.take(2)
    with pytest.raises(RuntimeError, match="sampled with weight version 5, the trainer's is 1"):
        source.finish()
