from __future__ import annotations

import asyncio
import time

import pytest

from verippo.core.llm.budget import BudgetSpent
from verippo.core.llm.journal import Journal
from verippo.core.llm.transport import Reply


def test_concurrency_limit_and_kept_connections(drive, question, llm_server):
    server = llm_server(lambda body: "yes", delay_seconds=0.05)

    async def use(client):
        return await asyncio.gather(*(client.ask(question(), draw=n) for n in range(20)))

    drive(server, use, concurrency=4)
    assert server.most_open == 4
    assert server.num_connections <= 4  # kept alive from call to call


def test_requests_per_minute_are_spaced_evenly(drive, question, llm_server):
    arrivals = []
    server = llm_server(lambda body: (arrivals.append(time.monotonic()), "yes")[1])

    async def use(client):
        await asyncio.gather(*(client.ask(question(), draw=n) for n in range(6)))

    drive(server, use, requests_per_minute=600)
    gaps = [later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)]
    assert arrivals[-1] - arrivals[0] > 0.45  # five gaps of 0.1 s, less what the first was late
    assert max(gaps) < 1


def test_tokens_per_minute_count_the_tokens_really_used(drive, question, llm_server):
    server = llm_server(
        lambda body: llm_server.module.Answer(prompt_tokens=10, completion_tokens=90)
    )

    async def use(client):
        start = time.monotonic()
        for n in range(6):
            await client.ask(question(), draw=n)
        return time.monotonic() - start

    took, _ = drive(
        server, use, tokens_per_minute=60_000, max_new_tokens=500
    )  # 100 tokens take 0.1 s; 500 would take 0.5 s each
    assert 0.45 < took < 1.8


def test_concurrent_calls_stay_within_the_budget(drive, question, llm_server, tmp_path):
    # a call costs 0.01 USD and may cost 0.02: of 0.1 USD nine calls fit, the tenth might not
    server = llm_server(
        lambda body: llm_server.module.Answer(prompt_tokens=0, completion_tokens=1000),
        delay_seconds=0.02,
    )
    prices = {"price_in": 0.0, "price_out": 10.0, "max_new_tokens": 2000}
    with Journal(tmp_path / "journal.jsonl") as journal:

        async def use(client):
            results = await asyncio.gather(
                *(client.ask(question(), draw=n) for n in range(30)), return_exceptions=True
            )
            spent = [result for result in results if isinstance(result, BudgetSpent)]
            assert len([result for result in results if isinstance(result, Reply)]) == 9
            assert len(spent) == 21
            return str(spent[0])

        message, usage = drive(
            server, use, journal=journal, budget_usd=0.1, concurrency=8, **prices
        )
        assert message.startswith(
            "0.0900 USD are spent and the next call may cost 0.0200, "
            "over llm.budget_usd=0.1: raise it"
        )
        assert len(server.bodies) == 9
        assert usage.usd == pytest.approx(0.09)
    with Journal(tmp_path / "journal.jsonl") as journal:  # a larger budget goes on from there
        again = lambda client: asyncio.gather(*(client.ask(question(), draw=n) for n in range(30)))  # noqa: E731
        _, usage = drive(server, again, journal=journal, budget_usd=1.0, **prices)
    assert (usage.cached_calls, usage.calls, len(server.bodies)) == (9, 21, 30)


def test_failed_attempts_are_charged_at_their_upper_bound(ask, scripted, llm_server):
    Answer = llm_server.module.Answer
    server = llm_server(
        scripted(
            Answer(body=b"{"),
            Answer(hang=True),
            Answer(reset=True),
            Answer(text="", completion_tokens=5),
            Answer("yes", usage=False),
        )
    )
    _, usage = ask(server, price_out=1.0, max_new_tokens=1000, timeout_seconds=0.3)
    assert usage.usd == pytest.approx((1000 + 1000 + 0 + 5 + 1000) / 1e6)
