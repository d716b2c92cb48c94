"""HTTP client of one sglang server; its errors name the address.

It works with servers of version 0.5.5 or newer. Where a route is newer than that, an older server
answers 404 and the caller uses another route.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit
from weakref import WeakSet

from ..http_library import httpx
from .sampler import Completion, SamplingParams
from .sglang_requests import Request, abort_request

PROBE_SECONDS = 10.0
"""Timeout of requests that a healthy server answers at once."""

KEEP_ALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
        if hasattr(socket, name)  # Linux
    ),
]
"""Socket options that detect a dead machine within two minutes, however long an answer takes."""


class ServerError(RuntimeError):
    """Failure of a server.

    Attributes:
        url: address of the server.
        kind: "unreachable" (connection refused, reset or closed), "timeout", "broken" (status 5xx,
            or an invalid answer) or "refused" (status 4xx: the request is at fault).
        status: HTTP status of the answer, if there was one.
    """

    def __init__(
        self,
        url: str,
        problem: str,
        *,
        kind: Literal["unreachable", "timeout", "broken", "refused"],
        status: int | None = None,
    ) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.kind = kind
        self.status = status


def read_completion(
    answer: Any,
    params: SamplingParams,
    *,
    url: str,
    stop_token_ids: Sequence[int],
    version: int,
) -> Completion:
    """Reads the answer to a `generate_request`.

    Args:
        answer: JSON value of the answer.
        params: parameters of the request.
        url: address of the server, for errors.
        stop_token_ids: ids that end a response.
        version: weight version that the server must have used.

    Returns:
        The response.

    Raises:
        ServerError: the answer is incomplete or contradicts itself.
        RuntimeError: a token was drawn with another weight version.
    """
    try:
        ids = list(answer["output_ids"])
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"]]
        logprob_ids = [entry[1] for entry in meta["output_token_logprobs"]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise _incomplete(url, error) from None
    check_version(meta, url=url, version=version)
    stopped = bool(ids) and ids[-1] in stop_token_ids
    if reason == "abort":
        problem = f"the request was aborted: {meta['finish_reason'].get('message')}"
    elif len(logprobs) != len(ids) or not ids:
        problem = f"the answer has {len(logprobs)} log-probs for {len(ids)} tokens"
    elif logprob_ids != ids:
        problem = "the log-probs belong to other tokens than those of the response"
    elif not all(math.isfinite(logprob) for logprob in logprobs):
        problem = f"a log-prob is not finite: {min(logprobs)}"
    elif not stopped and (reason != "length" or len(ids) != params.max_new_tokens):
        problem = (
            f"the response ended ({reason}) after {len(ids)} tokens at id {ids[-1]}, which is not "
            "a stop token of the trainer"
        )
    else:
        return Completion(
            token_ids=ids,
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            version=version,
        )
    raise ServerError(url, problem, kind="broken")


def read_scores(
    answer: Any,
    token_ids: Sequence[int],
    *,
    url: str,
    version: int,
) -> list[float]:
    """Reads the answer to a `score_request`.

    Args:
        answer: JSON value of the answer.
        token_ids: the sequence that was scored.
        url: address of the server, for errors.
        version: weight version that the server must have used.

    Returns:
        Log-probs of the tokens from the second on, in nats.

    Raises:
        ServerError: the answer does not have one log-prob for each of these tokens.
        RuntimeError: the server used another weight version.
    """
    try:
        meta = answer["meta_info"]
        logprobs = [float(entry[0]) for entry in meta["input_token_logprobs"][1:]]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise _incomplete(url, error) from None
    check_version(meta, url=url, version=version)
    # the ids of the entries cannot be checked: sglang reports the last of the vocabulary as 0
    if len(logprobs) != len(token_ids) - 1:
        problem = f"the answer has {len(logprobs)} log-probs for {len(token_ids) - 1} tokens"
        raise ServerError(url, problem, kind="broken")
    return logprobs


def check_version(meta: dict[str, Any], *, url: str, version: int) -> None:
    """Checks that one weight version was used for all tokens of an answer.

    Args:
        meta: the `meta_info` of the answer.
        url: address of the server, for errors.
        version: the version expected.

    Raises:
        RuntimeError: another version was used.
    """
    versions = {
        str(span.get("version"))
        for span in meta.get("weight_versions") or []
        if span.get("start") != span.get("end")
    }
    if others := sorted((versions | {str(meta.get("weight_version"))}) - {str(version)}):
        raise RuntimeError(
            f"{url}: used weight version {', '.join(others)}, the last one sent is {version}"
        )


def _incomplete(url: str, error: Exception) -> ServerError:
    problem = f"the answer is incomplete ({type(error).__name__}: {error})"
    return ServerError(url, problem, kind="broken")


class SglangServer:
    """Client of one server. It can be used from several threads."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Args:
        url: address, such as http://host:30000; the scheme may be left out.
        api_key: key that the server requires.

        Raises:
            ValueError: the address is malformed.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            is_origin = parts.hostname and not parts.path.strip("/") and not parts.query
            if parts.scheme not in ("http", "https") or not is_origin or parts.port == 0:
                raise ValueError("this is not an address such as http://host:30000")
            # a user name and password would be shown in errors, and are not used
            self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            self.host = str(parts.hostname)
            transport = httpx.HTTPTransport(
                verify=ssl.create_default_context(),  # the system's certificates
                # a new connection for each request: a server may close an idle one at any time
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                socket_options=KEEP_ALIVE,
            )
            self._http = httpx.Client(
                base_url=self.url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                transport=transport,
                trust_env=False,
            )
        except (ValueError, httpx.InvalidURL) as error:
            raise ValueError(f"sampler.urls: {url!r}: {error}") from None
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self._request_ids: set[str] = set()
        self._num_cuts = 0
        self._lock = threading.Lock()

    def ask(
        self,
        request: Request,
        *,
        timeout_seconds: float = PROBE_SECONDS,
        retries: int = 0,
    ) -> Any:
        """Sends a request.

        Args:
            request: what to send.
            timeout_seconds: limit of each wait for the server; the default is for requests that a
                healthy server answers at once.
            retries: how often to repeat the request while the server cannot be reached; only for
                requests that may safely be sent twice.

        Returns:
            JSON value of the answer; for /flush_cache its text.

        Raises:
            ServerError: the request failed.
        """
        num_cuts = self._num_cuts
        for attempt in range(retries):
            try:
                return self._ask_once(request, timeout_seconds)
            except ServerError as error:
                if error.kind != "unreachable" or self._num_cuts > num_cuts:
                    raise
            time.sleep(0.5 * 2**attempt)
        return self._ask_once(request, timeout_seconds)

    def _ask_once(self, request: Request, timeout_seconds: float) -> Any:
        path, body = request
        request_id = (body or {}).get("rid", "")
        start = time.monotonic()
        self._request_ids.add(request_id)
        try:
            response = self._http.request(
                "GET" if body is None else "POST",
                path,
                json=body,
                timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, PROBE_SECONDS)),
                extensions={"trace": self._record_socket},
            )
        except httpx.HTTPError as error:
            # a broken connection is a timeout to httpx too, but an earlier one
            is_timeout = isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout))
            if is_timeout and time.monotonic() - start >= timeout_seconds:
                problem = f"no answer to {path} within {timeout_seconds:g} s"
                raise ServerError(self.url, problem, kind="timeout") from None
            problem = f"{path} failed: {type(error).__name__}: {error}"
            raise ServerError(self.url, problem, kind="unreachable") from None
        finally:
            self._request_ids.discard(request_id)
        return self._read(path, response)

    def _record_socket(self, event: str, info: Mapping[str, Any]) -> None:
        """Traces httpx's requests, to know the connections that `cut` must close."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._sockets.add(info["return_value"].get_extra_info("socket"))

    def _read(self, path: str, response: Any) -> Any:
        status = response.status_code
        if status >= 400:
            is_broken = status >= 500 or status in (408, 429)
            raise ServerError(
                self.url,
                f"answered {path} with {status}: {_error_message(response.text)}",
                kind="broken" if is_broken else "refused",
                status=status,
            )
        try:
            return json.loads(response.text or "null")
        except json.JSONDecodeError:
            if path.startswith("/flush_cache"):
                return response.text
            problem = f"the answer to {path} is not JSON: {response.text[:100]!r}"
            raise ServerError(self.url, problem, kind="broken") from None

    def ask_first(self, *paths: str) -> Any:
        """Sends a GET request to the first of these routes that the server has.

        Args:
            paths: routes, the preferred one first.

        Returns:
            JSON value of the answer.

        Raises:
            ServerError: the request failed, or the server has none of the routes.
        """
        for path in paths:
            try:
                return self.ask(Request(path), retries=2)
            except ServerError as error:
                if error.status != 404:
                    raise
        problem = "answers, but is not an sglang server of version 0.5.5 or newer"
        raise ServerError(self.url, problem, kind="refused")

    def info(self) -> dict[str, Any]:
        """Settings that the server was started with: tp_size, dp_size, context_length and more."""
        return self.ask_first("/server_info", "/get_server_info")

    def version(self) -> str:
        """Version of the weights that the server holds."""
        answer = self.ask_first("/model_info", "/get_model_info")
        if "weight_version" not in answer:
            answer = self.ask(Request("/get_weight_version"))
        return str(answer["weight_version"])

    def abort(self) -> None:
        """Ends every request in flight; those with a request id on the server too. Never raises."""
        with contextlib.suppress(ServerError):  # a server that cannot be reached runs nothing
            for request_id in self._request_ids.copy() - {""}:
                self.ask(abort_request(request_id), timeout_seconds=5)
        self.cut()

    def cut(self) -> None:
        """Closes the connection of every request in flight; each raises ServerError."""
        with self._lock:
            self._num_cuts += 1
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):  # closed meanwhile
                sock.shutdown(socket.SHUT_RDWR)


def _error_message(text: str) -> str:
    """The message in the body of an error, in one line."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            body = body[key]
    return " ".join(str(body).split())[:300] or "(empty)"
