"""HTTP requests of an LLM client: rate limits, accounting, and reading of answers."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NamedTuple

import openai

from ..http_library import httpx
from .budget import BudgetSpent, Meter, TokenCount, Usage
from .config import LLMConfig

MAX_HOLD_SECONDS = 600.0
"""Longest delay that a server can impose by a Retry-After header."""


class Reply(NamedTuple):
    """Answer of the model."""

    text: str
    finish_reason: str
    """stop; length when the answer reached max_new_tokens."""
    prompt_tokens: int
    completion_tokens: int

    @classmethod
    def from_json(cls, entry: Any) -> Reply:
        """The reply that the journal holds.

        Raises:
            TypeError: the entry has another form.
        """
        reply = cls(**entry)
        if not (isinstance(reply.text, str) and isinstance(reply.finish_reason, str)):
            raise TypeError("its text is no text")
        return reply


class UnreadableReply(httpx.TransportError):
    """An answer without usable text. A transport error, because openai retries those."""

    def __init__(self, problem: str, used: TokenCount) -> None:
        super().__init__(f"the answer {problem}")
        self.used = used


class OverBudget(BaseException):
    """Carries a BudgetSpent through openai's client, which in version 2 retries any Exception."""


class MeteredHTTP(openai.DefaultAsyncHttpxClient):
    """Sends each HTTP request of the openai client, retries included, through the meter.

    The openai client decides about retries and waits between them. It cannot limit or count the
    tokens of a failed attempt, and it takes an unreadable answer for a good one; both happen here.
    """

    def __init__(
        self,
        config: LLMConfig,
        usage: Usage,
        *,
        may_be_empty: bool,
    ) -> None:
        limits = httpx.Limits(
            max_connections=config.concurrency, max_keepalive_connections=config.concurrency
        )
        super().__init__(limits=limits, timeout=config.timeout_seconds)
        self.seconds = config.timeout_seconds
        self.meter = Meter(config, usage)
        self.may_be_empty = may_be_empty

    async def send(self, request: Any, **options: Any) -> Any:
        """As the base class; the response to a completed call carries its Reply as an extension."""
        body = json.loads(request.content)
        max_tokens = body.get("max_tokens") or body["max_completion_tokens"]
        bound = TokenCount(len(request.content), max_tokens)  # a token is at least one byte
        self.meter.usage.retries += num_retries(request) > 0
        try:
            async with self.meter.request(bound) as charge:
                try:
                    # httpx's own limit covers each read, not the whole request
                    response = await asyncio.wait_for(
                        super().send(request, **options), self.seconds
                    )
                    if response.is_success:
                        reply = read_reply(response.content, bound, may_be_empty=self.may_be_empty)
                        charge.used = TokenCount(reply.prompt_tokens, reply.completion_tokens)
                        response.extensions["reply"] = reply
                except (asyncio.TimeoutError, httpx.TimeoutException):
                    charge.used = bound
                    reason = f"no answer within timeout_seconds={self.seconds:g}"
                    raise httpx.ReadTimeout(reason, request=request) from None
                except UnreadableReply as error:
                    charge.used = error.used
                    raise
        except BudgetSpent as error:
            raise OverBudget(error) from None
        self._steer_retries(response)
        return response

    def _steer_retries(self, response: Any) -> None:
        """Applies a Retry-After to all calls of this client, and stops futile retries."""
        seconds = response.headers.get("retry-after", "")
        if is_transient(response.status_code) and re.fullmatch(r"\d+(\.\d+)?", seconds):
            self.meter.hold(min(float(seconds), MAX_HOLD_SECONDS))
            del response.headers["retry-after"]  # openai would give up if it were long
        if response.status_code == 501 or b"insufficient_quota" in response.content:
            response.headers["x-should-retry"] = "false"


def read_reply(data: bytes, bound: TokenCount, *, may_be_empty: bool) -> Reply:
    """Reads the body of a completion.

    Args:
        data: the body.
        bound: upper bound of the tokens, assumed where the server does not report them.
        may_be_empty: whether a chat answer may lack text; a plain completion always may.

    Returns:
        The reply. If the model refused, finish_reason is content_filter and text is the reason.

    Raises:
        UnreadableReply: there is no usable text.
    """
    try:
        content = json.loads(data.decode("utf-8"))
        choice = content["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        text = message.get("content")
        refusal = message.get("refusal")
        counts = content.get("usage") or {}
        reported = counts.get("prompt_tokens"), counts.get("completion_tokens")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        problem = f"is not a completion: {data[:100]!r} ({len(data)} bytes)"
        raise UnreadableReply(problem, bound) from None
    used = TokenCount(
        *(n if isinstance(n, int) else most for n, most in zip(reported, bound, strict=True))
    )
    finish = choice.get("finish_reason") or "stop"
    if refusal or finish == "content_filter":
        return Reply(refusal or finish, "content_filter", *used)
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        text = "".join(str(part.get("text") or "") for part in text)  # thinking parts have no text
    may_be_empty = may_be_empty or "message" not in choice or finish == "length"
    if not isinstance(text, str | None) or not (may_be_empty or (text and text.strip())):
        raise UnreadableReply(f"has no text, but {json.dumps(text)[:100]}", used)
    # JSON escapes can produce unpaired surrogates, which no file can hold
    return Reply((text or "").encode("utf-8", "replace").decode(), finish, *used)


def is_transient(status: int) -> bool:
    """Whether a retry may succeed."""
    return status in (408, 409, 429) or (status >= 500 and status != 501)


def num_retries(request: Any) -> int:
    """How many attempts openai made before this request of a call."""
    return int(request.headers.get("x-stainless-retry-count", 0))
