"""Chat templates, and the text of an answer that thinks first. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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


def render_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None) -> list[int]:
    """Token ids of a conversation that ends where the assistant begins to speak."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return render_messages(tokenizer, messages, add_generation_prompt=True)


def render_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, or DEFAULT_TEMPLATE when it has none."""
    template = None if tokenizer.chat_template else DEFAULT_TEMPLATE
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return tokenizer.encode(text, add_special_tokens=False)
