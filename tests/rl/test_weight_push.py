"""The parity gate. For a real server see tests/sglang."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from verippo.core.sampling.sampler import Completion
from verippo.core.training import dist
from verippo.core.training.pretrained import load_policy
from verippo.rl import weight_push as sync
from verippo.rl.config import PPOConfig, SamplerConfig, VerifierConfig

PROMPTS = [[1, 5, 9, 200], [1], list(range(3, 203)), [1, 319], [4, 4, 4], [8, 8]]
CONFIG = PPOConfig(
    policy="p", data="d", output="o", steps=3, verifier=VerifierConfig(kind="exact"), dtype="fp32"
)


class Elsewhere:
    """A sampler with two copies of the weights; one log-prob of the second is off by `wrong`."""

    def __init__(self, path, wrong=0.0):
        self.model, self.wrong, self.version, self.slept, self.closed = (
            load_policy(path, dtype="fp32").hf,
            wrong,
            None,
            0,
            0,
        )
        self.deaf = False

    def generate(self, prompts, params):
        return [Completion(token_ids=[2], logprobs=[-1.0], finish_reason="stop")]

    def update_weights(self, named_tensors, version):
        self.version = version
        if not self.deaf:
            self.model.load_state_dict(dict(named_tensors), strict=False)

    @torch.no_grad()
    def logprobs(self, sequences):
        found = {"first": [], "second": []}
        for ids in sequences:  # transformers' own forward, one sequence at a time
            tokens = torch.tensor([ids])
            attention = {"cu_seqlens": [0, len(ids)], "max_seqlen": len(ids)}
            hidden = self.model.base_model(
                input_ids=tokens, use_cache=False, **attention
            ).last_hidden_state
            table = torch.log_softmax(
                torch.nn.functional.linear(hidden, self.model.lm_head.weight), -1
            )[0, :-1]
            for copy in found.values():
                copy.append(table.gather(1, tokens[0, 1:, None]).squeeze(1).tolist())
        found["second"][1][2] += self.wrong
        return found

    def sleep(self):
        self.slept += 1

    def close(self):
        self.closed += 1


def a_run(path, sampler):
    policy = load_policy(path, dtype="fp32")

    def forward(batch, **options):
        return policy(batch, **options)

    forward.named_tensors = lambda: policy.hf.named_parameters()
    return SimpleNamespace(
        policy=forward, sampler=sampler, train_set=SimpleNamespace(token_ids=PROMPTS), gate={}
    )


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init()


def test_the_gate_uses_the_first_tokens_of_the_first_prompts():
    batch = sync.gate_batch(PROMPTS)
    assert batch.lengths == [4, 128, 2, 3]  # a lone token has no log-prob
    starts = batch.cu_seqlens[:-1].long()
    assert not batch.response_mask[starts].any()
    assert int(batch.response_mask.sum()) == sum(batch.lengths) - 4
    assert batch.tokens[:4].tolist() == PROMPTS[0]


def test_a_successful_update_returns_version_and_gap(make_model):
    sampler = Elsewhere(make_model("llama", seed=1))  # other weights, until the update
    metrics = sync.push_weights(CONFIG, a_run(make_model("llama", seed=2), sampler), 7)
    assert metrics.keys() == {"weight_version", "weight_parity_gap"}
    assert metrics["weight_version"] == sampler.version == 7
    assert 0 <= metrics["weight_parity_gap"] < 1e-5


def test_a_copy_that_differs_anywhere_is_an_error(make_model):
    path = make_model("llama", seed=2)
    with pytest.raises(
        RuntimeError,
        match="second does not hold the trainer's weights: token 3 of gate sequence 1 has log-prob",
    ):
        sync.push_weights(CONFIG, a_run(path, Elsewhere(path, wrong=2e-4)), 7)
    wide = replace(CONFIG, sampler=SamplerConfig(parity_tolerance=1e-3))
    for config, wrong in ((wide, 2e-4), (replace(CONFIG, dtype="bf16"), -0.2)):
        gap = sync.push_weights(config, a_run(path, Elsewhere(path, wrong=wrong)), 7)[
            "weight_parity_gap"
        ]
        assert gap == pytest.approx(abs(wrong), rel=0.1)
    with pytest.raises(RuntimeError, match="a gap of inf over sampler.parity_tolerance=0.0001"):
        sync.push_weights(CONFIG, a_run(path, Elsewhere(path, wrong=float("nan"))), 7)


def test_a_copy_that_missed_a_small_update_is_detected(make_model):
    path = make_model("llama", seed=2)
    sampler = Elsewhere(path)
    run, config = a_run(path, sampler), replace(CONFIG, dtype="bf16")  # tolerance 0.5

    def step(size):
        with torch.no_grad():
            for _, parameter in run.policy.named_tensors():
                parameter.mul_(1 + size)

    for version, size in enumerate((0, 1e-4, 0, 1e-4)):  # a step that moves nothing is no fault
        step(size)
        assert sync.push_weights(config, run, version)["weight_parity_gap"] < 1e-5
    sampler.deaf = True
    sync.push_weights(config, run, 4)
    step(1e-4)
    with pytest.raises(
        RuntimeError,
        match=r"first did not take .* to the last bit, while \d+% of the trainer's moved, by up to",
    ):
        sync.push_weights(config, run, 5)


def test_the_gap_worked_by_hand():
    batch = sync.gate_batch([[5, 6, 7], [8, 9]])
    ours = torch.tensor([0.0, -1.0, -2.0, 0.0, -3.0])
    assert sync.parity_gap(ours, batch, [[-1.0, -2.25], [-3.125]], name="x", limit=0.5) == 0.25
    message = (
        "x .*: token 2 of gate sequence 0 has log-prob -2.250000 there, -2.000000 in the trainer, "
        "a gap of 0.25"
    )
    with pytest.raises(RuntimeError, match=message):
        sync.parity_gap(ours, batch, [[-1.0, -2.25], [-3.125]], name="x", limit=0.2)


def test_a_custom_sampler_without_log_probs_is_not_gated(make_model):
    path = make_model("llama", seed=2)
    plain = SimpleNamespace(
        update_weights=lambda tensors, version: len(list(tensors)), generate=None
    )
    assert sync.push_weights(CONFIG, a_run(path, plain), 3) == {"weight_version": 3}
    sync.sleep(CONFIG, plain)
    sync.close(plain)


def test_a_sampler_sleeps_only_if_configured(make_model):
    sampler = Elsewhere(make_model("llama"))
    sync.sleep(CONFIG, sampler)
    assert sampler.slept == 0
    sync.sleep(replace(CONFIG, sampler=SamplerConfig(kind="sglang", urls="x", sleep=True)), sampler)
    sync.close(sampler)
    assert (sampler.slept, sampler.closed) == (1, 1)
