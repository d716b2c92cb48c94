"""Encoding of text in which only the chat template may write control tokens.

A question, an answer or a reference may hold the string of a special token, such as `</s>`. Encoded
as it stands it would become the control token: end the turn, or open another. So the strings of
special tokens in such text are replaced by codes before the template is filled in (`protect`), and
`encode` reads the codes as ordinary text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, which text never holds
_CODE = re.compile("\ufdd0([0-9]+)\ufdd1")
_THINK_TAGS = frozenset({"<think>", "</think>"})


class _Special:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # a token of one character cannot be spelled in any other way: it stays what it is
        self.text = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and len(token.content) > 1
        }
        self.ids = {text: number for number, text in self.text.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)
        # without special tokens a pattern that matches nothing
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that decoding leaves out: all but those of the tags around a thought."""
        return frozenset(n for n, text in self.text.items() if text not in _THINK_TAGS)


@functools.lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> _Special:
    return _Special(tokenizer)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens of a tokenizer and their ids."""
    return _special(tokenizer).ids


def split_at_special(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int | None]:
    """The text before the first special token and that token's id; None if there is none."""
    special = _special(tokenizer)
    match = special.pattern.search(text)
    if match is None:
        return text, None
    return text[: match.start()], special.ids[match[0]]


def protect(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Replaces the string of every special token in a text by a code, which `encode` undoes."""
    special = _special(tokenizer)
    return special.pattern.sub(lambda match: f"\ufdd0{special.ids[match[0]]}\ufdd1", text)


def unprotect(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Puts the strings of special tokens back in the place of their codes."""
    known = _special(tokenizer).text
    return _CODE.sub(lambda match: known.get(int(match[1]), match[0]), text)


def is_protected(text: str) -> bool:
    """Whether a text holds codes of special tokens."""
    return _CODE.search(text) is not None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; special tokens are control tokens, their codes are ordinary text.

    Args:
        tokenizer: the model's tokenizer.
        text: text in which `protect` has been applied to the parts that are not a template's.
    """
    if not is_protected(text):
        return tokenizer.encode(text, add_special_tokens=False)
    special = _special(tokenizer)
    text = special.pattern.sub(lambda match: _other_name(special.ids[match[0]]), text)
    encoding = _renamed(tokenizer).encode(unprotect(tokenizer, text), add_special_tokens=False)
    return encoding.ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a response, without special tokens other than `<think>` and `</think>`."""
    hidden = _special(tokenizer).hidden_ids
    text: Any = tokenizer.decode([token for token in ids if token not in hidden])
    return text


def _other_name(token: int) -> str:
    return f"\ufdd2{token}\ufdd1"


@functools.lru_cache(maxsize=8)
def _renamed(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer in which the special tokens have names that text never holds."""
    from tokenizers import Tokenizer

    backend: Any = tokenizer.backend_tokenizer
    settings = json.loads(backend.to_str())
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    names = {text: _other_name(token) for text, token in special_ids(tokenizer).items()}
    for token in settings["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    vocabulary = settings["model"].get("vocab")
    if isinstance(vocabulary, dict):
        renamed: Any = {names.get(piece, piece): token for piece, token in vocabulary.items()}
    else:  # of a Unigram model: pairs of piece and score
        renamed = [[names.get(piece, piece), score] for piece, score in vocabulary]
    settings["model"]["vocab"] = renamed
    if (unknown := settings["model"].get("unk_token")) is not None:
        settings["model"]["unk_token"] = names.get(unknown, unknown)
    return Tokenizer.from_str(json.dumps(settings))
