"""Damaged data, configurations, models and side files: one line that names the file, no traces."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY, load_rows
from verippo.eval.questions import load_questions
from verippo.launch import cli
from verippo.launch.option_check import read_config_files

EXAM = {
    "question": "Which vitamin is lacking in a sailor whose gums bleed after months at sea?",
    "options": {"A": "Vitamin A", "B": "Vitamin B", "C": "Vitamin C"},
    "answer_idx": "C",
}
ROWS = {
    "problems": EXAM,
    "search": {QUESTION_KEY: "Which vitamin?", ANSWER_KEY: "Vitamin C"},
    "sft": {"Question": "Which vitamin?", "Complex_CoT": "Gums.", "Response": "Vitamin C"},
    "verifier": {"response": "Vitamin C", "reference": "vitamin C", "label": True},
    "ppo": {QUESTION_KEY: "Which vitamin?", ANSWER_KEY: "Vitamin C"},
    "eval": EXAM,
}
"""A good row of each command's data."""
DEEP = "[" * 100_000
DIGITS = "9" * 100_000
TRAINING = """
    --dtype fp32 --zero_stage 2 --gradient_checkpointing false --log_to jsonl
    --max_tokens_per_gpu 512
"""
OPTIONS = {
    "problems": "--llm.model m --llm.base_url http://127.0.0.1:9/v1 --llm.max_retries 0",
    "search": "--llm.model m --llm.base_url http://127.0.0.1:9/v1 --llm.max_retries 0",
    "sft": f"{TRAINING} --max_seq_len 256 --epochs 1",
    "verifier": f"{TRAINING} --max_seq_len 256 --epochs 1",
    "ppo": f"{TRAINING} --verifier.kind exact --steps 1 --prompts_per_step 2 --max_prompt_tokens 64"
    " --sampling.max_new_tokens 4",
    "eval": "--engine local --dtype fp32 --max_new_tokens 4",
}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama", seed=21)


@pytest.fixture
def command(model, tmp_path):
    """Arguments of a command with its data; further options come last."""

    def arguments(name, data, *more, path=model, output=None):
        argv = [name, "--data", str(data), "--output", str(output or tmp_path / "out")]
        if name not in ("problems", "search"):
            argv += [{"ppo": "--policy"}.get(name, "--model"), str(path)]
        return [*argv, *OPTIONS[name].split(), *map(str, more)]

    return arguments


def good_rows(name, num=4):
    return [ROWS[name] for _ in range(num)]


def good_file(folder, name, suffix=".json"):
    path = folder / f"good{suffix}"
    rows = good_rows(name)
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    return path


