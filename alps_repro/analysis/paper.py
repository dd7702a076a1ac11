"""The paper's reported numbers, and their arithmetic: averages, repeated numbers, fractions, standard errors.

This says which numbers agree, and nothing about causes. A number in `reported.csv` has no trailing zero, so that 34.2
may have been printed as 34.20. Where it matters, both interpretations are given: `as_stored` (34.2 is anything from
34.15 to 34.25) and `two_decimals` (34.195 to 34.205).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError, one_of

if TYPE_CHECKING:
    import pandas as pd

NUMBERS = Path(__file__).parent / "reported.csv"

#: The tables of `reported.csv`; 12 and 13 are Tables 4 and 5 in full.
TABLES = ("table1", "table2", "table3", "table10", "table11", "table12", "table13", "table14")

#: Tables whose columns are benchmarks; those of Table 12 are tasks, that of Table 11 hours.
ACCURACIES = tuple(table for table in TABLES if table not in ("table11", "table12"))

#: The tables that repeat Table 1's runs, and under which setting.
REPEATS: dict[str, dict[str, str]] = {
    "full": {"table3": "100", "table10": "full", "table14": "full"},
    "no_attn": {"table3": "0", "table14": "no_attn"},
    "alps": {"table2": "pad", "table3": "10", "table10": "alps", "table14": "alps"},
}

#: The task whose model a benchmark is evaluated on, except in Table 14, which has every benchmark on every model.
TASK_OF = {
    **dict.fromkeys(("ifeval", "gpqa"), "general"),
    **dict.fromkeys(("gsm8k", "math"), "math"),
    **dict.fromkeys(("humaneval", "humaneval_plus", "mbpp", "mbpp_plus"), "code"),
}

#: How many questions a benchmark may have, by source; the first is used for standard errors (for code, the paper names
#: EvalPlus). IFEval and MMLU are left out: their numbers are means of several accuracies.
QUESTIONS: dict[str, dict[str, int]] = {
    "gpqa": {"GPQA main": 448},
    "gsm8k": {"GSM8K, test": 1319},
    "math": {"MATH, test": 5000},
    "humaneval": {"HumanEval": 164},
    "humaneval_plus": {"EvalPlus": 164},
    "mbpp": {"EvalPlus 0.2": 378, "EvalPlus 0.1": 399, "lm-eval": 500},
    "mbpp_plus": {"EvalPlus 0.2": 378, "EvalPlus 0.1": 399},
    "arc_challenge": {"ARC-C, test": 1172},
}

#: The Llama 3.2 model card's numbers of the base models (github.com/meta-llama/llama-models, models/llama3_2/
#: MODEL_CARD.md, "Base Pretrained Models"): by Meta's own evaluation library, MMLU with 5 shots as a mean over subjects
#: (macro_avg/acc_char), ARC-Challenge with 25 shots (acc_char).
MODEL_CARD: dict[str, dict[str, float]] = {
    "mmlu": {"Llama-3.2-1B": 32.2, "Llama-3.2-3B": 58.0, "Llama-3.1-8B": 66.7},
    "arc_challenge": {"Llama-3.2-1B": 32.8, "Llama-3.2-3B": 69.1, "Llama-3.1-8B": 79.7},
}
MODEL_CARD_SHOTS = {"mmlu": 5, "arc_challenge": 25}

#: The shots that the paper names for the same benchmarks.
PAPER_SHOTS = {"mmlu": 5, "arc_challenge": 0}


def reported() -> pd.DataFrame:
    """Every number of the paper's result tables: table, model, setting, train_task (Table 14's), benchmark, value."""
    import pandas as pd

    return pd.read_csv(NUMBERS, dtype={"setting": str, "train_task": str})


def paper_table(table: str) -> pd.DataFrame:
    """One of the paper's tables, in its order: a row per model and setting (Table 14: and task), a benchmark a column.

    Raises:
        UserError: it is not in `TABLES`.
    """
    one_of("table", table, TABLES)
    rows = reported().query("table == @table")
    keys = ["model", "setting", *(["train_task"] if rows["train_task"].notna().any() else [])]
    wide = rows.pivot(index=keys, columns="benchmark", values="value")
    order = rows[keys].drop_duplicates().itertuples(index=False, name=None)
    return wide.reindex(index=list(order), columns=list(rows["benchmark"].unique()))


# Rounded numbers


def _exact(value: float) -> Fraction:
    return Fraction(repr(float(value)))


def decimals(value: float) -> int:
    """Decimals of a number in `reported.csv`; the printed one may have had one more, a trailing zero."""
    return len(repr(float(value)).split(".")[1])


def half_step(places: int) -> Fraction:
    """How far the number that was rounded to so many decimals may lie from the printed one."""
    return Fraction(1, 2 * 10**places)


@cache
def is_fraction(value: float, questions: int, places: int) -> bool:
    """Whether some k out of so many questions, in percent, rounds to the printed value (ties either way)."""
    exact, half = _exact(value), half_step(places)
    low = max(0, math.ceil((exact - half) * questions / 100))
    return low <= min(questions, math.floor((exact + half) * questions / 100))


@cache
def share_of_fractions(questions: int, places: int = 2) -> float:
    """Of all numbers from 0 to 100 with so many decimals, the share that some k out of so many questions rounds to."""
    unit = 100 * 10**places
    reachable = set()
    for k in range(questions + 1):
        double = 2 * unit * k  # over 2 * questions; a tie may be rounded either way
        reachable.add((double + questions) // (2 * questions))
        reachable.add(-((questions - double) // (2 * questions)))
    return len(reachable) / (unit + 1)


# Averages


def averages() -> pd.DataFrame:
    """Printed averages beside those of the printed cells.

    Returns:
        a row per model and setting of tables with averages. Columns: table, model, setting, cells, printed, mean (of
        the printed cells), low and high (between which the mean of the unrounded cells lies), differs (the mean does
        not round to the printed average), possible (some unrounded cells round to the cells, and their mean to the
        average, as printed).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for (table, model, setting), group in reported().groupby(["table", "model", "setting"], sort=False):
        if "avg" not in set(group["benchmark"]):
            continue
        values = group.set_index("benchmark")["value"]
        printed, cells = _exact(values["avg"]), values.drop("avg")
        mean = sum(map(_exact, cells), Fraction(0)) / len(cells)
        slack = sum((half_step(decimals(value)) for value in cells), Fraction(0)) / len(cells)
        distance: Fraction = abs(printed - mean)
        # Averages have two decimals everywhere.
        rows.append(
            {
                "table": table,
                "model": model,
                "setting": setting,
                "cells": len(cells),
                "printed": float(printed),
                "mean": float(mean),
                "low": float(mean - slack),
                "high": float(mean + slack),
                "differs": distance > half_step(2),
                "possible": distance <= slack + half_step(2),
            }
        )
    return pd.DataFrame(rows)


