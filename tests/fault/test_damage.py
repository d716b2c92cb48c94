"""Damaged files of a run: found before training, or repaired, and never trained on."""

from __future__ import annotations

import shutil

import pytest

from verippo.core.training.engine import TrainEngine
from verippo.launch import cli


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def half_done(runs, tmp_path_factory):
    """Folders of runs that ended after step 5, with checkpoints of steps 2 and 4, by stage."""
    folders = {}
    for stage, calls in {"sft": 6, "ppo": 8 * 5 + 1}.items():
        folders[stage] = tmp_path_factory.mktemp("half") / stage
        with pytest.MonkeyPatch.context() as patch:
            real = TrainEngine.step
            count = []

            def step(self, rate, real=real, count=count, calls=calls):
                count.append(rate)
                if len(count) == calls:
                    raise Killed
                return real(self, rate)

            patch.setattr(TrainEngine, "step", step)
            with pytest.raises(Killed):
                cli.main(runs.arguments(stage, folders[stage], save_every=2))
    return folders


@pytest.fixture(params=["sft", "ppo"])
def damaged(request, half_done, runs, tmp_path):
    """(stage, folder to damage, command that resumes it)."""
    folder = tmp_path / "run"
    shutil.copytree(half_done[request.param], folder)
    return request.param, folder, runs.arguments(request.param, folder, save_every=2)


def refused(argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("verippo:")]
    return line


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_flipped_bit_in_an_optimizer_shard_is_refused(damaged, unbroken, check_same, capsys):
    stage, folder, argv = damaged
    newest = folder / "checkpoints" / "step-00000004"
    shards = sorted(newest.rglob("*optim_states.pt"))
    flip_bit(shards[-1])
    line = refused(argv, capsys)
    assert f"{shards[-1].relative_to(newest)} does not match its checksum" in line
    older = newest.with_name("step-00000002")
    assert f"--resume {older} to resume from an older one" in line
    cli.main([*argv, "--resume", str(older)])
    check_same(folder, unbroken(stage))


@pytest.mark.parametrize("keep", [0, 20])
def test_truncated_state_is_refused(damaged, keep, capsys):
    _, folder, argv = damaged
    state = folder / "checkpoints" / "step-00000004" / "state.json"
    state.write_bytes(state.read_bytes()[:keep])
    line = refused(argv, capsys)
    assert "step-00000004" in line
    assert "--resume" in line


def test_missing_shard_is_refused(damaged, capsys):
    _, folder, argv = damaged
    newest = folder / "checkpoints" / "step-00000004"
    shard = sorted(newest.rglob("*optim_states.pt"))[0]
    shard.unlink()
    assert f"{shard.relative_to(newest)} is missing" in refused(argv, capsys)


@pytest.mark.parametrize("damage", [b'{"step": 5, "lo', b"\x00" * 40, b"\xff\xfe{]\n"])
def test_damaged_metrics_lose_their_broken_lines_only(damaged, unbroken, check_same, damage):
    stage, folder, argv = damaged
    for name in ("metrics", "eval"):
        with (folder / f"{name}.jsonl").open("ab") as file:
            file.write(damage)
    cli.main(argv)
    check_same(folder, unbroken(stage))


@pytest.mark.parametrize("content", [None, b"", b"step-00000099", b"\xff\x00"])
def test_damaged_latest_resumes_from_the_newest_whole_checkpoint(
    damaged, unbroken, check_same, content, capsys
):
    stage, folder, argv = damaged
    latest = folder / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    cli.main(argv)
    assert "resuming after step 4" in capsys.readouterr().out
    check_same(folder, unbroken(stage))
