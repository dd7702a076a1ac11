"""Intervals of scores and of means over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def interval(score: float, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy over that many questions (spread over items, not seeds)."""
    from scipy.stats import binomtest

    found = binomtest(round(score * questions), questions).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def over_seeds(scores: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean over training seeds (Student's t, seeds - 1 degrees of freedom)."""
    from scipy.stats import sem, t

    return float(t.ppf(0.975, len(scores) - 1) * sem(scores))
