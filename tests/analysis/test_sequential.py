"""Sequential tests: parts against independent packages and published values, the whole by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from alps_repro.analysis.sequential import (
    ALPHA,
    Estimate,
    adjusted,
    crossing,
    decide,
    holm,
    nominal_p,
    overall_p,
    stratified,
)

LOOKS = (6, 12, 18)
DRAWS = 4000
#: Standard deviations of paired differences of the three tasks, points (committed records).
SPREAD = {"family": 3.2, "arithmetic": 5.3, "reversal": 5.5}
NAMES = ("random_matched", "random", "bottom", "l2", "full", "lora_matched")


# Parts


@pytest.mark.parametrize(("looks", "constant"), [(2, 1.977), (3, 2.004), (4, 2.024), (5, 2.040)])
def test_bounds_are_those_of_the_literature(looks: int, constant: float) -> None:
    """Jennison and Turnbull (2000), table 2.3: O'Brien–Fleming, alpha 0.05 two-sided."""
    last = nominal_p(0.05, tuple(range(1, looks + 1)))[-1]
    assert stats.norm.isf(last / 2) == pytest.approx(constant, abs=5e-4)


@pytest.mark.parametrize("looks", [(6, 12, 18), (3, 4, 18), (5, 6)])
def test_crossing_is_that_of_a_multivariate_normal(looks: tuple[int, ...]) -> None:
    times = np.array(looks) / looks[-1]
    walk = stats.multivariate_normal(cov=np.minimum.outer(times, times), seed=0)
    for bound in (1.5, 2.0, 2.6):
        edge = np.full(len(looks), bound)
        inside = walk.cdf(edge, lower_limit=-edge)
        assert crossing(bound, looks) == pytest.approx(1 - inside, abs=2e-5)


def test_one_look_is_a_plain_test() -> None:
    assert nominal_p(0.05, (7,)) == pytest.approx((0.05,))
    assert overall_p(0.013, 0, (7,)) == pytest.approx(0.013)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6, 0.1])
def test_overall_p_is_the_inverse_of_the_bounds(alpha: float) -> None:
    for look, p in enumerate(nominal_p(alpha, LOOKS)):
        assert overall_p(p, look, LOOKS) == pytest.approx(alpha, rel=1e-6)


def test_holm() -> None:
    """Holm (1979), by hand."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_stratified_of_one_task_is_the_paired_t_test() -> None:
    values = np.random.default_rng(0).normal(1, 2, 9)
    found, expected = stratified({"one": values}), stats.ttest_1samp(values, 0)
    assert found.p() == pytest.approx(expected.pvalue)
    assert found.interval(0.05) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_stratified_of_two_tasks_is_welchs_test() -> None:
    """The mean of x and -y is half their difference, so that Satterthwaite's t is Welch's."""
    draw = np.random.default_rng(1)
    x, y = draw.normal(1, 2, 8), draw.normal(0, 5, 11)
    found, expected = stratified({"x": x, "y": -y}), stats.ttest_ind(x, y, equal_var=False)
    assert found.p() == pytest.approx(expected.pvalue)
    assert found.df == pytest.approx(expected.df)


def test_degrees_of_freedom_of_equal_spreads() -> None:
    rows = {name: [0.0, 1.0, 2.0, 5.0] for name in "abc"}
    assert stratified(rows).df == pytest.approx(9)


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        stratified({"a": [1.0, 2.0], "b": [1.0]})


def test_what_was_significant_stays_so() -> None:
    early = [1e-9, 0.5, 0.5]
    first, second = adjusted([early, [0.9, 0.9, 0.9]], LOOKS)
    assert second[0] == first[0] < 0.05


def test_minimum_detectable_effect_is_detected_with_its_power() -> None:
    draw, p = np.random.default_rng(2), 0.02
    given = Estimate(0.0, 1.0, 17.0)
    true = given.minimum_detectable(p)
    error = np.sqrt(draw.chisquare(17, 200_000) / 17)
    hits = np.abs((draw.normal(true, 1, 200_000)) / error) > stats.t.isf(p / 2, 17)
    assert hits.mean() == pytest.approx(0.8, abs=0.02)


# The whole, by simulation


def simulated(effects: dict[str, float], draw: np.random.Generator, shared: float = 0.0) -> list[dict[str, Estimate]]:
    """Estimates of a family at all looks; shared: the part of a seed's variance that its tasks have in common."""
    seeds, tasks = LOOKS[-1], len(SPREAD)
    looks: list[dict[str, Estimate]] = [{} for _ in LOOKS]
    # One method is in every comparison: differences of one seed and task are correlated by one half.
    own = _noise(draw, (seeds, tasks), shared)
    for name, effect in effects.items():
        noise = (own - _noise(draw, (seeds, tasks), shared)) / np.sqrt(2)
        values = effect + noise * np.array(list(SPREAD.values()))
        for look, count in enumerate(LOOKS):
            looks[look][name] = stratified(dict(zip(SPREAD, values[:count].T)))
    return looks


