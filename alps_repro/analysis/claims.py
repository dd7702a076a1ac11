"""The paper's claims and the tests that decide them. What each compares was written down before anything was run.

Every claim is a difference between two rows of a table, paired over questions and training seeds. Its interval counts
both as drawn: other questions, and other seeds, would have given other numbers. How it is computed was changed after
the runs: the variance of the seeds is now always counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.analysis.tables import lower_is_better
from alps_repro.analysis.timing import MEASURED, benchmark, seconds
from alps_repro.errors import UserError
from alps_repro.experiments.grid import SIZES, Cell
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.recorded import recorded_cells
from alps_repro.experiments.records import Record, write_whole

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    *["claim", "says", "measure", "unit", "test", "effect", "ci_low", "ci_high", "detectable", "seeds", "questions"],
    "verdict",
]

#: What a test can say, the worst first. One training seed says nothing of others, and so decides nothing.
NO_VERDICT = "no verdict"
VERDICTS = ("fails", NO_VERDICT, "undecided", "holds")

#: What counts as nothing: an advantage that the interval excludes to be this large does not hold.
MARGINS = {"accuracy": 1.0, "log_likelihood": 0.02, "loss": 0.01, "time": 0.02}
UNITS = {
    "accuracy": "points",
    "log_likelihood": "nats per answer",
    "loss": "nats per token",
    "time": "of a step's time",
}


@dataclass(frozen=True)
class Claim:
    """says: the paper's claim. table: where both rows stand. row: the one that is said to be better.

    others: the rows that it is said to be better than; it has to be better than each (an intersection-union test, so
    no correction is needed). measures: what is compared.
    """

    says: str
    table: str
    row: str
    others: tuple[str, ...]
    measures: tuple[str, ...] = ("accuracy", "log_likelihood")


CLAIMS: dict[str, Claim] = {
    "tenth_beats_all": Claim("training 10 % of the heads beats training all of them", "table1", "alps", ("full",)),
    "beats_random": Claim("alps beats random heads", "table1", "alps", ("random",)),
    "beats_random_matched": Claim(
        "alps beats random heads with as many weights (control)", "table1", "alps", ("random_matched",)
    ),
    "beats_layer_consistent": Claim("alps beats random heads in every layer", "table1", "alps", ("layer_consistent",)),
    "beats_bottom": Claim("alps beats the heads that moved least (control)", "table1", "alps", ("bottom",)),
    "beats_l2": Claim("alps beats the heads that moved most by plain norm (control)", "table1", "alps", ("l2",)),
    "beats_lora": Claim("alps beats LoRA of rank 128", "table1", "alps", ("lora",)),
    "beats_lora_matched": Claim("alps beats LoRA with as many weights (control)", "table1", "alps", ("lora_matched",)),
    "tenth_beats_all_scope_all": Claim(
        "training 10 % of the heads and all else beats training everything", "table1_all", "alps", ("full",)
    ),
    "beats_random_scope_all": Claim("alps beats random heads, all else trained", "table1_all", "alps", ("random",)),
    "tenth_is_best": Claim("10 % is the best ratio", "table3", "10", ("100", "70", "50", "30", "0")),
    "pad_is_best": Claim("PAD is the best metric", "table2", "pad", ("cosine", "euclidean", "kl")),
    "transfers": Claim("heads carry over: they beat random heads on the other data set", "table4", "alps", ("random",)),
    "transfers_beats_full": Claim("carried over, they beat training all heads", "table4", "alps", ("full",)),
    "forgets_less_than_full": Claim(
        "alps forgets less than full fine-tuning", "table5", "alps", ("full",), ("accuracy", "loss")
    ),
    "forgets_less_than_lora": Claim("alps forgets less than LoRA", "table5", "alps", ("lora",), ("accuracy", "loss")),
}

#: Of other systems, at each number of training examples: {claim: (says, row, others)}.
_OF_SYSTEMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "alps_chooses_best_rows": (
        "ALPS's heads are the best to train the weights of",
        "alps",
        ("random", "lofit", "hifi", "importance"),
    ),
    "alps_chooses_best_offsets": (
        "ALPS's heads are the best to train an offset for",
        "alps_offset",
        ("random_offset", "lofit_offset", "hifi_offset", "importance_offset"),
    ),
    "lofit_chooses_better": ("LoFiT's heads are better for its offsets than ALPS's", "lofit_offset", ("alps_offset",)),
    "choice_matters_for_offsets": (
        "LoFiT's heads are better for offsets than drawn ones",
        "lofit_offset",
        ("random_offset",),
    ),
    "jola_beats_lofit": ("JoLA beats LoFiT", "jola", ("lofit_offset",)),
    "jola_beats_alps": ("JoLA beats ALPS", "jola", ("alps",)),
    "jola_beats_lora": ("JoLA beats LoRA", "jola", ("lora_matched",)),
    "jola_needs_both": ("JoLA's two edits beat either alone", "jola", ("jola_additive", "jola_multiplicative")),
    "jola_needs_gates": ("JoLA's gates help", "jola", ("jola_ungated",)),
    "alps_beats_low_rank": (
        "ALPS beats LoRA, DoRA and SHiRA with as many weights",
        "alps",
        ("lora_matched", "dora_matched", "shira_matched"),
    ),
}

CLAIMS |= {
    f"{name}_{size}": Claim(f"{says}, {size} examples", f"systems_{size}", row, others)
    for size in SIZES
    for name, (says, row, others) in _OF_SYSTEMS.items()
}


@dataclass(frozen=True)
class Effect:
    """A mean difference with its 95 % interval, and the smallest true one that would be seen in four of five tries."""

    mean: float
    low: float
    high: float
    detectable: float


@dataclass(frozen=True)
class Block:
    """Paired differences (seeds, questions) of one model, family and task.

    model: its runs of one seed are one draw, since a seed decides which heads are drawn, whatever the family. task: its
    questions are the same wherever it is asked. seeds: those of the lines.
    """

    values: np.ndarray
    model: str
    task: str
    seeds: tuple[int, ...]


def effect(blocks: Sequence[Block]) -> Effect:
    """The mean over blocks of their mean differences, with seeds and questions as random.

    A block's differences are d_ij = m + s_i + q_j + e_ij, of seed i and question j. Blocks may share s_i (of one
    model) and q_j (of one task). The mean's variance has two parts. That of the seeds, from a model's means by seed,
    holds a share of the rest (e_ij) too, and so is never counted as less than that share. That of the questions, from
    a task's means by question, is counted without it. For one block these are, of the mean squares of the two-way
    table, max(MS_seeds, MS_rest) and max(MS_questions - MS_rest, 0), over seeds · questions. Each part takes the t
    quantile of its own degrees of freedom, and half the width of the interval is the root of the sum of their squares,
    so that it covers at least 95 % (S. K. Banerjee, Sankhyā 22, 1960): many questions do not make three seeds say
    more. A block of one seed: over questions alone.
    """
    count = len(blocks)
    mean = float(np.mean([block.values.mean() for block in blocks]))
    of_questions: dict[tuple[str, int], Any] = {}  # what each question of a task adds to the mean
    of_seeds: dict[str, dict[int, float]] = {}  # what each seed of a model does
    of_rest: dict[str, float] = {}  # what a model's rest adds to the variance
    fewest: dict[str, int] = {}  # seeds of any of a model's blocks
    for block in blocks:
        (seeds, questions), own = block.values.shape, block.values - block.values.mean()
        lines, columns = own.mean(1), own.mean(0)
        place = block.task, questions
        of_questions[place] = of_questions.get(place, 0.0) + columns / (count * questions)
        fewest[block.model] = min(seeds, fewest.get(block.model, seeds))
        if seeds > 1:
            drawn = of_seeds.setdefault(block.model, {})
            for seed, line in zip(block.seeds, lines / (count * math.sqrt(seeds * (seeds - 1)))):
                drawn[seed] = drawn.get(seed, 0.0) + line
            square = ((own - lines[:, None] - columns) ** 2).sum() / ((seeds - 1) * max(questions - 1, 1))
            of_rest[block.model] = of_rest.get(block.model, 0.0) + square / (block.values.size * count**2)

    asked = []
    for columns in of_questions.values():
        degrees = max(len(columns) - 1, 1)
        asked.append((float((columns**2).sum()) * len(columns) / degrees, degrees))
    parts = [_pooled(asked)]
    if min(fewest.values()) > 1:
        variance, of_asked = parts[0]
        trained = [
            (max(sum(line**2 for line in drawn.values()), of_rest[model]), fewest[model] - 1)
            for model, drawn in of_seeds.items()
        ]
        parts = [(max(variance - sum(of_rest.values()), 0.0), of_asked), _pooled(trained)]
    reach = _reach(parts, 0.975)
    return Effect(mean, mean - reach, mean + reach, reach + _reach(parts, 0.8))


def _pooled(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The sum of independent variances, and its degrees of freedom by Satterthwaite."""
    variance = sum(own for own, _ in parts)
    return variance, variance**2 / sum(own**2 / degrees for own, degrees in parts) if variance else 1.0


