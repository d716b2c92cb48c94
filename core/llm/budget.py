"""Rate limits, budget and token counts of an LLM client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NamedTuple

from .config import LLMConfig


class BudgetSpent(RuntimeError):
    """The next call could exceed the budget, or the account has no money left."""


class TokenCount(NamedTuple):
    """Tokens of a prompt and of its answer."""

    prompt: int
    completion: int


@dataclass
class Usage:
    """Totals over the calls of one client."""

    calls: int = 0
    """Calls sent to the server; retries are not counted again."""
    answers: int = 0
    """Calls that got an answer from the server."""
    cached_calls: int = 0
    """Calls answered from the journal, recorded failures included."""
    retries: int = 0
    """Requests that repeated an earlier one."""
    failures: int = 0
    """Calls that failed permanently, recorded failures included, or whose answer was unusable."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


class _Pace:
    """Spaces requests evenly: each delays the next by its own share of a minute."""

    def __init__(self, per_minute: int | None) -> None:
        self.seconds_each = 60 / per_minute if per_minute else 0.0
        self.free_at = 0.0

    def take(self, units: int) -> float:
        """Reserves the units; returns the time at which the request may start."""
        start = max(time.monotonic(), self.free_at)
        self.free_at = start + units * self.seconds_each
        return start


@dataclass
class Charge:
    """Tokens of one request, set by the sender once it knows them."""

    used: TokenCount = TokenCount(0, 0)


class Meter:
    """Delays requests to fit the rate limits and the budget, and accounts for their tokens."""

    def __init__(self, config: LLMConfig, usage: Usage) -> None:
        self.config = config
        self.usage = usage
        self._requests = _Pace(config.requests_per_minute)
        self._tokens = _Pace(config.tokens_per_minute)
        self._held_until = 0.0
        self._reserved: list[float] = []
        self._settled = asyncio.Event()

    @asynccontextmanager
    async def request(self, bound: TokenCount) -> AsyncIterator[Charge]:
        """Waits until a request may start; on exit replaces its reserved cost by the real one.

        Args:
            bound: upper bound of the request's tokens, for which budget is reserved.

        Raises:
            BudgetSpent: the request could exceed the budget.
        """
        worst = self._usd(bound)
        await self._fit_budget(worst)
        expected = bound.prompt // 4 + bound.completion  # a prompt token is about four bytes
        charge = Charge()
        self._reserved.append(worst)
        try:
            start = max(self._requests.take(1), self._tokens.take(expected), self._held_until)
            await asyncio.sleep(max(0.0, start - time.monotonic()))
            yield charge
        finally:
            excess = sum(charge.used) - expected
            self._tokens.free_at += excess * self._tokens.seconds_each
            self.usage.prompt_tokens += charge.used.prompt
            self.usage.completion_tokens += charge.used.completion
            self.usage.usd += self._usd(charge.used)
            self._reserved.remove(worst)
            self._settled.set()
            self._settled = asyncio.Event()

    def hold(self, seconds: float) -> None:
        """Delays every request that has not started yet by at least `seconds`."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)

    async def _fit_budget(self, worst: float) -> None:
        budget = self.config.budget_usd
        while budget is not None and self.usage.usd + sum(self._reserved) + worst > budget:
            if not self._reserved:
                raise BudgetSpent(
                    f"{self.usage.usd:.4f} USD are spent and the next call may cost {worst:.4f}, "
                    f"over llm.budget_usd={budget}: raise it and start again; "
                    "finished calls are not paid for again"
                )
            await self._settled.wait()  # calls in flight mostly cost less than their reservation

    def _usd(self, tokens: TokenCount) -> float:
        prices = self.config.price_in, self.config.price_out
        return (tokens.prompt * prices[0] + tokens.completion * prices[1]) / 1e6
