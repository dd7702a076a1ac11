"""Verification: a record is equal where it was made, held by its intervals elsewhere, and found out when doctored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_checkpoint

from alps_repro.analysis.verify import Verification, verify
from alps_repro.errors import UserError
from alps_repro.experiments import runs
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.records import record_path
from alps_repro.training.recipe import Recipe

RECIPE = Recipe(max_steps=2, batch_size=2, micro_batch_size=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Records of a chain: a task model is trained, heads are localized and trained, the result is evaluated."""
    folder = tmp_path_factory.mktemp("verify")
    base = str(tiny_checkpoint(folder / "base"))
    shared = {"base": base, "dataset": "chain_sum", "recipe": RECIPE}
    full = FinetuneConfig(method="full", ratio=1.0, scope="all", **shared)
    localization = LocalizeConfig(base=base, task_model=full)
    alps = FinetuneConfig(method="alps", ratio=0.25, scope="heads", localization=localization, **shared)
    evaluation = EvaluateConfig(model=alps, tasks=("chain_sum",), limit=8)
    runs.evaluate_run(evaluation, folder / "results", progress=False)
    configs = {"localize": localization, "finetune": alps, "evaluate": evaluation}
    return {kind: record_path(folder / "results" / "records", kind, config.name) for kind, config in configs.items()}


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Path:
    """A folder in which the chain's predecessors are made a second time, and then lie for all tests."""
    folder = tmp_path_factory.mktemp("again")
    assert verify(paths["finetune"], folder, progress=False).holds
    return folder


@pytest.fixture
def doctored(paths: dict[str, Path], again: Path, tmp_path: Path) -> Callable[..., Verification]:
    """Verify a changed copy of a record, on the predecessors of `again`."""

    def run(kind: str, change: Callable[[dict[str, Any]], Any]) -> Verification:
        stored = json.loads(paths[kind].read_text())
        change(stored)
        path = tmp_path / "doctored.json"
        path.write_text(json.dumps(stored))
        record_path(again / "records", kind, stored["name"]).unlink(missing_ok=True)
        return verify(path, again, progress=False)

    return run


def elsewhere(record: dict[str, Any]) -> None:
    record["provenance"]["processor"] = "Another processor"


