"""Rollouts of several turns: what the policy wrote is trained, what tools and users wrote is not."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from verippo.core.sampling.local_sampler import LocalSampler
from verippo.core.sampling.sampler import Completion, SamplingParams, draw_seed
from verippo.core.text.data import Problem
from verippo.core.training import stopping
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_causal_lm, load_policy, load_tokenizer
from verippo.rl import ppo
from verippo.rl.advantages import length_penalties, loss_weights
from verippo.rl.config import CorrectionConfig, PPOConfig, VerifierConfig
from verippo.rl.rollout import (
    Rollout,
    check_rollouts,
    checked_rollout,
    prompt_ids,
    rollout,
    rollout_prompts,
)
from verippo.rl.step_metrics import quarter_metrics, step_metrics
from verippo.rl.turns import Conversation, converse, sample_turns, turn_sampling

PROBLEM = Problem(question="2 + 2 ?", answer="4", index=3)
END = 2
NAN = math.nan
# a conversation of two turns, with context between and after them, and one of a single turn
TURNS = Rollout(
    problem=PROBLEM,
    prompt_ids=[1, 10, 11],
    response_ids=[12, END, 20, 21, 13, 14, END, 22],
    response_mask=[True, True, False, False, True, True, True, False],
    sampler_logprobs=[-1.0, -2.0, -3.0, -4.0, -5.0],
    text="",
)
SINGLE = Rollout(
    problem=PROBLEM,
    prompt_ids=[1, 10],
    response_ids=[15, END],
    sampler_logprobs=[-6.0, -7.0],
    text="",
    truncated=True,
)
TRAINED = [3, 4, 7, 8, 9, 13, 14]


def config(**options):
    base = {"policy": "m", "data": "d", "output": "o", "steps": 1}
    return PPOConfig(**base | {"verifier": VerifierConfig(kind="exact")} | options)


def on_mask(values):
    """[tokens] with these values at the trained tokens and NaN elsewhere."""
    x = torch.full((15,), NAN)
    x[TRAINED] = torch.tensor(values)
    return x


def test_counts_of_a_conversation():
    assert (TURNS.num_trained, TURNS.num_context, TURNS.num_turns) == (5, 3, 2)
    assert (SINGLE.num_trained, SINGLE.num_context, SINGLE.num_turns) == (2, 0, 1)


def test_pack_leaves_context_out_of_the_mask():
    batch = pack([TURNS, SINGLE])
    assert batch.tokens.tolist() == [1, 10, 11, 12, END, 20, 21, 13, 14, END, 22, 1, 10, 15, END]
    assert batch.response_mask.nonzero().flatten().tolist() == TRAINED
    assert batch.response_lengths.tolist() == [5, 2]
    assert batch.lengths == [11, 4]


@pytest.mark.parametrize("mask", [[True], [False] * 8, [True] * 9])
def test_pack_refuses_a_mask_that_does_not_fit(mask):
    with pytest.raises(ValueError, match="row 1 has 8 response tokens and a response_mask of"):
        pack([SINGLE, replace(TURNS, response_mask=mask)])


def test_score_lands_on_the_last_trained_token_and_kl_on_trained_tokens_alone():
    batch = pack([TURNS, SINGLE])
    rewards = ppo.token_rewards(
        [1.0, 0.5],
        on_mask([-1.0, -1.0, -2.0, -1.0, -1.0, -3.0, -1.0]),
        on_mask([-2.0, -1.0, -1.0, -1.0, -3.0, -3.0, -2.0]),
        batch.response_mask,
        batch.cu_seqlens,
        kl_coef=0.5,
    )
    expected = torch.zeros(15)
    # -0.5 (logprob - ref) at each, and the score at tokens 9 and 14
    expected[TRAINED] = torch.tensor([-0.5, 0.0, 0.5, 0.0, -1.0 + 1.0, 0.0, -0.5 + 0.5])
    assert rewards.tolist() == expected.tolist()


def test_gae_steps_over_context_by_hand():
    batch = pack([TURNS])
    rewards = torch.full((11,), NAN)
    values = torch.full((11,), NAN)
    rewards[TRAINED[:5]] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    values[TRAINED[:5]] = torch.tensor([0.5, 0.25, 0.5, 0.75, 0.5])
    advantages, returns = ppo.gae(
        rewards, values, batch.response_mask, batch.cu_seqlens, gamma=1.0, lam=0.5
    )
    # deltas -0.25, 0.25 (to the 0.5 after the gap), 0.25, -0.25, 0.5; A_t = delta + A_{t+1} / 2
    expected = [-0.0625, 0.375, 0.25, 0.0, 0.5]
    assert advantages[TRAINED[:5]].tolist() == expected
    assert returns[TRAINED[:5]].tolist() == [0.4375, 0.625, 0.75, 0.75, 1.0]
    off = ~batch.response_mask
    assert not advantages[off].any()
    assert not returns[off].any()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_gae_across_gaps_equals_gae_of_the_trained_tokens_alone(data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    rows, plain = [], []
    for length in lengths:
        mask = data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
        rows.append(replace(TURNS, response_ids=[5] * length, response_mask=mask))
        plain.append(replace(SINGLE, response_ids=[5] * sum(mask)))
    gapped, dense = pack(rows), pack(plain)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    own = torch.randn(2, dense.num_response_tokens, dtype=torch.float64, generator=generator)

    def advantages(batch):
        x = torch.full((2, batch.num_tokens), NAN, dtype=torch.float64)
        x[:, batch.response_mask] = own
        parts = ppo.gae(*x, batch.response_mask, batch.cu_seqlens, gamma=0.9, lam=0.8)
        return torch.stack([part[batch.response_mask] for part in parts])

    torch.testing.assert_close(advantages(gapped), advantages(dense))


def test_whitening_counts_trained_tokens_alone():
    batch = pack([TURNS, SINGLE])
    whitened = ppo.whiten(on_mask([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), batch.response_mask)
    assert not whitened[~batch.response_mask].any()
    # mean 4, variance 28 / 6
    expected = [(x - 4) / (28 / 6) ** 0.5 for x in range(1, 8)]
    assert whitened[TRAINED].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_correction_compares_trained_tokens_alone(level):
    rows = [TURNS, SINGLE]
    batch = pack(rows)
    # ratios of the tokens: 2, 1/2, 2, 2, 1 and 1, 2
    gaps = [math.log(x) for x in (2, 0.5, 2, 2, 1, 1, 2)]
    sampled = [*TURNS.sampler_logprobs, *SINGLE.sampler_logprobs]
    logprobs = on_mask([s + gap for s, gap in zip(sampled, gaps, strict=True)])
    options = config(correction=CorrectionConfig(level=level, mode="truncate", high=100.0))
    weights, metrics = loss_weights(options, logprobs, batch, rows)
    expected = {
        "token": [2, 0.5, 2, 2, 1, 1, 2],
        "sequence": [4] * 5 + [2] * 2,
        "geometric": [4 ** (1 / 5)] * 5 + [2**0.5] * 2,
    }
    assert weights[TRAINED].tolist() == pytest.approx(expected[level], rel=1e-5)
    assert not weights[~batch.response_mask].any()
    assert metrics["correction_touched_rate"] == 0


def test_lengths_are_those_of_trained_tokens():
    rows = [TURNS, SINGLE]
    batch = pack(rows)
    options = config(loss_mean="sequence")
    weights, _ = loss_weights(options, torch.zeros(15), batch, rows)
    assert weights[TRAINED].tolist() == pytest.approx([1 / 5] * 5 + [1 / 2] * 2)
    sampling = SamplingParams(max_new_tokens=6)
    options = config(sampling=sampling, overlong_buffer=2, missing_eos_penalty=0.25)
    # 5 of 6 tokens, one into the last 2: -1/2; the other is short and was cut off: -1/4
    assert length_penalties(options, rows).tolist() == [-0.5, -0.25]


def test_metrics_of_a_conversation_by_hand():
    rows = [TURNS, SINGLE]
    sampled = [*TURNS.sampler_logprobs, *SINGLE.sampler_logprobs]
    row = step_metrics(
        rollouts=rows,
        scores=torch.tensor([1.0, 0.0]),
        rewards=on_mask([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5]),
        batch=pack(rows),
        logprobs=on_mask([x + 0.5 for x in sampled]),
        ref_logprobs=on_mask([x - 0.5 for x in sampled]),
        entropy=on_mask([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
        values=on_mask([0.0] * 7),
        returns=on_mask([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        right_score=1.0,
    )
    expected = {
        "response_length_mean": 3.5,
        "context_length_mean": 1.5,
        "turns_mean": 1.5,
        "tokens_generated": 7,
        "kl_mean": 3.5,  # a nat a token
        "reward_mean": 0.75,
        "entropy": 4.0,
        "sampler_logprob_gap_mean": 0.5,
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value), name


def test_quarters_of_a_conversation_are_those_of_its_trained_tokens():
    rows = [replace(TURNS, response_mask=[False, *TURNS.response_mask[1:]])]
    values = torch.full((11,), NAN)
    values[TRAINED[1:5]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    row = quarter_metrics(values, values, values, pack(rows))
    assert [row[f"value_mean_q{n}"] for n in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]


# --- gradients ---


def losses(logprobs, batch):
    """Every policy loss of fixed targets; NaN in all targets off the mask."""
    generator = torch.Generator().manual_seed(1)
    mask = batch.response_mask

    def target():
        values = torch.randn(len(mask), generator=generator)
        return torch.where(mask, values, NAN)

    old, advantages, ref = (target() for _ in range(3))
    clips = {"clip_low": 0.2, "clip_high": 0.2}
    return [
        ppo.policy_loss(logprobs, old, advantages, mask, **clips).loss_sum,
        ppo.gspo_loss(logprobs, old, advantages, mask, batch.cu_seqlens, **clips).loss_sum,
        ppo.cispo_loss(logprobs, old, advantages, mask, **clips).loss_sum,
        ppo.kl_loss(logprobs, old, ref, mask).loss_sum,
    ]


def test_logits_that_predict_context_carry_no_gradient(make_model):
    folder = str(make_model("llama", seed=41))
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    batch = pack([TURNS])
    logits = hf(input_ids=batch.tokens[None]).logits[0]
    logprobs = torch.log_softmax(logits[:-1], -1)
    own = torch.cat([torch.zeros(1), logprobs[torch.arange(10), batch.tokens[1:]]])
    predicts = torch.cat([batch.response_mask[1:], torch.tensor([False])])  # the token after it
    for loss in losses(own, batch):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert not gradient[~predicts].any()
        assert gradient[predicts].any()


def test_trainers_logprobs_of_a_conversation_are_transformers_own(make_model):
    folder = str(make_model("llama", seed=41))
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    batch = pack([SINGLE, TURNS])
    logprobs, entropy = load_policy(folder, dtype="fp32")(batch, temperature=0.7, with_entropy=True)
    for seq in range(2):
        start, end = batch.boundaries[seq : seq + 2]
        ids = batch.tokens[start:end]
        dense = torch.log_softmax(hf(input_ids=ids[None]).logits[0, :-1] / 0.7, -1)
        mask = batch.response_mask[start:end]
        expected = dense.gather(1, ids[1:, None]).squeeze(1)[mask[1:]]
        torch.testing.assert_close(logprobs[start:end][mask], expected, atol=1e-5, rtol=1e-5)
        assert not logprobs[start:end][~mask].any()
        assert not entropy[start:end][~mask].any()


# --- building conversations ---


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


class Scripted:
    """A sampler that answers each request by a function of its number of calls and the request."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def generate(self, prompts, params):
        self.calls.append((prompts, params))
        return [self.answer(len(self.calls) - 1, prompt) for prompt in prompts]

    def update_weights(self, named_tensors, version):
        raise AssertionError


