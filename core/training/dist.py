"""Process groups, collectives and the end of all ranks when one fails.

No other module calls torch.distributed."""

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

from ..messages import printable

T = TypeVar("T")
_FAILED = "verippo/failed"


def init(*, timeout_seconds: float = 1800.0) -> None:
    """Joins the process group described by the environment of deepspeed, torchrun or srun.

    Without such an environment the process is the only rank. The backend is NCCL on CUDA, gloo
    otherwise. Does nothing if a group exists already.

    Args:
        timeout_seconds: a collective that waits longer ends the run.

    Raises:
        ValueError: the environment is incomplete.
    """
    if td.is_initialized():
        return
    _adopt_slurm_environment()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    # a child of a single process inherits its variables, and must not look for its port
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
        )
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        store = td.HashStore()
        td.init_process_group(
            _backend(),
            store=store,
            rank=0,
            world_size=1,
            timeout=timeout,
        )
        return
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise ValueError(
            f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    td.init_process_group(_backend(), timeout=timeout)
    atexit.register(_leave)


def _leave() -> None:
    """Leaves the group; otherwise gloo's threads would abort the process at its end."""
    if td.is_initialized():
        td.destroy_process_group()


def _backend() -> str:
    # gloo beside NCCL: small Python objects travel without the GPU
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _adopt_slurm_environment() -> None:
    num_tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or num_tasks == 1:
        return
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=os.environ["SLURM_NTASKS"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
    )


def rank() -> int:
    """Number of this process in the group."""
    return td.get_rank() if td.is_initialized() else 0


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes in the group."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank's tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Waits for all ranks."""
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


class OuterGroup:
    """A process group of this process, as rank 0, with processes outside the run.

    The others join by address and port, as in torch's examples of custom groups, with the same
    name, backend ("nccl" or "gloo") and world size.
    """

    def __init__(
        self,
        *,
        address: str,
        port: int,
        world_size: int,
        name: str,
        timeout_seconds: float,
    ) -> None:
        """Opens the store that the others connect to; port 0 takes a free one."""
        self.timeout = datetime.timedelta(seconds=timeout_seconds)
        self.store = td.TCPStore(
            address,
            port,
            world_size,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
        )
        self.address = address
        self.port = self.store.port
        self.world_size = world_size
        self.name = name
        self.backend = "nccl" if torch.cuda.is_available() else "gloo"
        self.group: Any = None

    def join(self) -> None:
        """Waits until all have joined.

        Raises:
            RuntimeError: a process did not join within the time-out.
        """
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
        """Broadcasts tensors one after another and waits until they are sent."""
        options: dict[str, Any] = {"src": 0, "group": self.group, "async_op": True}
        for work in [td.broadcast(tensor, **options) for tensor in tensors]:
            if work is not None:
                work.wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def leave(self) -> None:
        """Leaves the group, if it was joined."""
        if self.group is not None:
            td.destroy_process_group(self.group)


@contextlib.contextmanager
def fail_together(*, poll_seconds: float = 1.0) -> Iterator[None]:
    """Ends all ranks within seconds when one raises, naming that rank and its error.

    Otherwise the others would wait in a collective until its time-out. Enter it after `init`, on
    every rank.
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
    watcher = threading.Thread(
        target=_watch,
        args=(store, done, poll_seconds),
        daemon=True,
    )
    watcher.start()
    try:
        yield
        barrier()
    except BaseException as error:
        done.set()
        if torch.cuda.is_available():  # NCCL might wait for ranks that are in another collective
            atexit.unregister(_leave)
        with contextlib.suppress(Exception):
            if store.compare_set(_FAILED, "", f"rank {rank()}: {type(error).__name__}: {error}"):
                time.sleep(2 * poll_seconds)  # rank 0 serves the store: let the others read it
        raise
    finally:
        done.set()
        # a daemon thread inside a C++ call would abort the process at its end
        watcher.join(timeout=30)


def _watch(store: td.Store, done: threading.Event, poll_seconds: float) -> None:
    while not done.wait(poll_seconds):
        try:
            failed = store.check([_FAILED])
            reason = store.get(_FAILED).decode() if failed else ""
        except Exception as error:
            failed = True
            reason = f"rank 0 is gone ({type(error).__name__})"
        # this rank may be about to raise the same error itself
        if failed and not done.wait(poll_seconds):
            print(f"verippo: rank {rank()} stops: {printable(reason)}", file=sys.stderr, flush=True)
            os._exit(1)
