"""The paper's numbers and their arithmetic: against numbers taken by hand, exact fractions, and scipy."""

from __future__ import annotations

import csv
import math
from decimal import ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction

import pytest
from scipy.stats import binom

from alps_repro.analysis import figures, paper
from alps_repro.errors import UserError

MODELS = ["Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"]


# The numbers


def test_every_number_is_there_once() -> None:
    numbers = paper.reported()
    assert len(numbers) == 849
    assert list(numbers.columns) == ["table", "model", "setting", "train_task", "benchmark", "value"]
    assert not numbers.duplicated(["table", "model", "setting", "train_task", "benchmark"]).any()
    assert set(numbers["table"]) == set(paper.TABLES)
    assert list(numbers["model"].unique()) == MODELS
    assert numbers["train_task"].notna().equals(numbers["table"] == "table14")
    assert numbers.drop(columns="train_task").notna().all(axis=None)


@pytest.mark.parametrize("table", paper.TABLES)
def test_wide_tables_hold_their_numbers(table: str) -> None:
    """Each number of the file in its cell, and no more, in the order of the file."""
    wide = paper.paper_table(table)
    with paper.NUMBERS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == table]
    assert wide.size == len(rows)
    for row in rows:
        key = (row["model"], row["setting"], *([row["train_task"]] if row["train_task"] else []))
        assert wide.loc[key, row["benchmark"]] == float(row["value"])
    keys = list(dict.fromkeys((row["model"], row["setting"], row["train_task"]) for row in rows))
    assert [key[:2] for key in wide.index] == [key[:2] for key in keys]
    assert list(wide.columns) == list(dict.fromkeys(row["benchmark"] for row in rows))


def test_cells_taken_by_hand() -> None:
    first = paper.paper_table("table1")
    assert first.loc[("Llama-3.1-8B", "alps"), "gpqa"] == 27.29
    assert first.loc[("Llama-3.2-3B", "full"), "mbpp"] == 50
    assert paper.paper_table("table3").loc[("Llama-3.1-8B", "0"), "humaneval_plus"] == 64.88
    assert paper.paper_table("table11").loc[("Llama-3.2-1B", "alps"), "train_hours"] == 0.4
    assert paper.paper_table("table14").loc[("Llama-3.2-1B", "full", "code"), "gpqa"] == 10.27


def test_no_such_table() -> None:
    with pytest.raises(UserError, match="There is no table 'table5': did you mean 'table"):
        paper.paper_table("table5")


# Averages


def test_averages() -> None:
    found = paper.averages().set_index(["table", "model", "setting"])
    assert len(found) == (paper.reported()["benchmark"] == "avg").sum() == 87
    differing = found[found["differs"]]
    assert {key: (row["printed"], round(row["mean"], 3)) for key, row in differing.iterrows()} == {
        ("table1", "Llama-3.2-1B", "lora"): (28.22, 28.229),
        ("table1", "Llama-3.1-8B", "alps"): (52.41, 52.436),
        ("table2", "Llama-3.1-8B", "pad"): (52.41, 52.416),
        ("table3", "Llama-3.1-8B", "30"): (51.62, 51.75),
        ("table3", "Llama-3.1-8B", "10"): (52.41, 52.416),
        ("table12", "Llama-3.1-8B", "alps"): (34.67, 34.697),
    }
    # Rounding of the cells alone accounts for three of them.
    assert list(found.index[~found["possible"]]) == [
        ("table1", "Llama-3.1-8B", "alps"),
        ("table3", "Llama-3.1-8B", "30"),
        ("table12", "Llama-3.1-8B", "alps"),
    ]
    assert differing["cells"].tolist() == [8, 8, 8, 8, 8, 3]
    assert ((found["low"] < found["mean"]) & (found["mean"] < found["high"])).all()


def test_possible_averages_are_those_that_some_unrounded_cells_have() -> None:
    """Cells moved as far as rounding allows towards the printed average reach it, or nothing does."""
    averages = paper.averages()
    tables = {table: paper.paper_table(table) for table in averages["table"].unique()}
    for row in averages.itertuples():
        cells = tables[row.table].loc[(row.model, row.setting)].drop("avg")
        sign = 1 if row.printed > row.mean else -1
        steps = [Decimal("0.05") if paper.decimals(cell) == 1 else Decimal("0.005") for cell in cells]
        moved = sum(Decimal(str(cell)) + sign * step for cell, step in zip(cells, steps)) / len(cells)
        assert float(moved) == pytest.approx(row.high if sign == 1 else row.low)
        passed = sign * (Decimal(str(row.printed)) - sign * Decimal("0.005") - moved) <= 0
        assert row.possible == passed


# Numbers that stand in several tables


