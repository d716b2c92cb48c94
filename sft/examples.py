"""Tokenised training conversations, with a cache keyed by content."""

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

from ..core.text.chat import DEFAULT_TEMPLATE, TEMPLATE_DATE, render_example
from ..core.text.data import Purpose, load_rows
from ..core.training import dist
from .conversations import Columns, Turn, read_conversation


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tokenised conversation; the loss is taken over the response."""

    prompt_ids: Sequence[int] = field(repr=False)
    response_ids: Sequence[int] = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def load_examples(
    sources: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None,
    system: str | None,
    workers: int,
    columns: Columns = Columns(),  # noqa: B008 immutable
    purpose: Purpose = "train",
) -> list[Example]:
    """Reads and tokenises all rows of the sources, in order.

    Rows whose answer has weight 0 are left out; their number is printed.

    Args:
        sources: comma-separated files, folders or hub ids.
        tokenizer: its chat template renders the turns.
        limit: rows to read of each source; None for all.
        system: system turn of rows without one of their own.
        workers: processes that tokenise.
        columns: keys of question, reasoning and response.
        purpose: as for `load_rows`.

    Raises:
        ValueError: a row cannot be trained on; the message names the first one.
    """
    conversations = [
        read_conversation(row, where=f"data {sources}: row {n}", system=system, columns=columns)
        for n, row in enumerate(load_rows(sources, limit=limit, purpose=purpose))
    ]
    kept = {n: each.turns for n, each in enumerate(conversations) if not each.skipped}
    if dist.is_main():
        if num_skipped := len(conversations) - len(kept):
            print(f"{sources}: left out {num_skipped} rows whose answer has weight 0")
        if not any(each.has_thinking for each in conversations):
            print(
                f"note: no row of {sources} has {columns.thinking!r}: "
                "all answers are trained without reasoning"
            )
    tokenised = _tokenise(kept, tokenizer, sources=sources, workers=workers)
    return [
        Example(prompt_ids=row["prompt_ids"], response_ids=row["response_ids"]) for row in tokenised
    ]


def _tokenise(
    conversations: dict[int, list[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: str,
    workers: int,
) -> Any:
    """A `datasets` table of token ids, cached under a digest of everything it depends on."""
    import datasets

    datasets.disable_progress_bars()
    turns = [json.dumps(each) for each in conversations.values()]
    cache = _cache_folder(turns, tokenizer)
    # nodes may share a cache folder: then the first to finish wins
    if dist.local_rank() == 0 and not cache.exists():
        table = datasets.Dataset.from_dict({"turns": turns, "row": list(conversations)})
        table = table.map(
            _encode_row,
            fn_kwargs={"tokenizer": tokenizer, "sources": sources},
            num_proc=workers if workers > 1 else None,
            remove_columns=["turns", "row"],
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
    row: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sources: str,
) -> dict[str, list[int]]:
    try:
        prompt, response = render_example(tokenizer, json.loads(row["turns"]))
    except ValueError as error:
        raise ValueError(f"data {sources}: row {row['row']}: {error}") from None
    return {"prompt_ids": prompt, "response_ids": response}


def _cache_folder(turns: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    """Where the tokenised conversations are cached."""
    from datasets import config

    backend: Any = tokenizer.backend_tokenizer
    digest = hashlib.blake2b(digest_size=16)
    template = tokenizer.chat_template or DEFAULT_TEMPLATE
    for part in (
        backend.to_str(),
        json.dumps(template),
        str(tokenizer.eos_token),
        TEMPLATE_DATE.isoformat(),
        "2",
        *turns,
    ):
        digest.update(part.encode())
    folder = Path(config.HF_DATASETS_CACHE) / "verippo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"sft-{digest.hexdigest()}"
