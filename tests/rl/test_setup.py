from __future__ import annotations

import json

import pytest
import torch

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.core.training import dist
from verippo.core.training.engine import FrozenEngine, TrainEngine
from verippo.core.training.packing import PackedBatch
from verippo.core.training.pretrained import load_classifier, load_policy
from verippo.rl.advantages import NoCritic
from verippo.rl.config import PPOConfig, VerifierConfig
from verippo.rl.setup import set_up
from verippo.rl.verifier import ClassifierVerifier, ExactMatchVerifier, FunctionVerifier


@pytest.fixture(scope="module")
def policy(make_model):
    return str(make_model("llama", seed=51))


@pytest.fixture
def given(policy, problems_file, tmp_path):
    """changes -> PPOConfig"""
    known = {
        "policy": policy,
        "data": str(problems_file),
        "output": str(tmp_path / "out"),
        "steps": 2,
        "prompts_per_step": 4,
        "verifier": VerifierConfig(kind="exact"),
        "sampling": SamplingParams(max_new_tokens=8),
        "max_prompt_tokens": 80,
        "dtype": "fp32",
        "zero_stage": 0,
        "gradient_checkpointing": False,
    }
    return lambda **changes: PPOConfig(**known | changes)


def batch():
    tokens = torch.arange(3, 13)
    return PackedBatch(
        tokens=tokens, cu_seqlens=torch.tensor([0, 4, 10]).int(), response_mask=tokens % 4 > 1
    )


def test_policy_and_reference_start_as_the_same_model_and_the_critic_at_zero(given, policy):
    run = set_up(given())
    with torch.no_grad():
        expected = load_policy(policy, dtype="fp32")(batch())
        assert torch.equal(run.policy(batch()), expected)
        assert torch.equal(run.reference(batch()), expected)
        assert run.critic(batch()).tolist() == [0.0] * 10
    assert isinstance(run.policy, TrainEngine)
    assert isinstance(run.critic, TrainEngine)
    assert isinstance(run.reference, FrozenEngine)


def test_a_reference_and_a_critic_of_their_own_are_used(given, make_model):
    reference, critic = (
        str(make_model("llama", seed=52)),
        str(make_model("llama", classes=1, seed=53, num_hidden_layers=1)),
    )
    run = set_up(given(reference=reference, critic=critic))
    with torch.no_grad():
        assert torch.equal(run.reference(batch()), load_policy(reference, dtype="fp32")(batch()))
        assert float(run.critic(batch()).abs().max()) > 0  # this one brings a head
    assert run.critic.module.hf.config.num_hidden_layers == 1


def test_verifier_becomes_the_critic_without_its_head(given, make_model):
    folder = str(make_model("llama", classes=2, seed=54))
    verifier = VerifierConfig(kind="classifier", model=folder, max_tokens=96)
    critic = set_up(given(critic="verifier", verifier=verifier)).critic
    assert critic(batch()).tolist() == [0.0] * 10
    own = load_classifier(folder, dtype="fp32").hf.model.state_dict()
    for name, weight in critic.module.hf.model.state_dict().items():
        assert torch.equal(weight, own[name])


def test_without_gae_there_is_no_critic(given):
    assert isinstance(set_up(given(advantage="rloo", samples_per_prompt=2)).critic, NoCritic)


