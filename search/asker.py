"""Asks an LLM until a parser accepts its reply, and records every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.verifier_text import after_thought
from .parse import UnusableReply
from .results import Call, TrajectoryStep
from .templates import Prompts

Value = TypeVar("Value")

CUT_OFF = "it is cut off, as it is too long"
DRAW_STRIDE = 1 << 16
"""Distance between the draw numbers of equal prompts, so that those of their tries do not meet."""


class Asker:
    """Asks on behalf of one item, whose trajectory it records in `steps`."""

    def __init__(
        self,
        llm: LLM,
        prompts: Prompts,
        *,
        max_asks: int,
        judge_temperature: float,
    ) -> None:
        self.llm = llm
        self.prompts = prompts
        self.max_asks = max_asks
        self.judge_temperature = judge_temperature
        self.steps: list[TrajectoryStep] = []
        self._calls: list[Call] = []

    def close_step(self, strategy: str, **facts: Any) -> None:
        """Ends a step: the calls since the last one belong to it; `facts` as in TrajectoryStep."""
        self.steps.append(TrajectoryStep(strategy=strategy, calls=self._calls, **facts))
        self._calls = []

    async def ask(
        self,
        name: str,
        values: dict[str, Any],
        parse: Callable[[str], Value],
        *,
        draw: int = 0,
        schema: dict[str, Any] | None = None,
        judging: bool = False,
        llm: LLM | None = None,
    ) -> Value:
        """Asks until the reply can be parsed, naming the fault of the reply before.

        Args:
            name: name of the prompt.
            values: variables of its template.
            parse: turns a reply into the wanted value or raises UnusableReply.
            draw: distinguishes equal prompts that need independent replies.
            schema: JSON schema of the reply, for servers that can enforce one.
            judging: whether `judge_temperature` applies.
            llm: another model than the item's.

        Returns:
            What `parse` returned.

        Raises:
            UnusableReply: none of `max_asks` replies could be parsed.
            LLMError: as LLM.ask.
        """
        llm = llm or self.llm
        prompt = self.prompts.render(name, **values)
        temperature = self.judge_temperature if judging else None
        call = Call(name, llm.config.model, content_key(prompt))
        self._calls.append(call)
        text = prompt
        fault = ""
        for number in range(self.max_asks):
            # always a single user turn: some chat templates refuse two in a row
            message = {"role": "user", "content": text}
            place = draw * DRAW_STRIDE + number
            reply = await llm.ask([message], draw=place, schema=schema, temperature=temperature)
            call.prompt_tokens += reply.prompt_tokens
            call.completion_tokens += reply.completion_tokens
            cut = reply.finish_reason == "length"
            try:
                value = parse(after_thought(reply.text))
                # prose after a whole JSON object or verdict may be cut off
                if not cut or schema or judging:
                    return value
                fault = CUT_OFF
            except UnusableReply as error:
                fault = f"{CUT_OFF} ({error})" if cut else str(error)
            call.faults.append(fault)
            text = f"{prompt}\n\n{self.prompts.render('reask', fault=fault)}"
        raise UnusableReply(f"{name}: {fault} ({self.max_asks} asks)")
