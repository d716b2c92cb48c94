"""Calls to an OpenAI-compatible server, with rate limits, a budget and a journal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sized
from typing import Any, TypeVar

import openai
from tqdm import tqdm

from ..http_library import httpx
from ..messages import mask_credentials
from .budget import BudgetSpent, Usage
from .config import LLMConfig
from .journal import Journal, content_key
from .transport import (
    MeteredHTTP,
    OverBudget,
    Reply,
    UnreadableReply,
    is_transient,
    num_retries,
)

JSON_MODES = ("schema", "object", "text")
JSON_COMPLAINT = re.compile(
    "response_format|json_schema|json_object|structured|grammar|guided", re.IGNORECASE
)

MISTAKES = {
    401: "the API key was refused (llm.api_key_env, llm.api_key_file)",
    404: "no such model or address (llm.model, llm.base_url)",
}
"""Statuses that end the run, and what they mean."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class LLMError(RuntimeError):
    """A call failed permanently; the message names the model and the reason."""

    def __init__(
        self,
        reason: str,
        *,
        refused: bool = False,
        recorded: bool = True,
    ) -> None:
        """Args:
        reason: the message.
        refused: whether the server rejected this very call, so that others may still succeed.
        recorded: whether the journal keeps the failure; false if no server was reached.
        """
        super().__init__(reason)
        self.refused = refused
        self.recorded = recorded


