"""Scores of heads: the moved head is found, the numbers are right to the last digits, and what is asked for is checked.

References are written anew here, in extended precision and from the formulas, and share no code with the package.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import safe_open, save_file
from scipy.stats import wasserstein_distance
from tiny_models import TINY, tiny_model
from torch import nn

from alps_repro import HeadLayout, HeadScores, UserError, localize
from alps_repro.localization.metrics import HEAD_MATRICES, METRICS
from alps_repro.localization.scores import _rounded

#: Every metric with every ground that it has.
KINDS = [*({"metric": m} for m in METRICS), {"metric": "pad", "ground": "value"}]
KIND_NAMES = [*METRICS, "pad_value"]
ONE_HEAD = 1e-9  # a ratio that selects a single head

each_kind = pytest.mark.parametrize("kind", KINDS, ids=KIND_NAMES)
each_matrix = pytest.mark.parametrize("head_matrix", HEAD_MATRICES)


def close(expected: float | np.ndarray, rel: float):
    """`pytest.approx` without its absolute tolerance of 1e-12, which is more than many scores."""
    return pytest.approx(expected, rel=rel, abs=0)


@torch.no_grad()
def add_noise(model: nn.Module, layer: int, part: str, index: int, size: float = 0.5) -> nn.Module:
    """A copy of the model with noise on the rows of one query head, or of one key/value group.

    Which rows those are is held against the model's own forward pass in `test_heads.py`.
    """
    model = copy.deepcopy(model)
    layout = HeadLayout.of(model)
    prefix = layout.prefix(name for name, _ in model.named_modules())
    weight = model.get_submodule(prefix + layout.module(layer, part)).weight
    rows = (weight.T if layout.transposed else weight)[list(layout.rows(part, index))]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(layer + index)) * size
    (weight.T if layout.transposed else weight)[list(layout.rows(part, index))] = rows + noise
    return model


@torch.no_grad()
def moved_everywhere(name: str) -> tuple[nn.Module, nn.Module]:
    """A base, and a task model in which every weight of attention moved; both larger than at initialization."""
    base = tiny_model(name)
    for i, (path, parameter) in enumerate(base.named_parameters()):
        if "att" in path and parameter.ndim == 2:
            parameter.normal_(0, 0.4, generator=torch.Generator().manual_seed(i))
    task = copy.deepcopy(base)
    for i, (path, parameter) in enumerate(task.named_parameters()):
        if "att" in path and parameter.ndim == 2:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 + i))
    return base, task


# --- the head that moved is found ------------------------------------------------------------------------------------


class Moved:
    """A base and models tuned from it in the query rows of one head each; one of them saved, and the base too."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.base = name, tiny_model(name)
        self.tasks = {head: add_noise(self.base, head[0], "query", head[1]) for head in [(0, 1), (1, 0), (1, 3)]}
        self.saved = (1, 3)
        self.base_folder, self.task_folder = folder / "base", folder / "task"
        self.base.save_pretrained(self.base_folder)
        self.tasks[self.saved].save_pretrained(self.task_folder)


@pytest.fixture(scope="module", params=TINY)
def moved(request, tmp_path_factory) -> Moved:
    return Moved(request.param, tmp_path_factory.mktemp(request.param))


@each_kind
def test_head_whose_query_rows_moved_comes_first(moved, kind):
    for head_matrix in HEAD_MATRICES:
        for head, task in moved.tasks.items():
            scores = localize(moved.base, task, head_matrix=head_matrix, **kind)
            assert scores.top(ONE_HEAD).heads == (head,)
            assert scores.values[head] > 0
            assert np.count_nonzero(scores.values) == 1  # nothing else moved, so nothing else scores


@each_kind
def test_folders_score_as_loaded_models_do(moved, kind):
    for head_matrix in HEAD_MATRICES:
        loaded = localize(moved.base, moved.tasks[moved.saved], head_matrix=head_matrix, **kind)
        folders = localize(moved.base_folder, str(moved.task_folder), head_matrix=head_matrix, **kind)
        assert folders.top(ONE_HEAD).heads == (moved.saved,)
        assert folders.values.tobytes() == loaded.values.tobytes()


def test_folder_and_loaded_model_mix(moved):
    task = moved.tasks[moved.saved]
    assert np.array_equal(localize(moved.base, task).values, localize(moved.base_folder, task).values)
    assert np.array_equal(localize(moved.base, task).values, localize(moved.base, moved.task_folder).values)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("kind", [{"metric": "pad"}, {"metric": "js"}, {"metric": "l2"}], ids=["pad", "js", "l2"])
def test_a_moved_group_marks_exactly_the_heads_that_read_it(moved, part, kind):
    layout = HeadLayout.of(moved.base)
    for group in range(layout.groups):
        task = add_noise(moved.base, 1, part, group)
        expected = np.zeros((layout.layers, layout.heads), bool)
        expected[1] = [layout.group(head) == group for head in range(layout.heads)]
        for head_matrix in ("product", "concat"):
            values = localize(moved.base, task, head_matrix=head_matrix, **kind).values
            assert np.array_equal(values > 0, expected)
            assert not values[~expected].any()


