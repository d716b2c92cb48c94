"""What each default of PPO earns on the demo's task: the same start, one choice changed, several seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..rl.config import KLConfig
from ..rl.train import train
from .demo import DemoConfig, StageClock, ppo_config, prepare, stage_table

VARIANTS: dict[str, dict[str, Any]] = {
    "default (critic, KL 0.03, whitening, value clip)": {},
    "no critic: whitened score (REINFORCE++)": {"advantage": "reinforce++"},
    "no critic: RLOO, 4 samples a prompt": {"advantage": "rloo", "samples_per_prompt": 4},
    "no KL penalty": {"kl": KLConfig(coef=0.0)},
    "no whitening": {"whiten": False},
    "no value clip": {"value_clip": None},
    "lambda 0.95 instead of 1": {"lam": 0.95},
}


def ablate(config: DemoConfig, folder: Path) -> Path:
    """Trains every variant from every seed's own stage 1 and verifier; writes ablation.json and ablation.md, returns the
    latter. Goes on where it was stopped: a finished run is read, not run again."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(config.seed, config.seed + config.ablation_seeds):
        seeded = replace(config, seed=seed)
        home = folder / f"seed-{seed}"
        home.mkdir(exist_ok=True)
        paths = prepare(seeded, home, StageClock())
        for number, (name, changes) in enumerate(VARIANTS.items()):
            output = home / f"ppo-{number}"
            samples = changes.get("samples_per_prompt", 1)
            run = ppo_config(
                seeded,
                paths,
                output,
                prompts_per_step=config.rollouts_per_step // samples,
                **changes,
            )
            train(run, resolved={"variant": name, "seed": seed})
            results[name].append(_summary(output))
            print(f"seed {seed}: {name}: {results[name][-1]}", flush=True)
    (folder / "ablation.json").write_text(json.dumps(results, indent=1))
    table = folder / "ablation.md"
    table.write_text(_table(results))
    print(table.read_text())
    return table


def _summary(output: Path) -> dict[str, float]:
    before, after = stage_table(output)["rows"]
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "exact_before": before["exact_rate"]["value"],
        "exact_after": after["exact_rate"]["value"],
        "score_after": after["score_mean"]["value"],
        "reasoned_after": after["reasoned_rate"]["value"],
        "length_after": after["response_length_mean"],
        "kl": last["kl_mean"],
        "entropy": last["entropy"],
    }


def _table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = [
        "| variant | exact answers before | after, mean | after, each seed | reasoned | KL (nats a response) | entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        each = " ".join(f"{run['exact_after']:.2f}" for run in runs)
        lines.append(
            f"| {name} | {mean['exact_before']:.2f} | {mean['exact_after']:.2f} | {each} | {mean['reasoned_after']:.2f} "
            f"| {mean['kl']:.1f} | {mean['entropy']:.3f} |"
        )
    return "\n".join(lines) + "\n"
