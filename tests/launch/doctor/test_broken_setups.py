"""Each broken set-up is named in one line, with the exit status of its kind."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from safetensors.torch import load_file, save_file

from verippo.launch.doctor import disk

QUESTION, ANSWER = "Open-ended Verifiable Question", "Ground-True Answer"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def sglang():
    """Starts HTTP servers that answer every GET with the given JSON; info -> address."""
    servers = []

    def start(**info):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(info).encode())

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def closed_port():
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def taken_port():
    """A port on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def named(doctor, stage, options, pattern, *, status="FAILED"):
    """Checks that exactly one line has this status and matches."""
    code, lines = doctor(stage, options)
    found = [line for line in lines if line.startswith(f"  {status} ") and re.search(pattern, line)]
    assert len(found) == 1, (pattern, lines)
    assert code == (2 if status == "FAILED" else 0)
    # every check still ran
    assert re.fullmatch(r"\d+ ok, \d+ warning, \d+ FAILED", lines[-1])


def test_a_healthy_setup_passes_and_leaves_nothing(doctor, healthy, tmp_path):
    code, lines = doctor("ppo", healthy)
    assert code == 0
    assert [line for line in lines if line.startswith("  FAILED")] == []
    assert {line for line in lines if not line.startswith("  ")} >= {
        "machine",
        "network",
        "disk",
        "models",
        "data",
        "batches",
    }
    assert not (tmp_path / "made").exists()
    text = "\n".join(lines)
    # 12 problems, a quarter of which is held out
    assert "rows: 9 to train on, 3 held out" in text
    assert "chat template: '[user] A patient has fever" in text
    assert "steps: 3 steps, 9 optimizer steps of the policy and 9 of the critic" in text
    assert "tokens: at most 864 a step" in text  # 4 x (200 + 16)


def test_missing_data_key(doctor, healthy, write_rows):
    rows = [{QUESTION: f"What is {n}?", ANSWER: "x"} for n in range(8)]
    del rows[5][ANSWER]
    options = healthy | {"data": write_rows("rows.json", rows)}
    named(doctor, "ppo", options, rf"rows: .*row 5: no key '{ANSWER}'")