def test_contradictions() -> None:
    found = paper.contradictions().set_index(["model", "method", "benchmark"])
    assert {key: row.dropna().to_dict() for key, row in found.iterrows()} == {
        ("Llama-3.1-8B", "no_attn", "humaneval_plus"): {"table1": 65.88, "table3": 64.88, "table14": 65.88},
        ("Llama-3.1-8B", "no_attn", "avg"): {"table1": 49.82, "table3": 49.69},
        ("Llama-3.1-8B", "alps", "gpqa"): {"table1": 27.29, "table2": 27.13, "table3": 27.13, "table14": 27.29},
    }


def test_repeated_numbers_are_looked_for_everywhere() -> None:
    found = paper.repeated()
    assert len(found) == 3 * 3 * 9
    # Three runs of three models: nine numbers in Tables 1 and 3, for alps in Table 2; eight in Table 14; two models of
    # two runs with six in Table 10.
    places = found.drop(columns=["model", "method", "benchmark"]).notna().sum()
    assert places.to_dict() == {"table1": 81, "table2": 27, "table3": 81, "table10": 24, "table14": 72}
    # A wrong reading of Table 14 would take the number of another task's model.
    row = found.query("model == 'Llama-3.2-1B' and method == 'full' and benchmark == 'gsm8k'").iloc[0]
    assert row["table14"] == row["table1"] == 17.82


# Fractions


@pytest.mark.parametrize("questions", [1, 7, 8, 164, 448, 500, 1319])
@pytest.mark.parametrize("places", [1, 2])
def test_fractions_by_brute_force(questions: int, places: int) -> None:
    """A printed number is k of N just when rounding some k/N, with ties in any manner, prints it."""
    step = Decimal(1).scaleb(-places)
    printed = set()
    for k in range(questions + 1):
        exact = Fraction(100 * k, questions)
        # To 28 digits, of which a tie has few.
        value = Decimal(exact.numerator) / Decimal(exact.denominator)
        printed |= {value.quantize(step, rounding=way) for way in (ROUND_HALF_UP, ROUND_HALF_DOWN, ROUND_HALF_EVEN)}
    unit = 100 * 10**places
    every = [Decimal(i).scaleb(-places) for i in range(0, unit + 1, 1 if questions in (8, 448) else 7)]
    assert [paper.is_fraction(float(value), questions, places) for value in every] == [
        value in printed for value in every
    ]
    assert paper.share_of_fractions(questions, places) == len(printed) / (unit + 1)


def test_fractions_by_hand() -> None:
    assert paper.is_fraction(45.12, 164, 2)  # 74/164 = 0.45121...
    assert not paper.is_fraction(45.13, 164, 2)
    assert not paper.is_fraction(69.5, 164, 2)  # 114/164 = 0.69512...
    assert paper.is_fraction(69.5, 164, 1)
    assert paper.is_fraction(3.12, 448, 2)  # 14/448 = 0.03125: a tie
    assert paper.is_fraction(3.13, 448, 2)
    assert not paper.is_fraction(100.01, 448, 2)  # no more than all
    assert (paper.decimals(34.2), paper.decimals(50.0), paper.decimals(34.27)) == (1, 1, 2)


def test_counts_of_fractions() -> None:
    found = paper.fraction_counts(["setting"], "table1").set_index(["setting", "benchmark", "questions"])
    both = found.loc[(slice(None), ["gpqa", "gsm8k"]), :].groupby("setting", sort=False)
    assert (both["cells"].sum() == 6).all()
    assert list(both["two_decimals"].sum().items()) == [
        *[("full", 6), ("no_attn", 5), ("random", 6), ("layer_consistent", 0), ("lora", 0), ("alps", 2)]
    ]
    # 34.2, if it was printed so, can be 451/1319.
    assert both["as_stored"].sum()["lora"] == 1
    every = paper.fraction_counts().set_index(["benchmark", "questions"])
    assert every.loc[("humaneval", 164), ["cells", "as_stored", "two_decimals"]].tolist() == [85, 9, 6]
    assert every.loc[("humaneval_plus", 164), ["cells", "as_stored", "two_decimals"]].tolist() == [85, 0, 0]
    # Table 12 has a column "math" too, which is a task.
    assert every.loc[("math", 5000), "cells"] == 85
    assert every.loc[("math", 5000), "by_chance"] == pytest.approx(42.5, abs=0.01)
    once = paper.fraction_counts(distinct=True).set_index(["benchmark", "questions"])
    assert once.loc[("humaneval", 164), ["cells", "two_decimals"]].tolist() == [56, 3]


