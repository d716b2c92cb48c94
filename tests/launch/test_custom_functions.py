"""Functions of users that return what they must not: named in one line, with what they returned."""

from __future__ import annotations

import json
import sys

import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY

MODULE = """
import dataclasses

import numpy
import torch

from verippo.core.sampling.sampler import Completion
from verippo.rl import rollout as rollouts_module
from verippo.rl.ppo import PolicyLoss, policy_loss


def score(rollouts):
    return {score}


def rollout(sampler, prompts, sampling, *, tokenizer):
    good = rollouts_module.rollout(sampler, prompts, sampling, tokenizer=tokenizer)
    change = lambda **parts: [dataclasses.replace(good[0], **parts), *good[1:]]
    return {rollout}


def advantage(rewards, values, batch, rollouts):
    return {advantage}


def loss(logprobs, micro):
    good = policy_loss(
        logprobs, micro.logprobs, micro.advantages, micro.mask, clip_low=0.2, clip_high=0.2
    )
    return {loss}


class Engine:
    def __init__(self):
        self.version = 0

    def update_weights(self, named_tensors, version):
        list(named_tensors)
        self.version = version

    def generate(self, prompts, params):
        good = [
            Completion(token_ids=[5, 2], logprobs=[-1.0, -1.0], finish_reason="stop")
            for _ in prompts
        ]
        change = lambda **parts: [dataclasses.replace(good[0], **parts), *good[1:]]
        return {generate}


class Generates:
    def generate(self, prompts, params):
        return []


def make(model_path, stop_token_ids):
    return {make}
"""
GOOD = {
    "score": "[0.0] * len(rollouts)",
    "rollout": "good",
    "advantage": "(rewards, rewards)",
    "loss": "good",
    "generate": "good",
    "make": "Engine()",
}
OPTIONS = {
    "score": ["--verifier.kind", "function", "--verifier.function", "own:score"],
    "rollout": ["--rollout_function", "own:rollout"],
    "advantage": ["--advantage_function", "own:advantage"],
    "loss": ["--policy_loss_function", "own:loss"],
    "generate": ["--sampler.kind", "factory", "--sampler.factory", "own:make"],
    "make": ["--sampler.kind", "factory", "--sampler.factory", "own:make"],
}
NAMES = {
    "score": "verifier.function=own:score returned",
    "rollout": "rollout_function=own:rollout returned",
    "advantage": "advantage_function=own:advantage returned",
    "loss": "policy_loss_function=own:loss returned",
    "generate": "sampler",
    "make": "sampler.factory=own:make returned",
}
WRONG = {
    "score": {
        "None": "None",
        "{r: 1.0 for r in range(len(rollouts))}": "dict of 2",
        "{0.5, 1.0}": "set of 2",
        "'01'": "str '01'",
        "['0', '1']": "list of 2 (it holds str '0')",
        "3": "int '3'",
        "0.5": "float '0.5'",
        "[0.0]": "1 scores for 2 rollouts",
        "[0.0] * 3": "3 scores",
        "(x for x in [1.0])": "1 scores for 2",
        "[None, None]": "list of 2",
        "[[1.0], [1.0, 2.0]]": "list of 2",
        "[float('nan')] * 2": "nan for rollout 0",
        "[10 ** 400] * 2": "list of 2",
        "[1j, 1j]": "list of 2",
        "torch.zeros(2, 2)": "a Tensor of shape (2, 2)",
        "torch.tensor(1.0)": "a Tensor of shape ()",
        "(rollouts, {})": "tuple of 2",
    },
    "rollout": {
        "None": "None",
        "{n: r for n, r in enumerate(good)}": "dict of 2",
        "(r for r in good)": "generator",
        "good[:1]": "1 rollouts for 2 prompts",
        "good * 2": "4 rollouts for 2 prompts",
        "good[0]": "Rollout",
        "[r.text for r in good]": "str",
        "[vars(r) for r in good]": "dict of",
        "[None] * 2": "None as rollout 0",
        "change(response_ids=None)": "None as token ids",
        "change(response_ids=[1.5])": "float '1.5' among its token ids",
        "change(response_ids=['a'])": "str 'a' among its token ids",
        "change(response_ids='ab')": "str 'ab' as token ids",
        "change(response_ids=torch.tensor([1]))": "a Tensor of shape (1,)",
        "change(response_ids=numpy.zeros((1, 1), int))": "ndarray of 1 as token ids",
        "change(response_ids=[10 ** 9], sampler_logprobs=[-1.0])": "outside the vocabulary",
        "change(response_ids=[-1], sampler_logprobs=[-1.0])": "outside the vocabulary",
        "change(response_ids=[], sampler_logprobs=[])": "no token ids",
        "change(prompt_ids=[])": "no token ids",
        "change(prompt_ids=[10 ** 9])": "outside the vocabulary",
        "change(sampler_logprobs=[-1.0] * 99)": "99 sampler log-probs",
        "change(sampler_logprobs=[None])": "None among its log-probs",
        "change(sampler_logprobs=None)": "None as log-probs",
        "change(sampler_logprobs=[float('nan')] * len(good[0].response_ids))": "finite",
        "change(response_mask=[1] * len(good[0].response_ids))": "response_mask holds int '1'",
        "change(response_mask=[False] * len(good[0].response_ids))": "0 of them True",
        "change(response_mask=[True] * 99)": "response_mask has 99 booleans",
        "change(text=None)": "problem or text",
        "change(problem=None)": "problem or text",
    },
    "advantage": {
        "None": "None",
        "rewards": "a Tensor of shape",
        "[rewards, rewards]": "list of 2",
        "(rewards,)": "tuple of 1",
        "{'advantages': rewards, 'returns': rewards}": "dict of 2",
        "(rewards[:1], rewards)": "a Tensor of shape (1,)",
        "(rewards, rewards[None])": "a Tensor of shape (1,",
        "(rewards.long(), rewards)": "torch.int64",
        "(rewards > 0, rewards)": "torch.bool",
        "(rewards.to(torch.complex64), rewards)": "torch.complex64",
        "(rewards.tolist(), rewards)": "list of",
        "(rewards * float('nan'), rewards)": "not finite",
    },
    "loss": {
        "None": "None",
        "good.loss_sum": "a Tensor of shape ()",
        "tuple(good)": "tuple of",
        "good._asdict()": "dict of",
        "good._replace(loss_sum=good.loss_sum.detach())": "without gradient",
        "good._replace(loss_sum=0.0)": "float '0.0' as loss_sum",
        "good._replace(loss_sum=logprobs)": "a Tensor of shape",
        "good._replace(num_tokens=None)": "None as num_tokens",
        "good._replace(clip_sum=torch.zeros(2))": "a Tensor of shape (2,)",
    },
    "generate": {
        "None": "generate returned None",
        "{}": "generate returned dict of 0",
        "iter(good)": "list_iterator",
        "good[:1]": "returned 1 completions for 2 prompts",
        "good + good": "returned 4 completions for 2 prompts",
        "[(c.token_ids, c.logprobs) for c in good]": "tuple of 2",
        "change(token_ids=None)": "None as token ids",
        "change(token_ids=[0.5, 2])": "float '0.5' among its token ids",
        "change(logprobs=['a', 'b'])": "str 'a' among its log-probs",
        "change(logprobs=[-1.0])": "1 sampler log-probs",
        "change(token_ids=[10 ** 9, 2])": "outside the vocabulary",
    },
    "make": {
        "None": "None",
        "{}": "dict of 0",
        "Engine": "type",
        "Generates()": "Generates",
        "(Engine(), 1)": "tuple of 2",
    },
}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", seed=31)


