"""Notebooks: what each must look like, and the whole chain of them on a tiny random model."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
import yaml
from tiny_models import tiny_checkpoint

import alps_repro.reproduce as reproducing
from alps_repro import tables
from alps_repro.checkpoints import QUANTIZATIONS
from alps_repro.data import DATASETS
from alps_repro.errors import UserError
from alps_repro.evaluation import TEMPLATES
from alps_repro.methods import METHODS, SCOPES
from alps_repro.records import load_records
from alps_repro.reproduce import reproduce
from alps_repro.scores import GROUNDS, HEAD_MATRICES, METRICS

SOURCES = reproducing.NOTEBOOKS
NOTEBOOKS = sorted(SOURCES.glob("*.ipynb"))
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
    names = [path.name for path in NOTEBOOKS]
    assert {"01_localize_heads.ipynb", "02_finetune.ipynb", "03_evaluate.ipynb", "06_report.ipynb"} <= set(names)
    assert all(re.match(r"\d\d_[a-z_]+\.ipynb", name) for name in names)


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
    "method": METHODS,
    "scope": SCOPES,
    "quantization": QUANTIZATIONS,
    "template": TEMPLATES,
}


@each_notebook
def test_explanations_name_every_choice(path: Path) -> None:
    source = parameters_cell(read(path)).source
    # A comment may go on in lines of its own.
    texts = {block.split(" = ")[0]: block for block in re.split(r"\n(?!#)", source)}
    for name in texts.keys() & CHOICES.keys():
        named = set(re.findall(r'"([\w.]+)"', texts[name].partition("#")[2]))
        assert set(CHOICES[name]) <= named


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
    assert check(path)["settings"].base == "smollm2-135m"


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
    "choice_seed": (-1, "'choice_seed' is -1"),
    "learning_rate": (0, "'learning_rate' is 0"),
    "max_steps": (0, "'max_steps' is 0"),
    "model": ("alpz", "did you mean 'alps'"),
    "tasks": (["chainsum"], "did you mean 'chain_sum'"),
    "limit": (0, "'limit' is 0"),
    "batch_size": (0, "'batch_size' is 0"),
    "template": ("alpacca", "'alpaca'"),
    "allow_code": ("perhaps", "'allow_code' is 'perhaps'"),
    # Any text could be the name of a model or folder, so it is looked for when the run begins.
    "base": (5, "'base' is 5"),
    "task_model": (5, "'task_model"),
    "results": (5, "'results' is 5"),
}


@each_notebook
def test_impossible_parameters_are_refused_before_anything_runs(path: Path) -> None:
    for name in parameters(read(path)):
        value, message = IMPOSSIBLE[name]
        with pytest.raises(UserError, match=message):
            check(path, **{name: value})


# In a kernel


def execute(source: Path, target: Path, **given: Any) -> str:
    """What papermill says of a notebook that must fail."""
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(source), str(target), parameters=given, kernel_name="python3", progress_bar=False
        )
    assert caught.value.ename == "UserError"
    return caught.value.evalue


@pytest.mark.parametrize(
    ("notebook", "given", "message"),
    [
        ("01_localize_heads", {"raito": 0.2}, "There is no parameter 'raito': did you mean 'ratio'?"),
        ("02_finetune", {"method": "alpz"}, "There is no method 'alpz': did you mean 'alps'?"),
    ],
)
def test_papermill_stops_with_the_nearest_right_one(
    notebook: str, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {**given, "results": str(tmp_path / "results")}
    assert execute(SOURCES / f"{notebook}.ipynb", tmp_path / "out.ipynb", **given) == message
    assert not (tmp_path / "results").exists()


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    }


COPIES = [
    *["01_localize_heads", "02_finetune-alps", "02_finetune-full"],
    *["03_evaluate-alps", "03_evaluate-full", "03_evaluate-vanilla", "06_report"],
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A profile's notebooks executed on a tiny model, and what was said of it.

    The notebooks are copies with the check cell once more at the end, as when cells are run again in Jupyter: what a
    notebook has made by then must not be taken for parameters.
    """
    folder = tmp_path_factory.mktemp("chain")
    notebooks, profile, said = folder / "notebooks", folder / "tiny.yaml", []
    notebooks.mkdir()
    for path in NOTEBOOKS:
        notebook = read(path)
        again = copy.deepcopy(check_cell(notebook))
        again.id = "checked-again"
        notebook.cells.append(again)
        nbformat.write(notebook, notebooks / path.name)
    settings = {
        "results": str(folder / "results"),
        "base": str(tiny_checkpoint(folder / "base")),
        "dataset": "chain_sum",
        "tasks": ["chain_sum"],
        "limit": 4,
        "methods": ["full", "alps"],
        "scopes": {"alps": "heads"},
        "ratio": 0.25,
        "recipe": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2},
    }
    profile.write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproducing, "NOTEBOOKS", notebooks)
        results = reproduce(str(profile), said.append)
        yield results, str(profile), said


