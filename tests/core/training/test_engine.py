"""TrainEngine and FrozenEngine against plain torch.

What one and two ranks do alike is run by tests/rl/rank_checks.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from verippo.core.training.engine import (
    EngineConfig,
    TrainEngine,
    deepspeed_config,
    parameter_groups,
)
from verippo.core.training.packing import PackedBatch
from verippo.core.training.pretrained import load_critic, load_policy

STAGES = [0, 2, 3]


@pytest.fixture(params=["one_rank", "both_ranks"])
def results(request):
    return request.getfixturevalue(request.param)


def batch_of(lengths, *, prompt=2, seed=0):
    """Random tokens, everything after the first `prompt` of each sequence a response."""
    tokens = torch.randint(3, 320, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    mask = torch.cat([torch.arange(length) >= prompt for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedBatch(tokens=tokens, cu_seqlens=cu_seqlens, response_mask=mask)


def config(stage=0, **changes):
    return EngineConfig(
        **{
            "zero_stage": stage,
            "dtype": "fp32",
            "gradient_checkpointing": False,
            "max_grad_norm": 1e9,
        }
        | changes
    )


def train_once(engine, batch, rate, *, power=1.0):
    """One step on minus the mean log-prob; returns the loss and the step's result."""
    loss = -power * engine(batch).sum()
    engine.backward(loss, batch.num_response_tokens, last=True)
    return loss.item() / batch.num_response_tokens, engine.step(rate)


def plain_loss(model, batch):
    total = 0.0
    for start, end in zip(batch.boundaries[:-1], batch.boundaries[1:], strict=True):
        ids = batch.tokens[start:end]
        logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(1, ids[1:, None])[1:].sum()  # the prompt has two tokens
    return total / batch.num_response_tokens


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_is_scaled_down_to_the_global_norm(rank_checks, job, results, stage):
    """With plain SGD: the move's length over the rate is max_grad_norm; its direction that of the
    unclipped move."""
    free, clipped = results[0]["updates"][stage][:2], results[0]["clipped"][stage]
    for name in ("policy", "critic"):
        start = free[0]["weights"][name]
        long, short = (
            torch.cat([(w[name][key] - start[key]).double().flatten() for key in start])
            for w in (free[1]["weights"], clipped["weights"])
        )
        assert float(long.norm()) / rank_checks.RATE > 2 * rank_checks.MAX_GRAD_NORM
        assert float(short.norm()) / rank_checks.RATE == pytest.approx(
            rank_checks.MAX_GRAD_NORM, rel=1e-3
        )
        assert float(torch.nn.functional.cosine_similarity(long, short, dim=0)) == pytest.approx(
            1.0, abs=1e-4
        )
    for unclipped, step in zip(free[1]["steps"], clipped["steps"], strict=True):
        assert step == pytest.approx(
            unclipped, rel=1e-5
        )  # what is reported is the norm before clipping


