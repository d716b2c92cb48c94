"""Finds the places of a response that name an option, by its letter or by its own words."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise

from . import choice_wording as w

OptionTexts = tuple[tuple[str, str | None], ...]
Span = tuple[int, int, str | None]
"""Start, end and letter of an occurrence of an option's words."""

CONTEXT_CHARACTERS = 160
"""Characters read on either side of a mention."""


@dataclass(frozen=True)
class Mention:
    """A place that names an option, with the rest of its sentence in lower case."""

    start: int
    """Position of the first character in the response."""
    end: int
    """Position after the last character."""
    text: str
    """The characters from `start` to `end`."""
    letter: str | None
    """The option's letter; None for a list of letters, or for words that two options share."""
    left: str
    """The sentence before the mention."""
    right: str
    """The sentence after the mention."""
    mark: str
    """Punctuation mark that ends the sentence."""
    own_words: bool = False
    """Whether the option's words follow its letter: "B. Aspirin", but not "A stroke"."""
    listed: bool = False
    """Whether the mention belongs to a list of options, none of which is singled out."""
    sign: str = ""
    """Tick or cross that follows on the line, before another option."""

    @property
    def spelled(self) -> bool:
        """Whether the option is named by its letter."""
        return self.own_words or bool(w.LABEL.fullmatch(self.text))

    @property
    def letters(self) -> str:
        """The letters of a list such as "A, B and C", or the only letter."""
        return self.letter or "".join(re.findall("(?<![A-Za-z])[A-Z](?![A-Za-z])", self.text))

    @cached_property
    def excluded(self) -> bool:
        """Whether the option is said to be wrong."""
        clause = w.TURN.split(self.left)[-1]
        return self.sign == "✗" or bool(
            w.DENIED_LEFT.search(clause) or w.DENIED_RIGHT.match(self.right)
        )

    @cached_property
    def denied(self) -> bool:
        """Whether the option is said to be wrong, or the sentence is hypothetical."""
        clause = w.TURN.split(self.left)[-1]
        return self.excluded or bool(w.SUPPOSED.search(f"{clause} _ {self.right}"))

    @cached_property
    def claimed(self) -> bool:
        """Whether the sentence states that the option is the answer."""
        if self.mark == "?" or self.denied:
            return False
        if self.sign or self.explicit:
            return True
        claim = w.CLAIM_RIGHT.match(self.right)
        return claim is not None and not w.DENIED_GAP.search(claim["gap"] or claim["cngap"] or "")

    @cached_property
    def explicit(self) -> bool:
        """Whether the sentence announces the answer, as in "the answer is B"."""
        return bool(w.CLAIM_LEFT.search(self.left) or w.EXPLICIT_RIGHT.match(self.right))

    @property
    def stated(self) -> bool:
        """Whether the sentence is about the option, and does not deny it."""
        about = self.claimed or self.concluded or self.ends_sentence or self.endorsed
        return about and not self.denied

    @property
    def ends_sentence(self) -> bool:
        """Whether nothing follows in the sentence, which is no question."""
        return self.mark != "?" and not self.right.strip(" .,)")

    @property
    def meant(self) -> bool:
        """Whether the words stand for their option alone."""
        return (
            bool(self.letter)
            and not self.listed
            and (not self.common or bool(w.STANDS_APART.match(self.right)))
        )

    @property
    def concluded(self) -> bool:
        """Whether the sentence arrives at the option, which is weaker than a claim."""
        return bool(w.WEAK_LEFT.search(self.left)) and not self.denied

    @property
    def unsure(self) -> bool:
        """Whether the sentence is a question or expresses doubt."""
        return self.mark == "?" or bool(w.UNSURE.search(self.left + self.right))

    @property
    def singled_out(self) -> bool:
        """Whether the option stands alone, or its sentence recommends it."""
        return self.endorsed or bool(w.SETS_OFF.match(self.right))

    @property
    def endorsed(self) -> bool:
        """Whether the sentence recommends the option."""
        return bool(w.ENDORSEMENT.search(self.left + self.right))

    @property
    def common(self) -> bool:
        """Whether the words occur in any text, such as "no"."""
        return bool(w.COMMON_WORDS.fullmatch(self.text.lower()))


def line_start(text: str, position: int) -> int:
    """Position where the line that holds `position` begins."""
    return text.rfind("\n", 0, position) + 1


