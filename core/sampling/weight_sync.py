"""Sends weights to sglang servers from rank 0, holding no more than two buckets at a time.

There are three ways: through a shared folder, a process group, or the requests themselves.
"""

from __future__ import annotations

import base64
import io
import itertools
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from ..training import dist
from ..training.checkpoint import follow_umask
from ..training.shard_files import Bucket, buckets, write_index, write_shards
from .sglang_client import ServerError, SglangServer
from .sglang_fleet import Fleet, call_each
from .sglang_requests import (
    BEGIN,
    END,
    GROUP,
    LEAVE,
    Request,
    broadcast_request,
    disk_request,
    join_request,
    tensor_request,
)


class WeightSync(Protocol):
    """A way of sending weights to servers. It runs on rank 0."""

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        """Sends weights to every server in use; servers that fail may be excluded.

        Args:
            fleet: the servers.
            named_tensors: Hugging Face names with full tensors.
            version: weight version that the servers report afterwards.

        Raises:
            ServerError: a server refused the weights, or the others cannot go on without one.
        """
        ...

    def close(self, fleet: Fleet) -> None:
        """Removes what was set up for the servers.

        It must be called before a push to other servers than those of the last push.

        Args:
            fleet: the servers.
        """
        ...


@dataclass
class DiskSync:
    """Saves safetensors files in a folder that the servers can read, a new one for each version."""

    folder: Path
    bucket_bytes: int
    timeout_seconds: float

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        target = self.folder / f"weights-{version}"
        shutil.rmtree(target, ignore_errors=True)  # left by a killed run
        target.mkdir(parents=True)
        write_index(target, write_shards(target, named_tensors, self.bucket_bytes))
        follow_umask(target)  # the servers may run as another user
        request = disk_request(str(target), version)
        fleet.ask(
            lambda server: server.ask(request, timeout_seconds=self.timeout_seconds, retries=2)
        )
        for old in self.folder.glob("weights-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def close(self, fleet: Fleet) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class DistributedSync:
    """Broadcasts in a process group of rank 0 and every tensor-parallel rank of every server."""

    address: str | None
    port: int
    bucket_bytes: int
    timeout_seconds: float
    group: dist.OuterGroup | None = None

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        if self.group is None:
            self.close(fleet)
            self.group = self._create_group(fleet)
        servers = fleet.available()
        fleet.ask_all(partial(begin_update, timeout_seconds=self.timeout_seconds))
        for bucket in buckets(named_tensors, self.bucket_bytes):
            request = broadcast_request(
                [(name, _dtype(tensor), tensor.shape) for name, tensor in bucket], version
            )
            send = partial(self.group.send, [tensor for _, tensor in bucket])
            self._run_with_servers(servers, [request] * len(servers), send)
        fleet.ask_all(partial(end_update, timeout_seconds=self.timeout_seconds))

    def _create_group(self, fleet: Fleet) -> dist.OuterGroup:
        servers = fleet.available()
        sizes = fleet.ask_all(_tensor_parallel)
        group = dist.OuterGroup(
            address=self.address or _own_address(servers[0]),
            port=self.port,
            world_size=1 + sum(sizes),
            name=GROUP,
            timeout_seconds=self.timeout_seconds,
        )
        requests = [
            join_request(
                address=group.address,
                port=group.port,
                rank_offset=rank_offset,
                world_size=group.world_size,
                backend=group.backend,
            )
            for rank_offset in itertools.accumulate(sizes[:-1], initial=1)
        ]
        self._run_with_servers(servers, requests, group.join)
        return group

    def _run_with_servers(
        self,
        servers: Sequence[SglangServer],
        requests: Sequence[Request],
        work: Callable[[], None],
    ) -> None:
        """Runs a collective operation: sends each server its request, and does rank 0's part.

        No server answers before all have taken part. The first failure ends the operation at once:
        the others would wait for the failed server until their timeout.
        """
        pool = ThreadPoolExecutor(len(servers))
        answers = [
            pool.submit(server.ask, request, timeout_seconds=self.timeout_seconds)
            for server, request in zip(servers, requests, strict=True)
        ]
        own: Future[None] = Future()
        # a daemon thread: it may hang for long, which must not delay the end of the process
        threading.Thread(target=_run, args=(own, work), daemon=True).start()
        try:
            done = wait([*answers, own], return_when=FIRST_EXCEPTION).done
            # a failure here is mostly due to a server, whose own error says more
            if own in done and own.exception():
                done = wait(answers, timeout=2, return_when=FIRST_EXCEPTION).done | {own}
            for part in sorted(done, key=lambda part: part is own):
                part.result()
        except BaseException:
            self.group = None  # unusable, even if some are still in it
            for server in servers:
                server.cut()
            raise
        finally:
            pool.shutdown(wait=False)

    def close(self, fleet: Fleet) -> None:
        """Leaves the group, and one that an earlier run left open: names must be unique."""
        with suppress(RuntimeError):  # no server is left
            leave = partial(SglangServer.ask, request=LEAVE)
            call_each(fleet.available(), leave)
        if self.group is not None:
            self.group.leave()
        self.group = None


@dataclass
class TensorSync:
    """Sends tensors in requests to servers on this machine: GPU memory by handle, else by value."""

    bucket_bytes: int
    timeout_seconds: float

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        tp = fleet.ask(_tensor_parallel)
        fleet.ask(partial(begin_update, timeout_seconds=self.timeout_seconds))
        for bucket in buckets(named_tensors, self.bucket_bytes):
            pickled = base64.b64encode(pickle_tensors(bucket)).decode()
            requests = {url: tensor_request(pickled, version, tp=size) for url, size in tp.items()}
            fleet.ask(partial(self._send, requests=requests))
        fleet.ask(partial(end_update, timeout_seconds=self.timeout_seconds))

    def _send(self, server: SglangServer, *, requests: dict[str, Request]) -> None:
        server.ask(requests[server.url], timeout_seconds=self.timeout_seconds)

    def close(self, fleet: Fleet) -> None:
        pass


def pickle_tensors(bucket: Bucket) -> bytes:
    """Pickles tensors for sglang's restricted unpickler.

    Tensors on the host are pickled by value, since a handle to shared memory with torch's default
    strategy crashes the server. Tensors on a GPU are pickled by handle; the caller must keep them
    until the server has answered.

    Args:
        bucket: names and tensors.
    """
    buffer = io.BytesIO()
    if bucket[0][1].is_cuda:
        pickler = ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = {**pickler.dispatch_table, Tensor: _handle}  # type: ignore[attr-defined]
        pickler.dump(bucket)
    else:
        pickle.dump(bucket, buffer)
    return buffer.getvalue()


def _handle(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Handle of GPU memory, with the GPU's UUID: the server may number the GPUs differently."""
    reduced: Any = reductions.reduce_tensor(tensor)
    rebuild, arguments = reduced
    device = 6  # position of the GPU's number in the arguments of rebuild_cuda_tensor
    assert arguments[device] == tensor.device.index
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return rebuild, (*arguments[:device], uuid, *arguments[device + 1 :])


def begin_update(server: SglangServer, *, timeout_seconds: float) -> None:
    """Begins a weight update, after ending one that a killed run left open.

    Args:
        server: the server. Versions older than 0.5.21 lack the route, and do not need it.
        timeout_seconds: limit of the request.

    Raises:
        ServerError: the request failed.
    """
    try:
        _ask_if_known(server, BEGIN, timeout_seconds)
    except ServerError as error:
        if error.status != 400:
            raise
        end_update(server, timeout_seconds=timeout_seconds)
        _ask_if_known(server, BEGIN, timeout_seconds)


def end_update(server: SglangServer, *, timeout_seconds: float) -> None:
    """Ends a weight update; see `begin_update`."""
    _ask_if_known(server, END, timeout_seconds)


def _ask_if_known(server: SglangServer, request: Request, timeout_seconds: float) -> None:
    try:
        server.ask(request, timeout_seconds=timeout_seconds)
    except ServerError as error:
        if error.status != 404:
            raise


def _run(future: Future[None], work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_parallel(server: SglangServer) -> int:
    return int(server.info().get("tp_size", 1))


def _own_address(server: SglangServer) -> str:
    """Address of this machine in the network that connects it to the server."""
    port = 9  # any: connecting a datagram socket sends nothing
    family, kind, protocol, _, peer = socket.getaddrinfo(server.host, port, type=socket.SOCK_DGRAM)[
        0
    ]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(peer)
        return probe.getsockname()[0]
