"""A profile from start to end, by snakemake (`workflow/Snakefile`): every run once, then tables, figures, notebooks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.plan import Runs, needed
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import KINDS, Config, OtherRun, find_record, load_record, make_folder, write_whole
from alps_repro.experiments.reuse import done

SNAKEFILE = Path(__file__).parents[2] / "workflow" / "Snakefile"


def profile_path(name: str) -> Path:
    """The file of a profile that is given by name or by path."""
    return Path(name) if name.endswith((".yaml", ".yml")) else SNAKEFILE.parents[1] / "profiles" / f"{name}.yaml"


def overridden(file: str | Path, config: Mapping[str, Any]) -> Path:
    """The profile that a workflow runs: `file`, or, where snakemake's `config` differs, a file of all settings.

    Runs read a profile's file, so settings with overrides are written to the results folder.

    Args:
        file: the profile.
        config: the settings of all config files and of `--config`, as snakemake puts them together.

    Raises:
        UserError: a setting is unknown or impossible.
    """
    own = Profile.read(file)
    whole = {**own, **config}
    if whole == own:
        return Path(file)
    results = Path(Profile.made(whole).results)
    text = yaml.safe_dump(json.loads(json.dumps(whole)), sort_keys=False, allow_unicode=True)
    path = results / ".profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:10]}.yaml"
    make_folder(path.parent)
    write_whole(path, text)
    return path


def jobs(profile: Profile) -> Runs:
    """The runs that the workflow makes each in a job of its own: evaluations, localizations, and the fine-tunings that
    make task models. Any other fine-tuning is a part of its evaluation's job, after which its model may be removed."""
    runs = needed(profile)
    task_models = [config.task_model for config in runs.localizations.values()]
    if profile.score_and_truth:
        task_models.append(profile.importance().task_model)
    trained = {config.name: config for config in task_models if isinstance(config, FinetuneConfig)}
    return Runs(trained, runs.localizations, runs.evaluations)


def waits_for(config: EvaluateConfig | LocalizeConfig, made: Runs) -> list[Config]:
    """The runs among the jobs `made` that have to be done before the job of `config` starts."""
    if isinstance(config, LocalizeConfig):
        return [config.task_model] if isinstance(config.task_model, FinetuneConfig) else []
    if isinstance(config.model, str):
        return []
    before: list[Config] = [config.model.localization] if config.model.localization is not None else []
    return [*before, config.model] if config.model.name in made.finetunings else before


def config_path(results: Path, kind: str, name: str) -> Path:
    """Where the workflow writes the configuration of a run, for its notebook to read."""
    return results / ".profiles" / "configs" / f"{kind}-{name}.json"


def write_configs(results: Path, made: Runs) -> None:
    """Write the configuration of every job's run, for its notebook to read; files that are right stay as they are."""
    for config in made.configs:
        path, text = config_path(results, KINDS[type(config)], config.name), json.dumps(config.dump(), indent=1) + "\n"
        if not (path.exists() and path.read_text() == text):
            make_folder(path.parent)
            write_whole(path, text)


def check_records(profile: Profile) -> None:
    """Compare the records in a profile's results folder with the runs that would reuse them.

    Raises:
        UserError: some are of other runs; the sentence says which and how the first one differs.
    """
    results, configs = Path(profile.results), needed(profile).configs
    if profile.score_and_truth:
        configs += [profile.recall(), profile.importance()]
    wrong, reached = [], True
    for config in configs:
        try:
            if reached:
                try:
                    done(config, results)
                    continue
                except OtherRun:
                    raise
                except UserError:  # a model that is not there: nothing is run with it where all records are
                    reached = False
            find_record(results / "records", config)
        except OtherRun as error:
            wrong.append(error)
    if wrong:
        more = f" {len(wrong) - 1} more of its records are, too." if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]}{more}")


def lock(results: Path) -> FileLock:
    """What a workflow holds while it is at work on a results folder.

    Two of them would harm each other: snakemake removes a job's output before it runs it, also what another one has
    made since the jobs were planned. The lock is the system's, which ends with its process, however that ends;
    snakemake's own outlives a workflow that is killed.
    """
    return FileLock(results / ".locks" / "workflow.lock")


def busy(results: Path) -> str:
    """The message of a workflow that finds another one at work."""
    return f"Another workflow is at work on '{results}': wait for it, then start again."


def failures(profile: Profile) -> dict[str, str]:
    """{run: why it failed} for a profile's runs that failed and have not been completed since."""
    paths = sorted((Path(profile.results) / "records").glob("*.failed.json"))
    own = needed(profile).by_kind
    failed = [record for record in map(load_record, paths) if record.name in own.get(record.kind, {record.name: None})]
    return {f"{record.kind} {record.name}": record.error or "" for record in failed}


def remove_models(profile: Profile) -> list[Path]:
    """Remove the tuned models that no run of a profile needs any more; returns their folders.

    A model is needed until its evaluations, and the localizations and the importance of heads that are taken from it,
    are recorded. Records, scores and samples stay, and a run that is asked for later makes its model again.
    """
    folder, runs = Path(profile.results), needed(profile)
    users: list[tuple[Config, object]] = [(config, config.model) for config in runs.evaluations.values()]
    users += [(config, config.task_model) for config in runs.localizations.values()]
    if profile.score_and_truth:
        users.append((profile.importance(), profile.importance().task_model))
    waited_for = {
        model.name
        for config, model in users
        if isinstance(model, FinetuneConfig) and find_record(folder / "records", config) is None
    }
    # One whose fine-tuning is not recorded yet may be half written.
    made = [c for name, c in runs.finetunings.items() if name not in waited_for and find_record(folder / "records", c)]
    there = [folder / "models" / config.name for config in made if (folder / "models" / config.name).exists()]
    for path in there:
        shutil.rmtree(path)
    return there


def reproduce(name: str, say: Callable[[str], None]) -> Path:
    """Make everything of a profile that is missing; what is done is not repeated.

    Args:
        name: of a profile, or a path to one.
        say: called with each line for the user.

    Returns:
        The results folder.

    Raises:
        UserError: a run failed; all that does not need it has been made.
    """
    profile = Profile.load(name)
    if not SNAKEFILE.exists():
        raise UserError("The workflow and its notebooks are not part of an installed package: run in a clone of it.")
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
    last = own or [line for line in lines if "Error" in line or "rror:" in line] or lines or ["it gave no reason."]
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