def saved_folder(folder, name):
    Dataset.from_list(good_rows(name)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def written(content, suffix=".json"):
    def write(folder, name):
        path = folder / f"bad{suffix}"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def in_row(key_or_value, suffix=".json"):
    """A file whose third row has a broken value in its first text."""

    def write(folder, name):
        rows = [json.dumps(row) for row in good_rows(name)]
        first = next(iter(ROWS[name]))
        broken = dict(ROWS[name]) | {first: "VALUE"}
        rows[2] = json.dumps(broken).replace('"VALUE"', key_or_value)
        path = folder / f"bad{suffix}"
        if suffix == ".jsonl":
            path.write_text("\n".join(rows))
        else:
            path.write_text(f"[{', '.join(rows)}]")
        return path

    return write


def damaged(suffix, damage):
    def write(folder, name):
        path = good_file(folder, name, suffix)
        path.write_bytes(damage(path.read_bytes()))
        return path

    return write


def folder_with(pattern, damage):
    def write(folder, name):
        saved = saved_folder(folder, name)
        (path,) = saved.glob(pattern)
        damage(path)
        return saved

    return write


def fifo(folder, name):
    os.mkfifo(folder / "bad.json")
    return folder / "bad.json"


def folder_named_as_a_file(folder, name):
    (folder / "bad.json").mkdir()
    return folder / "bad.json"


def broken_link(folder, name):
    (folder / "bad.json").symlink_to(folder / "nothing")
    return folder / "bad.json"


def endless_device(folder, name):
    (folder / "bad.json").symlink_to("/dev/zero")
    return folder / "bad.json"


def unix_socket(folder, name):
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("bad.jsonl")
    os.chdir(here)
    return folder / "bad.jsonl"


DATA = {
    "deep json": written(DEEP),
    "deep jsonl": written(DEEP + "\n", ".jsonl"),
    "deep value in a row": in_row(DEEP),
    "deep closed value in a row": in_row(DEEP + "]" * 100_000),
    "deep closed value in a line": in_row(DEEP + "]" * 100_000, ".jsonl"),
    "endless digits": in_row(DIGITS),
    "endless digits in a line": in_row(DIGITS, ".jsonl"),
    "integer over int64": in_row("1" + "0" * 40),
    "float over all": in_row("1e999"),
    "not a number": in_row("NaN"),
    "unpaired surrogate": in_row('"\\ud800"'),
    "not UTF-8": written(b'[{"question": "\xff"}]'),
    "line not UTF-8": written(b'{"question": "\xff"}\n', ".jsonl"),
    "UTF-16": written('[{"question": "x"}]'.encode("utf-16")),
    "null bytes": written(b"\x00" * 100),
    "empty": written(b""),
    "empty jsonl": written(b"", ".jsonl"),
    "empty list": written("[]"),
    "number": written("3"),
    "list of lists": written("[[1]]"),
    "object of numbers": written('{"a": 1}'),
    "lines of lists": written("[1]\n", ".jsonl"),
    "truncated json": damaged(".json", lambda data: data[:-9]),
    "truncated jsonl": damaged(".jsonl", lambda data: data[:-9]),
    "truncated parquet": damaged(".parquet", lambda data: data[:-9]),
    "parquet without its pages": damaged(".parquet", lambda data: data[:4] + b"x" * 99 + data[99:]),
    "parquet of zeros": written(b"\x00" * 200, ".parquet"),
    "empty parquet": written(b"", ".parquet"),
    "json named parquet": written("[{}]", ".parquet"),
    "folder without state": folder_with("state.json", Path.unlink),
    "folder with broken state": folder_with("state.json", lambda path: path.write_text("{")),
    "folder with deep state": folder_with("state.json", lambda path: path.write_text(DEEP)),
    "folder with list as state": folder_with("state.json", lambda path: path.write_text("[]")),
    "folder with broken info": folder_with(
        "dataset_info.json", lambda path: path.write_text('{"features": 3}')
    ),
    "folder without table": folder_with("*.arrow", Path.unlink),
    "folder with broken table": folder_with("*.arrow", lambda path: path.write_bytes(b"x" * 50)),
    "folder with cut table": folder_with(
        "*.arrow", lambda path: path.write_bytes(path.read_bytes()[:-400])
    ),
    "fifo": fifo,
    "folder named as a file": folder_named_as_a_file,
    "broken link": broken_link,
    "endless device": endless_device,
    "socket": unix_socket,
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ROWS)
def test_malformed_data_is_refused_in_one_line(name, kind, command, refused, tmp_path):
    path = DATA[kind](tmp_path, name)
    line = refused(command(name, path))
    assert str(path) in line
    assert len(line) < 1000


@pytest.mark.parametrize("kind", ["deep closed value in a line", "endless digits in a line"])
@pytest.mark.parametrize("name", ROWS)
def test_broken_line_is_named_by_number(name, kind, command, refused, tmp_path):
    assert ": line 3" in refused(command(name, DATA[kind](tmp_path, name)))


@pytest.mark.parametrize("name", ROWS)
def test_row_of_a_wrong_value_is_named_by_number(name, command, refused, tmp_path):
    line = refused(command(name, DATA["integer over int64"](tmp_path, name)))
    assert "row 2" in line or "item 2" in line


@pytest.mark.parametrize("name", ["problems", "ppo", "eval"])
def test_damaged_further_files_are_refused(name, command, refused, tmp_path, model):
    good = good_file(tmp_path, name)
    (tmp_path / "x").mkdir()
    path = DATA["endless digits"](tmp_path / "x", name)
    option = {"problems": "--decontaminate", "ppo": "--eval_data", "eval": "--data"}[name]
    line = refused(command(name, good, option, path))
    assert str(path) in line


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_byte_damage_is_read_or_refused_with_the_file(suffix, tmp_path, data):
    """Truncated, flipped and inserted bytes give rows, or a ValueError that names the file."""
    path = good_file(tmp_path, "eval", suffix)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["cut", "flip", "insert"])):
            case "cut":
                del content[at:]
            case "flip":
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        content = content or bytearray(b"x")
    path.write_bytes(content)
    for read in (load_rows, load_questions):
        refusal = None
        try:
            read(str(path))
        except ValueError as error:
            refusal = error
        assert refusal is None or str(path) in str(refusal)


