"""Ablation of PPO's defaults on the demo's task: one choice changed at a time, several seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..rl.config import KLConfig
from ..rl.train import train
from .demo_task import DemoConfig, ppo_config, prepare, read_rows

VARIANTS: dict[str, dict[str, Any]] = {
    "default (critic, KL 0.03, whitening, value clip)": {},
    "no critic: whitened score (REINFORCE++)": {"advantage": "reinforce++"},
    "no critic: RLOO, 4 samples a prompt": {"advantage": "rloo", "samples_per_prompt": 4},
    "no KL penalty": {"kl": KLConfig(coef=0.0)},
    "no whitening": {"whiten": False},
    "no value clip": {"value_clip": None},
    "lambda 0.95 instead of 1": {"lam": 0.95},
}
"""Fields in which each variant differs from the demo."""
COLUMNS = (
    "variant",
    "exact answers before",
    "after, mean",
    "after, each seed",
    "reasoned",
    "KL (nats a response)",
    "entropy",
)

Results = dict[str, list[dict[str, float]]]
"""Measures of each variant's runs, one run per seed."""


def ablate(config: DemoConfig, folder: Path) -> Path:
    """Trains every variant from the same stage 1 and verifier, for several seeds.

    Runs that an earlier call finished are read and not repeated.

    Args:
        config: The demo's configuration; the first seed is its `seed`.
        folder: Folder that receives a folder per seed, ablation.json and ablation.md.

    Returns:
        Path of ablation.md.
    """
    results: Results = {name: [] for name in VARIANTS}
    for seed in range(config.seed, config.seed + config.ablation_seeds):
        seeded = replace(config, seed=seed)
        home = folder / f"seed-{seed}"
        home.mkdir(exist_ok=True)
        prepare(seeded, home, {})
        for number, (name, changes) in enumerate(VARIANTS.items()):
            prompts = config.rollouts_per_step // changes.get("samples_per_prompt", 1)
            output = home / f"ppo-{number}"
            own = {"output": str(output), "prompts_per_step": prompts} | changes
            run = ppo_config(seeded, home, **own)
            train(run, resolved={"variant": name, "seed": seed})
            results[name].append(run_summary(output))
            print(f"seed {seed}: {name}: {results[name][-1]}", flush=True)
    (folder / "ablation.json").write_text(json.dumps(results, indent=1))
    table = folder / "ablation.md"
    table.write_text(markdown_table(results))
    print(table.read_text())
    return table


def run_summary(output: Path) -> dict[str, float]:
    """Measures of a finished run, from its output folder."""
    evals = read_rows(output / "eval.jsonl")
    last_step = read_rows(output / "metrics.jsonl")[-1]
    after = evals[-1]
    return {
        "exact_before": evals[0]["exact_rate"],
        "exact_after": after["exact_rate"],
        "score_after": after["score_mean"],
        "reasoned_after": after["reasoned_rate"],
        "length_after": after["response_length_mean"],
        "kl": last_step["kl_mean"],
        "entropy": last_step["entropy"],
    }


def markdown_table(results: Results) -> str:
    """A row per variant, with means over the seeds."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, runs in results.items():
        means = {key: mean(run[key] for run in runs) for key in runs[0]}
        rows.append(
            (
                name,
                f"{means['exact_before']:.2f}",
                f"{means['exact_after']:.2f}",
                " ".join(f"{run['exact_after']:.2f}" for run in runs),
                f"{means['reasoned_after']:.2f}",
                f"{means['kl']:.1f}",
                f"{means['entropy']:.3f}",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
