"""A number of a table to be cited: the number, a sentence on what was run for it, and BibTeX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.analysis.tables import digits, lower_is_better, paper_table
from alps_repro.errors import UserError, one_of
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.grid import TABLES, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import recorded_cells
from alps_repro.experiments.records import Record
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

CITATION = Path(__file__).parents[2] / "CITATION.cff"


@dataclass(frozen=True)
class Cited:
    """mean and half_width: as in the table's CSV. number: both, with what they are. sentence: what was run."""

    mean: float
    half_width: float
    number: str
    sentence: str
    bibtex: str
    records: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number}\n\n{self.sentence}\n\n{self.bibtex}"


def cite(profile: Profile, table: str, row: str, column: str, model: str | None = None) -> Cited:
    """Cite one number of one of a profile's tables; `model` may be left out where the table has one.

    Raises:
        UserError: there is no such table, row, column or model, or the number has not been measured yet.
    """
    grid = cells(profile, table)
    model = model or (profile.models[0] if len(profile.models) == 1 else None)
    if model is None:
        raise UserError(f"{table} has several models: say which by --model, of {', '.join(profile.models)}.")
    one_of("model in this profile", model, profile.models)
    one_of(f"row in {table}", row, dict.fromkeys(cell.row for cell in grid))
    by_family = TABLES[table].by_family
    known = dict.fromkeys(name for cell in grid for name in ((cell.family,) if by_family else cell.tasks))
    one_of(f"column in {table}", column, [*known, *(["avg"] if len(known) > 1 else [])])
    long = paper_table(profile, table)
    found = long[(long["model"] == model) & (long["row"] == row) & (long["column"] == column)]
    if found.empty:
        raise UserError(f"The row {row} of {table} has no {column} yet: not all of its runs are done.")
    entry = found.iloc[0]
    known = {record.name: record for _, record in recorded_cells(profile, table)}
    records = [known[name] for name in record_names(long, entry)]
    over = f"{entry['seeds']} training seeds, Student's t" if entry["spread"] == "seeds" else "questions, Wilson's"
    number = f"{table}, {row}, {column}: {number_text(entry)}"
    number += f" (half the width of the 95 % interval over {over})" if entry["spread"] else ""
    tasks = dict.fromkeys(
        task
        for cell in grid
        if (cell.row, cell.base) == (row, model)
        for task in cell.tasks
        if column == "avg" or column in (task, cell.family if by_family else task)
    )
    sentence = what_was_run(records, [task for task in tasks if column != "avg" or not lower_is_better(task)])
    own = sorted({(r.provenance.commit or "", bool(r.provenance.dirty)) for r in records})
    bibtex = "\n\n".join([package_bibtex(own), paper_bibtex()])
    return Cited(
        float(entry["mean"]), float(entry["half_width"]), number, sentence, bibtex, tuple(r.name for r in records)
    )


def number_text(entry: pd.Series) -> str:
    """A number of a paper table with half the width of its interval, and its unit."""
    places = digits(entry["column"])
    half = "" if math.isnan(entry["half_width"]) else f" ± {entry['half_width']:.{places}f}"
    return f"{entry['mean']:.{places}f}{half} {'nats per token' if lower_is_better(entry['column']) else '%'}"


def record_names(long: pd.DataFrame, entry: pd.Series) -> list[str]:
    """The records behind a number of a paper table; behind an average, those of all that it is over."""
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