def _reach(parts: Sequence[tuple[float, float]], share: float) -> float:
    """How far a mean's quantile lies from it, of variances with their degrees of freedom."""
    from scipy.special import stdtrit

    return math.sqrt(sum(float(stdtrit(degrees, share)) ** 2 * variance for variance, degrees in parts))


def values(record: Record, task: str, measure: str) -> np.ndarray | None:
    """One number per question of a task: points (0 or 100), nats of the right answer, or minus nats per token.

    None where the task has no such number. A group's questions (MMLU's subjects) count alike.
    """
    found = record.result["per_question"]
    parts = [
        own for name, own in sorted(found.items()) if name.startswith(f"{task}_") and name not in record.config.tasks
    ]
    if task not in found and parts and all("correct" in own for own in parts):
        found = {task: {"correct": "".join(own["correct"] for own in parts)}}
    own = found.get(task, {})
    if measure == "accuracy" and "correct" in own and not lower_is_better(task):
        return 100.0 * np.array([int(digit) for digit in own["correct"]])
    if measure == "log_likelihood" and "answer_loglikelihood" in own:
        return np.array(own["answer_loglikelihood"])
    if measure == "loss" and lower_is_better(task):
        return np.array(own["loglikelihood"]) / np.array(own["tokens"])
    return None


