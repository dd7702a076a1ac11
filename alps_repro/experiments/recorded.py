"""The records of a profile's cells: what tables, claims and figures are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.grid import Cell, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import EvaluateRecord, Record, find_record


def records_folder(profile: Profile) -> Path:
    return Path(profile.results) / "records"


def recorded_cells(profile: Profile, table: str) -> list[tuple[Cell, EvaluateRecord]]:
    """The cells of a table that have been run, each with its record.

    Raises:
        UserError: a record is of another configuration than its cell's; two were made with different models or
            questions of one name; or they come from two versions of the measuring code.
    """
    found = [(cell, find_record(records_folder(profile), cell.config)) for cell in cells(profile, table)]
    there = [(cell, record) for cell, record in found if record is not None]
    trained = [
        find_record(records_folder(profile), r.config.model) for _, r in there if not isinstance(r.config.model, str)
    ]
    check_consistent([*(record for _, record in there), *(record for record in trained if record is not None)])
    codes = {record.provenance.code: record.name for _, record in there}
    if len(codes) > 1:
        raise UserError(
            f"The records of {table} come from {len(codes)} versions of the measuring code (such as those of "
            f"{' and '.join(codes.values())}): remove the older ones and run again."
        )
    return there


def check_consistent(records: Iterable[Record]) -> None:
    """Check that in records that are compared with each other, a name stands for one model, or one set of questions.

    Raises:
        UserError: names two records that were made with different models or data of one name.
    """
    seen: dict[tuple[Any, ...], tuple[str, str]] = {}
    for record in records:
        for (what, *of), value in _named_inputs(record):
            first, other = seen.setdefault((what, *of), (value, record.name))
            if first != value:
                raise UserError(
                    f"The records {other} and {record.name} were made with different {what} of the name '{of[0]}': run "
                    "one of them again."
                )


def _named_inputs(record: Record) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What a record's configuration names, and the hash of what it was: ((kind, name, what else decides it), hash)."""
    config, provenance = record.config, record.provenance
    hashes = provenance.model_sha256
    if isinstance(config, EvaluateConfig):
        if isinstance(config.model, str):
            yield ("models", config.model), hashes.get("evaluated", "")
        elif "base" in hashes:
            yield ("models", config.model.base), hashes["base"]
        for task, value in provenance.data_sha256.items():
            yield ("questions", task, config.split, config.limit, config.template), value
    else:
        if "base" in hashes:
            yield ("models", config.base), hashes["base"]
        if isinstance(config, LocalizeConfig) and isinstance(config.task_model, str) and "task" in hashes:
            yield ("models", config.task_model), hashes["task"]
    if isinstance(config, FinetuneConfig) and config.dataset in provenance.data_sha256:
        recipe = config.recipe
        size = (recipe.max_steps, recipe.batch_size, recipe.examples, recipe.data_share)
        yield ("training examples", config.dataset, config.seed, *size), provenance.data_sha256[config.dataset]