@pytest.mark.parametrize("part", ["key", "value"])
def test_released_reading_slices_groups_by_the_query_head(moved, part):
    """The released code takes k and v at the query head's number. With fewer groups than heads, group g then marks
    head g, which need not read it, and heads from `groups` on see nothing of any group."""
    layout = HeadLayout.of(moved.base)
    for group in range(layout.groups):
        values = localize(moved.base, add_noise(moved.base, 1, part, group), head_matrix="released").values
        assert set(zip(*np.nonzero(values))) == {(1, group)}


def test_released_reading_equals_concat_where_every_head_has_its_group(moved):
    base, task = moved_everywhere(moved.name)
    layout = HeadLayout.of(base)
    released = localize(base, task, head_matrix="released", metric="l2").values
    concat = localize(base, task, head_matrix="concat", metric="l2").values
    if layout.groups == layout.heads:
        assert np.array_equal(released, concat)
    else:
        # Head 0 reads group 0 under its own number; a head without k and v differs in its query rows alone.
        assert np.array_equal(released[:, 0], concat[:, 0])
        assert (released[:, layout.groups :] < concat[:, layout.groups :]).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_gqa"])
@each_kind
def test_equal_models_score_exactly_zero(name, kind):
    """And scores of 0 alone are no scores."""
    for head_matrix in HEAD_MATRICES:
        base, _ = moved_everywhere(name)
        with pytest.raises(UserError, match=r"No head of '.*' differs from"):
            localize(base, copy.deepcopy(base), head_matrix=head_matrix, **kind)


# --- shards, dtypes, threads, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3", "falcon_gqa", "opt"])
def test_sharded_checkpoints_score_as_single_files(tmp_path, name):
    base, task = moved_everywhere(name)
    for model, folder in ((base, "base"), (task, "task")):
        model.save_pretrained(tmp_path / folder)
        model.save_pretrained(tmp_path / f"{folder}-shards", max_shard_size="8KB")
    assert len(list((tmp_path / "base-shards").glob("*.safetensors"))) > 3
    single = localize(tmp_path / "base", tmp_path / "task")
    shards = localize(tmp_path / "base-shards", tmp_path / "task-shards")
    assert single.values.all()
    assert single.values.tobytes() == shards.values.tobytes()


def test_bfloat16_checkpoints_lose_nothing(tmp_path):
    """Stored in bfloat16, read from the folder or loaded as bfloat16 or float32: the same numbers."""
    base, task = moved_everywhere("llama")
    for model, folder in ((base, "base"), (task, "task")):
        model.to(torch.bfloat16).save_pretrained(tmp_path / folder)
    folders = localize(tmp_path / "base", tmp_path / "task").values
    assert folders.all()
    assert np.array_equal(folders, localize(base, task).values)
    assert np.array_equal(folders, localize(base.float(), task.float()).values)


STORED = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(one, other) for one in STORED for other in STORED]
pair_names = [f"{one}-{other}".replace("torch.", "") for one, other in PAIRS]


@pytest.mark.filterwarnings("ignore:.*is stored in")
@pytest.mark.parametrize("stored", PAIRS, ids=pair_names)
def test_rounding_is_no_change(tmp_path, stored):
    """One model, saved in two dtypes, from numbers that neither of the shorter ones holds."""
    source = tiny_model("llama")
    with torch.no_grad():
        for i, parameter in enumerate(source.parameters()):
            # From 1e-9 to 1, where float16 has fewer digits than bfloat16 at one end and more at the other.
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_(
                drawn * 10 ** (-9 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(i)))
            )
    for folder, dtype in zip(("base", "task"), stored):
        copy.deepcopy(source).to(dtype).save_pretrained(tmp_path / folder)
    with pytest.raises(UserError, match="No head"):
        localize(tmp_path / "base", tmp_path / "task", metric="l2", head_matrix="concat")


@pytest.mark.parametrize("stored", PAIRS, ids=pair_names)
def test_pairs_are_compared_in_the_coarser_dtype(tmp_path, stored):
    base, task = moved_everywhere("llama")
    for model, folder, dtype in ((base, "base", stored[0]), (task, "task", stored[1])):
        copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / folder)
    folders = tmp_path / "base", tmp_path / "task"
    if stored[0] == stored[1]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert localize(*folders).compared_in is None
        return
    coarser = (
        torch.bfloat16 if torch.bfloat16 in stored else torch.float16 if torch.float16 in stored else torch.float32
    )
    name = str(coarser).removeprefix("torch.")
    with pytest.warns(UserWarning, match=f"both are compared in {name}"):
        scores = localize(*folders, metric="l2", head_matrix="concat")
    assert scores.compared_in == name
    if {torch.float16, torch.bfloat16} != set(stored):
        alike = localize(base.to(coarser), task.to(coarser), metric="l2", head_matrix="concat")
        assert np.array_equal(scores.values, alike.values)
    # Of weights that were trained for real, rounding leaves nearly all of the change.
    assert scores.values == close(
        localize(*moved_everywhere("llama"), metric="l2", head_matrix="concat").values, rel=0.02
    )


