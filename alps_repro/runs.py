"""Runs that are done once: each makes its predecessors if they are missing, and leaves a record.

A results folder holds `records/` (JSON), `scores/` (of localizations), `samples/` (what models answered, question
by question), `models/` (weights), and what is made from the records: `tables/`, `figures/`, `notebooks/`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alps_repro.checkpoints import is_adapter, load_model, model_hash, resolve
from alps_repro.data import training_examples
from alps_repro.embeddings import embed, principal
from alps_repro.errors import UserError, explained
from alps_repro.evaluation import evaluate, headline
from alps_repro.importance import COMPARED, READINGS, importance, peaks, recall_by_metric
from alps_repro.recipe import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.records import KINDS, Config, Outcome, Record, load_record, record_path, recorded, write_whole
from alps_repro.scores import HeadScores, localize
from alps_repro.selectors import SELECTORS, batches, select_by
from alps_repro.training import finetune


def _done(folder: Path, kind: str, config: Config) -> Record | None:
    path = record_path(folder, kind, config.name)
    if not path.exists():
        return None
    record = load_record(path)
    return record if record.status == "completed" and record.config == config else None


@contextmanager
def _held(results: Path, kind: str, name: str) -> Iterator[None]:
    """Let one process at a time make a run; a second one says who makes it, waits, and finds it done."""
    _prepare(results / ".locks")
    path = results / ".locks" / f"{kind}-{name}.lock"
    lock, holder = FileLock(path), path.with_suffix(".holder")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            print(f"{who} is making {kind}-{name} in '{results}': waiting for it.", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise explained(error) or error from error
    try:
        write_whole(holder, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def finetune_run(config: FinetuneConfig, results: str | Path, *, progress: bool = True) -> tuple[Record, Path]:
    """Fine-tune as `config` says, unless that has been done; returns the record and the tuned model's folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would wait for the lock that the first one holds, and that one for them.
        raise UserError("A recorded run is made by one process: under a launcher call alps_repro.finetune itself.")
    results = Path(results)
    model = results / "models" / config.name
    record = _done(results / "records", "finetune", config)
    if config.method == "no_attn" and config.scope == "heads":
        model = resolve(config.base)
    if record is not None and model.exists():
        return record, model
    scores = None
    if config.localization is not None:
        scores = localize_run(config.localization, results, progress=progress)[0]
    _prepare(results / "models")
    with _held(results, "finetune", config.name):
        record = _done(results / "records", "finetune", config)
        if record is not None and model.exists():
            return record, model
        return _finetune(config, results, model, scores, progress)


def _finetune(
    config: FinetuneConfig, results: Path, model: Path, scores: HeadScores | None, progress: bool
) -> tuple[Record, Path]:
    with recorded(results / "records", config) as outcome:
        outcome.model_sha256["base"] = model_hash(resolve(config.base))
        output = results / "models" / config.name
        shutil.rmtree(output, ignore_errors=True)  # of a run that was cut off before its record
        tuned = finetune(
            config.base,
            config.dataset,
            output,
            method=config.method,
            ratio=config.ratio,
            scope=config.scope,
            scores=scores,
            quantization=config.quantization,
            seed=config.seed,
            choice_seed=config.choice_seed,
            recipe=config.recipe,
            progress=progress,
        )
        outcome.result = {"heads": tuned.heads, "losses": tuned.losses, "tokens": tuned.tokens, "rank": tuned.rank}
        if tuned.validation:
            outcome.result["validation"] = tuned.validation
        if tuned.closed_gates is not None:
            outcome.result["closed_gates"] = tuned.closed_gates
        outcome.model_sha256["tuned"] = model_hash(tuned.path)
        if tuned.data_sha256:
            outcome.data_sha256[config.dataset] = tuned.data_sha256
        outcome.trained_parameters, outcome.total_parameters = tuned.trained_parameters, tuned.total_parameters
    return outcome.record, model