def what_was_run(records: Sequence[Record], tasks: Sequence[str] | None = None) -> str:
    """One sentence on runs of one kind: model, data, method, heads, scope, steps, seeds, questions, commit.

    tasks: those of evaluations that are meant; by default all that were asked.
    """
    kind, configs = records[0].kind, [record.config for record in records]
    if kind == "localize":
        said = f"All heads of {listed(config.base for config in configs)}, {localization_text(configs)}"
    elif kind == "finetune":
        said = training_text(configs)
    elif kind == "evaluate":
        tuned = [config.model for config in configs if isinstance(config.model, FinetuneConfig)]
        model = training_text(tuned) if tuned else f"{listed(config.model for config in configs)} as it is, not tuned"
        said = f"{model}; asked {_questions(records, tasks)}"
    else:
        said = f"{kind} {listed(record.name for record in records)}"
    own = sorted({(r.provenance.commit or "", bool(r.provenance.dirty)) for r in records})
    commits = listed(("commit " if commit else "commit: ") + commit_text(commit, dirty, 10) for commit, dirty in own)
    versions = listed(r.provenance.versions.get("alps-repro", "of unknown version") for r in records)
    return f"{said} (alps-repro {versions}, {commits})."


def training_text(configs: Sequence[FinetuneConfig]) -> str:
    """What was trained on what and how, of runs that differ in data and seed at most."""
    first = configs[0]
    method, recipes = METHODS[first.method], [config.recipe for config in configs]
    loaded = "" if first.quantization == "none" else f", loaded in {first.quantization},"
    what = "nothing of attention" if first.method == "no_attn" else method.about
    else_ = "nothing else" if first.scope == "heads" else "everything outside q, k and v"
    said = (
        f"{listed(config.base for config in configs)}{loaded} trained on {_each(config.dataset for config in configs)} "
        f"by the method '{first.method}': {what} and {else_} (scope '{first.scope}')"
    )
    if method.uses_ratio:
        said += f", {100 * first.ratio:g} % of the heads"
    if localizations := [config.localization for config in configs if config.localization]:
        said += f", {localization_text(localizations)}"
    length = listed(
        f"{recipe.max_steps} steps of {recipe.batch_size} examples"
        if recipe.max_steps
        else f"{recipe.epochs:g} epochs in batches of {recipe.batch_size}"
        for recipe in recipes
    )
    seeds = dict.fromkeys(config.seed for config in configs)
    return (
        f"{said}; {length} at a learning rate of {listed(f'{recipe.learning_rate:g}' for recipe in recipes)}, training "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {listed(seeds)}"
    )


def localization_text(configs: Sequence[LocalizeConfig]) -> str:
    """How heads were scored, of localizations that differ in their task model at most."""
    first = configs[0]
    found: dict[str, list[str]] = {}
    for config in configs:
        task = config.task_model
        if isinstance(task, FinetuneConfig):
            share = f"{task.recipe.data_share:.0%} of its data, " if task.recipe.data_share < 1 else ""
            steps = f", {task.recipe.max_steps} steps" if task.recipe.max_steps else ""
            how = f" ({share}method '{task.method}', scope '{task.scope}'{steps})"
            found.setdefault(how, []).append(task.dataset)
    named = [config.task_model for config in configs if isinstance(config.task_model, str)]
    against = listed([*named, *(f"its fine-tuning on {_each(names)}{how}" for how, names in found.items())])
    return f"scored by {first.metric} of {first.head_matrix} matrices against {against}"


def _each(words: Iterable[Any]) -> str:
    once = dict.fromkeys(words)
    return f"each of {listed(once)}" if len(once) > 1 else listed(once)


def _questions(records: Sequence[Record], tasks: Sequence[str] | None) -> str:
    asked: dict[str, str] = {}
    for record in records:
        config: EvaluateConfig = record.config
        for task in config.tasks:
            if tasks is None or task in tasks:
                count = record.result["questions"].get(task) or (f"up to {config.limit}" if config.limit else "all")
                asked[task] = f"{count} {config.split} questions of {task}"
    return listed(asked.values())


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


def package_bibtex(commits: Sequence[tuple[str, bool]]) -> str:
    """BibTeX of this package at the commits of some records: (commit, whether files differed from it)."""
    citation = _citation()
    note = listed(f"commit {commit}" + (" with changes on top" if dirty else "") for commit, dirty in commits if commit)
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
