"""The batch scripts of launch/slurm: their syntax and options, and their runs under programs that
stand in for Slurm's."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verippo.launch.commands import COMMANDS, import_name
from verippo.launch.option_groups import options

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
COMMON = ROOT / "launch" / "slurm" / "common.sh"
SRUN = """#!/bin/bash
case "$*" in
*"serve start"*)
    echo "$*" >>"$RECORD/servers"
    trap 'echo stopped >>"$RECORD/servers"; exit 0' TERM
    while :; do sleep 0.05; done
    ;;
esac
trap 'echo saved >>"$RECORD/training"; exit 0' USR1
echo "$MASTER_ADDR $MASTER_PORT $*" >>"$RECORD/training"
[[ -z ${FAILS:-} ]] || exit "$FAILS"
if [[ -n ${ENDS:-} ]]; then
    mkdir -p "$OUTPUT/model"
    exit 0
fi
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then
    printf 'node%s\\n' 1 2 3 4 5 6 | head -n "$SLURM_JOB_NUM_NODES"
else
    echo "$*" >>"$RECORD/scontrol"
fi
"""


def text_of(path: Path) -> str:
    """The script with continued lines joined and without comments."""
    joined = re.sub(r"\\\n\s*", " ", path.read_text())
    return "\n".join(line for line in joined.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize("path", [*SCRIPTS, COMMON], ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\t" not in path.read_text()
    if checker := shutil.which("shellcheck"):
        command = [checker, "-x", "-s", "bash", str(path)]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert found.returncode == 0, found.stdout


def known_options(name: str) -> set[str]:
    return {"--config"} | {option.name for option in options(import_name(COMMANDS[name].config))}


@pytest.mark.parametrize("path", [*SCRIPTS, COMMON], ids=lambda path: path.name)
def test_every_option_of_verippo_exists(path: Path) -> None:
    checked = 0
    for line in text_of(path).splitlines():
        command = re.search(r'^train .* (ppo|"\$STAGE") | (serve start) |^(start_servers) ', line)
        if command is None:
            continue
        stage = {"ppo": "ppo", '"$STAGE"': "sft"}.get(command[1], "serve start")
        given = re.findall(r"(?<=\s)--[\w.]+", line[command.start(command.lastindex or 0) :])
        assert given
        assert set(given) <= known_options(stage), line
        checked += 1
    assert checked
    if path in SCRIPTS:
        comments = path.read_text()
        for name in re.findall(r"(?:CONFIG=|:-)(launch/configs/\S+?\.yaml)", comments):
            assert (ROOT / name).exists(), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_requeued_and_warned_before_its_end(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "#SBATCH --requeue" in lines
    assert any(re.fullmatch(r"#SBATCH --signal=B:USR1@\d+", line) for line in lines)
    assert lines[-1] == "requeue_if_stopped"


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], Path]]:
    """Starts a batch script as Slurm would; what it calls is recorded in a folder."""

    def start(script: str, *arguments: str, nodes: int, **variables: Any):
        programs, record = tmp_path / "bin", tmp_path / "record"
        programs.mkdir()
        record.mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "curl": "#!/bin/sh\n"}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORD": str(record),
            "OUTPUT": str(tmp_path / "out"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-6]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": "8",
            **{name: str(value) for name, value in variables.items()},
        }
        command = ["bash", str(ROOT / "launch" / "slurm" / script), *arguments]
        job = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return job, record

    return start


def wait_for(path: Path, job: subprocess.Popen[str]) -> str:
    for _ in range(600):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        assert job.poll() is None, job.stdout and job.stdout.read()
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_job_saves_and_goes_back_to_the_queue(submit, number) -> None:
    job, record = submit("ppo_8b.sbatch", "--policy", "p", nodes=1)
    started = wait_for(record / "training", job)
    assert started.startswith("node1 31000 ")
    assert "--ntasks=8" in started
    assert "ppo --config launch/configs/ppo_8b.yaml --output" in started
    assert started.endswith("--policy p\n")
    job.send_signal(number)
    assert job.wait(timeout=30) == 0
    assert (record / "training").read_text().endswith("saved\n")
    assert (record / "scontrol").read_text() == "requeue 7\n"


def test_a_finished_job_stays_out_of_the_queue(submit) -> None:
    job, record = submit("sft.sbatch", nodes=4, ENDS=1, STAGE="verifier")
    assert job.wait(timeout=30) == 0
    assert not (record / "scontrol").exists()
    assert "--nodelist=node1,node2,node3,node4 --ntasks=32" in (record / "training").read_text()
    assert " verifier --config " in (record / "training").read_text()


def test_a_failed_job_keeps_its_status_and_is_not_requeued(submit) -> None:
    job, record = submit("ppo_8b.sbatch", nodes=1, FAILS=3)
    assert job.wait(timeout=30) == 3
    assert not (record / "scontrol").exists()


def test_servers_share_the_nodes_of_the_training(submit) -> None:
    job, record = submit("ppo_70b.sbatch", nodes=4, ENDS=1, POLICY="p")
    assert job.wait(timeout=30) == 0
    servers = (record / "servers").read_text()
    assert servers.endswith("stopped\n")
    assert "--nodelist=node1,node2,node3,node4 --ntasks=4 --ntasks-per-node=1" in servers
    assert "--tp 8 --mem_fraction 0.4 --arguments=--enable-memory-saver" in servers
    training = (record / "training").read_text()
    urls = ",".join(f"http://node{n}:30000" for n in (1, 2, 3, 4))
    assert f"--sampler.urls {urls} --sampler.api_key_env SERVER_KEY" in training
    assert "--sampler.sync disk --sampler.sleep true" in training


def test_servers_have_nodes_of_their_own(submit) -> None:
    job, record = submit("ppo_70b_servers.sbatch", nodes=6, ENDS=1)
    assert job.wait(timeout=30) == 0
    assert "--nodelist=node5,node6 --ntasks=2" in (record / "servers").read_text()
    training = (record / "training").read_text()
    assert "--nodelist=node1,node2,node3,node4 --ntasks=32" in training
    assert "--sampler.urls http://node5:30000,http://node6:30000" in training
    assert "--sampler.sync distributed --sampler.sleep false" in training