def localize_run(config: LocalizeConfig, results: str | Path, *, progress: bool = True) -> tuple[HeadScores, Record]:
    """Localize as `config` says, unless that has been done; the task model's run is made first where it is missing."""
    results = Path(results)
    path = results / "scores" / f"{config.name}.json"
    record = _done(results / "records", "localize", config)
    if record is not None and path.exists():
        return HeadScores.load(path), record
    task: str | Path = config.task_model if isinstance(config.task_model, str) else ""
    if isinstance(config.task_model, FinetuneConfig):
        task = finetune_run(config.task_model, results, progress=progress)[1]
    _prepare(path.parent)
    with _held(results, "localize", config.name):
        record = _done(results / "records", "localize", config)
        if record is not None and path.exists():
            return HeadScores.load(path), record
        return _localize(config, results, task, path, progress)


def _localize(
    config: LocalizeConfig, results: Path, task: str | Path, path: Path, progress: bool
) -> tuple[HeadScores, Record]:
    with recorded(results / "records", config) as outcome:
        if config.metric in SELECTORS:
            asked = {} if config.dataset is None else {"dataset": config.dataset, "questions": config.questions}
            scores = select_by(config.metric, config.base, task, **asked, progress=progress)
        else:
            scores = localize(
                config.base,
                task,
                metric=config.metric,
                head_matrix=config.head_matrix,
                tau=config.tau,
                ground=config.ground,
                progress=progress,
            )
        write_whole(path, json.dumps(scores.dump(), indent=1) + "\n")
        outcome.model_sha256 = {"base": model_hash(resolve(config.base)), "task": model_hash(resolve(task))}
        outcome.result = {"scores": path.name, "values": scores.values.tolist(), "layout": asdict(scores.layout)}
        if scores.compared_in:
            outcome.result["compared_in"] = scores.compared_in
    return scores, outcome.record


def evaluate_run(config: EvaluateConfig, results: str | Path, *, progress: bool = True) -> Record:
    """Evaluate as `config` says, unless that has been done; the fine-tuning is made first where it is missing."""
    results = Path(results)

    def tuned() -> tuple[Record | None, str | Path]:
        if isinstance(config.model, FinetuneConfig):
            return finetune_run(config.model, results, progress=progress)
        return None, config.model

    def make(outcome: Outcome, before: tuple[Record | None, str | Path]) -> None:
        tuning, model = before
        found = evaluate(
            model,
            config.tasks,
            quantization=config.quantization,
            batch_size=config.batch_size,
            autocast=config.autocast,
            limit=config.limit,
            template=config.template,
            allow_code=config.allow_code,
            split=config.split,
            progress=progress,
        )
        samples = results / "samples" / f"{config.name}.jsonl"
        _prepare(samples.parent)
        rows = [{"task": task, **row} for task, answers in found.samples.items() for row in answers]
        write_whole(samples, "".join(json.dumps(row) + "\n" for row in rows))
        outcome.result = {
            "scores": found.scores,
            "metrics": found.results,
            "questions": {task: len({row["doc_id"] for row in rows}) for task, rows in found.samples.items()},
            "shots": found.shots,
            "task_versions": found.versions,
            "headline_metric": {task: headline(task) for task in config.tasks},
            "per_question": {task: _per_question(task, rows) for task, rows in found.samples.items()},
            "samples": samples.name,
        }
        if found.neutralized:
            outcome.result["neutralized"] = found.neutralized
        outcome.data_sha256 = found.hashes
        folder = resolve(model)
        outcome.model_sha256["evaluated"] = model_hash(folder)
        if tuning is not None:
            outcome.trained_parameters = tuning.cost.trained_parameters
            outcome.total_parameters = tuning.cost.total_parameters
            outcome.result["training_seconds"] = tuning.cost.seconds
        if is_adapter(folder) and tuning is not None:
            outcome.model_sha256["base"] = tuning.provenance.model_sha256["base"]

    return _made_once(config, results, make, tuned)