def completion(tokenizer, text, *, finish="stop", version=0, logprob=-0.5):
    ids = [*tokenizer.encode(text, add_special_tokens=False), *([END] if finish == "stop" else [])]
    return Completion(
        token_ids=ids, logprobs=[logprob] * len(ids), finish_reason=finish, version=version
    )


def prompts_of(tokenizer, num, **settings):
    problems = [replace(PROBLEM, index=n) for n in range(num)]
    ids = prompt_ids(tokenizer, problems, system=None)
    return rollout_prompts(problems, ids, **{"seed": 1, "step": 2, "samples": 1} | settings)


def test_conversation_keeps_the_sampled_tokens_and_masks_the_message(tokenizer):
    (prompt,) = prompts_of(tokenizer, 1)
    conversation = Conversation(prompt, tokenizer)
    first = completion(tokenizer, "call", logprob=-1.0, version=4)
    second = completion(tokenizer, "answer", logprob=-2.0, version=4)
    conversation.add_turn(first)
    assert conversation.last_text == "call"
    assert conversation.add_message("result")
    context = tokenizer.encode(
        "<|start_header_id|>user<|end_header_id|>\n\nresult</s>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        add_special_tokens=False,
    )
    before = [*prompt.token_ids, *first.token_ids, *context]
    assert list(conversation.request().token_ids) == before
    conversation.add_turn(second)
    one = conversation.rollout()
    assert list(one.prompt_ids) + list(one.response_ids) == [*before, *second.token_ids]
    num, gap, last = len(first.token_ids), len(context), len(second.token_ids)
    assert one.response_mask == [True] * num + [False] * gap + [True] * last
    assert one.sampler_logprobs == [-1.0] * num + [-2.0] * last
    assert (one.version, one.truncated, one.num_turns) == (4, False, 2)
    assert one.text.startswith("call")
    assert "result" in one.text
    assert one.text.endswith("answer")
    assert conversation.rollout(text=conversation.last_text).text == "answer"


