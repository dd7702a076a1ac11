"""Notebooks: what each must look like, and each of them executed on a tiny random model; a profile by snakemake."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from tiny_models import tiny_checkpoint

from alps_repro.analysis import tables
from alps_repro.data.datasets import DATASETS, OFFLINE
from alps_repro.errors import UserError
from alps_repro.evaluation.benchmarks import SPLITS, TEMPLATES
from alps_repro.experiments.configure import SOURCES
from alps_repro.experiments.grid import cells, evaluations
from alps_repro.experiments.notebooks import execute
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import Record, load_record, load_records, record_path
from alps_repro.experiments.runs import evaluate_run
from alps_repro.experiments.workflow import reproduce
from alps_repro.localization.metrics import GROUNDS, HEAD_MATRICES, METRICS
from alps_repro.models.checks import QUANTIZATIONS
from alps_repro.training.methods import METHODS, SCOPES

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(cell: Any) -> str:
    """A cell's Python, without IPython's magic lines."""
    return "\n".join("" if line.startswith("%") else line for line in cell.source.splitlines())


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook: Any) -> Any:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def check_cell(notebook: Any) -> Any:
    (cell,) = [cell for cell in code_cells(notebook) if "check_parameters" in cell.source]
    return cell


def parameters(notebook: Any) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(code(parameters_cell(notebook)), namespace)
    return {name: value for name, value in namespace.items() if not name.startswith("__")}


# Each one as it is stored


def test_the_story_is_there() -> None:
    names = [path.stem for path in NOTEBOOKS]
    assert set(names) >= {"01_localize_heads", "02_finetune", "03_evaluate", "04_transfer", "05_forgetting"}
    assert set(names) >= {"06_report", "07_systems", "08_score_and_truth", "09_paper_arithmetic"}
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in names)


@each_notebook
def test_form(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    # What the tag is for: exactly one cell, and the check right behind it.
    cells = code_cells(notebook)
    assert cells[0] is parameters_cell(notebook)
    assert cells[1] is check_cell(notebook)
    for cell in cells:
        assert cell.outputs == [], "stored without outputs"
        assert cell.execution_count is None
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(code(cell)))), "the package does"


@each_notebook
def test_every_parameter_is_checked_explained_and_used(path: Path) -> None:
    notebook = read(path)
    found = parameters(notebook)
    check = ast.parse(code(check_cell(notebook)))
    (call,) = [
        node
        for node in ast.walk(check)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "check_parameters"
    ]
    known = eval(compile(ast.Expression(call.args[1]), str(path), "eval"), {})
    assert known == list(found)
    explained = set()
    for line in parameters_cell(notebook).source.splitlines():
        name, separator, comment = line.partition("  # ")
        if not line.startswith("#"):
            assert separator, f"'{line}' has no comment"
            assert len(comment) > 10
            explained.add(name.split(" = ")[0])
    assert explained == set(found)
    used = {
        node.id
        for cell in code_cells(notebook)[1:]
        for node in ast.walk(ast.parse(code(cell)))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert set(found) <= used


#: What may be asked for under a parameter's name.
CHOICES = {
    "metric": METRICS,
    "head_matrix": HEAD_MATRICES,
    "ground": GROUNDS,
    "dataset": DATASETS,
    "heads_from": DATASETS,
    "source": SOURCES,
    "method": METHODS,
    "scope": SCOPES,
    "quantization": QUANTIZATIONS,
    "template": TEMPLATES,
    "split": SPLITS,
    "against": [name for name, method in METHODS.items() if method.source == "paper" and name != "alps"],
}


@each_notebook
def test_explanations_name_every_choice(path: Path) -> None:
    """Each in quotes, or, where they are many, the place where they stand."""
    source = parameters_cell(read(path)).source
    # A comment may go on in lines of its own.
    texts = {block.split(" = ")[0]: block for block in re.split(r"\n(?!#)", source)}
    for name in texts.keys() & CHOICES.keys():
        comment = texts[name].partition("#")[2]
        if place := re.search(r"\b(alps_repro\.[\w.]+)\.([A-Z]+)\b", comment):
            listed = getattr(importlib.import_module(place[1]), place[2])
            # Questions whose answers are known are made for offline data sets alone.
            assert listed is (OFFLINE if path.stem == "08_score_and_truth" else CHOICES[name])
        else:
            assert set(CHOICES[name]) <= set(re.findall(r'"([\w.]+)"', comment))


# Its check cell alone


def check(path: Path, **given: Any) -> dict[str, Any]:
    """Run parameters and check as papermill would, with `given` between the two."""
    notebook = read(path)
    namespace: dict[str, Any] = {}
    exec(code(parameters_cell(notebook)), namespace)
    namespace |= given
    exec(code(check_cell(notebook)), namespace)
    return namespace


@each_notebook
def test_defaults_are_right(path: Path) -> None:
    namespace = check(path)
    assert "profile" not in namespace or namespace["settings"].models == ("smollm2-135m",)


@each_notebook
def test_every_mistyped_parameter_is_refused(path: Path) -> None:
    for name in parameters(read(path)):
        for wrong in (name + "s", name.upper(), name[:2] + name[3:]):
            for value in (None, 0.2, "x"):
                with pytest.raises(UserError, match=f"no parameter '{wrong}': did you mean '|no parameter '{wrong}'"):
                    check(path, **{wrong: value})


IMPOSSIBLE = {
    "profile": ("quik", "did you mean 'quick'"),
    "metric": ("padd", "did you mean 'pad'"),
    "head_matrix": ("produkt", "did you mean 'product'"),
    "tau": (-1, "positive temperature"),
    "ground": ("place", "known are"),
    "ratio": (0, r"not in \(0, 1\]"),
    "dataset": ("chainsum", "did you mean 'chain_sum'"),
    "method": ("alpz", "did you mean 'alps'"),
    "scope": ("head", "did you mean 'heads'"),
    "quantization": ("4-bit", "did you mean '4bit'"),
    "seed": (-1, "'seed' is -1"),
    "heads_from": ("chainsum", "did you mean 'chain_sum'"),
    "source": ("ful", "did you mean 'full'"),
    "data_share": (0, "'data_share' is 0"),
    "split": ("dev", "'split' is 'dev'"),
    "learning_rate": (0, "'learning_rate' is 0"),
    "max_steps": (0, "'max_steps' is 0"),
    "examples": (0, "'examples' is 0"),
    "tasks": (["chainsum"], "did you mean 'chain_sum'"),
    "limit": (0, "'limit' is 0"),
    "batch_size": (0, "'batch_size' is 0"),
    "template": ("alpacca", "'alpaca'"),
    "allow_code": ("perhaps", "'allow_code' is 'perhaps'"),
    # Any text could be the name of a model or folder, so it is looked for when the run begins.
    "base": (5, "'base' is 5"),
    "task_model": (5, "'task_model"),
    "results": (5, "'results' is 5"),
    "against": (["ful"], "did you mean 'full'"),
    "max_lost": (2, "'max_lost' is 2"),
    "threshold": (0, "'threshold' is 0"),
    "config": ("nowhere.json", "The configuration 'nowhere.json' cannot be read"),
}


@each_notebook
def test_impossible_parameters_are_refused_before_anything_runs(path: Path) -> None:
    for name in parameters(read(path)):
        value, message = IMPOSSIBLE[name]
        with pytest.raises(UserError, match=message):
            check(path, **{name: value})


# Or by a file that holds the whole configuration

#: Of each notebook that accepts one: the kind of run, its variable there, and named parameters for one of its own.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "01_localize_heads": ("localize", "localization", {"metric": "kl", "head_matrix": "concat", "seed": 3}),
    "02_finetune": ("finetune", "finetuning", {"method": "random", "ratio": 0.2, "seed": 3, "learning_rate": 1e-5}),
    "03_evaluate": ("evaluate", "evaluation", {"method": "alps", "tasks": ["gcd"], "limit": 3, "split": "validation"}),
}
each_run = pytest.mark.parametrize("name", RUNS)


def notebook_path(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def stored_config(folder: Path, name: str, **changes: Any) -> Path:
    """The configuration that a notebook's named parameters give, in a file."""
    _, variable, given = RUNS[name]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**check(notebook_path(name), **given)[variable].dump(), **changes}))
    return path


