"""`verippo doctor`: checks a run before it starts."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from ...core.files import removing_traces
from ...core.training import checkpoint, dist
from .arithmetic import check_batches, check_functions
from .config import DoctorConfig
from .disk import check_disk
from .dry_run import dry_run
from .findings import Report, lines, merged
from .machine import check_machine
from .models import check_models, model_paths
from .network import check_network, launched_port
from .ranks import check_ranks, gather_facts
from .rows import check_rows


def doctor(config: DoctorConfig, *, resolved: dict[str, Any]) -> None:
    """Runs the command: prints a line for each check.

    Args:
        config: the run, and options of the checks.
        resolved: the configuration as plain values.

    Raises:
        ValueError: a check failed.
    """
    port, launched = launched_port()
    dist.init(timeout_seconds=config.timeout_seconds)
    report = Report()
    with dist.fail_together():
        check_machine(report, config)
        check_network(
            report,
            config,
            connect_seconds=config.connect_seconds,
            port=port,
            launched=launched,
        )
        with removing_traces(Path(config.output).expanduser(), always=dist.is_main()):
            _check_run(report, config, resolved)
        report.findings = merged(dist.all_gather(report.findings))
        if dist.is_main():
            print(*lines(report.findings), sep="\n", flush=True)
            if config.dry_run:
                _dry_run(report, config)
            counts = [f"{report.count(each)} {each}" for each in ("ok", "warning", "FAILED")]
            print(", ".join(counts), flush=True)
        num_failed = dist.broadcast(report.count("FAILED"))
    if num_failed and not dist.is_main():
        sys.exit(2)  # rank 0 says why
    if num_failed:
        raise ValueError(
            f"{num_failed} of {len(report.findings)} checks failed: see the lines above"
        )


def _check_run(report: Report, config: DoctorConfig, resolved: dict[str, Any]) -> None:
    """What needs the output folder, and what rank 0 alone checks."""
    problem = None
    try:
        checkpoint.prepare_output(config.output, resume=config.resume)
    except ValueError as error:  # on every rank alike
        problem = str(error)
    if dist.world_size() > 1:
        paths = [*config.data.split(","), *(config.eval_data or "").split(",")]
        paths = [path for path in [*paths, *model_paths(config)] if path]
        facts = gather_facts(config, resolved, paths, writable=problem is None)
        if dist.is_main():
            check_ranks(report, config, facts)
    if not dist.is_main():
        return
    check_disk(report, config, problem)
    check_models(report, config)
    check_functions(report, config)
    num_rows = check_rows(report, config)
    ranks = config.ranks or dist.world_size()
    check_batches(report, config, ranks=ranks, num_rows=num_rows)


def _dry_run(report: Report, config: DoctorConfig) -> None:
    before = len(report.findings)
    report.group = "dry run"
    if report.count("FAILED"):
        report.add("warning", "two steps", "not run: correct the failures first")
    else:
        report.check("two steps", partial(dry_run, config))
    print(*lines(report.findings[before:]), sep="\n", flush=True)
