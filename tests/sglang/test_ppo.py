"""`verippo ppo` on two ranks with ZeRO-3, sampling from a real sglang server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verippo.core.sampling.sglang_client import SglangServer, read_scores
from verippo.core.sampling.sglang_requests import disk_request, flush_request, score_request
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY

pytestmark = pytest.mark.sglang
STEPS = 5
TORCHRUN = [
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node",
    "2",
    "-m",
    "verippo.launch.cli",
]
DEEPSPEED = [
    "deepspeed.launcher.runner",
    "--num_accelerators",
    "2",
    "--no_local_rank",
    "--master_port",
    "FREE",
    "--module",
    "verippo.launch.cli",
]
SCORING = "def score(rollouts):\n    return [sum(r.response_ids) % 7 / 7 for r in rollouts]\n"


@pytest.fixture
def command(tmp_path):
    """The PPO command for a policy, and the environment it runs in."""
    (tmp_path / "scoring.py").write_text(SCORING)
    problems = [{QUESTION_KEY: f"What is {n} plus one?", ANSWER_KEY: str(n + 1)} for n in range(6)]
    (tmp_path / "problems.json").write_text(json.dumps(problems))

    def make(launcher, policy, url, **changes):
        options = {
            "policy": policy,
            "data": tmp_path / "problems.json",
            "output": tmp_path / "run",
            "steps": STEPS,
            "verifier.kind": "function",
            "verifier.function": "scoring:score",
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "epochs": 1,
            "minibatches": 2,
            "zero_stage": 3,
            "dtype": "fp32",
            "gradient_checkpointing": "false",
            "max_prompt_tokens": 100,
            "sampling.max_new_tokens": 20,
            "max_tokens_per_gpu": 512,
            "log_to": "jsonl",
            "policy_learning_rate": 3e-3,
            "critic_learning_rate": 1e-2,
            "sampler.kind": "sglang",
            "sampler.urls": url,
            "sampler.timeout_seconds": 60,
            "timeout_seconds": 120,
        } | changes
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            launcher = [
                str(probe.getsockname()[1]) if part == "FREE" else part for part in launcher
            ]
        return [
            sys.executable,
            "-m",
            *launcher,
            "ppo",
            *[str(part) for k, v in options.items() for part in (f"--{k}", v)],
        ]

    return make


@pytest.fixture
def start(tmp_path):
    """Starts a command; what still runs after the test is killed."""
    running = []

    def begin(command):
        environment = os.environ | {
            "PYTHONPATH": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path, start_new_session=True, **pipes
            )
        )
        return running[-1]

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rows(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@torch.no_grad()
def logprobs(folder, ids):
    """transformers' log-probs of ids[1:] with the model of a folder."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.tensor([ids])
    table = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits[0, :-1], -1)
    return table.gather(1, tokens[0, 1:, None]).squeeze(1)


def check_run(folder, url):
    """Checks that every update arrived and changed the weights, and the last equals the export."""
    found = rows(folder)
    assert (
        [row["step"] for row in found]
        == [row["weight_version"] for row in found]
        == list(range(1, STEPS + 1))
    )
    assert max(row["weight_parity_gap"] for row in found) < 1e-4
    assert max(row["sampler_logprob_gap_p99"] for row in found) < 1e-4
    assert all(row["sampler_logprob_gap_mean"] <= row["sampler_logprob_gap_p99"] for row in found)
    assert abs(found[-1]["kl_mean"]) > 0.01  # k1 estimates of a few samples may be negative
    ids = AutoTokenizer.from_pretrained(folder / "model")(
        "The patient has a fever and a cough. What is it?"
    ).input_ids
    answer = SglangServer(url).ask(score_request(ids), timeout_seconds=60)
    scores = torch.tensor(read_scores(answer, ids, url=url, version=STEPS))
    assert torch.allclose(scores, logprobs(folder / "model", ids), atol=1e-4)


@pytest.mark.parametrize(
    ("launcher", "changes"),
    [
        (TORCHRUN, {"sampler.sync": "disk"}),
        (DEEPSPEED, {"sampler.sync": "distributed"}),
        (TORCHRUN, {"sampler.sync": "tensor", "sampler.sleep": "true"}),
    ],
    ids=["disk", "distributed", "tensor"],
)
def test_after_every_step_the_server_holds_the_trainers_weights(
    sglang_server, command, start, tmp_path, launcher, changes
):
    run = start(command(launcher, sglang_server.model_path, sglang_server.url, **changes))
    try:
        _, errors = run.communicate(timeout=180)
        assert run.returncode == 0, errors[-3000:]
        check_run(tmp_path / "run", sglang_server.url)
        assert not (tmp_path / "run" / "sync").exists()
        held = AutoModelForCausalLM.from_pretrained(sglang_server.model_path).state_dict()
        moved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
        assert all(not torch.equal(held[name], tensor) for name, tensor in moved.items())
    finally:
        client = SglangServer(sglang_server.url)
        client.ask(disk_request(sglang_server.model_path, "default"), timeout_seconds=60)
        client.ask(flush_request(10), timeout_seconds=20)


@pytest.mark.parametrize("sync", ["disk", "distributed"])
def test_server_takes_the_merged_weights_of_a_policy_with_adapters(
    sglang_server, command, start, tmp_path, sync
):
    changes = {"sampler.sync": sync, "lora.rank": 4, "policy_learning_rate": 3e-2}
    run = start(command(TORCHRUN, sglang_server.model_path, sglang_server.url, **changes))
    try:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors[-3000:]
        check_run(tmp_path / "run", sglang_server.url)
        held = AutoModelForCausalLM.from_pretrained(sglang_server.model_path).state_dict()
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
        moved = {name for name in held if not torch.equal(held[name], after[name])}
        assert moved == {name for name in held if "_proj.weight" in name}
    finally:
        client = SglangServer(sglang_server.url)
        client.ask(disk_request(sglang_server.model_path, "default"), timeout_seconds=60)
        client.ask(flush_request(10), timeout_seconds=20)


def test_a_run_whose_only_server_is_killed_ends_with_its_address_and_goes_on_with_a_new_one(
    make_model, start_sglang, command, start, tmp_path
):
    policy, folder = make_model("qwen3", tied=True, seed=5), tmp_path / "run"
    first = start_sglang(policy)
    options = {"sampler.sync": "distributed", "save_every": 1}
    run = start(command(TORCHRUN, policy, first.url, **options))
    deadline = time.monotonic() + 120
    while len(rows(folder)) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, _ in first.processes:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = run.communicate(timeout=100)
    assert run.returncode == 1
    assert time.monotonic() - killed < 60
    assert first.url in errors
    done = len(rows(folder))
    assert 2 <= done < STEPS

    second = start_sglang(policy)
    run = start(command(TORCHRUN, policy, second.url, **options))
    output, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors[-3000:]
    assert f"resuming after step {done} of {STEPS}" in output
    check_run(folder, second.url)