def test_every_notebook_of_a_run_accepts_a_configuration() -> None:
    assert {path.stem for path in NOTEBOOKS if "config" in parameters(read(path))} == set(RUNS)


@each_run
def test_a_configuration_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    """Whatever the profile says of other runs."""
    _, variable, given = RUNS[name]
    made = check(notebook_path(name), config=str(stored_config(tmp_path, name)), profile="cpu", results=str(tmp_path))
    assert made[variable] == check(notebook_path(name), **given)[variable]
    assert made[variable] != check(notebook_path(name))[variable]
    assert made["settings"].results == str(tmp_path)


@each_run
def test_no_named_parameter_beside_a_configuration(name: str, tmp_path: Path) -> None:
    path = stored_config(tmp_path, name)
    for other in {*parameters(read(notebook_path(name)))} - {"profile", "results", "config"}:
        with pytest.raises(UserError, match=f"leave out the parameter '{other}', or `config`"):
            check(notebook_path(name), config=str(path), **{other: "alps"})


@each_run
def test_wrong_configurations_are_refused(name: str, tmp_path: Path) -> None:
    path = stored_config(tmp_path, name)
    stored = json.loads(path.read_text())
    nested, typo, right = {
        "01_localize_heads": ("task_model", "datset", "dataset"),
        "02_finetune": ("recipe", "max_step", "max_steps"),
        "03_evaluate": ("model", "quantisation", "quantization"),
    }[name]
    first = next(iter(stored))
    for wrong, message in {
        json.dumps({**stored, f"{first}s": 1}): f"no parameter '{first}s': did you mean '{first}'",
        json.dumps({**stored, nested: {**stored[nested], typo: 1}}): f"{typo}': did you mean '{right}'",
        json.dumps({k: v for k, v in stored.items() if k != first}): f"The parameter '{first}' is missing",
        "[1]": "holds no settings",
        '"text"': "holds no settings",
        "{": "cannot be read",
        "[" * 100_000: "cannot be read",
        "\x00": "cannot be read",
    }.items():
        path.write_text(wrong)
        with pytest.raises(UserError, match=message) as caught:
            check(notebook_path(name), config=str(path))
        assert f"The configuration '{path}'" in str(caught.value)
        assert "\n" not in str(caught.value)
    for other in RUNS.keys() - {name}:
        with pytest.raises(UserError, match="is not one for this notebook: There is no parameter"):
            check(notebook_path(name), config=str(stored_config(tmp_path, other)))
    path.write_bytes(b"\xff\xfe")
    for place in (str(path), str(tmp_path), str(tmp_path / ("x" * 300))):
        with pytest.raises(UserError, match="cannot be read"):
            check(notebook_path(name), config=place)
    with pytest.raises(UserError, match="'config' is 5: give the path"):
        check(notebook_path(name), config=5)


