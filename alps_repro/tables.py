"""Tables, made from records alone: CSV with plain numbers, Markdown and LaTeX to be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError
from alps_repro.methods import METHODS
from alps_repro.recipe import EvaluateConfig, FinetuneConfig
from alps_repro.records import Record, load_records, write_whole

if TYPE_CHECKING:
    import pandas as pd


def interval(score: float, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy over that many questions (spread over items, not seeds)."""
    from scipy.stats import binomtest

    found = binomtest(round(score * questions), questions).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def summary(records: Iterable[Record]) -> pd.DataFrame:
    """One row per evaluated model and task: what was trained, how it scores, what its training took.

    Columns: base, dataset, method, ratio, scope, quantization, seed, task, score, low, high (95 % over questions),
    strict, questions, trained_parameters, trained_share, training_seconds, record. Scores are in percent.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for record in records:
        if not isinstance(record.config, EvaluateConfig):
            continue
        tuned = record.config.model if isinstance(record.config.model, FinetuneConfig) else None
        cost = record.cost
        for task, score in record.result["scores"].items():
            questions = record.result["questions"].get(task)
            strict = record.result["metrics"][task].get("exact_match,strict-match")
            low, high = interval(score, questions) if strict is not None else (None, None)
            rows.append(
                {
                    "base": tuned.base if tuned else record.config.model,
                    "dataset": tuned.dataset if tuned else None,
                    "method": tuned.method if tuned else "vanilla",
                    "ratio": tuned.ratio if tuned and METHODS[tuned.method].uses_ratio else None,
                    "scope": tuned.scope if tuned else None,
                    "quantization": record.config.quantization,
                    "seed": tuned.seed if tuned else None,
                    "task": task,
                    "score": 100 * score,
                    "low": None if low is None else 100 * low,
                    "high": None if high is None else 100 * high,
                    "strict": None if strict is None else 100 * strict,
                    "questions": questions,
                    "trained_parameters": cost.trained_parameters if tuned else 0,
                    "trained_share": cost.trained_parameters / cost.total_parameters if tuned else 0.0,
                    "training_seconds": record.result.get("training_seconds"),
                    "record": record.name,
                }
            )
    if not rows:
        raise UserError("There is no record of an evaluation to make a table from: run an evaluation first.")
    order = {"vanilla": -1, **{method: i for i, method in enumerate(METHODS)}}
    table = pd.DataFrame(rows)
    table["_order"] = table["method"].map(order)
    table = table.sort_values(["base", "task", "_order", "ratio", "seed", "record"], na_position="first")
    return table.drop(columns="_order").reset_index(drop=True).convert_dtypes()


def to_read(table: pd.DataFrame) -> pd.DataFrame:
    """The summary with a reader's columns; the interval is over questions, for the one training seed of the row."""
    import pandas as pd

    def cell(value: Any, text: str) -> str:
        return "–" if pd.isna(value) else text.format(value)

    return pd.DataFrame(
        {
            "method": table["method"],
            "trains": [
                "nothing"
                if row.method == "vanilla"
                else f"{'all' if pd.isna(row.ratio) else f'{row.ratio:.0%} of'} heads"
                + (" and everything else" if row.scope == "all" else " only")
                for row in table.itertuples()
            ],
            "trained parameters": [
                f"{row.trained_parameters:,} ({row.trained_share:.1%})" for row in table.itertuples()
            ],
            "task": table["task"],
            "score, %": [f"{score:.1f}" for score in table["score"]],
            "95 % interval": [
                "–" if pd.isna(row.low) else f"{row.low:.1f} to {row.high:.1f}" for row in table.itertuples()
            ],
            "strict, %": [cell(value, "{:.1f}") for value in table["strict"]],
            "questions": [cell(value, "{}") for value in table["questions"]],
            "training, s": [cell(value, "{:.0f}") for value in table["training_seconds"]],
        }
    )


def write(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write `name`.csv, .md and .tex; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = to_read(table)
    texts = {
        "csv": table.to_csv(index=False, lineterminator="\n"),
        "md": shown.to_markdown(index=False, disable_numparse=True) + "\n",
        "tex": shown.to_latex(index=False, escape=True),
    }
    for suffix, text in texts.items():
        write_whole(folder / f"{name}.{suffix}", text)
    return [folder / f"{name}.{suffix}" for suffix in texts]


def write_summary(results: str | Path) -> tuple[pd.DataFrame, list[Path]]:
    """Make `tables/summary.*` of a results folder from its records."""
    results = Path(results)
    if not (results / "records").is_dir():
        raise UserError(f"'{results}' is no results folder: it holds no records/.")
    table = summary(load_records(results / "records", "evaluate"))
    return table, write(table, results / "tables", "summary")