def test_message_follows_the_turn_as_the_chat_template_writes_it(tokenizer):
    """The ids are those of the conversation rendered as a whole."""
    (prompt,) = prompts_of(tokenizer, 1)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == "
        "'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant: "
        "{% endif %}"
    )
    conversation = Conversation(prompt, tokenizer)
    conversation.add_turn(completion(tokenizer, "call"))
    num = len(conversation.response_ids)
    conversation.add_message("a </s> b")  # text of a tool is no control token
    ids = conversation.response_ids[num:]
    assert tokenizer.decode(ids) == "\n<s>user: a </s> b\n<s>assistant: "
    assert END not in ids


def test_template_without_end_token_loses_no_part_of_the_message(tokenizer):
    (prompt,) = prompts_of(tokenizer, 1)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    conversation = Conversation(prompt, tokenizer)
    conversation.add_turn(completion(tokenizer, "call"))
    num = len(conversation.response_ids)
    conversation.add_message("result")
    assert tokenizer.decode(conversation.response_ids[num:]) == "\n<s>result\n<s>"


def test_turns_of_different_weights_are_refused(tokenizer):
    (prompt,) = prompts_of(tokenizer, 1)
    conversation = Conversation(prompt, tokenizer)
    conversation.add_turn(completion(tokenizer, "a", version=4))
    with pytest.raises(ValueError, match="turn 1 was sampled with weight version 5, the first"):
        conversation.add_turn(completion(tokenizer, "b", version=5))