def _per_question(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a paired test needs of each question, in the order of `doc_id`: small enough to be kept in the record.

    correct: a digit a question, by the number that stands for the task, where that is one and right or wrong (IFEval's
    is the mean of four). answer_loglikelihood: of the right answer, nats, to seven digits. loglikelihood and tokens: of
    a passage of prose.
    """
    metrics = headline(task)
    metric, _, graded = metrics[0].partition(",")
    rows = sorted((row for row in rows if row.get("filter", "none") in (graded, "none")), key=lambda row: row["doc_id"])
    found: dict[str, Any] = {}
    # Programs of models are run, and their ends noted, by this package.
    correct = [row["outcome"] == "passed" if "outcome" in row else row.get(metric, row.get("acc")) for row in rows]
    if len(metrics) == 1 and correct and all(value in (0, 1) for value in correct):
        found["correct"] = "".join(str(int(value)) for value in correct)
    for name in ("answer_loglikelihood", "loglikelihood", "tokens"):
        if rows and all(name in row for row in rows):
            found[name] = [float(f"{row[name]:.7g}") for row in rows]
    return found


def _made_once(
    config: Config,
    results: str | Path,
    make: Callable[[Outcome, Any], None],
    first: Callable[[], Any] = lambda: None,
) -> Record:
    """The record of a run; where it is not there, `make` fills it in with what `first` gives.

    first: makes the runs that come before, each with a record and a time of its own.
    """
    results, kind = Path(results), KINDS[type(config)]
    if (record := _done(results / "records", kind, config)) is not None:
        return record
    before = first()
    _prepare(results / "records")
    with _held(results, kind, config.name):
        if (record := _done(results / "records", kind, config)) is not None:
            return record
        with recorded(results / "records", config) as outcome:
            make(outcome, before)
        return outcome.record


def recall_run(config: RecallConfig, results: str | Path, *, progress: bool = True) -> Record:
    """How many moved heads each metric finds: `result["rows"]` is the table that `recall_by_metric` gives.

    `result["peaks"]`: the largest probability in each head's distribution, {head matrix: (layers, heads)}.
    """

    def make(outcome: Outcome, before: None) -> None:
        found = recall_by_metric(
            config.base,
            factors=config.factors,
            seeds=config.seeds,
            share=config.share,
            background=config.background,
            progress=progress,
        )
        outcome.model_sha256["base"] = model_hash(resolve(config.base))
        peaked = {kind: values.tolist() for kind, values in peaks(config.base).items()}
        outcome.result = {"rows": found.to_dict("records"), "peaks": peaked}

    return _made_once(config, results, make)


def importance_run(config: ImportanceConfig, results: str | Path, *, progress: bool = True) -> Record:
    """Importance and scores of the heads of a task model, which is made first where it is missing.

    `result["importance"]`: nats per counted token, (layers, heads). `result["scores"]`: {metric: (layers, heads)}.
    """

    def make(outcome: Outcome, before: tuple[Record, Path]) -> None:
        folder = before[1]
        model, tokenizer = load_model(folder)
        asked, data = batches(config.task_model.dataset, config.questions, tokenizer, config.batch_size)
        lost = importance(model, asked, progress=progress)
        scores = {
            name: localize(config.base, folder, head_matrix=config.head_matrix, **READINGS[name]).values.tolist()
            for name in COMPARED
        }
        outcome.model_sha256 = {"base": model_hash(resolve(config.base)), "task": model_hash(folder)}
        outcome.data_sha256[config.task_model.dataset] = data
        outcome.result = {"importance": lost.tolist(), "scores": scores}

    return _made_once(config, results, make, lambda: finetune_run(config.task_model, results, progress=progress))


def embed_run(config: EmbedConfig, results: str | Path, *, progress: bool = True) -> Record:
    """Where a model puts the questions of data sets; `result`: {data set: three principal coordinates a question}."""

    def make(outcome: Outcome, before: None) -> None:
        outcome.model_sha256["base"] = model_hash(resolve(config.base))
        model, tokenizer = load_model(config.base)
        asked = {name: training_examples(name, size=config.questions)["instruction"] for name in config.datasets}
        outcome.result = {
            name: points.tolist() for name, points in principal(embed(model, tokenizer, asked, progress)).items()
        }

    return _made_once(config, results, make)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be made ({error.strerror}): choose another results folder.") from error
