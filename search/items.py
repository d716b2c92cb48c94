"""Works on every item of a command, resuming from the journal and keeping failures with reasons."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from ..core.llm.client import LLM, BudgetSpent, LLMConfig, LLMError, gather_in_order
from ..core.llm.journal import Journal, content_key
from .asker import Asker
from .config import AskingConfig
from .parse import UnusableReply
from .results import ItemResult
from .templates import Prompts

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Work(Generic[Item]):
    """What a command does with an item, and what the result depends on."""

    run: Callable[[Item, Asker, Sequence[LLM]], Awaitable[ItemResult]]
    """Works on an item; the last argument holds the clients of `others`."""
    content: Callable[[Item], list[Any]]
    """Parts of the item on which the result depends; items of equal content share a result."""
    settings: list[Any]
    """Settings of the run on which the result depends."""
    prompts: Prompts
    others: Sequence[LLMConfig] = field(default=())
    """Further models."""


def finish_items(
    config: AskingConfig,
    items: Sequence[Item],
    work: Work[Item],
    *,
    resolved: dict[str, Any],
) -> list[ItemResult]:
    """Works on all items, except those that the journal holds.

    Args:
        config: the command's configuration.
        items: what to work on.
        work: what to do with each.
        resolved: the configuration as plain values, for config.yaml.

    Returns:
        A result for each item, in order; "failed" or "unreached" with a reason where an item could
        not be finished.

    Raises:
        ValueError: the journal is in use or of other settings, or no call gets an answer.
    """
    models = [
        {"model": llm.model, "temperature": llm.temperature, "most": llm.max_new_tokens}
        for llm in (config.llm, *work.others)
    ]
    asking = [config.seed, config.max_asks, config.judge_temperature, work.prompts.digest]
    settings = [*work.settings, models, *asking]
    by_key = {content_key(settings, work.content(item)): item for item in items}
    for llm in (config.llm, *work.others):
        llm.api_key()  # raises for a missing one before the folder is made
    with open_journal(config) as journal:
        settings_text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        journal.path.with_name("config.yaml").write_text(settings_text, encoding="utf-8")
        results = asyncio.run(_finish_all(config, by_key, work, journal))
    return [results[content_key(settings, work.content(item))] for item in items]


def open_journal(config: AskingConfig) -> Journal:
    """The journal in the output folder: an existing one, a new one, or a copy of another run's."""
    path = Path(config.output).expanduser() / "journal.jsonl"
    try:  # not checkpoint.prepare_output, which imports torch and so takes seconds
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {config.output}: cannot write there: {error.strerror}") from None
    if config.resume == "never" and path.exists():
        raise ValueError(
            f"output {config.output}: holds a journal already: choose another folder, or "
            "--resume auto"
        )
    if config.resume not in ("auto", "never"):
        other = Path(config.resume).expanduser() / "journal.jsonl"
        if not other.exists():
            raise ValueError(
                f"resume {config.resume}: no journal.jsonl there; give auto, never, or the folder "
                "of an earlier run"
            )
        if not path.exists():
            Path(shutil.copy(other, f"{path}.tmp")).replace(path)
    return Journal(path)


async def _finish_all(
    config: AskingConfig,
    by_key: dict[str, Item],
    work: Work[Item],
    journal: Journal,
) -> dict[str, ItemResult]:
    llms = [
        LLM(each, journal=journal, retry_failed=config.retry_failed)
        for each in (config.llm, *work.others)
    ]

    async def finish(key: str) -> ItemResult:
        return await _finish_one(config, key, by_key[key], work, journal, llms, len(by_key))

    try:
        results = await gather_in_order(
            list(by_key),
            finish,
            concurrency=config.llm.items_at_once,
            progress="items",
            usage=llms[0].usage,
        )
    finally:
        for llm in llms:
            await llm.close()
    calls = sum(llm.usage.calls for llm in llms)
    cached = sum(llm.usage.cached_calls for llm in llms)
    usd = sum(llm.usage.usd for llm in llms)
    print(f"made {calls} calls, {cached} more were in the journal; {usd:.4f} USD in this run")
    return dict(zip(by_key, results, strict=True))


async def _finish_one(
    config: AskingConfig,
    key: str,
    item: Item,
    work: Work[Item],
    journal: Journal,
    llms: list[LLM],
    num_items: int,
) -> ItemResult:
    known = journal.get_as(key, ItemResult.from_json)
    if known and not (known.outcome == "failed" and config.retry_failed):
        return known
    # each --retry_failed allows as many further asks as the first turn had
    turn = known.turn + 1 if known else 1
    asker = Asker(
        llms[0],
        work.prompts,
        max_asks=config.max_asks * turn,
        judge_temperature=config.judge_temperature,
    )
    try:
        result = await work.run(item, asker, llms[1:])
    except (BudgetSpent, UnusableReply, LLMError) as error:
        outcome = "unreached" if isinstance(error, BudgetSpent) else "failed"
        asker.close_step(outcome)
        result = ItemResult(
            outcome=outcome,
            reason=str(error),
            trajectory=asker.steps,
            turn=turn,
        )
        if isinstance(error, LLMError):
            _check_any_answer(config, llms, num_items, error)
            await journal.record_error(key, str(error))
        if not isinstance(error, UnusableReply):
            return result  # the call is journaled as failed, or no server was reached
        llms[0].usage.failures += 1
    result = replace(result, trajectory=asker.steps, turn=turn)
    await journal.record(key, result.to_json())
    return result


def _check_any_answer(
    config: AskingConfig,
    llms: list[LLM],
    num_items: int,
    error: LLMError,
) -> None:
    """Raises ValueError when the first calls of a model all failed."""
    enough = min(config.llm.concurrency, num_items)
    for usage in [llm.usage for llm in llms]:
        if usage.failures >= enough and not usage.answers + usage.cached_calls:
            raise ValueError(
                f"none of the first {usage.failures} calls got an answer; the last: {error}"
            ) from None


def write_json(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a JSON list, a row per line, to a temporary file that is then renamed.

    Unpaired surrogates, which UTF-8 cannot hold, are written as JSON escapes; values without a
    JSON type, such as Parquet's dates, as text.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("[")
        for number, row in enumerate(rows):
            text = json.dumps(row, ensure_ascii=False, default=str)
            file.write((",\n" if number else "\n") + text)
        file.write("\n]\n")
    temporary.replace(path)
