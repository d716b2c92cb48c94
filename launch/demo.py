"""`verippo demo`: the whole pipeline, small, on CPU, in minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core.report.run_report import write_report
from ..core.training.checkpoint import prepare_output
from ..rl.train import train
from .ablation import ablate
from .demo_task import TASKS, DemoConfig, ppo_config, prepare, stage_table, timed


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
