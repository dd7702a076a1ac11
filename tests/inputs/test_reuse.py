"""A record belongs to its inputs: before a run is reused, they are compared by content; a table shows no other run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from brought import brought
from safetensors.torch import load_file, save_file
from tiny_models import tiny_checkpoint

from alps_repro.analysis import tables
from alps_repro.analysis.claims import decided
from alps_repro.errors import UserError
from alps_repro.experiments import configs, records
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.grid import cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import OtherRun, find_record, load_record, record_path
from alps_repro.experiments.reuse import done
from alps_repro.experiments.runs import evaluate_run, finetune_run, localize_run
from alps_repro.models.folders import file_hashes
from alps_repro.settings import FORMER, with_former
from alps_repro.training import recipe
from alps_repro.training.recipe import Recipe

KIND = "Records and their inputs"
RECIPE = Recipe(max_steps=2, batch_size=2, micro_batch_size=2, learning_rate=1e-3)
CHECKOUT = Path(__file__).parents[2]


def change_weights(path: Path) -> None:
    """Other values in a file of the same size."""
    tensors = load_file(path)
    save_file({name: value + 0.01 for name, value in tensors.items()}, path, metadata={"format": "pt"})


def change_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def keep_size_and_times(path: Path, change: Callable[[Path], None]) -> None:
    before = path.stat()
    change(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def other_letters(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"a":4', '"a":5').replace('"b":5', '"b":4').replace('"a": 4', '"a": 5'))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a task model, and a results folder of an alps run with its evaluation."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_checkpoint(folder / "base"), tiny_checkpoint(folder / "task", seed=1)
    here = Path.cwd()
    os.chdir(folder)
    evaluate_run(evaluation(), "results", progress=False)
    evaluate_run(EvaluateConfig(model="base", tasks=("chain_sum",), limit=2), "results", progress=False)
    os.chdir(here)
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, as the current folder: models are named relative to it."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def localization() -> LocalizeConfig:
    return LocalizeConfig(base="base", task_model="task")


def finetuning() -> FinetuneConfig:
    settings = {"method": "alps", "ratio": 0.25, "scope": "heads", "localization": localization(), "recipe": RECIPE}
    return FinetuneConfig(base="base", dataset="chain_sum", **settings)


def evaluation() -> EvaluateConfig:
    return EvaluateConfig(model=finetuning(), tasks=("chain_sum",), limit=2)


CHANGES = {
    "base/model.safetensors": lambda path: keep_size_and_times(path, change_weights),
    "base/config.json": lambda path: change_json(path, rms_norm_eps=1e-3),
    "base/tokenizer.json": other_letters,
    "base/generation_config.json": lambda path: change_json(path, note="changed"),
    "task/model.safetensors": change_weights,
}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        brought(
            KIND,
            "other weights in a model's folder, of the same size and with the old time stamps",
            "model.safetensors of the base model 'base' has changed",
            "base/model.safetensors",
        ),
        brought(
            KIND,
            "another config.json in a model's folder",
            "config.json of the base model 'base' has changed",
            "base/config.json",
        ),
        brought(
            KIND,
            "another tokenizer in a model's folder",
            "tokenizer.json of the base model 'base' has changed",
            "base/tokenizer.json",
        ),
        brought(
            KIND,
            "another generation_config.json in a model's folder",
            "generation_config.json of the base model 'base' has changed",
            "base/generation_config.json",
        ),
        brought(
            KIND,
            "another task model at the same place",
            "model.safetensors of the task model 'task' has changed",
            "task/model.safetensors",
        ),
    ],
)
def test_changed_inputs_are_named_and_nothing_is_reused(place: Path, file: str, says: str) -> None:
    """Of the localization, the fine-tuning and the evaluation behind it."""
    for config in (localization(), finetuning(), evaluation()):
        assert done(config, "results") is not None
    CHANGES[file](place / file)
    for config in (localization(), finetuning(), evaluation()):
        with pytest.raises(OtherRun, match=says):
            done(config, "results")


def test_a_changed_model_is_evaluated_again_and_the_earlier_results_are_kept(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(model="base", tasks=("chain_sum",), limit=2)
    path = record_path(Path("results/records"), "evaluate", config.name)
    old = path.read_bytes()
    keep_size_and_times(place / "base/model.safetensors", change_weights)
    again = evaluate_run(config, "results", progress=False)
    assert "model.safetensors of the evaluated model 'base' has changed" in capsys.readouterr().err
    fresh = evaluate_run(config, "fresh", progress=False)
    assert again.result["metrics"] == fresh.result["metrics"] != json.loads(old)["result"]["metrics"]
    (kept,) = Path("results/superseded").iterdir()
    assert (kept / path.name).read_bytes() == old
    assert (kept / f"{config.name}.jsonl").exists()
    assert evaluate_run(config, "results", progress=False).finished == again.finished  # and now it is done


def test_a_changed_base_makes_the_whole_chain_again(place: Path) -> None:
    before = evaluate_run(evaluation(), "results", progress=False)
    change_weights(place / "base/model.safetensors")
    after = evaluate_run(evaluation(), "results", progress=False)
    assert after.provenance.model_sha256["evaluated"] != before.provenance.model_sha256["evaluated"]
    fresh = evaluate_run(evaluation(), "fresh", progress=False)
    assert after.result["metrics"] == fresh.result["metrics"]
    assert len(list(Path("results/superseded").iterdir())) == 3


def test_a_tuned_model_that_was_changed_is_not_taken_for_the_run(place: Path, capsys: Any) -> None:
    _, folder = finetune_run(finetuning(), "results", progress=False)
    hashes = file_hashes(folder)
    change_weights(folder / "adapter_model.safetensors")
    with pytest.raises(OtherRun, match=r"tuned model .* has changed"):
        done(evaluation(), "results")
    finetune_run(finetuning(), "results", progress=False)
    assert "is made again" in capsys.readouterr().err
    assert file_hashes(folder) == hashes


def test_evaluating_an_adapter_belongs_to_its_base_too(place: Path) -> None:
    _, folder = finetune_run(finetuning(), "results", progress=False)
    config = EvaluateConfig(model=str(folder), tasks=("chain_sum",), limit=2)
    evaluate_run(config, "own", progress=False)
    assert done(config, "own")
    change_json(place / "base/generation_config.json", note="changed")
    with pytest.raises(OtherRun, match=r"base/generation_config.json of the evaluated model .* has changed"):
        done(config, "own")


def test_scores_that_are_not_the_records_are_made_again(place: Path) -> None:
    scores, record = localize_run(localization(), "results", progress=False)
    path = Path("results/scores") / record.result["scores"]
    change_json(path, values=[[1.0] * 4] * 2)
    assert localize_run(localization(), "results", progress=False)[0].values.tolist() == scores.values.tolist()


def test_what_fails_with_other_inputs_leaves_everything_where_it_was(place: Path) -> None:
    config = EvaluateConfig(model="base", tasks=("chain_sum",), limit=2)
    path = record_path(Path("results/records"), "evaluate", config.name)
    samples = Path("results/samples") / f"{config.name}.jsonl"
    before = path.read_bytes(), samples.read_bytes()
    whole = (place / "base/model.safetensors").read_bytes()
    (place / "base/model.safetensors").write_bytes(whole[:500])
    with pytest.raises(UserError):
        evaluate_run(config, "results", progress=False)
    assert (path.read_bytes(), samples.read_bytes()) == before
    assert path.with_suffix(".failed.json").exists()
    (place / "base/model.safetensors").write_bytes(whole)
    evaluate_run(config, "results", progress=False)
    assert not path.with_suffix(".failed.json").exists()


def test_a_model_changed_while_it_is_read_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alps_repro.experiments import runs

    def change_too(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        change_weights(place / "base/model.safetensors")
        return found

    original = runs.evaluate
    monkeypatch.setattr(runs, "evaluate", change_too)
    config = EvaluateConfig(model="base", tasks=("chain_sum",), limit=1)
    with pytest.raises(UserError, match="'base' was changed while the run read it"):
        evaluate_run(config, "results", progress=False)


# Configurations


def test_a_table_made_with_another_default_shows_none_of_the_records(tmp_path: Path) -> None:
    """The runs' names are the same, since names leave defaults out."""
    shutil.copytree(CHECKOUT / "alps_repro", tmp_path / "alps_repro")
    for folder in ("profiles", "results"):
        (tmp_path / folder).symlink_to(CHECKOUT / folder)
    path = tmp_path / "alps_repro" / "training" / "recipe.py"
    source = path.read_text()
    path.write_text(source.replace("weight_decay: float = Field(0.1,", "weight_decay: float = Field(0.2,"))
    assert path.read_text() != source
    command = [sys.executable, "-m", "alps_repro.cli", "table", "cpu", "table1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 2
    assert "recipe.weight_decay was 0.1 and is 0.2 now" in made.stderr


@pytest.fixture
def cpu(tmp_path: Path) -> Profile:
    """Profile cpu with a copy of its committed records to change."""
    shutil.copytree(CHECKOUT / "results/cpu/records", tmp_path / "cpu/records")
    return Profile.load("cpu", results=str(tmp_path / "cpu"))


def doctor(profile: Profile, change: Callable[[dict[str, Any]], None], method: str = "alps", kind: str = "") -> Path:
    """Change the stored record of a run of table 1's first seed; returns its path."""
    cell = next(cell for cell in cells(profile, "table1") if cell.row == method)
    config = {"": cell.config, "finetune": cell.config.model}[kind]
    path = record_path(Path(profile.results) / "records", records.KINDS[type(config)], config.name)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return path


def set_decay(stored: dict[str, Any]) -> None:
    stored["config"]["model"]["recipe"]["weight_decay"] = 0.2


def set_limit(stored: dict[str, Any]) -> None:
    stored["config"]["batch_size"] = 4


def set_tuned(stored: dict[str, Any]) -> None:
    stored["provenance"]["model_sha256"]["tuned"] = "0" * 64


def set_base(stored: dict[str, Any]) -> None:
    stored["provenance"]["model_sha256"]["evaluated"] = "0" * 64


def set_questions(stored: dict[str, Any]) -> None:
    stored["provenance"]["data_sha256"]["family_relationships"] = "0" * 64


def drop_decay(stored: dict[str, Any]) -> None:
    del stored["config"]["model"]["recipe"]["weight_decay"]


@pytest.mark.parametrize(
    ("change", "method", "kind", "says"),
    [
        brought(
            KIND,
            "a record of a run with another weight decay, under the same name",
            "model.recipe.weight_decay was 0.2 and is 0.1 now",
            *(set_decay, "alps", ""),
        ),
        brought(
            KIND,
            "a record of an evaluation with another batch size, under the same name",
            "batch_size was 4 and is 32 now",
            *(set_limit, "vanilla", ""),
        ),
        brought(
            KIND,
            "an evaluation of another model than the one that its fine-tuning made",
            "the evaluated model is not the one of the record finetune-",
            *(set_tuned, "alps", "finetune"),
        ),
        brought(
            KIND,
            "rows of a table that were made from different base models of one name",
            "were made with different models of the name 'smollm2-135m'",
            *(set_base, "vanilla", ""),
        ),
        brought(
            KIND,
            "rows of a table that were asked different questions of one task",
            "were made with different questions of the name 'family_relationships'",
            *(set_questions, "full", ""),
        ),
        brought(
            KIND,
            "a record that lacks a setting, and nothing says what it was",
            "the setting 'weight_decay' is missing",
            *(drop_decay, "random", ""),
        ),
    ],
)
def test_tables_claims_and_figures_show_no_record_of_another_run(
    cpu: Profile, change: Callable[[dict[str, Any]], None], method: str, kind: str, says: str
) -> None:
    from alps_repro.analysis.cite import cite
    from alps_repro.experiments.workflow import check_records

    doctor(cpu, change, method, kind)
    makers: list[Callable[[], Any]] = [
        lambda: tables.paper_table(cpu, "table1"),
        lambda: decided(cpu),
        lambda: cite(cpu, "table1", "alps", "avg"),
    ]
    if "different" not in says:  # one record alone shows it
        makers.append(lambda: check_records(cpu))
    for make in makers:
        with pytest.raises(UserError, match=says):
            make()


@pytest.mark.parametrize("name", ["cpu", "grid", "grid-time"])
def test_all_committed_records_are_found_under_todays_configurations(name: str) -> None:
    """Every setting that they lack stands in the table of history."""
    profile = Profile.load(name)
    folder = CHECKOUT / "results" / name / "records"
    found = 0
    for table in profile.tables:
        for cell in cells(profile, table):
            record = find_record(folder, cell.config)
            assert record is not None
            assert record.config == cell.config
            found += 1
    assert found > 50


def test_history_names_settings_that_exist() -> None:
    for kind, settings in FORMER.items():
        assert settings.keys() <= getattr(recipe if kind == "Recipe" else configs, kind).model_fields.keys()


def test_a_former_default_is_what_counts_and_what_names_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is added with another default than runs had so far gives new runs new names, and no old ones."""
    path = next((CHECKOUT / "results/cpu/records").glob("evaluate-*-alps-*"))
    stored = json.loads(path.read_text())
    name = stored["name"]
    monkeypatch.setitem(FORMER["EvaluateConfig"], "template", "none")
    del stored["config"]["template"]
    config = EvaluateConfig.model_validate(with_former(EvaluateConfig, stored["config"]))
    assert config.template == "none"
    assert config.name == name
    # The value that is left out of names is the former one, whatever the default is now.
    monkeypatch.setitem(FORMER["EvaluateConfig"], "template", "alpaca")
    assert config.name != name
    assert config.model_copy(update={"template": "alpaca"}).name == name


def test_records_are_read_once_for_each_state(tmp_path: Path) -> None:
    path = next((CHECKOUT / "results/cpu/records").glob("evaluate-*"))
    record = load_record(path)
    shutil.copy(path, tmp_path / path.name)
    assert find_record(tmp_path, record.config) is find_record(tmp_path, record.config)
    stored = json.loads(path.read_text())
    stored["result"]["scores"] = dict.fromkeys(stored["result"]["scores"], 1.0)
    (tmp_path / path.name).write_text(json.dumps(stored))
    assert set(find_record(tmp_path, record.config).result["scores"].values()) == {1.0}
