"""Methods: controls that match alps in weights, LoRA counted as peft makes it, heads as each method says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, tiny_model
from transformers import PreTrainedModel

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection, head_count
from alps_repro.localization.scores import HeadScores, localize
from alps_repro.training.finetune import trainable
from alps_repro.training.methods import LORA_RANK, METHODS, SCOPES, lora_weights, row_weights

SMOLLM2 = HeadLayout("llama", layers=30, heads=9, groups=3, head_dim=64, hidden_size=576)
LLAMA_1B = HeadLayout("llama", layers=16, heads=32, groups=8, head_dim=64, hidden_size=2048)
LAYOUTS = {name: HeadLayout.of(tiny_model(name)) for name in TINY} | {"SmolLM2": SMOLLM2, "Llama-3.2-1B": LLAMA_1B}


def scores_of(layout: HeadLayout, seed: int = 0) -> HeadScores:
    values = np.random.default_rng(seed).random((layout.layers, layout.heads))
    return HeadScores(values, layout, "base", "task")


def selected(method: str, layout: HeadLayout, ratio: float = 0.1, seed: int = 0, of: int = 0) -> HeadSelection:
    heads = METHODS[method].select(layout, ratio, scores_of(layout, of), seed)
    assert isinstance(heads, HeadSelection)
    return heads


# Weights.


@pytest.mark.parametrize("name", TINY)
def test_row_weights_are_what_is_trained(name: str) -> None:
    """Of every architecture, and for a group that two selected heads share."""
    layout, model = LAYOUTS[name], tiny_model(name)
    heads = HeadSelection(((0, 0), (0, 1), (1, 3)), layout)
    tuned = trainable(model, heads, "heads")
    rows = [p for p in tuned.parameters() if p.requires_grad and p.ndim == 2]  # biases have one dimension
    assert sum(p.numel() for p in rows) == row_weights(heads)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_random_matched_trains_as_many_weights_as_alps(name: str, ratio: float) -> None:
    """Exactly, or less than a head with its group short of it, where no head that is left fits in; never more."""
    layout = LAYOUTS[name]
    block, short = layout.head_dim * layout.hidden_size, Counter()
    for seed in range(20):
        alps, drawn = (selected(method, layout, ratio, 1000 + seed, of=seed) for method in ("alps", "random_matched"))
        missing = row_weights(alps) - row_weights(drawn)
        assert missing % block == 0
        assert 0 <= missing < 3 * block
        if missing:  # all heads of its groups are taken, so that the next one would bring a group along
            groups = Counter((layer, layout.group(head)) for layer, head in drawn)
            assert set(groups.values()) == {layout.heads_per_group}
        short[missing // block] += 1
    if layout.heads_per_group == 1 or name not in TINY:  # the tiny models have few groups to end with
        assert short.keys() == {0}
    assert short[0] >= 10


def test_random_matched_follows_its_seed() -> None:
    drawn = [selected("random_matched", SMOLLM2, seed=seed) for seed in range(10)]
    assert len({heads.heads for heads in drawn}) == 10
    assert selected("random_matched", SMOLLM2, seed=3) == drawn[3]
    # It is drawn from the whole model: in ten tries most layers and all positions come up.
    assert len({layer for heads in drawn for layer, _ in heads}) == SMOLLM2.layers
    assert {head for heads in drawn for _, head in heads} == set(range(SMOLLM2.heads))
    # And it is not the heads of alps.
    alps = set(selected("alps", SMOLLM2))
    assert max(len(alps & set(heads)) for heads in drawn) < len(alps) / 2


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_lora_matched_is_the_rank_that_comes_nearest(name: str, ratio: float) -> None:
    layout = LAYOUTS[name]
    wanted, unit = row_weights(selected("alps", layout, ratio)), lora_weights(layout)
    rank = METHODS["lora_matched"].rank(layout, ratio, scores_of(layout))
    away = {other: abs(other * unit - wanted) for other in range(1, rank + 3)}
    assert away[rank] == min(away.values())


def test_lora_has_the_papers_rank_whatever_the_ratio() -> None:
    assert {METHODS["lora"].rank(SMOLLM2, ratio, None) for ratio in (0.1, 1.0)} == {LORA_RANK} == {128}


def attention(model: PreTrainedModel) -> list[str]:
    layout = HeadLayout.of(model)
    prefix = layout.prefix(name for name, _ in model.named_modules())
    return [prefix + path for layer in range(layout.layers) for path in layout.modules(layer)]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", TINY)
def test_lora_weights_are_those_that_peft_makes(name: str, rank: int) -> None:
    """With separate projections and with fused ones, which count once."""
    model = tiny_model(name)
    made = get_peft_model(model, LoraConfig(r=rank, target_modules=attention(model), fan_in_fan_out=name == "gpt2"))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == rank * lora_weights(LAYOUTS[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon_gqa"])
def test_lora_trains_nothing_but_its_own_matrices(name: str) -> None:
    model = tiny_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = trainable(model, None, "heads", adapter="lora", rank=4)
    trained = {key for key, p in tuned.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(attention(tiny_model(name)))
    assert all(".lora_A." in key or ".lora_B." in key for key in trained)
    start = {key: p.detach().clone() for key, p in tuned.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    ids = torch.tensor([[4, 9, 17, 30]])
    for _ in range(2):  # B starts at zero, so that A moves in the second step only
        tuned(input_ids=ids, labels=ids).loss.backward()
        assert {key for key, p in tuned.named_parameters() if p.grad is not None} == trained
        optimizer.step()
    moved = {key for key, p in tuned.named_parameters() if not torch.equal(p, start[key])}
    assert moved == trained
    after = tuned.unload().state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


# Heads.


@pytest.mark.parametrize("name", ["llama", "SmolLM2", "Llama-3.2-1B"])
def test_bottom_and_alps_are_the_two_ends(name: str) -> None:
    layout = LAYOUTS[name]
    alps, bottom, values = selected("alps", layout), selected("bottom", layout), scores_of(layout).values
    assert len(alps) == len(bottom) == head_count(0.1, layout.total)
    assert not set(alps) & set(bottom)
    assert min(values[head] for head in alps) > max(values[head] for head in bottom)
    others = {divmod(i, layout.heads) for i in range(layout.total)} - set(alps) - set(bottom)
    assert all(max(values[h] for h in bottom) < values[o] < min(values[h] for h in alps) for o in others)


def test_l2_takes_the_heads_whose_weights_moved_furthest() -> None:
    """By a localization of its own, of the weights themselves."""
    assert METHODS["l2"].metric == ("l2", "concat")
    with_own = {name for name, method in METHODS.items() if method.metric is not None}
    assert with_own - {"l2"} == {f"{name}{of}" for name in ("lofit", "hifi", "importance") for of in ("", "_offset")}
    base, task = tiny_model("llama_mha_bias"), tiny_model("llama_mha_bias")
    with torch.no_grad():
        for layer, head, step in ((0, 2, 0.5), (1, 1, 0.3), (0, 0, 0.1)):
            task.model.layers[layer].self_attn.v_proj.weight[8 * head : 8 * head + 8] += step
    scores = localize(base, task, metric="l2", head_matrix="concat")
    for count, heads in ((1, [(0, 2)]), (2, [(0, 2), (1, 1)]), (3, [(0, 0), (0, 2), (1, 1)])):
        assert list(METHODS["l2"].select(scores.layout, count / 8, scores, 0)) == heads


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.uses_scores])
def test_scores_of_another_shape_are_refused(method: str) -> None:
    chosen = METHODS[method]
    ask = chosen.rank if chosen.rank else lambda *given: chosen.select(*given, 0)
    with pytest.raises(UserError, match="another shape"):
        ask(SMOLLM2, 0.1, scores_of(LLAMA_1B))


def test_what_the_registry_says_of_each_method() -> None:
    """Whether a method draws, and whether the ratio or the scores change anything."""
    layout = SMOLLM2
    for name, method in METHODS.items():
        assert method.about
        assert (method.select is None) == (method.rank is not None), name

        def chosen(ratio: float = 0.1, of: int = 0, seed: int = 0, method: object = method) -> object:
            scores = scores_of(layout, of) if method.uses_scores else None
            return method.rank(layout, ratio, scores) if method.rank else method.select(layout, ratio, scores, seed)

        assert (chosen(seed=1) != chosen(seed=2)) == method.draws, name
        assert (chosen(ratio=0.1) != chosen(ratio=0.5)) == method.uses_ratio, name
        if method.uses_scores and not method.rank and not method.draws:
            assert chosen(of=1) != chosen(of=2), name
    of_paper = [name for name, method in METHODS.items() if method.source == "paper"]
    assert of_paper == ["full", "no_attn", "random", "layer_consistent", "lora", "alps"]
    controls = [name for name, method in METHODS.items() if method.source == "control"]
    assert controls == ["bottom", "l2", "random_matched", "lora_matched"]
    assert SCOPES.keys() == {"all", "heads"}
