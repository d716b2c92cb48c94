"""Signals that stop a training run: SIGINT, SIGTERM and SIGUSR1.

While a run loads, a signal ends it at once. Within the training loop it is only noted, until every
rank reaches a point at which the state of the last finished step can be saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
"""The signals; if several arrive, as from launchers, the last of these counts."""
AGAIN_SECONDS = 2.0
"""A second SIGINT after this time ends the process without saving; launchers repeat it sooner."""


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; `number` is its place in SIGNALS, from 1."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {self.signal.name}")

    @property
    def signal(self) -> signal.Signals:
        """The signal."""
        return SIGNALS[self.number - 1]

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, as shells have it; 0 for the others, which ask for an orderly end."""
        return 130 if self.signal == signal.SIGINT else 0


class AgreedStop(Stopped):
    """Raised by every rank at the same point, with the weights of the last finished step."""


@dataclass
class _Progress:
    received: int = 0
    time: float = 0.0
    deferred: bool = False
    training: bool = False


_progress = _Progress()


def received() -> int:
    """Place of the received signal in SIGNALS, from 1; 0 without one."""
    return _progress.received


def training_began() -> bool:
    """Whether the training loop was entered."""
    return _progress.training


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals for the duration of a `with` block, if this is the main thread.

    After a signal they stay ignored: launchers send more while the process ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _progress
    _progress = _Progress()
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _progress.received else handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only notes signals for the duration of a `with` block, the training loop."""
    _progress.deferred = _progress.training = True
    try:
        yield
    finally:
        _progress.deferred = False


def abortable(call: Callable[[], T]) -> T | None:
    """Calls a function that a signal ends at once, inside `deferred` too; None if one did."""
    if _progress.received:
        return None
    before = _progress.deferred
    try:
        _progress.deferred = False
        return call()
    except Stopped:
        return None
    finally:
        _progress.deferred = before


def _on_signal(number: int, frame: object) -> None:
    first = not _progress.received
    if first:
        _progress.time = time.monotonic()
    elif number == signal.SIGINT and time.monotonic() - _progress.time > AGAIN_SECONDS:
        print("verippo: interrupted again: ended without saving", file=sys.stderr, flush=True)
        os._exit(130)
    place = SIGNALS.index(signal.Signals(number)) + 1
    _progress.received = max(_progress.received, place)
    if first and not _progress.deferred:
        raise Stopped(place)
    if first and number == signal.SIGINT and sys.stderr.isatty():
        print("\nstopping at the next safe point; Ctrl-C again ends at once", file=sys.stderr)
