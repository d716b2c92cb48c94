"""Adapters against peft with plain torch, on one and two ranks (lora_ranks.py)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from verippo.core.training.engine import FrozenEngine, TrainEngine
from verippo.core.training.lora import FrozenBase, LoraConfig, target_names, with_adapters
from verippo.core.training.pretrained import load_critic, load_policy

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ["policy", "critic"]


@pytest.fixture(scope="module")
def lora_ranks():
    sys.path.append(str(Path(__file__).parent))
    return importlib.import_module("lora_ranks")


@pytest.fixture(scope="module")
def lora_job(lora_ranks, job, tmp_path_factory):
    """Fields of a Job: the adapters' two factors are random, so that both have gradients."""
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for name in NAMES:
        factors[name] = {
            key.removeprefix("base_model.model."): 0.2
            * torch.randn(parameter.shape, generator=generator)
            for key, parameter in twin(job, name, lora_ranks).named_parameters()
            if "lora_" in key
        }
    shared = {key: job[key] for key in ("policy", "critic", "experience")}
    return shared | {"folder": tmp_path_factory.mktemp("lora"), "factors": factors}


def twin(job, name, lora_ranks, factors=None):
    """The model as peft makes it, without any of our code."""
    if name == "policy":
        base = AutoModelForCausalLM.from_pretrained(job[name], attn_implementation="eager")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            job[name], attn_implementation="eager", num_labels=1
        )
    settings = peft.LoraConfig(
        r=lora_ranks.RANK, lora_alpha=lora_ranks.ALPHA, target_modules=LINEAR
    )
    model = peft.get_peft_model(base, settings)
    if name == "critic":
        model.base_model.model.score.requires_grad_(True)
    if factors:
        found = dict(model.named_parameters())
        with torch.no_grad():
            for key, value in factors[name].items():
                found[f"base_model.model.{key}"].copy_(value)
    return model


@pytest.fixture(scope="module")
def one_rank_lora(lora_ranks, lora_job):
    return [lora_ranks.run(lora_ranks.Job(**lora_job))]


@pytest.fixture(scope="module")
def both_ranks_lora(lora_ranks, lora_job, two_ranks):
    folder = lora_job["folder"]
    torch.save(lora_job, folder / "job.pt")
    done = two_ranks(lora_ranks.__file__, str(folder), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(params=["one_rank_lora", "both_ranks_lora"])
def results(request):
    return request.getfixturevalue(request.param)


def outputs(model, name, batch):
    """[tokens] log-probs or values of the response tokens by transformers' own forward."""
    found = torch.zeros(batch.num_tokens)
    boundaries = batch.boundaries
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        ids = batch.tokens[None, start:end]
        if name == "policy":
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            row = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        else:
            hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
            row = model.score(hidden)[:, 0]
        row = torch.cat([row.new_zeros(1), row])
        found = found.index_add(0, torch.arange(start, end), row)
    return torch.where(batch.response_mask, found, 0.0)


def plain_model(model):
    """The transformers model inside a peft model."""
    return model.base_model.model


@pytest.fixture(scope="module")
def expected(lora_ranks, lora_job):
    """Of each model: merged weights after one plain SGD step, and the norm of the gradient."""
    found = {}
    experience = lora_job["experience"]
    for name in NAMES:
        model = twin(lora_job, name, lora_ranks, lora_job["factors"])
        out = outputs(plain_model(model), name, experience.batch)
        if name == "policy":
            loss = -out.sum()
        else:
            mask = experience.batch.response_mask
            loss = 0.5 * torch.where(mask, out - experience.returns, 0.0).square().sum()
        (loss / experience.batch.num_response_tokens).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(trained, lr=lora_ranks.RATE).step()
        found[name] = {k: v.detach() for k, v in model.merge_and_unload().named_parameters()}
    return found


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_one_sgd_step_equals_peft_with_plain_torch(results, expected, job, name, stage):
    run = results[0]["updated"][name, stage]
    assert run["after"].keys() == expected[name].keys()
    for key, value in expected[name].items():
        torch.testing.assert_close(run["after"][key], value, atol=1e-6, rtol=0, msg=key)
    moved = {key for key in run["after"] if not torch.equal(run["after"][key], run["before"][key])}
    assert {key.split(".")[-2] for key in moved} == {*LINEAR, *(["score"] * (name == "critic"))}


def test_gradient_checkpointing_changes_no_step(results, expected):
    run = results[0]["checkpointing"][3]
    for key, value in expected["policy"].items():
        torch.testing.assert_close(run["after"][key], value, atol=1e-6, rtol=0, msg=key)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_exported_folder_gives_the_outputs_of_the_adapters(results, job, name, stage):
    run = results[0]["updated"][name, stage]
    auto = AutoModelForCausalLM if name == "policy" else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(
        run["folder"], attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    assert load_file(f"{run['folder']}/model.safetensors").keys() == (
        load_file(f"{job[name]}/model.safetensors").keys()
    )
    with torch.no_grad():
        exported = outputs(model, name, job["experience"].batch)
    for rank in results:
        ours = rank["updated"][name, stage]["outputs"]
        torch.testing.assert_close(ours, exported, atol=1e-5, rtol=0)
        assert (ours - rank["updated"][name, stage]["outputs_before"]).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 3])
