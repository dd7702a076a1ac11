"""Where heads lie, held against what the models themselves compute; and selections of heads."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, tiny_model
from torch import nn
from transformers import BertConfig, BloomConfig, Gemma3Config, LlamaConfig, OPTConfig, T5Config

from alps_repro import HeadLayout, HeadSelection, UserError
from alps_repro.heads.layout import ARCHITECTURES, PARTS
from alps_repro.heads.selection import head_count

#: What architectures call the projection behind attention; its input holds the heads' results side by side.
OUTPUT_PROJECTIONS = ("o_proj", "dense", "c_proj", "out_proj")

#: The tiny models whose query, key and value projections have biases.
BIASED = {"llama_mha_bias", "qwen2", "phi", "opt", "gpt2", "gpt_neox", "falcon_mha"}

#: SmolLM2-135M's numbers.
SMOLLM2 = HeadLayout("llama", layers=30, heads=9, groups=3, head_dim=64, hidden_size=576)
SMALL = HeadLayout("llama", layers=4, heads=6, groups=2, head_dim=8, hidden_size=48)


class Probe:
    """A tiny model whose first layer's attention can be perturbed row by row, and the heads' results read."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, tiny_model(name)
        self.noise = torch.Generator().manual_seed(4)
        self.layout = HeadLayout.of(self.model)
        # The first layer: what it gets cannot depend on what is perturbed.
        prefix = self.layout.prefix(path for path, _ in self.model.named_modules())
        self.modules = {part: self.model.get_submodule(prefix + self.layout.module(0, part)) for part in PARTS}
        attention = self.model.get_submodule((prefix + self.layout.module(0, "query")).rpartition(".")[0])
        children = dict(attention.named_children())
        (self.output,) = [children[n] for n in OUTPUT_PROJECTIONS if n in children]
        if self.layout.architecture == "olmo2":
            # OLMo 2 normalizes the queries and keys of all heads together, so that each row moves every head a
            # little. Without these two norms (which move no row elsewhere) the model's own split can be seen.
            attention.q_norm = attention.k_norm = nn.Identity()
        self.tokens = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for module in set(self.modules.values()):  # larger than at first, so that every row counts
                module.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
                if module.bias is not None:
                    module.bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
        self.unperturbed = self.heads()

    @torch.no_grad()
    def heads(self) -> torch.Tensor:
        """What each head hands to the output projection: (batch, positions, heads, head dim)."""
        seen = []
        hook = self.output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        try:
            self.model(self.tokens)
        finally:
            hook.remove()
        return seen[0].unflatten(-1, (self.layout.heads, self.layout.head_dim))

    @torch.no_grad()
    def changed_positions(self, part: str, rows: range, position: int) -> list[int]:
        """The positions at which any head's result changes when these outputs of one position get noise."""

        def add_noise(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            noise = torch.randn((len(output), len(rows)), generator=self.noise)
            output[:, position, rows.start : rows.stop] += noise
            return output

        hook = self.modules[part].register_forward_hook(add_noise)
        try:
            differs = (self.heads() != self.unperturbed).flatten(2).any(-1).any(0)
        finally:
            hook.remove()
        return differs.nonzero().flatten().tolist()

    @torch.no_grad()
    def changed(self, part: str, rows: range, *, how: str, what: str = "weight and bias") -> set[int]:
        """The heads whose result changes when these rows are zeroed or get noise."""
        module = self.modules[part]
        kept = {name: tensor.clone() for name, tensor in module.named_parameters()}
        weight = module.weight.T if self.layout.transposed else module.weight
        for tensor in [weight] * ("weight" in what) + [module.bias] * ("bias" in what and module.bias is not None):
            own = tensor[rows.start : rows.stop]
            own.copy_(torch.zeros_like(own) if how == "zero" else own + torch.randn(own.shape, generator=self.noise))
        result = self.heads()
        for name, tensor in module.named_parameters():
            tensor.copy_(kept[name])
        same = [torch.equal(result[:, :, h], self.unperturbed[:, :, h]) for h in range(self.layout.heads)]
        return {head for head, equal in enumerate(same) if not equal}


@pytest.fixture(scope="module", params=TINY)
def probe(request) -> Probe:
    return Probe(request.param)


def test_every_architecture_has_a_tiny_model():
    """Without one, nothing holds the rows of that architecture against its forward pass."""
    assert {model_type for model_type, _ in TINY.values()} == set(ARCHITECTURES)


def test_layout_of_model_and_config_agree(probe):
    layout = probe.layout
    assert HeadLayout.of(probe.model.config) == layout
    assert (layout.layers, layout.heads) == (2, 4)
    # The output projection's width is the model's own word on heads and head width.
    assert probe.unperturbed.shape == (2, 9, layout.heads, layout.head_dim)
    assert (probe.modules["query"].bias is not None) == (probe.name in BIASED)


@pytest.mark.parametrize("how", ["zero", "noise"])
def test_query_rows_move_their_head_alone(probe, how):
    for head in range(probe.layout.heads):
        assert probe.changed("query", probe.layout.rows("query", head), how=how) == {head}


@pytest.mark.parametrize("how", ["zero", "noise"])
@pytest.mark.parametrize("part", ["key", "value"])
def test_group_rows_move_exactly_the_heads_that_read_the_group(probe, part, how):
    layout = probe.layout
    for group in range(layout.groups):
        readers = {head for head in range(layout.heads) if layout.group(head) == group}
        assert probe.changed(part, layout.rows(part, group), how=how) == readers


def test_parts_are_what_they_are_called(probe):
    """A query acts at its own position alone; a key, on later positions, and not on the first, which has nothing to
    choose from; a value, from its own position on. Queries, keys and values that are swapped show up here."""
    layout = probe.layout
    for head in range(layout.heads):
        assert probe.changed_positions("query", layout.rows("query", head), 3) == [3]
    for group in range(layout.groups):
        assert probe.changed_positions("key", layout.rows("key", group), 0) == [*range(1, 9)]
        assert probe.changed_positions("value", layout.rows("value", group), 0) == [*range(9)]


@pytest.mark.parametrize("name", sorted(BIASED))
def test_biases_lie_in_the_rows_of_their_head(name):
    """A bias belongs to the same rows as the weights. (Keys are left out: without rotary positions a bias of the
    keys adds the same to every score of a query, which the softmax takes away again.)"""
    probe = Probe(name)
    layout = probe.layout
    for head in range(layout.heads):
        assert probe.changed("query", layout.rows("query", head), how="noise", what="bias") == {head}
    for group in range(layout.groups):
        readers = {head for head in range(layout.heads) if layout.group(head) == group}
        assert probe.changed("value", layout.rows("value", group), how="noise", what="bias") == readers


def test_every_single_row_belongs_to_its_head(probe):
    """Not just the blocks: the first and last row of each block, which an off-by-one would misplace."""
    layout = probe.layout
    for head in range(layout.heads):
        block = layout.rows("query", head)
        for row in (block[0], block[-1]):
            assert probe.changed("query", range(row, row + 1), how="noise") == {head}
    for group in range(layout.groups):
        block = layout.rows("value", group)
        for row in (block[0], block[-1]):
            moved = probe.changed("value", range(row, row + 1), how="noise")
            assert moved == {head for head in range(layout.heads) if layout.group(head) == group}


def test_rows_partition_every_projection(probe):
    layout = probe.layout
    for path in layout.modules(0):
        parts = [part for part in PARTS if layout.module(0, part) == path]
        rows = np.concatenate([layout.split(part) for part in parts])
        weight = probe.modules[parts[0]].weight
        outputs, inputs = weight.T.shape if layout.transposed else weight.shape
        assert sorted(rows) == list(range(outputs))
        assert {layout.projection_rows(part) for part in parts} == {outputs}
        assert inputs == layout.hidden_size


def test_split_is_in_head_order(probe):
    layout = probe.layout
    for part, count in (("query", layout.heads), ("key", layout.groups), ("value", layout.groups)):
        split = layout.split(part).reshape(count, layout.head_dim)
        for index in range(count):
            assert list(split[index]) == list(layout.rows(part, index))


@pytest.mark.parametrize("name", TINY)
def test_tensors_of_attention_are_those_of_the_model(name):
    """All of them, and no others but biases that a normalization does not have."""
    model = tiny_model(name)
    layout = HeadLayout.of(model)
    prefix = layout.prefix(path for path, _ in model.named_modules())
    attention = prefix + layout.output_module(1).rpartition(".")[0] + "."
    own = {tensor.removeprefix(prefix) for tensor in model.state_dict() if tensor.startswith(attention)}
    known = layout.tensors(1, model.config)
    assert own <= known
    assert all("norm.bias" in tensor or "layernorm" in tensor for tensor in known - own)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_no_such_head_or_group(index):
    with pytest.raises(UserError, match=f"There is no query {index}"):
        HeadLayout.of(tiny_model("llama_mha_bias")).rows("query", index)
    with pytest.raises(UserError, match=r"There is no value 2: .* 0 to 1"):
        HeadLayout.of(tiny_model("llama").config).rows("value", 2)


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), BloomConfig()], ids=lambda c: c.model_type)
def test_unknown_architecture_is_named_and_never_guessed(config):
    with pytest.raises(UserError, match=r"ARCHITECTURES in alps_repro/heads/layout\.py") as error:
        HeadLayout.of(config)
    assert f"'{config.model_type}'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("stranger", [object(), "a/folder", None])