def test_wrong_file_type(doctor, healthy, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    named(doctor, "ppo", healthy | {"data": tmp_path / "rows.csv"}, r"cannot read \.csv")


def test_held_out_rows_in_the_training_data(doctor, healthy, write_rows):
    rows = [{QUESTION: "What  IS 3 plus one?", ANSWER: "4"}, {QUESTION: "New?", ANSWER: "y"}]
    options = healthy | {"eval_fraction": 0.0, "eval_data": write_rows("held.json", rows)}
    named(doctor, "ppo", options, "1 of 2 ask what a training row asks: rows 0")


def test_rows_over_the_limit(doctor, healthy, write_rows):
    rows = [{QUESTION: f"What is {n}?" + " x" * 300 * (n == 2), ANSWER: "x"} for n in range(8)]
    options = healthy | {"data": write_rows("rows.json", rows)}
    named(doctor, "ppo", options, "1 of 8 rows are over max_prompt_tokens=200", status="warning")


def test_vocabulary_mismatch(doctor, healthy, make_model, tmp_path):
    critic = make_model("llama", seed=9)
    file = critic / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"<pad>"', '"<void>"'))
    try:
        pattern = "critic's tokenizer: .* do not share a vocabulary"
        named(doctor, "ppo", healthy | {"critic": critic}, pattern)
    finally:
        file.write_text(text)


def test_tokenizer_larger_than_the_embedding(doctor, healthy, policy):
    edit(policy / "config.json", vocab_size=100)
    named(doctor, "ppo", healthy, "policy's tokenizer: .* has 100 embeddings, but its tokenizer")


def test_no_chat_template(doctor, healthy, make_model):
    options = healthy | {"policy": make_model("qwen3")}
    named(doctor, "ppo", options, "chat template: .* has none: the built-in one", status="warning")


def test_chat_template_that_refuses(doctor, healthy, policy):
    (policy / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    named(doctor, "ppo", healthy, "the chat template refuses the conversation: no users here")


def test_no_end_of_sequence_token(doctor, healthy, policy):
    file = policy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for name in ("eos_token", "pad_token"):
        settings.pop(name, None)
    file.write_text(json.dumps(settings))
    (policy / "special_tokens_map.json").unlink(missing_ok=True)
    named(doctor, "ppo", healthy, "its tokenizer has no eos_token")


def test_context_too_short(doctor, healthy, policy):
    edit(policy / "config.json", max_position_embeddings=128)
    named(doctor, "ppo", healthy, r"context: .* = 216, over the context of .* \(128\)")


def test_unsupported_family(doctor, healthy, policy):
    edit(policy / "config.json", final_logit_softcapping=30.0)
    pattern = "policy: .*final_logit_softcapping is not supported"
    named(doctor, "ppo", healthy, pattern)


def test_missing_shard(doctor, healthy, policy):
    weights = load_file(policy / "model.safetensors")
    (policy / "model.safetensors").unlink()
    save_file(weights, policy / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    places["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index = policy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    named(doctor, "ppo", healthy, "weights file model-00002-of-00002.safetensors is missing")


def test_incomplete_weights_file(doctor, healthy, policy):
    file = policy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    named(doctor, "ppo", healthy, r"model\.safetensors is damaged or incomplete")


def test_verifier_with_three_classes(doctor, healthy, make_model):
    options = healthy | {"verifier.kind": "classifier"}
    options["verifier.model"] = make_model("llama", classes=3)
    named(doctor, "ppo", options, "its head has 3 classes, the verifier's has two")


def test_verifier_without_a_head(doctor, healthy, make_model):
    options = healthy | {"verifier.kind": "classifier", "verifier.model": make_model("llama")}
    named(doctor, "ppo", options, r"has no head \(score\.weight\)")


def test_bad_function_name(doctor, healthy):
    options = healthy | {"verifier.kind": "function", "verifier.function": "no_such_module:score"}
    named(doctor, "ppo", options, "verifier.function: .*No module named 'no_such_module'")


def test_output_that_cannot_be_written(doctor, healthy, tmp_path):
    (tmp_path / "file").write_text("x")
    named(doctor, "ppo", healthy | {"output": tmp_path / "file" / "out"}, "output: .*cannot write")


def test_disk_too_small(doctor, healthy, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    named(doctor, "ppo", healthy, "space: 0.0 GiB free in .*: free some, or lower save_total_limit")


def test_port_in_use(doctor, healthy, taken_port, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(taken_port))
    named(doctor, "ppo", healthy, f"MASTER_PORT: {taken_port} is in use on this host")


def test_port_that_is_no_number(doctor, healthy, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "auto")
    named(doctor, "ppo", healthy, "MASTER_PORT: 'auto': must be a number from 1024 to 65535")


def on_servers(healthy, url):
    return healthy | {"sampler.kind": "sglang", "sampler.urls": url}


def test_server_that_cannot_be_reached(doctor, healthy, closed_port):
    options = on_servers(healthy, f"http://127.0.0.1:{closed_port}")
    named(doctor, "ppo", options, rf"server http://127.0.0.1:{closed_port}: cannot be reached")


def test_server_of_the_policy_passes(doctor, healthy, sglang):
    url = sglang(version="0.5.5", model_path=str(healthy["policy"]))
    named(doctor, "ppo", on_servers(healthy, url), "sglang 0.5.5, model", status="ok     ")


def test_server_of_another_model(doctor, healthy, sglang, make_model):
    url = sglang(version="0.5.6", model_path=str(make_model("llama")))
    pattern = "with model_type=llama, but the policy .* has qwen3"
    named(doctor, "ppo", on_servers(healthy, url), pattern)


def test_server_too_old(doctor, healthy, sglang):
    url = sglang(version="0.5.4.post3", model_path=str(healthy["policy"]))
    named(doctor, "ppo", on_servers(healthy, url), "sglang 0.5.4.post3: needs 0.5.5 or newer")


def test_server_with_too_short_a_context(doctor, healthy, sglang):
    url = sglang(version="0.5.5", model_path=str(healthy["policy"]), context_length=64)
    named(doctor, "ppo", on_servers(healthy, url), "its context of 64 tokens is under .* = 216")


def test_llm_that_cannot_be_reached(doctor, healthy, closed_port):
    url = f"http://127.0.0.1:{closed_port}/v1"
    options = healthy | {"verifier.kind": "judge", "llm.model": "m", "llm.base_url": url}
    named(doctor, "ppo", options, rf"llm: http://127.0.0.1:{closed_port}/v1/ cannot be reached")


def test_batch_that_does_not_divide(doctor, healthy):
    named(doctor, "ppo", healthy | {"ranks": 3}, "4 rollouts a step .* do not divide over 3 ranks")


def supervised(healthy, data):
    names = ("output", "eval_fraction", "dtype")
    kept = {name: healthy[name] for name in names}
    return kept | {"model": healthy["policy"], "data": data, "max_seq_len": 256}


def test_sft_row_without_an_answer(doctor, healthy, write_rows):
    rows = [{"Question": f"Q{n}", "Complex_CoT": "so", "Response": "A"} for n in range(8)]
    rows[3]["Response"] = ""
    options = supervised(healthy, write_rows("rows.json", rows))
    named(doctor, "sft", options, "row 3: 'Response' is empty")


def test_verifier_rows_of_one_class(doctor, healthy, write_rows):
    rows = [{"response": f"R{n}", "reference": "A", "label": True} for n in range(8)]
    options = supervised(healthy, write_rows("rows.json", rows))
    named(doctor, "verifier", options, "all 6 answers are labelled right")
