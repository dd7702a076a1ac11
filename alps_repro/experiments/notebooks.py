"""Executing a notebook, and checking its parameters.

`python -m alps_repro.experiments.notebooks NOTEBOOK COPY PARAMETERS` executes one by papermill; PARAMETERS is JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alps_repro.errors import UserError, nearest


def check_parameters(namespace: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a notebook's parameters where one is not known.

    namespace: the notebook's `globals()`; known: the names its parameters cell explains. Papermill puts a mistyped
        parameter there as one more variable and merely warns. Only plain values can be parameters, so other objects
        that a notebook has made by the time a cell is run again are passed over.

    Raises:
        UserError: names the nearest right one.
    """
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    for name, value in namespace.items():
        if type(value) in plain and not name.startswith("_") and name not in (*known, "In", "Out"):
            raise UserError(f"There is no parameter '{name}': {nearest(name, known)}")


def execute(notebook: Path, copy: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook and store the executed copy, whole or, where it failed, as `COPY.failed.ipynb`.

    On the way it is `COPY.unfinished.ipynb`, which is left where the process is killed. Where that happens after the
    run's record is written, the run is done and has no executed notebook.

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
