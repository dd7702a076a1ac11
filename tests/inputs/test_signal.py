"""Pairs of a base and a task model as people have them: scores of a real change, or a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from brought import brought as row
from datasets import Dataset
from peft import get_peft_model
from tiny_models import tiny_checkpoint, tiny_model

from alps_repro import AlpsConfig, HeadScores, UserError, finetune, localize
from alps_repro.heads.layout import HeadLayout
from alps_repro.localization.selectors import select_by
from alps_repro.training.methods import METHODS

brought = partial(row, "Pairs of models")
Change = Callable[[torch.nn.Module], torch.nn.Module]


def moved(*heads: tuple[int, int]) -> Change:
    """Noise on the query rows of heads of a tiny Llama."""

    @torch.no_grad()
    def change(model: torch.nn.Module) -> torch.nn.Module:
        for layer, head in heads:
            rows = model.model.layers[layer].self_attn.q_proj.weight[8 * head : 8 * head + 8]
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(head))
        return model

    return change


@torch.no_grad()
def moved_outside(model: torch.nn.Module) -> torch.nn.Module:
    model.model.layers[0].mlp.down_proj.weight.add_(0.1)
    model.model.layers[1].self_attn.o_proj.weight.add_(0.1)
    return model


def same(model: torch.nn.Module) -> torch.nn.Module:
    return model


def saved(folder: Path, change: Change, dtype: torch.dtype) -> Path:
    change(tiny_model("llama")).to(dtype).save_pretrained(folder)
    return folder


FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.filterwarnings("ignore:.*is stored in")
@pytest.mark.parametrize(
    ("change", "stored", "happens"),
    [
        brought("a task model that is a copy of its base", "No head of", same, (FLOAT, FLOAT)),
        brought("a task model with other weights outside q, k and v", "No head of", moved_outside, (FLOAT, FLOAT)),
        brought("the base, saved in bfloat16, as its task model", "No head of", same, (FLOAT, BRAIN)),
        brought("the base in bfloat16, and its original in float32", "No head of", same, (BRAIN, FLOAT)),
        brought("the base in float16, and the same in bfloat16", "No head of", same, (HALF, BRAIN)),
        brought("the base in float32, and the same in float16", "No head of", same, (FLOAT, HALF)),
    ],
)
def test_pairs_without_a_change(
    tmp_path: Path, change: Change, stored: tuple[torch.dtype, torch.dtype], happens: str
) -> None:
    pair = saved(tmp_path / "base", same, stored[0]), saved(tmp_path / "task", change, stored[1])
    for metric, head_matrix in (("pad", "product"), ("l2", "concat"), ("js", "released")):
        with pytest.raises(UserError, match=happens) as error:
            localize(*pair, metric=metric, head_matrix=head_matrix)
        assert str(pair[1]) in str(error.value)


@pytest.mark.parametrize(
    ("stored", "compared", "happens"),
    [
        brought(
            "a base in float32, its task model in bfloat16", "both are compared in bfloat16", (FLOAT, BRAIN), BRAIN
        ),
        brought(
            "a base in bfloat16, its task model in float32", "both are compared in bfloat16", (BRAIN, FLOAT), BRAIN
        ),
        brought("a base in float32, its task model in float16", "both are compared in float16", (FLOAT, HALF), HALF),
        brought("a base in float16, its task model in bfloat16", "both are compared in bfloat16", (HALF, BRAIN), BRAIN),
    ],
)
def test_pairs_stored_in_different_dtypes(
    tmp_path: Path, stored: tuple[torch.dtype, torch.dtype], compared: torch.dtype, happens: str
) -> None:
    pair = saved(tmp_path / "base", same, stored[0]), saved(tmp_path / "task", moved((1, 2)), stored[1])
    with pytest.warns(UserWarning, match=happens):
        scores = localize(*pair)
    assert scores.compared_in == str(compared).removeprefix("torch.")
    assert set(zip(*np.nonzero(scores.values))) == {(1, 2)}  # nothing of what the others lost by rounding


def test_an_adapters_rows_are_compared_as_they_are(tmp_path: Path) -> None:
    """They are float32 on a base of bfloat16, which both sides have; rounded, small changes would be lost."""
    base = tiny_checkpoint(tmp_path / "base")
    saved(base, same, BRAIN)
    model = get_peft_model(tiny_model("llama").to(BRAIN).float(), AlpsConfig(heads=[(0, 1)]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 1e-5)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scores = localize(base, tmp_path / "adapter")
    assert scores.compared_in is None
    assert scores.values[0, 1] > 0
    # Against a base with more digits than the adapter's own, they are rounded like the rest.
    original = saved(tmp_path / "original", same, FLOAT)
    with pytest.warns(UserWarning, match="compared in bfloat16"), pytest.raises(UserError, match="No head of"):
        localize(original, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("values", "happens"),
    [
        brought(
            "a selection of more heads than changed",
            "1 of 6 heads of the same score, 0",
            [[0, 0, 0, 5.0], [0, 7, 0, 0]],
        ),
        brought(
            "heads of equal score at its edge", "1 of 2 heads of the same score, 2", [[1, 2, 2.0, 5], [0, 7, 1, 0]]
        ),
        brought(
            "scores that are equal but for a few",
            "2 of 7 heads of the same score, 0.5",
            [[0.5] * 4, [0.5, 9, 0.5, 0.5]],
        ),
    ],
)
def test_selections_that_end_among_equals(values: list[list[float]], happens: str) -> None:
    scores = HeadScores(np.array(values), HeadLayout("llama", 2, 4, 2, 8, 32), "base", "task")
    with pytest.warns(UserWarning, match=f"ends among {happens}"):
        chosen = scores.top(0.375)
    with pytest.warns(UserWarning, match=happens):
        assert METHODS["alps"].select(scores.layout, 0.375, scores, 0) == chosen


@pytest.mark.parametrize(
    ("values", "happens"),
    [
        brought("a file of scores that are all 0", "No head of 'task' differs from 'base'", np.zeros((2, 4))),
        brought(
            "a file of scores that are all equal", "All heads of 'task' have the same score", np.full((2, 4), 0.25)
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The selection")
def test_scores_without_a_difference(tmp_path: Path, values: np.ndarray, happens: str) -> None:
    base, rows = tiny_checkpoint(tmp_path / "base"), Dataset.from_list([{"instruction": "a", "response": "b"}] * 4)
    HeadScores(values, HeadLayout("llama", 2, 4, 2, 8, 32), "base", "task").save(tmp_path / "scores.json")
    for method in ("alps", "bottom", "random_matched", "lora_matched", "hifi_offset"):
        with pytest.raises(UserError, match=happens):
            finetune(base, rows, tmp_path / "out", method=method, scope="heads", scores=tmp_path / "scores.json")
    assert not (tmp_path / "out").exists()


def test_other_selectors_without_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoFiT's scales before any training are all 0, and so are their norms."""
    from alps_repro.localization import selectors

    base = tiny_checkpoint(tmp_path / "base")
    for values in (np.zeros((2, 4)), np.ones((2, 4))):
        monkeypatch.setitem(selectors.RESULT_METRICS, "scale_norm", lambda base, task, values=values, **asked: values)
        with pytest.raises(UserError, match="have the same score by 'scale_norm'"):
            select_by("scale_norm", base, "task")
