"""The formulas against hand-worked numbers, a float64 numpy twin written as loops, and what must
not change them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verippo.rl import ppo
from verippo.rl.step_metrics import explained_variance


def tensor(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def mask_of(*values):
    return torch.tensor(values, dtype=torch.bool)


def cu(*lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


# Hand-worked numbers


def test_kl_estimates_worked_by_hand():
    # l = ln(1/2) - ln(1/4) = ln 2:  k1 = ln 2,  k2 = (ln 2)^2 / 2,  k3 = 1/2 - 1 + ln 2
    logprobs, reference = tensor(math.log(1 / 2)), tensor(math.log(1 / 4))
    for estimator, expected in (("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)):
        assert ppo.kl_estimate(logprobs, reference, estimator=estimator).item() == pytest.approx(
            expected, abs=1e-6
        )


def test_k1_and_k3_are_unbiased_on_three_words():
    p, q = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    exact = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    for estimator in ("k1", "k3"):
        estimates = ppo.kl_estimate(p.log(), q.log(), estimator=estimator)
        assert float((p * estimates).sum()) == pytest.approx(exact, abs=1e-12)
    assert (ppo.kl_estimate(p.log(), q.log(), estimator="k3") > 0).all()


def test_k3_of_an_impossible_ratio_is_finite():
    # -l = 500 is held at 20: e^20 - 1 - 500
    k3 = ppo.kl_estimate(tensor(-500.0), tensor(0.0), estimator="k3")
    assert k3.item() == pytest.approx(math.exp(20) - 501)


def test_score_lands_on_the_last_response_token_and_kl_on_each_worked_by_hand():
    # sequence 0: prompt, two response tokens, a slot after EOS; sequence 1: prompt, one response
    # token
    logprobs, reference = tensor(9, -1.0, -2.0, 9, 9, -3.0), tensor(7, -1.5, -1.0, 7, 7, -3.5)
    mask = mask_of(0, 1, 1, 0, 0, 1)
    rewards = ppo.token_rewards(tensor(1.0, 0.1), logprobs, reference, mask, cu(4, 2), kl_coef=0.1)
    # kl: 0.5, -1.0 and 0.5
    assert rewards.tolist() == pytest.approx([0, -0.05, 0.1 + 1.0, 0, 0, -0.05 + 0.1])


def test_scores_may_be_a_list_and_the_reference_absent_without_a_kl_penalty():
    rewards = ppo.token_rewards(
        [1.0, 0.1], torch.zeros(3), None, mask_of(0, 1, 1), cu(2, 1), kl_coef=0.0
    )
    assert rewards.tolist() == pytest.approx([0, 1.0, 0.1])


def test_gae_worked_by_hand():
    # gamma 1, lambda 1/2. delta = 0.6 - 0.5, 0.7 - 0.6, 1 - 0.7 = 0.1, 0.1, 0.3
    # A2 = 0.3, A1 = 0.1 + 0.15 = 0.25, A0 = 0.1 + 0.125 = 0.225; returns A + V
    advantages, returns = ppo.gae(
        tensor(0, 0, 0, 1.0),
        tensor(5, 0.5, 0.6, 0.7),
        mask_of(0, 1, 1, 1),
        cu(4),
        gamma=1.0,
        lam=0.5,
    )
    assert advantages.tolist() == pytest.approx([0, 0.225, 0.25, 0.3])
    assert returns.tolist() == pytest.approx([0, 0.725, 0.85, 1.0])


def test_gae_steps_over_a_gap_to_the_next_response_token_worked_by_hand():
    # The same response with a tool's output, values 8 and 9, between its first and second token.
    mask = mask_of(1, 0, 0, 1, 1)
    advantages, returns = ppo.gae(
        tensor(0, 0, 0, 0, 1.0), tensor(0.5, 8, 9, 0.6, 0.7), mask, cu(5), gamma=1.0, lam=0.5
    )
    assert advantages.tolist() == pytest.approx([0.225, 0, 0, 0.25, 0.3])
    assert returns.tolist() == pytest.approx([0.725, 0, 0, 0.85, 1.0])


def test_gae_takes_a_lambda_for_each_sequence_worked_by_hand():
    # Two equal sequences, delta = 0.1 and 0.4: lambda 0 gives 0.1, lambda 1 gives 0.5 first
    rewards, values, mask = tensor(0, 1.0, 0, 1.0), tensor(0.5, 0.6, 0.5, 0.6), mask_of(1, 1, 1, 1)
    advantages, _ = ppo.gae(rewards, values, mask, cu(2, 2), gamma=1.0, lam=tensor(0.0, 1.0))
    assert advantages.tolist() == pytest.approx([0.1, 0.4, 0.5, 0.4])


def test_whitening_worked_by_hand():
    # 1, 2, 3: mean 2, unbiased variance 1
    white = ppo.whiten(tensor(1.0, 99.0, 2.0, 3.0), mask_of(1, 0, 1, 1))
    assert white.tolist() == pytest.approx([-1, 0, 0, 1], abs=1e-7)
    given_moments = ppo.whiten(
        tensor(1.0, 99.0, 2.0, 3.0), mask_of(1, 0, 1, 1), mean=1.0, var=tensor(4.0)[0]
    )
    assert given_moments.tolist() == pytest.approx([0, 0, 0.5, 1], abs=1e-7)


def test_one_token_or_none_whitens_to_zero():
    assert ppo.whiten(tensor(5.0, 7.0), mask_of(1, 0)).tolist() == [0, 0]
    assert ppo.whiten(tensor(5.0, 7.0), mask_of(0, 0)).tolist() == [0, 0]
    assert ppo.whiten(torch.zeros(0), mask_of()).shape == (0,)


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "gradient", "clipped", "held"),
    [
        # The gradient is with respect to the log-prob: -A rho where the plain branch is the larger,
        # else 0.
        (1.1, 1.0, {}, -1.1, -1.1, 0, 0),
        (1.5, 1.0, {}, -1.2, 0.0, 1, 0),
        (1.5, -1.0, {}, 1.5, 1.5, 0, 0),
        (0.5, 1.0, {}, -0.5, -0.5, 0, 0),
        (0.5, -1.0, {}, 0.8, 0.0, 1, 0),
        (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5, 0, 0),
        (0.75, -2.0, {"clip_low": 0.3}, 1.5, 1.5, 0, 0),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0, 0, 1),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0, 2.0, 0, 0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.2, 0.0, 1, 0),
        (1.1, 1.0, {"importance": tensor(0.5)}, -0.55, -0.55, 0, 0),
    ],
)
def test_policy_loss_worked_by_hand(ratio, advantage, options, loss, gradient, clipped, held):
    logprobs = tensor(math.log(ratio) - 1).requires_grad_()
    out = ppo.policy_loss(logprobs, tensor(-1.0), tensor(advantage), mask_of(1), **options)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert (int(out.num_tokens), int(out.clip_sum), int(out.dual_clip_sum)) == (1, clipped, held)
    assert out.approx_kl_sum.item() == pytest.approx(ratio - 1 - math.log(ratio))
    assert out.ratio_max_abs_log.item() == pytest.approx(abs(math.log(ratio)))


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.2, 0.405, -0.9, 0),  # inside the bound: 0.5 * 0.9^2
        (
            1.0,
            0.0,
            0.0,
            0.2,
            0.5,
            1.0,
            0,
        ),  # moved away from the target: the plain error is the larger
        (1.0, 0.0, 2.0, 0.2, 1.62, 0.0, 1),  # moved far towards it: 0.5 * (0.2 - 2)^2, held
        (1.0, 0.0, 2.0, None, 0.5, -1.0, 0),
    ],
)
def test_value_loss_worked_by_hand(value, old, target, clip, loss, gradient, clipped):
    values = tensor(value).requires_grad_()
    out = ppo.value_loss(values, tensor(old), tensor(target), mask_of(1), clip=clip)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert (int(out.num_tokens), int(out.clip_sum)) == (1, clipped)


@pytest.mark.parametrize(
    ("kind", "scores", "groups", "expected"),
    [
        # 1 - (0 + 0.2)/2, 0 - (1 + 0.2)/2, 0.2 - (1 + 0)/2
        ("rloo", [1.0, 0.0, 0.2], [7, 7, 7], [0.9, -0.6, -0.3]),
        ("rloo", [1.0, 3.0, 0.0, 4.0], [5, 2, 5, 2], [1, -1, -1, 1]),
        # mean 0.4, deviations 0.6, -0.4, -0.2, unbiased variance 0.56 / 2, std 0.529150
        ("grpo", [1.0, 0.0, 0.2], [0, 0, 0], [1.133893, -0.755929, -0.377964]),
        ("grpo", [0.1, 0.1, 1.0, 0.0], [0, 0, 1, 1], [0, 0, 0.707107, -0.707107]),
        # deviations 0.5, -0.5, 1, -1: mean 0, unbiased variance 2.5 / 3, std 0.912871
        (
            "reinforce++",
            [1.0, 0.0, 3.0, 1.0],
            [0, 0, 1, 1],
            [0.547723, -0.547723, 1.095445, -1.095445],
        ),
        # one sample to each prompt: mean 1/2, unbiased variance 1/2
        ("reinforce++", [1.0, 0.0], [0, 1], [0.707107, -0.707107]),
    ],
)
def test_group_advantages_worked_by_hand(kind, scores, groups, expected):
    got = ppo.group_advantages(tensor(*scores), torch.tensor(groups), kind=kind)
    assert got.tolist() == pytest.approx(expected, abs=2e-6)


def test_explained_variance_worked_by_hand():
    returns, mask = tensor(1.0, 2.0, 3.0, 50.0), mask_of(1, 1, 1, 0)
    # residuals 0, 0, -1 have variance 1/3, the returns 1
    for values, expected in (
        ([1, 2, 3], 1),
        ([2, 3, 4], 1),
        ([5, 5, 5], 0),
        ([1, 2, 4], 2 / 3),
        ([3, 2, 1], -3),
    ):
        assert explained_variance(tensor(*values, -9.0), returns, mask).item() == pytest.approx(
            expected
        )
    assert explained_variance(tensor(1.0, 2.0), tensor(0.1, 0.1), mask_of(1, 1)).item() == 0
    assert explained_variance(tensor(1.0, 2.0), tensor(0.1, 0.3), mask_of(1, 0)).item() == 0


# The numpy twin of a whole step


def random_step(seed, *, turns=2):
    """A ragged batch: prompts, response turns with gaps between, slots after the end."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(rng.integers(1, 6)):
        parts = [np.zeros(rng.integers(0, 4))]
        for _ in range(rng.integers(1, turns + 1)):
            parts += [np.ones(rng.integers(1, 8)), np.zeros(rng.integers(0, 4))]
        masks.append(np.concatenate(parts).astype(bool))
    n, seqs = sum(map(len, masks)), len(masks)
    old = -rng.exponential(1.0, n)
    old_values = rng.normal(0, 1, n)
    return SimpleNamespace(
        mask=np.concatenate(masks),
        cu_seqlens=np.cumsum([0, *map(len, masks)]),
        scores=rng.choice([0.0, 0.1, 1.0], seqs),
        old=old,
        reference=old + rng.normal(0, 0.3, n),
        new=old + rng.normal(0, 0.4, n),
        old_values=old_values,
        new_values=old_values + rng.normal(0, 0.3, n),
        lam=rng.uniform(0, 1, seqs),
        importance=rng.uniform(0, 2, n),
    )


