from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.core.training import dist
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_critic, load_policy
from verippo.rl.experience import Experience, MiniBatch, compute, judged, share


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        SimpleNamespace(
            prompt_ids=torch.randint(3, 320, (prompt,), generator=generator).tolist(),
            response_ids=torch.randint(3, 320, (response,), generator=generator).tolist(),
        )
        for prompt, response in lengths
    ]


def an_experience(lengths):
    """Every tensor tells its tokens apart: logprobs 0, 1, 2, ...; values those plus 0.1; and so on."""
    batch = pack(rows(lengths))
    count = torch.arange(batch.num_tokens, dtype=torch.float64)
    return Experience(
        batch=batch,
        logprobs=count,
        values=count + 0.1,
        advantages=count + 0.2,
        returns=count + 0.3,
        ref_logprobs=count + 0.4,
        rewards=count + 0.5,
    )


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(dist, "rank", lambda: rank)
    monkeypatch.setattr(dist, "world_size", lambda: world_size)


def test_minibatches_are_a_partition_into_equal_counts():
    experience = an_experience([(1, n) for n in range(1, 13)])
    minis = list(experience.minibatches(4, seed=(0, 1, 0)))
    assert [len(mini.seqs) for mini in minis] == [3, 3, 3, 3]
    assert sorted(s for mini in minis for s in mini.seqs) == list(range(12))
    # sequence s has s + 1 response tokens
    assert [mini.num_response_tokens for mini in minis] == [
        sum(s + 1 for s in mini.seqs) for mini in minis
    ]


def of_problem(index):
    return SimpleNamespace(problem=SimpleNamespace(index=index))


def test_only_rollouts_with_a_verdict_make_up_the_update():
    rollouts = [of_problem(index) for index in (3, 3, 5, 5, 5)]
    scores = torch.tensor([0.1, math.nan, 1.0, 0.1, math.nan], dtype=torch.float64)
    kept, of_kept = judged(rollouts, scores, grouped=False)
    assert kept == [rollouts[0], rollouts[2], rollouts[3]]
    assert of_kept.tolist() == [0.1, 1.0, 0.1]
    # the first response of problem 3 has nothing left to be compared with
    kept, of_kept = judged(rollouts, scores, grouped=True)
    assert kept == rollouts[2:4]
    assert of_kept.tolist() == [1.0, 0.1]


def test_no_mini_batch_is_empty_when_sequences_are_missing():
    minis = list(an_experience([(1, 2)] * 3).minibatches(4, seed=(0, 1, 0)))
    assert [mini.num_response_tokens for mini in minis] == [2, 2, 2]


def test_each_epoch_step_and_seed_has_its_own_permutation_and_the_same_one_when_asked_again():
    experience = an_experience([(1, 1)] * 16)

    def order(*seed):
        return [s for mini in experience.minibatches(2, seed=seed) for s in mini.seqs]

    orders = [order(0, 1, 0), order(0, 1, 1), order(0, 2, 0), order(1, 1, 0)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(0, 1, 0) == orders[0]
    assert orders[0] != list(range(16))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=14),
    world_size=st.integers(1, 4),
    max_tokens=st.integers(14, 40),
)
def test_ranks_share_out_every_sequence_once_in_as_many_micro_batches_each(
    lengths, world_size, max_tokens
):
    experience = an_experience(lengths)
    with pytest.MonkeyPatch.context() as patch:
        taken, counts, lasts = [], [], []
        for rank in range(world_size):
            as_rank(patch, rank, world_size)
            seqs = list(range(len(lengths)))
            micros = list(MiniBatch(experience=experience, seqs=seqs).microbatches(max_tokens))
            counts.append(len(micros))
            lasts.append([micro.last for micro in micros])
            for micro in micros:
                assert micro.batch.num_tokens <= max_tokens
                taken += micro.logprobs[micro.mask].tolist()
    assert len(set(counts)) == 1
    assert all(last == [False] * (counts[0] - 1) + [True] for last in lasts)
    assert sorted(taken) == experience.logprobs[experience.batch.response_mask].tolist()


def test_a_micro_batch_carries_each_tokens_own_numbers():
    experience = an_experience([(2, 3), (1, 4), (3, 2)])
    for micro in MiniBatch(experience=experience, seqs=[2, 0, 1]).microbatches(10):
        # the log-prob is the token's number, so it says which token of the batch this is
        index = micro.logprobs.long()
        assert torch.equal(micro.batch.tokens, experience.batch.tokens[index])
        assert torch.equal(micro.mask, experience.batch.response_mask[index])
        for name in ("values", "advantages", "returns"):
            assert torch.equal(getattr(micro, name), getattr(experience, name)[index])


def test_a_rank_without_work_gets_an_empty_micro_batch_with_no_token_to_train_on(monkeypatch):
    experience = an_experience([(2, 3)])
    masks = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        (micro,) = MiniBatch(experience=experience, seqs=[0]).microbatches(8)
        assert micro.last
        masks.append(int(micro.mask.sum()))
    assert sorted(masks) == [0, 0, 3]


def test_a_sequence_over_the_cap_is_refused_by_its_number():
    with pytest.raises(ValueError, match="rollout 1 has 9 tokens, over max_tokens_per_gpu=8"):
        share(an_experience([(1, 1), (4, 5)]).batch, [0, 1], 8)


@pytest.mark.parametrize("max_tokens", [1000, 13])
def test_compute_is_one_direct_forward_whatever_the_micro_batches(make_model, max_tokens):
    folder = make_model("qwen2", seed=41)
    batch = pack(rows([(3, 4), (2, 9), (5, 1), (1, 6)]))
    policy, critic = load_policy(folder, dtype="fp32"), load_critic(folder, dtype="fp32")
    torch.nn.init.normal_(critic.hf.score.weight)
    with torch.no_grad():
        expected = policy(batch, temperature=0.6, with_entropy=True)
        (values,) = compute(critic, batch, max_tokens)
        torch.testing.assert_close(values, critic(batch), atol=1e-5, rtol=1e-5)
    parts = compute(
        lambda micro: policy(micro, temperature=0.6, with_entropy=True), batch, max_tokens
    )
    for part, whole in zip(parts, expected, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
        assert not part.requires_grad
        assert bool((part[~batch.response_mask] == 0).all())