def test_reference_is_the_policy_without_adapters_to_the_last_bit(results, job, stage):
    frozen = FrozenEngine(load_policy(job["policy"], dtype="fp32"), config(0))
    batch = job["experience"].batch
    longest = max(batch.lengths)
    from verippo.rl.experience import compute

    (base,) = compute(frozen, batch, longest)
    for rank in results:
        run = rank["updated"]["policy", stage]
        torch.testing.assert_close(run["base_before"], base, atol=1e-6, rtol=0)
        assert torch.equal(run["base"], run["base_before"])  # also after a step and an export
        assert (run["outputs_before"] - run["base"]).abs().max() > 1e-2
        assert run["training"]


def test_zero_3_on_two_ranks_holds_no_whole_parameter(both_ranks_lora):
    assert [rank["updated"]["policy", 3]["held"] for rank in both_ranks_lora] == [0, 0]


RESUMED = [("policy", 0), ("critic", 1), ("critic", 2), ("policy", 3), ("critic", 3)]


@pytest.mark.parametrize(("name", "stage"), RESUMED)
def test_resumed_adapters_go_on_bit_for_bit(results, name, stage):
    run = results[0]["resumed"][name, stage]
    for key, saved in run["saved"].items():
        assert torch.equal(saved, run["loaded"][key]), key
        assert torch.equal(run["unbroken"][key], run["resumed"][key]), key
    moved = [key for key in run["saved"] if not torch.equal(run["saved"][key], run["fresh"][key])]
    assert len(moved) == 2 * len(LINEAR) + (name == "critic")


@pytest.mark.parametrize(("name", "stage"), RESUMED)
def test_checkpoints_hold_what_is_trained_and_nothing_else(results, lora_ranks, name, stage):
    run = results[0]["resumed"][name, stage]
    folder = Path(run["folder"]) / name
    first = sorted(folder.glob("*model_states.pt"))[0]
    state = torch.load(first, weights_only=False)
    kept = set(state["module"])
    assert all("lora_" in key or key == "hf.score.weight" for key in kept)
    assert len(kept) == 2 * 2 * len(LINEAR) + (name == "critic")
    assert not state.get("frozen_param_fragments")


def config(stage, **changes):
    from verippo.core.training.engine import EngineConfig

    known = {"zero_stage": stage, "dtype": "fp32", "gradient_checkpointing": False}
    return EngineConfig(**known | changes)


def engine_of(path, stage=0, **changes):
    settings = config(stage, **changes)
    module = load_policy(path, dtype=settings.dtype, engine=settings)
    return TrainEngine(with_adapters(module, LoraConfig(rank=2), seed=0), settings)


def test_checkpoint_over_other_weights_is_refused(make_model, tmp_path):
    engine_of(make_model(seed=5)).save(tmp_path, "policy")
    engine_of(make_model(seed=5)).load(tmp_path, "policy")
    with pytest.raises(ValueError, match="policy: its adapters were trained over weights with "):
        engine_of(make_model(seed=6)).load(tmp_path, "policy")


def test_adapters_change_nothing_at_first_and_depend_on_the_seed_alone(make_model):
    path = make_model("qwen2", seed=7)  # with biases
    first, again, other = (
        with_adapters(load_policy(path, dtype="fp32"), LoraConfig(rank=2), seed=seed).hf
        for seed in (0, 0, 1)
    )
    plain = load_policy(path, dtype="fp32").hf
    engine = engine_of(path)
    assert dict(engine.named_tensors()).keys() == dict(plain.named_parameters()).keys()
    for name, tensor in engine.named_tensors():
        assert torch.equal(tensor, plain.get_parameter(name)), name
    same, differ = (
        [
            torch.equal(a, b)
            for (name, a), b in zip(first.named_parameters(), model.parameters(), strict=True)
            if "lora_A" in name
        ]
        for model in (again, other)
    )
    assert all(same)
    assert not any(differ)


def test_bf16_adapters_learn_under_zero_3_and_are_merged_in_bf16(make_model, job):
    engine = engine_of(make_model(seed=8), 3, dtype="bf16", gradient_checkpointing=True)
    batch = job["experience"].batch
    losses = []
    for _ in range(6):
        loss = -engine(batch).sum()
        engine.backward(loss, batch.num_response_tokens, last=True)
        assert engine.step(1e-2).applied
        losses.append(loss.item())
        FrozenBase(engine)(batch)
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for _, p in engine.named_tensors()} == {torch.bfloat16}


def test_targets_are_names_of_linear_layers_of_the_decoder(make_model):
    hf = load_critic(make_model(classes=1), dtype="fp32").hf
    assert {name.split(".")[-1] for name in target_names(hf, "all-linear")} == set(LINEAR)
    assert target_names(hf, "q_proj, v_proj") == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]
    with pytest.raises(
        ValueError, match="no linear layers called lm_head: choose all-linear or some of down_proj,"
    ):
        target_names(hf, "q_proj,lm_head")


def test_options_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match=r"lora\.rank=-1: must be 0 or more"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match=r"lora\.alpha=0: must be above 0"):
        LoraConfig(rank=1, alpha=0)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_checkpoint_of_adapters_is_loaded_under_another_stage(
    make_model, job, tmp_path, before, after
):
    def trained(engine):
        batch = job["experience"].batch
        engine.backward(-engine(batch).sum(), batch.num_response_tokens, last=True)
        engine.step(1e-2)
        return engine.full_state()

    path = make_model(seed=9)
    first, second = engine_of(path, before), engine_of(path, after)
    saved = trained(first)
    first.save(tmp_path / "checkpoints" / "step", "policy")
    expected = trained(first)
    second.load(tmp_path / "checkpoints" / "step", "policy")
    assert all(torch.equal(saved[key], value) for key, value in second.full_state().items())
    for key, value in trained(second).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)
