"""Tables, made from records alone: CSV with plain numbers, Markdown and LaTeX to be read.

`summary` is a row per evaluation of a results folder. `paper_table` is one of the paper's, in the paper's layout:
the grid of `experiments` says which records it needs, and nothing else is looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.analysis import timing
from alps_repro.analysis.paper import reported
from alps_repro.analysis.statistics import interval, over_seeds
from alps_repro.errors import UserError, one_of
from alps_repro.evaluation.benchmarks import KNOWLEDGE
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.grid import TABLES, Cell
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import check_consistent, recorded_cells, records_folder
from alps_repro.experiments.records import Record, load_records, write_whole
from alps_repro.training.adapters import ADAPTERS
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

#: Of a paper table's CSV.
PAPER_COLUMNS = [
    *["model", "row", "column", "mean", "half_width", "spread", "seeds", "best", "against_full", "log_likelihood"],
    *["log_likelihood_half_width", "reported", "difference", "records"],
]


def summary(records: Sequence[Record]) -> pd.DataFrame:
    """One row per evaluated model and task: what was trained, how it scores, what its training took.

    Columns: base, dataset, method, ratio, scope, quantization, seed, task, score, low, high (95 % over questions),
    strict, log_likelihood (of right answers, nats), questions, trained_parameters, trained_share, training_seconds,
    record. Scores are in percent, losses in nats.
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
                    "score": score if lower_is_better(task) else 100 * score,
                    "low": None if low is None else 100 * low,
                    "high": None if high is None else 100 * high,
                    "strict": None if strict is None else 100 * strict,
                    "log_likelihood": record.result["metrics"][task].get("answer_loglikelihood,none"),
                    "questions": questions,
                    "trained_parameters": cost.trained_parameters if tuned else 0,
                    "trained_share": cost.trained_parameters / cost.total_parameters if tuned else 0.0,
                    "training_seconds": record.result.get("training_seconds"),
                    "record": record.name,
                }
            )
    if not rows:
        raise UserError("There is no record of an evaluation to make a table from: run an evaluation first.")
    check_consistent(records)
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
            "trains": [_trains(row) for row in table.itertuples()],
            "trained parameters": [
                f"{row.trained_parameters:,} ({row.trained_share:.1%})" for row in table.itertuples()
            ],
            "task": table["task"],
            "score, %": [
                f"{row.score:.4f} nats" if lower_is_better(row.task) else f"{row.score:.1f}"
                for row in table.itertuples()
            ],
            "95 % interval": [
                "–" if pd.isna(row.low) else f"{row.low:.1f} to {row.high:.1f}" for row in table.itertuples()
            ],
            "strict, %": [cell(value, "{:.1f}") for value in table["strict"]],
            "log-likelihood, nats": [cell(value, "{:.2f}") for value in table["log_likelihood"]],
            "questions": [cell(value, "{}") for value in table["questions"]],
            "training, s": [cell(value, "{:.0f}") for value in table["training_seconds"]],
        }
    )


def _trains(row: Any) -> str:
    import pandas as pd

    if row.method == "vanilla":
        return "nothing"
    adapter = METHODS[row.method].adapter
    if adapter != "rows":
        return ADAPTERS[adapter].about
    share = "all" if pd.isna(row.ratio) else f"{row.ratio:.0%} of"
    return f"{share} heads" + (" and everything else" if row.scope == "all" else " only")


def measured(profile: Profile, table: str) -> pd.DataFrame:
    """What the records say of a table: one row per cell, task and seed that has been measured.

    Columns: model, row, family, task, seed, score (as lm-eval gives it, between 0 and 1, or nats), log_likelihood (of
    right answers, nats; NaN where there is none), questions, record, code.

    Raises:
        UserError: nothing has been measured, or the records come from two versions of the measuring code.
    """
    import pandas as pd

    rows = [row for cell, record in recorded_cells(profile, table) for row in _rows(cell, record)]
    if not rows:
        raise UserError(
            f"No run of {table} is in '{records_folder(profile)}' yet: run the profile, then make its tables."
        )
    # What trains nothing is one record, whatever the seed of the row.
    return pd.DataFrame(rows).drop_duplicates(["model", "row", "family", "task", "record"], ignore_index=True)


