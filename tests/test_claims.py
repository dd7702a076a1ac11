"""Claims: intervals that cover what they say, verdicts at their borders, and what counts as better."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from synthetic import measure, right_answers, small_profile

from alps_repro import claims
from alps_repro.claims import CLAIMS, MARGINS, Block, Effect, decided, differences, effect, verdict, write_claims
from alps_repro.errors import UserError
from alps_repro.experiments import TABLES
from alps_repro.recipe import Profile
from alps_repro.records import load_record

# The interval.


def simulated(
    blocks: int,
    seeds: int,
    questions: int,
    of_seeds: float,
    of_questions: float,
    draw: np.random.Generator,
    **how: bool,
) -> list[Block]:
    """Differences with mean 0 of a model: random seeds and questions, of each block or of all, and a rest of sd 1."""

    def parts(sd: float, shape: tuple[int, int], shared: bool) -> list[np.ndarray]:
        own = draw.normal(size=(1 if shared else blocks, *shape))
        return list(np.broadcast_to(sd * own, (blocks, *shape)))

    lines = parts(of_seeds, (seeds, 1), how.get("shared_seeds", False))
    columns = parts(of_questions, (1, questions), how.get("shared_questions", False))
    rest = draw.normal(size=(blocks, seeds, questions))
    tasks = ["t"] * blocks if how.get("shared_questions") else [f"t{i}" for i in range(blocks)]
    return [
        Block(line + column + own, "m", task, tuple(range(seeds)))
        for line, column, own, task in zip(lines, columns, rest, tasks)
    ]


@pytest.mark.parametrize(
    ("blocks", "seeds", "of_seeds", "of_questions", "how"),
    [
        (1, 3, 0.1, 0.3, {}),
        (1, 5, 0.2, 0.3, {}),
        (3, 3, 0.0, 0.3, {}),
        (3, 3, 0.1, 0.3, {}),
        (3, 3, 0.2, 0.3, {}),
        (3, 5, 0.5, 0.5, {}),
        (3, 3, 0.2, 0.3, {"shared_seeds": True}),
        (3, 5, 0.5, 0.5, {"shared_seeds": True}),
        (3, 3, 0.1, 0.5, {"shared_questions": True}),
        (3, 4, 0.2, 0.5, {"shared_seeds": True, "shared_questions": True}),
    ],
)
def test_interval_covers_the_truth_in_nineteen_of_twenty(
    blocks: int, seeds: int, of_seeds: float, of_questions: float, how: dict[str, bool]
) -> None:
    """Seeds and questions both as drawn; where blocks share them, it does not count them as more than they are."""
    draw, times = np.random.default_rng(0), 3000
    found = [effect(simulated(blocks, seeds, 100, of_seeds, of_questions, draw, **how)) for _ in range(times)]
    covered = sum(one.low <= 0 <= one.high for one in found) / times
    print(f"{blocks} blocks, {seeds} seeds: {100 * covered:.1f} %")
    assert 0.92 <= covered <= 0.98


def test_detectable_is_seen_in_four_of_five_tries() -> None:
    draw, times = np.random.default_rng(1), 400
    setting = (3, 4, 100, 0.1, 0.3)
    found = [effect(simulated(*setting, draw)) for _ in range(times)]
    true = float(np.mean([one.detectable for one in found]))
    seen = sum(one.low + true > 0 for one in found) / times
    assert 0.72 <= seen <= 0.9


def block(values: Any, model: str = "m", task: str = "t", seeds: tuple[int, ...] | None = None) -> Block:
    numbers = np.array(values, dtype=float)
    return Block(numbers, model, task, seeds or tuple(range(len(numbers))))


def test_effect_by_hand() -> None:
    """Mean squares of questions 9, of seeds 4, of the rest 1: the variance is (9 + 4 - 1) / 4."""
    found = effect([block([[1, 3], [2, 6]])])
    degrees = 3**2 / ((9 / 4) ** 2 + (4 / 4) ** 2 + (1 / 4) ** 2)
    assert found.mean == 3
    assert (found.low + found.high) / 2 == pytest.approx(3)
    assert found.high - 3 == pytest.approx(t.ppf(0.975, degrees) * np.sqrt(3))
    assert found.detectable == pytest.approx((t.ppf(0.975, degrees) + t.ppf(0.8, degrees)) * np.sqrt(3))


def test_blocks_that_share_nothing_add_up() -> None:
    one = effect([block([[1, 3], [2, 6]])])
    two = effect([block([[1, 3], [2, 6]]), block([[1, 3], [2, 6]], "another", "u")])
    # Half the variance, with twice the degrees of freedom.
    degrees = 3**2 / ((9 / 4) ** 2 + (4 / 4) ** 2 + (1 / 4) ** 2)
    assert two.mean == one.mean
    assert two.high - 3 == pytest.approx(t.ppf(0.975, 2 * degrees) * np.sqrt(3 / 2))


def test_one_seed_is_the_paired_t_test() -> None:
    values = np.random.default_rng(2).normal(1, 3, size=(1, 60))
    found = effect([block(values)])
    reach = t.ppf(0.975, 59) * values.std(ddof=1) / np.sqrt(60)
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach))


def test_seeds_alike_add_nothing_to_the_questions() -> None:
    """Three times the same answers are one seed's worth of knowledge."""
    line = np.random.default_rng(3).normal(size=40)
    one, three = effect([block([line])]), effect([block([line] * 3)])
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_no_difference_anywhere() -> None:
    assert effect([block(np.zeros((3, 10)))]) == Effect(0.0, 0.0, 0.0, 0.0)
    assert effect([block(np.full((2, 5), 7.0))]) == Effect(7.0, 7.0, 7.0, 0.0)


