"""Runs that are done once: each makes its predecessors if they are missing, and leaves a record.

A results folder holds `records/` (JSON), `scores/` (of localizations), `samples/` (what models answered, question
by question), `models/` (weights), and what is made from the records: `tables/`, `figures/`, `notebooks/`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alps_repro.data.datasets import training_examples
from alps_repro.errors import UserError, explained
from alps_repro.evaluation.benchmarks import headline
from alps_repro.evaluation.harness import evaluate
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
    OtherRun,
    Outcome,
    Record,
    find_record,
    load_record,
    predecessors,
    record_path,
    recorded,
    scores_hash,
    write_whole,
)
from alps_repro.localization.ablation import importance
from alps_repro.localization.recovery import COMPARED, READINGS, peaks, recall_by_metric
from alps_repro.localization.scores import HeadScores, localize
from alps_repro.localization.selectors import RESULT_METRICS, model_and_batches, select_by
from alps_repro.models.embeddings import embed, principal
from alps_repro.models.folders import file_hashes, model_hash, resolve
from alps_repro.models.loading import load_model
from alps_repro.training.finetune import finetune


def done(config: Config, results: str | Path) -> Record | None:
    """The record of a run that may be taken for it; None where there is none.

    Beyond what `find_record` compares, every file of the models that the configuration names, and of a tuned model
    that lies there, is compared with what the record's run read or made: by content, whatever its name, size and time.

    Raises:
        OtherRun: names what differs.
        UserError: a model that the run was made with is not there to be compared.
    """
    results = Path(results)
    record = find_record(results / "records", config)
    if record is not None and (differs := _changed(record, results)):
        raise OtherRun(record_path(results / "records", record.kind, record.name), differs)
    return record


def _done(config: Config, results: Path) -> Record | None:
    """`done`, and None where what is there is of another run."""
    try:
        record = done(config, results)
    except OtherRun:
        return None
    if record is not None:  # a later try may have failed, with inputs that are no longer there
        record_path(results / "records", record.kind, record.name).with_suffix(".failed.json").unlink(missing_ok=True)
    return record


def _models(config: Config) -> dict[str, str]:
    """The models that a configuration names, by the role that they have in its record."""
    if isinstance(config, EvaluateConfig):
        return {"evaluated": config.model} if isinstance(config.model, str) else {"base": config.model.base}
    task = getattr(config, "task_model", None)
    return {"base": config.base, **({"task": task} if isinstance(task, str) else {})}


def _changed(record: Record, results: Path) -> list[str]:
    """What of a run's inputs is no longer what the run was made with, a phrase each."""
    found = []
    read, hashes = record.provenance.files_sha256, record.provenance.model_sha256
    for role, name in _models(record.config).items():
        if role in read:
            now = file_hashes(name)
            files = [file for file in sorted({*now, *read[role]}) if now.get(file) != read[role].get(file)]
            found += [f"{file} of the {role} model '{name}' has changed" for file in files]
        elif role in hashes and model_hash(resolve(name)) != hashes[role]:  # of a record without hashes of files
            found.append(f"the {role} model '{name}' has changed")
    tuned = results / "models" / record.name
    if isinstance(record.config, FinetuneConfig) and tuned.exists():
        same = file_hashes(tuned) == read["tuned"] if "tuned" in read else model_hash(tuned) == hashes["tuned"]
        found += [] if same else [f"the tuned model '{tuned}' has changed"]
    for before in predecessors(record.config).values():
        if made := find_record(results / "records", before):
            found += _changed(made, results)
    return list(dict.fromkeys(found))


@contextmanager
def _set_aside(config: Config, results: Path) -> Iterator[None]:
    """While a run is made again, what lies in its place and is of another run is out of the way, and stays there.

    Where the new run fails, everything is put back.
    """
    path, differs = record_path(results / "records", KINDS[type(config)], config.name), None
    try:
        done(config, results)
    except OtherRun as error:
        differs = error.differs
    if differs is None:
        yield
        return
    folder = results / "superseded" / f"{path.stem}-{re.sub('[^0-9]', '', load_record(path).finished)[:14]}"
    _say_again(path, differs, folder)
    moved = _moved(config, results, folder)
    try:
        yield
    except BaseException:
        for place, kept in moved.items():
            kept.replace(place)
        folder.rmdir()
        raise