def test_numbers_half_way_between_two_may_have_been_rounded_to_either():
    """1 + 2 ** -8 lies between 1 and 1 + 2 ** -7 in bfloat16; a number just above it became the latter."""
    half = torch.tensor([1 + 2**-8, 1 + 2**-8, 1 + 2**-8, 1.0], dtype=torch.float16)
    brain = torch.tensor([1, 1 + 2**-7, 1 + 2**-6, 2**-30], dtype=torch.bfloat16)
    for first, second, flip in ((half, brain, False), (brain, half, True)):
        a, b = _rounded(first, second, (first.dtype, second.dtype))[:: -1 if flip else 1]
        assert a.tolist() == [1, 1 + 2**-7, 1, 1]
        assert b.tolist() == [1, 1 + 2**-7, 1 + 2**-6, 0]


@pytest.mark.parametrize("coarse", [torch.float16, torch.bfloat16])
def test_only_projections_in_different_dtypes_are_rounded(tmp_path, coarse):
    base, task = moved_everywhere("llama")
    exact = localize(base, task).values
    task.model.layers[1].self_attn.to(coarse)
    with pytest.warns(UserWarning, match="is stored in float32"):
        scores = localize(base, task)
    assert scores.compared_in == str(coarse).removeprefix("torch.")
    assert np.array_equal(scores.values[0], exact[0])
    assert (scores.values[1] != exact[1]).all()


