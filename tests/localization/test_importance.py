"""Importance held against models with the head cut out, and metrics against heads that are known to have moved."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import softmax
from scipy.stats import kendalltau, spearmanr
from test_heads import Probe
from tiny_models import TINY, tiny_checkpoint, tiny_model

from alps_repro import AlpsConfig, HeadLayout, HeadScores, HeadSelection, UserError, localize
from alps_repro.analysis import figures
from alps_repro.data.prompts import Collate
from alps_repro.localization.ablation import importance
from alps_repro.localization.metrics import METRICS
from alps_repro.localization.recovery import (
    COMPARED,
    METRIC_VARIANTS,
    correlations,
    moved,
    peaks,
    recall,
    recall_by_metric,
)

LAYOUT = HeadLayout("llama", layers=2, heads=5, groups=1, head_dim=4, hidden_size=20)
#: One of each way in which projections are stored.
STORED = ["llama", "llama_mha_bias", "phi3", "gpt2", "gpt_neox", "falcon_mqa", "falcon_gqa"]


def batches() -> list[dict[str, Any]]:
    """Two batches with different numbers of rows and counted tokens."""
    draw, rows = np.random.default_rng(0), []
    for length, prompt in ((9, 5), (12, 11), (7, 3), (10, 4), (6, 5)):
        rows.append({"input_ids": draw.integers(4, 64, length).tolist(), "prompt_length": prompt})
    collate = Collate(0, "response")
    return [collate(rows[:3]), collate(rows[3:])]


def loud_model(name: str) -> torch.nn.Module:
    """A tiny model with weights so large that every head matters."""
    model = tiny_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def output_projection(model: torch.nn.Module, layer: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The projection behind attention, and its weight as (outputs, inputs)."""
    layout = HeadLayout.of(model)
    prefix = layout.prefix(name for name, _ in model.named_modules())
    module = model.get_submodule(prefix + layout.output_module(layer))
    return module, module.weight.T if layout.transposed else module.weight


@torch.no_grad()
def without(model: torch.nn.Module, layer: int, head: int) -> torch.nn.Module:
    """A copy in which nothing of a head passes the output projection."""
    model, width = copy.deepcopy(model), HeadLayout.of(model).head_dim
    output_projection(model, layer)[1][:, head * width : (head + 1) * width] = 0
    return model


@torch.no_grad()
def own_loss(model: torch.nn.Module, given: list[dict[str, Any]]) -> float:
    """The model's own loss over all counted tokens."""
    counted = [int((batch["labels"][:, 1:] != -100).sum()) for batch in given]
    return sum(float(model(**batch).loss) * n for batch, n in zip(given, counted)) / sum(counted)


# --- the output projection ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_output_projection_gets_the_heads_in_their_order(name):
    probe = Probe(name)
    layout = probe.layout
    for layer in range(layout.layers):
        module, weight = output_projection(probe.model, layer)
        assert weight.shape == (layout.hidden_size, layout.heads * layout.head_dim)
        assert (module is probe.output) == (layer == 0)
    for head in range(layout.heads):
        assert probe.changed("query", layout.rows("query", head), how="noise") == {head}


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_silencing_a_heads_slice_removes_the_head(name):
    model, tokens = loud_model(name), torch.arange(4, 13)[None]
    layout = HeadLayout.of(model)
    for layer, head in HeadSelection.all(layout):

        def silence(module: torch.nn.Module, inputs: tuple, own: int = head * layout.head_dim) -> tuple:
            heads = inputs[0].clone()
            heads[..., own : own + layout.head_dim] = 0
            return (heads, *inputs[1:])

        hook = output_projection(model, layer)[0].register_forward_pre_hook(silence)
        silenced = model(tokens).logits
        hook.remove()
        torch.testing.assert_close(silenced, without(model, layer, head)(tokens).logits)
        assert not torch.allclose(silenced, model(tokens).logits)


# --- importance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_importance_is_the_loss_without_the_head_less_the_loss_with_it(name):
    model, given = loud_model(name), batches()
    found = importance(model, given)
    layout = HeadLayout.of(model)
    assert found.shape == (layout.layers, layout.heads)
    assert found.dtype == np.float64
    whole = own_loss(model, given)
    for layer, head in HeadSelection.all(layout):
        expected = own_loss(without(model, layer, head), given) - whole
        assert found[layer, head] == pytest.approx(expected, abs=2e-5)
        assert abs(expected) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_gqa"])
