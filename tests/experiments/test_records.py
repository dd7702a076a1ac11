"""Records: one a run, complete, found again, never half-written; what is done is not done twice."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
import typing
import weakref
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint

from alps_repro.data.datasets import data_hash, training_examples
from alps_repro.errors import UserError
from alps_repro.experiments import provenance, records, runs
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.records import SCORES, load_record, load_records, record_path, scores_hash, write_whole
from alps_repro.experiments.runs import embed_run, evaluate_run, finetune_run, importance_run, localize_run, recall_run
from alps_repro.localization.scores import HeadScores
from alps_repro.models.folders import model_hash
from alps_repro.models.loading import load_model
from alps_repro.training.finetune import Finetuned
from alps_repro.training.methods import LORA_RANK, METHODS
from alps_repro.training.recipe import Recipe

SCHEMA = Path(records.__file__).with_name("record.schema.json")
RECIPE = Recipe(max_steps=2, batch_size=2, micro_batch_size=2, learning_rate=1e-3)


@dataclass
class Chain:
    """A localization, an ALPS run in scope `heads` and its evaluation, in one results folder."""

    folder: Path
    base: Path
    localization: LocalizeConfig
    finetuning: FinetuneConfig
    evaluation: EvaluateConfig

    @property
    def path(self) -> dict[str, Path]:
        configs = {"localize": self.localization, "finetune": self.finetuning, "evaluate": self.evaluation}
        return {kind: record_path(self.folder / "records", kind, config.name) for kind, config in configs.items()}

    def run(self) -> Any:
        return evaluate_run(self.evaluation, self.folder, progress=False)


def make(folder: Path) -> Chain:
    base, task = tiny_checkpoint(folder / "base"), tiny_checkpoint(folder / "task", seed=1)
    localization = LocalizeConfig(base=str(base), task_model=str(task))
    finetuning = FinetuneConfig(
        base=str(base),
        dataset="chain_sum",
        method="alps",
        ratio=0.25,
        scope="heads",
        localization=localization,
        recipe=RECIPE,
    )
    evaluation = EvaluateConfig(model=finetuning, tasks=("chain_sum",), limit=3)
    return Chain(folder / "results", base, localization, finetuning, evaluation)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = make(tmp_path_factory.mktemp("chain"))
    chain.run()
    return chain


@pytest.fixture
def own(done: Chain, tmp_path: Path) -> Chain:
    """A copy of the finished chain to break; configurations name the same models."""
    shutil.copytree(done.folder, tmp_path / "results")
    return Chain(tmp_path / "results", done.base, done.localization, done.finetuning, done.evaluation)


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".locks" not in path.parts
    }


# The schema


def test_schema_file_is_the_schema() -> None:
    """On a difference: the schema changed, so write the file anew, and raise SCHEMA_VERSION if records do not fit."""
    assert SCHEMA.read_text() == json.dumps(records.schema(), indent=1, sort_keys=True) + "\n"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("kind", ["localize", "finetune", "evaluate"])
def test_real_records_fit_the_schema(done: Chain, kind: str, validator: jsonschema.Draft202012Validator) -> None:
    stored = json.loads(done.path[kind].read_text())
    validator.validate(stored)
    assert stored["kind"] == kind
    for name in stored:
        assert not validator.is_valid({**stored, name: object}), f"'{name}' is not looked at"
    for name in ("config", "provenance", "cost"):
        assert not validator.is_valid({**stored, name: {**stored[name], "new": 1}})
    assert not validator.is_valid({**stored, "new": 1})
    assert not validator.is_valid({**stored, "schema_version": records.SCHEMA_VERSION + 1})


def committed(every: int) -> list[Path]:
    """One in so many of the repository's records, and those of the rarer kinds."""
    found = sorted((Path(records.__file__).parents[2] / "results").rglob("records/*.json"))
    return [
        path for i, path in enumerate(found) if i % every == 0 or not path.name.startswith(("eval", "fine", "local"))
    ]


