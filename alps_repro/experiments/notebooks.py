"""Notebooks: their parameters, and their execution.

`python -m alps_repro.experiments.notebooks NOTEBOOK COPY PARAMETERS` executes one by papermill; PARAMETERS is JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alps_repro.errors import UserError, nearest
from alps_repro.experiments.records import Kind
from alps_repro.settings import Settings

SettingsT = TypeVar("SettingsT", bound=Settings)

#: The notebook that makes a run of each kind.
NOTEBOOKS: dict[Kind, str] = {"localize": "01_localize_heads", "finetune": "02_finetune", "evaluate": "03_evaluate"}

#: What may be given beside `config`, the file that holds everything else.
BESIDE_CONFIG = ("profile", "results", "config")


def check_parameters(namespace: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a notebook's parameters where one is unknown, or where one is given beside a configuration's file.

    Papermill puts a mistyped parameter into the notebook as one more variable and merely warns. Only plain values can
    be parameters, so other objects that a notebook has made by the time a cell is run again are passed over.

    Args:
        namespace: the notebook's `globals()`.
        known: the names that its parameters cell explains.

    Raises:
        UserError: names the nearest known parameter, or the one that `config` leaves no place for.
    """
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    for name, value in namespace.items():
        if type(value) in plain and not name.startswith("_") and name not in (*known, "In", "Out"):
            raise UserError(f"There is no parameter '{name}': {nearest(name, known)}")
    if "config" in known and namespace.get("config") is not None:
        given = [name for name in known if name not in BESIDE_CONFIG and namespace.get(name) is not None]
        if given:
            raise UserError(
                f"`config` holds the whole configuration: leave out the parameter '{given[0]}', or `config`."
            )


def read_config(path: str | Path, kind: type[SettingsT]) -> SettingsT:
    """Read the configuration of a run from a JSON file, as `Settings.dump` gives it and records hold it.

    Args:
        path: the file; settings that it leaves out are the defaults.
        kind: the class of the configuration.

    Raises:
        UserError: the file cannot be read, or holds something else; a mistyped setting is told with the nearest name.
    """
    if not isinstance(path, (str, Path)):
        raise UserError(f"The parameter 'config' is {path!r}: give the path of a JSON file.")
    try:
        stored = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The configuration '{path}' cannot be read ({reason}): give a JSON file.") from None
    if not isinstance(stored, dict):
        raise UserError(f"The configuration '{path}' holds no settings: give a JSON object of them.")
    try:
        return kind.check(**stored)
    except UserError as error:
        raise UserError(f"The configuration '{path}' is not one for this notebook: {error}") from None


def execute(notebook: Path, copy: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook and store the executed copy, whole or, where it failed, as `COPY.failed.ipynb`.

    Until it is done the copy is called `COPY.unfinished.ipynb`, which remains where the process is killed. Where that
    happens after the run's record is written, the run is done and has no executed notebook.

    Args:
        notebook: the notebook to execute.
        copy: where the executed copy is written.
        parameters: values for the notebook's parameters cell, by name.

    Raises:
        UserError: the notebook failed; the sentence is the error's own.
    """
    import papermill

    copy.parent.mkdir(parents=True, exist_ok=True)
    unfinished, failed = copy.with_suffix(".unfinished.ipynb"), copy.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    try:
        made = papermill.execute_notebook(
            str(notebook),
            str(unfinished),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=["--log-level=50"],
        )
    except papermill.PapermillExecutionError as error:
        unfinished.replace(failed)
        raise UserError(f"{copy.stem} failed: {error.ename}: {error.evalue} (see '{failed}')") from error
    for cell in made.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # of progress bars that overwrite their line, keep the last state
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    unfinished.write_text(json.dumps(made))
    unfinished.replace(copy)


if __name__ == "__main__":
    try:
        execute(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
    except UserError as failure:
        print(f"alps-repro: {failure}", file=sys.stderr)
        raise SystemExit(1) from None
