from __future__ import annotations

import asyncio
import email.utils
import json
import time

import pytest

from verippo.core.llm.budget import BudgetSpent, Usage
from verippo.core.llm.client import LLMError
from verippo.core.llm.journal import Journal
from verippo.core.llm.transport import Reply

# --- asking ---


def test_ask_sends_its_arguments_and_returns_token_counts(drive, question, llm_server):
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


def test_configured_sampling_is_the_default_of_ask(ask, question, llm_server):
    server = llm_server(lambda body: "yes")
    ask(server, temperature=0.0, max_new_tokens=12)
    assert server.bodies == [
        {"model": "m", "messages": question(), "temperature": 0.0, "max_tokens": 12}
    ]


def test_completion_sends_the_prompt_verbatim_and_may_be_empty(drive, scripted, llm_server):
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


def test_truncated_answer_is_returned_even_without_text(ask, scripted, llm_server):
    Answer = llm_server.module.Answer
    server = llm_server(scripted(Answer("half an", "length"), Answer(None, "length")))
    assert ask(server, "a")[0][:2] == ("half an", "length")
    assert ask(server, "b")[0][:2] == ("", "length")


def test_content_parts_are_joined(ask, llm_server):
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "It "},
        {"type": "text", "text": "is."},
    ]
    body = json.dumps({"choices": [{"message": {"content": parts}}]}).encode()
    assert ask(llm_server(lambda _: llm_server.module.Answer(body=body)))[0].text == "It is."


def test_unpaired_surrogates_are_replaced_in_replies_only(ask, llm_server):
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
            "the answer is not a completion: b'{\"choices\": .*mess' \\(19 bytes\\)",
        ),
        ({"body": b"[" * 9999}, "the answer is not a completion: b'\\[\\["),
        (
            {"body": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'},
            "the answer is not a completion",
        ),
        ({"body": b"\x00\xff\xfe"}, "the answer is not a completion"),
        ({"body": b""}, "the answer is not a completion: b'' \\(0 bytes\\)"),
        ({"body": b'{"error": "odd"}'}, 'the answer is not a completion: b\'{"error": "odd"}\''),
        ({"num_choices": 0}, "the answer is not a completion"),
        (
            {"body": b'{"choices": [{"message": {"content": "a"}}], "usage": [1]}'},
            "the answer is not a completion",
        ),
        ({"text": None}, "the answer has no text, but null"),
        ({"text": " \n"}, 'the answer has no text, but " \\\\n"'),
        (
            {"body": b'{"choices": [{"message": {"content": [1]}}]}'},
            "the answer has no text, but \\[1\\]",
        ),
    ],
)
def test_transient_failure_is_retried_and_finally_reported(
    ask, scripted, llm_server, fault, reason
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
def test_retry_after_is_obeyed_as_seconds_and_as_date(ask, scripted, llm_server, as_date):
    wait = email.utils.formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    server = llm_server(scripted(llm_server.module.error(429, retry_after=wait), "yes"))
    start = time.monotonic()
    assert ask(server)[0].text == "yes"
    assert 1.0 <= time.monotonic() - start + as_date < 4


def test_retry_after_delays_all_calls_of_the_client(drive, question, scripted, llm_server):
    server = llm_server(scripted(llm_server.module.error(429, retry_after="1"), "yes"))

    async def two(client):
        first = asyncio.create_task(client.ask(question("a")))
        await asyncio.sleep(0.3)
        start = time.monotonic()
        await client.ask(question("b"))
        await first
        return time.monotonic() - start

    assert 0.6 < drive(server, two)[0] < 3


def test_waits_between_retries_double_with_jitter(ask, llm_server, monkeypatch):
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
def test_other_error_statuses_are_not_retried(ask, llm_server, status):
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
def test_refusal_is_not_retried(ask, llm_server, refusal, reason):
    server = llm_server(lambda body: llm_server.module.Answer(**refusal))
    with pytest.raises(LLMError, match=reason):
        ask(server)
    assert len(server.bodies) == 1


def test_wrong_key_or_model_is_a_value_error_and_not_journaled(ask, llm_server, tmp_path):
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
def test_empty_account_raises_budget_spent_at_once(ask, llm_server, status):
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
def test_json_mode_is_relaxed_once_the_server_refuses_it(
    drive, question, llm_server, refused, status, message
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


def test_schema_is_sent_in_strict_mode(drive, question, llm_server):
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
def test_configured_json_mode_is_not_relaxed(drive, question, llm_server, mode, kind):
    server = llm_server(lambda body: "{}")
    drive(server, lambda client: client.ask(question(), schema=SCHEMA), json_mode=mode)
    assert kind_of(server.bodies[0]) == kind
    server = llm_server(lambda body: llm_server.module.error(400, "no response_format"))
    with pytest.raises(LLMError, match="HTTP 400: no response_format"):
        drive(server, lambda client: client.ask(question(), schema=SCHEMA), json_mode=mode)


def test_unrelated_complaint_does_not_relax_json_mode(drive, question, llm_server):
    server = llm_server(lambda body: llm_server.module.error(400, "the context is 100 tokens"))
    with pytest.raises(LLMError, match="the context is 100 tokens"):
        drive(server, lambda client: client.ask(question(), schema=SCHEMA))
    assert len(server.bodies) == 1


def test_max_completion_tokens_is_used_when_demanded(ask, llm_server):
    refusal = llm_server.module.error(
        400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    )
    server = llm_server(lambda body: refusal if "max_tokens" in body else "yes")
    reply, usage = ask(server, max_new_tokens=77)
    assert (reply.text, len(server.bodies), usage.retries) == ("yes", 2, 0)
    assert server.bodies[1]["max_completion_tokens"] == 77
