from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from verippo.core.text.chat import render_response
from verippo.core.text.data import Problem
from verippo.core.text.verifier_text import TEMPLATE, Tiers
from verippo.core.training.engine import EngineConfig
from verippo.rl.rollout import Rollout
from verippo.rl.verifier import ClassifierVerifier, ExactMatchVerifier, FunctionVerifier

PLAIN = EngineConfig(zero_stage=0, dtype="fp32")


def answered(text, answer="Pneumonia"):
    problem = Problem(question="What is it?", answer=answer, index=0)
    return Rollout(
        problem=problem, prompt_ids=[5], response_ids=[6], sampler_logprobs=[-1.0], text=text
    )


def final(text, answer="Pneumonia"):
    return answered(render_response("Because.", text), answer)


def plain_probability(model, tokenizer, response, reference, *, max_tokens=10**6):
    """P(right) by transformers alone.

    The response's tokens are cut in the middle; the front keeps the odd one.
    """
    before, rest = TEMPLATE.split("{response}")
    parts = [
        tokenizer(text, add_special_tokens=False).input_ids
        for text in (before, response, rest.replace("{reference}", reference))
    ]
    room = max_tokens - len(parts[0]) - len(parts[2])
    if len(parts[1]) > room:
        parts[1] = parts[1][: math.ceil(room / 2)] + parts[1][-(room // 2) :]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([sum(parts, [])])).logits.softmax(-1)[0, 1])


@pytest.fixture(scope="module")
def judge(make_model):
    """A classifier's folder, and the same as plain transformers sees it."""
    folder = make_model("llama", classes=2, seed=31)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    return folder, model, AutoTokenizer.from_pretrained(folder)


def test_exact_match_forgives_case_space_and_outer_punctuation_only():
    rollouts = [
        final("Pneumonia"),
        final(" **pneumonia**. "),
        final("Pneumonia, probably"),
        final(""),
        answered("Pneumonia"),
    ]
    assert ExactMatchVerifier().score(rollouts) == [1.0, 1.0, 0.1, 0.1, 0.0]
    assert ExactMatchVerifier(tiers=Tiers(right=5, wrong=-1, unparsable=-2)).score(rollouts) == [
        5,
        5,
        -1,
        -1,
        -2,
    ]
    assert ExactMatchVerifier().score([]) == []


def test_an_empty_final_response_is_never_right():
    assert ExactMatchVerifier().score([final("", answer="...")]) == [0.1]


def test_a_functions_numbers_are_used_as_they_are():
    verifier = FunctionVerifier(lambda rollouts: [len(r.text) / 4 for r in rollouts])
    assert verifier.score([answered("ab"), answered("abc")]) == [0.5, 0.75]
    assert FunctionVerifier(lambda _: torch.tensor([1, 2])).score([answered(""), answered("")]) == [
        1.0,
        2.0,
    ]


@pytest.mark.parametrize("given", [None, ["right"], [None]])
def test_a_function_that_gives_no_numbers_is_refused_by_name(given):
    def oracle(rollouts):
        return given

    with pytest.raises(ValueError, match="oracle returned .* expected a list of 1 numbers"):
        FunctionVerifier(oracle).score([answered("")])


def test_a_function_that_gives_another_count_is_refused_by_name():
    def oracle(rollouts):
        return [1.0]

    with pytest.raises(
        ValueError, match="oracle returned 1 scores for 2 rollouts: it must return one for each"
    ):
        FunctionVerifier(oracle).score([answered(""), answered("")])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_function_that_gives_no_finite_number_is_refused_with_the_rollout(bad):
    with pytest.raises(ValueError, match="for rollout 1: scores must be finite"):
        FunctionVerifier(lambda _: [0.5, bad]).score([answered(""), answered("")])


def test_a_classifiers_probabilities_are_those_of_plain_transformers_on_the_same_text(judge):
    folder, model, tokenizer = judge
    pairs = [
        ("Pneumonia", "pneumonia"),
        ("A cough", "The patient has a fever."),
        ("x", "Pneumonia"),
        ("y" * 40, "z"),
    ]
    expected = [plain_probability(model, tokenizer, *pair) for pair in pairs]
    assert max(expected) - min(expected) > 0.01
    for cap in (10**4, 160):  # all in one micro-batch; one or two in each
        verifier = ClassifierVerifier.load(
            str(folder), PLAIN, max_tokens_per_gpu=cap, max_tokens=160
        )
        assert verifier.probabilities(pairs) == pytest.approx(expected, abs=1e-6)
        assert verifier.num_cut == 0


def test_two_ranks_of_which_one_has_nothing_to_judge_give_the_same_under_zero_3(
    both_ranks, one_rank, job
):
    model = AutoModelForSequenceClassification.from_pretrained(
        job["verifier"], attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(job["verifier"])
    expected = [plain_probability(model, tokenizer, *pair, max_tokens=96) for pair in job["pairs"]]
    for rank in (*one_rank, both_ranks[0]):
        assert rank["verdicts"] == pytest.approx(expected, abs=1e-6)
    assert both_ranks[1]["verdicts"] == []


def test_a_response_that_is_too_long_is_cut_in_the_middle_and_counted(judge):
    folder, model, tokenizer = judge
    verifier = ClassifierVerifier.load(str(folder), PLAIN, max_tokens=90)
    pairs = [
        ("Pneumonia", "Pneumonia"),
        ("0123456789" * 8, "Pneumonia"),
        ("abcdefghi" * 9, "Asthma"),
    ]
    expected = [plain_probability(model, tokenizer, *pair, max_tokens=90) for pair in pairs]
    assert verifier.probabilities(pairs) == pytest.approx(expected, abs=1e-6)
    assert verifier.num_cut == 2


def test_a_classifiers_score_passes_through_the_tiers_with_broken_and_blank_unasked(
    judge, monkeypatch
):
    folder, model, tokenizer = judge
    rollouts = [final("Pneumonia"), answered("no format"), final(""), final("A cough and a fever")]
    p = [
        plain_probability(model, tokenizer, r.final, "Pneumonia")
        for r in (rollouts[0], rollouts[3])
    ]
    between, (low, high) = sum(p) / 2, sorted(p)
    tiers = Tiers(right=3.0, wrong=2.0, unparsable=1.0)

    def score(threshold):
        verifier = ClassifierVerifier.load(str(folder), PLAIN, threshold=threshold, tiers=tiers)
        asked = []
        original = verifier.probabilities
        monkeypatch.setattr(
            verifier, "probabilities", lambda pairs: asked.extend(pairs) or original(pairs)
        )
        scores = verifier.score(rollouts)
        assert asked == [("Pneumonia", "Pneumonia"), ("A cough and a fever", "Pneumonia")]
        return scores

    first, last = (3.0, 2.0) if p[0] > p[1] else (2.0, 3.0)
    assert score(between) == [first, 1.0, 2.0, last]
    assert score(low / 2) == [3.0, 1.0, 2.0, 3.0]
    assert score((1 + high) / 2) == [2.0, 1.0, 2.0, 2.0]
    assert ClassifierVerifier.load(str(folder), PLAIN).score([]) == []


def test_a_template_without_its_places_is_refused(judge):
    with pytest.raises(ValueError, match="needs {response} once and, after it, {reference} once"):
        ClassifierVerifier.load(str(judge[0]), PLAIN, template="{reference} {response}")


def test_template_without_the_end_token_is_mentioned(make_model, capsys):
    from verippo.core.training.engine import EngineConfig

    path = str(make_model("llama", classes=2))
    config = EngineConfig(dtype="fp32")
    ClassifierVerifier.load(path, config, template="{response}{reference}")
    assert "does not end in </s>" in capsys.readouterr().out
    ClassifierVerifier.load(path, config, template="{response}{reference}</s>")
    ClassifierVerifier.load(path, config)
    assert "does not end in" not in capsys.readouterr().out
