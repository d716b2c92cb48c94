"""Ends a rank when another one has failed, has been stopped, or cannot be reached.

Each rank writes a heartbeat with its phase into the store of the process group and reads those of
the others. One thread talks to the store; another one judges by what the first has read, since a
request to a host that cannot be reached may never return. Whatever else may block runs in a thread
that is waited for only so long, and the process ends without its main thread, which may be inside
a collective operation.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

from . import stopping

FAILED = "verippo/failed"
STOP = "verippo/stop"
ALIVE = "verippo/alive"
ADVICE = "check that host and the network, then run the same command again to resume"


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


def within(seconds: float, call: Callable[[], object]) -> bool:
    """Whether a call returned or raised in time; after that it is left to itself."""

    def run() -> None:
        with suppress(Exception):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


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
        hosts: Sequence[str],
        limit_seconds: float,
        poll_seconds: float,
    ) -> None:
        """Args:
        store: a connection of its own to the store of the process group.
        rank: number of this rank.
        hosts: name and address of each rank's host.
        limit_seconds: a rank without a heartbeat for longer is taken for stopped.
        poll_seconds: time between heartbeats.
        """
        self.store = store
        self.rank = rank
        self.hosts = hosts
        self.limit = limit_seconds
        self.poll = poll_seconds
        self.others = [other for other in range(len(hosts)) if other != rank]
        self.beats = 0
        self.heard: dict[int, tuple[int, Activity]] = {}
        self.silence = dict.fromkeys(self.others, 0.0)
        self.store_silence = 0.0
        self.failure: Failure | None = None
        self.done = threading.Event()
        self.ending = threading.Lock()
        loops = (self._exchange_repeatedly, self._judge_repeatedly)
        self.threads = [threading.Thread(target=loop, daemon=True) for loop in loops]

    def start(self) -> None:
        """Starts watching."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads."""
        self.done.set()
        # a daemon thread inside a C++ call would abort the process at its end, if the call returned
        seconds = 1.0 if self._is_cut_off() else 30.0
        for thread in self.threads:
            thread.join(timeout=seconds)

    def publish(self, failure: Failure) -> bool:
        """Tells the other ranks why the run ends, and gives them time to read it.

        Returns:
            Whether the store answered, or an earlier failure is known.
        """
        if self._is_cut_off():
            return self.failure is not None
        value = json.dumps(failure)
        if not within(5 * self.poll, lambda: self.store.compare_set(FAILED, "", value)):
            return False
        time.sleep(2 * self.poll)  # rank 0 serves the store
        return True

    def end_cut_off(self, error: BaseException) -> NoReturn:
        """Ends this rank after an error that it could not publish: its network may have failed."""
        message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        failure = self._store_failure()
        self._end(failure._replace(reason=f"{failure.reason} ({message})"))

    def _is_cut_off(self) -> bool:
        return self.store_silence > 5 * self.poll

    def end_after(self, error: Exception) -> NoReturn:
        """Ends this rank after a failed collective operation, naming the rank that caused it."""
        deadline = time.monotonic() + 10 * self.poll
        while time.monotonic() < deadline and self.failure is None:
            silent = [other for other in self.others if self.silence[other] > 5 * self.poll]
            if silent:
                self._end(self._silent(silent))
            time.sleep(self.poll / 4)
        absent = [other for other in self.others if not self._activity(other).waits]
        reason = f"a collective operation failed in phase {_activity.phase}"
        if absent:
            reason += f", to which {self._describe(absent)} did not come in time"
        message = " ".join(str(error).split())[:200]
        self._end(self.failure or Failure(f"{reason}: {message}"))

    def _activity(self, rank: int) -> Activity:
        return self.heard[rank][1] if rank in self.heard else Activity()

    def _describe(self, ranks: Sequence[int]) -> str:
        return " and ".join(
            f"rank {n} ({self.hosts[n]}; last in phase {self._activity(n).phase})" for n in ranks
        )

    def _silent(self, ranks: Sequence[int]) -> Failure:
        return self._lost(ranks, max(self.silence[rank] for rank in ranks))

    def _lost(self, ranks: Sequence[int], seconds: float) -> Failure:
        return Failure(
            f"no sign of life for {seconds:.0f} s from {self._describe(ranks)}: "
            f"stopped, killed or out of reach: {ADVICE}"
        )

    def _store_failure(self) -> Failure:
        """No answer from the store, which the first rank or the launcher on its host serves."""
        if 0 in self.silence:
            return self._lost([0], self.store_silence)
        return Failure(
            f"no answer for {self.store_silence:.0f} s from the store of the ranks, which the "
            f"launcher on this host ({self.hosts[0]}) serves: stopped or killed: {ADVICE}"
        )

    def _exchange_repeatedly(self) -> None:
        while not self.done.wait(self.poll):
            try:
                self._exchange()
                self.store_silence = 0.0
            except Exception as error:
                if not self._is_cut_off():  # otherwise the silence is what has to be reported
                    reason = f"{self._describe([0])} is gone: {ADVICE} ({error!r:.100})"
                    self.failure = Failure(reason)
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
        if self.store_silence > self.limit:
            return self._store_failure()
        longest = max(self.silence.values())
        if longest <= self.limit:
            return None
        return self._silent([n for n in self.others if self.silence[n] > longest - 5 * self.poll])

    def _end(self, failure: Failure) -> NoReturn:
        self.ending.acquire()  # for good: the judge and the main thread may end the process at once
        start = "" if self.rank else "\n"  # rank 0 shows progress bars
        line = f"{start}verippo: rank {self.rank} stops: {failure.reason}"
        # nobody may read the other end of stderr any more
        within(5.0, lambda: print(line, file=sys.stderr, flush=True))
        self.publish(failure)
        os._exit(failure.status)
