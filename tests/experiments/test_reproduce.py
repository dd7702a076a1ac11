"""What a profile leaves on disk: models go when nothing needs them any more."""

from __future__ import annotations

from pathlib import Path

from synthetic import save, small_profile

from alps_repro.experiments.plan import Runs, needed
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import record_path
from alps_repro.experiments.workflow import remove_models


def train(profile: Profile, runs: Runs) -> dict[str, Path]:
    """A folder for the model of every fine-tuning, which is recorded."""
    models = {name: Path(profile.results) / "models" / name for name in runs.finetunings}
    for name, path in models.items():
        path.mkdir(parents=True)
        (path / "weights").touch()
        save(profile, runs.finetunings[name], {})
    return models


def test_model_stays_until_all_that_needs_it_is_recorded(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, seeds=[0], score_and_truth=True)
    runs = needed(profile)
    models = train(profile, runs)
    assert remove_models(profile) == []
    task_model = profile.importance().task_model.name
    for config in runs.evaluations.values():
        save(profile, config, {})
        own = None if isinstance(config.model, str) else config.model.name
        assert remove_models(profile) == ([models[own]] if own else [])
    # Heads are localized on the task model, and each of them is silenced there.
    (localization,) = runs.localizations.values()
    save(profile, localization, {})
    assert remove_models(profile) == []
    save(profile, profile.importance(), {})
    assert remove_models(profile) == [models[task_model]]
    assert not any(path.exists() for path in models.values())


def test_model_without_a_record_is_left(tmp_path: Path) -> None:
    """It may be half written, or of a run that is to resume."""
    profile = small_profile(tmp_path, seeds=[0], methods=["random"])
    (path,) = train(profile, needed(profile)).values()
    record_path(tmp_path / "records", "finetune", path.name).unlink()
    for config in needed(profile).evaluations.values():
        save(profile, config, {})
    beside = path.with_name("another")
    beside.mkdir()
    assert remove_models(profile) == []
    save(profile, needed(profile).finetunings[path.name], {})
    assert remove_models(profile) == [path]
    assert beside.exists(), "what is no run of the profile is nobody's to remove"
