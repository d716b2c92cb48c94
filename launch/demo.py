"""`verippo demo`: the whole pipeline, small, on CPU, in minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.report.run_report import write_report
from ..core.report.statistics import Interval, wilson_interval
from ..core.training.checkpoint import prepare_output
from ..rl.train import train
from .ablation import ablate
from .demo_task import TASKS, DemoConfig, ppo_config, prepare, read_rows, timed


def demo(config: DemoConfig, *, resolved: dict[str, Any]) -> Path:
    """Runs every stage, resuming where an earlier run stopped.

    Args:
        config: The demo's configuration.
        resolved: The same as plain values, for PPO's config.yaml.

    Returns:
        Path of the report, or of the ablation's table.
    """
    folder = prepare_output(config.output, resume="auto")
    if config.ablation_seeds:
        return ablate(config, folder)
    seconds: dict[str, float] = {}
    prepare(config, folder, seconds)
    with timed("ppo", seconds):
        ppo = train(ppo_config(config, folder), resolved=resolved)
    stages: dict[str, Any] = stage_table(ppo, TASKS[config.task].note) | {"seconds": seconds}
    (ppo / "stages.json").write_text(json.dumps(stages, indent=1))
    title = "verippo demo: SFT, verifier, PPO"
    report = write_report(ppo, title=title, output=folder / "report.html")
    for row in stages["rows"]:
        exact = row["exact_rate"]
        print(
            f"{row['stage']:<10} exact answers {exact['value']:.3f} "
            f"(95 % {exact['low']:.3f} to {exact['high']:.3f}), "
            f"score {row['score_mean']['value']:.3f}, "
            f"reasoned {row['reasoned_rate']['value']:.2f}, "
            f"length {row['response_length_mean']:.1f} tokens, "
            f"turns {row['turns_mean']:.2f}"
        )
    print(f"report: {report}")
    return report


def stage_table(ppo_folder: Path, note: str) -> dict[str, Any]:
    """Contents of stages.json: held-out evaluations before and after PPO, with 95 % intervals."""
    evals = read_rows(ppo_folder / "eval.jsonl")
    rows = []
    for stage, row in (("after SFT", evals[0]), ("after PPO", evals[-1])):
        num = row["num"]
        score = row["score_mean"]
        half = 1.96 * row["score_std"] / num**0.5
        rates = {
            key: Interval(row[key], *wilson_interval(round(row[key] * num), num))._asdict()
            for key in ("exact_rate", "reasoned_rate")
        }
        measures = {
            "score_mean": Interval(score, score - half, score + half)._asdict(),
            "response_length_mean": row["response_length_mean"],
            "turns_mean": row["turns_mean"],
        }
        rows.append({"stage": stage, "num": num} | rates | measures)
    return {"rows": rows, "notes": [note]}
