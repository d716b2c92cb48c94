"""What a rollout engine is: token ids in, token ids with log-probs out, and weights that follow the trainer's."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. There is no top-p and no top-k: the sampler's distribution must be the policy."""

    temperature: float = 1.0
    """logits are divided by it; 0 takes the likeliest token, and its log-probs are those at temperature 1"""
    max_new_tokens: int = 1024
    """tokens; a response that reaches it without a stop token counts as truncated"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens={self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One response is drawn for it."""

    token_ids: Sequence[int]
    seed: int = 0
    """63 bits; with the weights and the parameters it fixes every draw of the response, whatever else is in the batch"""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A response, the stop token included."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] = field(repr=False)
    """of each token, at the sampling temperature, as the sampler saw it (nats)"""
    finish_reason: Literal["stop", "length"]
    version: int = 0
    """the weight version it was drawn with"""


class Sampler(Protocol):
    """The protocol that a rollout engine implements."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the prompts' order."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the trainer's weights, Hugging Face names and full tensors, one by one; every rank iterates them all.
        Completions drawn from then on carry `version`."""
        ...


@runtime_checkable
class ServedSampler(Sampler, Protocol):
    """A sampler whose weights live elsewhere. Each method is called on every rank."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Copy of the weights (its address) -> for each sequence, the log-probs of its tokens from the second on, at
        temperature 1 (nats)."""
        ...

    def sleep(self) -> None:
        """Gives its memory back until the next weight update."""
        ...

    def close(self) -> None: ...


def check_prompts(
    prompts: Sequence[Prompt], params: SamplingParams, *, vocabulary: int, context: int | None
) -> None:
    """Raises ValueError for an empty prompt, an id outside the vocabulary, or a prompt that with `max_new_tokens` exceeds
    the context (tokens)."""
    for number, prompt in enumerate(prompts):
        if not len(prompt.token_ids):
            raise ValueError(f"prompt {number} is empty")
        low, high = min(prompt.token_ids), max(prompt.token_ids)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"prompt {number} has token id {low if low < 0 else high}, vocabulary is {vocabulary}"
            )
        if context and len(prompt.token_ids) + params.max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt.token_ids)} tokens, with max_new_tokens={params.max_new_tokens} over "
                f"the model's context of {context}: lower sampling.max_new_tokens or max_prompt_tokens"
            )


def draw_seed(*parts: int) -> int:
    """A seed of 63 bits from integers such as (seed, step, prompt, sample): equal parts, equal seed, on any machine."""
    try:
        digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    except struct.error:
        raise ValueError(f"seed={parts[0]}: must fit 64 bits") from None
    return int.from_bytes(digest, "little") >> 1
