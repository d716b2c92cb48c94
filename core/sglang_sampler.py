"""Sampling over HTTP from one or many sglang servers, whose weights follow the trainer's."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor
from tqdm import tqdm

from verippo.core import dist
from verippo.core.sampler import Completion, Prompt, SamplingParams, check_prompts
from verippo.core.sglang_client import (
    ASLEEP,
    PROBE_SECONDS,
    ServerError,
    SglangServer,
    ask_living,
    flush_request,
    generate_request,
    on_each,
    read_completion,
    read_scores,
    release_request,
    resume_request,
    score_request,
    version_request,
)
from verippo.core.weight_sync import DiskSync, DistributedSync, TensorSync, WeightSync

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SglangConfig:
    """The servers, and how weights reach them."""

    urls: str = ""
    """sglang: comma-separated addresses, http://host:port each"""
    api_key_env: str | None = None
    """sglang: environment variable that holds the servers' API key"""
    concurrency: int = 256
    """sglang: requests in flight from each rank, over all servers"""
    timeout_seconds: float = 900.0
    """sglang: a response or a weight update that takes longer means a hanging server; above the longest response's time"""
    retries: int = 2
    """sglang: failures in a row after which a server is left out, less one"""
    sync: Literal["disk", "distributed", "tensor"] = "disk"
    """sglang: how weights travel: a folder that the servers see too, a process group (NCCL, on CPU gloo), or handles to
    memory of the same machine"""
    sync_folder: str | None = None
    """disk: the shared folder; default: OUTPUT/sync"""
    master_address: str | None = None
    """distributed: where servers reach rank 0; default: the address that leads to the first server"""
    master_port: int = 0
    """distributed: its port; 0 takes a free one"""
    bucket_mib: int = 512
    """weights are gathered and sent in portions of this size (MiB), or of one tensor where that is larger"""
    parity_tolerance: float | None = None
    """sglang: nats that a server's log-prob of a fixed token may differ from the trainer's after a weight update; the servers
    run in the trainer's dtype. Default: 1e-4 with fp32, 0.5 with bf16"""
    sleep: bool = False
    """sglang: the servers give their GPU memory back while the trainer trains (start them with --enable-memory-saver)"""

    def __post_init__(self) -> None:
        for name in ("concurrency", "bucket_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"sampler.{name}={getattr(self, name)}: must be at least 1")
        if self.retries < 0:
            raise ValueError(f"sampler.retries={self.retries}: must be 0 or more")
        if not self.timeout_seconds > 0:
            raise ValueError(f"sampler.timeout_seconds={self.timeout_seconds}: must be above 0")
        if self.parity_tolerance is not None and not self.parity_tolerance > 0:
            raise ValueError(f"sampler.parity_tolerance={self.parity_tolerance}: must be above 0")
        if not 0 <= self.master_port < 1 << 16:
            raise ValueError(f"sampler.master_port={self.master_port}: must be 0 (any free one) to 65535")


class SglangSampler:
    """Draws from servers that others started. Every rank sends its own prompts; weights are sent by rank 0 alone.

    A server that fails is left out until a weight update finds it well again; what it had not finished goes to the others.
    A prompt's seed fixes its draws only on servers started with --enable-deterministic-inference.
    """

    def __init__(
        self, config: SglangConfig, *, stop_token_ids: Sequence[int], vocabulary: int, context: int | None, folder: Path,
        progress: bool = False,
    ) -> None:  # fmt: skip
        """vocabulary and context: the model's, in tokens. folder: for sync=disk, unless the configuration names one.
        Raises ValueError when no server answers."""
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise ValueError(f"sampler.api_key_env={config.api_key_env}: that environment variable is not set")
        urls = [url.strip().rstrip("/") for url in config.urls.split(",") if url.strip()]
        self.config, self.progress, self.version = config, progress, 0
        self.servers = [SglangServer(url, api_key=key) for url in dict.fromkeys(urls)]
        self.stops, self.vocabulary, self.context = tuple(stop_token_ids), vocabulary, context
        self.load = _Load(self.servers, retries=config.retries)
        for info in on_each(self.servers, SglangServer.info):
            if isinstance(info, ServerError):
                self.load.leave_out(info)
            elif info.get("context_length"):
                self.context = min(info["context_length"], self.context or math.inf)
        if not self.load.alive():
            raise ValueError(f"sampler.urls: {self.load.obituary()}")
        if config.sync_folder:  # others may use it too: what we write and remove lies in a folder of our own
            folder = Path(config.sync_folder) / f"verippo-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
        self.sync = _weight_sync(config, folder)

    # --- responses ---

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in order.

        Raises ValueError for an empty prompt, an id outside the vocabulary or a prompt too long for the context; RuntimeError
        when no server is left, when one holds other weights than the last sent, or when one refuses a request.
        """
        check_prompts(prompts, params, vocabulary=self.vocabulary, context=self.context)
        if not prompts:
            return []
        longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].token_ids), i))
        running = _Running()
        pool = ThreadPoolExecutor(min(self.config.concurrency, len(prompts)), thread_name_prefix="rollout")
        try:
            futures = {pool.submit(self._complete, prompts[i], params, running): i for i in longest_first}
            done = {futures[future]: future.result() for future in self._watched(futures)}
            return [done[i] for i in range(len(prompts))]
        finally:  # after an error or an interrupt nothing of ours may go on running on the servers
            running.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            on_each(self.servers, lambda server: server.abort(running.on(server)) if running.on(server) else None)
            pool.shutdown()

    def _watched(self, futures: dict[Future[Completion], int]) -> Iterator[Future[Completion]]:
        start, tokens = time.perf_counter(), 0
        with tqdm(total=len(futures), desc="rollout", unit="response", leave=False, disable=not self.progress) as bar:
            for future in as_completed(futures):
                yield future
                tokens += len(future.result().token_ids)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                bar.update()

    def _complete(self, prompt: Prompt, params: SamplingParams, running: _Running) -> Completion:
        """Asks one server after another until one answers well."""
        tokens = len(prompt.token_ids) + params.max_new_tokens
        for attempt in itertools.count():
            with self.load.lend(tokens) as server, running.request(server) as rid:
                started = time.monotonic()
                try:
                    request = generate_request(prompt.token_ids, params, seed=prompt.seed, stop_token_ids=self.stops, rid=rid)
                    answer = server.ask(request, timeout_seconds=self.config.timeout_seconds)
                    completion = read_completion(answer, params, url=server.url, stop_token_ids=self.stops, version=self.version)
                    self.load.praise(server)
                    return completion
                except ServerError as error:
                    if error.kind == "refused" or running.stop.is_set():
                        raise
                    pause = self.load.blame(server, error, started)
                    if attempt >= (self.config.retries + 1) * len(self.servers):  # others succeed: this one never will
                        raise
            running.stop.wait(pause)
        raise AssertionError

    # --- weights ---

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends the weights to every server that answers, waking those asleep, and reads their version back.

        Every rank iterates all tensors; rank 0 sends. Raises RuntimeError on every rank alike when a server fails.
        """
        failed = {url for urls in dist.all_gather(list(self.load.failures)) for url in urls}
        tensors, failure = iter(named_tensors), None
        if dist.is_main():
            try:
                self._send(tensors, version, failed)
            except (RuntimeError, ValueError, OSError) as error:
                failure = f"weight version {version} was not sent ({self.config.sync}): {error}"
        for _ in tensors:  # what rank 0 did not reach, and all of it on the others
            pass
        failure, failures = dist.broadcast((failure, self.load.failures))
        self.load.start_again(failures)
        if failure:
            raise RuntimeError(failure)
        self.version = version

    def _send(self, tensors: Iterator[tuple[str, Tensor]], version: int, failed: set[str]) -> None:
        self.load.start_again({})
        self._ask_living(lambda server: _make_ready(server, failed, self.config.timeout_seconds))
        for failure in self.sync.push(self.load.alive(), tensors, str(version)):
            self.load.leave_out(failure)
        self._ask_living(lambda server: self._settle(server, str(version)))

    def _ask_living(self, work: Callable[[SglangServer], T]) -> dict[str, T]:
        """What `work` gives for each server in use, by address; one that fails is left out, as long as another is left."""
        given, failures = ask_living(self.load.alive(), work)
        for failure in failures:
            self.load.leave_out(failure)
        if not given:
            raise RuntimeError(self.load.obituary())
        return given

    def _settle(self, server: SglangServer, version: str) -> None:
        server.ask(flush_request(self.config.timeout_seconds), timeout_seconds=self.config.timeout_seconds + PROBE_SECONDS)
        if (held := server.version()) != version:
            raise RuntimeError(f"{server.url}: holds weight version {held} after the update to {version}")

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Address -> for each sequence, the server's log-probs of its tokens from the second on (temperature 1, nats).

        Every server in use is asked. Call on every rank: rank 0 asks, all get the answer, or the RuntimeError.
        """
        found: dict[str, list[list[float]]] = {}
        failure = None
        if dist.is_main():
            try:
                found = self._ask_living(lambda server: self._score(server, sequences))
            except RuntimeError as error:
                failure = str(error)
        failure, found = dist.broadcast((failure, found))
        if failure:
            raise RuntimeError(failure)
        return found

    def _score(self, server: SglangServer, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        timeout = self.config.timeout_seconds
        return [
            read_scores(
                server.ask(score_request(ids), timeout_seconds=timeout, retries=2), ids, url=server.url, version=self.version
            )
            for ids in sequences
        ]

    def sleep(self) -> None:
        """The servers give their memory back until the next weight update. Call on every rank, none of them generating."""
        failure = None
        if dist.is_main():
            try:
                self._ask_living(self._release)
            except RuntimeError as error:
                failure = str(error)
        if failure := dist.broadcast(failure):
            raise RuntimeError(failure)

    def _release(self, server: SglangServer) -> None:
        timeout = self.config.timeout_seconds
        server.ask(flush_request(timeout), timeout_seconds=timeout + PROBE_SECONDS)  # refused while anything runs
        server.ask(release_request(), timeout_seconds=timeout)
        server.ask(version_request(ASLEEP), timeout_seconds=PROBE_SECONDS)

    def close(self) -> None:
        """Leaves the servers' process group and removes what was written for them. Never raises for a dead server."""
        if dist.is_main():
            self.sync.close(self.load.alive())


def _make_ready(server: SglangServer, failed: set[str], timeout_seconds: float) -> None:
    """Wakes the server if it is asleep; one that failed before must answer a request again."""
    if server.version() == ASLEEP:
        server.ask(resume_request(), timeout_seconds=timeout_seconds)
    elif server.url in failed:
        server.ask(score_request([0, 0]), timeout_seconds=PROBE_SECONDS)


def _weight_sync(config: SglangConfig, folder: Path) -> WeightSync:
    bucket_bytes, timeout = config.bucket_mib * 2**20, config.timeout_seconds
    if config.sync == "disk":
        return DiskSync(folder, bucket_bytes=bucket_bytes, timeout_seconds=timeout)
    if config.sync == "tensor":
        return TensorSync(bucket_bytes=bucket_bytes, timeout_seconds=timeout)
    address, port = config.master_address, config.master_port
    return DistributedSync(address=address, port=port, bucket_bytes=bucket_bytes, timeout_seconds=timeout)


class _Load:
    """Which servers are in use, and how many tokens this rank has asked each of them for."""

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

    @contextmanager
    def lend(self, tokens: int) -> Iterator[SglangServer]:
        """The server with the fewest outstanding tokens, which has these too meanwhile; one in doubt only if all are."""
        with self._lock:
            if not (alive := self.alive()):
                raise RuntimeError(self.obituary())
            server = min(alive, key=lambda server: (self._strikes[server.url] > 0, self._tokens[server.url]))
            self._tokens[server.url] += tokens
        try:
            yield server
        finally:
            with self._lock:
                self._tokens[server.url] -= tokens

    def praise(self, server: SglangServer) -> None:
        self._strikes[server.url] = 0

    def blame(self, server: SglangServer, error: ServerError, started: float) -> float:
        """Counts a failure of a request sent at `started` (time.monotonic). A server that hangs, or fails more than `retries`
        times in a row, is left out. Returns how long to wait before the next attempt (seconds)."""
        with self._lock:
            if started >= self._struck_at[server.url]:  # one outage fails all requests in flight, and counts once
                self._strikes[server.url] += 1
                self._struck_at[server.url] = time.monotonic()
            if server.url not in self.failures and (error.kind == "timeout" or self._strikes[server.url] > self.retries):
                self.leave_out(error)
            strikes = [self._strikes[server.url] for server in self.alive()]
        fewest = min(strikes, default=0)
        return min(0.5 * 2**fewest, 8.0) if fewest else 0.0


class _Running:
    """The requests of one call of `generate` that are under way."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._name, self._numbers = uuid.uuid4().hex, itertools.count()
        self._urls: dict[str, str] = {}

    @contextmanager
    def request(self, server: SglangServer) -> Iterator[str]:
        rid = f"{self._name}-{next(self._numbers):09d}"  # of one length: aborting a request aborts those it is a prefix of
        self._urls[rid] = server.url
        try:
            yield rid
        finally:
            del self._urls[rid]

    def on(self, server: SglangServer) -> list[str]:
        return [rid for rid, url in list(self._urls.items()) if url == server.url]
