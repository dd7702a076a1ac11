"""To cite a number of a table: the number, a sentence on what was run for it, and BibTeX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.analysis.tables import digits, lower_is_better, paper_table
from alps_repro.errors import UserError, one_of
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.grid import TABLES, Cell, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import recorded_cells
from alps_repro.experiments.records import Record
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

CITATION = Path(__file__).parents[2] / "CITATION.cff"


@dataclass(frozen=True)
class Cited:
    """A number to cite; as text, all of it.

    Attributes:
        mean: As in the table's CSV file.
        half_width: Half the width of the 95 % interval, as there.
        number: Both, with table, row, column and unit.
        sentence: What was run.
        bibtex: Entries for this package and the paper.
        records: Names of the evaluations' records.
    """

    mean: float
    half_width: float
    number: str
    sentence: str
    bibtex: str
    records: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number}\n\n{self.sentence}\n\n{self.bibtex}"


def cite(profile: Profile, table: str, row: str, column: str, model: str | None = None) -> Cited:
    """Cite one number of one of a profile's tables.

    Args:
        profile: Whose records to look at.
        table: One of its tables.
        row: A row of the table.
        column: A column of the table.
        model: May be left out where the profile has one.

    Raises:
        UserError: there is no such table, row, column or model, or the number has not been measured yet.
    """
    grid = cells(profile, table)
    model = _checked_place(profile, table, grid, row, column, model)
    long = paper_table(profile, table)
    numbers = long[(long["model"] == model) & (long["row"] == row) & (long["column"] == column)]
    if numbers.empty:
        raise UserError(f"The row {row} of {table} has no {column} yet: not all of its runs are done.")
    entry = numbers.iloc[0]
    by_name = {record.name: record for _, record in recorded_cells(profile, table)}
    records = [by_name[name] for name in record_names(long, entry)]
    over = f"{entry['seeds']} training seeds, Student's t" if entry["spread"] == "seeds" else "questions, Wilson's"
    number = f"{table}, {row}, {column}: {number_text(entry)}"
    number += f" (half the width of the 95 % interval over {over})" if entry["spread"] else ""
    tasks = dict.fromkeys(
        task
        for cell in grid
        if (cell.row, cell.base) == (row, model)
        for task in cell.tasks
        if column == "avg" or column in (task, cell.family if TABLES[table].by_family else task)
    )
    sentence = what_was_run(records, [task for task in tasks if column != "avg" or not lower_is_better(task)])
    bibtex = "\n\n".join([package_bibtex(commits(records)), paper_bibtex()])
    return Cited(
        float(entry["mean"]), float(entry["half_width"]), number, sentence, bibtex, tuple(r.name for r in records)
    )


def _checked_place(profile: Profile, table: str, grid: Sequence[Cell], row: str, column: str, model: str | None) -> str:
    """The model; raises where table, row, column or model is not one of the profile's."""
    model = model or (profile.models[0] if len(profile.models) == 1 else None)
    if model is None:
        raise UserError(f"{table} has several models: name one by --model, of {', '.join(profile.models)}.")
    one_of("model in this profile", model, profile.models)
    one_of(f"row in {table}", row, dict.fromkeys(cell.row for cell in grid))
    by_family = TABLES[table].by_family
    columns = dict.fromkeys(name for cell in grid for name in ((cell.family,) if by_family else cell.tasks))
    one_of(f"column in {table}", column, [*columns, *(["avg"] if len(columns) > 1 else [])])
    return model


def number_text(entry: pd.Series) -> str:
    """A number of a paper table with half the width of its interval, and its unit."""
    places = digits(entry["column"])
    half = "" if math.isnan(entry["half_width"]) else f" ± {entry['half_width']:.{places}f}"
    return f"{entry['mean']:.{places}f}{half} {'nats per token' if lower_is_better(entry['column']) else '%'}"


def record_names(long: pd.DataFrame, entry: pd.Series) -> list[str]:
    """The records behind a number of a paper table; behind an average, those of all its columns."""
    if entry["column"] != "avg":
        return entry["records"].split()
    line = long[(long["model"] == entry["model"]) & (long["row"] == entry["row"])]
    line = line[~line["column"].map(lower_is_better)]
    return list(dict.fromkeys(name for names in line["records"] for name in names.split()))


# What was run


def listed(words: Iterable[Any]) -> str:
    """Each different word once: "a", "a and b", "a, b and c"."""
    once = list(dict.fromkeys(map(str, words)))
    return " and ".join([", ".join(once[:-1]), once[-1]] if len(once) > 1 else once)


def commits(records: Iterable[Record]) -> list[tuple[str, bool]]:
    """The commits that records were made at, each once: (commit or "", whether files differed from it)."""
    return sorted({(r.provenance.commit or "", bool(r.provenance.dirty)) for r in records})


