"""Tests of a family of comparisons while runs are still being added: group-sequential Holm, and equivalence.

A comparison is a mean difference between two methods, paired by seed, with tasks as strata. A family is looked at after
fixed numbers of seeds. At each look:

- *better*, *worse*: two-sided tests with O'Brien–Fleming bounds for alpha divided by the number of hypotheses that are
  not rejected yet (Holm's step-down; Ye, Li, Liu and Yao 2013), at the look's nominal p;
- *equivalent*: the repeated interval of 1 - 2 alpha lies within the margin (two one-sided tests, same bounds);
- *inconclusive*: else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

ALPHA = 0.05
POWER = 0.8

#: Of the quadrature over a bounded interval; 64 give 12 digits.
NODES = 64

Verdict = Literal["better", "worse", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A mean difference over strata of equal weight.

    Attributes:
        effect: the mean over tasks of the mean over seeds, in the differences' unit.
        error: its standard error.
        df: degrees of freedom (Satterthwaite 1946).
    """

    effect: float
    error: float
    df: float

    def p(self) -> float:
        """Two-sided p of no difference, for this look alone (Student's t)."""
        if self.error == 0:
            return float(self.effect == 0)
        return float(2 * stdtr(self.df, -abs(self.effect) / self.error))

    def interval(self, p: float) -> tuple[float, float]:
        """The interval whose two-sided error rate at this look is `p`."""
        half = -float(stdtrit(self.df, p / 2)) * self.error
        return self.effect - half, self.effect + half

    def minimum_detectable(self, p: float, power: float = POWER) -> float:
        """The true difference that a test at `p` finds significant with this power, given the standard error."""
        return float(stdtrit(self.df, power) - stdtrit(self.df, p / 2)) * self.error


