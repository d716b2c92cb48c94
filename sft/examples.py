"""Training conversations: reading, checking and tokenising, with a cache keyed by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.text.chat import DEFAULT_TEMPLATE, render_example, render_response
from ..core.text.data import load_rows, text_field
from ..core.training import dist

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tokenised conversation; the loss is taken over the response."""

    prompt_ids: Sequence[int] = field(repr=False)
    response_ids: Sequence[int] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def conversation(
    row: dict[str, Any], *, where: str, system: str | None = None
) -> list[dict[str, str]]:
    """The turns of one row.

    A row holds `messages` (role, content), `conversations` (from, value), or Question,
    Complex_CoT and Response; a missing or blank Complex_CoT makes an answer without reasoning.

    Args:
        row: the row as loaded.
        where: source and row number, for errors.
        system: system turn put before a Question.

    Raises:
        ValueError: the row has none of these forms.
    """
    if "messages" in row or "conversations" in row:
        turns = row.get("messages") or row.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{where}: its turns are not a list of objects")
        return [_turn(turn, where=f"{where}, turn {n}") for n, turn in enumerate(turns)]
    question = text_field(row, "Question", where=where)
    final = text_field(row, "Response", where=where)
    thinking = row.get("Complex_CoT") or ""
    if not isinstance(thinking, str):
        raise ValueError(f"{where}: 'Complex_CoT' is {type(thinking).__name__}, expected text")
    messages = [{"role": "system", "content": system}] if system else []
    answer = render_response(thinking.strip(), final)
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _turn(turn: dict[str, Any], *, where: str) -> dict[str, str]:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        known = ", ".join(sorted(set(ROLES.values())))
        raise ValueError(f"{where}: needs a role of {known} and text content")
    return {"role": ROLES[role], "content": content}


def load_examples(
    sources: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    system: str | None,
    workers: int,
) -> list[Example]:
    """Reads and tokenises all rows of the sources, in order.

    Args:
        sources: comma-separated files, folders or hub ids.
        tokenizer: its chat template renders the turns.
        limit: rows to read of each source; None for all.
        system: system turn put before every Question.
        workers: processes that tokenise.

    Raises:
        ValueError: a row cannot be trained on; the message names the first one.
    """
    conversations = [
        conversation(row, where=f"data {sources}: row {n}", system=system)
        for n, row in enumerate(load_rows(sources, limit=limit))
    ]
    for n, messages in enumerate(conversations):  # before any worker process starts
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"data {sources}: row {n}: the last turn is not the assistant's")
        if not messages[-1]["content"].strip():
            raise ValueError(f"data {sources}: row {n}: the assistant's turn is empty")
    tokenised = _tokenise(conversations, tokenizer, sources=sources, workers=workers)
    return [
        Example(prompt_ids=row["prompt_ids"], response_ids=row["response_ids"]) for row in tokenised
    ]


def _tokenise(
    conversations: list[list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: str,
    workers: int,
) -> Any:
    """A `datasets` table of token ids, cached under a digest of everything it depends on."""
    import datasets

    datasets.disable_progress_bars()
    cache = _cache_folder(conversations, tokenizer)
    # nodes may share a cache folder: then the first to finish wins
    if dist.local_rank() == 0 and not cache.exists():
        table = datasets.Dataset.from_dict(
            {"turns": [json.dumps(turns) for turns in conversations]}
        )
        table = table.map(
            _encode_row,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "sources": sources},
            num_proc=workers if workers > 1 else None,
            remove_columns=["turns"],
            keep_in_memory=True,
            new_fingerprint=cache.name,
        )
        temporary = cache.with_name(f".{cache.name}-{os.getpid()}")
        table.save_to_disk(str(temporary))
        try:
            temporary.rename(cache)
        except OSError:  # another process finished first
            shutil.rmtree(temporary)
    dist.barrier()
    return datasets.load_from_disk(str(cache))


def _encode_row(
    row: dict[str, str],
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    sources: str,
) -> dict[str, list[int]]:
    try:
        prompt, response = render_example(tokenizer, json.loads(row["turns"]))
    except ValueError as error:
        raise ValueError(f"data {sources}: row {index}: {error}") from None
    return {"prompt_ids": prompt, "response_ids": response}


def _cache_folder(
    conversations: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Where the tokenised conversations are cached."""
    from datasets import config

    backend: Any = tokenizer.backend_tokenizer
    digest = hashlib.blake2b(digest_size=16)
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    for part in (
        backend.to_str(),
        json.dumps(template),
        str(tokenizer.eos_token),
        "1",
    ):
        digest.update(part.encode())
    for turns in conversations:
        digest.update(json.dumps(turns).encode())
    folder = Path(config.HF_DATASETS_CACHE) / "verippo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"sft-{digest.hexdigest()}"
