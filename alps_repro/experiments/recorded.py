"""The records of a profile's cells: what tables, claims and figures are made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alps_repro.errors import UserError
from alps_repro.experiments.grid import Cell, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import Record, check_consistent, find_record

if TYPE_CHECKING:
    pass


def records_folder(profile: Profile) -> Path:
    return Path(profile.results) / "records"


def recorded_cells(profile: Profile, table: str) -> list[tuple[Cell, Record]]:
    """The cells of a table that have been measured, each with its record: what tables, claims and figures are made of.

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
