"""Writes self-contained HTML pages for sharing by mail: light and dark, readable on a phone.

Templates extend page.html.jinja, which holds the style. Every value is escaped, and the page's
Content-Security-Policy forbids loading anything and running any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..files import replace_file


def number(x: object) -> float | None:
    """Converts a finite number to float.

    Args:
        x: Any value.

    Returns:
        The number; None for NaN, infinity and anything that is not a number.
    """
    try:
        return float(x) if isinstance(x, (int, float)) and math.isfinite(x) else None
    except OverflowError:  # an integer beyond the floats
        return None


def format_number(x: object, percent: bool = False) -> str:
    """Formats a number with about four digits: 12,345, 3.142 or 64.0%.

    Args:
        x: The value.
        percent: Whether the value is a share to show as a percentage.

    Returns:
        The text; a dash for anything but a finite number.
    """
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
    """Formats a duration as 4.2 s, 3 min 05 s or 2 h 07 min.

    Args:
        seconds: The duration in seconds.
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def write_page(
    output: Path,
    template: Path,
    *,
    folder: Path,
    script: str = "",
    **values: Any,
) -> Path:
    """Renders a template to a file, which a reader never finds incomplete.

    Args:
        output: The page's path.
        template: Path of the Jinja template.
        folder: Folder that the page describes; the footer names it.
        script: JavaScript code, the only script that the page may run; empty for none.
        **values: Variables of the template.

    Returns:
        `output`.
    """
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "duration": format_duration, "finite": number}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template.name).render(
        **values,
        folder=folder.resolve().name,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        script=script,
        script_source=f"; script-src 'sha256-{digest}'" if script else "",
    )
    return replace_file(output, page)
