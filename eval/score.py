"""Which option an output chooses, and how often that is right. Pure.

The rules were fixed before any label was seen, and apply in this order to the final response alone:
  1. statement   a letter is claimed: "the answer is B", "B is correct", boxed, JSON, "答案是B"; of several claims the last
  2. letter      a letter stands alone: the whole response, or its first or last line, or "(B)." at its end
  3. text        an option's own words are claimed, stand alone, or are the only option's words that occur
  4. none        anything else. It counts as wrong; nothing is guessed by likeness
A claim that is denied, asked, hypothetical or somebody else's is none; two letters at once ("A and C") or a letter that
no option has are a claim without an answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from verippo.core.chat import FINAL, THINKING


class Extraction(NamedTuple):
    """What was read: a letter of the options or None, by which rule, from how many claims, and whether they disagree."""

    letter: str | None
    rule: str
    num_statements: int = 0
    conflicting: bool = False


class Mention(NamedTuple):
    """A place that names an option: text[start:end]. `letter` is None when it names several at once."""

    start: int
    end: int
    letter: str | None


_WINDOW = 160
"""characters read to the left and to the right of a mention, within its sentence"""

_MARKUP = re.compile(r"[*`$]|__|(?<!\w)_|_(?!\w)|</?(?:b|i|em|strong|u)>|\\[()\[\],;]|\\(?:quad|boldsymbol)\b")
_LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|sf|it))\s*\{([^{}]*)\}")
_LABEL = re.compile(
    r"(?:\b(?P<prefix>(?:answer )?(?:option|choice|letter)|选项)\s*:?\s*)?(?P<open>[(\[{<\"'“‘【「《]*)"
    r"(?<![A-Za-z0-9'’°/.-])(?P<letter>[A-Za-z])(?![A-Za-z0-9'’°/&+²])(?P<close>[)\]}>\"'”’】」》]*)(?:选?项)?",
    re.IGNORECASE,
)
_MORE = re.compile(
    r"(?:\s*(?:,?\s*(?:and|or|&|和|或|与|及)|,|、)\s*(?:options?\s*)?[(\"']*[A-Z](?![A-Za-z0-9'’/-])[)\"']*)+"
    r"(?=\s*(?:[.;:!?)\n。]|$|(?:are|both|because|together|apply|since|equally|seem)\b|都|均))"
)
_FOLLOWS = re.compile(
    r"\s*(?:$|[\n,;:!?()\[\]{}<>|=\"'”’–—…。、/]|-\s|\.(?!\s?[a-z])|[一-鿿]|"
    r"\.?\s+(?:because|since|as|due|given|which|and|or|but|for|is|are|was|would|based|with|from|according|rather|not|over|"
    r"here|so|the|this|it|has|by|in|on|best|represent\w*|correspond\w*|therefore|option|choice)\b)"
)
_STRICT = re.compile(r"\s*(?:$|\n|[.,:;)](?:\s|$))")

_HEAD = (
    r"(?<![a-z])(?:answer|choice|option|selection|pick|response|conclusion|diagnosis|treatment|management|therapy|drug|agent|"
    r"step|test|cause|explanation|mechanism|statement|exception|finding|organism|one|match|correct|best|likely|appropriate)s?"
)
_FILLER = (
    r"(?:[\s\"'“”‘’(\[{<>=~:,|#-]|(?<![a-z])(?:the|option|choice|letter|answer|most likely|likely|probably|clearly|definitely|"
    r"certainly|therefore|thus|hence|indeed|simply|then|best|correct|single|it's|it is|i believe|i think|in fact|actually|"
    r"\\?boxed)(?![a-z]))*$"
)
_CLAIM_LEFT = re.compile(
    rf"{_HEAD}(?![a-z])[^\n]{{0,110}}?(?:\bis\b|\bbe\b|\bwas\b|'s\b|:|=|->|→|\bremains\b){_FILLER}"
    r"|\b(?:choos|pick|select|go(?:es|ing)? with|opt(?:s|ed|ing)? for|vote for|settl\w+ on|conclud)(?:e|es|ed|ing|s)?"
    rf"(?: that)?{_FILLER}"
    rf"|(?:(?:final|my|correct|right|best|i(?:'d| would)?)\s+answer|^\W*answer)(?: with)?{_FILLER}"
    r"|boxed\s*\{\s*$|<answer>\s*$"
    r"|\b(?:wait|actually|no|sorry|correction|scratch that)\b[\s,:.—-]*(?:it's|it is|i mean|make that|it must be)?\s*$"
    r"|(?:答案|正确|最佳|最可能|最合适|最恰当|诊断|结论)[^。!?\n;]{0,40}?(?:是|为|选|:)[\s\"'“(\[【「]*(?:选项)?\s*$"
    r"|(?<![不勿未非别挑])选(?:择|定)?(?:答案)?\s*:?[\s\"'“(\[【「]*(?:选项)?\s*$"
)
_WEAK_LEFT = re.compile(
    r"(?:\b(?:so|thus|therefore|hence|leaving|leaves|left with|points? to|match(?:es)?|corresponds? to|consistent with|"
    rf"supports?|suggests?|indicates?|favou?rs?|i\.e\.|namely|(?:it|that|this)(?:'s| is| must be))|所以|因此|故){_FILLER}"
)
_RIGHT_WORD = (
    r"(?:correct|right|true|best|most (?!un)\w+|only (?:correct|option|choice|answer|one)|answer|one that)\b"
)
_CLAIM_RIGHT = re.compile(
    r"[\s.):,-]*(?P<gap>[^.!?\n]{0,110}?)(?:\b(?:is|are|was|would be|seems|appears|remains|being|as|to be|makes)\b|[:–—(-])"
    rf"\s*(?:clearly|therefore|thus|indeed|still|probably|likely|definitely)?\s*(?:the|our|my)?\s*(?:single\s+)?{_RIGHT_WORD}"
    r"|[^\w\n]*[✓✔✅]"
    r"|(?P<cngap>[^。!?\n;,]{0,30}?)(?:是|为)?(?:正确|对的|最佳|最合适|最符合|符合题意|最可能)"
)
_DENIED_GAP = re.compile(
    r"\b(?:not|incorrect|wrong|but|while|whereas|although|than|if|unlike|never|cannot)\b|n't\b|不|错|非"
    r"|[(\s][B-Z][.)]|\b[B-Z] (?:is|are)\b"
)
_DENIED_LEFT = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|no longer|rul(?:e|es|ed|ing) out|exclud\w+|eliminat\w+|reject\w*|rather than|"
    r"instead of|than|avoid\w*|unlike|except)|n't)\s+(?:[\w'-]+\s+){0,2}[\s(\"'\[]*$"
    r"|(?:\bnot|n't|\bhardly|\bnever)\s+(?:think|believe|say|agree|mean|sure|certain|convinced|claim|conclude|confirm|determine)\b"
    r"|\b(?:incorrect|wrong|inaccurate|other|tempting|distractor|previous|first|initial)\s+(?:answer|choice|option|guess)s?\b"
    r"|(?:不是|不选|排除|并非|而非|不应选|不能选|不会是|除了?)\s*(?:选项)?\s*[(\"']*$"
)
_DENIED_RIGHT = re.compile(
    r"[\s.):]*(?:\([^)]*\)\s*)?(?:(?:is|are|was|were|would be|can be|could be|should be|has been|seems)\s+(?:\w+ly\s+)?"
    r"(?:not\b|incorrect|wrong|false|inappropriate|unlikely|less\b|ruled out|excluded|eliminated|inconsistent|contraindicated|"
    r"a distractor|the least)|(?:is|are|was|would|does|can|could)n't\b|does not\b|cannot\b|can not\b|would not\b)"
    r"|[^。,;\n]{0,20}?(?:不(?:正确|对|符合|是|能|适|支持)|错误|有误|排除|不选)"
)
_SUPPOSED = re.compile(
    r"\b(?:if|had|were|unless|suppose|assuming|without)\b.*\b(?:would|could|might)\b"
    r"|\b(?:would|could|might)\b.*\b(?:if|had|were|unless)\b"
    r"|\b(?:some|many|students?|people|one|you|others)\s+(?:\w+\s+)?(?:might|may|would|could|often|commonly)\b"
    r"|\bmistake|\btempt|\btrap\b|\bat first\b|\binitially\b|\bfirst (?:thought|instinct|impression)|\bwhether\b"
)
_UNSURE = re.compile(
    r"\b(?:cannot|can't|unable|insufficient|don't know|do not know|unclear|unsure|not (?:sure|certain|possible|able|enough)|"
    r"whether|need more|no (?:single|clear|correct|definitive) (?:answer|option))\b|无法|不确定|不能确定|不清楚|难以"
)
_CONCLUDES = re.compile(r"\b(?:therefore|thus|so|hence|conclusion|overall|summary|finally|ultimately)\b|因此|所以|综上|总之|故")
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。!?\n]")
_TURN = re.compile(r"\b(?:but|however|yet|though)\b|但|然而")
_GENERIC = {"yes", "no", "maybe", "none", "all", "both", "true", "false", "n/a", "never", "always", "是", "否", "both a and b"}


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
    texts = _option_texts(tuple(options.items()))
    labels = _labels(text, texts)
    if found := _last_claim([m for m in labels if _claimed(text, m)], "statement", options):
        return found
    if weak := [m for m in labels if _claimed(text, m, weak=True)]:
        return _last_claim(weak, "statement", options) or Extraction(None, "none")
    if (alone := _alone(text, labels)) is not None:
        return Extraction(alone.letter if alone.letter in options else None, "letter", 1)
    return _by_text(text, texts, options)


def _last_claim(claims: list[Mention], rule: str, options: dict[str, str]) -> Extraction | None:
    if not claims:
        return None
    letter = claims[-1].letter
    return Extraction(letter if letter in options else None, rule, len(claims), len({m.letter for m in claims}) > 1)


def _plain(text: str) -> str:
    """Width forms folded (Ｂ is B), emphasis and LaTeX's text commands removed."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    while "\\" in text and (shorter := _LATEX.sub(r"\1", text)) != text:
        text = shorter
    return _MARKUP.sub("", text).strip()


