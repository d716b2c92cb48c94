"""Verifiers: frozen judges of a rollout's final response. Each gives tiers 1.0 / 0.1 / 0.0 (right, wrong, unparsable)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from ..core.text.verifier_text import (
    TEMPLATE,
    Tiers,
    check_template,
    normalise_answer,
    verifier_ids,
)
from ..core.training import dist
from ..core.training.engine import EngineConfig, FrozenEngine
from ..core.training.model import load_classifier, load_tokenizer
from ..core.training.packing import PackedBatch, empty_batch, microbatches
from .judge_verifier import JudgeVerifier as JudgeVerifier
from .rollout import Rollout


class Verifier(Protocol):
    num_cut: int
    """inputs that had to be shortened to be judged, so far, on this rank"""
    num_unjudged: int
    """responses on which no verdict was to be had, likewise"""

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One score a rollout, in order. Under several ranks each passes its own, and all call."""
        ...


def is_right(rollout: Rollout) -> bool:
    """Whether the final response equals the reference answer up to case, white space and outer punctuation."""
    final = rollout.final
    return bool(final) and normalise_answer(final or "") == normalise_answer(rollout.problem.answer)


class ExactMatchVerifier:
    """Right when the final response is the reference answer, up to case, white space and outer punctuation."""

    num_cut = num_unjudged = 0

    def __init__(self, *, tiers: Tiers = Tiers()) -> None:  # noqa: B008 an immutable tuple
        self.tiers = tiers

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [
            self.tiers.unparsable
            if r.final is None
            else self.tiers.right
            if is_right(r)
            else self.tiers.wrong
            for r in rollouts
        ]


class FunctionVerifier:
    """A user's own function: rollouts -> scores. Its numbers are used as they are."""

    num_cut = num_unjudged = 0

    def __init__(self, function: Callable[[Sequence[Rollout]], Sequence[float]]) -> None:
        self.function = function

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Raises ValueError when the function gives no numbers, another count of scores, or one that is not finite."""
        name = getattr(self.function, "__name__", "the verifier function")
        given = self.function(rollouts)
        try:
            scores = [float(score) for score in given]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must give a list of numbers: {error}") from None
        if len(scores) != len(rollouts):
            raise ValueError(
                f"{name} gave {len(scores)} scores for {len(rollouts)} rollouts: it must give one each"
            )
        for number, score in enumerate(scores):
            if not math.isfinite(score):
                raise ValueError(f"{name} gave {score} for rollout {number}: scores must be finite")
        return scores


class ClassifierVerifier:
    """A frozen two-class model that reads (final response, reference answer) and gives P(right).

    It has its own tokenizer. Broken format earns tiers.unparsable and a blank final response tiers.wrong, both without
    asking the model; otherwise tiers.right when P > threshold, else tiers.wrong.
    """

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
        check_template(template)
        self.engine, self.tokenizer, self.threshold, self.tiers = (
            engine,
            tokenizer,
            threshold,
            tiers,
        )
        self.template, self.max_tokens, self.max_tokens_per_gpu = (
            template,
            max_tokens,
            max_tokens_per_gpu,
        )
        self.num_cut = self.num_unjudged = 0

    @classmethod
    def load(cls, path: str, config: EngineConfig, **options: object) -> ClassifierVerifier:
        engine = FrozenEngine(load_classifier(path, dtype=config.dtype), config)
        return cls(engine, load_tokenizer(path), **options)  # type: ignore[arg-type]

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        finals = [rollout.final for rollout in rollouts]
        asked = [number for number, final in enumerate(finals) if final]
        pairs = [(finals[number] or "", rollouts[number].problem.answer) for number in asked]
        right = dict(zip(asked, self.probabilities(pairs), strict=True))
        return [
            self.tiers.unparsable
            if final is None
            else self.tiers.right
            if right.get(number, 0.0) > self.threshold
            else self.tiers.wrong
            for number, final in enumerate(finals)
        ]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(right) of each (final response, reference answer). Every rank must call, with its own pairs."""
        rows = []
        for final, reference in pairs:
            ids, num_cut = verifier_ids(
                self._encode, final, reference, template=self.template, max_tokens=self.max_tokens
            )
            self.num_cut += num_cut > 0
            rows.append(ids)
        lengths = [len(ids) for ids in rows]
        plan = microbatches(lengths, max_tokens=self.max_tokens_per_gpu) if rows else []
        result = [0.0] * len(rows)
        for turn in range(
            max(dist.all_gather(len(plan)))
        ):  # ZeRO-3: every rank runs as many forwards as the busiest
            numbers = plan[turn] if turn < len(plan) else []
            batch = _inputs([rows[n] for n in numbers]) if numbers else empty_batch()
            logits = self.engine(batch.to(dist.device()))
            for number, p in zip(numbers, logits.softmax(-1)[:, 1].tolist(), strict=False):
                result[number] = p
        return result

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _inputs(rows: list[list[int]]) -> PackedBatch:
    tokens = torch.tensor([token for row in rows for token in row])
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
    return PackedBatch(
        tokens=tokens,
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32),
        response_mask=torch.zeros_like(tokens, dtype=torch.bool),
    )
