"""The loop's guards. That the loop itself is right: test_step_exactness, test_learning, and tests/launch/test_cli.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import Problem
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.rollout import Rollout, rollout_prompts
from verippo.rl.train import State, _count_skips, _roll_out, _stop_on_gap

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
    rollouts = _roll_out(a_run(drawn), PROMPTS, SamplingParams(), version=4)
    assert [r.problem.index for r in rollouts] == [0, 1, 2]


@pytest.mark.parametrize("given", [2, 4])
def test_a_rollout_function_that_gives_another_count_is_refused(given):
    run = a_run(lambda prompts: (drawn(prompts) * 2)[:given])
    with pytest.raises(
        ValueError,
        match=f"the rollout function gave {given} rollouts for 3 prompts: it must give one each",
    ):
        _roll_out(run, PROMPTS, SamplingParams(), version=4)


def test_rollouts_of_another_weight_version_are_refused():
    def stale(prompts):
        return [*drawn(prompts[:2]), *drawn(prompts[2:], version=3)]

    with pytest.raises(
        RuntimeError, match="rollout 2 was drawn with weight version 3, the trainer's is 4"
    ):
        _roll_out(a_run(stale), PROMPTS, SamplingParams(), version=4)


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
        _roll_out(run, PROMPTS, SamplingParams(), version=4)


def test_skipped_steps_are_counted_and_several_in_a_row_end_the_run_with_its_rollouts_saved(
    tmp_path,
):
    config, state = replace(CONFIG, max_skipped_steps=2), State(step=6)
    for applied in (False, True, False):
        _count_skips(config, state, applied, tmp_path, drawn(PROMPTS))
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 1)
    with pytest.raises(
        RuntimeError, match="2 optimizer steps in a row .* not finite; see .*rollouts-step-7.json"
    ):
        _count_skips(config, state, False, tmp_path, drawn(PROMPTS))
    saved = json.loads((tmp_path / "rollouts-step-7.json").read_text())
    assert [row["problem"]["question"] for row in saved] == ["0?", "1?", "2?"]
    assert saved[0]["response_ids"] == [6]


def test_a_sampler_far_from_the_trainer_ends_the_run():
    _stop_on_gap(CONFIG, {"step": 2, "sampler_logprob_gap_mean": 0.99})
    with pytest.raises(
        RuntimeError, match="step 2: the sampler's log-probs are 1.5 nats from the trainer's"
    ):
        _stop_on_gap(CONFIG, {"step": 2, "sampler_logprob_gap_mean": 1.5})
