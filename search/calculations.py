"""Generates sums of bedside scores: small verifiable problems, reproducible by seed.

For demonstrating and testing the trainer, not for clinical use. A record has the published keys
(`Question`, `Complex_CoT`, `Response`, `Open-ended Verifiable Question`, `Ground-True Answer`),
its answer follows from a sum shown in full, and `source` cites where the points were published.
Training and held-out problems are disjoint for every seed: the split of a problem follows from a
hash of its findings, whatever their order.
"""

import hashlib
import random
from collections.abc import Sequence
from itertools import accumulate, count, islice, pairwise
from typing import Any, Literal

from .bedside_scores import IRRELEVANT, SCORES, Finding, Item, Score

Record = dict[str, Any]
Split = Literal["train", "eval"]

ONE_IN_HELD_OUT = 10
MIN_FINDINGS = 3
MAX_FINDINGS = 8
MAX_DRAWS = 2000

IRRELEVANT_TEXTS = frozenset(finding.text for finding in IRRELEVANT)

ANSWER_PHRASES = ("{}", "total {}", "total of {}", "the score is {}")
"""Phrases that state an answer; a record's Response is the first."""


def generate(
    num: int,
    *,
    seed: int,
    split: Split,
    kinds: Sequence[str],
    difficulty: int,
) -> list[Record]:
    """Generates problems with their reasoning; record i depends on `i` and the arguments after it.

    Problems repeat in the long run: a small score has a few hundred sets of findings.

    Args:
        num: number of records.
        seed: seed of every draw.
        split: which of the two disjoint sets of problems.
        kinds: scores to draw from, evenly: keys of `SCORES`.
        difficulty: number of findings in a sum, 3 to 8.

    Returns:
        `num` records.

    Raises:
        ValueError: an argument has another value, or a score has no such problem.
    """
    if not kinds or any(kind not in SCORES for kind in kinds):
        raise ValueError(f"kinds={list(kinds)}: choose among {list(SCORES)}")
    if split not in ("train", "eval"):
        raise ValueError(f'split={split!r}: choose "train" or "eval"')
    if not MIN_FINDINGS <= difficulty <= MAX_FINDINGS:
        raise ValueError(f"difficulty={difficulty}: choose {MIN_FINDINGS} to {MAX_FINDINGS}")
    names = sorted(set(kinds))
    draws = (random.Random(f"{seed}/{split}/{i}") for i in range(num))
    return [_record(rng, split, names, difficulty) for rng in draws]


def split_of(kind: str, findings: Sequence[str]) -> Split:
    """The split that a problem belongs to, by a hash of its kind and findings.

    Args:
        kind: key of `SCORES`.
        findings: texts of the findings; their order and irrelevant findings make no difference.
    """
    parts = sorted(set(findings) - IRRELEVANT_TEXTS)
    digest = hashlib.blake2b("|".join([kind, *parts]).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % ONE_IN_HELD_OUT == 0 else "train"


def paraphrases(record: Record) -> list[str]:
    """Correct statements of the record's final answer, its Response first."""
    return [phrase.format(record["Ground-True Answer"]) for phrase in ANSWER_PHRASES]


def wrong_answers(record: Record, num: int, seed: int) -> list[str]:
    """Wrong final answers to a record's question, stated in the same phrases as the right ones.

    Likely mistakes come first: off by one or two, and swapped digits.

    Args:
        record: a record of `generate`.
        num: number of answers.
        seed: seed of the draw.

    Returns:
        `num` distinct answers.
    """
    rng = random.Random(f"{seed}/{record['Question']}")
    number = record["Ground-True Answer"]
    value = int(number)
    near = [value + offset for offset in (-2, -1, 1, 2)] + _swapped_digits(number)
    answers = list(dict.fromkeys(slip for slip in near if slip >= 0 and slip != value))
    further = (answer for answer in count(value + 3) if answer not in near)
    rng.shuffle(answers)
    answers += islice(further, num)
    return [rng.choice(ANSWER_PHRASES).format(answer) for answer in answers[:num]]


def _record(
    rng: random.Random,
    split: Split,
    kinds: Sequence[str],
    difficulty: int,
) -> Record:
    kind = rng.choice(kinds)
    score = SCORES[kind]
    findings = _draw_problem(score, split, difficulty, rng)
    texts = [finding.text for finding in findings]
    totals = [*accumulate(finding.points for finding in findings)]
    steps = [
        f"{finding.text} = {finding.points} , total {total}"
        for finding, total in zip(findings, totals, strict=True)
    ]
    question = f"{score.name} : {' , '.join(texts)} , total ?"
    answer = str(totals[-1])
    return {
        "Question": question,
        "Complex_CoT": " ; ".join(steps),
        "Response": ANSWER_PHRASES[0].format(answer),
        "Open-ended Verifiable Question": question,
        "Ground-True Answer": answer,
        "kind": kind,
        "source": score.source,
        "difficulty": len(findings),
        "split": split,
        "style": "compact",
        "inputs": {"findings": texts},
    }


def _draw_problem(
    score: Score,
    split: Split,
    difficulty: int,
    rng: random.Random,
) -> list[Finding]:
    """Draws findings of one patient until they belong to the wanted split."""
    for _ in range(MAX_DRAWS):
        findings = _draw_findings(score, difficulty, rng)
        if split_of(score.kind, [finding.text for finding in findings]) == split:
            return findings
    raise ValueError(
        f"kinds: {score.kind} has no {split} problem of difficulty={difficulty} in {MAX_DRAWS} "
        "draws: choose another difficulty"
    )


def _draw_findings(score: Score, difficulty: int, rng: random.Random) -> list[Finding]:
    """Draws findings of one patient; a severity drawn first spreads the totals evenly."""
    num_irrelevant = max(difficulty - len(score.items), rng.randrange(2))
    severity = rng.uniform(0.1, 0.9)
    items = rng.sample(score.items, difficulty - num_irrelevant)
    findings = [_draw_finding(item, severity, rng) for item in items]
    findings += rng.sample(IRRELEVANT, num_irrelevant)
    rng.shuffle(findings)
    return findings


def _draw_finding(item: Item, severity: float, rng: random.Random) -> Finding:
    level = sum(rng.random() < severity for _ in range(len(item) - 1))
    return rng.choice(item[level])


def _swapped_digits(number: str) -> list[int]:
    """The number with each pair of neighbouring digits exchanged."""
    pairs = enumerate(pairwise(number))
    return [int(number[:i] + b + a + number[i + 2 :]) for i, (a, b) in pairs]