def test_each_turn_has_a_seed_of_its_own(tokenizer):
    (prompt, other) = prompts_of(tokenizer, 2)
    conversation = Conversation(prompt, tokenizer)
    seeds = []
    for _ in range(3):
        seeds.append(conversation.request().seed)
        conversation.add_turn(completion(tokenizer, "a"))
    assert seeds == [prompt.seed, draw_seed(prompt.seed, 1), draw_seed(prompt.seed, 2)]
    assert len({*seeds, other.seed}) == 4


def test_converse_asks_for_each_turn_once_and_leaves_finished_ones_out(tokenizer):
    """Problem n makes n calls; the last one is cut off in its third turn."""

    def answer(turn, prompt):
        number = seeds[turn].index(prompt.seed)
        cut = number == 3 and turn == 2
        text = "call" if turn < number else "done"
        return completion(tokenizer, text, finish="length" if cut else "stop")

    prompts = prompts_of(tokenizer, 4)
    seeds = [[p.seed for p in prompts]]
    seeds += [[draw_seed(p.seed, turn) for p in prompts] for turn in (1, 2, 3)]
    sampler = Scripted(answer)
    conversations = converse(
        sampler,
        prompts,
        SamplingParams(max_new_tokens=400),
        tokenizer=tokenizer,
        reply=lambda one: "go on" if one.last_text == "call" else None,
        max_turns=4,
    )
    assert [len(asked) for asked, _ in sampler.calls] == [4, 3, 2]
    assert {params.max_new_tokens for _, params in sampler.calls} == {100}
    assert [len(one.turns) for one in conversations] == [1, 2, 3, 3]
    assert [one.rollout().truncated for one in conversations] == [False, False, False, True]
    assert [one.prompt.problem.index for one in conversations] == [0, 1, 2, 3]