# --- configuration files ---

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
YAML = {
    "list": written("- 1\n- 2\n", ".yaml"),
    "word": written("hello", ".yaml"),
    "number": written("3", ".yaml"),
    "empty": written("", ".yaml"),
    "not UTF-8": written(b"output: \xff\xfe\n", ".yaml"),
    "UTF-16 without mark": written("output: x".encode("utf-16-le"), ".yaml"),
    "control character": written("output: a\x07b", ".yaml"),
    "alias bomb": written(BOMB, ".yaml"),
    "alias bomb in a field": written(BOMB + "\ndata: *a11", ".yaml"),
    "alias of itself": written("output: &a [*a]", ".yaml"),
    "deep": written("output: " + DEEP, ".yaml"),
    "deep mapping": written("{a: " * 50_000, ".yaml"),
    "endless digits": written(f"seed: {DIGITS}", ".yaml"),
    "integer over int64": written("seed: 1" + "0" * 40, ".yaml"),
    "open bracket": written("output: [", ".yaml"),
    "python object": written("output: !!python/object/apply:os.getcwd []", ".yaml"),
    "two documents": written("output: a\n---\noutput: b\n", ".yaml"),
    "number as key": written("3: 4", ".yaml"),
    "list as key": written("? [1]\n: 2", ".yaml"),
    "list as value": written("output: [a]", ".yaml"),
    "mapping as value": written("output: {a: b}", ".yaml"),
    "date as value": written("seed: 2001-01-01", ".yaml"),
    "null byte": written('data: "a\\0b"', ".yaml"),
    "null byte in output": written('output: "a\\0b"', ".yaml"),
    "empty output": written('output: ""', ".yaml"),
    "blank output": written('output: "  "', ".yaml"),
    "fifo": fifo,
    "folder": folder_named_as_a_file,
    "endless device": endless_device,
    "missing": lambda folder, name: folder / "bad.yaml",
}
NAMED_BY_FIELD = (
    "seed",
    "output",
    "data",
)
"""Values that are refused for what they say: the line names the field."""


@pytest.mark.parametrize("kind", YAML)
@pytest.mark.parametrize("name", ["problems", "ppo", "eval", "eval compare", "serve status"])
def test_malformed_configuration_is_refused_in_one_line(name, kind, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = YAML[kind](tmp_path, name)
    kinds = {"problems": "--llm.model m", "ppo": "--policy p --verifier.kind exact --steps 1"}
    argv = [*name.split(), "--config", path, *kinds.get(name, "").split()]
    if name == "eval":
        argv += ["--model", "m", "--engine", "local"]
    if name == "eval compare":
        argv += ["--first", "a", "--second", "b"]
    line = refused(argv, output=tmp_path)
    assert path.name in line or any(field in line for field in NAMED_BY_FIELD)
    assert len(line) < 1000


@pytest.mark.parametrize("name", ROWS)
def test_empty_output_is_refused(name, command, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = command(name, good_file(tmp_path, name), "--output", "")
    assert "output is empty" in refused(argv, output=tmp_path)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_byte_damage_in_yaml_is_read_or_refused(tmp_path, data):
    from verippo.eval.config import CompareConfig

    path = tmp_path / "c.yaml"
    content = bytearray(b"first: a\nsecond: &b [x]\noutput: c\nseed: 3\nscoring: original\n")
    at = data.draw(st.integers(0, len(content) - 1))
    content[at:at] = data.draw(st.binary(min_size=1, max_size=6))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_config_files(["--config", str(path)])
        cli.parse(CompareConfig, ["--config", str(path)], program="verippo eval compare")


# --- models ---


def template(text):
    def damage(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}))

    return damage


def overwritten(name, content):
    return lambda folder: (folder / name).write_bytes(content.encode())


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


MODELS = {
    "empty folder": emptied,
    "configuration no JSON": overwritten("config.json", "{"),
    "configuration deep": overwritten("config.json", DEEP),
    "configuration a list": overwritten("config.json", "[]"),
    "configuration empty": overwritten("config.json", ""),
    "configuration of no type": overwritten("config.json", "{}"),
    "configuration of wrong sizes": overwritten(
        "config.json", '{"model_type": "llama", "hidden_size": "x"}'
    ),
    "configuration a folder": lambda folder: (
        (folder / "config.json").unlink(),
        (folder / "config.json").mkdir(),
    ),
    "weights cut": cut_weights,
    "weights empty": overwritten("model.safetensors", ""),
    "weights of garbage": overwritten("model.safetensors", "x" * 1000),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "tokenizer no JSON": overwritten("tokenizer.json", "{"),
    "tokenizer deep": overwritten("tokenizer.json", DEEP),
    "tokenizer configuration no JSON": overwritten("tokenizer_config.json", "["),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("token*")],
    "template that raises": template("{{ raise_exception('no system turn') }}"),
    "template without syntax": template("{% for %}"),
    "template of a missing attribute": template("{{ messages[0].content.nothing() }}"),
    "template that divides by zero": template("{{ 1 // 0 }}"),
    "template that recurses": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template of a huge range": template("{% for i in range(10 ** 30) %}{% endfor %}"),
    "template that drops the question": template("hello"),
    "template that is a number": template(3),
    "templates without a default": template([{"name": "tool", "template": "x"}]),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["sft", "verifier", "ppo", "eval"])
def test_broken_model_is_refused_in_one_line(name, kind, command, refused, tmp_path, model):
    if name == "verifier" and "template" in kind:
        pytest.skip("reads no conversation")
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    MODELS[kind](broken)
    line = refused(command(name, good_file(tmp_path, name), path=broken))
    assert str(broken) in line or "the chat template" in line
    assert len(line) < 1000


@pytest.mark.parametrize("name", ["sft", "verifier", "ppo", "eval"])
def test_nothing_is_left_in_a_folder_that_existed(name, command, refused, tmp_path, model):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    cut_weights(broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(command(name, good_file(tmp_path, name), path=broken))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


# --- files of an earlier run ---


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, make_model):
    """command -> output folder of a finished run, and its data."""
    root = tmp_path_factory.mktemp("finished")
    runs = {}
    for name in ("sft", "ppo", "eval"):
        data = good_file(root, name)
        data = data.rename(root / f"{name}.json")
        path = "--policy" if name == "ppo" else "--model"
        argv = [name, "--data", str(data), "--output", str(root / name), path, str(model)]
        cli.main([*argv, *OPTIONS[name].split()])
        runs[name] = root / name, data
    return runs


STEP = "checkpoints/step-00000001"
ENDLESS = f'{{"step": {DIGITS}}}'
SIDE_FILES = {
    "metrics.jsonl": [DEEP + "\n", "[1]\n", '{"step": "x"}\n', '{"step": []}\n', ENDLESS, "\x00"],
    "samples.jsonl": ["3\n", '{"step": null}\n'],
    "config.yaml": ["[1]", "{", BOMB, DEEP, ENDLESS],
    f"{STEP}/state.json": ["", "{", "[]", DEEP, '{"step": "x"}', '{"nothing": 1}', ENDLESS],
    f"{STEP}/checksums.json": ["", "{", "[]", DEEP, "{}", '{"x": 3}'],
    "checkpoints/latest": ["", "nothing", "../..", "\x00", "é" * 3],
    "checkpoints/best": ["", "\x00", "../.."],
}


