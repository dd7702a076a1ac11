"""The paper's tables as grids of runs: what has to be run for each, before anything has been.

A table is a name, a sentence and a function that yields its cells; one that is added to `TABLES` is run by the workflow
and made from the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError, one_of
from alps_repro.experiments.configs import EvaluateConfig
from alps_repro.experiments.configure import SOURCES, Run

if TYPE_CHECKING:
    from alps_repro.experiments.profile import Coverage, Profile


@dataclass(frozen=True)
class Cell:
    """One evaluation that a table needs.

    Attributes:
        row: of the table.
        family: of the column.
        run: what is evaluated.
        config: of the evaluation.
        tasks: those of the evaluation that this table shows.
    """

    row: str
    family: str
    run: Run
    config: EvaluateConfig
    tasks: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.run.base

    @property
    def seed(self) -> int | None:
        """The training seed; None where nothing was trained."""
        return None if self.run.method == "vanilla" else self.run.seed


@dataclass(frozen=True)
class Table:
    """One of the tables that can be made.

    Attributes:
        title: one line.
        cells: yields what to run, in the order of the rows.
        reported: the paper's table in `reported.csv`.
        by_family: whether a column is a family, that is the mean of its tasks.
    """

    title: str
    cells: Callable[[Profile, Coverage], Iterator[Cell]]
    reported: str | None = None
    by_family: bool = False


def _cell(profile: Profile, row: str, family: str, run: Run, *, main: bool = False, **settings: Any) -> Cell:
    """The cell of a run; where nothing is trained, it is the vanilla model's, which is evaluated once.

    main: whether the run is one of Table 1's, which are evaluated on general knowledge in the same evaluation where
    Table 5 shows them. Other tables share these runs.
    """
    if run.method == "no_attn" and run.scope == "heads":
        run = profile.run(base=run.base, dataset=run.dataset, method="vanilla", quantization=run.quantization)
    own = settings.pop("tasks", None) or profile.evaluation(run).tasks
    tasks = (*own, *profile.knowledge) if main and _with_knowledge(profile, run) else own
    config = profile.evaluation(run, tasks, **settings)
    return Cell(row, family, run, config, own)


def _with_knowledge(profile: Profile, run: Run) -> bool:
    shown = profile.tables.get("table5")
    return shown is not None and run.method in ("vanilla", *(shown.methods or profile.methods))


def _axes(profile: Profile, coverage: Coverage) -> Iterator[tuple[str, int, str]]:
    """(model, seed, family), seeds in the outer loop, so that an incomplete grid holds whole seeds."""
    for seed in coverage.seeds or profile.seeds:
        for model in profile.models:
            for family in coverage.families or profile.families:
                yield model, seed, family


def _main(profile: Profile, coverage: Coverage, scope: str | None = None) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        given = {"base": model, "dataset": profile.families[family].datasets[0], "seed": seed}
        if seed == (coverage.seeds or profile.seeds)[0]:
            yield _cell(profile, "vanilla", family, profile.run(method="vanilla", **given), main=True)
        for method in coverage.methods or profile.methods:
            run = profile.run(method=method, **given, scope=scope)
            yield _cell(profile, method, family, run, main=scope is None)


def _metrics(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        given = {"base": model, "dataset": profile.families[family].datasets[0], "seed": seed}
        for metric in profile.metrics:
            run = profile.run(method="alps", metric=metric, **given)
            yield _cell(profile, metric, family, run, main=metric == profile.metric)


def _ratios(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        given = {"base": model, "dataset": profile.families[family].datasets[0], "seed": seed}
        yield _cell(profile, "100", family, profile.run(method="full", **given), main=True)
        for ratio in sorted({*profile.ratios, profile.ratio}, reverse=True):
            run = profile.run(method="alps", ratio=ratio, **given)
            yield _cell(profile, f"{100 * ratio:g}", family, run, main=ratio == profile.ratio)
        yield _cell(profile, "0", family, profile.run(method="no_attn", **given), main=True)


def _transfer(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        if len(profile.families[family].datasets) < 2:
            continue
        found_on, trained_on = profile.families[family].datasets
        given = {"base": model, "dataset": trained_on, "seed": seed}
        for method in coverage.methods or profile.methods:
            yield _cell(profile, method, family, profile.run(method=method, heads_from=found_on, **given))
        yield _cell(profile, "alps_own", family, profile.run(method="alps", **given))


def _knowledge(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for cell in _main(profile, coverage):
        yield Cell(cell.row, cell.family, cell.run, cell.config, profile.knowledge)


def _sources(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        given = {"base": model, "dataset": profile.families[family].datasets[0], "seed": seed}
        yield _cell(profile, "full", family, profile.run(method="full", **given), main=True)
        for source, row in SOURCES.items():
            if source == "ready_made" and model not in profile.ready_made:
                continue
            run = profile.run(method="alps", source=source, **given)
            yield _cell(profile, row, family, run, main=source == "full")


def _every_benchmark(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        for method in coverage.methods or ("full", "no_attn", "alps"):
            own = profile.families[family].datasets[0]
            run = profile.run(method=method, base=model, dataset=own, seed=seed)
            for other in profile.families:
                tasks = profile.evaluation(profile.run(dataset=profile.families[other].datasets[0])).tasks
                # A model's own benchmarks are Table 1's.
                own_task = other == family
                yield _cell(profile, f"{method}/{family}", other, run, main=own_task, tasks=None if own_task else tasks)


def _choice(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    for dataset in profile.candidates:
        # Data sets are chosen before learning rates are searched: with the recipe's own.
        rate = profile.recipe.learning_rate
        given = {"dataset": dataset, "seed": profile.search_seed, "learning_rate": rate}
        for method in ("vanilla", "full"):
            run = profile.run(method=method, scope="all", **given)
            family = profile.family(dataset) or "rejected"
            yield _cell(profile, method, family, run, tasks=(dataset,), split="validation", limit=profile.search_limit)


def _search(profile: Profile, coverage: Coverage) -> Iterator[Cell]:
    family = next(iter(profile.families))
    for entry in profile.search:
        for rate in entry.learning_rates:
            given = {"method": entry.method, "scope": entry.scope, "ratio": entry.ratio, "seed": profile.search_seed}
            run = profile.run(**given, learning_rate=rate)
            at = "" if entry.ratio is None else f"@{entry.ratio:g}"
            row = f"{entry.method}{at}/{entry.scope}/{rate:g}"
            yield _cell(profile, row, family, run, split="validation", limit=profile.search_limit)


def _systems(profile: Profile, coverage: Coverage, examples: int) -> Iterator[Cell]:
    for model, seed, family in _axes(profile, coverage):
        given = {"base": model, "dataset": profile.families[family].datasets[0], "seed": seed}
        if seed == (coverage.seeds or profile.seeds)[0]:
            yield _cell(profile, "vanilla", family, profile.run(method="vanilla", **given))
        for method in coverage.methods or profile.methods:
            yield _cell(profile, method, family, profile.run(method=method, examples=examples, **given))


#: {table that compares systems: training examples}, few and many; JoLA's claim is about few.
SYSTEMS = {"systems_200": 200, "systems_2000": 2000}

TABLES: dict[str, Table] = {
    "choice": Table("Candidate data sets, on validation questions", _choice),
    "search": Table("Learning-rate search, on validation questions", _search),
    "table1": Table("Which part of attention is trained", _main, "table1"),
    "table1_all": Table(
        "The same, with everything outside attention trained (scope all)",
        lambda profile, coverage: _main(profile, coverage, "all"),
        "table1",
    ),
    "table2": Table("Which metric scores the heads", _metrics, "table2"),
    "table3": Table("How many heads are trained", _ratios, "table3"),
    "table4": Table("Heads found on one data set, trained on another", _transfer, "table12", by_family=True),
    "table5": Table("General knowledge after training", _knowledge, "table13"),
    "table10": Table("Where the task model comes from", _sources, "table10"),
    "table14": Table("Every benchmark on every task's model", _every_benchmark, "table14"),
} | {
    name: Table(f"Comparison of systems, {size} training examples", partial(_systems, examples=size))
    for name, size in SYSTEMS.items()
}


def cells(profile: Profile, table: str) -> list[Cell]:
    """All cells of one of a profile's tables, whether they have been run or not.

    Raises:
        UserError: the profile has no such table, or no run for it.
    """
    one_of("table of this profile", table, profile.tables)
    grid = list(TABLES[table].cells(profile, profile.tables[table]))
    if not grid:
        raise UserError(
            f"The profile has no run for {table} ({TABLES[table].title}): add what it needs, or leave the table out."
        )
    return grid


def evaluations(profile: Profile) -> dict[str, Cell]:
    """Every evaluation that a profile's tables need, once: {name: a cell that needs it}."""
    first: dict[str, Cell] = {}
    for table in profile.tables:
        for cell in cells(profile, table):
            first.setdefault(cell.config.name, cell)
    return first
