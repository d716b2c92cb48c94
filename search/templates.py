"""The prompts: Jinja templates in prompts/<language>, which a user's folder may override."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import (
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.llm.journal import content_key
from .parse import UnusableReply

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
    "reask": "fault said",
    STRATEGY: "question chain",
}
"""Variables of each prompt's template: text, but `options`, which maps letters to texts.

`said` is the reply that could not be used, or empty if it is not to be quoted.
"""


class Prompts:
    """Renders prompts by name.

    `strategies` holds the names of the files strategy-NAME.jinja, ours and the user's; `digest`
    identifies all templates.
    """

    def __init__(self, language: str, folder: str | None = None) -> None:
        """Args:
            language: "en" or "zh".
            folder: templates that override ours by name, or add strategies.

        Raises:
            ValueError: a template of the folder overrides nothing, is malformed, or uses a variable
                that it does not get.
        """
        ours = Path(__file__).parent / "prompts" / language
        translations = Path(__file__).with_name(f"faults_{language}.yaml")
        self._translations: dict[str, str] = {}
        if translations.exists():  # the faults themselves are English
            self._translations = yaml.safe_load(translations.read_text(encoding="utf-8"))
        own = self._own = Path(folder or "").expanduser()
        if folder and not list(own.glob("*.jinja")):
            raise ValueError(
                f"prompts {folder}: holds no *.jinja: give a folder of templates named as in "
                "verippo/search/prompts"
            )
        loader = FileSystemLoader([own, ours] if folder else [ours])
        environment = ImmutableSandboxedEnvironment(
            loader=loader,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        found = loader.list_templates()
        files = [name for name in found if name.endswith(".jinja") and "/" not in name]
        named = [name.removesuffix(".jinja") for name in files if not name.startswith("_")]
        strategies = [name for name in named if name.startswith(STRATEGY)]
        self.strategies = sorted(name.removeprefix(STRATEGY) for name in strategies)
        sources = [(name, loader.get_source(environment, name)[0]) for name in files]
        self.digest = content_key(sources)
        name = ""
        try:
            self._templates = {name: environment.get_template(f"{name}.jinja") for name in named}
            for name in named:
                kind = STRATEGY if name.startswith(STRATEGY) else name
                if kind not in VARIABLES:
                    raise ValueError(
                        f"prompts {own / name}.jinja: overrides nothing: name it "
                        f"{', '.join(VARIABLES)}NAME"
                    )
                keys = VARIABLES[kind].split()
                blank = {key: {"A": ""} if key == "options" else "" for key in keys}
                self.render(name, **blank)
        except TemplateSyntaxError as error:
            where = f"{error.filename or error.name}, line {error.lineno}"
            raise ValueError(f"prompts {where}: {error.message}") from None
        except (TemplateError, TypeError, RecursionError) as error:
            raise ValueError(f"prompts {own / name}.jinja: {error}") from None

    def render(self, name: str, **values: Any) -> str:
        """The text of a prompt, without outer white space.

        Raises:
            ValueError: the template does what the sandbox forbids, or uses an unknown variable.
        """
        try:
            return self._templates[name].render(values).strip()
        except (TemplateError, TypeError) as error:
            raise ValueError(f"prompts {self._own / name}.jinja: {error}") from None

    def ask_again(self, fault: UnusableReply, *, said: str) -> str:
        """The text that follows a prompt whose reply could not be used.

        Args:
            fault: what is wrong with the reply.
            said: the reply, if it is to be quoted.
        """
        translate = self._translations
        values = {key: translate.get(str(value), value) for key, value in fault.values.items()}
        reason = translate.get(fault.template, fault.template).format(**values)
        return self.render("reask", fault=reason, said=said)
