"""An LLM as the verifier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.llm.config import LLMConfig
from ..core.llm.judge import Judge, JudgedAnswer
from ..core.text.verifier_text import Tiers
from .rollout import Rollout


class JudgeVerifier:
    """Counts a response as right when an LLM says that it agrees with the reference answer.

    A broken format counts as unparsable and an empty final response as wrong, without a call. A
    response without a verdict has no score: it takes no part in the update.
    """

    needs_format = True
    num_cut = 0
    num_unjudged = 0

    def __init__(
        self,
        config: LLMConfig,
        *,
        journal: Path | None = None,
        seed: int = 0,
        tiers: Tiers = Tiers(),  # noqa: B008 an immutable tuple
    ) -> None:
        """Args:
        config: the model that judges.
        journal: file that keeps its replies for a resumed run; each rank needs its own.
        seed: the run's seed; see Judge.
        tiers: scores of right, wrong and unparsable responses.
        """
        self.judge = Judge(config, journal=journal, seed=seed)
        self.tiers = tiers

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One tier per rollout, in order; NaN without a verdict.

        Raises:
            RuntimeError, ValueError: as Judge.verdicts; the message names the problem.
        """
        answers = {
            number: JudgedAnswer(
                name=f"a response to problem {rollout.problem.index}",
                question=rollout.problem.question,
                reference=rollout.problem.answer,
                response=rollout.final,
            )
            for number, rollout in enumerate(rollouts)
            if rollout.final
        }
        verdicts = dict(zip(answers, self.judge.verdicts([*answers.values()]), strict=True))
        self.num_unjudged = self.judge.num_unjudged
        scores = []
        for number, rollout in enumerate(rollouts):
            verdict = verdicts.get(number, False)
            score = self.tiers.score(bool(verdict), parsable=rollout.final is not None)
            scores.append(math.nan if verdict is None else score)
        return scores


def share_of_limits(config: LLMConfig, num_ranks: int) -> LLMConfig:
    """Divides the limits, which hold for all ranks together, among ranks that ask at once.

    Args:
        config: settings with the limits of all ranks.
        num_ranks: number of ranks that ask.

    Returns:
        The settings of one rank.
    """
    limits = {
        name: max(1, limit // num_ranks)
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute")
        if (limit := getattr(config, name)) is not None
    }
    budget = config.budget_usd and config.budget_usd / num_ranks
    return replace(config, **limits, budget_usd=budget)
