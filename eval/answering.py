"""Asks the questions: the prompts, and the engines that answer them. Every answer is journaled; none is asked for twice."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..core.llm.client import LLM, BudgetSpent, LLMConfig, LLMError, gather_in_order
from ..core.llm.journal import Journal, content_key
from ..core.sampling.sampler import Prompt, SamplingParams, draw_seed
from ..core.sampling.server import serving
from ..core.text.chat import render_messages, render_text
from .config import EvalConfig
from .questions import Question, permutation, permuted

ANSWER_SENTENCE = 'End with the sentence "The answer is A.", with the letter of the option you chose in place of A.'
PROMPTS = {
    "free": "Here is a multiple-choice question. Which option is right?\n\n{question}\n\n{options}",
    "strict": "Here is a multiple-choice question. Which option is right?\n"
    + ANSWER_SENTENCE
    + "\n\n{question}\n\n{options}",
    "thinking": "Here is a multiple-choice question. Which option is right?\nReason about it under the heading "
    "`## Thinking`. Then write your answer under the heading `## Final Response`.\n"
    + ANSWER_SENTENCE
    + "\n\n{question}\n\n{options}",
}


class Case(NamedTuple):
    """One thing to ask."""

    question: Question
    """as it is asked: of a permutation, with its options in that order"""
    run: int
    permutation: int
    """0: the options as they stand in the file"""
    back: dict[str, str]
    """letter as asked -> letter of the file"""
    seed: int
    """31 bits, which every server takes"""


class Answer(NamedTuple):
    """What came of it: a text, which may be empty, or the error that ended the last try."""

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str | None = None


def make_cases(
    questions: Sequence[Question], *, runs: int, permutations: int, seed: int
) -> list[Case]:
    """Every question in every order and run. A case's draws depend on (seed, item, run, permutation) and nothing else."""
    cases = []
    for question in questions:
        item = int(content_key(question.source, question.id)[:15], 16)
        for order in range(permutations + 1):
            order_seed = draw_seed(seed, item, order)
            shown = permuted(question, order_seed) if order else question
            back = (
                permutation(question, order_seed)
                if order
                else {letter: letter for letter in question.options}
            )
            cases += [
                Case(shown, run, order, back, draw_seed(seed, item, run, order) >> 32)
                for run in range(runs)
            ]
    return cases


def messages(question: Question, *, prompt: str, system: str | None) -> list[dict[str, str]]:
    """The conversation that asks the question."""
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    # not str.format: a question may hold braces
    text = (
        PROMPTS[prompt].replace("{options}", options, 1).replace("{question}", question.question, 1)
    )
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": text},
    ]


def check_weights(journal: Journal, model: str) -> None:
    """Raises ValueError when the journal's answers come from other weights in the same folder: resume would mix the two."""
    files = (
        sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]) if model else []
    )
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    found, key = content_key(facts), content_key("weights", model)
    if journal.get(key) not in (None, found):
        raise ValueError(
            f"model {model}: its weights have changed since the answers in the journal: choose another --output"
        )
    if journal.get(key) is None:
        asyncio.run(journal.record(key, found))


def ask(
    config: EvalConfig,
    cases: Sequence[Case],
    journal: Journal,
    done: Callable[[Case, Answer], None],
) -> list[Answer]:
    """An answer for each case, in order; `done` hears of each as it comes."""
    if config.engine == "local":
        return _ask_local(config, cases, journal, done)
    with _server(config) as client:
        return asyncio.run(_ask_server(config, client, cases, journal, done))


@contextmanager
def _server(config: EvalConfig) -> Iterator[LLMConfig]:
    """The client of a running server, or of one of our own that is stopped at the end, however it comes."""
    if config.engine == "openai":
        yield config.client
        return
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # what ends a batch job must stop the server too
    options = replace(config.server, model=config.model)
    key = {
        name: getattr(options, name)
        for name in ("api_key_env", "api_key_file")
        if getattr(options, name)
    }
    print(f"starting a server of {config.model}")
    with serving(options) as server:
        yield replace(config.client, base_url=f"{server.url}/v1", **key)


