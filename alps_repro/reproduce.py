"""A profile from start to end, by snakemake (`workflow/Snakefile`): every run once, then tables, figures, notebooks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from alps_repro.errors import UserError
from alps_repro.recipe import Profile
from alps_repro.records import load_record

SNAKEFILE = Path(__file__).parents[1] / "workflow" / "Snakefile"


def profile_path(name: str) -> Path:
    """The file of a profile that is given by name or by path."""
    return Path(name) if name.endswith((".yaml", ".yml")) else SNAKEFILE.parents[1] / "profiles" / f"{name}.yaml"


def failures(results: Path) -> dict[str, str]:
    """{run: why it failed} of the runs that failed and have not been completed since."""
    records = [load_record(path) for path in sorted((results / "records").glob("*.failed.json"))]
    return {f"{record.kind} {record.name}": record.error or "" for record in records}


def reproduce(name: str, say: Callable[[str], None]) -> Path:
    """Make everything of a profile that is not there yet; what is done is not repeated.

    name: of a profile, or a path to one. say: takes a line for the user.

    Returns:
        the results folder.

    Raises:
        UserError: a run failed; all that does not need it has been made.
    """
    profile = Profile.load(name)
    command = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--configfile", profile_path(name)]
    process = subprocess.Popen(
        [*map(str, command), "--cores", "all", "--quiet", "reason", "host"], stderr=subprocess.PIPE, text=True
    )
    doing, lines = "", []
    for line in process.stderr or ():
        lines.append(line.strip())
        if found := re.match(r"Job \d+: (.*)", line):
            doing = found[1]
            say(f"{doing} ...")
        elif found := re.match(r"(\d+) of (\d+) steps", line):
            say(f"[{found[1]}/{found[2]}] {doing}: done")
    if process.wait() == 0:
        return Path(profile.results)
    failed = failures(Path(profile.results))
    for run, why in failed.items():
        say(f"failed: {run}: {why}")
    # What a notebook or command said of its end; else what snakemake said of its own.
    own = [line.removeprefix("alps-repro: ") for line in lines if line.startswith("alps-repro: ")]
    last = own[-1:] or [line for line in lines if "Error" in line or "rror:" in line][-1:] or lines[-1:]
    raise UserError(
        f"{len(failed)} runs of the profile failed, what does not need them is in '{profile.results}'; run again to "
        "repeat them."
        if failed
        else f"The workflow stopped: {''.join(last)}"
    )
