"""Figures: of training, of scores compared with ground truth, of the paper's own numbers, and the paper's (`FIGURES`).

Claims have forest plots, which `forest.py` draws.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.analysis.paper import LABELS, differences
from alps_repro.analysis.tables import paper_table
from alps_repro.errors import UserError, one_of
from alps_repro.experiments.configs import FinetuneConfig
from alps_repro.experiments.grid import SYSTEMS, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import recorded_cells
from alps_repro.experiments.records import Record, find_record
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import head_count
from alps_repro.localization.recovery import highest_places
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which the colour-blind can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: The same without black, and two more, for figures of many lines.
MANY_COLOURS = (*COLOURS[:6], "#882255", "#777777")

_MARKERS, _LINES = "os^Dv<>Ph*", ("-", "--", "-.", ":")


def loss_curves(records: Iterable[Record]) -> Figure:
    """Training loss in nats per loss token by optimizer step, a line for each run.

    Many runs get a panel for each data set, with the median over the runs of each method and scope.

    Args:
        records: Those of fine-tunings that trained anything are shown, the others left out.
    """
    curves = [(r.config, r.result["losses"]) for r in records if isinstance(r.config, FinetuneConfig)]
    runs = [(config, losses) for config, losses in curves if losses]
    few = len(runs) <= len(COLOURS)
    lines: dict[str, dict[str, list[list[float]]]] = {}
    for config, losses in runs:
        seed = f", seed {config.seed}" if few else ""
        label = f"{config.method} (scope {config.scope}{seed})"
        lines.setdefault(label, {}).setdefault("" if few else config.dataset, []).append(losses)
    datasets = sorted({dataset for line in lines.values() for dataset in line})
    figure, panels = _loss_panels(datasets, few)
    for i, (label, line) in enumerate(lines.items()):
        colour, style = MANY_COLOURS[i % len(MANY_COLOURS)], _LINES[i // len(MANY_COLOURS) % len(_LINES)]
        for dataset, alike in line.items():
            middle = [statistics.median(loss for loss in step if loss is not None) for step in zip_longest(*alike)]
            axes = panels[datasets.index(dataset)]
            width = 1.6 if few else 1.1
            axes.plot(range(1, len(middle) + 1), middle, lw=width, label=label, color=colour, ls=style)
    if few:
        panels[0].legend(frameon=False)
    else:
        handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels())}
        runs_of = [f"{label}: {sum(map(len, lines[label].values()))} runs" for label in lines]
        figure.legend(
            [handles[label] for label in lines], runs_of, loc="outside right center", frameon=False, fontsize=8
        )
    return figure


def _loss_panels(datasets: Sequence[str], few: bool) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each data set, at most three side by side, on logarithmic axes of the loss."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    across, down = min(len(datasets), 3), math.ceil(len(datasets) / 3)
    width, height = max(2.9 * across, 5.2), max(2.5 * down, 3.6)
    figure = Figure(figsize=(width if few else width + 2.6, height), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, squeeze=False).ravel().tolist()
    for axes, dataset in zip(panels, datasets):
        axes.set_title(dataset, fontsize=10)
        axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    for axes in panels[len(datasets) :]:
        axes.set_axis_off()
    for axes in panels[::across]:
        axes.set_ylabel("training loss, nats per token")
    return figure, panels


def recall(table: pd.DataFrame, share: float = 0.1) -> Figure:
    """Recall by factor, a panel for each head-matrix variant, a line for each metric; bars span the seeds.

    Args:
        table: As `localization.recovery.recall_by_metric` gives it.
        share: Of heads that were changed, which is the recall of a random choice.
    """
    from matplotlib.figure import Figure

    kinds, metrics = list(dict.fromkeys(table["head_matrix"])), list(dict.fromkeys(table["metric"]))
    figure = Figure(figsize=(1.5 + 3.3 * len(kinds), 3.8), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds):
        for i, metric in enumerate(metrics):
            own = table[(table["head_matrix"] == kind) & (table["metric"] == metric)]
            recalls = own.groupby("factor")["recall"].agg(["mean", "min", "max"])
            # Slightly offset, so that equal metrics do not hide each other.
            aside = 1 + 0.012 * (i - (len(metrics) - 1) / 2)
            axes.errorbar(
                recalls.index.to_numpy() * aside,
                recalls["mean"],
                yerr=[recalls["mean"] - recalls["min"], recalls["max"] - recalls["mean"]],
                color=COLOURS[i % len(COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=_LINES[i % len(_LINES)],
                markersize=5,
                lw=1.3,
                elinewidth=0.8,
                label=metric,
            )
        axes.axhline(share, color="0.5", lw=1, dashes=(1, 2), label="chance")
        factors = sorted(set(table["factor"]))
        axes.set_xscale("log")
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.05)
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("change relative to other heads, factor")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("recall of the changed heads")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def importance(importance: np.ndarray, scores: np.ndarray, name: str, ratio: float = 0.1) -> Figure:
    """Each head's importance by its score, with the highest heads by each marked.

    Args:
        importance: The loss increase where a head is zero-ablated, nats per token: (layers, heads).
        scores: (layers, heads).
        name: Of the scores.
        ratio: Share of heads in each top set.
    """
    from matplotlib.figure import Figure

    x, y, top = scores.ravel(), importance.ravel(), head_count(ratio, scores.size)
    by_score, by_importance = (np.isin(np.arange(x.size), highest_places(values, top)) for values in (x, y))
    figure = Figure(figsize=(6.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    x, label_x = _score_axis(axes, x, name)
    # A few heads are far ahead of the rest in both, so both are on logarithmic axes; importance, which may be negative,
    # only beyond its median size.
    middle = float(np.median(np.abs(y)))
    if middle > 0:
        axes.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(middle)))
    axes.axhline(0, color="0.6", lw=0.8)
    for label, chosen, colour, marker, size in (
        ("neither", ~by_score & ~by_importance, "0.55", ".", 22),
        ("score only", by_score & ~by_importance, COLOURS[1], "^", 34),
        ("importance only", ~by_score & by_importance, COLOURS[0], "s", 30),
        ("both", by_score & by_importance, COLOURS[6], "*", 80),
    ):
        axes.scatter(
            x[chosen],
            y[chosen],
            s=size,
            marker=marker,
            color=colour,
            alpha=0.85,
            linewidths=0,
            label=f"{label} ({chosen.sum()})",
        )
    axes.set_xlabel(label_x)
    axes.set_ylabel("importance: loss increase, nats per token")
    axes.grid(alpha=0.25)
    figure.legend(
        title=f"in the top {ratio:.0%} by",
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        columnspacing=1.5,
        handletextpad=0.2,
    )
    return figure


def _score_axis(axes: Axes, x: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Make the x axis logarithmic where scores differ much; returns the scores to draw, and the axis' label.

    A few scores next to zero would leave no room for the others, and are drawn at the left edge.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    label, lowest = f"score: {name}", np.percentile(x, 2.5)
    if not (lowest > 0 and x.max() > 10 * lowest):
        return x, label
    axes.set_xscale("log")
    if x.max() < 100 * lowest:  # powers of ten alone would leave an axis with one number or none
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return np.maximum(x, lowest), f"{label}; the lowest 2.5 % at the left edge"


def paper_differences(against: Sequence[str] = ("full", "random"), threshold: float = 1.96) -> Figure:
    """The paper's differences as points with bars of `threshold` standard errors, a panel for each model.

    Args:
        against: Methods of Table 1, as in `paper.differences`.
        threshold: Standard errors; 1.96 for 95 %.
    """
    from matplotlib.figure import Figure

    found = differences(against, threshold)
    models, benchmarks = found["model"].unique(), found["benchmark"].unique()
    figure = Figure(figsize=(7.4, 3.2 + 0.4 * len(against)), layout="constrained")
    panels = figure.subplots(1, len(models), sharex=True, sharey=True)
    apart = 0.3 if len(against) < 3 else 0.7 / len(against)
    for axes, model in zip(panels, models):
        axes.axvline(0, color="0.35", lw=0.8)
        for i, method in enumerate(against):
            part = found[(found["model"] == model) & (found["against"] == method)]
            middle = (len(against) - 1) / 2
            axes.errorbar(
                part["difference"],
                [row + (i - middle) * apart for row in range(len(benchmarks))],
                xerr=threshold * part["standard_error"],
                fmt="osD^v"[i],
                color=COLOURS[i],
                ms=4,
                lw=1.2,
                capsize=2,
                label=f"alps − {method}",
            )
        axes.set_title(model, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(benchmarks)), [LABELS[name] for name in benchmarks])
    panels[0].invert_yaxis()
    figure.supxlabel(f"points, ± {threshold:g} standard errors of a difference", fontsize=10)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=min(3, len(against)), frameon=False)
    return figure


def _short(model: str) -> str:
    """A model's name without its publisher."""
    return model.rstrip("/").rsplit("/", 1)[-1]


