"""An append-only record of finished items, safe against a kill at any moment: what resume reads."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple


def content_key(*parts: Any) -> str:
    """32 hex digits of the SHA-256 of the parts' canonical JSON: the same content, the same key, on any machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Place(NamedTuple):
    offset: int
    length: int
    failed: bool


class _Waiting(NamedTuple):
    key: str
    line: bytes
    failed: bool
    written: asyncio.Future[None]


class Journal:
    """A JSONL file with one object a line, {"key", "value"} or {"key", "error"}; the last entry of a key counts.

    Entries stay on disk and are read when asked for; memory holds only where they stand. One process at a time has it open.
    """

    def __init__(self, path: Path) -> None:
        """Makes the file and its folder, or reads what is there; what a kill left half-written at the end is cut off.

        Raises ValueError when another process has it open, and when a line before others is no entry.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._guard = threading.Lock()  # a write in a thread may outlive an interrupted event loop
        self._places: dict[str, _Place] = {}
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._read()
        except BlockingIOError:
            self.close()
            raise ValueError(
                f"journal {path}: another process is writing it: wait for that run, or end it"
            ) from None
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Fills in the places; the length of the whole entries, to which the file is cut."""
        offset, torn_at, torn_line = 0, -1, 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry: Any = json.loads(line) if line.endswith(b"\n") else None
                    key, failed = entry["key"], "error" in entry
                except (ValueError, KeyError, TypeError):
                    if torn_at < 0:
                        torn_at, torn_line = offset, number
                else:
                    if torn_at >= 0:
                        raise ValueError(
                            f"journal {self.path}: line {torn_line} is no entry: delete it, its item is done again"
                        )
                    self._places[key] = _Place(offset, len(line), failed)
                offset += len(line)
        if torn_at >= 0:
            os.ftruncate(self._file, torn_at)
            return torn_at
        return offset

    def _entry(self, key: str, *, failed: bool) -> dict[str, Any]:
        place = self._places.get(key)
        if place is None or place.failed != failed:
            return {}
        return json.loads(os.pread(self._file, place.length, place.offset))

    def get(self, key: str) -> Any | None:
        """The recorded value; None when there is none or the newest entry is a failure."""
        return self._entry(key, failed=False).get("value")

    def error(self, key: str) -> str | None:
        """Why the item failed, when its newest entry is a failure."""
        return self._entry(key, failed=True).get("error")

    async def record(self, key: str, value: Any) -> None:
        """Returns when the entry is on disk; entries that come meanwhile share the next fsync.

        value: anything that JSON can hold. Raises OSError, and holds nothing of the entry, when the disk refuses it.
        """
        await self._append(key, {"key": key, "value": value}, failed=False)

    async def record_error(self, key: str, reason: str) -> None:
        """As `record`, for an item that failed."""
        await self._append(key, {"key": key, "error": reason}, failed=True)

    async def _append(self, key: str, entry: dict[str, Any], *, failed: bool) -> None:
        line = (
            json.dumps(entry, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
            + b"\n"
        )
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        self._waiting.append(_Waiting(key, line, failed, written))
        if self._writer is None or self._writer.done():
            self._writer = loop.create_task(self._write_all())
        await written

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._commit, batch)
            except OSError as error:
                for item in batch:
                    if not item.written.done():
                        item.written.set_exception(
                            OSError(error.errno, error.strerror, str(self.path))
                        )
            else:
                for item in batch:
                    if not item.written.done():
                        item.written.set_result(None)

    def _commit(self, batch: list[_Waiting]) -> None:
        with self._guard:
            try:
                data = memoryview(b"".join(item.line for item in batch))
                done = 0
                while done < len(data):
                    done += os.pwrite(self._file, data[done:], self._end + done)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
            for item in batch:
                self._places[item.key] = _Place(self._end, len(item.line), item.failed)
                self._end += len(item.line)

    def close(self) -> None:
        """Gives up the file and its lock."""
        with self._guard:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
