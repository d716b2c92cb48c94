"""What the answer of an OpenAI-compatible server says: a reply, or a fault and what follows from it. Pure but for a clock."""

from __future__ import annotations

import json
import time
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple

LONGEST_WAIT_SECONDS = 600.0
"""however long the server's Retry-After is"""


class Reply(NamedTuple):
    text: str
    finish_reason: str
    """stop, or length when max_new_tokens cut it off"""
    prompt_tokens: int
    completion_tokens: int


class Fault(NamedTuple):
    """Why a try gave no answer, and what follows from it."""

    reason: str
    kind: Literal["passing", "final", "setup", "money"] = "final"
    wait_seconds: float = 0.0
    recorded: bool = True
    """whether the journal is told: not when no server was reached, which says nothing of the call"""
    tokens: tuple[int, int] = (0, 0)
    """of prompt and answer, that it cost; at most, where no count came"""


def read_reply(
    data: bytes, *, most_in: int, most_out: int, may_be_empty: bool = False
) -> Reply | Fault:
    """What a completion's body says, or why it says nothing.

    most_in, most_out: tokens that the call can have cost at most, taken where the server does not count them.
    may_be_empty: whether a chat answer without text is one; a completion may always be empty.
    """

    def unreadable(what: str) -> Fault:
        return Fault(f"the answer {what}", "passing", tokens=(most_in, most_out))

    try:
        content = json.loads(data.decode("utf-8"))
        choice = content["choices"][0]
        message = choice.get("message") or {"content": choice.get("text")}
        text, finish, counts = (
            message.get("content"),
            choice.get("finish_reason") or "stop",
            content.get("usage") or {},
        )
        num_in, num_out = counts.get("prompt_tokens"), counts.get("completion_tokens")
    except UnicodeDecodeError:
        return unreadable("is not UTF-8")
    except (ValueError, RecursionError):
        return unreadable(f"is cut off or not JSON ({len(data)} bytes)")
    except (LookupError, TypeError, AttributeError):
        return unreadable(f"has no choices: {data[:100]!r}")
    tokens = (
        num_in if isinstance(num_in, int) else most_in,
        num_out if isinstance(num_out, int) else most_out,
    )
    if message.get("refusal") or finish == "content_filter":
        return Fault(f"refused: {message.get('refusal') or 'content_filter'}", tokens=tokens)
    if isinstance(text, list) and all(
        isinstance(part, dict) for part in text
    ):  # a thought is a part without "text"
        text = "".join(str(part.get("text") or "") for part in text)
    if not isinstance(text, str) and text is not None:
        return Fault(
            f"the answer's content is {type(text).__name__}, not text", "passing", tokens=tokens
        )
    if not may_be_empty and "message" in choice and finish != "length" and not (text or "").strip():
        return Fault(
            f"the answer's content is {'null' if text is None else 'empty'}",
            "passing",
            tokens=tokens,
        )
    text = (
        (text or "").encode("utf-8", "replace").decode()
    )  # escapes can make half characters, which no file takes
    return Reply(
        text=text, finish_reason=finish, prompt_tokens=tokens[0], completion_tokens=tokens[1]
    )


def status_fault(status: int, body: Any, headers: Any) -> Fault:
    """What an error status means. body: its parsed JSON, or its text."""
    told = body.get("message", body) if isinstance(body, dict) else body
    code = body.get("code") if isinstance(body, dict) else None
    reason = f"HTTP {status}: {told}"
    if status == 402 or code == "insufficient_quota":
        return Fault(reason, "money")
    if status == 401:
        return Fault(
            f"the API key was refused (llm.api_key_env, llm.api_key_file): {reason}", "setup"
        )
    if status == 404:
        return Fault(f"no such model or address (llm.model, llm.base_url): {reason}", "setup")
    if status in (408, 409, 429) or (status >= 500 and status != 501):
        return Fault(
            reason, "passing", min(_retry_after(headers.get("retry-after")), LONGEST_WAIT_SECONDS)
        )
    return Fault(reason)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header: a number or an HTTP date (RFC 9110, section 10.2.3); 0 for anything else."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(value)).timestamp() - time.time())
    except ValueError:
        return 0.0
