"""Checks of the data: rows, keys, lengths, and what training and held-out rows share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from ...core.text.chat import render_example
from ...core.text.data import Purpose, load_rows
from ...core.text.verifier_text import load_template
from ...core.training.run_config import RunConfig
from ...rl.config import PPOConfig
from ...rl.setup import problem_sets
from ...sft.config import SFTConfig, VerifierTrainingConfig
from ...sft.conversations import read_conversation
from ...sft.examples import Example
from ...sft.finetune import train_and_eval_rows
from ...sft.verifier_examples import LabelledIds, load_answers, tokenise
from .findings import Caution, Report
from .models import roles, tokenizer_of

MAX_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run as far as the checks need them."""

    train: Sequence[Hashable]
    """The question of each training row."""
    held_out: Sequence[Hashable]
    num_dropped: int
    """Rows that are too long."""
    limit: str
    """The option that limits their length, with its value."""
    notes: str = ""


def check_rows(report: Report, config: RunConfig) -> int | None:
    """Checks the data of a run.

    Returns:
        Number of training rows; None if they cannot be read.
    """
    report.group = "data"
    found: list[Rows] = []

    def read() -> str:
        with contextlib.redirect_stdout(io.StringIO()):  # the loaders print what they drop
            rows = _rows(config)
        found.append(rows)
        return f"{len(rows.train)} to train on, {len(rows.held_out)} held out{rows.notes}"

    report.check("rows", read)
    for rows in found:
        report.check("lengths", partial(_lengths, rows))
        report.check("held-out rows", partial(_overlap, rows, config))
        return len(rows.train)
    return None


def _rows(config: RunConfig) -> Rows:
    tokenizer = tokenizer_of(roles(config)[0].path)
    if isinstance(config, SFTConfig):
        return _conversations(config, tokenizer)
    if isinstance(config, VerifierTrainingConfig):
        return _answers(config, tokenizer)
    assert isinstance(config, PPOConfig)
    train, held_out = problem_sets(config, tokenizer)
    return Rows(
        train=[" ".join(problem.question.lower().split()) for problem in train.problems],
        held_out=[" ".join(problem.question.lower().split()) for problem in held_out.problems],
        num_dropped=len(train.dropped) + len(held_out.dropped),
        limit=f"max_prompt_tokens={config.max_prompt_tokens}",
    )


def _conversations(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    num_read = 0

    def load(sources: str, *, purpose: Purpose = "train") -> list[Example]:
        nonlocal num_read
        examples = list(_examples(config, tokenizer, sources, purpose))
        num_read += len(examples)
        return examples

    train, held_out = train_and_eval_rows(config, load, lambda row: row.num_tokens)
    return Rows(
        train=[tuple(row.prompt_ids) for row in train],
        held_out=[tuple(row.prompt_ids) for row in held_out],
        num_dropped=num_read - len(train) - len(held_out),
        limit=f"max_seq_len={config.max_seq_len}",
    )


def _examples(
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: str,
    purpose: Purpose,
) -> Iterator[Example]:
    """As `load_examples`, without its cache, which other ranks would have to wait for."""
    for number, row in enumerate(load_rows(sources, limit=config.limit, purpose=purpose)):
        where = f"data {sources}: row {number}"
        conversation = read_conversation(
            row,
            where=where,
            system=config.system_prompt,
            columns=config.columns,
        )
        if conversation.skipped:
            continue
        try:
            prompt, response = render_example(tokenizer, conversation.turns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield Example(prompt_ids=prompt, response_ids=response)


def _answers(config: VerifierTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    template = load_template(config.template)
    num_unlabelled = 0
    num_cut = 0

    def judge(cases: Sequence[object]) -> list[bool | None]:
        nonlocal num_unlabelled
        num_unlabelled += len(cases)
        return [True] * len(cases)

    def load(sources: str, *, purpose: Purpose = "train") -> list[LabelledIds]:
        nonlocal num_cut
        answers, _ = load_answers(
            sources,
            limit=config.limit,
            purpose=purpose,
            seed=config.seed,
            wrong_per_question=config.wrong_per_question,
            columns=config.columns,
            judge=judge if config.llm.model else None,
        )
        rows, cut = tokenise(answers, tokenizer, template=template, max_tokens=config.max_seq_len)
        num_cut += cut
        return rows

    train, held_out = train_and_eval_rows(
        config,
        load,
        length=lambda row: len(row.token_ids),
        group=lambda row: row.row,
    )
    num_right = sum(row.label for row in train)
    if not num_unlabelled and num_right in (0, len(train)):
        label = "right" if num_right else "wrong"
        raise ValueError(
            f"data {config.data}: all {len(train)} answers are labelled {label}: give "
            "answers of both classes to the verifier"
        )
    judged = f", {num_unlabelled} for the LLM to label" if num_unlabelled else ""
    return Rows(
        train=[tuple(row.token_ids) for row in train],
        held_out=[tuple(row.token_ids) for row in held_out],
        num_dropped=0,
        limit=f"max_seq_len={config.max_seq_len}",
        notes=f"; {num_right} labelled right, {num_cut} cut to max_seq_len{judged}",
    )


def _lengths(rows: Rows) -> str:
    total = len(rows.train) + len(rows.held_out) + rows.num_dropped
    if rows.num_dropped:
        raise Caution(
            f"{rows.num_dropped} of {total} rows are over {rows.limit} and are left out: raise it "
            "to use them"
        )
    return f"all are within {rows.limit}"


def _overlap(rows: Rows, config: RunConfig) -> str:
    if not rows.held_out:
        raise Caution("none: give eval_data or eval_fraction to see what the run achieves")
    known = set(rows.train)
    shared = [number for number, row in enumerate(rows.held_out) if row in known]
    if not shared:
        return f"{len(rows.held_out)}, none of which is among the training rows"
    numbers = ", ".join(map(str, shared[:MAX_NAMED])) + (" ..." if shared[MAX_NAMED:] else "")
    text = f"{len(shared)} of {len(rows.held_out)} ask what a training row asks: rows {numbers}"
    if config.eval_data:
        raise ValueError(f"{text}: take them out of data or eval_data")
    raise Caution(f"{text} (the data repeats itself): take the repetitions out")
