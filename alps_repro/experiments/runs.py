"""Runs that are done once: each makes its predecessors if they are missing, and leaves a record.

A results folder holds `records/` (JSON), `scores/` (of localizations), `samples/` (a model's answer to each question),
`models/` (weights), and what is made from the records: `tables/`, `figures/`, `notebooks/`.
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
from typing import Any, Literal, TypeVar

from filelock import FileLock, Timeout

from alps_repro.data.datasets import training_examples
from alps_repro.errors import UserError, explained
from alps_repro.evaluation.benchmarks import headline
from alps_repro.evaluation.harness import Evaluation, evaluate
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.records import (
    KINDS,
    SCORES,
    Config,
    EmbedRecord,
    EvaluateRecord,
    FinetuneRecord,
    ImportanceRecord,
    Kind,
    LocalizeRecord,
    Outcome,
    RecallRecord,
    RecordT,
    make_folder,
    recorded,
    scores_hash,
    write_whole,
)
from alps_repro.experiments.results import (
    EmbedResult,
    EvaluateResult,
    FinetuneResult,
    ImportanceResult,
    LocalizeResult,
    PerQuestion,
    RecallResult,
)
from alps_repro.experiments.reuse import named_models, reusable
from alps_repro.experiments.superseded import set_aside, set_aside_record
from alps_repro.localization.ablation import importance
from alps_repro.localization.recovery import COMPARED, METRIC_VARIANTS, peaks, recall_by_metric
from alps_repro.localization.scores import HeadScores, localize
from alps_repro.localization.selectors import RESULT_METRICS, model_and_batches, select_by
from alps_repro.models.embeddings import embed, principal
from alps_repro.models.folders import file_hashes, model_hash, resolve
from alps_repro.models.loading import load_model
from alps_repro.training.finetune import Finetuned, finetune


@contextmanager
def _held(results: Path, kind: Kind, name: str) -> Iterator[None]:
    """Let one process at a time make a run; a second one tells which one does, waits, and finds it done."""
    make_folder(results / ".locks")
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


@contextmanager
def _recorded(config: Config, results: Path, **made: str | Path) -> Iterator[Outcome]:
    """`recorded`, with the hashes of the models that a run reads: those it names, and those `made` for it, by role.

    Raises:
        UserError: a model was changed during the run.
    """
    with recorded(results / "records", config) as outcome:
        read = {**named_models(config), **made}
        before = {role: (model_hash(resolve(name)), file_hashes(name)) for role, name in read.items()}
        outcome.model_sha256 = {role: whole for role, (whole, _) in before.items()}
        outcome.files_sha256 = {role: files for role, (_, files) in before.items()}
        yield outcome
        for role, name in read.items():
            if file_hashes(name) != before[role][1]:
                raise UserError(f"The {role} model '{name}' was changed while the run read it: run again.")


Before = TypeVar("Before")


def _made_once(
    config: Config,
    results: str | Path,
    kind: type[RecordT],
    make: Callable[[Outcome, Before], None],
    first: Callable[[], Before],
    models: Callable[[Before], dict[str, str | Path]] = lambda before: {},
) -> RecordT:
    """The record of a run; where there is none, the run is made.

    Args:
        config: of the run.
        results: the results folder.
        kind: of its record.
        make: makes the run with what `first` returns, and fills in the outcome.
        first: makes the runs that come before, each with a record and a time of its own.
        models: of these, by role.
    """
    results = Path(results)
    if (record := reusable(config, results, kind)) is not None:
        return record
    before = first()
    make_folder(results / "records")
    with _held(results, KINDS[type(config)], config.name):
        if (record := reusable(config, results, kind)) is not None:
            return record
        with set_aside(config, results), _recorded(config, results, **models(before)) as outcome:
            make(outcome, before)
        return outcome.written(kind)


def finetune_run(config: FinetuneConfig, results: str | Path, *, progress: bool = True) -> tuple[FinetuneRecord, Path]:
    """Fine-tune as a configuration says, unless that has been done; its localization is made first where it is missing.

    Args:
        config: of the run.
        results: the results folder.
        progress: whether to show progress bars.

    Returns:
        the record, and the folder of the tuned model: the base's, where nothing is trained.

    Raises:
        UserError: the run is not possible, or is started by a launcher of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Each process would wait for the lock that the first one holds, and that one for them.
        raise UserError("A recorded run is made by one process: under a launcher call alps_repro.finetune itself.")
    results = Path(results)
    model = results / "models" / config.name
    if config.method == "no_attn" and config.scope == "heads":
        model = resolve(config.base)
    record = reusable(config, results, FinetuneRecord)
    if record is not None and model.exists():
        return record, model
    scored = None
    if config.localization is not None:
        scored = localize_run(config.localization, results, progress=progress)
    make_folder(results / "models")
    with _held(results, "finetune", config.name):
        record = reusable(config, results, FinetuneRecord)
        if record is not None and model.exists():
            return record, model
        with set_aside(config, results):
            return _finetune(config, results, scored, record, progress), model


