from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import subprocess
import sys
import time

import pytest

from verippo.core.llm.client import (
    LLM,
    BudgetSpent,
    LLMConfig,
    LLMError,
    Reply,
    Usage,
    gather_in_order,
)
from verippo.core.llm.journal import Journal

KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def question(text="Is it so?"):
    return [{"role": "user", "content": text}]


def drive(server, use, *, journal=None, retry_failed=False, **settings):
    """Runs `use(llm)` with a client of the server; its result and the client's usage."""

    async def main():
        client = LLM(
            LLMConfig(base_url=server.url, model="m", **settings),
            journal=journal,
            retry_failed=retry_failed,
        )
        try:
            return await use(client), client.usage
        finally:
            await client.close()

    return asyncio.run(main())


def ask(server, text="Is it so?", **settings):
    return drive(server, lambda client: client.ask(question(text)), **settings)


def scripted(*answers):
    """These answers in turn, the last one for ever."""
    left = list(answers)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


# --- asking ---


def test_an_ask_sends_what_was_given_and_returns_what_was_counted(llm_server):
    server = llm_server(
        lambda body: llm_server.module.Answer("It is.", prompt_tokens=7, completion_tokens=3)
    )

    def use(client):
        return client.ask(question(), temperature=0.5, top_p=0.9, seed=5)

    reply, usage = drive(server, use, price_in=2.0, price_out=10.0, max_new_tokens=20)
    assert reply == Reply("It is.", "stop", 7, 3)
    assert server.bodies == [
        {
            "model": "m",
            "messages": question(),
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 20,
            "seed": 5,
        }
    ]
    assert server.paths == ["/v1/chat/completions"]
    assert usage == Usage(
        calls=1,
        answers=1,
        prompt_tokens=7,
        completion_tokens=3,
        usd=pytest.approx((7 * 2 + 3 * 10) / 1e6),
    )


def test_settings_hold_where_the_ask_names_none(llm_server):
    server = llm_server(lambda body: "yes")
    ask(server, temperature=0.0, max_new_tokens=12)
    assert server.bodies == [
        {"model": "m", "messages": question(), "temperature": 0.0, "max_tokens": 12}
    ]


def test_a_completion_continues_the_prompt_as_it_stands_and_may_be_empty(llm_server):
    server = llm_server(scripted("and so on", ""))

    def complete(draw):
        return lambda client: client.complete("<s>Once", draw=draw, seed=3)

    assert drive(server, complete(0), max_new_tokens=9)[0] == Reply("and so on", "stop", 1, 3)
    assert drive(server, complete(1))[0].text == ""
    assert server.paths == ["/v1/completions"] * 2
    assert server.bodies[0] == {
        "model": "m",
        "prompt": "<s>Once",
        "temperature": 1.0,
        "max_tokens": 9,
        "seed": 3,
    }


def test_an_answer_cut_at_its_limit_is_returned_as_such_even_when_nothing_was_said_yet(llm_server):
    Answer = llm_server.module.Answer
    server = llm_server(scripted(Answer("half an", "length"), Answer(None, "length")))
    assert ask(server, "a")[0][:2] == ("half an", "length")
    assert ask(server, "b")[0][:2] == ("", "length")


def test_content_in_parts_is_the_text_of_its_parts(llm_server):
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "It "},
        {"type": "text", "text": "is."},
    ]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    assert ask(llm_server(lambda _: llm_server.module.Answer(body=body)))[0].text == "It is."


def test_half_characters_become_replacement_marks(llm_server):
    body = b'{"choices": [{"message": {"content": "a\\ud83db"}, "finish_reason": "stop"}]}'
    reply, _ = ask(llm_server(lambda _: llm_server.module.Answer(body=body)))
    assert reply.text == "a?b"
    with pytest.raises(LLMError, match="unpaired surrogate"):
        ask(llm_server(lambda _: "yes"), "\ud83d")