@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.long)])
def test_committed_records_are_of_their_types(every: int, validator: jsonschema.Draft202012Validator) -> None:
    """Each result as `results` says, with nothing left over; what is read and written again is equal."""
    kinds: dict[str, int] = {}
    for path in committed(every):
        record, stored = load_record(path), json.loads(path.read_text())
        validator.validate(stored)
        kinds[record.kind] = kinds.get(record.kind, 0) + 1
        assert type(record) is records.RECORDS[record.kind]
        assert type(record.config) is records.CONFIGS[record.kind]
        written = json.loads(record.model_dump_json())
        assert written.pop("config") == record.config.dump()
        assert written.pop("provenance").items() >= stored.pop("provenance").items()
        stored.pop("config")
        assert written == stored
        of = typing.get_type_hints(type(record), vars(records))["result"]
        assert TypeAdapter(of).validate_python(record.result) == record.result
        if typing.is_typeddict(of):
            assert of.__required_keys__ <= record.result.keys() <= of.__annotations__.keys()
    assert kinds.keys() == records.RECORDS.keys()


# What a record says


@pytest.mark.parametrize("kind", ["localize", "finetune", "evaluate"])
def test_provenance(done: Chain, kind: str) -> None:
    record = load_record(done.path[kind])
    assert record.status == "completed"
    assert record.error is None
    found = record.provenance
    checkout = Path(records.__file__).parents[2]
    if (checkout / ".git").exists():
        head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert found.commit == head.stdout.strip()
        assert isinstance(found.dirty, bool)
    else:
        assert found.commit is None
        assert found.dirty is None
    assert re.fullmatch("[0-9a-f]{64}", found.code)
    for package in ("alps-repro", "torch", "transformers", "peft", "lm-eval", "datasets", "reasoning-gym"):
        assert found.versions[package] == metadata.version(package)
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.threads >= 1
    assert found.processor
    assert found.system
    assert found.model_sha256
    assert 0 < record.cost.seconds < 1000
    assert record.cost.peak_memory_bytes > 50e6
    assert datetime.fromisoformat(record.finished).tzinfo == UTC


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks begin anew by /proc")
def test_peak_memory_is_the_runs_own(done: Chain, tmp_path: Path) -> None:
    np.ones(10**8)
    with records.recorded(tmp_path, done.finetuning) as outcome:
        before = provenance.peak_memory_bytes()
        np.ones(10**7)
    peak = outcome.record.cost.peak_memory_bytes
    assert 0.9 * 8e7 < peak - before < 2e8


def test_peaks_on_a_gpu_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    provenance.release_memory()
    assert called == []  # no GPU is touched by a process that has used none
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    provenance.release_memory()
    assert called == ["empty_cache", "reset_peak_memory_stats"]


