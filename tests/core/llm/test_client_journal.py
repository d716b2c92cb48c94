from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest

from verippo.core.llm.client import LLMError
from verippo.core.llm.journal import Journal
from verippo.core.llm.transport import Reply


def test_journaled_calls_are_not_sent_again(drive, question, llm_server, tmp_path):
    server = llm_server(lambda body: llm_server.module.Answer(f"answer {len(server.bodies)}"))

    async def use(client):
        first = await client.ask(question("a"))
        others = [
            await client.ask(question("a"), draw=1),
            await client.ask(question("a"), temperature=0.1),
            await client.ask(question("a"), schema={"type": "object"}),
            await client.ask(question("b")),
            await client.complete("a"),
        ]
        return [first, *others, await client.ask(question("a"))]

    with Journal(tmp_path / "journal.jsonl") as journal:
        replies, usage = drive(server, use, journal=journal)
        assert [reply.text for reply in replies] == [f"answer {n}" for n in (1, 2, 3, 4, 5, 6, 1)]
        assert (usage.calls, usage.cached_calls) == (6, 1)
    with Journal(tmp_path / "journal.jsonl") as journal:
        again, usage = drive(server, use, journal=journal)
    assert again == replies
    assert (usage.calls, usage.cached_calls, usage.usd) == (0, 7, 0)
    assert len(server.bodies) == 6


def test_equal_concurrent_calls_share_one_despite_cancellation(
    drive, question, llm_server, tmp_path
):
    server = llm_server(lambda body: "yes", delay_seconds=0.3)

    async def use(client):
        tasks = [asyncio.create_task(client.ask(question())) for _ in range(5)]
        await asyncio.sleep(0.1)
        tasks[0].cancel()
        return await asyncio.gather(*tasks[1:])

    with Journal(tmp_path / "journal.jsonl") as journal:
        replies, usage = drive(server, use, journal=journal)
    assert [reply.text for reply in replies] == ["yes"] * 4
    assert (len(server.bodies), usage.calls) == (1, 1)


def test_close_cancels_calls_in_flight_silently(drive, question, llm_server, tmp_path, caplog):
    server = llm_server(lambda body: "yes", delay_seconds=30)

    async def use(client):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.ask(question()), 0.2)

    begun = time.monotonic()
    with Journal(tmp_path / "journal.jsonl") as journal:
        drive(server, use, journal=journal)
    assert time.monotonic() - begun < 10
    assert (len(server.bodies), caplog.text) == (1, "")
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_recorded_failure_is_repeated_only_with_retry_failed(ask, scripted, llm_server, tmp_path):
    server = llm_server(scripted(llm_server.module.error(400, "too long"), "yes"))
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(LLMError, match="HTTP 400: too long") as first:
            ask(server, journal=journal)
        with pytest.raises(LLMError) as second:
            ask(server, journal=journal)
        assert str(second.value) == str(first.value)
        assert len(server.bodies) == 1
        assert ask(server, journal=journal, retry_failed=True)[0].text == "yes"
        assert ask(server, journal=journal)[0].text == "yes"
    assert len(server.bodies) == 2


def test_unreachable_server_is_not_recorded_as_a_failure(ask, llm_server, tmp_path):
    server = llm_server(lambda body: "yes")
    server.close()
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(LLMError, match="connection failed: ConnectError"):
            ask(server, journal=journal, max_retries=1)
        assert ask(llm_server(lambda body: "yes"), journal=journal)[0].text == "yes"


def test_reply_survives_json():
    reply = Reply("a", "stop", 1, 2)
    assert Reply(**json.loads(json.dumps(reply._asdict()))) == reply


def test_killed_program_resumes_without_repeating_calls(llm_server, tmp_path):
    server = llm_server(lambda body: f"re: {body['messages'][0]['content']}", delay_seconds=0.02)
    (tmp_path / "program.py").write_text(f"""
import asyncio
from pathlib import Path
from verippo.core.llm.journal import Journal
from verippo.core.llm.client import LLM, LLMConfig, gather_in_order

async def main():
    with Journal(Path({str(tmp_path)!r}) / "journal.jsonl") as journal:
        llm = LLM(LLMConfig(base_url={server.url!r}, model="m"), journal=journal)

        async def work(item):
            first = await llm.ask([{{"role": "user", "content": f"first {{item}}"}}])
            return (await llm.ask([{{"role": "user", "content": first.text}}])).text

        print(*await gather_in_order(range(40), work, concurrency=4), sep=",")

asyncio.run(main())
""")
    command = [sys.executable, str(tmp_path / "program.py")]
    for num_calls in (15, 40):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while len(server.bodies) < num_calls and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait(timeout=20)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ",".join(f"re: re: first {n}" for n in range(40))
    assert len(server.calls) == 80
    assert 80 <= len(server.bodies) <= 80 + 2 * 4  # a kill loses what was in flight
