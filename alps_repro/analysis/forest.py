"""A forest plot: differences with their intervals, margins and verdicts, a line each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alps_repro.analysis.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot.

    Attributes:
        label: What is compared.
        group: The heading above the line; lines of one group follow each other.
        effect: The difference.
        low: Lower end of its 95 % interval; NaN where there is none, as `high`.
        high: Upper end.
        margin: The smallest effect that counts.
        unit: Of all four, such as `nats per token`.
        verdict: A key of `LOOKS`.
        digits: Decimals to print.
    """

    label: str
    group: str
    effect: float
    low: float
    high: float
    margin: float
    unit: str
    verdict: str
    digits: int


#: How each verdict is drawn, so that it can be recognised without colours.
LOOKS: dict[str, dict[str, Any]] = {
    "holds": {"color": COLOURS[2], "marker": "o", "markerfacecolor": COLOURS[2]},
    "undecided": {"color": "0.45", "marker": "D", "markerfacecolor": "white", "markersize": 5},
    "fails": {"color": COLOURS[1], "marker": "s", "markerfacecolor": COLOURS[1]},
    "no verdict": {"color": COLOURS[0], "marker": "o", "markerfacecolor": "white", "ls": (0, (3, 2))},
}

_BAND, _HEADING = "#F3D98B", "0.94"
_SIZE = 8.5  # of text, points
_LINE = 0.215  # height of a line, inches
_PLOT, _NUMBERS = 3.3, 2.75  # widths, inches
_TOP, _BOTTOM = 0.32, 0.86  # inches above and below the lines


def forest(rows: Sequence[ForestRow]) -> Figure:
    """Draw differences with their 95 % intervals, the margins as a band from zero, and the verdicts.

    Args:
        rows: At least one, of units with one scale; groups are headed by their unit where there are several.

    Returns:
        a figure as wide as its longest label needs, and as high as its lines.
    """
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(row.unit for row in rows))
    lines = _lines(rows, len(units) > 1)
    labels = max(_width(line) for line in lines) + 0.36
    width, height = labels + _PLOT + _NUMBERS, _TOP + _LINE * len(lines) + _BOTTOM
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((labels / width, _BOTTOM / height, _PLOT / width, _LINE * len(lines) / height))
    _prepare(axes, len(lines), -labels / _PLOT, 1 + _NUMBERS / _PLOT)
    for i, line in enumerate(lines):
        if isinstance(line, str):
            _heading(axes, i, line, -labels / _PLOT, (labels + _PLOT + _NUMBERS) / _PLOT)
        else:
            _draw(axes, i, line, -(labels - 0.2) / _PLOT)
    for x, text in zip(_COLUMNS, ("effect", "95 % interval", "verdict")):
        axes.text(x, -1, text, transform=axes.get_yaxis_transform(), size=_SIZE, color="0.35", **_aligned(x))
    scale = units[0] if len(units) == 1 else units[0].split()[0]
    axes.set_xlabel(f"difference, {scale} (right of zero: as claimed)", size=_SIZE + 0.5)
    _legend(figure, rows, height)
    return figure


#: Where the columns of numbers end, and the verdicts begin, in widths of the plot.
_COLUMNS = (1 + 0.62 / _PLOT, 1 + 1.83 / _PLOT, 1 + 2.0 / _PLOT)


def _aligned(x: float) -> dict[str, Any]:
    return {"ha": "left" if x == _COLUMNS[-1] else "right", "va": "center_baseline"}


def margin_text(margin: float, unit: str) -> str:
    """A margin with its unit, such as `1 point`."""
    return f"{margin:g} {unit.removesuffix('s') if margin == 1 else unit}"


def _lines(rows: Sequence[ForestRow], with_unit: bool) -> list[str | ForestRow]:
    """The lines from top to bottom: each group's heading, then its rows."""
    lines: list[str | ForestRow] = []
    heading = None
    for row in rows:
        own = f"{row.group} ({row.unit})" if with_unit else row.group
        if own != heading:
            lines.append(own)
        heading = own
        lines.append(row)
    return lines


