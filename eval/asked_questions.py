"""The questions as they are asked: their order, prompts and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.llm.journal import content_key
from ..core.sampling.sampler import draw_seed
from .config import EvalConfig
from .questions import Question, permute_options

_QUESTION = "Here is a multiple-choice question. Which option is right?\n"


_ANSWER_SENTENCE = """\
End with the sentence "The answer is A.", with the letter of the option you chose in place of A.
"""


_HEADINGS = """\
Reason about it under the heading `## Thinking`. \
Then write your answer under the heading `## Final Response`.
"""


_ITEM = "\n{question}\n\n{options}"


PROMPTS = {
    "free": _QUESTION + _ITEM,
    "strict": _QUESTION + _ANSWER_SENTENCE + _ITEM,
    "thinking": _QUESTION + _HEADINGS + _ANSWER_SENTENCE + _ITEM,
}


@dataclass(frozen=True)
class AskedQuestion:
    """A question in one order of its options, for one run."""

    question: Question
    """The question with its options in the order shown."""
    run: int
    permutation: int
    """Number of the order of the options; 0 is the order of the file."""
    file_letters: dict[str, str]
    """Letter shown -> letter in the file."""
    seed: int
    """Seed of 31 bits, which every server accepts."""

    def file_letter(self, shown: str | None) -> str | None:
        """Letter in the file of a letter shown; None stays None."""
        return self.file_letters[shown] if shown else None


@dataclass(frozen=True)
class Answer:
    """An answer, which may be empty, or the error of the call that failed."""

    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str | None = None

    @classmethod
    def from_json(cls, entry: Any) -> Answer:
        """The answer that the journal holds.

        Raises:
            TypeError: the entry has another form.
        """
        answer = cls(**entry)
        if not entry or not isinstance(answer.text, str):
            raise TypeError("it has no text")
        return answer


OnAnswer = Callable[[AskedQuestion, Answer], None]
"""Function that is called with each answer as it arrives."""


OnReady = Callable[[], None]
"""Function that is called once model and prompts are checked, before the first answer."""


def list_questions_to_ask(
    questions: Sequence[Question],
    *,
    runs: int,
    permutations: int,
    seed: int,
) -> list[AskedQuestion]:
    """Lists every question in every order of its options and every run.

    The seed and the order of the options depend on (seed, item, run, permutation) alone, not on
    the other questions.

    Args:
        questions: Questions in the file's order of options.
        runs: Answers per question and order.
        permutations: Number of random orders besides the file's.
        seed: Seed of the evaluation.

    Returns:
        [questions * orders * runs] in this nesting, the runs innermost.
    """
    asked = []
    for question in questions:
        item = int(content_key(question.source, question.id)[:15], 16)
        for order in range(permutations + 1):
            shown = question
            letters = {letter: letter for letter in question.options}
            if order:
                shown, letters = permute_options(question, draw_seed(seed, item, order))
            asked += [
                AskedQuestion(shown, run, order, letters, draw_seed(seed, item, run, order) >> 32)
                for run in range(runs)
            ]
    return asked


def build_messages(config: EvalConfig, question: Question) -> list[dict[str, str]]:
    """Builds the conversation that asks the question.

    Args:
        config: Configuration with the prompt and the system prompt.
        question: Question with its options in the order to show.

    Returns: the messages, each with role and content.
    """
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    # not str.format, because a question may contain braces
    text = PROMPTS[config.prompt].replace("{options}", options, 1)
    text = text.replace("{question}", question.question, 1)
    turns = {"system": config.system_prompt, "user": text}
    return [{"role": role, "content": content} for role, content in turns.items() if content]
