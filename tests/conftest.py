"""Shared by all tests: small real models with a real tokenizer, real data where it is at hand, and
two-rank runs."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTHONSAFEPATH", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs, and so their children, ignore it
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SGLANG = ROOT / ".sglang"
SGLANG_ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
CORPUS = [
    "## Thinking\n\nThe patient has a fever and a cough.\n\n## Final Response\n\nPneumonia",
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is the most likely diagnosis?",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "A model answered a medical question. Decide whether its answer agrees with the reference.",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 320 tokens that reads and writes any text without loss; no chat
    template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Callable[..., Path]:
    """Makes a random little model with its tokenizer and returns its folder.

    The same arguments, the same weights.
    """

    def make(
        kind: str = "llama",
        *,
        tied: bool = False,
        classes: int | None = None,
        seed: int = 0,
        vocab: int = 320,
        **overrides: int,
    ) -> Path:
        sizes = (
            dict(  # noqa: C408
                vocab_size=vocab,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=2048,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            )
            | overrides
        )
        config = CONFIGS[kind](**sizes, tie_word_embeddings=tied)
        if classes:
            config.num_labels = classes
        torch.manual_seed(seed)
        auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
        folder = tmp_path_factory.mktemp(f"{kind}-model")
        model = auto.from_config(config)
        with (
            torch.no_grad()
        ):  # biases and norms start at 0 and 1: move them, or a test would not see them ignored
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(3)
        model.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def published_models() -> dict[str, dict[str, Any]]:
    """Short name of a published model -> what its config.json says about sizes."""
    return json.loads((ROOT / "tests" / "published_models.json").read_text())


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real small model, beside the project; the test is skipped where they are not."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real data is not at hand ({SHARED})")
    return SHARED


@pytest.fixture
def next_commands(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], list[str]]:
    """The commands that a training run printed for its model, each accepted by its own options."""

    def read(output: Path) -> list[str]:
        from verippo.launch import cli
        from verippo.launch.commands import COMMANDS, import_name

        lines = capsys.readouterr().out.splitlines()
        found = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
        assert [line for line in lines if line.startswith("model: ")][
            -1
        ] == f"model: {output}/model"
        assert lines[-len(found) - 1].startswith("model: ")
        for command in found:
            program, name, *arguments = shlex.split(command)
            assert program == "verippo"
            cli.parse(import_name(COMMANDS[name].config), arguments, program=name)
            assert f"{output}/model" in arguments
        return found

    return read


@pytest.fixture
def problems_file(tmp_path: Path) -> Path:
    """Twelve little problems in the published format."""
    rows = [
        {
            "Open-ended Verifiable Question": f"What is {n} plus one?",
            "Ground-True Answer": str(n + 1),
        }
        for n in range(12)
    ]
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="session")
def two_ranks() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m torch.distributed.run` with two gloo ranks on the arguments; returns the
    finished process."""

    def run(
        *arguments: str, timeout: float = 120, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        num = (env or {}).get("VERIPPO_RANKS", "2")
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            num,
            *arguments,
        ]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PYTHONSAFEPATH": "1"} | (env or {}),
        )

    return run


@pytest.fixture
def llm_server() -> Iterator[Callable[..., Any]]:
    """Starts scripted OpenAI-compatible servers (tests/llm_server.py), closed after the test:
    answer -> LLMServer.
    `llm_server.module` has Answer, error and request_key, of which scripts are made."""
    sys.path.append(str(Path(__file__).parent))
    module, servers = importlib.import_module("llm_server"), []

    def start(answer: Callable[[dict[str, Any]], Any], **options: Any) -> Any:
        servers.append(module.LLMServer(answer, **options))
        return servers[-1]

    start.module = module  # type: ignore[attr-defined]
    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def rank_checks() -> Any:
    """The script tests/rl/rank_checks.py, as a module."""
    sys.path.append(str(Path(__file__).parent / "rl"))
    return importlib.import_module("rank_checks")


@pytest.fixture(scope="session")
def job(
    rank_checks: Any, make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the engine tests work on: little models, an experience made by hand, the updates to
    make. Fields of a Job."""
    return rank_checks.make_job(
        folder=tmp_path_factory.mktemp("ranks"),
        policy=str(make_model("qwen3", tied=True, seed=1)),
        critic=str(make_model("llama", classes=1, seed=2)),
        verifier=str(make_model("llama", classes=2, seed=3)),
    )


@pytest.fixture(scope="session")
def one_rank(rank_checks: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What rank_checks.run gives in this process alone: a list of one."""
    return [rank_checks.run(rank_checks.Job(**job))]


@pytest.fixture(scope="session")
def both_ranks(
    rank_checks: Any, job: dict[str, Any], two_ranks: Callable[..., Any]
) -> list[dict[str, Any]]:
    """What rank_checks.run gives on each of two ranks."""
    torch.save(job, job["folder"] / "job.pt")
    done = two_ranks(rank_checks.__file__, str(job["folder"]))
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(job["folder"] / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="session")
def sglang_options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields of a ServerConfig with which the environment of `make test-sglang` serves on CPU, on a
    free port."""
    if not (SGLANG / ".stubs").exists():
        pytest.skip("sglang's own environment is not there: make test-sglang")
    return {
        "python": str(SGLANG / "bin" / "python"),
        "port": 0,
        "device": "cpu",
        "environment": SGLANG_ENVIRONMENT,
        "state": str(tmp_path_factory.mktemp("servers")),
        "start_timeout_seconds": 300.0,
    }


@pytest.fixture(scope="session")
def sglang_server(
    sglang_options: dict[str, Any], make_model: Callable[..., Path]
) -> Iterator[SimpleNamespace]:
    """A real sglang server for the whole session (.url, .model_path, .pid).

    Who updates its weights puts them back.
    """
    from verippo.core.sampling.server import serving
    from verippo.core.sampling.server_command import ServerConfig

    model = make_model("llama")
    with serving(ServerConfig(model=str(model), **sglang_options)) as server:
        yield SimpleNamespace(url=server.url, model_path=str(model), pid=server.pid)


@pytest.fixture
def start_sglang(sglang_options: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Starts one more server, `start_sglang(model_path, **fields of a ServerConfig) -> Server`,
    stopped after the test
    if the test has not killed it."""
    from verippo.core.sampling.server import serving
    from verippo.core.sampling.server_command import ServerConfig

    with ExitStack() as stack:
        yield lambda model, **fields: stack.enter_context(
            serving(
                ServerConfig(
                    **{"model": str(model), "stop_timeout_seconds": 30.0} | sglang_options | fields
                )
            )
        )


@pytest.fixture(scope="session")
def fake_sglang(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields of a ServerConfig that start tests/fake_sglang.py in sglang's place, with an empty
    model."""
    folder = tmp_path_factory.mktemp("fake")
    (folder / "config.json").write_text("{}")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{ROOT}/tests/fake_sglang.py" "$@"\n')
    python.chmod(0o755)
    return {
        "python": str(python),
        "model": str(folder),
        "device": "cpu",
        "start_timeout_seconds": 30.0,
    }
