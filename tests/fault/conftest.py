"""Small runs of every training stage, to be killed, stopped, damaged and resumed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.core.training.stopping import SIGNALS
from verippo.launch import cli

MACHINE_METRICS = re.compile("seconds_.*|tokens_per_second|peak_memory_gib")
COMMON = {
    "zero_stage": 2,
    "dtype": "fp32",
    "gradient_checkpointing": "false",
    "log_to": "jsonl",
    "save_every": 4,
    "eval_every": 3,
    "eval_fraction": 0.25,
    "max_tokens_per_gpu": 256,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("fault")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A run that a signal stopped in this process leaves the signals ignored."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def runs(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Commands of small runs: `arguments(stage, output, **changes)`, and what they leave."""
    data = tmp_path_factory.mktemp("data")
    problems = [
        {QUESTION_KEY: f"What is {n} modulo two?", ANSWER_KEY: str(n % 2)} for n in range(16)
    ]
    rows = [
        {"Question": f"What is {n} plus {n}?", "Complex_CoT": "Add. " * 9, "Response": f"{2 * n}."}
        for n in range(16)
    ]
    answers = [
        {"response": f"It is {n}.", "reference": str(n - n % 2), "label": n % 2 == 0}
        for n in range(16)
    ]
    for name, content in {"ppo": problems, "sft": rows, "verifier": answers}.items():
        (data / f"{name}.json").write_text(json.dumps(content))
    model = make_model("llama", seed=11)
    stages: dict[str, dict[str, Any]] = {
        "sft": {
            "model": model,
            "max_seq_len": 256,
            "max_steps": 9,
            "batch_size": 6,
            "learning_rate": 1e-3,
        },
        "verifier": {
            "model": model,
            "max_seq_len": 256,
            "max_steps": 9,
            "batch_size": 6,
            "learning_rate": 1e-3,
        },
        "ppo": {
            "policy": model,
            "verifier.kind": "exact",
            "steps": 7,
            "prompts_per_step": 6,
            "epochs": 2,
            "minibatches": 2,
            "max_prompt_tokens": 70,
            "sampling.max_new_tokens": 20,
            "policy_learning_rate": 1e-3,
            "critic_learning_rate": 1e-2,
        },
    }

    def arguments(stage: str, output: Path, **changes: Any) -> list[str]:
        options = COMMON | {"data": data / f"{stage}.json", "output": output} | stages[stage]
        listed = [[f"--{name}", str(value)] for name, value in (options | changes).items()]
        return [stage, *[part for option in listed for part in option]]

    return SimpleNamespace(arguments=arguments, data=data, model=model)


@pytest.fixture(scope="session")
def unbroken(
    runs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Folder of a stage's uninterrupted run on one rank."""
    made: dict[str, Path] = {}

    def folder(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("unbroken") / stage
            cli.main(runs.arguments(stage, made[stage]))
        return made[stage]

    return folder


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    """Rows of a run's JSONL file, without what depends on the machine."""

    def read(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
        file = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [
            {key: value for key, value in row.items() if not MACHINE_METRICS.fullmatch(key)}
            for row in rows
        ]

    return read


@pytest.fixture(scope="session")
def check_same(rows_of: Callable[..., Any]) -> Callable[[Path, Path], None]:
    """Checks that two runs have the same records, and weights of the same bits."""

    def check(folder: Path, other: Path) -> None:
        for name in ("metrics", "eval", "samples"):
            assert rows_of(folder, name) == rows_of(other, name), name
        a, b = (load_file(path / "model" / "model.safetensors") for path in (folder, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    return check


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python ARGUMENTS` in a session of its own; what is left is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        scripts = Path(sys.executable).parent
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"} | environment,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def start_ranks(
    start: Callable[..., subprocess.Popen[str]],
) -> Callable[..., list[subprocess.Popen[str]]]:
    """Starts `verippo ARGUMENTS` on two ranks as srun would: no launcher ends the other rank."""

    def run(arguments: list[str]) -> list[subprocess.Popen[str]]:
        port = str(random.randrange(20000, 30000))
        return [
            start(
                *("-m", "verippo.launch.cli", *arguments),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            for rank in range(2)
        ]

    return run


@pytest.fixture(scope="session")
def wait_for_steps(rows_of: Callable[..., Any]) -> Callable[..., None]:
    """Waits until a run has written a number of steps."""

    def wait(folder: Path, number: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 600
        file = folder / "metrics.jsonl"
        while not (file.exists() and file.read_text().count("\n") >= number):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait
