"""`verippo` end to end: outputs of a run, exact repetition and resumption, refused mistakes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from verippo.core.text.chat import render_prompt, render_response
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.core.training.pretrained import load_tokenizer
from verippo.launch import cli
from verippo.rl.config import PPOConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# scripts of users read these names: do not rename them
INTERFACE = """
    step episodes score_mean score_right_rate score_unparsable_rate kl_mean reward_mean
    response_length_mean truncated_rate entropy policy_loss value_loss clip_fraction approx_kl
    explained_variance ratio_first_minibatch_max sampler_logprob_gap_mean sampler_logprob_gap_p99
    grad_norm_policy grad_norm_value lr_policy lr_value skipped_steps seconds_rollout seconds_score
    seconds_forward seconds_train seconds_sync tokens_generated tokens_per_second peak_memory_gib
"""
METRICS = set(INTERFACE.split())
SAME_ON_TWO_RANKS = """
    score_mean score_right_rate score_unparsable_rate kl_mean reward_mean response_length_mean
    truncated_rate entropy policy_loss value_loss clip_fraction approx_kl explained_variance
    grad_norm_policy grad_norm_value tokens_generated
"""
MACHINE_METRICS = re.compile("seconds_.*|tokens_per_second|peak_memory_gib")


def arguments(output, **changes):
    """Arguments of a small `verippo ppo`.

    A double underscore stands for a dot; None removes an option.
    """
    options = {
        "output": output,
        "verifier__kind": "exact",
        "steps": 4,
        "prompts_per_step": 6,
        "epochs": 2,
        "minibatches": 2,
        "max_prompt_tokens": 70,
        "sampling__max_new_tokens": 31,
        "sampling__temperature": 0.9,
        "max_tokens_per_gpu": 256,
        "zero_stage": 2,
        "dtype": "fp32",
        "gradient_checkpointing": "false",
        "policy_learning_rate": 3e-4,
        "critic_learning_rate": 1e-2,
        "log_to": "jsonl",
    } | changes
    listed = [
        (f"--{name.replace('__', '.')}", str(value))
        for name, value in options.items()
        if value is not None
    ]
    return ["ppo", *[part for option in listed for part in option]]


def rows_of(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def without_machine_metrics(rows):
    return [
        {key: value for key, value in row.items() if not MACHINE_METRICS.fullmatch(key)}
        for row in rows
    ]


def same_weights(first, second):
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(capsys, argv):
    """The line on stderr with which the command refuses the arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("verippo: ")
    return err


