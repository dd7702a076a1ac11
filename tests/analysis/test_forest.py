"""Forest plots: every claim with its numbers, also without colours and without an interval."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alps_repro.analysis.claims import CLAIMS, VERDICTS, claim_figures
from alps_repro.analysis.figures import save
from alps_repro.analysis.forest import LOOKS, ForestRow, forest, margin_text

RESULTS = Path(__file__).parents[2] / "results"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def row(verdict: str = "holds", low: float = 1.0, high: float = 3.0, group: str = "table1: first") -> ForestRow:
    return ForestRow(f"is {verdict}", group, 2.0, low, high, 1.0, "points", verdict, 1)


@pytest.mark.parametrize("name", ["cpu", "grid", "grid-time", "reference/quick"])
def test_every_claim_is_drawn_with_its_numbers(name: str) -> None:
    claims = pd.read_csv(RESULTS / name / "claims.csv")
    figures = claim_figures(claims)
    assert list(figures) == ["claims_points", "claims_nats"]
    for figure, measures in zip(figures.values(), (["accuracy"], ["log_likelihood", "loss"])):
        own = claims[claims["measure"].isin(measures)]
        shown, drawn = texts(figure), []
        for claim in own.to_dict("records"):
            assert CLAIMS[claim["claim"]].statement in shown
        for line in figure.axes[0].get_lines():
            if len(line.get_xdata()) == 1:
                drawn.append(line.get_xdata()[0])
        assert sorted(drawn) == sorted(own["effect"])
        assert [text for text in shown if text in VERDICTS].count("holds") == (own["verdict"] == "holds").sum()
        low, high = figure.axes[0].get_xlim()
        assert low < own["ci_low"].min() < own["ci_high"].max() < high
        assert figure.get_size_inches()[1] < 8


def test_verdicts_can_be_told_without_colours() -> None:
    assert set(LOOKS) == set(VERDICTS)
    looks = {(look["marker"], look["markerfacecolor"] == "white", "ls" in look) for look in LOOKS.values()}
    assert len(looks) == len(LOOKS)


def test_only_the_verdicts_that_there_are_stand_in_the_legend() -> None:
    (legend,) = forest([row("holds"), row("no verdict")]).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *["holds", "no verdict: one training seed, interval over questions alone", "margin: 1 point"]
    ]


def test_no_interval() -> None:
    figure = forest([row("no verdict", math.nan, math.nan)])
    assert "–" in texts(figure)
    assert not any(isinstance(line, Line2D) and line.get_marker() == "|" for line in figure.axes[0].get_lines())


def test_groups_are_headed_once_and_by_their_unit_where_there_are_several() -> None:
    other = ForestRow("loss", "table5: second", 0.1, 0.0, 0.2, 0.01, "nats per token", "undecided", 3)
    assert texts(forest([row(), row("fails")])).count("table1: first") == 1
    shown = texts(forest([row(), other]))
    assert {"table1: first (points)", "table5: second (nats per token)"} <= set(shown)


def test_margin_is_a_band_from_zero() -> None:
    (band,) = forest([row()]).axes[0].containers
    assert [(patch.get_x(), patch.get_width()) for patch in band] == [(0, 1.0)]
    assert to_hex(band[0].get_facecolor()) == "#f3d98b"
    assert [margin_text(1.0, "points"), margin_text(0.02, "nats per answer")] == ["1 point", "0.02 nats per answer"]


def test_same_claims_same_bytes(tmp_path: Path) -> None:
    first, second = (save(forest([row(), row("fails")]), tmp_path / name, "f") for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
