"""Generated clinical calculations and score sums: an endless, seeded source of verifiable problems.

For demonstrating and testing the trainer, not for clinical use. A record has the published keys (`Question`,
`Complex_CoT`, `Response`, `Open-ended Verifiable Question`, `Ground-True Answer`), its answer follows from arithmetic
shown in full, and `source` cites where the points or the formula were published. Training and held-out problems are
disjoint whatever the seed: a hash of a problem's inputs, not of its wording or order, decides its split.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import accumulate, count, islice, pairwise
from typing import Any, Literal, NamedTuple

from .bedside_scores import IRRELEVANT, SCORES, Finding, Item, Score
from .clinical_formulas import FORMULAS, Formula, Working, plain

Record = dict[str, Any]
Split = Literal["train", "eval"]
Style = Literal["compact", "prose"]

ONE_IN_HELD_OUT = 10
MIN_FINDINGS, MAX_FINDINGS = 3, 8
MAX_DRAWS = 2000
TIE_MARGIN = Decimal("0.06")
"""In units of the answer's last place: no answer lies closer than this to where rounding turns"""

IRRELEVANT_WORDS = frozenset(finding.compact for finding in IRRELEVANT)

GROUPS: Mapping[str, tuple[str, ...]] = {"scores": tuple(SCORES), "calculations": tuple(FORMULAS)}

ANSWER_PHRASES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("scores", "compact"): ("{}", "total {}", "total of {}", "the score is {}"),
    ("scores", "prose"): (
        "The total score is {}.",
        "{}",
        "The score is {} points.",
        "a total of {}",
        "{} points",
    ),
    ("calculations", "compact"): ("{}", "answer {}", "the answer is {}"),
    ("calculations", "prose"): (
        "The {name} is {}.",
        "{}",
        "The answer is {}.",
        "{name}: {}",
        "It comes to {}.",
    ),
}
"""(group, style) -> ways to state an answer; a record's Response is the first"""

WRONG_UNITS: Mapping[str, str] = {
    "mg": "g",
    "mL/h": "mL/min",
    "drops/min": "drops/h",
    "mmol/L": "mg/dL",
    "mmHg": "kPa",
    "mg/dL": "mmol/L",
    "mOsm/kg": "mmol/dL",
    "kg/m2": "kg/m",
    "mL/min": "mL/h",
    "%": "mmol/L",
}


class Problem(NamedTuple):
    """A drawn problem before it has wording."""

    inputs: dict[str, Any]
    findings: Sequence[Finding]
    lines: Sequence[str]
    answer: str


def generate(
    num: int,
    *,
    seed: int,
    split: Split = "train",
    kinds: str | Sequence[str] | None = None,
    difficulty: int = 6,
    style: Style = "compact",
) -> list[Record]:
    """The first `num` records of `stream`."""
    return list(
        islice(stream(seed=seed, split=split, kinds=kinds, difficulty=difficulty, style=style), num)
    )


def stream(
    *,
    seed: int,
    split: Split = "train",
    kinds: str | Sequence[str] | None = None,
    difficulty: int = 6,
    style: Style = "compact",
    start: int = 0,
) -> Iterator[Record]:
    """Records start, start + 1, ... without end; record i depends on the other arguments and i alone.

    `kinds`: names of scores and formulas or of the groups "scores" and "calculations"; None is everything. They are
    drawn evenly. `difficulty`: findings in a score sum, 3 to 8 (a calculation has as many steps as its formula).
    `style`: "compact" has a small closed vocabulary, "prose" full sentences; both word the same problems.

    Problems repeat in the long run: a small score has a few hundred sets of findings. Raises ValueError on a kind,
    split, style or difficulty that is not one of these, and on a start below 0.
    """
    names = resolve_kinds(kinds)
    if split not in ("train", "eval"):
        raise ValueError(f'split is {split!r}: choose "train" or "eval"')
    if style not in ("compact", "prose"):
        raise ValueError(f'style is {style!r}: choose "compact" or "prose"')
    if not MIN_FINDINGS <= difficulty <= MAX_FINDINGS:
        raise ValueError(
            f"difficulty is {difficulty}: choose {MIN_FINDINGS} to {MAX_FINDINGS} findings"
        )
    if start < 0:
        raise ValueError(f"start is {start}: records are counted from 0")
    return (
        _record(random.Random(f"{seed}/{split}/{i}"), split, names, difficulty, style)
        for i in count(start)
    )


