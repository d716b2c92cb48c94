"""A full disk ends a run with one line, and the run resumes once there is space."""

from __future__ import annotations

import resource
import shutil
import subprocess

import pytest

from verippo.launch import cli


@pytest.mark.parametrize("held_out", [0.25, 0.0])  # the best model is written first, or not at all
def test_limit_on_file_sizes_ends_the_run_with_one_line(
    held_out, runs, unbroken, check_same, start, tmp_path
):
    argv = runs.arguments("sft", tmp_path / "run", eval_fraction=held_out)
    code = (
        "import resource, sys\n"
        "from verippo.launch import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))\n"
        "cli.main(sys.argv[1:])\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = start("-c", code, *argv)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 2, err[-2000:]
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "verippo: sft:" in line]
    assert "more than 65536 bytes, the limit of this process: raise it (ulimit -f)" in line
    if held_out:
        cli.main(argv)
        check_same(tmp_path / "run", unbroken("sft"))


def test_full_file_system_ends_the_run_and_keeps_its_last_checkpoint(
    runs, unbroken, check_same, start, tmp_path, capsys
):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted")
    try:
        argv = runs.arguments("sft", folder / "run", save_every=1, save_total_limit=50)
        process = start("-m", "verippo.launch.cli", *argv)
        _, err = process.communicate(timeout=90)
        assert process.returncode == 2, err[-2000:]
        assert "Traceback" not in err
        assert "checkpoints: no space left for a checkpoint: free some and start again" in err
        shutil.copytree(folder / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    argv = runs.arguments("sft", tmp_path / "run")
    cli.main(argv)
    assert "resuming after step" in capsys.readouterr().out
    check_same(tmp_path / "run", unbroken("sft"))
