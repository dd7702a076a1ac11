"""A profile from start to end: its notebooks executed by papermill in the order of the story, each once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alps_repro.errors import UserError
from alps_repro.recipe import Profile

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def steps(name: str, profile: Profile) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(notebook, name of its executed copy, parameters) for each execution of a profile."""
    given = {"profile": name}
    uses_scores = "alps" in profile.methods
    others = [method for method in profile.methods if method != "full"]
    yield "02_finetune", "02_finetune-full", {**given, "method": "full"}
    if uses_scores:
        yield "01_localize_heads", "01_localize_heads", given
    for method in others:
        yield "02_finetune", f"02_finetune-{method}", {**given, "method": method}
    for model in ["vanilla", "full", *others]:
        yield "03_evaluate", f"03_evaluate-{model}", {**given, "model": model}
    yield "06_report", "06_report", given


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
    results = Path(profile.results)
    executed = results / "notebooks"
    executed.mkdir(parents=True, exist_ok=True)
    todo = list(steps(name, profile))
    fresh = False
    for i, (notebook, copy, parameters) in enumerate(todo, 1):
        parameters = {**parameters, **overrides}
        source, target = NOTEBOOKS / f"{notebook}.ipynb", executed / f"{copy}.ipynb"
        digest = _digest(source, profile, parameters)
        done = target.exists() and json.loads(target.read_text())["metadata"].get("alps_repro") == digest
        if done and not (notebook == "06_report" and fresh):  # the report is made anew after anything else was
            say(f"[{i}/{len(todo)}] {copy}: done already")
            continue
        say(f"[{i}/{len(todo)}] {copy} ...")
        fresh = True
        unfinished = executed / f"{copy}.failed.ipynb"
        try:
            made = papermill.execute_notebook(
                str(source),
                str(unfinished),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                extra_arguments=["--log-level=40"],
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{copy} failed: {error.ename}: {error.evalue} (see '{unfinished}')") from error
        made.metadata["alps_repro"] = digest
        unfinished.write_text(json.dumps(made))
        unfinished.replace(target)
    return results
