"""Results of checks, one line each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ...core.messages import printable

Status = Literal["ok", "warning", "FAILED"]
WIDTH = len("warning")


class Caution(Exception):
    """Raised by a check whose result does not keep the run from starting."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    group: str
    """Heading under which it is printed."""
    status: Status
    what: str
    """Name of what was checked."""
    text: str
    """What was found and, unless the status is ok, what to do."""


@dataclass
class Report:
    """The findings so far. `group` is the heading of those to come."""

    group: str = ""
    findings: list[Finding] = field(default_factory=list)

    def add(self, status: Status, what: str, text: str) -> None:
        """Adds a finding, unless another check has failed for the same reason."""
        known = [each.text for each in self.findings if each.status == "FAILED"]
        if status == "FAILED" and any(reason in text for reason in known):
            return
        self.findings.append(Finding(group=self.group, status=status, what=what, text=text))

    def check(self, what: str, find: Callable[[], str]) -> None:
        """Runs a check, which returns what it found.

        Args:
            what: name of what is checked.
            find: the check; it raises Caution for a warning, and any other error if it fails.
        """
        try:
            self.add("ok", what, find())
        except Caution as caution:
            self.add("warning", what, str(caution))
        except (ValueError, RuntimeError) as error:
            self.add("FAILED", what, str(error))
        except Exception as error:  # the checks go on, whatever a damaged file or server causes
            self.add("FAILED", what, f"{type(error).__name__}: {error}")

    def count(self, status: Status) -> int:
        """Number of findings with a status."""
        return sum(each.status == status for each in self.findings)


def merged(findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's findings, and those problems of other ranks that it does not have.

    Args:
        findings: those of each rank.
    """
    result = list(findings[0])
    known = {(each.what, each.text) for each in result}
    for rank, others in enumerate(findings[1:], start=1):
        for each in others:
            if each.status != "ok" and (each.what, each.text) not in known:
                known.add((each.what, each.text))
                result.append(replace(each, what=f"rank {rank}, {each.what}"))
    return result


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings as lines of text, under the headings of their groups."""
    for group in dict.fromkeys(each.group for each in findings):
        yield group
        for each in findings:
            if each.group == group:
                yield f"  {each.status:<{WIDTH}}  {each.what}: {printable(each.text)}"