@pytest.mark.parametrize("scope", ["heads", "all"])
def test_trained_model_is_released_before_the_next_run(
    scope: str, done: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = load_model(*args, **kwargs)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr("alps_repro.training.finetune.load_model", load)
    finetune_run(done.finetuning.model_copy(update={"scope": scope}), tmp_path, progress=False)
    provenance.release_memory()
    assert [model() for model in models] == [None]


def test_skipped_steps_are_recorded(done: Chain) -> None:
    stored = finetune_run(done.finetuning, done.folder, progress=False)[0].result
    assert "skipped" not in stored
    tuned = Finetuned(done.base, (1.0,), (), 1, 2, 3, "", skipped=4)
    assert runs._finetune_result(tuned)["skipped"] == 4


def test_records_hold_everything_asked(done: Chain) -> None:
    for kind, config in (
        ("localize", done.localization),
        ("finetune", done.finetuning),
        ("evaluate", done.evaluation),
    ):
        record = load_record(done.path[kind])
        assert record.config == config
        # Written out whole: defaults of a later version must not change what an old record says.
        assert json.loads(done.path[kind].read_text())["config"] == config.dump()


def test_hashes_and_counts_are_those_of_the_files(done: Chain) -> None:
    tuned = done.folder / "models" / done.finetuning.name
    finetuned, evaluated = load_record(done.path["finetune"]), load_record(done.path["evaluate"])
    localized = load_record(done.path["localize"])
    base, task = model_hash(done.base), model_hash(Path(done.localization.task_model))
    assert base != task
    assert localized.provenance.model_sha256 == {"base": base, "task": task}
    assert finetuned.provenance.model_sha256 == {"base": base, "tuned": model_hash(tuned)}
    assert evaluated.provenance.model_sha256 == {"base": base, "evaluated": model_hash(tuned)}
    seen = data_hash(training_examples("chain_sum", size=4, seed=0))
    assert finetuned.provenance.data_sha256 == {"chain_sum": seen, SCORES: scores_hash(localized.result)}
    files = finetuned.provenance.files_sha256
    assert files["base"]["tokenizer.json"] == hashlib.sha256((done.base / "tokenizer.json").read_bytes()).hexdigest()
    base_files = {"base/model.safetensors", "base/generation_config.json"}
    assert files["tuned"].keys() > {"adapter_model.safetensors", *base_files}
    assert re.fullmatch("[0-9a-f]{64}", evaluated.provenance.data_sha256["chain_sum"])

    trained = sum(value.numel() for value in load_file(tuned / "adapter_model.safetensors").values())
    total = sum(value.numel() for value in load_file(done.base / "model.safetensors").values())
    for record in (finetuned, evaluated):
        assert record.cost.trained_parameters == trained
        assert record.cost.total_parameters == total
    assert len(finetuned.result["losses"]) == RECIPE.max_steps
    assert finetuned.result["rank"] is None
    scores = HeadScores.load(done.folder / "scores" / localized.result["scores"])
    assert [tuple(head) for head in finetuned.result["heads"]] == list(scores.top(0.25))
    assert scores.values.tolist() == localized.result["values"]
    samples = (done.folder / "samples" / evaluated.result["samples"]).read_text().splitlines()
    assert {json.loads(line)["doc_id"] for line in samples} == {0, 1, 2}
    assert evaluated.result["questions"] == {"chain_sum": 3}


def test_headline_metrics_are_named(done: Chain) -> None:
    result = load_record(done.path["evaluate"]).result
    values = [result["metrics"]["chain_sum"][name] for name in result["headline_metric"]["chain_sum"]]
    assert result["scores"]["chain_sum"] == sum(values) / len(values)


def test_answers_question_by_question_are_in_the_record(done: Chain) -> None:
    """Paired tests need no samples: what they would take from them is kept, in the order of the questions."""
    result = load_record(done.path["evaluate"]).result
    samples = [json.loads(line) for line in (done.folder / "samples" / result["samples"]).read_text().splitlines()]
    rows = sorted((row for row in samples if row["filter"] == "flexible-extract"), key=lambda row: row["doc_id"])
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    kept = result["per_question"]["chain_sum"]
    assert kept.keys() == {"correct", "answer_loglikelihood"}
    assert kept["correct"] == "".join(str(int(row["exact_match"])) for row in rows)
    assert kept["answer_loglikelihood"] == pytest.approx([row["answer_loglikelihood"] for row in rows], rel=1e-6)
    assert sum(map(int, kept["correct"])) / 3 == result["scores"]["chain_sum"]
    mean = result["metrics"]["chain_sum"]["answer_loglikelihood,none"]
    assert sum(kept["answer_loglikelihood"]) / 3 == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("task", "rows", "kept"),
    [
        # A question is graded twice, and stands once, by the grade that counts; questions come in any order.
        (
            "gcd",
            [
                {"doc_id": 1, "filter": "flexible-extract", "exact_match": 1.0, "answer_loglikelihood": -0.123456789},
                {"doc_id": 1, "filter": "strict-match", "exact_match": 0.0, "answer_loglikelihood": -0.123456789},
                {"doc_id": 0, "filter": "strict-match", "exact_match": 0.0, "answer_loglikelihood": -2.0},
                {"doc_id": 0, "filter": "flexible-extract", "exact_match": 0.0, "answer_loglikelihood": -2.0},
            ],
            {"correct": "01", "answer_loglikelihood": [-2.0, -0.1234568]},
        ),
        ("world_facts", [{"doc_id": i, "filter": "none", "acc": float(i == 1)} for i in range(3)], {"correct": "010"}),
        # The number for all is a mean over subjects, that of a question is not.
        ("mmlu_dev", [{"doc_id": i, "filter": "none", "acc": float(i != 1)} for i in range(3)], {"correct": "101"}),
        (
            "prose",
            [{"doc_id": i, "filter": "none", "loglikelihood": -3.5 * i, "tokens": 10 + i} for i in (1, 0)],
            {"loglikelihood": [0.0, -3.5], "tokens": [10, 11]},
        ),
        # What is no yes or no is not taken for one.
        ("gcd", [{"doc_id": 0, "filter": "flexible-extract", "exact_match": 0.5}], {}),
    ],
)
def test_what_is_kept_of_a_question(task: str, rows: list[dict[str, Any]], kept: dict[str, Any]) -> None:
    assert runs._per_question(task, rows) == kept