def test_what_is_no_model_has_no_layout(stranger):
    with pytest.raises(UserError, match="is not known"):
        HeadLayout.of(stranger)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=4),
        LlamaConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=8),
        LlamaConfig(hidden_size=48, num_attention_heads=-4),
        LlamaConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=-2),
        LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=0),
        LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=-8),
        OPTConfig(hidden_size=48, num_attention_heads=0),
    ],
    ids=["6:4", "4:8", "-4", "4:-2", "no layers", "head_dim", "no heads"],
)
def test_numbers_that_do_not_fit_are_refused(config):
    with pytest.raises(UserError, match="heads") as error:
        HeadLayout.of(config)
    assert len(str(error.value).splitlines()) == 1


def test_gemma3_with_vision_gives_the_text_part():
    text = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    layout = HeadLayout.of(Gemma3Config(text_config={**text, "head_dim": 16}))
    assert layout == HeadLayout("gemma3_text", layers=3, heads=4, groups=2, head_dim=16, hidden_size=32)


def test_prefix_must_be_found_exactly_once():
    first = SMALL.module(0, "query")
    assert SMALL.prefix([f"model.{first}.weight"]) == "model."
    assert SMALL.prefix([first]) == ""
    for names in ([], ["lm_head.weight"], [f"model.{first}.weight", f"language_model.{first}.weight"]):
        with pytest.raises(UserError, match=f"{first}.weight"):
            SMALL.prefix(names)