def test_table_of_fractions() -> None:
    shown = paper.fraction_table().set_index(["benchmark", "questions"])
    methods = ["full", "no_attn", "random", "layer_consistent", "lora", "alps"]
    assert list(shown.columns) == ["count", *methods, "by chance"]
    row = shown.loc[("gpqa", 448)]
    assert row[methods].tolist() == ["3 of 3", "2 of 3", "3 of 3", "0 of 3", "0 of 3", "1 of 3"]
    assert row["by chance"] == "5%"
    assert len(shown) == 10


# The vanilla row


def test_vanilla_row_is_the_model_cards() -> None:
    found = paper.vanilla()
    assert len(found) == 6
    assert found["equal"].all()
    assert found["vanilla"].tolist() == [32.2, 58, 66.7, 32.8, 69.1, 79.7]
    arc = found[found["benchmark"] == "arc_challenge"]
    assert set(zip(arc["shots_of_card"], arc["shots_of_tuned_rows"])) == {(25, 0)}


def test_drops() -> None:
    found = paper.drops().set_index(["model", "method"])
    assert len(found) == 18
    row = found.loc[("Llama-3.1-8B", "alps")]
    assert row[["mmlu", "arc_challenge", "average"]].tolist() == pytest.approx([8.83, 15.41, 12.12])
    assert row["across_protocols"] == pytest.approx(15.41 / 24.24)
    assert found["average"].tolist() == pytest.approx(list((found["mmlu"] + found["arc_challenge"]) / 2), abs=0.011)


# Standard errors


@pytest.mark.parametrize(("value", "questions"), [(26.16, 448), (4.6, 5000), (72.68, 164), (50, 1), (0, 10)])
def test_standard_error_is_the_binomials(value: float, questions: int) -> None:
    expected = 100 * binom.std(questions, value / 100) / questions
    assert paper.standard_error(value, questions) == pytest.approx(expected)


def test_standard_errors_of_a_table() -> None:
    found = paper.standard_errors()
    assert len(found) == 3 * 6 * 7
    gpqa = found[found["benchmark"] == "gpqa"]["standard_error"]
    assert 1.8 < gpqa.min() < gpqa.max() < 2.2


def test_differences() -> None:
    found = paper.differences()
    assert len(found) == 3 * 8 * 2
    row = found.query("model == 'Llama-3.2-1B' and benchmark == 'gpqa' and against == 'full'").iloc[0]
    # By hand: sqrt(26.16 * 73.84 / 448 + 18.75 * 81.25 / 448) = 2.777, and 7.41 / 2.777 = 2.668.
    assert row["difference"] == pytest.approx(7.41)
    assert row["standard_error"] == pytest.approx(2.777, abs=1e-3)
    assert row["ratio"] == pytest.approx(2.668, abs=1e-3)
    assert not row["below_threshold"]
    assert (found["below_1"] <= found["below_threshold"]).all()
    counts = paper.difference_counts(found).set_index("against")
    assert counts.loc["full"].tolist() == [24, 24, 18, 19]
    assert counts.loc["random"].tolist() == [24, 20, 16, 21]


def test_threshold_and_questions_of_differences() -> None:
    assert paper.differences(threshold=100)["below_threshold"].all()
    assert not paper.differences(threshold=1e-9)["below_threshold"].any()
    fewer, more = (paper.differences(["lora"], questions={"mbpp": n}).set_index("benchmark") for n in (100, 400))
    ratios = more.loc["mbpp", "ratio"] / fewer.loc["mbpp", "ratio"]
    assert ratios.tolist() == pytest.approx([2, 2, 2])
    assert more.drop("mbpp").equals(fewer.drop("mbpp"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"against": ["ful"]}, "There is no method 'ful': did you mean 'full'"),
        ({"against": ["alps"]}, "There is no method 'alps'"),
        ({"against": "full"}, "'against' is 'full': give a list"),
        ({"against": []}, r"'against' is \[\]: give a list"),
        ({"against": 5}, "'against' is 5: give a list"),
        ({"threshold": 0}, "'threshold' is 0: give a positive number"),
        ({"threshold": "2"}, "'threshold' is '2'"),
        ({"threshold": math.nan}, "'threshold' is nan"),
    ],
)
def test_impossible_comparisons(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        paper.differences(**given)


def test_figure_shows_the_differences() -> None:
    figure = figures.paper_differences(["random"], threshold=2)
    found = paper.differences(["random"])
    assert [axes.get_title() for axes in figure.axes] == MODELS
    for axes, model in zip(figure.axes, MODELS):
        part = found[found["model"] == model]
        (drawn,) = axes.containers
        points, _, (bars,) = drawn
        assert points.get_xdata().tolist() == pytest.approx(part["difference"].tolist())
        widths = [segment[1][0] - segment[0][0] for segment in bars.get_segments()]
        assert widths == pytest.approx((4 * part["standard_error"]).tolist())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alps − random"]