def _panels(models: Sequence[str], title: str) -> tuple[Figure, Sequence[Axes]]:
    """A panel for each model, side by side, on one axis of scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 + 3.4 * len(models), 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models):
        panel.set_title(_short(model), fontsize=10)
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel(title)
    return figure, panels


def _points(panel: Axes, places: Sequence[float], line: pd.DataFrame, i: int, **look: Any) -> None:
    """Means with their intervals, if any, in the panel's i-th colour and marker."""
    look = {
        "color": MANY_COLOURS[i % 8],
        "marker": "os^Dvp*hX<>"[i % 11],
        "ms": 5,
        "capsize": 2,
        "elinewidth": 1,
        **look,
    }
    panel.errorbar(places, line["mean"], line["half_width"], **look)


def ratios(profile: Profile) -> Figure:
    """The paper's Figure 4: score by share of heads trained, a panel for each model, a line for each benchmark.

    Bars are Table 3's 95 % intervals.
    """
    table = paper_table(profile, "table3")
    columns = list(dict.fromkeys(table["column"]))
    figure, panels = _panels(list(dict.fromkeys(table["model"])), "score, %")
    for panel, (_, own) in zip(panels, table.groupby("model", sort=False)):
        for i, column in enumerate(columns):
            line = own[own["column"] == column]
            # Slightly offset, so that no bar hides another.
            places = line["row"].astype(float) + 0.6 * (i - (len(columns) - 1) / 2)
            bold = {"color": "black", "lw": 2.2, "ls": "-"} if column == "avg" else {"lw": 1.1, "ls": "--"}
            _points(panel, list(places), line, i, label=column, **bold)
        panel.set_xticks(sorted(set(own["row"].astype(float))))
        panel.set_xlabel("share of heads trained, %")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def selected_heads(profile: Profile) -> Figure:
    """The paper's Figures 5 and 8: the heads that `alps` selects, a panel for each model and family.

    Darker heads are selected in more of the training seeds.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    layouts, counts = _selections(profile)
    models, families = (list(dict.fromkeys(key[i] for key in counts)) for i in (0, 1))
    seeds = max(seeds for _, seeds in counts.values())
    colours = ListedColormap([str(1 - 0.9 * (n / seeds) ** 0.8) for n in range(seeds + 1)])
    norm = BoundaryNorm([n - 0.5 for n in range(seeds + 2)], seeds + 1)
    heights = [max(1.2, 0.12 * layouts[model].layers) for model in models]
    figure = Figure(figsize=(1.3 + 1.9 * len(families), 0.7 + 0.25 * len(models) + sum(heights)), layout="constrained")
    panels = figure.subplots(len(models), len(families), squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, model in zip(panels, models):
        layout = layouts[model]
        for panel, family in zip(line, families):
            count, _ = counts.get((model, family), (np.zeros((layout.layers, layout.heads)), 0))
            x, y = (np.arange(n + 1) - 0.5 for n in (layout.heads, layout.layers))
            mesh = panel.pcolormesh(x, y, count, cmap=colours, norm=norm, edgecolors="0.88", linewidth=0.3)
            panel.set_xticks(range(0, layout.heads, 1 if layout.heads <= 12 else 4))
            panel.set_yticks(range(0, layout.layers, 1 if layout.layers <= 8 else 5))
            panel.tick_params(labelsize=7, length=2, labelleft=panel is line[0])
        line[0].set_ylabel(f"layer of {_short(model)}", fontsize=8)
    for panel, family in zip(panels[0], families):
        panel.set_title(family, fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("query head", fontsize=8)
    bar = figure.colorbar(mesh, ax=panels, fraction=0.05, pad=0.02, ticks=range(seeds + 1), aspect=12, shrink=0.8)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.ax.set_title("seeds", fontsize=8)
    return figure


def _selections(profile: Profile) -> tuple[dict[str, HeadLayout], dict[tuple[str, str], tuple[np.ndarray, int]]]:
    """Each model's layout, and for each model and family in how many seeds each head is selected, of how many."""
    layouts: dict[str, HeadLayout] = {}
    counts: dict[tuple[str, str], tuple[np.ndarray, int]] = {}
    folder = Path(profile.results) / "records"
    for cell in cells(profile, "table1"):
        if cell.row != "alps" or not isinstance(cell.config.model, FinetuneConfig):
            continue
        assert cell.config.model.localization is not None
        trained = find_record(folder, cell.config.model)
        scored = find_record(folder, cell.config.model.localization)
        if trained is None or scored is None:
            continue
        layout = layouts[cell.base] = HeadLayout(**scored.result["layout"])
        count, seeds = counts.get((cell.base, cell.family), (np.zeros((layout.layers, layout.heads)), 0))
        for layer, head in trained.result["heads"]:
            count[layer, head] += 1
        counts[cell.base, cell.family] = count, seeds + 1
    if not counts:
        raise UserError("No run of alps is among the records yet: run the profile, then make its figures.")
    return layouts, counts


