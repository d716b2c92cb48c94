"""The report page is safe, self-contained and complete about what is missing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from verippo.core.report.charts import Line, Panel, find_curves
from verippo.core.report.html_page import format_duration, format_number, number
from verippo.core.report.run_report import (
    RunFolder,
    average_blocks,
    by_step,
    choose_samples,
    compare_rates,
    compare_stages,
    write_report,
)

HOSTILE = "<script>alert('x')</script>\"><img src=//evil.example/a.png onerror=alert(1)>{{ 7*7 }}"
STEPS = range(1, 6)
PPO_KEYS = """
    score_mean score_right_rate score_unparsable_rate exact_rate reasoned_rate kl_mean
    reward_mean truncated_rate response_length_mean entropy policy_loss value_loss clip_fraction
    approx_kl sampler_logprob_gap_mean sampler_logprob_gap_p99 grad_norm_policy grad_norm_value
    lr_policy lr_value seconds_rollout seconds_score seconds_forward seconds_train seconds_sync
    tokens_per_second peak_memory_gib
"""


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


CALIBRATION = {
    "num": 900,
    "threshold": 0.4,
    "accuracy": interval(0.9625, 0.9483, 0.9731),
    "curve": [
        {"mean_predicted": 0.2, "share_right": 0.15, "num": 400},
        {"mean_predicted": None, "share_right": None, "num": 0},
    ],
    "thresholds": [
        {"threshold": 0.4, "accuracy": 0.9625, "false_positive_rate": 0.0314},
        {"threshold": 0.5, "accuracy": 0.9625, "false_negative_rate": None},
    ],
}
AFTER_SFT = {"stage": "after SFT", "exact_rate": interval(0.211, 0.164, 0.267), "num": 256}
AFTER_PPO = {"stage": HOSTILE, "exact_rate": interval(0.683, 0.623, 0.737)}
STAGES = {
    "rows": [
        AFTER_SFT | {"score_mean": None},
        AFTER_PPO | {"response_length_mean": 131.7},
    ],
    "seconds": {"sft": 61.4, HOSTILE: 3700},
    "notes": [HOSTILE],
}


def ppo_row(step: int) -> dict:
    values = {key: (i + 1) / 100 * step for i, key in enumerate(PPO_KEYS.split())}
    return values | {
        "step": step,
        "episodes": 1000 * step,
        "explained_variance": None if step == 2 else -30.0 / step**4,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Page of a PPO run with hostile text in every text field and a last line that is cut short."""
    folder = tmp_path_factory.mktemp("run")
    write_lines(folder / "metrics.jsonl", [ppo_row(step) for step in STEPS])
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"step": 6, "note": "µ'.encode()[:-1])  # cut inside a character
    rates = {"right_rate": 0.5, "unparsable_rate": 0.1, "score_mean": 0.25, "exact_rate": None}
    write_lines(
        folder / "eval.jsonl",
        [rates | {"step": 0, "num": 20, "reasoned_rate": 0.0}, rates | {"step": 5, "num": 20}],
    )
    texts = dict.fromkeys(("split", "prompt", "response", "answer", "verdict"), HOSTILE)
    sample = {"split": "train", "response": "r", "answer": "a", "score": 0.1, "verdict": "wrong"}
    samples = [sample | {"step": step, "prompt": f"p{step}"} for step in STEPS for _ in range(4)]
    write_lines(folder / "samples.jsonl", [texts | {"step": 1, "score": 1.0}] * 2 + samples)
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    (folder / "stages.json").write_text(json.dumps(STAGES))
    (folder / "config.yaml").write_text(f"seed: 1\nname: {HOSTILE}\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", HOSTILE: HOSTILE}))
    return write_report(folder, title=HOSTILE).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects (tag, attributes) of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_text_of_a_run_is_escaped_everywhere(page):
    tags = Tags(page).found
    assert not {"script", "img", "iframe", "object", "link", "a"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in page  # shown as it is, not evaluated
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 12


def test_page_loads_nothing_from_outside(page):
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    for _, attributes in Tags(page).found:
        assert "src" not in attributes
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_resolve(page):
    ids = [attributes["id"] for _, attributes in Tags(page).found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    references = set(re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', page))
    assert references
    assert {a or b for a, b in references} <= set(ids)


def test_figures_follow_the_colour_scheme_and_are_labelled(page):
    figures = [attributes for tag, attributes in Tags(page).found if tag == "svg"]
    # score and right answers, calibration, and the PPO curves without the two of SFT
    assert len(figures) == 2 + 1 + 12
    for figure in figures:
        assert figure["role"] == "img"
        assert figure["aria-label"]
        assert figure["viewbox"]
    assert not any("width" in figure for figure in figures)
    assert "#01020" not in page  # no stand-in colour is left
    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", svg)) - {"none"} == {
        f"var(--{name})" for name in ("muted", "grid", "c1", "c2", "c3", "c4", "c5")
    }
    for unit in ("KL, nats per response", "truncated, % of responses", "seconds", "step"):
        assert f">{unit}</text>" in svg


def test_numbers_of_the_run_are_on_the_page(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert "5 steps recorded, the last is step 5 after 5,000 episodes." in text
    assert "exactly right 21.1% → 68.3%." in text
    assert "21.1% (16.4–26.7%)" in text
    assert "+47.2 points" in text  # 68.3 - 21.1
    # kl_mean is the sixth key, so 0.06 * 5 at step 5
    assert "KL to the reference is 0.3 nats per response" in text
    assert "96.2% (94.8–97.3%)" in text
    assert re.search(r"0\.4 in use ?96\.2% ?3\.1% ?–", text)
    assert "8 of 22 shown" in text
    assert "14 left out" in text
    assert "1 min 01 s" in text
    assert "1 h 02 min" in text
    assert "Made by verippo" in text


def test_unreadable_line_is_counted_on_the_page(page):
    assert "metrics.jsonl: 1 unreadable line skipped" in page


def test_page_of_an_empty_folder_names_the_missing_files(tmp_path):
    page = write_report(tmp_path, title="Nothing yet").read_text(encoding="utf-8")
    assert "No training step has been recorded" in page
    assert "metrics.jsonl, eval.jsonl, samples.jsonl, config.yaml, environment.json" in page
    assert "<svg" not in page
    assert "<h2" not in page


@pytest.mark.parametrize(
    "name",
    [f"{name}.jsonl" for name in ("metrics", "eval", "samples")]
    + [f"{name}.json" for name in ("calibration", "stages", "environment")],
)
def test_each_file_alone_or_garbled_gives_a_page(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"step": 1, "num": 3, "curve": null}\n')
    write_report(tmp_path, title="alone")
    (tmp_path / name).write_bytes(b'{"step": 1, "nu\xff')
    page = write_report(tmp_path, title="garbled").read_text(encoding="utf-8")
    assert f"{name}: " in page


def test_sft_run_has_its_own_curves_only(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "loss": 2.0, "lr": 1e-5}, {"step": 2, "loss": float("nan")}],
    )
    write_lines(
        tmp_path / "eval.jsonl",
        [{"step": s, "loss": 3.0 - s, "token_accuracy": 0.5, "num_tokens": 9} for s in (0, 2)],
    )
    output = tmp_path / "x.html"
    page = write_report(tmp_path, title="SFT", output=output).read_text(encoding="utf-8")
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Loss", "Token accuracy", "Learning rates"]
    assert "3 → 1" in page
    assert not (tmp_path / "report.html").exists()
    written = {path.name for path in tmp_path.iterdir()}  # no temporary file is left
    assert written == {"metrics.jsonl", "eval.jsonl", "x.html"}


def test_a_verifiers_page_has_its_loss_per_answer_and_its_accuracy(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.7}])
    write_lines(
        tmp_path / "eval.jsonl",
        [
            {"step": step, "loss": 0.7, "accuracy": accuracy, "num": 100}
            for step, accuracy in ((0, 0.5), (1, 0.81))
        ],
    )
    page = write_report(tmp_path, title="Verifier", classifier=True).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Loss", "Accuracy"]
    assert "nats per answer" in page
    assert "nats per token" not in page
    assert "accuracy 50.0% → 81.0%" in text
    assert "81.0% (72.2–87.5%)" in text  # Wilson, 81 of 100


