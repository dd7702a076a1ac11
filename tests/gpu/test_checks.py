"""The script of checks on a GPU, each in miniature on the CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
#: What needs no minute in miniature.
FAST = ("versions", "rates", "quantized", "large", "resume", "agreement")


@pytest.fixture(scope="module")
def checks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("gpu_checks")


@pytest.fixture(scope="module")
def base(checks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checks.tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("name", FAST)
def test_a_check_is_ok_in_miniature(checks: Any, base: Path, name: str, tmp_path: Path) -> None:
    kept: dict[str, Any] = {}
    check = checks.Check("cpu", base, tmp_path, keep=kept.update)
    assert checks.CHECKS[name].make(check) is True
    assert kept == check.values
    assert json.dumps(kept)


def test_a_check_without_time_is_skipped_and_kept(checks: Any, base: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "checks.json"
    lines = checks.run(["rates"], "cpu", base, out, budget=1.0)
    assert [line["check"] for line in lines] == ["model", "rates"]
    assert lines[-1]["ok"] is None
    assert lines[-1]["reason"] == "skipped: no time"
    assert json.loads(out.read_text())["checks"] == lines
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
