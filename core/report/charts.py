"""Charts of a run's report, drawn by matplotlib as inline SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator

from .html_page import format_number, number
from .statistics import wilson_interval

Row = dict[str, Any]

NAMES = ("muted", "grid", "c1", "c2", "c3", "c4", "c5")
VARIABLES = {f"#01020{i}": name for i, name in enumerate(NAMES)}
"""Colour that matplotlib draws -> CSS variable that replaces it in the SVG, so that the chart suits
light and dark pages."""
MUTED, GRID, *LINE_COLOURS = VARIABLES
STYLE: Any = {
    "axes.prop_cycle": cycler(color=LINE_COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": MUTED,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titlecolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.labelcolor": MUTED,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "verippo",
}


class Line(NamedTuple):
    """Definition of a curve; charts.yaml describes the fields."""

    key: str
    label: str = "train"
    colour: int = 1
    source: str = "train"

    @property
    def drawn_colour(self) -> str:
        """Colour for matplotlib, whose cycle starts at C0."""
        return f"C{self.colour - 1}"


class Panel(NamedTuple):
    """Definition of one pair of axes; charts.yaml describes the fields."""

    unit: str
    lines: list[Line]
    zero: bool = True
    bottom: float = -math.inf
    log: bool = False

    @property
    def percent(self) -> bool:
        """Whether the values are shares, shown in percent."""
        return "%" in self.unit


class Curve(NamedTuple):
    """The values of a line, at the steps that have one."""

    line: Line
    steps: list[float]
    values: list[float]


class Mark(NamedTuple):
    """An entry of a legend."""

    colour: int
    style: str
    """CSS class: line, dots or fill."""


class Chart(NamedTuple):
    """A finished chart of the page."""

    title: str
    note: str
    svg: str
    legend: dict[str, Mark]
    """Label -> mark; empty for a chart with a single label."""


def draw_charts(section: str, data: dict[str, list[Row]]) -> Iterator[Chart]:
    """Draws the charts of a section of charts.yaml, leaving out panels and lines without values.

    Args:
        section: Key in charts.yaml.
        data: Rows of each source, in the order of their steps.

    Yields:
        The charts that have values, in the order of charts.yaml.
    """
    definitions = yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text("utf-8"))
    for index, chart in enumerate(definitions[section]):
        panels = [
            Panel(**panel | {"lines": [Line(**line) for line in panel["lines"]]})
            for panel in chart.pop("panels")
        ]
        drawn = [(panel, curves) for panel in panels if (curves := find_curves(panel, data))]
        if drawn:
            yield draw_chart(drawn, name=f"{section}{index}", **chart)


def find_curves(panel: Panel, data: dict[str, list[Row]]) -> list[Curve]:
    """Finds the curves of a panel that have at least one finite value.

    Args:
        panel: The panel.
        data: Rows of each source, in the order of their steps.
    """
    curves = []
    for line in panel.lines:
        points = [
            (row["step"], value)
            for row in data[line.source]
            if (value := number(row.get(line.key))) is not None
        ]
        if points:
            curves.append(Curve(line, *map(list, zip(*points, strict=True))))
    return curves


@matplotlib.rc_context(STYLE)
def draw_chart(
    panels: list[tuple[Panel, list[Curve]]],
    *,
    name: str,
    title: str,
    note: str,
    stacked: bool = False,
) -> Chart:
    """Draws panels one above the other, with a shared step axis.

    Args:
        panels: The panels with their curves, from top to bottom.
        name: Prefix of the SVG's ids.
        title: Heading of the chart.
        note: Line of explanation under the heading.
        stacked: Whether to stack the curves as bars.
    """
    fig, axes = new_axes(len(panels))
    legend = {}
    ranges = []
    for ax, (panel, curves) in zip(axes, panels, strict=True):
        draw_panel(ax, panel, curves, stacked=stacked)
        for line, _, values in curves:
            style = "dots" if line.source == "eval" else "fill" if stacked else "line"
            legend[line.label] = Mark(line.colour, style)
            first, last = (format_number(values[i], panel.percent) for i in (0, -1))
            ranges.append(f"{panel.unit}, {line.label}: {first} to {last}")
    low, high = axes[-1].get_xlim()
    if high - low < 1:  # a single step
        axes[-1].set_xlim((low + high) / 2 - 0.8, (low + high) / 2 + 0.8)
    axes[-1].set_xlabel("step")
    svg = to_svg(fig, name=name, label=f"{title} by step, first to last. " + "; ".join(ranges))
    return Chart(title, note, svg, legend if len(legend) > 1 else {})


def draw_panel(ax: Any, panel: Panel, curves: list[Curve], *, stacked: bool) -> None:
    """Draws or stacks the curves and sets the y axis.

    Args:
        ax: Axes of the panel.
        panel: The panel's definition.
        curves: Its curves.
        stacked: Whether to stack the curves as bars.
    """
    ax.set_title(panel.unit)
    if stacked:
        values = draw_stack(ax, curves)
    else:
        values = [value for curve in curves for value in curve.values]
        for line, steps, heights in curves:
            ax.plot(
                steps,
                heights,
                color=line.drawn_colour,
                marker="o" if line.source == "eval" or len(steps) == 1 else "",
                markersize=3.6,
                clip_on=panel.bottom > -math.inf,
            )
    if panel.log and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
    else:
        ax.set_ylim(*y_limits(panel, values))
    ax.yaxis.set_major_formatter(lambda x, _: tick_text(x, panel.percent))
    ax.yaxis.set_minor_formatter("")


def draw_stack(ax: Any, curves: list[Curve]) -> list[float]:
    """Stacks curves as bars without gaps, where a missing value counts as 0.

    Args:
        ax: Axes to draw on.
        curves: Curves from bottom to top.

    Returns:
        Height of the stack at each step.
    """
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = [steps[0] - half, *(steps[:-1] + steps[1:]) / 2, steps[-1] + half]
    base = np.zeros(len(steps))
    for line, own_steps, values in curves:
        top = base.copy()
        top[np.searchsorted(steps, own_steps)] += values
        ax.stairs(
            top,
            edges,
            baseline=base,
            fill=True,
            color=line.drawn_colour,
            linewidth=0,
        )
        base = top
    ax.set_xlim(edges[0], edges[-1])
    return list(base)


def y_limits(panel: Panel, values: list[float]) -> tuple[float, float]:
    """Computes the limits of the y axis, with a margin even if all values are equal."""
    bottom = panel.bottom if max(values) > panel.bottom else -math.inf
    shown = [*values, 0.0] if panel.zero else values
    low = max(bottom, min(shown))
    high = max(shown)
    margin = 0.07 * (high - low) or (0.02 if panel.percent else 0.1 * abs(high) or 1.0)
    top = min(high + margin, 1.03) if panel.percent else high + margin
    return low if low in (0.0, bottom) else low - margin, top


@matplotlib.rc_context(STYLE)
def draw_reliability(bins: list[Row]) -> list[Chart]:
    """Draws the share of right answers against the verifier's probability, with Wilson intervals.

    Args:
        bins: Rows with mean_predicted, share_right and num, as in calibration.json.

    Returns:
        The chart; empty if no bin has answers.
    """
    filled = [row for row in bins if row.get("num")]
    if not filled:
        return []
    fig, (ax,) = new_axes(1)
    ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    predicted = [row["mean_predicted"] for row in filled]
    right = [row["share_right"] for row in filled]
    intervals = [wilson_interval(row["share_right"] * row["num"], row["num"]) for row in filled]
    ax.vlines(predicted, *zip(*intervals, strict=True), color="C0", linewidth=1.5, alpha=0.45)
    ax.plot(predicted, right, color="C0", marker="o", markersize=4)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axis.set_major_formatter(lambda x, _: tick_text(x, percent=True))
    ax.set_title("actually right, % of responses")
    ax.set_xlabel("probability of being right, by the verifier")
    label = f"Verifier's calibration, {len(filled)} bins: share right against predicted probability"
    note = (
        "Held-out answers in bins of the verifier's probability, with 95% intervals. "
        "Dashed: perfect calibration."
    )
    svg = to_svg(fig, name="reliability", label=label)
    return [Chart("Verifier's calibration", note, svg, {})]


def new_axes(num_panels: int) -> tuple[Figure, list[Any]]:
    """Creates an empty figure and its axes, from top to bottom."""
    fig = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = list(fig.subplots(num_panels, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.tick_params(
            colors=MUTED,
            labelsize=10.5,
            length=0,
            pad=5,
            which="both",
        )
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(6 - num_panels, steps=[1, 2, 2.5, 5, 10]))
    return fig, axes


def tick_text(x: float, percent: bool = False) -> str:
    """Formats an axis label: 12k, 0.25, 2e-06 or 60%."""
    if percent:
        text = f"{100 * x:g}%"
    else:
        text = f"{x / 1000:g}k" if abs(x) >= 10000 else f"{x:.4g}"
    return text.replace("-", "−")


def to_svg(fig: Figure, *, name: str, label: str) -> str:
    """Renders the figure as an inline SVG that fills the width of its box.

    Args:
        fig: The figure.
        name: Prefix that keeps the ids of several SVGs on a page apart.
        label: Text for screen readers.
    """
    buffer = io.StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(buffer, format="svg", transparent=True, metadata=none)
    _, tag, svg = buffer.getvalue().partition("<svg ")
    svg = re.sub("<!--.*?-->", "", tag + svg, flags=re.DOTALL)
    head = rf'<svg \1 role="img" aria-label="{label}">'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', head, svg, count=1)
    svg = re.sub(r'\bid="|url\(#|href="#', rf"\g<0>{name}-", svg).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
