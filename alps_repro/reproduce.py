"""A profile from start to end, by snakemake (`workflow/Snakefile`): every run once, then tables, figures, notebooks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from alps_repro.errors import UserError
from alps_repro.plan import needed
from alps_repro.recipe import FinetuneConfig, Profile
from alps_repro.records import load_record, record_path

SNAKEFILE = Path(__file__).parents[1] / "workflow" / "Snakefile"


def profile_path(name: str) -> Path:
    """The file of a profile that is given by name or by path."""
    return Path(name) if name.endswith((".yaml", ".yml")) else SNAKEFILE.parents[1] / "profiles" / f"{name}.yaml"


def lock(results: Path) -> FileLock:
    """What a workflow holds while it is at work on a results folder.

    Two of them would harm each other: snakemake removes a job's output before it runs it, also what another one has
    made since the jobs were planned. The lock is the system's, which ends with its process, however that ends;
    snakemake's own outlives a workflow that is killed.
    """
    return FileLock(results / ".locks" / "workflow.lock")


def busy(results: Path) -> str:
    """What a workflow says that finds another one at work."""
    return f"Another workflow is at work on '{results}': wait for it, then start again."


def failures(profile: Profile) -> dict[str, str]:
    """{run: why it failed} of a profile's runs that failed and have not been completed since."""
    paths = sorted((Path(profile.results) / "records").glob("*.failed.json"))
    runs = needed(profile)
    own = {"finetune": runs.finetunings, "localize": runs.localizations, "evaluate": runs.evaluations}
    failed = [record for record in map(load_record, paths) if record.name in own.get(record.kind, {record.name})]
    return {f"{record.kind} {record.name}": record.error or "" for record in failed}


def remove_models(profile: Profile) -> list[Path]:
    """Remove the tuned models that nothing of a profile needs any more; returns their folders.

    A model is needed until its evaluations, and the localizations and the importance of heads that are taken from it,
    are recorded. Records, scores and samples stay, and a run that is asked for later makes its model again.
    """
    folder, runs = Path(profile.results), needed(profile)
    users: list[tuple[str, str, object]] = [("evaluate", name, c.model) for name, c in runs.evaluations.items()]
    users += [("localize", name, config.task_model) for name, config in runs.localizations.items()]
    if profile.score_and_truth:
        config = profile.importance()
        users.append(("importance", config.name, config.task_model))
    waited_for = {
        model.name
        for kind, name, model in users
        if isinstance(model, FinetuneConfig) and not record_path(folder / "records", kind, name).exists()
    }
    done = [folder / "models" / name for name in runs.finetunings if name not in waited_for]
    # One whose fine-tuning is not recorded yet may be half written.
    there = [path for path in done if path.exists() and record_path(folder / "records", "finetune", path.name).exists()]
    for path in there:
        shutil.rmtree(path)
    return there


def reproduce(name: str, say: Callable[[str], None]) -> Path:
    """Make everything of a profile that is not there yet; what is done is not repeated.

    name: of a profile, or a path to one. say: takes a line for the user.

    Returns:
        the results folder.

    Raises:
        UserError: a run failed; all that does not need it has been made.
    """
    profile = Profile.load(name)
    results = Path(profile.results)
    code, lines = _workflow(name, say)
    while code and any(busy(results) in line for line in lines):
        say(f"Another workflow is at work on '{results}': waiting for it.")
        with lock(results):
            pass
        code, lines = _workflow(name, say)
    if code == 0:
        return results
    failed = failures(profile)
    for run, why in failed.items():
        say(f"failed: {run}: {why}")
    if failed:
        raise UserError(
            f"{len(failed)} run{'s' if len(failed) > 1 else ''} of the profile failed, what does not need "
            f"{'them' if len(failed) > 1 else 'it'} is in '{results}'; run again to repeat "
            f"{'them' if len(failed) > 1 else 'it'}."
        )
    # What a notebook or command said of its end; else what snakemake said of its own.
    own = [line.removeprefix("alps-repro: ") for line in lines if line.startswith("alps-repro: ")]
    last = own or [line for line in lines if "Error" in line or "rror:" in line] or lines or ["it said nothing."]
    raise UserError(f"The workflow stopped: {last[-1]}")


def _workflow(name: str, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run snakemake on a profile; returns its exit status and what it wrote to standard error."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", SNAKEFILE, "--configfile", profile_path(name)]
    process = subprocess.Popen(
        [*map(str, command), "--cores", "all", "--quiet", "reason", "host"], stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    jobs: dict[str, str] = {}
    ended = ""
    for line in process.stderr or ():
        lines.append(line.strip())
        if found := re.match(r"Job (\d+): (.*)", line):
            jobs[found[1]] = found[2]
            say(f"{found[2]} ...")
        elif found := re.match(r"Finished jobid: (\d+)", line):
            ended = jobs.get(found[1], "everything")  # what asks for all the rest is told of at its end alone
        elif found := re.match(r"(\d+) of (\d+) steps", line):
            say(f"[{found[1]}/{found[2]}] {ended}: done")
    return process.wait(), lines