def stratified(differences: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean difference over tasks, seeds nested in tasks.

    Args:
        differences: of each task, one difference per seed; at least two seeds each.

    Raises:
        ValueError: a task has fewer than two seeds, or there is no task.
    """
    if not differences or any(len(own) < 2 for own in differences.values()):
        raise ValueError("A stratified mean needs at least two seeds of every task.")
    parts = [np.asarray(own, dtype=float) for own in differences.values()]
    weight = 1 / len(parts)
    variances = np.array([weight**2 * own.var(ddof=1) / len(own) for own in parts])
    total = float(variances.sum())
    df = total**2 / float(sum(v**2 / (len(own) - 1) for v, own in zip(variances, parts))) if total else math.inf
    return Estimate(weight * float(sum(own.mean() for own in parts)), math.sqrt(total), df)


def crossing(bound: float, looks: tuple[int, ...]) -> float:
    """The probability that a true null crosses O'Brien–Fleming's bounds at any look.

    With information n_k at look k, of n_K at the last, |Z_k| reaches `bound` · sqrt(n_K / n_k): the Brownian motion
    Z_k · sqrt(n_k / n_K) reaches the same `bound` at every look. Its density within is integrated from look to look
    (Armitage, McPherson and Rowe 1969) by Gauss–Legendre quadrature.

    Args:
        looks: information at each look, such as the number of seeds, rising.
    """
    nodes, weights = (bound * values for values in _quadrature())
    times = np.diff([0, *looks]) / looks[-1]
    density = _normal(nodes, times[0])
    for time in times[1:]:
        density = _normal(nodes[:, None] - nodes, time) @ (weights * density)
    return max(0.0, 1 - float(weights @ density))


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(NODES)


def _normal(x: np.ndarray, variance: float) -> np.ndarray:
    """The density of a normal distribution around 0."""
    return np.exp(x * x / (-2 * variance)) / math.sqrt(2 * math.pi * variance)


@functools.cache
def nominal_p(alpha: float, looks: tuple[int, ...]) -> tuple[float, ...]:
    """The two-sided p that each look rejects at, so that all looks together reject a true null with `alpha`."""
    from scipy.optimize import brentq

    # No lower than a single look's bound, no higher than Bonferroni's.
    low, high = -ndtri(alpha / 2), -ndtri(alpha / (2 * len(looks)))
    bound = brentq(lambda c: crossing(c, looks) - alpha, low - 1e-9, high + 1e-9) if len(looks) > 1 else low
    return tuple(float(2 * ndtr(-bound * math.sqrt(looks[-1] / look))) for look in looks)


def overall_p(p: float, look: int, looks: tuple[int, ...]) -> float:
    """The alpha whose bounds a p at one look just reaches: the group-sequential p of that look."""
    return crossing(-float(ndtri(p / 2)) * math.sqrt(looks[look] / looks[-1]), looks) if 0 < p < 1 else float(p > 0)


@dataclass(frozen=True)
class Decision:
    """What a family's tests say of one hypothesis.

    Attributes:
        verdict: of the first look that decides.
        look: number of that look from 0; of an inconclusive one, the last.
        estimate: of that look.
        interval: the repeated 95 % interval of that look (O'Brien–Fleming bounds for 0.05, not corrected for the number
            of hypotheses).
        p_adjusted: the smallest family-wise alpha that rejects no difference by that look.
        minimum_detectable: with 80 % power at the last look done, by Holm's first step.
    """

    verdict: Verdict
    look: int
    estimate: Estimate
    interval: tuple[float, float]
    p_adjusted: float
    minimum_detectable: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values."""
    out, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = highest
    return out


def adjusted(p_values: Sequence[Sequence[float]], looks: tuple[int, ...]) -> list[list[float]]:
    """Group-sequential Holm's adjusted p of each hypothesis after each look done so far.

    A hypothesis's own p after a look is the smallest of its group-sequential p values so far: what was significant once
    stays so. These are valid p values, and Holm's procedure applies to them at every look.

    Args:
        p_values: of each look done so far, a two-sided p of each hypothesis.
        looks: all looks that are planned.
    """
    own = [[overall_p(p, look, looks) for p in values] for look, values in enumerate(p_values)]
    return [holm(np.min(own[: look + 1], axis=0).tolist()) for look in range(len(own))]


def decide(
    estimates: Sequence[Mapping[str, Estimate]],
    margins: Mapping[str, float],
    looks: tuple[int, ...],
    alpha: float = ALPHA,
) -> dict[str, Decision]:
    """The verdicts of a family of hypotheses at the looks that are done.

    A significant difference is better or worse, however small; of the others, those whose repeated interval lies within
    the margin are equivalent.

    Args:
        estimates: of each look done so far, an estimate of each hypothesis.
        margins: of each hypothesis, the difference that does not matter, in its unit.
        looks: all looks that are planned.
        alpha: family-wise error rate of better and worse; error rate of each verdict of equivalence.
    """
    names, last = list(margins), len(estimates) - 1
    p_adjusted = adjusted([[look[name].p() for name in names] for look in estimates], looks)
    inner, outer = nominal_p(2 * alpha, looks), nominal_p(alpha, looks)
    first = nominal_p(alpha / len(names), looks)[last]
    out: dict[str, Decision] = {}
    for i, name in enumerate(names):
        own = [look[name] for look in estimates]
        significant = (k for k in range(last + 1) if p_adjusted[k][i] <= alpha)
        within = (k for k in range(last + 1) if max(map(abs, own[k].interval(inner[k]))) < margins[name])
        verdict: Verdict = "inconclusive"
        if (look := next(significant, None)) is not None:
            verdict = "better" if own[look].effect > 0 else "worse"
        elif (look := next(within, None)) is not None:
            verdict = "equivalent"
        else:
            look = last
        found = own[look]
        detectable = own[last].minimum_detectable(first)
        out[name] = Decision(verdict, look, found, found.interval(outer[look]), p_adjusted[look][i], detectable)
    return out
