"""It learns: on a task whose optimum is known, a random policy gets there, without a critic and
with one."""

from __future__ import annotations

import json

from verippo.rl.config import PPOConfig
from verippo.rl.train import train


def learn(**settings):
    """The metrics of every step."""
    folder = train(PPOConfig(**settings), resolved={})
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def test_policy_gradient_alone_learns_the_task(task):
    rows = learn(**task, advantage="rloo", samples_per_prompt=4, epochs=2)
    print("score", [round(row["score_mean"], 2) for row in rows])
    assert rows[0]["score_mean"] < 0.2  # chance is 1 in 12
    assert mean(rows[-5:], "score_mean") >= 0.95
    assert all(row["value_loss"] == 0 for row in rows)


def test_with_a_critic_it_learns_the_task_and_the_critic_learns_what_to_expect(task):
    """With gamma below 1 what a state is worth depends on how far the end is: so there is something
    to predict even when
    every response has become the same."""
    rows = learn(
        **task,
        samples_per_prompt=4,
        epochs=2,
        gamma=0.9,
        lam=0.95,
        critic_learning_rate=1e-2,
        value_clip=None,
    )
    print("score", [round(row["score_mean"], 2) for row in rows])
    print("explained variance", [round(row["explained_variance"], 2) for row in rows])
    assert rows[0]["score_mean"] < 0.2
    assert (
        abs(rows[0]["explained_variance"]) < 1e-6
    )  # a critic whose head starts at zero explains nothing
    assert mean(rows[-5:], "score_mean") >= 0.95
    assert mean(rows[-5:], "explained_variance") > 0.5