def twin(s, o):
    """The step as the papers write it: scalar loops over each sequence's response tokens, gradients
    by hand."""
    n = len(s.mask)
    rewards, advantages, returns = np.zeros(n), np.zeros(n), np.zeros(n)
    for i in range(len(s.scores)):
        response = [t for t in range(s.cu_seqlens[i], s.cu_seqlens[i + 1]) if s.mask[t]]
        for t in response:
            gap = s.old[t] - s.reference[t]
            kl = {"k1": gap, "k2": gap * gap / 2, "k3": math.exp(-gap) - 1 + gap}[o.estimator]
            rewards[t] = -o.kl_coef * kl + (s.scores[i] if t == response[-1] else 0)
        next_value = next_advantage = 0.0
        for t in reversed(response):
            delta = rewards[t] + o.gamma * next_value - s.old_values[t]
            next_advantage = advantages[t] = delta + o.gamma * s.lam[i] * next_advantage
            next_value = s.old_values[t]
            returns[t] = advantages[t] + s.old_values[t]
    chosen = np.flatnonzero(s.mask)
    white = np.zeros(n)
    spread = sum((advantages[t] - advantages[chosen].mean()) ** 2 for t in chosen) / max(
        len(chosen) - 1, 1
    )
    for t in chosen:
        white[t] = (advantages[t] - advantages[chosen].mean()) / math.sqrt(spread + 1e-8)

    policy = value = kl_sum = 0.0
    clips = holds = value_clips = 0
    grad_logprobs, grad_values = np.zeros(n), np.zeros(n)
    for t in chosen:
        rho, a, w = math.exp(s.new[t] - s.old[t]), white[t], s.importance[t]
        bounded = min(max(rho, 1 - o.clip_low), 1 + o.clip_high)
        loss, gradient = -a * rho, -a * rho
        if -a * bounded > loss:
            loss, gradient, clips = -a * bounded, 0.0, clips + 1
        if a < 0 and loss > -o.dual_clip * a:
            loss, gradient, holds = -o.dual_clip * a, 0.0, holds + 1
        policy += w * loss
        grad_logprobs[t] = w * gradient
        kl_sum += rho - 1 - math.log(rho)

        error = s.new_values[t] - returns[t]
        moved = min(
            max(s.new_values[t], s.old_values[t] - o.value_clip), s.old_values[t] + o.value_clip
        )
        if (moved - returns[t]) ** 2 > error**2:
            value += 0.5 * (moved - returns[t]) ** 2
            value_clips += 1
        else:
            value += 0.5 * error**2
            grad_values[t] = error
    log_rho = [abs(s.new[t] - s.old[t]) for t in chosen]
    counts = [len(chosen), clips, holds, value_clips]
    return [
        rewards,
        advantages,
        returns,
        white,
        policy,
        kl_sum,
        max(log_rho),
        value,
        grad_logprobs,
        grad_values,
        counts,
    ]