def test_page_without_evaluation_names_the_options_for_one(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "score_mean": 0.7}])
    page = write_report(tmp_path, title="PPO").read_text(encoding="utf-8")
    assert "<code>--eval_data</code> or <code>--eval_fraction</code>" in page


def test_the_environment_is_shown_whole(page):
    (box,) = [a for _, a in Tags(page).found if a.get("aria-label") == "Environment"]
    assert "whole" in (box["class"] or "").split()
    assert ".scroll.whole { max-height: none; }" in page


def test_unpaired_surrogate_is_replaced(tmp_path):
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1, "response": "unpaired \\ud800, line\\u2028end"}\n'
    )
    page = write_report(tmp_path, title="t").read_text(encoding="utf-8")
    assert "unpaired ?, line\u2028end" in page


def test_lines_without_an_object_or_a_step_are_skipped_and_counted(tmp_path):
    text = '{"step": 2}\n\n12\n{"loss": 1}\n{"step": null}\n{"step": 1, "x": "\u2028"}\n{"st'
    (tmp_path / "m.jsonl").write_text(text)
    files = RunFolder(tmp_path)
    assert files.rows("m.jsonl") == [{"step": 2}, {"step": 1, "x": "\u2028"}]
    assert files.rows("absent.jsonl") == []
    assert files.problems == ["m.jsonl: 4 unreadable lines skipped"]


