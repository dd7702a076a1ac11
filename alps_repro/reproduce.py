"""A profile from start to end: its notebooks executed by papermill in the order of the story, each once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alps_repro.errors import UserError
from alps_repro.methods import METHODS
from alps_repro.recipe import Profile
from alps_repro.records import record_path

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@dataclass(frozen=True)
class Step:
    """One execution of a notebook; `copy` names the executed copy, `record` the file it leaves (none for a report)."""

    notebook: str
    copy: str
    parameters: dict[str, Any]
    record: Path | None = None


def steps(name: str, profile: Profile) -> Iterator[Step]:
    """The executions of a profile, in the order in which one needs another."""
    given, records = {"profile": name}, Path(profile.results) / "records"

    def finetuning(method: str) -> Step:
        record = record_path(records, "finetune", profile.finetuning(method).name)
        return Step("02_finetune", f"02_finetune-{method}", {**given, "method": method}, record)

    yield finetuning("full")
    if any(METHODS[method].uses_scores for method in profile.methods):
        record = record_path(records, "localize", profile.localization().name)
        yield Step("01_localize_heads", "01_localize_heads", given, record)
    others = [method for method in profile.methods if method != "full"]
    yield from map(finetuning, others)
    for model in ["vanilla", "full", *others]:
        record = record_path(records, "evaluate", profile.evaluation(model).name)
        yield Step("03_evaluate", f"03_evaluate-{model}", {**given, "model": model}, record)
    yield Step("06_report", "06_report", given)


def _digest(notebook: Path, profile: Profile, parameters: dict[str, Any]) -> str:
    cells = [cell["source"] for cell in json.loads(notebook.read_text())["cells"]]
    return hashlib.sha256(json.dumps([cells, profile.dump(), parameters]).encode()).hexdigest()


def reproduce(name: str, say: Callable[[str], None], **overrides: Any) -> Path:
    """Execute a profile's notebooks; those already executed with the same cells and settings are left as they are.

    name: of a profile, or a path to one. say: takes a line for the user. overrides: settings of the profile.

    Returns:
        the results folder.

    Raises:
        UserError: a notebook failed; its executed copy, with the error in it, ends in `.failed.ipynb`.
    """
    import papermill

    profile = Profile.load(name, **overrides)
    executed = Path(profile.results) / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    todo, fresh = list(steps(name, profile)), False
    for i, step in enumerate(todo, 1):
        parameters = {**step.parameters, **overrides}
        source, target = NOTEBOOKS / f"{step.notebook}.ipynb", executed / f"{step.copy}.ipynb"
        digest = _digest(source, profile, parameters)
        done = target.exists() and json.loads(target.read_text())["metadata"].get("alps_repro") == digest
        if step.record is None:
            done = done and not fresh  # the report is made anew after anything else was
        elif not step.record.exists():
            done = False
        if done:
            say(f"[{i}/{len(todo)}] {step.copy}: done already")
            continue
        say(f"[{i}/{len(todo)}] {step.copy} ...")
        fresh = True
        unfinished = executed / f"{step.copy}.failed.ipynb"
        try:
            made = papermill.execute_notebook(
                str(source),
                str(unfinished),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=["--log-level=50"],
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{step.copy} failed: {error.ename}: {error.evalue} (see '{unfinished}')") from error
        made.metadata["alps_repro"] = digest
        _as_on_a_terminal(made)
        unfinished.write_text(json.dumps(made))
        unfinished.replace(target)
    return Path(profile.results)


def _as_on_a_terminal(notebook: Any) -> None:
    """Of progress bars that overwrite their line, keep the last state."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