@lru_cache(maxsize=4096)
def _option_texts(items: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str | None], ...]:
    """(lower-case text, letter) of each option, the longest first; the letter is None when options share the text."""
    texts: dict[str, str | None] = {}
    for letter, text in items:
        key = re.sub(r"^(?:the|an?) ", "", " ".join(_plain(text).lower().split()).rstrip(" .。;,"))
        texts[key] = None if key in texts else letter
    return tuple(sorted(((text, letter) for text, letter in texts.items() if text), key=lambda pair: -len(pair[0])))


def _labels(text: str, texts: tuple[tuple[str, str | None], ...]) -> list[Mention]:
    """Every letter that may stand for an option, with the option's own words where they follow it."""
    mentions: list[Mention] = []
    lower, end = text.lower(), 0
    own = {letter: words for words, letter in texts}
    for match in _LABEL.finditer(text):
        if match.start("letter") < end:
            continue
        letter, end = match["letter"], match.end()
        bracketed = bool(match["open"] and match["close"]) or bool(match["prefix"])
        if letter.islower() and not bracketed and not _STRICT.match(text, end):
            continue
        if letter.isupper() and (more := _MORE.match(text, end)):
            mentions.append(Mention(match.start(), more.end(), None))
            end = more.end()
            continue
        start_of_words = end + len(lower[end:]) - len(lower[end:].lstrip(" \n.):,-–—\"'(=]"))
        words = own.get(letter.upper())
        if words and lower.startswith(words, start_of_words):
            end = start_of_words + len(words)
        elif not bracketed and not _FOLLOWS.match(text, end):
            continue
        mentions.append(Mention(match.start(), end, letter.upper()))
    return mentions


