"""Sampling of responses to problems; `rollout` is the function that users replace or wrap."""

from __future__ import annotations

import asyncio
import inspect
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.number_array import NumberArray, convert_fields
from ..core.sampling.sampler import Completion, Prompt, Sampler, SamplingParams, draw_seed
from ..core.text.chat import parse_response, render_prompt
from ..core.text.data import Problem
from ..core.text.encoding import decode
from .hooks import describe


@dataclass(frozen=True, kw_only=True)
class RolloutPrompt:
    """A request for one response to a problem."""

    problem: Problem
    token_ids: Sequence[int] = field(repr=False)
    sample: int = 0
    """Number of this sample among those of the problem, from 0."""
    seed: int = 0
    """Seed of its draws; depends on run seed, step, problem and sample alone."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A problem with a sampled response, in one turn or several.

    In several turns, the response is everything after the prompt: what the policy wrote, which is
    trained, and between it the context that tools and users wrote, which never is. `response_mask`
    tells them apart; `rl.turns.Conversation` builds such rollouts turn by turn:

        response_ids      call  </s>  result  answer  </s>
        response_mask     True  True  False   True    True
        sampler_logprobs  -0.1  -0.2          -0.3    -0.4

    Lists of numbers become a `NumberArray`, which reads like a list.
    """

    problem: Problem
    prompt_ids: Sequence[int] = field(repr=False)
    response_ids: Sequence[int] = field(repr=False)
    """Token ids of the response, its stop token included."""
    sampler_logprobs: Sequence[float] = field(repr=False)
    """Log-prob of each trained token at the sampling temperature (nats), by the sampler."""
    response_mask: Sequence[bool] | None = field(default=None, repr=False)
    """Which response tokens the policy wrote, one for each; None: all of them."""
    text: str
    """The response without special tokens, as verifiers read it."""
    truncated: bool = False
    """Whether the length limit cut it off."""
    sample: int = 0
    version: int = 0
    """Version of the weights that sampled it."""

    def __post_init__(self) -> None:
        convert_fields(
            self,
            prompt_ids=np.int32,
            response_ids=np.int32,
            sampler_logprobs=np.float64,
            response_mask=np.bool_,
        )

    @property
    def num_trained(self) -> int:
        """Number of response tokens that the policy wrote."""
        if self.response_mask is None:
            return len(self.response_ids)
        return int(np.count_nonzero(self.response_mask))

    @property
    def num_context(self) -> int:
        """Number of response tokens that tools or users wrote."""
        return len(self.response_ids) - self.num_trained

    @property
    def num_turns(self) -> int:
        """Number of stretches that the policy wrote, with context between them."""
        if self.response_mask is None:
            return 1
        mask = np.asarray(self.response_mask, dtype=bool)
        return int(mask[0]) + int(np.count_nonzero(mask[1:] & ~mask[:-1]))

    @property
    def final(self) -> str | None:
        """The final response, or None when the format is broken."""
        parsed = parse_response(self.text)
        return parsed.final if parsed else None

    @property
    def reasoned(self) -> bool:
        """Whether the format holds and the part under `## Thinking` is not empty."""
        parsed = parse_response(self.text)
        return bool(parsed and parsed.thinking)


def joined_logprobs(rollouts: Sequence[Rollout]) -> Tensor:
    """The sampler's log-probs of all trained tokens: [tokens] float32, sequence after sequence."""
    parts: list[Any] = [np.empty(0), *(rollout.sampler_logprobs for rollout in rollouts)]
    return torch.from_numpy(np.concatenate(parts, dtype=np.float32))


class RolloutFunction(Protocol):
    """Signature of `rollout`, for functions in its place."""

    def __call__(
        self,
        sampler: Sampler,
        prompts: Sequence[RolloutPrompt],
        sampling: SamplingParams,
        *,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Rollout]: ...


class AsyncRolloutFunction(Protocol):
    """Signature of a rollout function that awaits its tools."""

    async def __call__(
        self,
        sampler: Sampler,
        prompts: Sequence[RolloutPrompt],
        sampling: SamplingParams,
        *,
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Rollout]: ...


