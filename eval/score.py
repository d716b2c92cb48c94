"""Which option an output chooses, and how often that is right. Pure.

Only the final response and the options are read, never the right answer. Four rules, in this order:
  1. statement   a letter is claimed: "the answer is B", "B is correct", boxed, JSON, "答案是B"; else an option's own
                 words are; of several claims the last
  2. letter      a letter stands alone: the whole response, its first or last line, or the only letter not denied
  3. text        an option's own words stand alone, or are the only ones not denied in a sentence that makes an answer of them
  4. none        anything else. It counts as wrong; nothing is guessed by likeness
A claim that is denied, asked, hypothetical or somebody else's is none, and so is a list of the options; two letters at once
("A and C"), or a letter that no option has, are a claim without an answer. The wordings are in eval/wording.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from ..core.text.chat import FINAL, THINKING
from . import wording as w


class Extraction(NamedTuple):
    """What was read: a letter of the options or None, by which rule, from how many claims, and whether they disagree."""

    letter: str | None
    rule: str
    num_statements: int = 0
    conflicting: bool = False


class Mention(NamedTuple):
    """A place that names an option: text[start:end]. `letter` is None when it names several at once; `own_words` tells a
    letter that the option's words follow: "B. Aspirin", but not "A stroke"."""

    start: int
    end: int
    letter: str | None
    own_words: bool = False


class Context(NamedTuple):
    """The lower-case rest of a mention's sentence, and the mark that ends it."""

    left: str
    right: str
    mark: str


OptionTexts = tuple[tuple[str, str | None], ...]
_WINDOW = 160
"""characters read on either side of a mention"""
_NONE = Extraction(None, "none")


def final_response(output: str) -> str:
    """What follows the last `## Final Response`, or the last `</think>`; "" when the output never left its thinking."""
    for marker in (FINAL, "</think>"):
        if marker in output:
            return output.rpartition(marker)[2].strip()
    return "" if THINKING in output or "<think>" in output else output.strip()


def extract_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that the output chooses, or None when it chooses none."""
    return extract(output, options).letter


def extract(output: str, options: dict[str, str]) -> Extraction:
    """As `extract_choice`, with the rule that decided."""
    text = _plain(final_response(output))
    if not text:
        return _NONE
    texts = _option_texts(tuple(options.items()))
    mentions = _labels(text, texts)
    listed = _listed(text, mentions, options)
    labels = [
        (m, _context(text, m)._replace(left="") if m in listed else _context(text, m))
        for m in mentions
    ]
    if claims := [m for m, c in labels if _claimed(c)]:
        return _last(claims, "statement", options)
    labels = [(m, c) for m, c in labels if m.letter is None or m.letter in options]
    if claims := [m for m, c in labels if _weakly_claimed(c)]:
        return _last(claims, "statement", options)
    words = _words(text, texts, mentions)
    if claims := _claimed_words(text, words):
        return _last(claims, "statement", options)
    if alone := _alone(text, labels, listed):
        return _last([alone], "letter", options)
    found = _words_alone(text, words)
    return _last(found, "text", options) if found else _NONE


def _last(claims: list[Mention], rule: str, options: dict[str, str]) -> Extraction:
    letter = claims[-1].letter
    return Extraction(
        letter if letter in options else None,
        rule,
        len(claims),
        len({m.letter for m in claims}) > 1,
    )


def _plain(text: str) -> str:
    """Width forms folded (Ｂ is B), emphasis and LaTeX's text commands removed."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).replace(
            "İ", "I"
        )  # the one letter that is longer in lower case
    while "\\" in text and (shorter := w.LATEX.sub(r"\1", text)) != text:
        text = shorter
    return w.MARKUP.sub("", text).strip()


@lru_cache(maxsize=4096)
def _option_texts(items: tuple[tuple[str, str], ...]) -> OptionTexts:
    """(lower-case text, letter) of each option, the longest first; the letter is None when options share the text."""
    texts: dict[str, str | None] = {}
    for letter, text in items:
        key = w.ARTICLE.sub("", " ".join(_plain(text).lower().split()).strip(" .。;,\"'“”"))
        texts[key] = None if key in texts else letter
    return tuple(
        sorted(
            ((text, letter) for text, letter in texts.items() if text),
            key=lambda pair: -len(pair[0]),
        )
    )