@pytest.mark.parametrize(
    "line", re.findall(r"^papermill .*", (ROOT / "README.md").read_text(), flags=re.MULTILINE), ids=str
)
def test_papermill_commands_of_the_readme_are_right(line: str) -> None:
    _, notebook, _, *words = shlex.split(line)
    assert words[::3] == ["-p"] * (len(words) // 3)
    check(ROOT / notebook, **dict(zip(words[1::3], words[2::3], strict=True)))


# In a kernel


@pytest.mark.parametrize(
    ("notebook", "given", "message"),
    [
        ("01_localize_heads", {"raito": 0.2}, "There is no parameter 'raito': did you mean 'ratio'?"),
        ("02_finetune", {"method": "alpz"}, "There is no method 'alpz': did you mean 'alps'?"),
    ],
)
def test_stops_with_the_nearest_right_one(notebook: str, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {**given, "results": str(tmp_path / "results")}
    with pytest.raises(UserError) as caught:
        execute(ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path / "out.ipynb", given)
    failed = tmp_path / "out.failed.ipynb"
    assert str(caught.value) == f"out failed: UserError: {message} (see '{failed}')"
    assert [path.name for path in tmp_path.iterdir()] == [failed.name], "no copy that looks as if it were whole"


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    }


#: Of tiny runs; a folder and a base come on top.
SETTINGS = {
    "families": {"sums": {"datasets": ["chain_sum", "basic_arithmetic"]}},
    "methods": ["full", "alps"],
    "scope": "heads",
    "tables": {"table1": {}, "table4": {}, "table5": {}},
    "limit": 4,
    "ratio": 0.25,
    "knowledge": ["prose"],
    "score_and_truth": True,
    "recipe": {"learning_rate": 1e-3, "max_steps": 2, "batch_size": 2, "micro_batch_size": 2},
}


def profile_in(folder: Path, **settings: Any) -> Profile:
    """A profile of tiny runs in `folder/tiny.yaml`, its results in `folder/results`."""
    base = folder / "base"
    given = {**SETTINGS, "results": str(folder / "results"), "models": [str(base)], **settings}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(given))
    if not base.exists():
        tiny_checkpoint(base)
    return Profile.load(str(folder / "tiny.yaml"))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_in(tmp_path_factory.mktemp("chain"))