# Numbers in several tables


def repeated() -> pd.DataFrame:
    """Numbers of one model, method and benchmark that are in several tables (`REPEATS`), a column for each table."""
    import pandas as pd

    numbers = reported()
    own = numbers["train_task"].isna() | (numbers["train_task"] == numbers["benchmark"].map(TASK_OF))
    runs = {
        run: part.set_index(["model", "benchmark"])["value"] for run, part in numbers[own].groupby(["table", "setting"])
    }
    parts = []
    for method, places in REPEATS.items():
        first = runs["table1", method]
        columns = {"table1": first, **{table: runs[table, setting] for table, setting in places.items()}}
        part = pd.DataFrame(columns).reindex(first.index).reset_index()
        part.insert(1, "method", method)
        parts.append(part)
    tables = [table for table in TABLES if any(table in part for part in parts)]
    return pd.concat(parts, ignore_index=True)[["model", "method", "benchmark", *tables]]


def contradictions() -> pd.DataFrame:
    """Those of `repeated()` that are not the same number everywhere."""
    numbers = repeated()
    values = numbers.drop(columns=["model", "method", "benchmark"])
    return numbers[values.nunique(axis=1) > 1].dropna(axis=1, how="all").reset_index(drop=True)


# Accuracies as fractions


def fractions() -> pd.DataFrame:
    """For every printed accuracy and every count in `QUESTIONS`, whether it can be k out of so many.

    Returns:
        a frame with the columns table, model, setting, train_task, benchmark, value, questions, count (its source),
        as_stored, two_decimals. Table 13's vanilla row, which is a model card's, is left out.
    """
    import pandas as pd

    numbers = reported().query("table in @ACCURACIES and benchmark in @QUESTIONS and setting != 'vanilla'")
    rows: list[dict[str, Any]] = []
    for number in numbers.to_dict("records"):
        for count, questions in QUESTIONS[number["benchmark"]].items():
            value = number["value"]
            rows.append(
                {
                    **{str(name): entry for name, entry in number.items()},
                    "questions": questions,
                    "count": count,
                    "as_stored": is_fraction(value, questions, decimals(value)),
                    "two_decimals": is_fraction(value, questions, 2),
                }
            )
    return pd.DataFrame(rows)