def _labels(text: str, texts: OptionTexts) -> list[Mention]:
    """Every letter that may stand for an option, with the option's own words where they follow it."""
    mentions: list[Mention] = []
    lower, end = text.lower(), 0
    own = {letter: words for words, letter in texts}
    names = _text_mentions(
        lower, tuple(pair for pair in texts if len(pair[0]) > 1 and w.LONE_LETTER.search(pair[0]))
    )
    for match in w.LABEL.finditer(text):
        at = match.start("letter")
        if at < end or any(name.start <= at < name.end for name in names):
            continue
        letter, end = match["letter"], match.end()
        enclosed = match["prefix"] or (match["open"] and match["close"])
        if letter.islower() and not enclosed and not w.LOWER_CASE.match(text, at):
            continue
        if not enclosed and w.NAMED.search(text, max(0, match.start() - 20), match.start()):
            continue
        if letter.isupper() and (more := w.MORE.match(text, end)):
            end = more.end()
            mentions.append(Mention(match.start(), end, None))
            continue
        words, gap = own.get(letter.upper()), w.GAP.match(lower, end)
        own_words, follows = (
            False,
            w.FOLLOWS.match(text, end) and not (letter == "I" and w.PRONOUN.match(text, end)),
        )
        if (
            words
            and gap
            and (starts := [at for at in (gap.end(1), gap.end()) if lower.startswith(words, at)])
        ):
            if letter == "A" and gap[0] == " " and not (enclosed or match["close"]):
                continue  # an article: the option's words count by themselves
            own_words, end = True, starts[0] + len(words)
        elif not (enclosed or follows):
            continue
        mentions.append(Mention(match.start(), end, letter.upper(), own_words))
    return mentions


def _listed(text: str, mentions: list[Mention], options: dict[str, str]) -> set[Mention]:
    """The labels of a list of the options, in order: one a line, or with nothing said of any, three at least."""
    order, runs = list(options), [mentions[:1]]
    for m, n in pairwise(mentions):
        between = text[m.end : n.start]
        lines = not text[text.rfind("\n", 0, m.start) + 1 : m.start].strip(" -•>#") and bool(
            w.NEXT_LINE.fullmatch(between)
        )
        bare = m.own_words and n.own_words and not between.strip(" \n\t.;,:•->|\"'[]{}(")
        successive = (
            m.letter in order
            and n.letter in order
            and order.index(n.letter) == order.index(m.letter) + 1
        )
        if successive and (bare or lines):
            runs[-1].append(n)
        else:
            runs.append([n])
    return {m for run in runs for m in run if len(run) >= min(3, len(options))}


def _context(text: str, mention: Mention) -> Context:
    """A line break directly before the mention does not end what is to its left."""
    left = text[max(0, mention.start - _WINDOW) : mention.start].rstrip()
    left = w.SENTENCE_END.split(left)[-1]
    left = re.sub(
        r"(?<![A-Za-z])A(?![A-Za-z])", "_", left
    ).lower()  # else an option A would read as an article
    right = text[mention.end : mention.end + _WINDOW]
    stop = w.SENTENCE_END.search(right)
    return Context(
        left, (right[: stop.start()] if stop else right).lower(), stop[0] if stop else ""
    )


def _claimed(context: Context) -> bool:
    """Whether the sentence says that the option mentioned is the answer."""
    if context.mark == "?" or _denied(context):
        return False
    if w.CLAIM_LEFT.search(context.left):
        return True
    claim = w.CLAIM_RIGHT.match(context.right)
    return claim is not None and not w.DENIED_GAP.search(claim["gap"] or claim["cngap"] or "")


def _weakly_claimed(context: Context) -> bool:
    """Whether the sentence comes to the option mentioned, and ends there."""
    ends = context.mark != "?" and not context.right.strip(" .,)")
    return ends and not _denied(context) and bool(w.WEAK_LEFT.search(context.left))


