"""Reads the replies of an LLM, and says in one line what is wrong with them.

A JSON reply holds exactly one object. A Markdown code fence around it and prose before or after it
are skipped, since models cannot be kept from them; so are braces in that prose. Chinese quotation
marks that delimit texts, and quotation marks inside a text that are not escaped, are mended.
Refused are a second object, text that breaks off, repeated keys, missing keys, and values that are
blank or no text; in a chain of thought further keys are ignored, in other objects they are refused.
Line breaks inside a string need not be escaped.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..core.text.chat import FINAL, THINKING
from ..core.text.data import ANSWER_KEY, QUESTION_KEY
from ..core.text.verifier_text import normalise_answer, parse_verdict
from .results import ChainStep
from .wording import CHINESE_WEIGHT, assistant_phrase, leaked_phrase, text_length

THINK, CONCLUDE, VERIFY = ENDING = ("Inner Thinking", "Final Conclusion", "Verification")
JUDGEMENTS = ("pass", "too simple", "ambiguous answer", "not reformulatable")
MIN_PARAGRAPHS = 3
"""Smallest number of paragraphs of a monologue."""
TAG = re.compile(
    r"</?(?:problem|question|options|answer|reasoning|steps|thoughts|given|reference|reply)>"
)
"""Tags that delimit the parts of a prompt."""


class UnusableReply(ValueError):
    """A reply that cannot be used; its text, the reason, is shown to the model and counted.

    The part of the reason before a colon is the kind of fault, by which the report counts.
    """

    def __init__(self, template: str, **values: Any) -> None:
        """Args:
        template: the reason, with the names of values in braces; the key of its translation.
        values: the values.
        """
        super().__init__(template.format(**values))
        self.template = template
        self.values = values


class ImprovableReply(UnusableReply):
    """A reply that is asked for once more, and used as it is if it does not get better."""

    def __init__(self, value: str, template: str, **values: Any) -> None:
        """Args:
        value: the parsed reply.
        template: as UnusableReply.
        values: as UnusableReply.
        """
        super().__init__(template, **values)
        self.value = value


def parse_object(text: str, keys: set[str], *, exact: bool = True) -> dict[str, Any]:
    """The one JSON object of a reply.

    Args:
        text: the reply.
        keys: the keys that it must have.
        exact: whether other keys are refused and the case of letters counts.

    Raises:
        UnusableReply: the reply is empty, or not exactly one such object.
    """
    if not text.strip():
        raise UnusableReply("it is empty")
    try:
        return _only_object(text, keys, exact=exact)
    except UnusableReply as error:
        try:
            return _only_object(_with_mended_quotes(text), keys, exact=exact)
        except UnusableReply:
            raise error from None


# an opening brace as JSON has it, not one of the prose around, such as {A, B}
_OBJECT = re.compile(r"\{(?=\s*(?:[\"'“”}]|$))")


def _only_object(text: str, keys: set[str], *, exact: bool) -> dict[str, Any]:
    fault: UnusableReply | None = None
    for brace in _OBJECT.finditer(text):
        try:
            found, end = _DECODER.raw_decode(text, brace.start())
        except json.JSONDecodeError as error:
            ended = error.pos >= len(text.rstrip("` \n")) or error.msg.startswith("Unterminated")
            how = "its JSON breaks off: {reason}" if ended else "its JSON is not valid: {reason}"
            fault = fault or UnusableReply(how, reason=error.msg)
            continue
        except RecursionError:
            raise UnusableReply("its JSON is nested too deeply") from None
        if not exact:
            found = _with_keys(found, keys)
        if fault and not keys <= set(found):
            continue  # a part of the object that is not valid
        if _OBJECT.search(text, end):
            raise UnusableReply("it holds more than one JSON object")
        _check_keys(found, keys, "the object", exact=exact)
        return found
    raise fault or UnusableReply("it holds no JSON object")


def _with_mended_quotes(text: str) -> str:
    """The text with ASCII quotation marks around JSON's texts, and escaped ones inside them.

    A quotation mark ends a text if the punctuation of JSON follows.
    """
    mended = []
    inside = False
    for mark in re.finditer(r'\\.|["“”]|[^\\"“”]+|\\', text, re.DOTALL):
        part = mark[0]
        if part in ('"', "“", "”"):
            ends = re.compile(r"\s*(?:[\]}]|[,:]\s*[\"“”{\[]|$)").match(text, mark.end())
            if inside and not ends:
                part = '\\"' if part == '"' else part
            else:
                part, inside = '"', not inside
        mended.append(part)
    return "".join(mended)


def _with_keys(found: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """The object with the wanted keys in their own spelling, found in any case of letters."""
    spelling = {key.casefold(): key for key in keys}
    return {spelling.get(key.casefold(), key): value for key, value in found.items()}


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnusableReply("its JSON has a key twice")
    return found


# parse_int: int() limits its digits
_DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unrepeated, parse_int=float)


def _check_keys(found: dict[str, Any], keys: set[str], what: str, *, exact: bool) -> None:
    if not keys <= set(found) or (exact and set(found) != keys):
        template = "{what} has the keys {found}, not exactly {keys}"
        raise UnusableReply(template, what=what, found=_listed(found), keys=_listed(keys))


def _listed(keys: Any) -> str:
    return ", ".join(f'"{key}"' for key in sorted(keys))[:200] or "none"


def _text(found: dict[str, Any], key: str) -> str:
    if not isinstance(found[key], str):
        raise UnusableReply("{what} is not text", what=f'"{key}"')
    return _checked_text(found[key], f'"{key}"')


def _checked_text(text: str, what: str) -> str:
    """The text without outer white space; refused if it would break a training target."""
    text = text.strip()
    if not text:
        raise UnusableReply("{what} is empty", what=what)
    if THINKING in text or FINAL in text:
        template = '{what} holds the heading "{thinking}" or "{final}"'
        raise UnusableReply(template, what=what, thinking=THINKING, final=FINAL)
    if tag := TAG.search(text):
        raise UnusableReply("{what} holds a tag of the prompt: {tag}", what=what, tag=tag[0])
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableReply("{what} holds an unpaired surrogate", what=what) from None
    return text


def _check_leak(text: str) -> None:
    if phrase := leaked_phrase(text):
        template = "it shows that its writer was told about the answer: {phrase}"
        raise UnusableReply(template, phrase=phrase)


def parse_response(text: str) -> str:
    """A final response in plain text.

    Raises:
        UnusableReply: it is empty, would break a training target, shows that the answer was given,
            or has an assistant's preface or closing offer.
    """
    response = _checked_text(text, "it")
    _check_leak(response)
    if phrase := assistant_phrase(response):
        raise UnusableReply("it has a preface or a closing offer: {phrase}", phrase=phrase)
    return response


def parse_chain(text: str) -> list[ChainStep]:
    """The steps of a chain of thought.

    Titles may be missing, and the case of keys and actions does not matter.

    Raises:
        UnusableReply: it is malformed, or does not end with Inner Thinking, Final Conclusion and
            Verification.
    """
    steps = parse_object(text, {"CoT"}, exact=False)["CoT"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise UnusableReply("{what} is not a list of objects", what='"CoT"')
    chain = [_chain_step(step, number) for number, step in enumerate(steps, start=1)]
    if tuple(step["action"] for step in chain[-3:]) != ENDING:
        template = "its last three actions are not {actions}, in this order"
        raise UnusableReply(template, actions=", ".join(ENDING))
    return chain


_ACTIONS = {action.casefold(): action for action in ENDING}


def _chain_step(step: dict[str, Any], number: int) -> ChainStep:
    step = _with_keys(step, {"action", "title", "content"})
    action = _ACTIONS.get(str(step.get("action")).strip().replace("_", " ").casefold())
    if action is None:
        raise UnusableReply(
            "step {number} has the action {action}, not one of {actions}",
            number=number,
            action=json.dumps(step.get("action"), ensure_ascii=False)[:60],
            actions=_listed(ENDING),
        )
    _check_keys(step, {"action", "content"}, f"step {number} ({action})", exact=False)
    title = step.get("title")
    has_title = action == THINK and isinstance(title, str) and title.strip()
    titled = {"title": _text(step, "title")} if has_title else {}
    return {"action": action, **titled, "content": _text(step, "content")}


def parse_continuation(text: str) -> list[ChainStep]:
    """The further steps of a chain, whose writer was told that its conclusion is wrong.

    Raises:
        UnusableReply: as parse_chain, or it shows that its writer was told so.
    """
    chain = parse_chain(text)
    _check_leak("\n".join(value for step in chain for value in step.values()))
    return chain


def conclusion(chain: list[ChainStep]) -> str:
    """The Final Conclusion of a chain."""
    return chain[-2]["content"]


def extend_chain(before: list[ChainStep], after: list[ChainStep]) -> list[ChainStep]:
    """A chain, perhaps empty, with its continuation.

    A Verification at the start of the continuation replaces the last one, which was mistaken.
    """
    return [*(before[:-1] if after[0]["action"] == VERIFY else before), *after]


def parse_monologue(text: str, *, min_length: int = 0) -> str:
    """The natural monologue of a reply.

    Args:
        text: the reply.
        min_length: smallest `text_length`; 0 accepts any length and form.

    Raises:
        UnusableReply: it is not exactly that, or shows that the answer was given.
        ImprovableReply: it is too short or has too few paragraphs.
    """
    monologue = _text(parse_object(text, {"NaturalReasoning"}), "NaturalReasoning")
    _check_leak(monologue)
    if (length := text_length(monologue)) < min_length:
        raise ImprovableReply(
            monologue,
            "it is too short: about {length} characters, not at least {least}",
            length=length,
            least=min_length,
            least_chinese=min_length // CHINESE_WEIGHT,
        )
    if min_length and len(re.split(r"\n\s*\n", monologue)) < MIN_PARAGRAPHS:
        raise ImprovableReply(
            monologue,
            "it has too few paragraphs: write at least {least}, with an empty line between them",
            least=MIN_PARAGRAPHS,
        )
    return monologue


def parse_problem(text: str) -> tuple[str, str]:
    """An open-ended question and its answer.

    Raises:
        UnusableReply: it is not exactly that.
    """
    found = parse_object(text, {QUESTION_KEY, ANSWER_KEY})
    return _text(found, QUESTION_KEY), _text(found, ANSWER_KEY)


_LABEL = "|".join(JUDGEMENTS)
_JUDGEMENT = re.compile(
    rf"(?:(?:judge?ment|label|answer|标签|判断)\s*[:：]\s*)?({_LABEL})"
    r"(?=\s*$|\s*[.:。：\n(（–—]| - )"
)


def parse_judgement(text: str) -> str:
    """One of JUDGEMENTS, which must open the reply and be the only one in it.

    Raises:
        UnusableReply: it is anything else.
    """
    if not text.strip():
        raise UnusableReply("it is empty")
    label = normalise_answer(text).replace("_", " ")
    if label in JUDGEMENTS:
        return label
    folded = re.sub(r"[*`\"“”]", "", text).replace("_", " ").strip().casefold()
    found = _JUDGEMENT.match(folded)
    if not found or len(set(re.findall(rf"\b(?:{_LABEL})\b", folded))) > 1:
        raise UnusableReply(
            "it is not one of {labels} and nothing else", labels=_listed(JUDGEMENTS)
        )
    return found[1]


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