def fraction_counts(by: Iterable[str] = (), table: str | None = None, distinct: bool = False) -> pd.DataFrame:
    """How many printed accuracies can be k out of N, for each benchmark and N.

    Args:
        by: Further columns to count by, such as `setting` and `table`.
        table: One table alone.
        distinct: Count a model's equal numbers for a benchmark once, as most of them are repeats.

    Returns:
        a frame with the columns of `by`, benchmark, count, questions, cells, as_stored, two_decimals, by_chance
        (expected number among as many numbers with two decimals, uniform from 0 to 100).

    Raises:
        UserError: `table` is not in `ACCURACIES`.
    """
    numbers = fractions()
    if table is not None:
        one_of("table", table, ACCURACIES)
        numbers = numbers[numbers["table"] == table]
    if distinct:
        numbers = numbers.drop_duplicates([*by, "model", "benchmark", "value", "count"])
    keys = [*by, "benchmark", "count", "questions"]
    counts = numbers.groupby(keys, sort=False).agg(
        cells=("value", "size"), as_stored=("as_stored", "sum"), two_decimals=("two_decimals", "sum")
    )
    counts = counts.reset_index()
    counts["by_chance"] = counts["cells"] * counts["questions"].map(share_of_fractions)
    return counts


def fraction_table(table: str = "table1", reading: str = "two_decimals") -> pd.DataFrame:
    """A table's `fraction_counts` by setting, each cell such as `3 of 3`; the last column is the share by chance.

    Args:
        table: Of `ACCURACIES`.
        reading: `two_decimals` or `as_stored`: how printed numbers are interpreted.

    Raises:
        UserError: either is unknown.
    """
    one_of("reading", reading, ("two_decimals", "as_stored"))
    counts = fraction_counts(["setting"], table)
    counts["shown"] = [f"{can} of {cells}" for can, cells in zip(counts[reading], counts["cells"])]
    keys = ["benchmark", "questions", "count"]
    wide = counts.pivot(index=keys, columns="setting", values="shown")
    order = list(counts[keys].drop_duplicates().itertuples(index=False, name=None))
    wide = wide.reindex(index=order, columns=list(counts["setting"].unique())).rename_axis(columns=None)
    wide["by chance"] = [f"{share_of_fractions(questions):.0%}" for _, questions, _ in order]
    return wide.reset_index()


# The vanilla row of Table 13


def vanilla() -> pd.DataFrame:
    """Table 13's vanilla row beside the model card's numbers, with the shots of the card and of the tuned rows."""
    import pandas as pd

    printed = paper_table("table13")
    rows = [
        {
            "model": model,
            "benchmark": benchmark,
            "vanilla": printed.loc[(model, "vanilla"), benchmark],
            "model_card": value,
            "equal": printed.loc[(model, "vanilla"), benchmark] == value,
            "shots_of_card": MODEL_CARD_SHOTS[benchmark],
            "shots_of_tuned_rows": PAPER_SHOTS[benchmark],
        }
        for benchmark, values in MODEL_CARD.items()
        for model, value in values.items()
    ]
    return pd.DataFrame(rows)


def drops() -> pd.DataFrame:
    """Points that Table 13's tuned rows lie below vanilla, per benchmark and in the average.

    Returns:
        a frame with the columns model, method, mmlu (the same shots on both sides), arc_challenge (0 shots and 25),
        average, and across_protocols: the share of the two drops' sum that is ARC-Challenge's.
    """
    import pandas as pd

    printed = paper_table("table13")
    rows = []
    for model, method in printed.index:
        if method == "vanilla":
            continue
        lost = printed.loc[(model, "vanilla")] - printed.loc[(model, method)]
        mmlu, arc = lost["mmlu"], lost["arc_challenge"]
        rows.append(
            {
                "model": model,
                "method": method,
                "mmlu": mmlu,
                "arc_challenge": arc,
                "average": lost["avg"],
                "across_protocols": arc / (mmlu + arc),
            }
        )
    return pd.DataFrame(rows)


