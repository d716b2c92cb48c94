"""From problems to sampled responses: what users replace or wrap to tune rollouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ..core.sampling.sampler import Prompt, Sampler, SamplingParams, draw_seed
from ..core.text.chat import parse_response, render_prompt
from ..core.text.data import Problem


@dataclass(frozen=True, kw_only=True)
class RolloutPrompt:
    """One response is to be drawn for this problem."""

    problem: Problem
    token_ids: Sequence[int] = field(repr=False)
    sample: int = 0
    """which of the problem's samples this is, from 0"""
    seed: int = 0
    """fixes its draws: made of (run seed, step, problem, sample) and nothing else"""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A problem, the response drawn for it, and what the sampler said of it."""

    problem: Problem
    prompt_ids: Sequence[int] = field(repr=False)
    response_ids: Sequence[int] = field(repr=False)
    """the stop token included"""
    sampler_logprobs: Sequence[float] = field(repr=False)
    """of each response token, at the sampling temperature (nats)"""
    text: str
    """the response without special tokens: what verifiers read"""
    truncated: bool = False
    """it reached max_new_tokens without a stop token"""
    sample: int = 0
    version: int = 0
    """the weight version it was drawn with"""

    @property
    def final(self) -> str | None:
        """The final response, or None when the format is broken."""
        parsed = parse_response(self.text)
        return parsed.final if parsed else None

    @property
    def reasoned(self) -> bool:
        """Whether the format holds and something stands under `## Thinking`."""
        parsed = parse_response(self.text)
        return bool(parsed and parsed.thinking)


class RolloutFunction(Protocol):
    def __call__(
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
    """Draws one response for each prompt, in order. This rank's prompts only; other ranks draw theirs."""
    requests = [Prompt(token_ids=prompt.token_ids, seed=prompt.seed) for prompt in prompts]
    completions = sampler.generate(requests, sampling)
    if len(completions) != len(prompts):
        raise ValueError(
            f"the sampler gave {len(completions)} completions for {len(prompts)} prompts: it must give one each"
        )
    return [
        Rollout(
            problem=prompt.problem,
            prompt_ids=prompt.token_ids,
            response_ids=completion.token_ids,
            sampler_logprobs=completion.logprobs,
            text=_text(tokenizer, completion.token_ids),
            truncated=completion.finish_reason == "length",
            sample=prompt.sample,
            version=completion.version,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def check_rollouts(rollouts: Sequence[Rollout], *, vocabulary: int, version: int) -> None:
    """Raises ValueError, naming the rollout, for what would train wrongly: log-probs that are not one finite number a token,
    and ids outside the vocabulary. Raises RuntimeError for a response drawn with other weights than `version`."""
    for number, rollout in enumerate(rollouts):
        if rollout.version != version:
            raise RuntimeError(
                f"rollout {number} was drawn with weight version {rollout.version}, the trainer's is {version}"
            )
        ids, logprobs = rollout.response_ids, rollout.sampler_logprobs
        if len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise ValueError(
                f"rollout {number} has {len(ids)} response tokens and {len(logprobs)} sampler log-probs: each token needs a "
                "finite one"
            )
        if not all(0 <= token < vocabulary for token in ids):
            raise ValueError(
                f"rollout {number} has a token id outside the vocabulary of {vocabulary}"
            )


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(
        list(token_ids), skip_special_tokens=True
    )  # a list only for lists of lists
    return text


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], *, system: str | None
) -> list[list[int]]:
    """The chat-templated token ids of every problem."""
    return [render_prompt(tokenizer, problem.question, system=system) for problem in problems]


def rollout_prompts(
    problems: Sequence[Problem],
    token_ids: Sequence[Sequence[int]],
    *,
    seed: int,
    step: int,
    samples: int,
) -> list[RolloutPrompt]:
    """`samples` prompts a problem, problem after problem, each with its own seed. A problem that stands there twice (a step
    may end one pass over the data and begin the next) counts its samples on: equal seeds would draw equal responses."""
    prompts: list[RolloutPrompt] = []
    drawn: Counter[int] = Counter()
    for problem, ids in zip(problems, token_ids, strict=True):
        for sample in range(drawn[problem.index], drawn[problem.index] + samples):
            own_seed = draw_seed(seed, step, problem.index, sample)
            prompts.append(
                RolloutPrompt(problem=problem, token_ids=ids, sample=sample, seed=own_seed)
            )
        drawn[problem.index] += samples
    return prompts
