from __future__ import annotations

import json
import pickle
import tracemalloc
from array import array
from dataclasses import replace

import numpy as np
import pytest
import torch

from verippo.core.sampling.local_sampler import LocalSampler
from verippo.core.sampling.sampler import Completion, SamplingParams
from verippo.core.text.chat import render_prompt, render_response
from verippo.core.text.data import Problem
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_causal_lm, load_tokenizer
from verippo.rl.rollout import (
    Rollout,
    check_rollouts,
    prompt_ids,
    rollout,
    rollout_prompts,
)

PROBLEMS = [
    Problem(question=f"What is {n} plus one?", answer=str(n + 1), index=n) for n in range(4)
]
IDS = [[5, 6], [7], [8, 9, 10], [11]]


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


def a_rollout(text):
    return Rollout(
        problem=PROBLEMS[0], prompt_ids=[5], response_ids=[6], sampler_logprobs=[-1.0], text=text
    )


class Scripted:
    """A sampler that says what it is told to, and remembers what it was asked."""

    def __init__(self, completions):
        self.completions = completions

    def generate(self, prompts, params):
        self.prompts, self.params = prompts, params
        return self.completions

    def update_weights(self, named_tensors, version):
        raise AssertionError


def test_each_prompt_gets_its_own_completion_field_by_field(tokenizer):
    text = tokenizer.encode("I say", add_special_tokens=False)
    sampler = Scripted(
        [
            Completion(
                token_ids=[*text, 2],
                logprobs=[-0.5] * (len(text) + 1),
                finish_reason="stop",
                version=7,
            ),
            Completion(
                token_ids=text, logprobs=[-0.25] * len(text), finish_reason="length", version=7
            ),
        ]
    )
    sampling = SamplingParams(max_new_tokens=9)
    prompts = rollout_prompts(PROBLEMS[:2], IDS[:2], seed=1, step=2, samples=1)
    first, second = rollout(sampler, prompts, sampling, tokenizer=tokenizer)
    assert first == Rollout(
        problem=PROBLEMS[0],
        prompt_ids=[5, 6],
        response_ids=[*text, 2],
        sampler_logprobs=[-0.5] * (len(text) + 1),
        text="I say",
        truncated=False,
        sample=0,
        version=7,
    )
    assert (second.problem, second.truncated, second.response_ids, second.text) == (
        PROBLEMS[1],
        True,
        text,
        "I say",
    )
    assert [(list(p.token_ids), p.seed) for p in sampler.prompts] == [
        ([5, 6], prompts[0].seed),
        ([7], prompts[1].seed),
    ]
    assert sampler.params is sampling


def test_lists_and_arrays_make_equal_rollouts():
    lists = Rollout(
        problem=PROBLEMS[0],
        prompt_ids=[5, 6],
        response_ids=(7, 8, 2),
        sampler_logprobs=[-0.1, -2],
        response_mask=[True, False, True],
        text="a",
    )
    arrays = replace(
        lists,
        prompt_ids=np.array([5, 6]),
        response_ids=array("i", [7, 8, 2]),
        sampler_logprobs=np.array([-0.1, -2.0]),
        response_mask=np.array([True, False, True]),
    )
    assert lists == arrays == pickle.loads(pickle.dumps(arrays))
    assert lists.prompt_ids == [5, 6]
    assert lists.response_mask == [True, False, True]
    assert json.dumps(list(arrays.sampler_logprobs)) == "[-0.1, -2.0]"
    assert (arrays.num_trained, arrays.num_context, arrays.num_turns) == (2, 1, 2)


def test_packing_and_checks_need_few_bytes_a_token():
    ids = np.arange(1000, dtype=np.int32)
    one = Rollout(
        problem=PROBLEMS[0],
        prompt_ids=ids[:200],
        response_ids=ids[200:],
        sampler_logprobs=-np.ones(800),
        text="a",
    )
    tracemalloc.start()
    try:
        check_rollouts([one] * 1000, vocabulary=1000, version=0)
        checked = tracemalloc.get_traced_memory()[1]
        batch = pack([one] * 1000)
        packed = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(batch.tokens, torch.arange(1000).repeat(1000))
    assert checked < 0.1 * batch.num_tokens
    assert packed < 10 * batch.num_tokens


