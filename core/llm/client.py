"""Calls to any OpenAI-compatible server: bounded retries, limits, a token and cost account, and a journal of answers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import openai
from tqdm import tqdm

from .journal import Journal, content_key
from .reply import Fault, Reply, read_reply, status_fault

FIRST_WAIT_SECONDS = 0.5
"""before the first retry; doubled for each further one, up to a minute"""
JSON_MODES = ("schema", "object", "text")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A model behind an OpenAI-compatible server, and how it may be used."""

    base_url: str | None = None
    """of the server, such as http://127.0.0.1:30000/v1; default: OpenAI's own"""
    model: str = ""
    """its name there"""
    api_key_env: str = "OPENAI_API_KEY"
    """the environment variable that holds the key; a server of your own may need none"""
    api_key_file: str | None = None
    """or: a file that holds it"""
    concurrency: int = 16
    """calls in flight at once"""
    max_retries: int = 6
    """further tries after a failure that may pass: 408, 409, 429, 5xx, a lost connection, an unreadable answer"""
    timeout_seconds: float = 300.0
    """of one try"""
    requests_per_minute: int | None = None
    """calls are spaced so as to stay within it"""
    tokens_per_minute: int | None = None
    """the same for tokens, of prompts and answers together"""
    temperature: float = 1.0
    """where the command does not set one"""
    max_new_tokens: int = 4096
    """where the command does not set it"""
    price_in: float = 0.0
    """USD per million prompt tokens"""
    price_out: float = 0.0
    """USD per million answer tokens"""
    budget_usd: float | None = None
    """the run stops before a call that could exceed it; what an earlier run spent does not count"""
    json_mode: Literal["auto", "schema", "object", "text"] = "auto"
    """how JSON is asked for; auto: by schema, and less strictly where the server refuses that"""

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_new_tokens", "requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"llm.{name}={getattr(self, name)}: must be at least 1")
        for name in ("max_retries", "temperature", "price_in", "price_out"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"llm.{name}={getattr(self, name)}: must be 0 or more")
        for name in ("timeout_seconds", "budget_usd"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"llm.{name}={getattr(self, name)}: must be above 0")
        if self.budget_usd and not self.price_in + self.price_out:
            raise ValueError(
                "llm.budget_usd needs llm.price_in and llm.price_out (USD per million tokens)"
            )
        url = urlsplit(
            "https://default" if self.base_url is None else self.base_url
        )  # a ValueError for what is no port
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise ValueError(f"llm.base_url={self.base_url}: give http://HOST:PORT/v1, or https")
        if not self.api_key_env.isidentifier():
            raise ValueError(
                "llm.api_key_env: give the name of the variable that holds the key, not the key"
            )

    @property
    def items_at_once(self) -> int:
        """How many items to work on so that `concurrency` calls are in flight while other answers go to disk."""
        return self.concurrency * 5 // 4

    def api_key(self) -> str:
        """The key, from the file or the environment; "" for a server that needs none. Raises ValueError where one is missing."""
        if self.api_key_file:
            try:
                key = (
                    Path(self.api_key_file)
                    .expanduser()
                    .read_text(encoding="utf-8", errors="replace")
                    .strip()
                )
            except OSError as error:
                raise ValueError(
                    f"llm.api_key_file={self.api_key_file}: {error.strerror}"
                ) from None
        else:
            key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.base_url is None:
            raise ValueError(
                f"no API key: set {self.api_key_env}, or give llm.api_key_file, or llm.base_url of your own server"
            )
        if (
            not (key.isascii() and key.isprintable()) or " " in key
        ):  # it would be quoted by the error of whoever sends it
            raise ValueError(
                f"the API key in {self.api_key_file or self.api_key_env} holds a blank or an odd character"
            )
        return key


