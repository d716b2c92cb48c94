"""Where the rollouts of a step come from: sampled when it begins, or during the step before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from ..core.sampling.process_sampler import ProcessSampler
from ..core.sampling.sglang_sampler import SglangSampler
from ..core.training import dist
from .config import PPOConfig
from .rollout import Rollout, RolloutPrompt
from .sampling import gather, roll_out, sample_share
from .setup import Components
from .weight_push import sleep

INTERRUPT_SECONDS = 30.0
"""How long the end of a run waits for a sampler that was interrupted, or that cannot be."""
PromptsOfStep = Callable[[int], list[RolloutPrompt]]


class RolloutSource(Protocol):
    """Where rollouts come from. Every rank calls each method, in its main thread."""

    def take(self, step: int) -> list[Rollout]:
        """The rollouts of a step, the same on every rank."""
        ...

    def finish(self) -> None:
        """Waits until nothing is being sampled: then the sampler's weights may change."""
        ...

    def close(self) -> None:
        """Gives up what is being sampled."""
        ...

    def save(self, folder: Path, name: str) -> None:
        """Stores in a checkpoint what the next step needs."""
        ...

    def load(self, folder: Path, name: str) -> None:
        """Loads what `save` stored."""
        ...


def rollout_source(
    config: PPOConfig,
    parts: Components,
    *,
    prompts: PromptsOfStep,
    stop_if_asked: Callable[[], None],
) -> RolloutSource:
    """The source that `config.staleness` names.

    Args:
        config: the run's configuration.
        parts: sampler and rollout function.
        prompts: step -> its prompts, the same on every rank; called once for each step in order.
        stop_if_asked: called by every rank after its share, which a signal may have cut short.
    """
    fresh = FreshRollouts(config, parts, prompts, stop_if_asked)
    return RolloutsAhead(fresh) if config.staleness else fresh


class FreshRollouts:
    """Samples a step's rollouts when it begins, with the weights of the step before."""

    def __init__(
        self,
        config: PPOConfig,
        parts: Components,
        prompts: PromptsOfStep,
        stop_if_asked: Callable[[], None],
    ) -> None:
        """See `rollout_source`."""
        self.config = config
        self.parts = parts
        self.prompts = prompts
        self.stop_if_asked = stop_if_asked

    def take(self, step: int) -> list[Rollout]:
        """Samples; afterwards the sampler may release its memory."""
        rollouts = roll_out(
            self.parts,
            self.prompts(step),
            self.config.sampling,
            version=step - 1,
            stop_if_asked=self.stop_if_asked,
        )
        sleep(self.config, self.parts.sampler)
        return rollouts

    def finish(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""

    def save(self, folder: Path, name: str) -> None:
        """Does nothing."""

    def load(self, folder: Path, name: str) -> None:
        """Does nothing."""


class RolloutsAhead:
    """Samples the next step's rollouts in a background thread while a step trains.

    `take(n)` starts the sampling of step n + 1, with the weights of step n - 1 that the sampler
    then holds; `finish`, before the weights of step n are pushed, waits for its end. The first
    step, and the first one after the end of an earlier run, is sampled when it begins.

    The thread takes part in no collective operation: rollouts are gathered by `finish`.
    """

    def __init__(self, fresh: FreshRollouts) -> None:
        """`fresh` samples a first step."""
        self.fresh = fresh
        self.next: list[Rollout] | None = None
        """Rollouts of the first step that is not finished. They stay until `finish`, since a
        signal may abandon a step that has taken them."""
        self.background: Background | None = None

    def take(self, step: int) -> list[Rollout]:
        """Returns the waiting rollouts, and starts the sampling of those of the next step."""
        taken = self.fresh.take(step) if self.next is None else self.next
        self.next = taken
        if step < self.fresh.config.total_steps:
            self.background = Background(self.fresh, step + 1, version=step - 1)
        return taken

    def finish(self) -> None:
        """Waits for the sampling that `take` started, and gathers its rollouts.

        Raises:
            BaseException: whatever the sampling raised.
        """
        self.next = self.background.rollouts() if self.background else None
        self.background = None

    def close(self) -> None:
        """Ends the sampling, if it can be interrupted."""
        if self.background:
            self.background.interrupt()

    def save(self, folder: Path, name: str) -> None:
        """Stores the waiting rollouts."""
        if dist.is_main():
            torch.save(self.next, folder / f"{name}.pt")

    def load(self, folder: Path, name: str) -> None:
        """Loads the waiting rollouts; a run that did not sample ahead has none."""
        file = folder / f"{name}.pt"
        self.next = torch.load(file, weights_only=False) if file.exists() else None


class Background:
    """The sampling of a step in a thread of its own."""

    def __init__(self, fresh: FreshRollouts, step: int, *, version: int) -> None:
        """Starts the thread; `version` is that of the sampler's weights."""
        self.parts = fresh.parts
        self.prompts = fresh.prompts(step)
        self.version = version
        self.future: Future[list[Rollout]] = Future()
        sample = partial(sample_share, self.parts, self.prompts, fresh.config.sampling)
        # a daemon thread: a function of the user's may hang, which must not delay the end
        self.thread = threading.Thread(target=_run, args=(self.future, sample), daemon=True)
        self.thread.start()

    def rollouts(self) -> list[Rollout]:
        """Waits for the end; the rollouts of all ranks."""
        return gather(self.parts, self.prompts, self.future.result(), version=self.version)

    def interrupt(self) -> None:
        """Ends the thread."""
        sampler = self.parts.sampler
        if isinstance(sampler, (ProcessSampler, SglangSampler)):
            sampler.interrupt()
        self.thread.join(INTERRUPT_SECONDS)


def _run(future: Future[list[Rollout]], sample: Callable[[], list[Rollout]]) -> None:
    try:
        future.set_result(sample())
    except BaseException as error:
        future.set_exception(error)
