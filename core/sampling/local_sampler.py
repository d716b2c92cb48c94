"""Sampling in the training process: batched decoding; new prompts replace finished ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ...kernels.attention import varlen_attention
from ..training.model import decoder_pass, logit_scale
from ..training.packing import PackedBatch
from ..training.pretrained import context_length, load_causal_lm
from ..training.self_check import check_decoding, own_outputs
from .sampler import Completion, Prompt, SamplingParams, check_prompts


class LocalSampler:
    """Samples from a model on this rank's device: a full copy of the weights, for small models.

    A token is drawn by inverting the distribution at a number that depends on the prompt's seed and
    the position alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_token_ids: Sequence[int],
        max_batch: int = 64,
        progress: bool = False,
        on_completion: Callable[[int, Completion], None] | None = None,
    ) -> None:
        """Args:
        model: a causal language model with packed attention, from `load_causal_lm`.
        stop_token_ids: ids that end a response.
        max_batch: responses decoded at once.
        progress: whether to show a progress bar.
        on_completion: called with a prompt's number and its completion as soon as it is finished.
        """
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.stop_ids = torch.tensor(sorted(stop_token_ids), device=self.device)
        self.max_batch = max_batch
        self.progress = progress
        self.on_completion = on_completion
        self.version = 0

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copies the weights into the model.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape.
        """
        waiting = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            if name not in waiting:
                if name == "lm_head.weight" and self.model.config.tie_word_embeddings:
                    continue
                raise ValueError(f"weight {name} is not a parameter of the sampler's model")
            own = waiting.pop(name)
            if own.shape != tensor.shape:
                raise ValueError(
                    f"weight {name} has shape {list(tensor.shape)}, the sampler's has "
                    f"{list(own.shape)}"
                )
            own.copy_(tensor)
        if waiting:
            raise ValueError(f"weights were not sent: {', '.join(sorted(waiting))}")
        self.version = version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in order.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary, or together with
                `max_new_tokens` exceeds the model's context.
        """
        config = self.model.config
        context = context_length(config)
        check_prompts(prompts, params, vocabulary=config.vocab_size, context=context)
        if not prompts:
            return []
        # the longest first: short ones fill the gaps at the end
        lengths = [len(prompt.token_ids) for prompt in prompts]
        waiting = deque(sorted(range(len(prompts)), key=lambda i: (-lengths[i], i)))
        slots = min(self.max_batch, len(prompts))
        rows = _Rows(self.model, slots, max(lengths), params)
        done: dict[int, Completion] = {}
        with tqdm(
            total=len(prompts),
            desc="rollout",
            unit="response",
            leave=False,
            disable=not self.progress,
        ) as bar:
            while waiting or rows.items:
                free = slots - len(rows.items)
                # a pass for a single new prompt would cost more than it gains
                if waiting and (free >= max(1, slots // 8) or not rows.items):
                    entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                    rows.enter({item: prompts[item] for item in entering})
                else:
                    rows.advance()
                for item, tokens, logprobs, stopped in rows.leave(self.stop_ids):
                    done[item] = Completion(
                        token_ids=tokens,
                        logprobs=logprobs,
                        finish_reason="stop" if stopped else "length",
                        version=self.version,
                    )
                    if self.on_completion:
                        self.on_completion(item, done[item])
                    bar.update()
        return [done[i] for i in range(len(prompts))]


def load_sampler(
    path: str,
    *,
    dtype: str,
    device: torch.device,
    stop_token_ids: Sequence[int],
    max_batch: int,
    progress: bool = False,
) -> LocalSampler:
    """A sampler with the weights of a model's folder or hub id.

    Args:
        path: the model.
        dtype: data type of its weights, "fp32" or "bf16".
        device: where it samples.
        stop_token_ids, max_batch, progress: as for `LocalSampler`.
    """
    model: Any = load_causal_lm(path, dtype=dtype)
    return LocalSampler(
        model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32),
        stop_token_ids=stop_token_ids,
        max_batch=max_batch,
        progress=progress,
    )


def check_sampling(config: PretrainedConfig, path: str) -> None:
    """Checks that this sampler's log-probs are those of transformers, for a family of models.

    Raises:
        ValueError: they are not, or the family cannot be decoded.
    """
    check_decoding(_decoding_difference, config, path)


def _decoding_difference(model: Any, rows: list[list[int]]) -> Tensor:
    sampler = LocalSampler(model, stop_token_ids=[])
    prompts = [Prompt(token_ids=row, seed=number) for number, row in enumerate(rows)]
    completions = sampler.generate(prompts, SamplingParams(temperature=1.0, max_new_tokens=4))
    model.set_attn_implementation("eager")
    differences = []
    for row, completion in zip(rows, completions, strict=True):
        logprobs = own_outputs(model, [*row, *completion.token_ids])[len(row) - 1 : -1]
        own = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        differences.append((own - torch.tensor(completion.logprobs)).abs().max())
    return torch.stack(differences).max()


class _Rows:
    """The responses being decoded, in slots 0..n-1: their tokens so far, keys and values."""

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        longest_prompt: int,
        params: SamplingParams,
    ) -> None:
        config = model.config
        parameter = next(model.parameters())
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or num_heads  # absent in GPT-2
        capacity = longest_prompt + params.max_new_tokens
        shape = (config.num_hidden_layers, slots, kv_heads, capacity, head_dim)
        self.model = model
        self.params = params
        self.device = parameter.device
        self.keys = torch.zeros(shape, dtype=parameter.dtype, device=self.device)
        self.values = torch.zeros_like(self.keys)
        self.items: list[int] = []
        self.stored = torch.zeros(slots, dtype=torch.int64, device=self.device)  # tokens in cache
        self.drawn = torch.zeros_like(self.stored)
        self.seeds = torch.zeros_like(self.stored)
        self.logprobs = torch.zeros(slots, params.max_new_tokens, device=self.device)
        self.tokens = torch.zeros_like(self.logprobs, dtype=torch.int64)

    def enter(self, prompts: dict[int, Prompt]) -> None:
        """Puts prompts into free slots, reads them in one packed pass, draws their first tokens."""
        first = len(self.items)
        lengths = [len(prompt.token_ids) for prompt in prompts.values()]
        slots = slice(first, first + len(lengths))
        self.items += prompts
        self.stored[slots] = torch.tensor(lengths, device=self.device)
        self.drawn[slots] = 0
        self.seeds[slots] = torch.tensor([p.seed for p in prompts.values()], device=self.device)
        ids = torch.tensor([t for p in prompts.values() for t in p.token_ids], device=self.device)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=self.device)
        batch = PackedBatch(
            tokens=ids,
            cu_seqlens=bounds.cumsum(0, dtype=torch.int32),
            response_mask=torch.zeros_like(ids, dtype=torch.bool),
        )
        cache = _Prefill(self, batch, first)
        hidden = decoder_pass(self.model, ids, batch.position_ids, kv_cache=cache)
        self._draw(hidden[batch.cu_seqlens[1:].long() - 1], slots)

    def advance(self) -> None:
        """Reads the last token of every row in one pass, and draws the next."""
        slots = slice(0, len(self.items))
        last = self.tokens[slots].gather(1, self.drawn[slots, None] - 1).squeeze(1)
        hidden = decoder_pass(self.model, last, self.stored[slots], kv_cache=_Step(self))
        self.stored[slots] += 1
        self._draw(hidden, slots)

    def _draw(self, hidden: Tensor, slots: slice) -> None:
        drawn = self.drawn[slots]
        logits = self.model.lm_head(hidden) * logit_scale(self.model.config)
        tokens, logprobs = draw(logits, self.seeds[slots], drawn, self.params.temperature)
        self.tokens[slots].scatter_(1, drawn[:, None], tokens[:, None])
        self.logprobs[slots].scatter_(1, drawn[:, None], logprobs[:, None])
        self.drawn[slots] += 1

    def leave(self, stop_ids: Tensor) -> list[tuple[int, list[int], list[float], bool]]:
        """Removes the finished rows; the last rows move into the gaps.

        Returns:
            Item, tokens, log-probs, and whether a stop token ended it, for each.
        """
        num = len(self.items)
        last = self.tokens[:num].gather(1, self.drawn[:num, None] - 1).squeeze(1)
        stopped = torch.isin(last, stop_ids)
        full = self.drawn[:num] == self.params.max_new_tokens
        finished = (stopped | full).nonzero().squeeze(1).tolist()
        left = []
        for slot in reversed(finished):
            count = int(self.drawn[slot])
            tokens = self.tokens[slot, :count].tolist()
            logprobs = self.logprobs[slot, :count].tolist()
            left.append((self.items[slot], tokens, logprobs, bool(stopped[slot])))
            end = len(self.items) - 1
            if slot != end:
                used = int(self.stored[end])
                for store in (self.keys, self.values):
                    store[:, slot, :, :used] = store[:, end, :, :used]
                for state in (self.stored, self.drawn, self.seeds, self.tokens, self.logprobs):
                    state[slot] = state[end]
                self.items[slot] = self.items[end]
            self.items.pop()
        return left


