"""The only torch.distributed calls: set-up, the few collectives the project needs, and failing together."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

T = TypeVar("T")
_FAILED = "verippo/failed"


def init(*, timeout_seconds: float = 1800.0) -> None:
    """Joins the process group that the launcher's environment describes (deepspeed, torchrun, srun); alone without one.

    NCCL on CUDA, gloo otherwise. A collective that waits longer than `timeout_seconds` ends the run. Does nothing when
    the group exists already. Raises ValueError for half an environment.
    """
    if td.is_initialized():
        return
    _adopt_slurm_environment()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # a child of a single process finds that one's variables, and must not look for its port
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }
        os.environ.update({name: str(value) for name, value in alone.items()})
        td.init_process_group(
            _backend(), store=td.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    td.init_process_group(_backend(), timeout=timeout)
    atexit.register(_leave)


def _leave() -> None:
    """gloo's threads that outlive python abort the process: a run that ended well would count as failed."""
    if td.is_initialized():
        td.destroy_process_group()


def _backend() -> str:
    # gloo beside NCCL: small Python objects and flags travel without touching the GPU
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _adopt_slurm_environment() -> None:
    if (
        "RANK" in os.environ
        or int(os.environ.get("SLURM_NTASKS", "1")) == 1
        or "SLURM_PROCID" not in os.environ
    ):
        return
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
    )


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def barrier() -> None:
    if world_size() > 1:
        td.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place, on the tensor's own device."""
    if world_size() > 1:
        td.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place, on the tensor's own device."""
    if world_size() > 1:
        td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    td.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of x over the mask of all ranks together, two passes in float64.

    x: [tokens] of this rank, mask: [tokens] bool. Raises ValueError with fewer than two masked tokens in all.
    """
    chosen = x[mask].double()
    total = all_sum(torch.stack([chosen.sum(), chosen.new_tensor(float(chosen.numel()))]))
    if total[1] < 2:
        raise ValueError(f"a variance needs at least 2 response tokens, got {int(total[1])}")
    mean = total[0] / total[1]
    squares = all_sum((chosen - mean).square().sum())
    return mean.to(x.dtype), (squares / (total[1] - 1)).to(x.dtype)


class OuterGroup:
    """A process group of this process, as rank 0, with processes outside the run, which join it by address and port.

    They join as torch's own examples of custom groups do: same name, backend ("nccl" or "gloo") and world size.
    """

    def __init__(
        self, *, address: str, port: int, world_size: int, name: str, timeout_seconds: float
    ) -> None:
        """Opens the meeting place; port 0 takes a free one. `join` then waits for the others."""
        self.timeout = datetime.timedelta(seconds=timeout_seconds)
        self.store = td.TCPStore(
            address, port, world_size, is_master=True, timeout=self.timeout, wait_for_workers=False
        )
        self.address, self.port, self.world_size, self.name = (
            address,
            self.store.port,
            world_size,
            name,
        )
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.group: Any = None

    def join(self) -> None:
        """Returns when all have joined. Raises RuntimeError when they have not within the time-out."""
        c10d: Any = td.distributed_c10d
        self.group, _ = c10d._new_process_group_helper(
            self.world_size,
            0,
            [],
            td.Backend(self.backend),
            td.PrefixStore(self.name, self.store),
            group_name=self.name,
            timeout=self.timeout,
        )
        c10d._world.pg_group_ranks[self.group] = {rank: rank for rank in range(self.world_size)}

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Broadcasts one after another; returns when they are sent."""
        for work in [
            td.broadcast(tensor, src=0, group=self.group, async_op=True) for tensor in tensors
        ]:
            work.wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def leave(self) -> None:
        if self.group is not None:
            td.destroy_process_group(self.group)


@contextlib.contextmanager
def fail_together(*, poll_seconds: float = 1.0) -> Iterator[None]:
    """Inside, a rank that raises ends all ranks within seconds, each naming the rank that failed and why.

    Without it the others wait in a collective until it times out. Enter after `init`, on every rank.
    """
    if world_size() == 1:
        yield
        return
    store = td.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, done, poll_seconds), daemon=True)
    watcher.start()
    try:
        yield
        barrier()
    except BaseException as error:
        done.set()
        if (
            torch.cuda.is_available()
        ):  # NCCL might wait there for ranks that are in another collective
            atexit.unregister(_leave)
        with contextlib.suppress(Exception):
            if store.compare_set(_FAILED, "", f"rank {rank()}: {type(error).__name__}: {error}"):
                time.sleep(
                    2 * poll_seconds
                )  # rank 0 serves the store: let the others read it first
        raise
    finally:
        done.set()
        watcher.join(
            timeout=30
        )  # python ends daemon threads inside a C++ call by aborting the process


def _watch(store: td.Store, done: threading.Event, poll_seconds: float) -> None:
    while not done.wait(poll_seconds):
        try:
            failed = store.check([_FAILED])
            reason = store.get(_FAILED).decode() if failed else ""
        except Exception as error:
            failed, reason = True, f"rank 0 is gone ({type(error).__name__})"
        if failed and not done.wait(
            poll_seconds
        ):  # this rank may be raising the same error: then it speaks itself
            print(f"verippo: rank {rank()} stops: {reason}", file=sys.stderr, flush=True)
            os._exit(1)