def _say_again(path: Path, differs: Sequence[str], folder: Path) -> None:
    shown = "; ".join(differs[:3]) + (f"; and {len(differs) - 3} more" if len(differs) > 3 else "")
    said = f"{path.stem} is made again ({shown}); what was there before is kept in '{folder}'."
    print(said, file=sys.stderr, flush=True)


def _moved(config: Config, results: Path, folder: Path) -> dict[Path, Path]:
    """Move a run's record and what it made to a folder: {place: where it is now}."""
    _prepare(folder)
    made = {LocalizeConfig: ("scores", ".json"), EvaluateConfig: ("samples", ".jsonl"), FinetuneConfig: ("models", "")}
    places = [record_path(results / "records", KINDS[type(config)], config.name)]
    if type(config) in made:
        of, suffix = made[type(config)]
        places.append(results / of / f"{config.name}{suffix}")
    moved = {place: folder / place.name for place in places if place.exists()}
    for place, kept in moved.items():
        place.replace(kept)
    return moved


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
    if config.method == "no_attn" and config.scope == "heads":
        model = resolve(config.base)
    record = _done(config, results)
    if record is not None and model.exists():
        return record, model
    scores = localization = None
    if config.localization is not None:
        scores, localization = localize_run(config.localization, results, progress=progress)
    _prepare(results / "models")
    with _held(results, "finetune", config.name):
        record = _done(config, results)
        if record is not None and model.exists():
            return record, model
        with _set_aside(config, results):
            return _finetune(config, results, model, scores, localization, record, progress)


def _finetune(
    config: FinetuneConfig,
    results: Path,
    model: Path,
    scores: HeadScores | None,
    localization: Record | None,
    earlier: Record | None,
    progress: bool,
) -> tuple[Record, Path]:
    """earlier: the record of this run, whose model is not there any more."""
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
            scores=scores,
            quantization=config.quantization,
            seed=config.seed,
            choice_seed=config.choice_seed,
            recipe=config.recipe,
            progress=progress,
        )
        outcome.result = {"heads": tuned.heads, "losses": tuned.losses, "tokens": tuned.tokens, "rank": tuned.rank}
        outcome.result["rows"] = tuned.rows
        if tuned.validation:
            outcome.result["validation"] = tuned.validation
        if tuned.closed_gates is not None:
            outcome.result["closed_gates"] = tuned.closed_gates
        outcome.model_sha256["tuned"] = model_hash(tuned.path)
        outcome.files_sha256["tuned"] = file_hashes(tuned.path)
        if tuned.data_sha256:
            outcome.data_sha256[config.dataset] = tuned.data_sha256
        if localization is not None:
            outcome.data_sha256[SCORES] = scores_hash(localization.result)
        outcome.trained_parameters, outcome.total_parameters = tuned.trained_parameters, tuned.total_parameters
        if earlier is not None and earlier.provenance.model_sha256["tuned"] != outcome.model_sha256["tuned"]:
            # Its evaluations were of the model that is gone: they, too, will be found to be of another run.
            path = record_path(results / "records", "finetune", config.name)
            folder = results / "superseded" / f"{path.stem}-{re.sub('[^0-9]', '', earlier.finished)[:14]}"
            _say_again(path, ["its model, made here again, is another one"], folder)
            _prepare(folder)
            path.replace(folder / path.name)
    return outcome.record, model


def localize_run(config: LocalizeConfig, results: str | Path, *, progress: bool = True) -> tuple[HeadScores, Record]:
    """Localize as `config` says, unless that has been done; the task model's run is made first where it is missing."""
    results = Path(results)
    path = results / "scores" / f"{config.name}.json"
    record = _done(config, results)
    if record is not None and (scores := _stored_scores(path, record)):
        return scores, record
    task: str | Path = config.task_model if isinstance(config.task_model, str) else ""
    if isinstance(config.task_model, FinetuneConfig):
        task = finetune_run(config.task_model, results, progress=progress)[1]
    _prepare(path.parent)
    with _held(results, "localize", config.name):
        record = _done(config, results)
        if record is not None and (scores := _stored_scores(path, record)):
            return scores, record
        with _set_aside(config, results):
            return _localize(config, results, task, path, progress)


def _stored_scores(path: Path, record: Record) -> HeadScores | None:
    """The scores of a localization, where they lie there and are those of its record."""
    scores = HeadScores.load(path) if path.exists() else None
    return scores if scores is not None and scores.values.tolist() == record.result["values"] else None


