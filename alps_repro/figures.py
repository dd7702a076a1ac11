"""Figures, made from records alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from alps_repro.recipe import FinetuneConfig
from alps_repro.records import Record

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
