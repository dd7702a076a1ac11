"""Training time (Table 11), from the rounds that `make bench` measured, where nothing else ran beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from alps_repro.analysis.paper import paper_table
from alps_repro.analysis.statistics import over_seeds
from alps_repro.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

MEASURED = Path(__file__).parents[2] / "results" / "benchmarks" / "training.json"

#: Its name among a profile's tables.
TABLE = "table11"

TITLE = "Time and memory of a training step"

#: The paper's `full`: a plain Trainer, which computes the logits of every position.
FULL = "full_plain"


def benchmark() -> dict[str, Any]:
    """The measurements of training steps by `make bench`.

    Returns:
        `provenance`, `variants` {name: description} and `rounds` {name: a dictionary for each round}.

    Raises:
        UserError: the benchmark has not been run.
    """
    if not MEASURED.exists():
        raise UserError(f"No training step has been timed: run make bench, which writes '{MEASURED.name}'.")
    return cast(dict[str, Any], json.loads(MEASURED.read_text()))


def seconds(rounds: list[dict[str, Any]]) -> np.ndarray:
    """The median step of each round, in seconds: (rounds,)."""
    return np.array([np.median(one["seconds"]) for one in rounds])


def training_time() -> pd.DataFrame:
    """Table 11: the time of a training step, and its share of full fine-tuning's in the same round.

    Returns:
        a row for each variant, the slowest first. Columns: variant, trains (description), trained_parameters, seconds
        (median of all steps), low, high (their range), share, share_low, share_high (mean over rounds, with its 95 %
        interval by Student's t; NaN of one round), peak_bytes (above the interpreter, median of the rounds), rounds.

    Raises:
        UserError: the benchmark has not been run.
    """
    import pandas as pd

    measured = benchmark()
    full, rows = seconds(measured["rounds"][FULL]), []
    for name, words in measured["variants"].items():
        rounds = measured["rounds"][name]
        own, steps = seconds(rounds), [step for one in rounds for step in one["seconds"]]
        share = own / full
        half = 0.0 if name == FULL else math.nan  # one round says nothing about others
        if len(own) > 1 and name != FULL:
            half = over_seeds(list(share))
        rows.append(
            {
                "variant": name,
                "trains": words,
                "trained_parameters": rounds[0]["trained_parameters"],
                "seconds": float(np.median(steps)),
                "low": min(steps),
                "high": max(steps),
                "share": float(share.mean()),
                "share_low": float(share.mean()) - half,
                "share_high": float(share.mean()) + half,
                "peak_bytes": float(np.median([one["peak_bytes"] - one["interpreter_bytes"] for one in rounds])),
                "rounds": len(rounds),
            }
        )
    return pd.DataFrame(rows).sort_values("seconds", ascending=False, ignore_index=True)


def paper_shares() -> pd.Series:
    """The paper's Table 11: hours of `alps` as a share of those of `full`, by model."""
    hours = paper_table("table11")["train_hours"].unstack("setting", sort=False)
    return hours["alps"] / hours["full"]


def to_read(table: pd.DataFrame) -> pd.DataFrame:
    """Table 11 with columns for readers."""
    import pandas as pd

    def of_full(row: Any) -> str:
        if row.variant == FULL:
            return "1"
        spread = "" if pd.isna(row.share_low) else f" ({row.share_low:.2f} to {row.share_high:.2f})"
        return f"{row.share:.2f}{spread}"

    return pd.DataFrame(
        {
            "training": table["trains"],
            "trainable parameters": [f"{n:,}" for n in table["trained_parameters"]],
            "step, s": [f"{row.seconds:.2f} ({row.low:.2f} to {row.high:.2f})" for row in table.itertuples()],
            "share of full": [of_full(row) for row in table.itertuples()],
            "peak memory, GB": [f"{n / 1e9:.2f}" for n in table["peak_bytes"]],
        }
    )


def note(table: pd.DataFrame) -> str:
    """What was measured where, and what the paper reports, in two sentences."""
    where = benchmark()["provenance"]
    device = where["gpu"] or f"{where['threads']} threads of {where['processor']}"
    shares = ", ".join(f"{share:.2f} ({model})" for model, share in paper_shares().items())
    return (
        f"Steps of SmolLM2-135M on {device}: median and range over {table['rounds'].max()} rounds, the share of full "
        "fine-tuning by a plain Trainer with its 95 % interval over rounds, and peak memory above the interpreter's. "
        f"In the paper, the training hours of alps are these shares of those of full: {shares}."
    )