def transfer(profile: Profile) -> Figure:
    """The paper's Figure 6: each method's score on the second data set of a family, a panel for each model.

    Bars are Table 4's 95 % intervals.
    """
    table = paper_table(profile, "table4")
    columns, rows = list(dict.fromkeys(table["column"])), list(dict.fromkeys(table["row"]))
    figure, panels = _panels(list(dict.fromkeys(table["model"])), "score on the second data set, %")
    for panel, (_, own) in zip(panels, table.groupby("model", sort=False)):
        for i, row in enumerate(rows):
            line = own[own["row"] == row].set_index("column").reindex(columns)
            places = [x + 0.8 * (i - (len(rows) - 1) / 2) / len(rows) for x in range(len(columns))]
            _points(panel, places, line, i, label=row, ls="none")
        panel.set_xticks(range(len(columns)), columns)
        panel.tick_params(axis="x", length=0)
        for x in range(1, len(columns)):
            panel.axvline(x - 0.5, color="0.85", lw=0.8)
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def embeddings(profile: Profile) -> Figure:
    """The paper's Figure 7: the base model's embeddings of each data set's questions, on three principal axes.

    Two data sets of a family share a colour.
    """
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    config = profile.embedding()
    record = find_record(Path(profile.results) / "records", config)
    if record is None:
        raise UserError("The questions have not been embedded yet: run the profile, then make its figures.")
    points = record.result
    figure = Figure(figsize=(6.8, 4.4))
    axes: Any = figure.add_axes((-0.04, 0.0, 0.76, 1.0), projection="3d")  # its class has no types
    for i, family in enumerate(profile.families.values()):
        for name, marker in zip(family.datasets, "o^"):
            x, y, z = np.array(points[name]).T
            axes.scatter(x, y, z, label=name, s=9, color=COLOURS[i % len(COLOURS)], marker=marker, alpha=0.65, lw=0)
    axes.set_xlabel("first axis", fontsize=8)
    axes.set_ylabel("second axis", fontsize=8)
    axes.set_zlabel("third axis", fontsize=8)
    axes.tick_params(labelsize=7, pad=1)
    axes.set_box_aspect(None, zoom=0.95)
    legend = figure.legend(loc="center left", bbox_to_anchor=(0.73, 0.5), frameon=False, fontsize=8, markerscale=1.6)
    legend.set_title(f"questions in\n{_short(config.base)}", FontProperties(size=8))
    return figure