def _noise(draw: np.random.Generator, shape: tuple[int, int], shared: float) -> np.ndarray:
    common = draw.normal(size=(shape[0], 1))
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * draw.normal(size=shape)


def verdicts(effects: dict[str, float], margin: float, seed: int, shared: float = 0.0) -> dict[str, np.ndarray]:
    """{hypothesis: the verdicts of all draws}."""
    draw = np.random.default_rng(seed)
    margins = dict.fromkeys(effects, margin)
    found = [decide(simulated(effects, draw, shared), margins, LOOKS) for _ in range(DRAWS)]
    return {name: np.array([one[name].verdict for one in found]) for name in effects}


def above(share: float, rate: float) -> bool:
    """Whether a share of the draws is above a rate by more than chance: 3 standard errors."""
    return share > rate + 3 * np.sqrt(rate * (1 - rate) / DRAWS)


@pytest.mark.long
def test_no_true_difference() -> None:
    """Family-wise error of better and worse at most 5 %, and equivalence often found."""
    found = verdicts(dict.fromkeys(NAMES, 0.0), 2.0, seed=3)
    wrong = np.any([np.isin(own, ("better", "worse")) for own in found.values()], axis=0).mean()
    assert not above(wrong, ALPHA)
    assert np.mean([(own == "equivalent").mean() for own in found.values()]) > 0.6


@pytest.mark.long
def test_some_true_differences() -> None:
    """Errors among the true nulls stay within 5 % where other hypotheses are false, and large effects are found."""
    effects = {**dict.fromkeys(NAMES[:3], 0.0), **dict.fromkeys(NAMES[3:], 6.0)}
    found = verdicts(effects, 2.0, seed=4)
    wrong = np.any([np.isin(found[name], ("better", "worse")) for name in NAMES[:3]], axis=0).mean()
    assert not above(wrong, ALPHA)
    assert all((found[name] == "better").mean() > 0.99 for name in NAMES[3:])


@pytest.mark.long
@pytest.mark.parametrize("effect", [2.0, -2.0])
def test_differences_at_the_margin_are_called_equivalent_no_more_than_alpha(effect: float) -> None:
    found = verdicts(dict.fromkeys(NAMES[:2], effect), 2.0, seed=5)
    wrong_side = "worse" if effect > 0 else "better"
    for own in found.values():
        assert not above((own == "equivalent").mean(), ALPHA)
        assert not above((own == wrong_side).mean(), ALPHA / 2)


@pytest.mark.long
def test_seeds_correlated_over_tasks_break_it() -> None:
    """Why seeds are hashed by task: half of a seed's variance shared by its tasks is more error than 5 %."""
    found = verdicts({"one": 0.0}, 2.0, seed=6, shared=0.5)
    assert above(np.isin(found["one"], ("better", "worse")).mean(), ALPHA)


@pytest.mark.long
def test_repeated_intervals_cover() -> None:
    draw = np.random.default_rng(7)
    effects = {"one": 3.0}
    covered = 0
    for _ in range(DRAWS):
        looks = simulated(effects, draw)
        bounds = [look["one"].interval(p) for look, p in zip(looks, nominal_p(ALPHA, LOOKS))]
        covered += all(low <= 3.0 <= high for low, high in bounds)
    assert not above(1 - covered / DRAWS, ALPHA)