def lasting(record: Record) -> dict[str, Any]:
    """A record without what differs each time that a run is made: times, and memory."""
    found = record.model_dump(mode="json")
    for part, names in {"cost": ("seconds", "peak_memory_bytes"), "result": ("training_seconds",)}.items():
        found[part] = {name: value for name, value in found[part].items() if name not in names}
    return {**found, "finished": None}


@pytest.fixture(scope="module")
def executed(profile: Profile) -> Callable[..., Any]:
    """Executes a notebook and reads the copy; what lies in the results folder by then is not made again.

    The notebook is a copy with the check cell once more at the end, as when cells are run again in Jupyter: what it has
    made by then must not be taken for parameters.
    """
    folder = Path(profile.results).parent

    def run(name: str, **given: Any) -> Any:
        notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
        again = copy.deepcopy(check_cell(notebook))
        again.id = "checked-again"
        notebook.cells.append(again)
        nbformat.write(notebook, folder / f"{name}.ipynb")
        target = folder / "out" / f"{name}.ipynb"
        execute(folder / f"{name}.ipynb", target, given)
        assert not target.with_suffix(".failed.ipynb").exists()
        return whole(read(target), again.source)

    return run


def whole(notebook: Any, last: str) -> Any:
    """The notebook, when all its cells were run and there is nothing in it for the reader to wonder at."""
    nbformat.validate(notebook)
    assert code_cells(notebook)[-1].source == last
    assert all(cell.execution_count is not None for cell in code_cells(notebook))
    assert not any(output.output_type == "error" for output in outputs(notebook))
    lines = [line for output in outputs(notebook) for line in output.get("text", "").splitlines()]
    # peft 0.21 asks transformers for an attribute by its former name.
    assert [line for line in lines if "Warning" in line and "is_gradient_checkpointing" not in line] == []
    assert not any("\r" in output.get("text", "") for output in outputs(notebook)), "every state of a progress bar"
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def shown(notebook: Any, kind: str) -> list[str]:
    """All that is shown as HTML ("text/html"; bars left out), Markdown, or pictures ("image/png")."""
    found = [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]
    return [data for data in found if "<progress" not in data]


def records_of(profile: Profile) -> dict[str, int]:
    """{kind: number of records}"""
    kinds = [record.kind for record in load_records(Path(profile.results) / "records")]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def path_of(profile: Profile) -> str:
    return str(Path(profile.results).with_name("tiny.yaml"))


def test_localize(profile: Profile, executed: Any) -> None:
    """The task model is made as well; without parameters, the profile's own localization."""
    notebook = executed("01_localize_heads", profile=path_of(profile))
    assert len(shown(notebook, "image/png")) == 1
    assert len(shown(notebook, "text/html")) == 2
    name = profile.localization(profile.run()).name
    assert record_path(Path(profile.results) / "records", "localize", name).exists()
    assert (Path(profile.results) / "figures" / "heads" / f"{name}.svg").exists()


