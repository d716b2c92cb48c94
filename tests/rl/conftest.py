"""A task whose optimum is known, small enough to train on within seconds."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from verippo.core.sampling.sampler import SamplingParams
from verippo.rl.config import KLConfig, VerifierConfig

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
