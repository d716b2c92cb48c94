"""SglangSampler with scripted servers, which fail on demand. For a real one see tests/sglang."""

from __future__ import annotations

import base64
import json
import math
import pickle
import re
import signal
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.sampling import weight_sync
from verippo.core.sampling.sampler import Prompt, SamplingParams, ServedSampler
from verippo.core.sampling.sglang_client import ServerError, SglangServer
from verippo.core.sampling.sglang_requests import Request, broadcast_request
from verippo.core.sampling.sglang_sampler import SglangConfig, SglangSampler
from verippo.core.sampling.weight_sync import buckets

STOP = 2
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)
WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(262_140),
    "c": torch.full((2,), 7.0, dtype=torch.bfloat16),
}


class ScriptedServer(ThreadingHTTPServer):
    """A fake sglang server that records every request and has a weight version.

    `script(path, body)` returns (status, bytes), or None for the usual answer. The usual response
    to a prompt is [last id of the prompt, stop token].
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script=lambda path, body: None, *, old=False, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.script, self.version, self.asked, self.lock = script, "default", [], threading.Lock()
        self.missing = (
            ("/server_info", "/model_info", "/begin_weight_update", "/end_weight_update")
            if old
            else ()
        )
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def usual(self, path, body):
        if path in ("/server_info", "/get_server_info"):
            return {"tp_size": 1, "dp_size": 1, "context_length": None}
        if path in ("/model_info", "/get_model_info"):
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path.startswith("/update_weights_from"):
            self.version = body["weight_version"]
        if path == "/generate":
            return self.completion(body)
        return {"success": True, "message": "Success"}

    def completion(self, body, *, ids=None, logprobs=None, reason=None, version=None, spans=None):
        ids = [body["input_ids"][-1], STOP] if ids is None else ids
        logprobs = [-0.25] * len(ids) if logprobs is None else logprobs
        version = version or self.version
        return {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": reason or {"type": "stop", "matched": STOP},
                "weight_version": version,
                "weight_versions": spans or [{"version": version, "start": 0, "end": len(ids)}],
                "output_token_logprobs": [
                    [logprob, id, None] for logprob, id in zip(logprobs, ids, strict=False)
                ],
                "input_token_logprobs": [
                    [-0.5 if n else None, id, None] for n, id in enumerate(body["input_ids"])
                ],
            },
        }

    def paths(self):
        return [path for path, _ in self.asked]

    def prompts(self):
        return [body["input_ids"] for path, body in self.asked if path == "/generate"]

    def handle_error(self, request, client_address):
        pass  # connections closed by the test


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, content = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        with server.lock:
            server.asked.append((self.path, body))
            server.headers = dict(self.headers)
        answer = (
            (404, b'{"detail": "Not Found"}')
            if self.path in server.missing
            else server.script(self.path, body)
        )
        status, content = answer or (200, json.dumps(server.usual(self.path, body)).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    started = []

    def start(*arguments, **options):
        started.append(ScriptedServer(*arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture
def connect(tmp_path):
    """Makes a sampler of these servers, which has sent version 0 of the weights."""

    def make(*servers, push=True, context=100, **fields):
        fields = {
            "urls": ",".join(server.url for server in servers),
            "timeout_seconds": 10.0,
            "retries": 0,
        } | fields
        sampler = SglangSampler(
            SglangConfig(**fields),
            stop_token_ids=(STOP,),
            vocabulary=50,
            context=context,
            folder=tmp_path / "sync",
        )
        if push:
            sampler.update_weights(WEIGHTS.items(), 0)
            for server in servers:
                server.asked.clear()
        return sampler

    return make


def prompts(*lengths):
    """Prompts of these lengths; the last id identifies the prompt."""
    return [
        Prompt(token_ids=[7] * (length - 1) + [10 + n], seed=n) for n, length in enumerate(lengths)
    ]


def on_generate(answer):
    return lambda path, body: answer(body) if path == "/generate" else None


def as_json(value):
    return 200, json.dumps(value).encode()


def refused_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}")


# --- responses ---


def test_responses_are_in_order_and_the_longest_prompt_is_sent_first(serve, connect):
    server = serve()
    sampler = connect(server, concurrency=1)
    completions = sampler.generate(prompts(3, 5, 4, 5), GREEDY)
    assert [c.token_ids for c in completions] == [[10, STOP], [11, STOP], [12, STOP], [13, STOP]]
    assert [(c.logprobs, c.finish_reason, c.version) for c in completions] == [
        ([-0.25, -0.25], "stop", 0)
    ] * 4
    assert [ids[-1] for ids in server.prompts()] == [11, 13, 12, 10]
    assert sampler.generate([], GREEDY) == []


def test_a_request_has_all_sampling_parameters(serve, connect):
    server = serve()
    prompt = Prompt(token_ids=[5, 6], seed=2**63 - 1)
    connect(server, api_key_env="HOME", context=None).generate(
        [prompt], SamplingParams(temperature=0.7)
    )
    ((path, body),) = server.asked
    assert path == "/generate"
    assert body["input_ids"] == [5, 6]
    assert body["return_logprob"] is True
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "max_new_tokens": 1024,
        "stop_token_ids": [STOP],
        "sampling_seed": 2**63 - 1,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert server.headers["Authorization"].startswith("Bearer /")


def test_a_response_of_max_new_tokens_counts_as_truncated(serve, connect):
    def answer(body):
        return as_json(server.completion(body, ids=[9] * 8, reason={"type": "length", "length": 8}))

    server = serve(on_generate(answer))
    (completion,) = connect(server).generate(prompts(3), GREEDY)
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 8)


def test_the_server_with_the_fewest_outstanding_tokens_is_chosen(serve, connect):
    first, second = serve(), serve()
    fleet = connect(first, second).fleet
    with fleet.lend(100) as server:
        assert server.url == first.url
        with fleet.lend(60) as server:
            assert server.url == second.url
            with fleet.lend(50) as server:
                assert server.url == second.url  # 60 against 100
                with fleet.lend(1) as server:
                    assert server.url == first.url  # 110 against 100
        with fleet.lend(5) as server:
            assert server.url == second.url  # what was answered counts no more


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 50], "prompt 1 has token id 50, vocabulary is 50"),
        ([-1], "prompt 1 has token id -1"),
        ([], "prompt 1 is empty"),
        ([5] * 33, "prompt 1 has 33 tokens, with max_new_tokens=8 over the model's context of 40"),
    ],
)
def test_an_invalid_prompt_is_never_sent(serve, connect, prompt, message):
    server = serve(
        lambda path, body: as_json({"context_length": 40}) if path == "/server_info" else None
    )
    with pytest.raises(ValueError, match=message):
        connect(server).generate([*prompts(3), Prompt(token_ids=prompt)], GREEDY)
    assert server.prompts() == []


def test_the_progress_bar_shows_responses_and_tokens_per_second(serve, connect, capsys):
    server = serve(on_generate(lambda body: time.sleep(0.12)))
    sampler = connect(server, concurrency=1)
    sampler.progress = True
    sampler.generate(prompts(3, 4, 5), GREEDY)
    assert re.search(r"rollout: .* 2/3 .*response/s, 1\d tokens/s", capsys.readouterr().err)


# --- faults ---


def broken_answers(server, body):
    good = server.completion(body)
    return {
        "500": (
            (500, b'{"error": {"message": "out of memory"}}'),
            "answered /generate with 500: out of memory",
        ),
        "garbage": ((200, b"<html>proxy"), "is not JSON: '<html>proxy'"),
        "torn": ((200, json.dumps(good).encode()[:-9]), "the answer to /generate is not JSON"),
        "list": (as_json([good]), "the answer is incomplete"),
        "no log-probs": (as_json(good | {"meta_info": {}}), "the answer is incomplete"),
        "too few log-probs": (
            as_json(server.completion(body, logprobs=[-1.0])),
            "1 log-probs for 2 tokens",
        ),
        "no tokens": (as_json(server.completion(body, ids=[])), "0 log-probs for 0 tokens"),
        "other log-probs": (
            as_json(good | {"output_ids": [9, STOP]}),
            "the log-probs belong to other tokens than those of the response",
        ),
        "not finite": (
            as_json(server.completion(body, logprobs=[-1.0, -math.inf])),
            "a log-prob is not finite: -inf",
        ),
        "aborted": (
            as_json(server.completion(body, reason={"type": "abort", "message": "by hand"})),
            "aborted: by hand",
        ),
        "another stop": (
            as_json(server.completion(body, ids=[5, 6])),
            r"ended \(stop\) after 2 tokens at id 6, which is no",
        ),
        "cut short": (
            as_json(server.completion(body, ids=[5], reason={"type": "length"})),
            r"ended \(length\) after 1 tokens at id 5",
        ),
    }


@pytest.mark.parametrize(
    "fault",
    [
        "500",
        "garbage",
        "torn",
        "list",
        "no log-probs",
        "too few log-probs",
        "no tokens",
        "other log-probs",
        "not finite",
        "aborted",
        "another stop",
        "cut short",
    ],
)
def test_prompts_of_a_server_with_invalid_answers_go_to_the_others(serve, connect, capsys, fault):
    bad = serve(on_generate(lambda body: broken_answers(bad, body)[fault][0]))
    message = broken_answers(bad, {"input_ids": [1]})[fault][1]
    good = serve()
    sampler = connect(bad, good)
    completions = sampler.generate(prompts(3, 4, 5, 6), GREEDY)
    assert [c.token_ids[0] for c in completions] == [10, 11, 12, 13]
    assert sorted(ids[-1] for ids in good.prompts()) == [10, 11, 12, 13]
    assert list(sampler.fleet.failures) == [bad.url]
    assert f"server excluded: {bad.url}: " in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=f"no sglang server is left: {bad.url}: .*{message}"):
        connect(bad).generate(prompts(3, 4), GREEDY)


def test_a_transient_failure_is_retried(serve, connect):
    failures = iter([(503, b"busy"), (200, b"{")])
    server = serve(on_generate(lambda body: next(failures, None)))
    (completion,) = connect(server, retries=2).generate(prompts(3), GREEDY)
    assert completion.token_ids == [10, STOP]
    assert len(server.prompts()) == 3


def test_failures_in_flight_at_the_same_time_count_once(serve, connect):
    together = threading.Barrier(8)

    def answer(body):
        if len(server.prompts()) <= 8:
            together.wait(5)
            return 500, b""
        return None

    server = serve(on_generate(answer))
    assert len(connect(server, retries=1).generate(prompts(*[3] * 8), GREEDY)) == 8


def test_a_refused_request_ends_the_rollout_with_the_reason(serve, connect):
    server = serve(
        on_generate(lambda body: (400, b'{"error": {"message": "max_new_tokens is\\n too large"}}'))
    )
    with pytest.raises(
        RuntimeError,
        match=f"{server.url}: answered /generate with 400: max_new_tokens is too large",
    ):
        connect(server, retries=5).generate(prompts(3), GREEDY)
    assert len(server.prompts()) == 1


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"version": "4"}, "4"),
        (
            {
                "spans": [
                    {"version": "4", "start": 0, "end": 1},
                    {"version": "0", "start": 1, "end": 2},
                ]
            },
            "4",
        ),
    ],
)
def test_responses_of_another_weight_version_are_refused(serve, connect, answer, found):
    server = serve(on_generate(lambda body: as_json(server.completion(body, **answer))))
    message = f"{server.url}: used weight version {found}, the last one sent is 0"
    with pytest.raises(RuntimeError, match=message):
        connect(server, retries=5).generate(prompts(3), GREEDY)
    assert len(server.prompts()) == 1


def test_a_server_that_hangs_is_excluded_after_the_timeout(serve, connect):
    never = threading.Event()
    hanging = serve(on_generate(lambda body: never.wait(20)))
    good = serve()
    sampler = connect(hanging, good, timeout_seconds=1.0)
    start = time.monotonic()
    completions = sampler.generate(prompts(*[4] * 10), GREEDY)
    assert time.monotonic() - start < 4
    assert [c.token_ids[0] for c in completions] == list(range(10, 20))
    assert sorted(ids[-1] for ids in good.prompts()) == list(range(10, 20))
    assert 0 < len(hanging.prompts()) < 10
    with pytest.raises(RuntimeError, match=f"{hanging.url}: no answer to /generate within 1 s"):
        connect(hanging, timeout_seconds=1.0).generate(prompts(3), GREEDY)
    never.set()


def test_with_no_server_left_the_error_lists_all_failures(serve, connect, capsys):
    first, second = serve(), serve(on_generate(lambda body: (500, b"boom")))
    sampler = connect(first, second)
    first.shutdown()
    first.server_close()
    with pytest.raises(
        RuntimeError,
        match=f"no sglang server is left: .*{first.url}: /generate failed: ConnectError: .*refused",
    ):
        sampler.generate(prompts(3, 4, 5), GREEDY)
    assert {first.url, second.url} == set(sampler.fleet.failures)


def test_addresses_without_an_sglang_server_are_refused(serve, connect):
    nothing = refused_port()
    with pytest.raises(
        ValueError,
        match=f"sampler.urls: no sglang server is left: {nothing.url}: /server_info failed",
    ):
        connect(nothing)
    other = serve(lambda path, body: (404, b"not here"))
    with pytest.raises(
        ValueError,
        match=f"{other.url}: answers, but is not an sglang server of version 0.5.5 or newer",
    ):
        connect(other)
    with pytest.raises(ValueError, match="'ftp://x': this is not an address such as"):
        SglangServer("ftp://x")
    with pytest.raises(
        ValueError, match="sampler.urls: 'http://host:3000O': Port could not be cast"
    ):
        SglangServer("http://host:3000O")
    with pytest.raises(ValueError, match="sampler.urls=', ': there is no address in it"):
        connect(urls=", ")
    good = serve()
    assert [server.url for server in connect(nothing, good, push=False).fleet.available()] == [
        good.url
    ]


def test_after_an_error_running_requests_are_aborted(serve, connect):
    never = threading.Event()

    def answer(body):
        if body["input_ids"][-1] == 11:
            while len(server.prompts()) < 2:
                time.sleep(0.01)
            return as_json(server.completion(body, version="other"))
        return never.wait(20)

    server = serve(on_generate(answer))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="weight version other"):
        connect(server, timeout_seconds=30.0).generate(prompts(9, 3), GREEDY)
    assert time.monotonic() - start < 5
    (rid,) = [
        body["rid"]
        for path, body in server.asked
        if path == "/generate" and body["input_ids"][-1] == 10
    ]
    assert ("/abort_request", {"rid": rid}) in server.asked
    never.set()


def test_interrupt_ends_a_rollout_in_another_thread_for_good(serve, connect):
    running, release = threading.Event(), threading.Event()

    def hang(body):
        running.set()
        release.wait(30)

    server = serve(on_generate(hang))
    sampler = connect(server, timeout_seconds=30)
    raised = []

    def sample():
        try:
            sampler.generate(prompts(3, 4), GREEDY)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    assert running.wait(10)
    begun = time.monotonic()
    sampler.interrupt()
    thread.join(10)
    release.set()
    assert raised
    assert time.monotonic() - begun < 8
    num_asked = server.paths().count("/generate")
    with pytest.raises(RuntimeError, match="the rollout was stopped"):
        sampler.generate(prompts(3), GREEDY)
    assert server.paths().count("/generate") == num_asked


def test_no_prompt_is_retried_after_the_rollout_has_ended(serve, connect):
    def answer(body):
        if body["input_ids"][-1] == 10:
            return 500, b""
        while len(server.prompts()) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        return as_json(server.completion(body, version="other"))

    server = serve(on_generate(answer))
    with pytest.raises(RuntimeError, match="weight version other"):
        connect(server, retries=5).generate(prompts(9, 3), GREEDY)
    assert sorted(ids[-1] for ids in server.prompts()) == [10, 11]


def test_an_interrupted_update_does_not_wait_for_a_hanging_server(serve, connect):
    never = threading.Event()

    def hang(path, body):
        if path == "/update_weights_from_disk":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            never.wait(20)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        connect(serve(hang), timeout_seconds=30.0)
    assert time.monotonic() - start < 5
    never.set()


# --- weights ---


def test_disk_sync_saves_the_weights_and_keeps_only_the_newest(serve, connect, tmp_path):
    def look(path, body):
        if path == "/update_weights_from_disk":
            folder = tmp_path / "sync" / f"weights-{body['weight_version']}"
            assert body["model_path"] == str(folder)
            places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            seen.append({name: load_file(folder / file)[name] for name, file in places.items()})
            files.append(sorted(set(places.values())))
            # servers of another user must be able to read them, where the umask allows it
            plain = (folder / "model.safetensors.index.json").stat().st_mode
            assert {(folder / file).stat().st_mode for file in places.values()} == {plain}

    seen, files = [], []
    server = serve(look)
    sampler = connect(server, bucket_mib=1)
    sampler.update_weights(((name, tensor + 1) for name, tensor in WEIGHTS.items()), 1)
    for number, weights in enumerate(seen):
        assert weights.keys() == WEIGHTS.keys()
        for name, tensor in WEIGHTS.items():
            assert weights[name].dtype == tensor.dtype
            assert torch.equal(weights[name], tensor + number)
    assert files == [["model-00000.safetensors", "model-00001.safetensors"]] * 2
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["weights-1"]
    assert server.version == "1"
    assert server.paths()[-2:] == ["/flush_cache?timeout=10", "/model_info"]
    sampler.close()
    assert not (tmp_path / "sync").exists()


def test_closing_leaves_other_files_in_a_shared_folder(serve, connect, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights-7").write_text("of somebody else")
    sampler = connect(serve(), sync_folder=str(tmp_path / "shared"))
    assert len(list((tmp_path / "shared").iterdir())) == 2
    sampler.close()
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["weights-7"]


def test_a_sync_folder_that_cannot_be_created_is_named(serve, connect):
    server = serve()
    with pytest.raises(
        ValueError,
        match="sampler.sync_folder: the folder /dev/null/verippo-.* cannot be created: Not a dir",
    ):
        connect(server, sync_folder="/dev/null", push=False)


@pytest.mark.parametrize("old", [False, True])
def test_tensor_sync_uses_an_update_session_if_the_server_has_one(serve, connect, old):
    server = serve(old=old)
    connect(server, sync="tensor", bucket_mib=1, push=False).update_weights(WEIGHTS.items(), 3)
    sent = [path for path in server.paths() if "update" in path]
    update = ["/update_weights_from_tensor"] * 2
    assert sent == ["/begin_weight_update", *update, "/end_weight_update"]
    bodies = [body for path, body in server.asked if path == "/update_weights_from_tensor"]
    pairs = [
        pair
        for body in bodies
        for pair in pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
    ]
    assert [name for name, _ in pairs] == list(WEIGHTS)
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in pairs)
    assert server.version == "3"


def test_an_update_session_left_open_by_a_killed_run_is_closed(serve, connect):
    state = {"open": True}

    def script(path, body):
        if path == "/begin_weight_update" and state["open"]:
            return 400, b'{"message": "already open"}'
        state["open"] &= path != "/end_weight_update"
        return None

    server = serve(script)
    connect(server, sync="tensor", push=False).update_weights(WEIGHTS.items(), 3)
    assert server.version == "3"


@pytest.mark.parametrize("path", ["/init_weights_update_group", "/begin_weight_update"])
def test_a_server_that_refuses_to_prepare_a_broadcast_ends_it_at_once(serve, connect, path):
    refusal = (400, b'{"success": false, "message": "already been created"}')
    server = serve(lambda asked, body: refusal if asked == path else None)
    sampler = connect(server, sync="distributed", push=False, timeout_seconds=60.0)
    if path != "/init_weights_update_group":
        sampler.sync._create_group = lambda fleet: SimpleNamespace(leave=lambda: None)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError,
        match=rf"not sent \(distributed\): {server.url}: answered {path} with 400: already",
    ):
        sampler.update_weights(WEIGHTS.items(), 1)
    assert time.monotonic() - start < 10
    assert server.paths().index("/destroy_weights_update_group") < server.paths().index(path)


def test_a_refused_broadcast_ends_at_once(serve, connect):
    server = serve(
        lambda path, body: (
            (400, b'{"message": "no"}') if path == "/update_weights_from_distributed" else None
        )
    )
    sampler = connect(server, sync="distributed", push=False, timeout_seconds=60.0)
    sampler.sync._create_group = lambda fleet: SimpleNamespace(
        send=lambda tensors: time.sleep(60), leave=lambda: None
    )
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=f"{server.url}: answered /update_weights_from_distributed with 400: no"
    ):
        sampler.update_weights(WEIGHTS.items(), 1)
    assert time.monotonic() - start < 10


def test_a_broadcast_request_has_names_dtypes_and_shapes():
    request = broadcast_request(
        [("a", "float32", torch.Size([2, 3])), ("b", "bfloat16", (4,))], "7"
    )
    assert request == Request(
        "/update_weights_from_distributed",
        {
            "names": ["a", "b"],
            "dtypes": ["float32", "bfloat16"],
            "shapes": [[2, 3], [4]],
            "group_name": "verippo",
            "weight_version": "7",
            "flush_cache": False,
        },
    )


def test_data_parallel_servers_need_disk_sync(serve, connect):
    server = serve(
        lambda path, body: as_json({"tp_size": 1, "dp_size": 2}) if path == "/server_info" else None
    )
    connect(server)
    for sync in ("tensor", "distributed"):
        with pytest.raises(
            ValueError,
            match=f"sampler.sync={sync}: only disk can update servers with dp_size over 1",
        ):
            connect(server, sync=sync)


def test_buckets_copy_tensors_up_to_their_size():
    def source():
        held = torch.zeros(
            4
        )  # 16 bytes, overwritten for each name as a sharded engine's gathered tensor is
        for number, name in enumerate("abcde"):
            held.fill_(number)
            yield name, held if name != "d" else torch.full((100,), 3.0)

    portions = list(buckets(source(), 40))
    assert [[name for name, _ in portion] for portion in portions] == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert [tensor[0].item() for portion in portions for _, tensor in portion] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("sync", ["disk", "tensor", "distributed"])
def test_no_more_than_two_buckets_are_held_at_a_time(serve, connect, sync):
    sampler = connect(serve(), sync=sync, push=False)
    sampler.sync.bucket_bytes = 40
    sampler.sync._create_group = lambda fleet: SimpleNamespace(
        send=lambda tensors: None, leave=lambda: None
    )
    copies, held = [], []

    class Watched(torch.Tensor):
        """A tensor whose copies are counted while they live."""

        def clone(self, **options):
            copy = super().clone(**options).as_subclass(torch.Tensor)
            copies.append(weakref.ref(copy))
            return copy

    def tensors():
        for number in range(12):  # 16 bytes each: two to a portion
            held.append(sum(copy() is not None for copy in copies))
            yield f"w{number}", torch.full((4,), float(number)).as_subclass(Watched)

    sampler.update_weights(tensors(), 1)
    assert len(held) == 12
    assert 2 <= max(held) <= 4  # the portion that was sent, and the one being filled


def test_a_failed_update_still_iterates_all_tensors(serve, connect):
    taken = []

    def tensors():
        for name, tensor in WEIGHTS.items():
            taken.append(name)
            yield name, tensor

    server = serve(
        lambda path, body: (400, b'{"message": "no space"}') if "begin" in path else None
    )
    with pytest.raises(
        RuntimeError,
        match=rf"weight version 4 was not sent \(tensor\): {server.url}: .* 400: no space",
    ):
        connect(server, sync="tensor", push=False).update_weights(tensors(), 4)
    assert taken == list(WEIGHTS)


def test_only_a_failed_first_update_mentions_the_model(serve, connect):
    full = threading.Event()
    full.set()

    def answer(path, body):
        if path == "/server_info":
            return as_json({"model_path": "/models/70b"})
        return (400, b'{"message": "no space"}') if "begin" in path and full.is_set() else None

    sampler, hint = (
        connect(serve(answer), sync="tensor", push=False),
        "does the policy differ in shape from the servers' model, /models/70b",
    )
    with pytest.raises(RuntimeError, match=hint):
        sampler.update_weights(WEIGHTS.items(), 1)
    full.clear()
    sampler.update_weights(WEIGHTS.items(), 1)
    full.set()
    with pytest.raises(RuntimeError, match="no space") as caught:
        sampler.update_weights(WEIGHTS.items(), 2)
    assert hint not in str(caught.value)


def test_a_server_with_its_old_version_after_an_update_is_refused(serve, connect):
    server = serve(
        lambda path, body: (
            as_json({"success": True}) if path == "/update_weights_from_disk" else None
        )
    )
    with pytest.raises(
        RuntimeError, match=f"{server.url}: reports weight version default after the update to 0"
    ):
        connect(server)


def test_an_excluded_server_is_used_again_after_an_update(serve, connect):
    ill = threading.Event()
    first, second = (
        serve(on_generate(lambda body: (500, b"ill") if ill.is_set() else None)),
        serve(),
    )
    sampler = connect(first, second)
    ill.set()
    sampler.generate(prompts(3, 4), GREEDY)
    sampler.update_weights(WEIGHTS.items(), 1)
    assert list(sampler.fleet.failures) == [first.url]
    ill.clear()
    sampler.update_weights(WEIGHTS.items(), 2)
    assert not sampler.fleet.failures
    assert (first.version, second.version) == ("2", "2")


def test_a_restarted_server_joins_a_new_group(serve, connect):
    def joined(fleet):
        groups.append([server.url for server in fleet.available()])
        return SimpleNamespace(send=lambda tensors: None, leave=lambda: None)

    groups, first, second = [], serve(), serve()
    sampler = connect(first, second, sync="distributed", push=False)
    sampler.sync._create_group = joined
    for version in (1, 2):
        sampler.update_weights(WEIGHTS.items(), version)
    assert groups == [[first.url, second.url]]
    second.version = "default"  # as after a start
    sampler.update_weights(WEIGHTS.items(), 3)
    assert groups == [[first.url, second.url]] * 2
    second.script = lambda path, body: (500, b"ill")
    sampler.update_weights(WEIGHTS.items(), 4)
    second.script = lambda path, body: None
    second.version = "4"  # it cannot be in the group whatever it says
    sampler.update_weights(WEIGHTS.items(), 5)
    sampler.update_weights(WEIGHTS.items(), 6)
    assert groups[2:] == [[first.url], [first.url, second.url]]


@pytest.mark.parametrize("sync", ["disk", "tensor"])
def test_a_server_that_fails_during_an_update_is_excluded(serve, connect, sync):
    bad, good = (
        serve(lambda path, body: (500, b"lost") if "update_weights" in path else None),
        serve(),
    )
    sampler = connect(bad, good, sync=sync, bucket_mib=1, push=False)
    sampler.update_weights(WEIGHTS.items(), 4)
    assert (bad.version, good.version) == ("default", "4")
    assert good.paths()[-2:] == ["/flush_cache?timeout=10", "/model_info"]
    assert "500: lost" in sampler.fleet.failures[bad.url]
    assert [c.token_ids[0] for c in sampler.generate(prompts(3, 4), GREEDY)] == [10, 11]
    with pytest.raises(
        RuntimeError, match=f"not sent .*: no sglang server is left: {bad.url}: .* with 500: lost"
    ):
        connect(bad, sync=sync)


def test_an_update_refused_by_one_server_fails(serve, connect):
    blind = serve(
        lambda path, body: (400, b'{"message": "no such folder"}') if "from_disk" in path else None
    )
    with pytest.raises(
        RuntimeError,
        match=f"{blind.url}: answered /update_weights_from_disk with 400: no such folder",
    ):
        connect(serve(), blind)


def test_log_probs_come_from_every_server(serve, connect):
    first, second = serve(), serve()
    sampler = connect(first, second)
    assert isinstance(sampler, ServedSampler)
    assert sampler.logprobs([[3, 4, 49], [5, 6]]) == {
        server.url: [[-0.5, -0.5], [-0.5]] for server in (first, second)
    }
    body = first.asked[0][1]
    assert (body["logprob_start_len"], body["sampling_params"]) == (
        0,
        {"temperature": 1.0, "max_new_tokens": 0},
    )
    second.version = "9"
    with pytest.raises(
        RuntimeError, match=f"{second.url}: used weight version 9, the last one sent is 0"
    ):
        sampler.logprobs([[3, 4]])


def test_sleeping_servers_are_woken_before_an_update(serve, connect):
    server = serve()
    sampler = connect(server)
    sampler.sleep()
    assert server.paths() == [
        "/flush_cache?timeout=10",
        "/release_memory_occupation",
        "/update_weight_version",
    ]
    with pytest.raises(RuntimeError, match="weight version asleep"):
        sampler.generate(prompts(3), GREEDY)
    server.asked.clear()
    connect(server, push=False).update_weights(WEIGHTS.items(), 1)
    paths = server.paths()
    assert paths.index("/resume_memory_occupation") < paths.index("/update_weights_from_disk")
    server.asked.clear()
    sampler.update_weights(WEIGHTS.items(), 2)  # resuming what is awake would end the server
    assert "/resume_memory_occupation" not in server.paths()


def test_a_server_is_not_woken_twice_after_a_failed_update(serve, connect):
    server = serve()
    sampler = connect(server)
    sampler.sleep()
    server.script = lambda path, body: (500, b"lost") if "from_disk" in path else None
    with pytest.raises(RuntimeError, match="500: lost"):
        sampler.update_weights(WEIGHTS.items(), 1)
    server.script = lambda path, body: None
    connect(server, push=False).update_weights(WEIGHTS.items(), 0)
    assert server.paths().count("/resume_memory_occupation") == 1


def test_a_server_with_running_requests_is_not_put_to_sleep(serve, connect):
    server = serve()
    sampler = connect(server)
    server.script = lambda path, body: (
        (400, b"requests are running") if path.startswith("/flush") else None
    )
    with pytest.raises(
        RuntimeError, match="answered /flush_cache.* with 400: requests are running"
    ):
        sampler.sleep()
    assert "/release_memory_occupation" not in server.paths()


def test_a_missing_api_key_is_refused(serve, connect):
    with pytest.raises(
        ValueError,
        match="sampler.api_key_env=NOT_SET_ANYWHERE: that environment variable is not set",
    ):
        connect(serve(), api_key_env="NOT_SET_ANYWHERE")


def test_an_api_key_may_end_in_a_newline(serve, connect, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sesame\n")
    server = serve()
    connect(server, api_key_env="SERVER_KEY")
    assert server.headers["Authorization"] == "Bearer sesame"


def test_an_interrupted_request_is_retried_only_if_that_is_allowed(serve):
    def cut(path, body):
        calls.append(path)
        if len(calls) < 3:
            raise ConnectionError

    calls = []
    server = SglangServer(serve(cut).url)
    assert server.ask(Request("/model_info"), timeout_seconds=5, retries=2) == {
        "weight_version": "default"
    }
    calls.clear()
    with pytest.raises(ServerError, match="/begin_weight_update failed: RemoteProtocolError"):
        server.ask(Request("/begin_weight_update", {}), timeout_seconds=5)
    assert calls == ["/begin_weight_update"]


def test_a_password_in_an_address_is_not_shown():
    server = SglangServer("http://user:sesame@127.0.0.1:1")
    with pytest.raises(ServerError, match="^http://127.0.0.1:1: /x failed: ConnectError") as caught:
        server.ask(Request("/x"), timeout_seconds=5)
    assert "sesame" not in str(caught.value)


def test_pickled_tensors_hold_their_values_and_no_handle_to_shared_memory():
    pickled = weight_sync.pickle_tensors(list(WEIGHTS.items()))
    assert len(pickled) > 262_140 * 4
    assert b"rebuild_storage" not in pickled
