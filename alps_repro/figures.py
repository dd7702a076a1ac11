"""Figures, made from records alone; `FIGURES` holds the paper's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alps_repro.errors import UserError, one_of
from alps_repro.experiments import cells
from alps_repro.recipe import FinetuneConfig, Profile
from alps_repro.records import Record, load_record, record_path
from alps_repro.tables import paper_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curves(records: Iterable[Record]) -> Figure:
    """Training loss in nats per counted token against the optimizer step, one line a run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    runs = [r for r in records if isinstance(r.config, FinetuneConfig) and r.result.get("losses")]
    for i, record in enumerate(runs):
        losses = record.result["losses"]
        label = f"{record.config.method} (scope {record.config.scope}, seed {record.config.seed})"
        axes.plot(range(1, len(losses) + 1), losses, color=COLOURS[i % len(COLOURS)], lw=1.6, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per token")
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def ratios(profile: Profile) -> Figure:
    """The paper's Figure 4: score against the share of heads that is trained, a panel a model, a line a benchmark.

    Bars are 95 % intervals, over what Table 3's are.
    """
    from matplotlib.figure import Figure

    table = paper_table(profile, "table3")
    models = list(dict.fromkeys(table["model"]))
    figure = Figure(figsize=(1.2 + 3.8 * len(models), 3.6), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models):
        for i, (column, line) in enumerate(table[table["model"] == model].groupby("column", sort=False)):
            shares = line["row"].astype(float)
            bold = column == "avg"
            panel.errorbar(
                shares,
                line["mean"],
                line["half_width"].fillna(0),
                marker="os^Dvp*"[i % 7],
                ms=5,
                lw=2.2 if bold else 1.3,
                capsize=2,
                color="black" if bold else COLOURS[i % len(COLOURS)],
                ls="-" if bold else "--",
                label=column,
            )
        panel.set(title=model, xlabel="share of heads trained, %", ylabel="score, %")
        panel.grid(alpha=0.25)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def selected_heads(profile: Profile) -> Figure:
    """The paper's Figures 5 and 8: which heads `alps` selects, a panel a model and family.

    Darker: selected in more of the training seeds.
    """
    import numpy as np
    from matplotlib.figure import Figure

    from alps_repro.heads import HeadLayout

    chosen: dict[tuple[str, str], list] = {}
    layouts: dict[str, HeadLayout] = {}
    folder = Path(profile.results) / "records"
    for cell in cells(profile, "table1"):
        if cell.row != "alps" or not isinstance(cell.config.model, FinetuneConfig):
            continue
        path = record_path(folder, "finetune", cell.config.model.name)
        scores = record_path(folder, "localize", cell.config.model.localization.name)
        if path.exists() and scores.exists():
            layouts[cell.base] = HeadLayout(**load_record(scores).result["layout"])
            chosen.setdefault((cell.base, cell.family), []).append(load_record(path).result["heads"])
    if not chosen:
        raise UserError("No run of alps is among the records yet: run the profile, then make its figures.")
    models, families = (list(dict.fromkeys(key[i] for key in chosen)) for i in (0, 1))
    deepest = max(layout.layers for layout in layouts.values())
    size = (0.6 + 2.1 * len(families), 1.2 + 0.16 * deepest * len(models))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(models), len(families), squeeze=False)
    seeds = max(len(runs) for runs in chosen.values())
    for line, model in zip(panels, models):
        for panel, family in zip(line, families):
            layout, counts = layouts[model], np.zeros((layouts[model].layers, layouts[model].heads))
            for heads in chosen.get((model, family), []):
                for layer, head in heads:
                    counts[layer, head] += 1
            image = panel.imshow(counts, origin="lower", cmap="Greys", vmin=0, vmax=seeds, aspect="auto")
            panel.set_title(family, fontsize=9)
            panel.set_xticks(range(0, layout.heads, 1 if layout.heads <= 12 else 4))
            panel.tick_params(labelsize=7, length=2)
        line[0].set_ylabel(f"layer of {model.rsplit('/', 1)[-1]}", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("query head", fontsize=8)
    bar = figure.colorbar(image, ax=panels, fraction=0.04, pad=0.02, ticks=range(seeds + 1))
    bar.set_label("training seeds in which the head is selected", fontsize=8)
    return figure


def transfer(profile: Profile) -> Figure:
    """The paper's Figure 6: what each method reaches on the second data set of a family, a panel a model.

    Bars are 95 % intervals, over what Table 4's are.
    """
    from matplotlib.figure import Figure

    table = paper_table(profile, "table4")
    models = list(dict.fromkeys(table["model"]))
    figure = Figure(figsize=(1.5 + 4.2 * len(models), 3.8), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models):
        own = table[table["model"] == model]
        columns, rows = list(dict.fromkeys(own["column"])), list(dict.fromkeys(own["row"]))
        for i, row in enumerate(rows):
            line = own[own["row"] == row].set_index("column").reindex(columns)
            places = [x + 0.8 * (i - (len(rows) - 1) / 2) / len(rows) for x in range(len(columns))]
            panel.errorbar(
                places,
                line["mean"],
                line["half_width"].fillna(0),
                fmt="os^Dvp*hX<>"[i % 11],
                ms=5,
                capsize=2,
                color=COLOURS[i % len(COLOURS)],
                label=row,
            )
        panel.set_xticks(range(len(columns)), columns)
        panel.set(title=model, ylabel="score on the second data set, %")
        panel.grid(axis="y", alpha=0.25)
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def embeddings(profile: Profile) -> Figure:
    """The paper's Figure 7: where the base model puts each data set's questions, on three principal axes."""
    from matplotlib.figure import Figure

    config = profile.embedding()
    path = record_path(Path(profile.results) / "records", "embed", config.name)
    if not path.exists():
        raise UserError("The questions have not been embedded yet: run the profile, then make its figures.")
    figure = Figure(figsize=(6.6, 4.8), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    for i, (name, points) in enumerate(load_record(path).result.items()):
        family = i // 2  # two data sets of a family share a colour
        colour, marker = COLOURS[family % len(COLOURS)], "o^"[i % 2]
        axes.scatter(*zip(*points), s=9, color=colour, marker=marker, alpha=0.65, label=name)
    axes.set(xlabel="first axis", ylabel="second axis", zlabel="third axis")
    axes.tick_params(labelsize=7)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


@dataclass(frozen=True)
class PaperFigure:
    """title: one line. table: the table of the profile that it needs. draw: from a profile's records.

    embeds: whether it needs the embeddings of the profile's data sets, too.
    """

    title: str
    table: str
    draw: Callable[[Profile], Figure]
    embeds: bool = False


FIGURES: dict[str, PaperFigure] = {
    "figure4": PaperFigure("Score against the share of heads", "table3", ratios),
    "figure5": PaperFigure("Which heads are selected (the paper's Figures 5 and 8)", "table1", selected_heads),
    "figure6": PaperFigure("Heads carried over to another data set", "table4", transfer),
    "figure7": PaperFigure("Where the base model puts the data sets' questions", "table4", embeddings, embeds=True),
}


def of_profile(profile: Profile) -> list[str]:
    """The names of the figures whose tables a profile has."""
    return [name for name, figure in FIGURES.items() if figure.table in profile.tables]


def write_figure(profile: Profile, name: str) -> list[Path]:
    """Make `figures/NAME.svg` and .png of a profile from its records; returns their paths."""
    one_of("figure of this profile", name, of_profile(profile))
    return save(FIGURES[name].draw(profile), Path(profile.results) / "figures", name)


def save(figure: Figure, folder: str | Path, name: str) -> list[Path]:
    """Write `name`.svg and .png (200 dpi); returns their paths. The same figure gives the same bytes."""
    import matplotlib

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("svg", "png")]
    # A constrained layout moves a little with every drawing, so it is settled once.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    with matplotlib.rc_context({"svg.hashsalt": "alps-repro"}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=200, metadata={"Software": None})
    return paths