def step(s, o):
    """The same through the code under test, in the dtype of the arrays."""
    t = SimpleNamespace(**{name: torch.as_tensor(array) for name, array in vars(s).items()})
    new, new_values = t.new.requires_grad_(), t.new_values.requires_grad_()
    boundaries = t.cu_seqlens.int()
    rewards = ppo.token_rewards(
        t.scores, t.old, t.reference, t.mask, boundaries, kl_coef=o.kl_coef, estimator=o.estimator
    )
    advantages, returns = ppo.gae(
        rewards, t.old_values, t.mask, boundaries, gamma=o.gamma, lam=t.lam
    )
    white = ppo.whiten(advantages, t.mask)
    pg = ppo.policy_loss(
        new,
        t.old,
        white,
        t.mask,
        clip_low=o.clip_low,
        clip_high=o.clip_high,
        dual_clip=o.dual_clip,
        importance=t.importance,
    )
    vf = ppo.value_loss(new_values, t.old_values, returns, t.mask, clip=o.value_clip)
    pg.loss_sum.backward()
    vf.loss_sum.backward()
    assert int(pg.num_tokens) == int(vf.num_tokens)
    counts = torch.stack([pg.num_tokens, pg.clip_sum, pg.dual_clip_sum, vf.clip_sum])
    out = [
        rewards,
        advantages,
        returns,
        white,
        pg.loss_sum,
        pg.approx_kl_sum,
        pg.ratio_max_abs_log,
        vf.loss_sum,
    ]
    return [x.detach() for x in [*out, new.grad, new_values.grad, counts]]