def metric(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["result"]["metrics"]["chain_sum"].update({name: value})


def test_record_is_reproduced_from_nothing(paths: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = verify(paths["evaluate"], progress=False)
    assert found.holds
    assert found.environment == []
    assert found.lines()[-1] == "The record is reproduced bit for bit."
    assert len(found.lines()) == 3
    assert not list(tmp_path.iterdir()), "the temporary folder is removed"


@pytest.mark.parametrize("kind", ["localize", "finetune", "evaluate"])
def test_every_kind_is_equal_where_it_was_made(doctored: Any, kind: str) -> None:
    found = doctored(kind, lambda record: None)
    assert found.holds
    assert found.environment == []


@pytest.mark.parametrize("kind", ["localize", "finetune", "evaluate"])
def test_every_kind_is_held_by_intervals_elsewhere(doctored: Any, kind: str) -> None:
    found = doctored(kind, elsewhere)
    assert found.holds
    assert len(found.environment) == 1
    assert found.environment[0].startswith("processor: Another processor in the record, ")
    assert any("within" in line for line in found.checked)
    assert "model base: the same" in found.checked
    assert found.lines()[0].startswith("The environment differs from the record's")
    assert found.lines()[-1] == "The record holds."


def test_changed_metric_is_found_out(doctored: Any) -> None:
    found = doctored("evaluate", metric("answer_loglikelihood,none", -1.25))
    assert not found.holds
    (line,) = found.wrong
    assert line.startswith("metrics chain_sum answer_loglikelihood,none: -1.25 in the record, ")
    assert found.lines()[-1].startswith("The record does not hold")
    assert f"  WRONG {line}" in found.lines()


def test_changed_metric_outside_its_interval_is_found_out_elsewhere(doctored: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        elsewhere(record)
        metric("exact_match,strict-match", 0.75)(record)

    found = doctored("evaluate", change)
    (line,) = found.wrong
    assert line.startswith("chain_sum exact_match,strict-match: 0.75 in the record, 0 here, outside 0.409")
    assert line.endswith("(Wilson's 95 % interval over 8 questions)")
    assert found.lines()[-1].endswith("its table's interval over seeds says how much runs differ.")


def test_changed_metric_with_a_standard_error_is_held_by_three(doctored: Any) -> None:
    def change(by: float) -> Callable[[dict[str, Any]], None]:
        def shift(record: dict[str, Any]) -> None:
            elsewhere(record)
            metrics = record["result"]["metrics"]["chain_sum"]
            metrics["answer_loglikelihood,none"] += by * metrics["answer_loglikelihood_stderr,none"]

        return shift

    assert doctored("evaluate", change(2.5)).holds
    (line,) = doctored("evaluate", change(3.5)).wrong
    assert line.startswith("chain_sum answer_loglikelihood,none: ")
    assert line.endswith("(3 standard errors)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["result"]["losses"].__setitem__(0, 9.0), "losses[0]: 9.0 in the record, "),
        (lambda r: r["result"].pop("tokens"), "tokens: nothing in the record, "),
        (lambda r: r["provenance"]["model_sha256"].update(tuned="0" * 64), "hash of model tuned: 000"),
        (lambda r: r["cost"].update(trained_parameters=1), "trained_parameters: 1 in the record, "),
    ],
)
def test_anything_changed_is_found_out(doctored: Any, change: Any, words: str) -> None:
    (line,) = doctored("finetune", change).wrong
    assert line.startswith(words)


def test_time_may_differ(doctored: Any) -> None:
    assert doctored("evaluate", lambda record: record["result"].update(training_seconds=1e9)).holds


def test_other_data_or_base_is_wrong_everywhere(doctored: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        elsewhere(record)
        record["provenance"]["data_sha256"]["chain_sum"] = "0" * 64
        record["provenance"]["model_sha256"]["base"] = "0" * 64

    assert doctored("evaluate", change).wrong == [
        "data chain_sum: different from the record",
        "model base: different from the record",
    ]


def test_versions_code_and_threads_are_environment(doctored: Any) -> None:
    def change(record: dict[str, Any]) -> None:
        record["provenance"]["versions"]["torch"] = "1.0"
        record["provenance"]["code"] = None
        record["provenance"]["threads"] = 3

    threads = torch.get_num_threads()
    found = doctored("localize", change)
    assert torch.get_num_threads() == threads, "what was set for the run is set back"
    assert found.again.provenance.threads == 3
    assert [line.split(":")[0] for line in found.environment] == ["code", "torch"]
    assert found.environment[0].startswith("code: none in the record, ")


def test_many_wrong_numbers_are_counted(doctored: Any) -> None:
    found = doctored("localize", lambda record: record["result"].update(values=[[1.0] * 40] * 2))
    assert len(found.wrong) > 60
    assert len(found.lines()) < 30
    assert any(line.strip().startswith("and ") for line in found.lines())


def test_folder_with_the_same_record_is_refused(paths: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="holds a record of this run"):
        verify(paths["evaluate"], paths["evaluate"].parents[1])


def test_failed_and_missing_records_are_refused(paths: dict[str, Path], tmp_path: Path) -> None:
    stored = {**json.loads(paths["evaluate"].read_text()), "status": "failed", "result": {}, "error": "no disk"}
    path = tmp_path / "evaluate-x.failed.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="of a failed run"):
        verify(path)
    with pytest.raises(UserError, match="cannot be read"):
        verify(tmp_path / "nowhere.json")


def test_command(paths: dict[str, Path], again: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from alps_repro.cli import app

    def run(path: Path) -> Any:
        record_path(again / "records", "evaluate", json.loads(path.read_text())["name"]).unlink(missing_ok=True)
        return CliRunner().invoke(app, ["verify", str(path), "--results", str(again)])

    good = run(paths["evaluate"])
    assert good.exit_code == 0, good.output
    assert good.stdout.startswith(f"{paths['evaluate'].parents[2] / 'base'} trained on chain_sum by the method 'alps'")
    assert good.stdout.rstrip().endswith("The record is reproduced bit for bit.")
    stored = json.loads(paths["evaluate"].read_text())
    stored["result"]["scores"]["chain_sum"] = 0.5
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(stored))
    result = run(bad)
    assert result.exit_code == 1
    assert "WRONG scores chain_sum: 0.5 in the record, 0.0 here" in result.stdout
