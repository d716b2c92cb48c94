"""Run folders and checkpoints: written aside, synced, renamed; `latest` moves last.

OUTPUT/checkpoints/step-00000020/   state.json + whatever the run saves beside it
OUTPUT/checkpoints/latest           the name of the newest whole one
OUTPUT/checkpoints/best             the name of the one with the best evaluation, if any
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import dist


def prepare_output(output: str, *, resume: str) -> Path:
    """Makes the run's folder and keeps it from other processes until this one ends. Raises ValueError when it cannot be
    written, is another process's at this moment, or holds another run and resume is "never"."""
    folder = Path(output).expanduser()
    problem = None
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(bytes(1 << 16))
            probe.unlink()
            if not _lock(folder / ".lock"):
                problem = f"output {folder}: another run writes there: choose another folder, or end that run"
        except OSError as error:
            problem = f"output {folder}: cannot write there: {error.strerror or error}"
        if problem is None and resume == "never" and (folder / "metrics.jsonl").exists():
            problem = f"output {folder}: holds a run already: choose another folder, or --resume auto to go on with it"
    problem = dist.broadcast(problem)
    if problem:
        raise ValueError(problem)
    return folder


def _lock(path: Path) -> bool:
    """False when another process holds it. Held to the end of this process: its descriptor is left open on purpose."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(
            descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # not flock: this process may open the folder again
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        pass
    return True


def find_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: the one that `latest` names ("auto"), none ("never"), or the given folder.

    When `latest` is missing or names none, "auto" takes the newest whole one: a step folder with its state.json.
    Raises ValueError when the given folder is not a checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume).expanduser()
        if not (path / "state.json").exists():
            raise ValueError(
                f"resume {resume}: no checkpoint there (state.json is missing); give auto, never, or a step folder"
            )
        return path
    checkpoints = folder / "checkpoints"
    whole = {path.parent.name: path.parent for path in checkpoints.glob("step-*/state.json")}
    pointer = checkpoints / "latest"
    pointed = whole.get(pointer.read_text().strip()) if pointer.exists() else None
    return pointed or whole.get(max(whole, default=""))


@contextlib.contextmanager
def taking_up(checkpoint: Path) -> Iterator[None]:
    """Around the reading of a checkpoint: whatever fails there is a ValueError that says how to go on."""
    try:
        yield
    except Exception as error:  # a torn file raises a dozen kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"cannot go on from {checkpoint} ({reason}): it is damaged, or of a run with other settings; give --resume an older "
            "step folder, or another --output to start afresh"
        ) from None


def load_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def save(
    folder: Path,
    *,
    step: int,
    state: dict[str, Any],
    write: Callable[[Path], None],
    best: bool,
    total_limit: int,
) -> Path:
    """Saves a checkpoint atomically and prunes old ones. Every rank must call it.

    write: called on every rank with the temporary folder, to put the engines' states there.
    best: marks it as the one with the best evaluation, which pruning spares. total_limit: how many to keep besides.
    """
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f".writing-{final.name}"
    if dist.is_main():
        for abandoned in checkpoints.glob(".writing-*"):
            shutil.rmtree(abandoned)
        temporary.mkdir(parents=True)
    dist.barrier()
    with naming_a_full_disk(checkpoints, "a checkpoint"):
        write(temporary)
    dist.barrier()
    if dist.is_main():
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        _sync_tree(temporary)
        _remove(final)
        temporary.rename(final)
        _point(checkpoints / "latest", final.name)
        if best:
            _point(checkpoints / "best", final.name)
        _prune(checkpoints, total_limit)
    dist.barrier()
    return final


@contextlib.contextmanager
def naming_a_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Around the writing of large files under `folder`: a full disk is a ValueError that names it and what was written."""
    try:
        yield
    except Exception:  # torch and safetensors have errors of their own for it
        if shutil.disk_usage(folder).free > 1 << 20:
            raise
        raise ValueError(
            f"{folder}: no space left for {what}: make some; the run goes on from its last checkpoint"
        ) from None


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_suffix(".tmp")
    temporary.write_text(name)
    _sync(temporary)
    temporary.replace(pointer)
    _sync(pointer.parent)


def _prune(checkpoints: Path, total_limit: int) -> None:
    spared = {
        (checkpoints / name).read_text().strip()
        for name in ("latest", "best")
        if (checkpoints / name).exists()
    }
    steps = sorted(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    for path in steps[: max(0, len(steps) - total_limit)]:
        if path.name not in spared:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    (checkpoint / "state.json").unlink(
        missing_ok=True
    )  # first: a kill in between must not leave what looks whole
    shutil.rmtree(checkpoint, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder, folder.parent]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
