"""The loop's guards.

That the loop itself is right: test_step_exactness, test_learning, and tests/launch/test_cli.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import Problem
from verippo.core.training.run import RunState, TrainingRun
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.rollout import Rollout, rollout_prompts
from verippo.rl.run import roll_out, save_rollouts
from verippo.rl.step_metrics import check_logprob_gap

PROBLEMS = [Problem(question=f"{n}?", answer=str(n), index=n) for n in range(3)]
PROMPTS = rollout_prompts(PROBLEMS, [[5]] * 3, seed=0, step=1, samples=1)
CONFIG = PPOConfig(policy="p", data="d", output="o", steps=3, verifier=VerifierConfig(kind="exact"))


def drawn(prompts, version=4):
    return [
        Rollout(
            problem=p.problem,
            prompt_ids=p.token_ids,
            response_ids=[6],
            sampler_logprobs=[-1.0],
            text="x",
            version=version,
        )
        for p in prompts
    ]


def a_run(function):
    def rollout(sampler, prompts, sampling, *, tokenizer):
        return function(prompts)

    policy = SimpleNamespace(
        module=SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace(vocab_size=10)))
    )
    return SimpleNamespace(rollout=rollout, sampler=None, tokenizer=None, policy=policy)


def test_rollouts_come_in_the_prompts_order():
    rollouts = roll_out(a_run(drawn), PROMPTS, SamplingParams(), version=4)
    assert [r.problem.index for r in rollouts] == [0, 1, 2]


@pytest.mark.parametrize("given", [2, 4])
def test_a_rollout_function_that_gives_another_count_is_refused(given):
    run = a_run(lambda prompts: (drawn(prompts) * 2)[:given])
    with pytest.raises(
        ValueError,
        match=f"the rollout function returned {given} rollouts for 3 prompts: it must return one for each",
    ):
        roll_out(run, PROMPTS, SamplingParams(), version=4)


def test_rollouts_of_another_weight_version_are_refused():
    def stale(prompts):
        return [*drawn(prompts[:2]), *drawn(prompts[2:], version=3)]

    with pytest.raises(
        RuntimeError, match="rollout 2 was sampled with weight version 3, the trainer's is 4"
    ):
        roll_out(a_run(stale), PROMPTS, SamplingParams(), version=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler_logprobs": [-1.0, -1.0]}, "has 1 response tokens and 2 sampler log-probs"),
        ({"sampler_logprobs": []}, "has 1 response tokens and 0 sampler log-probs"),
        ({"sampler_logprobs": [math.nan]}, "each token needs a finite one"),
        ({"response_ids": [10]}, "has a token id outside the vocabulary of 10"),
        ({"response_ids": [-1]}, "has a token id outside the vocabulary of 10"),
    ],
)
def test_what_would_train_wrongly_is_refused_by_number(changes, said):
    run = a_run(
        lambda prompts: [
            *drawn(prompts[:1]),
            replace(drawn(prompts)[1], **changes),
            *drawn(prompts[2:]),
        ]
    )
    with pytest.raises(ValueError, match=f"rollout 1 .*{said}"):
        roll_out(run, PROMPTS, SamplingParams(), version=4)


def test_several_skipped_steps_in_a_row_end_the_run(tmp_path):
    run = TrainingRun(
        config=replace(CONFIG, max_skipped_steps=2),
        folder=tmp_path,
        engines={},
        export=lambda folder: None,
        better=lambda new, old: False,
        state=RunState(step=6),
    )
    save_failure = partial(save_rollouts, tmp_path, run.state, drawn(PROMPTS))
    for applied in (False, True, False):
        run.count_skipped(applied, save_failure=save_failure)
    assert (run.state.skipped_steps, run.state.skipped_in_a_row) == (2, 1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        RuntimeError,
        match="2 consecutive optimizer steps .* not finite; see .*rollouts-step-7.json",
    ):
        run.count_skipped(False, save_failure=save_failure)
    saved = json.loads((tmp_path / "rollouts-step-7.json").read_text())
    assert [row["problem"]["question"] for row in saved] == ["0?", "1?", "2?"]
    assert saved[0]["response_ids"] == [6]


def test_a_sampler_far_from_the_trainer_ends_the_run():
    check_logprob_gap({"sampler_logprob_gap_mean": 0.99}, 1.0, step=2)
    with pytest.raises(
        RuntimeError, match="step 2: the sampler's log-probs are 1.5 nats from the trainer's"
    ):
        check_logprob_gap({"sampler_logprob_gap_mean": 1.5}, 1.0, step=2)