def systems(profile: Profile, table: str) -> Figure:
    """Every system's score with its 95 % interval, and its trainable parameters; coloured by the kind of adapter.

    Args:
        profile: Whose records to look at.
        table: One of its tables of systems.
    """
    from matplotlib.figure import Figure

    long = paper_table(profile, table)
    long = long[long["column"] == long["column"].iloc[-1]]  # the task, or the mean over them
    rows, models = list(dict.fromkeys(long["row"])), list(dict.fromkeys(long["model"]))
    kinds = list(dict.fromkeys(METHODS[row].adapter.split("_")[0] for row in rows if row in METHODS))
    figure = Figure(figsize=(2.6 + 3.4 * len(models), 1.1 + 0.24 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models):
        own = long[long["model"] == model]
        for entry in own.to_dict("records"):
            row = entry["row"]
            i = kinds.index(METHODS[row].adapter.split("_")[0]) if row in METHODS else 7
            look = {"color": MANY_COLOURS[i], "marker": "os^Dvp*h"[i], "ms": 5, "capsize": 2, "elinewidth": 1}
            panel.errorbar(entry["mean"], rows.index(row), xerr=entry["half_width"], **look)
        beside = panel.secondary_yaxis("right")
        beside.set_yticks(
            [rows.index(row) for row in own["row"]], _trainable_parameters(profile, table, own), fontsize=8
        )
        beside.tick_params(length=0)
        beside.set_ylabel("trainable parameters", fontsize=9)
        panel.set_title(_short(model), fontsize=10)
        panel.grid(axis="x", alpha=0.25)
        panel.set_xlabel("score, %")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    return figure


def _trainable_parameters(profile: Profile, table: str, own: pd.DataFrame) -> list[str]:
    """The trainable parameters of the first run behind each row; `–` where nothing was trained."""
    first = {(cell.base, cell.row): record for cell, record in reversed(recorded_cells(profile, table))}
    counts = [first[place].cost.trained_parameters for place in zip(own["model"], own["row"])]
    return ["–" if trained is None else f"{trained:,}" for trained in counts]


@dataclass(frozen=True)
class PaperFigure:
    """One of a profile's figures.

    Attributes:
        title: One line.
        table: The table of the profile that it needs.
        draw: Draws it from a profile's records.
        row: The row of that table that it shows; None for all.
        embeds: Whether it also needs the embeddings of the profile's data sets.
    """

    title: str
    table: str
    draw: Callable[[Profile], Figure]
    row: str | None = None
    embeds: bool = False


FIGURES: dict[str, PaperFigure] = {
    "figure4": PaperFigure("Score by share of heads trained", "table3", ratios),
    "figure5": PaperFigure("Selected heads (the paper's Figures 5 and 8)", "table1", selected_heads, "alps"),
    "figure6": PaperFigure("Heads transferred to another data set", "table4", transfer),
    "figure7": PaperFigure("The base model's embeddings of the questions", "table4", embeddings, embeds=True),
} | {
    name: PaperFigure(f"Scores of all systems, {size} training examples", name, partial(systems, table=name))
    for name, size in SYSTEMS.items()
}


def of_profile(profile: Profile) -> list[str]:
    """The names of the figures whose tables, and rows in them, a profile has."""
    return [
        name
        for name, figure in FIGURES.items()
        if figure.table in profile.tables
        and (figure.row is None or any(cell.row == figure.row for cell in cells(profile, figure.table)))
    ]


def write_figure(profile: Profile, name: str) -> list[Path]:
    """Make `figures/NAME.svg` and .png of a profile from its records.

    Args:
        profile: Whose records to look at.
        name: One of `of_profile`.

    Returns:
        the two paths.

    Raises:
        UserError: the profile has no such figure, or its runs are not there yet.
    """
    one_of("figure of this profile", name, of_profile(profile))
    return save(FIGURES[name].draw(profile), Path(profile.results) / "figures", name)


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `NAME.svg` and .png (200 dpi), each whole or not at all: the same figure gives the same bytes.

    Returns:
        the two paths.
    """
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A constrained layout changes slightly with every drawing, so it is computed once.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    paths = [folder / f"{name}.{suffix}" for suffix in ("svg", "png")]
    settings: list[dict[str, Any]] = [{"metadata": {"Date": None}}, {"metadata": {"Software": None}, "dpi": 200}]
    for path, own in zip(paths, settings):
        beside = folder / f".{name}.{os.getpid()}{path.suffix}"
        with matplotlib.rc_context({"svg.hashsalt": "alps-repro"}):
            figure.savefig(beside, **own)
        beside.replace(path)
    return paths
