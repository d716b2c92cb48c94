"""Comparison of the ranks: versions, options, files, clocks, and the folder that they share."""

from __future__ import annotations

import hashlib
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...core.training import dist
from ...core.training.run_config import RunConfig
from ...rl.config import PPOConfig
from .findings import Caution, Report
from .machine import versions

MAX_SKEW_SECONDS = 5.0
"""Difference of two clocks above which there is a warning."""
MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank knows."""

    host: str
    clock: float
    """Seconds since 1970, taken when all ranks had met."""
    sees_output: bool = True
    """Whether it reads the file that rank 0 has written in its output folder."""
    versions: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the command, by their dotted names."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Digests of data and models, by their names."""


def gather_facts(
    config: RunConfig,
    resolved: Mapping[str, Any],
    paths: Sequence[str],
    *,
    writable: bool,
) -> list[RankFacts]:
    """The facts of every rank, on every rank.

    Args:
        config: this rank's configuration.
        resolved: the same as plain values.
        paths: files and folders whose content must be the same on all ranks.
        writable: whether rank 0 can write in its output folder.
    """
    folder = Path(config.output).expanduser()
    files = {path: digest(Path(path).expanduser()) for path in paths}
    name = dist.broadcast(f".seen-by-all-{uuid.uuid4().hex}")
    probe = folder / name
    if dist.is_main() and writable:
        probe.write_text(name)
    dist.barrier()
    clock = time.time()
    own = RankFacts(
        host=socket.gethostname(),
        clock=clock,
        sees_output=not writable or probe.is_file(),
        versions=versions(),
        options=dict(_flat(resolved)),
        files=files,
    )
    facts = dist.all_gather(own)
    if dist.is_main() and writable:
        probe.unlink()
    return facts


def digest(path: Path) -> str:
    """A digest of a file's content, or of the names and sizes of a folder's files."""
    if path.is_file():
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    if not path.is_dir():
        return "not on this host"
    sizes = [(str(p.relative_to(path)), p.stat().st_size) for p in path.rglob("*") if p.is_file()]
    return hashlib.blake2b(repr(sorted(sizes)).encode(), digest_size=8).hexdigest()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return flat


def check_ranks(report: Report, config: RunConfig, facts: Sequence[RankFacts]) -> None:
    """Compares the ranks with rank 0."""
    report.group = "ranks"
    report.check("hosts", partial(_hosts, facts))
    for what, field_name, advice in (
        ("versions", "versions", "install the same on all hosts"),
        ("options", "options", "start all ranks with the same options and configuration file"),
        ("files", "files", "copy rank 0's to all hosts"),
    ):
        report.check(what, partial(_equal, facts, field_name, advice))
    report.check("output folder", partial(_shared, facts, config.output))
    report.check("clocks", partial(_clocks, facts))
    report.check("time-outs", partial(_timeouts, config))


def _hosts(facts: Sequence[RankFacts]) -> str:
    hosts = dict.fromkeys(each.host for each in facts)
    return f"{len(facts)} ranks on {', '.join(hosts)}"


def _equal(facts: Sequence[RankFacts], field_name: str, advice: str) -> str:
    first = getattr(facts[0], field_name)
    differing = [
        f"{name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {rank}"
        for rank, each in enumerate(facts)
        for other in [getattr(each, field_name)]
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise ValueError(f"{', '.join(differing[:MAX_NAMED])}: {advice}")
    return "the same on all ranks"


def _shared(facts: Sequence[RankFacts], output: str) -> str:
    blind = [f"rank {n} ({each.host})" for n, each in enumerate(facts) if not each.sees_output]
    if blind:
        raise ValueError(
            f"{output}: {', '.join(blind[:MAX_NAMED])} cannot read what rank 0 writes there: give "
            "a folder that all hosts share"
        )
    return f"{output} is seen by all ranks"


def _clocks(facts: Sequence[RankFacts]) -> str:
    clocks = [each.clock for each in facts]
    skew = max(clocks) - min(clocks)
    if skew > MAX_SKEW_SECONDS:
        fast = clocks.index(max(clocks))
        slow = clocks.index(min(clocks))
        raise Caution(
            f"rank {fast} ({facts[fast].host}) is {skew:.0f} s ahead of rank {slow} "
            f"({facts[slow].host}): logs and files will be dated wrongly: synchronise them (NTP)"
        )
    return f"within {skew:.1f} s"


def _timeouts(config: RunConfig) -> str:
    limit = config.timeout_seconds
    waits = {}
    if isinstance(config, PPOConfig) and config.sampler.kind == "sglang":
        waits["sampler.timeout_seconds"] = config.sampler.timeout_seconds
    if isinstance(config, PPOConfig) and config.verifier.kind == "judge":
        waits["llm.timeout_seconds"] = config.llm.timeout_seconds
    for name, seconds in waits.items():
        if seconds >= limit:
            raise Caution(
                f"timeout_seconds={limit:g} is not over {name}={seconds:g}: while one rank waits "
                "for a server, the others may end the run: raise it or lower the other"
            )
    return f"timeout_seconds={limit:g}"
