"""SglangSampler with a real server, compared with a forward pass of transformers."""

from __future__ import annotations

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from verippo.core.sampling.local_sampler import LocalSampler
from verippo.core.sampling.sampler import Prompt, SamplingParams
from verippo.core.sampling.sglang_client import PROBE_SECONDS, SglangServer
from verippo.core.sampling.sglang_requests import (
    Request,
    disk_request,
    flush_request,
    version_request,
)
from verippo.core.sampling.sglang_sampler import SglangConfig, SglangSampler
from verippo.core.training import dist
from verippo.core.training.pretrained import load_causal_lm

pytestmark = pytest.mark.sglang
MODES = ("disk", "distributed", "tensor")
STOPS = (2, 11, 319)
GREEDY = SamplingParams(temperature=0, max_new_tokens=32)


@pytest.fixture(scope="module")
def server(sglang_server):
    """The session's server, which has its own weights again afterwards."""
    dist.init()
    yield sglang_server
    client = SglangServer(sglang_server.url)
    client.ask(disk_request(sglang_server.model_path, "default"), timeout_seconds=60)
    client.ask(flush_request(10), timeout_seconds=20)


@pytest.fixture
def connect(tmp_path):
    """A sampler of these servers; closed after the test."""
    made = []

    def make(*urls, **fields):
        config = SglangConfig(**{"urls": ",".join(urls), "timeout_seconds": 60.0} | fields)
        made.append(
            SglangSampler(
                config,
                stop_token_ids=STOPS,
                vocabulary=320,
                context=2048,
                folder=tmp_path / f"sync-{len(made)}",
            )
        )
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture(scope="module")
def model(server):
    return AutoModelForCausalLM.from_pretrained(
        server.model_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def shift(model, seed):
    """Other weights, far from the last."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logprobs(model, ids, temperature=1.0):
    """transformers' log-probs of ids[1:]."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1] / temperature
    return torch.log_softmax(logits.float(), -1).gather(1, tokens[0, 1:, None]).squeeze(1)


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(token_ids=torch.randint(0, 320, (n,), generator=generator).tolist(), seed=n)
        for n in lengths
    ]


def gap(model, sampler, ids):
    """The largest difference between transformers' log-probs and any server's."""
    expected = logprobs(model, ids)
    return max(
        float((expected - torch.tensor(scored[0])).abs().max())
        for scored in sampler.logprobs([ids]).values()
    )


@pytest.mark.parametrize("sync", MODES)
def test_after_every_update_the_servers_log_probs_are_those_of_the_weights_sent(
    server, connect, model, sync
):
    sampler = connect(server.url, sync=sync)
    sampler.sync.bucket_bytes = 20_000  # so that the little model needs several
    sampler.update_weights(model.named_parameters(), 1)
    (prompt,) = random_prompts(70)
    for version in (2, 3):
        shift(model, seed=version)
        assert gap(model, sampler, prompt.token_ids) > 0.01
        sampler.update_weights(model.named_parameters(), version)
        assert gap(model, sampler, prompt.token_ids) < 1e-4
        answer = SglangServer(server.url).ask(
            Request(
                "/generate",
                {"input_ids": prompt.token_ids, "sampling_params": {"max_new_tokens": 2}},
            ),
            timeout_seconds=60,
        )
        assert answer["meta_info"]["weight_version"] == str(version)


def test_greedy_tokens_are_those_of_the_local_sampler_and_of_transformers(server, connect, model):
    sampler = connect(server.url)
    local = LocalSampler(load_causal_lm(server.model_path, dtype="fp32"), stop_token_ids=STOPS)
    for each in (sampler, local):
        each.update_weights(model.named_parameters(), 5)
    prompts = random_prompts(3, 40, 200, 1, 17, 90, 5, 64)
    served, drawn = sampler.generate(prompts, GREEDY), local.generate(prompts, GREEDY)
    for prompt, ours, theirs in zip(prompts, served, drawn, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert ours.token_ids == theirs.token_ids == expected
        assert (
            ours.finish_reason
            == theirs.finish_reason
            == ("stop" if expected[-1] in STOPS else "length")
        )
        assert ours.version == 5
        assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)


