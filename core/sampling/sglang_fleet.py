"""The servers of a run: which are in use, how much each has to do, and asking all of them at once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from .sglang_client import ServerError, SglangServer

T = TypeVar("T")


class Fleet:
    """Servers, those that failed left out, each with the tokens that this rank has asked it for and not got yet."""

    def __init__(self, servers: Sequence[SglangServer], *, retries: int) -> None:
        self.servers, self.retries = servers, retries
        self._tokens = dict.fromkeys((server.url for server in servers), 0)
        self._lock = threading.Lock()
        self.start_again({})

    def start_again(self, failures: dict[str, str]) -> None:
        """All servers are in use but these, each with the reason."""
        self.failures = failures
        self._strikes = dict.fromkeys(self._tokens, 0)
        self._struck_at = dict.fromkeys(self._tokens, 0.0)

    def alive(self) -> list[SglangServer]:
        return [server for server in self.servers if server.url not in self.failures]

    def obituary(self) -> str:
        return f"no sglang server is left: {'; '.join(self.failures.values())}"

    def leave_out(self, error: ServerError) -> None:
        self.failures[error.url] = str(error)
        tqdm.write(f"verippo: left out: {error}", file=sys.stderr)

    # --- all at once ---

    def ask(self, work: Callable[[SglangServer], T]) -> dict[str, T]:
        """What `work` gives for each server in use, by address. One that fails is left out, as long as another is left;
        else raises RuntimeError. A refusal is raised as it is: what one server refuses is at fault itself."""
        given: dict[str, T] = {}
        results = on_each(self.alive(), work)
        for result in results:
            if isinstance(result, ServerError) and result.kind == "refused":
                raise result
        for server, result in zip(self.alive(), results, strict=True):
            if isinstance(result, ServerError):
                self.leave_out(result)
            else:
                given[server.url] = result
        if not given:
            raise RuntimeError(self.obituary())
        return given

    def ask_all(self, work: Callable[[SglangServer], T]) -> list[T]:
        """What `work` gives for each server in use. Raises the first failure when all have answered."""
        given: list[T] = []
        for result in on_each(self.alive(), work):
            if isinstance(result, ServerError):
                raise result
            given.append(result)
        return given

    # --- one at a time ---

    @contextmanager
    def lend(self, tokens: int) -> Iterator[SglangServer]:
        """The server with the fewest outstanding tokens, which has these too meanwhile; one in doubt only if all are."""
        with self._lock:
            if not (alive := self.alive()):
                raise RuntimeError(self.obituary())
            server = min(
                alive, key=lambda server: (self._strikes[server.url] > 0, self._tokens[server.url])
            )
            self._tokens[server.url] += tokens
        try:
            yield server
        finally:
            with self._lock:
                self._tokens[server.url] -= tokens

    def praise(self, server: SglangServer) -> None:
        self._strikes[server.url] = 0

    def blame(
        self,
        server: SglangServer,
        error: ServerError,
        started: float,
    ) -> float:
        """Counts a failure of a request sent at `started` (time.monotonic). A server that hangs, or fails more than `retries`
        times in a row, is left out. Returns how long to wait before the next attempt (seconds)."""
        with self._lock:
            if (
                started >= self._struck_at[server.url]
            ):  # one outage fails all requests in flight, and counts once
                self._strikes[server.url] += 1
                self._struck_at[server.url] = time.monotonic()
            if server.url not in self.failures and (
                error.kind == "timeout" or self._strikes[server.url] > self.retries
            ):
                self.leave_out(error)
            strikes = [self._strikes[server.url] for server in self.alive()]
        fewest = min(strikes, default=0)
        return min(0.5 * 2**fewest, 8.0) if fewest else 0.0


def on_each(
    servers: Sequence[SglangServer], work: Callable[[SglangServer], T]
) -> list[T | ServerError]:
    """What `work` gives for each server, all at once; a ServerError is returned in its server's place."""

    def attempt(server: SglangServer) -> T | ServerError:
        try:
            return work(server)
        except ServerError as error:
            return error

    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        try:
            return list(pool.map(attempt, servers))
        except BaseException:  # an interrupt does not wait for the answers
            for server in servers:
                server.cut()
            raise