def _finetune(
    config: FinetuneConfig,
    results: Path,
    scored: tuple[HeadScores, LocalizeRecord] | None,
    earlier: FinetuneRecord | None,
    progress: bool,
) -> FinetuneRecord:
    """Fine-tune and record it; `earlier`: the record of this run, whose model has been removed."""
    with _recorded(config, results) as outcome:
        output = results / "models" / config.name
        shutil.rmtree(output, ignore_errors=True)  # of a run that was cut off before its record
        tuned = finetune(
            config.base,
            config.dataset,
            output,
            method=config.method,
            ratio=config.ratio,
            scope=config.scope,
            scores=None if scored is None else scored[0],
            quantization=config.quantization,
            seed=config.seed,
            choice_seed=config.choice_seed,
            recipe=config.recipe,
            progress=progress,
        )
        outcome.result = _finetune_result(tuned)
        outcome.model_sha256["tuned"] = model_hash(tuned.path)
        outcome.files_sha256["tuned"] = file_hashes(tuned.path)
        if tuned.data_sha256:
            outcome.data_sha256[config.dataset] = tuned.data_sha256
        if scored is not None:
            outcome.data_sha256[SCORES] = scores_hash(scored[1].result)
        outcome.trained_parameters, outcome.total_parameters = tuned.trained_parameters, tuned.total_parameters
        if earlier is not None and earlier.provenance.model_sha256["tuned"] != outcome.model_sha256["tuned"]:
            # Its evaluations were of the model that was removed: they, too, will be found to be of another run.
            set_aside_record(results, earlier, "its model, made here again, is another one")
    return outcome.written(FinetuneRecord)


def _finetune_result(tuned: Finetuned) -> FinetuneResult:
    result: FinetuneResult = {
        "heads": tuned.heads,
        "losses": tuned.losses,
        "tokens": tuned.tokens,
        "rank": tuned.rank,
        "rows": tuned.rows,
    }
    if tuned.validation:
        result["validation"] = tuned.validation
    if tuned.closed_gates is not None:
        result["closed_gates"] = {**tuned.closed_gates}
    if tuned.skipped:
        result["skipped"] = tuned.skipped
    return result


def localize_run(
    config: LocalizeConfig, results: str | Path, *, progress: bool = True
) -> tuple[HeadScores, LocalizeRecord]:
    """Localize as a configuration says, unless that has been done; its task model is made first where it is missing.

    Args:
        config: of the run.
        results: the results folder, which gets the scores as `scores/NAME.json`.
        progress: whether to show progress bars.

    Raises:
        UserError: the run is not possible.
    """
    results = Path(results)
    path = results / "scores" / f"{config.name}.json"
    record = reusable(config, results, LocalizeRecord)
    if record is not None and (scores := _stored_scores(path, record)):
        return scores, record
    task: str | Path = config.task_model if isinstance(config.task_model, str) else ""
    if isinstance(config.task_model, FinetuneConfig):
        task = finetune_run(config.task_model, results, progress=progress)[1]
    make_folder(path.parent)
    with _held(results, "localize", config.name):
        record = reusable(config, results, LocalizeRecord)
        if record is not None and (scores := _stored_scores(path, record)):
            return scores, record
        with set_aside(config, results), _recorded(config, results, task=task) as outcome:
            scores = _scores(config, task, progress)
            write_whole(path, json.dumps(scores.dump(), indent=1) + "\n")
            layout: Any = asdict(scores.layout)
            result: LocalizeResult = {"scores": path.name, "values": scores.values.tolist(), "layout": layout}
            if scores.compared_in:
                result["compared_in"] = scores.compared_in
            outcome.result = result
        return scores, outcome.written(LocalizeRecord)