def test_numbers_too_large_for_the_coarser_dtype_stay_finite():
    base, task = moved_everywhere("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[0, 0] = 1e6
    for coarse in (torch.float16, torch.bfloat16):
        with pytest.warns(UserWarning, match="compared in"):
            assert np.isfinite(localize(base, task.to(coarse), metric="l2").values).all()


def test_number_of_threads_changes_no_bit(first_layers):
    threads = torch.get_num_threads()
    try:
        values = {}
        for count in (1, 2):
            torch.set_num_threads(count)
            for head_matrix in HEAD_MATRICES:
                values[count, head_matrix] = localize(*first_layers, head_matrix=head_matrix).values.tobytes()
            assert torch.get_num_threads() == count  # and localize leaves the caller's setting alone
    finally:
        torch.set_num_threads(threads)
    assert all(values[1, m] == values[2, m] for m in HEAD_MATRICES)


def test_reading_folders_builds_no_model(tmp_path, monkeypatch):
    base, task = moved_everywhere("llama")
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task", max_shard_size="8KB")
    expected = localize(base, task).values

    def no_module(*args, **kwargs):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", no_module)
    assert np.array_equal(localize(tmp_path / "base", tmp_path / "task").values, expected)


def test_localize_changes_neither_model(tmp_path):
    base, task = moved_everywhere("gpt2")
    before = [copy.deepcopy(m.state_dict()) for m in (base, task)]
    localize(base, task)
    for model, state in zip((base, task), before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_progress_bar_shows_each_layer(capsys):
    base, task = moved_everywhere("llama")
    quiet = localize(base, task)
    assert capsys.readouterr().err == ""
    loud = localize(base, task, progress=True)
    assert "2/2" in capsys.readouterr().err
    assert np.array_equal(quiet.values, loud.values)


def test_scores_say_how_they_were_made(tmp_path):
    base, task = moved_everywhere("llama")
    base.save_pretrained(tmp_path / "base")
    scores = localize(tmp_path / "base", task, metric="kl", head_matrix="concat", tau=2)
    assert (scores.base, scores.task) == (str(tmp_path / "base"), "LlamaForCausalLM")
    assert (scores.metric, scores.head_matrix, scores.tau, scores.ground) == ("kl", "concat", 2.0, "position")
    assert scores.layout == HeadLayout.of(base)
    assert scores.values.dtype == np.float64
    assert scores.values.shape == (2, 4)


# --- the numbers against references ----------------------------------------------------------------------------------

Long = np.longdouble


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def entropy_distance(p: np.ndarray, q: np.ndarray) -> Long:
    return (p * np.log(p / q)).sum()


#: Metrics in extended precision, straight from their definitions.
REFERENCE: dict[str, Callable[[np.ndarray, np.ndarray], Long]] = {
    "pad": lambda b, t: np.abs(np.cumsum(softmax(b)) - np.cumsum(softmax(t))).sum() / (len(b) - 1),
    "pad_value": lambda b, t: np.abs(np.sort(softmax(b)) - np.sort(softmax(t))).mean(),
    "wasserstein": lambda b, t: np.abs(np.cumsum(softmax(b)) - np.cumsum(softmax(t))).sum(),
    "kl": lambda b, t: entropy_distance(softmax(b), softmax(t)),
    "kl_released": lambda b, t: entropy_distance(softmax(t) + Long("1e-8"), softmax(b) + Long("1e-8")),
    "js": lambda b, t: sum(entropy_distance(p, (softmax(b) + softmax(t)) / 2) for p in (softmax(b), softmax(t))) / 2,
    "cosine": lambda b, t: (
        1 - (softmax(b) @ softmax(t)) / np.sqrt((softmax(b) @ softmax(b)) * (softmax(t) @ softmax(t)))
    ),
    "euclidean": lambda b, t: np.sqrt(((softmax(b) - softmax(t)) ** 2).sum()),
    "l2": lambda b, t: np.sqrt(((b - t) ** 2).sum()),
    "relative_l2": lambda b, t: np.sqrt(((b - t) ** 2).sum() / (b**2).sum()),
}


def reference_split(name: str, model: nn.Module, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value rows, each (heads or groups, head dim, hidden), as the modelling code splits them."""
    weights = {path: p.detach().numpy().astype(Long) for path, p in model.named_parameters() if f".{layer}." in path}

    def weight(ending: str) -> np.ndarray:
        (found,) = [w for path, w in weights.items() if path.endswith(f"{ending}.weight")]
        return found

    if name == "gpt2":
        return tuple(part.reshape(4, 8, 32) for part in np.split(weight("attn.c_attn").T, 3))
    if name == "gpt_neox":
        return tuple(weight("query_key_value").reshape(4, 3, 8, 32).transpose(1, 0, 2, 3))
    if name == "falcon_gqa":
        blocks = weight("query_key_value").reshape(2, 4, 8, 32)
        return blocks[:, :2].reshape(4, 8, 32), blocks[:, 2], blocks[:, 3]
    if name == "phi3":
        q, k, v = np.split(weight("qkv_proj"), [32, 48])
    else:
        q, k, v = (weight(f"{letter}_proj") for letter in "qkv")
    width = {"llama_mqa_head_dim": 12}.get(name, 8)
    return tuple(part.reshape(-1, width, 32) for part in (q, k, v))


def reference_matrix(q: np.ndarray, k: np.ndarray, v: np.ndarray, head: int, kind: str) -> np.ndarray:
    """A head's matrix in extended precision, flattened; q, k, v as `reference_split` gives them."""
    group = head * len(k) // len(q)
    if kind == "product":
        w_q, w_k, w_v = q[head].T, k[group].T, v[group].T  # hidden size x head dim, as in the paper
        return (w_q @ (w_k.T @ w_v)).ravel()
    own = [k[group], v[group]] if kind == "concat" else [part[head] for part in (k, v) if head < len(part)]
    return np.concatenate([part.ravel() for part in (q[head], *own)])


@pytest.mark.parametrize("name", ["llama", "llama_mha_bias", "llama_mqa_head_dim", "phi3", "gpt2", "gpt_neox"])
@each_matrix
@each_kind
def test_values_agree_with_extended_precision(name, head_matrix, kind):
    base, task = moved_everywhere(name)
    values = localize(base, task, head_matrix=head_matrix, **kind).values
    reference = REFERENCE["pad_value" if "ground" in kind else kind["metric"]]
    for layer in range(2):
        split_b, split_t = reference_split(name, base, layer), reference_split(name, task, layer)
        for head in range(4):
            matrices = [reference_matrix(*split, head, head_matrix) for split in (split_b, split_t)]
            assert values[layer, head] == close(float(reference(*matrices)), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "falcon_gqa", "gpt2"])
@each_matrix
@pytest.mark.parametrize("tau", [1, 0.5, 3.0])
def test_pad_is_scipys_wasserstein_distance(name, head_matrix, tau):
    """At the position i / (N - 1) with weight P_i; and, on the other ground, with P_i as samples."""
    base, task = moved_everywhere(name)
    position = localize(base, task, head_matrix=head_matrix, tau=tau).values
    value = localize(base, task, head_matrix=head_matrix, tau=tau, ground="value").values
    for layer in range(2):
        splits = [reference_split(name, model, layer) for model in (base, task)]
        for head in range(4):
            p_b, p_t = (softmax(reference_matrix(*s, head, head_matrix) / tau).astype(float) for s in splits)
            x = np.linspace(0, 1, len(p_b))
            assert position[layer, head] == close(wasserstein_distance(x, x, p_b, p_t), rel=1e-6)
            assert value[layer, head] == close(wasserstein_distance(p_b, p_t), rel=1e-6)


FIRST = 3


@pytest.fixture(scope="module")
def first_layers(smollm2, tmp_path_factory) -> tuple[Path, Path]:
    """The first three layers' attention of SmolLM2, and the same with noise of 1e-4 on every weight.

    These folders hold no more than what localizing reads.
    """
    config = json.loads((smollm2 / "config.json").read_text())
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = [f"model.layers.{n}.self_attn.{part}_proj.weight" for n in range(FIRST) for part in "qkv"]
        base = {name: file.get_tensor(name) for name in names}
    noise = torch.Generator().manual_seed(0)
    task = {name: w + 1e-4 * torch.randn(w.shape, generator=noise) for name, w in base.items()}
    folders = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("task")
    for folder, tensors in zip(folders, (base, task)):
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": FIRST}))
        save_file(tensors, folder / "model.safetensors")
    return folders


@pytest.fixture(scope="module")
def first_layers_reference(first_layers) -> dict[tuple[str, int, int], list[np.ndarray]]:
    """Head matrices of a few of SmolLM2's heads in extended precision, of base and task."""
    matrices: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for folder in first_layers:
        tensors = load_file(folder / "model.safetensors")
        for layer, head in ((0, 0), (1, 4), (2, 8)):
            own = [tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"].astype(Long) for part in "qkv"]
            split = [weight.reshape(-1, 64, 576) for weight in own]
            for kind in HEAD_MATRICES:
                matrices.setdefault((kind, layer, head), []).append(reference_matrix(*split, head, kind))
    return matrices


@each_matrix
@each_kind
def test_real_model_agrees_with_extended_precision(first_layers, first_layers_reference, head_matrix, kind):
    """At SmolLM2's size, where a softmax in single precision would move the cumulative sum as much as the shift."""
    values = localize(*first_layers, head_matrix=head_matrix, **kind).values
    reference = REFERENCE["pad_value" if "ground" in kind else kind["metric"]]
    for (own, layer, head), (base, task) in first_layers_reference.items():
        if own == head_matrix:
            assert values[layer, head] == close(float(reference(base, task)), rel=1e-6)


@pytest.mark.parametrize("head_matrix", ["product", "concat"])
def test_real_model_agrees_with_scipy(first_layers, first_layers_reference, head_matrix):
    values = localize(*first_layers, head_matrix=head_matrix).values
    for (own, layer, head), (base, task) in first_layers_reference.items():
        if own == head_matrix:
            p_b, p_t = softmax(base).astype(float), softmax(task).astype(float)
            x = np.linspace(0, 1, len(p_b))
            assert values[layer, head] == close(wasserstein_distance(x, x, p_b, p_t), rel=1e-6)


def test_whole_real_model_moves_only_where_it_was_moved(smollm2, first_layers, tmp_path):
    """All 30 layers of SmolLM2 against a task model whose first three layers moved, put together from two shards."""
    shutil.copy(smollm2 / "config.json", tmp_path)
    (tmp_path / "rest.safetensors").symlink_to(smollm2 / "model.safetensors")
    (tmp_path / "moved.safetensors").symlink_to(first_layers[1] / "model.safetensors")
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        where = dict.fromkeys(file.keys(), "rest.safetensors")
    with safe_open(first_layers[1] / "model.safetensors", "pt") as file:
        where.update(dict.fromkeys(file.keys(), "moved.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    scores = localize("smollm2-135m", tmp_path)
    assert scores.values.shape == (30, 9)
    assert scores.base == "smollm2-135m"
    assert scores.values[:FIRST].all()
    assert not scores.values[FIRST:].any()
    assert np.array_equal(scores.values[:FIRST], localize(*first_layers).values)


# --- each metric by hand ---------------------------------------------------------------------------------------------

#: Two entries: P_B = (1/4, 3/4), P_T = (1/2, 1/2).
BASE = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
TASK = torch.zeros(2, dtype=torch.float64)
EPSILON = 1e-8


def distance(metric: str, base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """A metric on copies: it may write over what it is given."""
    return METRICS[metric](base.clone(), task.clone(), tau)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("pad", 1 / 4),
        ("wasserstein", 1 / 4),
        ("kl", 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)),
        (
            "kl_released",
            (1 / 2 + EPSILON) * math.log((1 / 2 + EPSILON) / (1 / 4 + EPSILON))
            + (1 / 2 + EPSILON) * math.log((1 / 2 + EPSILON) / (3 / 4 + EPSILON)),
        ),
        (
            "js",
            (1 / 4 * math.log(2 / 3) + 3 / 4 * math.log(6 / 5)) / 2
            + (1 / 2 * math.log(4 / 3) + 1 / 2 * math.log(4 / 5)) / 2,
        ),
        ("cosine", 1 - 2 / math.sqrt(5)),
        ("euclidean", math.sqrt(2) / 4),
        ("l2", math.log(3)),
        ("relative_l2", 1.0),
    ],
)
def test_two_entries_by_hand(metric, expected):
    assert distance(metric, BASE, TASK, 1.0) == close(expected, rel=1e-12)


def test_every_metric_has_a_reference():
    assert set(REFERENCE) == {*METRICS, "pad_value"}


def random_pair(entries: int, shift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(entries)
    base, step = torch.randn(2, entries, dtype=torch.float64, generator=noise)
    return base, base + shift * step


def test_directions():
    """KL is D(P_B || P_T), the released one D(P_T || P_B); all other metrics between softmaxes are symmetric."""
    base, task = random_pair(50)
    assert distance("kl", base, task, 1.0) != close(distance("kl", task, base, 1.0), rel=1e-3)
    assert distance("kl_released", base, task, 1.0) == close(distance("kl", task, base, 1.0), rel=1e-5)
    for metric in ("pad", "wasserstein", "js", "cosine", "euclidean", "l2"):
        assert distance(metric, base, task, 1.0) == close(distance(metric, task, base, 1.0), rel=1e-12)


def test_released_kl_adds_its_epsilon():
    """Where P_B all but vanishes, the 1e-8 decides: without it the distance would be about 100."""
    base = torch.tensor([0.0, -200.0], dtype=torch.float64)
    assert distance("kl", TASK, base, 1.0) == close(100 - math.log(2), rel=1e-9)
    assert distance("kl_released", base, TASK, 1.0) == close(
        (0.5 + EPSILON) * (math.log((0.5 + EPSILON) / EPSILON) + math.log((0.5 + EPSILON) / (1 + EPSILON))), rel=1e-9
    )


@pytest.mark.parametrize("entries", [2, 17, 1000, 36864])
@pytest.mark.parametrize("metric", METRICS)
def test_no_distance_to_itself(metric, entries):
    base, _ = random_pair(entries)
    assert distance(metric, base, base, 1.0) == 0


@pytest.mark.parametrize("shift", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("metric", ["kl", "kl_released", "js", "cosine"])
def test_second_order_distances_do_not_cancel(metric, shift):
    """For small shifts these are of the order shift squared, and lose all their digits when written naively."""
    base, task = random_pair(2000, shift)
    pair = base.numpy().astype(Long), task.numpy().astype(Long)
    p, q = softmax(pair[0]), softmax(pair[1])
    if metric == "cosine":
        difference = p / np.sqrt(p @ p) - q / np.sqrt(q @ q)
        expected = difference @ difference / 2
    else:
        # With p (r - 1 - log r) instead of -p log r, r = q / p, nothing cancels in extended precision either.
        def stable(p: np.ndarray, q: np.ndarray) -> Long:
            r = (q - p) / p
            return (p * (r - np.log1p(r))).sum()

        e = Long("1e-8")
        expected = {
            "kl": lambda: stable(p, q),
            "kl_released": lambda: stable(q + e, p + e),
            "js": lambda: (stable(p, (p + q) / 2) + stable(q, (p + q) / 2)) / 2,
        }[metric]()
    assert distance(metric, base, task, 1.0) == close(float(expected), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_no_distance_to_itself_whatever_the_numbers(metric):
    """Rounding alone must not give an untouched head a score."""
    for seed in range(200):
        base = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 10 ** (
            seed % 5 - 3
        )
        assert distance(metric, base, base, 1.0) == 0


def test_distributions_that_share_nothing():
    """Probabilities may underflow (at a small tau they do); what they are compared with must stay finite."""
    base = torch.tensor([0.0, -2000.0], dtype=torch.float64)
    task = torch.tensor([-2000.0, 0.0], dtype=torch.float64)
    assert distance("kl", base, task, 1.0) == close(2000, rel=1e-12)
    assert distance("kl", base, task, 1e-3) == close(2e6, rel=1e-12)
    assert distance("js", base, task, 1.0) == close(math.log(2), rel=1e-12)
    assert distance("pad", base, task, 1.0) == close(1, rel=1e-12)
    assert distance("cosine", base, task, 1.0) == close(1, rel=1e-12)
    one = 1 + EPSILON
    assert distance("kl_released", base, task, 1.0) == close((one - EPSILON) * math.log(one / EPSILON), rel=1e-12)


def test_growth_with_the_shift():
    """Appendix E of the paper: the Wasserstein distance grows linearly with a shift, KL quadratically."""
    for metric, factor in (("pad", 10), ("kl", 100), ("js", 100), ("l2", 10)):
        near, far = (distance(metric, *random_pair(500, shift), 1.0) for shift in (1e-4, 1e-3))
        assert far / near == close(factor, rel=0.01)


def test_wasserstein_is_pad_without_the_division():
    base, task = moved_everywhere("llama")
    pad = localize(base, task, metric="pad").values
    assert localize(base, task, metric="wasserstein").values == close(pad * (32 * 8 - 1), rel=1e-14)
    concat = localize(base, task, metric="pad", head_matrix="concat").values
    whole = localize(base, task, metric="wasserstein", head_matrix="concat").values
    assert whole == close(concat * (3 * 32 * 8 - 1), rel=1e-14)


@pytest.mark.parametrize("metric", [m for m in METRICS if "l2" not in m])
@pytest.mark.parametrize("height", [-1e5, -800, -90, 90, 800, 1e5])
def test_softmaxes_do_not_overflow(metric, height):
    """Adding the same to every entry changes no softmax; taken naively, exp(800) is infinite and exp(-800) zero."""
    base, task = random_pair(100)
    expected = distance(metric, base, task, 1.0)
    assert distance(metric, base + height, task + height, 1.0) == close(expected, rel=1e-9)
    assert distance(metric, base, task + height, 1.0) == close(expected, rel=1e-9)


@pytest.mark.parametrize("metric", [m for m in METRICS if "l2" not in m])
@pytest.mark.parametrize("tau", [0.25, 2, 7.0])
def test_tau_divides_before_the_softmax(metric, tau):
    base, task = random_pair(100)
    assert distance(metric, base, task, tau) == close(distance(metric, base / tau, task / tau, 1.0), rel=1e-13)
    assert distance(metric, base, task, tau) != close(distance(metric, base, task, 1.0), rel=1e-2)


def test_relative_l2_of_nothing():
    base, task = moved_everywhere("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.zero_()
    with pytest.raises(UserError, match="use the metric l2"):
        localize(base, task, metric="relative_l2")
    assert localize(base, task, metric="l2").values.all()


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"metric": "padd"}, "no metric 'padd': did you mean 'pad'"),
        ({"metric": "cosin"}, "did you mean 'cosine'"),
        ({"metric": "xyz"}, "known are: cosine, euclidean"),
        ({"metric": ""}, "known are"),
        ({"metric": None}, "no metric 'None'"),
        ({"head_matrix": "produkt"}, "no head matrix 'produkt': did you mean 'product'"),
        ({"head_matrix": 3}, "no head matrix '3'"),
        ({"ground": "positions"}, "no ground 'positions': did you mean 'position'"),
        ({"ground": "value", "metric": "kl"}, "'value' belongs to the metric 'pad'; 'kl' has none"),
        ({"ground": "value", "metric": "wasserstein"}, "belongs to the metric 'pad'"),
        ({"tau": 0}, "tau is 0"),
        ({"tau": -1}, "tau is -1"),
        ({"tau": math.nan}, "tau is nan"),
        ({"tau": math.inf}, "tau is inf"),
        ({"tau": "1"}, "tau is '1'"),
        ({"tau": None}, "tau is None"),
        ({"tau": 2, "metric": "l2"}, "uses no softmax"),
        ({"tau": 0.5, "metric": "relative_l2"}, "uses no softmax"),
    ],
)
def test_impossible_parameters_are_refused_before_anything_is_read(asked, says):
    with pytest.raises(UserError) as error:
        localize("neither/read", "nor/there", **asked)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# --- scores as a value -----------------------------------------------------------------------------------------------


def scores_of(values: list[list[float]]) -> HeadScores:
    layers, heads = np.shape(values)
    layout = HeadLayout("llama", layers=layers, heads=heads, groups=1, head_dim=8, hidden_size=32)
    return HeadScores(np.array(values, dtype=np.float64), layout, "base", "task")


@pytest.mark.filterwarnings("ignore:The selection")
def test_top_and_bottom_round_up_and_break_ties_downwards():
    scores = scores_of([[1, 3, 2], [3, 0, 3], [0, 2, 1]])
    assert scores.top(ONE_HEAD).heads == ((0, 1),)
    assert scores.top(0.2).heads == ((0, 1), (1, 0))  # 1.8 heads
    assert scores.top(0.4).heads == ((0, 1), (0, 2), (1, 0), (1, 2))  # (0, 2) before (2, 1)
    assert scores.bottom(ONE_HEAD).heads == ((1, 1),)
    assert scores.bottom(0.3).heads == ((0, 0), (1, 1), (2, 0))  # (0, 0) before (2, 2)
    assert scores.top(1).heads == scores.bottom(1).heads
    assert len(scores.top(1.0)) == 9


@pytest.mark.parametrize(
    ("values", "ratio", "says"),
    [
        ([[1, 3, 2], [3, 0, 3], [0, 2, 1]], 0.2, "2 of 3 heads of the same score, 3"),
        ([[1, 3, 2], [3, 0, 3], [0, 2, 1]], 0.3, None),
        ([[1, 3, 2], [3, 0, 3], [0, 2, 1]], 0.4, "1 of 2 heads of the same score, 2"),
        ([[1, 3, 2], [3, 0, 3], [0, 2, 1]], 0.85, "1 of 2 heads of the same score, 0"),
        ([[1, 3, 2], [3, 0, 3], [0, 2, 1]], 1, None),
        ([[0, 0, 0], [0.5, 0, 0]], 0.5, "2 of 5 heads of the same score, 0"),
        ([[1, 2, 3, 4]], 0.5, None),
        ([[-1, -1, 2, 4]], 0.75, "1 of 2 heads of the same score, -1"),
    ],
)
def test_ties_at_the_edge_are_said(values, ratio, says):
    negative = scores_of((-np.array(values)).tolist())
    for select in (scores_of(values).top, negative.bottom):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            select(ratio)
        said = [str(warning.message) for warning in caught]
        assert len(said) == (says is not None)
        assert says is None or says.partition(",")[0] in said[0]
        assert says is None or select == negative.bottom or f"{says}:" in said[0]


def test_scores_without_a_difference_select_nothing():
    assert scores_of([[1, 2]]).checked().values.any()
    with pytest.raises(UserError, match="No head of 'task' differs from 'base'"):
        scores_of([[0.0] * 4] * 3).checked()
    with pytest.raises(UserError, match="All heads of 'task' have the same score"):
        scores_of([[0.3] * 4] * 3).checked()
    assert scores_of([[0.3]]).checked()  # of a model with one head


@pytest.mark.filterwarnings("ignore:The selection")
def test_all_equal_scores_select_in_order():
    scores = scores_of([[0.0] * 4] * 3)
    assert scores.top(0.5).heads == scores.bottom(0.5).heads == ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1))


@pytest.mark.parametrize("ratio", [0, -1, 1.5, math.nan, True, "a"])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(UserError, match=r"not in \(0, 1\]"):
        scores_of([[1, 2]]).top(ratio)
    with pytest.raises(UserError, match=r"not in \(0, 1\]"):
        scores_of([[1, 2]]).bottom(ratio)


def test_save_and_load_keep_every_bit(tmp_path):
    base, task = moved_everywhere("falcon_gqa")
    scores = localize(base, task, metric="js", head_matrix="released", tau=0.3)
    scores.values[0, 0], scores.values[0, 1] = 5e-324, 0.1 + 0.2
    scores.save(tmp_path / "scores.json")
    loaded = HeadScores.load(tmp_path / "scores.json")
    assert loaded.values.tobytes() == scores.values.tobytes()
    assert loaded.values.dtype == np.float64
    assert loaded.dump() == scores.dump()
    assert loaded.layout == scores.layout


def test_scores_say_what_they_were_compared_in_where_that_was_not_what_is_stored(tmp_path):
    assert "compared_in" not in scores_of([[1, 2]]).dump()
    scores = dataclasses.replace(scores_of([[1, 2]]), compared_in="bfloat16")
    scores.save(tmp_path / "scores.json")
    assert HeadScores.load(tmp_path / "scores.json").compared_in == "bfloat16"
    scores_of([[1, 2]]).save(tmp_path / "scores.json")
    assert HeadScores.load(tmp_path / "scores.json").compared_in is None


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{}",
        {"values": [[1, 2]]},
        {"values": [[1, 2], [3, 4, 5]]},
        {"values": [[1, 2], [3, math.nan]]},
        {"values": [[1, 2], [3, math.inf]]},
        {"values": [[1, 2], [3, "many"]]},
        {"values": None},
        {"values": [[10**400, 2], [3, 4]]},
        {"layout": {"layers": 2}},
        {"layout": 3},
        {"unknown": 1},
    ],
)
def test_what_are_no_scores_is_refused(tmp_path, change):
    file = tmp_path / "scores.json"
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        file.write_text(json.dumps({**scores_of([[1, 2], [3, 4]]).dump(), **change}))
    with pytest.raises(UserError) as error:
        HeadScores.load(file)
    assert len(str(error.value).splitlines()) == 1
    assert str(file) in str(error.value)


