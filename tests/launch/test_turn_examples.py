"""The examples of several turns, with a little policy that was taught to call the calculator."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from verippo.core.sampling.sampler import Completion, SamplingParams
from verippo.core.text.chat import render_example, render_prompt, render_response
from verippo.core.text.data import Problem
from verippo.core.training.pretrained import load_tokenizer
from verippo.launch import cli
from verippo.rl.rollout import rollout_prompts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, as `--rollout_function` does in its folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return importlib.import_module


# --- arithmetic ---


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("2+3+1", "6"),
        (" 2 * (3 - 5) ", "-4"),
        ("-7/2", "-3.5"),
        ("0.1+0.2", "0.3"),
        ("123456789*10", "1234567890"),
        ("1/0", "error"),
        ("2**9", "error"),
        ("2//1", "error"),
        ("", "error"),
        ("()", "error"),
        ("1 2", "error"),
        ("007", "error"),
        ("1(2)", "error"),
        ("__import__('os')", "error"),
        ("a+1", "error"),
        ("1_0", "error"),
        ("(" * 199, "error"),
        ("-" * 199 + "1", "-1"),
        ("9" * 150 + "*" + "9" * 40, "1e+190"),
        ("1+" * 100 + "1", "error"),  # 201 characters
    ],
)
def test_calculator_by_hand(example, expression, result):
    assert example("calculator_rollout").calculate(expression) == result


# --- conversations ---


class Scripted:
    """Answers the prompts of each call with the texts of a list."""

    def __init__(self, tokenizer, *turns):
        self.tokenizer = tokenizer
        self.turns = list(turns)

    def generate(self, prompts, params):
        completions = []
        for text in self.turns.pop(0)[: len(prompts)]:
            ids = self.tokenizer.encode(text, add_special_tokens=False)[: params.max_new_tokens - 1]
            ids.append(self.tokenizer.eos_token_id)
            completions.append(
                Completion(token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason="stop")
            )
        assert len(completions) == len(prompts)
        return completions


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def prompts(tokenizer):
    problems = [Problem(question="2 + 3 ?", answer="5", index=n) for n in range(2)]
    ids = [render_prompt(tokenizer, problem.question) for problem in problems]
    return rollout_prompts(problems, ids, seed=0, step=1, samples=1)


SAMPLING = SamplingParams(max_new_tokens=800)


def context_of(one, tokenizer):
    pairs = zip(one.response_ids, one.response_mask, strict=True)
    return tokenizer.decode([token for token, own in pairs if not own])


def test_call_is_answered_with_its_result(example, tokenizer, prompts):
    sampler = Scripted(
        tokenizer,
        ["<calc>2+3</calc>", render_response("<calc>2+3</calc>?", "6")],
        [render_response("It is 5.", "5")],
    )
    function = example("calculator_rollout").rollout
    first, second = function(sampler, prompts, SAMPLING, tokenizer=tokenizer)
    assert (first.num_turns, second.num_turns) == (2, 1)
    assert "5" in context_of(first, tokenizer)
    assert (first.final, second.final) == ("5", "6")
    assert len(first.sampler_logprobs) == first.num_trained


def test_calls_are_bounded(example, tokenizer, prompts):
    sampler = Scripted(tokenizer, *[["<calc>1+</calc>"] * 2] * 4)
    function = example("calculator_rollout").rollout
    rollouts = function(sampler, prompts, SAMPLING, tokenizer=tokenizer)
    assert [one.num_turns for one in rollouts] == [4, 4]
    assert context_of(rollouts[0], tokenizer).count("error") == 3
    assert all(len(one.response_ids) <= 800 for one in rollouts)


def test_verifier_reads_the_answer_after_the_request_alone(example, tokenizer, prompts):
    module = example("verify_then_answer_rollout")
    sampler = Scripted(tokenizer, ["first", "first"], ["second", "third"])
    rollouts = module.rollout(sampler, prompts, SAMPLING, tokenizer=tokenizer)
    assert [one.text for one in rollouts] == ["second", "third"]
    assert all(module.REQUEST in context_of(one, tokenizer) for one in rollouts)


# --- runs ---


def taught_rows():
    """Conversations with a call and without, each with the same answer."""
    for n in range(10):
        answer = str(n % 2)
        question = f"Is {n} odd?"
        final = render_response("Halve.", answer)
        call = f"<calc>{n}-{n - n % 2}</calc>"
        yield [question, final]
        yield [question, call]
        yield [question, call, answer, final]


@pytest.fixture(scope="module")
def taught(make_model, tmp_path_factory):
    """A policy that calls the calculator in about half of its answers."""
    folder = tmp_path_factory.mktemp("taught")
    source = make_model("llama", seed=11)
    tokenizer = load_tokenizer(str(source))
    model = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    examples = []
    for texts in taught_rows():
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
        ]
        examples.append(render_example(tokenizer, messages))
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        chosen = rng.sample(examples, 8)
        longest = max(len(prompt + response) for prompt, response in chosen)
        ids = torch.zeros(8, longest, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, response) in enumerate(chosen):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor(prompt + response)
            labels[row, len(prompt) : end] = torch.tensor(response)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"Open-ended Verifiable Question": f"Is {n} odd?", "Ground-True Answer": str(n % 2)}
        for n in range(10)
    ]
    (folder / "problems.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("module", "fewest_turns", "most_turns"),
    [
        ("calculator_rollout", 1.05, 3.95),
        ("verify_then_answer_rollout", 1.5, 2.0),
        ("async_review_rollout", 1.5, 2.0),
    ],
)
def test_example_runs(module, fewest_turns, most_turns, taught, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = {
        "policy": taught / "model",
        "data": taught / "problems.json",
        "output": tmp_path / "out",
        "rollout_function": f"{module}:rollout",
        "verifier.kind": "exact",
        "steps": 2,
        "prompts_per_step": 8,
        "eval_fraction": 0.2,
        "sampling.max_new_tokens": 480,
        "max_prompt_tokens": 80,
        "max_tokens_per_gpu": 600,
        "dtype": "fp32",
        "zero_stage": 0,
        "gradient_checkpointing": "false",
        "policy_learning_rate": 1e-4,
        "log_to": "jsonl",
    }
    cli.main(["ppo", *(str(x) for name, value in options.items() for x in (f"--{name}", value))])
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["sampler_logprob_gap_p99"] < 1e-4
        assert row["ratio_first_minibatch_max"] < 1e-6
        assert fewest_turns <= row["turns_mean"] <= most_turns
        assert row["context_length_mean"] > 1
        assert row["tokens_generated"] == round(8 * row["response_length_mean"])