@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_engine_goes_on_bit_for_bit_like_the_one_that_was_saved(results, stage):
    run = results[0]["resumed"][stage]
    for name, saved in run["saved"].items():
        assert torch.equal(saved, run["loaded"][name]), name
        assert torch.equal(run["unbroken"][name], run["resumed"][name]), name
    assert any(
        not torch.equal(saved, run["unbroken"][name]) for name, saved in run["saved"].items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_full_state_is_the_unsharded_weights_and_only_on_the_main_rank(results, job, stage):
    for name in ("policy", "critic"):
        stored = load_file(f"{job[name]}/model.safetensors")
        ours = results[0]["updates"][stage][0]["weights"][name]
        assert ours.keys() == stored.keys()
        assert all(torch.equal(ours[key], stored[key]) for key in stored)
        assert all(rank["updates"][stage][0]["weights"][name] == {} for rank in results[1:])


def test_named_tensors_are_the_unsharded_weights_on_every_rank(results, job):
    stored = load_file(f"{job['critic']}/model.safetensors")
    for rank in results:
        ours = rank["forwards"]["named_tensors"]
        assert ours.keys() == stored.keys()
        assert all(torch.equal(ours[key], stored[key]) for key in stored)


def test_sharded_forwards_give_what_plain_transformers_gives(rank_checks, results, job):
    policy = AutoModelForCausalLM.from_pretrained(job["policy"], attn_implementation="eager")
    critic = AutoModelForSequenceClassification.from_pretrained(
        job["critic"], attn_implementation="eager", num_labels=1
    )
    batch = job["experience"].batch
    logprobs, entropy, values = (torch.zeros(batch.num_tokens) for _ in range(3))
    for start, end, (prompt, _) in zip(
        batch.boundaries[:-1], batch.boundaries[1:], rank_checks.LENGTHS, strict=True
    ):
        ids, response = batch.tokens[None, start:end], slice(start + prompt, end)
        with torch.no_grad():
            dense = (
                policy(input_ids=ids).logits[0, prompt - 1 : -1] / rank_checks.TEMPERATURE
            ).log_softmax(-1)
            hidden = critic.model(input_ids=ids).last_hidden_state[0, prompt - 1 : -1]
            values[response] = critic.score(hidden).squeeze(-1)
        logprobs[response] = dense[torch.arange(len(dense)), ids[0, prompt:]]
        entropy[response] = -(dense.exp() * dense).sum(-1)
    for rank in results:
        for name, expected in (("logprobs", logprobs), ("entropy", entropy), ("values", values)):
            torch.testing.assert_close(rank["forwards"][name], expected, atol=1e-5, rtol=1e-5)


def test_zero_3_on_two_ranks_holds_no_whole_parameter_of_a_frozen_model(both_ranks):
    assert [rank["forwards"]["parameters_held"] for rank in both_ranks] == [0, 0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_model_takes_the_weights_of_a_trained_one(results, stage):
    for rank in results:
        found = rank["refreshed"][stage]
        expected = results[0]["refreshed"][stage]["policy"]
        for weights in found["weights"]:  # of the engine that took them, and one that loaded them
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
        trained, taken, loaded = found["logprobs"]
        assert torch.equal(taken, trained)
        assert torch.equal(loaded, trained)
        assert not torch.equal(trained, rank["forwards"]["logprobs"])  # they had moved
        assert (found["parameters_held"] == 0) is (stage == 3 and len(results) == 2)


def test_adamw_is_torchs_with_decay_on_matrices_alone(make_model):
    folder, rate, decay = make_model("qwen2", seed=4), 1e-2, 0.1  # qwen2 has biases
    batch = batch_of([9, 4, 12])
    twin = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    plain = {name for name, _ in twin.named_parameters() if "norm" in name or name.endswith("bias")}
    assert (
        len(plain) == 5 + 6
    )  # two norms a layer and the last; q, k and v biases in each of two layers
    named = dict(twin.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in named.items() if name not in plain],
                "weight_decay": decay,
            },
            {"params": [named[name] for name in plain], "weight_decay": 0.0},
        ],
        lr=rate,
        eps=1e-3,
    )
    plain_loss(twin, batch).backward()
    optimizer.step()

    for stage in (0, 2):
        engine = TrainEngine(
            load_policy(folder, dtype="fp32"), config(stage, weight_decay=decay, adam_epsilon=1e-3)
        )
        train_once(engine, batch, rate)
        for name, tensor in engine.full_state().items():
            torch.testing.assert_close(tensor, named[name].detach(), atol=1e-6, rtol=0)


def test_parameters_are_grouped_by_their_dimensions_even_when_sharded_to_nothing():
    class Sharded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.norm = (torch.nn.Parameter(torch.empty(0)) for _ in range(2))
            self.matrix.ds_shape, self.norm.ds_shape = (8, 4), (4,)

    module = Sharded()
    with_decay, without = parameter_groups(module, 0.3)
    assert with_decay["params"] == [module.matrix]
    assert with_decay["weight_decay"] == 0.3
    assert without["params"][0] is module.norm
    assert without["weight_decay"] == 0.0


def test_gradient_checkpointing_changes_no_weight(make_model):
    folder, batch = make_model(seed=5), batch_of([9, 4, 12])
    states = []
    for checkpointing in (False, True):
        module = load_critic(folder, dtype="fp32")
        torch.nn.init.normal_(module.hf.score.weight, generator=torch.Generator().manual_seed(0))
        engine = TrainEngine(
            module,
            config(gradient_checkpointing=checkpointing),
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        )
        assert module.hf.is_gradient_checkpointing is checkpointing
        train_once(engine, batch, 0.1)
        states.append(engine.full_state())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-6, rtol=0)
    assert not torch.equal(
        states[0]["score.weight"], load_critic(folder, dtype="fp32").hf.score.weight
    )