def test_a_completion_too_few_is_refused(tokenizer):
    prompts = rollout_prompts(PROBLEMS[:2], IDS[:2], seed=1, step=2, samples=1)
    with pytest.raises(ValueError, match="the sampler returned 0 completions for 2 prompts"):
        rollout(Scripted([]), prompts, SamplingParams(), tokenizer=tokenizer)


def test_samples_of_a_problem_stand_together_and_each_has_its_own_seed():
    prompts = rollout_prompts(PROBLEMS, IDS, seed=3, step=5, samples=3)
    assert [(p.problem.index, p.sample) for p in prompts] == [
        (n, s) for n in range(4) for s in range(3)
    ]
    assert all(p.token_ids == IDS[p.problem.index] for p in prompts)
    assert len({p.seed for p in prompts}) == 12


def test_a_seed_depends_on_run_step_problem_and_sample_and_on_nothing_else():
    def seeds(problems, ids, **changes):
        prompts = rollout_prompts(problems, ids, **{"seed": 3, "step": 5, "samples": 2} | changes)
        return {(p.problem.index, p.sample): p.seed for p in prompts}

    reference = seeds(PROBLEMS, IDS)
    assert seeds(PROBLEMS[::-1], IDS[::-1]) == reference
    assert seeds(PROBLEMS[2:], IDS[2:]).items() <= reference.items()
    assert seeds(PROBLEMS, IDS, samples=5).items() >= reference.items()
    for change in ({"seed": 4}, {"step": 6}):
        assert not set(seeds(PROBLEMS, IDS, **change).values()) & set(reference.values())


def test_a_problem_that_stands_twice_in_a_step_is_drawn_anew():
    prompts = rollout_prompts(
        [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]], [IDS[0], IDS[1], IDS[0]], seed=0, step=1, samples=2
    )
    assert [(p.problem.index, p.sample) for p in prompts] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
    ]
    assert len({p.seed for p in prompts}) == 6


def test_a_response_does_not_depend_on_what_else_is_drawn_nor_on_how_many_at_once(
    make_model, tokenizer
):
    folder = str(make_model("llama", seed=21))
    prompts = rollout_prompts(
        PROBLEMS, prompt_ids(tokenizer, PROBLEMS, system=None), seed=0, step=1, samples=2
    )
    sampling = SamplingParams(max_new_tokens=8)

    def draw(chosen, max_batch):
        sampler = LocalSampler(
            load_causal_lm(folder, dtype="fp32"), stop_token_ids=(2,), max_batch=max_batch
        )
        rollouts = rollout(sampler, chosen, sampling, tokenizer=tokenizer)
        return {(r.problem.index, r.sample): list(r.response_ids) for r in rollouts}

    together = draw(prompts, 8)
    assert len({tuple(ids) for ids in together.values()}) == 8
    assert draw(prompts[::-1], 3) == together
    assert draw(prompts[5:6], 1) == {(2, 1): together[2, 1]}


def test_prompts_are_the_chat_template_with_the_system_turn_when_there_is_one(tokenizer):
    plain, with_system = (
        prompt_ids(tokenizer, PROBLEMS, system=system) for system in (None, "Be brief.")
    )
    assert plain == [render_prompt(tokenizer, problem.question) for problem in PROBLEMS]
    assert with_system == [
        render_prompt(tokenizer, problem.question, system="Be brief.") for problem in PROBLEMS
    ]
    assert "Be brief." in tokenizer.decode(with_system[0])
    assert "Be brief." not in tokenizer.decode(plain[0])


def test_final_and_reasoned_follow_the_format():
    whole = a_rollout(render_response("Because.", "Pneumonia"))
    assert (whole.final, whole.reasoned) == ("Pneumonia", True)
    silent = a_rollout(render_response("", "Pneumonia"))
    assert (silent.final, silent.reasoned) == ("Pneumonia", False)
    blank = a_rollout(render_response("Because.", ""))
    assert (blank.final, blank.reasoned) == ("", True)
    broken = a_rollout("Pneumonia")
    assert (broken.final, broken.reasoned) == (None, False)
