from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from verippo.core.training.packing import pack
from verippo.rl.advantages import NoCritic, advantage_function
from verippo.rl.config import PPOConfig, VerifierConfig

# problem, then tokens of prompt and response: two samples each of problems 4 and 9
SHAPE = [(4, 2, 3), (4, 2, 1), (9, 1, 2), (9, 1, 2)]
# rewards on the response tokens; they sum to 1, 3, 2, -2
REWARDS = [[0.0, 0.5, 0.5], [3.0], [0.0, 2.0], [-1.0, -1.0]]


def config(**changes):
    verifier = VerifierConfig(kind="exact")
    given = {
        "policy": "p",
        "data": "d",
        "output": "o",
        "steps": 1,
        "verifier": verifier,
        "samples_per_prompt": 2,
    }
    return PPOConfig(**given | changes)


@pytest.fixture
def step():
    """rewards [tokens], values [tokens], batch, rollouts"""
    rollouts = [
        SimpleNamespace(
            problem=SimpleNamespace(index=problem),
            prompt_ids=[5] * prompt,
            response_ids=[6] * response,
        )
        for problem, prompt, response in SHAPE
    ]
    batch = pack(rollouts)
    rewards = torch.zeros(batch.num_tokens)
    rewards[batch.response_mask] = torch.tensor([r for row in REWARDS for r in row])
    values = torch.where(batch.response_mask, 0.5, torch.nan)
    return rewards, values, batch, rollouts


def on_responses(tensor, batch):
    assert bool((tensor[~batch.response_mask] == 0).all())
    return tensor[batch.response_mask].tolist()


def test_rloo_gives_every_token_its_responses_reward_less_the_others_of_its_problem(step):
    advantages, returns = advantage_function(config(advantage="rloo"))(*step)
    assert on_responses(advantages, step[2]) == [-2, -2, -2, 2, 4, 4, -4, -4]
    assert on_responses(returns, step[2]) == [0] * 8


def test_grpo_divides_by_the_spread_of_the_problem(step):
    advantages, _ = advantage_function(config(advantage="grpo"))(*step)
    # group 4: 1 and 3, mean 2, std sqrt(2); group 9: 2 and -2, mean 0, std sqrt(8)
    half = 0.5**0.5
    expected = [-half] * 3 + [half] + [half] * 2 + [-half] * 2
    assert on_responses(advantages, step[2]) == pytest.approx(expected, abs=1e-5)


def test_gae_uses_the_values_worked_by_hand(step):
    advantages, returns = advantage_function(config(advantage="gae", gamma=0.5, lam=0.5))(*step)
    # response 1: deltas 0 + .25 - .5 = -.25, .5 + .25 - .5 = .25, .5 - .5 = 0; A = 0, .25 + 0, -.25
    # + .25 * .25 = -.1875
    # response 2: 3 - .5; response 3: deltas -.25, 1.5, A = 1.5, -.25 + .375; response 4: -1.25,
    # -1.5, A = -1.5, -1.625
    expected = [-0.1875, 0.25, 0.0, 2.5, 0.125, 1.5, -1.625, -1.5]
    assert on_responses(advantages, step[2]) == pytest.approx(expected)
    assert on_responses(returns, step[2]) == pytest.approx([a + 0.5 for a in expected])


def test_one_sample_a_prompt_is_a_group_by_itself_even_when_a_problem_comes_twice(step):
    advantages, _ = advantage_function(config(advantage="reinforce++", samples_per_prompt=1))(*step)
    totals = torch.tensor([1.0, 3.0, 2.0, -2.0])
    white = ((totals - totals.mean()) / totals.std()).tolist()
    lengths = [response for _, _, response in SHAPE]
    expected = [w for w, length in zip(white, lengths, strict=True) for _ in range(length)]
    assert on_responses(advantages, step[2]) == pytest.approx(expected, abs=1e-5)


def test_a_problem_met_twice_in_a_step_makes_one_larger_group(step):
    rewards, values, batch, rollouts = step
    for rollout in rollouts:
        rollout.problem.index = 4
    advantages, _ = advantage_function(config(advantage="rloo"))(rewards, values, batch, rollouts)
    expected = [1 - 3 / 3] * 3 + [3 - 1 / 3] + [2 - 2 / 3] * 2 + [-2 - 6 / 3] * 2
    assert on_responses(advantages, batch) == pytest.approx(expected)


def test_without_a_critic_values_are_zero_and_steps_do_nothing(step, tmp_path):
    critic = NoCritic()
    assert critic(step[2]).tolist() == [0.0] * step[2].num_tokens
    critic.backward(torch.ones((), requires_grad=True), 3, last=True)
    assert critic.step(0.1) == (True, 0.0)
    critic.save(tmp_path, "critic")
    critic.load(tmp_path, "critic")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda r: r, "returned a Tensor of shape .*: must be"),
        (
            lambda r: (r, r[1:]),
            r"of shape \(\d+,\) .* as returns: must be .* \[\d+\], one per token",
        ),
        (lambda r: ([0.0], r), "returned list of 1 as advantages"),
        (lambda r: (r, r * float("nan")), "returns hold a value that is not finite"),
    ],
)
def test_an_estimator_that_returns_unusable_values_is_refused(returned, message, step, monkeypatch):
    rewards, values, batch, rollouts = step
    monkeypatch.setattr(
        "verippo.rl.advantages.load_function",
        lambda spec, option: lambda rewards, values, batch, rollouts: returned(rewards),
    )
    function = advantage_function(config(advantage_function="mine:estimate"))
    with pytest.raises(ValueError, match=f"mine:estimate.*{message}"):
        function(torch.where(batch.response_mask, rewards, 0), values, batch, rollouts)


def test_adaptive_lambda_gives_each_response_its_own_lambda(step):
    rewards, values, batch, rollouts = step
    given = advantage_function(config(advantage="gae", lam_alpha=0.5))
    advantages, _ = given(rewards, values, batch, rollouts)
    for seq, rollout in enumerate(rollouts):
        lam = max(0.0, 1 - 1 / (0.5 * len(rollout.response_ids)))
        plain = advantage_function(config(advantage="gae", lam=lam))
        own = batch.seq_ids == seq
        expected, _ = plain(rewards, values, batch, rollouts)
        assert torch.allclose(advantages[own], expected[own])
