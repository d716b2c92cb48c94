"""Sampling over HTTP from one or many sglang servers, whose weights follow the trainer's."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from torch import Tensor
from tqdm import tqdm

from ..bounds import CountingInt, NonNegativeInt, PortInt, PositiveFloat, check_bounds
from ..training import dist
from .sampler import Completion, Prompt, SamplingParams, check_prompts
from .sglang_client import PROBE_SECONDS, ServerError, SglangServer, read_completion, read_scores
from .sglang_fleet import Fleet, on_each
from .sglang_requests import (
    ASLEEP,
    RELEASE,
    RESUME,
    flush_request,
    generate_request,
    score_request,
    version_request,
)
from .weight_sync import DiskSync, DistributedSync, TensorSync, WeightSync

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SglangConfig:
    """sglang servers, and how weights reach them."""

    urls: str = ""
    """sglang: comma-separated addresses of the servers, such as http://127.0.0.1:30000."""
    api_key_env: str | None = None
    """sglang: environment variable that holds the servers' API key."""
    concurrency: CountingInt = 256
    """sglang: requests in flight from each rank, over all servers."""
    timeout_seconds: PositiveFloat = 900.0
    """sglang: seconds after which a response or weight update counts as hanging."""
    retries: NonNegativeInt = 2
    """sglang: failed requests in a row that a server is forgiven before it is left out."""
    sync: Literal["disk", "distributed", "tensor"] = "disk"
    """sglang: how weights travel: a shared folder, NCCL (gloo on CPU), or shared memory."""
    sync_folder: str | None = None
    """disk: folder that trainer and servers share; default: OUTPUT/sync."""
    master_address: str | None = None
    """distributed: address at which servers reach rank 0; default: found by itself."""
    master_port: PortInt = 0
    """distributed: port of rank 0; 0 takes a free one."""
    bucket_mib: CountingInt = 512
    """Size in MiB of the portions in which weights are gathered and sent."""
    parity_tolerance: PositiveFloat | None = None
    """sglang: gap in nats allowed after an update; default: 1e-4 with fp32, 0.5 with bf16."""
    sleep: bool = False
    """sglang: servers release GPU memory during training (needs --enable-memory-saver)."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="sampler.")


class SglangSampler:
    """Draws from servers that others started. Every rank sends its own prompts; weights are sent by rank 0 alone.

    A server that fails is left out until a weight update finds it well again; what it had not finished goes to the others.
    A prompt's seed fixes its draws only on servers started with --enable-deterministic-inference.
    """

    def __init__(
        self,
        config: SglangConfig,
        *,
        stop_token_ids: Sequence[int],
        vocabulary: int,
        context: int | None,
        folder: Path,
        progress: bool = False,
    ) -> None:
        """vocabulary and context: the model's, in tokens. folder: for sync=disk, unless the configuration names one.
        Raises ValueError when no server answers."""
        key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else None
        if config.api_key_env and not key:
            raise ValueError(
                f"sampler.api_key_env={config.api_key_env}: that environment variable is not set"
            )
        urls = [url.strip().rstrip("/") for url in config.urls.split(",") if url.strip()]
        if not urls:
            raise ValueError(f"sampler.urls={config.urls!r}: there is no address in it")
        self.config, self.progress, self.version = config, progress, 0
        self.fleet = Fleet(
            [SglangServer(url, api_key=key) for url in dict.fromkeys(urls)], retries=config.retries
        )
        self.stops, self.vocabulary, self.context = tuple(stop_token_ids), vocabulary, context
        self._started_with: set[str] | None = (
            set()
        )  # models of the servers; None once an update has succeeded
        for info in on_each(self.fleet.servers, SglangServer.info):
            if isinstance(info, ServerError):
                self.fleet.leave_out(info)
                continue
            self._started_with.add(str(info.get("model_path")))
            if info.get("context_length"):
                self.context = min(info["context_length"], self.context or math.inf)
            if config.sync != "disk" and int(info.get("dp_size", 1)) > 1:
                raise ValueError(
                    f"sampler.sync={config.sync}: only disk can update servers with dp_size over 1"
                )
        if not self.fleet.alive():
            raise ValueError(f"sampler.urls: {self.fleet.obituary()}")
        if (
            config.sync_folder
        ):  # others may use it too: what we write and remove lies in a folder of our own
            folder = (
                Path(config.sync_folder)
                / f"verippo-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
            )
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
        stop = threading.Event()
        pool = ThreadPoolExecutor(
            min(self.config.concurrency, len(prompts)), thread_name_prefix="rollout"
        )
        try:
            futures = {
                pool.submit(self._complete, prompts[i], params, stop): i for i in longest_first
            }
            done = {futures[future]: future.result() for future in self._watched(futures)}
            return [done[i] for i in range(len(prompts))]
        finally:  # after an error or an interrupt nothing of ours may go on running on the servers
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            on_each(self.fleet.servers, SglangServer.abort)
            pool.shutdown()

    def _watched(self, futures: dict[Future[Completion], int]) -> Iterator[Future[Completion]]:
        start, tokens = time.perf_counter(), 0
        with tqdm(
            total=len(futures),
            desc="rollout",
            unit="response",
            leave=False,
            disable=not self.progress,
        ) as bar:
            for future in as_completed(futures):
                yield future
                tokens += len(future.result().token_ids)
                bar.set_postfix_str(
                    f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False
                )
                bar.update()

    def _complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: threading.Event,
    ) -> Completion:
        """Asks one server after another until one answers well."""
        tokens, pause, failures = len(prompt.token_ids) + params.max_new_tokens, 0.0, 0
        while not stop.wait(pause):
            rid = (
                uuid.uuid4().hex
            )  # of one length: aborting a request aborts those it is a prefix of
            request = generate_request(
                prompt.token_ids, params, seed=prompt.seed, stop_token_ids=self.stops, rid=rid
            )
            with self.fleet.lend(tokens) as server:
                started = time.monotonic()
                try:
                    answer = server.ask(request, timeout_seconds=self.config.timeout_seconds)
                    completion = read_completion(
                        answer,
                        params,
                        url=server.url,
                        stop_token_ids=self.stops,
                        version=self.version,
                    )
                    self.fleet.praise(server)
                    return completion
                except ServerError as error:
                    if error.kind == "refused" or stop.is_set():
                        raise
                    pause, failures = self.fleet.blame(server, error, started), failures + 1
                    if failures > (self.config.retries + 1) * len(
                        self.fleet.servers
                    ):  # others succeed: this one never will
                        raise
        raise RuntimeError("the rollout was given up")

    # --- weights ---

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends the weights to every server that answers, waking those asleep, and reads their version back.

        Every rank iterates all tensors; rank 0 sends. Raises RuntimeError on every rank alike when a server fails.
        """
        failed = {url for urls in dist.all_gather(list(self.fleet.failures)) for url in urls}
        tensors = iter(named_tensors)
        what = f"weight version {version} was not sent ({self.config.sync}): "
        try:
            self.fleet.start_again(
                _by_main(lambda: self._send(tensors, version, failed), meanwhile=tensors, what=what)
            )
        except RuntimeError as error:
            if not self._started_with:
                raise
            models = ", ".join(sorted(self._started_with))
            raise RuntimeError(
                f"{error} (is the policy of another shape than what they were started with, {models}?)"
            ) from None
        self.version, self._started_with = version, None

    def _send(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        version: int,
        failed: set[str],
    ) -> dict[str, str]:
        """Returns the servers that failed, each with the reason."""
        self.fleet.start_again({})
        held = self.fleet.ask(lambda server: self._make_ready(server, failed))
        if failed or self.fleet.failures or not {*held.values()} <= {ASLEEP, str(self.version)}:
            self.sync.close(self.fleet)  # others than before, or one that was started again since
        self.sync.push(self.fleet, tensors, str(version))
        self.fleet.ask(lambda server: self._settle(server, str(version)))
        return self.fleet.failures

    def _make_ready(self, server: SglangServer, failed: set[str]) -> str:
        """Wakes the server if it is asleep; one that failed before must answer a request again. Returns its version."""
        if (version := server.version()) == ASLEEP:
            server.ask(RESUME, timeout_seconds=self.config.timeout_seconds)
            server.ask(
                version_request("awake"), timeout_seconds=PROBE_SECONDS
            )  # whoever comes if we fail must not resume again
        elif server.url in failed:
            server.ask(score_request([0, 0]), timeout_seconds=PROBE_SECONDS)
            self._flush(server)  # waits for requests that were given up on to end
        return version

    def _settle(self, server: SglangServer, version: str) -> None:
        self._flush(server)
        if (held := server.version()) != version:
            raise RuntimeError(
                f"{server.url}: holds weight version {held} after the update to {version}"
            )

    def _flush(self, server: SglangServer) -> None:
        timeout = self.config.timeout_seconds
        server.ask(flush_request(timeout), timeout_seconds=timeout + PROBE_SECONDS)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Address -> for each sequence, the server's log-probs of its tokens from the second on (temperature 1, nats).

        Every server in use is asked. Call on every rank: rank 0 asks, all get the answer, or the RuntimeError.
        """
        return _by_main(
            lambda: self.fleet.ask(lambda server: [self._score(server, ids) for ids in sequences])
        )

    def _score(self, server: SglangServer, ids: Sequence[int]) -> list[float]:
        answer = server.ask(
            score_request(ids), timeout_seconds=self.config.timeout_seconds, retries=2
        )
        return read_scores(answer, ids, url=server.url, version=self.version)

    def sleep(self) -> None:
        """The servers give their memory back until the next weight update. Call on every rank, none of them generating."""
        _by_main(lambda: self.fleet.ask(self._release))

    def _release(self, server: SglangServer) -> None:
        self._flush(server)  # refused while anything runs
        server.ask(RELEASE, timeout_seconds=self.config.timeout_seconds)
        server.ask(version_request(ASLEEP), timeout_seconds=PROBE_SECONDS)

    def close(self) -> None:
        """Leaves the servers' process group and removes what was written for them. Never raises for a dead server."""
        if dist.is_main():
            self.sync.close(self.fleet)


def _by_main(work: Callable[[], T], *, meanwhile: Iterable[object] = (), what: str = "") -> T:
    """What `work` gives on rank 0, on every rank. Its failure is raised everywhere as RuntimeError, `what` before it.
    meanwhile: is iterated to its end, by rank 0 after its work."""
    found: T | None = None
    failure = None
    if dist.is_main():
        try:
            found = work()
        except (RuntimeError, ValueError, OSError) as error:
            failure = f"{what}{error}"
    for _ in meanwhile:
        pass
    failure, found = dist.broadcast((failure, found))
    if failure is not None:
        raise RuntimeError(failure)
    return found  # type: ignore[return-value]


def _weight_sync(config: SglangConfig, folder: Path) -> WeightSync:
    bucket_bytes, timeout = config.bucket_mib * 2**20, config.timeout_seconds
    if config.sync == "disk":
        folder = folder.expanduser().resolve()
        try:
            if dist.is_main():
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"sampler.sync_folder: no folder can be made at {folder}: {error.strerror}"
            ) from None
        return DiskSync(folder, bucket_bytes, timeout)
    if config.sync == "tensor":
        return TensorSync(bucket_bytes, timeout)
    return DistributedSync(config.master_address, config.master_port, bucket_bytes, timeout)