def _around(text: str, mention: Mention) -> tuple[str, str, str]:
    """The lower-case rest of the sentence to the left, to the right, and the mark that ends it. A line break directly
    before the mention does not end what is to its left."""
    left = text[max(0, mention.start - _WINDOW) : mention.start]
    left = _SENTENCE_END.split(left.rstrip())[-1] if not left.rstrip().endswith((".", "!", "?", "。")) else ""
    right = text[mention.end : mention.end + _WINDOW]
    skip = len(right) - len(right.lstrip(".):,- "))
    stop = _SENTENCE_END.search(right, skip)
    return left.lower(), (right[: stop.start()] if stop else right).lower(), stop[0] if stop else ""


def _claimed(text: str, mention: Mention, *, weak: bool = False) -> bool:
    """Whether the sentence around the mention says that this option is the answer."""
    left, right, mark = _around(text, mention)
    if mark == "?" or _denied(left, right):
        return False
    if weak:
        return bool(_WEAK_LEFT.search(left)) and not right.strip(" .,)")
    if _CLAIM_LEFT.search(left):
        return True
    claim = _CLAIM_RIGHT.match(right)
    return bool(claim) and not _DENIED_GAP.search((claim["gap"] or claim["cngap"] or "") if claim else "")


def _denied(left: str, right: str) -> bool:
    clause = _TURN.split(left)[-1]
    return bool(
        _DENIED_LEFT.search(re.split(r"[;:]|, (?:so|therefore|thus)", clause)[-1] if "not" not in clause[-30:] else clause)
        or _DENIED_RIGHT.match(right)
        or _SUPPOSED.search(f"{clause} _ {right}")
    )