def test_a_head_that_nothing_comes_of_has_no_importance_at_all(name):
    model = without(without(loud_model(name), 0, 2), 1, 1)
    found = importance(model, batches())
    assert {(int(layer), int(head)) for layer, head in np.argwhere(found == 0)} == {(0, 2), (1, 1)}


def traces(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: (
            module.training,
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks),
            module.__dict__.get("forward"),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = loud_model("llama").train()
    model.model.layers[1].mlp.eval()
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)  # as device maps do
    before, state = traces(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        broken = batches()
        broken[1]["input_ids"][0, 0] = 64  # no such token
        with pytest.raises(IndexError):
            importance(model, broken)
    else:
        assert np.array_equal(importance(model, batches()), importance(model, batches()))
    assert traces(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_importance_of_an_adapter_is_that_of_the_merged_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    heads = HeadSelection(((0, 1), (1, 3)), HeadLayout.of(tiny_model("llama")))
    for config in (
        AlpsConfig(heads=heads, task_type="CAUSAL_LM"),
        LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"),
    ):
        model = get_peft_model(loud_model("llama"), config)
        for name, parameter in model.named_parameters():
            if "alps" in name or "lora" in name:
                parameter.data.normal_(0, 0.3)
        found = importance(model, batches())
        np.testing.assert_allclose(found, importance(model.merge_and_unload(), batches()), atol=1e-5)


def test_nothing_to_lose_is_refused():
    unanswered = Collate(0, "response")([{"input_ids": [5, 6, 7], "prompt_length": 3}])
    for given in ([], [unanswered]):
        with pytest.raises(UserError, match="The batches have no loss tokens"):
            importance(tiny_model("llama"), given)


# --- heads that truly moved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_exactly_the_chosen_rows_move_further(name, tmp_path):
    base = tiny_checkpoint(tmp_path / "base", name)
    before = load_file(base / "model.safetensors")
    truth = moved(base, tmp_path / "one", factor=1, seed=3)
    assert moved(base, tmp_path / "five", factor=5, seed=3) == truth
    layout = truth.layout
    once, more = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "five"))
    attention = [path for layer in range(layout.layers) for path in layout.modules(layer)]
    assert set(once) == set(more) == {f"{path}.weight" for path in attention}, "nothing outside q, k and v"
    rows = layout.selected_rows(truth)
    prefix = layout.prefix(before)
    for path in attention:
        shifts = [side[f"{path}.weight"] - before[f"{prefix}{path}.weight"] for side in (once, more)]
        small, large = (shift.T if layout.transposed else shift for shift in shifts)
        chosen = torch.zeros(len(small), dtype=torch.bool)
        chosen[rows.get(path, [])] = True
        torch.testing.assert_close(large[chosen], 5 * small[chosen], atol=1e-7, rtol=0)
        assert torch.equal(large[~chosen], small[~chosen])
        assert (small != 0).float().mean() > 0.99
        assert float(small.std()) == pytest.approx(1e-4, rel=0.1)
    assert (tmp_path / "five" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("name", STORED)
def test_whole_groups_are_moved_and_found(name, tmp_path):
    base = tiny_checkpoint(tmp_path / "base", name)
    truth = moved(base, tmp_path / "moved", share=0.3, factor=50)
    layout = truth.layout
    groups = {(layer, layout.group(head)) for layer, head in truth}
    assert len(groups) == math.ceil(0.3 * layout.layers * layout.groups)
    assert len(truth) == len(groups) * layout.heads_per_group
    scores = localize(base, tmp_path / "moved", metric="l2", head_matrix="concat")
    assert recall(scores, truth) == 1


def test_narrow_weights_get_the_whole_noise(tmp_path):
    base = tmp_path / "base"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(base)
    moved(base, tmp_path / "moved", background=1e-6)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "moved"))
    for path, weight in after.items():
        assert weight.dtype == torch.float32
        assert (weight != before[f"model.{path}"].float()).float().mean() > 0.99


