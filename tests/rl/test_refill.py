"""Groups with equal scores are dropped and refilled, and the draws stay exact."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from verippo.core.sampling.sampler import SamplingParams, draw_seed
from verippo.core.text.data import Problem
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.refill import groups_that_differ, refill
from verippo.rl.rollout import rollout_prompts
from verippo.rl.train import train

NAN = math.nan


def drawn(*problems, samples=2):
    """Rollouts of two tokens, `samples` for each problem."""
    return [
        SimpleNamespace(problem=SimpleNamespace(index=n), num_trained=2)
        for n in problems
        for _ in range(samples)
    ]


@pytest.mark.parametrize(
    ("scores", "differ"),
    [
        ([1.0, 0.0], True),
        ([1.0, 1.0], False),
        ([0.0, 0.0], False),
        ([1.0, NAN], False),  # one verdict teaches nothing
        ([NAN, NAN], False),
    ],
)
def test_a_group_teaches_if_its_verdicts_differ(scores, differ):
    found = groups_that_differ(drawn(7), torch.tensor(scores))
    assert found == [differ, differ]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 1.0, NAN])), max_size=30))
@settings(max_examples=100, deadline=None)
def test_groups_are_found_by_problem_in_any_order(pairs):
    rollouts = [SimpleNamespace(problem=SimpleNamespace(index=n)) for n, _ in pairs]
    scores = torch.tensor([score for _, score in pairs])
    expected = []
    for n, _ in pairs:
        own = [score for other, score in pairs if other == n and not math.isnan(score)]
        expected.append(bool(own) and min(own) < max(own))
    assert groups_that_differ(rollouts, scores) == expected


def refilled(first, rounds, more):
    """Refills scores of two samples a prompt; returns the result and what was asked for."""
    rounds_given = iter(more)
    asked = []
    number = len(first) // 2

    def sample(count, so_far):
        asked.append((count, len(so_far)))
        scores = next(rounds_given)
        assert len(scores) == 2 * count  # two samples of each prompt
        start = len(so_far) // 2
        return drawn(*range(start, start + count)), torch.tensor(scores).double()

    result = refill(
        drawn(*range(number)),
        torch.tensor(first).double(),
        sample,
        rounds=rounds,
        samples_per_prompt=2,
        right_score=1.0,
    )
    return *result, asked


def test_groups_are_refilled_until_none_is_missing():
    first = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    rollouts, scores, metrics, asked = refilled(first, 5, [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0]])
    assert [r.problem.index for r in rollouts] == [0, 0, 3, 3, 5, 5]
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert asked == [(2, 6), (1, 10)]
    assert metrics == {
        "groups_dropped": 3,
        "groups_refilled": 2,
        "groups_missing": 0,
        "sampled_score_mean": 5 / 12,
        "sampled_right_rate": 5 / 12,
        "tokens_sampled": 24,
        "responses_sampled": 12,
    }


def test_at_the_bound_the_step_trains_on_what_there_is(capsys):
    rollouts, scores, metrics, asked = refilled([1.0, 0.0, 1.0, 1.0], 1, [[NAN, 1.0]])
    assert [r.problem.index for r in rollouts] == [0, 0]
    assert scores.tolist() == [1.0, 0.0]
    assert asked == [(1, 4)]
    assert (metrics["groups_dropped"], metrics["groups_missing"]) == (2, 1)
    assert metrics["sampled_score_mean"] == 4 / 5  # of those with a verdict
    said = "1 of 2 groups still have equal scores at refill_groups=1: training on the other 1\n"
    assert capsys.readouterr().out == said


def test_without_any_difference_the_first_rollouts_are_kept(capsys):
    rollouts, scores, metrics, _ = refilled([1.0, 1.0], 1, [[0.0, 0.0]])
    assert scores.tolist() == [1.0, 1.0]
    assert [r.problem.index for r in rollouts] == [0, 0]
    assert metrics["groups_missing"] == 1
    assert "training on all of the first ones" in capsys.readouterr().out


def test_nothing_is_sampled_where_no_group_is_missing():
    _, _, metrics, asked = refilled([1.0, 0.0], 3, [])
    assert asked == []
    assert metrics["groups_dropped"] == 0


def test_a_problem_drawn_again_in_a_step_has_new_draws():
    problem = Problem(question="?", answer="a", index=4)
    prompts = rollout_prompts([problem], [[5]], seed=1, step=3, samples=2, drawn={4: 2})
    assert [(p.sample, p.seed) for p in prompts] == [
        (2, draw_seed(1, 3, 4, 2)),
        (3, draw_seed(1, 3, 4, 3)),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"samples_per_prompt": 4},
        {"advantage": "reinforce++"},
        {"advantage": "rloo", "samples_per_prompt": 4, "advantage_function": "m:f"},
    ],
)
def test_refilling_needs_groups(options):
    with pytest.raises(ValueError, match="refill_groups=2 replaces groups of equal scores: it nee"):
        PPOConfig(
            policy="m",
            data="d",
            output="o",
            steps=1,
            verifier=VerifierConfig(kind="exact"),
            refill_groups=2,
            **options,
        )


# --- whole runs ---

PRESENT = """
def score(rollouts):
    return [float("e" in r.text.split()) for r in rollouts]
"""


@pytest.fixture
def refilling(task, tmp_path):
    (tmp_path / "present.py").write_text(PRESENT)
    return task | {
        "verifier": VerifierConfig(kind="function", function="present:score"),
        "sampling": SamplingParams(max_new_tokens=3),
        "advantage": "grpo",
        "samples_per_prompt": 3,
        "prompts_per_step": 4,
        "refill_groups": 2,
        "policy_learning_rate": 1e-3,
        "steps": 4,
        "save_every": 2,
        "max_logprob_gap": 1e-3,
    }


def run(**options):
    return train(PPOConfig(**options), resolved={})


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds_", "tokens_per_second", "peak_memory")
    return [
        {key: value for key, value in row.items() if not key.startswith(machine)} for row in rows
    ]


def test_a_resumed_run_draws_the_same_refills(refilling, tmp_path):
    whole = run(**refilling | {"output": str(tmp_path / "whole")})
    rows = rows_of(whole)
    assert sum(row["groups_refilled"] for row in rows) > 0
    assert rows[-1]["episodes"] == sum(row["responses_sampled"] for row in rows) > 4 * 12
    for row in rows:
        assert row["responses_sampled"] == 3 * (4 + row["groups_dropped"] - row["groups_missing"])
        assert row["score_right_rate"] not in (0.0, 1.0)
    run(**refilling | {"steps": 2})
    folder = run(**refilling)
    assert rows_of(folder) == rows
    first, second = (load_file(path / "model" / "model.safetensors") for path in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)