def question(number):
    return f"What is {number} modulo two?"


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Twelve problems; the question in row 5 is too long for max_prompt_tokens."""
    rows = [
        {QUESTION_KEY: question(n) * (3 if n == 5 else 1), ANSWER_KEY: str(n % 2)}
        for n in range(12)
    ]
    path = tmp_path_factory.mktemp("data") / "problems.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def taught_policy(make_model, tmp_path_factory):
    """A policy that answers these questions with 0 or 1 at random, mostly in the right format.

    So there are right, wrong and unparsable responses of different lengths, some truncated.
    """
    folder = tmp_path_factory.mktemp("taught-policy")
    rng = random.Random(0)
    source = make_model("llama", seed=11)
    tokenizer = load_tokenizer(str(source))
    model = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        ids = torch.zeros(12, 100, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for n in range(12):
            answer = rng.choice("01")
            text = answer
            if rng.random() < 0.9:
                thinking = rng.choice(["Halve.", "Halve.", "Halve it."])
                text = render_response(thinking, answer)
            prompt = render_prompt(tokenizer, question(n))
            response = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
            ids[n, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            labels[n, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.model_max_length = 40  # prompts are longer: tokenizers would warn of it
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(taught_policy, problems):
    """Options of the reference run: it evaluates every second step and saves every step."""
    return {
        "policy": taught_policy,
        "data": problems,
        "eval_fraction": 0.3,
        "eval_every": 2,
        "save_every": 1,
        "steps": 6,
    }


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    """Output folder of an uninterrupted run that reads most of its options from a YAML file."""
    folder = tmp_path_factory.mktemp("runs")
    listed = arguments(folder / "unbroken", **settings)[1:]
    names = [name.removeprefix("--") for name in listed[::2]]
    plain = dict(zip(names, map(yaml.safe_load, listed[1::2]), strict=True))
    nested = {}
    for name, value in plain.items():
        outer, _, inner = name.rpartition(".")
        (nested.setdefault(outer, {}) if outer else nested)[inner] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(nested | {"steps": 77, "gamma": 0.9}))
    cli.main(["ppo", "--config", str(folder / "run.yaml"), "--steps", "6", "--gamma", "1.0"])
    return folder / "unbroken"


def test_every_step_has_every_metric_of_the_interface(unbroken):
    rows = rows_of(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row.keys() >= METRICS
        assert all(math.isfinite(row[name]) for name in METRICS)


def test_ratio_starts_at_one_and_kl_at_zero(unbroken):
    rows = rows_of(unbroken)
    assert all(row["ratio_first_minibatch_max"] < 1e-6 for row in rows)
    assert all(row["sampler_logprob_gap_p99"] < 1e-4 for row in rows)
    assert rows[0]["kl_mean"] == 0
    assert rows[-1]["kl_mean"] != 0
    assert all(row["approx_kl"] > 0 for row in rows)
    assert all(row["skipped_steps"] == 0 for row in rows)


def test_responses_are_right_wrong_and_unparsable(unbroken):
    """Otherwise the other tests of this run would show little."""
    rows = rows_of(unbroken)
    assert any(0 < row["score_right_rate"] < 1 for row in rows)
    assert any(0 < row["score_unparsable_rate"] < 1 for row in rows)
    assert any(0 < row["truncated_rate"] < 1 for row in rows)
    assert len({row["response_length_mean"] for row in rows}) > 1


def test_options_override_the_yaml_file(unbroken, settings):
    used = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert used.keys() == {field.name for field in dataclasses.fields(PPOConfig)}
    assert (used["steps"], used["gamma"]) == (6, 1.0)  # the file says 77 and 0.9
    assert (used["epochs"], used["verifier"]["kind"]) == (2, "exact")
    assert used["sampling"]["max_new_tokens"] == 31
    assert used["policy"] == str(settings["policy"])


def test_trained_model_loads_in_transformers(unbroken, taught_policy):
    before = AutoModelForCausalLM.from_pretrained(taught_policy)
    after = AutoModelForCausalLM.from_pretrained(unbroken / "model")
    for old, new in zip(before.parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new)
    tokenizer = AutoTokenizer.from_pretrained(unbroken / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(taught_policy).get_vocab()
    ids = torch.tensor([tokenizer.encode(question(3))])
    mask = torch.ones_like(ids)
    out = after.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids.shape[1]


def test_evaluations_come_before_the_first_step_and_every_second(unbroken):
    rows = rows_of(unbroken, "eval")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    # 0.3 of 12 is 4, rounded; the over-long problem is one of them
    assert all(row["num"] == 3 for row in rows)
    assert (unbroken / "report.html").read_text().startswith("<!")


def test_old_checkpoints_are_removed_except_the_best(unbroken):
    kept = {path.name for path in (unbroken / "checkpoints").glob("step-*")}
    assert {"step-00000005", "step-00000006"} <= kept
    assert len(kept) <= 3


def test_overlong_prompt_is_dropped_and_named(taught_policy, problems, tmp_path, capsys):
    cli.main(arguments(tmp_path / "out", policy=taught_policy, data=problems, steps=1))
    line = "dropped 1 training problems over max_prompt_tokens=70: rows 5\n"
    assert line in capsys.readouterr().out


def test_same_command_gives_the_same_bits(unbroken, settings, tmp_path):
    cli.main(arguments(tmp_path / "again", **settings))
    assert without_machine_metrics(rows_of(tmp_path / "again")) == without_machine_metrics(
        rows_of(unbroken)
    )
    assert rows_of(tmp_path / "again", "samples") == rows_of(unbroken, "samples")
    assert same_weights(tmp_path / "again", unbroken)


def test_killed_and_resumed_run_ends_with_the_same_bits(unbroken, settings, tmp_path, capfd):
    output = tmp_path / "killed"
    delay = random.uniform(0.0, 2.0)
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "verippo.launch.cli", *arguments(output, **settings)],
            stderr=stderr,
            start_new_session=True,
        )
        deadline = time.monotonic() + 90
        while not (output / "checkpoints" / "latest").exists():
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    reached = len(rows_of(output)) if process.returncode == -signal.SIGKILL else "the end"
    print(f"killed {delay:.2f} s after the first checkpoint, with {reached} steps logged")
    for noise in ("arning", "Token indices"):  # stderr shows the progress and nothing else
        assert noise not in (tmp_path / "stderr").read_text()

    cli.main(arguments(output, **settings))
    assert "resuming after step" in capfd.readouterr().out
    assert without_machine_metrics(rows_of(output)) == without_machine_metrics(rows_of(unbroken))
    for name in ("eval", "samples"):
        assert rows_of(output, name) == rows_of(unbroken, name)
    assert same_weights(output, unbroken)


def test_run_stopped_before_its_first_checkpoint_logs_no_step_twice(
    unbroken, settings, tmp_path, monkeypatch
):
    output = tmp_path / "early"

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("verippo.rl.run.PPORun.save", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(output, **settings))
    monkeypatch.undo()
    assert caught.value.code == 130
    assert [row["step"] for row in rows_of(output, "eval")] == [0]
    cli.main(arguments(output, **settings | {"steps": 2}))
    assert [row["step"] for row in rows_of(output, "eval")] == [0, 2]
    assert [row["step"] for row in rows_of(output)] == [1, 2]


# --- what is refused ---


@pytest.fixture
def given(settings, tmp_path):
    """Arguments of the reference run with changed options."""
    return lambda **changes: arguments(
        changes.pop("output", tmp_path / "out"), **settings | changes
    )


def test_missing_key_and_empty_answer_are_named_with_their_row(capsys, given, problems, tmp_path):
    rows = json.loads(problems.read_text())
    path = tmp_path / "broken.json"
    del rows[7][ANSWER_KEY]
    path.write_text(json.dumps(rows))
    assert f"data {path}: row 7: no key 'Ground-True Answer'; it has {QUESTION_KEY}" in refused(
        capsys, given(data=path)
    )
    rows[7][ANSWER_KEY] = " "
    path.write_text(json.dumps(rows))
    assert f"data {path}: row 7: 'Ground-True Answer' is empty" in refused(capsys, given(data=path))


def test_unreadable_and_missing_data_files_are_refused(capsys, given, tmp_path):
    (tmp_path / "data.txt").write_text("hello")
    (tmp_path / "data.json").write_text("hello")
    assert "cannot read .txt: give .json, .jsonl, .parquet" in refused(
        capsys, given(data=tmp_path / "data.txt")
    )
    assert "not valid JSON" in refused(capsys, given(data=tmp_path / "data.json"))
    assert "no such file" in refused(capsys, given(data=tmp_path / "nothing.json"))


def test_critic_with_another_vocabulary_is_refused(capsys, given, make_model, taught_policy):
    critic = make_model("llama", seed=12)
    tokenizer = AutoTokenizer.from_pretrained(critic)
    tokenizer.add_tokens(["pneumothorax"])
    tokenizer.save_pretrained(critic)
    line = refused(capsys, given(critic=critic))
    assert f"{taught_policy} and {critic} do not share a vocabulary" in line


def test_missing_models_and_models_of_the_wrong_kind_are_refused(
    capsys, given, make_model, tmp_path
):
    policy = make_model("llama", seed=13)
    assert f"model {tmp_path}/none: no such folder" in refused(
        capsys, given(policy=tmp_path / "none")
    )
    assert "model none: no tokenizer: not a folder here, and as a hub id" in refused(
        capsys, given(policy="none")
    )
    line = refused(capsys, given(verifier__kind="classifier", verifier__model=policy))
    assert f"model {policy}: no classification head" in line
    assert "over the context of" in refused(
        capsys, given(max_prompt_tokens=3000, max_tokens_per_gpu=4000)
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"minibatches": 4},
            "(prompts_per_step x samples_per_prompt) do not divide into minibatches=4",
        ),
        ({"prompts_per_step": 9, "minibatches": 1}, "fewer than prompts_per_step=9"),
        ({"nonsense": 3}, "nonsense"),
        ({"kl__nonsense": 3}, "nonsense"),
        ({"epochs": "many"}, "many"),
        ({"verifier__kind": "oracle"}, "oracle"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"data": None}, "data"),
        (
            {"verifier__kind": "function", "verifier__function": "nowhere:score"},
            "verifier.function=nowhere:score: No module",
        ),
        ({"rollout_function": "json:nothing"}, "rollout_function=json:nothing: "),
        ({"resume": "nowhere"}, "resume nowhere: no checkpoint there"),
        ({"offload": "all"}, "offload=all needs zero_stage=3, got zero_stage=2"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(capsys, given, changes, part):
    assert part in refused(capsys, given(**changes))


def test_unknown_key_in_the_yaml_file_is_refused(capsys, given, tmp_path):
    (tmp_path / "run.yaml").write_text("kl: {coef: 0.1, cofe: 0.2}\n")
    assert "cofe" in refused(capsys, given(config=tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("text", "name"),
    [("epochs: null", "epochs"), ("kl: null", "kl"), ("kl: {coef: null}", "kl.coef")],
)
def test_null_is_refused_where_a_value_is_required(capsys, given, tmp_path, text, name):
    (tmp_path / "run.yaml").write_text(text)
    assert f"ppo: {name} is null: give a value" in refused(
        capsys, given(config=tmp_path / "run.yaml")
    )


def test_unknown_command_is_refused_with_a_list_of_commands(capsys):
    line = refused(capsys, ["pppo"])
    assert "unknown command 'pppo'" in line
    assert "ppo" in line.partition("choose one of")[2]


def test_unwritable_output_is_refused(capsys, given, problems):
    # root may write anywhere, except under a file and under /proc
    assert "cannot write there: Not a directory" in refused(capsys, given(output=problems / "x"))
    if Path("/proc/self").exists():
        assert "output /proc/x: cannot write there" in refused(capsys, given(output="/proc/x"))


def test_full_disk_is_reported_at_the_start_and_at_a_checkpoint(
    capsys, given, monkeypatch, tmp_path
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "cannot write there: No space left on device" in refused(capsys, given())
    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(SystemExit) as caught:
        cli.main(given(steps=1, output=tmp_path / "full"))
    assert caught.value.code == 2
    assert "checkpoints: no space left for a checkpoint" in capsys.readouterr().err


def test_resume_never_refuses_a_folder_with_a_run(capsys, given, unbroken):
    assert "holds a run already" in refused(capsys, given(output=unbroken, resume="never"))


# --- help ---


def documented_fields(config, prefix=""):
    """(option, docstring) of every field, nested ones with a dot, from the source text."""
    source = "".join(
        inspect.getsource(part) for part in config.__mro__[:-1]
    )  # fields may be inherited
    nested = {
        f.name: f.default_factory
        for f in dataclasses.fields(config)
        if dataclasses.is_dataclass(f.default_factory)
    }
    for field in dataclasses.fields(config):
        if field.name in nested:
            yield from documented_fields(nested[field.name], f"{prefix}{field.name}.")
        else:
            doc = re.search(rf"^    {field.name}: .*\n    \"\"\"(.*?)\"\"\"", source, re.M | re.S)
            assert doc, f"{config.__name__}.{field.name} has no docstring"
            yield prefix + field.name, doc[1]


def test_help_shows_every_field_with_its_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["ppo", "--help"])
    assert caught.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    fields = list(documented_fields(PPOConfig))
    assert len(fields) > 50
    for name, doc in fields:
        assert f"--{name}" in text
        assert "".join(doc.split()) in text, name
    assert "PPOConfig(" not in text  # the class has a docstring of its own


def test_print_config_prints_yaml_that_parses_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        cli.main(["ppo", "--kl.coef", "0.07", "--print_config"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    flat = {
        f"{name}.{inner}" if isinstance(value, dict) else name: part
        for name, value in printed.items()
        for inner, part in (value.items() if isinstance(value, dict) else [("", value)])
    }
    assert flat.keys() == {name for name, _ in documented_fields(PPOConfig)}
    assert flat["kl.coef"] == 0.07
    given = {"policy": "p", "data": "d", "output": "o", "steps": 3}
    verifier = printed["verifier"] | {"kind": "exact"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(printed | given | {"verifier": verifier}))
    config, resolved = cli.parse(
        PPOConfig, ["--config", str(tmp_path / "run.yaml")], program="verippo ppo"
    )
    assert config.kl.coef == 0.07
    assert config.policy == "p"
    assert resolved["verifier"]["kind"] == "exact"


def test_verippo_without_a_command_lists_the_commands(capsys):
    for argv, code in ([], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == code
        assert "  ppo" in capsys.readouterr().out


# --- users' own engine, verifier, rollout function, advantage estimator and policy loss ---


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler__kind": "factory", "sampler__factory": "my_engine:make"},
        {"verifier__kind": "function", "verifier__function": "my_verifier:score"},
        {"rollout_function": "my_rollout:rollout", "sampling__max_new_tokens": 30},
        {"advantage_function": "my_advantage:leave_one_out_baseline"},
        {"policy_loss_function": "my_policy_loss:clipped_weight_loss"},
        {"lam_alpha": 0.5, "dual_clip": 3.0, "correction": {"level": "token"}},
        {
            "lam_critic": 1.0,
            "critic_epochs": 2,
            "critic_warmup_steps": 1,
            "target_kl": 0.01,
            "policy_loss": "cispo",
            "overlong_buffer": 2,
            "kl": {"place": "loss", "target": 1.0},
        },
        {"policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    ],
)
def test_examples_run(changes, taught_policy, problems, tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cli.main(arguments(tmp_path / "out", policy=taught_policy, data=problems, steps=2, **changes))
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampler_logprob_gap_p99"] < 1e-4 for row in rows)
    assert all(0 < row["score_mean"] < 1 for row in rows)


# --- real data and a real model ---


@pytest.mark.parametrize("kind", ["exact", "classifier"])
def test_real_problems_with_a_small_real_model(kind, shared, make_model, tmp_path, capfd):
    verifier = make_model("llama", classes=2, seed=14) if kind == "classifier" else None
    policy = shared / "models" / "stories260K"
    cli.main(
        arguments(
            tmp_path / "out",
            policy=policy,
            data=shared / "data" / "medical_demo_198.json",
            limit=40,
            steps=2,
            verifier__kind=kind,
            verifier__model=verifier,
            max_prompt_tokens=300,
            sampling__max_new_tokens=24,
            max_tokens_per_gpu=2048,
            prompts_per_step=4,
            epochs=1,
        )
    )
    rows = rows_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["ratio_first_minibatch_max"] < 1e-6 for row in rows)
    out, err = capfd.readouterr()
    assert re.search(r"dropped \d+ training problems over max_prompt_tokens=300: rows \d+", out)
    assert "arning" not in err
    assert "Token indices" not in err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")


# --- two ranks ---


def test_two_ranks_give_the_numbers_of_one(taught_policy, make_model, problems, tmp_path):
    changes = {
        "policy": taught_policy,
        "data": problems,
        "steps": 1,
        "zero_stage": 3,
        "verifier__kind": "classifier",
        "verifier__model": make_model("llama", classes=2, seed=15),
        "verifier__threshold": 0.5,
    }
    scripts = Path(sys.executable).parent
    # another run on this machine may use the default port
    port = str(random.randrange(20000, 30000))
    launcher = ["--num_accelerators", "2", "--master_port", port, "--no_local_rank", "--module"]
    done = subprocess.run(
        [
            sys.executable,
            str(scripts / "deepspeed"),
            *launcher,
            "verippo.launch.cli",
            *arguments(tmp_path / "two", **changes),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cli.main(arguments(tmp_path / "one", **changes))
    (one,), (two,) = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for name in SAME_ON_TWO_RANKS.split():
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), name
    assert 0 < one["score_mean"] < 1
    states = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    differences = torch.cat(
        [(states[0][key] - states[1][key]).abs().flatten() for key in states[0]]
    )
    print(f"weights differ by {differences.mean():.1e} on average, {differences.max():.1e} at most")
    # the maximum is larger: Adam makes full steps even from gradients that are only rounding errors
    assert float(differences.mean()) < 1e-7
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert "arning" not in done.stderr.replace("DeepSpeed", "")


def test_error_on_one_rank_ends_both_and_is_shown(taught_policy, problems, two_ranks, tmp_path):
    (tmp_path / "failing.py").write_text(
        textwrap.dedent("""
        import os, pathlib, time

        def score(rollouts):
            if os.environ["RANK"] == "1":
                pathlib.Path(__file__).with_name("raised").write_text(str(time.time()))
                raise RuntimeError("the verifier is broken")
            return [0.5] * len(rollouts)
        """)
    )
    argv = arguments(
        tmp_path / "out",
        policy=taught_policy,
        data=problems,
        verifier__kind="function",
        verifier__function="failing:score",
    )
    done = two_ranks("-m", "verippo.launch.cli", *argv, env={"PYTHONPATH": str(tmp_path)})
    seconds = time.time() - float((tmp_path / "raised").read_text())
    print(f"both ranks were down {seconds:.1f} s after the error")
    assert done.returncode != 0
    assert seconds < 60
    assert "RuntimeError: the verifier is broken" in done.stderr
    assert "verippo: rank 0 stops: rank 1: RuntimeError: the verifier is broken" in done.stderr
