"""The charts of a run's report, drawn as inline SVG."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise
from typing import Any, NamedTuple

from .html_page import format_number, number
from .statistics import wilson_interval

Row = dict[str, Any]


COLOURS = {
    f"var(--{name})": f"#01020{i}"
    for i, name in enumerate(("muted", "grid", "c1", "c2", "c3", "c4", "c5"))
}
"""CSS variable -> the colour matplotlib draws it in, replaced in the SVG so that one drawing serves light and dark."""


class Line(NamedTuple):
    """A curve: `key` in the rows of `source` ("train": metrics.jsonl, "eval": eval.jsonl), in colour --c<colour>."""

    key: str
    label: str = "train"
    colour: int = 1
    source: str = "train"


class Panel(NamedTuple):
    """One pair of axes. `unit` names the y axis (with a %: shares); `zero` keeps 0 in view; under `bottom` is cut."""

    unit: str
    lines: tuple[Line, ...]
    zero: bool = True
    bottom: float = -math.inf
    log: bool = False


class Plot(NamedTuple):
    """One figure of the page; its panels share the step axis."""

    title: str
    note: str
    panels: tuple[Panel, ...]
    stacked: bool = False


def _both(key: str, eval_key: str = "") -> tuple[Line, Line]:
    return Line(key), Line(eval_key or key, "evaluation", 2, "eval")


SCORE_PLOTS = (
    Plot(
        "Score",
        "Mean of the verifier's scores. The reward is the score less the KL penalty.",
        (Panel("score", (*_both("score_mean"), Line("reward_mean", "train, reward", 3))),),
    ),
    Plot(
        "Right answers",
        "By the verifier's verdict, and by exact comparison with the reference answer.",
        (
            Panel("judged right, % of responses", _both("score_right_rate", "right_rate")),
            Panel("exactly right, % of responses", _both("exact_rate")),
        ),
    ),
)


PLOTS = (
    Plot(
        "Loss",
        "Mean cross-entropy of the target tokens.",
        (Panel("nats per token", _both("loss"), zero=False),),
    ),
    Plot(
        "Token accuracy",
        "Target tokens that are the model's first choice.",
        (Panel("% of tokens", _both("token_accuracy"), zero=False),),
    ),
    Plot(
        "Distance from the reference",
        "KL to the reference: sum over a response's tokens, mean over responses.",
        (Panel("KL, nats per response", (Line("kl_mean"),)),),
    ),
    Plot(
        "Response length",
        "Truncated: stopped by the token limit, without an end token.",
        (
            Panel("tokens per response", _both("response_length_mean")),
            Panel("truncated, % of responses", _both("truncated_rate")),
        ),
    ),
    Plot(
        "Form of the answers",
        "Answers that reason before they conclude; answers without a readable conclusion.",
        (
            Panel("reasoned, % of responses", _both("reasoned_rate")),
            Panel("unparsable, % of responses", _both("score_unparsable_rate", "unparsable_rate")),
        ),
    ),
    Plot(
        "Entropy",
        "Of the policy's next-token distribution.",
        (Panel("nats per token", (Line("entropy"),)),),
    ),
    Plot(
        "Explained variance",
        "Of the returns, by the critic: 1 is perfect, 0 no better than their mean. Cut at −1.",
        (Panel("share of variance", (Line("explained_variance"),), bottom=-1.0),),
    ),
    Plot(
        "Size of the updates",
        "Tokens whose ratio was clipped; KL from the policy that sampled.",
        (
            Panel("clipped, % of tokens", (Line("clip_fraction"),)),
            Panel("approximate KL, nats per token", (Line("approx_kl"),)),
        ),
    ),
    Plot(
        "Losses",
        "Mean over response tokens.",
        (Panel("policy loss", (Line("policy_loss"),)), Panel("value loss", (Line("value_loss"),))),
    ),
    Plot(
        "Gradient norms",
        "Before clipping.",
        (
            Panel(
                "L2 norm",
                (
                    Line("grad_norm", "model"),
                    Line("grad_norm_policy", "policy"),
                    Line("grad_norm_value", "value", 2),
                ),
                log=True,
            ),
        ),
    ),
    Plot(
        "Learning rates",
        "As used at each step.",
        (
            Panel(
                "learning rate",
                (Line("lr", "model"), Line("lr_policy", "policy"), Line("lr_value", "value", 2)),
            ),
        ),
    ),
    Plot(
        "Sampler against trainer",
        "How far the two log-probs of a sampled token differ.",
        (
            Panel(
                "nats per token",
                (
                    Line("sampler_logprob_gap_mean", "mean"),
                    Line("sampler_logprob_gap_p99", "99th percentile", 2),
                ),
                log=True,
            ),
        ),
    ),
    Plot(
        "Time per step",
        "By phase, stacked.",
        stacked=True,
        panels=(
            Panel(
                "seconds",
                tuple(
                    Line(f"seconds_{name}", name, i)
                    for i, name in enumerate(
                        ("rollout", "score", "forward", "train", "sync"), start=1
                    )
                ),
            ),
        ),
    ),
    Plot(
        "Speed and memory",
        "As measured at each step.",
        (
            Panel("tokens per second", (Line("tokens_per_second"),)),
            Panel("peak memory, GiB", (Line("peak_memory_gib"),)),
        ),
    ),
)


def points(line: Line, data: dict[str, list[Row]]) -> tuple[list[float], list[float]]:
    """The steps and values of one curve, where it has values."""
    pairs = [
        (row["step"], v)
        for row in data[line.source]
        if (v := number(row.get(line.key))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def stack(ax: Any, curves: list[tuple[str, list[float], list[float]]]) -> list[float]:
    """Stacks (colour, steps, values) as bars without gaps, a missing value as 0; the heights of the stacks."""
    steps = sorted({x for _, xs, _ in curves for x in xs})
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    edges = [steps[0] - half, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + half]
    base = [0.0] * len(steps)
    for colour, xs, ys in curves:
        value_at = dict(zip(xs, ys, strict=True))
        top = [height + value_at.get(x, 0.0) for x, height in zip(steps, base, strict=True)]
        ax.stairs(top, edges, baseline=base, fill=True, color=colour, linewidth=0)
        base = top
    ax.set_xlim(edges[0], edges[-1])
    return base


def draw_panel(
    ax: Any,
    panel: Panel,
    data: dict[str, list[Row]],
    *,
    stacked: bool,
) -> None:
    """Draws the lines that have values, or stacks them, and sets limits that no outlier or constant spoils."""
    found = [(line, *points(line, data)) for line in panel.lines if points(line, data)[0]]
    curves = [(COLOURS[f"var(--c{line.colour})"], xs, ys) for line, xs, ys in found]
    values = [v for _, _, ys in curves for v in ys]
    if stacked:
        values = stack(ax, curves)
    else:
        for (line, _, _), (colour, xs, ys) in zip(found, curves, strict=True):
            dots = "o" if line.source == "eval" or len(xs) == 1 else ""
            ax.plot(
                xs,
                ys,
                color=colour,
                marker=dots,
                markersize=3.6,
                linewidth=1.5,
                clip_on=panel.bottom > -math.inf,
            )
    if panel.log and min(values) > 0 and max(values) > 30 * min(values):
        ax.set_yscale("log")
        return
    bottom = panel.bottom if max(values) > panel.bottom else -math.inf
    values += [0.0] if panel.zero else []
    low, high, percent = max(bottom, min(values)), max(values), "%" in panel.unit
    pad = 0.07 * (high - low) or (0.02 if percent else 0.1 * abs(high) or 1.0)
    ax.set_ylim(
        low if low in (0.0, bottom) else low - pad, min(high + pad, 1.03) if percent else high + pad
    )


def tick_text(x: float, percent: bool = False) -> str:
    """An axis label as short as it can be: 12k, 0.25, 2e-06, 60%."""
    text = f"{100 * x:g}%" if percent else f"{x / 1000:g}k" if abs(x) >= 10000 else f"{x:.4g}"
    return text.replace("-", "−")


def to_svg(fig: Any, *, name: str, label: str) -> str:
    """The figure as an inline SVG as wide as its box: ids prefixed by `name`, CSS colours, no metadata."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL
    )
    svg = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 role="img" aria-label="{label}">',
        svg,
        count=1,
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace('xlink:href="#', f'href="#{name}-')
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def new_axes(num_panels: int) -> tuple[Any, list[Any]]:
    """An empty figure and its axes, one above the other: quiet frame, horizontal grid, short ticks."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    muted, grid = COLOURS["var(--muted)"], COLOURS["var(--grid)"]
    fig = Figure(figsize=(4.4, 3.1), layout="constrained")
    axes = list(fig.subplots(num_panels, 1, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(muted)
        ax.tick_params(colors=muted, labelsize=10.5, length=0, pad=5, which="both")
        ax.grid(axis="y", color=grid, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(6 - num_panels, steps=[1, 2, 2.5, 5, 10]))
    return fig, axes


def draw_plot(plot: Plot, data: dict[str, list[Row]], *, name: str) -> Row | None:
    """A figure of the page (title, note, legend, SVG), of the panels that have values; None when none has."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels = [panel for panel in plot.panels if any(points(line, data)[0] for line in panel.lines)]
    if not panels:
        return None
    fig, axes = new_axes(len(panels))
    facts, legend = [], {}
    for ax, panel in zip(axes, panels, strict=True):
        draw_panel(ax, panel, data, stacked=plot.stacked)
        percent = "%" in panel.unit
        ax.set_title(panel.unit, loc="left", fontsize=10.5, color=COLOURS["var(--muted)"])
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda x, _, percent=percent: tick_text(x, percent))
        )
        ax.yaxis.set_minor_formatter(NullFormatter())
        for line in panel.lines:
            steps, values = points(line, data)
            if steps:
                style = "dots" if line.source == "eval" else "fill" if plot.stacked else "line"
                legend[line.label] = {"colour": line.colour, "style": style}
                ends = (
                    f"{format_number(values[0], percent)} to {format_number(values[-1], percent)}"
                )
                facts.append(f"{panel.unit}, {line.label}: {ends}")
    low, high = axes[-1].get_xlim()
    if high - low < 1:  # a single step
        axes[-1].set_xlim((low + high) / 2 - 0.8, (low + high) / 2 + 0.8)
    axes[-1].set_xlabel("step", fontsize=10.5, color=COLOURS["var(--muted)"])
    label = f"{plot.title} by step, first to last. " + "; ".join(facts)
    svg = to_svg(fig, name=name, label=label)
    return {
        "title": plot.title,
        "note": plot.note,
        "legend": legend if len(legend) > 1 else {},
        "svg": svg,
    }


