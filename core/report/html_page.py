"""Writes a page that can be mailed: one self-contained HTML file, every value escaped, light and dark, readable on a phone.

Templates extend page.html.jinja, which brings the style. The Content-Security-Policy forbids loading anything, and every
script but the one that is given.
"""

from __future__ import annotations

import base64
import hashlib
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def number(x: object) -> float | None:
    """`x` as a float if it is a finite number, else None: a null, NaN or text in a metrics row is no value."""
    return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None


def format_number(x: object, percent: bool = False) -> str:
    """About four digits with thousands separated: 12,345 or 3.142 or 64.0%; a dash for what is no number."""
    if (value := number(x)) is None:
        return "–"
    if percent:
        text = f"{100 * value:.1f}%"
    elif abs(value) >= 1000 or value == int(value):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    return text.replace("-", "−")


def format_duration(seconds: float) -> str:
    """4.2 s, 3 min 05 s or 2 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 60:
        return f"{seconds:.1f} s"
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def write_page(
    output: Path,
    template: Path,
    *,
    folder: Path,
    script: str = "",
    **values: Any,
) -> Path:
    """Renders the template with the values to `output`, at once or not at all; its path.

    folder: what the page was made from, named in its footer. script: the one that may run, if any.
    """
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": format_number, "duration": format_duration, "finite": number}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template.name).render(
        **values,
        folder=folder.resolve().name,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        script=script,
        script_source=f"; script-src 'sha256-{digest}'" if script else "",
    )
    temporary = output.with_name(output.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    return temporary.replace(output)