def test_chain_makes_everything(chain: Any) -> None:
    results, _, said = chain
    assert [line.split("]")[0] for line in said] == [f"[{i}/{len(COPIES)}" for i in range(1, len(COPIES) + 1)]
    assert sorted(path.stem for path in (results / "notebooks").iterdir()) == COPIES
    records = load_records(results / "records")
    assert [record.kind for record in records] == ["evaluate"] * 3 + ["finetune"] * 2 + ["localize"]
    table = tables.summary(records)
    assert list(table["method"]) == ["vanilla", "full", "alps"]
    assert (results / "tables" / "summary.csv").read_text() == table.to_csv(index=False, lineterminator="\n")
    for name in ("tables/summary.md", "tables/summary.tex", "figures/heatmap.png", "figures/losses.svg"):
        assert (results / name).stat().st_size > 100
    assert {path.name for path in results.iterdir()} == {
        *[".locks", "records", "scores", "samples", "models", "tables", "figures", "notebooks"]
    }


@pytest.mark.parametrize("name", COPIES)
def test_executed_copy(chain: Any, name: str) -> None:
    """Every cell was run, the second check included, and what was promised is to be seen."""
    results, *_ = chain
    notebook = read(results / "notebooks" / f"{name}.ipynb")
    nbformat.validate(notebook)
    source = read(SOURCES / f"{name.split('-')[0]}.ipynb")
    assert code_cells(notebook)[-1].source == check_cell(source).source
    outputs = []
    for cell in code_cells(notebook):
        assert cell.execution_count is not None
        outputs += cell.outputs
    assert not any(output.output_type == "error" for output in outputs)
    shown = {kind for output in outputs for kind in output.get("data", {})}
    assert "text/html" in shown, "a table"
    if not name.startswith("03"):
        assert "image/png" in shown, "a picture"
    lines = [line for output in outputs for line in output.get("text", "").splitlines()]
    # peft 0.21 asks transformers for an attribute by its former name.
    warned = [line for line in lines if "Warning" in line and "is_gradient_checkpointing" not in line]
    assert warned == [], "nothing for the reader to wonder at"


def test_chain_again_does_nothing(chain: Any) -> None:
    results, profile, _ = chain
    before, said = state(results), []
    assert reproduce(profile, said.append) == results
    assert said == [f"[{i}/7] {line.split('] ')[1].split()[0]}: done already" for i, line in enumerate(chain[2], 1)]
    assert state(results) == before


def test_failed_notebook_is_named_and_leaves_the_rest(chain: Any, tmp_path: Path) -> None:
    results, profile, _ = chain
    settings = yaml.safe_load(Path(profile).read_text())
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump({**settings, "base": str(tmp_path / "nowhere")}))
    before = state(results)
    with pytest.raises(UserError, match=r"02_finetune-full failed: UserError: There is no checkpoint.*failed.ipynb"):
        reproduce(str(broken), print)
    after = state(results)
    assert before.items() <= after.items()
    assert all(".failed." in name for name in set(after) - set(before))