@pytest.mark.parametrize(
    ("method", "rank"), [("lora", LORA_RANK), ("lora_matched", 5), ("random_matched", None), ("no_attn", None)]
)
def test_record_of_each_kind_of_method(
    done: Chain, tmp_path: Path, method: str, rank: int | None, validator: jsonschema.Draft202012Validator
) -> None:
    """`heads` where heads are trained, `rank` where LoRA is, and weights as many as were trained.

    The two highest heads have groups of their own, so 6 blocks of 8 · 32 weights; LoRA of rank 1 has 2 · (64 + 96).
    """
    localization = done.localization if METHODS[method].uses_scores else None
    config = done.finetuning.model_copy(update={"method": method, "localization": localization})
    record, model = finetune_run(config, tmp_path, progress=False)
    assert record.result["rank"] == rank
    assert (record.result["heads"] == ()) == (METHODS[method].rank is not None or method == "no_attn")
    (path,) = (tmp_path / "records").glob("finetune-*.json")
    validator.validate(json.loads(path.read_text()))
    if method == "no_attn":
        assert record.cost.trained_parameters == 0
        assert model == done.base
    else:
        saved = sum(value.numel() for value in load_file(model / "adapter_model.safetensors").values())
        assert record.cost.trained_parameters == saved


def test_code_is_of_what_measures_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that are compared have the same; a change to tables, notebooks and the like makes none of them old."""
    package = tmp_path / "alps_repro"
    shutil.copytree(Path(provenance.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(package / "experiments" / "provenance.py"))
    code = provenance._code.__wrapped__
    before, seen = code(), set()
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        text = path.read_bytes()
        path.write_bytes(text + b"#")
        if code() != before:
            seen.add(str(path.relative_to(package)))
        path.write_bytes(text)
    assert code() == before == provenance._code()
    # All that runs import, settings and recipes too; found without the package's own way to find it.
    (package / "__init__.py").write_text("")  # it names modules for type checking alone, which the finder follows
    found = ModuleFinder(path=[str(tmp_path)])
    found.run_script(str(package / "experiments" / "runs.py"))
    imported = {Path(module.__file__) for name, module in found.modules.items() if name.startswith("alps_repro")}
    read = {package / "experiments" / "record.schema.json"}
    assert seen == {str(path.relative_to(package)) for path in {*imported, *read, package / "experiments" / "runs.py"}}
    assert {"settings.py", "training/recipe.py", "tuner/rows.py", "evaluation/tasks/offline.py"} < seen
    assert not {"analysis/tables.py", "analysis/claims.py", "report/build.py", "cli.py", "experiments/plan.py"} & seen


# Once is enough


def test_run_again_does_nothing(done: Chain) -> None:
    before = state(done.folder)
    record, model = finetune_run(done.finetuning, done.folder, progress=False)
    assert record == load_record(done.path["finetune"])
    assert model == done.folder / "models" / done.finetuning.name
    scores, _ = localize_run(done.localization, done.folder, progress=False)
    assert scores.metric == "pad"
    done.run()
    assert state(done.folder) == before


@pytest.mark.parametrize(
    ("lost", "made"),
    [
        ("models", ["finetune"]),
        ("scores", ["localize"]),
    ],
)
def test_what_is_lost_is_made_again(own: Chain, lost: str, made: list[str]) -> None:
    """And the same comes out of it: the run is a function of its configuration."""
    before = state(own.folder)
    shutil.rmtree(own.folder / lost)
    if lost == "scores":
        localize_run(own.localization, own.folder, progress=False)
    else:
        finetune_run(own.finetuning, own.folder, progress=False)
    after = state(own.folder)
    assert after.keys() == before.keys()
    rewritten = {name for name in after if after[name][0] != before[name][0]}
    assert {name.split("/")[1].split("-")[0] for name in rewritten if name.startswith("records/")} == set(made)
    for name in after:
        if not name.startswith("records/"):
            assert after[name][1] == before[name][1], f"{name} came out otherwise"


def test_samples_are_not_missed(own: Chain) -> None:
    """They are left out of what is published: the record alone says what came out, question by question."""
    shutil.rmtree(own.folder / "samples")
    before = state(own.folder)
    assert own.run() == load_record(own.path["evaluate"])
    assert state(own.folder) == before


def test_another_question_is_another_run(own: Chain) -> None:
    other = own.evaluation.model_copy(update={"limit": 2})
    before = state(own.folder)
    evaluate_run(other, own.folder, progress=False)
    after = state(own.folder)
    assert before.items() <= after.items(), "the finetuning and the first evaluation stay as they are"
    assert len(after) == len(before) + 2


def test_model_without_record_is_not_taken_for_the_run(own: Chain) -> None:
    """It is the rest of a run that was cut off before its record: made again, and the same comes out."""
    own.path["finetune"].unlink()
    (weights,) = (own.folder / "models").glob("*alps*/*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    finetune_run(own.finetuning, own.folder, progress=False)
    assert weights.read_bytes() == whole


# Runs that leave nothing but a record


def about_the_base(done: Chain) -> dict[str, tuple[Any, Any]]:
    """{kind: (configuration, what runs it)}"""
    full = FinetuneConfig(base=str(done.base), dataset="chain_sum", method="full", ratio=1.0, recipe=RECIPE)
    return {
        "recall": (RecallConfig(base=str(done.base), factors=(5.0,), seeds=(0,), share=0.25), recall_run),
        "importance": (ImportanceConfig(base=str(done.base), task_model=full, questions=2), importance_run),
        "embed": (EmbedConfig(base=str(done.base), datasets=("chain_sum", "gcd"), questions=3), embed_run),
    }


@pytest.mark.parametrize("kind", ["recall", "importance", "embed"])
def test_run_that_leaves_a_record_alone(
    done: Chain, tmp_path: Path, kind: str, validator: jsonschema.Draft202012Validator
) -> None:
    config, run = about_the_base(done)[kind]
    record = run(config, tmp_path, progress=False)
    path = record_path(tmp_path / "records", kind, config.name)
    assert load_record(path) == record
    assert (record.kind, record.status, record.config) == (kind, "completed", config)
    validator.validate(json.loads(path.read_text()))
    assert record.provenance.model_sha256["base"] == model_hash(done.base)
    if kind == "recall":
        assert {(row["factor"], row["seed"]) for row in record.result["rows"]} == {(5.0, 0)}
        assert all(0 <= row["recall"] <= 1 for row in record.result["rows"])
    elif kind == "importance":
        shapes = {np.shape(values) for values in [record.result["importance"], *record.result["scores"].values()]}
        assert shapes == {(2, 4)}
        (trained,) = load_records(tmp_path / "records", "finetune")
        assert trained.config == config.task_model
        assert record.provenance.model_sha256["task"] == trained.provenance.model_sha256["tuned"]
        assert record.provenance.data_sha256.keys() == {"chain_sum"}
    else:
        assert {name: np.shape(points) for name, points in record.result.items()} == {
            "chain_sum": (3, 3),
            "gcd": (3, 3),
        }
    before = state(tmp_path)
    assert run(config, tmp_path, progress=False) == record
    assert state(tmp_path) == before


def test_failure_of_such_a_run_is_recorded(tmp_path: Path) -> None:
    config = RecallConfig(base=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no checkpoint"):
        recall_run(config, tmp_path, progress=False)
    path = record_path(tmp_path / "records", "recall", config.name).with_suffix(".failed.json")
    assert load_record(path).status == "failed"
    assert load_records(tmp_path / "records") == []


# Failures


@pytest.fixture
def breakable(tmp_path: Path) -> Chain:
    """A finished finetuning whose base can be damaged."""
    chain = make(tmp_path)
    finetune_run(chain.finetuning, chain.folder, progress=False)
    return chain


def test_failure_is_recorded_and_replaces_nothing(breakable: Chain, validator: jsonschema.Draft202012Validator) -> None:
    chain = breakable
    completed = chain.path["localize"]  # it reads the base first
    failed = completed.with_suffix(".failed.json")
    shutil.rmtree(chain.folder / "models")
    weights = (chain.base / "model.safetensors").read_bytes()
    (chain.base / "model.safetensors").write_bytes(weights[:1000])
    before = state(chain.folder)

    with pytest.raises(UserError) as caught:
        finetune_run(chain.finetuning, chain.folder, progress=False)
    after = state(chain.folder)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {f"records/{failed.name}"}
    stored = json.loads(failed.read_text())
    validator.validate(stored)
    assert stored["status"] == "failed"
    assert stored["result"] == {}
    assert stored["error"] == str(caught.value)
    assert stored["config"] == chain.localization.dump()
    # A table made now is made of what did come out.
    assert [record.status for record in load_records(chain.folder / "records")] == ["completed", "completed"]

    (chain.base / "model.safetensors").write_bytes(weights)
    finetune_run(chain.finetuning, chain.folder, progress=False)
    assert not failed.exists(), "a failure that has been mended is no longer reported"
    assert load_record(completed).result == load_record(completed).result


def stop(folder: Path, error: BaseException) -> None:
    with records.recorded(folder, LocalizeConfig(base="m", task_model="t")) as outcome:
        outcome.result = {"half": True}
        raise error


def test_interruption_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop(tmp_path, KeyboardInterrupt())
    (path,) = tmp_path.iterdir()
    record = load_record(path)
    assert path.name.endswith(".failed.json")
    assert (record.status, record.result, record.error) == ("failed", {}, "KeyboardInterrupt")


def test_error_of_many_lines_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        stop(tmp_path, RuntimeError("\nfirst line\nsecond line\n"))
    (path,) = tmp_path.iterdir()
    assert load_record(path).error == "first line"


# Files


def test_write_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("place", ["file/a.json", "missing/a.json", "folder"])
def test_write_where_nothing_can_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = state(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written \(.+\): make room or choose another folder"):
        write_whole(tmp_path / place, "text")
    assert state(tmp_path) == before


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the write fails half-way."""
    path = tmp_path / "a.json"
    path.write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from alps_repro.errors import UserError\n"
        "from alps_repro.experiments.records import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_whole(Path(sys.argv[1]), 'x' * 100_000)\n"
        "except UserError as error:\n    print(error)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert shown.stdout.count("\n") == 1
    assert "a.json' cannot be written (File too large)" in shown.stdout
    assert state(tmp_path).keys() == {"a.json"}
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "has schema version None"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 0'), "has schema version 0.*reads 1"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "has schema version 2.*reads 1"),
        (lambda text: text.replace('"kind": "finetune"', '"kind": "train"'), "does not fit its schema.*kind"),
        (lambda text: text.replace('"method": "alps"', '"method": "alpz"'), "does not fit its schema.*alpz"),
        (lambda text: text.replace('"cost"', '"costs"'), "does not fit its schema"),
    ],
)
def test_unreadable_record_is_refused_in_one_sentence(own: Chain, change: Any, message: str) -> None:
    path = own.path["finetune"]
    path.write_text(change(path.read_text()))
    before = state(own.folder)
    for read in (
        lambda: load_record(path),
        lambda: load_records(own.folder / "records"),
        # It may be somebody's result: it is not overwritten by running again.
        lambda: finetune_run(own.finetuning, own.folder, progress=False),
    ):
        with pytest.raises(UserError, match=f"(?s){message}.*remove it and run again") as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert state(own.folder) == before