def test_sampled_log_probs_are_the_policys_at_the_sampling_temperature_and_a_stop_token_ends_each(
    server, connect, model
):
    sampler = connect(server.url)
    sampler.update_weights(model.named_parameters(), 6)
    prompts = random_prompts(*range(5, 29), seed=1)
    completions = sampler.generate(prompts, SamplingParams(temperature=0.7, max_new_tokens=60))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = logprobs(model, [*prompt.token_ids, *completion.token_ids], 0.7)[
            -len(completion.token_ids) :
        ]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
        assert not set(completion.token_ids[:-1]) & set(STOPS)
        assert (completion.token_ids[-1] in STOPS) == (completion.finish_reason == "stop")


def test_an_id_outside_the_vocabulary_never_reaches_the_server_which_would_die_of_it(
    server, connect, model
):
    sampler = connect(server.url)
    sampler.update_weights(model.named_parameters(), 7)
    with pytest.raises(ValueError, match="prompt 0 has token id 320, vocabulary is 320"):
        sampler.generate([Prompt(token_ids=[1, 320])], GREEDY)
    with pytest.raises(ValueError, match="over the model's context of 2048"):
        sampler.generate([Prompt(token_ids=[1] * 2020)], GREEDY)
    assert len(sampler.generate(random_prompts(4), GREEDY)) == 1


def test_responses_of_a_version_that_somebody_else_set_are_refused(server, connect, model):
    sampler = connect(server.url)
    sampler.update_weights(model.named_parameters(), 8)
    SglangServer(server.url).ask(version_request("another run's"), timeout_seconds=10)
    with pytest.raises(
        RuntimeError,
        match=f"{server.url}: used weight version another run's, the last one sent is 8",
    ):
        sampler.generate(random_prompts(4), GREEDY)


def test_an_interrupted_rollout_leaves_nothing_running_on_the_server(server, connect, model):
    sampler = connect(server.url)
    sampler.update_weights(model.named_parameters(), 9)
    threading.Timer(1.0, _thread.interrupt_main).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampler.generate(
            random_prompts(*[8] * 200), SamplingParams(temperature=1.0, max_new_tokens=2000)
        )
    assert time.monotonic() - start < 10
    SglangServer(server.url).ask(
        flush_request(3), timeout_seconds=20
    )  # refused while anything runs
    sampler.sleep()
    sampler.update_weights(model.named_parameters(), 10)
    assert gap(model, sampler, random_prompts(30)[0].token_ids) < 1e-4


def test_a_server_that_hangs_is_named_within_the_time_out_and_serves_again_once_it_is_well(
    server, connect, model
):
    sampler = connect(server.url, timeout_seconds=3.0)
    sampler.update_weights(model.named_parameters(), 11)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(
            RuntimeError,
            match=f"no sglang server is left: {server.url}: no answer to /generate within 3 s",
        ):
            sampler.generate(random_prompts(4, 5), GREEDY)
        assert (
            time.monotonic() - start < 3 + 5 + 4
        )  # the time-out, an attempt to abort, and what a busy machine adds
        with pytest.raises(
            RuntimeError, match=f"{server.url}: no answer to /model_info within {PROBE_SECONDS:g} s"
        ):
            sampler.update_weights(model.named_parameters(), 12)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    sampler.update_weights(model.named_parameters(), 13)
    assert len(sampler.generate(random_prompts(4, 5), GREEDY)) == 2