# --- failures that may pass ---


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 429}, "HTTP 429: scripted"),
        ({"status": 500}, "HTTP 500: scripted"),
        ({"status": 503}, "HTTP 503: scripted"),
        ({"status": 408}, "HTTP 408: scripted"),
        ({"status": 409}, "HTTP 409: scripted"),
        ({"reset": True}, "connection failed: Re"),
        ({"missing_bytes": 5}, "connection failed: RemoteProtocolError"),
        ({"hang": True}, "no answer within timeout_seconds=0.3"),
        (
            {"body": b'{"choices": [{"mess'},
            'the answer is no completion: b\'{"choices": .*mess\' \\(19 bytes\\)',
        ),
        ({"body": b"[" * 9999}, "the answer is no completion: b'\\[\\["),
        (
            {"body": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'},
            "the answer is no completion",
        ),
        ({"body": b"\x00\xff\xfe"}, "the answer is no completion"),
        ({"body": b""}, "the answer is no completion: b'' \\(0 bytes\\)"),
        ({"body": b'{"error": "odd"}'}, 'the answer is no completion: b\'{"error": "odd"}\''),
        ({"num_choices": 0}, "the answer is no completion"),
        (
            {"body": b'{"choices": [{"message": {"content": "a"}}], "usage": [1]}'},
            "the answer is no completion",
        ),
        ({"text": None}, "the answer has no text, but null"),
        ({"text": " \n"}, 'the answer has no text, but " \\\\n"'),
        (
            {"body": b'{"choices": [{"message": {"content": [1]}}]}'},
            "the answer has no text, but \\[1\\]",
        ),
    ],
)
def test_a_failure_that_may_pass_is_tried_again_and_after_a_bound_given_up_with_its_reason(
    llm_server, fault, reason
):
    error, Answer = llm_server.module.error, llm_server.module.Answer
    bad = error(fault["status"]) if "status" in fault else Answer(**fault)
    timeout = 0.3 if "hang" in fault else 30.0
    reply, usage = ask(llm_server(scripted(bad, bad, "yes")), timeout_seconds=timeout)
    assert (reply.text, usage.retries, usage.calls, usage.failures) == ("yes", 2, 1, 0)
    server = llm_server(lambda body: bad)
    with pytest.raises(LLMError, match=rf"m at {server.url}/: {reason}.*\(tried 3 times\)"):
        ask(server, timeout_seconds=timeout, max_retries=2)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for_in_seconds_and_as_a_date(llm_server, as_date):
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    server = llm_server(scripted(llm_server.module.error(429, retry_after=wait), "yes"))
    start = time.monotonic()
    assert ask(server)[0].text == "yes"
    assert 1.0 <= time.monotonic() - start + as_date < 4


def test_a_retry_after_holds_back_every_other_call_too(llm_server):
    server = llm_server(scripted(llm_server.module.error(429, retry_after="1"), "yes"))

    async def two(client):
        first = asyncio.create_task(client.ask(question("a")))
        await asyncio.sleep(0.3)
        start = time.monotonic()
        await client.ask(question("b"))
        await first
        return time.monotonic() - start

    assert 0.6 < drive(server, two)[0] < 3


def test_waits_between_retries_double_with_jitter(llm_server, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.5)
    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    with pytest.raises(LLMError):
        ask(llm_server(lambda body: llm_server.module.error(500)), max_retries=6)
    for seconds, longest in zip(waits, [0.5, 1, 2, 4, 8, 8], strict=True):
        assert longest * 0.75 <= seconds <= longest
    assert waits[4] != waits[5]


# --- failures that are final ---


@pytest.mark.parametrize("status", [400, 403, 413, 422, 501])
def test_other_error_statuses_are_final_at_once(llm_server, status):
    server = llm_server(lambda body: llm_server.module.error(status, "too long"))
    with pytest.raises(LLMError, match=f"m at .*: HTTP {status}: too long$"):
        ask(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ({"refusal": "I will not.", "text": None}, "refused: I will not."),
        ({"finish_reason": "content_filter"}, "refused: content_filter"),
    ],
)
def test_a_refusal_is_final(llm_server, refusal, reason):
    server = llm_server(lambda body: llm_server.module.Answer(**refusal))
    with pytest.raises(LLMError, match=reason):
        ask(server)
    assert len(server.bodies) == 1