# --- rows that a selection trains -----------------------------------------------------------------------------------


def test_selected_rows_take_a_group_once():
    """Heads 0 to 2 of SmolLM2 share group 0, head 8 reads group 2."""
    rows = SMOLLM2.selected_rows([(0, 0), (0, 1), (0, 2), (29, 8)])
    assert {path: len(r) for path, r in rows.items()} == {
        "layers.0.self_attn.q_proj": 3 * 64,
        "layers.0.self_attn.k_proj": 64,
        "layers.0.self_attn.v_proj": 64,
        "layers.29.self_attn.q_proj": 64,
        "layers.29.self_attn.k_proj": 64,
        "layers.29.self_attn.v_proj": 64,
    }
    assert list(rows["layers.29.self_attn.k_proj"]) == list(range(128, 192))
    assert list(rows["layers.29.self_attn.q_proj"]) == list(range(512, 576))
    assert all(r.dtype == np.int64 for r in rows.values())


def test_share_of_the_parameters_that_ten_percent_of_the_heads_train():
    """27 of 270 heads, one in every group of nine layers: 10 % of the query rows but 30 % of the key/value rows."""
    heads = [(layer, head) for layer in range(9) for head in (0, 3, 6)]
    trained = {path: len(r) for path, r in SMOLLM2.selected_rows(heads).items()}
    query = sum(n for path, n in trained.items() if "q_proj" in path)
    shared = sum(n for path, n in trained.items() if "q_proj" not in path)
    assert (query, shared) == (27 * 64, 2 * 27 * 64)
    assert query / (30 * 576) == 0.1
    assert shared / (30 * 2 * 192) == 0.3


