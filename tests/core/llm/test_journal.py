from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from verippo.core.llm.journal import Journal, content_key


def record(journal, *pairs):
    async def all_at_once():
        await asyncio.gather(*(journal.record(key, value) for key, value in pairs))

    asyncio.run(all_at_once())


def keys(path):
    return [json.loads(line)["key"] for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "journal.jsonl"


def test_content_key_is_the_hash_of_canonical_json():
    by_hand = hashlib.sha256(b'[{"a":[true,null,"\\u00e9"],"b":1},"x"]').hexdigest()[:32]
    assert content_key({"b": 1, "a": [True, None, "é"]}, "x") == by_hand
    assert content_key(["a"], "b") != content_key(["a", "b"])
    assert content_key(1) != content_key("1")


def test_entries_survive_reopening(path):
    with Journal(path) as journal:
        record(
            journal, ("a", {"text": "né\u2028\n", "n": [1, 2.5, None]}), ("b", "正确"), ("c", False)
        )
        assert (journal.get("a")["n"], journal.get("b")) == ([1, 2.5, None], "正确")
    with Journal(path) as journal:
        assert journal.get("a") == {"text": "né\u2028\n", "n": [1, 2.5, None]}
        assert (journal.get("b"), journal.get("c")) == ("正确", False)
        assert journal.get("unknown") is None
        assert journal.error("a") is None
    assert keys(path) == ["a", "b", "c"]  # in the order of writing


def test_last_entry_of_a_key_counts(path):
    with Journal(path) as journal:
        record(journal, ("a", 1), ("b", 1))
        asyncio.run(journal.record_error("a", "no answer"))
        asyncio.run(journal.record_error("b", "no answer"))
        record(journal, ("b", 2))
        states = [(journal.get(key), journal.error(key)) for key in "ab"]
        assert states == [(None, "no answer"), (2, None)]
    with Journal(path) as journal:
        assert [(journal.get(key), journal.error(key)) for key in "ab"] == states


def test_incomplete_last_line_is_removed(path):
    with Journal(path) as journal:
        record(journal, ("whole", "é"))
    whole = path.read_bytes()
    with Journal(path) as journal:
        record(journal, ("torn", "发热 ü"))
    both = path.read_bytes()
    for end in range(len(whole), len(both)):
        path.write_bytes(both[:end])
        with Journal(path) as journal:
            assert (journal.get("whole"), journal.get("torn")) == ("é", None)
            assert path.read_bytes() == whole
            record(journal, ("next", 1))
        assert keys(path) == ["whole", "next"]


def test_zeros_at_the_end_are_removed(path):
    with Journal(path) as journal:
        record(journal, ("a", 1))
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(700) + b"\n" + bytes(5))
    with Journal(path) as journal:
        assert journal.get("a") == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"{half\n", b'{"value": 1}\n', b"[1]\n", b"\xff\n"])
def test_damaged_line_before_others_is_refused(path, damage):
    with Journal(path) as journal:
        record(journal, ("a", 1), ("b", 2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    with pytest.raises(ValueError, match="line 2 is not an entry: delete the line"):
        Journal(path)
    path.write_bytes(first + second)
    Journal(path).close()  # the refusal gave up the lock


def test_second_process_is_refused(path):
    code = (
        "import sys; from pathlib import Path; from verippo.core.llm.journal import Journal;"
        f"j = Journal(Path({str(path)!r})); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(
            ValueError, match="another process is writing it: wait for that run, or end it"
        ):
            Journal(path)
    finally:
        process.kill()
        process.wait(timeout=20)
    Journal(path).close()


def test_acknowledged_entries_survive_a_kill(path):
    code = f"""
import asyncio
from pathlib import Path
from verippo.core.llm.journal import Journal

async def write(journal, n):
    await journal.record(str(n), "é" * 3000)
    print(n, flush=True)

async def main():
    journal = Journal(Path({str(path)!r}))
    for n in range(0, 10**6, 50):
        await asyncio.gather(*(write(journal, n + i) for i in range(50)))

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    acknowledged = [process.stdout.readline() for _ in range(120)]
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.read().splitlines()
    process.wait(timeout=20)
    assert len(acknowledged) >= 120
    with Journal(path) as journal:
        assert all(journal.get(line.strip()) == "é" * 3000 for line in acknowledged)
        record(journal, ("after", 1))
    assert keys(path)[-1] == "after"


def test_concurrent_entries_share_an_fsync(path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(threading.get_ident()), real(file))[1]
    )
    with Journal(path) as journal:
        record(journal, *((str(n), n) for n in range(1000)))
    assert 1 <= len(synced) <= 3
    assert threading.get_ident() not in synced  # the event loop never waits for the disk
    assert len(keys(path)) == 1000


def test_entry_counts_only_when_on_disk(path, monkeypatch):
    allowed = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda file: allowed.wait(timeout=20))

    async def watch(journal):
        task = asyncio.create_task(journal.record("a", 1))
        await asyncio.sleep(0.1)
        assert not task.done()
        assert journal.get("a") is None
        allowed.set()
        await task
        assert journal.get("a") == 1

    with Journal(path) as journal:
        asyncio.run(watch(journal))


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_full_disk_fails_all_waiting_entries_and_keeps_none(path, monkeypatch, failing):
    real = os.pwrite

    def full(file, data=b"", offset=0):
        real(file, bytes(data[: len(data) // 2]), offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    async def both(journal):
        return await asyncio.gather(
            journal.record("b", 2), journal.record("c", "é" * 99), return_exceptions=True
        )

    with Journal(path) as journal:
        record(journal, ("a", 1))
        whole = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full)
            errors = asyncio.run(both(journal))
        assert [error.errno for error in errors] == [errno.ENOSPC] * 2
        assert str(path) in str(errors[0])
        assert (journal.get("a"), journal.get("b"), journal.get("c")) == (1, None, None)
        assert path.read_bytes() == whole
        record(journal, ("b", 3))  # some room was made
        assert journal.get("b") == 3
    assert keys(path) == ["a", "b"]


def test_value_that_json_cannot_hold_is_refused(path):
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="Out of range float"):
            record(journal, ("a", float("nan")))
        assert journal.get("a") is None
    assert path.read_bytes() == b""


def test_unpaired_surrogates_are_kept(path):
    with Journal(path) as journal:
        record(journal, ("a", "热\ud800"))
    with Journal(path) as journal:
        assert journal.get("a") == "热\ud800"


def test_ten_thousand_entries_open_within_two_seconds(path):
    path.parent.mkdir()
    with path.open("w") as file:
        for n in range(10_000):
            file.write(
                json.dumps({"key": content_key(n), "value": {"text": "word " * 400, "n": n}}) + "\n"
            )
    start = time.process_time()
    with Journal(path) as journal:
        assert time.process_time() - start < 2
        assert journal.get(content_key(9_999))["n"] == 9_999
