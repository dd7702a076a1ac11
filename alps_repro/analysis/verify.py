"""Verify a record: its configuration, run again from scratch, gives the same numbers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alps_repro.analysis.statistics import interval
from alps_repro.errors import UserError
from alps_repro.evaluation.benchmarks import headline
from alps_repro.experiments.configs import EvaluateConfig
from alps_repro.experiments.provenance import Provenance
from alps_repro.experiments.records import Record, load_record, record_path
from alps_repro.experiments.runs import RUNS

#: Of runs other than evaluations, the numbers whose mean is compared with the record's where they need not be equal.
NUMBERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "localize": ("score, mean over heads", lambda result: result["values"]),
    "finetune": ("training loss, mean over steps", lambda result: result["losses"]),
    "recall": ("recall, mean over all tests", lambda result: [row["recall"] for row in result["rows"]]),
    "importance": ("importance, mean over heads", lambda result: result["importance"]),
    # The sign of a principal coordinate is arbitrary.
    "embed": ("size of coordinates, mean over questions", lambda result: np.abs(np.concatenate([*result.values()]))),
}

#: What rounding, and with it a result, may depend on; versions of packages come on top.
ENVIRONMENT = ("processor", "cpu", "threads", "gpu", "system", "python", "code")

#: The parts of a result that are times.
CLOCKED = ("training_seconds",)

#: How many wrong numbers are shown: where one question's answer differs, a hundred may.
SHOWN = 20


@dataclass(frozen=True)
class Verification:
    """The comparison of a record with a new run of its configuration.

    Attributes:
        record: The record.
        again: The new run's.
        environment: How this machine and software differ from the record's, a line each; where there is no difference,
            numbers must be equal.
        checked: What was compared with the record, a line each.
        wrong: The lines of `checked` that do not hold.
    """

    record: Record
    again: Record
    environment: list[str]
    checked: list[str]
    wrong: list[str]

    @property
    def holds(self) -> bool:
        return not self.wrong

    def lines(self) -> list[str]:
        """The comparison in lines for readers; the last is the verdict."""
        if not self.environment:
            place = ["Processor, threads, code and package versions are the record's: every number has to be equal."]
        else:
            place = ["The environment differs from the record's, so numbers may differ, more so after training:"]
        right = [line for line in self.checked if line not in self.wrong]
        marked = [f"  {line}" for line in right] + [f"  WRONG {line}" for line in self.wrong[:SHOWN]]
        if len(self.wrong) > SHOWN:
            marked.append(f"  and {len(self.wrong) - SHOWN} more")
        wanted = "holds" if self.environment else "is reproduced bit for bit"
        verdict = f"The record {wanted}." if self.holds else "The record does not hold: see what is marked WRONG."
        if self.environment and not self.holds:
            verdict += (
                " The intervals are over questions, and do not include what another machine's rounding does to "
                "training: its table's interval over seeds says how much runs differ."
            )
        return [*place, *(f"  {line}" for line in self.environment), *marked, verdict]


def verify(path: str | Path, results: str | Path | None = None, *, progress: bool = True) -> Verification:
    """Run a record's configuration again and compare.

    Args:
        path: The record's file.
        results: Where to run; by default a temporary folder, in which every predecessor is run again. In another
            folder, predecessors that are there are used, so that several records can be verified with one training.
        progress: Whether to show progress bars.

    Raises:
        UserError: the record is of a failed run, or `results` holds one of the same run.
    """
    record = load_record(Path(path))
    if record.status != "completed":
        raise UserError(f"The record '{path}' is of a failed run: there is no number in it to verify.")
    if results is None:
        with tempfile.TemporaryDirectory(prefix="alps-repro-verify-") as folder:
            return _compared(record, _again(record, Path(folder), progress))
    if record_path(Path(results) / "records", record.kind, record.name).exists():
        raise UserError(f"'{results}' holds a record of this run, which would be taken for a new one: choose another.")
    return _compared(record, _again(record, Path(results), progress))


def _again(record: Record, results: Path, progress: bool) -> Record:
    with _threads(record.provenance.threads):
        RUNS[record.kind](record.config, results, progress=progress)
    return load_record(record_path(results / "records", record.kind, record.name))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads: sums are split by them, and round accordingly."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compared(record: Record, again: Record) -> Verification:
    differs = environment(record.provenance, again.provenance)
    checks = list(_elsewhere(record, again) if differs else _here(record, again))
    wrong = [line for holds, line in checks if not holds]
    return Verification(record, again, differs, [line for _, line in checks], wrong)


def environment(then: Provenance, now: Provenance) -> list[str]:
    """What differs between the machine and software of a record and those here, a line each."""
    pairs = {name: (getattr(then, name), getattr(now, name)) for name in ENVIRONMENT}
    packages = sorted({*then.versions, *now.versions})
    pairs |= {name: (then.versions.get(name), now.versions.get(name)) for name in packages}
    return [f"{name}: {_short(a)} in the record, {_short(b)} here" for name, (a, b) in pairs.items() if a != b]


def _short(value: Any) -> str:
    return "none" if value is None else f"{value:.12}" if isinstance(value, str) and len(value) == 64 else str(value)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and string in a nested result, by its path."""
    if isinstance(value, dict):
        for key, own in value.items():
            if key not in CLOCKED:
                yield from _leaves(own, f"{name} {key}".strip())
    elif isinstance(value, list):
        for i, own in enumerate(value):
            yield from _leaves(own, f"{name}[{i}]")
    else:
        yield name, value


