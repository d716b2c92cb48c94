"""Process groups, collectives and the end of all ranks when one fails.

No other module calls torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as td
from torch import Tensor

from .stopping import AgreedStop, Stopped
from .watchdog import Failure, Watchdog, waiting

T = TypeVar("T")
WATCHED_SHARE = 0.8
"""Share of the time-out after which a silent rank ends the run: before a collective gives up."""
_silence_seconds = 60.0


def init(*, timeout_seconds: float = 600.0, heartbeat_seconds: float = 60.0) -> None:
    """Joins the process group described by the environment of deepspeed, torchrun or srun.

    Without such an environment the process is the only rank. The backend is NCCL on CUDA, gloo
    otherwise. Does nothing if a group exists already.

    Args:
        timeout_seconds: a collective that waits longer ends the run.
        heartbeat_seconds: a rank that gives no sign of life for longer ends the run; at most 0.8 of
            `timeout_seconds` counts.

    Raises:
        ValueError: the environment is incomplete, or the ranks do not meet in time.
    """
    global _silence_seconds
    _silence_seconds = min(heartbeat_seconds, WATCHED_SHARE * timeout_seconds)
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
    try:
        td.init_process_group(_backend(), timeout=timeout)
    except td.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"rank {os.environ['RANK']}: not all {os.environ['WORLD_SIZE']} ranks met at {place} "
            f"within timeout_seconds={timeout_seconds:g}: start all of them, and check that each "
            f"host reaches that address ({str(error)[:200]})"
        ) from None
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
        with waiting():
            td.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place, on the tensor's own device."""
    if world_size() > 1:
        with waiting():
            td.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place, on the tensor's own device."""
    if world_size() > 1:
        with waiting():
            td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with waiting():
        td.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with waiting():
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
    """Ends all ranks when one fails, is stopped or cannot be reached, naming that rank.

    After an error this takes seconds, without a sign of life the `heartbeat_seconds` given to
    `init`. Otherwise the others would wait in a collective. Enter it after `init`, on every rank.
    """
    if world_size() == 1:
        yield
        return
    watchdog = Watchdog(
        _connect_to_store(),
        rank=rank(),
        hosts=all_gather(_host()),
        limit_seconds=_silence_seconds,
        poll_seconds=min(poll_seconds, _silence_seconds / 10),
    )
    watchdog.start()
    try:
        yield
        barrier()
    except AgreedStop:  # raised by every rank
        barrier()
        raise
    except BaseException as error:
        if torch.cuda.is_available():  # NCCL might wait for ranks that are in another collective
            atexit.unregister(_leave)
        if isinstance(error, Exception) and _is_collective_error(error):
            watchdog.end_after(error)
        if isinstance(error, Stopped):
            failure = Failure(f"rank {rank()}: {error}", error.exit_status)
        else:
            failure = Failure(f"rank {rank()}: {type(error).__name__}: {error}")
        watchdog.done.set()
        if not watchdog.publish(failure):
            watchdog.end_cut_off(error)
        raise
    finally:
        watchdog.stop()


def _connect_to_store() -> td.TCPStore:
    """A connection of its own to the store, which the system ends when the store's host is lost."""
    port = int(os.environ["MASTER_PORT"])
    store = td.TCPStore(
        os.environ["MASTER_ADDR"],
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=_silence_seconds),
    )
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_USER_TIMEOUT": 1000 * _silence_seconds}
    with contextlib.suppress(psutil.Error, OSError, AttributeError):  # not on every system
        for connection in psutil.Process().net_connections("tcp"):
            if connection.raddr and connection.raddr.port == port:
                with socket.socket(fileno=os.dup(connection.fd)) as tcp:
                    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for name, value in options.items():
                        tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))
    return store


def _host() -> str:
    """Name of this host and, if they can be found out, its address in the network of the ranks."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = f"host {socket.gethostname()}"
    with contextlib.suppress(OSError):
        family = socket.getaddrinfo(*place)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect(place)
            return f"{name}, {probe.getsockname()[0]}"
    return name


def _is_collective_error(error: Exception) -> bool:
    return isinstance(error, td.DistError) or "gloo" in str(error).lower()