def test_bf16_learns_under_zero_3_and_skips_a_gradient_that_is_not_finite(make_model):
    folder, batch = make_model(seed=6), batch_of([9, 4])
    engine = TrainEngine(
        load_policy(folder, dtype="bf16"), config(3, dtype="bf16", gradient_checkpointing=True)
    )
    assert {p.dtype for _, p in engine.named_tensors()} == {torch.bfloat16}
    with torch.no_grad():
        expected = float(
            plain_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch)
        )
    losses = [train_once(engine, batch, 3e-3)[0] for _ in range(6)]
    assert losses[0] == pytest.approx(expected, rel=0.03)
    assert losses[-1] < losses[0] - 0.5
    before = engine.full_state()
    _, step = train_once(engine, batch, 3e-3, power=math.inf)
    assert not step.applied
    assert math.isnan(step.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.full_state().items())


def test_loading_what_is_not_there_is_a_value_error_of_one_line_that_names_it(make_model, tmp_path):
    engine = TrainEngine(load_policy(make_model(), dtype="fp32"), config(2))
    with pytest.raises(
        ValueError, match="checkpoint .*/policy: .*(incomplete|not found)"
    ) as caught:
        engine.load(tmp_path, "policy")
    assert "\n" not in str(caught.value)


def test_the_deepspeed_configuration_is_these_literals():
    assert deepspeed_config(EngineConfig(max_grad_norm=0.7), world_size=4, train=True) == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.7,
        "steps_per_print": None,
    }
    pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    for offload, train, expected in [
        ("optimizer", True, {"offload_optimizer": pinned}),
        ("all", True, {"offload_optimizer": pinned, "offload_param": pinned}),
        ("all", False, {"offload_param": pinned}),
        ("optimizer", False, {}),
    ]:
        zero = deepspeed_config(EngineConfig(offload=offload), world_size=1, train=train)[
            "zero_optimization"
        ]
        assert {key: value for key, value in zero.items() if "offload" in key} == expected
    plain = deepspeed_config(EngineConfig(zero_stage=0, dtype="fp32"), world_size=1, train=True)
    assert plain["zero_optimization"] == {"stage": 0}
    assert plain["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "all", "zero_stage": 2}, "offload=all needs zero_stage=3, got zero_stage=2"),
        (
            {"offload": "optimizer", "zero_stage": 0},
            "offload=optimizer needs zero_stage 1, 2 or 3, got 0",
        ),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


TRAINED = {"mlp", "input_layernorm", "post_attention_layernorm", "norm", "score"}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_attention_keeps_its_bits_and_needs_no_state(make_model, tmp_path, stage, kind):
    folder, batch = make_model(kind, classes=1, seed=9), batch_of([9, 4, 12])

    def make():
        module = load_critic(folder, dtype="fp32", freeze="attention")
        return TrainEngine(module, config(stage, weight_decay=0.1))

    engine = make()
    names = [name for name, _ in engine.named_tensors()]
    trained = {name for name in names if TRAINED & set(name.split("."))}
    assert {name for name in names if "self_attn" in name} | {"model.embed_tokens.weight"} == (
        set(names) - trained
    )
    before = engine.full_state()
    train_once(engine, batch, 1e-2)
    engine.save(tmp_path, "critic")
    train_once(engine, batch, 1e-2)
    after = engine.full_state()
    for name in names:
        assert torch.equal(after[name], before[name]) == (name not in trained), name

    states = engine.engine.optimizer.state_dict()
    if stage == 0:
        stored = sum(state["exp_avg"].numel() for state in states["state"].values())
        assert stored == sum(after[name].numel() for name in trained)
    if stage == 3:
        groups = engine.engine.optimizer.fp32_partitioned_groups_flat
        assert sum(group.numel() for group in groups) == sum(after[n].numel() for n in trained)

    again = make()
    again.load(tmp_path, "critic")
    train_once(again, batch, 1e-2)
    for name, tensor in again.full_state().items():
        assert torch.equal(tensor, after[name]), name
