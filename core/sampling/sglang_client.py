"""An sglang server over HTTP: its requests as plain data, one connection each, and errors that name the address.

Every request body is made by a function of its own here, so that it can be held against the server's OpenAPI document.
Servers from 0.5.5 on are understood: a route that an older one lacks answers 404, and the caller falls back.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from .sampler import Completion, SamplingParams
from .sglang_requests import Request, abort_request

PROBE_SECONDS = 10.0
"""time-out of requests that a healthy server answers at once"""


class ServerError(RuntimeError):
    """A server failed: how, and at which address.

    kind: "unreachable" (refused, reset, cut off), "timeout", "broken" (5xx, or an answer that makes no sense) or "refused"
    (4xx: the request is at fault); status: of the HTTP answer, where there was one.
    """

    def __init__(
        self,
        url: str,
        how: str,
        *,
        kind: Literal["unreachable", "timeout", "broken", "refused"],
        status: int | None = None,
    ) -> None:
        super().__init__(f"{url}: {how}")
        self.url, self.kind, self.status = url, kind, status


def read_completion(
    answer: Any,
    params: SamplingParams,
    *,
    url: str,
    stop_token_ids: Sequence[int],
    version: int,
) -> Completion:
    """The answer to a `generate_request`. Raises ServerError when its parts do not belong together, RuntimeError when a
    token was drawn with other weights than `version`."""
    try:
        ids, meta = list(answer["output_ids"]), answer["meta_info"]
        reason, triples = meta["finish_reason"]["type"], meta["output_token_logprobs"]
        logprobs, named = (
            [float(triple[0]) for triple in triples],
            [triple[1] for triple in triples],
        )
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise _broken(
            url, f"the answer lacks what was asked for ({type(error).__name__}: {error})"
        ) from None
    check_version(meta, url=url, version=version)
    if reason == "abort":
        raise _broken(url, f"the request was aborted: {meta['finish_reason'].get('message')}")
    if len(named) != len(ids) or not ids:
        raise _broken(url, f"{len(named)} log-probs for {len(ids)} tokens")
    if named != ids:
        raise _broken(url, "its log-probs are of other tokens than its response")
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise _broken(url, f"a log-prob is not finite: {min(logprobs)}")
    stopped = ids[-1] in stop_token_ids
    if not stopped and (reason != "length" or len(ids) != params.max_new_tokens):
        raise _broken(
            url,
            f"ended ({reason}) after {len(ids)} tokens at id {ids[-1]}, which is no stop token of the trainer's",
        )
    return Completion(
        token_ids=ids,
        logprobs=logprobs,
        finish_reason="stop" if stopped else "length",
        version=version,
    )


def read_scores(
    answer: Any,
    token_ids: Sequence[int],
    *,
    url: str,
    version: int,
) -> list[float]:
    """Log-probs of token_ids[1:] from the answer to a `score_request`. Raises as `read_completion`."""
    try:
        meta = answer["meta_info"]
        logprobs = [float(triple[0]) for triple in meta["input_token_logprobs"][1:]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise _broken(
            url, f"the answer lacks log-probs of the input ({type(error).__name__}: {error})"
        ) from None
    check_version(meta, url=url, version=version)
    if (
        len(logprobs) != len(token_ids) - 1
    ):  # the ids beside them are no check: the vocabulary's last one is given as 0
        raise _broken(url, f"{len(logprobs)} log-probs for {len(token_ids) - 1} tokens")
    return logprobs


def check_version(meta: dict[str, Any], *, url: str, version: int) -> None:
    """Raises RuntimeError unless every token was drawn with the weights of this version."""
    spans = {
        str(span.get("version"))
        for span in meta.get("weight_versions") or []
        if span.get("start") != span.get("end")
    }
    if found := sorted((spans | {str(meta.get("weight_version"))}) - {str(version)}):
        raise RuntimeError(
            f"{url}: drew with weight version {', '.join(found)}, the last one sent is {version}"
        )


def _broken(url: str, how: str) -> ServerError:
    return ServerError(url, how, kind="broken")


class SglangServer:
    """One server. Safe to use from several threads."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Raises ValueError for a malformed address."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ValueError(f"sampler.urls: {url!r}: {error}") from None
        if (
            parts.scheme not in ("http", "https")
            or not host
            or parts.path.strip("/")
            or parts.query
        ):
            raise ValueError(f"sampler.urls: {url!r} is not an address such as http://host:30000")
        self.url, self.host, self.port = f"{parts.scheme}://{parts.netloc}", host, port
        self._make = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._open: dict[
            http.client.HTTPConnection, str | None
        ] = {}  # with the rid of what it waits for
        self._num_cuts = 0
        self._lock = threading.Lock()

    def ask(
        self,
        request: Request,
        *,
        timeout_seconds: float,
        retries: int = 0,
    ) -> Any:
        """The answer's JSON value; of /flush_cache its text. Raises ServerError.

        retries: how often a request that may be repeated is sent again to a server that cannot be reached.
        """
        cuts = self._num_cuts
        for attempt in itertools.count():
            try:
                return self._read(request.path, *self._exchange(request, timeout_seconds))
            except ServerError as error:
                if error.kind != "unreachable" or attempt >= retries or self._num_cuts > cuts:
                    raise
                time.sleep(0.5 * 2**attempt)
        raise AssertionError

    def _exchange(self, request: Request, timeout_seconds: float) -> tuple[int, bytes]:
        connection = self._make(
            self.host, self.port, timeout=min(timeout_seconds, PROBE_SECONDS)
        )  # to connect
        with self._lock:
            self._open[connection] = (request.body or {}).get("rid")
        try:
            connection.connect()
            _keep_alive(connection.sock)
            connection.sock.settimeout(timeout_seconds)
            body = None if request.body is None else json.dumps(request.body)
            connection.request("GET" if body is None else "POST", request.path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            if (
                isinstance(error, TimeoutError)
                and connection.sock is not None
                and error.errno is None
            ):
                how = f"no answer to {request.path} within {timeout_seconds:g} s"
                raise ServerError(self.url, how, kind="timeout") from None
            how = f"{request.path} failed: {type(error).__name__}: {error}"
            raise ServerError(self.url, how, kind="unreachable") from None
        finally:
            with self._lock:
                del self._open[connection]
            connection.close()

    def _read(
        self,
        path: str,
        status: int,
        content: bytes,
    ) -> Any:
        text = content.decode("utf-8", errors="replace")
        if status >= 400:
            kind: Literal["broken", "refused"] = (
                "broken" if status >= 500 or status in (408, 429) else "refused"
            )
            raise ServerError(
                self.url,
                f"answered {path} with {status}: {_message(text)}",
                kind=kind,
                status=status,
            )
        try:
            return json.loads(text) if text else None
        except json.JSONDecodeError:
            if path.startswith("/flush_cache"):
                return text
            raise ServerError(
                self.url, f"answered {path} with what is not JSON: {text[:100]!r}", kind="broken"
            ) from None

    def ask_first(self, requests: Iterable[Request]) -> Any:
        """The answer to the first request whose route the server knows."""
        for request in requests:
            try:
                return self.ask(request, timeout_seconds=PROBE_SECONDS, retries=2)
            except ServerError as error:
                if error.status != 404:
                    raise
        raise ServerError(
            self.url, "answers, but it is no sglang server from 0.5.5 on", kind="refused"
        )

    def info(self) -> dict[str, Any]:
        """How it was started: tp_size, dp_size, context_length and more."""
        return self.ask_first([Request("/server_info"), Request("/get_server_info")])

    def version(self) -> str:
        """The name of the weights that it holds."""
        answer = self.ask_first([Request("/model_info"), Request("/get_model_info")])
        if "weight_version" not in answer:
            answer = self.ask(Request("/get_weight_version"), timeout_seconds=PROBE_SECONDS)
        return str(answer["weight_version"])

    def abort(self) -> None:
        """Ends every request of ours in flight, on the server too where it has a rid. Never raises."""
        with self._lock:
            rids = [rid for rid in self._open.values() if rid]
        with contextlib.suppress(ServerError):  # it is gone or hangs: nothing to save there
            for rid in rids:
                self.ask(abort_request(rid), timeout_seconds=5)
        self.cut()

    def cut(self) -> None:
        """Ends every request in flight from our side: each raises."""
        with self._lock:
            self._num_cuts += 1
            for sock in [
                connection.sock for connection in self._open
            ]:  # the connection itself may drop it meanwhile
                if sock is not None:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)


def _keep_alive(sock: socket.socket) -> None:
    """A machine that is gone without a word is noticed within two minutes, however long an answer may take."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        for option, value in (
            (socket.TCP_KEEPIDLE, 60),
            (socket.TCP_KEEPINTVL, 15),
            (socket.TCP_KEEPCNT, 4),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _message(text: str) -> str:
    """What an error's body says, in one line."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return " ".join(str(body).split())[:300] or "(nothing)"