def _width(line: str | ForestRow) -> float:
    """The width of a line's label in inches; a heading may reach into the plot."""
    from matplotlib.textpath import TextPath

    if isinstance(line, str):
        return 0.0
    return float(TextPath((0, 0), line.label, size=_SIZE).get_extents().width) / 72


def _prepare(axes: Axes, lines: int, left: float, right: float) -> None:
    """Axes without a frame, the first line on top."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(9, steps=(1, 2, 5, 10)))
    axes.set_ylim(lines - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=_SIZE, length=3, color="0.5")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("0.5")
    axes.grid(axis="x", color="0.9", lw=0.7)
    axes.set_axisbelow(True)
    axes.axvline(0, color="0.25", lw=0.9, zorder=1.5)
    axes.plot([left, right], [-0.5, -0.5], color="0.5", lw=0.8, clip_on=False, transform=axes.get_yaxis_transform())


def _heading(axes: Axes, i: int, text: str, left: float, width: float) -> None:
    """A group's heading on a strip across labels, plot and numbers."""
    from matplotlib.patches import Rectangle

    across = axes.get_yaxis_transform()
    strip = Rectangle((left, i - 0.5), width, 1, color=_HEADING, lw=0, clip_on=False, transform=across, zorder=1.8)
    axes.add_patch(strip)
    axes.text(
        left + 0.02, i, text, transform=across, size=_SIZE, weight="bold", va="center_baseline", color="0.15", zorder=3
    )


def _draw(axes: Axes, i: int, row: ForestRow, label: float) -> None:
    """A line: label, margin, interval and effect, numbers, verdict."""
    look = {"markersize": 5.5, "markeredgewidth": 1.2, "lw": 1.5, **LOOKS[row.verdict]}
    axes.barh(i, row.margin, height=1, left=0, color=_BAND, lw=0, zorder=1)
    if not math.isnan(row.low):
        axes.plot([row.low, row.high], [i, i], **{**look, "marker": "", "solid_capstyle": "butt"}, zorder=2.2)
        axes.plot([row.low, row.high], [i, i], ls="none", marker="|", ms=5, mew=1.2, color=look["color"], zorder=2.2)
    axes.plot([row.effect], [i], **{**look, "ls": "none"}, zorder=2.5)
    across = axes.get_yaxis_transform()
    axes.text(label, i, row.label, transform=across, size=_SIZE, va="center_baseline", color="0.1")
    none = math.isnan(row.low)
    interval = "–" if none else f"{row.low:+.{row.digits}f} to {row.high:+.{row.digits}f}"
    texts = (f"{row.effect:+.{row.digits}f}", interval, row.verdict)
    for x, text in zip(_COLUMNS, texts):
        bold = text == row.verdict and row.verdict in ("holds", "fails")
        colour = look["color"] if text == row.verdict else "0.1"
        axes.text(
            x,
            i,
            text.replace("-", "−") if text != row.verdict else text,
            transform=across,
            size=_SIZE,
            color=colour,
            weight="bold" if bold else "normal",
            **_aligned(x),
        )


def _legend(figure: Figure, rows: Sequence[ForestRow], height: float) -> None:
    """The verdicts that there are, and the margins."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    verdicts = {row.verdict for row in rows}
    handles: list[Any] = [
        Line2D([], [], **{"markersize": 5.5, "markeredgewidth": 1.2, "lw": 1.5, **look}, label=verdict)
        for verdict, look in LOOKS.items()
        if verdict in verdicts
    ]
    if "no verdict" in verdicts:
        handles[-1].set_label("no verdict: one training seed, interval over questions alone")
    margins = ", ".join(dict.fromkeys(margin_text(row.margin, row.unit) for row in rows))
    handles.append(Patch(color=_BAND, label=f"margin: {margins}"))
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.04 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=_SIZE,
        columnspacing=1.6,
        handlelength=2.2,
    )
