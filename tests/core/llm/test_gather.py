from __future__ import annotations

import asyncio

import pytest

from verippo.core.llm.budget import BudgetSpent, Usage
from verippo.core.llm.client import gather_in_order


def test_gather_keeps_order_and_concurrency_limit():
    working, most = 0, 0

    async def work(item):
        nonlocal working, most
        working += 1
        most = max(most, working)
        await asyncio.sleep(0.001 * (item % 7))
        working -= 1
        return item * item

    assert asyncio.run(gather_in_order(iter(range(100)), work, concurrency=5)) == [
        n * n for n in range(100)
    ]
    assert most == 5


def test_gather_makes_no_task_per_item():
    async def main():
        most = 0

        async def work(item):
            nonlocal most
            if item % 1000 == 0:
                await asyncio.sleep(0)
                most = max(most, len(asyncio.all_tasks()))
            return item

        assert len(await gather_in_order(range(100_000), work, concurrency=64)) == 100_000
        return most

    assert asyncio.run(main()) <= 66


def test_gather_finishes_begun_items_after_an_error():
    begun, finished = [], []

    async def work(item):
        begun.append(item)
        await asyncio.sleep(0.05 if item != 1 else 0.01)
        if item == 1:
            raise BudgetSpent("enough")
        finished.append(item)

    with pytest.raises(BudgetSpent, match="enough"):
        asyncio.run(gather_in_order(range(50), work, concurrency=4))
    assert begun == [0, 1, 2, 3]
    assert finished == [0, 2, 3]


def test_progress_bar_shows_items_failures_and_usd(capfd):
    async def work(item):
        usage.usd += 0.5
        usage.failures += item == 2

    usage = Usage()
    asyncio.run(gather_in_order(range(4), work, concurrency=1, progress="search", usage=usage))
    shown = capfd.readouterr().err.split("\r")[-1]
    for part in ("search: 100%", "4/4", "item/s", "failures=1", "usd=2.00"):
        assert part in shown
    asyncio.run(gather_in_order(range(4), work, concurrency=1))
    assert capfd.readouterr().err == ""