KILLED = """
import os, sys
from pathlib import Path
from verippo.core.training import dist
from verippo.core.training.pretrained import load_causal_lm
from verippo.core.sampling.sglang_requests import BEGIN
from verippo.core.sampling.sglang_sampler import SglangConfig, SglangSampler

dist.init()
config = SglangConfig(urls=sys.argv[1], sync="distributed", timeout_seconds=30.0)
options = {"stop_token_ids": (2,), "vocabulary": 320, "context": None, "folder": Path("unused")}
sampler = SglangSampler(config, **options)
sampler.update_weights(load_causal_lm(sys.argv[2], dtype="fp32").named_parameters(), 3)
sampler.fleet.servers[0].ask(BEGIN, timeout_seconds=10)
print("killed", flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_process_group_and_the_open_update_of_a_killed_run_do_not_hinder_the_next(
    server, connect, model
):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, server.url, server.model_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (killed.stdout, killed.returncode) == ("killed\n", -signal.SIGKILL), killed.stderr[
        -2000:
    ]
    sampler = connect(server.url, sync="distributed")
    start = time.monotonic()
    sampler.update_weights(model.named_parameters(), 1)
    assert time.monotonic() - start < 20
    assert gap(model, sampler, random_prompts(30)[0].token_ids) < 1e-4


@pytest.fixture
def hollow(server):
    """A server in front of the real one that claims to take weights, and does not."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            path = self.path
            if path == "/update_weights_from_disk":
                path, content = (
                    "/update_weight_version",
                    json.dumps(
                        {
                            "new_version": json.loads(content)["weight_version"],
                            "abort_all_requests": False,
                        }
                    ).encode(),
                )
            request = urllib.request.Request(
                server.url + path, content, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    status, content = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield SimpleNamespace(url=f"http://127.0.0.1:{proxy.server_port}")
        proxy.shutdown()


def test_weights_that_silently_do_not_arrive_are_caught_by_the_gate(server, hollow, connect, model):
    from verippo.core.training.pretrained import load_policy
    from verippo.rl import weight_push as sync
    from verippo.rl.config import PPOConfig, VerifierConfig

    policy = load_policy(server.model_path, dtype="fp32")
    policy.hf.load_state_dict(model.state_dict())
    prompts = [prompt.token_ids for prompt in random_prompts(30, 60)]

    def forward(batch, **options):
        return policy(batch, **options)

    forward.named_tensors = lambda: policy.hf.named_parameters()
    config = PPOConfig(
        policy="p",
        data="d",
        output="o",
        steps=1,
        dtype="fp32",
        verifier=VerifierConfig(kind="exact"),
    )
    run = SimpleNamespace(
        policy=forward,
        train_set=SimpleNamespace(token_ids=prompts),
        sampler=connect(server.url),
        gate={},
    )
    assert sync.push_weights(config, run, 1)["weight_parity_gap"] < 1e-4
    run.sampler = connect(hollow.url)
    assert (
        sync.push_weights(config, run, 2)["weight_parity_gap"] < 1e-4
    )  # there was nothing to take
    with torch.no_grad():
        policy.hf.get_input_embeddings().weight.mul_(1 + 1e-4)  # less than bf16's tolerance shows
    with pytest.raises(
        RuntimeError, match=f"{hollow.url} did not take the trainer's weights: .* before the update"
    ):
        sync.push_weights(replace(config, dtype="bf16"), run, 3)
    shift(policy.hf, seed=20)
    with pytest.raises(
        RuntimeError,
        match=f"{hollow.url} does not hold the trainer's weights: .* in the trainer, a gap of",
    ):
        sync.push_weights(config, run, 4)


def test_a_server_killed_in_mid_rollout_leaves_its_prompts_to_the_other_each_answered_once(
    server, start_sglang, connect, model
):
    other = start_sglang(server.model_path)
    sampler = connect(server.url, other.url, sync="distributed")
    local = LocalSampler(load_causal_lm(server.model_path, dtype="fp32"), stop_token_ids=STOPS)
    shift(model, seed=30)
    for each in (sampler, local):
        each.update_weights(model.named_parameters(), 1)
    assert set(sampler.logprobs([[1, 2]])) == {server.url, other.url}
    prompts, params = (
        random_prompts(*range(5, 45), seed=4),
        SamplingParams(temperature=0, max_new_tokens=300),
    )

    def kill_at_work():
        while not sampler.fleet._tokens[other.url]:
            time.sleep(0.01)
        time.sleep(0.2)
        for pid, _ in other.processes:
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill_at_work, daemon=True).start()
    completions = sampler.generate(prompts, params)
    assert sampler.fleet._num_failures[other.url] > 0  # it was at work when it went
    expected = local.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]

    sampler.update_weights(model.named_parameters(), 2)  # a new group, without the dead
    assert list(sampler.fleet.failures) == [other.url]
    assert list(sampler.logprobs([[1, 2]])) == [server.url]
    assert gap(model, sampler, prompts[0].token_ids) < 1e-4
    assert len(sampler.generate(prompts[:3], GREEDY)) == 3
