"""Sampling over HTTP from one or more sglang servers, whose weights follow the trainer's."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
from .sglang_fleet import Fleet, call_each
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
    """sglang servers, and how weights are sent to them."""

    urls: str = ""
    """sglang: comma-separated addresses of the servers, such as http://127.0.0.1:30000."""
    api_key_env: str | None = None
    """sglang: environment variable that holds the servers' API key."""
    concurrency: CountingInt = 256
    """sglang: requests in flight from each rank, over all servers."""
    timeout_seconds: PositiveFloat = 900.0
    """sglang: time limit of a response or weight update, in seconds."""
    retries: NonNegativeInt = 2
    """sglang: consecutive failed requests after which a server is still used."""
    sync: Literal["disk", "distributed", "tensor"] = "disk"
    """sglang: how weights are sent: shared folder, NCCL (gloo on CPU), or shared memory."""
    sync_folder: str | None = None
    """disk: folder shared by trainer and servers; default: OUTPUT/sync."""
    master_address: str | None = None
    """distributed: address at which servers reach rank 0; default: detected."""
    master_port: PortInt = 0
    """distributed: port of rank 0; 0 takes a free one."""
    bucket_mib: CountingInt = 512
    """Size in MiB of the buckets in which weights are gathered and sent."""
    parity_tolerance: PositiveFloat | None = None
    """sglang: log-prob gap allowed after an update (nats); default: fp32 1e-4, bf16 0.5."""
    sleep: bool = False
    """sglang: servers release GPU memory during training (needs --enable-memory-saver)."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="sampler.")


class SglangSampler:
    """Samples from sglang servers that are already running.

    Every rank sends its own prompts; rank 0 alone sends weights. A server that fails is excluded
    until a weight update finds it working again; its unfinished prompts go to the others. The seed
    of a prompt is used only by servers started with --enable-deterministic-inference.
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
        """Args:
        config: servers and weight transfer.
        stop_token_ids: ids that end a response.
        vocabulary: number of token ids of the model.
        context: largest number of tokens of a sequence, if the model has a limit.
        folder: where weights are saved with sync=disk, unless `config.sync_folder` is set.
        progress: whether to show a progress bar.

        Raises:
            ValueError: no server answers, or the configuration is invalid.
        """
        self.config = config
        self.progress = progress
        self.version = 0
        self.interrupted = False
        self.stop_token_ids = tuple(stop_token_ids)
        self.vocabulary = vocabulary
        self.context = context
        self.fleet = Fleet(connect(config), retries=config.retries)
        self._initial_models: set[str] = set()  # emptied when an update has succeeded
        for result in call_each(self.fleet.servers, SglangServer.info).values():
            if isinstance(result, ServerError):
                self.fleet.exclude(result)
                continue
            self._initial_models.add(str(result.get("model_path")))
            if result.get("context_length"):
                self.context = min(result["context_length"], self.context or math.inf)
            if config.sync != "disk" and int(result.get("dp_size", 1)) > 1:
                raise ValueError(
                    f"sampler.sync={config.sync}: only disk can update servers with dp_size over 1"
                )
        try:
            self.fleet.available()
        except RuntimeError as error:
            raise ValueError(f"sampler.urls: {error}") from None
        self.sync = _weight_sync(config, folder)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in order.

        Args:
            prompts: prompts of this rank.
            params: sampling parameters.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary, or together with
                `max_new_tokens` exceeds the context.
            RuntimeError: no server is left, a server has other weights than those sent last, or a
                server refused a request.
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
            done = {futures[future]: future.result() for future in self._with_progress(futures)}
            return [done[i] for i in range(len(prompts))]
        finally:  # after an error or interrupt, nothing may continue to run on the servers
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            call_each(self.fleet.servers, SglangServer.abort)
            pool.shutdown()

    def _with_progress(
        self, futures: Collection[Future[Completion]]
    ) -> Iterator[Future[Completion]]:
        start = time.perf_counter()
        tokens = 0
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
                rate = tokens / (time.perf_counter() - start)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update()

    def _complete(
        self,
        prompt: Prompt,
        params: SamplingParams,
        stop: threading.Event,
    ) -> Completion:
        """Sends a prompt to one server after another until one answers, or until `stop` is set."""
        # a prompt that fails this often will never succeed, although others do
        max_failures = (self.config.retries + 1) * len(self.fleet.servers)
        num_failures = 0
        delay = 0.0
        while not (stop.wait(delay) or self.interrupted):
            request = generate_request(
                prompt.token_ids,
                params,
                seed=prompt.seed,
                stop_token_ids=self.stop_token_ids,
                # ids of equal length: an abort applies to all ids that begin with the one given
                rid=uuid.uuid4().hex,
            )
            with self.fleet.lend(len(prompt.token_ids) + params.max_new_tokens) as server:
                started = time.monotonic()
                try:
                    answer = server.ask(request, timeout_seconds=self.config.timeout_seconds)
                    completion = read_completion(
                        answer,
                        params,
                        url=server.url,
                        stop_token_ids=self.stop_token_ids,
                        version=self.version,
                    )
                except ServerError as error:
                    if error.kind == "refused" or stop.is_set() or self.interrupted:
                        raise
                    delay = self.fleet.record_failure(error, started)
                    num_failures += 1
                    if num_failures > max_failures:
                        raise
                else:
                    self.fleet.record_success(server)
                    return completion
        raise RuntimeError("the rollout was stopped")

    def interrupt(self) -> None:
        """Ends `generate` in another thread, for good: it raises RuntimeError."""
        self.interrupted = True
        call_each(self.fleet.servers, SglangServer.abort)

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends weights to every server that answers; servers that are asleep are woken.

        Every rank must call it and iterate all tensors; rank 0 sends them.

        Args:
            named_tensors: Hugging Face names with full tensors.
            version: version of these weights; every server must report it afterwards.

        Raises:
            RuntimeError: the update failed; raised on every rank.
        """
        failed = {url for urls in dist.all_gather(list(self.fleet.failures)) for url in urls}
        tensors = iter(named_tensors)
        try:
            failures = _on_main(lambda: self._send(tensors, version, failed), meanwhile=tensors)
        except RuntimeError as error:
            problem = f"weight version {version} was not sent ({self.config.sync}): {error}"
            if self._initial_models:
                models = ", ".join(sorted(self._initial_models))
                problem += f" (does the policy differ in shape from the servers' model, {models}?)"
            raise RuntimeError(problem) from error
        self.fleet.reset(failures)
        self.version = version
        self._initial_models = set()

    def _send(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        version: int,
        failed: set[str],
    ) -> dict[str, str]:
        """Sends weights from rank 0. Returns the servers that failed, with the reasons."""
        self.fleet.reset({})
        versions = self.fleet.ask(lambda server: self._prepare(server, failed))
        # other servers than before, or one that was restarted
        if failed or self.fleet.failures or not {*versions.values()} <= {ASLEEP, str(self.version)}:
            self.sync.close(self.fleet)
        self.sync.push(self.fleet, tensors, str(version))
        self.fleet.ask(lambda server: self._finish(server, str(version)))
        return self.fleet.failures

    def _prepare(self, server: SglangServer, failed: set[str]) -> str:
        """Wakes a server, or tests one that failed before. Returns its weight version."""
        version = server.version()
        if version == ASLEEP:
            server.ask(RESUME, timeout_seconds=self.config.timeout_seconds)
            # should this update fail, the next one must not resume the server again
            server.ask(version_request("awake"))
        elif server.url in failed:
            server.ask(score_request([0, 0]))
            self._flush(server)  # waits for the end of abandoned requests
        return version

    def _finish(self, server: SglangServer, version: str) -> None:
        self._flush(server)
        reported = server.version()
        if reported != version:
            raise RuntimeError(
                f"{server.url}: reports weight version {reported} after the update to {version}"
            )

    def _flush(self, server: SglangServer) -> None:
        timeout = self.config.timeout_seconds
        server.ask(flush_request(timeout), timeout_seconds=timeout + PROBE_SECONDS)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """Log-probs of given sequences on every server in use.

        Every rank must call it; rank 0 asks the servers, and all ranks receive the result.

        Args:
            sequences: token ids.

        Returns:
            Address -> for each sequence, the log-probs of its tokens from the second on, at
            temperature 1 (nats).

        Raises:
            RuntimeError: all servers failed, or one has other weights than those sent last.
        """
        return _on_main(
            lambda: self.fleet.ask(lambda server: [self._score(server, ids) for ids in sequences])
        )

    def _score(self, server: SglangServer, ids: Sequence[int]) -> list[float]:
        answer = server.ask(
            score_request(ids), timeout_seconds=self.config.timeout_seconds, retries=2
        )
        return read_scores(answer, ids, url=server.url, version=self.version)

    def sleep(self) -> None:
        """Lets the servers release their GPU memory until the next weight update.

        Every rank must call it, while none is generating.

        Raises:
            RuntimeError: a server refused; requests may be running.
        """
        _on_main(lambda: self.fleet.ask(self._release))

    def _release(self, server: SglangServer) -> None:
        self._flush(server)  # refused while a request is running
        server.ask(RELEASE, timeout_seconds=self.config.timeout_seconds)
        server.ask(version_request(ASLEEP))

    def close(self) -> None:
        """Leaves the servers' process group and removes saved weights. Ignores failed servers."""
        if dist.is_main():
            self.sync.close(self.fleet)


