"""The held-out rate stands beside the start's and the baseline's, and a fall is said."""

from __future__ import annotations

import html
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from verippo.core.sampling.sampler import SamplingParams
from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.rl import held_out
from verippo.rl.config import PPOConfig, SamplerConfig, VerifierConfig
from verippo.rl.held_out import HeldOutRecord, change, rate_metrics, right_answers
from verippo.rl.train import train

FIRST_TOKEN = """
def score(rollouts):
    return [float(r.text.split()[:1] == [r.problem.answer]) for r in rollouts]
"""
ALL, NONE = [True] * 8, [False] * 8


def test_a_fall_of_every_answer_is_significant_from_six_on():
    found = change([False] * 6, [True] * 6)
    assert found == pytest.approx((-1.0, -1.0, -1.0, 2 / 64))  # two-sided, of six coins
    assert found.is_fall
    assert not change([False] * 5, [True] * 5).is_fall  # 2 / 32
    assert not change([True] * 6, [False] * 6).is_fall  # a rise


def test_problems_without_a_verdict_are_left_out_of_the_pairs():
    found = change([True, None, False, False], [False, True, None, True])
    assert found.difference == 0.0
    assert found.p_value == 1.0
    assert change([None, True], [True, None]) is None


def test_rate_has_wilsons_interval():
    metrics = rate_metrics([True] * 81 + [False] * 182 + [None] * 9, name="start_")
    assert metrics == {
        "start_right_rate": 81 / 263,
        "start_right_rate_low": pytest.approx(0.2553, abs=5e-5),
        "start_right_rate_high": pytest.approx(0.3662, abs=5e-5),
    }
    assert rate_metrics([None]) == {}


def test_scores_become_right_wrong_or_nothing():
    scores = torch.tensor([1.0, 0.1, math.nan, 0.5])
    assert right_answers(scores, 0.5) == [True, False, None, True]


def test_record_compares_with_both_and_says_a_fall_once(capsys):
    record = HeldOutRecord(num=8, baseline=ALL)
    first = record.compare([True] * 7 + [False], step=0)
    assert first["right_rate"] == 0.875
    assert "start_right_rate" not in first
    assert (first["baseline_right_rate"], first["below_baseline"]) == (1.0, False)
    out, err = capsys.readouterr()
    assert out.startswith("step 0: held-out rate 87.5 % [52.9, 97.8]; baseline 100.0 % [67.6, 100")
    assert err == ""
    later = record.compare(NONE, step=4)
    assert (later["start_change"], later["baseline_change"]) == (-0.875, -1.0)
    assert (later["below_start"], later["below_baseline"], record.fell) == (True, True, True)
    assert later["start_change_p"] == 2 / 128
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("WARNING: step 4: the held-out rate is significantly below the start's")
    assert "and the baseline's (change -100.0 points [-100.0, -100.0], p = 0.0078)" in err
    assert not record.compare(ALL, step=8)["below_start"]
    assert not record.fell


def test_record_is_part_of_the_checkpoint(tmp_path):
    record = HeldOutRecord(num=2, start=[True, None], baseline=[False, True], baseline_model="m")
    record.save(tmp_path, "held_out")
    read = HeldOutRecord(num=2)
    read.load(tmp_path, "held_out")
    assert read == record
    with pytest.raises(ValueError, match="of 2 held-out problems, the data has 3"):
        HeldOutRecord(num=3).load(tmp_path, "held_out")
    older = HeldOutRecord(num=3)
    older.load(tmp_path, "missing")
    assert older == HeldOutRecord(num=3)


# --- whole runs: trained to answer f, held-out problems want e ---