def test_message_without_room_ends_the_conversation(tokenizer):
    sampler = Scripted(lambda turn, prompt: completion(tokenizer, "call"))
    (one,) = converse(
        sampler,
        prompts_of(tokenizer, 1),
        SamplingParams(max_new_tokens=100),
        tokenizer=tokenizer,
        reply=lambda one: "long " * 50,
        max_turns=2,
    )
    rollout = one.rollout()
    assert rollout.truncated
    assert rollout.num_context == 0
    assert len(sampler.calls) == 1


def test_more_turns_than_tokens_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens=2 is less than a token for each of 3"):
        turn_sampling(SamplingParams(max_new_tokens=2), 3)


def test_sampler_that_returns_too_few_turns_is_refused(tokenizer):
    class Silent:
        def generate(self, prompts, params):
            return []

    conversations = [Conversation(p, tokenizer) for p in prompts_of(tokenizer, 2)]
    with pytest.raises(ValueError, match="the sampler returned 0 completions for 2 prompts"):
        sample_turns(conversations, Silent(), SamplingParams())


@pytest.fixture
def sampler(make_model):
    folder = str(make_model("llama", seed=21))

    def make(max_batch):
        model = load_causal_lm(folder, dtype="fp32")
        return LocalSampler(model, stop_token_ids=(END,), max_batch=max_batch)

    return make


def test_conversation_does_not_depend_on_what_else_is_drawn(sampler, tokenizer):
    prompts = prompts_of(tokenizer, 4, samples=2)

    def draw(chosen, max_batch):
        conversations = [Conversation(prompt, tokenizer) for prompt in chosen]
        for turn in range(3):
            sample_turns(conversations, sampler(max_batch), SamplingParams(max_new_tokens=6))
            for one in conversations:
                one.truncated = False  # a random model writes no end token
                assert one.add_message(f"turn {turn}")
        return {(o.prompt.problem.index, o.prompt.sample): o.response_ids for o in conversations}

    together = draw(prompts, 8)
    assert len({tuple(ids) for ids in together.values()}) == 8
    assert draw(prompts[::-1], 3) == together
    assert draw(prompts[5:6], 1) == {(2, 1): together[2, 1]}