def test_a_wrong_key_or_model_is_the_callers_mistake_and_ends_the_run(llm_server, tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(
            ValueError,
            match=r"the API key was refused \(llm.api_key_env, llm.api_key_file\): HTTP 401",
        ):
            ask(llm_server(lambda body: "yes", api_key="another"), journal=journal)
        with pytest.raises(
            ValueError,
            match=r"no such model or address \(llm.model, llm.base_url\): HTTP 404: no m here",
        ):
            ask(llm_server(lambda body: llm_server.module.error(404, "no m here")), journal=journal)
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


@pytest.mark.parametrize("status", [(402, None), (429, "insufficient_quota")])
def test_an_account_without_money_stops_the_run_cleanly(llm_server, status):
    server = llm_server(
        lambda body: llm_server.module.error(status[0], "pay first", code=status[1])
    )
    with pytest.raises(BudgetSpent, match="pay first"):
        ask(server)
    assert len(server.bodies) == 1


# --- JSON ---

SCHEMA = {"type": "object", "properties": {"verdict": {"type": "boolean"}}, "required": ["verdict"]}


def kind_of(body):
    return body.get("response_format", {}).get("type")


@pytest.mark.parametrize(
    ("refused", "status", "message"),
    [
        ({"json_schema"}, 400, "response_format of type json_schema is not supported"),
        ({"json_schema", "json_object"}, 422, "body.response_format: extra field"),
        ({"json_schema"}, 501, "structured output: not implemented"),
    ],
)
def test_json_is_asked_for_less_strictly_where_the_server_refuses_and_this_is_remembered(
    llm_server, refused, status, message
):
    error = llm_server.module.error(status, message)
    server = llm_server(
        lambda body: error if kind_of(body) in refused else '{"verdict": true}', delay_seconds=0.05
    )

    async def use(client):
        replies = await asyncio.gather(
            *(client.ask(question(), draw=n, schema=SCHEMA) for n in range(3))
        )
        return [*replies, await client.ask(question(), draw=9, schema=SCHEMA)]

    replies, usage = drive(server, use)
    assert [reply.text for reply in replies] == ['{"verdict": true}'] * 4
    assert usage.retries == 0
    assert len(server.bodies) == 4 + 3 * len(refused)
    best = ["json_schema", "json_object", None][len(refused)]
    assert [kind_of(body) for body in server.bodies].count(best) == 4
    assert kind_of(server.bodies[-1]) == best


def test_a_schema_is_sent_as_such(llm_server):
    server = llm_server(lambda body: "{}")
    drive(server, lambda client: client.ask(question(), schema=SCHEMA))
    sent = server.bodies[0]["response_format"]
    assert sent == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }


@pytest.mark.parametrize(
    ("mode", "kind"), [("schema", "json_schema"), ("object", "json_object"), ("text", None)]
)
def test_a_json_mode_that_was_named_is_kept(llm_server, mode, kind):
    server = llm_server(lambda body: "{}")
    drive(server, lambda client: client.ask(question(), schema=SCHEMA), json_mode=mode)
    assert kind_of(server.bodies[0]) == kind
    server = llm_server(lambda body: llm_server.module.error(400, "no response_format"))
    with pytest.raises(LLMError, match="HTTP 400: no response_format"):
        drive(server, lambda client: client.ask(question(), schema=SCHEMA), json_mode=mode)


def test_another_complaint_about_a_call_with_a_schema_is_final(llm_server):
    server = llm_server(lambda body: llm_server.module.error(400, "the context is 100 tokens"))
    with pytest.raises(LLMError, match="the context is 100 tokens"):
        drive(server, lambda client: client.ask(question(), schema=SCHEMA))
    assert len(server.bodies) == 1


def test_a_model_that_wants_max_completion_tokens_gets_it(llm_server):
    refusal = llm_server.module.error(
        400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    )
    server = llm_server(lambda body: refusal if "max_tokens" in body else "yes")
    reply, usage = ask(server, max_new_tokens=77)
    assert (reply.text, len(server.bodies), usage.retries) == ("yes", 2, 0)
    assert server.bodies[1]["max_completion_tokens"] == 77


# --- journal ---


