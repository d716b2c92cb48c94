"""Pre-training of the critic on kept rollouts, from the files to the critic that PPO takes."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.core.training.pretrained import load_critic
from verippo.launch import cli
from verippo.rl.config import KLConfig, PPOConfig, VerifierConfig
from verippo.rl.critic_config import CriticConfig
from verippo.rl.critic_training import _fit_metrics, train, with_returns
from verippo.rl.stored_rollouts import StoredRollout, load_stored, write_step
from verippo.rl.train import train as train_ppo

LOAD = {"limit": None, "max_tokens": 100, "vocabulary": 320}


def row_of(number, **changes):
    draw = random.Random(number)
    response = [draw.randrange(3, 320) for _ in range(draw.randrange(1, 9))]
    row = {
        "problem": {"question": f"question {number % 6}", "answer": "a", "index": number % 6},
        "prompt_ids": [draw.randrange(3, 320) for _ in range(4)],
        "response_ids": response,
        "rewards": [round(draw.gauss(0, 0.1), 3) for _ in response[1:]] + [float(number % 2)],
    }
    return row | changes


@pytest.fixture
def rollouts(tmp_path):
    """Folder with two steps of twelve rollouts."""
    folder = tmp_path / "rollouts"
    for step in (1, 2):
        write_step(folder, step, [row_of(12 * step + n) for n in range(12)])
    return folder


@pytest.fixture
def settings(make_model, rollouts, tmp_path):
    return CriticConfig(
        model=str(make_model("llama", seed=31)),
        data=str(rollouts),
        output=str(tmp_path / "critic"),
        eval_fraction=0.34,
        epochs=3,
        batch_size=5,
        max_tokens_per_gpu=32,
        learning_rate=1e-2,
        save_every=1,
        save_total_limit=100,
        eval_every=3,
        log_to="jsonl",
        dtype="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
    )


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def check_same(folder, other, tolerance=0.0):
    a, b = weights(folder), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0)


# --- reading ---


def test_stored_rollouts_are_read_without_those_that_have_no_verdict(tmp_path):
    folder = tmp_path / "rollouts"
    rows = [row_of(1), row_of(2, rewards=None), row_of(3)]
    write_step(folder, 1, rows)
    write_step(folder, 2, [row_of(4)])
    found = load_stored(str(folder), **LOAD)
    assert [list(rollout.response_ids) for rollout in found] == [
        row_of(n)["response_ids"] for n in (1, 3, 4)
    ]
    assert list(found[0].rewards) == pytest.approx(rows[0]["rewards"])
    assert found[0].question == "question 1"
    first = str(folder / "step-000001.jsonl.gz")
    assert len(load_stored(f"{folder},{first}", **LOAD | {"limit": 2})) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "line 1: no object with the key 'rewards'"),
        (row_of(1, rewards=[1.0]), "line 1: rewards must be a finite number for each response"),
        (row_of(1, prompt_ids=[]), "line 1: prompt_ids must be token ids under 320"),
        (row_of(1, response_ids=[320]), "line 1: response_ids must be token ids under 320"),
        (row_of(1, prompt_ids=[True]), "line 1: prompt_ids must be token ids"),
        (row_of(1, prompt_ids=[3] * 99), r"line 1: \d+ tokens, over max_tokens_per_gpu=100"),
        (row_of(1, problem=3), "line 1: no key 'question'"),
        (row_of(1, rewards=None), "no rollout has a verdict"),
    ],
)
def test_row_that_cannot_be_trained_on_is_refused_by_line(row, message, tmp_path):
    write_step(tmp_path / "rollouts", 1, [row])
    with pytest.raises(ValueError, match=message):
        load_stored(str(tmp_path / "rollouts"), **LOAD)


def test_damaged_file_and_folder_without_rollouts_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no step-\*.jsonl.gz in it: give the rollouts folder"):
        load_stored(str(tmp_path), **LOAD)
    file = write_step(tmp_path / "rollouts", 1, [row_of(1)])
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"data {file}: cannot be decompressed"):
        load_stored(str(file), **LOAD)
    file.write_bytes(gzip.compress(b"{oops\n"))
    with pytest.raises(ValueError, match=f"data {file}: line 1 is not valid JSON"):
        load_stored(str(file), **LOAD)


# --- formulas ---


def stored(response, rewards):
    return StoredRollout(question="q", prompt_ids=[5], response_ids=response, rewards=rewards)


def test_returns_are_discounted_sums_of_the_rewards():
    rollouts = [stored([6, 7, 2], [0.5, -1.0, 2.0]), stored([2], [0.25])]
    experience = with_returns(rollouts, gamma=0.5)
    assert experience.returns.tolist() == [0.0, 0.5, 0.0, 2.0, 0.0, 0.25]
    experience = with_returns(rollouts, gamma=1.0)
    assert experience.returns.tolist() == [0.0, 1.5, 1.0, 2.0, 0.0, 0.25]


def test_returns_skip_what_tools_wrote():
    turns = StoredRollout(
        question="q",
        prompt_ids=[5],
        response_ids=[6, 7, 8, 2],
        response_mask=[True, False, False, True],
        rewards=[0.5, 0.0, 0.0, 2.0],
    )
    experience = with_returns([turns, stored([2], [0.25])], gamma=0.5)
    assert experience.returns.tolist() == [0.0, 1.5, 0.0, 0.0, 2.0, 0.0, 0.25]


def test_metrics_of_a_batch_from_its_sums():
    experience = with_returns([stored([6, 7, 2], [-1.0, -1.0, 3.0])], gamma=1.0)  # 1, 2, 3
    # values 1, 1, 1: errors 0, 1, 2; variance of the errors and of the returns are equal
    metrics = _fit_metrics([2.5, 3.0], experience)
    assert metrics["value_loss"] == pytest.approx(2.5 / 3)
    assert metrics["explained_variance"] == pytest.approx(0.0)
    # values 1, 2, 2.5: errors 0, 0, 0.5, whose variance is 1/18; that of the returns 2/3
    metrics = _fit_metrics([0.125, 0.5], experience)
    assert metrics["explained_variance"] == pytest.approx(1 - (1 / 18) / (2 / 3))
    constant = with_returns([stored([2], [1.0])], gamma=1.0)
    assert _fit_metrics([0.0, 0.0], constant)["explained_variance"] == 0.0


# --- runs ---


def test_run_names_the_command_that_uses_its_critic(settings, next_commands):
    folder = train(replace(settings, eval_fraction=0.0, max_steps=1), resolved={})
    assert [command.split()[1] for command in next_commands(folder)] == ["ppo"]
    assert not (folder / "eval.jsonl").exists()


def test_run_learns_reports_and_leaves_a_critic(settings, rollouts):
    folder = train(settings, resolved={})
    metrics, evals = lines(folder, "metrics"), lines(folder, "eval")
    rows = [
        json.loads(line)
        for path in sorted(rollouts.iterdir())
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    # 2 of 6 questions are held out; a critic at zero has half the mean squared return as its loss
    assert evals[0]["num"] == 8
    candidates = set()
    questions = sorted({row["problem"]["question"] for row in rows})
    for first in questions:
        for second in questions:
            held_out = [row for row in rows if row["problem"]["question"] in (first, second)]
            returns = [
                sum(row["rewards"][t:]) for row in held_out for t in range(len(row["rewards"]))
            ]
            candidates.add(round(sum(x * x for x in returns) / 2 / len(returns), 5))
    assert round(evals[0]["value_loss"], 5) in candidates
    assert evals[0]["explained_variance"] == pytest.approx(0.0, abs=1e-6)
    assert {"explained_variance_q1", "explained_variance_q4", "value_mean_q1"} <= evals[0].keys()
    assert len(metrics) == 10  # 3 passes over 16 rollouts in batches of 5
    assert metrics[-1]["epoch"] == 3.0
    assert metrics[-1]["value_loss"] < metrics[0]["value_loss"] / 2
    assert (folder / "report.html").exists()
    critic = load_critic(str(folder / "model"), dtype="fp32", head="kept")
    assert critic.hf.score.weight.any()
    assert list((folder / "model-best").glob("*.safetensors"))


def test_resumed_run_ends_with_the_same_bits(settings, tmp_path):
    folder = train(settings, resolved={})
    before = weights(folder)
    rows = [lines(folder, name) for name in ("metrics", "eval")]
    resume = str(folder / "checkpoints" / "step-00000004")
    train(replace(settings, resume=resume), resolved={})
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, before[name])
    for name, was in zip(("metrics", "eval"), rows, strict=True):
        now = lines(folder, name)
        assert [row["value_loss"] for row in now] == [row["value_loss"] for row in was]


def test_head_of_the_model_is_kept_or_fresh(settings, tmp_path):
    first = train(replace(settings, max_steps=2), resolved={})
    own = str(first / "model")
    losses = {}
    for head in ("kept", "auto", "fresh"):
        again = replace(
            settings, model=own, critic_head=head, max_steps=1, output=str(tmp_path / head)
        )
        losses[head] = lines(train(again, resolved={}), "eval")[0]["value_loss"]
    last = lines(first, "eval")[-1]["value_loss"]
    assert losses["kept"] == losses["auto"] == pytest.approx(last, rel=1e-6)
    assert losses["fresh"] != pytest.approx(last, rel=1e-3)


def test_two_ranks_train_the_critic_of_one(settings, two_ranks, tmp_path):
    alone = train(replace(settings, max_steps=4, output=str(tmp_path / "one")), resolved={})
    options = {
        "model": settings.model,
        "data": settings.data,
        "output": str(tmp_path / "two"),
        "eval_fraction": settings.eval_fraction,
        "max_steps": 4,
        "batch_size": 5,
        "max_tokens_per_gpu": 32,
        "learning_rate": 1e-2,
        "eval_every": 3,
        "log_to": "jsonl",
        "dtype": "fp32",
        "zero_stage": 3,
        "gradient_checkpointing": "false",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = two_ranks("-m", "verippo.launch.cli", "critic", *arguments, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(alone, tmp_path / "two", tolerance=2e-5)
    for name in ("metrics", "eval"):
        for one, two in zip(lines(alone, name), lines(tmp_path / "two", name), strict=True):
            for key in ("value_loss", "explained_variance"):
                assert two[key] == pytest.approx(one[key], abs=1e-5)


# --- from PPO to a critic and back ---

SCORE = """
def score(rollouts):
    return [float("fever" in rollout.problem.question) for rollout in rollouts]
