"""Tables and figures: made from records alone, right to the digit, the same bytes every time."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from alps_repro.analysis import figures, tables
from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.provenance import Provenance
from alps_repro.experiments.records import RECORDS, Cost, Record
from alps_repro.heads.layout import HeadLayout
from alps_repro.localization.scores import HeadScores

PROVENANCE = Provenance(
    commit=None, dirty=None, versions={}, python="3.11.0", system="s", processor="p", threads=1, gpu=None
)
TOTAL = 1000


def tuned(method: str, **settings: Any) -> FinetuneConfig:
    localization = LocalizeConfig(base="m", task_model="t") if method == "alps" else None
    ratio = {"full": 1.0, "no_attn": 1.0}.get(method, 0.1)
    return FinetuneConfig(
        **{"base": "m", "dataset": "chain_sum", "method": method, "ratio": ratio, "localization": localization}
        | settings
    )


def record(config: Any, result: dict[str, Any], kind: str, **settings: Any) -> Record:
    cost = Cost(
        seconds=12.0, peak_memory_bytes=1, trained_parameters=settings.pop("trained", None), total_parameters=TOTAL
    )
    return RECORDS[kind](
        **{"kind": kind, "name": config.name, "status": "completed", "config": config, "result": result}
        | {"provenance": PROVENANCE, "cost": cost, "finished": datetime.now(UTC).isoformat()}
        | settings
    )


def evaluated(model: str | FinetuneConfig, right: int = 50, questions: int = 200, task: str = "chain_sum") -> Record:
    score = right / questions
    metrics = {"exact_match,flexible-extract": score, "exact_match,strict-match": score / 2}
    result: dict[str, Any] = {
        "scores": {task: score},
        "metrics": {task: metrics},
        "questions": {task: questions},
        "samples": "s.jsonl",
    }
    if isinstance(model, FinetuneConfig):
        result["training_seconds"] = 34.5
    trained = 100 if isinstance(model, FinetuneConfig) else None
    return record(EvaluateConfig(model=model, tasks=(task,)), result, "evaluate", trained=trained)


def benchmark(task: str, score: float) -> Record:
    """An evaluation without a strict score or a count of its own, such as MMLU's."""
    result = {"scores": {task: score}, "metrics": {task: {"acc,none": score}}, "questions": {f"{task}_a": 3}}
    return record(EvaluateConfig(model="m", tasks=(task,)), result, "evaluate")


def finetuned(method: str, losses: list[float], **settings: Any) -> Record:
    return record(tuned(method, **settings), {"losses": losses}, "finetune", trained=100)


EVERY = [
    evaluated(tuned("alps", ratio=0.3)),
    evaluated(tuned("random", seed=1)),
    evaluated(tuned("full"), right=180),
    evaluated("m", right=3),
    evaluated(tuned("alps", ratio=0.1, scope="heads")),
    evaluated(tuned("random", seed=0)),
    evaluated(tuned("layer_consistent")),
    evaluated(tuned("no_attn")),
]


def test_rows_are_in_the_order_of_the_paper_whatever_order_they_come_in() -> None:
    table = tables.summary(EVERY)
    assert list(table["method"]) == [
        *["vanilla", "full", "no_attn", "random", "random", "layer_consistent", "alps", "alps"]
    ]
    assert list(table["seed"].dropna()) == [0, 0, 0, 1, 0, 0, 0]
    assert list(table["ratio"].dropna()) == [0.1, 0.1, 0.1, 0.1, 0.3]
    assert tables.summary(EVERY[::-1]).equals(table)


def test_tasks_and_bases_are_kept_together() -> None:
    other = EvaluateConfig(model="a", tasks=("chain_sum",))
    rows = [*EVERY[:4], evaluated("m", task="spell_backward"), record(other, EVERY[3].result, "evaluate")]
    table = tables.summary(rows)
    assert list(zip(table["base"], table["task"], strict=True)) == [
        ("a", "chain_sum"),
        *[("m", "chain_sum")] * 4,
        ("m", "spell_backward"),
    ]


def test_numbers_of_a_row() -> None:
    """In percent; what was trained and what it took are the training's."""
    (row,) = tables.summary([evaluated(tuned("alps", scope="heads", seed=3), right=58, questions=200)]).to_dict(
        "records"
    )
    assert row["score"] == pytest.approx(29)
    assert row["strict"] == pytest.approx(14.5)
    assert row["questions"] == 200
    assert (row["base"], row["dataset"], row["method"], row["ratio"]) == ("m", "chain_sum", "alps", 0.1)
    assert (row["scope"], row["quantization"], row["seed"], row["task"]) == ("heads", "none", 3, "chain_sum")
    assert (row["trained_parameters"], row["trained_share"], row["training_seconds"]) == (100, 0.1, 34.5)
    (vanilla,) = tables.summary([evaluated("m")]).to_dict("records")
    assert (vanilla["trained_parameters"], vanilla["trained_share"]) == (0, 0)


