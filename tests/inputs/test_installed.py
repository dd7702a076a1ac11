"""What is not part of an installed package is said to be missing; an adapter's own tokenizer is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from brought import brought
from peft import get_peft_model
from tiny_models import tiny_checkpoint

from alps_repro import AlpsConfig, load_model
from alps_repro.errors import UserError

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package alone, as a wheel installs it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(CHECKOUT / "alps_repro", folder / "alps_repro", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        brought(
            "Installed, not cloned",
            "`plan` of a profile by name, from an installed package",
            "The profile 'quick' is not part of an installed package",
            ["plan", "quick"],
        ),
        brought(
            "Installed, not cloned",
            "`table` of a profile by name, from an installed package",
            "The profile 'cpu' is not part of an installed package",
            ["table", "cpu"],
        ),
        brought(
            "Installed, not cloned",
            "`reproduce` of a profile's file, from an installed package",
            "The workflow and its notebooks are not part of an installed package",
            ["reproduce", str(CHECKOUT / "profiles" / "quick.yaml")],
        ),
    ],
)
def test_an_installed_package_says_what_it_lacks(
    installed: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "alps_repro.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model, _ = load_model(tiny_checkpoint(tmp_path / "base"))
    tuned = get_peft_model(model, AlpsConfig(heads=[(0, 1)], task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_with_the_tokenizer_beside_it(adapter: Path) -> None:
    _, tokenizer = load_model(adapter)
    assert tokenizer.eos_token == "</s>"
    tokenizer.eos_token = "."
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    _, own = load_model(adapter)
    assert own.eos_token == "."
    assert own.chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        brought(
            "Adapters",
            "an adapter with a tokenizer that has more tokens than its base",
            "tokens beyond the 64 rows of the model's embedding",
            "tokens",
        ),
        brought("Adapters", "an adapter whose own tokenizer has no end token", "has no end token", "end"),
        brought("Adapters", "an adapter whose own tokenizer is damaged", "cannot be loaded", "file"),
    ],
)
def test_an_adapters_tokenizer_that_does_not_fit(adapter: Path, damage: str, says: str) -> None:
    _, tokenizer = load_model(adapter)
    if damage == "tokens":
        tokenizer.add_tokens([f"<{i}>" for i in range(12)])
    tokenizer.save_pretrained(adapter)
    if damage == "end":
        path = adapter / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))
    elif damage == "file":
        (adapter / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=says):
        load_model(adapter)
