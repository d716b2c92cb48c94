"""Responses and scores of a step, of which each rank makes its share and receives all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..core.sampling.local_sampler import LocalSampler
from ..core.sampling.process_sampler import ProcessSampler
from ..core.sampling.sampler import SamplingParams
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.training import dist
from ..core.training.stopping import abortable
from .rollout import Rollout, RolloutPrompt, check_rollouts, rollout
from .setup import Components


def roll_out(
    parts: Components,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    version: int,
    stop_if_asked: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Samples one response per prompt, each rank its share.

    Args:
        parts: sampler and rollout function.
        prompts: the prompts of all ranks.
        sampling: temperature and length limit.
        version: version of the weights.
        stop_if_asked: called by every rank after its share, which a signal may have cut short.

    Returns:
        The rollouts of all ranks in the order of the prompts, the same on every rank.

    Raises:
        ValueError: the rollout function returned another number of rollouts, or rollouts that
            cannot be trained on.
        RuntimeError: a rollout was sampled with other weights than `version`.
    """
    call = partial(sample_share, parts, prompts, sampling)
    # a user's function may hold collectives, which no rank may leave alone
    samplers = (LocalSampler, ProcessSampler, SglangSampler)
    ours = parts.rollout is rollout and isinstance(parts.sampler, samplers)
    own = abortable(call) if ours else call()
    stop_if_asked()
    assert own is not None  # only a signal ends the call
    return gather(parts, prompts, own, version=version)


def sample_share(
    parts: Components,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
) -> list[Rollout]:
    """This rank's share of the rollouts, without collective operations of ours."""
    share = prompts[dist.rank() :: dist.world_size()]
    own = parts.rollout(parts.sampler, share, sampling, tokenizer=parts.tokenizer)
    if len(own) != len(share):
        raise ValueError(
            f"the rollout function returned {len(own)} rollouts for {len(share)} prompts: "
            "it must return one for each"
        )
    return own


def gather(
    parts: Components,
    prompts: Sequence[RolloutPrompt],
    own: list[Rollout],
    *,
    version: int,
) -> list[Rollout]:
    """The rollouts of all ranks in the order of the prompts, checked; see `roll_out`."""
    world = dist.world_size()
    shares = dist.all_gather(own)
    rollouts = [shares[n % world][n // world] for n in range(len(prompts))]
    vocabulary = parts.policy.module.hf.config.vocab_size
    check_rollouts(rollouts, vocabulary=vocabulary, version=version)
    return rollouts


def score(parts: Components, rollouts: Sequence[Rollout]) -> Tensor:
    """The verifier's scores, each rank computing its share: [rollouts] float64 on every rank."""
    rank = dist.rank()
    world = dist.world_size()
    shares = dist.all_gather(parts.verifier.score(rollouts[rank::world]))
    scores = [shares[n % world][n // world] for n in range(len(rollouts))]
    return torch.tensor(scores, dtype=torch.float64)
