"""Asks a model the questions, through a server or in this process, and journals every answer."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.llm.client import LLM, BudgetSpent, LLMConfig, LLMError, gather_in_order
from ..core.llm.journal import Journal, content_key
from ..core.sampling.sampler import Completion, Prompt, SamplingParams
from ..core.sampling.server import serving
from ..core.text.chat import opens_thought, render_text
from ..core.text.encoding import decode, encode, is_protected, special_ids
from ..core.text.stop_tokens import server_stop_ids, stop_token_ids
from .asked_questions import Answer, AskedQuestion, OnAnswer, OnReady, build_messages
from .config import EvalConfig


def check_weights(journal: Journal, model: str) -> None:
    """Checks that the weights have not changed since the journal was begun.

    Args:
        journal: Journal of answers, in which the first call records the state of the weights.
        model: Folder of the model; anything else has no files to check.

    Raises:
        ValueError: a file of weights has another size or modification time than recorded.
    """
    folder = Path(model)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if model else []
    states = [(file, file.stat()) for file in files]
    found = content_key([(file.name, state.st_size, state.st_mtime_ns) for file, state in states])
    key = content_key("weights", model)
    recorded = journal.get(key)
    if recorded is None:
        asyncio.run(journal.record(key, found))
    elif recorded != found:
        raise ValueError(
            f"model {model}: its weights have changed since the answers in the journal: "
            "choose another --output"
        )


def ask(
    config: EvalConfig,
    asked: Sequence[AskedQuestion],
    journal: Journal,
    on_answer: OnAnswer,
    on_ready: OnReady,
) -> list[Answer]:
    """Answers the questions with the configured engine.

    Args:
        config: The evaluation's configuration.
        asked: Questions to ask.
        journal: Journal of answers; a question whose answer it holds is not asked again.
        on_answer: Called with each answer as it arrives.
        on_ready: Called once model and prompts are checked.

    Returns:
        One answer for each question, in order.

    Raises:
        ValueError: the model or a prompt cannot be used, the server answered none of the first
            calls, or the budget is spent.
    """
    if config.engine == "local":
        return _ask_local(config, asked, journal, on_answer, on_ready)
    prompts = _server_prompts(config, asked)
    with _server(config) as client:
        client.api_key()  # raises for a missing one
        on_ready()
        return asyncio.run(_ask_server(config, client, asked, prompts, journal, on_answer))


@contextmanager
def _server(config: EvalConfig) -> Iterator[LLMConfig]:
    """Yields the client's configuration; engine serve runs a server until the context ends."""
    if config.engine == "openai":
        yield config.client
        return
    # batch systems end a job with SIGTERM; exiting normally stops the server too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = replace(config.server, model=config.model)
    names = ("api_key_env", "api_key_file")
    keys = {name: getattr(options, name) for name in names if getattr(options, name)}
    print(f"starting a server for {config.model}")
    with serving(options) as server:
        yield replace(config.client, base_url=f"{server.url}/v1", **keys)


@dataclass(frozen=True)
class _ServerPrompts:
    """What is sent to a server."""

    texts: Sequence[str]
    """Rendered prompts; empty where the server applies its own template."""
    bodies: Sequence[str | list[int]]
    """The same, by `server_prompt`."""
    extra: dict[str, Any]
    """Further fields of each request."""


def _server_prompts(config: EvalConfig, asked: Sequence[AskedQuestion]) -> _ServerPrompts:
    from ..core.training.pretrained import has_tokenizer, load_tokenizer

    completes = config.endpoint == "completions"
    if not completes and not (config.engine == "serve" and has_tokenizer(config.model)):
        return _ServerPrompts([], [], {})
    tokenizer: Any = load_tokenizer(config.model)
    texts = [_rendered(config, item, tokenizer) for item in asked] if completes else []
    bodies = [server_prompt(tokenizer, text) for text in texts]
    return _ServerPrompts(texts, bodies, server_fields(config.model, tokenizer))


