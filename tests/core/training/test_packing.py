import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verippo.core.training.packing import (
    balance,
    best_fit,
    empty_batch,
    microbatches,
    pack,
    share_out,
)

EOS = PAD = 2
lengths_lists = st.lists(st.integers(1, 40), max_size=30)


def row(prompt_ids, response_ids):
    return SimpleNamespace(prompt_ids=prompt_ids, response_ids=response_ids)


def ragged():
    return pack([row([5, 6, 7], [8, EOS]), row([9], [EOS]), row([10, 11], [12, 13, EOS])])


def in_all(bins):
    return sorted(item for items in bins for item in items)


def test_pack_lays_prompts_and_responses_end_to_end_with_end_tokens_in_the_mask():
    batch = ragged()
    assert batch.tokens.tolist() == [5, 6, 7, 8, 2, 9, 2, 10, 11, 12, 13, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.response_mask.tolist() == [bool(m) for m in (0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1)]
    assert (batch.num_seqs, batch.num_tokens, batch.max_seqlen, batch.num_response_tokens) == (
        3,
        12,
        5,
        6,
    )


def test_masks_come_from_lengths_when_every_token_is_the_pad_token():
    batch = pack([row([PAD, PAD], [PAD]), row([PAD], [PAD, PAD])])
    assert batch.response_mask.tolist() == [False, False, True, False, True, True]


def test_positions_and_sequence_numbers_restart_with_every_sequence():
    batch = ragged()
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert batch.seq_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert batch.response_positions.tolist() == [3, 4, 6, 9, 10, 11]


def test_select_takes_whole_sequences_in_the_given_order():
    part = ragged().select([2, 0])
    assert part.tokens.tolist() == [10, 11, 12, 13, 2, 5, 6, 7, 8, 2]
    assert part.cu_seqlens.tolist() == [0, 5, 10]
    assert part.response_mask.tolist() == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert part.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_token_index_gathers_any_tensor_into_the_order_of_select():
    batch = ragged()
    assert batch.token_index([1, 2]).tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(batch.tokens[batch.token_index([2, 0])], batch.select([2, 0]).tokens)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8), st.randoms()
)
def test_selecting_equals_packing_the_selected_rows(sizes, random):
    rows = [row([n] * p, [100 + n] * r) for n, (p, r) in enumerate(sizes)]
    chosen = random.sample(range(len(rows)), random.randint(1, len(rows)))
    part, expected = pack(rows).select(chosen), pack([rows[n] for n in chosen])
    for name in (
        "tokens",
        "cu_seqlens",
        "response_mask",
        "position_ids",
        "seq_ids",
        "response_positions",
    ):
        assert torch.equal(getattr(part, name), getattr(expected, name)), name


def test_no_sequences_make_an_empty_pack():
    for batch in (pack([]), ragged().select([])):
        assert batch.tokens.tolist() == batch.position_ids.tolist() == batch.seq_ids.tolist() == []
        assert batch.cu_seqlens.tolist() == [0]
        assert (batch.num_seqs, batch.num_tokens, batch.max_seqlen, batch.num_response_tokens) == (
            0,
            0,
            0,
            0,
        )


def test_the_surplus_batch_has_a_token_and_no_response():
    batch = empty_batch()
    assert (batch.num_tokens, batch.num_seqs, batch.num_response_tokens) == (1, 1, 0)


@pytest.mark.parametrize(
    ("bad", "part"), [(row([], [1]), "prompt"), (row([1], []), "response"), (row([], []), "prompt")]
)
def test_an_empty_part_is_refused_with_its_row(bad, part):
    with pytest.raises(ValueError, match=f"row 1 has an empty {part}"):
        pack([row([1], [2]), bad])


def test_balance_worked_by_hand():
    # longest first, each into the lightest bin: 9 | 7; 6 joins 7 = 13; 5 joins 9 = 14; 4 joins 13 =
    # 17
    assert balance([4, 9, 6, 7, 5], 2) == [[1, 4], [0, 2, 3]]


def test_balance_leaves_bins_empty_when_items_run_out():
    assert sorted(balance([3], 3)) == [[], [], [0]]