def test_missing_scores_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        HeadScores.load(tmp_path / "none.json")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values",
    [
        np.ones((1, 1)),
        np.zeros((1, 1)),
        np.zeros((2, 3)),
        np.full((4, 4), 1e-30),
        np.random.default_rng(0).random((32, 32)),
        np.random.default_rng(0).lognormal(-14, 3, (30, 9)),
        np.eye(1, 9),
        np.random.default_rng(0).random((80, 64)),
    ],
    ids=["1x1", "1x1 zero", "2x3 zeros", "4x4 equal", "32x32", "30x9", "one moved", "80x64"],
)
def test_heatmap_can_be_saved(values):
    figure = scores_of(values).heatmap()
    assert type(figure).__name__ == "Figure"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


def test_heatmap_marks_the_selected_heads():
    scores = scores_of(np.random.default_rng(1).random((6, 5)))
    axes = scores.heatmap(0.2).axes[0]
    (marks,) = axes.collections
    assert {(int(y), int(x)) for x, y in marks.get_offsets()} == set(scores.top(0.2).heads)
    assert np.array_equal(axes.images[0].get_array().data, scores.values)
    assert axes.images[0].origin == "lower"


def test_heatmap_says_ties_and_what_was_compared():
    plain = scores_of(np.arange(20.0).reshape(4, 5) + 1).heatmap(0.2)
    assert plain.legends[0].get_texts()[0].get_text() == "top 20% (4 heads)"
    assert plain.axes[1].get_ylabel() == "pad (product)"
    tied = dataclasses.replace(scores_of(np.eye(2, 8)), compared_in="float16").heatmap(0.25)
    assert tied.legends[0].get_texts()[0].get_text().split("\n") == [
        "top 25% (4 heads),",
        "ending among 2 of 14 heads of the same score, 0",
    ]
    assert tied.axes[1].get_ylabel() == "pad (product), compared in float16"
