"""An append-only record of finished items that survives a kill at any moment."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..files import check_regular

Value = TypeVar("Value")


def content_key(*parts: Any) -> str:
    """Hashes JSON values: equal content has an equal key, on any machine.

    Args:
        parts: anything that JSON can hold.

    Returns:
        The first 32 hexadecimal digits of the SHA-256 of the parts' canonical JSON.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Span(NamedTuple):
    """Position of a line in the file, in bytes."""

    offset: int
    length: int


def _key(line: bytes) -> str | None:
    """The key of a complete entry; None for anything else."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    key = entry.get("key") if isinstance(entry, dict) else None
    return key if isinstance(key, str) else None


class Journal:
    """A JSONL file of entries {"key", "value"} or {"key", "error"}.

    The last entry of a key counts. Entries are read from disk on demand; memory holds only their
    positions. The file is locked against other processes.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates the file and its folder, and removes an incomplete entry at its end.

        Args:
            path: the file.

        Raises:
            ValueError: another process has it open, it is no regular file, or a line before the
                last one is damaged.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path, name="journal")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # A thread that writes may outlive an interrupted event loop.
        self._lock = threading.Lock()
        self._spans: dict[str, _Span] = {}
        self._batch: list[tuple[str, bytes]] = []
        self._commit: asyncio.Task[None] | None = None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._read()
            os.ftruncate(self._file, self._end)
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise ValueError(
                    f"journal {path}: another process is writing it: wait for that run, or end it"
                ) from None
            raise

    def _read(self) -> int:
        """Finds the entries; returns the length of the file up to the last complete one."""
        end = 0
        offset = 0
        damaged_line = 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                span = _Span(offset, len(line))
                offset += len(line)
                key = _key(line)
                if key is None:
                    damaged_line = damaged_line or number
                    continue
                if damaged_line:
                    raise ValueError(
                        f"journal {self.path}: line {damaged_line} is not an entry: "
                        "delete the line; its item is then done again"
                    )
                self._spans[key] = span
                end = offset
        return end

    def __iter__(self) -> Iterator[str]:
        """Yields the key of every item."""
        return iter(self._spans)

    def get(self, key: str) -> Any | None:
        """The recorded value; None if there is none or the last entry is a failure."""
        return self._entry(key).get("value")

    def get_as(self, key: str, convert: Callable[[Any], Value]) -> Value | None:
        """The recorded value, converted; None if there is none or the last entry is a failure.

        Raises:
            ValueError: the value has another form than `convert` reads.
        """
        value = self.get(key)
        try:
            return None if value is None else convert(value)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"journal {self.path}: the entry of key {key} has another form ({error}): delete "
                "the line; its item is then done again"
            ) from None

    def error(self, key: str) -> str | None:
        """The reason of the failure, if that is the last entry."""
        return self._entry(key).get("error")

    def _entry(self, key: str) -> dict[str, Any]:
        span = self._spans.get(key)
        return json.loads(os.pread(self._file, span.length, span.offset)) if span else {}

    async def record(self, key: str, value: Any) -> None:
        """Writes an entry and returns when it is on disk; concurrent entries share an fsync.

        Args:
            key: what `get` finds it by.
            value: anything that JSON can hold.

        Raises:
            OSError: the disk refused the entry, of which nothing is kept.
        """
        await self._append({"key": key, "value": value})

    async def record_error(self, key: str, reason: str) -> None:
        """As `record`, for an item that failed."""
        await self._append({"key": key, "error": reason})

    async def _append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        self._batch.append((entry["key"], text.encode(errors="backslashreplace") + b"\n"))
        # the first entry of a batch, or the first after an event loop that was interrupted
        if len(self._batch) == 1 or self._commit is None or self._commit.done():
            self._commit = asyncio.create_task(self._commit_after(self._commit))
        await asyncio.shield(self._commit)

    async def _commit_after(self, previous: asyncio.Task[None] | None) -> None:
        """Writes what has gathered until the previous commit is done."""
        if previous is not None and not previous.done():
            await asyncio.wait([previous])
        batch = self._batch
        self._batch = []
        await asyncio.to_thread(self._write, batch)

    def _write(self, batch: list[tuple[str, bytes]]) -> None:
        with self._lock:
            data = memoryview(b"".join(line for _, line in batch))
            written = 0
            try:
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], self._end + written)
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self._end)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            for key, line in batch:
                self._spans[key] = _Span(self._end, len(line))
                self._end += len(line)

    def close(self) -> None:
        """Closes the file, which releases its lock."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
