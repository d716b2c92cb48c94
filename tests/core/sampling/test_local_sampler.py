import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from verippo.core.sampling import local_sampler
from verippo.core.sampling.local_sampler import LocalSampler, draw, uniform
from verippo.core.sampling.sampler import Prompt, SamplingParams, draw_seed
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_causal_lm, load_policy

PROMPT_SIZES = [3, 11, 1, 7, 20, 5, 2, 9, 14, 4, 6]
EOS = 2


def random_prompts(sizes=PROMPT_SIZES, seed=0, vocab=320):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, vocab, (size,), generator=generator).tolist() for size in sizes]
    return [Prompt(token_ids=prompt, seed=draw_seed(seed, n)) for n, prompt in enumerate(ids)]


def sampler_of(folder, *, max_batch=64, stops=(EOS,)):
    return LocalSampler(
        load_causal_lm(folder, dtype="fp32"), stop_token_ids=stops, max_batch=max_batch
    )


def same(first, second):
    """Equal tokens and ends; log-probs up to the rounding of another batch's matrix products."""
    assert [(c.token_ids, c.finish_reason) for c in first] == [
        (c.token_ids, c.finish_reason) for c in second
    ]
    for a, b in zip(first, second, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model("llama")


def often_ending(model, num_stops):
    """Stop ids that a random model draws at times, so that rows leave the batch separately."""
    return tuple(range(0, model.config.vocab_size, model.config.vocab_size // num_stops))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("max_batch", [1, 3, 64])
def test_greedy_is_transformers_greedy_token_for_token(make_model, kind, max_batch):
    folder, prompts = make_model(kind), random_prompts()
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    stops = often_ending(model, 20)
    ours = sampler_of(folder, max_batch=max_batch, stops=stops).generate(
        prompts, SamplingParams(temperature=0, max_new_tokens=24)
    )
    reasons = Counter()
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.token_ids])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(stops),
            pad_token_id=0,
        )
        assert completion.token_ids == theirs[0, ids.shape[1] :].tolist()
        reasons[completion.finish_reason] += 1
    assert len(reasons) == 2  # or the test would not see rows leave at different times