def test_the_verifier_is_the_one_that_was_named(given, make_model, tmp_path, monkeypatch):
    (tmp_path / "constant.py").write_text("def score(rollouts): return [0.25 for _ in rollouts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(set_up(given()).verifier, ExactMatchVerifier)
    function = set_up(
        given(verifier=VerifierConfig(kind="function", function="constant:score"))
    ).verifier
    assert isinstance(function, FunctionVerifier)
    assert function.score([None, None]) == [0.25, 0.25]
    template = tmp_path / "template.txt"
    template.write_text("Is {response} the same as {reference}?")
    options = VerifierConfig(
        kind="classifier",
        model=str(make_model("llama", classes=2, seed=54)),
        threshold=0.3,
        max_tokens=99,
        template=str(template),
        right=2.0,
        wrong=1.0,
        unparsable=-1.0,
    )
    classifier = set_up(given(verifier=options)).verifier
    assert isinstance(classifier, ClassifierVerifier)
    assert (classifier.threshold, classifier.max_tokens, tuple(classifier.tiers)) == (
        0.3,
        99,
        (2.0, 1.0, -1.0),
    )
    assert classifier.template == "Is {response} the same as {reference}?"


def test_over_long_prompts_are_left_out_with_their_row_numbers_and_the_rest_keep_theirs(
    given, problems_file
):
    rows = json.loads(problems_file.read_text())
    for n in (3, 8):
        rows[n][QUESTION_KEY] *= 5
    problems_file.write_text(json.dumps(rows))
    run = set_up(given())
    assert run.train_set.dropped == [3, 8]
    assert [p.index for p in run.train_set.problems] == [n for n in range(12) if n not in (3, 8)]
    assert all(len(ids) <= 80 for ids in run.train_set.token_ids)
    assert (
        "".join(run.tokenizer.decode(run.train_set.token_ids[3])).count("What is 4 plus one?") == 1
    )


def test_held_out_problems_are_no_training_problems_and_the_split_is_the_seeds(given):
    runs = [set_up(given(eval_fraction=0.25, seed=seed)) for seed in (1, 1, 2)]
    held_out = [[p.index for p in run.eval_set.problems] for run in runs]
    assert len(held_out[0]) == 3
    assert held_out[0] == held_out[1] != held_out[2]
    for run, held in zip(runs, held_out, strict=True):
        assert sorted([p.index for p in run.train_set.problems] + held) == list(range(12))
    assert set_up(given()).eval_set.problems == []


def test_evaluation_data_of_its_own_is_read_with_the_same_keys(given, tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"q": "What?", "a": "That."}) + "\n")
    training = tmp_path / "train.jsonl"
    training.write_text(
        "".join(json.dumps({"q": f"Which {n}?", "a": "This."}) + "\n" for n in range(4))
    )
    run = set_up(given(data=str(training), eval_data=str(path), question_key="q", answer_key="a"))
    assert [(p.question, p.answer) for p in run.eval_set.problems] == [("What?", "That.")]
    assert len(run.train_set.problems) == 4


def test_rates_climb_and_fall_over_all_optimizer_steps(given):
    rates = {
        "policy_learning_rate": 1.0,
        "critic_learning_rate": 10.0,
        "warmup_ratio": 0.2,
        "schedule": "linear",
    }
    run = set_up(given(steps=5, epochs=2, minibatches=2, **rates))
    policy, critic = (list(map(rate, range(20))) for rate in (run.policy_rate, run.critic_rate))
    # 20 optimizer steps, 4 of them warm-up
    assert policy[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert policy[-1] == pytest.approx(1 / 16)
    assert critic == pytest.approx([10 * rate for rate in policy])


def test_too_few_problems_for_a_step_are_refused(given, problems_file):
    message = (
        rf"data {problems_file}: 9 problems are left to train on \(0 over max_prompt_tokens=80, 3 held out\), "
        "fewer than prompts_per_step=10"
    )
    with pytest.raises(ValueError, match=message):
        set_up(given(prompts_per_step=10, eval_fraction=0.25))


def test_rollouts_that_do_not_divide_over_the_ranks_are_refused(given, monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(
        ValueError, match="4 rollouts a step .* do not divide over 3 ranks: choose a multiple"
    ):
        set_up(given())


def test_a_context_too_short_for_prompt_and_response_is_refused(given, make_model):
    short = str(make_model("llama", seed=55, max_position_embeddings=87))
    with pytest.raises(
        ValueError,
        match=r"max_prompt_tokens \+ sampling.max_new_tokens = 88, over the context of .* \(87\)",
    ):
        set_up(given(policy=short))


def test_a_template_that_is_not_there_is_refused(given, make_model, tmp_path):
    model = str(make_model("llama", classes=2, seed=56))
    with pytest.raises(ValueError, match="nothing.txt"):
        set_up(
            given(
                verifier=VerifierConfig(
                    kind="classifier", model=model, template=str(tmp_path / "nothing.txt")
                )
            )
        )


def test_rows_keep_the_published_keys():
    assert (QUESTION_KEY, ANSWER_KEY) == ("Open-ended Verifiable Question", "Ground-True Answer")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(given, make_model):
    small = str(make_model("llama", seed=52, vocab=300))
    with pytest.raises(ValueError, match="has 300 embeddings, but its tokenizer 320 tokens"):
        set_up(given(policy=small))
    with pytest.raises(ValueError, match="has 300 embeddings, but its tokenizer 320 tokens"):
        set_up(given(critic=small))
