"""Calls to a scripted server, for the tests of the LLM client."""

from __future__ import annotations

import asyncio

import pytest

from verippo.core.llm.client import LLM
from verippo.core.llm.config import LLMConfig


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Shortens the waits between retries."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def question():
    """Makes a conversation of one message."""
    return lambda text="Is it so?": [{"role": "user", "content": text}]


@pytest.fixture
def scripted():
    """Makes a script that gives the answers in turn, and repeats the last."""

    def script(*answers):
        left = list(answers)
        return lambda body: left.pop(0) if len(left) > 1 else left[0]

    return script


@pytest.fixture
def drive(monkeypatch):
    """Runs `use(llm)` with a client of the server; returns its result and the client's usage."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123")

    def run(server, use, *, journal=None, retry_failed=False, **settings):
        config = LLMConfig(base_url=server.url, model="m", **settings)

        async def main():
            client = LLM(config, journal=journal, retry_failed=retry_failed)
            try:
                return await use(client), client.usage
            finally:
                await client.close()

        return asyncio.run(main())

    return run


@pytest.fixture
def ask(drive, question):
    """Asks the server one question; returns the reply and the client's usage."""
    return lambda server, text="Is it so?", **settings: drive(
        server, lambda client: client.ask(question(text)), **settings
    )
