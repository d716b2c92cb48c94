"""Reads the replies of an LLM, and says in one line what is wrong with them.

A JSON reply holds exactly one object. A Markdown code fence around it and prose before or after it
are skipped, since models cannot be kept from them. Refused are a second object, text that breaks
off, repeated keys, other keys than asked for, and values that are blank or no text. Line breaks
inside a string need not be escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..core.text.chat import FINAL, THINKING
from ..core.text.data import ANSWER_KEY, QUESTION_KEY
from ..core.text.verifier_text import normalise_answer, parse_verdict
from .results import ChainStep

THINK, CONCLUDE, VERIFY = ENDING = ("Inner Thinking", "Final Conclusion", "Verification")
JUDGEMENTS = ("pass", "too simple", "ambiguous answer", "not reformulatable")
REFUSAL = re.compile(
    r"^\W*(?:(?:i['’]m|i am) (?:very |so |really )?sorry|sorry|i|as an ai)\b[^.\n]{0,80}"
    r"\b(?:can(?:no|['’])t|can not|won['’]t|unable to|not able to) "
    r"(?:help|assist|comply|provide|answer|do that|fulfil|continue|discuss|offer)"
    r"|^\W*(?:很?抱歉|对不起|我(?!们)|作为[^，。\n]{0,8}(?:AI|人工智能|模型|助手))[^。\n]{0,40}"
    r"(?:无法|不能)(?:为您|帮您|对此)?(?:提供|回答|协助|帮助|满足|继续|讨论)",
    re.IGNORECASE,
)


class UnusableReply(ValueError):
    """A reply that cannot be used; its text, the reason, is shown to the model and counted."""


def parse_object(text: str, keys: set[str]) -> dict[str, Any]:
    """The one JSON object of a reply.

    Args:
        text: the reply.
        keys: the keys that it must have, and no others.

    Raises:
        UnusableReply: the reply is empty, a refusal, or not exactly one such object.
    """
    _check_answer(text)
    start = text.find("{")
    if start < 0:
        raise UnusableReply("it holds no JSON object")
    try:
        found, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        ended = error.pos >= len(text.rstrip("` \n")) or error.msg.startswith("Unterminated string")
        raise UnusableReply(
            f"its JSON {'breaks off' if ended else 'is not valid'}: {error.msg}"
        ) from None
    except RecursionError:
        raise UnusableReply("its JSON is nested too deeply") from None
    if "{" in text[end:]:
        raise UnusableReply("it holds more than one JSON object")
    _check_keys(found, keys, "the object")
    return found


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnusableReply("its JSON has a key twice")
    return found


# parse_int: int() limits its digits
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unrepeated, parse_int=float)


def _check_keys(found: dict[str, Any], keys: set[str], what: str) -> None:
    if set(found) != keys:
        raise UnusableReply(f"{what} has the keys {_listed(found)}, not exactly {_listed(keys)}")


def _listed(keys: Any) -> str:
    return ", ".join(f'"{key}"' for key in sorted(keys))[:200] or "none"


def _text(found: dict[str, Any], key: str) -> str:
    if not isinstance(found[key], str):
        raise UnusableReply(f'"{key}" is not text')
    return _checked_text(found[key], f'"{key}"')


def _checked_text(text: str, what: str) -> str:
    """The text without outer white space; refused if it would break a training target."""
    text = text.strip()
    if not text:
        raise UnusableReply(f"{what} is empty")
    if THINKING in text or FINAL in text:
        raise UnusableReply(f'{what} holds the heading "{THINKING}" or "{FINAL}"')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableReply(f"{what} holds an unpaired surrogate") from None
    return text


def _check_answer(text: str) -> None:
    if not text.strip():
        raise UnusableReply("it is empty")
    if REFUSAL.search(text):
        raise UnusableReply("it refuses to answer")


def parse_text(text: str) -> str:
    """A reply in plain text.

    Raises:
        UnusableReply: it is empty, a refusal, or would break a training target.
    """
    _check_answer(text)
    return _checked_text(text, "it")


def parse_chain(text: str) -> list[ChainStep]:
    """The steps of a chain of thought.

    Raises:
        UnusableReply: it is malformed, or does not end with Inner Thinking, Final Conclusion and
            Verification.
    """
    steps = parse_object(text, {"CoT"})["CoT"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UnusableReply('"CoT" is not a list of objects')
    chain: list[ChainStep] = []
    for number, step in enumerate(steps, start=1):
        if step.get("action") not in ENDING:
            action = json.dumps(step.get("action"))[:60]
            raise UnusableReply(
                f"step {number} has the action {action}, not one of {_listed(ENDING)}"
            )
        keys = {"action", "content"} | ({"title"} if step["action"] == THINK else set())
        _check_keys(step, keys, f"step {number} ({step['action']})")
        chain.append({key: _text(step, key) for key in step})
    if tuple(step["action"] for step in chain[-3:]) != ENDING:
        raise UnusableReply(f"its last three actions are not {', '.join(ENDING)}, in this order")
    return chain


def conclusion(chain: list[ChainStep]) -> str:
    """The Final Conclusion of a chain."""
    return chain[-2]["content"]


def extend_chain(before: list[ChainStep], after: list[ChainStep]) -> list[ChainStep]:
    """A chain, perhaps empty, with its continuation.

    A Verification at the start of the continuation replaces the last one, which was mistaken.
    """
    return [*(before[:-1] if after[0]["action"] == VERIFY else before), *after]


def parse_monologue(text: str) -> str:
    """The natural monologue of a reply.

    Raises:
        UnusableReply: it is not exactly that.
    """
    return _text(parse_object(text, {"NaturalReasoning"}), "NaturalReasoning")


def parse_problem(text: str) -> tuple[str, str]:
    """An open-ended question and its answer.

    Raises:
        UnusableReply: it is not exactly that.
    """
    found = parse_object(text, {QUESTION_KEY, ANSWER_KEY})
    return _text(found, QUESTION_KEY), _text(found, ANSWER_KEY)


def parse_judgement(text: str) -> str:
    """One of JUDGEMENTS, which must be the whole reply but for case and outer punctuation.

    Raises:
        UnusableReply: it is anything else.
    """
    _check_answer(text)
    label = normalise_answer(text).replace("_", " ")
    if label not in JUDGEMENTS:
        raise UnusableReply(f"it is not one of {_listed(JUDGEMENTS)} and nothing else")
    return label


def parse_truth(text: str) -> bool:
    """The verdict of a reply: the one whole word True or False.

    Raises:
        UnusableReply: it is anything else.
    """
    verdict = parse_verdict(text)
    if verdict is None:
        raise UnusableReply("unparsed: it is not the one word True or False")
    return verdict


def _schema(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _step(action: str, *keys: str) -> dict[str, Any]:
    return _schema(
        action={"type": "string", "enum": [action]}, **{key: {"type": "string"} for key in keys}
    )


STEPS = [_step(THINK, "title", "content"), _step(CONCLUDE, "content"), _step(VERIFY, "content")]
CHAIN_SCHEMA = _schema(CoT={"type": "array", "items": {"anyOf": STEPS}})
MONOLOGUE_SCHEMA = _schema(NaturalReasoning={"type": "string"})
PROBLEM_SCHEMA = _schema(**{QUESTION_KEY: {"type": "string"}, ANSWER_KEY: {"type": "string"}})
