"""What SFT, verifier training and PPO share: state, resume, metrics, checkpoints, export."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, dist, stopping
from .metrics import MetricLog, Stopwatch, finite, start_log
from .run_config import RunConfig
from .watchdog import enter_phase

Metrics = dict[str, Any]
ConfigT = TypeVar("ConfigT", bound=RunConfig)


@dataclass
class RunState:
    """Progress of a run, as stored in the checkpoint's state.json."""

    step: int = 0
    """Finished steps."""
    position: int = 0
    """Rows taken from the shuffled order."""
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    best: Metrics | None = None
    """Metrics of the best evaluation."""
    skipped_steps: int = 0
    """Optimizer steps skipped because a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those since the last applied step."""
    ending: bool = False
    """Whether the last step still lacks its evaluation: a signal stopped the run before it."""
    run_id: str | None = None
    """Identifier of the wandb run."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further numbers of one kind of run, such as an adaptive coefficient."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Configuration at the checkpoint, as plain values."""

    def __post_init__(self) -> None:
        for name in ("step", "position", "tokens", "skipped_steps", "skipped_in_a_row"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"state.json: {name} is {value!r}: must be a count")
        if not isinstance(self.settings, dict) or not isinstance(self.best, dict | None):
            raise ValueError("state.json: settings or best is no object")


def check_unchanged(
    fixed: Sequence[str],
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    where: Path,
) -> None:
    """Checks that a run resumes with the settings that cannot change within it.

    Raises:
        ValueError: a field of `fixed` differs; the message shows both values of each.
    """
    if changed := changed_settings(fixed, before, now):
        raise ValueError(
            f"{where} was written with other settings, which cannot change within a run: "
            f"{', '.join(changed)}: set them back, or start over with --resume never and another "
            "--output"
        )


def changed_settings(
    fixed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """Names the fields of `fixed` whose values differ, each with both values."""
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in fixed
        if name in before and name in now and _as_path(before[name]) != _as_path(now[name])
    ]


