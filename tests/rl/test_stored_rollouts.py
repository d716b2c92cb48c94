"""Rollouts kept on disk: what a row holds, and that a resumed run repeats its files exactly."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import Problem
from verippo.core.training.packing import pack
from verippo.rl import ppo
from verippo.rl.config import KLConfig, PPOConfig, VerifierConfig
from verippo.rl.critic_training import with_returns
from verippo.rl.experience import Experience
from verippo.rl.rollout import Rollout
from verippo.rl.stored_rollouts import discard_after, load_stored, stored_rows, write_step
from verippo.rl.train import train


def a_rollout(index, prompt, response):
    return Rollout(
        problem=Problem(question=f"{index}?", answer="yes", index=index),
        prompt_ids=prompt,
        response_ids=response,
        sampler_logprobs=[-0.1] * len(response),
        text="text",
        sample=index,
        version=3,
    )


def test_row_holds_the_tokens_of_its_response_and_null_without_verdict():
    rollouts = [
        a_rollout(0, [5, 6], [7, 8, 2]),
        a_rollout(1, [5], [9]),
        a_rollout(2, [5, 5, 5], [4, 2]),
    ]
    trained = [rollouts[0], rollouts[2]]
    batch = pack(trained)
    count = torch.arange(batch.num_tokens) + 0.1  # 5 tokens of the first, 5 of the second
    bad = torch.where(batch.response_mask, count, math.nan)
    bad[2] = math.inf
    experience = Experience(
        batch=batch,
        logprobs=-count,
        values=bad,
        advantages=count,
        returns=count,
        ref_logprobs=count + 20,
        rewards=count + 10,
    )
    scores = torch.tensor([1.0, math.nan, 0.1], dtype=torch.float64)
    rows = stored_rows(rollouts, scores, trained, experience)
    assert [row["score"] for row in rows] == [1.0, None, 0.1]
    assert rows[0] == {
        "problem": {"question": "0?", "answer": "yes", "index": 0},
        "prompt_ids": [5, 6],
        "response_ids": [7, 8, 2],
        "response_mask": None,
        "text": "text",
        "truncated": False,
        "sample": 0,
        "version": 3,
        "score": 1.0,
        "sampler_logprobs": [-0.1, -0.1, -0.1],
        "logprobs": [-2.1, -3.1, -4.1],
        "ref_logprobs": [22.1, 23.1, 24.1],
        "values": [None, 3.1, 4.1],
        "rewards": [12.1, 13.1, 14.1],
    }
    assert rows[1]["sampler_logprobs"] == [-0.1]
    assert [rows[1][name] for name in ("logprobs", "ref_logprobs", "values", "rewards")] == [
        None
    ] * 4
    assert rows[2]["values"] == [8.1, 9.1]


def test_later_steps_are_discarded_and_equal_rows_give_equal_bytes(tmp_path):
    folder = tmp_path / "rollouts"
    discard_after(folder, 0)
    files = [write_step(folder, step, [{"a": step}]) for step in (9, 10, 11)]
    first = files[1].read_bytes()
    discard_after(folder, 10)
    assert sorted(folder.iterdir()) == files[:2]
    assert write_step(folder, 10, [{"a": 10}]).read_bytes() == first
    assert files[1].name == "step-000010.jsonl.gz"


def rows_of(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture
def settings(make_model, problems_file, tmp_path):
    return PPOConfig(
        policy=str(make_model("llama", seed=21)),
        data=str(problems_file),
        output=str(tmp_path / "run"),
        keep_rollouts=True,
        verifier=VerifierConfig(kind="exact"),
        sampling=SamplingParams(max_new_tokens=6),
        kl=KLConfig(coef=0.5),
        missing_eos_penalty=0.25,
        steps=3,
        prompts_per_step=4,
        samples_per_prompt=2,
        epochs=1,
        max_prompt_tokens=80,
        max_tokens_per_gpu=512,
        policy_learning_rate=1e-2,
        save_every=1,
        save_total_limit=5,
        log_to="jsonl",
        dtype="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
    )


def test_kept_rollouts_rebuild_the_rewards_and_are_repeated_on_resume(settings, tmp_path):
    folder = train(settings, resolved={})
    files = sorted((folder / "rollouts").iterdir())
    assert [path.name for path in files] == [f"step-00000{n}.jsonl.gz" for n in (1, 2, 3)]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for step, (path, measured) in enumerate(zip(files, metrics, strict=True)):
        rows = rows_of(path)
        assert len(rows) == 8
        assert {row["version"] for row in rows} == {step}
        assert sum(row["score"] for row in rows) / 8 == pytest.approx(measured["score_mean"])
        for row in rows:
            kl = [a - b for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True)]
            rewards = [-0.5 * x for x in kl]
            rewards[-1] += row["score"] - 0.25 * row["truncated"]
            assert row["rewards"] == pytest.approx(rewards, abs=1e-6)
            assert len(row["values"]) == len(row["response_ids"])
    assert any(abs(x) > 1e-3 for row in rows for x in row["rewards"][:-1])
    before = [path.read_bytes() for path in files]
    files[2].write_bytes(b"of the run that was killed")
    later = folder / "rollouts" / "step-000004.jsonl.gz"
    later.write_bytes(b"of another run")
    resume = str(folder / "checkpoints" / "step-00000001")
    train(replace(settings, resume=resume), resolved={})
    assert [path.read_bytes() for path in files] == before
    assert not later.exists()


def test_returns_of_stored_rollouts_are_those_of_ppo(settings, monkeypatch):
    """Those of lam_critic=1, which do not depend on the critic."""
    seen = []
    compute_advantages = ppo.gae

    def gae(*args, **options):
        seen.append(compute_advantages(*args, **options))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "gae", gae)
        one_step = replace(settings, steps=1, lam=0.5, lam_critic=1.0, gamma=0.9)
        folder = train(one_step, resolved={})
    ((_, expected),) = seen
    stored = load_stored(str(folder / "rollouts"), limit=None, max_tokens=512, vocabulary=320)
    returns = with_returns(stored, gamma=0.9).returns
    torch.testing.assert_close(returns, expected, atol=1e-5, rtol=0)
    assert float(expected.abs().max()) > 0.1


def test_without_the_option_nothing_is_kept(settings):
    folder = train(replace(settings, keep_rollouts=False, steps=1), resolved={})
    assert not (folder / "rollouts").exists()