def test_a_model_without_grouped_heads_is_sampled_too(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    ).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50)  # or one token would be drawn for ever
    model.save_pretrained(tmp_path)
    ids = [5, 6, 7]
    theirs = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=20, eos_token_id=EOS, pad_token_id=0
    )
    params = SamplingParams(temperature=0, max_new_tokens=20)
    (ours,) = sampler_of(tmp_path).generate([Prompt(token_ids=ids)], params)
    assert ours.token_ids == theirs[0, 3:].tolist()
    assert len(set(ours.token_ids)) > 3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs_are_the_trainers_at_the_sampling_temperature(make_model, kind, tied):
    folder, prompts = make_model(kind, tied=tied), random_prompts()
    params = SamplingParams(temperature=0.7, max_new_tokens=16)
    completions = sampler_of(folder, max_batch=4, stops=range(0, 320, 40)).generate(prompts, params)
    batch = pack(
        [_Row(p.token_ids, c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    )
    with torch.no_grad():
        expected = load_policy(folder, dtype="fp32")(batch, temperature=0.7)[batch.response_mask]
    got = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert len({c.finish_reason for c in completions}) == 2


class _Row:
    def __init__(self, prompt_ids, response_ids):
        self.prompt_ids, self.response_ids = prompt_ids, response_ids


def test_greedy_logprobs_are_those_at_temperature_one(llama):
    prompts = random_prompts([4, 8])
    completions = sampler_of(llama).generate(
        prompts, SamplingParams(temperature=0, max_new_tokens=5)
    )
    batch = pack(
        [_Row(p.token_ids, c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    )
    with torch.no_grad():
        expected = load_policy(llama, dtype="fp32")(batch)[batch.response_mask].tolist()
    assert [x for c in completions for x in c.logprobs] == pytest.approx(expected, abs=1e-5)


def chi_square(counts, probabilities):
    total = sum(counts)
    return sum(
        (count - total * p) ** 2 / (total * p)
        for count, p in zip(counts, probabilities, strict=True)
    )


CHI_SQUARE_7_DF = 24.3  # 99.9 % of draws stay under it


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_drawn_token_is_a_sample_from_the_distribution(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, -0.5])
    num = 8000
    seeds = torch.tensor([draw_seed(5, n) for n in range(num)])
    tokens, logprobs = draw(
        logits.expand(num, 8), seeds, torch.zeros(num, dtype=torch.int64), temperature
    )
    weights = [math.exp(x / temperature) for x in logits.tolist()]
    probabilities = [weight / sum(weights) for weight in weights]
    assert chi_square([int((tokens == t).sum()) for t in range(8)], probabilities) < CHI_SQUARE_7_DF
    assert logprobs.tolist() == pytest.approx(
        [math.log(probabilities[t]) for t in tokens.tolist()], abs=1e-5
    )


def test_successive_positions_of_one_seed_are_samples_too():
    logits, num = torch.zeros(8), 8000
    tokens, _ = draw(logits.expand(num, 8), torch.full((num,), 123), torch.arange(num), 1.0)
    assert chi_square(torch.bincount(tokens, minlength=8).tolist(), [1 / 8] * 8) < CHI_SQUARE_7_DF
    pairs = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64).tolist()
    assert chi_square(pairs, [1 / 64] * 64) < 103.4  # 99.9 % at 63 degrees of freedom


def test_generated_tokens_are_a_sample_from_the_policy(make_model):
    """First and second tokens over a vocabulary of 8, against probabilities of transformers."""
    folder = make_model("llama", vocab=8)
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.15)  # so that every token is likely enough for the statistic
        sampler = sampler_of(folder, stops=(), max_batch=512)
        sampler.update_weights(model.named_parameters(), 1)
        first = torch.softmax(model(torch.tensor([[3, 5, 4]])).logits[0, -1] / 0.8, -1)
        paths = torch.tensor([[3, 5, 4, token] for token in range(8)])
        second = torch.softmax(model(paths).logits[:, -1] / 0.8, -1)
    prompts = [Prompt(token_ids=[3, 5, 4], seed=draw_seed(9, n)) for n in range(4000)]
    drawn = [
        c.token_ids
        for c in sampler.generate(prompts, SamplingParams(temperature=0.8, max_new_tokens=2))
    ]
    counts = Counter(a for a, _ in drawn)
    assert chi_square([counts[t] for t in range(8)], first.tolist()) < CHI_SQUARE_7_DF
    counts = Counter(b for _, b in drawn)
    assert chi_square([counts[t] for t in range(8)], (first @ second).tolist()) < CHI_SQUARE_7_DF


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(5000, 5)
    tokens, logprobs = draw(logits, torch.arange(5000), torch.zeros(5000, dtype=torch.int64), 1.0)
    assert set(tokens.tolist()) == {1, 3}
    assert torch.isfinite(logprobs).all()


def test_the_lowest_level_passes_over_tokens_without_probability(monkeypatch):
    monkeypatch.setattr(
        local_sampler,
        "uniform",
        lambda seeds, positions: torch.zeros(len(seeds), dtype=torch.float64),
    )
    one = torch.zeros(1, dtype=torch.int64)
    assert draw(torch.tensor([[-math.inf, -math.inf, 0.0, 0.0]]), one, one, 1.0)[0].tolist() == [2]


def test_results_do_not_depend_on_batch_size_order_or_company(llama):
    prompts, params = random_prompts(), SamplingParams(temperature=1.0, max_new_tokens=20)
    stops = tuple(range(0, 320, 30))
    whole = sampler_of(llama, stops=stops).generate(prompts, params)
    assert len({len(c.token_ids) for c in whole}) > 3
    for max_batch in (1, 2, 5):
        same(sampler_of(llama, stops=stops, max_batch=max_batch).generate(prompts, params), whole)
    sampler = sampler_of(llama, stops=stops, max_batch=4)
    same(sampler.generate(prompts[::-1], params)[::-1], whole)
    for n, prompt in enumerate(prompts):  # alone, and after whatever came before
        same(sampler.generate([prompt], params), [whole[n]])
    same(sampler.generate(random_prompts(seed=1) + prompts, params)[len(prompts) :], whole)


def test_a_longer_limit_goes_on_where_a_shorter_one_stopped(llama):
    prompts = random_prompts([4, 9])
    short, long = (
        sampler_of(llama).generate(prompts, SamplingParams(max_new_tokens=n)) for n in (5, 12)
    )
    for a, b in zip(short, long, strict=True):
        assert b.token_ids[: len(a.token_ids)] == a.token_ids


def test_another_seed_draws_another_response(llama):
    prompts = [Prompt(token_ids=[5, 6, 7], seed=seed) for seed in range(20)]
    drawn = sampler_of(llama).generate(prompts, SamplingParams(max_new_tokens=8))
    assert len({tuple(c.token_ids) for c in drawn}) == 20


def test_a_response_ends_with_the_first_stop_token_and_contains_it(llama):
    stops, prompts = (EOS, 17, 44, 90, 200, 201, 202, 203, 204, 300), random_prompts([5] * 40)
    completions = sampler_of(llama, stops=stops, max_batch=16).generate(
        prompts, SamplingParams(max_new_tokens=30)
    )
    for completion in completions:
        *before, last = completion.token_ids
        assert not set(before) & set(stops)
        assert (completion.finish_reason == "stop") == (last in stops)
        assert (completion.finish_reason == "length") <= (len(completion.token_ids) == 30)
        assert len(completion.logprobs) == len(completion.token_ids) <= 30
    assert len({c.token_ids[-1] for c in completions if c.finish_reason == "stop"}) > 2


def test_a_stop_token_drawn_last_counts_as_a_stop(llama):
    prompt = random_prompts([5])
    three = sampler_of(llama, stops=()).generate(prompt, SamplingParams(max_new_tokens=3))[0]
    assert three.finish_reason == "length"
    assert len(set(three.token_ids)) == 3
    again = sampler_of(llama, stops=(three.token_ids[-1],)).generate(
        prompt, SamplingParams(max_new_tokens=3)
    )[0]
    assert (again.token_ids, again.finish_reason) == (three.token_ids, "stop")


def test_one_token_is_a_whole_response(llama):
    completions = sampler_of(llama, max_batch=2).generate(
        random_prompts(), SamplingParams(max_new_tokens=1)
    )
    assert [len(c.token_ids) for c in completions] == [1] * len(PROMPT_SIZES)


def test_no_prompts_give_no_completions(llama):
    assert sampler_of(llama).generate([], SamplingParams()) == []


def splitmix64(seed, position):
    """SplitMix64 in Python's integers: Steele, Lea, Flood 2014, figure 17, on the mixed seed."""
    top = (1 << 64) - 1

    def mix(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & top
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & top
        return z ^ (z >> 31)

    return (mix((mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & top) >> 11) * 2.0**-53


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_uniform_is_splitmix64(seed, position):
    assert uniform(torch.tensor([seed]), torch.tensor([position])).item() == splitmix64(
        seed, position
    )


@pytest.mark.parametrize("over", ["positions", "seeds", "hashed seeds"])
def test_uniform_is_uniform(over):
    num = 20_000
    numbers, zeros = torch.arange(num), torch.zeros(num, dtype=torch.int64)
    if over == "positions":
        drawn = uniform(zeros, numbers)
    elif over == "seeds":
        drawn = uniform(numbers, zeros)
    else:
        drawn = uniform(torch.tensor([draw_seed(0, n) for n in range(num)]), zeros)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert len(set(drawn.tolist())) == num
    distance = (drawn.sort().values - (numbers + 0.5) / num).abs().max()  # Kolmogorov and Smirnov
    assert distance < 1.95 / math.sqrt(num)  # 99.9 % of draws
    shifted = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
    assert abs(shifted) < 3.3 / math.sqrt(num)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 10_000))
def test_neighbouring_seeds_and_positions_draw_different_numbers(seed, position):
    drawn = uniform(
        torch.tensor([seed, seed + 1, seed]), torch.tensor([position, position, position + 1])
    )
    assert len(set(drawn.tolist())) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_make_it_the_new_model(make_model, tied):
    old, new = make_model("llama", tied=tied), make_model("llama", tied=tied, seed=1)
    prompts, params = random_prompts([4, 9, 2]), SamplingParams(max_new_tokens=12)
    sampler = sampler_of(old)
    before = sampler.generate(prompts, params)
    assert [c.version for c in before] == [0, 0, 0]
    weights = dict(load_causal_lm(new, dtype="fp32").named_parameters())
    assert ("lm_head.weight" in weights) != tied
    sampler.update_weights(weights.items(), 3)
    after = sampler.generate(prompts, params)
    same(after, sampler_of(new).generate(prompts, params))
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    assert [c.version for c in after] == [3, 3, 3]


def test_a_tied_head_that_is_sent_along_is_passed_over(make_model):
    sampler = sampler_of(make_model("llama", tied=True))
    weights = dict(sampler.model.named_parameters())
    sampler.update_weights(
        [*weights.items(), ("lm_head.weight", weights["model.embed_tokens.weight"])], 1
    )
    assert sampler.version == 1


def test_new_weights_are_copies(make_model, llama):
    weights = dict(load_causal_lm(make_model("llama", seed=1), dtype="fp32").named_parameters())
    sampler, prompts = sampler_of(llama), random_prompts([4])
    sampler.update_weights(weights.items(), 1)
    before = sampler.generate(prompts, SamplingParams(max_new_tokens=6))
    with torch.no_grad():
        for tensor in weights.values():
            tensor.zero_()
    same(sampler.generate(prompts, SamplingParams(max_new_tokens=6)), before)


def test_weights_that_do_not_fit_are_refused_by_name(llama):
    sampler = sampler_of(llama)
    weights = {name: tensor.detach().clone() for name, tensor in sampler.model.named_parameters()}
    unknown = weights | {"model.layers.9.bias": torch.zeros(3)}
    with pytest.raises(
        ValueError, match="weight model.layers.9.bias is not a parameter of the sampler's model"
    ):
        sampler.update_weights(unknown.items(), 1)
    misshapen = weights | {"model.norm.weight": torch.zeros(31)}
    with pytest.raises(
        ValueError, match=r"weight model.norm.weight has shape \[31\], the sampler's has \[32\]"
    ):
        sampler.update_weights(misshapen.items(), 1)
    del weights["model.norm.weight"], weights["lm_head.weight"]
    with pytest.raises(
        ValueError, match="weights were not sent: lm_head.weight, model.norm.weight"
    ):
        sampler.update_weights(weights.items(), 1)
    assert sampler.version == 0


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "prompt 1 is empty"),
        ([3, 320], "prompt 1 has token id 320, vocabulary is 320"),
        ([3, -1], "prompt 1 has token id -1, vocabulary is 320"),
        (
            [3] * 2045,
            "prompt 1 has 2045 tokens, with max_new_tokens=4 over the model's context of 2048: low",
        ),
    ],
)
def test_a_bad_prompt_is_refused_by_number(llama, ids, reason):
    with pytest.raises(ValueError, match=reason):
        sampler_of(llama).generate(
            [Prompt(token_ids=[3]), Prompt(token_ids=ids)], SamplingParams(max_new_tokens=4)
        )