@pytest.mark.parametrize(
    ("function", "returned"),
    [(function, returned) for function, cases in WRONG.items() for returned in cases],
)
def test_wrong_result_of_a_function_is_named_in_one_line(
    function, returned, model, wrong_result, tmp_path, monkeypatch
):
    code = MODULE
    for name, expression in (GOOD | {function: returned}).items():
        code = code.replace(f"return {{{name}}}", f"return {expression}")
    (tmp_path / "own.py").write_text(code)
    (tmp_path / "data.json").write_text(
        json.dumps([{QUESTION_KEY: f"Is {n} even?", ANSWER_KEY: "yes"} for n in range(4)])
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    argv = ["ppo", "--policy", model, "--data", tmp_path / "data.json", "--steps", 1]
    argv += ["--output", tmp_path / "out", "--prompts_per_step", 2, "--max_prompt_tokens", 64]
    argv += ["--sampling.max_new_tokens", 4, "--max_tokens_per_gpu", 256, "--dtype", "fp32"]
    argv += ["--zero_stage", 2, "--gradient_checkpointing", "false", "--log_to", "jsonl"]
    argv += ["--max_logprob_gap", 1e9]
    if function != "score":
        argv += ["--verifier.kind", "exact"]
    line = wrong_result([*argv, *OPTIONS[function]])
    assert WRONG[function][returned] in line
    if "outside the vocabulary" not in line and "finite" not in line and "sampler log" not in line:
        assert NAMES[function] in line
