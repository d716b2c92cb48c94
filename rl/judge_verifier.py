"""An LLM as the verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.llm.client import LLMConfig
from ..core.llm.judge import Case, Judge
from ..core.text.verifier_text import Tiers
from .rollout import Rollout


class JudgeVerifier:
    """Right when an LLM says that the final response agrees with the reference answer to the question.

    Broken format earns tiers.unparsable and a blank final response tiers.wrong, both without asking.
    A response on which no verdict is to be had earns tiers.wrong too and is counted; see Judge.verdicts for how many may.
    """

    num_cut = num_unjudged = 0

    def __init__(
        self,
        config: LLMConfig,
        *,
        journal: Path | None = None,
        tiers: Tiers = Tiers(),  # noqa: B008 an immutable tuple
    ) -> None:
        """journal: see Judge."""
        self.judge, self.tiers = Judge(config, journal=journal), tiers

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score a rollout, in order. Raises as Judge.verdicts, naming the problem."""
        finals = [rollout.final for rollout in rollouts]
        asked = [number for number, final in enumerate(finals) if final]
        problems = [rollouts[number].problem for number in asked]
        cases = [
            Case(
                f"a response to problem {problem.index}",
                problem.question,
                problem.answer,
                finals[number] or "",
            )
            for number, problem in zip(asked, problems, strict=True)
        ]
        right = {
            number
            for number, verdict in zip(asked, self.judge.verdicts(cases), strict=True)
            if verdict
        }
        self.num_unjudged = self.judge.num_unjudged
        return [
            self.tiers.score(number in right, parsable=final is not None)
            for number, final in enumerate(finals)
        ]


def share_of_limits(config: LLMConfig, num_ranks: int) -> LLMConfig:
    """The settings of one of several ranks that ask at once: the limits, which hold for all together, divided."""

    requests, tokens, budget = (
        config.requests_per_minute,
        config.tokens_per_minute,
        config.budget_usd,
    )
    return replace(
        config,
        concurrency=max(1, config.concurrency // num_ranks),
        requests_per_minute=requests and max(1, requests // num_ranks),
        tokens_per_minute=tokens and max(1, tokens // num_ranks),
        budget_usd=budget and budget / num_ranks,
    )
