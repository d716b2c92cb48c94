"""Takes every item of a command through its calls: finished ones from the journal, failures kept with their reason."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..core.llm.client import LLM, BudgetSpent, LLMConfig, LLMError, gather_in_order
from ..core.llm.journal import Journal, content_key
from .asker import Asker
from .config import AskingConfig
from .parse import Fault
from .templates import Prompts

Item = TypeVar("Item")
Result = dict[str, Any]
Work = Callable[[Item, Asker, Sequence[LLM]], Awaitable[Result]]


def finish_items(
    config: AskingConfig,
    items: Sequence[Item],
    work: Work[Item],
    *,
    content: Callable[[Item], list[Any]],
    settings: list[Any],
    prompts: Prompts,
    resolved: dict[str, Any],
    others: Sequence[LLMConfig] = (),
) -> list[Result]:
    """A result for each item, in order: `outcome`, `trajectory` (the Asker's steps) and what `work` returns.

    outcome: that of `work`; "failed" with its `reason`; or "unreached" when the budget is spent. Equal content is worked on
    once. content, settings: what the result depends on, of the item and of the run. resolved: the configuration as plain
    values, for config.yaml. others: further models, whose clients `work` gets. Raises ValueError when the journal is in use
    or not to be gone on with, and when no call gets an answer.
    """
    models = [
        {"model": llm.model, "temperature": llm.temperature, "most": llm.max_new_tokens}
        for llm in (config.llm, *others)
    ]
    settings = [
        *settings,
        models,
        config.seed,
        config.max_asks,
        config.judge_temperature,
        prompts.digest,
    ]
    by_key = {content_key(settings, content(item)): item for item in items}
    for llm in (config.llm, *others):
        llm.api_key()  # a missing one is found before the folder is made
    with open_journal(config) as journal:
        settings_text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        journal.path.with_name("config.yaml").write_text(settings_text, encoding="utf-8")
        results = asyncio.run(
            _finish(config, by_key, work, prompts=prompts, others=others, journal=journal)
        )
    return [results[content_key(settings, content(item))] for item in items]


def open_journal(config: AskingConfig) -> Journal:
    """The journal in the output folder: gone on with, new, or a copy of another run's."""
    path = Path(config.output).expanduser() / "journal.jsonl"
    try:  # not checkpoint.prepare_output, which would bring torch along: two seconds of every start
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output {config.output}: cannot write there: {error.strerror}") from None
    if config.resume == "never" and path.exists():
        raise ValueError(
            f"output {config.output}: holds a journal already: choose another folder, or --resume auto"
        )
    if config.resume not in ("auto", "never"):
        other = Path(config.resume).expanduser() / "journal.jsonl"
        if not other.exists():
            raise ValueError(
                f"resume {config.resume}: no journal.jsonl there; give auto, never, or the folder of an earlier run"
            )
        if not path.exists():
            Path(shutil.copy(other, f"{path}.tmp")).replace(path)
    return Journal(path)


async def _finish(
    config: AskingConfig,
    by_key: dict[str, Item],
    work: Work[Item],
    *,
    prompts: Prompts,
    others: Sequence[LLMConfig],
    journal: Journal,
) -> dict[str, Result]:
    llms = [
        LLM(each, journal=journal, retry_failed=config.retry_failed)
        for each in (config.llm, *others)
    ]

    async def finish(key: str) -> Result:
        known = journal.get(key)
        if known is not None and not (known["outcome"] == "failed" and config.retry_failed):
            return known
        turn = (
            known["turn"] + 1 if known else 1
        )  # each --retry_failed allows as many asks again after those in the journal
        asker = Asker(
            llms[0],
            prompts,
            max_asks=config.max_asks * turn,
            judge_temperature=config.judge_temperature,
        )
        try:
            result = await work(by_key[key], asker, llms[1:])
        except (BudgetSpent, Fault, LLMError) as error:
            outcome = "unreached" if isinstance(error, BudgetSpent) else "failed"
            asker.close_step(outcome)
            result = {"outcome": outcome, "reason": str(error), "trajectory": asker.steps}
            if isinstance(
                error, LLMError
            ):  # the journal holds the call as failed, or says nothing as no server was reached
                for usage in [llm.usage for llm in llms]:
                    if (
                        usage.failures >= min(config.llm.concurrency, len(by_key))
                        and not usage.answers + usage.cached_calls
                    ):
                        raise ValueError(
                            f"none of the first {usage.failures} calls got an answer; the last: {error}"
                        ) from None
                await journal.record_error(key, str(error))
            if not isinstance(error, Fault):
                return result
            llms[0].usage.failures += 1
        result |= {"trajectory": asker.steps, "turn": turn}
        await journal.record(key, result)
        return result

    try:
        usage, at_once = llms[0].usage, config.llm.items_at_once
        results = await gather_in_order(
            list(by_key), finish, concurrency=at_once, progress="items", usage=usage
        )
    finally:
        for llm in llms:
            await llm.close()
    print(
        f"asked {sum(llm.usage.calls for llm in llms)} calls, {sum(llm.usage.cached_calls for llm in llms)} more were in the "
        f"journal; {sum(llm.usage.usd for llm in llms):.4f} USD in this run"
    )
    return dict(zip(by_key, results, strict=True))


def write_json(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON list, a row a line; written aside and renamed, so that a kill leaves the old file or the new one.

    Half characters (lone surrogates), which UTF-8 cannot hold, are written as JSON's escapes; what JSON has no type for, such
    as Parquet's dates, as text.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("[")
        for number, row in enumerate(rows):
            file.write(
                (",\n" if number else "\n") + json.dumps(row, ensure_ascii=False, default=str)
            )
        file.write("\n]\n")
    temporary.replace(path)