class LLMError(RuntimeError):
    """A call failed for good; the text says which and why.

    refused: the server wants none of this call (a content filter, say), while another's may well succeed; else it gave no answer.
    """

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class BudgetSpent(RuntimeError):
    """The next call could exceed the budget, or the account has no money left. What was finished is in the journal."""


@dataclass
class Usage:
    """What the calls of one client came to."""

    calls: int = 0
    """asked of the server, however many tries each took"""
    answers: int = 0
    """calls that got one"""
    cached_calls: int = 0
    """answered from the journal, failures too"""
    retries: int = 0
    failures: int = 0
    """calls that failed for good, now or as the journal says, or whose answers could not be used"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


class _Pace:
    """Spaces calls evenly: `units` of one push back the next by their share of a minute."""

    def __init__(self, per_minute: int | None) -> None:
        self.seconds_each = 60 / per_minute if per_minute else 0.0
        self.free_at = 0.0

    def take(self, units: int) -> float:
        """When the call may start (monotonic seconds)."""
        start = max(time.monotonic(), self.free_at)
        self.free_at = start + units * self.seconds_each
        return start

    def give_back(self, units: int) -> None:
        self.free_at -= units * self.seconds_each


class LLM:
    """One model. Answers are journaled by content, so that a program of asks replays after a kill and pays only for what
    it never got; equal asks at one time share one call."""

    def __init__(
        self,
        config: LLMConfig,
        *,
        journal: Journal | None = None,
        retry_failed: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        """retry_failed: asks again what the journal holds as failed. may_be_empty: takes a chat answer without text for one,
        as of a model under test, and does not try again. Raises ValueError without a model or a key."""
        if not config.model:
            raise ValueError("llm.model is not set: give the model's name at the server")
        self.config, self.journal, self.retry_failed, self.may_be_empty = (
            config,
            journal,
            retry_failed,
            may_be_empty,
        )
        self.usage = Usage()
        most = config.concurrency
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=most, max_keepalive_connections=most
        )
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=config.api_key() or "no-key",
            max_retries=0,
            timeout=config.timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(
                limits=limits, timeout=config.timeout_seconds
            ),
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._requests, self._tokens = (
            _Pace(config.requests_per_minute),
            _Pace(config.tokens_per_minute),
        )
        self._held_until = 0.0
        self._reserved: list[float] = []
        self._settled = asyncio.Event()
        self._in_flight: dict[str, asyncio.Task[Reply]] = {}
        self._json_level = max(0, ("auto", *JSON_MODES).index(config.json_mode) - 1)
        self._length_name = "max_tokens"

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        draw: int = 0,
        schema: dict[str, Any] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> Reply:
        """The assistant's answer to a conversation.

        draw: tells repeated asks of one text apart. schema: JSON schema of the answer, which is asked for as strictly as the
        server can; the answer is not checked against it. Raises LLMError when the call fails for good or failed so before,
        BudgetSpent, ValueError when the server refuses the key or does not know the model, OSError when the disk is full.
        """
        body = self._body(
            temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed
        ) | {"messages": messages}
        return await self._once(content_key("chat", body, schema, draw), body, schema)

    async def complete(
        self,
        prompt: str,
        *,
        draw: int = 0,
        temperature: float | None = None,
        top_p: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        stop: list[str] | None = None,
    ) -> Reply:
        """What the model writes after a prompt as it stands; may be empty. Raises as `ask`."""
        body = self._body(
            temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed, stop=stop
        )
        body |= {"prompt": prompt}
        return await self._once(content_key("completion", body, draw), body, None)

    def _body(
        self, *, temperature: float | None, max_tokens: int | None, **others: Any
    ) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "temperature": self.config.temperature if temperature is None else temperature,
            "max_tokens": max_tokens or self.config.max_new_tokens,
        } | {name: value for name, value in others.items() if value is not None}

    async def close(self) -> None:
        """Gives up what is in flight and closes the connections; the journal stays open."""
        calls = list(self._in_flight.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._client.close()

    async def _once(self, key: str, body: dict[str, Any], schema: dict[str, Any] | None) -> Reply:
        if self.journal is not None:
            if (known := self.journal.get(key)) is not None:
                self.usage.cached_calls += 1
                return Reply(**known)
            if not self.retry_failed and (reason := self.journal.error(key)) is not None:
                self.usage.cached_calls += 1
                self.usage.failures += 1
                raise LLMError(reason)
        if key not in self._in_flight:
            task = asyncio.get_running_loop().create_task(self._call(key, body, schema))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key))
        return await asyncio.shield(
            self._in_flight[key]
        )  # an asker that gives up leaves the call to the others

    async def _call(self, key: str, body: dict[str, Any], schema: dict[str, Any] | None) -> Reply:
        async with self._slots:
            outcome = await self._tries(body, schema)
        if isinstance(outcome, Reply):
            self.usage.answers += 1
            if self.journal is not None:
                await self.journal.record(key, outcome._asdict())
            return outcome
        reason = f"{self.config.model} at {self._client.base_url}: {outcome.reason}"
        if outcome.kind == "setup":
            raise ValueError(reason)
        if outcome.kind == "money":
            raise BudgetSpent(reason)
        self.usage.failures += 1
        if outcome.recorded and self.journal is not None:
            await self.journal.record_error(key, reason)
        raise LLMError(reason, refused=outcome.kind == "final")

    async def _tries(self, body: dict[str, Any], schema: dict[str, Any] | None) -> Reply | Fault:
        self.usage.calls += 1
        tries = 0
        while True:
            adapted, level = self._adapted(body, schema), self._json_level
            outcome = await self._try(adapted)
            if isinstance(outcome, Reply):
                return outcome
            if self._adapts(outcome, adapted, level):
                continue
            tries += 1
            if outcome.kind != "passing" or tries > self.config.max_retries:
                return (
                    outcome._replace(reason=f"{outcome.reason} (tried {tries} times)")
                    if tries > 1
                    else outcome
                )
            self.usage.retries += 1
            grown = min(60.0, FIRST_WAIT_SECONDS * 2 ** (tries - 1))
            await asyncio.sleep(outcome.wait_seconds + grown * random.uniform(0.5, 1.0))

    def _adapted(self, body: dict[str, Any], schema: dict[str, Any] | None) -> dict[str, Any]:
        """The body as this server wants it, by all that it refused so far."""
        body = {
            self._length_name if name == "max_tokens" else name: value
            for name, value in body.items()
        }
        if schema is not None and JSON_MODES[self._json_level] == "schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            }
        elif schema is not None and JSON_MODES[self._json_level] == "object":
            body["response_format"] = {"type": "json_object"}
        return body

    def _adapts(self, fault: Fault, sent: dict[str, Any], level: int) -> bool:
        """Whether the server refused the way of asking and there is another; the client remembers it."""
        if fault.kind != "final":
            return False
        if "max_completion_tokens" in fault.reason and "max_tokens" in sent and "messages" in sent:
            self._length_name = "max_completion_tokens"
            return True
        complains = re.search(
            r"response_format|json_schema|json_object|structured|grammar|guided",
            fault.reason,
            re.IGNORECASE,
        )
        if "response_format" not in sent or not complains or self.config.json_mode != "auto":
            return False
        self._json_level = max(
            self._json_level, level + 1
        )  # calls in flight are refused together: one step down for all
        return True

    async def _try(self, body: dict[str, Any]) -> Reply | Fault:
        most_in = len(
            json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        )  # a token is a byte at least
        most_out = body.get("max_tokens") or body["max_completion_tokens"]
        worst, expected = self._price(most_in, most_out), most_in // 4 + most_out
        await self._fit_budget(worst)
        self._reserved.append(worst)
        try:
            start = max(self._requests.take(1), self._tokens.take(expected), self._held_until)
            await asyncio.sleep(max(0.0, start - time.monotonic()))
            outcome = await self._send(body, most_in, most_out)
            tokens = (
                outcome.tokens
                if isinstance(outcome, Fault)
                else (outcome.prompt_tokens, outcome.completion_tokens)
            )
            self._tokens.give_back(expected - sum(tokens))
            self.usage.prompt_tokens += tokens[0]
            self.usage.completion_tokens += tokens[1]
            self.usage.usd += self._price(*tokens)
            if isinstance(outcome, Fault) and outcome.wait_seconds:  # all callers are meant
                self._held_until = max(self._held_until, time.monotonic() + outcome.wait_seconds)
            return outcome
        finally:
            self._reserved.remove(worst)
            self._settled.set()
            self._settled = asyncio.Event()

    async def _fit_budget(self, worst: float) -> None:
        budget = self.config.budget_usd
        while budget is not None and self.usage.usd + sum(self._reserved) + worst > budget:
            if not self._reserved:
                raise BudgetSpent(
                    f"{self.usage.usd:.4f} USD are spent and the next call may cost {worst:.4f}, over llm.budget_usd={budget}: "
                    "raise it and start again; what is finished is not paid again"
                )
            await (
                self._settled.wait()
            )  # calls in flight mostly cost less than was set aside for them

    def _price(self, num_in: int, num_out: int) -> float:
        return (num_in * self.config.price_in + num_out * self.config.price_out) / 1e6

    async def _send(self, body: dict[str, Any], most_in: int, most_out: int) -> Reply | Fault:
        path = "/chat/completions" if "messages" in body else "/completions"
        try:  # not the typed methods: they take a quarter of the time, and hide what an unreadable answer held
            sent = self._client.post(path, body=body, cast_to=bytes)
            data = await asyncio.wait_for(sent, self.config.timeout_seconds)
            outcome = read_reply(
                data, most_in=most_in, most_out=most_out, may_be_empty=self.may_be_empty
            )
        except openai.APIStatusError as error:
            outcome = status_fault(
                error.status_code, error.body or error.response.text, error.response.headers
            )
        except (openai.APITimeoutError, asyncio.TimeoutError):
            reason = f"no answer within timeout_seconds={self.config.timeout_seconds:g}"
            outcome = Fault(reason, "passing", tokens=(most_in, most_out))
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            outcome = Fault(
                f"connection failed: {type(cause).__name__} {cause}".strip(),
                "passing",
                recorded=False,
            )
        except UnicodeEncodeError:
            outcome = Fault(
                "the prompt holds half a character (a lone surrogate), which cannot be sent"
            )
        if isinstance(outcome, Fault):  # servers quote keys
            reason = outcome.reason.replace(self._client.api_key, "***")
            outcome = outcome._replace(reason=" ".join(reason.split())[:500])
        return outcome


async def gather_in_order(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    *,
    concurrency: int,
    progress: str | None = None,
    usage: Usage | None = None,
) -> list[Result]:
    """What `work` gives for every item, in the items' order, at most `concurrency` at once.

    progress: the name of a progress bar; usage: a client's, whose failures and USD it shows. When one item raises, no
    further one begins, those in work are finished, and the first error is raised.
    """
    results: dict[int, Result] = {}
    source, errors = enumerate(items), list[Exception]()

    async def worker(bar: tqdm[Any]) -> None:
        for number, item in source:
            try:
                results[number] = await work(item)
            except Exception as error:
                errors.append(error)
            if errors:
                return
            if usage is not None:
                bar.set_postfix(failures=usage.failures, usd=f"{usage.usd:.2f}", refresh=False)
            bar.update()

    total = len(items) if isinstance(items, Sized) else None
    with tqdm(total=total, desc=progress, unit="item", disable=progress is None) as bar:
        await asyncio.gather(*(worker(bar) for _ in range(concurrency)))
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(results))]
