"""The tokens at which a response ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .chat import end_of_turn_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response of a model.

    They are those with which its tokenizer, its generation_config.json and its chat template end
    one: base models often come with a template whose end of turn is not their end of sequence.

    Args:
        path: the model's Hugging Face folder or hub id.
        tokenizer: its tokenizer.
    """
    return tuple(sorted({*server_stop_ids(path, tokenizer), *_template_ends(tokenizer)}))


def server_stop_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids at which a server of the model stops by itself."""
    from transformers import GenerationConfig

    end: Any = tokenizer.eos_token_id
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # there is none
        configured = None
    except Exception as error:
        raise ValueError(
            f"model {path}: generation_config.json cannot be read: {type(error).__name__}: {error}"
        ) from None
    if configured is None:
        return {end}
    ids = configured if isinstance(configured, list) else [configured]
    if not all(type(number) is int for number in ids):
        raise ValueError(f"model {path}: generation_config.json: eos_token_id is {configured!r}")
    return {end, *ids}


def _template_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    try:
        return {end_of_turn_id(tokenizer)}
    except ValueError:
        # such a template cannot be trained with; where it is used for a prompt, that is refused
        return set()