def resolve_kinds(kinds: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names and groups -> sorted distinct names of scores and formulas. Raises ValueError on an unknown one."""
    names = tuple(GROUPS) if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    resolved = sorted({name for group in names for name in GROUPS.get(group, (group,))})
    unknown = [name for name in resolved if name not in SCORES and name not in FORMULAS]
    if unknown or not resolved:
        raise ValueError(f"kinds {unknown} not among {[*GROUPS, *SCORES, *FORMULAS]}")
    return tuple(resolved)


def split_of(kind: str, inputs: Mapping[str, Any]) -> Split:
    """The split that a problem belongs to, by a hash of its kind and inputs.

    Neither the order of findings nor the irrelevant ones among them count: one set of findings, one split.
    """
    if kind in SCORES:
        parts = sorted(set(inputs["findings"]) - IRRELEVANT_WORDS)
    else:
        parts = sorted(f"{name}={value}" for name, value in inputs.items())
    digest = hashlib.blake2b("|".join([kind, *parts]).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % ONE_IN_HELD_OUT == 0 else "train"


def paraphrases(record: Record) -> list[str]:
    """Right statements of the record's final answer, its Response first."""
    return [
        phrase.format(record["Ground-True Answer"], name=_name(record))
        for phrase in _phrases(record)
    ]


def wrong_answers(record: Record, num: int, seed: int) -> list[str]:
    """`num` distinct wrong final answers in the phrases of `paraphrases`, so that phrasing gives nothing away.

    Likely slips come first: off by one or two in the last place, swapped digits, and for a calculation also a factor
    of ten and, where the answer has a unit, a wrong one.
    """
    rng = random.Random(f"{seed}/{record['Question']}")
    number, _, unit = record["Ground-True Answer"].partition(" ")
    value = Decimal(number)
    last_place = (
        Decimal(1).scaleb(-FORMULAS[record["kind"]].num_decimals)
        if record["kind"] in FORMULAS
        else Decimal(1)
    )
    slips = [value + offset * last_place for offset in (-2, -1, 1, 2)] + _swapped_digits(number)
    if record["kind"] in FORMULAS:
        slips += [value * 10, value / 10]
    slips = list(dict.fromkeys(slip for slip in slips if slip >= 0 and slip != value))
    answers = [_with_unit(plain(slip), unit) for slip in slips] + (
        [f"{number} {WRONG_UNITS[unit]}"] if unit else []
    )
    rng.shuffle(answers)
    further = (value + offset * last_place for offset in count(3))
    while len(answers) < num:
        answers += [
            _with_unit(plain(slip), unit) for slip in islice(further, num) if slip not in slips
        ]
    phrases = _phrases(record)
    return [rng.choice(phrases).format(answer, name=_name(record)) for answer in answers[:num]]


def _record(
    rng: random.Random, split: Split, kinds: Sequence[str], difficulty: int, style: Style
) -> Record:
    kind = rng.choice(kinds)
    problem = _draw(kind, split, difficulty, rng)
    if kind in SCORES:
        score = SCORES[kind]
        source, num_steps, answer = score.source, len(problem.findings), problem.answer
        word_score = _compact_score if style == "compact" else _prose_score
        question, reasoning = word_score(score, problem.findings)
    else:
        formula = FORMULAS[kind]
        source, num_steps = formula.source, len(problem.lines)
        answer = problem.answer if style == "compact" else _with_unit(problem.answer, formula.unit)
        word_formula = _compact_formula if style == "compact" else _prose_formula
        question, reasoning = word_formula(formula, problem)
    record = {
        "Question": question,
        "Complex_CoT": reasoning,
        "Response": "",
        "Open-ended Verifiable Question": question,
        "Ground-True Answer": answer,
        "kind": kind,
        "source": source,
        "difficulty": num_steps,
        "split": split,
        "style": style,
        "inputs": problem.inputs,
    }
    return record | {"Response": paraphrases(record)[0]}


def _draw(kind: str, split: Split, difficulty: int, rng: random.Random) -> Problem:
    for _ in range(MAX_DRAWS):
        problem = (
            _draw_findings(SCORES[kind], difficulty, rng)
            if kind in SCORES
            else _draw_values(FORMULAS[kind], rng)
        )
        if problem is not None and split_of(kind, problem.inputs) == split:
            return problem
    raise ValueError(
        f"{kind} has no {split} problem of difficulty {difficulty} in {MAX_DRAWS} draws: choose another"
    )


def _draw_findings(score: Score, difficulty: int, rng: random.Random) -> Problem | None:
    """One severity per patient spreads the totals evenly; a running total below 0 is refused."""
    num_irrelevant = max(difficulty - len(score.items), rng.randrange(2))
    severity = rng.uniform(0.1, 0.9)
    findings = [
        _draw_finding(item, severity, rng)
        for item in rng.sample(score.items, difficulty - num_irrelevant)
    ]
    findings += rng.sample(IRRELEVANT, num_irrelevant)
    rng.shuffle(findings)
    totals = list(accumulate(finding.points for finding in findings))
    if min(totals) < 0:
        return None
    return Problem(
        {"findings": [finding.compact for finding in findings]}, findings, (), str(totals[-1])
    )


def _draw_finding(item: Item, severity: float, rng: random.Random) -> Finding:
    level = sum(rng.random() < severity for _ in range(len(item) - 1))
    return rng.choice(item[level])


def _draw_values(formula: Formula, rng: random.Random) -> Problem | None:
    """Refuses answers that are not positive and those that lie near a rounding tie."""
    values = {name: rng.choice(choices) for name, choices in formula.values.items()}
    work = Working(formula.num_decimals)
    value = formula.work(work, **values)
    from_tie = abs((value.scaleb(formula.num_decimals) % 1) - Decimal("0.5"))
    answer = value.quantize(Decimal(1).scaleb(-formula.num_decimals), ROUND_HALF_UP)
    if answer <= 0 or from_tie < TIE_MARGIN:
        return None
    inputs = {
        name: v if isinstance(v, str) else int(v) if v % 1 == 0 else float(v)
        for name, v in values.items()
    }
    lines = work.lines if value == answer else [*work.lines, f"rounded {plain(answer)}"]
    return Problem(inputs, (), lines, plain(answer))


def _compact_score(score: Score, findings: Sequence[Finding]) -> tuple[str, str]:
    totals = accumulate(finding.points for finding in findings)
    listed = zip(findings, totals, strict=True)
    steps = (f"{finding.compact} = {finding.points} , total {total}" for finding, total in listed)
    return (
        f"{score.name} : {' , '.join(finding.compact for finding in findings)} , total ?",
        " ; ".join(steps),
    )


def _prose_score(score: Score, findings: Sequence[Finding]) -> tuple[str, str]:
    question = (
        f"A patient is assessed with the {score.title}. The notes list these findings: "
        f"{'; '.join(finding.prose for finding in findings)}. Not every finding has to belong to the score. "
        "Counting only what is listed, what is the total score?"
    )
    reasoning = [
        f"I go through the findings in the order given and add up the points of the {score.title}."
    ]
    total = 0
    for finding in findings:
        verdict = "is not part of the score" if finding in IRRELEVANT else "belongs to the score"
        points = f"{finding.points} point{'' if abs(finding.points) == 1 else 's'}"
        sign = "-" if finding.points < 0 else "+"
        sum_text = f"{total} {sign} {abs(finding.points)} = {total + finding.points}"
        reasoning.append(
            f"{finding.prose[0].upper()}{finding.prose[1:]} {verdict}: {points}, so {sum_text}."
        )
        total += finding.points
    return question, "\n".join([*reasoning, f"That was the last finding, so the total is {total}."])


def _compact_formula(formula: Formula, problem: Problem) -> tuple[str, str]:
    given = " , ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in problem.inputs.items()
    )
    return f"{formula.name} : {given} ?", " ; ".join(problem.lines)


def _prose_formula(formula: Formula, problem: Problem) -> tuple[str, str]:
    place = "one decimal place" if formula.num_decimals else "the nearest whole number"
    question = (
        f"{formula.question.format(**problem.inputs)} Answer in {formula.unit}, rounded to {place}."
    )
    lines = [f"{line}.".replace("rounded", f"Rounded to {place}:") for line in problem.lines]
    conclusion = f"So the {formula.name} is {_with_unit(problem.answer, formula.unit)}."
    return question, "\n".join([formula.rule, *lines, conclusion])


def _name(record: Record) -> str:
    return FORMULAS[record["kind"]].name if record["kind"] in FORMULAS else ""


def _phrases(record: Record) -> tuple[str, ...]:
    return ANSWER_PHRASES["scores" if record["kind"] in SCORES else "calculations", record["style"]]


def _with_unit(number: str, unit: str) -> str:
    return f"{number} {unit}" if unit else number


def _swapped_digits(number: str) -> list[Decimal]:
    """Every exchange of two neighbouring digits, across no decimal point."""
    pairs = enumerate(pairwise(number))
    return [
        Decimal(number[:i] + b + a + number[i + 2 :]) for i, (a, b) in pairs if (a + b).isdigit()
    ]
