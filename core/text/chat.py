"""Chat templates, and the text of an answer that thinks first. Pure."""

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
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""The shape of Llama-3's template, for tokenizers that bring none; a turn ends with the tokenizer's own end token."""


class ParsedResponse(NamedTuple):
    thinking: str
    final: str


def render_response(thinking: str, final: str) -> str:
    """The published target text: thinking, then the final response."""
    return f"{THINKING}\n\n{thinking}\n\n{FINAL}\n\n{final}"


def parse_response(text: str) -> ParsedResponse | None:
    """Splits an answer into its two parts, outer white space removed; None when the format is broken.

    The format holds exactly one `## Thinking` and, after it, exactly one `## Final Response` followed by a blank line.
    """
    if text.count(THINKING) != 1 or text.count(f"{FINAL}\n\n") != 1:
        return None
    before, final = text.split(f"{FINAL}\n\n")
    if THINKING not in before:
        return None
    return ParsedResponse(before.split(THINKING)[1].strip(), final.strip())


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None
) -> list[int]:
    """Token ids of a conversation that ends where the assistant begins to speak."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return render_messages(tokenizer, messages, add_generation_prompt=True)


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation under the tokenizer's chat template, or DEFAULT_TEMPLATE when it has none.

    Raises ValueError when the template does."""
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    try:
        text: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:  # some templates refuse a system turn in this way
        raise ValueError(f"the chat template refuses the conversation: {error}") from None
    return text


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids of the same."""
    text = render_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=False)


def render_example(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of a training conversation: what stands before the last, assistant's turn, and that turn.

    The two parts are encoded apart, as they are when the model answers. The turn ends with its end token and nothing
    after it; one is added when the template writes none. Raises ValueError when the last turn is not the assistant's or is
    blank, and when the template renders the earlier turns otherwise once an answer follows.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the last turn is not the assistant's")
    if not messages[-1]["content"].strip():
        raise ValueError("the assistant's turn is empty")
    prompt, whole = (
        render_text(tokenizer, messages[:-1], add_generation_prompt=True),
        render_text(tokenizer, messages),
    )
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template rewrites the prompt when an answer follows: the prompt is no prefix of the whole"
        )
    response = tokenizer.encode(whole[len(prompt) :], add_special_tokens=False)
    end_ids = _end_ids(tokenizer)
    ends = [n for n, token in enumerate(response) if token in end_ids]
    response = response[: ends[-1] + 1] if ends else [*response, tokenizer.eos_token_id]
    return tokenizer.encode(prompt, add_special_tokens=False), response


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    known = (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
    )  # Llama-3 and Qwen end turns by these
    ends = {tokenizer.eos_token_id}
    for token in known:  # not get_vocab: this runs for every row
        number = tokenizer.convert_tokens_to_ids(token)
        if isinstance(number, int) and tokenizer.convert_ids_to_tokens(number) == token:
            ends.add(number)
    return ends
