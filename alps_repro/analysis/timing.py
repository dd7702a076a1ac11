"""Training time (Table 11), from the rounds that `make bench` measured, where nothing else ran beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.analysis.paper import paper_table
from alps_repro.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

MEASURED = Path(__file__).parents[2] / "results" / "benchmarks" / "training.json"

TITLE = "What a training step takes"

#: What the paper's `full` is: plain Trainer makes the logits of every position.
FULL = "full_plain"


def benchmark() -> dict[str, Any]:
    """What `make bench` measured of training steps: `variants` {name: words}, `rounds` {name: one dict a round}.

    Raises:
        UserError: it has not been run.
    """
    if not MEASURED.exists():
        raise UserError(f"No training step has been timed: run make bench, which writes '{MEASURED.name}'.")
    return json.loads(MEASURED.read_text())


def seconds(rounds: list[dict[str, Any]]) -> np.ndarray:
    """The median step of each round."""
    return np.array([np.median(one["seconds"]) for one in rounds])


def training_time() -> pd.DataFrame:
    """Table 11: what a training step takes, and as a share of full fine-tuning's in the same round.

    Columns: variant, trains (words), trained_parameters, seconds (median of all steps), low, high (their range),
    share, share_low, share_high (mean over rounds, with its 95 % interval by Student's t; NaN of one round), peak_bytes
    (above the interpreter, median of the rounds), rounds.
    """
    import pandas as pd
    from scipy.stats import sem, t

    found = benchmark()
    full, rows = seconds(found["rounds"][FULL]), []
    for name, words in found["variants"].items():
        rounds = found["rounds"][name]
        own, steps = seconds(rounds), [step for one in rounds for step in one["seconds"]]
        share = own / full
        half = 0.0 if name == FULL else math.nan  # one round says nothing of others
        if len(own) > 1 and name != FULL:
            half = float(t.ppf(0.975, len(own) - 1) * sem(share))
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
    """Table 11 with a reader's columns."""
    import pandas as pd

    def of_full(row: Any) -> str:
        if row.variant == FULL:
            return "1"
        spread = "" if pd.isna(row.share_low) else f" ({row.share_low:.2f} to {row.share_high:.2f})"
        return f"{row.share:.2f}{spread}"

    return pd.DataFrame(
        {
            "what is trained": table["trains"],
            "trained parameters": [f"{n:,}" for n in table["trained_parameters"]],
            "a step, s": [f"{row.seconds:.2f} ({row.low:.2f} to {row.high:.2f})" for row in table.itertuples()],
            "of full": [of_full(row) for row in table.itertuples()],
            "memory, GB": [f"{n / 1e9:.2f}" for n in table["peak_bytes"]],
        }
    )


def note(table: pd.DataFrame) -> str:
    """What was measured where, and what the paper's own hours say, in two sentences."""
    where = benchmark()["provenance"]
    device = where["gpu"] or f"{where['threads']} threads of {where['processor']}"
    shares = ", ".join(f"{share:.2f} ({model})" for model, share in paper_shares().items())
    return (
        f"Steps of SmolLM2-135M on {device}, median and range in {table['rounds'].max()} rounds, as a share of "
        f"plain Trainer's full fine-tuning with the 95 % interval over rounds, and peak memory above the interpreter. "
        f"The paper's hours of alps are {shares} of those of full."
    )