def _rows(cell: Cell, record: Record) -> list[dict[str, Any]]:
    return [
        {
            "model": cell.base,
            "row": cell.row,
            "family": cell.family,
            "task": task,
            "seed": cell.seed,
            "score": record.result["scores"][task],
            "log_likelihood": record.result["metrics"][task].get("answer_loglikelihood,none", math.nan),
            "questions": record.result["questions"].get(task),
            "record": record.name,
            "code": record.provenance.code,
        }
        for task in cell.tasks
    ]


def paper_table(profile: Profile, table: str) -> pd.DataFrame:
    """One of the paper's tables, long: a row per model, row and column, in the order of the grid.

    Columns: model, row, column (a task, a family, or `avg`), mean (percent, or nats for a loss), half_width (of the
    95 % interval), spread (`seeds`, or `questions` where there is one training seed), seeds, best (of its column,
    vanilla left out), against_full (the difference to the row `full`), log_likelihood (mean over seeds of the right
    answers', nats) and log_likelihood_half_width (over seeds), reported and difference (the paper's number where the
    model is the same, and ours minus it), records (names, joined by spaces).
    """
    import pandas as pd

    found = measured(profile, table)
    found["column"] = found["family"] if TABLES[table].by_family else found["task"]
    found["loss"] = found["task"].map(lower_is_better)
    found["value"] = found["score"].where(found["loss"], 100 * found["score"])
    keys = ["model", "row", "column"]
    each = [*keys, "seed"]
    one = found.groupby(each, sort=False, dropna=False)
    # One number a seed: the mean over a column's tasks, or over the families whose models were asked the same.
    seeds = one.agg(value=("value", "mean"), log_likelihood=("log_likelihood", _whole_mean), loss=("loss", "first"))
    # The same questions say nothing new when they are asked again, least of all of the same model: they count once.
    asked = found.groupby([*each, "task"], sort=False, dropna=False).agg(
        value=("value", "mean"), loss=("loss", "first"), questions=("questions", "first")
    )
    asked["half"] = [_over_questions(task.value, task.questions, task.loss) for task in asked.itertuples()]
    halves = asked.groupby(each, sort=False, dropna=False)["half"].agg(_half_of_mean)
    seeds = seeds.join(halves).join(one["record"].unique()).reset_index()
    full = seeds[~seeds["loss"]].groupby(["model", "row", "seed"], sort=False, dropna=False)
    if not TABLES[table].by_family or found["family"].nunique() > 1:
        columns = found.loc[~found["loss"], "column"].nunique()
        average = full.agg(
            value=("value", "mean"),
            log_likelihood=("log_likelihood", _whole_mean),
            half=("half", _half_of_mean),
            parts=("column", "nunique"),
        )
        average = average[average["parts"] == columns].drop(columns="parts").reset_index()  # nothing is left out of it
        average["record"] = [[] for _ in range(len(average))]
        if columns > 1 and len(average):
            seeds = pd.concat([seeds, average.assign(column="avg", loss=False)], ignore_index=True)
    rows = [_entry(key, group) for key, group in seeds.groupby(keys, sort=False)]
    out = _against_full(pd.DataFrame(rows)).drop(columns="loss").merge(_reported(table), how="left", on=keys)
    out["difference"] = out["mean"] - out["reported"]
    order = {key: {name: i for i, name in enumerate(dict.fromkeys(found[key]))} | {"avg": 999} for key in keys}
    out = out.sort_values(keys, key=lambda column: column.map(order[str(column.name)]), kind="stable")
    return out[PAPER_COLUMNS].reset_index(drop=True)


def _whole_mean(values: pd.Series) -> float:
    """The mean, or NaN where a part is missing."""
    return values.mean(skipna=False)


def _over_questions(value: float, questions: float | None, loss: bool) -> float:
    """Half the width of Wilson's interval of a percentage; NaN of a loss, and where questions were not counted."""
    if loss or not questions or math.isnan(questions):
        return math.nan
    low, high = interval(value / 100, int(questions))
    return 50 * (high - low)


