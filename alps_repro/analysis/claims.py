"""The paper's claims, other systems' claims, and the tests that decide them.

A claim is decided here: `CLAIMS` says what is compared, `MARGINS` what counts as no advantage, `verdict` what follows
from an interval, and `EXPLANATION` is the same in words for readers. What each claim compares was fixed before any run.
How intervals are computed was changed after the runs: the variance between seeds is now always included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.analysis.figures import save
from alps_repro.analysis.forest import ForestRow, forest, margin_text
from alps_repro.analysis.statistics import Effect, Stratum, effect, over_seeds
from alps_repro.analysis.tables import lower_is_better
from alps_repro.analysis.timing import MEASURED, benchmark, seconds
from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig
from alps_repro.experiments.grid import SYSTEMS, TABLES, Cell
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import recorded_cells
from alps_repro.experiments.records import Record, write_whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

#: Of `claims.csv`.
COLUMNS = [
    *["claim", "says", "measure", "unit", "test", "effect", "ci_low", "ci_high", "detectable", "seeds", "questions"],
    "verdict",
]

#: Every verdict, the worst first. One training seed says nothing about others, and so decides nothing.
NO_VERDICT = "no verdict"
VERDICTS = ("fails", NO_VERDICT, "undecided", "holds")

#: The smallest advantage that counts: a claim whose interval excludes it fails.
MARGINS = {"accuracy": 1.0, "log_likelihood": 0.02, "loss": 0.01, "time": 0.02}
UNITS = {
    "accuracy": "points",
    "log_likelihood": "nats per answer",
    "loss": "nats per token",
    "time": "of a step's time",
}

#: Decimals that an effect is printed with.
DIGITS = {"accuracy": 1, "log_likelihood": 3, "loss": 4, "time": 2}

#: How to read claims, in Markdown: the one text that `claims.md`, the report and the documentation share.
EXPLANATION = (
    "Each claim is a difference between two rows of a table, paired over questions and training seeds. What it "
    "compares was fixed before the runs; how the interval is computed was changed after them. Accuracies are compared "
    "in points and, beside them, the log-likelihood of the correct answers in nats, which changes before an answer "
    "does. The 95 % interval treats training seeds and questions as random samples and always includes the variance "
    "between seeds.\n\n"
    "A claim *holds* if its interval lies above zero, *fails* if its interval lies below the margin ("
    + ", ".join(margin_text(margin, UNITS[measure]) for measure, margin in MARGINS.items())
    + "), and is *undecided* otherwise. A claim against several rivals has to hold against each of them; shown is the "
    "least favourable comparison. With one training seed the interval is over questions alone, and there is no "
    "verdict. The minimum detectable effect is the smallest true effect that these runs would detect with 80 % power. "
    "Verdicts are not corrected for multiple testing."
)


@dataclass(frozen=True)
class Claim:
    """A claim that one row of a table is better than others.

    Attributes:
        statement: The claim in words, for readers.
        table: The table that the rows are in.
        row: The row that is claimed to be better.
        others: The rows that it is claimed to be better than. It has to be better than each (an intersection-union
            test, so that no correction is needed).
        measures: What is compared.
        says: The words for it in `claims.csv`, whose values are kept; by default the statement.
    """

    statement: str
    table: str
    row: str
    others: tuple[str, ...]
    measures: tuple[str, ...] = ("accuracy", "log_likelihood")
    says: str | None = None


_FORGETTING = ("accuracy", "loss")

CLAIMS: dict[str, Claim] = {
    "tenth_beats_all": Claim("training 10 % of the heads beats training all of them", "table1", "alps", ("full",)),
    "beats_random": Claim("alps beats random heads", "table1", "alps", ("random",)),
    "beats_random_matched": Claim(
        "alps beats parameter-matched random heads (control)",
        "table1",
        "alps",
        ("random_matched",),
        says="alps beats random heads with as many weights (control)",
    ),
    "beats_layer_consistent": Claim(
        "alps beats random heads, as many in each layer",
        "table1",
        "alps",
        ("layer_consistent",),
        says="alps beats random heads in every layer",
    ),
    "beats_bottom": Claim(
        "alps beats the heads that changed least (control)",
        "table1",
        "alps",
        ("bottom",),
        says="alps beats the heads that moved least (control)",
    ),
    "beats_l2": Claim(
        "alps beats the heads that changed most by L2 norm (control)",
        "table1",
        "alps",
        ("l2",),
        says="alps beats the heads that moved most by plain norm (control)",
    ),
    "beats_lora": Claim("alps beats LoRA of rank 128", "table1", "alps", ("lora",)),
    "beats_lora_matched": Claim(
        "alps beats parameter-matched LoRA (control)",
        "table1",
        "alps",
        ("lora_matched",),
        says="alps beats LoRA with as many weights (control)",
    ),
    "tenth_beats_all_scope_all": Claim(
        "training 10 % of the heads beats full fine-tuning (scope all)",
        "table1_all",
        "alps",
        ("full",),
        says="training 10 % of the heads and all else beats training everything",
    ),
    "beats_random_scope_all": Claim(
        "alps beats random heads (scope all)",
        "table1_all",
        "alps",
        ("random",),
        says="alps beats random heads, all else trained",
    ),
    "tenth_is_best": Claim("10 % is the best ratio", "table3", "10", ("100", "70", "50", "30", "0")),
    "pad_is_best": Claim("PAD is the best metric", "table2", "pad", ("cosine", "euclidean", "kl")),
    "transfers": Claim(
        "transferred heads beat random heads",
        "table4",
        "alps",
        ("random",),
        says="heads carry over: they beat random heads on the other data set",
    ),
    "transfers_beats_full": Claim(
        "transferred heads beat training all heads",
        "table4",
        "alps",
        ("full",),
        says="carried over, they beat training all heads",
    ),
    "forgets_less_than_full": Claim(
        "alps forgets less than full fine-tuning", "table5", "alps", ("full",), _FORGETTING
    ),
    "forgets_less_than_lora": Claim("alps forgets less than LoRA", "table5", "alps", ("lora",), _FORGETTING),
}

#: Claims on other systems, which are tested at each number of training examples.
_ON_SYSTEMS: dict[str, Claim] = {
    "alps_chooses_best_rows": Claim(
        "ALPS selects the best heads for training weights",
        "systems",
        "alps",
        ("random", "lofit", "hifi", "importance"),
        says="ALPS's heads are the best to train the weights of",
    ),
    "alps_chooses_best_offsets": Claim(
        "ALPS selects the best heads for training offsets",
        "systems",
        "alps_offset",
        ("random_offset", "lofit_offset", "hifi_offset", "importance_offset"),
        says="ALPS's heads are the best to train an offset for",
    ),
    "lofit_chooses_better": Claim(
        "LoFiT's heads beat ALPS's for training offsets",
        "systems",
        "lofit_offset",
        ("alps_offset",),
        says="LoFiT's heads are better for its offsets than ALPS's",
    ),
    "choice_matters_for_offsets": Claim(
        "LoFiT's heads beat random heads for training offsets",
        "systems",
        "lofit_offset",
        ("random_offset",),
        says="LoFiT's heads are better for offsets than drawn ones",
    ),
    "jola_beats_lofit": Claim("JoLA beats LoFiT", "systems", "jola", ("lofit_offset",)),
    "jola_beats_alps": Claim("JoLA beats ALPS", "systems", "jola", ("alps",)),
    "jola_beats_lora": Claim(
        "JoLA beats LoRA (of as many parameters as ALPS)",
        "systems",
        "jola",
        ("lora_matched",),
        says="JoLA beats LoRA",
    ),
    "jola_needs_both": Claim(
        "JoLA's two edits together beat either alone",
        "systems",
        "jola",
        ("jola_additive", "jola_multiplicative"),
        says="JoLA's two edits beat either alone",
    ),
    "jola_needs_gates": Claim("JoLA's gates help", "systems", "jola", ("jola_ungated",)),
    "alps_beats_low_rank": Claim(
        "ALPS beats parameter-matched LoRA, DoRA and SHiRA",
        "systems",
        "alps",
        ("lora_matched", "dora_matched", "shira_matched"),
        says="ALPS beats LoRA, DoRA and SHiRA with as many weights",
    ),
}

CLAIMS |= {
    f"{name}_{size}": replace(
        claim,
        statement=f"{claim.statement}, {size} examples",
        says=f"{claim.says or claim.statement}, {size} examples",
        table=table,
    )
    for table, size in SYSTEMS.items()
    for name, claim in _ON_SYSTEMS.items()
}


@dataclass(frozen=True)
class TimeClaim:
    """A claim that a training step is faster than full fine-tuning's, decided by the benchmark `make bench`.

    Attributes:
        statement: The claim in words, for readers.
        variant: The benchmark's variant that is claimed to be faster.
        says: The words for it in `claims.csv`.
    """

    statement: str
    variant: str
    says: str


TIME_CLAIMS: dict[str, TimeClaim] = {
    "trains_cheaper": TimeClaim(
        "a training step of alps is faster than one of full fine-tuning (scope all)",
        "alps_all",
        "a step of alps takes less time than one of full fine-tuning, all else trained",
    ),
    "trains_cheaper_heads": TimeClaim(
        "a training step of alps is faster than one of full fine-tuning (scope heads)",
        "alps_heads",
        "a step of alps alone takes less time than one of full fine-tuning",
    ),
}


def statement(claim: str) -> str:
    """A claim in words, by its name."""
    return CLAIMS[claim].statement if claim in CLAIMS else TIME_CLAIMS[claim].statement


# Differences between the rows of a table


def values(record: Record, task: str, measure: str) -> np.ndarray | None:
    """One number for each question of a task: points (0 or 100), nats of the correct answer, or minus nats per token.

    Args:
        record: Of an evaluation.
        task: Of the evaluation; every question of a group (MMLU's subjects) has the same weight.
        measure: A key of `MARGINS`.

    Returns:
        (questions,), larger is better; None where the task has no such number.
    """
    assert isinstance(record.config, EvaluateConfig)
    per_question = record.result["per_question"]
    own = per_question.get(task, {})
    if task not in per_question:
        subtasks = [
            numbers
            for name, numbers in sorted(per_question.items())
            if name.startswith(f"{task}_") and name not in record.config.tasks
        ]
        if subtasks and all("correct" in numbers for numbers in subtasks):
            own = {"correct": "".join(numbers["correct"] for numbers in subtasks)}
    if measure == "accuracy" and "correct" in own and not lower_is_better(task):
        return 100.0 * np.array([int(digit) for digit in own["correct"]])
    if measure == "log_likelihood" and "answer_loglikelihood" in own:
        return np.array(own["answer_loglikelihood"])
    if measure == "loss" and lower_is_better(task):
        return np.array(own["loglikelihood"]) / np.array(own["tokens"])
    return None


Grid = dict[tuple[str, str, int | None], tuple[Cell, Record]]  # by row, place and seed


def _grid(profile: Profile, table: str) -> Grid:
    recorded = recorded_cells(profile, table)
    return {(cell.row, f"{cell.base}/{cell.family}", cell.seed): (cell, record) for cell, record in recorded}


def differences(profile: Profile, table: str, row: str, other: str, measure: str) -> list[Stratum]:
    """Paired differences `row` - `other` of a table, for every model, family and task.

    Only seeds that both rows have are taken; a row that trains nothing stands for every seed.
    """
    return _paired(_grid(profile, table), row, other, measure)


def _paired(grid: Grid, row: str, other: str, measure: str) -> list[Stratum]:
    strata: list[Stratum] = []
    for place in dict.fromkeys(place for _, place, _ in grid):
        own, others = (
            {seed: entry for (name, where, seed), entry in grid.items() if name == which and where == place}
            for which in (row, other)
        )
        seeds = sorted(s for s in own if s is not None and (s in others or None in others))
        if not seeds:
            continue
        for task in own[seeds[0]][0].tasks:
            lines: dict[int, np.ndarray] = {}
            for seed in seeds:
                ours = values(own[seed][1], task, measure)
                theirs = values((others.get(seed) or others[None])[1], task, measure)
                if ours is not None and theirs is not None:
                    lines[seed] = ours - theirs
            if lines:
                strata.append(Stratum(np.array(list(lines.values())), own[seeds[0]][0].base, task, tuple(lines)))
    return strata


# Verdicts


def verdict(found: Effect, margin: float) -> str:
    """The verdict on one claim; nothing is corrected for the number of claims.

    Args:
        found: Its effect.
        margin: The smallest advantage that counts, in the unit of the effect.

    Returns:
        `holds` if the interval lies above zero, `fails` if it lies below `margin`, else `undecided`.
    """
    return "holds" if found.low > 0 else "fails" if found.high < margin else "undecided"


@dataclass(frozen=True)
class Comparison:
    """A claim's row compared with one of the others: the effect, the paired differences, and the verdict."""

    other: str
    effect: Effect
    strata: list[Stratum]
    verdict: str

    @property
    def seeds(self) -> int:
        """The fewest training seeds of any stratum."""
        return min(len(stratum.seeds) for stratum in self.strata)

    @property
    def questions(self) -> int:
        """Different questions, over all tasks."""
        return sum({stratum.task: stratum.values.shape[1] for stratum in self.strata}.values())


def _comparisons(grid: Grid, claim: Claim, measure: str) -> Iterator[Comparison]:
    """A claim's row against each of the others that has been measured."""
    for other in claim.others:
        if strata := _paired(grid, claim.row, other, measure):
            found = effect(strata)
            one_seed = min(len(stratum.seeds) for stratum in strata) == 1
            yield Comparison(other, found, strata, NO_VERDICT if one_seed else verdict(found, MARGINS[measure]))


def decided(profile: Profile) -> pd.DataFrame:
    """A row for each claim and measure that the records allow to test.

    Where a claim has several others, the row shows the least favourable comparison, and the claim holds if it holds
    against all. With one training seed, the interval is over questions alone, and there is no verdict (and no
    `detectable`). Claims on time come with Table 1, from a benchmark, whose rounds are not seeds.

    Args:
        profile: Whose tables to look at.

    Returns:
        a frame with `COLUMNS`.

    Raises:
        UserError: no claim can be tested yet.
    """
    import pandas as pd

    own = {name: claim for name, claim in CLAIMS.items() if claim.table in profile.tables}
    grids = {table: _grid(profile, table) for table in dict.fromkeys(claim.table for claim in own.values())}
    rows = [
        _row(name, claim, measure, compared)
        for name, claim in own.items()
        for measure in claim.measures
        if (compared := list(_comparisons(grids[claim.table], claim, measure)))
    ]
    if not rows:
        raise UserError(f"No claim can be tested yet: '{profile.results}' holds no pair of rows to compare.")
    if "table1" in profile.tables:
        rows += _time()
    return pd.DataFrame(rows)[COLUMNS].astype({"seeds": "Int64", "questions": "Int64"})


def _row(name: str, claim: Claim, measure: str, compared: Sequence[Comparison]) -> dict[str, Any]:
    """A claim's row, from its comparisons: the least favourable one."""
    worst = min(compared, key=lambda one: (VERDICTS.index(one.verdict), one.effect.mean))
    one_seed = worst.verdict == NO_VERDICT
    untested = [other for other in claim.others if other not in {one.other for one in compared}]
    test = f"{claim.row} - {worst.other} in {claim.table}, paired over {'' if one_seed else 'seeds and '}questions"
    if one_seed:
        test += "; one training seed, so that the interval is over questions alone"
    if len(claim.others) > 1:
        test += f"; the worst of {len(compared)} comparisons, which all have to hold"
    if untested:
        test += f"; not measured yet: {', '.join(untested)}"
    return {
        "claim": name,
        "says": claim.says or claim.statement,
        "measure": measure,
        "unit": UNITS[measure],
        "test": test,
        "effect": worst.effect.mean,
        "ci_low": worst.effect.low,
        "ci_high": worst.effect.high,
        "detectable": math.nan if one_seed else worst.effect.detectable,
        "seeds": worst.seeds,
        "questions": worst.questions,
        "verdict": "undecided" if untested and worst.verdict == "holds" else worst.verdict,
    }


def _time() -> list[dict[str, Any]]:
    """The claims on time, from the benchmark's rounds of SmolLM2: each round gives one ratio of median steps."""
    import pandas as pd

    if not MEASURED.exists():
        return []
    rounds = benchmark()["rounds"]
    rows = []
    for name, claim in TIME_CLAIMS.items():
        saved = 1 - seconds(rounds[claim.variant]) / seconds(rounds["full_answer_only"])
        found = _over_rounds(saved)
        rows.append(
            {
                "claim": name,
                "says": claim.says,
                "measure": "time",
                "unit": UNITS["time"],
                "test": f"1 - {claim.variant} / full_answer_only, median seconds a step of SmolLM2, over {len(saved)} "
                "rounds of make bench (the same steps measured again, not seeds)",
                "effect": found.mean,
                "ci_low": found.low,
                "ci_high": found.high,
                "detectable": found.detectable,
                "seeds": pd.NA,
                "questions": pd.NA,
                "verdict": verdict(found, MARGINS["time"]) if len(saved) > 1 else NO_VERDICT,
            }
        )
    return rows


def _over_rounds(saved: np.ndarray) -> Effect:
    """The mean over rounds with its interval by Student's t; NaN of one round."""
    mean, half, power = float(saved.mean()), math.nan, math.nan
    if len(saved) > 1:
        half, power = over_seeds(list(saved)), over_seeds(list(saved), 0.8)
    return Effect(mean, mean - half, mean + half, half + power)


# For readers


def to_read(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims with columns for readers."""
    import pandas as pd

    shown = []
    for row in claims.to_dict("records"):
        places = DIGITS[row["measure"]]
        interval = "–"
        if not pd.isna(row["ci_low"]):
            over = " (questions alone)" if row["verdict"] == NO_VERDICT else ""
            interval = f"{row['ci_low']:+.{places}f} to {row['ci_high']:+.{places}f}{over}"
        shown.append(
            {
                "claim": statement(row["claim"]),
                "effect": f"{row['effect']:+.{places}f} {row['unit']}",
                "95 % interval": interval,
                "minimum detectable effect": "–" if pd.isna(row["detectable"]) else f"{row['detectable']:.{places}f}",
                "seeds": "–" if pd.isna(row["seeds"]) else row["seeds"],
                "verdict": row["verdict"],
            }
        )
    return pd.DataFrame(shown)


def note(claims: pd.DataFrame) -> str:
    """How many tests the claims are, and how many have a verdict, in a sentence."""
    tests, without = len(claims), int((claims["verdict"] == NO_VERDICT).sum())
    if not without:
        return f"These are {tests} tests."
    return f"These are {tests} tests, {without} of them without a verdict."


#: The forest plots of claims: {name: (title, the measures whose claims it shows)}.
CLAIM_FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "claims_points": ("Claims measured in points", ("accuracy",)),
    "claims_nats": ("Claims measured in nats", ("log_likelihood", "loss")),
}


def _group(table: str) -> str:
    return f"{table}: {TABLES[table].title}"


def claim_figures(claims: pd.DataFrame) -> dict[str, Figure]:
    """Forest plots of claims, as `decided` gives them: one of those in points and one of those in nats, if any."""
    figures, order = {}, list(TABLES)
    for name, (_, measures) in CLAIM_FIGURES.items():
        own = claims[claims["measure"].isin(measures)].to_dict("records")
        rows = [
            ForestRow(
                label=statement(row["claim"]),
                group=_group(CLAIMS[row["claim"]].table),
                effect=row["effect"],
                low=row["ci_low"],
                high=row["ci_high"],
                margin=MARGINS[row["measure"]],
                unit=row["unit"],
                verdict=row["verdict"],
                digits=min(DIGITS[row["measure"]], 3),
            )
            for row in sorted(own, key=lambda row: order.index(CLAIMS[row["claim"]].table))
        ]
        if rows:
            figures[name] = forest(rows)
    return figures


def write_claims(profile: Profile) -> list[Path]:
    """Make `claims.csv`, `claims.md` and the claims' forest plots in `figures/` of a profile's results folder.

    Where no claim can be tested, the first two say so: the profile's other tables are no worse for it.

    Returns:
        the paths, in this order.
    """
    folder = Path(profile.results)
    figures: dict[str, Figure] = {}
    try:
        claims = decided(profile)
        shown = to_read(claims).to_markdown(index=False, disable_numparse=True)
        texts = {
            "claims.csv": claims.to_csv(index=False, lineterminator="\n"),
            "claims.md": f"{shown}\n\n{EXPLANATION}\n\n{note(claims)}\n",
        }
        figures = claim_figures(claims)
    except UserError as reason:
        texts = {"claims.csv": ",".join(COLUMNS) + "\n", "claims.md": f"{reason}\n"}
    for name, text in texts.items():
        write_whole(folder / name, text)
    drawn = [path for name, figure in figures.items() for path in save(figure, folder / "figures", name)]
    return [*(folder / name for name in texts), *drawn]
