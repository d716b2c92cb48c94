"""Ablations of PPO on the demo's tasks: several variants, several seeds, from the same start."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from ..core.files import replace_file
from ..core.report.statistics import wilson_interval
from ..core.training import stopping
from ..rl.config import SamplerConfig
from ..rl.loss_config import CorrectionConfig, KLConfig
from ..rl.train import train
from .demo_task import DemoConfig, ppo_config, prepare, read_rows

Variants = dict[str, dict[str, Any]]
"""Fields in which each variant differs from the task's configuration of PPO."""
Measures = dict[str, float]

DECOUPLED = {"lam": 0.95, "lam_critic": 1.0}
ADAPTIVE = {"lam_alpha": 0.05, "lam_critic": 1.0}
STALE = {
    "sampler": SamplerConfig(
        kind="factory", factory="verippo.launch.stale_sampler:every_fourth_step"
    )
}
VARIANTS: dict[str, Variants] = {
    "short": {
        "default (critic, KL 0.03, whitening, value clip)": {},
        "no critic: whitened score (REINFORCE++)": {"advantage": "reinforce++"},
        "no critic: RLOO, 4 samples a prompt": {"advantage": "rloo", "samples_per_prompt": 4},
        "no KL penalty": {"kl": KLConfig(coef=0.0)},
        "no whitening": {"whiten": False},
        "no value clip": {"value_clip": None},
        "lambda 0.95 instead of 1": {"lam": 0.95},
    },
    "long": {
        "paper's: lambda 0.95, critic from zero": {"lam": 0.95},
        "lambda 1": {"lam": 1.0},
        "decoupled: lambda 0.95, critic's 1": DECOUPLED,
        "decoupled, adaptive lambda": ADAPTIVE,
        "... and critic warm-up, 3 steps": ADAPTIVE | {"critic_warmup_steps": 3},
        "... and two critic epochs": ADAPTIVE | {"critic_epochs": 2},
        "RLOO, 4 samples a prompt": {"advantage": "rloo", "samples_per_prompt": 4},
        "GRPO, 4 samples a prompt": {"advantage": "grpo", "samples_per_prompt": 4},
        "lambda 1, stale sampler": {"lam": 1.0} | STALE,
        "... with weights by token, truncated": {
            "lam": 1.0,
            "correction": CorrectionConfig(level="token", mode="truncate"),
        }
        | STALE,
        "... with weights by geometric mean, masked": {
            "lam": 1.0,
            "correction": CorrectionConfig(level="geometric", mode="mask"),
        }
        | STALE,
    },
}
COLUMNS = (
    "variant",
    "exact answers before",
    "after, mean (95 %)",
    "after, each seed",
    "reasoned",
    "explained variance",
    "KL (nats a response)",
    "entropy",
)
SUMMARY = "summary.json"
"""File with the measures of a finished run, in its folder."""


def ablate(config: DemoConfig, folder: Path) -> Path:
    """Trains every variant from the same stage 1 and verifier, for several seeds.

    Runs that an earlier call finished are not repeated, and unfinished ones are resumed.

    Args:
        config: The demo's configuration; the first seed is its `seed`.
        folder: Folder that receives a folder per seed, ablation.json and ablation.md.

    Returns:
        Path of ablation.md.
    """
    seeds = range(config.seed, config.seed + config.ablation_seeds)
    homes = {folder / f"seed-{seed}": replace(config, seed=seed) for seed in seeds}
    runs = {
        (home, name): home / f"ppo-{number}"
        for number, name in enumerate(VARIANTS[config.task])
        for home in homes
    }
    _finish(runs, homes, num_jobs=config.ablation_jobs)
    results: dict[str, list[Measures]] = {name: [] for name in VARIANTS[config.task]}
    for (_, name), output in runs.items():
        results[name].append(json.loads((output / SUMMARY).read_text()))
    replace_file(folder / "ablation.json", json.dumps(results, indent=1))
    table = folder / "ablation.md"
    replace_file(table, markdown_table(results))
    print(table.read_text())
    return table


