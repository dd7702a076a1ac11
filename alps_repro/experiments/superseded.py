"""What a new run takes the place of: an earlier record and its files are moved to `superseded/` and kept there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.records import (
    KINDS,
    Config,
    OtherRun,
    Record,
    load_record,
    make_folder,
    record_path,
)
from alps_repro.experiments.reuse import done


@contextmanager
def set_aside(config: Config, results: Path) -> Iterator[None]:
    """Move what lies in a run's place and is of another run out of the way, while the run is made again and after.

    Where the new run fails, everything is put back.

    Args:
        config: of the run.
        results: the results folder.
    """
    path, differs = record_path(results / "records", KINDS[type(config)], config.name), None
    try:
        done(config, results)
    except OtherRun as error:
        differs = error.differs
    if differs is None:
        yield
        return
    folder = _folder(results, load_record(path))
    _announce(path, differs, folder)
    moved = _moved(config, results, folder)
    try:
        yield
    except BaseException:
        for place, kept in moved.items():
            kept.replace(place)
        folder.rmdir()
        raise


def set_aside_record(results: Path, record: Record, why: str) -> None:
    """Move a run's record, and nothing that the run made, out of the way; `why` is told."""
    path, folder = record_path(results / "records", record.kind, record.name), _folder(results, record)
    _announce(path, [why], folder)
    make_folder(folder)
    path.replace(folder / path.name)


def _folder(results: Path, record: Record) -> Path:
    """Where a record is kept: by its name, and the second in which its run was finished."""
    return results / "superseded" / f"{record.kind}-{record.name}-{re.sub('[^0-9]', '', record.finished)[:14]}"


def _announce(path: Path, differs: Sequence[str], folder: Path) -> None:
    shown = "; ".join(differs[:3]) + (f"; and {len(differs) - 3} more" if len(differs) > 3 else "")
    print(f"{path.stem} is made again ({shown}); the earlier one is kept in '{folder}'.", file=sys.stderr, flush=True)


def _moved(config: Config, results: Path, folder: Path) -> dict[Path, Path]:
    """Move a run's record and what it made to a folder: {place: where it is now}."""
    make_folder(folder)
    made: dict[type[Config], tuple[str, str]] = {
        LocalizeConfig: ("scores", ".json"),
        EvaluateConfig: ("samples", ".jsonl"),
        FinetuneConfig: ("models", ""),
    }
    places = [record_path(results / "records", KINDS[type(config)], config.name)]
    if type(config) in made:
        subfolder, suffix = made[type(config)]
        places.append(results / subfolder / f"{config.name}{suffix}")
    moved = {place: folder / place.name for place in places if place.exists()}
    for place, kept in moved.items():
        place.replace(kept)
    return moved