def teach(folder, target, words):
    """A policy that begins most answers with `words`, the first the most often."""
    policy = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    prompts = torch.randint(3, 12, (64, 6), generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([words[n % len(words)] for n in range(64)])
    for _ in range(40):
        logits = policy(input_ids=prompts).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.repeat_interleave(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.save_pretrained(target)
    for file in folder.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    return str(target)


@pytest.fixture
def falling(task, tmp_path):
    """Keyword arguments of a run whose training data rewards f, its held-out data e."""
    for name, answer in (("problems", "f"), ("held_out", "e")):
        rows = [{QUESTION_KEY: " ".join("abcdefgh"[n:]), ANSWER_KEY: answer} for n in range(8)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "first_token.py").write_text(FIRST_TOKEN)
    source = tmp_path / "policy"
    e, f = 7, 8  # ids of the words
    return task | {
        "policy": teach(source, tmp_path / "mixed", [e, e, f]),
        "eval_data": str(tmp_path / "held_out.json"),
        "verifier": VerifierConfig(kind="function", function="first_token:score"),
        "sampling": SamplingParams(max_new_tokens=2),
        "advantage": "rloo",
        "samples_per_prompt": 4,
        "epochs": 2,
        "steps": 8,
        "eval_every": 4,
        "save_every": 4,
        "policy_learning_rate": 2e-2,
    }


def run(**settings):
    return train(PPOConfig(**settings), resolved={})


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_policy_that_becomes_worse_warns_and_the_report_says_so(falling, capsys):
    folder = run(**falling)
    first, _, last = rows_of(folder, "eval")
    assert first["right_rate"] == 1.0
    assert (last["right_rate"], last["start_right_rate"], last["below_start"]) == (0.0, 1.0, True)
    assert (last["start_change_low"], last["start_change_high"]) == (-1.0, -1.0)
    err = capsys.readouterr().err
    assert "WARNING: step 8: the held-out rate is significantly below the start's" in err
    page = html.unescape((folder / "report.html").read_text())
    assert "At step 8 the held-out rate is 0.0%, significantly below the start's 100.0%" in page


def test_stop_below_baseline_ends_the_run_with_a_checkpoint(falling, tmp_path):
    with pytest.raises(RuntimeError, match="step 4: stop_below_baseline ended the run"):
        run(**falling | {"stop_below_baseline": True, "save_every": 1000})
    output = tmp_path / "out"
    assert (output / "checkpoints" / "latest").read_text() == "step-00000004"
    assert (output / "model" / "config.json").exists()
    assert [row["step"] for row in rows_of(output, "metrics")] == [1, 2, 3, 4]
    run(**falling)  # without the option it goes on
    assert [row["step"] for row in rows_of(output, "metrics")] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.fixture
def below(falling, tmp_path):
    """A run that starts below its baseline: a random policy, a baseline that always answers e."""
    source = tmp_path / "policy"
    return falling | {
        "policy": str(source),
        "baseline": teach(source, tmp_path / "baseline", [7]),
        "policy_learning_rate": 0.0,
        "steps": 4,
        "eval_every": 2,
        "save_every": 2,
    }


def test_a_baseline_better_than_the_policy_warns_before_the_first_step(below, capsys):
    folder = run(**below)
    rows = rows_of(folder, "eval")
    assert [row["baseline_right_rate"] for row in rows] == [1.0, 1.0, 1.0]
    assert all(row["right_rate"] <= 0.25 for row in rows)
    assert all(row["below_baseline"] for row in rows)
    assert not any(row.get("below_start") for row in rows)  # the policy does not move
    err = capsys.readouterr().err
    assert "WARNING: step 0: the held-out rate is significantly below the baseline's" in err
    page = html.unescape((folder / "report.html").read_text())
    assert "significantly below the baseline's 100.0%" in page
    splits = {row["split"] for row in rows_of(folder, "samples")}
    assert splits == {"train", "eval", "baseline"}


def test_a_resumed_run_compares_with_the_same_results(below, tmp_path, monkeypatch):
    whole = run(**below | {"output": str(tmp_path / "whole")})
    run(**below | {"steps": 2})

    def again(*_):
        raise AssertionError("the baseline was evaluated again")

    monkeypatch.setattr(held_out, "baseline_components", again)
    folder = run(**below)
    assert rows_of(folder, "eval") == rows_of(whole, "eval")


SAMPLER = """
from verippo.core.sampling.local_sampler import LocalSampler
from verippo.core.training.pretrained import load_causal_lm

log = []

class Recording(LocalSampler):
    def update_weights(self, named_tensors, version):
        tensors = [(name, tensor.clone()) for name, tensor in named_tensors]
        log.append((version, dict(tensors)["lm_head.weight"]))
        super().update_weights(tensors, version)

def make(path, stops):
    return Recording(load_causal_lm(path, dtype="fp32"), stop_token_ids=stops)
"""


def test_other_samplers_get_the_baselines_weights_before_the_policys(below, tmp_path):
    (tmp_path / "recording.py").write_text(SAMPLER)
    sampler = SamplerConfig(kind="factory", factory="recording:make")
    folder = run(**below | {"sampler": sampler, "steps": 1})
    assert rows_of(folder, "eval")[0]["baseline_right_rate"] == 1.0
    import recording

    heads = [
        AutoModelForCausalLM.from_pretrained(below[name]).lm_head.weight
        for name in ("baseline", "policy")
    ]
    assert [version for version, _ in recording.log] == [0, 0, 1]
    for (_, sent), head in zip(recording.log, heads, strict=False):
        assert torch.equal(sent, head)


@pytest.mark.parametrize("option", [{"baseline": "m"}, {"stop_below_baseline": True}])
def test_the_alarm_needs_held_out_problems(option):
    with pytest.raises(ValueError, match="needs held-out problems: give eval_data or eval_frac"):
        PPOConfig(
            policy="m",
            data="d",
            output="o",
            steps=1,
            verifier=VerifierConfig(kind="exact"),
            **option,
        )
