"""The sglang servers of a run: which are in use, how busy each is, and requests to all of them."""

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
    """The servers of a run. One that fails is excluded until `reset`.

    For each server it counts the tokens that this rank is waiting for.
    """

    def __init__(self, servers: Sequence[SglangServer], *, retries: int) -> None:
        """Args:
        servers: all servers of the run.
        retries: consecutive failures after which a server is still used.
        """
        self.servers = servers
        self.retries = retries
        self._tokens = dict.fromkeys((server.url for server in servers), 0)
        self._lock = threading.Lock()
        self.reset({})

    def reset(self, failures: dict[str, str]) -> None:
        """Sets which servers are excluded, and forgives the failures of all others.

        Args:
            failures: address of each excluded server -> reason.
        """
        self.failures = failures
        self._num_failures = dict.fromkeys(self._tokens, 0)
        self._failed_at = dict.fromkeys(self._tokens, 0.0)

    def available(self) -> list[SglangServer]:
        """Servers in use.

        Raises:
            RuntimeError: there is none; the message has the failure of each.
        """
        if servers := [server for server in self.servers if server.url not in self.failures]:
            return servers
        raise RuntimeError(f"no sglang server is left: {'; '.join(self.failures.values())}")

    def exclude(self, error: ServerError) -> None:
        """Excludes the server that failed, and prints the error."""
        self.failures[error.url] = str(error)
        tqdm.write(f"verippo: server excluded: {error}", file=sys.stderr)

    def ask(self, work: Callable[[SglangServer], T]) -> dict[str, T]:
        """Calls a function for every server in use, at the same time, and excludes those that fail.

        Args:
            work: function to call.

        Returns:
            Address -> result, of the servers that did not fail.

        Raises:
            ServerError: a server refused a request; every server would.
            RuntimeError: all servers failed.
        """
        results = call_each(self.available(), work)
        errors = [result for result in results.values() if isinstance(result, ServerError)]
        for error in errors:
            if error.kind == "refused":
                raise error
        for error in errors:
            self.exclude(error)
        self.available()  # raises if none is left
        return {
            url: result for url, result in results.items() if not isinstance(result, ServerError)
        }

    def ask_all(self, work: Callable[[SglangServer], T]) -> list[T]:
        """Calls a function for every server in use, at the same time; none may fail.

        Args:
            work: function to call.

        Returns:
            Results in the order of `available`.

        Raises:
            ServerError: a server failed; raised when all calls have ended.
        """
        completed: list[T] = []
        for result in call_each(self.available(), work).values():
            if isinstance(result, ServerError):
                raise result
            completed.append(result)
        return completed

    @contextmanager
    def lend(self, tokens: int) -> Iterator[SglangServer]:
        """Chooses a server for a request: the one with the fewest outstanding tokens.

        A server whose last request failed is only chosen if that holds for all.

        Args:
            tokens: tokens of the request, outstanding for the duration of the `with` block.

        Raises:
            RuntimeError: no server is left.
        """
        with self._lock:
            server = min(
                self.available(),
                key=lambda server: (self._num_failures[server.url] > 0, self._tokens[server.url]),
            )
            self._tokens[server.url] += tokens
        try:
            yield server
        finally:
            with self._lock:
                self._tokens[server.url] -= tokens

    def record_success(self, server: SglangServer) -> None:
        """Forgives the earlier failures of a server."""
        self._num_failures[server.url] = 0

    def record_failure(self, error: ServerError, started: float) -> float:
        """Counts a failure, and excludes a server that hangs or has used up its retries.

        Args:
            error: the failure.
            started: when the request was sent (time.monotonic).

        Returns:
            Delay before the next attempt, in seconds.
        """
        url = error.url
        with self._lock:
            # one outage fails all requests in flight, and counts once
            if started >= self._failed_at[url]:
                self._num_failures[url] += 1
                self._failed_at[url] = time.monotonic()
            is_final = error.kind == "timeout" or self._num_failures[url] > self.retries
            if is_final and url not in self.failures:
                self.exclude(error)
            counts = [n for name, n in self._num_failures.items() if name not in self.failures]
        fewest = min(counts, default=0)
        return min(0.5 * 2**fewest, 8.0) if fewest else 0.0


def call_each(
    servers: Sequence[SglangServer], work: Callable[[SglangServer], T]
) -> dict[str, T | ServerError]:
    """Calls a function for each server, at the same time.

    Args:
        servers: servers to call it for.
        work: function to call.

    Returns:
        Address -> result, or the ServerError that was raised.
    """

    def attempt(server: SglangServer) -> T | ServerError:
        try:
            return work(server)
        except ServerError as error:
            return error

    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        try:
            results = list(pool.map(attempt, servers))
        except BaseException:  # an interrupt must not wait for the answers
            for server in servers:
                server.cut()
            raise
    return {server.url: result for server, result in zip(servers, results, strict=True)}