class _Prefill:
    """Stores keys and values of packed prompts from slot `first` on; attends within each."""

    def __init__(
        self,
        rows: _Rows,
        batch: PackedBatch,
        first: int,
    ) -> None:
        self.rows = rows
        self.batch = batch
        self.slots = batch.seq_ids + first

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        self.rows.keys[layer][self.slots, :, self.batch.position_ids] = key
        self.rows.values[layer][self.slots, :, self.batch.position_ids] = value
        cu_seqlens = self.batch.boundaries if query.device.type == "cpu" else self.batch.cu_seqlens
        return varlen_attention(query, key, value, cu_seqlens, self.batch.max_seqlen, scale=scale)


class _Step:
    """Stores key and value of one new token per row; attends to everything the row has stored."""

    def __init__(self, rows: _Rows) -> None:
        num = len(rows.items)
        self.rows = rows
        self.at = rows.stored[:num]
        self.slots = torch.arange(num, device=rows.device)
        self.longest = int(self.at.max()) + 1
        visible = torch.arange(self.longest, device=rows.device) <= self.at[:, None]
        self.mask = visible[:, None, None]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> Tensor:
        keys = self.rows.keys[layer]
        values = self.rows.values[layer]
        keys[self.slots, :, self.at] = key
        values[self.slots, :, self.at] = value
        num = len(self.slots)
        out = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            keys[:num, :, : self.longest],
            values[:num, :, : self.longest],
            attn_mask=self.mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.squeeze(2)


def draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Draws one token per row.

    The token is the first whose cumulative probability exceeds `uniform(seed, position)`: a draw
    from the distribution that does not depend on the other rows.

    Args:
        logits: [rows, vocabulary].
        seeds: [rows] int64.
        positions: [rows] int64, number of tokens drawn before.
        temperature: 0 takes the most likely token, with its log-prob at temperature 1.

    Returns:
        tokens, logprobs: [rows] int64 and [rows] fp32.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)
        level = uniform(seeds, positions) * cumulative[:, -1]
        found = torch.searchsorted(cumulative, level[:, None], right=True).squeeze(1)
        tokens = found.clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Counter-based uniform numbers in [0, 1), float64, of 53 random bits.

    SplitMix64 (Steele, Lea, Flood 2014) of the seed advanced by the position, in wrapping integer
    arithmetic that is the same on every device.
    """
    x = _mix(seeds) + (positions + 1) * _signed(0x9E3779B97F4A7C15)
    return _shift_right(_mix(x), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