async def _ask_server(
    config: EvalConfig,
    client: LLMConfig,
    cases: Sequence[Case],
    journal: Journal,
    done: Callable[[Case, Answer], None],
) -> list[Answer]:
    from ..core.training.model import load_tokenizer

    tokenizer = load_tokenizer(config.model) if config.endpoint == "completions" else None
    llm = LLM(client, journal=journal, retry_failed=config.retry_failed, may_be_empty=True)
    num_failed = num_answered = 0

    async def work(case: Case) -> Answer:
        nonlocal num_failed, num_answered
        conversation = messages(case.question, prompt=config.prompt, system=config.system_prompt)
        draw: dict[str, Any] = {"draw": case.run, "seed": case.seed, "top_p": config.nucleus}
        try:
            if tokenizer is None:
                reply = await llm.ask(conversation, **draw)
            else:
                reply = await llm.complete(prompt_text(tokenizer, conversation), **draw)
            answer = Answer(reply.text, reply.finish_reason, reply.completion_tokens)
            num_answered += 1
        except LLMError as error:
            num_failed += 1
            if num_failed == min(client.concurrency, len(cases)) and not num_answered:
                raise ValueError(
                    f"none of the first {num_failed} calls got an answer; the last: {error}"
                ) from None
            answer = Answer(error=str(error))
        except BudgetSpent as error:
            raise ValueError(f"stopped after {num_answered} answers: {error}") from None
        done(case, answer)
        return answer

    try:
        answers = await gather_in_order(cases, work, concurrency=client.items_at_once)
    finally:
        await llm.close()
    usage = llm.usage
    print(
        f"asked {usage.calls} calls, {usage.cached_calls} more were in the journal; {usage.usd:.4f} USD in this run"
    )
    return answers


def prompt_text(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    """The conversation under the chat template, so that the server's tokenizer reads the ids that training used: a begin
    token that this tokenizer sets before every text is left to it."""
    text, begin = (
        render_text(tokenizer, conversation, add_generation_prompt=True),
        tokenizer.bos_token,
    )
    if (
        begin
        and text.startswith(begin)
        and tokenizer.encode(text)[:2] == [tokenizer.bos_token_id] * 2
    ):
        return text[len(begin) :]
    return text


def _ask_local(
    config: EvalConfig,
    cases: Sequence[Case],
    journal: Journal,
    done: Callable[[Case, Answer], None],
) -> list[Answer]:

    from ..core.sampling.local_sampler import LocalSampler
    from ..core.training import dist
    from ..core.training.model import (
        check_embedding,
        context_length,
        load_causal_lm,
        load_tokenizer,
        stop_token_ids,
    )

    tokenizer: Any = load_tokenizer(config.model)
    hf: Any = load_causal_lm(config.model, dtype=config.dtype)
    check_embedding(hf.config, tokenizer, config.model)
    stops = stop_token_ids(config.model, tokenizer)
    sampler = LocalSampler(hf.to(dist.device()), stop_token_ids=stops, max_batch=config.max_batch)
    params = SamplingParams(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    room = (context_length(hf.config) or 1 << 60) - config.max_new_tokens
    answers: list[Answer] = []

    for start in range(0, len(cases), 4 * config.max_batch):  # what a kill may lose
        chunk = cases[start : start + 4 * config.max_batch]
        found: dict[int, Answer] = {}
        waiting: dict[int, tuple[str, Prompt]] = {}
        for n, case in enumerate(chunk):
            conversation = messages(
                case.question, prompt=config.prompt, system=config.system_prompt
            )
            ids = render_messages(tokenizer, conversation, add_generation_prompt=True)
            key = content_key(
                "local",
                config.model,
                config.dtype,
                ids,
                case.seed,
                config.temperature,
                config.max_new_tokens,
            )
            if len(ids) > room:
                found[n] = Answer(
                    error=f"{len(ids)} tokens of prompt leave no room for max_new_tokens={config.max_new_tokens}"
                )
            elif (recorded := journal.get(key)) is not None:
                found[n] = Answer(**recorded)
            else:
                waiting[n] = key, Prompt(token_ids=ids, seed=case.seed)
        completions = sampler.generate([prompt for _, prompt in waiting.values()], params)
        for n, completion in zip(waiting, completions, strict=True):
            text = tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
            found[n] = Answer(text, completion.finish_reason, len(completion.token_ids))
        asyncio.run(_record(journal, {key: found[n] for n, (key, _) in waiting.items()}))
        for n, case in enumerate(chunk):
            done(case, found[n])
        answers += [found[n] for n in range(len(chunk))]
    return answers


async def _record(journal: Journal, answers: dict[str, Answer]) -> None:
    await asyncio.gather(
        *(journal.record(key, answer._asdict()) for key, answer in answers.items())
    )