def what_was_run(records: Sequence[Record], tasks: Sequence[str] | None = None) -> str:
    """One sentence on runs of one kind: model, data, method, heads, scope, steps, seeds, questions, commit.

    Args:
        records: Of one kind, at least one.
        tasks: Of evaluations, the tasks to name; by default all.
    """
    configs = [record.config for record in records]
    localizations = [config for config in configs if isinstance(config, LocalizeConfig)]
    trainings = [config for config in configs if isinstance(config, FinetuneConfig)]
    evaluations = [config for config in configs if isinstance(config, EvaluateConfig)]
    if localizations:
        run = f"All heads of {listed(config.base for config in localizations)}, {localization_text(localizations)}"
    elif trainings:
        run = training_text(trainings)
    elif evaluations:
        models = [config.model for config in evaluations]
        tuned = [model for model in models if isinstance(model, FinetuneConfig)]
        model = training_text(tuned) if tuned else f"{listed(models)} as it is, not fine-tuned"
        run = f"{model}; evaluated on {_questions(records, tasks)}"
    else:
        run = f"{records[0].kind} {listed(record.name for record in records)}"
    at = listed(
        ("commit " if commit else "commit: ") + commit_text(commit, dirty, 10) for commit, dirty in commits(records)
    )
    versions = listed(r.provenance.versions.get("alps-repro", "of unknown version") for r in records)
    return f"{run} (alps-repro {versions}, {at})."


def training_text(configs: Sequence[FinetuneConfig]) -> str:
    """What was trained, on what and how, of runs that differ at most in data and seed."""
    first = configs[0]
    method, recipes = METHODS[first.method], [config.recipe for config in configs]
    loaded = "" if first.quantization == "none" else f", loaded in {first.quantization},"
    what = "nothing of attention" if first.method == "no_attn" else method.about
    else_ = "nothing else" if first.scope == "heads" else "everything outside q, k and v"
    text = (
        f"{listed(config.base for config in configs)}{loaded} trained on {_each(config.dataset for config in configs)} "
        f"by the method '{first.method}': {what} and {else_} (scope '{first.scope}')"
    )
    if method.uses_ratio:
        text += f", {100 * first.ratio:g} % of the heads"
    if localizations := [config.localization for config in configs if config.localization]:
        text += f", {localization_text(localizations)}"
    length = listed(
        f"{recipe.max_steps} steps of {recipe.batch_size} examples"
        if recipe.max_steps
        else f"{recipe.epochs:g} epochs in batches of {recipe.batch_size}"
        for recipe in recipes
    )
    seeds = dict.fromkeys(config.seed for config in configs)
    return (
        f"{text}; {length} at a learning rate of {listed(f'{recipe.learning_rate:g}' for recipe in recipes)}, training "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {listed(seeds)}"
    )


def localization_text(configs: Sequence[LocalizeConfig]) -> str:
    """How heads were scored, of localizations that differ at most in their task model."""
    first = configs[0]
    by_training: dict[str, list[str]] = {}
    for config in configs:
        task = config.task_model
        if isinstance(task, FinetuneConfig):
            share = f"{task.recipe.data_share:.0%} of its data, " if task.recipe.data_share < 1 else ""
            steps = f", {task.recipe.max_steps} steps" if task.recipe.max_steps else ""
            how = f" ({share}method '{task.method}', scope '{task.scope}'{steps})"
            by_training.setdefault(how, []).append(task.dataset)
    named = [config.task_model for config in configs if isinstance(config.task_model, str)]
    against = listed([*named, *(f"its fine-tuning on {_each(names)}{how}" for how, names in by_training.items())])
    return f"scored by {first.metric} of {first.head_matrix} matrices against {against}"


def _each(words: Iterable[Any]) -> str:
    once = dict.fromkeys(words)
    return f"each of {listed(once)}" if len(once) > 1 else listed(once)


def _questions(records: Sequence[Record], tasks: Sequence[str] | None) -> str:
    """How many questions of which split and tasks were evaluated on."""
    texts: dict[str, str] = {}
    for record in records:
        config = record.config
        assert isinstance(config, EvaluateConfig)
        for task in config.tasks:
            if tasks is None or task in tasks:
                count = record.result["questions"].get(task) or (f"up to {config.limit}" if config.limit else "all")
                texts[task] = f"{count} {config.split} questions of {task}"
    return listed(texts.values())


def commit_text(commit: str | None, dirty: bool | None, length: int | None = None) -> str:
    """A commit's first `length` digits, or `none`, and whether files differed from it."""
    return (commit or "none")[:length] + (" with changes on top" if dirty else "")


# BibTeX


def _citation() -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load(CITATION.read_text())
    except OSError as error:
        raise UserError(f"'{CITATION.name}' cannot be read ({error.strerror}): cite from a checkout.") from error


def _authors(people: Iterable[dict[str, str]]) -> str:
    names = (p.get("name") or f"{p['family-names']}, {p['given-names']}" for p in people)
    return " and ".join(f"{{{name}}}" if "," not in name else name for name in names)


def _entry(kind: str, key: str, fields: dict[str, Any]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def package_bibtex(at: Sequence[tuple[str, bool]]) -> str:
    """BibTeX of this package at some `commits`."""
    citation = _citation()
    note = listed(f"commit {commit}" + (" with changes on top" if dirty else "") for commit, dirty in at if commit)
    fields = {
        "title": f"{{{citation['title']}}}",
        "author": _authors(citation["authors"]),
        "version": citation["version"],
        "year": str(citation["date-released"])[:4],
        "note": note,
    }
    return _entry("software", "alps_repro", fields)


def paper_bibtex() -> str:
    """BibTeX of the paper that this package reproduces."""
    paper = _citation()["references"][0]
    fields = {
        "title": f"{{{paper['title']}}}",
        "author": _authors(paper["authors"]),
        "booktitle": paper["collection-title"],
        "year": paper["year"],
        "pages": f"{paper['start']}--{paper['end']}",
        "doi": paper["doi"],
        "url": paper["url"],
    }
    return _entry("inproceedings", "alps", fields)