def line_end(text: str, position: int) -> int:
    """Position where the line that holds `position` ends."""
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def normalise(text: str) -> str:
    """Folds width forms (Ｂ becomes B) and removes emphasis and LaTeX's text commands."""
    if not text.isascii():
        # İ is the one letter that is longer in lower case, which would shift positions
        text = unicodedata.normalize("NFKC", text).replace("İ", "I")
    while "\\" in text and (shorter := w.LATEX.sub(r"\1", text)) != text:
        text = shorter
    text = w.CERTAINTY.sub("", w.MARKUP.sub("", text).translate(w.SIGNS))
    text = w.CROSSES.sub("|✗", w.TICKS.sub("|✓", text))
    text = w.SIGN_FIRST.sub(lambda line: line[1] + w.SIGNED.sub(r"\2 \1", line[2]), text)
    return w.EMOJI.sub("", text).strip()


@lru_cache(maxsize=4096)
def option_texts(options: tuple[tuple[str, str], ...]) -> OptionTexts:
    """Normalises the options' texts.

    Args:
        options: (letter, text) of each option.

    Returns:
        (lower-case text, letter) of each distinct text, the longest first. The letter is None when
        several options have the text.
    """
    texts: dict[str, str | None] = {}
    for letter, text in options:
        words = " ".join(normalise(text).lower().split()).strip(" .。;,\"'“”")
        key = w.ARTICLE.sub("", words)
        texts[key] = None if key in texts else letter
    for words in list(texts):
        species = re.fullmatch(r"([a-z])[a-z]+ ([a-z]{4,})", words)
        if species and species[2] not in texts:  # Escherichia coli is also called E. coli
            texts.setdefault(f"{species[1]}. {species[2]}", texts[words])
    texts.pop("", None)
    return tuple(sorted(texts.items(), key=lambda pair: -len(pair[0])))


def find_labels(text: str, texts: OptionTexts, options: dict[str, str]) -> list[Mention]:
    """Finds every letter that may stand for an option.

    Args:
        text: The normalised response.
        texts: The options' words, as `option_texts` returns them.
        options: Letter -> text of each option.

    Returns:
        Mentions in the order of the response. Their letters need not be among the options.
    """
    lower = text.lower()
    # a letter inside an option's own words, such as the B of "hepatitis B", is no label
    with_letters = (pair for pair in texts if len(pair[0]) > 1 and w.LONE_LETTER.search(pair[0]))
    names = find_texts(lower, tuple(with_letters))
    words_of = {letter: words for words, letter in reversed(texts) if letter}
    mentions: list[Mention] = []
    end = 0
    for match in w.LABEL.finditer(text):
        at = match.start("letter")
        if at < end or any(start <= at < stop for start, stop, _ in names):
            continue
        mention = _read_label(text, lower, match, words_of.get(match["letter"].upper()))
        if mention is not None:
            mentions.append(mention)
            end = mention.end
    labels = _share_denials(text, _up_to_the_next(text, mentions))
    return _mark_lists(text, labels, options)


def _share_denials(text: str, labels: list[Mention]) -> list[Mention]:
    """Extends a denial to the rest of its list: "not B (too young), C (no fever) or D"."""
    left = ""
    shared: list[Mention] = []
    for label in labels:
        in_list = shared and w.IN_LIST.fullmatch(text, shared[-1].end, label.start)
        left = left if in_list and w.DENIED_LEFT.search(left) else label.left
        shared.append(replace(label, left=left))
    return shared


def _up_to_the_next(text: str, mentions: list[Mention]) -> list[Mention]:
    """Limits what each mention says to the text before the next one."""
    ends = [*(m.start for m in mentions[1:]), len(text)]
    return [
        replace(
            m,
            right=m.right[: max(0, end - m.end)],
            sign="".join(w.SIGN.findall(text, m.end, min(end, line_end(text, m.end))))[-1:],
        )
        for m, end in zip(mentions, ends, strict=False)
    ]


