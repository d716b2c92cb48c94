"""Chat templates, and the format of an answer with a thinking part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING = "## Thinking"
FINAL = "## Final Response"

DEFAULT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Template for tokenizers without one: Llama-3's, with the tokenizer's own end token."""

END_TOKENS = ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")
"""Tokens by which Llama-3 and Qwen end a turn."""


class ParsedResponse(NamedTuple):
    """The two parts of an answer."""

    thinking: str
    final: str


def render_response(thinking: str, final: str) -> str:
    """Writes an answer in the published format: the thinking, then the final response."""
    return f"{THINKING}\n\n{thinking}\n\n{FINAL}\n\n{final}"


def parse_response(text: str) -> ParsedResponse | None:
    """Splits an answer into its two parts.

    The format has `## Thinking` exactly once and, after it, `## Final Response` with a blank line
    exactly once.

    Returns:
        The parts without outer white space, or None if the format is broken.
    """
    before, *final = text.split(f"{FINAL}\n\n")
    if text.count(THINKING) != 1 or len(final) != 1 or THINKING not in before:
        return None
    return ParsedResponse(before.split(THINKING)[1].strip(), final[0].strip())


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None
) -> list[int]:
    """Token ids of a conversation up to the beginning of the assistant's answer.

    Args:
        tokenizer: the model's tokenizer.
        question: the user's message.
        system: the system message, if there is one.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return render_messages(tokenizer, messages, add_generation_prompt=True)


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Writes a conversation by the tokenizer's chat template, or by DEFAULT_TEMPLATE.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation, each with role and content.
        add_generation_prompt: whether the text ends with the beginning of an assistant's turn.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        text: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:  # such as a template without a system turn
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    return text


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids of the text that `render_text` writes."""
    text = render_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False)


def render_example(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of a training conversation.

    The two parts are encoded separately, as they are when the model answers.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation; the last message is the assistant's.

    Returns:
        The ids before the last turn, and those of the last turn. These end with an end token, which
        is added if the template writes none.

    Raises:
        ValueError: the last turn is not the assistant's or is blank, or the template renders the
            earlier turns differently when an answer follows.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the last turn is not the assistant's")
    if not messages[-1]["content"].strip():
        raise ValueError("the assistant's turn is empty")
    prompt = render_text(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = render_text(tokenizer, messages)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template rewrites the prompt when an answer follows: "
            "the prompt is no prefix of the whole"
        )
    response = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    end_ids = _end_ids(tokenizer)
    ends = [n for n, token in enumerate(response) if token in end_ids]
    response = response[: ends[-1] + 1] if ends else [*response, tokenizer.eos_token_id]
    return tokenizer.encode(prompt, add_special_tokens=False), response


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokenizer's end token and of those END_TOKENS that it knows."""
    end: Any = tokenizer.eos_token_id
    end_ids: set[int] = {end}
    for token in END_TOKENS:
        number = tokenizer.convert_tokens_to_ids(token)  # an unknown token gets another's id
        if isinstance(number, int) and tokenizer.convert_ids_to_tokens(number) == token:
            end_ids.add(number)
    return end_ids