"""


def test_pretrained_critic_explains_what_a_fresh_one_does_not(
    make_model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "fever.py").write_text(SCORE)
    monkeypatch.syspath_prepend(tmp_path)
    questions = [f"{word} {'and ' * n}" for n in range(8) for word in ("fever", "cough")]
    (tmp_path / "problems.json").write_text(
        json.dumps([{QUESTION_KEY: question, ANSWER_KEY: "x"} for question in questions])
    )
    policy = str(make_model("llama", seed=41))
    common = {
        "max_tokens_per_gpu": 1024,
        "save_every": 100,
        "log_to": "jsonl",
        "dtype": "fp32",
        "zero_stage": 0,
        "gradient_checkpointing": False,
        "schedule": "constant",
    }
    first = PPOConfig(
        policy=policy,
        data=str(tmp_path / "problems.json"),
        output=str(tmp_path / "ppo"),
        keep_rollouts=True,
        verifier=VerifierConfig(kind="function", function="fever:score"),
        sampling=SamplingParams(max_new_tokens=6),
        kl=KLConfig(coef=0.0),
        steps=4,
        prompts_per_step=16,
        epochs=1,
        max_prompt_tokens=80,
        policy_learning_rate=0.0,
        critic_learning_rate=0.0,
        **common,
    )
    train_ppo(first, resolved={})
    # the command, as a user types it
    options = {name: str(value).lower() for name, value in common.items()}
    options |= {
        "model": policy,
        "data": str(tmp_path / "ppo" / "rollouts"),
        "output": str(tmp_path / "critic"),
        "eval_fraction": "0.25",
        "epochs": "10",
        "batch_size": "12",
        "learning_rate": "3e-3",
    }
    cli.main(["critic", *(part for name in options for part in (f"--{name}", options[name]))])
    assert lines(tmp_path / "critic", "eval")[-1]["explained_variance"] > 0.5
    explained = {}
    for name, critic in {"fresh": None, "trained": str(tmp_path / "critic" / "model")}.items():
        again = replace(first, critic=critic, steps=1, seed=1, output=str(tmp_path / name))
        explained[name] = lines(train_ppo(again, resolved={}), "metrics")[0]["explained_variance"]
    with capsys.disabled():
        print("explained variance in the first step:", explained)
    assert explained["fresh"] == pytest.approx(0.0, abs=1e-6)
    assert explained["trained"] > 0.5
