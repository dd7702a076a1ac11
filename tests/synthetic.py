"""Records of runs that never took place, for what is made from records alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alps_repro.analysis.tables import lower_is_better
from alps_repro.evaluation.benchmarks import OFFLINE_METRIC
from alps_repro.experiments.configs import FinetuneConfig
from alps_repro.experiments.grid import Cell, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.provenance import Provenance
from alps_repro.experiments.records import KINDS, RECORDS, Config, Cost
from alps_repro.heads.selection import head_count

LAYOUT = {"architecture": "llama", "layers": 6, "heads": 8, "groups": 4, "head_dim": 8, "hidden_size": 64}

#: Of a cell's model and a task, numbers of single questions: digits 0 and 1, or minus nats per token.
Answers = Callable[[Cell, str], Sequence[float]]


def small_profile(results: Path, **settings: Any) -> Profile:
    defaults = {
        "results": str(results),
        "models": ["m"],
        "families": {"sums": {"datasets": ["chain_sum"]}},
        "tables": {"table1": {}},
        "methods": ["full", "random", "alps"],
        "scope": "heads",
        "seeds": [0, 1, 2],
    }
    return Profile.check(**{**defaults, **settings})


def draws(*key: Any) -> np.random.Generator:
    """Random numbers of their own for every key, the same in every process."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def right_answers(share: Callable[[Cell, str], float], questions: int = 200) -> Answers:
    """Answers of which about `share(cell, task)` are right, easy questions first; of prose, nats that grow with it."""

    def answers(cell: Cell, task: str) -> Sequence[float]:
        if lower_is_better(task):
            return -3 - 0.5 * share(cell, task) + 0.05 * draws("prose").normal(size=questions)
        ability = draws(task).uniform(size=questions)
        moved = ability + 0.03 * draws(cell.config.name, task).normal(size=questions)
        return (moved < share(cell, task)).astype(int)

    return answers


def result(answers: dict[str, Sequence[float]], log_likelihoods: bool = True) -> dict[str, Any]:
    """An evaluation's result, by the answers to each task's questions."""
    found: dict[str, Any] = {name: {} for name in ("scores", "metrics", "questions", "per_question", "shots")}
    for task, values in answers.items():
        numbers = np.asarray(values, dtype=float)
        found["questions"][task] = len(numbers)
        if lower_is_better(task):
            found["scores"][task] = -float(numbers.mean())
            found["metrics"][task] = {"nats_per_token,none": -float(numbers.mean())}
            found["per_question"][task] = {"loglikelihood": list(10 * numbers), "tokens": [10.0] * len(numbers)}
            continue
        found["scores"][task] = float(numbers.mean())
        found["metrics"][task] = {OFFLINE_METRIC: float(numbers.mean())}
        found["per_question"][task] = {"correct": "".join(str(int(number)) for number in numbers)}
        if log_likelihoods:
            nats = list(numbers - 2.0)
            found["metrics"][task]["answer_loglikelihood,none"] = float(np.mean(nats))
            found["per_question"][task]["answer_loglikelihood"] = nats
    return {**found, "samples": "none.jsonl"}


def save(profile: Profile, config: Config, result: dict[str, Any], code: str = "0" * 64) -> Path:
    provenance = Provenance(
        commit=None, dirty=None, code=code, versions={}, python="3", system="s", processor="p", threads=1, gpu=None
    )
    kind = KINDS[type(config)]
    record = RECORDS[kind](
        kind=kind,
        name=config.name,
        status="completed",
        config=config,
        result=result,
        provenance=provenance,
        cost=Cost(seconds=1.0, peak_memory_bytes=1, trained_parameters=10, total_parameters=100),
        finished="2025-01-01T00:00:00+00:00",
    )
    return record.save(Path(profile.results) / "records")


def measure(
    profile: Profile,
    answers: Answers,
    tables: Sequence[str] | None = None,
    only: Callable[[Cell], bool] = lambda cell: True,
    **settings: Any,
) -> None:
    """Write the records of a profile's tables; `only` those cells of which it is true."""
    for table in tables or profile.tables:
        for cell in filter(only, cells(profile, table)):
            given = {task: answers(cell, task) for task in cell.config.tasks}
            save(profile, cell.config, result(given, settings.get("log_likelihoods", True)), settings.get("code", "0"))


def select_heads(profile: Profile, layout: dict[str, Any] = LAYOUT) -> None:
    """Write what Figure 5 needs: the localizations and fine-tunings behind Table 1's runs of `alps`."""
    total = layout["layers"] * layout["heads"]
    for cell in cells(profile, "table1"):
        tuned = cell.config.model
        if isinstance(tuned, FinetuneConfig) and tuned.method == "alps":
            moved = draws(cell.base, cell.family).normal(size=total) + 0.5 * draws(tuned.name).normal(size=total)
            heads = [divmod(int(head), layout["heads"]) for head in (-moved).argsort()[: head_count(0.1, total)]]
            save(profile, tuned.localization, {"layout": layout})
            save(profile, tuned, {"heads": heads, "losses": []})