def _stored_scores(path: Path, record: LocalizeRecord) -> HeadScores | None:
    """The scores of a localization, where their file exists and holds those of its record."""
    scores = HeadScores.load(path) if path.exists() else None
    return scores if scores is not None and scores.values.tolist() == record.result["values"] else None


def _scores(config: LocalizeConfig, task: str | Path, progress: bool) -> HeadScores:
    """Score the heads: by the outputs of the model's heads where the metric is of these, else by the weights."""
    if config.metric in RESULT_METRICS:
        on: dict[str, Any] = {"device": config.device}
        on |= {} if config.dataset is None else config.model_dump(include={"dataset", "questions", "max_lost"})
        return select_by(config.metric, config.base, task, **on, progress=progress)
    return localize(
        config.base,
        task,
        metric=config.metric,
        head_matrix=config.head_matrix,
        tau=config.tau,
        ground=config.ground,
        progress=progress,
    )


def evaluate_run(config: EvaluateConfig, results: str | Path, *, progress: bool = True) -> EvaluateRecord:
    """Evaluate as a configuration says, unless that has been done; its fine-tuning is made first where it is missing.

    Args:
        config: of the run.
        results: the results folder, which gets the answers as `samples/NAME.jsonl`.
        progress: whether to show progress bars.

    Raises:
        UserError: the run is not possible.
    """
    results = Path(results)

    def tuned() -> tuple[FinetuneRecord | None, str | Path]:
        if isinstance(config.model, FinetuneConfig):
            return finetune_run(config.model, results, progress=progress)
        return None, config.model

    def make(outcome: Outcome, before: tuple[FinetuneRecord | None, str | Path]) -> None:
        tuning, model = before
        measured = evaluate(
            model,
            config.tasks,
            quantization=config.quantization,
            batch_size=config.batch_size,
            precision=config.precision,
            device=config.device,
            limit=config.limit,
            template=config.template,
            allow_code=config.allow_code,
            split=config.split,
            max_lost=config.max_lost,
            progress=progress,
        )
        samples = results / "samples" / f"{config.name}.jsonl"
        make_folder(samples.parent)
        rows = [{"task": task, **row} for task, answers in measured.samples.items() for row in answers]
        write_whole(samples, "".join(json.dumps(row) + "\n" for row in rows))
        result = _evaluate_result(config, measured, samples.name)
        outcome.data_sha256 = measured.hashes
        if tuning is not None:
            outcome.trained_parameters = tuning.cost.trained_parameters
            outcome.total_parameters = tuning.cost.total_parameters
            result["training_seconds"] = tuning.cost.seconds
        outcome.result = result

    return _made_once(config, results, EvaluateRecord, make, tuned, lambda before: {"evaluated": before[1]})


def _evaluate_result(config: EvaluateConfig, measured: Evaluation, samples: str) -> EvaluateResult:
    result: EvaluateResult = {
        "scores": measured.scores,
        "metrics": measured.results,
        "questions": {task: len({row["doc_id"] for row in rows}) for task, rows in measured.samples.items()},
        "truncated": measured.truncated,
        "shots": measured.shots,
        "task_versions": measured.versions,
        "headline_metric": {task: headline(task) for task in config.tasks},
        "per_question": {task: _per_question(task, rows) for task, rows in measured.samples.items()},
        "samples": samples,
    }
    if measured.neutralized:
        result["neutralized"] = measured.neutralized
    return result