def test_what_the_journal_holds_is_never_asked_again(llm_server, tmp_path):
    server = llm_server(lambda body: llm_server.module.Answer(f"answer {len(server.bodies)}"))

    async def use(client):
        first = await client.ask(question("a"))
        others = [
            await client.ask(question("a"), draw=1),
            await client.ask(question("a"), temperature=0.1),
            await client.ask(question("a"), schema=SCHEMA),
            await client.ask(question("b")),
            await client.complete("a"),
        ]
        return [first, *others, await client.ask(question("a"))]

    with Journal(tmp_path / "journal.jsonl") as journal:
        replies, usage = drive(server, use, journal=journal)
        assert [reply.text for reply in replies] == [f"answer {n}" for n in (1, 2, 3, 4, 5, 6, 1)]
        assert (usage.calls, usage.cached_calls) == (6, 1)
    with Journal(tmp_path / "journal.jsonl") as journal:
        again, usage = drive(server, use, journal=journal)
    assert again == replies
    assert (usage.calls, usage.cached_calls, usage.usd) == (0, 7, 0)
    assert len(server.bodies) == 6


def test_equal_asks_at_one_time_share_one_call_even_when_the_first_asker_gives_up(
    llm_server, tmp_path
):
    server = llm_server(lambda body: "yes", delay_seconds=0.3)

    async def use(client):
        tasks = [asyncio.create_task(client.ask(question())) for _ in range(5)]
        await asyncio.sleep(0.1)
        tasks[0].cancel()
        return await asyncio.gather(*tasks[1:])

    with Journal(tmp_path / "journal.jsonl") as journal:
        replies, usage = drive(server, use, journal=journal)
    assert [reply.text for reply in replies] == ["yes"] * 4
    assert (len(server.bodies), usage.calls) == (1, 1)


def test_closing_gives_up_the_calls_in_flight_and_says_nothing_of_them(
    llm_server, tmp_path, caplog
):
    server = llm_server(lambda body: "yes", delay_seconds=30)

    async def use(client):
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.ask(question()), 0.2)

    begun = time.monotonic()
    with Journal(tmp_path / "journal.jsonl") as journal:
        drive(server, use, journal=journal)
    assert time.monotonic() - begun < 10
    assert (len(server.bodies), caplog.text) == (1, "")
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_a_recorded_failure_fails_again_unless_it_is_to_be_retried(llm_server, tmp_path):
    server = llm_server(scripted(llm_server.module.error(400, "too long"), "yes"))
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(LLMError, match="HTTP 400: too long") as first:
            ask(server, journal=journal)
        with pytest.raises(LLMError) as second:
            ask(server, journal=journal)
        assert str(second.value) == str(first.value)
        assert len(server.bodies) == 1
        assert ask(server, journal=journal, retry_failed=True)[0].text == "yes"
        assert ask(server, journal=journal)[0].text == "yes"
    assert len(server.bodies) == 2


def test_a_server_that_is_not_there_is_not_held_against_the_call(llm_server, tmp_path):
    server = llm_server(lambda body: "yes")
    server.close()
    with Journal(tmp_path / "journal.jsonl") as journal:
        with pytest.raises(LLMError, match="connection failed: ConnectError"):
            ask(server, journal=journal, max_retries=1)
        assert ask(llm_server(lambda body: "yes"), journal=journal)[0].text == "yes"


# --- limits ---


def test_no_more_calls_are_in_flight_than_allowed(llm_server):
    server = llm_server(lambda body: "yes", delay_seconds=0.05)

    async def use(client):
        return await asyncio.gather(*(client.ask(question(), draw=n) for n in range(20)))

    drive(server, use, concurrency=4)
    assert server.most_open == 4
    assert server.num_connections <= 4  # kept alive from call to call


def test_requests_are_spaced_to_their_rate(llm_server):
    arrivals = []
    server = llm_server(lambda body: (arrivals.append(time.monotonic()), "yes")[1])

    async def use(client):
        await asyncio.gather(*(client.ask(question(), draw=n) for n in range(6)))

    drive(server, use, requests_per_minute=600)
    gaps = [later - earlier for earlier, later in zip(arrivals, arrivals[1:], strict=False)]
    assert arrivals[-1] - arrivals[0] > 0.45  # five gaps of 0.1 s, less what the first was late
    assert max(gaps) < 1


def test_tokens_are_spaced_to_their_rate_by_what_calls_really_took(llm_server):
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


# --- money ---