options = st.builds(
    SimpleNamespace,
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    kl_coef=st.sampled_from([0.0, 0.03, 0.5]),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    clip_low=st.floats(0.05, 1),
    clip_high=st.floats(0.05, 1),
    dual_clip=st.floats(1.1, 4),
    value_clip=st.floats(0.05, 1),
)
ORIGINAL = SimpleNamespace(
    estimator="k1",
    kl_coef=0.03,
    gamma=1.0,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=1.5,
    value_clip=0.2,
)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**9), o=options)
def test_a_whole_step_equals_the_numpy_twin_with_its_gradients(seed, o):
    s = random_step(seed)
    for got, expected in zip(step(s, o), twin(s, o), strict=True):
        np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=1e-10, atol=1e-10)


def test_the_twin_meets_every_branch():
    clips, holds, value_clips = np.sum(
        [twin(random_step(seed), ORIGINAL)[-1][1:] for seed in range(40)], axis=0
    )
    assert min(clips, holds, value_clips) > 3


def test_fp32_inputs_give_fp32_outputs_near_the_twin():
    for seed in range(10):
        s = random_step(seed)
        narrow = SimpleNamespace(
            **{k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in vars(s).items()}
        )
        for got, expected in zip(step(narrow, ORIGINAL), twin(s, ORIGINAL), strict=True):
            assert got.dtype in (torch.float32, torch.int64)
            np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=2e-4, atol=2e-5)


