"""Asks an LLM for what a parser must accept, again and with the reason when it does not; keeps account of every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..core.llm.client import LLM
from ..core.llm.journal import content_key
from ..core.text.verifier_text import after_thought
from .parse import Fault
from .templates import Prompts

Value = TypeVar("Value")
Step = dict[str, Any]

CUT_OFF = "it is cut off, as it is too long"
DRAW_STRIDE = 1 << 16


class Asker:
    """Asks for one item. `steps` is its trajectory: each step with the calls that it took."""

    def __init__(
        self, llm: LLM, prompts: Prompts, *, max_asks: int, judge_temperature: float
    ) -> None:
        self.llm, self.prompts, self.max_asks, self.judge_temperature = (
            llm,
            prompts,
            max_asks,
            judge_temperature,
        )
        self.steps: list[Step] = []
        self._calls: list[dict[str, Any]] = []

    def close_step(self, strategy: str, **facts: Any) -> None:
        """What was asked since the last step becomes the step `strategy`."""
        self.steps.append({"strategy": strategy, **facts, "calls": self._calls})
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
        """The parsed answer to the prompt `name`, filled in with the values.

        draw: tells apart equal prompts that are to be answered anew. Raises Fault when the last of `max_asks` answers could
        not be used either, and whatever LLM.ask raises.
        """
        llm = llm or self.llm
        prompt, temperature = (
            self.prompts.render(name, **values),
            self.judge_temperature if judging else None,
        )
        call: dict[str, Any] = {
            "prompt": name,
            "model": llm.config.model,
            "hash": content_key(prompt),
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "faults": [],
        }
        self._calls.append(call)
        text = prompt
        for number in range(
            self.max_asks
        ):  # one turn each time: some chat templates refuse two of the user's
            message = {"role": "user", "content": text}
            reply = await llm.ask(
                [message], draw=draw * DRAW_STRIDE + number, schema=schema, temperature=temperature
            )
            call["prompt_tokens"] += reply.prompt_tokens
            call["completion_tokens"] += reply.completion_tokens
            cut = reply.finish_reason == "length"
            try:
                value = parse(after_thought(reply.text))
                if (
                    not cut or schema or judging
                ):  # a whole JSON object or verdict may have its trailing prose cut off
                    return value
                fault = CUT_OFF
            except Fault as error:
                fault = f"{CUT_OFF} ({error})" if cut else str(error)
            call["faults"].append(fault)
            text = f"{prompt}\n\n{self.prompts.render('reask', fault=fault)}"
        raise Fault(f"{name}: {fault} ({self.max_asks} asks)")