def connect(config: SglangConfig) -> list[SglangServer]:
    """Clients of the servers at `config.urls`; ValueError without an address or its API key."""
    key = None
    if config.api_key_env:
        key = os.environ.get(config.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"sampler.api_key_env={config.api_key_env}: that environment variable is not set"
            )
    urls = [url.strip().rstrip("/") for url in config.urls.split(",") if url.strip()]
    if not urls:
        raise ValueError(f"sampler.urls={config.urls!r}: there is no address in it")
    servers = [SglangServer(url, api_key=key) for url in urls]
    return [*{server.url: server for server in servers}.values()]


def _on_main(work: Callable[[], T], *, meanwhile: Iterable[object] = ()) -> T:
    """Calls a function on rank 0; all ranks return its result or raise its error.

    Args:
        work: function to call.
        meanwhile: iterated to its end on every rank, on rank 0 after `work`.

    Raises:
        RuntimeError: `work` failed.
    """
    result: T | None = None
    failure = None
    if dist.is_main():
        try:
            result = work()
        except (RuntimeError, ValueError, OSError) as error:
            failure = str(error)
    for _ in meanwhile:
        pass
    failure, result = dist.broadcast((failure, result))
    if failure is not None:
        raise RuntimeError(failure)
    return result  # type: ignore[return-value]


def _weight_sync(config: SglangConfig, folder: Path) -> WeightSync:
    bucket_bytes = config.bucket_mib * 2**20
    timeout = config.timeout_seconds
    if config.sync == "tensor":
        return TensorSync(bucket_bytes, timeout)
    if config.sync == "distributed":
        return DistributedSync(config.master_address, config.master_port, bucket_bytes, timeout)
    if config.sync_folder:  # other runs may use it too, so each has a subfolder
        run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        folder = Path(config.sync_folder) / f"verippo-{run_id}"
    folder = folder.expanduser().resolve()
    try:
        if dist.is_main():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"sampler.sync_folder: the folder {folder} cannot be created: {error.strerror}"
        ) from None
    return DiskSync(folder, bucket_bytes, timeout)