def test_uneven_blocks() -> None:
    """A grid that is not complete yet has blocks of other seeds and lengths."""
    draw = np.random.default_rng(4)
    blocks = [
        block(draw.normal(size=(3, 50))),
        block(draw.normal(size=(2, 20)), task="u", seeds=(0, 2)),
        block(draw.normal(size=(1, 30)), model="n", task="v", seeds=(1,)),
    ]
    found = effect(blocks)
    assert found.mean == pytest.approx(np.mean([one.values.mean() for one in blocks]))
    assert found.low < found.mean < found.high
    assert np.isfinite([found.low, found.high, found.detectable]).all()


# Verdicts.


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1e-9, 5.0, "holds"),
        (0.0, 5.0, "undecided"),
        (-1.0, 1.0, "undecided"),
        (-1.0, 0.999, "fails"),
        (-3.0, -1.0, "fails"),
        (0.1, 0.5, "holds"),  # small, but there
        (0.0, 0.0, "fails"),
    ],
)
def test_verdict(low: float, high: float, said: str) -> None:
    assert verdict(Effect((low + high) / 2, low, high, 0.0), margin=1.0) == said


def test_every_claim_names_a_table_and_measures() -> None:
    for claim in CLAIMS.values():
        assert claim.table in TABLES
        assert set(claim.measures) <= MARGINS.keys() == claims.UNITS.keys()
        assert claim.row not in claim.others


# Claims on records.


def shares(**by_method: float) -> Any:
    return right_answers(lambda cell, task: by_method.get(cell.run.method, 0.5))


def found(profile: Profile, name: str, measure: str = "accuracy") -> pd.Series:
    table = decided(profile)
    return table[(table["claim"] == name) & (table["measure"] == measure)].iloc[0]


def test_known_advantage(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.7))
    for measure_, unit in (("accuracy", "points"), ("log_likelihood", "nats per answer")):
        row = found(profile, "beats_random", measure_)
        assert row["verdict"] == "holds"
        size = 20 if measure_ == "accuracy" else 0.2
        assert row["effect"] == pytest.approx(size, abs=0.25 * size)
        assert row["ci_low"] < row["effect"] < row["ci_high"]
        assert (row["unit"], row["seeds"], row["questions"]) == (unit, 3, 200)
        assert row["test"] == "alps - random in table1, paired over seeds and questions"


def test_effect_is_the_difference_of_the_scores(tmp_path: Path) -> None:
    from alps_repro.tables import paper_table

    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.7, random=0.55))
    means = paper_table(profile, "table1").set_index("row")["mean"]
    assert found(profile, "beats_random")["effect"] == pytest.approx(means["alps"] - means["random"])
    assert found(profile, "tenth_beats_all")["effect"] == pytest.approx(means["alps"] - means["full"])


def test_equal_and_worse(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.5, full=0.8))
    assert found(profile, "beats_random")["verdict"] in ("undecided", "fails")
    worse = found(profile, "tenth_beats_all")
    assert worse["verdict"] == "fails"
    assert worse["ci_high"] < 0


def test_best_of_several_has_to_beat_each(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, tables={"table2": {}})

    def metric(**by_metric: float) -> Any:
        return right_answers(lambda cell, task: by_metric.get(cell.run.metric, 0.4))

    measure(profile, metric(pad=0.7))
    best = found(profile, "pad_is_best")
    assert best["verdict"] == "holds"
    assert "the worst of 3 comparisons, which all have to hold" in best["test"]
    assert "not measured" not in best["test"]
    measure(profile, metric(pad=0.7, kl=0.9))
    beaten = found(profile, "pad_is_best")
    assert beaten["verdict"] == "fails"
    assert beaten["test"].startswith("pad - kl in table2")
    assert beaten["effect"] == pytest.approx(-20, abs=5)
    measure(profile, metric(pad=0.7, kl=0.7))
    assert found(profile, "pad_is_best")["verdict"] in ("undecided", "fails")


def test_not_against_all_yet(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, tables={"table2": {}})
    answers = right_answers(lambda cell, task: 0.7 if cell.run.metric == "pad" else 0.4)
    measure(profile, answers, only=lambda cell: cell.row in ("pad", "euclidean"))
    row = found(profile, "pad_is_best")
    assert row["verdict"] == "undecided"
    assert row["ci_low"] > 0
    assert row["test"].endswith("; not measured yet: cosine, kl")


