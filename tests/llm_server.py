"""A scripted server with OpenAI's protocol, for tests: chat completions, completions, models.

By the fixture:  server = llm_server(lambda body: "True" if "fever" in str(body) else "False")
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """Answer to one request; by default a well-formed completion."""

    text: str | None = "ok"
    finish_reason: str = "stop"
    refusal: str | None = None
    prompt_tokens: int | None = None
    """By default the number of words of the request."""
    completion_tokens: int | None = None
    """By default the number of words of the text."""
    num_choices: int = 1
    usage: bool = True
    """Whether the answer reports its tokens."""
    delay_seconds: float = 0.0
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 never changed
    body: bytes | None = None
    """Sent instead of a completion, such as an error or damaged JSON."""
    missing_bytes: int = 0
    """Number of bytes of the announced body that are not sent before the connection ends."""
    reset: bool = False
    """Whether the connection is reset instead of an answer."""
    hang: bool = False
    """Whether the answer never comes."""


def error(
    status: int, message: str = "scripted", *, code: str | None = None, **headers: str
) -> Answer:
    """An error status; `retry_after="2"` becomes the header Retry-After."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, body=body, headers=named)


def request_key(body: dict[str, Any]) -> str:
    """Equal bodies have equal keys."""
    return json.dumps(body, sort_keys=True, ensure_ascii=False)


class LLMServer:
    """Serves in a thread, on a free port of 127.0.0.1, until it is closed.

    Attributes:
        bodies: the bodies of all requests so far, in order of arrival.
        calls: number of requests by `request_key(body)`.
        paths: the paths of all requests so far.
        num_open: requests being answered.
        most_open: the largest value of num_open so far.
        num_connections: connections accepted so far.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | Answer],
        *,
        api_key: str | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        """Args:
        answer: request body -> a text or an Answer; called once per request, in the thread.
        api_key: any other key is refused with status 401 and quoted in the message, as some
            servers do; None accepts every key.
        delay_seconds: delay of every answer.
        """
        self.answer = answer
        self.api_key = api_key
        self.delay_seconds = delay_seconds
        self.bodies: list[dict[str, Any]] = []
        self.calls: Counter[str] = Counter()
        self.paths: list[str] = []
        self.num_open = 0
        self.most_open = 0
        self.num_connections = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        )
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._started.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def close(self) -> None:
        """Stops listening and drops every connection."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._server.close)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of one connection."""
        self.num_connections += 1
        dropped = (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError)
        with contextlib.suppress(*dropped):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                fields = (line.partition(":") for line in head[1:])
                headers = {name.lower(): value.strip() for name, _, value in fields}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                self.num_open += 1
                self.most_open = max(self.most_open, self.num_open)
                try:
                    reply = self._reply(head[0].split()[1], headers, json.loads(data or b"{}"))
                    if not await self._send(reply, writer):
                        return
                finally:
                    self.num_open -= 1
        writer.close()

    def _reply(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        """The answer to a request, with its body."""
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and key != self.api_key:
            return error(401, f"Incorrect API key provided: {key}")
        if path.endswith("/models"):
            models = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
            return Answer(body=json.dumps(models).encode())
        self.bodies.append(body)
        self.paths.append(path)
        self.calls[request_key(body)] += 1
        try:
            scripted = self.answer(body)
        except Exception as fault:  # a permanent error fails the test at once, with the reason
            return error(418, f"the test's script failed: {fault!r}")
        answer = Answer(text=scripted) if isinstance(scripted, str) else scripted
        return answer if answer.body is not None else answer._replace(body=completion(body, answer))

    async def _send(self, reply: Answer, writer: asyncio.StreamWriter) -> bool:
        """Sends an answer; returns whether the connection is still open."""
        await asyncio.sleep(self.delay_seconds + reply.delay_seconds)
        if reply.hang:
            await asyncio.sleep(3600)
        if reply.reset:
            writer.transport.abort()
            return False
        content = reply.body or b""
        fields = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        lines = [f"{name}: {value}\r\n" for name, value in (fields | reply.headers).items()]
        head = f"HTTP/1.1 {reply.status} Scripted\r\n{''.join(lines)}\r\n"
        writer.write(head.encode() + content[: len(content) - reply.missing_bytes])
        await writer.drain()
        if reply.missing_bytes:
            writer.close()
        return not reply.missing_bytes


def completion(body: dict[str, Any], answer: Answer) -> bytes:
    """The body of a well-formed completion."""
    is_chat = "messages" in body
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.finish_reason}
    if is_chat:
        prompt = " ".join(str(message["content"]) for message in body["messages"])
        message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
        choice["message"] = message
    else:
        prompt = str(body.get("prompt", ""))
        choice["text"] = answer.text
    num_in = answer.prompt_tokens
    num_out = answer.completion_tokens
    usage = {
        "prompt_tokens": len(prompt.split()) if num_in is None else num_in,
        "completion_tokens": len((answer.text or "").split()) if num_out is None else num_out,
    }
    content = {
        "id": "scripted",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": body.get("model", ""),
        "choices": [choice] * answer.num_choices,
    }
    if answer.usage:
        content["usage"] = usage | {"total_tokens": sum(usage.values())}
    return json.dumps(content).encode()