def _per_question(task: str, rows: list[dict[str, Any]]) -> PerQuestion:
    """What a paired test needs of each question, in the order of `doc_id`: small enough to be kept in the record.

    `correct` is by the task's headline metric, where that is one metric and right or wrong (IFEval's is the mean of
    four). Log-likelihoods are kept to seven digits.
    """
    metrics = headline(task)
    metric, _, graded = metrics[0].partition(",")
    rows = sorted((row for row in rows if row.get("filter", "none") in (graded, "none")), key=lambda row: row["doc_id"])
    kept: PerQuestion = {}
    # Programs that models wrote are run, and graded, by this package.
    grades: list[Any] = [
        row["outcome"] == "passed" if "outcome" in row else row.get(metric, row.get("acc")) for row in rows
    ]
    if len(metrics) == 1 and grades and all(grade in (0, 1) for grade in grades):
        kept["correct"] = "".join(str(int(grade)) for grade in grades)
    names: tuple[Literal["answer_loglikelihood", "loglikelihood", "tokens"], ...]
    names = ("answer_loglikelihood", "loglikelihood", "tokens")
    for name in names:
        if rows and all(name in row for row in rows):
            kept[name] = [float(f"{row[name]:.7g}") for row in rows]
    return kept


def recall_run(config: RecallConfig, results: str | Path, *, progress: bool = True) -> RecallRecord:
    """Measure how many of the heads that were changed by a known amount each metric finds.

    Args:
        config: of the run.
        results: the results folder.
        progress: whether to show progress bars.

    Raises:
        UserError: the run is not possible.
    """

    def make(outcome: Outcome, before: None) -> None:
        table = recall_by_metric(
            config.base,
            factors=config.factors,
            seeds=config.seeds,
            share=config.share,
            background=config.background,
            progress=progress,
        )
        rows: Any = table.to_dict("records")
        result: RecallResult = {
            "rows": rows,
            "peaks": {kind: values.tolist() for kind, values in peaks(config.base).items()},
        }
        outcome.result = result

    return _made_once(config, results, RecallRecord, make, lambda: None)


def importance_run(config: ImportanceConfig, results: str | Path, *, progress: bool = True) -> ImportanceRecord:
    """Measure importance and scores of the heads of a task model, which is made first where it is missing.

    Args:
        config: of the run.
        results: the results folder.
        progress: whether to show progress bars.

    Raises:
        UserError: the run is not possible.
    """

    def make(outcome: Outcome, before: tuple[FinetuneRecord, Path]) -> None:
        folder = before[1]
        model, examples, data = model_and_batches(
            folder,
            config.task_model.dataset,
            config.questions,
            size=config.batch_size,
            max_lost=config.max_lost,
            device=config.device,
        )
        lost = importance(model, examples, progress=progress)
        scores = {
            name: localize(config.base, folder, head_matrix=config.head_matrix, **METRIC_VARIANTS[name]).values.tolist()
            for name in COMPARED
        }
        outcome.data_sha256[config.task_model.dataset] = data
        result: ImportanceResult = {"importance": lost.tolist(), "scores": scores}
        outcome.result = result

    return _made_once(
        config,
        results,
        ImportanceRecord,
        make,
        lambda: finetune_run(config.task_model, results, progress=progress),
        lambda before: {"task": before[1]},
    )


def embed_run(config: EmbedConfig, results: str | Path, *, progress: bool = True) -> EmbedRecord:
    """Embed the questions of data sets by a model, on three principal axes.

    Args:
        config: of the run.
        results: the results folder.
        progress: whether to show progress bars.

    Raises:
        UserError: the run is not possible.
    """

    def make(outcome: Outcome, before: None) -> None:
        import torch

        model, tokenizer = load_model(config.base, dtype=torch.float32, device=config.device)
        questions = {name: training_examples(name, size=config.questions)["instruction"] for name in config.datasets}
        result: EmbedResult = {
            name: points.tolist() for name, points in principal(embed(model, tokenizer, questions, progress)).items()
        }
        outcome.result = result

    return _made_once(config, results, EmbedRecord, make, lambda: None)


#: What makes a run of each kind: by its configuration, the results folder, and whether to show `progress`.
RUNS: dict[Kind, Callable[..., Any]] = {
    "localize": localize_run,
    "finetune": finetune_run,
    "evaluate": evaluate_run,
    "recall": recall_run,
    "importance": importance_run,
    "embed": embed_run,
}
