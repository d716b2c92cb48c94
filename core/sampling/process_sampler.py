"""Sampling in a process of its own, so that the training process can train meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..training import stopping
from .local_sampler import load_sampler
from .sampler import Completion, Prompt, SamplingParams
from .weight_sync import buckets

# A signal to the whole process group must not end the child: its parent may still need an answer.
COMMAND = f"""
import signal, sys
for number in {[int(number) for number in stopping.SIGNALS]}:
    signal.signal(number, signal.SIG_IGN)
from {__name__} import serve
serve(int(sys.argv[1]))
"""
BUCKET_BYTES = 512 * 2**20
"""Size of the pieces in which weights travel."""


class Settings(NamedTuple):
    """What the child loads, and how it runs."""

    path: str
    dtype: str
    device: str
    stop_token_ids: tuple[int, ...]
    max_batch: int
    num_threads: int


class Generate(NamedTuple):
    """Request for completions."""

    prompts: Sequence[Prompt]
    params: SamplingParams


class Update(NamedTuple):
    """Announces weights: safetensors in pieces follow, then an empty one."""

    version: int


class Failure(NamedTuple):
    """Answer of a child that failed."""

    message: str
    is_mistake: bool
    """Whether it was a ValueError, whose message is for the user."""


class ProcessSampler:
    """A `LocalSampler` in a child process of this rank.

    Calls wait for the child's answer without occupying the interpreter: from a thread, `generate`
    runs beside training. The child ends with this process, however that ends.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str,
        device: torch.device,
        stop_token_ids: Sequence[int],
        max_batch: int,
    ) -> None:
        """Starts the child, which loads the model while this process goes on.

        Args:
            path: folder or hub id of a causal language model.
            dtype: data type of its weights, "fp32" or "bf16".
            device: where the child samples.
            stop_token_ids: ids that end a response.
            max_batch: responses decoded at once.
        """
        self._lock = threading.Lock()
        self._connection, other_end = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(other_end.fileno())],
            stdin=subprocess.PIPE,  # which closes when this process ends, even by SIGKILL
            pass_fds=[other_end.fileno()],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        other_end.close()
        self._connection.send(
            Settings(
                path=path,
                dtype=dtype,
                device=str(device),
                stop_token_ids=tuple(stop_token_ids),
                max_batch=max_batch,
                num_threads=torch.get_num_threads(),
            )
        )

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in order.

        Raises:
            ValueError: a prompt is empty, has an id outside the vocabulary, or together with
                `max_new_tokens` exceeds the model's context.
            RuntimeError: the child failed or ended.
        """
        return self._ask(Generate(prompts, params))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends the weights to the child.

        Raises:
            ValueError: a parameter is missing, unknown or of another shape.
            RuntimeError: the child failed or ended.
        """
        self._ask(Update(version), _packed(named_tensors))

    def _ask(self, request: Generate | Update, pieces: Iterable[bytes] = ()) -> Any:
        with self._lock:
            try:
                answer = self._exchange(request, pieces)
            except BaseException:  # the child's answer would be taken for that to the next request
                self.interrupt()
                raise
        if isinstance(answer, Failure) and answer.is_mistake:
            raise ValueError(answer.message)
        if isinstance(answer, Failure):
            raise RuntimeError(f"the sampling process failed:\n{answer.message}")
        return answer

    def _exchange(self, request: Generate | Update, pieces: Iterable[bytes]) -> Any:
        try:
            self._connection.send(request)
            for piece in pieces:
                self._connection.send_bytes(piece)
        except (BrokenPipeError, ConnectionResetError):  # the child has ended, its answer says why
            pass
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            how = f"exit status {status}"
            if status < 0:
                how = f"{signal.Signals(-status).name}: unless somebody sent it, memory ran out"
            raise RuntimeError(f"the sampling process was ended by {how}") from None

    def interrupt(self) -> None:
        """Ends the child; a call that waits in another thread raises RuntimeError."""
        self._process.kill()

    def close(self) -> None:
        """Ends the child; no other thread may be waiting for it."""
        self.interrupt()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._connection.close()


def _packed(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes]:
    for bucket in buckets(named_tensors, BUCKET_BYTES):
        yield safetensors.torch.save({name: tensor.cpu() for name, tensor in bucket})
    yield b""


def serve(descriptor: int) -> None:
    """Samples for the parent process until it ends: what the child runs.

    Args:
        descriptor: file descriptor of the connection to the parent.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    try:
        settings = connection.recv()
        torch.set_num_threads(settings.num_threads)
        device = torch.device(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        sampler = load_sampler(
            settings.path,
            dtype=settings.dtype,
            device=device,
            stop_token_ids=settings.stop_token_ids,
            max_batch=settings.max_batch,
        )
    except Exception as error:
        connection.send(_failure(error))
        return
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent has ended
            return
        pieces = _received(connection) if isinstance(request, Update) else iter(())
        answer: Any = None
        try:
            if isinstance(request, Update):
                sampler.update_weights(pieces, request.version)
            else:
                answer = sampler.generate(request.prompts, request.params)
        except Exception as error:
            answer = _failure(error)
            for _ in pieces:  # those that were not read
                pass
        connection.send(answer)


def _received(connection: Connection) -> Iterator[tuple[str, Tensor]]:
    while piece := connection.recv_bytes():
        yield from safetensors.torch.load(piece).items()


def _failure(error: Exception) -> Failure:
    if isinstance(error, ValueError):
        return Failure(str(error), is_mistake=True)
    return Failure(traceback.format_exc(), is_mistake=False)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)