def test_conversation_of_one_turn_is_what_rollout_samples(sampler, tokenizer):
    prompts = prompts_of(tokenizer, 3)
    sampling = SamplingParams(max_new_tokens=9)
    conversations = converse(
        sampler(8), prompts, sampling, tokenizer=tokenizer, reply=lambda one: None, max_turns=1
    )
    expected = rollout(sampler(8), prompts, sampling, tokenizer=tokenizer)
    own = [replace(one.rollout(), response_mask=None) for one in conversations]
    assert own == expected


# --- checks ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler_logprobs": [-1.0] * 8}, "has 5 trained tokens and 8 sampler log-probs"),
        ({"sampler_logprobs": [-1.0] * 4 + [NAN]}, "has 5 trained tokens and 5 sampler"),
        ({"response_ids": [999, *TURNS.response_ids[1:]]}, "outside the vocabulary of 50"),
        ({"response_ids": [*TURNS.response_ids[:-1], 999]}, "outside the vocabulary of 50"),
    ],
)
def test_conversation_that_cannot_be_trained_on_is_refused(changes, said):
    check_rollouts([SINGLE, TURNS], vocabulary=50, version=0)
    with pytest.raises(ValueError, match=f"rollout 1 has .*{said.removeprefix('has ')}"):
        check_rollouts([SINGLE, replace(TURNS, **changes)], vocabulary=50, version=0)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("yes", "response_mask is str 'yes': expected a list of booleans"),
        ([1] * 8, "response_mask holds int '1': expected booleans"),
        ([True] * 7, "response_mask has 7 booleans, 7 of them True, for 8 response tokens"),
        ([False] * 8, "response_mask has 8 booleans, 0 of them True"),
    ],
)
def test_mask_of_a_users_function_is_checked(mask, said):
    def function(sampler, prompts, sampling, *, tokenizer):
        return [replace(TURNS, response_mask=mask)]

    with pytest.raises(ValueError, match=f"own:f returned rollout 0, in which {said}"):
        checked_rollout(function, "own:f", None, [None], SamplingParams(), tokenizer=None)


# --- functions that await ---


async def drawn(sampler, prompts, sampling, *, tokenizer):
    """Rollouts whose tools finish in another order than they began."""

    async def one(number):
        await asyncio.sleep(0.02 * (len(prompts) - number))
        return replace(TURNS, sample=number)

    return list(await asyncio.gather(*map(one, range(len(prompts)))))


def run(function, num=3):
    prompts = [None] * num
    return checked_rollout(function, "own:f", None, prompts, SamplingParams(), tokenizer=None)


def test_async_function_runs_to_its_end():
    assert [one.sample for one in run(drawn)] == [0, 1, 2]


def test_async_function_runs_beside_a_loop_in_another_thread():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert [one.sample for one in run(drawn)] == [0, 1, 2]
        assert loop.is_running()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_result_of_an_async_function_is_checked():
    async def wrong(sampler, prompts, sampling, *, tokenizer):
        return 7

    with pytest.raises(ValueError, match="own:f returned int '7': it must return a list of 3"):
        run(wrong)


def test_error_of_an_async_function_reaches_the_caller():
    async def fails(sampler, prompts, sampling, *, tokenizer):
        raise ValueError("the tool's address is wrong")

    with pytest.raises(ValueError, match="the tool's address is wrong"):
        run(fails)


def test_signal_while_a_tool_is_awaited_is_noted_and_the_function_ends():
    async def signalled(sampler, prompts, sampling, *, tokenizer):
        asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGINT)
        return await drawn(sampler, prompts, sampling, tokenizer=tokenizer)

    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    try:
        with stopping.handled(), stopping.deferred():
            assert len(run(signalled)) == 3
            assert stopping.SIGNALS[stopping.received() - 1] == signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
