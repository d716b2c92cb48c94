"""Differences between ranks, and versions that do not fit together."""

from __future__ import annotations

import json

import pytest

from verippo.launch.doctor.findings import Report, lines, merged
from verippo.launch.doctor.machine import wrong_requirements
from verippo.launch.doctor.ranks import RankFacts, check_ranks
from verippo.rl.config import PPOConfig, SamplerConfig, VerifierConfig

SCRIPT = """
import json, os, sys, time
from types import SimpleNamespace
from verippo.launch.cli import main
from verippo.launch.doctor import ranks

options = json.loads(sys.argv[1])
if os.environ["RANK"] == "1":
    ranks.time = SimpleNamespace(time=lambda: time.time() + 60)
    options |= {"lam": 0.5, "output": options["output"] + "-of-rank-1"}
main(["doctor", "ppo", *[f"--{name}={value}" for name, value in options.items()]])
"""


def config(**options):
    verifier = VerifierConfig(kind="exact")
    return PPOConfig(policy="p", data="d", output="o", steps=1, verifier=verifier, **options)


def found(facts, **options):
    report = Report()
    check_ranks(report, config(**options), facts)
    return {each.what: (each.status, each.text) for each in report.findings}


def test_equal_ranks_pass():
    facts = [RankFacts(host=f"node{n}", clock=1000.0 + n) for n in range(3)]
    results = found(facts)
    assert {status for status, _ in results.values()} == {"ok"}
    assert results["hosts"][1] == "3 ranks on node0, node1, node2"
    assert results["clocks"][1] == "within 2.0 s"


@pytest.mark.parametrize(
    ("what", "status", "other", "text"),
    [
        ("clocks", "warning", {"clock": 1042.0}, "rank 1 (b) is 42 s ahead of rank 0 (a)"),
        ("output folder", "FAILED", {"sees_output": False}, "rank 1 (b) cannot read what rank 0"),
        ("options", "FAILED", {"options": {"lam": 0.5}}, "lam is 0.95 on rank 0 and 0.5 on rank 1"),
        ("versions", "FAILED", {"versions": {"torch": "2.9"}}, "torch is 2.13 on rank 0 and 2.9"),
        ("files", "FAILED", {"files": {"d.json": "bb"}}, "d.json is aa on rank 0 and bb on rank 1"),
    ],
)
def test_a_rank_that_differs_is_named(what, status, other, text):
    same = {
        "clock": 1000.0,
        "options": {"lam": 0.95},
        "versions": {"torch": "2.13"},
        "files": {"d.json": "aa"},
    }
    facts = [RankFacts(host="a", **same), RankFacts(host="b", **(same | other))]
    results = found(facts)
    assert results[what][0] == status
    assert text in results[what][1]
    assert {key for key, (each, _) in results.items() if each != "ok"} == {what}


def test_time_out_under_that_of_the_servers_is_a_warning():
    facts = [RankFacts(host="a", clock=0.0)]
    sampler = SamplerConfig(kind="sglang", urls="http://h:1", timeout_seconds=900.0)
    status, text = found(facts, sampler=sampler, timeout_seconds=600.0)["time-outs"]
    assert status == "warning"
    assert "timeout_seconds=600 is not over sampler.timeout_seconds=900" in text


def test_problems_of_other_ranks_are_shown_once():
    reports = [Report(group="machine") for _ in range(3)]
    for report in reports:
        report.add("ok", "GPU", "one")
    for report in reports[1:]:
        report.add("FAILED", "packages", "torch is not installed")
    shown = list(lines(merged([report.findings for report in reports])))
    assert shown == [
        "machine",
        "  ok       GPU: one",
        "  FAILED   rank 1, packages: torch is not installed",
    ]


def test_wrong_versions_are_named_with_the_command():
    wrong = wrong_requirements(["torch<1.0", "no-such-thing>=2", "numpy", 'x>1; extra == "gpu"'])
    assert len(wrong) == 2
    assert "is not <1.0, as verippo needs: pip install 'torch<1.0'" in wrong[0]
    assert wrong[1] == "no-such-thing is not installed: pip install 'no-such-thing>=2'"


def test_two_ranks_name_what_differs_between_them(two_ranks, healthy, tmp_path):
    script = tmp_path / "doctor_of_two.py"
    script.write_text(SCRIPT)
    options = {name: str(value) for name, value in healthy.items()}
    done = two_ranks(str(script), json.dumps(options), timeout=900)
    assert done.returncode != 0
    text = done.stdout
    assert "lam is 1.0 on rank 0 and 0.5 on rank 1" in text, text + done.stderr
    assert "cannot read what rank 0 writes there" in text
    assert " s ahead of rank 0" in text
    assert text.count("MASTER_PORT: ") == 1
    assert ", at which the ranks have met" in text
    assert not (tmp_path / "made").exists()
