"""A scripted model that knows medicine: it answers our prompts, English and Chinese, from a plan
for each problem."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from verippo.core.text.data import ANSWER_KEY, QUESTION_KEY
from verippo.launch import cli

PONDERING = f"H{'m' * 1400}."
"""The last paragraph of a monologue, which makes it long enough; a single word, and so cheap."""
OPENINGS = {
    "chain": ("Work out the following", "请独立思考"),
    "continue": ("A line of reasoning", "下面这段关于医学问题的推理"),
    "verdict": ("Two answers to the same", "请比较对同一个医学问题"),
    "monologue": ("Turn these reasoning steps", "请把下面的推理步骤改写"),
    "response": ("You have thought about", "你已经思考过一个问题"),
    "choice": ("A medical examination question", "一道医学考试题"),
    "judge": ("An examination question is to become", "有一道考试题要改成"),
    "rewrite": ("Rewrite an examination question", "请改写一道考试题"),
}
STRATEGIES = {
    "backtracking": ("Go back: find the earliest", "请回溯"),
    "exploring_new_paths": ("Leave the paths taken so far", "请离开已经走过的思路"),
    "verification": ("Check the reasoning claim by claim", "逐一与题目和医学知识核对"),
    "correction": ("Name the mistake in the reasoning", "请尽可能准确地指出"),
    "label_guided": ("For your eyes only", "只给你一个人看"),
}


def kind_of(prompt: str, names: dict[str, tuple[str, str]]) -> str:
    """The one name of which an opening stands in the prompt."""
    (found,) = [name for name, texts in names.items() if any(text in prompt for text in texts)]
    return found


def between(prompt: str, tag: str) -> str:
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)[1]


def chain(conclusion: str, *, after: bool = False) -> str:
    steps = [{"action": "Verification", "content": "Is that so?"}] if after else []
    steps += [
        {
            "action": "Inner Thinking",
            "title": "Findings",
            "content": f"What speaks for {conclusion}?",
        },
        {"action": "Final Conclusion", "content": conclusion},
        {"action": "Verification", "content": f"{conclusion} fits."},
    ]
    return json.dumps({"CoT": steps}, ensure_ascii=False)


class Doctor:
    """answers: question -> reference answer. plan: question -> how many wrong conclusions in a row
    come before the right one
    (counted along a chain, so that every attempt begins anew); 99: only with the label.

    faults: prompt kind -> what to answer at first in place of the good answer, one after the other, for each question or
    (verdicts) pair of answers. `log`: the kinds asked for, by question.
    """

    def __init__(self, answers: dict[str, str], plan: dict[str, int]) -> None:
        self.answers, self.plan = answers, plan
        self.faults: dict[str, list[Any]] = {}
        self.log: dict[str, list[str]] = defaultdict(list)
        self.asked: Counter[tuple[str, str]] = Counter()

    def __call__(self, body: dict[str, Any]) -> Any:
        prompt = body["messages"][0]["content"]
        assert len(body["messages"]) == 1
        kind = kind_of(prompt, OPENINGS)
        topic = between(prompt, {"verdict": "given", "response": "question"}.get(kind, "problem"))
        self.log[topic].append(kind_of(prompt, STRATEGIES) if kind == "continue" else kind)
        self.asked[kind, topic] += 1
        faults = self.faults.get(kind, [])
        number = self.asked[kind, topic] - 1
        return faults[number] if number < len(faults) else getattr(self, kind)(prompt, topic)

    def conclusion(self, question: str, num_before: int) -> str:
        answer = self.answers[question]
        return (
            answer
            if num_before >= self.plan[question]
            else f"wrong guess {num_before} at {question}"
        )

    def chain(self, prompt: str, question: str) -> str:
        return chain(self.conclusion(question, 0))

    def continue_(self, prompt: str, question: str) -> str:
        if kind_of(prompt, STRATEGIES) == "label_guided":
            assert between(prompt, "answer") == self.answers[question]
            return chain(self.answers[question], after=True)
        assert self.answers[question] not in prompt.replace(question, "")
        return chain(
            self.conclusion(
                question, prompt.count('"action": "Final Conclusion", "content": "wrong')
            ),
            after=True,
        )

    def verdict(self, prompt: str, given: str) -> str:
        return str(given in (reference := between(prompt, "reference"), f"It is {reference}."))

    def monologue(self, prompt: str, question: str) -> str:
        lines = [json.loads(line)["content"] for line in between(prompt, "steps").splitlines()]
        text = "\n\n".join(["Hmm.", *lines, PONDERING])
        return json.dumps({"NaturalReasoning": text}, ensure_ascii=False)

    def response(self, prompt: str, question: str) -> str:
        return f"It is {self.answers[question]}."


setattr(Doctor, "continue", Doctor.continue_)


def unique_tokens(
    answer: Callable[[dict[str, Any]], Any], module: Any
) -> Callable[[dict[str, Any]], Any]:
    """The same answers, but their count of tokens tells which request they belong to."""

    def script(body: dict[str, Any]) -> Any:
        reply = answer(body)
        digest = hashlib.sha256(module.request_key(body).encode()).digest()
        return module.Answer(text=reply, completion_tokens=int.from_bytes(digest[:6], "big"))

    return script


@pytest.fixture
def doctor() -> type[Doctor]:
    return Doctor


@pytest.fixture
def scripted() -> Any:
    """This module."""
    import sys

    return sys.modules[__name__]


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Path]:
    """Runs `verippo NAME` on rows in this process: (name, rows, server, **options) -> its output
    folder."""

    def run(
        name: str, rows: list[dict[str, Any]], server: Any, *, output: str = "out", **options: Any
    ) -> Path:
        data = tmp_path / "rows.json"
        data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        given = {
            "data": data,
            "output": tmp_path / output,
            "llm.base_url": server.url,
            "llm.model": "scripted",
        } | options
        cli.main(
            [name, *[part for key, value in given.items() for part in (f"--{key}", str(value))]]
        )
        return tmp_path / output

    return run


def problem(number: int, *, answer: str | None = None) -> dict[str, Any]:
    return {
        "id": number,
        QUESTION_KEY: f"What ails patient {number}?",
        ANSWER_KEY: answer or f"disease {number}",
    }


def load(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))