def _half_of_mean(halves: Sequence[float]) -> float:
    """Half the width of the interval of a mean of independent scores, from theirs: variances add up.

    However many questions each has: a task of few is as large a part of the mean as one of many.
    """
    return math.sqrt(sum(half**2 for half in halves)) / len(halves)


def lower_is_better(task: str) -> bool:
    """Whether a task's score is a loss."""
    return task in KNOWLEDGE and not KNOWLEDGE[task].higher_is_better


def digits(column: str) -> int:
    """Decimals that the numbers of a column are printed with: points have 2, a loss in nats 4."""
    return 4 if lower_is_better(column) else 2


def _entry(key: tuple[str, str, str], seeds: pd.DataFrame) -> dict[str, Any]:
    values, likelihoods = list(seeds["value"]), list(seeds["log_likelihood"])
    if len(values) > 1:
        half, spread = over_seeds(values), "seeds"
    else:
        half = float(seeds["half"].iloc[0])
        spread = "" if math.isnan(half) else "questions"
    return {
        **dict(zip(("model", "row", "column"), key)),
        "mean": sum(values) / len(values),
        "half_width": half,
        "spread": spread,
        "seeds": seeds["seed"].notna().sum(),
        "loss": bool(seeds["loss"].iloc[0]),
        "log_likelihood": sum(likelihoods) / len(likelihoods),
        "log_likelihood_half_width": over_seeds(likelihoods) if len(likelihoods) > 1 else math.nan,
        "records": " ".join(dict.fromkeys(name for names in seeds["record"] for name in names)),
    }


def _against_full(table: pd.DataFrame) -> pd.DataFrame:
    """Add `best` and `against_full`."""
    full = table[table["row"].isin(("full", "100"))].set_index(["model", "column"])["mean"]
    keys = list(zip(table["model"], table["column"]))
    table["against_full"] = table["mean"] - [full.get(key, math.nan) for key in keys]
    signed = table["mean"].where(~table["loss"], -table["mean"]).where(table["row"] != "vanilla")
    table["best"] = signed == signed.groupby([table["model"], table["column"]]).transform("max")
    return table


def _reported(table: str) -> pd.DataFrame:
    """The paper's numbers for a table, by the names that models and tasks have here."""
    paper = reported()
    paper = paper[paper["table"] == TABLES[table].reported].copy()
    paper["model"] = "meta-llama/" + paper["model"]
    names = {"gpqa": "gpqa_main_zeroshot", "math": "hendrycks_math"}
    paper["column"] = paper["benchmark"].replace({} if TABLES[table].by_family else names)
    paper["row"] = paper["setting"]
    if paper["train_task"].notna().any():
        paper["row"] = paper["setting"] + "/" + paper["train_task"]
    return paper.rename(columns={"value": "reported"})[["model", "row", "column", "reported"]]


def paper_layout(table: pd.DataFrame, decimals: int | None = None, records: str | None = None) -> pd.DataFrame:
    """A paper table as it is printed: a line per model and row, a column per benchmark.

    Cells: mean ± half the width of the 95 % interval, an arrow for above or below `full`, the best in bold
    (Markdown's), and in brackets the paper's number where it has one. decimals: by default 2, of losses 4. records: the
    folder of the records, to which each cell then leads by numbers from 1 on.
    """
    from urllib.parse import quote

    import pandas as pd

    def cell(row: Any) -> str:
        places = decimals or digits(row.column)
        text = f"{row.mean:.{places}f}"
        if not math.isnan(row.half_width):
            text += f" ± {row.half_width:.{places}f}"
        text = f"**{text}**" if row.best else text
        if row.row not in ("full", "100", "vanilla") and not math.isnan(row.against_full):
            text += " ↑" if row.against_full > 0 else " ↓" if row.against_full < 0 else " ="
        text = text if pd.isna(row.reported) else f"{text} (paper {row.reported:.{places}f})"
        names = row.records.split() if records else []
        return " ".join([text, *(f"[{i}]({records}/evaluate-{quote(name)}.json)" for i, name in enumerate(names, 1))])

    shown = table.assign(cell=[cell(row) for row in table.itertuples()])
    lines = list(dict.fromkeys(zip(shown["model"], shown["row"])))
    wide = shown.pivot(index=["model", "row"], columns="column", values="cell")
    wide = wide.loc[lines, list(dict.fromkeys(shown["column"]))]
    return wide.fillna("–").rename_axis(columns=None).reset_index()