@pytest.mark.parametrize(
    ("right", "questions"), [(0, 200), (1, 200), (58, 200), (100, 200), (200, 200), (1, 1), (3, 7)]
)
def test_interval_is_wilsons(right: int, questions: int) -> None:
    """Against the formula (Wilson 1927), which stays within 0 and 1 where the usual one does not."""
    z, p, n = norm.ppf(0.975), right / questions, questions
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = tables.interval(p, questions)
    assert low == pytest.approx(middle - half, abs=1e-9)
    assert high == pytest.approx(middle + half, abs=1e-9)
    assert 0 <= low <= p <= high <= 1
    (row,) = tables.summary([evaluated("m", right, questions)]).to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx((100 * low, 100 * high))


def test_score_that_is_no_proportion_of_questions_gets_no_interval(tmp_path: Path) -> None:
    table = tables.summary([benchmark("mmlu", 0.4321), evaluated("m")])
    row = table[table["task"] == "mmlu"].iloc[0]
    assert row["score"] == pytest.approx(43.21)
    assert row[["low", "high", "strict", "questions"]].isna().all()
    tables.write(table, tmp_path, "t")
    for suffix in ("md", "tex"):
        text = (tmp_path / f"t.{suffix}").read_text()
        assert "43.2" in text
        assert "nan" not in text.lower()
        assert "<NA>" not in text


def test_files(tmp_path: Path) -> None:
    table = tables.summary(EVERY)
    paths = tables.write(table, tmp_path / "tables", "summary")
    assert [path.name for path in paths] == ["summary.csv", "summary.md", "summary.tex"]
    with paths[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(table["method"])
    # CSV has the numbers themselves.
    assert [float(row["score"]) for row in rows] == pytest.approx(list(table["score"]))
    assert [float(row["low"]) for row in rows] == pytest.approx(list(table["low"]))
    assert rows[0]["seed"] == ""
    markdown, latex = paths[1].read_text(), paths[2].read_text()
    lines = markdown.splitlines()
    assert len(lines) == len(EVERY) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert "90.0" in lines[3]
    assert latex.count(r"\\") == len(EVERY) + 1
    for command in (r"\begin{tabular}", r"\toprule", r"\bottomrule", r"\end{tabular}"):
        assert command in latex
    # An unescaped % would swallow the rest of the line, an unescaped _ stops LaTeX.
    for character in "%_":
        assert latex.count(character) == latex.count(f"\\{character}") > 0


def test_written_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in tables.write(tables.summary(EVERY), tmp_path, "t")]
    second = [path.read_bytes() for path in tables.write(tables.summary(EVERY[::-1]), tmp_path, "t")]
    assert first == second


def test_summary_of_a_folder_is_of_its_completed_evaluations(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    for each in [*EVERY, finetuned("full", [1.0])]:
        each.save(folder)
    failed = EvaluateConfig(model="m", tasks=("gsm8k",))
    record(failed, {}, "evaluate", status="failed", error="no network").save(folder)
    table, paths = tables.write_summary(tmp_path)
    assert table.equals(tables.summary(EVERY))
    before = [path.read_bytes() for path in paths]
    tables.write_summary(str(tmp_path))
    assert [path.read_bytes() for path in paths] == before


def test_nothing_to_make_a_table_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a results folder"):
        tables.write_summary(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no record of an evaluation.*run an evaluation first"):
        tables.summary([])
    with pytest.raises(UserError, match="no record of an evaluation"):
        tables.summary([finetuned("full", [1.0])])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "summary.csv").write_text("earlier")
    (tmp_path / "records").mkdir()
    with pytest.raises(UserError, match="no record of an evaluation"):
        tables.write_summary(tmp_path)
    assert (tmp_path / "tables" / "summary.csv").read_text() == "earlier"


# Figures


LOSSES = [
    finetuned("full", [2.8, 1.0, 0.4]),
    finetuned("alps", [2.8, 1.4, 0.9, 0.8], scope="heads"),
    # A model in which there was nothing to train has no curve.
    finetuned("no_attn", [], scope="heads"),
    EVERY[0],
]


def test_loss_curves_show_the_losses() -> None:
    (axes,) = figures.loss_curves(LOSSES).axes
    drawn = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert drawn == [[[i, loss] for i, loss in enumerate(run.result["losses"], 1)] for run in LOSSES[:2]]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown == ["full (scope all, seed 0)", "alps (scope heads, seed 0)"]


def heatmap() -> Any:
    layout = HeadLayout(**{**LAYOUT, "layers": 2, "heads": 4, "groups": 2})
    return HeadScores(np.arange(8.0).reshape(2, 4) * 1e-7, layout, "m", "t").heatmap(0.25)


LAYOUT = {"architecture": "llama", "head_dim": 8, "hidden_size": 32}


@pytest.mark.parametrize("draw", [lambda: figures.loss_curves(LOSSES), heatmap], ids=["losses", "heatmap"])
def test_same_figure_same_bytes(tmp_path: Path, draw: Any) -> None:
    """Of the same figure and of one drawn anew, so that results can be compared by their hashes."""
    figure = draw()
    first = [path.read_bytes() for path in figures.save(figure, tmp_path, "f")]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["f.png", "f.svg"]
    assert first[0].startswith(b"<?xml")
    assert first[1].startswith(b"\x89PNG")
    assert [path.read_bytes() for path in figures.save(figure, tmp_path / "again", "f")] == first
    assert [path.read_bytes() for path in figures.save(draw(), str(tmp_path / "anew"), "f")] == first
