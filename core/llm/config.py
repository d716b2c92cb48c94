"""Configuration of a model behind an OpenAI-compatible server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from ..bounds import (
    CountingInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    check_bounds,
)


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A model behind an OpenAI-compatible server, and the limits of its use."""

    base_url: str | None = None
    """URL of the server, such as http://127.0.0.1:30000/v1; by default OpenAI's own."""
    model: str = ""
    """Model name as the server knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key. Your own server may need no key."""
    api_key_file: str | None = None
    """File that holds the API key, used instead of the environment variable."""
    concurrency: CountingInt = 16
    """Maximum number of calls in flight."""
    max_retries: NonNegativeInt = 6
    """Retries after HTTP status 408, 409, 429 or 5xx, a lost connection or an unreadable answer."""
    timeout_seconds: PositiveFloat = 300.0
    """Time limit of one request, in seconds; each retry has its own."""
    requests_per_minute: CountingInt | None = None
    """Rate limit in requests per minute; requests are spaced evenly to stay within it."""
    tokens_per_minute: CountingInt | None = None
    """Rate limit in tokens per minute, prompts and answers together."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature, unless the command sets its own."""
    max_new_tokens: CountingInt = 4096
    """Maximum number of tokens of an answer, unless the command sets its own."""
    price_in: NonNegativeFloat = 0.0
    """Price of a million prompt tokens, in USD."""
    price_out: NonNegativeFloat = 0.0
    """Price of a million answer tokens, in USD."""
    budget_usd: PositiveFloat | None = None
    """Spending limit of this run, in USD; it stops before a call that could exceed the limit."""
    json_mode: Literal["auto", "schema", "object", "text"] = "auto"
    """How to request JSON; auto starts with a schema and relaxes it if the server refuses."""

    def __post_init__(self) -> None:
        check_bounds(self, prefix="llm.")
        if self.budget_usd and not self.price_in + self.price_out:
            raise ValueError(
                "llm.budget_usd needs llm.price_in and llm.price_out (USD per million tokens)"
            )
        if self.base_url is not None:
            url = urlsplit(self.base_url)  # raises a ValueError of its own for a malformed port
            if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
                raise ValueError(
                    f"llm.base_url={self.base_url}: give http://HOST:PORT/v1, or https"
                )
        if not self.api_key_env.isidentifier():
            raise ValueError(
                "llm.api_key_env: give the name of the variable that holds the key, not the key"
            )

    @property
    def items_at_once(self) -> int:
        """Number of items to process at a time.

        More than `concurrency`, so that calls stay in flight while other answers are written.
        """
        return self.concurrency * 5 // 4

    def api_key(self) -> str:
        """Reads the API key.

        Returns:
            The key from the file or the environment, or "" for a server that needs none.

        Raises:
            ValueError: the key is missing or unreadable, or holds characters no header allows.
        """
        if self.api_key_file:
            try:
                content = Path(self.api_key_file).expanduser().read_bytes()
            except OSError as error:
                raise ValueError(
                    f"llm.api_key_file={self.api_key_file}: {error.strerror}"
                ) from None
            key = content.decode(errors="replace").strip()
        else:
            key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.base_url is None:
            raise ValueError(
                f"no API key: set {self.api_key_env}, or give llm.api_key_file, "
                "or llm.base_url of your own server"
            )
        # An HTTP library would quote such a key in its own error message.
        if " " in key or not key.isascii() or not key.isprintable():
            raise ValueError(
                f"the API key in {self.api_key_file or self.api_key_env} "
                "has a space or a character that is not printable ASCII"
            )
        return key