Grid = dict[tuple[str, str, int | None], tuple[Cell, Record]]  # by row, place and seed


def _grid(profile: Profile, table: str) -> Grid:
    found = recorded_cells(profile, table)
    return {(cell.row, f"{cell.base}/{cell.family}", cell.seed): (cell, record) for cell, record in found}


def differences(profile: Profile, table: str, row: str, other: str, measure: str) -> list[Block]:
    """Paired differences `row` - `other`, for every model, family and task.

    Only seeds that both rows have are taken; a row that trains nothing stands for every seed.
    """
    return _paired(_grid(profile, table), row, other, measure)


def _paired(grid: Grid, row: str, other: str, measure: str) -> list[Block]:
    blocks: list[Block] = []
    for place in dict.fromkeys(place for _, place, _ in grid):
        own, others = (
            {seed: found for (name, where, seed), found in grid.items() if name == which and where == place}
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
                blocks.append(Block(np.array(list(lines.values())), own[seeds[0]][0].base, task, tuple(lines)))
    return blocks


def verdict(found: Effect, margin: float) -> str:
    """holds: the interval lies above zero. fails: it leaves no room for an advantage of `margin`. Else undecided.

    For one claim: nothing is corrected for the number of claims.
    """
    return "holds" if found.low > 0 else "fails" if found.high < margin else "undecided"


def _against_each(grid: Grid, claim: Claim, measure: str) -> Iterator[tuple[str, str, Effect, list[Block]]]:
    """The verdict against each of the others, with that other, the effect and what it is of."""
    for other in claim.others:
        if blocks := _paired(grid, claim.row, other, measure):
            found = effect(blocks)
            yield verdict(found, MARGINS[measure]) if _seeds(blocks) > 1 else NO_VERDICT, other, found, blocks


def _seeds(blocks: Sequence[Block]) -> int:
    return min(len(block.seeds) for block in blocks)


def decided(profile: Profile) -> pd.DataFrame:
    """A row per claim and measure that the records say anything of.

    Columns: `COLUMNS`. Where a claim has several others, the row shows the one that it comes off worst against, and
    holds if it holds for all. One training seed: the interval is over questions alone, and there is no verdict (and no
    `detectable`). Whether a step is cheaper stands beside Table 1, from a benchmark, whose rounds are no seeds.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    own = {name: claim for name, claim in CLAIMS.items() if claim.table in profile.tables}
    grids = {table: _grid(profile, table) for table in dict.fromkeys(claim.table for claim in own.values())}
    for name, claim in own.items():
        for measure in claim.measures:
            found = list(_against_each(grids[claim.table], claim, measure))
            if not found:
                continue
            whole, other, worst, blocks = min(found, key=lambda one: (VERDICTS.index(one[0]), one[2].mean))
            one_seed = whole == NO_VERDICT
            if len(found) < len(claim.others) and whole == "holds":
                whole = "undecided"  # not against all of them yet
            test = f"{claim.row} - {other} in {claim.table}, paired over {'' if one_seed else 'seeds and '}questions"
            if one_seed:
                test += "; one training seed, so that the interval is over questions alone"
            if len(claim.others) > 1:
                test += f"; the worst of {len(found)} comparisons, which all have to hold"
            if missing := sorted({*claim.others} - {name for _, name, _, _ in found}, key=claim.others.index):
                test += f"; not measured yet: {', '.join(missing)}"
            rows.append(
                {
                    "claim": name,
                    "says": claim.says,
                    "measure": measure,
                    "unit": UNITS[measure],
                    "test": test,
                    "effect": worst.mean,
                    "ci_low": worst.low,
                    "ci_high": worst.high,
                    "detectable": math.nan if one_seed else worst.detectable,
                    "seeds": _seeds(blocks),
                    "questions": sum({block.task: block.values.shape[1] for block in blocks}.values()),
                    "verdict": whole,
                }
            )
    if not rows:
        raise UserError(f"No claim can be tested yet: '{profile.results}' holds no pair of rows to compare.")
    if "table1" in profile.tables:
        rows += _time()
    return pd.DataFrame(rows)[COLUMNS].astype({"seeds": "Int64", "questions": "Int64"})


def _time() -> list[dict[str, Any]]:
    """Whether a training step of SmolLM2 is cheaper, from the benchmark's rounds: each gives one ratio of medians."""
    import pandas as pd
    from scipy.stats import sem, t

    if not MEASURED.exists():
        return []
    rounds = benchmark()["rounds"]
    rows = []
    for claim, own, says in (
        ("trains_cheaper", "alps_all", "a step of alps takes less time than one of full fine-tuning, all else trained"),
        ("trains_cheaper_heads", "alps_heads", "a step of alps alone takes less time than one of full fine-tuning"),
    ):
        saved = 1 - seconds(rounds[own]) / seconds(rounds["full_answer_only"])
        mean, half, power = float(saved.mean()), math.nan, math.nan
        if len(saved) > 1:
            error, degrees = float(sem(saved)), len(saved) - 1
            half, power = float(t.ppf(0.975, degrees)) * error, float(t.ppf(0.8, degrees)) * error
        found = Effect(mean, mean - half, mean + half, half + power)
        rows.append(
            {
                "claim": claim,
                "says": says,
                "measure": "time",
                "unit": UNITS["time"],
                "test": f"1 - {own} / full_answer_only, median seconds a step of SmolLM2, over {len(saved)} rounds of "
                "make bench (the same steps measured again, not seeds)",
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


def to_read(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims with a reader's columns."""
    import pandas as pd

    digits = {"accuracy": 1, "log_likelihood": 3, "loss": 4, "time": 2}

    def interval(row: Any) -> str:
        if pd.isna(row.ci_low):
            return "–"
        places = digits[row.measure]
        over = " (questions alone)" if row.verdict == NO_VERDICT else ""
        return f"{row.ci_low:+.{places}f} to {row.ci_high:+.{places}f}{over}"

    shown = [
        {
            "claim": row.says,
            "effect": f"{row.effect:+.{digits[row.measure]}f} {row.unit}",
            "95 % interval": interval(row),
            "could have seen": "–" if pd.isna(row.detectable) else f"{row.detectable:.{digits[row.measure]}f}",
            "seeds": "–" if pd.isna(row.seeds) else row.seeds,
            "here": row.verdict,
        }
        for row in claims.itertuples()
    ]
    return pd.DataFrame(shown)


def note(claims: pd.DataFrame) -> str:
    """What the intervals of the claims are over, and what their verdicts are not, in a sentence each."""
    told = []
    if (claims["seeds"] > 1).any():
        told.append("Intervals are over training seeds and questions, and always count the variance of the seeds.")
    if (claims["seeds"] == 1).any():
        told.append("One training seed decides nothing: its intervals are over questions alone, without a verdict.")
    tests = (claims["verdict"] != NO_VERDICT).sum()
    told.append(f"Each verdict is of its own test: none is corrected for their number, which is {tests} here.")
    return " ".join(told)


def write_claims(profile: Profile) -> list[Path]:
    """Make `claims.csv` and `claims.md` of a profile's results folder; returns their paths.

    Where no claim can be tested, they say so: the profile's other tables are no worse for it.
    """
    folder = Path(profile.results)
    try:
        claims = decided(profile)
        texts = {
            "claims.csv": claims.to_csv(index=False, lineterminator="\n"),
            "claims.md": f"{to_read(claims).to_markdown(index=False, disable_numparse=True)}\n\n{note(claims)}\n",
        }
    except UserError as reason:
        texts = {"claims.csv": ",".join(COLUMNS) + "\n", "claims.md": f"{reason}\n"}
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]
