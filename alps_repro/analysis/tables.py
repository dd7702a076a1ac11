"""Tables, made from records alone: CSV with plain numbers, Markdown and LaTeX for readers.

`summary` has a row for each evaluation in a results folder. `paper_table` is one of the paper's tables, in the paper's
layout: `experiments.grid` says which records it needs, and nothing else is looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

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
    """A row for each evaluated model and task: what was trained, its score, and the cost of its training.

    Args:
        records: Those that are not of evaluations are left out.

    Returns:
        a frame with the columns base, dataset, method, ratio, scope, quantization, seed, task, score, low, high (95 %
        over questions), strict, log_likelihood (of the correct answers, nats), questions, trained_parameters,
        trained_share, training_seconds, record. Scores are in percent, losses in nats.

    Raises:
        UserError: there is no evaluation, or two records were made with different models or questions of one name.
    """
    import pandas as pd

    rows = [row for record in records for row in _summary_rows(record)]
    if not rows:
        raise UserError("There is no record of an evaluation to make a table from: run an evaluation first.")
    check_consistent(records)
    order = {"vanilla": -1, **{method: i for i, method in enumerate(METHODS)}}
    table = pd.DataFrame(rows)
    table["_order"] = table["method"].map(order)
    table = table.sort_values(["base", "task", "_order", "ratio", "seed", "record"], na_position="first")
    return table.drop(columns="_order").reset_index(drop=True).convert_dtypes()


def _summary_rows(record: Record) -> Iterator[dict[str, Any]]:
    config, result, cost = record.config, record.result, record.cost
    if not isinstance(config, EvaluateConfig):
        return
    tuned = config.model if isinstance(config.model, FinetuneConfig) else None
    trained, total = (cost.trained_parameters, cost.total_parameters) if tuned else (0, 1)
    assert trained is not None
    assert total is not None
    for task, score in result["scores"].items():
        questions = result["questions"].get(task)
        strict = result["metrics"][task].get("exact_match,strict-match")
        low, high = interval(score, questions) if strict is not None else (None, None)
        yield {
            "base": tuned.base if tuned else config.model,
            "dataset": tuned.dataset if tuned else None,
            "method": tuned.method if tuned else "vanilla",
            "ratio": tuned.ratio if tuned and METHODS[tuned.method].uses_ratio else None,
            "scope": tuned.scope if tuned else None,
            "quantization": config.quantization,
            "seed": tuned.seed if tuned else None,
            "task": task,
            "score": score if lower_is_better(task) else 100 * score,
            "low": None if low is None else 100 * low,
            "high": None if high is None else 100 * high,
            "strict": None if strict is None else 100 * strict,
            "log_likelihood": result["metrics"][task].get("answer_loglikelihood,none"),
            "questions": questions,
            "trained_parameters": trained,
            "trained_share": trained / total,
            "training_seconds": result.get("training_seconds"),
            "record": record.name,
        }


def to_read(table: pd.DataFrame) -> pd.DataFrame:
    """The summary with columns for readers; the interval is over questions, for the one training seed of the row."""
    import pandas as pd

    def text(value: Any, form: str) -> str:
        return "–" if pd.isna(value) else f"{value:{form}}"

    return pd.DataFrame(
        [
            {
                "method": row["method"],
                "trains": _trains(row),
                "trainable parameters": f"{row['trained_parameters']:,} ({row['trained_share']:.1%})",
                "task": row["task"],
                "score, %": f"{row['score']:.4f} nats" if lower_is_better(row["task"]) else f"{row['score']:.1f}",
                "95 % interval": "–" if pd.isna(row["low"]) else f"{row['low']:.1f} to {row['high']:.1f}",
                "strict, %": text(row["strict"], ".1f"),
                "log-likelihood, nats": text(row["log_likelihood"], ".2f"),
                "questions": text(row["questions"], ""),
                "training, s": text(row["training_seconds"], ".0f"),
            }
            for row in table.to_dict("records")
        ]
    )


def _trains(row: Mapping[Hashable, Any]) -> str:
    """What a row of the summary trains."""
    import pandas as pd

    if row["method"] == "vanilla":
        return "nothing"
    adapter = METHODS[row["method"]].adapter
    if adapter != "rows":
        return ADAPTERS[adapter].about
    share = "all" if pd.isna(row["ratio"]) else f"{row['ratio']:.0%} of"
    return f"{share} heads" + (" and everything else" if row["scope"] == "all" else " only")


def measured(profile: Profile, table: str) -> pd.DataFrame:
    """The measured part of a table: a row for each cell, task and seed.

    Args:
        profile: Whose records to look at.
        table: One of the profile's tables.

    Returns:
        a frame with the columns model, row, family, task, seed, score (as lm-eval gives it, between 0 and 1, or nats),
        log_likelihood (of the correct answers, nats; NaN where there is none), questions, record, code.

    Raises:
        UserError: nothing has been measured, or the records come from two versions of the measuring code.
    """
    import pandas as pd

    rows = [row for cell, record in recorded_cells(profile, table) for row in _rows(cell, record)]
    if not rows:
        raise UserError(
            f"No run of {table} is in '{records_folder(profile)}' yet: run the profile, then make its tables."
        )
    # A row that trains nothing has one record, whatever the seed.
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
    """One of the paper's tables, long: a row for each model, row and column, in the order of the grid.

    Args:
        profile: Whose records to look at.
        table: One of the profile's tables.

    Returns:
        a frame with the columns model, row, column (a task, a family, or `avg`), mean (percent, or nats for a loss),
        half_width (of the 95 % interval), spread (`seeds`, or `questions` where there is one training seed), seeds,
        best (of its column, vanilla left out), against_full (the difference from the row `full`), log_likelihood (mean
        over seeds of the correct answers', nats) and log_likelihood_half_width (over seeds), reported and difference
        (the paper's number where the model is the same, and ours minus it), records (names, joined by spaces).

    Raises:
        UserError: nothing has been measured, or the records come from two versions of the measuring code.
    """
    import pandas as pd

    parts = measured(profile, table)
    parts["column"] = parts["family"] if TABLES[table].by_family else parts["task"]
    parts["loss"] = parts["task"].map(lower_is_better)
    parts["value"] = parts["score"].where(parts["loss"], 100 * parts["score"])
    seeds = _by_seed(parts)
    columns = parts.loc[~parts["loss"], "column"].nunique()
    if columns > 1 and (average := _averages(seeds, columns)) is not None:
        seeds = pd.concat([seeds, average], ignore_index=True)
    rows = [_entry(key, group) for key, group in seeds.groupby(_PLACE, sort=False)]
    long = _against_full(pd.DataFrame(rows)).drop(columns="loss").merge(_reported(table), how="left", on=_PLACE)
    long["difference"] = long["mean"] - long["reported"]
    order = {key: {name: i for i, name in enumerate(dict.fromkeys(parts[key]))} | {"avg": 999} for key in _PLACE}
    long = long.sort_values(_PLACE, key=lambda column: column.map(order[str(column.name)]), kind="stable")
    return long[PAPER_COLUMNS].reset_index(drop=True)


#: The columns that identify a number of a paper table.
_PLACE = ["model", "row", "column"]


def _by_seed(parts: pd.DataFrame) -> pd.DataFrame:
    """One number for each place and seed: the mean over a column's tasks, or over families evaluated on one task."""
    each = [*_PLACE, "seed"]
    one = parts.groupby(each, sort=False, dropna=False)
    seeds = one.agg(value=("value", "mean"), log_likelihood=("log_likelihood", _whole_mean), loss=("loss", "first"))
    # A task's questions count once, however many families' models were evaluated on them.
    tasks = parts.groupby([*each, "task"], sort=False, dropna=False).agg(
        value=("value", "mean"), loss=("loss", "first"), questions=("questions", "first")
    )
    tasks["half"] = [_over_questions(*task) for task in zip(tasks["value"], tasks["questions"], tasks["loss"])]
    halves = tasks.groupby(each, sort=False, dropna=False)["half"].agg(_half_of_mean)
    return seeds.join(halves).join(one["record"].unique()).reset_index()


def _averages(seeds: pd.DataFrame, columns: int) -> pd.DataFrame | None:
    """The column `avg` of rows that have all columns, losses left out; None where no row has."""
    average = (
        seeds[~seeds["loss"]]
        .groupby(["model", "row", "seed"], sort=False, dropna=False)
        .agg(
            value=("value", "mean"),
            log_likelihood=("log_likelihood", _whole_mean),
            half=("half", _half_of_mean),
            parts=("column", "nunique"),
        )
    )
    average = average[average["parts"] == columns].drop(columns="parts").reset_index()
    average["record"] = [[] for _ in range(len(average))]
    return average.assign(column="avg", loss=False) if len(average) else None


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
    """Half the width of the interval of an unweighted mean of independent scores, from theirs: variances add up."""
    return math.sqrt(sum(half**2 for half in halves)) / len(halves)


def lower_is_better(task: str) -> bool:
    """Whether a task's score is a loss."""
    return task in KNOWLEDGE and not KNOWLEDGE[task].higher_is_better


def digits(column: str) -> int:
    """Decimals that a column's numbers are printed with: 2 for points, 4 for a loss in nats."""
    return 4 if lower_is_better(column) else 2


def _entry(place: tuple[Hashable, ...], seeds: pd.DataFrame) -> dict[str, Any]:
    """A number of a paper table, from those of its seeds."""
    values, likelihoods = list(seeds["value"]), list(seeds["log_likelihood"])
    if len(values) > 1:
        half, spread = over_seeds(values), "seeds"
    else:
        half = float(seeds["half"].iloc[0])
        spread = "" if math.isnan(half) else "questions"
    return {
        **dict(zip(_PLACE, place)),
        "mean": sum(values) / len(values),
        "half_width": half,
        "spread": spread,
        "seeds": seeds["seed"].notna().sum(),
        "loss": bool(seeds["loss"].iloc[0]),
        "log_likelihood": sum(likelihoods) / len(likelihoods),
        "log_likelihood_half_width": over_seeds(likelihoods) if len(likelihoods) > 1 else math.nan,
        "records": " ".join(dict.fromkeys(name for names in seeds["record"] for name in names)),
    }


#: The rows of tables that train all heads.
_FULL = ("full", "100")


def _against_full(table: pd.DataFrame) -> pd.DataFrame:
    """Add `best` and `against_full`."""
    full = table[table["row"].isin(_FULL)].set_index(["model", "column"])["mean"]
    keys = list(zip(table["model"], table["column"]))
    table["against_full"] = table["mean"] - [full.get(key, math.nan) for key in keys]
    signed = table["mean"].where(~table["loss"], -table["mean"]).where(table["row"] != "vanilla")
    table["best"] = signed == signed.groupby([table["model"], table["column"]]).transform("max")
    return table


def _reported(table: str) -> pd.DataFrame:
    """The paper's numbers for a table, under our names of models and tasks."""
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
    """A paper table as it is printed: a line for each model and row, a column for each benchmark.

    Args:
        table: As `paper_table` gives it.
        decimals: By default 2, and 4 for losses.
        records: The folder of the records, to which each cell then has links, numbered from 1.

    Returns:
        a frame of cells: mean ± half the width of the 95 % interval, an arrow for above or below `full`, the best in
        bold (Markdown's), and in brackets the paper's number where it has one.
    """
    shown = table.assign(cell=[_cell_text(entry, decimals, records) for _, entry in table.iterrows()])
    lines = list(dict.fromkeys(zip(shown["model"], shown["row"])))
    wide = shown.pivot(index=["model", "row"], columns="column", values="cell")
    wide = wide.loc[lines, list(dict.fromkeys(shown["column"]))]
    return wide.fillna("–").rename_axis(columns=None).reset_index()


def _cell_text(entry: pd.Series, decimals: int | None, records: str | None) -> str:
    places = decimals or digits(entry["column"])
    text = f"{entry['mean']:.{places}f}"
    if not math.isnan(entry["half_width"]):
        text += f" ± {entry['half_width']:.{places}f}"
    text = f"**{text}**" if entry["best"] else text
    against = entry["against_full"]
    if entry["row"] not in (*_FULL, "vanilla") and not math.isnan(against):
        text += " ↑" if against > 0 else " ↓" if against < 0 else " ="
    text = text if math.isnan(entry["reported"]) else f"{text} (paper {entry['reported']:.{places}f})"
    names = entry["records"].split() if records else []
    return " ".join([text, *(f"[{i}]({records}/evaluate-{quote(name)}.json)" for i, name in enumerate(names, 1))])


def log_likelihoods(table: pd.DataFrame) -> pd.DataFrame:
    """A paper table's log-likelihoods of the correct answers as a table of its own, without columns that have none."""
    own = table.assign(mean=table["log_likelihood"], half_width=table["log_likelihood_half_width"], loss=False)
    own["spread"] = own["half_width"].notna().map({True: "seeds", False: ""})
    own["reported"] = math.nan
    there = own.groupby("column")["mean"].transform("count") > 0
    return _against_full(own[there].reset_index(drop=True))


def spread_note(table: pd.DataFrame) -> str:
    """What the intervals of a paper table are over, and which of its columns are losses, in a sentence each."""
    losses = [column for column in dict.fromkeys(table["column"]) if lower_is_better(column)]
    on_losses = f" {', '.join(losses)}: loss in nats per token, where lower is better." if losses else ""
    spreads = [name for name in dict.fromkeys(table["spread"]) if name]
    if not spreads:
        return f"There is no interval: there is only one training seed.{on_losses}"
    seeds = sorted({int(n) for n in table.loc[table["spread"] == "seeds", "seeds"]})
    over = {
        "seeds": f"{' or '.join(map(str, seeds))} training seeds (Student's t)",
        "questions": "questions, where there is one training seed or nothing was trained (Wilson)",
    }
    return (
        f"± is half the width of the 95 % interval over {'; or over '.join(over[name] for name in spreads)}.{on_losses}"
    )


def of_profile(profile: Profile) -> list[str]:
    """The names of a profile's tables: those of its runs, and Table 11 beside Table 1 where it was measured."""
    timed = "table1" in profile.tables and timing.MEASURED.exists()
    return [*profile.tables, *([timing.TABLE] if timed else [])]


def write_paper_table(profile: Profile, table: str) -> list[Path]:
    """Make `tables/TABLE.csv`, .md and .tex of a profile from its records.

    Table 11 is made from the benchmark of training steps, which nothing else ran beside.

    Args:
        profile: Whose records to look at.
        table: One of `of_profile`.

    Returns:
        the paths, in this order.

    Raises:
        UserError: the profile has no such table, or nothing in it can be shown.
    """
    one_of("table of this profile", table, of_profile(profile))
    folder = Path(profile.results) / "tables"
    if table == timing.TABLE:
        times = timing.training_time()
        shown, note = timing.to_read(times), timing.note(times)
        return _write(folder, table, times, f"**{timing.TITLE}.** {note}\n\n{_markdown(shown)}", _latex(shown, note))
    long = paper_table(profile, table)
    note = spread_note(long)
    linked = _markdown(paper_layout(long, records="../records"))
    markdown = f"**{TABLES[table].title}.** {note} The numbers behind a cell link to its records.\n\n{linked}"
    likelihoods = log_likelihoods(long)
    if len(likelihoods):
        about = "Log-likelihood of the correct answers, nats, where higher is better."
        below = _markdown(paper_layout(likelihoods, decimals=3))
        markdown += f"\n\n{about} {spread_note(likelihoods)}\n\n{below}"
    return _write(folder, table, long, markdown, _latex(paper_layout(long), note))


def _markdown(shown: pd.DataFrame) -> str:
    return shown.to_markdown(index=False, disable_numparse=True)


#: What pandas' LaTeX leaves as it is: bold text of Markdown, and signs that LaTeX's fonts lack.
_LATEX = {r"\*\*(.*?)\*\*": r"\\textbf{\1}", "±": r"$\\pm$", "↑": r"$\\uparrow$", "↓": r"$\\downarrow$"}


def _latex(shown: pd.DataFrame, note: str | None = None) -> str:
    tex = shown.to_latex(index=False, escape=True)
    for pattern, command in _LATEX.items():
        tex = re.sub(pattern, command, tex)
    return tex if note is None else f"% {note}\n{tex}"


def write(table: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write a summary, as `summary` gives it, to `NAME.csv`, .md and .tex; returns their paths."""
    shown = to_read(table)
    return _write(folder, name, table, _markdown(shown), _latex(shown))


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
    """Make `tables/summary.csv`, .md and .tex of a results folder from its records.

    Returns:
        the summary, and the paths.

    Raises:
        UserError: the folder holds no records, or none of an evaluation.
    """
    results = Path(results)
    if not (results / "records").is_dir():
        raise UserError(f"'{results}' is not a results folder: it holds no records/.")
    table = summary(load_records(results / "records", "evaluate"))
    return table, write(table, results / "tables", "summary")