@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("file", "content"),
    [(file, content) for file, contents in SIDE_FILES.items() for content in contents],
    ids=lambda part: part[:24].encode("unicode_escape").decode(),
)
def test_damaged_side_file_is_read_over_or_refused(
    name, file, content, finished, command, tmp_path, refused
):
    folder, data = finished[name]
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / file).write_bytes(content.encode("latin-1"))
    more = ["--steps", 2] if name == "ppo" else ["--epochs", 2]
    argv = [str(part) for part in command(name, data, *more)]
    before = (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns
    status = 0
    try:
        cli.main(argv)
    except SystemExit as error:
        status = error.code
    if status == 0:
        assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns > before
    else:
        assert "step-00000001" in refused(argv)


JOURNAL = {
    "deep": DEEP,
    "list": "[1]",
    "list as key": '{"key": [1], "value": 1}',
    "number as key": '{"key": 1, "value": 1}',
    "digits": f'{{"key": {DIGITS}}}',
    "not UTF-8": b'{"key": "\xff"}',
}


@pytest.mark.parametrize("kind", JOURNAL)
def test_damaged_journal_is_refused_by_line(kind, finished, command, refused, tmp_path):
    folder, data = finished["eval"]
    shutil.copytree(folder, tmp_path / "out")
    journal = tmp_path / "out" / "journal.jsonl"
    line = JOURNAL[kind]
    lines = journal.read_bytes().split(b"\n")
    lines[1:1] = [line.encode() if isinstance(line, str) else line]
    journal.write_bytes(b"\n".join(lines))
    assert f"journal {journal}: line 2 is not an entry" in refused(command("eval", data))


@pytest.mark.parametrize("value", ["3", '"x"', "[]", "{}", '{"text": 3}', '{"nothing": 1}'])
@pytest.mark.parametrize("name", ["eval", "search"])
def test_journal_with_a_value_of_another_form_is_refused(
    value, name, finished, command, refused, tmp_path, llm_server
):
    data = good_file(tmp_path, name)
    server = llm_server(lambda body: "True")
    more = ["--llm.base_url", f"{server.url}"] if name == "search" else []
    argv = [str(part) for part in command(name, data, *more)]
    cli.main(argv)
    journal = tmp_path / "out" / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if isinstance(line.get("value"), dict):
            line["value"] = json.loads(value)
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert f"journal {journal}: the entry of key" in refused(argv)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_journal_that_is_no_file_is_refused(kind, finished, command, refused, tmp_path):
    (tmp_path / "out").mkdir()
    journal = tmp_path / "out" / "journal.jsonl"
    if kind == "folder":
        journal.mkdir()
    elif kind == "fifo":
        os.mkfifo(journal)
    else:
        journal.symlink_to("/dev/zero")
    assert str(journal) in refused(command("eval", finished["eval"][1]))


RESULTS = {
    "deep": DEEP,
    "empty": "",
    "list": "[]",
    "no items": '{"config": {}, "items": []}',
    "items of numbers": '{"config": {}, "items": [1]}',
    "items a number": '{"config": {}, "items": 1}',
    "digits": f'{{"config": {{}}, "items": [{DIGITS}]}}',
    "configuration a number": None,
    "answers a number": None,
    "answers empty": None,
    "options a number": None,
    "letters a number": None,
    "runs of other numbers": None,
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("kind", RESULTS)
def test_damaged_results_are_refused(kind, finished, refused, tmp_path):
    good = finished["eval"][0] / "results.json"
    content = RESULTS[kind]
    results = json.loads(good.read_text())
    item = results["items"][0]
    match kind:
        case "configuration a number":
            results["config"] = 3
        case "answers a number":
            item["answers"] = 3
        case "answers empty":
            item["answers"] = []
        case "options a number":
            item["options"] = 3
        case "letters a number":
            item["answers"][0]["letters"] = 3
        case "runs of other numbers":
            item["answers"] *= 2
    content = json.dumps(results) if content is None else content
    path = tmp_path / "bad" / "results.json"
    path.parent.mkdir()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    for pair in ([path, good], [good, path.parent]):
        line = refused(["eval", "compare", *pair, "--output", tmp_path / "out"])
        assert str(path) in line


def test_results_that_are_a_fifo_are_refused(finished, refused, tmp_path):
    path = fifo(tmp_path, "eval")
    argv = ["eval", "compare", path, finished["eval"][0], "--output", tmp_path / "out"]
    assert str(path) in refused(argv)


def test_damaged_calibration_does_not_end_a_run(make_model, command, tmp_path):
    verifier = make_model("llama", classes=2, seed=22)
    for content in (DEEP, "[]", '{"curve": 3}', '{"curve": [3]}', f'{{"num": {DIGITS}}}'):
        (verifier / "calibration.json").write_text(content)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        more = ["--verifier.kind", "classifier", "--verifier.model", verifier]
        cli.main([str(part) for part in command("ppo", good_file(tmp_path, "ppo"), *more)])
        assert (tmp_path / "out" / "model").is_dir()
