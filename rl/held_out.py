"""The held-out rate beside those of the start and of a baseline, and the alarm when it falls."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ..core.report.statistics import bootstrap_difference, mcnemar, wilson_interval
from ..core.training import dist
from ..core.training.engine import FrozenEngine
from ..core.training.pretrained import load_policy
from ..core.training.run import Metrics
from .config import PPOConfig
from .setup import Components, check_same_shapes, local_sampler
from .weight_push import push_weights

SIGNIFICANCE = 0.05
"""A fall is significant if McNemar's exact test gives a p-value below this."""
REFERENCES = ("start", "baseline")
"""What an evaluation is compared with."""

Results = list[bool | None]
"""Whether the answer to each held-out problem is right; None without a verdict."""


class Change(NamedTuple):
    """How a rate changed between two evaluations of the same problems."""

    difference: float
    """Rate of the later one minus rate of the earlier one."""
    low: float
    """Bounds of the 95 % interval of the difference, by a bootstrap over the problems."""
    high: float
    p_value: float
    """Exact two-sided p-value of McNemar's test."""

    @property
    def is_fall(self) -> bool:
        """Whether the rate fell significantly."""
        return self.difference < 0 and self.p_value < SIGNIFICANCE


def change(now: Results, before: Results) -> Change | None:
    """Compares two evaluations of the same problems, pair by pair.

    Args:
        now: [problems], the later evaluation.
        before: [problems], the earlier one.

    Returns:
        The change over the problems that have a verdict in both; None if there are none.
    """
    pairs = [(a, b) for a, b in zip(now, before, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    later, earlier = map(list, zip(*pairs, strict=True))
    difference, low, high = map(float, vars(bootstrap_difference(later, earlier, seed=0)).values())
    return Change(difference, low, high, mcnemar(later, earlier).p_value)


def rate_metrics(results: Results, *, name: str = "") -> Metrics:
    """The rate of right answers with its 95 % interval (Wilson), as metrics."""
    judged = [right for right in results if right is not None]
    if not judged:
        return {}
    low, high = wilson_interval(sum(judged), len(judged))
    key = f"{name}right_rate"
    return {key: sum(judged) / len(judged), f"{key}_low": low, f"{key}_high": high}


def right_answers(scores: Tensor, right_score: float) -> Results:
    """Which scores count as right; None for NaN, which is no verdict."""
    return [
        None if missing else right
        for missing, right in zip(
            scores.isnan().tolist(), (scores >= right_score).tolist(), strict=True
        )
    ]


@dataclass
class HeldOutRecord:
    """Results on the held-out problems with which later evaluations are compared.

    They are part of the checkpoints: a resumed run compares with the same ones.
    """

    num: int
    """Number of held-out problems."""
    start: Results | None = None
    """Results before the first step."""
    baseline: Results | None = None
    """Results of the baseline."""
    baseline_model: str | None = None
    """Model that the baseline's results are of."""
    fell: bool = False
    """Whether the last evaluation of this process was significantly below the start or baseline."""

    def compare(self, results: Results, *, step: int) -> Metrics:
        """Metrics of an evaluation beside the start's and the baseline's; also prints them.

        Args:
            results: results of the evaluation, which at step 0 become the start's.
            step: finished steps.
        """
        if step == 0:
            self.start = results
        metrics = rate_metrics(results)
        falls = []
        text = f"step {step}: held-out rate {_percent(metrics)}"
        for name in REFERENCES:
            before = getattr(self, name)
            if before is None or (name == "start" and step == 0):
                continue
            metrics |= rate_metrics(before, name=f"{name}_")
            found = change(results, before)
            metrics[f"below_{name}"] = bool(found and found.is_fall)
            if found is None:
                continue
            metrics |= {
                f"{name}_change": found.difference,
                f"{name}_change_low": found.low,
                f"{name}_change_high": found.high,
                f"{name}_change_p": found.p_value,
            }
            text += f"; {name} {_percent(metrics, f'{name}_')}, change {_points(found)}"
            if found.is_fall:
                falls.append(f"the {name}'s (change {_points(found)}, p = {found.p_value:.2g})")
        self.fell = bool(falls)
        if dist.is_main():
            tqdm.write(text)
            if falls:
                tqdm.write(_warning(step, falls), file=sys.stderr)
        return metrics

    def save(self, folder: Path, name: str) -> None:
        """Writes the results to folder/name.json."""
        if dist.is_main():
            fields = ("num", "start", "baseline", "baseline_model")
            content = {field: getattr(self, field) for field in fields}
            (folder / f"{name}.json").write_text(json.dumps(content))

    def load(self, folder: Path, name: str) -> None:
        """Reads what `save` wrote; a checkpoint from before there was such a record has none.

        Raises:
            ValueError: the results are of another number of problems.
        """
        path = folder / f"{name}.json"
        if not path.exists():
            return
        content: dict[str, Any] = json.loads(path.read_text())
        if content["num"] != self.num:
            raise ValueError(
                f"it has results of {content['num']} held-out problems, the data has {self.num}"
            )
        self.start = content["start"]
        self.baseline = content["baseline"]
        self.baseline_model = content["baseline_model"]


def _percent(metrics: Metrics, name: str = "") -> str:
    key = f"{name}right_rate"
    if key not in metrics:
        return "unknown"
    rate, low, high = (100 * metrics[key + end] for end in ("", "_low", "_high"))
    return f"{rate:.1f} % [{low:.1f}, {high:.1f}]"


def _points(found: Change) -> str:
    difference, low, high = (100 * part for part in found[:3])
    return f"{difference:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _warning(step: int, falls: Sequence[str]) -> str:
    return (
        f"WARNING: step {step}: the held-out rate is significantly below {' and '.join(falls)}: "
        "compare the texts in samples.jsonl; lower policy_learning_rate, raise kl.coef, or see "
        "whether the verifier rewards something else"
    )


def evaluate_baseline(
    config: PPOConfig,
    parts: Components,
    record: HeldOutRecord,
    answer: Callable[[Components], Tensor],
    *,
    version: int,
) -> None:
    """Keeps the baseline's results on the held-out problems.

    A sampler that is not local is left with the baseline's weights.

    Args:
        config: names the baseline.
        parts: the run's components.
        record: receives the results.
        answer: components -> [problems], scores of the responses by their sampler.
        version: version of weights under which the baseline's are sent to the sampler.

    Raises:
        ValueError: the model cannot be loaded, or its shapes differ from the policy's.
    """
    baseline = baseline_components(config, parts)
    push_weights(config, baseline, version)
    record.baseline = right_answers(answer(baseline), config.verifier.right)
    record.baseline_model = config.baseline
    del baseline
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def baseline_components(config: PPOConfig, parts: Components) -> Components:
    """The run's components with the baseline in place of the policy.

    A local sampler is replaced by one of the baseline's. Others are sent the baseline's weights
    before the policy's, for which both must have the same shapes.

    Raises:
        ValueError: the model cannot be loaded, or its shapes differ from the policy's.
    """
    assert config.baseline
    baseline = FrozenEngine(load_policy(config.baseline, dtype=config.dtype), config.engine)
    # sampling reads no more of the policy than a frozen engine has
    changed = replace(parts, policy=cast(Any, baseline))
    if config.sampler.kind == "local":
        sampler = local_sampler(config, config.baseline, parts.stop_token_ids)
        return replace(changed, sampler=sampler)
    check_same_shapes(
        parts.policy.module,
        baseline.module,
        f"baseline {config.baseline}",
        needed_by=f"sampler.kind={config.sampler.kind}",
    )
    return changed