@pytest.mark.parametrize("name", TINY)
def test_selecting_all_heads_selects_all_rows(name):
    layout = HeadLayout.of(tiny_model(name).config)
    rows = layout.selected_rows(HeadSelection.all(layout))
    assert sorted(rows) == sorted(path for layer in range(layout.layers) for path in layout.modules(layer))
    for path, own in rows.items():
        part = next(p for layer in range(layout.layers) for p in PARTS if layout.module(layer, p) == path)
        assert list(own) == list(range(layout.projection_rows(part)))


@pytest.mark.parametrize("name", TINY)
def test_selected_rows_of_one_head_are_its_own(name):
    layout = HeadLayout.of(tiny_model(name).config)
    rows = layout.selected_rows([(1, 2)])
    expected: dict[str, list[int]] = {}
    for part, index in (("query", 2), ("key", layout.group(2)), ("value", layout.group(2))):
        expected.setdefault(layout.module(1, part), []).extend(layout.rows(part, index))
    assert {path: list(r) for path, r in rows.items()} == {path: sorted(r) for path, r in expected.items()}


# --- selections -----------------------------------------------------------------------------------------------------


def test_selection_is_sorted_and_unique():
    selection = HeadSelection([(3, 1), (0, 5), (3, 1), (np.int64(0), np.int64(2))], SMALL)
    assert selection.heads == ((0, 2), (0, 5), (3, 1))
    assert list(selection) == list(selection.heads)
    assert len(selection) == 3
    assert all(type(i) is int for pair in selection for i in pair)