@given(lengths_lists, st.integers(1, 8))
def test_balance_loses_nothing_and_bins_differ_by_at_most_the_longest(lengths, num_bins):
    bins = balance(lengths, num_bins)
    assert len(bins) == num_bins
    assert in_all(bins) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in items) for items in bins]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(lengths_lists, st.integers(0, 4))
def test_microbatches_hold_everything_under_the_cap_and_as_many_as_asked(lengths, surplus):
    fewest = microbatches(lengths, max_tokens=50)
    more = microbatches(lengths, max_tokens=50, num=len(fewest) + surplus)
    assert len(more) == len(fewest) + surplus
    for bins in (fewest, more):
        assert in_all(bins) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in items) <= 50 for items in bins)


def test_microbatches_are_few_and_equal():
    # 30 tokens under a cap of 20 need two; equal halves are 15 and 15, not 20 and 10
    assert microbatches([10, 5, 10, 5], max_tokens=20) == [[0, 1], [2, 3]]


def test_microbatches_fall_back_to_best_fit_where_equal_parts_break_the_cap():
    # two bins of 12 hold 6+6 and 4+4+4; longest into the lightest gives 6+4+4 = 14
    assert in_all(microbatches([6, 6, 4, 4, 4], max_tokens=12)) == [0, 1, 2, 3, 4]
    assert sorted(microbatches([6, 6, 4, 4, 4], max_tokens=12)) == [[0, 1], [2, 3, 4]]


def test_a_sequence_over_the_cap_is_named_with_both_numbers():
    with pytest.raises(ValueError, match="rollout 1 has 21 tokens, over max_tokens_per_gpu=20"):
        microbatches([20, 21], max_tokens=20)


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_microbatches_are_refused(num):
    with pytest.raises(
        ValueError, match=f"2 micro-batches are needed under max_tokens_per_gpu=20, got num={num}"
    ):
        microbatches([15, 15], max_tokens=20, num=num)


@given(lengths_lists, st.integers(1, 4))
def test_ranks_share_everything_out_in_equally_many_microbatches(lengths, world_size):
    plans = [
        share_out(lengths, max_tokens=50, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(plan) for plan in plans}) == 1
    assert in_all(itertools.chain(*plans)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= 50 for plan in plans for items in plan)


def test_best_fit_takes_the_fullest_bin_that_still_holds_the_item():
    # 7 and 6 open a bin each; 3 fits both (3 and 4 left) and goes to the 7; 4 goes to the 6; 2
    # opens a third
    assert best_fit([7, 6, 3, 4, 2], 10) == [[0, 2], [1, 3], [4]]


@given(st.lists(st.integers(1, 100), max_size=60))
def test_best_fit_keeps_the_capacity_loses_no_item_and_stays_near_the_lower_bound(lengths):
    bins = best_fit(lengths, 100)
    assert in_all(bins) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in items) <= 100 for items in bins)
    # any two bins together are over the capacity, or the later one's items would have gone into the
    # earlier
    loads = sorted(sum(lengths[i] for i in items) for items in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


def fewest_bins(lengths, capacity):
    """The optimum by trying everything: the slow, obvious twin."""

    def fits(items, rooms):
        if not items:
            return True
        return any(
            fits(items[1:], [*rooms[:n], room - items[0], *rooms[n + 1 :]])
            for n, room in enumerate(rooms)
            if room >= items[0] and room not in rooms[:n]
        )

    return next(
        num for num in itertools.count() if fits(sorted(lengths, reverse=True), [capacity] * num)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=8))
def test_best_fit_uses_at_most_eleven_ninths_of_the_optimum(lengths):
    assert (
        9 * len(best_fit(lengths, 12)) <= 11 * fewest_bins(lengths, 12) + 6
    )  # Dosa 2007: 11/9 OPT + 6/9 is tight


def test_best_fit_refuses_an_item_over_the_capacity_with_its_row():
    with pytest.raises(ValueError, match="row 2 has 11 tokens, over the pack's 10"):
        best_fit([1, 2, 11], 10)