def test_finetune(profile: Profile, executed: Any) -> None:
    notebook = executed("02_finetune", profile=path_of(profile), method="alps")
    assert len(shown(notebook, "image/png")) == 1
    assert len(shown(notebook, "text/html")) == 2
    config = profile.finetuning(profile.run())
    record = load_record(record_path(Path(profile.results) / "records", "finetune", config.name))
    assert f"{record.cost.trained_parameters:,} of" in shown(notebook, "text/html")[1]


def test_evaluate(profile: Profile, executed: Any) -> None:
    notebook = executed("03_evaluate", profile=path_of(profile), method="full", tasks=["chain_sum", "gcd"], limit=2)
    table, answers = shown(notebook, "text/html")
    assert re.findall(r">(chain_sum|gcd)<", table) == ["chain_sum", "gcd"]
    assert answers.count("<tr>") == 1 + 2 * 2
    config = profile.evaluation(profile.run(method="full"), ["chain_sum", "gcd"], limit=2)
    assert record_path(Path(profile.results) / "records", "evaluate", config.name).exists()


@each_run
def test_a_configuration_makes_the_record_of_the_named_parameters(profile: Profile, tmp_path: Path, name: str) -> None:
    """Of the name and with the content; the runs that it needs are made in the same folder, too."""
    named = {
        "01_localize_heads": ({}, profile.localization(profile.run())),
        "02_finetune": ({"method": "alps"}, profile.finetuning(profile.run())),
        "03_evaluate": ({"method": "full", "limit": 2}, profile.evaluation(profile.run(method="full"), limit=2)),
    }
    (given, config), kind, made = named[name], RUNS[name][0], []
    (tmp_path / "config.json").write_text(json.dumps(config.dump()))
    for i, words in enumerate((given, {"config": str(tmp_path / "config.json")})):
        results = tmp_path / f"results-{i}"
        execute(
            notebook_path(name), tmp_path / "out.ipynb", {"profile": path_of(profile), "results": str(results), **words}
        )
        made.append({path.name: lasting(load_record(path)) for path in (results / "records").iterdir()})
    assert made[0] == made[1]
    assert record_path(Path(), kind, config.name).name in made[0]


def test_transfer(profile: Profile, executed: Any) -> None:
    """Runs that are missing are made, and the second data set's heads are found on the first."""
    notebook = executed("04_transfer", profile=path_of(profile))
    (table,) = shown(notebook, "text/markdown")
    assert [row.split("|")[2].strip() for row in table.splitlines()[2:]] == ["full", "alps", "alps_own"]
    assert len(shown(notebook, "image/png")) == 2
    overlap = shown(notebook, "text/html")[-1]
    assert "in common" in overlap
    for cell in cells(profile, "table4"):
        assert record_path(Path(profile.results) / "records", "evaluate", cell.config.name).exists()
    assert record_path(Path(profile.results) / "records", "embed", profile.embedding().name).exists()


def test_forgetting(profile: Profile, executed: Any) -> None:
    notebook = executed("05_forgetting", profile=path_of(profile))
    (table,) = shown(notebook, "text/markdown")
    assert [row.split("|")[2].strip() for row in table.splitlines()[2:]] == ["vanilla", "full", "alps"]
    assert "prose" in table.splitlines()[0]
    against = shown(notebook, "text/html")[-1]
    assert ">full<" in against
    assert ">vanilla<" not in against
    for cell in cells(profile, "table5"):
        assert record_path(Path(profile.results) / "records", "evaluate", cell.config.name).exists()