def test_bf16_inputs_are_computed_in_fp32():
    x, mask = torch.randn(8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bool)
    assert ppo.policy_loss(x, x, x, mask).loss_sum.dtype == torch.float32
    assert ppo.value_loss(x, x, x, mask).loss_sum.dtype == torch.float32
    assert ppo.whiten(x, mask).dtype == torch.float32
    assert ppo.gae(x, x, mask, cu(8), gamma=1.0, lam=0.95)[0].dtype == torch.float32
    assert ppo.token_rewards([1.0], x, x, mask, cu(8), kl_coef=0.1).dtype == torch.float32


# Masks


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_masked_slots_change_no_output_and_no_gradient(garbage):
    for seed in range(5):
        s = random_step(seed)
        spoiled = SimpleNamespace(**{name: array.copy() for name, array in vars(s).items()})
        for name in ("old", "reference", "new", "old_values", "new_values", "importance"):
            vars(spoiled)[name][~s.mask] = garbage
        for got, expected in zip(step(spoiled, ORIGINAL), step(s, ORIGINAL), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_slots_of_targets_and_metrics_do_not_matter(garbage):
    x, mask = tensor(1.0, 2.0, 4.0, garbage), mask_of(1, 1, 1, 0)
    clean = tensor(1.0, 2.0, 4.0, 0.0)
    y = tensor(1.5, 1.0, 3.0, 0.0)
    assert torch.equal(ppo.whiten(x, mask), ppo.whiten(clean, mask))
    assert explained_variance(x, y, mask) == explained_variance(clean, y, mask)
    assert explained_variance(y, x, mask) == explained_variance(y, clean, mask)
    assert ppo.policy_loss(y, y, x, mask).loss_sum == ppo.policy_loss(y, y, clean, mask).loss_sum
    assert ppo.value_loss(y, y, x, mask).loss_sum == ppo.value_loss(y, y, clean, mask).loss_sum
    for a, b in zip(
        ppo.gae(x, y, mask, cu(4), gamma=1.0, lam=0.9),
        ppo.gae(clean, y, mask, cu(4), gamma=1.0, lam=0.9),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_integer_masks_mean_the_same():
    s = random_step(3)
    integers = SimpleNamespace(**vars(s) | {"mask": s.mask.astype(np.int64)})
    for got, expected in zip(step(integers, ORIGINAL), step(s, ORIGINAL), strict=True):
        assert torch.equal(got, expected)


def test_a_micro_batch_without_response_tokens_gives_zero_and_stays_connected():
    for n in (0, 3):
        x = torch.randn(n, requires_grad=True)
        constant, mask = torch.randn(n), torch.zeros(n, dtype=torch.bool)
        pg = ppo.policy_loss(x, constant, constant, mask, dual_clip=3.0)
        vf = ppo.value_loss(x, constant, constant, mask)
        (pg.loss_sum + vf.loss_sum).backward()
        assert [float(field.detach()) for field in (*pg, *vf)] == [0.0] * 10
        assert not x.grad.any()
    advantages, returns = ppo.gae(constant, constant, mask, cu(2, 1), gamma=1.0, lam=0.95)
    assert not advantages.any()
    assert not returns.any()


def test_a_sequence_without_response_tokens_may_only_score_zero():
    logprobs, mask = torch.zeros(3), mask_of(0, 1, 0)
    rewards = ppo.token_rewards([0.5, 0.0, 0.0], logprobs, logprobs, mask, cu(2, 1, 0), kl_coef=0.1)
    assert rewards.tolist() == [0, 0.5, 0]
    with pytest.raises(ValueError, match="sequence 1 has no response token"):
        ppo.token_rewards([0.5, 1.0, 0.0], logprobs, logprobs, mask, cu(2, 1, 0), kl_coef=0.1)
    with pytest.raises(ValueError, match="sequence 2 has no response token"):
        ppo.token_rewards([0.5, 0.0, math.nan], logprobs, logprobs, mask, cu(2, 1, 0), kl_coef=0.1)


# Invariances


def rewards_and_values(seed):
    s = random_step(seed)
    mask, boundaries = torch.as_tensor(s.mask), torch.as_tensor(s.cu_seqlens).int()
    rewards = torch.where(mask, torch.as_tensor(s.reference), 0.0)
    return rewards, torch.as_tensor(s.old_values), mask, boundaries


@pytest.mark.parametrize("seed", range(5))
def test_gae_with_lambda_one_is_return_minus_value(seed):
    rewards, values, mask, boundaries = rewards_and_values(seed)
    advantages, returns = ppo.gae(rewards, values, mask, boundaries, gamma=0.9, lam=1.0)
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        tokens = [t for t in range(start, stop) if mask[t]]
        for i, t in enumerate(tokens):
            discounted = sum(0.9**k * float(rewards[u]) for k, u in enumerate(tokens[i:]))
            assert float(returns[t]) == pytest.approx(discounted, abs=1e-12)
            assert float(advantages[t]) == pytest.approx(discounted - float(values[t]), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_gae_with_lambda_zero_is_the_one_step_error(seed):
    rewards, values, mask, boundaries = rewards_and_values(seed)
    advantages, _ = ppo.gae(rewards, values, mask, boundaries, gamma=0.9, lam=0.0)
    for start, stop in zip(boundaries[:-1], boundaries[1:], strict=True):
        tokens = [t for t in range(start, stop) if mask[t]]
        for t, following in zip(tokens, [*tokens[1:], None], strict=True):
            next_value = 0.0 if following is None else float(values[following])
            assert float(advantages[t]) == pytest.approx(
                float(rewards[t]) + 0.9 * next_value - float(values[t])
            )


def test_undiscounted_return_of_every_token_is_the_score_when_lambda_is_one_and_kl_is_off():
    s = random_step(11)
    mask, boundaries = torch.as_tensor(s.mask), torch.as_tensor(s.cu_seqlens).int()
    rewards = ppo.token_rewards(
        s.scores.tolist(), torch.as_tensor(s.old), None, mask, boundaries, kl_coef=0.0
    )
    _, returns = ppo.gae(
        rewards, torch.as_tensor(s.old_values), mask, boundaries, gamma=1.0, lam=1.0
    )
    for i, score in enumerate(s.scores):
        part = slice(s.cu_seqlens[i], s.cu_seqlens[i + 1])
        torch.testing.assert_close(returns[part], score * mask[part].double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_value_for_each_token_right_on_average_gives_zero_advantage(seed):
    # A critic that knows the discounted return leaves nothing to estimate, whatever lambda.
    rewards, _, mask, boundaries = rewards_and_values(seed)
    _, exact = ppo.gae(rewards, torch.zeros_like(rewards), mask, boundaries, gamma=0.9, lam=1.0)
    advantages, _ = ppo.gae(rewards, exact, mask, boundaries, gamma=0.9, lam=0.37)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_sequences_and_masked_slots_between_change_nothing(seed):
    rewards, values, mask, boundaries = rewards_and_values(seed)
    together = ppo.gae(rewards, values, mask, boundaries, gamma=0.9, lam=0.8)
    for start, stop in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        kept = mask[start:stop]
        bare = ppo.gae(
            rewards[start:stop][kept],
            values[start:stop][kept],
            kept[kept],
            cu(int(kept.sum())),
            gamma=0.9,
            lam=0.8,
        )
        for whole, alone in zip(together, bare, strict=True):
            torch.testing.assert_close(whole[start:stop][kept], alone, rtol=0, atol=1e-12)


def test_losses_of_micro_batches_add_up_to_that_of_the_whole():
    s = random_step(5)
    new, old, white, mask = (torch.as_tensor(x) for x in (s.new, s.old, s.old_values, s.mask))
    cut = int(s.cu_seqlens[1])
    for loss in (ppo.policy_loss, ppo.value_loss):
        whole = loss(new, old, white, mask)
        parts = [
            loss(*(x[part] for x in (new, old, white, mask)))
            for part in (slice(0, cut), slice(cut, None))
        ]
        for name in ("loss_sum", "num_tokens", "clip_sum"):
            total = sum(float(getattr(part, name)) for part in parts)
            assert total == pytest.approx(float(getattr(whole, name)), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_whitened_values_have_mean_zero_and_variance_one_and_forget_shift_and_scale(
    seed, shift, scale
):
    rng = np.random.default_rng(seed)
    x, mask = torch.as_tensor(rng.normal(0, 1, 50)), torch.as_tensor(rng.random(50) < 0.6)
    white = ppo.whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[mask].var()) == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(ppo.whiten(scale * x + shift, mask), white, rtol=0, atol=1e-5)
    given_moments = ppo.whiten(x, mask, mean=x[mask].mean(), var=x[mask].var())
    torch.testing.assert_close(given_moments, white, rtol=0, atol=1e-12)


def test_an_unmoved_policy_has_ratio_one_no_clipping_and_gradient_minus_advantage():
    old, advantages, mask = torch.randn(20), torch.randn(20), torch.arange(20) % 3 > 0
    new = old.clone().requires_grad_()
    out = ppo.policy_loss(new, old, advantages, mask)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(-float(advantages[mask].sum()), abs=1e-5)
    assert torch.equal(new.grad, torch.where(mask, -advantages, 0.0))
    assert (int(out.clip_sum), float(out.approx_kl_sum), float(out.ratio_max_abs_log)) == (
        0,
        0.0,
        0.0,
    )


def test_log_ratios_beyond_twenty_are_held_and_still_reported():
    new = torch.tensor([100.0, -100.0]).requires_grad_()
    out = ppo.policy_loss(new, torch.zeros(2), torch.tensor([-1.0, 1.0]), mask_of(1, 1))
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(math.exp(20), rel=1e-6)
    assert new.grad.tolist() == [0, 0]
    assert out.ratio_max_abs_log.item() == 100
    assert math.isfinite(out.approx_kl_sum)


def test_nan_on_the_mask_reaches_the_loss():
    bad, good = tensor(math.nan, 1.0), tensor(0.5, 1.0)
    assert ppo.policy_loss(bad, good, good, mask_of(1, 1)).loss_sum.isnan()
    assert ppo.value_loss(bad, good, good, mask_of(1, 1)).loss_sum.isnan()


def test_targets_get_no_gradient():
    x = [torch.randn(4, requires_grad=True) for _ in range(4)]
    mask = torch.ones(4, dtype=torch.bool)
    ppo.policy_loss(*x[:3], mask, importance=x[3]).loss_sum.backward()
    ppo.value_loss(*x[:3], mask).loss_sum.backward()
    assert [leaf.grad is None for leaf in x] == [False, True, True, True]
    assert not any(
        out.requires_grad for out in ppo.gae(x[0], x[1], mask, cu(4), gamma=1.0, lam=1.0)
    )
    assert not ppo.token_rewards([1.0], x[0], x[1], mask, cu(4), kl_coef=0.1).requires_grad


@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce++"])
def test_group_advantages_sum_to_zero_and_forget_each_prompts_level(kind):
    rng = np.random.default_rng(0)
    scores, groups = (
        torch.as_tensor(rng.normal(0, 1, 12)),
        torch.as_tensor(rng.permutation(np.arange(12) % 4)),
    )
    advantages = ppo.group_advantages(scores, groups, kind=kind)
    for group in range(4):
        assert float(advantages[groups == group].sum()) == pytest.approx(0, abs=1e-12)
    shifted = ppo.group_advantages(scores + 10.0 * groups, groups, kind=kind)
    torch.testing.assert_close(shifted, advantages, rtol=0, atol=1e-10)


# What is refused

X, Y, MASK = torch.zeros(3), torch.zeros(2), torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppo.kl_estimate(X, X, estimator="k4"), "estimator is 'k4'"),
        (lambda: ppo.kl_estimate(X, Y, estimator="k1"), r"ref_logprobs has shape \[2\]"),
        (
            lambda: ppo.token_rewards([1.0], X, X, MASK, cu(2, 1), kl_coef=0.1),
            r"scores has shape \[1\], must be \[2\]",
        ),
        (
            lambda: ppo.token_rewards([1.0], X, X, MASK, cu(2), kl_coef=0.1),
            "must rise from 0 to the 3 tokens",
        ),
        (lambda: ppo.token_rewards([1.0], X, X, MASK, cu(3), kl_coef=-0.1), "kl_coef is -0.1"),
        (
            lambda: ppo.token_rewards([1.0], X, None, MASK, cu(3), kl_coef=0.1),
            "without ref_logprobs",
        ),
        (
            lambda: ppo.token_rewards([1.0], X, Y, MASK, cu(3), kl_coef=0.1),
            "ref_logprobs has shape",
        ),
        (lambda: ppo.gae(X, Y, MASK, cu(3), gamma=1.0, lam=1.0), "values has shape"),
        (lambda: ppo.gae(X, X, X, cu(3), gamma=1.0, lam=1.0), "the mask is torch.float32"),
        (lambda: ppo.gae(X, X, MASK[:2], cu(3), gamma=1.0, lam=1.0), "the mask has shape"),
        (lambda: ppo.gae(X, X, MASK, cu(4, -1), gamma=1.0, lam=1.0), "must rise"),
        (lambda: ppo.gae(X, X, MASK, cu(3)[1:], gamma=1.0, lam=1.0), "must rise"),
        (lambda: ppo.gae(X, X, MASK, cu(3), gamma=1.1, lam=1.0), "gamma=1.1"),
        (lambda: ppo.gae(X, X, MASK, cu(3), gamma=1.0, lam=-0.1), "lam=-0.1"),
        (lambda: ppo.gae(X, X, MASK, cu(3), gamma=1.0, lam=math.nan), "lam=nan"),
        (lambda: ppo.gae(X, X, MASK, cu(2, 1), gamma=1.0, lam=X), r"of shape \[2\]"),
        (lambda: ppo.whiten(X, MASK, mean=0.0), "give both or neither"),
        (lambda: ppo.whiten(X, X), "was another tensor passed in its place"),
        (lambda: ppo.policy_loss(X, Y, X, MASK), "old_logprobs has shape"),
        (lambda: ppo.policy_loss(X, X, Y, MASK), "advantages has shape"),
        (lambda: ppo.policy_loss(X, X, X, X), "the mask is"),
        (
            lambda: ppo.policy_loss(X[None], X[None], X[None], MASK[None]),
            r"both must be \[tokens\]",
        ),
        (lambda: ppo.policy_loss(X, X, X, MASK, clip_low=0.0), "clip_low=0.0"),
        (lambda: ppo.policy_loss(X, X, X, MASK, clip_low=1.2), "clip_low=1.2"),
        (lambda: ppo.policy_loss(X, X, X, MASK, clip_high=0.0), "clip_high=0.0"),
        (lambda: ppo.policy_loss(X, X, X, MASK, dual_clip=1.0), "dual_clip is 1.0"),
        (lambda: ppo.policy_loss(X, X, X, MASK, importance=Y), "importance has shape"),
        (lambda: ppo.value_loss(X, Y, X, MASK), "old_values has shape"),
        (lambda: ppo.value_loss(X, X, Y, MASK), "returns has shape"),
        (lambda: ppo.value_loss(X, X, X, MASK, clip=0.0), "clip is 0.0"),
        (lambda: ppo.group_advantages(X, MASK.int(), kind="mean"), "kind is 'mean'"),
        (lambda: ppo.group_advantages(X, X, kind="rloo"), "groups of integers"),
        (lambda: ppo.group_advantages(X, MASK[:2].int(), kind="rloo"), "shapes"),
        (
            lambda: ppo.group_advantages(X, torch.tensor([4, 4, 9]), kind="rloo"),
            "group 9 has 1 score",
        ),
        (
            lambda: ppo.group_advantages(X, torch.tensor([4, 4, 9]), kind="grpo"),
            "group 9 has 1 score",
        ),
        (
            lambda: ppo.group_advantages(X, torch.tensor([4, 4, 9]), kind="reinforce++"),
            "group 9 has 1 score",
        ),
        (lambda: explained_variance(X, Y, MASK), "returns has shape"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        ppo.policy_loss(X, X, X, MASK, 0.2)
    with pytest.raises(TypeError):
        ppo.value_loss(X, X, X, MASK, 0.2)
    with pytest.raises(TypeError):
        ppo.gae(X, X, MASK, cu(3), 1.0, 0.95)


def test_results_are_tensors_without_dimensions():
    for out in (ppo.policy_loss(X, X, X, MASK), ppo.value_loss(X, X, X, MASK)):
        assert all(isinstance(field, Tensor) and field.shape == () for field in out)


def test_gae_with_another_lambda_for_the_critic():
    """One sequence of two tokens, worked by hand: gamma 1, delta = (0.1, 0.4)."""
    rewards = torch.tensor([0.0, 1.0])
    values = torch.tensor([0.5, 0.6])
    mask = torch.ones(2, dtype=torch.bool)
    bounds = torch.tensor([0, 2])
    options = {"gamma": 1.0, "lam": 0.5, "lam_critic": 1.0}
    advantages, returns = ppo.gae(rewards, values, mask, bounds, **options)
    assert advantages.tolist() == pytest.approx([0.3, 0.4])
    assert returns.tolist() == pytest.approx([1.0, 1.0])
    same = ppo.gae(rewards, values, mask, bounds, gamma=1.0, lam=0.5)
    assert same[1].tolist() == pytest.approx([0.8, 1.0])