def draw_reliability(bins: list[Row], *, name: str) -> Row | None:
    """The share of right answers against the verifier's probability, with Wilson intervals; None without bins."""
    from matplotlib.ticker import FuncFormatter

    rows = [
        [number(row.get(key)) for key in ("mean_predicted", "share_right", "num")] for row in bins
    ]
    if not (found := [row for row in rows if None not in row and row[2]]):
        return None
    fig, (ax,) = new_axes(1)
    xs, ys, nums = zip(*found, strict=True)
    blue, muted = COLOURS["var(--c1)"], COLOURS["var(--muted)"]
    ax.plot([0, 1], [0, 1], color=muted, linewidth=1, linestyle=(0, (4, 3)))
    lows, highs = zip(
        *(wilson_interval(y * n, int(n)) for y, n in zip(ys, nums, strict=True)), strict=True
    )
    ax.vlines(xs, lows, highs, color=blue, linewidth=1.5, alpha=0.45)
    ax.plot(xs, ys, color=blue, marker="o", markersize=4, linewidth=1.5)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axis.set_major_formatter(FuncFormatter(lambda x, _: tick_text(x, percent=True)))
    ax.set_title("in truth right, % of responses", loc="left", fontsize=10.5, color=muted)
    ax.set_xlabel("verifier's probability of right", fontsize=10.5, color=muted)
    note = "Held-out answers in bins of the verifier's probability, with 95% intervals. Dashed: perfect calibration."
    label = f"Verifier's calibration, {len(found)} bins: truth against stated probability"
    return {
        "title": "Verifier's calibration",
        "note": note,
        "legend": {},
        "svg": to_svg(fig, name=name, label=label),
    }