@lru_cache(maxsize=256)  # asked up to four times of each mention
def _denied(context: Context) -> bool:
    clause = w.TURN.split(context.left)[-1]
    return bool(
        w.DENIED_LEFT.search(clause)
        or w.DENIED_RIGHT.match(context.right)
        or w.SUPPOSED.search(f"{clause} _ {context.right}")
    )


def _unsure(context: Context) -> bool:
    return context.mark == "?" or bool(w.UNSURE.search(context.left + context.right))


def _complete(text: str) -> bool:
    """Whether the output was not cut within its last sentence."""
    return text.endswith((".", "!", "。", ")", '"'))


def _alone(
    text: str, labels: list[tuple[Mention, Context]], listed: set[Mention]
) -> Mention | None:
    """The letter that is the whole response, begins its first or last line, is its last word, or is the only one spoken for."""
    first_end, last_start = (text + "\n").index("\n"), text.rfind("\n") + 1
    heads = []
    for m, context in labels:
        line_start = text.rfind("\n", 0, m.start) + 1
        if m not in listed and w.LEADS_IN.fullmatch(
            text[line_start : m.start].lower().strip(" •→➡️✅👉.0123456789")
        ):
            heads.append((m, context))
    for m, context in heads:
        line_end = (text + "\n").index("\n", m.end)
        if (
            (m.start < first_end or m.start >= last_start)
            and context.mark != "?"
            and not _denied(context)
        ):
            bare = not m.own_words and not text[m.end : line_end].strip(" .,、。:)!")
            set_off = w.SETS_OFF.match(text, m.end) or text[m.end - 1] == ")" or m.own_words
            if bare or (m.letter and set_off and {n.letter for n, _ in heads} == {m.letter}):
                return m
    spoken = [(m, c) for m, c in labels if m.letter and not _denied(c) and not _unsure(c)]
    if len({m.letter for m, _ in spoken}) == 1:
        m, c = spoken[-1]
        is_last_word = m not in listed and text[m.end :] in (".", "。") and not c.left
        if is_last_word or (
            _complete(text) and (w.SETS_OFF.match(c.right) or w.PRAISES.search(c.left + c.right))
        ):
            return m
    return None


def _words(text: str, texts: OptionTexts, labels: list[Mention]) -> list[tuple[Mention, Context]]:
    """The mentions of options' words, but for those that belong to a letter."""
    by_letter = bytearray(len(text))
    for label in (label for label in labels if label.own_words):
        by_letter[label.start : label.end] = bytes([1]) * (label.end - label.start)
    return [
        (m, _context(text, m))
        for m in _text_mentions(text.lower(), texts)
        if not by_letter[m.start]
    ]


def _neighbours(text: str, words: list[tuple[Mention, Context]]) -> set[Mention]:
    """Those that stand beside another option's words: "aspirin or heparin"."""
    pairs = [(m, n) for (m, _), (n, _) in pairwise(words) if m.letter != n.letter]
    return {each for m, n in pairs if w.BETWEEN.fullmatch(text, m.end, n.start) for each in (m, n)}


def _claimed_words(text: str, words: list[tuple[Mention, Context]]) -> list[Mention]:
    """The options' words that are claimed, else those that are weakly claimed."""
    listed = _neighbours(text, words)
    firm = [
        (m, c)
        for m, c in words
        if not _common(text[m.start : m.end]) or w.STANDS_APART.match(c.right)
    ]
    single = [(m, c) for m, c in firm if m.letter and m not in listed]
    weak = [m for m, c in single if w.WEAK_LEFT.search(c.left) and not _denied(c)]
    return [m for m, c in single if _claimed(c)] or weak