def test_a_seed_decides_everything(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    truths = [moved(base, tmp_path / str(i), seed=seed) for i, seed in enumerate((7, 7, 9))]
    same, again, other = ((tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3))
    assert truths[0] == truths[1] != truths[2]
    assert same == again != other


def test_the_plain_norm_finds_what_moved_in_a_real_model(smollm2, tmp_path):
    truth = moved(smollm2, tmp_path / "moved")
    assert len(truth) == 27
    assert recall(localize(smollm2, tmp_path / "moved", metric="l2", head_matrix="concat"), truth) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, r"not in \(0, 1\]"),
        ({"factor": 0}, "The factor 0 is not a positive number"),
        ({"factor": math.nan}, "The factor nan"),
        ({"background": -1e-4}, "The background -0.0001"),
        ({"background": "much"}, "The background 'much'"),
    ],
)
def test_what_cannot_be_moved_is_refused(wrong, message, tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        moved(base, tmp_path / "moved", **wrong)
    assert not (tmp_path / "moved").exists()
    with pytest.raises(UserError, match="exists already"):
        moved(base, base)


def test_an_adapter_is_not_moved(tmp_path):
    from peft import get_peft_model

    model = tiny_model("llama")
    heads = HeadSelection(((0, 1),), HeadLayout.of(model))
    get_peft_model(model, AlpsConfig(heads=heads, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter"):
        moved(tmp_path / "adapter", tmp_path / "moved")


def scores_of(values: Any) -> HeadScores:
    return HeadScores(np.array(values, dtype=float), LAYOUT, "base", "task")


def test_recall_by_hand():
    scores = scores_of([[9, 1, 8, 0, 0], [7, 6, 0, 0, 5]])  # from the highest: (0,0) (0,2) (1,0) (1,1) (1,4) (0,1)
    assert recall(scores, HeadSelection(((0, 0),), LAYOUT)) == 1
    assert recall(scores, HeadSelection(((1, 4),), LAYOUT)) == 0
    assert recall(scores, HeadSelection(((0, 0), (0, 2), (1, 4), (0, 1)), LAYOUT)) == 0.5
    # As many as there are, where a ratio that is a float would give one more: 5 of 9 heads.
    odd = replace(LAYOUT, layers=1, heads=9)
    values = HeadScores(np.arange(9.0)[None], odd, "base", "task")
    assert recall(values, HeadSelection(tuple((0, head) for head in range(5)), odd)) == 0.2
    # Of equal scores the first are taken, as `HeadScores.top` does.
    assert recall(scores_of(np.zeros((2, 5))), HeadSelection(((0, 0), (1, 0)), LAYOUT)) == 0.5


def test_recall_of_nothing_is_refused():
    with pytest.raises(UserError, match="No head was changed"):
        recall(scores_of(np.ones((2, 5))), HeadSelection((), LAYOUT))
    with pytest.raises(UserError, match="are of different models"):
        recall(scores_of(np.ones((2, 5))), HeadSelection(((0, 0),), replace(LAYOUT, layers=3)))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    base = tiny_checkpoint(tmp_path_factory.mktemp("recall") / "base")
    return recall_by_metric(base, factors=(1, 50), seeds=iter((0, 1)), head_matrices=("product", "concat", "released"))


def test_recall_by_metric(table, tmp_path):
    assert list(table.columns) == ["metric", "head_matrix", "factor", "seed", "recall"]
    assert len(table) == 2 * 2 * 3 * len(COMPARED)
    assert set(COMPARED) == set(table["metric"]) == set(METRIC_VARIANTS) - {"wasserstein"}
    assert set(METRICS) < set(METRIC_VARIANTS)
    far = table[(table["factor"] == 50) & (table["head_matrix"] == "concat")].set_index("metric")["recall"]
    assert (far["l2"] == 1).all()
    # A row is what its parts give one by one.
    base = tiny_checkpoint(tmp_path / "base")
    truth = moved(base, tmp_path / "moved", factor=50, seed=1)
    scores = localize(base, tmp_path / "moved", metric="pad", ground="value", head_matrix="product")
    (row,) = table.query("metric == 'pad_value' and head_matrix == 'product' and factor == 50 and seed == 1").recall
    assert row == recall(scores, truth)


def test_unknown_metric_is_refused_before_anything_is_moved(tmp_path):
    with pytest.raises(UserError, match="did you mean 'pad'"):
        recall_by_metric(tmp_path, metrics=("padd",))


# --- scores against importance --------------------------------------------------------------------------------------


def test_correlations_are_scipys():
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(10, 6))
    scores = {
        "same": np.exp(truth),
        "opposite": -truth,
        "near": truth + draw.normal(size=truth.shape),
        "tied": np.round(truth),
    }
    found = correlations(scores, truth).set_index("metric")
    assert list(found.index) == list(scores)
    for name, values in scores.items():
        row = found.loc[name]
        assert row["spearman"] == pytest.approx(spearmanr(values.ravel(), truth.ravel()).statistic)
        assert row["kendall"] == pytest.approx(kendalltau(values.ravel(), truth.ravel()).statistic)
        assert row["low"] - 1e-9 <= row["spearman"] <= row["high"] + 1e-9
    assert found.loc["near", "high"] - found.loc["near", "low"] > 0.1
    # 6 of 60 heads; all in common has one chance in C(60, 6), none has all.
    assert (found["top"] == 6).all()
    assert found["expected"].tolist() == pytest.approx([0.6] * 4)
    assert found.loc[["same", "opposite"], "overlap"].tolist() == [6, 0]
    assert found.loc[["same", "opposite"], "p_value"].tolist() == pytest.approx([1 / math.comb(60, 6), 1])


def test_the_interval_is_the_bootstraps():
    draw = np.random.default_rng(1)
    truth, scores = draw.normal(size=(2, 4, 5))
    (row,) = correlations({"it": scores}, truth, resamples=50, seed=3).itertuples()
    picks = np.random.default_rng(3).integers(20, size=(50, 20))
    each = [spearmanr(scores.ravel()[pick], truth.ravel()[pick]).statistic for pick in picks]
    assert [row.low, row.high] == pytest.approx(np.percentile(each, [2.5, 97.5]).tolist())


def test_scores_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"'pad' have shape \(2, 3\)"):
        correlations({"pad": np.ones((2, 3))}, np.ones((3, 2)))


# --- figures --------------------------------------------------------------------------------------------------------


def png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


@pytest.mark.filterwarnings("error")
def test_recall_figure_shows_every_metric(table):
    figure = figures.recall(table)
    assert [axes.get_title() for axes in figure.axes] == ["product", "concat", "released"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted([*COMPARED, "chance"])
    assert png(figure).startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(30, 9), (2, 4), (1, 1)])
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_importance_figure_marks_the_highest(shape, kind):
    draw = np.random.default_rng(0)
    truth, scores = (
        (draw.normal(size=shape), draw.lognormal(-14, 2, shape)) if kind == "random" else np.zeros((2, *shape))
    )
    figure = figures.importance(truth, scores, "pad")
    (axes,) = figure.axes
    counts = [len(dots.get_offsets()) for dots in axes.collections]
    top = math.ceil(0.1 * truth.size)
    assert sum(counts) == truth.size
    assert counts[1] + counts[3] == counts[2] + counts[3] == top
    assert png(figure).startswith(b"\x89PNG")


def test_figures_are_the_same_bytes_again(table, tmp_path):
    for folder in ("once", "again"):
        figures.save(figures.recall(table), tmp_path / folder, "recall")
    once, again = (sorted(Path(tmp_path / folder).iterdir()) for folder in ("once", "again"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


# --- peaks ----------------------------------------------------------------------------------------------------------


def test_peaks_are_the_largest_entries_of_the_softmax() -> None:
    model = tiny_model("llama")
    attention, width = model.model.layers[1].self_attn, 8
    query, key, value = (getattr(attention, f"{p}_proj").weight.detach().double().numpy() for p in "qkv")
    own = slice(3 * width, 4 * width), slice(1 * width, 2 * width)  # head 3 reads group 1
    matrix = query[own[0]].T @ (key[own[1]] @ value[own[1]].T)
    joined = np.concatenate([query[own[0]], key[own[1]], value[own[1]]])
    found = peaks(model)
    assert found["product"].shape == (2, 4)
    assert found["product"][1, 3] == pytest.approx(softmax(matrix, axis=None).max(), rel=1e-12)
    assert found["concat"][1, 3] == pytest.approx(softmax(joined, axis=None).max(), rel=1e-12)