def rollout(
    sampler: Sampler,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rollout]:
    """Samples one response for each prompt.

    Args:
        sampler: the engine that holds the policy's weights.
        prompts: this rank's prompts; other ranks call the function with theirs.
        sampling: temperature and length limit.
        tokenizer: decodes the responses.

    Returns:
        One rollout per prompt, in order.

    Raises:
        ValueError: the sampler returned something else than one completion for each prompt.
    """
    requests = [Prompt(token_ids=prompt.token_ids, seed=prompt.seed) for prompt in prompts]
    completions = sampler.generate(requests, sampling)
    check_completions(completions, num=len(prompts))
    return [
        Rollout(
            problem=prompt.problem,
            prompt_ids=prompt.token_ids,
            response_ids=completion.token_ids,
            sampler_logprobs=completion.logprobs,
            text=decode(tokenizer, completion.token_ids),
            truncated=completion.finish_reason == "length",
            sample=prompt.sample,
            version=completion.version,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def check_completions(completions: Any, *, num: int) -> None:
    """Raises ValueError for what a sampler must not return."""
    expected = f"it must return a list of {num}, one Completion for each prompt"
    if not isinstance(completions, (list, tuple)):
        raise ValueError(f"the sampler's generate returned {describe(completions)}: {expected}")
    for number, completion in enumerate(completions):
        if not isinstance(completion, Completion):
            raise ValueError(
                f"the sampler's generate returned {describe(completion)} as completion {number}: "
                f"{expected}"
            )
        _check_tokens(
            completion.token_ids, completion.logprobs, name=f"the sampler's completion {number}"
        )
    if len(completions) != num:
        raise ValueError(
            f"the sampler returned {len(completions)} completions for {num} prompts: "
            "it must return one for each"
        )


def checked_rollout(
    function: RolloutFunction | AsyncRolloutFunction,
    name: str,
    sampler: Sampler,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rollout]:
    """Calls a user's rollout function and checks its result.

    Args:
        function: the function; one defined with `async def` runs to its end in an event loop of its
            own.
        name: what errors call it.
        sampler, prompts, sampling, tokenizer: its arguments.

    Raises:
        ValueError: it does not return a list of one rollout for each prompt, with plain token ids,
            log-probs and text.
    """
    rollouts: Any = function(sampler, prompts, sampling, tokenizer=tokenizer)
    if inspect.iscoroutine(rollouts):
        rollouts = asyncio.run(rollouts)
    expected = f"it must return a list of {len(prompts)}, one Rollout for each prompt"
    if not isinstance(rollouts, (list, tuple)):
        raise ValueError(f"{name} returned {describe(rollouts)}: {expected}")
    for number, one in enumerate(rollouts):
        if not isinstance(one, Rollout):
            raise ValueError(f"{name} returned {describe(one)} as rollout {number}: {expected}")
        where = f"{name} returned rollout {number}, in which"
        if not isinstance(one.problem, Problem) or not isinstance(one.text, str):
            raise ValueError(f"{where} problem or text is of the wrong kind: use a Problem and str")
        _check_tokens(one.prompt_ids, [], name=f"{where} the prompt")
        _check_tokens(one.response_ids, one.sampler_logprobs, name=f"{where} the response")
        _check_response_mask(one, name=where)
    if len(rollouts) != len(prompts):
        raise ValueError(
            f"{name} returned {len(rollouts)} rollouts for {len(prompts)} prompts: "
            "it must return one for each"
        )
    return list(rollouts)


def _check_response_mask(rollout: Rollout, *, name: str) -> None:
    """Refuses a mask that is not one boolean for each response token, or that trains none."""
    mask: Any = rollout.response_mask
    if mask is None:
        return
    if not isinstance(mask, (NumberArray, list, tuple, np.ndarray)):
        raise ValueError(f"{name} response_mask is {describe(mask)}: expected a list of booleans")
    if not isinstance(mask, NumberArray):  # not all of them are booleans
        wrong = [value for value in mask if not isinstance(value, (bool, np.bool_))]
        raise ValueError(f"{name} response_mask holds {describe(wrong[0])}: expected booleans")
    if len(mask) != len(rollout.response_ids) or not rollout.num_trained:
        raise ValueError(
            f"{name} response_mask has {len(mask)} booleans, {rollout.num_trained} of them True, "
            f"for {len(rollout.response_ids)} response tokens: expected one for each, at least one "
            "True"
        )


def _check_tokens(ids: Any, logprobs: Any, *, name: str) -> None:
    """Refuses an empty list of ids, ids that are no integers, and log-probs that are no numbers."""
    for what, values, kind in (
        ("token ids", ids, numbers.Integral),
        ("log-probs", logprobs, numbers.Real),
    ):
        if isinstance(values, NumberArray):
            continue
        is_array = isinstance(values, np.ndarray) and values.ndim == 1
        if not is_array and (not isinstance(values, Sequence) or isinstance(values, (str, bytes))):
            raise ValueError(f"{name} has {describe(values)} as {what}: expected a list")
        wrong = [value for value in values if not isinstance(value, kind)]
        if wrong:
            raise ValueError(f"{name} has {describe(wrong[0])} among its {what}")
    if not len(ids):
        raise ValueError(f"{name} has no token ids: expected at least one")


def check_rollouts(rollouts: Sequence[Rollout], *, vocabulary: int, version: int) -> None:
    """Refuses rollouts that cannot be trained on, naming the first one by number.

    Raises:
        ValueError: log-probs are not one finite number per trained token, or an id is outside the
            vocabulary.
        RuntimeError: a response was sampled with other weights than `version`.
    """
    for number, rollout in enumerate(rollouts):
        if rollout.version != version:
            raise RuntimeError(
                f"rollout {number} was sampled with weight version {rollout.version}, "
                f"the trainer's is {version}"
            )
        logprobs = np.asarray(rollout.sampler_logprobs)
        num = rollout.num_trained
        if num != len(logprobs) or not np.isfinite(logprobs).all():
            tokens = "response tokens" if rollout.response_mask is None else "trained tokens"
            raise ValueError(
                f"rollout {number} has {num} {tokens} and {len(logprobs)} sampler log-probs: "
                "each token needs a finite one, and context has none"
            )
        parts = map(np.asarray, (rollout.prompt_ids, rollout.response_ids))
        if any(len(ids) and (ids.min() < 0 or ids.max() >= vocabulary) for ids in parts):
            raise ValueError(
                f"rollout {number} has a token id outside the vocabulary of {vocabulary}"
            )


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], *, system: str | None
) -> list[list[int]]:
    """Token ids of every problem's prompt, by the tokenizer's chat template.

    Raises:
        ValueError: the template refuses a question; the message names its row.
    """
    prompts = []
    for problem in problems:
        try:
            prompts.append(render_prompt(tokenizer, problem.question, system=system))
        except ValueError as error:
            raise ValueError(f"row {problem.index}: {error}") from None
    return prompts


def rollout_prompts(
    problems: Sequence[Problem],
    token_ids: Sequence[Sequence[int]],
    *,
    seed: int,
    step: int,
    samples: int,
    drawn: Mapping[int, int] = MappingProxyType({}),
) -> list[RolloutPrompt]:
    """Prompts for `samples` responses to each problem, problem after problem, with their seeds.

    A problem may occur twice, when a step ends one pass over the data and begins the next; its
    sample numbers then continue, since equal seeds would draw equal responses. `drawn` is how many
    samples of each problem, by its index, the step has drawn before.
    """
    prompts: list[RolloutPrompt] = []
    drawn = Counter(drawn)
    for problem, ids in zip(problems, token_ids, strict=True):
        for sample in range(drawn[problem.index], drawn[problem.index] + samples):
            own_seed = draw_seed(seed, step, problem.index, sample)
            prompts.append(
                RolloutPrompt(
                    problem=problem,
                    token_ids=ids,
                    sample=sample,
                    seed=own_seed,
                )
            )
        drawn[problem.index] += samples
    return prompts
