"""The text that a verifier reads, the verdicts of an LLM, and the comparison of answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .encoding import encode, protect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "A model answered a medical question. Decide whether its answer agrees with the reference.\n\n"
    "Answer of the model:\n{response}\n\n"
    "Reference answer:\n{reference}\n\n"
    "The answer of the model is"
)
"""Default template, which the classifier's two classes complete."""

VERDICTS = {
    "true": True,
    "false": False,
    "正确": True,
    "错误": False,
    "真": True,
    "假": False,
    "一致": True,
    "不一致": False,
}
"""Words that count as a verdict of an LLM, in lower case."""
_LABEL = re.compile(
    r"(?:(?:the |my )?(?:final )?(?:verdict|answer|judge?ment|conclusion|result)(?: is)?"
    r"|(?:最终)?(?:结论|判断|答案|评判)[是为]?)\s*[:：]?\s*",
    re.IGNORECASE,
)
_SET_OFF = r"(?=$|\s*[.。,，:：;；!！(（\n]|\s+[-–—]\s)"
FENCE = re.compile(r"\s*```(?:json|text|plaintext|markdown)?\s")


Choice = TypeVar("Choice")


class Tiers(NamedTuple):
    """Scores of a right, a wrong and an unparsable answer."""

    right: float = 1.0
    wrong: float = 0.1
    unparsable: float = 0.0

    def score(self, right: bool, *, parsable: bool = True) -> float:
        """The score of a right or wrong answer, or of one in a broken format."""
        if not parsable:
            return self.unparsable
        return self.right if right else self.wrong


def check_template(template: str) -> None:
    """Checks the template of a verifier.

    Raises:
        ValueError: it does not hold {response} and, after it, {reference} once each.
    """
    if re.findall("{response}|{reference}", template) != ["{response}", "{reference}"]:
        raise ValueError("verifier template: needs {response} once and, after it, {reference} once")


def load_template(path: str | None) -> str:
    """Reads a verifier's template from a text file; without a path, returns TEMPLATE.

    Raises:
        ValueError: the file cannot be read, or its content is not a valid template.
    """
    if path is None:
        return TEMPLATE
    try:
        template = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"verifier template {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"verifier template {path}: is not UTF-8 text") from None
    template = template.rstrip("\r\n")  # an editor's last newline is not part of the text
    check_template(template)
    return template


def verifier_input(
    tokenizer: PreTrainedTokenizerBase,
    response: str,
    reference: str,
    *,
    template: str,
    max_tokens: int,
) -> tuple[list[int], int]:
    """Token ids that a verifier reads: `verifier_ids` with its tokenizer.

    Only the template's own special tokens are control tokens; in the response and the reference
    they are ordinary text.
    """
    return verifier_ids(
        partial(encode, tokenizer),
        protect(tokenizer, response),
        protect(tokenizer, reference),
        template=template,
        max_tokens=max_tokens,
    )


def verifier_ids(
    encode: Callable[[str], list[int]],
    response: str,
    reference: str,
    *,
    template: str,
    max_tokens: int,
) -> tuple[list[int], int]:
    """Token ids of the filled-in template.

    The text is encoded as a whole if it fits. Otherwise the response is cut in the middle, and the
    parts are encoded one by one; the reference and the template are never cut.

    Args:
        encode: text -> token ids.
        response: the response to verify.
        reference: the reference answer.
        template: see check_template.
        max_tokens: maximum number of token ids.

    Returns:
        The ids, and the number of the response's tokens that were cut.

    Raises:
        ValueError: template and reference leave no room for the response.
    """
    before, after = template.split("{response}")
    after = after.replace("{reference}", reference)
    whole = encode(before + response + after)
    if len(whole) <= max_tokens:
        return whole, 0
    head = encode(before)
    tail = encode(after)
    body = encode(response)
    room = max_tokens - len(head) - len(tail)
    num_cut = max(0, len(body) - room)
    if num_cut and room < 2:
        raise ValueError(
            f"verifier input: instruction and reference take {len(head) + len(tail)} of "
            f"max_tokens={max_tokens}, which leaves no room for the response; raise it "
            f"(reference: {reference[:60]!r})"
        )
    if num_cut:
        num_front = (room + 1) // 2
        body = body[:num_front] + body[num_front + num_cut :]
    return head + body + tail, num_cut


def normalise_answer(text: str) -> str:
    """Folds case, collapses white space and removes outer punctuation, for comparisons."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'()[]*")


def after_thought(text: str) -> str:
    """Removes the thinking of a reasoning model, up to </think>; <think> may be in the prompt."""
    return text.rpartition("</think>")[2]


def parse_verdict(text: str) -> bool | None:
    """Reads the verdict of an LLM.

    Returns:
        The verdict as in `leading_choice`, or that of {"verdict": a word or a boolean}; None for
        any other text, such as "untrue" or "True and false".
    """
    text = FENCE.sub("", after_thought(text), count=1)
    plain = text.strip(" \t\r\n`")
    if not plain.startswith("{"):
        return leading_choice(text, VERDICTS)
    try:
        verdict = json.loads(plain)["verdict"]
    except (ValueError, KeyError, RecursionError):  # RecursionError: an endless row of brackets
        return None
    return verdict if isinstance(verdict, bool) else VERDICTS.get(str(verdict).strip().casefold())


def leading_choice(text: str, choices: Mapping[str, Choice]) -> Choice | None:
    """Reads which of some words a text begins with, as people and models write it.

    The word may follow a label ("Verdict: True", "The answer is True") and may be followed by a
    reason that is set off from it ("True - same diagnosis", "False. The answer ..."). Quotes and
    the marks of Markdown are ignored.

    Args:
        text: the reply.
        choices: word in lower case -> its meaning.

    Returns:
        The meaning; None if the text does not begin with one of the words, goes on without setting
        it off ("True or False"), or holds a word of another meaning ("True, or False?").
    """
    text = re.sub("[*_`\"'“”‘’「」]", "", text).strip(" \t\r\n.。!！,，;；").casefold()
    text = _LABEL.sub("", text, count=1) if _LABEL.match(text) else text
    longest_first = sorted(choices, key=len, reverse=True)
    words = [rf"\b{re.escape(w)}\b" if w.isascii() else re.escape(w) for w in longest_first]
    pattern = re.compile("|".join(words))
    first = re.match(f"(?:{pattern.pattern}){_SET_OFF}", text)
    if first is None:
        return None
    found = {choices[match[0]] for match in pattern.finditer(text)}
    return found.pop() if len(found) == 1 else None
