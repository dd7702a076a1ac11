"""Table 11: from the benchmark's rounds, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import small_profile

from alps_repro.analysis import tables, timing
from alps_repro.errors import UserError


def rounds(*medians: float) -> list[dict]:
    """Rounds of three steps each, whose median is the second."""
    return [
        {
            "seconds": [one - 1, one, one + 5],
            "trained_parameters": 7,
            "peak_bytes": int(3e9 + i),
            "interpreter_bytes": int(1e9),
        }
        for i, one in enumerate(medians)
    ]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "training.json"
    found = {
        "provenance": {"gpu": None, "threads": 2, "processor": "P"},
        "variants": {"own": "a few rows", "full_plain": "everything"},
        "rounds": {"full_plain": rounds(4, 5, 8), "own": rounds(2, 2, 2)},
    }
    path.write_text(json.dumps(found))
    monkeypatch.setattr(timing, "MEASURED", path)
    return path


def test_shares_are_of_the_same_round(measured: Path) -> None:
    full, own = timing.training_time().to_dict("records")
    assert (full["variant"], full["seconds"], full["share"]) == ("full_plain", 7, 1)
    assert (own["seconds"], own["low"], own["high"], own["peak_bytes"]) == (2, 1, 7, 2e9 + 1)
    # Student's t with two degrees of freedom: 4.302653; standard error of 0.5, 0.4 and 0.25.
    mean, half = 1.15 / 3, 4.302653 * 0.1258306 / 3**0.5
    assert (own["share"], own["share_low"], own["share_high"]) == pytest.approx(
        (mean, mean - half, mean + half), rel=1e-5
    )


def test_one_round_has_no_interval(measured: Path) -> None:
    found = json.loads(measured.read_text())
    found["rounds"] = {name: own[:1] for name, own in found["rounds"].items()}
    measured.write_text(json.dumps(found))
    times = timing.training_time()
    own = times.set_index("variant").loc["own"]
    assert own[["share_low", "share_high"]].isna().all()
    assert list(timing.to_read(times)["share of full"]) == ["1", f"{own['share']:.2f}"]


def test_the_paper_s_shares() -> None:
    """2.02 and 0.40 hours, 4.40 and 1.05, 7.67 and 2.18."""
    assert list(timing.paper_shares()) == pytest.approx([0.40 / 2.02, 1.05 / 4.40, 2.18 / 7.67])


def test_written_like_the_other_tables(measured: Path, tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    assert tables.of_profile(profile)[-1] == "table11"
    csv, markdown, tex = tables.write_paper_table(profile, "table11")
    assert csv.read_text() == timing.training_time().to_csv(index=False, lineterminator="\n")
    assert "0.20 (Llama-3.2-1B)" in markdown.read_text()
    assert "2 threads of P" in tex.read_text()
    before = [path.read_bytes() for path in (csv, markdown, tex)]
    assert [path.read_bytes() for path in tables.write_paper_table(profile, "table11")] == before


def test_not_measured(measured: Path, tmp_path: Path) -> None:
    measured.unlink()
    assert "table11" not in tables.of_profile(small_profile(tmp_path))
    with pytest.raises(UserError, match="run make bench"):
        timing.training_time()
    with pytest.raises(UserError, match="no table of this profile 'table11'"):
        tables.write_paper_table(small_profile(tmp_path), "table11")


def test_real_benchmark_has_the_paper_s_row_and_ours() -> None:
    found = timing.training_time().set_index("variant")
    assert found.loc[timing.FULL, "seconds"] == found["seconds"].max()
    assert found.loc["alps_heads", "trained_parameters"] < found.loc["alps_all", "trained_parameters"]
