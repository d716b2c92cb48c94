"""The prompts: Jinja templates in prompts/<language>, overridden by name and added to by a folder of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)

from ..core.llm.journal import content_key

STRATEGY = "strategy-"
VARIABLES = {
    "chain": "question",
    "label": "question chain answer",
    "verdict": "question conclusion answer",
    "monologue": "question chain",
    "response": "question reasoning",
    "choice": "question options",
    "judge": "question options letter answer",
    "rewrite": "question options letter answer question_key answer_key",
    "reask": "fault",
    STRATEGY: "question chain",
}
"""Every prompt and what its template may use: text, but for options, a mapping of letters to texts."""


class Prompts:
    """Renders a prompt by its name. `strategies` are the names of the files strategy-NAME.jinja, ours and the user's."""

    def __init__(self, language: str, folder: str | None = None) -> None:
        """Raises ValueError when a template of the folder overrides nothing, is malformed, or uses what it is not given."""
        ours, own = Path(__file__).parent / "prompts" / language, Path(folder or "").expanduser()
        if folder and not list(own.glob("*.jinja")):
            raise ValueError(
                f"prompts {folder}: holds no *.jinja: give a folder of templates named as in verippo/search/prompts"
            )
        loader = FileSystemLoader([own, ours] if folder else [ours])
        environment = Environment(
            loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        files = [
            name for name in loader.list_templates() if name.endswith(".jinja") and "/" not in name
        ]
        named = [name.removesuffix(".jinja") for name in files if not name.startswith("_")]
        self.strategies = sorted(
            name.removeprefix(STRATEGY) for name in named if name.startswith(STRATEGY)
        )
        self.digest = content_key(
            [(name, loader.get_source(environment, name)[0]) for name in files]
        )
        try:
            self._templates = {name: environment.get_template(f"{name}.jinja") for name in named}
            for name in named:
                kind = STRATEGY if name.startswith(STRATEGY) else name
                if kind not in VARIABLES:
                    raise ValueError(
                        f"prompts {own / name}.jinja: overrides nothing: name it {', '.join(VARIABLES)}NAME"
                    )
                self.render(
                    name,
                    **{
                        key: {"A": ""} if key == "options" else ""
                        for key in VARIABLES[kind].split()
                    },
                )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"prompts {error.filename or error.name}, line {error.lineno}: {error.message}"
            ) from None
        except (TemplateError, TypeError, RecursionError) as error:
            raise ValueError(f"prompts {own / name}.jinja: {error}") from None

    def render(self, name: str, **values: Any) -> str:
        """The text of a prompt, without white space at its ends."""
        return self._templates[name].render(values).strip()