def test_systems(profile: Profile, executed: Any, tmp_path: Path) -> None:
    """One of each kind, at both numbers of examples; the smallest tables that there can be."""
    methods = ["full", "alps", "lofit_offset", "hifi", "jola"]
    own = {"results": str(tmp_path / "results"), "tables": {"systems_200": {}, "systems_2000": {}}, "methods": methods}
    settings = yaml.safe_load(Path(path_of(profile)).read_text()) | own | {"questions": 4}
    path = tmp_path / "systems.yaml"
    path.write_text(yaml.safe_dump(settings))
    notebook = executed("07_systems", profile=str(path))
    few, many = shown(notebook, "text/markdown")
    for table in (few, many):
        rows = [row.split("|")[2].strip() for row in table.splitlines() if row.startswith("| /")]
        assert rows[:6] == ["vanilla", *methods]
    assert len(shown(notebook, "image/png")) == 2
    given, overlap, gates = shown(notebook, "text/html")
    assert re.findall(r"row_heading[^>]*>(\w+)<", given) == methods
    steps = {str(len(record.result["losses"])) for record in load_records(tmp_path / "results" / "records", "finetune")}
    assert set(re.findall(r"col0[^>]*>(\d+)<", given)) == steps
    assert re.findall(r"row_heading[^>]*>(\w+)<", overlap) == ["alps", "lofit", "hifi"]
    assert "0 of 8" in gates


def test_score_and_truth(profile: Profile, executed: Any) -> None:
    """By the sizes that profiles have: on a model of eight heads they take seconds."""
    notebook = executed("08_score_and_truth", profile=path_of(profile))
    assert len(shown(notebook, "image/png")) >= 2
    assert len(shown(notebook, "text/html")) >= 3
    found = records_of(profile)
    assert (found["recall"], found["importance"]) == (1, 1)
    for name in ("recall", "importance-pad"):
        assert (Path(profile.results) / "figures" / f"{name}.png").stat().st_size > 1000


def test_report(profile: Profile, executed: Any) -> None:
    """Everything from the records, each table as its files have it."""
    results = Path(profile.results)
    for cell in evaluations(profile).values():  # those that the notebooks above have not made
        evaluate_run(cell.config, results, progress=False)
    before = state(results / "records")
    notebook = executed("06_report", profile=path_of(profile))
    assert state(results / "records") == before
    claims, *shown_tables = shown(notebook, "text/markdown")
    assert claims == (results / "claims.md").read_text()
    assert shown_tables == [(results / "tables" / f"{name}.md").read_text() for name in tables.of_profile(profile)]
    table = tables.summary(load_records(results / "records"))
    assert (results / "tables" / "summary.csv").read_text() == table.to_csv(index=False, lineterminator="\n")
    assert set(table["method"]) == {"vanilla", "full", "alps"}
    # Figures 5, 6 and 7 where they can be made, losses, and a heat map a localization.
    assert len(shown(notebook, "image/png")) >= 5
    assert (results / "figures" / "losses.svg").stat().st_size > 1000
    assert all(record.kind in shown(notebook, "text/html")[-1] for record in load_records(results / "records"))


def test_arithmetic(executed: Any, profile: Profile) -> None:
    """It needs no run, and makes none."""
    before = records_of(profile)
    notebook = executed("09_paper_arithmetic", against=["random", "lora"], threshold=1.5)
    assert len(shown(notebook, "image/png")) == 1
    assert len(shown(notebook, "text/html")) >= 8
    assert ">no_attn<" not in shown(notebook, "text/html")[-1]
    assert records_of(profile) == before


def test_every_notebook_is_executed_above() -> None:
    source = Path(__file__).read_text()
    assert {path.stem for path in NOTEBOOKS} == set(re.findall(r'= executed\("(\w+)"', source))


# A profile, by snakemake


TOKEN = "hf_" + "secret" * 6

#: Every rule of the workflow that makes a run, once or more.
GRID = {"tables": {"table1": {}}, "task_scope": "heads", "knowledge": [], "limit": 2, "score_and_truth": False}


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A profile and the lines that were said of it; snakemake's own files lie beside the results."""
    folder = tmp_path_factory.mktemp("reproduced")
    profile, said = profile_in(folder, **GRID), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_TOKEN", TOKEN)
        assert reproduce(path_of(profile), said.append) == Path(profile.results)
    return profile, said