def _as_path(value: Any) -> Any:
    """The same value for each way to write the path of an existing file."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value


def print_next_commands(folder: Path, *commands: str) -> None:
    """Prints where a finished run's model is, and the commands that use it.

    Args:
        folder: the run's folder.
        commands: commands in which MODEL stands for the model's folder.
    """
    if not dist.is_main():
        return
    model = folder / "model"
    best = folder / "model-best"
    print(f"model: {model}" + (f" (best evaluated: {best})" if best.exists() else ""))
    for command in commands:
        print(f"next: {command.replace('MODEL', shlex.quote(str(model)))}")


class Saveable(Protocol):
    """A part of the run that is stored in its checkpoints."""

    def save(self, folder: Path, name: str) -> None: ...

    def load(self, folder: Path, name: str) -> None: ...


@dataclass(kw_only=True)
class TrainingRun(Generic[ConfigT]):
    """A run's folder, state and log, with everything that happens around the algorithm.

    Every rank holds one and calls every method; only the main rank writes.
    """

    config: ConfigT
    folder: Path
    engines: Mapping[str, Saveable]
    """Parts stored in checkpoints, by name."""
    export: Callable[[Path], None]
    """Writes the trained model as a Hugging Face folder; called on every rank."""
    better: Callable[[Metrics, Metrics], bool]
    """Whether the first evaluation beats the second."""
    save_when_best: bool = False
    """Whether a new best evaluation is followed by a checkpoint at once."""
    stop_early: Callable[[RunState], bool] = lambda state: False
    """Whether the run is done before its last step."""
    state: RunState = field(default_factory=RunState)
    watch: Stopwatch = field(default_factory=lambda: Stopwatch(enter_phase))
    total_steps: int = 0
    log: MetricLog | None = None
    saved: tuple[int, bool] = (0, False)
    """Step and `ending` of the newest checkpoint."""

    def resume(self, *, resolved: dict[str, Any]) -> None:
        """Loads the checkpoint that `config.resume` selects, if there is one.

        Args:
            resolved: the configuration as plain values.

        Raises:
            ValueError: the checkpoint is damaged, or was written with other settings of fields that
                cannot change within a run.
        """
        trust = self.config.trust_checkpoint
        found = checkpoint.find_resume(self.folder, self.config.resume, trust=trust)
        if found is None:
            self.state.settings = resolved
            metrics = self.folder / "metrics.jsonl"
            if dist.is_main() and metrics.exists() and metrics.stat().st_size:
                print(
                    f"output {self.folder}: has metrics of an earlier start but no checkpoint: "
                    "starting over from step 0, and the metrics are replaced"
                )
            return
        with checkpoint.explain_load_errors(found):
            checkpoint.verify(found)
            self.state = RunState(**checkpoint.load_state(found))
        check_unchanged(self.config.fixed, self.state.settings, resolved, where=found)
        self.state.settings = resolved
        with checkpoint.explain_load_errors(found):
            for name, engine in self.engines.items():
                engine.load(found, name)
        self.saved = self.state.step, self.state.ending

    def start(self, total_steps: int, *, resolved: dict[str, Any]) -> None:
        """Opens the log. `resolved` is the configuration as plain values, for config.yaml."""
        self.total_steps = total_steps
        if dist.is_main():
            self.log = start_log(
                self.folder,
                log_to=self.config.log_to,
                step=self.state.step,
                total_steps=total_steps,
                config=resolved,
                world_size=dist.world_size(),
                run_id=self.state.run_id,
            )

    def steps(self, name: str) -> Iterator[tuple[int, tqdm]]:
        """Yields (step, progress bar) for each remaining step, counted from 1.

        The body of the loop must end with `end_step`.
        """
        start = self.state.step
        hidden = not dist.is_main()
        with tqdm(
            total=self.total_steps,
            initial=start,
            desc=name,
            unit="step",
            disable=hidden,
        ) as bar:
            while not self.is_over:
                self.seed_draws("step", self.state.step + 1)
                yield self.state.step + 1, bar
                bar.update()

    def seed_draws(self, purpose: str, step: int) -> None:
        """Seeds the global generators of torch, numpy and Python for this step and rank.

        A user's functions that draw from them then repeat their draws when a run resumes.
        """
        text = f"{self.config.seed}/{purpose}/{step}/{dist.rank()}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def stop_if_asked(self) -> None:
        """Ends the run if any rank has received a signal to stop.

        Every rank must call it, at a point where the weights are those of the last finished step.

        Raises:
            AgreedStop: on every rank.
        """
        # in host memory, so that no GPU has to catch up first
        number = int(dist.all_max(torch.tensor([stopping.received()])))
        if number:
            raise stopping.AgreedStop(number)

    @contextlib.contextmanager
    def saved_on_stop(self) -> Iterator[None]:
        """Saves the last finished step when `stop_if_asked` ends the run inside the block."""
        with stopping.deferred():
            try:
                yield
                self.stop_if_asked()
            except stopping.AgreedStop:
                if self.state.step and self.saved != (self.state.step, self.state.ending):
                    self.save(best=False)
                raise

    @property
    def is_over(self) -> bool:
        """Whether the last step is done."""
        return self.state.step >= self.total_steps or self.stop_early(self.state)

    def is_due(self, every: int) -> bool:
        """Whether an action taken every `every` steps, and after the last one, is due now."""
        return self.state.step % every == 0 or self.state.step == self.total_steps

    def count_skipped(
        self, applied: bool, *, save_failure: Callable[[], str] | None = None
    ) -> None:
        """Counts optimizer steps whose gradient was not finite.

        Args:
            applied: whether the last optimizer step was applied.
            save_failure: saves the data of the failed step and returns where it is.

        Raises:
            RuntimeError: `max_skipped_steps` of them in a row.
        """
        state = self.state
        state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
        state.skipped_steps += not applied
        if state.skipped_in_a_row >= self.config.max_skipped_steps:
            where = f"; see {save_failure()}" if save_failure else ""
            raise RuntimeError(
                f"{state.skipped_in_a_row} consecutive optimizer steps had a gradient that is not "
                f"finite{where}"
            )

    def log_metrics(self, row: Metrics) -> None:
        """Appends a row to metrics.jsonl."""
        if self.log is not None:
            self.log.write("metrics", finite({"step": self.state.step, **row}))

    def log_evaluation(self, metrics: Metrics) -> None:
        """Appends a row to eval.jsonl."""
        if self.log is not None:
            self.log.write("eval", finite({"step": self.state.step, **metrics}), prefix="eval/")

    def is_best(self, metrics: Metrics) -> bool:
        """Whether an evaluation is the best so far; if so, keeps it as `state.best`."""
        if self.state.best is not None and not self.better(metrics, self.state.best):
            return False
        self.state.best = metrics
        return True

    def resume_end(self, evaluate: Callable[[], Metrics] | None) -> None:
        """Ends the step that a signal stopped before its evaluation, if the run resumes there."""
        if self.state.ending:
            self.end_step(evaluate)

    def end_step(self, evaluate: Callable[[], Metrics] | None) -> None:
        """Evaluates, exports the best model and saves a checkpoint, each when it is due.

        `evaluate` returns the metrics of the held-out rows; None where there are none. It may call
        `stop_if_asked`.
        """
        self.state.ending = True
        self.stop_if_asked()
        best = False
        if evaluate and self.is_due(self.config.eval_every):
            enter_phase("evaluate")
            self.seed_draws("evaluation", self.state.step)
            metrics = evaluate()
            self.log_evaluation(metrics)
            best = self.is_best(metrics)
        self.state.ending = False
        if best:
            self.export(self.folder / "model-best")
        # a checkpoint from before the evaluation would repeat it
        repeats = self.saved == (self.state.step, True)
        saves = self.is_due(self.config.save_every) or self.is_over or repeats
        if saves or (best and self.save_when_best):
            self.save(best=best)

    def save(self, *, best: bool) -> None:
        """Writes a checkpoint; `best` protects it from pruning."""

        def write(temporary: Path) -> None:
            for name, engine in self.engines.items():
                engine.save(temporary, name)

        enter_phase("save")
        self.state.run_id = self.log.run_id if self.log else None
        checkpoint.save(
            self.folder,
            step=self.state.step,
            state=vars(self.state),
            write=write,
            best=best,
            total_limit=self.config.save_total_limit,
        )
        self.saved = self.state.step, self.state.ending

    def finish(self) -> None:
        """Exports the final model."""
        self.export(self.folder / "model")

    def close(self) -> None:
        """Closes the log."""
        if self.log is not None:
            self.log.close()