def _finish(
    runs: dict[tuple[Path, str], Path],
    homes: dict[Path, DemoConfig],
    *,
    num_jobs: int,
) -> None:
    """Trains what is not finished, each seed after its stage 1 and verifier.

    Args:
        runs: (folder of a seed, variant) -> output folder.
        homes: folder of a seed -> its configuration.
        num_jobs: runs at once.
    """
    todo = [run for run, output in runs.items() if not (output / SUMMARY).exists()]
    unprepared = list(dict.fromkeys(home for home, _ in todo))
    with (
        tqdm(total=len(unprepared) + len(todo), desc="ablation", unit="run") as bar,
        _workers(num_jobs) as pool,
    ):
        jobs: dict[Future[Any], tuple[Path, str]] = {
            pool.submit(_prepare, homes[home], home): (home, "") for home in unprepared
        }
        while jobs:
            for future in wait(jobs, return_when=FIRST_COMPLETED).done:
                home, variant = jobs.pop(future)
                measures = future.result()
                bar.update()
                if variant:
                    rates = f"{measures['exact_before']:.3f} to {measures['exact_after']:.3f}"
                    bar.write(f"{home.name}: {variant}: exact answers {rates}")
                    continue
                for run in (run for run in todo if run[0] == home):
                    jobs[pool.submit(_train, homes[home], *run, runs[run])] = run


@contextlib.contextmanager
def _workers(num: int) -> Iterator[Executor]:
    """Processes that runs are submitted to; all end, resumable, if the body fails or is stopped."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num, mp_context=context, initializer=_handle_signals)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _handle_signals() -> None:
    stopping.handled().__enter__()


def _prepare(config: DemoConfig, home: Path) -> None:
    home.mkdir(exist_ok=True)
    with _output_to(home / "stages.log"):
        prepare(config, home, {})


def _train(
    config: DemoConfig,
    home: Path,
    name: str,
    output: Path,
) -> Measures:
    changes = VARIANTS[config.task][name]
    prompts = config.sizes.rollouts_per_step // changes.get("samples_per_prompt", 1)
    own = {"output": str(output), "prompts_per_step": prompts} | changes
    with _output_to(home / f"{output.name}.log"):
        train(ppo_config(config, home, **own), resolved={"variant": name, "seed": config.seed})
    measures = run_summary(output)
    replace_file(output / SUMMARY, json.dumps(measures))
    return measures


@contextlib.contextmanager
def _output_to(file: Path) -> Iterator[None]:
    """Sends what a run prints to a file, which leaves the terminal to the bar of all runs."""
    with (
        file.open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def run_summary(output: Path) -> Measures:
    """Measures of a finished run, from its output folder."""
    evals = read_rows(output / "eval.jsonl")
    steps = read_rows(output / "metrics.jsonl")
    last_step = steps[-1]
    after = evals[-1]
    return {
        "num": after["num"],
        "exact_before": evals[0]["exact_rate"],
        "exact_after": after["exact_rate"],
        "score_after": after["score_mean"],
        "reasoned_after": after["reasoned_rate"],
        "length_after": after["response_length_mean"],
        "explained_variance": mean(step["explained_variance"] for step in steps[-4:]),
        "kl": last_step["kl_mean"],
        "entropy": last_step["entropy"],
        "seconds": sum(
            value for step in steps for key, value in step.items() if key.startswith("seconds_")
        ),
    }


def markdown_table(results: dict[str, list[Measures]]) -> str:
    """A row per variant, with means over the seeds.

    The interval is that of the rate over the held-out problems of all seeds together.
    """
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, runs in results.items():
        means = {key: mean(run[key] for run in runs) for key in runs[0]}
        num = sum(run["num"] for run in runs)
        low, high = wilson_interval(means["exact_after"] * num, num)
        rows.append(
            (
                name,
                f"{means['exact_before']:.2f}",
                f"{means['exact_after']:.2f} ({low:.2f} to {high:.2f})",
                " ".join(f"{run['exact_after']:.2f}" for run in runs),
                f"{means['reasoned_after']:.2f}",
                f"{means['explained_variance']:.2f}",
                f"{means['kl']:.1f}",
                f"{means['entropy']:.3f}",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
