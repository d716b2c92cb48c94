"""The protocol of a sampling engine: token ids in, token ids with log-probs out."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from ..bounds import CountingInt, NonNegativeFloat, check_bounds
from ..number_array import convert_fields


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. No top-p, no top-k: the sampler's distribution must be the policy's."""

    temperature: NonNegativeFloat = 1.0
    """Divisor of the logits; 0 takes the most likely token, with log-probs at temperature 1."""
    max_new_tokens: CountingInt = 1024
    """Tokens after which a response without stop token is cut and counts as truncated."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="sampling.")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A request for one response."""

    token_ids: Sequence[int]
    seed: int = 0
    """63 bits; with weights and parameters it fixes every draw of the response."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A response, with its stop token. Lists of numbers become a `NumberArray`."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] = field(repr=False)
    """Log-prob of each token at the sampling temperature (nats), as the sampler saw it."""
    finish_reason: Literal["stop", "length"]
    version: int = 0
    """Version of the weights that it was drawn with."""

    def __post_init__(self) -> None:
        convert_fields(self, token_ids=np.int32, logprobs=np.float64)


class Sampler(Protocol):
    """What a sampling engine implements."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in order."""
        ...

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes the trainer's weights.

        Every rank must iterate `named_tensors` to the end: Hugging Face names with full tensors.
        Completions drawn afterwards carry `version`.
        """
        ...


@runtime_checkable
class ServedSampler(Sampler, Protocol):
    """A sampler whose weights live in other processes. Every rank calls each method."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Log-probs of given sequences under every copy of the weights.

        Returns:
            Address of the copy -> for each sequence, the log-probs of its tokens from the second
            on, at temperature 1 (nats).
        """
        ...

    def sleep(self) -> None:
        """Releases its memory until the next weight update."""
        ...

    def close(self) -> None:
        """Leaves nothing of the run behind."""
        ...


def check_prompts(
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    vocabulary: int,
    context: int | None,
) -> None:
    """Refuses prompts that cannot be sampled from, by number.

    Raises:
        ValueError: a prompt is empty, has an id outside the vocabulary, or together with
            `max_new_tokens` exceeds the context.
    """
    for number, prompt in enumerate(prompts):
        if not len(prompt.token_ids):
            raise ValueError(f"prompt {number} is empty")
        low = min(prompt.token_ids)
        high = max(prompt.token_ids)
        if low < 0 or high >= vocabulary:
            wrong = low if low < 0 else high
            raise ValueError(f"prompt {number} has token id {wrong}, vocabulary is {vocabulary}")
        if context and len(prompt.token_ids) + params.max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(prompt.token_ids)} tokens, with max_new_tokens="
                f"{params.max_new_tokens} over the model's context of {context}: "
                "lower sampling.max_new_tokens or max_prompt_tokens"
            )


def draw_seed(*parts: int) -> int:
    """A seed of 63 bits from integers such as run seed, step, problem and sample.

    Equal integers give equal seeds on any machine.

    Raises:
        ValueError: an integer does not fit 64 bits.
    """
    try:
        digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    except struct.error:
        raise ValueError(f"seed={parts[0]}: must fit 64 bits") from None
    return int.from_bytes(digest, "little") >> 1
