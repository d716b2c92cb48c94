from __future__ import annotations

import dataclasses

import pytest

from verippo.core.llm.client import LLM, LLMError
from verippo.core.llm.config import LLMConfig
from verippo.core.llm.journal import Journal

KEY = "sk-very-secret-0123"


def test_api_key_appears_in_no_error_file_or_repr(ask, drive, llm_server, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    echo = llm_server.module.error(400, f"bad request by {KEY}")
    with Journal(tmp_path / "journal.jsonl") as journal:
        for server, kind in [
            (llm_server(lambda body: echo), LLMError),
            (llm_server(lambda body: "", api_key="x"), ValueError),
        ]:
            with pytest.raises(kind, match=r"by \*\*\*|provided: \*\*\*") as caught:
                ask(server, kind.__name__, journal=journal)
            chain = [caught.value, caught.value.__cause__, caught.value.__context__]
            assert KEY not in "".join(map(repr, chain))
        server = llm_server(lambda body: "yes", api_key=KEY)
        reply, _ = ask(server, journal=journal)  # the key did arrive

        async def represent(client):
            return (
                repr(vars(client)) + repr(client.config) + repr(dataclasses.asdict(client.config))
            )

        texts = [drive(server, represent)[0], caplog.text, *capfd.readouterr()]
    assert reply.text == "yes"
    assert KEY not in "".join(texts) + (tmp_path / "journal.jsonl").read_text()


def test_api_key_comes_from_environment_or_file(ask, llm_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", " one\n")
    (tmp_path / "key").write_text("two\n")
    assert ask(llm_server(lambda body: "yes", api_key="one"), api_key_env="MY_KEY")[0].text == "yes"
    assert (
        ask(llm_server(lambda body: "yes", api_key="two"), api_key_file=str(tmp_path / "key"))[
            0
        ].text
        == "yes"
    )
    monkeypatch.delenv("MY_KEY")
    assert (
        ask(llm_server(lambda body: "yes"), api_key_env="MY_KEY")[0].text == "yes"
    )  # a server of one's own needs none
    with pytest.raises(
        ValueError, match="no API key: set MY_KEY, or give llm.api_key_file, or llm.base_url"
    ):
        LLM(LLMConfig(model="m", api_key_env="MY_KEY"))
    with pytest.raises(ValueError, match=r"llm.api_key_file=.*nokey: No such file"):
        LLM(LLMConfig(model="m", api_key_file=str(tmp_path / "nokey")))


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk one", "sk-é", "sk\x00"])
def test_malformed_api_key_is_refused_without_being_shown(tmp_path, key):
    (tmp_path / "key").write_text(key)
    with pytest.raises(
        ValueError,
        match="the API key in .*key has a space or a character that is not printable ASCII",
    ) as caught:
        LLM(LLMConfig(model="m", api_key_file=str(tmp_path / "key")))
    assert "sk" not in str(caught.value).replace(str(tmp_path), "")
    with pytest.raises(
        ValueError,
        match="^llm.api_key_env: give the name of the variable that holds the key, not the key$",
    ):
        LLMConfig(api_key_env="sk-0123")


def test_budget_needs_prices():
    with pytest.raises(ValueError, match="llm.budget_usd needs llm.price_in and llm.price_out"):
        LLMConfig(budget_usd=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: 0}, f"llm.{name}=0: must be at least 1")
            for name in (
                "concurrency",
                "max_new_tokens",
                "requests_per_minute",
                "tokens_per_minute",
            )
        ],
        *[
            ({name: -1.0}, f"llm.{name}=-1.0: must be 0 or more")
            for name in ("temperature", "price_in", "price_out")
        ],
        ({"max_retries": -1}, "llm.max_retries=-1: must be 0 or more"),
        ({"timeout_seconds": 0.0}, "llm.timeout_seconds=0.0: must be above 0"),
        (
            {"base_url": "127.0.0.1:30000"},
            "llm.base_url=127.0.0.1:30000: give http://HOST:PORT/v1, or https",
        ),
        *[
            ({"base_url": url}, f"llm.base_url={url}: give http://HOST:PORT/v1")
            for url in ("", "http://", "http://host:0")
        ],
        ({"base_url": "http://[::1"}, "Invalid IPv6 URL"),
        ({"base_url": "http://host:99999/v1"}, "Port out of range"),
        ({"budget_usd": 0.0, "price_in": 1.0}, "llm.budget_usd=0.0: must be above 0"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LLMConfig(**changes)


def test_items_at_once_exceed_concurrency_by_a_quarter():
    assert [LLMConfig(concurrency=n).items_at_once for n in (1, 3, 16, 64)] == [1, 3, 20, 80]


def test_client_needs_a_model():
    with pytest.raises(ValueError, match="llm.model is not set"):
        LLM(LLMConfig(base_url="http://127.0.0.1:1/v1"))