def _rendered(config: EvalConfig, item: AskedQuestion, tokenizer: Any) -> str:
    """The prompt by the model's chat template; errors name the item and the model."""
    question = item.question
    try:
        messages = build_messages(config, question)
        return render_text(tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{question.where}: model {config.model}: {error}") from None


async def _ask_server(
    config: EvalConfig,
    client: LLMConfig,
    asked: Sequence[AskedQuestion],
    prompts: _ServerPrompts,
    journal: Journal,
    on_answer: OnAnswer,
) -> list[Answer]:
    llm = LLM(client, journal=journal, retry_failed=config.retry_failed, may_be_empty=True)
    num_first = min(client.concurrency, len(asked))
    finished: list[Answer] = []

    async def answer_one(number: int) -> Answer:
        item = asked[number]
        draw: dict[str, Any] = {
            "draw": item.run,
            "seed": item.seed,
            "top_p": config.nucleus,
            "extra": prompts.extra,
        }
        try:
            if prompts.texts:
                text = prompts.texts[number]
                reply = await llm.complete(prompts.bodies[number], **draw)
            else:
                text = ""
                reply = await llm.ask(build_messages(config, item.question), **draw)
            output = with_open_thought(text, reply.text)
            answer = Answer(output, reply.finish_reason, reply.completion_tokens)
        except LLMError as error:
            answer = Answer(error=str(error))
        except BudgetSpent as error:
            num_answers = sum(not each.error for each in finished)
            raise ValueError(f"stopped after {num_answers} answers: {error}") from None
        finished.append(answer)
        if len(finished) == num_first and all(each.error for each in finished):
            raise ValueError(
                f"none of the first {num_first} calls got an answer; last error: {answer.error}"
            )
        on_answer(item, answer)
        return answer

    try:
        answers = await gather_in_order(
            range(len(asked)), answer_one, concurrency=client.items_at_once
        )
    finally:
        await llm.close()
    usage = llm.usage
    print(
        f"made {usage.calls} calls, {usage.cached_calls} more were in the journal; "
        f"{usage.usd:.4f} USD in this run"
    )
    return answers


def server_fields(model: str, tokenizer: Any) -> dict[str, Any]:
    """Lists the request fields that a server needs to end and decode the model's answers correctly.

    Args:
        model: Folder or hub id of the model.
        tokenizer: The model's tokenizer.

    Returns:
        Fields that sglang and vLLM know; empty for most models.
    """
    fields: dict[str, Any] = {}
    if own := {*stop_token_ids(model, tokenizer)} - server_stop_ids(model, tokenizer):
        fields["stop_token_ids"] = sorted(own)
    if "</think>" in special_ids(tokenizer):
        fields["skip_special_tokens"] = False
    return fields


def server_prompt(tokenizer: Any, text: str) -> str | list[int]:
    """Converts a rendered prompt to a form that a server reads as the token ids used in training.

    Args:
        tokenizer: The model's tokenizer.
        text: The prompt, from `render_text`.

    Returns:
        The text, without its begin token if the tokenizer adds one to every text; or the ids
        themselves if the question contains strings of special tokens.
    """
    if is_protected(text):
        return encode(tokenizer, text)
    doubled = tokenizer.encode(text)[:2] == [tokenizer.bos_token_id] * 2
    return text.removeprefix(tokenizer.bos_token) if doubled else text


def with_open_thought(prompt: str, output: str) -> str:
    """Prepends `<think>` to the output if the prompt ends with one.

    Without it, truncated reasoning could not be told from an answer.

    Args:
        prompt: The rendered prompt.
        output: The model's output.
    """
    return f"<think>\n{output}" if opens_thought(prompt) else output


def _ask_local(
    config: EvalConfig,
    asked: Sequence[AskedQuestion],
    journal: Journal,
    on_answer: OnAnswer,
    on_ready: OnReady,
) -> list[Answer]:
    from ..core.sampling.local_sampler import LocalSampler, check_sampling
    from ..core.training import dist, pretrained

    tokenizer: Any = pretrained.load_tokenizer(config.model)
    network: Any = pretrained.load_causal_lm(config.model, dtype=config.dtype)
    pretrained.check_embedding(network.config, tokenizer, config.model)
    check_sampling(network.config, config.model)
    params = SamplingParams(temperature=config.temperature, max_new_tokens=config.max_new_tokens)
    room = (pretrained.context_length(network.config) or sys.maxsize) - config.max_new_tokens
    answers: dict[int, Answer] = {}
    waiting: list[_LocalRequest] = []

    def finish(place: int, answer: Answer) -> None:
        answers[place] = answer
        on_answer(asked[place], answer)

    def on_completion(number: int, completion: Completion) -> None:
        request = waiting[number]
        ids = list(completion.token_ids)
        output = with_open_thought(request.text, decode(tokenizer, ids))
        answer = Answer(output, completion.finish_reason, len(ids))
        asyncio.run(journal.record(request.key, vars(answer)))
        finish(request.place, answer)

    requests = list(_local_requests(config, asked, tokenizer))
    on_ready()
    for request in requests:
        num_tokens = len(request.prompt.token_ids)
        if num_tokens > room:
            error = (
                f"{num_tokens} tokens of prompt leave no room for "
                f"max_new_tokens={config.max_new_tokens}"
            )
            finish(request.place, Answer(error=error))
        elif recorded := journal.get_as(request.key, Answer.from_json):
            finish(request.place, recorded)
        else:
            waiting.append(request)
    sampler = LocalSampler(
        network.to(dist.device()),
        stop_token_ids=stop_token_ids(config.model, tokenizer),
        max_batch=config.max_batch,
        on_completion=on_completion,
    )
    sampler.generate([request.prompt for request in waiting], params)
    return [answers[place] for place in range(len(asked))]


@dataclass(frozen=True)
class _LocalRequest:
    """A question for the local engine."""

    place: int
    """Its number among the questions asked."""
    key: str
    """Key of its answer in the journal."""
    text: str
    """The rendered prompt."""
    prompt: Prompt


def _local_requests(
    config: EvalConfig, asked: Sequence[AskedQuestion], tokenizer: Any
) -> Iterator[_LocalRequest]:
    settings = (config.temperature, config.max_new_tokens)
    for place, item in enumerate(asked):
        text = _rendered(config, item, tokenizer)
        ids = encode(tokenizer, text)
        key = content_key("local", config.model, config.dtype, ids, item.seed, *settings)
        yield _LocalRequest(place, key, text, Prompt(token_ids=ids, seed=item.seed))
