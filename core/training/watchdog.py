"""Ends a rank when another one has failed, has been stopped, or cannot be reached.

Each rank writes a heartbeat with its phase into the store of the process group and reads those of
the others. One thread talks to the store; another one judges by what the first has read, since a
request to a host that cannot be reached may never return.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

from . import stopping

FAILED = "verippo/failed"
STOP = "verippo/stop"
ALIVE = "verippo/alive"


class Activity(NamedTuple):
    """What a rank does."""

    phase: str = "load"
    waits: bool = False
    """Whether it waits for other ranks in a collective operation."""


_activity = Activity()


def enter_phase(name: str) -> None:
    """Names what this rank does from now on, for the messages of the others."""
    global _activity
    _activity = Activity(name)


@contextmanager
def waiting() -> Iterator[None]:
    """Marks that this rank waits for the others."""
    global _activity
    _activity = _activity._replace(waits=True)
    try:
        yield
    finally:
        _activity = _activity._replace(waits=False)


class Failure(NamedTuple):
    """Why the run ends, and the exit status."""

    reason: str
    status: int = 1


class Watchdog:
    """Watches the other ranks from `start` to `stop`."""

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        world_size: int,
        limit_seconds: float,
        poll_seconds: float,
    ) -> None:
        """Args:
        store: a connection of its own to the store of the process group.
        rank: number of this rank.
        world_size: number of ranks.
        limit_seconds: a rank without a heartbeat for longer is taken for stopped.
        poll_seconds: time between heartbeats.
        """
        self.store = store
        self.rank = rank
        self.limit = limit_seconds
        self.poll = poll_seconds
        self.others = [other for other in range(world_size) if other != rank]
        self.beats = 0
        self.heard: dict[int, tuple[int, Activity]] = {}
        self.silence = dict.fromkeys(self.others, 0.0)
        self.store_silence = 0.0
        self.failure: Failure | None = None
        self.done = threading.Event()
        loops = (self._exchange_repeatedly, self._judge_repeatedly)
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def start(self) -> None:
        """Starts watching."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads."""
        self.done.set()
        # a daemon thread inside a C++ call would abort the process at its end
        for thread in self.threads:
            thread.join(timeout=30)

    def publish(self, failure: Failure) -> None:
        """Tells the other ranks why the run ends, and gives them time to read it."""
        if self.store_silence > 5 * self.poll:  # the request might never return
            return
        with suppress(Exception):
            if not self.store.compare_set(FAILED, "", json.dumps(failure)):
                return
            time.sleep(2 * self.poll)  # rank 0 serves the store

    def end_after(self, error: Exception) -> NoReturn:
        """Ends this rank after a failed collective operation, naming the rank that caused it."""
        deadline = time.monotonic() + 10 * self.poll
        while time.monotonic() < deadline and self.failure is None:
            silent = [other for other in self.others if self.silence[other] > 5 * self.poll]
            if silent:
                self._end(self._silent(silent))
            time.sleep(self.poll / 4)
        absent = [other for other in self.others if not self._activity(other).waits]
        names = " and ".join(f"rank {n} ({self._activity(n).phase})" for n in absent)
        message = " ".join(str(error).split())[:200]
        reason = f"a collective operation failed in phase {_activity.phase}"
        if names:
            reason += f", to which {names} did not come in time"
        self._end(self.failure or Failure(f"{reason}: {message}"))

    def _activity(self, rank: int) -> Activity:
        return self.heard[rank][1] if rank in self.heard else Activity()

    def _silent(self, ranks: list[int]) -> Failure:
        names = " and ".join(f"rank {n} (last in phase {self._activity(n).phase})" for n in ranks)
        seconds = max(self.silence[rank] for rank in ranks)
        return Failure(
            f"no sign of life for {seconds:.0f} s from {names}: stopped, killed or out of reach"
        )

    def _exchange_repeatedly(self) -> None:
        while not self.done.wait(self.poll):
            try:
                self._exchange()
                self.store_silence = 0.0
            except Exception as error:
                phase = self._activity(0).phase
                self.failure = Failure(f"rank 0 is gone, last in phase {phase} ({error!r:.100})")
                return

    def _exchange(self) -> None:
        """Writes this rank's heartbeat and reads what the others wrote."""
        self.beats += 1
        self.store.set(f"{ALIVE}/{self.rank}", json.dumps([self.beats, _activity]))
        for other in self.others:
            if self.store.check([f"{ALIVE}/{other}"]):
                beat, activity = json.loads(self.store.get(f"{ALIVE}/{other}"))
                if self.heard.get(other, (0,))[0] != beat:
                    self.silence[other] = 0.0
                self.heard[other] = beat, Activity(*activity)
        if self.store.check([FAILED]):
            self.failure = Failure(*json.loads(self.store.get(FAILED)))
        # a launcher may send a signal to one rank and wait for its end before it tells the next
        if stopping.received():
            self.store.set(STOP, str(stopping.received()))
        elif self.store.check([STOP]):
            os.kill(os.getpid(), stopping.SIGNALS[int(self.store.get(STOP)) - 1])

    def _judge_repeatedly(self) -> None:
        last = time.monotonic()
        while not self.done.wait(self.poll):
            now = time.monotonic()
            # time in which this process was itself stopped does not count
            elapsed = min(now - last, 2 * self.poll)
            last = now
            for other in self.others:
                self.silence[other] += elapsed
            self.store_silence += elapsed
            failure = self._judge()
            # this rank may be about to raise the same error itself
            if failure and not self.done.wait(self.poll):
                self._end(failure)

    def _judge(self) -> Failure | None:
        if self.failure:
            return self.failure
        if self.store_silence > self.limit and 0 in self.silence:
            return self._silent([0])  # which serves the store
        longest = max(self.silence.values())
        if longest <= self.limit:
            return None
        return self._silent([n for n in self.others if self.silence[n] > longest - 5 * self.poll])

    def _end(self, failure: Failure) -> NoReturn:
        self.publish(failure)
        start = "" if self.rank else "\n"  # rank 0 shows progress bars
        line = f"{start}verippo: rank {self.rank} stops: {failure.reason}"
        print(line, file=sys.stderr, flush=True)
        os._exit(failure.status)
