"""Chat templates, and the format of an answer with a thinking part."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from .encoding import encode, protect, split_at_special

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

TEMPLATE_DATE = datetime(2026, 1, 1)
"""Today, to templates that write the date: the same in every run, so that equal conversations have
equal token ids on any day."""
_DATE_CODES = {f"%{code}": TEMPLATE_DATE.strftime(f"%{code}") for code in "aAbBcdfHIjmMpSxXyY"}
# a macro, since transformers gives its own function this name and passes on plain data alone
_FIXED_DATE = """\
{%- macro strftime_now(format) -%}
{%- set date = namespace(text=format) -%}
{%- for code, text in date_codes.items() -%}
{%- set date.text = date.text.replace(code, text) -%}
{%- endfor -%}
{{- date.text -}}
{%- endmacro -%}
"""
THOUGHT_KEYS = ("reasoning_content", "thinking")
"""Keys of a message under which some templates expect the thinking part of an answer."""


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
        ValueError: the chat template refuses the conversation, or leaves out a part of it.
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

    Special tokens in the messages are replaced by codes: see `encoding.protect`.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation, each with role and content.
        add_generation_prompt: whether the text ends with the beginning of an assistant's turn.

    Raises:
        ValueError: the chat template refuses the conversation, or leaves out a part of it.
    """
    messages = [
        {key: part if key == "role" else protect(tokenizer, part) for key, part in message.items()}
        for message in messages
    ]
    try:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE
        text: Any = tokenizer.apply_chat_template(
            messages,
            chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_codes=_DATE_CODES,
        )
    except Exception as error:  # such as one without a system turn, or a fault of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template refuses the conversation: {reason}") from None
    _check_complete(text, messages)
    return text


def _check_complete(text: str, messages: list[dict[str, str]]) -> None:
    """Checks that the rendered text holds every message.

    Templates may drop the thoughts of earlier answers, as they do when the model is used.
    """
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number < len(messages) - 1:
            continue
        for key, part in message.items():
            if key != "role" and part.strip() not in text:
                raise ValueError(
                    f"the chat template drops or rewrites part of the {message['role']} turn "
                    f"({key} {part.strip()[:40]!r})"
                )


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Token ids of the text that `render_text` writes."""
    text = render_text(tokenizer, messages, add_generation_prompt=add_generation_prompt)
    return encode(tokenizer, text)


def render_next_turn(
    tokenizer: PreTrainedTokenizerBase, content: str, *, role: str = "user"
) -> list[int]:
    """Token ids that follow an assistant's turn: a message, and the beginning of the next answer.

    The special token that ends the assistant's turn is not among them: a sampled turn has it.

    Args:
        tokenizer: the model's tokenizer.
        content: the message.
        role: who speaks: "user", or "tool" where the chat template knows it.

    Raises:
        ValueError: the chat template refuses the conversation, or leaves out a part of it.
    """
    answer = "\ufdd3"  # a noncharacter, which neither templates nor messages hold
    messages = [
        {"role": "user", "content": "Question"},
        {"role": "assistant", "content": answer},
        {"role": role, "content": content},
    ]
    text = render_text(tokenizer, messages, add_generation_prompt=True)
    _, found, after = text.rpartition(answer)
    if not found:
        raise ValueError("the chat template drops the assistant's turn before another one")
    ending, special = split_at_special(tokenizer, after)
    if special is not None and special == end_of_turn_id(tokenizer):
        token: Any = tokenizer.convert_ids_to_tokens(special)
        after = after[len(ending) + len(token) :]
    return encode(tokenizer, after)


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, so that the answer begins in it."""
    return prompt.rstrip().endswith("<think>")


def render_example(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids of a training conversation.

    The two parts are encoded separately, as they are when the model answers.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation; the last message is the assistant's. It may have its thinking
            part under one of THOUGHT_KEYS, for templates that read it.

    Returns:
        The ids before the last turn, and those of the last turn. These end with the special token
        that the template writes after the content, or with the end-of-sequence token if it writes
        none.

    Raises:
        ValueError: the last turn is not the assistant's or is blank, the template leaves out a part
            of the conversation, or it renders the earlier turns differently when an answer follows.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the last turn is not the assistant's")
    content = messages[-1]["content"]
    if not content.strip():
        raise ValueError("the assistant's turn is empty")
    prompt = render_text(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = render_text(tokenizer, messages)
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template rewrites the prompt when an answer follows: "
            "the prompt is not a prefix of the conversation"
        )
    content = protect(tokenizer, content).strip()
    # the prompt may hold the content's first characters, such as <think>
    start = whole.find(content, max(0, len(prompt) - len(content) + 1))
    if start < 0:
        raise ValueError("the chat template writes the assistant's turn before its place")
    end = start + len(content)
    ending, end_id = split_at_special(tokenizer, whole[end:])
    if end_id is None:
        eos: Any = tokenizer.eos_token_id
        end_id = eos
    response = encode(tokenizer, whole[len(prompt) : end] + ending)
    return encode(tokenizer, prompt), [*response, end_id]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token with which a rendered answer ends, and so an answer of a trained model."""
    question = {"role": "user", "content": "Question"}
    return render_example(tokenizer, [question, {"role": "assistant", "content": "Answer"}])[1][-1]
