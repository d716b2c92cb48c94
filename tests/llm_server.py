"""A scripted server that speaks OpenAI's protocol, for tests: chat completions, completions, models.

In a test, by the fixture:   server = llm_server(lambda body: "True" if "fever" in body["messages"][-1]["content"] else "False")
As a process of its own:     python tests/llm_server.py --delay_seconds 0.2 --text True      prints its base URL
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What the server does with one request; the defaults make it a plain good answer."""

    text: str | None = "ok"
    finish_reason: str = "stop"
    refusal: str | None = None
    prompt_tokens: int | None = None
    """default: the words of the request's texts"""
    completion_tokens: int | None = None
    """default: the words of the text"""
    num_choices: int = 1
    usage: bool = True
    """whether the answer counts its tokens"""
    delay_seconds: float = 0.0
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 never changed
    body: bytes | None = None
    """sent in place of a well-formed answer: {"error": ...}, half of a JSON, bytes that are no text"""
    missing_bytes: int = 0
    """how many bytes of the announced body are not sent before the connection ends"""
    reset: bool = False
    """the connection is reset before any answer"""
    hang: bool = False
    """no answer ever comes"""


def error(
    status: int, message: str = "scripted", *, code: str | None = None, **headers: str
) -> Answer:
    """An error status; `retry_after="2"` becomes the header Retry-After."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Answer(
        status=status,
        body=body,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def request_key(body: dict[str, Any]) -> str:
    """Equal bodies, equal keys."""
    return json.dumps(body, sort_keys=True, ensure_ascii=False)


class LLMServer:
    """Listens on a free port of 127.0.0.1 in a thread until closed.

    answer: request body -> a text or an Answer; it is called in the server's thread, once a request.
    api_key: every other key gets 401, with the refused key in the message, as careless servers do.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str | Answer],
        *,
        api_key: str | None = None,
        delay_seconds: float = 0.0,
    ) -> None:
        self.answer, self.api_key, self.delay_seconds = answer, api_key, delay_seconds
        self.bodies: list[dict[str, Any]] = []
        """of every request so far, in order of arrival"""
        self.calls: Counter[str] = Counter()
        """requests by `request_key(body)`"""
        self.paths: list[str] = []
        self.num_open, self.most_open = 0, 0
        """requests being answered now, and the most there were at once"""
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
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
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
        self.num_connections += 1
        with contextlib.suppress(
            asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError
        ):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head[1:])
                }
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                self.num_open += 1
                self.most_open = max(self.most_open, self.num_open)
                try:
                    if not await self._respond(head[0].split()[1], headers, data, writer):
                        return
                finally:
                    self.num_open -= 1
        writer.close()

    async def _respond(
        self, path: str, headers: dict[str, str], data: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers one request; False when the connection is gone."""
        body = json.loads(data) if data else {}
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key is not None and given != self.api_key:
            reply = error(401, f"Incorrect API key provided: {given}")
        elif path.endswith("/models"):
            reply = Answer(
                body=json.dumps(
                    {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
                ).encode()
            )
        else:
            self.bodies.append(body)
            self.paths.append(path)
            self.calls[request_key(body)] += 1
            try:
                scripted = self.answer(body)
            except (
                Exception
            ) as fault:  # a final error, so that the test fails at once and by its name
                scripted = error(418, f"the test's script failed: {fault!r}")
            reply = Answer(text=scripted) if isinstance(scripted, str) else scripted
        await asyncio.sleep(self.delay_seconds + reply.delay_seconds)
        if reply.hang:
            await asyncio.sleep(3600)
        if reply.reset:
            writer.transport.abort()
            return False
        content = reply.body if reply.body is not None else _completion(body, reply)
        fields = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
        } | reply.headers
        head = "".join(
            [
                f"HTTP/1.1 {reply.status} Scripted\r\n",
                *(f"{name}: {value}\r\n" for name, value in fields.items()),
            ]
        )
        writer.write(f"{head}\r\n".encode() + content[: len(content) - reply.missing_bytes])
        await writer.drain()
        if reply.missing_bytes:
            writer.close()
        return not reply.missing_bytes


def _completion(body: dict[str, Any], reply: Answer) -> bytes:
    texts = (
        [str(message["content"]) for message in body["messages"]]
        if "messages" in body
        else [str(body.get("prompt", ""))]
    )
    choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish_reason}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": reply.text, "refusal": reply.refusal}
    else:
        choice["text"] = reply.text
    prompt_tokens, tokens = reply.prompt_tokens, reply.completion_tokens
    prompt_tokens = (
        sum(len(text.split()) for text in texts) if prompt_tokens is None else prompt_tokens
    )
    tokens = len((reply.text or "").split()) if tokens is None else tokens
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
    content = {
        "id": "scripted",
        "object": "chat.completion" if "messages" in body else "text_completion",
        "created": 0,
        "model": body.get("model", ""),
        "choices": [choice] * reply.num_choices,
        **({"usage": usage} if reply.usage else {}),
    }
    return json.dumps(content).encode()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay_seconds", type=float, default=0.0)
    parser.add_argument("--text", default="ok")
    options = parser.parse_args()
    server = LLMServer(lambda body: options.text, delay_seconds=options.delay_seconds)
    print(server.url, flush=True)
    server._thread.join()


if __name__ == "__main__":
    main()