def test_a_budget_is_not_overshot_by_calls_at_one_time_and_those_in_flight_are_kept(
    llm_server, tmp_path
):
    # a call costs 0.01 USD and can cost 0.02: of a budget of 0.1 USD nine calls fit, the tenth might not
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
            "0.0900 USD are spent and the next call may cost 0.0200, over llm.budget_usd=0.1: raise it"
        )
        assert len(server.bodies) == 9
        assert usage.usd == pytest.approx(0.09)
    with Journal(tmp_path / "journal.jsonl") as journal:  # a larger budget goes on from there
        again = lambda client: asyncio.gather(*(client.ask(question(), draw=n) for n in range(30)))  # noqa: E731
        _, usage = drive(server, again, journal=journal, budget_usd=1.0, **prices)
    assert (usage.cached_calls, usage.calls, len(server.bodies)) == (9, 21, 30)


def test_tries_that_may_have_cost_are_paid_for_at_their_worst(llm_server):
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


def test_a_budget_without_prices_is_refused():
    with pytest.raises(ValueError, match="llm.budget_usd needs llm.price_in and llm.price_out"):
        LLMConfig(budget_usd=1.0)


# --- keys ---


def test_the_key_is_in_no_error_file_or_representation(llm_server, tmp_path, caplog, capfd):
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


def test_a_key_comes_from_the_environment_or_a_file(llm_server, tmp_path, monkeypatch):
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
def test_a_key_that_no_header_takes_is_refused_without_being_shown(tmp_path, key):
    (tmp_path / "key").write_text(key)
    with pytest.raises(
        ValueError, match="the API key in .*key holds a blank or an odd character"
    ) as caught:
        LLM(LLMConfig(model="m", api_key_file=str(tmp_path / "key")))
    assert "sk" not in str(caught.value).replace(str(tmp_path), "")
    with pytest.raises(
        ValueError,
        match="^llm.api_key_env: give the name of the variable that holds the key, not the key$",
    ):
        LLMConfig(api_key_env="sk-0123")


# --- settings ---


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
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LLMConfig(**changes)


def test_more_items_than_calls_are_worked_on_where_calls_are_many():
    assert [LLMConfig(concurrency=n).items_at_once for n in (1, 3, 16, 64)] == [1, 3, 20, 80]


def test_a_client_without_a_model_is_refused():
    with pytest.raises(ValueError, match="llm.model is not set"):
        LLM(LLMConfig(base_url="http://127.0.0.1:1/v1"))


# --- many items ---


def test_results_keep_the_items_order_and_no_more_than_the_bound_are_in_work():
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


def test_a_hundred_thousand_items_are_never_tasks_all_at_once():
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


def test_after_an_error_no_item_begins_and_those_in_work_are_finished():
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


def test_the_bar_shows_items_failures_and_money(capfd):
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


def test_replies_go_through_json_unchanged():
    reply = Reply("a", "stop", 1, 2)
    assert Reply(**json.loads(json.dumps(reply._asdict()))) == reply


def test_a_program_of_asks_killed_and_started_again_asks_only_for_what_it_never_got(
    llm_server, tmp_path
):
    server = llm_server(lambda body: f"re: {body['messages'][0]['content']}", delay_seconds=0.02)
    (tmp_path / "program.py").write_text(f"""
import asyncio
from pathlib import Path
from verippo.core.llm.journal import Journal
from verippo.core.llm.client import LLM, LLMConfig, gather_in_order

async def main():
    with Journal(Path({str(tmp_path)!r}) / "journal.jsonl") as journal:
        llm = LLM(LLMConfig(base_url={server.url!r}, model="m"), journal=journal)

        async def work(item):
            first = await llm.ask([{{"role": "user", "content": f"first {{item}}"}}])
            return (await llm.ask([{{"role": "user", "content": first.text}}])).text

        print(*await gather_in_order(range(40), work, concurrency=4), sep=",")

asyncio.run(main())
""")
    command = [sys.executable, str(tmp_path / "program.py")]
    for num_calls in (15, 40):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while len(server.bodies) < num_calls and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait(timeout=20)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ",".join(f"re: re: first {n}" for n in range(40))
    assert len(server.calls) == 80
    assert 80 <= len(server.bodies) <= 80 + 2 * 4  # a kill loses what was in flight
