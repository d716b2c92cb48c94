"""What a command finds out about an item, as it travels between functions and to the journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ChainStep = dict[str, str]
"""A step of a chain of thought in its published form: action, content, perhaps title."""
KEPT = " (kept)"
"""Ends the fault of a reply that was used after all, since a second one was no better."""


@dataclass
class Call:
    """One prompt to an LLM, with all its tries."""

    prompt: str
    model: str
    hash: str
    """Digest of the rendered prompt."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    faults: list[str] = field(default_factory=list)
    """Why replies could not be used, in order."""

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Adds the tokens of a reply."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens


@dataclass(frozen=True, kw_only=True)
class TrajectoryStep:
    """A step of an item's work, with the calls it took."""

    strategy: str
    attempt: int | None = None
    depth: int | None = None
    chain: list[ChainStep] | None = None
    """What the strategy added to the chain of thought."""
    conclusion: str | None = None
    verdict: bool | None = None
    """Whether the verifier accepted the conclusion, or the final response."""
    calls: list[Call]


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """What became of an item."""

    outcome: str
    """done, dropped, solved, given up, failed, or unreached when the budget was spent."""
    reason: str | None = None
    """Why it was dropped, failed or was not reached."""
    texts: dict[str, str] = field(default_factory=dict)
    """The texts that were written, by name."""
    trajectory: Sequence[TrajectoryStep] = ()
    turn: int = 1
    """Number of times the item was tried, by --retry_failed."""

    def to_json(self) -> dict[str, Any]:
        """The journal's entry."""
        reason = {} if self.reason is None else {"reason": self.reason}
        trajectory = [step_to_json(step) for step in self.trajectory]
        return {
            "outcome": self.outcome,
            **reason,
            **self.texts,
            "trajectory": trajectory,
            "turn": self.turn,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ItemResult:
        """The result that `to_json` wrote."""
        texts = dict(entry)
        steps = [
            TrajectoryStep(**step | {"calls": [Call(**call) for call in step["calls"]]})
            for step in texts.pop("trajectory")
        ]
        return cls(
            outcome=texts.pop("outcome"),
            reason=texts.pop("reason", None),
            turn=texts.pop("turn"),
            trajectory=steps,
            texts=texts,
        )

    @property
    def calls(self) -> Iterator[Call]:
        """All calls, in order."""
        return (call for step in self.trajectory for call in step.calls)


def step_to_json(step: TrajectoryStep) -> dict[str, Any]:
    """A step in the published form: facts that it does not have are left out."""
    return {key: value for key, value in asdict(step).items() if value is not None}
