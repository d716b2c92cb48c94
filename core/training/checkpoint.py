"""Run folders and checkpoints, written to a temporary folder, synced and renamed.

OUTPUT/checkpoints/step-00000020/   state.json, checksums.json and whatever the run saves
OUTPUT/checkpoints/latest           name of the newest complete checkpoint, written last
OUTPUT/checkpoints/best             name of the checkpoint with the best evaluation, if any
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import dist


def prepare_output(output: str, *, resume: str) -> Path:
    """Makes a run's folder and locks it against other processes until this one ends.

    Raises:
        ValueError: the folder cannot be written, another process uses it, or it holds another run
            and `resume` is "never".
    """
    folder = Path(output).expanduser()
    problem = None
    if dist.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(bytes(1 << 16))
            probe.unlink()
            if not _lock(folder / ".lock"):
                problem = (
                    f"output {folder}: another run writes there: choose another folder, or end "
                    "that run"
                )
        except OSError as error:
            problem = f"output {folder}: cannot write there: {error.strerror or error}"
        if problem is None and resume == "never" and (folder / "metrics.jsonl").exists():
            problem = (
                f"output {folder}: holds a run already: choose another folder, or resume it with "
                "--resume auto"
            )
    problem = dist.broadcast(problem)
    if problem:
        raise ValueError(problem)
    return folder


def _lock(path: Path) -> bool:
    """Takes the lock until the process ends; returns False if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # not flock: this process may open the folder again
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:  # a file system without locks
        pass
    return True


def find_resume(folder: Path, resume: str, *, trust: bool = False) -> Path | None:
    """The checkpoint to resume from.

    Args:
        folder: the run's folder.
        resume: "auto" for the one that `latest` names, or the newest complete one if that file is
            missing; "never" for none; or a step folder.
        trust: whether to load a checkpoint from outside `folder`. Loading runs code that its files
            may hold.

    Returns:
        A step folder, or None to start from the beginning.

    Raises:
        ValueError: the given folder is not a checkpoint, or is not trusted.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume).expanduser()
        if not (path / "state.json").exists():
            raise ValueError(
                f"resume {resume}: no checkpoint there (state.json is missing); give auto, never, "
                "or a step folder"
            )
        if not trust and folder.resolve() not in path.resolve().parents:
            raise ValueError(
                f"resume {resume}: lies outside {folder}, and loading a checkpoint runs code that "
                "its files may hold: give --trust_checkpoint true if you know where it comes from"
            )
        return path
    checkpoints = folder / "checkpoints"
    whole = {path.parent.name: path.parent for path in checkpoints.glob("step-*/state.json")}
    pointed = whole.get(_pointed(checkpoints / "latest"))
    return pointed or whole.get(max(whole, default=""))


@contextlib.contextmanager
def explain_load_errors(checkpoint: Path) -> Iterator[None]:
    """Converts any error while loading a checkpoint into a ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # a damaged file raises errors of a dozen types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        older = max(_whole(checkpoint.parent, before=checkpoint.name), default=None)
        resume = f"--resume {older} to resume from an older one, or " if older else ""
        raise ValueError(
            f"cannot resume from {checkpoint} ({reason}): it is damaged, or of a run with other "
            f"settings; give {resume}another --output to start over"
        ) from None


def _whole(checkpoints: Path, *, before: str) -> list[Path]:
    """Folders of the whole checkpoints that are older than the one named `before`."""
    found = [state.parent for state in checkpoints.glob("step-*/state.json")]
    return [folder for folder in found if folder.name < before]


def verify(checkpoint: Path) -> None:
    """Compares every file with its checksum. Every rank must call it; they share the work.

    Raises:
        ValueError: a file is missing or has changed since it was written.
    """
    path = checkpoint / "checksums.json"
    if not path.exists():  # written before there were checksums
        return
    expected = json.loads(path.read_text())
    found = _checksums(checkpoint, sorted(expected))
    for name in sorted(expected):
        if found[name] != expected[name]:
            state = "is missing" if found[name] is None else "does not match its checksum"
            raise ValueError(f"{name} {state}")


def _checksums(folder: Path, names: list[str]) -> dict[str, int | None]:
    """CRC-32 of files by name; None for a missing one. Every rank reads its share of them."""
    share = names[dist.rank() :: dist.world_size()]
    own = {name: _crc32(folder / name) for name in share}
    return {name: crc for part in dist.all_gather(own) for name, crc in part.items()}


def _crc32(path: Path) -> int | None:
    crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
    except OSError:
        return None
    return crc


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state that `save` was given."""
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

    Args:
        folder: the run's folder.
        step: number of finished steps.
        state: written to state.json, whose presence marks the checkpoint as complete.
        write: writes the engines' states into a temporary folder; called on every rank.
        best: whether it follows the best evaluation; pruning then keeps it.
        total_limit: checkpoints to keep, not counting the best.

    Returns:
        The checkpoint's folder.
    """
    checkpoints = folder / "checkpoints"
    final = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f".writing-{final.name}"
    if dist.is_main():
        for abandoned in checkpoints.glob(".writing-*"):
            shutil.rmtree(abandoned)
        temporary.mkdir(parents=True)
    dist.barrier()
    with explain_full_disk(checkpoints, "a checkpoint"):
        write(temporary)
    dist.barrier()
    files = [path for path in temporary.rglob("*") if path.is_file()]
    checksums = _checksums(temporary, sorted(str(path.relative_to(temporary)) for path in files))
    if dist.is_main():
        (temporary / "checksums.json").write_text(json.dumps(checksums, indent=1))
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
def explain_full_disk(folder: Path, what: str) -> Iterator[None]:
    """Converts errors while writing large files to a full disk into a ValueError that says so.

    A file that reached the limit on file sizes counts too.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors raise errors of their own
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        too_large = os.strerror(errno.EFBIG).lower() in str(error).lower() or limit in sizes
        if limit != resource.RLIM_INFINITY and too_large:
            raise ValueError(
                f"{folder}: {what} needs files of more than {limit} bytes, the limit of this "
                "process: raise it (ulimit -f) and start again; the run resumes from its last "
                "checkpoint"
            ) from None
        if shutil.disk_usage(folder).free > 1 << 20:
            raise
        raise ValueError(
            f"{folder}: no space left for {what}: free some and start again; the run resumes "
            "from its last checkpoint"
        ) from None


def follow_umask(folder: Path) -> None:
    """Gives the files of a folder the permissions of any new file; safetensors makes its private.

    Args:
        folder: folder whose files this process has written.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_suffix(".tmp")
    temporary.write_text(name)
    _sync(temporary)
    temporary.replace(pointer)
    _sync(pointer.parent)


def _pointed(pointer: Path) -> str:
    """The name in a pointer's file; empty if it is missing. A damaged one names no checkpoint."""
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else ""


def _prune(checkpoints: Path, total_limit: int) -> None:
    kept = {_pointed(checkpoints / name) for name in ("latest", "best")}
    steps = sorted(path for path in checkpoints.iterdir() if path.name.startswith("step-"))
    for path in steps[: max(0, len(steps) - total_limit)]:
        if path.name not in kept:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # state.json first: a kill in between must not leave what looks whole
    (checkpoint / "state.json").unlink(missing_ok=True)
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
