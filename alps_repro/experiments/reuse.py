"""Which run need not be made again: its record is compared with the run, and its models with what was recorded."""

from __future__ import annotations

from pathlib import Path

from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.records import (
    Config,
    OtherRun,
    Record,
    RecordT,
    find_record,
    predecessors,
    record_path,
)
from alps_repro.models.folders import file_hashes, model_hash, resolve


def done(config: Config, results: str | Path) -> Record | None:
    """The record of a run, where the run need not be made again; None where there is no record.

    Beyond what `find_record` compares, every file of the models that the configuration names, and of a tuned model
    that lies in the results folder, is compared with what the record's run read or made: by content, whatever its
    name, size and time.

    Args:
        config: of the run.
        results: the results folder.

    Raises:
        OtherRun: names what differs.
        UserError: a model that the run was made with does not exist any more, so that it cannot be compared.
    """
    results = Path(results)
    record = find_record(results / "records", config)
    if record is not None and (differs := _changed(record, results)):
        raise OtherRun(record_path(results / "records", record.kind, record.name), differs)
    return record


def reusable(config: Config, results: Path, kind: type[RecordT]) -> RecordT | None:
    """The record of a run, which is of `kind`; None where there is none, or one of another run (see `done`)."""
    try:
        record = done(config, results)
    except OtherRun:
        return None
    if record is None:
        return None
    # A later attempt may have failed, with inputs that are no longer there.
    record_path(results / "records", record.kind, record.name).with_suffix(".failed.json").unlink(missing_ok=True)
    assert isinstance(record, kind)
    return record


def named_models(config: Config) -> dict[str, str]:
    """The models that a configuration names, by the role that they have in its record."""
    if isinstance(config, EvaluateConfig):
        return {"evaluated": config.model} if isinstance(config.model, str) else {"base": config.model.base}
    task = getattr(config, "task_model", None)
    return {"base": config.base, **({"task": task} if isinstance(task, str) else {})}


def _changed(record: Record, results: Path) -> list[str]:
    """How a run's inputs differ from those that it was made with, a phrase each."""
    changes = []
    read, hashes = record.provenance.files_sha256, record.provenance.model_sha256
    for role, name in named_models(record.config).items():
        if role in read:
            now = file_hashes(name)
            files = [file for file in sorted({*now, *read[role]}) if now.get(file) != read[role].get(file)]
            changes += [f"{file} of the {role} model '{name}' has changed" for file in files]
        elif role in hashes and model_hash(resolve(name)) != hashes[role]:  # of a record without hashes of files
            changes.append(f"the {role} model '{name}' has changed")
    tuned = results / "models" / record.name
    if isinstance(record.config, FinetuneConfig) and tuned.exists():
        same = file_hashes(tuned) == read["tuned"] if "tuned" in read else model_hash(tuned) == hashes["tuned"]
        changes += [] if same else [f"the tuned model '{tuned}' has changed"]
    for before in predecessors(record.config).values():
        if made := find_record(results / "records", before):
            changes += _changed(made, results)
    return list(dict.fromkeys(changes))
