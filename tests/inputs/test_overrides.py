"""Settings that are overridden beside a profile's file reach every run, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from brought import brought

from alps_repro.errors import UserError
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.workflow import overridden

KIND = "Overrides"
CHECKOUT = Path(__file__).parents[2]
QUICK = CHECKOUT / "profiles" / "quick.yaml"


def snakemake(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "-n", "--configfile", str(QUICK), *arguments]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "happens"),
    [
        brought(
            KIND, "`snakemake --config seeds=[7]`", "applied to every run", ["--config", "results={}", "seeds=[7]"]
        ),
        brought(KIND, "a second `--configfile` for snakemake", "applied to every run", ["{}/more.yaml"]),
        brought(
            KIND,
            "`snakemake --config` with a setting that does not exist",
            "There is no parameter 'sede': did you mean 'seeds'?",
            ["--config", "results={}", "sede=[7]"],
        ),
        brought(
            KIND,
            "a second `--configfile` with an impossible setting",
            "The ratio 2.0 is not in (0, 1]",
            ["{}/wrong.yaml"],
        ),
    ],
)
def test_what_snakemake_is_told_beside_the_profile(tmp_path: Path, arguments: list[str], happens: str) -> None:
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"results": str(tmp_path), "seeds": [7]}))
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({"results": str(tmp_path), "ratio": 2.0}))
    done = snakemake(*(word.format(tmp_path) for word in arguments))
    said = done.stdout + done.stderr
    if happens != "applied to every run":
        assert done.returncode
        assert happens in said
        return
    assert done.returncode == 0, said
    runs = [line for line in said.splitlines() if "fine-tuning smollm2" in line]
    assert runs
    assert all("seed7" in line for line in runs)
    assert str(tmp_path) in said
    (merged,) = (tmp_path / ".profiles").iterdir()  # what the runs read
    assert Profile.load(str(merged)) == Profile.load("quick", results=str(tmp_path), seeds=[7])


def test_without_overrides_the_profile_itself_is_read() -> None:
    assert overridden(QUICK, {}) == QUICK
    assert overridden(QUICK, Profile.read(QUICK)) == QUICK


def test_nested_settings_are_written_whole(tmp_path: Path) -> None:
    settings = {**Profile.read(QUICK), "results": str(tmp_path), "recipe": {"max_steps": 3, "betas": (0.8, 0.9)}}
    profile = Profile.load(str(overridden(QUICK, settings)))
    assert profile.recipe.max_steps == 3
    assert profile.recipe.betas == (0.8, 0.9)
    assert json.loads(json.dumps(Profile.read(overridden(QUICK, settings))["recipe"]["betas"])) == [0.8, 0.9]


def test_an_unknown_setting_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no parameter 'sed'"):
        overridden(QUICK, {"results": str(tmp_path), "sed": 1})
    assert not list(tmp_path.iterdir())
