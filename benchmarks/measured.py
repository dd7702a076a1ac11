"""What the benchmarks share: where their data lie, medians, and saving with provenance."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alps_repro.experiments.provenance import provenance
from alps_repro.experiments.records import write_whole
from alps_repro.models.embedded import cache_folder

DATA = cache_folder() / "benchmarks"
RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"


def median(values: Sequence[float]) -> float:
    """The median: these machines drift, and a mean would follow their worst moments."""
    return statistics.median(values)


def save(name: str, measured: dict[str, Any]) -> None:
    """Write `results/benchmarks/NAME.json`, every single measurement included."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stored = {"provenance": provenance().model_dump(), **measured}
    write_whole(RESULTS / f"{name}.json", json.dumps(stored, indent=1) + "\n")