def test_later_row_of_a_repeated_step_wins():
    rows = [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 2, "x": 3}, {"step": 0, "x": 0}]
    assert [row["x"] for row in by_step(rows)] == [0, 1, 3]


def test_block_means_skip_missing_values():
    rows = [
        {"step": 1, "x": 2.0},
        {"step": 2, "x": None},
        {"step": 3, "x": 4.0, "y": 1.0},
        {"step": 4},
        {"step": 5, "x": 7},
    ]
    means = [{"step": 2.0, "x": 3.0, "y": 1.0}, {"step": 4.5, "x": 7.0}]
    assert average_blocks(rows, 2) == (means, 3)
    assert average_blocks([], 2) == ([], 1)


def test_curve_skips_values_that_are_not_finite_numbers():
    rows = [
        {"step": 1, "x": 0},
        {"step": 2, "x": None},
        {"step": 3, "x": float("inf")},
        {"step": 4, "x": "5"},
        {"step": 5},
    ]
    panel = Panel("unit", [Line("x"), Line("y")])
    assert find_curves(panel, {"train": rows, "eval": []}) == [(Line("x"), [1], [0.0])]


def test_first_and_last_evaluation_are_compared_without_stages():
    evals = [
        {"step": step, "num": 263, "right_rate": 81 / 263, "score_mean": 0.4}
        for step in (0, 10, 20)
    ]
    first, last = compare_stages({}, evals)
    assert (first.name, last.name) == ("step 0", "step 20")
    assert first.measures["right_rate"] == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert first.measures["score_mean"] == (0.4, None, None)  # no share of a count
    assert [stage.name for stage in compare_stages({}, evals[:1])] == ["step 0"]
    assert compare_stages({}, []) == []


def test_held_out_rate_stands_beside_the_start_and_the_baseline():
    row = {"right_rate": 0.25, "start_right_rate": 0.5, "baseline_right_rate": 0.24}
    change = {"start_change": -0.25, "start_change_low": -0.375, "start_change_high": -0.1}
    evals = [
        row | {"step": 0},
        row | {"step": 20, "below_start": True, "below_baseline": True},
        row | change | {"step": 40, "below_start": True, "below_baseline": False},
    ]
    start, baseline = compare_rates(evals)
    assert start.is_fall
    assert start.text == (
        "At step 40 the held-out rate is 25.0%, significantly below the start's 50.0% "
        "(change −25 points, 95% interval −37.5 to −10)."
    )
    assert baseline.is_fall  # at an evaluation before
    assert baseline.text.endswith("interval – to –). It was significantly below at step 20.")
    assert "the held-out rate is 25.0%, beside the baseline's 24.0%" in baseline.text
    assert [c.is_fall for c in compare_rates(evals[:1])] == [False, False]
    assert compare_rates([]) == []


def test_samples_come_from_the_first_and_last_step_of_each_split():
    samples = [
        {"step": s, "split": split, "i": i}
        for s in (3, 1, 2)
        for split in ("train", "eval")
        for i in range(5)
    ]
    chosen = [(row["split"], row["step"], row["i"]) for row in choose_samples(samples)]
    assert chosen == [
        (split, s, i) for split in ("eval", "train") for s in (1, 3) for i in range(3)
    ]


def test_numbers_are_rounded_for_reading():
    values = (None, float("nan"), 0, 12345, 1234.5, 3.14159, 0.25, -0.00001234, 40.0)
    texts = ["–", "–", "0", "12,345", "1,234", "3.142", "0.25", "−1.23e−05", "40"]
    assert [format_number(value) for value in values] == texts
    percent = [format_number(x, percent=True) for x in (0.64, 1, -0.0512, "x")]
    assert percent == ["64.0%", "100.0%", "−5.1%", "–"]
    assert [format_duration(x) for x in (4.24, 185, 7620)] == ["4.2 s", "3 min 05 s", "2 h 07 min"]
    assert number("3") is None


def test_importing_the_report_does_not_import_matplotlib():
    code = (
        "import sys, verippo.core.report.run_report; "
        "sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
