"""The demo with a tool: the policy may leave the sum to a calculator, and learns to.

Stage 1 learns to answer at once, and to call the calculator with the findings and their points and
to answer with its result. Adding many numbers at once is hard for a model of half a million
parameters, so PPO has something to find out: that calls pay.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.sampling.sampler import Sampler, SamplingParams
from ..core.text.chat import render_response
from ..rl.rollout import Rollout, RolloutPrompt
from ..rl.turns import Conversation, converse

Record = dict[str, Any]

CALL = re.compile(r"<calc>([^<>]*)</calc>\s*$")
POINTS = re.compile(r" = (\d{1,6})(?!\d)")
CALL_WORDS = "<calc> = 1 ; </calc>"
"""Words that the answers have beside those of the problems."""


def with_calls(records: Sequence[Record], seed: int) -> list[Record]:
    """Conversations for stage 1, which trains the last turn of each.

    A record that calls is two of them: one ends with the call, the other with the answer to its
    result. So stage 1 too is trained on what the policy writes, and never on results.

    Args:
        records: records of `search.calculations.generate`.
        seed: not used: every second record calls.
    """
    rows: list[Record] = []
    for number, record in enumerate(records):
        question = record["Question"]
        answer = render_response("", record["Ground-True Answer"])
        if number % 2:
            rows.append(_turns(question, answer))
            continue
        call = call_of(record)
        rows.append(_turns(question, call))
        rows.append(_turns(question, call, record["Ground-True Answer"], answer))
    return rows


def call_of(record: Record) -> str:
    """The call that adds up the points of a record's findings."""
    lines = [step.split(" , ")[0] for step in record["Complex_CoT"].split(" ; ")]
    return f"<calc> {' ; '.join(lines)} </calc>"


def _turns(*texts: str) -> Record:
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": turns}


def rollout(
    sampler: Sampler,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Rollout]:
    """Samples a conversation with at most one call for each prompt."""
    conversations = converse(
        sampler,
        prompts,
        sampling,
        tokenizer=tokenizer,
        reply=reply,
        max_turns=2,
    )
    return [conversation.rollout() for conversation in conversations]


def reply(conversation: Conversation) -> str | None:
    """The sum of the points in the call with which the policy's turn ends; None without a call."""
    call = CALL.search(conversation.last_text)
    return str(sum(map(int, POINTS.findall(call[1])))) if call else None