def _read_label(
    text: str,
    lower: str,
    match: re.Match[str],
    words: str | None,
) -> Mention | None:
    """The mention at a match of `LABEL`; None when its letter stands for no option."""
    letter = match["letter"]
    start, end = match.span()
    enclosed = match["prefix"] or (match["open"] and match["close"])
    if not enclosed and (
        (letter.islower() and not w.LOWER_CASE.match(text, match.start("letter")))
        or w.NAME_PREFIX.search(text, max(0, start - 20), start)
    ):
        return None
    if letter.isupper() and (more := w.MORE_LETTERS.match(text, end)):
        return _mention(text, start, more.end(), None)
    gap = w.LABEL_GAP.match(lower, end)
    assert gap is not None, "the pattern matches the empty string"
    if words and lower.startswith(words, gap.end()):
        if letter == "A" and gap[0] == " " and not (enclosed or match["close"]):
            return None  # an article: the option's words are a mention of their own
        return _mention(text, start, gap.end() + len(words), letter.upper(), own_words=True)
    pronoun = letter == "I" and w.PRONOUN.match(text, end)
    if enclosed or match["close"] == ")" or (w.FOLLOWS.match(text, end) and not pronoun):
        return _mention(text, start, end, letter.upper())
    return None


def _mark_lists(text: str, labels: list[Mention], options: dict[str, str]) -> list[Mention]:
    """Marks successive labels that list the options, one a line or with their words alone."""
    successive = set(pairwise(options))
    runs = [labels[:1]]
    for label, following in pairwise(labels):
        between = text[label.end : following.start]
        before = text[line_start(text, label.start) : label.start]
        one_a_line = not before.strip(" -•>#") and w.NEXT_LINE.fullmatch(between)
        words_alone = label.own_words and following.own_words
        bare = words_alone and not between.strip(" \n\t.;,:•->|\"'[]{}(")
        if (label.letter, following.letter) in successive and (bare or one_a_line):
            runs[-1].append(following)
        else:
            runs.append([following])
    least = min(3, len(options))
    return [
        # the text before a listed label is the previous entry, and says nothing of this one
        replace(label, left="", listed=True) if len(run) >= least else label
        for run in runs
        for label in run
    ]


def find_words(text: str, texts: OptionTexts, labels: list[Mention]) -> list[Mention]:
    """Finds the options' own words, except those that follow a label.

    Words directly beside another option's ("aspirin or heparin") are marked as listed.
    """
    labelled = [range(label.start, label.end) for label in labels if label.own_words]
    words = [
        _mention(text, *span)
        for span in find_texts(text.lower(), texts)
        if not any(span[0] in places for places in labelled)
    ]
    beside: set[int] = set()
    for word, following in pairwise(words):
        between = w.BETWEEN.fullmatch(text, word.end, following.start)
        if between and word.letter != following.letter:
            beside |= {word.start, following.start}
    words = [replace(word, listed=word.start in beside) for word in words]
    return _up_to_the_next(text, words)


def find_texts(lower: str, texts: OptionTexts) -> list[Span]:
    """Finds the options' words as whole words; a longer option's words hide a shorter one's.

    Args:
        lower: The response in lower case.
        texts: The options' words, as `option_texts` returns them.
    """
    spans: list[Span] = []
    taken = bytearray(len(lower))
    for words, letter in texts:
        at = lower.find(words)
        while at >= 0:
            end = at + len(words)
            after = lower[end : end + 2].removeprefix("-")[:1]
            joined = _joined(lower[at - 1 : at], lower[at]) or _joined(lower[end - 1], after)
            if not joined and not any(taken[at:end]):
                taken[at:end] = b"\1" * len(words)
                spans.append((at, end, letter))
            at = lower.find(words, end)
    return sorted(spans)


def _joined(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word; Chinese has no word boundaries."""
    return left.isalnum() and left < "一" and right.isalnum() and right < "一"


def _mention(
    text: str,
    start: int,
    end: int,
    letter: str | None,
    own_words: bool = False,
) -> Mention:
    # a line break directly before the mention does not end the sentence on its left
    before = text[max(0, start - CONTEXT_CHARACTERS) : start].rstrip()
    left = w.SENTENCE_END.split(before)[-1]
    # otherwise an option A would read as an article
    left = re.sub(r"(?<![A-Za-z])A(?![A-Za-z])", "_", left).lower()
    right = text[end : end + CONTEXT_CHARACTERS]
    stop = w.SENTENCE_END.search(right)
    if stop:
        right = right[: stop.start()]
    mark = stop[0] if stop else ""
    return Mention(start, end, text[start:end], letter, left, right.lower(), mark, own_words)
