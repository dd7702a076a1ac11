"""Intervals of scores, of means over training seeds, and of paired differences over seeds and questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def interval(score: float, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy between 0 and 1 over that many questions (not over training seeds)."""
    from scipy.stats import binomtest

    limits = binomtest(round(score * questions), questions).proportion_ci(method="wilson")
    return float(limits.low), float(limits.high)


def over_seeds(scores: Sequence[float], quantile: float = 0.975) -> float:
    """How far a quantile lies from a mean over training seeds or rounds (Student's t, their number - 1 degrees of
    freedom); by default half the width of the 95 % interval."""
    from scipy.stats import sem, t

    return float(t.ppf(quantile, len(scores) - 1) * sem(scores))


@dataclass(frozen=True)
class Effect:
    """A mean difference.

    Attributes:
        mean: The difference.
        low: Lower end of its 95 % interval.
        high: Upper end.
        detectable: Minimum detectable effect: the smallest true one that would be detected with 80 % power.
    """

    mean: float
    low: float
    high: float
    detectable: float


@dataclass(frozen=True)
class Stratum:
    """Paired differences of one model, family and task.

    Attributes:
        values: The differences, (seeds, questions).
        model: Runs of one model and seed share the seed's random choices, whatever their family.
        task: Its questions are the same wherever a model is evaluated on it.
        seeds: The training seeds of the lines of `values`.
    """

    values: np.ndarray
    model: str
    task: str
    seeds: tuple[int, ...]


def effect(strata: Sequence[Stratum]) -> Effect:
    """The mean over strata of their mean differences, with seeds and questions as random effects.

    A stratum's differences are d_ij = m + s_i + q_j + e_ij, of seed i and question j. Strata may share s_i (of one
    model) and q_j (of one task). The mean's variance has two parts. That of the seeds, from a model's means by seed,
    also holds a share of the residual (e_ij), and so is never taken as less than that share. That of the questions,
    from a task's means by question, is taken without it. For one stratum these are, of the mean squares of the two-way
    table, max(MS_seeds, MS_residual) and max(MS_questions - MS_residual, 0), over seeds · questions. Each part takes
    the t quantile of its own degrees of freedom, and half the width of the interval is the root of the sum of their
    squares, so that it covers at least 95 % (S. K. Banerjee, Sankhyā 22, 1960): many questions cannot make up for
    having three seeds. A stratum of one seed: over questions alone.

    Args:
        strata: At least one. Where any model has a stratum of one seed, the interval is over questions alone.

    Returns:
        the effect in the unit of the differences.
    """
    mean = float(np.mean([stratum.values.mean() for stratum in strata]))
    of_questions, of_seeds, residuals = _deviations(strata)
    questions = []
    for columns in of_questions.values():
        degrees = max(len(columns) - 1, 1)
        questions.append((float((columns**2).sum()) * len(columns) / degrees, degrees))
    parts = [_pooled(questions)]
    fewest: dict[str, int] = {}  # seeds of any of a model's strata
    for stratum in strata:
        fewest[stratum.model] = min(len(stratum.values), fewest.get(stratum.model, len(stratum.values)))
    if min(fewest.values()) > 1:
        variance, degrees_of_questions = parts[0]
        seeds = [
            (max(sum(line**2 for line in lines.values()), residuals[model]), fewest[model] - 1)
            for model, lines in of_seeds.items()
        ]
        parts = [(max(variance - sum(residuals.values()), 0.0), degrees_of_questions), _pooled(seeds)]
    half = _half_width(parts, 0.975)
    return Effect(mean, mean - half, mean + half, half + _half_width(parts, 0.8))


def _deviations(
    strata: Sequence[Stratum],
) -> tuple[dict[tuple[str, int], Any], dict[str, dict[int, float]], dict[str, float]]:
    """What a task's questions and a model's seeds add to the mean, and a model's residual to its variance."""
    count = len(strata)
    of_questions: dict[tuple[str, int], Any] = {}
    of_seeds: dict[str, dict[int, float]] = {}
    residuals: dict[str, float] = {}
    for stratum in strata:
        (seeds, questions), own = stratum.values.shape, stratum.values - stratum.values.mean()
        lines, columns = own.mean(1), own.mean(0)
        place = stratum.task, questions
        of_questions[place] = of_questions.get(place, 0.0) + columns / (count * questions)
        if seeds > 1:
            of_model = of_seeds.setdefault(stratum.model, {})
            for seed, line in zip(stratum.seeds, lines / (count * math.sqrt(seeds * (seeds - 1)))):
                of_model[seed] = of_model.get(seed, 0.0) + line
            square = ((own - lines[:, None] - columns) ** 2).sum() / ((seeds - 1) * max(questions - 1, 1))
            residuals[stratum.model] = residuals.get(stratum.model, 0.0) + square / (stratum.values.size * count**2)
    return of_questions, of_seeds, residuals


def _pooled(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The sum of independent variances, and its degrees of freedom by Satterthwaite."""
    variance = sum(own for own, _ in parts)
    return variance, variance**2 / sum(own**2 / degrees for own, degrees in parts) if variance else 1.0


def _half_width(parts: Sequence[tuple[float, float]], quantile: float) -> float:
    """How far a mean's quantile lies from it, of variances with their degrees of freedom."""
    from scipy.special import stdtrit

    return math.sqrt(sum(float(stdtrit(degrees, quantile)) ** 2 * variance for variance, degrees in parts))