def test_what_trains_nothing_stands_for_every_seed(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, tables={"table3": {}})
    measure(profile, shares(alps=0.7))
    (one,) = differences(profile, "table3", "10", "0", "accuracy")
    assert one.seeds == (0, 1, 2)
    assert one.values.shape == (3, 200)
    assert (one.model, one.task) == ("m", "chain_sum")


def test_only_seeds_that_both_rows_have(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.7), only=lambda cell: (cell.row, cell.seed) not in (("alps", 0), ("random", 2)))
    (one,) = differences(profile, "table1", "alps", "random", "accuracy")
    assert one.seeds == (1,)
    assert differences(profile, "table1", "alps", "random", "loss") == []
    assert differences(profile, "table1", "alps", "lora", "accuracy") == []


def test_loss_is_better_where_it_is_lower(tmp_path: Path) -> None:
    knowledge = {"knowledge": ["world_facts", "prose"], "methods": ["full", "random", "lora", "alps"]}
    families = {"sums": {"datasets": ["chain_sum"]}, "divisors": {"datasets": ["gcd"]}}
    profile = small_profile(tmp_path, tables={"table5": {}}, families=families, **knowledge)
    # Of prose, 0.5 nats per token for each unit.
    measure(profile, right_answers(lambda cell, task: 0.4 if cell.run.method == "alps" else 0.6))
    row = found(profile, "forgets_less_than_full", "loss")
    assert row["effect"] == pytest.approx(0.1)
    assert row["verdict"] == "holds"
    assert row["unit"] == "nats per token"
    accuracy = found(profile, "forgets_less_than_full")
    assert accuracy["effect"] == pytest.approx(-20, abs=5)
    assert accuracy["verdict"] == "fails"
    # Two families' models are asked the same questions.
    assert accuracy["questions"] == row["questions"] == 200
    blocks = differences(profile, "table5", "alps", "full", "accuracy")
    assert [one.task for one in blocks] == ["world_facts"] * 2


def test_claims_of_tables_that_the_profile_lacks_are_left_out(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, tables={"table1": {}, "table2": {}})
    measure(profile, shares(alps=0.7))
    assert set(decided(profile)["claim"]) == {
        *["tenth_beats_all", "beats_random", "pad_is_best", "trains_cheaper", "trains_cheaper_heads"]
    }
    other = profile.model_copy(update={"tables": {"table2": profile.tables["table2"]}})
    assert set(decided(other)["claim"]) == {"pad_is_best"}


def test_rounds_of_the_benchmark_are_no_seeds(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.7))
    row = found(profile, "trains_cheaper", "time")
    assert pd.isna(row["seeds"])
    assert pd.isna(row["questions"])
    assert "rounds of make bench" in row["test"]
    assert "SmolLM2" in row["test"]
    assert row["unit"] == "of a step's time"
    assert row["ci_low"] < row["effect"] < row["ci_high"] < 1
    shown = claims.to_read(decided(profile))
    assert set(shown.loc[shown["effect"].str.endswith("time"), "seeds"]) == {"–"}


def test_nothing_to_compare(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    with pytest.raises(UserError, match="No claim can be tested yet"):
        decided(profile)
    measure(profile, shares(), only=lambda cell: cell.row == "alps")
    with pytest.raises(UserError, match="holds no pair of rows to compare"):
        decided(profile)
    table, words = claims.write_claims(profile)
    assert table.read_text() == ",".join(claims.COLUMNS) + "\n"
    assert "holds no pair of rows to compare" in words.read_text()


def test_files(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, shares(alps=0.7))
    paths = write_claims(profile)
    assert [path.name for path in paths] == ["claims.csv", "claims.md"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_claims(profile)] == first
    columns = {"claim", "test", "effect", "ci_low", "ci_high", "detectable", "seeds", "verdict"}
    table = pd.read_csv(paths[0])
    assert columns <= set(table.columns)
    lines = paths[0].read_text().splitlines()
    assert any(",3,200,holds" in line for line in lines)
    assert any(",,,holds" in line or ",,,undecided" in line or ",,,fails" in line for line in lines)  # rounds
    shown = paths[1].read_text()
    assert "nan" not in shown.lower()
    assert "<NA>" not in shown
    assert len(list(itertools.takewhile(lambda line: line.startswith("|"), shown.splitlines()))) == len(table) + 2


def test_questions_of_a_group_count_alike(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, right_answers(shares()), ["table1"])
    (path,) = list((tmp_path / "records").glob("evaluate-*alps*"))[:1]
    record = load_record(path)
    subjects = {"mmlu_b": {"correct": "11"}, "mmlu_a": {"correct": "01"}, "mmlu_dev": {"correct": "0"}}
    record.result["per_question"] = subjects
    record.config = record.config.model_copy(update={"tasks": ("mmlu", "mmlu_dev")})
    assert claims.values(record, "mmlu", "accuracy").tolist() == [0, 100, 100, 100]
    assert claims.values(record, "mmlu_dev", "accuracy").tolist() == [0]
    assert claims.values(record, "arc_challenge", "accuracy") is None
