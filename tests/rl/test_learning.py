"""It learns: on a task whose optimum is known, a random policy gets there, without a critic and
with one."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from verippo.core.sampling.sampler import SamplingParams
from verippo.rl.config import KLConfig, PPOConfig, VerifierConfig
from verippo.rl.train import train

WORDS = ["<unk>", "<s>", "</s>", *"abcdefghi"]
WANTED = WORDS.index("e")
VERIFIER = f"""
def score(rollouts):
    '''The share of the response's tokens that are the wanted one, its end token among the others: 1 at best.'''
    return [sum(token == {WANTED} for token in r.response_ids) / len(r.response_ids) for r in rollouts]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Keyword arguments of a PPOConfig: a policy over twelve tokens that knows nothing, and the
    verifier above."""
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    for part in (policy, fast):
        part.save_pretrained(tmp_path / "policy")
    rows = [
        {"Open-ended Verifiable Question": " ".join("abcdefgh"[n:]), "Ground-True Answer": "e"}
        for n in range(8)
    ]
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    (tmp_path / "counting.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    return {
        "policy": str(tmp_path / "policy"),
        "data": str(tmp_path / "problems.json"),
        "output": str(tmp_path / "out"),
        "verifier": VerifierConfig(kind="function", function="counting:score"),
        "sampling": SamplingParams(max_new_tokens=8),
        "kl": KLConfig(coef=0.0),
        "steps": 35,
        "prompts_per_step": 8,
        "max_prompt_tokens": 30,
        "max_tokens_per_gpu": 1024,
        "policy_learning_rate": 5e-3,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "save_every": 1000,
        "log_to": "jsonl",
        "dtype": "fp32",
        "gradient_checkpointing": False,
        "zero_stage": 0,
    }


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