class LLM:
    """Client of one model.

    Replies are journaled under a hash of the call's content. A program that is started again
    repeats its calls and pays only for those without a reply; equal concurrent calls share one.
    """

    def __init__(
        self,
        config: LLMConfig,
        *,
        journal: Journal | None = None,
        retry_failed: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        """Args:
            config: the model, its server and the limits.
            journal: where replies and failures are kept; None keeps neither.
            retry_failed: whether to repeat calls that the journal holds as failed.
            may_be_empty: whether a chat answer without text is a reply, instead of being retried.

        Raises:
            ValueError: there is no model name or no API key.
        """
        if not config.model:
            raise ValueError("llm.model is not set: give the model name as the server knows it")
        self.config = config
        self.journal = journal
        self.retry_failed = retry_failed
        self.usage = Usage()
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=config.api_key() or "no-key",
            max_retries=config.max_retries,
            timeout=config.timeout_seconds,
            http_client=MeteredHTTP(config, self.usage, may_be_empty=may_be_empty),
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._in_flight: dict[str, asyncio.Task[Reply]] = {}
        self._json_level = max(0, ("auto", *JSON_MODES).index(config.json_mode) - 1)
        self._max_tokens_name = "max_tokens"

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        draw: int = 0,
        schema: dict[str, Any] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Reply:
        """Requests the assistant's answer to a conversation.

        Args:
            messages: the conversation, each with role and content.
            draw: number that distinguishes repeated calls of equal content.
            schema: JSON schema, requested as strictly as the server can. The reply is not checked.
            temperature: sampling temperature; None: that of the configuration.
            top_p: probability mass to sample from; None: the server's default.
            seed: sampling seed; None: the server's choice.
            extra: further fields of the request, which the server must know.

        Raises:
            LLMError: the call failed permanently, now or according to the journal.
            BudgetSpent: the budget or the account does not allow the call.
            ValueError: the server refused the API key or does not know the model.
            OSError: the journal cannot be written.
        """
        body = self._body(temperature=temperature, top_p=top_p, seed=seed)
        body |= {"messages": messages} | (extra or {})
        return await self._shared_call(content_key("chat", body, schema, draw), body, schema)

    async def complete(
        self,
        prompt: str | list[int],
        *,
        draw: int = 0,
        top_p: float | None = None,
        seed: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Reply:
        """Requests the continuation of a text or of token ids, which may be empty.

        Otherwise as `ask`.
        """
        body = self._body(top_p=top_p, seed=seed) | {"prompt": prompt} | (extra or {})
        return await self._shared_call(content_key("completion", body, draw), body, None)

    async def close(self) -> None:
        """Cancels the calls in flight and closes the connections; the journal stays open."""
        calls = list(self._in_flight.values())
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._client.close()

    def _body(self, *, temperature: float | None = None, **sampling: Any) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "temperature": self.config.temperature if temperature is None else temperature,
            "max_tokens": self.config.max_new_tokens,
        } | {name: value for name, value in sampling.items() if value is not None}

    async def _shared_call(
        self,
        key: str,
        body: dict[str, Any],
        schema: dict[str, Any] | None,
    ) -> Reply:
        """The reply from the journal, from an equal call in flight, or from the server."""
        if self.journal is not None:
            if (known := self.journal.get_as(key, Reply.from_json)) is not None:
                self.usage.cached_calls += 1
                return known
            if not self.retry_failed and (reason := self.journal.error(key)) is not None:
                self.usage.cached_calls += 1
                self.usage.failures += 1
                raise LLMError(reason)
        if key not in self._in_flight:
            task = asyncio.create_task(self._call(key, body, schema))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key))
        # shielded: a caller that is cancelled must not cancel the call for the others
        return await asyncio.shield(self._in_flight[key])

    async def _call(
        self,
        key: str,
        body: dict[str, Any],
        schema: dict[str, Any] | None,
    ) -> Reply:
        """Calls the server and journals what came of it."""
        async with self._slots:
            self.usage.calls += 1
            outcome = await self._request(body, schema)
        if isinstance(outcome, Reply):
            self.usage.answers += 1
            if self.journal is not None:
                await self.journal.record(key, outcome._asdict())
            return outcome
        if isinstance(outcome, LLMError):
            self.usage.failures += 1
            if outcome.recorded and self.journal is not None:
                await self.journal.record_error(key, str(outcome))
        raise outcome

    async def _request(
        self, body: dict[str, Any], schema: dict[str, Any] | None
    ) -> Reply | Exception:
        """Sends the request in a form that the server accepts.

        Failures are returned: raised here, they would carry openai's error, which may quote the
        API key, as their context.
        """
        path = "/chat/completions" if "messages" in body else "/completions"
        while True:
            level = self._json_level
            sent = self._adapted(body, schema)
            try:
                # not the typed methods, whose validation takes most of a call's computing time
                response = await self._client.post(path, body=sent, cast_to=httpx.Response)
            except openai.APIStatusError as error:
                if self._adapt(error, sent, level):
                    continue
                return self._failure(error)
            except openai.APIConnectionError as error:
                return self._failure(error)
            except OverBudget as error:
                return error.args[0]
            except UnicodeEncodeError:
                reason = "the prompt holds an unpaired surrogate, which cannot be sent"
                return LLMError(self._line(reason), refused=True)
            reply: Reply = response.extensions["reply"]
            if reply.finish_reason == "content_filter":
                return LLMError(self._line(f"refused: {reply.text}"), refused=True)
            return reply

    def _adapted(self, body: dict[str, Any], schema: dict[str, Any] | None) -> dict[str, Any]:
        """The request body in the form that the server has been found to accept."""
        adapted = dict(body)
        adapted[self._max_tokens_name] = adapted.pop("max_tokens")
        mode = JSON_MODES[self._json_level]
        if schema is not None and mode == "schema":
            described = {"name": "answer", "schema": schema, "strict": True}
            adapted["response_format"] = {"type": "json_schema", "json_schema": described}
        elif schema is not None and mode == "object":
            adapted["response_format"] = {"type": "json_object"}
        return adapted

    def _adapt(
        self,
        error: openai.APIStatusError,
        sent: dict[str, Any],
        level: int,
    ) -> bool:
        """Changes the form of requests if the server refused it; returns whether it did."""
        if is_transient(error.status_code):
            return False
        complaint = _message(error)
        if "max_completion_tokens" in complaint and "max_tokens" in sent and "messages" in sent:
            self._max_tokens_name = "max_completion_tokens"
            return True
        complains = "response_format" in sent and JSON_COMPLAINT.search(complaint)
        if not complains or self.config.json_mode != "auto":
            return False
        # Calls in flight are refused together: they lower the level by one step in all.
        self._json_level = max(self._json_level, level + 1)
        return True

    def _failure(self, error: openai.APIError) -> Exception:
        """The exception to raise for an error of the openai client."""
        attempts = 1 + num_retries(error.request)
        suffix = f" (tried {attempts} times)" if attempts > 1 else ""
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            reason = f"HTTP {status}: {_message(error)}"
            if status == 402 or error.code == "insufficient_quota":
                return BudgetSpent(self._line(reason) + suffix)
            if status in MISTAKES:
                return ValueError(self._line(f"{MISTAKES[status]}: {reason}") + suffix)
            return LLMError(self._line(reason) + suffix, refused=not is_transient(status))
        cause = error.__cause__
        was_reached = isinstance(cause, (UnreadableReply, httpx.TimeoutException))
        reason = str(cause) if was_reached else f"connection failed: {type(cause).__name__} {cause}"
        return LLMError(self._line(reason) + suffix, recorded=was_reached)

    def _line(self, reason: str) -> str:
        """The reason in one line, with the model and without the API key, which servers quote."""
        text = " ".join(reason.replace(self._client.api_key, "***").split())[:500]
        return mask_credentials(f"{self.config.model} at {self._client.base_url}: {text}")


def _message(error: openai.APIStatusError) -> str:
    """The server's own message about an error."""
    body = error.body or error.response.text
    return str(body.get("message", body) if isinstance(body, dict) else body)


async def gather_in_order(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    *,
    concurrency: int,
    progress: str | None = None,
    usage: Usage | None = None,
) -> list[Result]:
    """Applies `work` to every item.

    After an exception no further item begins; those in progress are finished before it is raised.

    Args:
        items: the items, read one by one.
        work: coroutine function of one item.
        concurrency: maximum number of items in progress.
        progress: name of the progress bar; None shows no bar.
        usage: totals of a client, whose failures and USD the bar shows.

    Returns:
        The results, in the order of the items.
    """
    results: dict[int, Result] = {}
    errors: list[Exception] = []
    source = enumerate(items)

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
    with tqdm(
        total=total,
        desc=progress,
        unit="item",
        disable=progress is None,
    ) as bar:
        await asyncio.gather(*(worker(bar) for _ in range(concurrency)))
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(results))]