def _alone(text: str, labels: list[Mention]) -> Mention | None:
    """The letter that is the whole response, begins its first or last line, or closes it in brackets."""
    by_start = {m.start: m for m in labels}
    lines, at = [], 0
    for line in text.split("\n"):
        start = at + len(line) - len(line.lstrip(" \t->#•"))
        if line.strip():
            lines.append((by_start.get(start), at + len(line)))
        at += len(line) + 1
    heads = [m for m, _ in lines if m]
    for mention, line_end in (lines[:1] + lines[-1:]) if lines else ():
        if mention is None or _denied(*_around(text, mention)[:2]):
            continue
        bare = not text[mention.end : line_end].strip(" .:)")
        if bare or len({m.letter for m in heads}) == 1:
            return mention
    if labels and not text[labels[-1].end :].strip(" .!。") and text[labels[-1].end - 1] == ")":
        left, right, _ = _around(text, labels[-1])
        if not _denied(left, right) and not _UNSURE.search(left) and len({m.letter for m in labels}) == 1:
            return labels[-1]
    return None


def _by_text(text: str, texts: tuple[tuple[str, str | None], ...], options: dict[str, str]) -> Extraction:
    """The option whose words are claimed; else those that stand alone; else the only ones that occur."""
    lower = " ".join(text.lower().split(" "))
    mentions: list[Mention] = []
    for words, letter in texts:
        at = lower.find(words)
        while at >= 0:
            end = at + len(words)
            if _bounded(lower, at, end) and not any(m.start < end and at < m.end for m in mentions):
                mentions.append(Mention(at, end, letter))
            at = lower.find(words, end)
    mentions.sort()
    generic = {m for m in mentions if m.end - m.start < 4 or text[m.start : m.end].lower() in _GENERIC}
    claims = [m for m in mentions if _claimed(text, m) and (m not in generic or _FOLLOWS.match(text, m.end))]
    if claims:
        return _last_claim(claims, "text", options) or Extraction(None, "none")
    lines = [line for line in text.split("\n") if line.strip()]
    for m in mentions:
        rest = text[m.end :].split("\n")[0]
        outer = m.start < len(lines[0]) or m.end > len(text) - len(lines[-1])
        begins = not text[: m.start].rpartition("\n")[2].strip(" -#>\"'")
        if outer and begins and (not rest.strip(" .!\"'。") or _leads(text, m)):
            return Extraction(m.letter, "text", 1)
    free = [m for m in mentions if m not in generic]
    spoken = [m for m in free if not _denied(*_around(text, m)[:2]) and not _UNSURE.search(" ".join(_around(text, m)[:2]))]
    letters = {m.letter for m in free}
    if spoken and len(letters) == 1:
        return Extraction(spoken[-1].letter, "text", 1)
    if spoken and _CONCLUDES.search(_around(text, spoken[-1])[0]) and spoken[-1] == free[-1]:
        return Extraction(spoken[-1].letter, "text", 1, True)
    return Extraction(None, "none")


def _leads(text: str, mention: Mention) -> bool:
    return mention.start == 0 and bool(re.match(r"[,.;:!—–-](?:\s|$)|[,。]", text[mention.end :]))


def _bounded(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins and ends at a word's edge; Chinese has no word edges."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (_joins(before, text[start]) or _joins(text[end - 1], after))


def _joins(a: str, b: str) -> bool:
    return (a.isalnum() and a < "一") and (b.isalnum() and b < "一")


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
    found = [(m.start(1), m[1]) for m in re.finditer(r"(?<![A-Za-z0-9])([A-Z])(?=[.,:)\s]|$)", plain) if m[1] in options]
    found += [(plain.lower().rfind(words), letter) for words, letter in _option_texts(tuple(options.items())) if letter]
    named = sorted(pair for pair in found if pair[0] >= 0)
    return (named[0][1], named[-1][1]) if named else (None, None)


def accuracy(letters: Sequence[str | None], answers: Sequence[str]) -> float:
    """Share of items whose letter is the answer; None, no answer, is wrong. Raises ValueError without items, or on a mismatch."""
    if len(letters) != len(answers) or not answers:
        raise ValueError(f"accuracy needs as many letters as answers, at least one; got {len(letters)} and {len(answers)}")
    return sum(letter == answer for letter, answer in zip(letters, answers, strict=True)) / len(answers)


def accuracy_original(readings: Sequence[tuple[str | None, str | None] | None], answers: Sequence[str]) -> tuple[float, int]:
    """Accuracy as the original counts it, and of how many items: empty answers dropped, the better of the two rules kept.

    For comparison with published numbers alone: it is biased upwards twice. NaN when every answer is empty.
    """
    kept = [(pair, answer) for pair, answer in zip(readings, answers, strict=True) if pair is not None]
    right = max(sum(pair[rule] == answer for pair, answer in kept) for rule in (0, 1))
    return (right / len(kept) if kept else float("nan")), len(kept)
