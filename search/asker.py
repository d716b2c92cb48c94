"""Asks an LLM until a parser accepts its reply, and records every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.llm.transport import Reply
from ..core.text.verifier_text import after_thought
from .parse import ImprovableReply, UnusableReply
from .results import KEPT, Call, TrajectoryStep
from .templates import Prompts

Value = TypeVar("Value")

MAX_QUOTED = 300
"""Characters of an unusable verdict or judgement that are quoted when it is asked for again."""
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

        An ImprovableReply is asked for once more; if that is no better, the longer one is used.

        Args:
            name: name of the prompt.
            values: variables of its template.
            parse: turns a reply into the wanted value or raises UnusableReply.
            draw: distinguishes equal prompts that need independent replies.
            schema: JSON schema of the reply, for servers that can enforce one.
            judging: whether `judge_temperature` applies and an unusable reply is quoted.
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
        improvable: dict[int, ImprovableReply] = {}
        for number in range(self.max_asks):
            # always a single user turn: some chat templates refuse two in a row
            message = {"role": "user", "content": text}
            place = draw * DRAW_STRIDE + number
            reply = await llm.ask([message], draw=place, schema=schema, temperature=temperature)
            call.count(reply.prompt_tokens, reply.completion_tokens)
            try:
                # prose after a whole JSON object or verdict may be cut off
                return _read(reply, parse, may_be_cut=judging or schema is not None)
            except UnusableReply as error:
                fault = error
            call.faults.append(str(fault))
            is_last = bool(improvable) or number == self.max_asks - 1
            if isinstance(fault, ImprovableReply):
                improvable[number] = fault
            if improvable and is_last:
                return cast(Value, _longest(improvable, call))
            said = after_thought(reply.text).strip()[:MAX_QUOTED] if judging else ""
            text = f"{prompt}\n\n{self.prompts.ask_again(fault, said=said)}"
        raise UnusableReply(
            "{name}: {fault} ({num} asks)", name=name, fault=call.faults[-1], num=self.max_asks
        )


def _longest(improvable: dict[int, ImprovableReply], call: Call) -> str:
    """The longest of the texts, whose fault is noted as kept."""
    number = max(improvable, key=lambda number: len(improvable[number].value))
    call.faults[number] += KEPT
    return improvable[number].value


def _read(reply: Reply, parse: Callable[[str], Value], *, may_be_cut: bool) -> Value:
    """The value of a reply.

    Raises:
        UnusableReply: as `parse`, or the reply is cut off.
    """
    is_cut = reply.finish_reason == "length"
    try:
        value = parse(after_thought(reply.text))
    except UnusableReply as error:
        if is_cut:
            template = "it is cut off, as it is too long ({fault})"
            raise UnusableReply(template, fault=error) from None
        raise
    if is_cut and not may_be_cut:
        raise UnusableReply("it is cut off, as it is too long")
    return value