# Standard errors


def standard_error(value: float, questions: int) -> float:
    """Binomial standard error, in points, of an accuracy in percent over that many questions."""
    share = value / 100
    return 100 * math.sqrt(share * (1 - share) / questions)


def _questions(benchmark: str) -> int:
    return next(iter(QUESTIONS[benchmark].values()))


def standard_errors(table: str = "table1") -> pd.DataFrame:
    """A row per accuracy of a table whose number of questions is known: its binomial standard error in points.

    Raises:
        UserError: the table is not in `ACCURACIES`.
    """
    one_of("table", table, ACCURACIES)
    numbers = reported().query("table == @table and benchmark in @QUESTIONS").reset_index(drop=True)
    numbers["questions"] = [_questions(benchmark) for benchmark in numbers["benchmark"]]
    numbers["standard_error"] = [standard_error(v, n) for v, n in zip(numbers["value"], numbers["questions"])]
    return numbers


def differences(
    against: Sequence[str] = ("full", "random"),
    threshold: float = 1.96,
    questions: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """`alps` minus other methods, in points and in standard errors of a difference, per model and benchmark.

    The standard error is that of two binomial accuracies on separate questions. Both models answered the same
    questions, for which it may be smaller (or larger); to know takes answers question by question, which the paper does
    not give.

    Args:
        against: Methods of Table 1.
        threshold: Standard errors; 1.96 is 95 %.
        questions: Other counts than the first ones of `QUESTIONS`.

    Returns:
        a row per model, benchmark (of Tables 1 and 13, if its questions can be counted) and method. Columns: model,
        benchmark, against, questions, alps, other, difference, standard_error, ratio (of the two, without sign),
        below_1, below_threshold.

    Raises:
        UserError: a method or the threshold is unknown or out of range.
    """
    import pandas as pd

    _check_comparison(against, threshold)
    sizes = {**{name: _questions(name) for name in QUESTIONS}, **(questions or {})}
    numbers = reported().query("table in ('table1', 'table13') and benchmark in @QUESTIONS")
    values = numbers.set_index(["model", "setting", "benchmark"])["value"]
    rows: list[dict[str, Any]] = []
    for model, benchmark, method in product(numbers["model"].unique(), numbers["benchmark"].unique(), against):
        size = sizes[benchmark]
        alps, other = values[model, "alps", benchmark], values[model, method, benchmark]
        error = math.hypot(standard_error(alps, size), standard_error(other, size))
        ratio = abs(alps - other) / error
        rows.append(
            {
                "model": model,
                "benchmark": benchmark,
                "against": method,
                "questions": size,
                "alps": alps,
                "other": other,
                "difference": alps - other,
                "standard_error": error,
                "ratio": ratio,
                "below_1": ratio < 1,
                "below_threshold": ratio < threshold,
            }
        )
    return pd.DataFrame(rows)


def _check_comparison(against: Sequence[str], threshold: float) -> None:
    others = [name for name in paper_table("table1").index.unique("setting") if name != "alps"]
    if not isinstance(against, (list, tuple)) or not against:
        raise UserError(f"'against' is {against!r}: give a list of methods, such as ['full', 'random'].")
    for method in against:
        one_of("method", method, others)
    if not (isinstance(threshold, (int, float)) and 0 < threshold < math.inf):
        raise UserError(f"'threshold' is {threshold!r}: give a positive number of standard errors, such as 1.96.")


def difference_counts(found: pd.DataFrame) -> pd.DataFrame:
    """Of `differences()`, per method: pairs, those in favour of alps, below 1 and below the threshold."""
    counts = found.assign(in_favour=found["difference"] > 0).groupby("against", sort=False)
    return counts.agg(
        pairs=("difference", "size"),
        alps_higher=("in_favour", "sum"),
        below_1=("below_1", "sum"),
        below_threshold=("below_threshold", "sum"),
    ).reset_index()


LABELS = {
    "gpqa": "GPQA",
    "gsm8k": "GSM8K",
    "math": "MATH",
    "humaneval": "HumanEval",
    "humaneval_plus": "HumanEval+",
    "mbpp": "MBPP",
    "mbpp_plus": "MBPP+",
    "arc_challenge": "ARC-C",
}