def test_load_records_takes_the_kind_asked_for(done: Chain) -> None:
    folder = done.folder / "records"
    assert [record.kind for record in load_records(folder)] == ["evaluate", "finetune", "localize"]
    for kind in ("evaluate", "finetune", "localize"):
        assert [record.kind for record in load_records(folder, kind)] == [kind]
    assert load_records(folder / "nowhere") == []


def test_saved_record_reads_back_the_same(done: Chain, tmp_path: Path) -> None:
    record = load_record(done.path["evaluate"])
    again = copy.deepcopy(record)
    assert again.save(tmp_path).read_bytes() == done.path["evaluate"].read_bytes()


def test_what_a_paired_test_is_told_of_the_paper_s_benchmarks() -> None:
    programs = [{"doc_id": i, "filter": "create_test", "outcome": end} for i, end in enumerate(["passed", "timed out"])]
    assert runs._per_question("humaneval", programs) == {"correct": "10"}
    options = [{"doc_id": i, "filter": "none", "acc": right} for i, right in enumerate([0.0, 1.0])]
    assert runs._per_question("mmlu_anatomy", options) == {"correct": "01"}
    # IFEval's number is the mean of four: one of them would be another test.
    levels = [{"doc_id": 0, "filter": "none", "prompt_level_strict_acc": True, "prompt_level_loose_acc": True}]
    assert runs._per_question("ifeval", levels) == {}
