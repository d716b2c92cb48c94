"""Verifiers, which score a rollout's final response against the reference answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from ..core.text.verifier_text import (
    TEMPLATE,
    Tiers,
    check_template,
    normalise_answer,
    verifier_input,
)
from ..core.training import dist
from ..core.training.engine import EngineConfig, FrozenEngine
from ..core.training.packing import microbatches, pack_token_rows
from ..core.training.pretrained import load_classifier, load_tokenizer
from .hooks import describe
from .judge_verifier import JudgeVerifier as JudgeVerifier
from .rollout import Rollout


class Verifier(Protocol):
    """Gives every rollout a score."""

    needs_format: bool
    """Whether a response in a broken format counts as unparsable."""
    num_cut: int
    """Inputs shortened so far to fit the verifier, on this rank."""
    num_unjudged: int
    """Responses so far that got no verdict, on this rank."""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score per rollout, in order; NaN for a response without a verdict.

        Every rank calls it, with its own rollouts.
        """
        ...


def is_right(rollout: Rollout) -> bool:
    """Whether the final response equals the reference answer.

    Case, white space and outer punctuation do not matter.
    """
    final = rollout.final
    return bool(final) and normalise_answer(final or "") == normalise_answer(rollout.problem.answer)


class ExactMatchVerifier:
    """Counts a response as right when `is_right` holds; a broken format as unparsable."""

    needs_format = True
    num_cut = 0
    num_unjudged = 0

    def __init__(self, *, tiers: Tiers = Tiers()) -> None:  # noqa: B008 an immutable tuple
        self.tiers = tiers

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One tier per rollout, in order."""
        return [
            self.tiers.score(is_right(rollout), parsable=rollout.final is not None)
            for rollout in rollouts
        ]


class FunctionVerifier:
    """Scores by a user's function, which maps rollouts to numbers that are used as they are."""

    needs_format = False
    num_cut = 0
    num_unjudged = 0

    def __init__(
        self, function: Callable[[Sequence[Rollout]], Sequence[float]], *, name: str | None = None
    ) -> None:
        """Args:
        function: maps rollouts to scores.
        name: what errors call it; by default its own name.
        """
        self.function = function
        self.name = name or getattr(function, "__name__", "the verifier function")

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score per rollout, in order.

        Raises:
            ValueError: the function returned another number of scores, or no finite numbers.
        """
        name = self.name
        returned = self.function(rollouts)
        expected = f"expected a list of {len(rollouts)} numbers, one for each rollout"
        if isinstance(returned, (dict, set, str, bytes)):  # would be read as other numbers
            raise ValueError(f"{name} returned {describe(returned)}: {expected}")
        try:
            scores = [_number(score) for score in returned]
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{name} returned {describe(returned)} ({error}): {expected}"
            ) from None
        if len(scores) != len(rollouts):
            raise ValueError(
                f"{name} returned {len(scores)} scores for {len(rollouts)} rollouts: "
                "it must return one for each"
            )
        for number, score in enumerate(scores):
            if not math.isfinite(score):
                raise ValueError(
                    f"{name} returned {score} for rollout {number}: scores must be finite"
                )
        return scores


def _number(score: Any) -> float:
    if isinstance(score, (str, bytes)):
        raise TypeError(f"it holds {describe(score)}")
    return float(score)


class ClassifierVerifier:
    """A frozen two-class model that reads the final response and the reference answer.

    It has its own tokenizer. A response is right when P(right) is above the threshold. The model
    is not asked about a broken format, which is unparsable, or an empty final response, which is
    wrong.
    """

    needs_format = True

    def __init__(
        self,
        engine: FrozenEngine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        threshold: float = 0.4,
        tiers: Tiers = Tiers(),  # noqa: B008 an immutable tuple
        template: str = TEMPLATE,
        max_tokens: int = 2048,
        max_tokens_per_gpu: int = 16384,
    ) -> None:
        """Args:
        engine: the two-class model; class 1 is "right".
        tokenizer: the model's own.
        threshold: a response is right when P(right) is above it.
        tiers: scores of right, wrong and unparsable responses.
        template: text with {response} and {reference}, as the model was trained on.
        max_tokens: tokens of an input; a longer response is cut in the middle.
        max_tokens_per_gpu: tokens of a forward pass.
        """
        check_template(template)
        self.engine = engine
        self.tokenizer = tokenizer
        self.threshold = threshold
        self.tiers = tiers
        self.template = template
        self.max_tokens = max_tokens
        self.max_tokens_per_gpu = max_tokens_per_gpu
        self.num_cut = 0
        self.num_unjudged = 0

    @classmethod
    def load(
        cls,
        path: str,
        config: EngineConfig,
        **options: object,
    ) -> ClassifierVerifier:
        """Loads the model and its tokenizer; `options` as for the constructor."""
        engine = FrozenEngine(load_classifier(path, dtype=config.dtype, engine=config), config)
        verifier = cls(engine, load_tokenizer(path), **options)  # type: ignore[arg-type]
        eos = str(verifier.tokenizer.eos_token)
        if verifier.template != TEMPLATE and not verifier.template.endswith(eos) and dist.is_main():
            print(
                f"note: the verifier's template does not end in {eos}, its tokenizer's end token; "
                "published verifiers were trained on text that does"
            )
        return verifier

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One tier per rollout, in order. Every rank calls it, with its own rollouts."""
        finals = [rollout.final for rollout in rollouts]
        asked = [number for number, final in enumerate(finals) if final]
        pairs = [(finals[number] or "", rollouts[number].problem.answer) for number in asked]
        p = dict(zip(asked, self.probabilities(pairs), strict=True))
        return [
            self.tiers.score(p.get(number, 0.0) > self.threshold, parsable=final is not None)
            for number, final in enumerate(finals)
        ]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(right) of each (final response, reference answer).

        Every rank calls it, with its own pairs.
        """
        rows = []
        for final, reference in pairs:
            ids, num_cut = verifier_input(
                self.tokenizer,
                final,
                reference,
                template=self.template,
                max_tokens=self.max_tokens,
            )
            self.num_cut += num_cut > 0
            rows.append(ids)
        lengths = [len(ids) for ids in rows]
        plan = microbatches(lengths, max_tokens=self.max_tokens_per_gpu) if rows else []
        # under ZeRO-3 every rank must run as many forward passes as the busiest
        plan += [[]] * (max(dist.all_gather(len(plan))) - len(plan))
        result = [0.0] * len(rows)
        for numbers in plan:
            batch = pack_token_rows([rows[n] for n in numbers])
            logits = self.engine(batch.to(dist.device()))
            for number, p in zip(numbers, logits.softmax(-1)[:, 1].tolist(), strict=False):
                result[number] = p
        return result