@pytest.mark.parametrize("head", [(4, 0), (0, 6), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist_are_refused(head):
    with pytest.raises(UserError, match=f"no head {head[1]} in layer {head[0]}: .* layers 0 to 3 with heads 0 to 5"):
        HeadSelection((head,), SMALL)


@pytest.mark.parametrize("head", [3, (1,), (1, 2, 3), "12", ("1", "2"), (0.5, 1), (1.0, 2), (None, 1)])
def test_what_is_not_a_pair_of_integers_is_refused(head):
    """Rounding 0.5 or reading '12' as a pair would train heads that nobody asked for."""
    with pytest.raises(UserError, match="is not a head"):
        HeadSelection((head,), SMALL)


@pytest.mark.parametrize(
    ("ratio", "total", "count"),
    [
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.7, 10, 7),
        (0.1, 270, 27),
        (0.101, 270, 28),
        (0.1, 9, 1),
        (0.5, 3, 2),
        (1e-9, 270, 1),
        (1, 8, 8),
        (1.0, 8, 8),
        (np.float64(0.1), 30, 3),
    ],
)
def test_count_is_rounded_up_in_decimal(ratio, total, count):
    """In binary 0.07 * 100 is 7.000000000000001, and its ceiling 8."""
    assert head_count(ratio, total) == count


@given(st.integers(1, 1000), st.integers(1, 2000))
def test_count_is_the_exact_ceiling(thousandths, total):
    exact = Fraction(thousandths, 1000) * total
    assert head_count(thousandths / 1000, total) == math.ceil(exact)


@pytest.mark.parametrize("ratio", [0, 0.0, -1, -0.1, 1.5, 2, math.nan, math.inf, True, "a", "0.1", None])
def test_ratios_outside_are_refused(ratio):
    for select in (HeadSelection.random, HeadSelection.layer_consistent):
        with pytest.raises(UserError, match=r"not in \(0, 1\]"):
            select(SMALL, ratio, 0)


@pytest.mark.parametrize("ratio", [1, 1.0])
def test_ratio_one_is_every_head(ratio):
    every = HeadSelection.all(SMALL)
    assert len(every) == SMALL.total == 24
    assert HeadSelection.random(SMALL, ratio, 0) == every
    assert HeadSelection.layer_consistent(SMALL, ratio, 0) == every


@pytest.mark.parametrize("ratio", [0.01, 0.07, 0.1, 0.33, 0.5])
def test_random_draws_that_many_heads(ratio):
    drawn = HeadSelection.random(SMOLLM2, ratio, 3)
    assert len(drawn) == math.ceil(Fraction(str(ratio)) * 270)
    assert drawn == HeadSelection.random(SMOLLM2, ratio, 3)
    assert drawn != HeadSelection.random(SMOLLM2, ratio, 4)


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 1), (0.12, 2), (0.34, 4), (0.9, 9)])
def test_layer_consistent_draws_the_same_number_in_every_layer(ratio, count):
    drawn = HeadSelection.layer_consistent(SMOLLM2, ratio, 3)
    per_layer = [sum(layer == own for own, _ in drawn) for layer in range(30)]
    assert per_layer == [count] * 30
    assert drawn == HeadSelection.layer_consistent(SMOLLM2, ratio, 3)
    if count < 9:
        assert drawn != HeadSelection.layer_consistent(SMOLLM2, ratio, 4)
        # Drawn anew in each layer: not one column of heads repeated.
        assert len({tuple(head for own, head in drawn if own == layer) for layer in range(30)}) > 1


def test_random_reaches_every_head():
    """No head is out of reach of the draw, and none is always in it."""
    seen = np.zeros((SMALL.layers, SMALL.heads))
    for seed in range(200):
        for layer, head in HeadSelection.random(SMALL, 0.25, seed):
            seen[layer, head] += 1
    assert seen.min() > 20  # expected 50 each
    assert seen.max() < 90


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    HeadSelection.random(SMALL, 0.5, 1)
    HeadSelection.layer_consistent(SMALL, 0.5, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_selection_round_trip(tmp_path):
    for selection in (HeadSelection.random(SMOLLM2, 0.1, 1), HeadSelection((), SMALL), HeadSelection.all(SMALL)):
        selection.save(tmp_path / "heads.json")
        assert HeadSelection.load(tmp_path / "heads.json") == selection


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe\x00",
        b'{"heads": [[0, 1]]}',
        json.dumps({"heads": 3, "layout": asdict(SMALL)}).encode(),
        json.dumps({"heads": [3], "layout": asdict(SMALL)}).encode(),
        json.dumps({"heads": [[0, 1.5]], "layout": asdict(SMALL)}).encode(),
        json.dumps({"heads": [[9, 1]], "layout": asdict(SMALL)}).encode(),
        json.dumps({"heads": [[0, 1]], "layout": {"layers": 2}}).encode(),
        json.dumps({"heads": [[0, 1]], "layout": {**asdict(SMALL), "layers": "four"}}).encode(),
        json.dumps({"heads": [[0, 1]], "layout": {**asdict(SMALL), "more": 1}}).encode(),
    ],
)
def test_what_is_no_selection_is_refused(tmp_path, content):
    file = tmp_path / "heads.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        HeadSelection.load(file)
    assert len(str(error.value).splitlines()) == 1


def test_missing_selection_file(tmp_path):
    with pytest.raises(UserError, match="is not a saved head selection"):
        HeadSelection.load(tmp_path / "none.json")
