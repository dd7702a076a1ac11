"""What the project says about itself: lock, environment, citation, and the commands and tables of its documents.

Tables in documents are compared with those made from records, number by number; the sentences around them are free.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from documents import DOCUMENTS, with_tables
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny_models import tiny_checkpoint
from typer.testing import CliRunner

from alps_repro.analysis import tables
from alps_repro.analysis.claims import write_claims
from alps_repro.cli import app
from alps_repro.doctor import locked_versions
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_records
from alps_repro.experiments.runs import evaluate_run
from alps_repro.training.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REFERENCE = ROOT / "results" / "reference" / "quick"


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for line in [*project["dependencies"], *(line for extra in extras for line in extra)]]


@pytest.mark.parametrize("wanted", requirements(), ids=str)
def test_lock_has_every_requirement_within_its_range(wanted):
    locked = {canonicalize_name(name): version for name, version in locked_versions().items()}
    assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)])


def test_lock_names_every_package_exactly_once_per_marker():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] not in "# "]
    assert len(lines) == len(set(lines)) > 100
    assert all("==" in line for line in lines)


def test_conda_environment_is_the_locked_one():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip["pip"] == ["--requirement requirements.lock", "--editable ."]
    # Conda itself brings Python and tools only: no package has a second source of its version.
    assert {re.split("[=<>]", name)[0] for name in conda} == {"python", "pip", "make"}
    python = next(name for name in conda if name.startswith("python")).split("=")[1]
    assert tuple(map(int, python.split("."))) >= (3, 11)


def test_ci_runs_what_the_readme_says():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make reproduce" in README
    assert "make test" in README


def test_workflow_for_gpus_names_what_there_is():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "reproduce.yml").read_text())
    triggers = workflow[True]  # YAML reads "on" so
    assert list(triggers) == ["workflow_dispatch"]  # nothing by the clock
    choices = triggers["workflow_dispatch"]["inputs"]["profile"]
    assert choices["default"] in choices["options"]
    (job,) = workflow["jobs"].values()
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    for words in ("make .venv/.made", "nvidia-smi", "alps-repro doctor", "--keep-going"):
        assert words in commands
    assert "$(MADE):" in (ROOT / "Makefile").read_text()
    assert '"profiles/$PROFILE.yaml"' in commands
    (upload,) = (step["with"] for step in job["steps"] if "upload" in step.get("uses", ""))
    for name in choices["options"]:
        assert Profile.load(name).results == f"results/{name}"
        paths = upload["path"].replace("${{ inputs.profile }}", name).split()
        parts = ("records", "notebooks", "tables", "figures", "claims.csv", "logs")
        assert paths == [f"results/{name}/{part}" for part in parts]


def test_image_has_the_cuda_of_the_lock_and_no_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    cuda = re.search(r"cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements.lock").read_text())[1]
    assert f"FROM nvidia/cuda:{cuda}." in "\n".join(lines)
    assert [line for line in lines if line.startswith("USER")] == ["USER alps"]
    assert "requirements.lock" in next(line for line in lines if "pip install" in line)
    version = locked_versions()["torch"]
    assert f"PyPI resolves torch=={version}" in (ROOT / "requirements.lock").read_text()


def test_citation_names_package_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["references"][0]["doi"] == "10.18653/v1/2025.findings-acl.612"
    assert citation["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def rows(markdown: str) -> list[dict[str, str]]:
    """Every row of the tables in a text: cells by column."""
    found: list[dict[str, str]] = []
    columns: list[str] = []
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif not columns:
            columns = cells
        elif not set(line) <= set("|:- "):
            found.append(dict(zip(columns, cells, strict=True)))
    return found


def content(path: Path) -> object:
    """What is compared of a made file: a table's rows, or all of it."""
    if path.suffix == ".md":
        return rows(path.read_text())
    if path.suffix == ".tex":
        return [line for line in path.read_text().splitlines() if not line.startswith("%")]
    return path.read_bytes()


def check_committed(made: list[Path], folder: Path, committed: Path) -> None:
    """Hold made tables against the committed ones; of figures, that they are there."""
    for path in made:
        own = committed / path.relative_to(folder)
        if path.suffix in (".svg", ".png"):
            assert own.stat().st_size > 5000, own
        else:
            assert content(path) == content(own), own


def test_summary_is_what_the_committed_records_make(tmp_path):
    made = tables.write(tables.summary(load_records(REFERENCE / "records", "evaluate")), tmp_path, "summary")
    check_committed(made, tmp_path, REFERENCE / "tables")