def log_likelihoods(table: pd.DataFrame) -> pd.DataFrame:
    """The same rows and columns of a paper table, of the right answers' log-likelihoods; without columns of none."""
    own = table.assign(mean=table["log_likelihood"], half_width=table["log_likelihood_half_width"], loss=False)
    own["spread"] = own["half_width"].notna().map({True: "seeds", False: ""})
    own["reported"] = math.nan
    there = own.groupby("column")["mean"].transform("count") > 0
    return _against_full(own[there].reset_index(drop=True))


def spread_note(table: pd.DataFrame) -> str:
    """What the intervals of a paper table are over, and which of its columns are losses, in a sentence each."""
    losses = [column for column in dict.fromkeys(table["column"]) if lower_is_better(column)]
    told = f" {', '.join(losses)}: loss in nats per token, where lower is better." if losses else ""
    found = [name for name in dict.fromkeys(table["spread"]) if name]
    if not found:
        return f"There is no interval: one training seed says nothing of others.{told}"
    seeds = sorted({int(n) for n in table.loc[table["spread"] == "seeds", "seeds"]})
    parts = {
        "seeds": f"{' or '.join(map(str, seeds))} training seeds (Student's t)",
        "questions": "questions, where there is one training seed or nothing was trained (Wilson)",
    }
    return f"± is half the width of the 95 % interval over {'; or over '.join(parts[name] for name in found)}.{told}"


def of_profile(profile: Profile) -> list[str]:
    """The names of a profile's tables: those of its runs, and the time of Table 1's methods where it was measured."""
    timed = "table1" in profile.tables and timing.MEASURED.exists()
    return [*profile.tables, *(["table11"] if timed else [])]


def write_paper_table(profile: Profile, table: str) -> list[Path]:
    """Make `tables/TABLE.csv`, .md and .tex of a profile from its records; returns their paths.

    Table 11 is made from the benchmark of training steps, beside which nothing else ran.
    """
    one_of("table of this profile", table, of_profile(profile))
    if table == "table11":
        times = timing.training_time()
        shown, note = timing.to_read(times), timing.note(times)
        markdown = f"**{timing.TITLE}.** {note}\n\n{shown.to_markdown(index=False, disable_numparse=True)}"
        tex = f"% {note}\n" + shown.to_latex(index=False, escape=True)
        return _write(Path(profile.results) / "tables", table, times, markdown, tex)
    long = paper_table(profile, table)
    shown = paper_layout(long)
    note = spread_note(long)
    linked = paper_layout(long, records="../records").to_markdown(index=False, disable_numparse=True)
    markdown = f"**{TABLES[table].title}.** {note} The numbers behind a cell lead to its records.\n\n{linked}"
    likelihoods = log_likelihoods(long)
    if len(likelihoods):
        below = paper_layout(likelihoods, decimals=3).to_markdown(index=False, disable_numparse=True)
        about = "Log-likelihood of the right answers, nats, where higher is better."
        markdown += f"\n\n{about} {spread_note(likelihoods)}\n\n{below}"
    latex = shown.map(lambda text: re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", _latex(text)))
    latex.columns = [_latex(name) for name in latex.columns]
    tex = f"% {note}\n" + latex.to_latex(index=False, escape=False)
    return _write(Path(profile.results) / "tables", table, long, markdown, tex)


#: What LaTeX reads as a command, and signs that its fonts lack.
_LATEX = {sign: f"\\{sign}" for sign in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def write(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write a summary as `name`.csv, .md and .tex; returns their paths."""
    shown = to_read(table)
    tex = shown.to_latex(index=False, escape=True)
    return _write(folder, name, table, shown.to_markdown(index=False, disable_numparse=True), tex)


def _write(folder: Path, name: str, plain: pd.DataFrame, markdown: str, tex: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "csv": plain.to_csv(index=False, lineterminator="\n"),
        "md": markdown + "\n",
        "tex": tex,
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