@pytest.mark.long
def test_profile_makes_everything(reproduced: Any) -> None:
    profile, said = reproduced
    results = Path(profile.results)
    alps, full = (profile.finetuning(profile.run(method=method)) for method in ("alps", "full"))
    asked = {name: f"03_evaluate-{name}.ipynb" for name in evaluations(profile)}
    begun = [line.removesuffix(" ...") for line in said if line.endswith(" ...")]
    assert set(begun) == {
        *(f"evaluating {name}" for name in asked),
        f"fine-tuning {full.name}",
        f"localizing {alps.localization.name}",
        *["making table1", "making table11", "drawing figure5", "making the report"],
    }
    assert begun[-1] == "making the report"
    assert said[-1] == "[10/10] everything: done"
    done = [re.sub(r"^\[\d+/10\] (.*): done$", r"\1", line) for line in said if line.endswith(": done")]
    assert sorted(done) == sorted([*begun, "everything"])
    assert {path.name for path in (results / "notebooks").iterdir()} == {
        *asked.values(),
        *[f"02_finetune-{full.name}.ipynb", f"01_localize_heads-{alps.localization.name}.ipynb", "06_report.ipynb"],
    }
    assert records_of(profile) == {"evaluate": 3, "finetune": 2, "localize": 1}
    for name, cell in evaluations(profile).items():
        assert load_record(record_path(results / "records", "evaluate", name)).config == cell.config
    for made in ("tables/table1.csv", "tables/summary.md", "figures/losses.svg", "figures/figure5.png", "claims.csv"):
        assert (results / made).stat().st_size > 100
    assert {path.name for path in results.iterdir()} == {
        *[".locks", ".profiles", "records", "scores", "samples", "models", "tables", "figures", "notebooks"],
        *["claims.csv", "claims.md"],
    }
    stored = {path.name: json.loads(path.read_text()) for path in (results / ".profiles" / "configs").iterdir()}
    finetuning = record_path(results / "records", "finetune", profile.finetuning(profile.run(method="alps")).name)
    assert stored == {
        path.name: json.loads(path.read_text())["config"]
        for path in (results / "records").iterdir()
        if path != finetuning
    }, "each job's run, and no other"


@pytest.mark.long
def test_profile_again_does_nothing(reproduced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, _ = reproduced
    monkeypatch.chdir(Path(profile.results).parent)
    before, said = state(Path(profile.results)), []
    assert reproduce(path_of(profile), said.append) == Path(profile.results)
    assert said == []
    assert state(Path(profile.results)) == before


@pytest.mark.long
def test_failed_run_is_named_and_leaves_the_rest(
    reproduced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models, one of them damaged: the other's runs are made; a token is not told by what fails, either."""
    profile, _ = reproduced
    shutil.copytree(Path(profile.models[0]), tmp_path / "base")
    shutil.copytree(Path(profile.models[0]), tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    models = [str(tmp_path / name) for name in ("base", "broken")]
    both = profile_in(tmp_path, **{**GRID, "models": models, "methods": ["full"]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said: list[str] = []
    with pytest.raises(UserError, match=r"2 runs of the profile failed.*run again to repeat them"):
        reproduce(path_of(both), said.append)
    told = [line for line in said if line.startswith("failed: ")]
    assert len(told) == 2
    assert all(re.search(r"-broken-.*: '.*broken' cannot be loaded .*check that its folder", line) for line in told)
    copies = {path.name for path in (tmp_path / "results" / "notebooks").iterdir()}
    for name, cell in evaluations(both).items():
        made = cell.base == models[0]
        assert record_path(tmp_path / "results" / "records", "evaluate", name).exists() == made
        assert (f"03_evaluate-{name}.ipynb" in copies) == made
        assert (f"03_evaluate-{name}.failed.ipynb" in copies) == (not made)
    assert no_token_in(tmp_path) > 20


def no_token_in(folder: Path) -> int:
    """How many files were looked through."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        assert TOKEN.encode() not in path.read_bytes(), path
    return len(paths)


@pytest.mark.long
def test_tokens_reach_no_notebook_and_no_log(reproduced: Any) -> None:
    profile, said = reproduced
    folder = Path(profile.results).parent
    assert TOKEN not in "\n".join(said)
    assert list((folder / ".snakemake" / "log").iterdir()), "there is a log to look through"
    assert len(list((folder / "results" / "notebooks").iterdir())) == 6
    assert no_token_in(folder) > 20
