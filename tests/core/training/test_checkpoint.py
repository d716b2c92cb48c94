import functools
import os
import subprocess
import sys

import pytest

from verippo.core.training import checkpoint
from verippo.core.training.checkpoint import (
    explain_load_errors,
    find_resume,
    load_state,
    prepare_output,
)


def write_weights(text, folder):
    (folder / "policy").mkdir()
    (folder / "policy" / "weights.bin").write_text(text)


def save(folder, step, *, best=False, total_limit=10, write=None):
    write = write or functools.partial(write_weights, f"weights of {step}")
    return checkpoint.save(
        folder, step=step, state={"step": step}, write=write, best=best, total_limit=total_limit
    )


def folders(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def test_a_checkpoint_holds_the_state_and_whatever_was_written(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    assert load_state(path) == {"step": 7}
    assert (path / "policy" / "weights.bin").read_text() == "weights of 7"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007"


def test_auto_goes_on_from_the_newest_save_and_never_from_none(tmp_path):
    assert find_resume(tmp_path, "auto") is None
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert find_resume(tmp_path, "auto") == newest
    assert find_resume(tmp_path, "never") is None


def test_a_crash_while_writing_leaves_the_old_checkpoint_and_no_half_one(tmp_path):
    old = save(tmp_path, 1)

    def crash(folder):
        write_weights("half", folder)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 2, write=crash)
    assert not (tmp_path / "checkpoints" / "step-00000002").exists()
    assert find_resume(tmp_path, "auto") == old
    assert load_state(old) == {"step": 1}


def test_the_next_save_clears_what_a_crash_left(tmp_path):
    (tmp_path / "checkpoints" / ".writing-step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".writing-step-00000005" / "half").touch()
    save(tmp_path, 6)
    assert folders(tmp_path) == ["step-00000006"]


def crash_at(monkeypatch, name, number):
    """Makes the `number`-th call of a file operation raise as a kill would stop it: before it is
    done."""
    calls, real = [], getattr(os, name)

    def maybe(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, maybe)
    return calls


@pytest.mark.parametrize("name", ["fsync", "rename", "replace", "rmdir", "unlink", "open"])
def test_stopped_at_any_moment_the_run_goes_on_from_a_whole_checkpoint(tmp_path, monkeypatch, name):
    for number in range(1, 40):
        folder = tmp_path / str(number)
        for step in (1, 2, 3):
            save(folder, step, total_limit=2)
        with monkeypatch.context() as patch:
            calls = crash_at(patch, name, number)
            try:
                save(folder, 3, total_limit=1)  # over an existing one, the hardest case
            except KeyboardInterrupt:
                pass
            else:
                assert number > len(calls)
                return
        found = find_resume(folder, "auto")
        step = load_state(found)["step"]
        assert step in (2, 3)
        assert (found / "policy" / "weights.bin").read_text() == f"weights of {step}"
    pytest.fail(f"more than 40 calls of os.{name}")


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 1, write=functools.partial(write_weights, "new"))
    assert (path / "policy" / "weights.bin").read_text() == "new"
    assert folders(tmp_path) == ["step-00000001"]


def test_pruning_keeps_the_newest_and_spares_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best=step == 2, total_limit=2)
    assert folders(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000002"


def test_pruning_spares_the_latest_when_older_steps_are_gone_over_again(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    again = save(tmp_path, 12, total_limit=1)  # the run was resumed from step 10 by hand
    assert folders(tmp_path) == ["step-00000012", "step-00000030"]
    assert find_resume(tmp_path, "auto") == again


@pytest.mark.parametrize("pointer", [None, "", "step-00000009", "step-00000003", ".."])
def test_auto_falls_back_to_the_newest_whole_folder_when_latest_names_none(tmp_path, pointer):
    save(tmp_path, 1)
    whole = save(tmp_path, 2)
    half = tmp_path / "checkpoints" / "step-00000003"  # no state.json: not whole
    half.mkdir()
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_text(pointer)
    assert find_resume(tmp_path, "auto") == whole


def test_a_given_folder_is_taken_and_any_other_refused(tmp_path):
    path = save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_resume(tmp_path, str(path)) == path
    with pytest.raises(
        ValueError,
        match=r"no checkpoint there \(state.json is missing\); give auto, never, or a step folder",
    ):
        find_resume(tmp_path, str(tmp_path))


def test_the_output_folder_is_made_and_left_clean(tmp_path):
    folder = prepare_output(str(tmp_path / "a" / "b"), resume="auto")
    assert folder == tmp_path / "a" / "b"
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_another_process_writes_is_refused_until_that_one_ends(tmp_path):
    prepare_output(str(tmp_path), resume="auto")
    prepare_output(str(tmp_path), resume="auto")  # the same process may go on
    code = "import sys; from verippo.core.training.checkpoint import prepare_output; prepare_output(sys.argv[1], resume='auto')"
    other = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert f"output {tmp_path}: another run writes there" in other.stderr
    subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True, timeout=60)
    prepare_output(str(tmp_path / "a"), resume="auto")


def test_damaged_state_is_refused_and_names_the_older_checkpoint(tmp_path):
    for step in (1, 2, 3):
        path = save(tmp_path, step)
    (path / "state.json").write_text("")
    older = path.with_name("step-00000002")
    with (
        pytest.raises(
            ValueError,
            match=rf"cannot resume from .*\(JSONDecodeError: .*--resume {older} to resume from",
        ),
        explain_load_errors(path),
    ):
        load_state(path)


def test_single_flipped_bit_is_found(tmp_path):
    path = save(tmp_path, 3, write=functools.partial(write_weights, "w" * 1000))
    checkpoint.verify(path)
    weights = path / "policy" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[700] ^= 4
    weights.write_bytes(data)
    with (
        pytest.raises(
            ValueError,
            match=r"policy/weights.bin does not match its checksum\).*give another --output",
        ),
        explain_load_errors(path),
    ):
        checkpoint.verify(path)
    weights.unlink()
    with pytest.raises(ValueError, match="policy/weights.bin is missing"):
        checkpoint.verify(path)


def test_checkpoint_from_elsewhere_needs_to_be_trusted(tmp_path):
    path = save(tmp_path / "other", 3)
    with pytest.raises(ValueError, match=r"lies outside .*mine.*--trust_checkpoint true"):
        find_resume(tmp_path / "mine", str(path))
    assert find_resume(tmp_path / "mine", str(path), trust=True) == path


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output .*file/run: cannot write there: Not a directory"):
        prepare_output(str(tmp_path / "file" / "run"), resume="auto")


def test_another_runs_folder_is_refused_unless_it_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError,
        match="holds a run already: choose another folder, or resume it with --resume auto",
    ):
        prepare_output(str(tmp_path), resume="never")
    assert prepare_output(str(tmp_path), resume="auto") == tmp_path