def _flat(record: Record) -> dict[str, Any]:
    hashes = {"hash of model": record.provenance.model_sha256, "hash of data": record.provenance.data_sha256}
    cost = record.cost.model_dump(include={"trained_parameters", "total_parameters"})
    return dict(_leaves({**record.result, **hashes, **cost}))


def _here(record: Record, again: Record) -> Iterator[tuple[bool, str]]:
    """In the record's own environment: every number and hash is bit-identical."""
    then, now = _flat(record), _flat(again)
    names = list(dict.fromkeys((*then, *now)))
    differ = [name for name in names if then.get(name, "nothing") != now.get(name, "nothing")]
    for name in differ:
        yield False, f"{name}: {then.get(name, 'nothing')} in the record, {now.get(name, 'nothing')} here"
    yield True, f"{len(names) - len(differ)} of {len(names)} numbers and hashes are equal"


def _elsewhere(record: Record, again: Record) -> Iterator[tuple[bool, str]]:
    """In another environment: the same data and base, and numbers within the record's intervals."""
    before, after = record.provenance, again.provenance
    # A trained model differs in its last bits, but not the model that training began with.
    untrained = isinstance(record.config, EvaluateConfig) and isinstance(record.config.model, str)
    bases = [name for name in ("base", *(["evaluated"] if untrained else [])) if name in before.model_sha256]
    inputs: list[tuple[str, str, Any, Any]] = [
        *(("data", name, value, after.data_sha256.get(name)) for name, value in before.data_sha256.items()),
        *(("model", name, before.model_sha256[name], after.model_sha256.get(name)) for name in bases),
        *(
            ("files of model", name, before.files_sha256[name], after.files_sha256.get(name))
            for name in bases
            if name in before.files_sha256
        ),
    ]
    for kind, name, then, now in inputs:
        yield then == now, f"{kind} {name}: {'the same' if then == now else 'different from the record'}"
    if isinstance(record.config, EvaluateConfig):
        yield from _metrics(record, again, record.config.tasks)
    else:
        name, numbers = NUMBERS[record.kind]
        if np.size(values := numbers(record.result)):
            yield _mean(name, np.ravel(values), np.ravel(numbers(again.result)))


def _metrics(record: Record, again: Record, tasks: Sequence[str]) -> Iterator[tuple[bool, str]]:
    for task in tasks:
        questions = record.result["questions"].get(task)
        then, now = ({"score": r.result["scores"][task], **r.result["metrics"][task]} for r in (record, again))
        for name, value in then.items():
            if "_stderr," in name or ("," not in name and name != "score"):
                continue
            error = _error(record, task, headline(task) if name == "score" else (name,))
            correct = value * (questions or math.nan)
            if 0 <= value <= 1 and abs(correct - np.round(correct)) < 1e-6:  # a share of the questions
                low, high = interval(value, questions)
                what = f"Wilson's 95 % interval over {questions} questions"
            elif error is not None:
                low, high, what = value - 3 * error, value + 3 * error, "3 standard errors"
            else:
                continue
            yield _within(f"{task} {name}", value, now.get(name, math.nan), low, high, what)


def _error(record: Record, task: str, metrics: Sequence[str]) -> float | None:
    """The standard error of a score over questions: lm-eval's, or else from which were answered correctly."""
    errors = [record.result["metrics"][task].get(name.replace(",", "_stderr,")) for name in metrics]
    if None not in errors:
        return float(np.mean(errors))
    correct = record.result.get("per_question", {}).get(task, {}).get("correct")
    if not correct or tuple(metrics) != headline(task):
        return None
    return float(np.std([int(digit) for digit in correct], ddof=1) / math.sqrt(len(correct)))


def _mean(name: str, then: Any, now: Any) -> tuple[bool, str]:
    """Compare two lists of numbers by their means, within 3 standard errors of the record's mean."""
    value = float(np.mean(then))
    error = float(np.std(then, ddof=1) / math.sqrt(len(then))) if len(then) > 1 else 0.0
    return _within(name, value, float(np.mean(now)), value - 3 * error, value + 3 * error, "3 standard errors")


def _within(name: str, then: float, now: float, low: float, high: float, what: str) -> tuple[bool, str]:
    holds = low <= now <= high
    where = "within" if holds else "outside"
    return holds, f"{name}: {then:.6g} in the record, {now:.6g} here, {where} {low:.6g} to {high:.6g} ({what})"