def _localize(
    config: LocalizeConfig, results: Path, task: str | Path, path: Path, progress: bool
) -> tuple[HeadScores, Record]:
    with _recorded(config, results, task=task) as outcome:
        if config.metric in RESULT_METRICS:
            asked = {"device": config.device}
            asked |= {} if config.dataset is None else config.model_dump(include={"dataset", "questions", "max_lost"})
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
        outcome.result = {"scores": path.name, "values": scores.values.tolist(), "layout": asdict(scores.layout)}
        if scores.compared_in:
            outcome.result["compared_in"] = scores.compared_in
    return scores, outcome.record


@contextmanager
def _recorded(config: Config, results: Path, **made: str | Path) -> Iterator[Outcome]:
    """`recorded`, with the hashes of the models that a run reads: those it names, and those `made` for it, by role.

    Raises:
        UserError: a model was changed while the run was at work.
    """
    with recorded(results / "records", config) as outcome:
        read = {**_models(config), **made}
        before = {role: (model_hash(resolve(name)), file_hashes(name)) for role, name in read.items()}
        outcome.model_sha256 = {role: whole for role, (whole, _) in before.items()}
        outcome.files_sha256 = {role: files for role, (_, files) in before.items()}
        yield outcome
        for role, name in read.items():
            if file_hashes(name) != before[role][1]:
                raise UserError(f"The {role} model '{name}' was changed while the run read it: run again.")


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
            dtype=config.dtype,
            device=config.device,
            limit=config.limit,
            template=config.template,
            allow_code=config.allow_code,
            split=config.split,
            max_lost=config.max_lost,
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
            "truncated": found.truncated,
            "shots": found.shots,
            "task_versions": found.versions,
            "headline_metric": {task: headline(task) for task in config.tasks},
            "per_question": {task: _per_question(task, rows) for task, rows in found.samples.items()},
            "samples": samples.name,
        }
        if found.neutralized:
            outcome.result["neutralized"] = found.neutralized
        outcome.data_sha256 = found.hashes
        if tuning is not None:
            outcome.trained_parameters = tuning.cost.trained_parameters
            outcome.total_parameters = tuning.cost.total_parameters
            outcome.result["training_seconds"] = tuning.cost.seconds

    return _made_once(config, results, make, tuned, lambda before: {"evaluated": before[1]})


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
    models: Callable[[Any], dict[str, str | Path]] = lambda before: {},
) -> Record:
    """The record of a run; where it is not there, `make` fills it in with what `first` gives.

    first: makes the runs that come before, each with a record and a time of its own. models: of these, by role.
    """
    results, kind = Path(results), KINDS[type(config)]
    if (record := _done(config, results)) is not None:
        return record
    before = first()
    _prepare(results / "records")
    with _held(results, kind, config.name):
        if (record := _done(config, results)) is not None:
            return record
        with _set_aside(config, results), _recorded(config, results, **models(before)) as outcome:
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
        peaked = {kind: values.tolist() for kind, values in peaks(config.base).items()}
        outcome.result = {"rows": found.to_dict("records"), "peaks": peaked}

    return _made_once(config, results, make)


def importance_run(config: ImportanceConfig, results: str | Path, *, progress: bool = True) -> Record:
    """Importance and scores of the heads of a task model, which is made first where it is missing.

    `result["importance"]`: nats per counted token, (layers, heads). `result["scores"]`: {metric: (layers, heads)}.
    """

    def make(outcome: Outcome, before: tuple[Record, Path]) -> None:
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
            name: localize(config.base, folder, head_matrix=config.head_matrix, **READINGS[name]).values.tolist()
            for name in COMPARED
        }
        outcome.data_sha256[config.task_model.dataset] = data
        outcome.result = {"importance": lost.tolist(), "scores": scores}

    return _made_once(
        config,
        results,
        make,
        lambda: finetune_run(config.task_model, results, progress=progress),
        lambda before: {"task": before[1]},
    )


def embed_run(config: EmbedConfig, results: str | Path, *, progress: bool = True) -> Record:
    """Where a model puts the questions of data sets; `result`: {data set: three principal coordinates a question}."""

    def make(outcome: Outcome, before: None) -> None:
        import torch

        model, tokenizer = load_model(config.base, dtype=torch.float32, device=config.device)
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