def _words_alone(text: str, words: list[tuple[Mention, Context]]) -> list[Mention]:
    """The options' words that stand alone in the first or last line, or the only ones not denied, in a sentence that is
    made for them."""
    listed = _neighbours(text, words)
    first_end, last_start = (text + "\n").index("\n"), text.rfind("\n") + 1
    for m in (m for m, _ in words if m not in listed):
        begins = w.LEADS_IN.fullmatch(text[text.rfind("\n", 0, m.start) + 1 : m.start].lower())
        rest = text[m.end : (text + "\n").index("\n", m.end)]
        leads = m.start == 0 and re.match(r"\s?[,.;:!—–-](?:\s|$)|[,。]", rest)
        if (
            begins
            and (m.start < first_end or m.end > last_start)
            and (leads or not rest.strip(" .!\"'。"))
        ):
            return [m]
    spoken = [(m, c) for m, c in words if not _denied(c) and not w.EXAMPLE_LEFT.search(c.left)]
    sure = [(m, c) for m, c in spoken if not _common(text[m.start : m.end]) and not _unsure(c)]
    only = [m for m, _ in sure]
    made = any(w.SETS_OFF.match(c.right) or w.PRAISES.search(c.left + c.right) for _, c in sure)
    stops = [
        0,
        *(stop.end() for stop in w.SENTENCE_END.finditer(text, 0, len(text) - 1)),
        len(text),
    ]
    outer_sentence = any(m.start < stops[1] or m.start >= stops[-2] for m in only)
    alone = len({m.letter for m in only}) == 1 and not listed.intersection(only)
    return only if alone and made and outer_sentence and _complete(text) else []


def _text_mentions(lower: str, texts: OptionTexts) -> list[Mention]:
    """Where options' words occur as whole words; inside a longer option's words a shorter option is not mentioned."""
    mentions: list[Mention] = []
    taken = bytearray(len(lower))
    for words, letter in texts:
        at = lower.find(words)
        while at >= 0:
            end = at + len(words)
            after = lower[end : end + 2].removeprefix("-")[:1]
            whole = not (_joined(lower[at - 1 : at], lower[at]) or _joined(lower[end - 1], after))
            if whole and not any(taken[at:end]):
                taken[at:end] = bytes([1]) * len(words)
                mentions.append(Mention(at, end, letter))
            at = lower.find(words, end)
    return sorted(mentions)


def _joined(a: str, b: str) -> bool:
    """Whether two neighbours belong to one word; Chinese has no word edges."""
    return a.isalnum() and a < "一" and b.isalnum() and b < "一"


def _common(words: str) -> bool:
    short = len(words) < (2 if words > "一" else 4) and not re.search(".[A-Z]", words)
    return short or words.lower() in w.COMMON_WORDS


def extract_original(output: str, options: dict[str, str]) -> tuple[str | None, str | None] | None:
    """The original's two readings of an output, the first option named and the last; None for an empty answer, which it drops.

    Known of it: the answer is read after the last `## Final Response` and a blank line, by two rules, of which the labels
    choose. Not known, and set here: that the rules are the first and the last option named, by a letter ("B.", "(B)") or by
    its text; and that an output without the heading is read whole.
    """
    text = output.rpartition(f"{FINAL}\n\n")[2].strip()
    if not text:
        return None
    plain = _plain(text)
    named = [
        (m.start(), m[0])
        for m in re.finditer(r"(?<![A-Za-z0-9])[A-Z](?=[.,:)\s]|$)", plain)
        if m[0] in options
    ]
    words = _text_mentions(plain.lower(), _option_texts(tuple(options.items())))
    letters = [
        letter for _, letter in sorted(named + [(m.start, m.letter) for m in words if m.letter])
    ]
    return (letters[0], letters[-1]) if letters else (None, None)


def accuracy(letters: Sequence[str | None], answers: Sequence[str]) -> float:
    """Share of items whose letter is the answer; None, no answer, is wrong. Raises ValueError without items, or on a mismatch."""
    if len(letters) != len(answers) or not answers:
        raise ValueError(
            f"accuracy needs as many letters as answers, at least one; got {len(letters)} and {len(answers)}"
        )
    return sum(letter == answer for letter, answer in zip(letters, answers, strict=True)) / len(
        answers
    )


def accuracy_original(
    readings: Sequence[tuple[str | None, str | None] | None], answers: Sequence[str]
) -> tuple[float, int]:
    """Accuracy as the original counts it, and of how many items: empty answers dropped, the better of the two rules kept.

    For comparison with published numbers alone: it is biased upwards twice. NaN when every answer is empty.
    """
    kept = [
        (pair, answer) for pair, answer in zip(readings, answers, strict=True) if pair is not None
    ]
    right = max(sum(pair[rule] == answer for pair, answer in kept) for rule in (0, 1))
    return (right / len(kept) if kept else float("nan")), len(kept)