def test_reference_is_of_the_profile_as_it_is(tmp_path):
    """Each of its runs has a record, by its name of today, and tables and claims are what the records make."""
    shutil.copytree(REFERENCE / "records", tmp_path / "records")
    quick = Profile.load("quick", results=str(tmp_path))
    recorded = {record.name for record in load_records(REFERENCE / "records", "evaluate")}
    assert recorded == set(evaluations(quick))
    made = [path for name in quick.tables for path in tables.write_paper_table(quick, name)] + write_claims(quick)
    check_committed(made, tmp_path, REFERENCE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_shows_the_tables_of_the_results(document):
    """If this fails: `python tests/documents.py` writes them anew."""
    text = document.read_text()
    assert rows(text) == rows(with_tables(document))
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        assert (document.parent / unquote(link.split("#")[0])).exists(), link


def test_tables_of_the_benchmarks_are_of_their_measurements(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import table

    found = json.loads((table.RESULTS / "gpu.json").read_text())
    for name, made in (("gpu", table.gpu(found)), ("methods", table.methods(found))):
        text = made.to_markdown(index=False, disable_numparse=True) + "\n"
        assert text == (table.RESULTS / f"{name}.md").read_text()
    assert {row.strip("`") for row in table.methods(found)["method"]} == set(METHODS)


@pytest.mark.parametrize("name", ["cpu", "grid", "grid-time"])
def test_committed_tables_and_claims_are_what_the_records_make(name, tmp_path):
    (tmp_path / "records").symlink_to(ROOT / "results" / name / "records")
    profile = Profile.load(name, results=str(tmp_path))
    made = [path for table in tables.of_profile(profile) for path in tables.write_paper_table(profile, table)]
    check_committed(made + write_claims(profile), tmp_path, ROOT / "results" / name)


def test_reference_gains_what_a_profile_must_show():
    table = tables.summary(load_records(REFERENCE / "records", "evaluate")).set_index("method")
    assert table.loc["full", "score"] - table.loc["vanilla", "score"] >= 20
    assert not any(record.provenance.dirty for record in load_records(REFERENCE / "records"))


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+\.\w+)`", README):
        if not name.startswith("results/quick"):
            pattern = name.replace("NAME", "*")
            assert any(ROOT.glob(pattern)) or any(ROOT.glob(f"alps_repro/{pattern}")), name


def commands(program: str) -> list[list[str]]:
    """The words of every command of the README that calls a program, without its name."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def test_commands_of_the_readme_run_on_a_tiny_model(tmp_path, monkeypatch):
    base, task = tiny_checkpoint(tmp_path / "base"), tiny_checkpoint(tmp_path / "task", seed=1)
    profile = tmp_path / "tiny.yaml"
    settings = {
        "results": str(tmp_path / "cpu"),
        "models": [str(base)],
        "families": {"sums": {"datasets": ["chain_sum"]}},
        "tables": {"table1": {"methods": ["full"]}},
        "limit": 4,
        "recipe": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2},
    }
    profile.write_text(yaml.safe_dump(settings))
    for cell in evaluations(Profile.load(str(profile))).values():
        evaluate_run(cell.config, tmp_path / "cpu", progress=False)
    stand_ins = {"BASE": str(base), "TASK": str(task), "smollm2-135m": str(base), "max_steps=40": "max_steps=2"}
    stand_ins |= {"cpu": str(profile), "100": "8"}
    monkeypatch.chdir(tmp_path)
    ran = [words for words in commands("alps-repro") if words[0] != "reproduce"]
    assert {words[0] for words in ran} >= {"localize", "finetune", "evaluate", "table", "plan", "verify", "doctor"}
    for command in ran:
        # A record's name is cut short there: any of its kind stands for it.
        command = [re.sub(r"^results/\w+/(records/\w+-)\.\.\.json$", r"cpu/\1*.json", word) for word in command]
        words = [str(next(tmp_path.glob(word))) if "*" in word else stand_ins.get(word, word) for word in command]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0 or words == ["doctor"], (command, result.output, result.exception)


def test_profiles_that_commands_of_the_readme_name_can_be_loaded():
    makes = [word.split("=")[1] for words in commands("make") for word in words if word.startswith("PROFILE=")]
    files = [words[words.index("--configfile") + 1] for words in commands("snakemake")]
    assert len(files) >= 2
    for name in [*makes, *(str(ROOT / file) for file in files)]:
        assert Profile.load(name).tables


def test_python_of_the_readme_runs_on_a_tiny_model(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for name in ("path/to/base", "path/to/task-model"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tiny_checkpoint(folder, seed=len(name), hidden_size=64)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "heads.png").stat().st_size > 1000
    assert names["model"].get_nb_trainable_parameters()[0] > 0
