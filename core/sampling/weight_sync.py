"""Three ways for weights to reach sglang servers. Rank 0 alone runs this; it never holds more than a bucket of them."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing import reductions

from ..training import dist
from .sglang_client import PROBE_SECONDS, ServerError, SglangServer
from .sglang_fleet import Fleet, on_each
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

Bucket = list[tuple[str, Tensor]]


class WeightSync(Protocol):
    """One way of sending weights."""

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        """Every server in use holds the tensors afterwards, under this version; those that failed are left out. Raises
        ServerError when one refuses them, or when its failure leaves the others without."""
        ...

    def close(self, fleet: Fleet) -> None:
        """Leaves nothing behind. A push may follow, and must not come without it where other servers are in use than before."""
        ...


def buckets(named_tensors: Iterable[tuple[str, Tensor]], num_bytes: int) -> Iterator[Bucket]:
    """Copies of the tensors in portions of at most `num_bytes`, a larger tensor by itself: the originals of a sharded
    engine last only until the next one is asked for."""
    bucket: Bucket = []
    size = 0
    for name, tensor in named_tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach().clone(memory_format=torch.contiguous_format)))
        size += tensor.nbytes
    if bucket:
        yield bucket


@dataclass
class DiskSync:
    """A folder of safetensors files that the servers can read too, a new one for each version."""

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
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed
        target.mkdir(parents=True)
        places: dict[str, str] = {}
        for number, bucket in enumerate(buckets(named_tensors, self.bucket_bytes)):
            file = f"model-{number:05d}.safetensors"
            save_file({name: tensor.cpu() for name, tensor in bucket}, target / file)
            places |= {name: file for name, _ in bucket}
        (target / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places})
        )
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
    """Broadcasts from rank 0 in a process group with every tensor-parallel rank of every server."""

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
            self.group = self._joined(fleet)
        servers = fleet.alive()
        fleet.ask_all(functools.partial(begin_update, timeout_seconds=self.timeout_seconds))
        for bucket in buckets(named_tensors, self.bucket_bytes):
            request = broadcast_request(
                [(name, _dtype(tensor), tensor.shape) for name, tensor in bucket], version
            )
            send = functools.partial(self.group.send, [tensor for _, tensor in bucket])
            self._together(servers, [request] * len(servers), send)
        fleet.ask_all(functools.partial(end_update, timeout_seconds=self.timeout_seconds))

    def _joined(self, fleet: Fleet) -> dist.OuterGroup:
        servers, sizes = fleet.alive(), fleet.ask_all(_tensor_parallel)
        group = dist.OuterGroup(
            address=self.address or _own_address(servers[0]),
            port=self.port,
            world_size=1 + sum(sizes),
            name=GROUP,
            timeout_seconds=self.timeout_seconds,
        )
        join = functools.partial(
            join_request,
            address=group.address,
            port=group.port,
            world_size=group.world_size,
            backend=group.backend,
        )
        firsts = itertools.accumulate(sizes[:-1], initial=1)
        self._together(servers, [join(rank_offset=first) for first in firsts], group.join)
        return group

    def _together(
        self,
        servers: Sequence[SglangServer],
        requests: Sequence[Request],
        own_part: Callable[[], None],
    ) -> None:
        """Sends each server its request, which it answers once all have done their part, and does ours. The first failure
        ends it, at once: those who wait for a server that refused would wait for the whole time-out."""
        pool = ThreadPoolExecutor(len(servers))
        answers = [
            pool.submit(server.ask, request, timeout_seconds=self.timeout_seconds)
            for server, request in zip(servers, requests, strict=True)
        ]
        ours: Future[None] = Future()
        threading.Thread(target=_fulfil, args=(ours, own_part), daemon=True).start()
        try:
            done = wait([*answers, ours], return_when=FIRST_EXCEPTION).done
            if (
                ours in done and ours.exception()
            ):  # mostly because a server left: then its own error says more
                done = wait(answers, timeout=2, return_when=FIRST_EXCEPTION).done | {ours}
            for part in sorted(done, key=lambda part: part is ours):
                part.result()
        except BaseException:
            self.group = None  # whoever is still in it, it is of no use
            for server in servers:
                server.cut()
            raise
        finally:
            pool.shutdown(wait=False)

    def close(self, fleet: Fleet) -> None:
        """Also ends what an earlier run left behind: a server refuses a second group of the same name."""
        on_each(fleet.alive(), lambda server: server.ask(LEAVE, timeout_seconds=PROBE_SECONDS))
        if self.group is not None:
            self.group.leave()
        self.group = None


@dataclass
class TensorSync:
    """Hands tensors over on the same machine: GPU memory by handle, host memory by value."""

    bucket_bytes: int
    timeout_seconds: float

    def push(
        self,
        fleet: Fleet,
        named_tensors: Iterable[tuple[str, Tensor]],
        version: str,
    ) -> None:
        sizes = fleet.ask(_tensor_parallel)
        fleet.ask(functools.partial(begin_update, timeout_seconds=self.timeout_seconds))
        for bucket in buckets(named_tensors, self.bucket_bytes):
            pickled = base64.b64encode(pickle_tensors(bucket)).decode()
            fleet.ask(
                functools.partial(self._hand_over, pickled=pickled, version=version, sizes=sizes)
            )
        fleet.ask(functools.partial(end_update, timeout_seconds=self.timeout_seconds))

    def _hand_over(
        self,
        server: SglangServer,
        *,
        pickled: str,
        version: str,
        sizes: dict[str, int],
    ) -> None:
        server.ask(
            tensor_request(pickled, version, tp=sizes[server.url]),
            timeout_seconds=self.timeout_seconds,
        )

    def close(self, fleet: Fleet) -> None:
        pass


def pickle_tensors(bucket: Bucket) -> bytes:
    """(name, tensor) pairs as sglang's restricted unpickler takes them. Tensors on the host go by value: a handle to shared
    memory with torch's default strategy ends the server. Those on a GPU go by handle, the GPU named by its UUID, since the
    server may number the GPUs otherwise; keep them until the server has answered."""
    buffer = io.BytesIO()
    if bucket[0][1].is_cuda:
        pickler = ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = {**pickler.dispatch_table, Tensor: _handle}  # type: ignore[attr-defined]
        pickler.dump(bucket)
    else:
        pickle.dump(bucket, buffer)
    return buffer.getvalue()


def _handle(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    reduced: Any = reductions.reduce_tensor(tensor)
    rebuild, arguments = reduced
    device = 6  # which argument of rebuild_cuda_tensor numbers the GPU
    assert arguments[device] == tensor.device.index
    uuid = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return rebuild, (*arguments[:device], uuid, *arguments[device + 1 :])


def begin_update(server: SglangServer, *, timeout_seconds: float) -> None:
    """Opens a weight update. One that a killed run left open is closed first."""
    try:
        _ask_if_known(server, BEGIN, timeout_seconds)
    except ServerError as error:
        if error.status != 400:
            raise
        end_update(server, timeout_seconds=timeout_seconds)
        _ask_if_known(server, BEGIN, timeout_seconds)


def end_update(server: SglangServer, *, timeout_seconds: float) -> None:
    """Closes it."""
    _ask_if_known(server, END, timeout_seconds)


def _ask_if_known(server: SglangServer, request: Request, timeout_seconds: float) -> None:
    """Servers older than 0.5.21 know no such thing, and need none."""
    try:
        server.ask(request, timeout_seconds=timeout_seconds)
    except ServerError as error:
        if error.status != 404:
            raise


def _fulfil(promise: Future[None], work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as error:
        promise.set_exception(error)
    else:
        promise.set_result(None)


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
