"""Tables as grids of runs: the paper's rows and columns, every run once, before anything has been run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from synthetic import small_profile

from alps_repro.analysis import paper, tables
from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.configure import SOURCES
from alps_repro.experiments.grid import TABLES, Cell, cells, evaluations
from alps_repro.experiments.notebooks import read_config
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.workflow import config_path, waits_for, write_configs
from alps_repro.experiments.workflow import jobs as jobs_of
from alps_repro.heads.selection import HeadSelection
from alps_repro.training.methods import METHODS, Method

ROOT = Path(__file__).parents[2]
PROFILES = ["quick", "cpu", "paper", "gpu-4bit"]
LLAMAS = ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B"]
PAPER_METHODS = ["full", "no_attn", "random", "layer_consistent", "lora", "alps"]


def rows(profile: Profile, table: str) -> list[str]:
    return list(dict.fromkeys(cell.row for cell in cells(profile, table)))


def columns(profile: Profile, table: str) -> list[str]:
    """As `tables.paper_table` has them, averages left out."""
    found = cells(profile, table)
    if TABLES[table].by_family:
        return list(dict.fromkeys(cell.family for cell in found))
    return list(dict.fromkeys(task for cell in found for task in cell.tasks))


# As the paper has them.


def test_table1_is_the_papers() -> None:
    profile = Profile.load("paper")
    found = cells(profile, "table1")
    tuned = [(cell.base, cell.row, cell.family, cell.seed) for cell in found if cell.row != "vanilla"]
    wanted = [
        (model, method, family, seed)
        for model in LLAMAS
        for method in PAPER_METHODS
        for family in ("general", "math", "code")
        for seed in (0, 1, 2)
    ]
    assert sorted(tuned) == sorted(wanted)
    vanilla = [(cell.base, cell.family, cell.seed) for cell in found if cell.row == "vanilla"]
    assert vanilla == [(model, family, None) for model in LLAMAS for family in ("general", "math", "code")]
    assert rows(profile, "table1") == ["vanilla", *PAPER_METHODS]
    assert all(cell.run.scope == ("heads" if cell.row == "lora" else "all") for cell in found)


@pytest.mark.parametrize(
    ("name", "table", "shown"),
    [
        ("quick", "table1", ["vanilla", "full", "random", "alps"]),
        ("cpu", "table1", ["vanilla", *PAPER_METHODS, "bottom", "l2", "random_matched", "lora_matched"]),
        ("cpu", "table1_all", ["vanilla", "full", "no_attn", "random", "alps"]),
        ("cpu", "table2", ["cosine", "euclidean", "kl", "pad"]),
        ("cpu", "table3", ["100", "70", "50", "30", "10", "0"]),
        ("cpu", "table4", ["full", "no_attn", "random", "alps", "alps_own"]),
        ("cpu", "table5", ["vanilla", "full", "random", "layer_consistent", "lora", "alps"]),
        ("cpu", "table10", ["full", "alps_10pct_data", "alps_attn_only_10pct", "alps"]),  # no ready-made SmolLM2
        ("paper", "table2", ["cosine", "euclidean", "kl", "pad"]),
        ("paper", "table3", ["100", "70", "50", "30", "10", "0"]),
        ("paper", "table4", [*PAPER_METHODS, "alps_own"]),
        ("paper", "table5", ["vanilla", *PAPER_METHODS]),
        ("gpu-4bit", "table1", ["vanilla", *PAPER_METHODS]),
    ],
)
def test_rows(name: str, table: str, shown: list[str]) -> None:
    assert rows(Profile.load(name), table) == shown


def test_tables_of_the_paper_are_all_there() -> None:
    """Table 12 is the whole of Table 4, Table 13 that of Table 5; Table 11 is of hours, and of no run of its own."""
    made = {TABLES[table].reported for table in Profile.load("paper").tables}
    assert made == {*paper.TABLES} - {"table11"}


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4", "table5", "table10", "table14"])
def test_every_number_of_the_paper_finds_its_cell(table: str) -> None:
    """By the names that `reported.csv`'s rows and columns have here; and in the paper's order."""
    profile = Profile.load("paper")
    reported = tables._reported(table)
    numbers = paper.reported()
    assert len(reported) == (numbers["table"] == TABLES[table].reported).sum() > 0
    assert not reported.duplicated(["model", "row", "column"]).any()
    there = {
        (cell.base, cell.row, column)
        for cell in cells(profile, table)
        for column in ([cell.family] if TABLES[table].by_family else cell.tasks)
    }
    there |= {(model, row, "avg") for model, row, _ in there}
    missing = set(reported[["model", "row", "column"]].itertuples(index=False, name=None)) - there
    assert not missing
    ours, theirs = rows(profile, table), list(dict.fromkeys(reported["row"]))
    if table == "table14":  # whose tasks stand there from last to first
        theirs = [row for task in profile.families for row in theirs if row.endswith(f"/{task}")]
    assert [row for row in ours if row in theirs] == theirs
    assert set(ours) - set(theirs) <= {"vanilla", "alps_own"}
    shown, printed = columns(profile, table), [name for name in dict.fromkeys(reported["column"]) if name != "avg"]
    assert [column for column in shown if column in printed] == printed
    assert set(shown) == set(printed)
    assert [model for model in profile.models if model in set(reported["model"])] == list(
        dict.fromkeys(reported["model"])
    )


def test_sources_of_task_models_each_have_a_row() -> None:
    profile = Profile.load("paper")
    assert rows(profile, "table10") == ["full", *SOURCES.values()]


# Shared runs.


@pytest.mark.parametrize("name", PROFILES)
def test_every_evaluation_is_counted_once(name: str) -> None:
    profile = Profile.load(name)
    every = [cell for table in profile.tables for cell in cells(profile, table)]
    found = evaluations(profile)
    assert found.keys() == {cell.config.name for cell in every}
    configs = {config_name: cell.config for config_name, cell in found.items()}
    for cell in every:
        assert configs[cell.config.name] == cell.config
        assert set(cell.tasks) <= set(cell.config.tasks)
    if name != "quick":
        assert len(found) < len(every)


def of(profile: Profile, table: str, row: str) -> dict[tuple, str]:
    return {(c.base, c.family, c.seed): c.config.name for c in cells(profile, table) if c.row == row}


@pytest.mark.parametrize("name", ["cpu", "paper", "gpu-4bit"])
@pytest.mark.parametrize(
    ("table", "row", "method"),
    [
        *[("table2", "pad", "alps"), ("table3", "10", "alps"), ("table3", "100", "full"), ("table3", "0", "no_attn")],
        *[("table5", "alps", "alps"), ("table5", "full", "full"), ("table5", "vanilla", "vanilla")],
        *[("table10", "alps", "alps"), ("table10", "full", "full")],
    ],
)
def test_other_tables_share_table1s_runs(name: str, table: str, row: str, method: str) -> None:
    profile = Profile.load(name)
    if table not in profile.tables:
        pytest.skip(f"profile {name} has no {table}")
    shared, runs = of(profile, table, row), of(profile, "table1", method)
    assert shared
    assert all(runs[place] == run for place, run in shared.items())


@pytest.mark.parametrize("name", ["cpu", "paper", "gpu-4bit"])
def test_own_benchmarks_of_table14_are_table1s(name: str) -> None:
    profile = Profile.load(name)
    own = {
        (c.base, c.run.method, c.family, c.seed): c.config.name
        for c in cells(profile, "table14")
        if c.row == f"{c.run.method}/{c.family}" or c.run.dataset == profile.families[c.family].datasets[0]
    }
    table1 = {(c.base, c.run.method, c.family, c.seed): c.config.name for c in cells(profile, "table1")}
    assert own
    assert all(table1[place] == run for place, run in own.items())


def test_main_runs_are_asked_general_knowledge_in_one_evaluation() -> None:
    profile = Profile.load("cpu")
    for cell in cells(profile, "table1"):
        asked = cell.row in ("vanilla", "full", "random", "layer_consistent", "lora", "alps", "no_attn")
        # Without attention is vanilla in scope heads.
        assert (cell.config.tasks == (*cell.tasks, *profile.knowledge)) == asked, cell.row
        assert cell.tasks == (profile.families[cell.family].datasets[0],)
    assert all(cell.tasks == profile.knowledge for cell in cells(profile, "table5"))


def test_heads_are_found_on_the_first_data_set_and_trained_on_the_second() -> None:
    profile = Profile.load("cpu")
    for cell in cells(profile, "table4"):
        found_on, trained_on = profile.families[cell.family].datasets
        assert cell.run.dataset == trained_on
        assert cell.tasks == (trained_on,)
        assert isinstance(cell.config.model, FinetuneConfig) == (cell.row != "no_attn")
        if cell.row in ("alps", "alps_own"):
            task_model = cell.config.model.localization.task_model
            assert task_model.dataset == (found_on if cell.row == "alps" else trained_on)


@pytest.mark.parametrize("name", ["cpu", "gpu-4bit"])
def test_no_head_and_nothing_else_is_the_vanilla_model(name: str) -> None:
    """Evaluated once, for every seed; in scope all, no_attn is a run like any other."""
    profile = Profile.load(name)
    vanilla, no_attn = of(profile, "table1", "vanilla"), of(profile, "table1", "no_attn")
    assert set(vanilla.values()) == set(no_attn.values())
    assert all(seed is None for _, _, seed in no_attn)
    assert len(vanilla) == len(profile.models) * len(profile.families)
    in_all = of(Profile.load("paper"), "table1", "no_attn")
    assert len(set(in_all.values())) == 3 * 3 * 3


# Methods and coverage.


def test_method_that_is_added_stands_in_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Method("the first head", lambda layout, ratio, scores, seed: HeadSelection(((0, 0),), layout))
    monkeypatch.setitem(METHODS, "first", first)
    profile = small_profile(tmp_path, methods=["full", "alps", "first"])
    found = [cell for cell in cells(profile, "table1") if cell.row == "first"]
    assert [cell.seed for cell in found] == [0, 1, 2]
    assert all(cell.config.model.method == "first" for cell in found)
    assert rows(profile, "table1") == ["vanilla", "full", "alps", "first"]


def test_coverage_narrows_a_table(tmp_path: Path) -> None:
    families = {"sums": {"datasets": ["chain_sum", "basic_arithmetic"]}, "divisors": {"datasets": ["gcd"]}}
    narrow = {"families": ["divisors"], "methods": ["alps"], "seeds": [1]}
    profile = small_profile(tmp_path, families=families, tables={"table1": narrow, "table4": {}})
    assert [(c.row, c.family, c.seed) for c in cells(profile, "table1")] == [
        ("vanilla", "divisors", None),
        ("alps", "divisors", 1),
    ]
    # A family of one data set has nothing to carry heads over to.
    assert {c.family for c in cells(profile, "table4")} == {"sums"}
    with pytest.raises(UserError, match="There is no table of this profile 'table2'"):
        cells(profile, "table2")


def test_search_and_choice_ask_validation_questions_on_seeds_of_their_own() -> None:
    profile = Profile.load("cpu")
    for table in ("search", "choice"):
        for cell in cells(profile, table):
            assert cell.config.split == "validation"
            assert cell.config.limit == profile.search_limit
            assert cell.seed in (None, profile.search_seed)
            assert profile.search_seed not in profile.seeds
    rates = {cell.row: cell.config.model.recipe.learning_rate for cell in cells(profile, "search")}
    assert rates["lora/heads/0.003"] == 3e-3
    assert len(rates) == sum(len(entry.learning_rates) for entry in profile.search)


def test_cells_say_what_they_evaluate() -> None:
    for name in PROFILES:
        profile = Profile.load(name)
        for table in profile.tables:
            for cell in cells(profile, table):
                assert isinstance(cell, Cell)
                assert isinstance(cell.config, EvaluateConfig)
                tuned = cell.config.model
                assert (tuned if isinstance(tuned, str) else tuned.base) == cell.base
                assert cell.seed == (None if isinstance(tuned, str) else tuned.seed)
                assert isinstance(tuned, str) or tuned.dataset == cell.run.dataset


# The workflow.


def dry_run(folder: Path, profile: Path) -> str:
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "-n"]
    done = subprocess.run(
        [*map(str, command), "--configfile", str(profile), "--directory", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def jobs(said: str) -> dict[str, int]:
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


def test_workflow_runs_every_evaluation_of_the_paper_once(tmp_path: Path) -> None:
    """Without the hub; and jobs are asked for what they need in tables and figures, nothing twice."""
    profile = Profile.load("paper")
    counts = jobs(dry_run(tmp_path, ROOT / "profiles" / "paper.yaml"))
    assert counts["evaluate"] == len(evaluations(profile))
    assert counts["table"] == len(tables.of_profile(profile))
    assert counts["figure"] == 4
    localized = {
        cell.config.model.localization.name
        for cell in evaluations(profile).values()
        if isinstance(cell.config.model, FinetuneConfig) and cell.config.model.localization
    }
    assert counts["localize"] == len(localized)
    assert not any(path.is_file() for path in tmp_path.rglob("*") if ".snakemake" not in path.parts)


@pytest.mark.parametrize("name", PROFILES)
def test_jobs_are_of_the_runs_that_records_hold(name: str) -> None:
    """Evaluations, localizations and task models; each waits for what its configuration holds and a job makes."""
    profile = Profile.load(name)
    made = jobs_of(profile)
    assert made.evaluations == {name: cell.config for name, cell in evaluations(profile).items()}
    task_models = [c.task_model for c in made.localizations.values() if not isinstance(c.task_model, str)]
    assert {config.name for config in task_models} <= made.finetunings.keys()
    for config in made.localizations.values():
        assert waits_for(config, made) == [config.task_model] * isinstance(config.task_model, FinetuneConfig)
    waiting = 0
    for config in made.evaluations.values():
        before = waits_for(config, made)
        waiting += len(before)
        if isinstance(config.model, FinetuneConfig):
            localization = [config.model.localization] if METHODS[config.model.method].uses_scores else []
            assert before == localization + [config.model] * (config.model.name in made.finetunings)
        else:
            assert before == []
    assert waiting


def test_configurations_are_written_for_the_notebooks(tmp_path: Path) -> None:
    """Each as its record holds it; one that is right is not written again."""
    made = jobs_of(small_profile(tmp_path))
    write_configs(tmp_path, made)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    every = {"finetune": made.finetunings, "localize": made.localizations, "evaluate": made.evaluations}
    for kind, configs in every.items():
        for name, config in configs.items():
            assert read_config(config_path(tmp_path, kind, name), type(config)) == config
    assert len(files) == sum(map(len, every.values())) == 3 + 3 + 10
    wrong = config_path(tmp_path, "evaluate", next(iter(made.evaluations)))
    right = wrong.read_text()
    wrong.write_text("{")
    write_configs(tmp_path, made)
    assert wrong.read_text() == right
    assert {path: path.stat().st_mtime_ns for path in files if path != wrong} == {
        path: time for path, time in files.items() if path != wrong
    }


def test_workflow_of_a_model_that_is_missing_is_planned_nevertheless(tmp_path: Path) -> None:
    """Its runs will say what is missing; the others are made."""
    settings = small_profile(tmp_path / "results", models=["smollm2-135m", str(tmp_path / "nowhere")])
    path = tmp_path / "profile.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))  # which is YAML
    counts = jobs(dry_run(tmp_path, path))
    assert counts["evaluate"] == len(evaluations(settings)) == 2 * (1 + 3 * 3)


def test_reported_rows_are_read_as_text() -> None:
    """A ratio such as 100 is a row's name."""
    assert pd.api.types.is_string_dtype(paper.reported()["setting"])
    assert {"100", "0"} <= set(tables._reported("table3")["row"])


def test_table_without_a_run_is_told_of() -> None:
    quick = Profile.load("quick")
    asked = Profile.check(**{**quick.model_dump(), "tables": {"table4": {}}})  # no family has a second data set
    with pytest.raises(UserError, match="no run for table4"):
        cells(asked, "table4")
