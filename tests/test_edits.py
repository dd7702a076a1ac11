"""JoLA and LoFiT: forward, gates and penalties by hand; that they start as the base, save, load and merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_tuner import HEADS, WIDE, logits, same, some_model, state, tokens, train
from tiny_models import TINY, tiny_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from alps_repro import HeadLayout, load_model
from alps_repro.errors import UserError
from alps_repro.tuner import JolaConfig, LofitConfig, jola, lofit

#: Everything that the two can be.
CONFIGS: dict[str, Any] = {
    "jola": lambda **own: JolaConfig(**own),
    "jola additive": lambda **own: JolaConfig(edits="additive", **own),
    "jola multiplicative": lambda **own: JolaConfig(edits="multiplicative", **own),
    "jola ungated": lambda **own: JolaConfig(gated=False, **own),
    "lofit scale": lambda **own: LofitConfig(stage="scale", **own),
    "lofit offset": lambda **own: LofitConfig(stage="offset", heads=HEADS, **own),
}

#: Those that add no offset, which can be folded into any output projection.
SCALES = ("jola multiplicative", "lofit scale")


def still(name: str) -> dict[str, Any]:
    """Settings of a tiny model without dropout."""
    return WIDE.get(name, {}) if name in ("gpt2", "opt") else {}


def edited(name: str, config: Any, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(some_model(name, **{**still(name), **settings}), config)


def tuner(model: PeftModel) -> Any:
    return model.base_model


# What is computed


def by_hand(layout: HeadLayout, z: torch.Tensor, tensors: dict[str, torch.Tensor], layer: int, heads: Any) -> Any:
    """The edited results, head by head, in evaluation."""
    out = z.clone()
    own = [head for at, head in heads if at == layer]
    for i, head in enumerate(own):
        part = slice(head * layout.head_dim, (head + 1) * layout.head_dim)

        def gate(kind: str, i: int = i) -> float:
            if kind not in tensors:
                return 1.0
            opened = 1 / (1 + math.exp(-float(tensors[kind][i])))
            return min(1.0, max(0.0, 1.2 * opened - 0.1))

        if "jola_scale" in tensors:
            out[..., part] *= 1 + gate("jola_scale_gate") * tensors["jola_scale"][i]
        if "jola_offset" in tensors:
            out[..., part] += gate("jola_offset_gate") * tensors["jola_offset"][i]
        if "lofit_scale" in tensors:
            out[..., part] *= 1 + tensors["lofit_scale"][i]
        if "lofit_offset" in tensors:
            out[..., part] += tensors["lofit_offset"][i]
    return out


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TINY)
def test_forward_is_the_hand_computed_one(name: str, kind: str) -> None:
    """What reaches the output projection is every head's own result, scaled and moved, on every architecture."""
    model = edited(name, CONFIGS[kind](init_std=0.5)).eval()
    layout = HeadLayout.of(model)
    every = [(layer, head) for layer in range(layout.layers) for head in range(layout.heads)]
    heads = HEADS if kind == "lofit offset" else every
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "_gate" in key:
                value.uniform_(-4, 4)
    seen: dict[Any, list[torch.Tensor]] = {}
    for layer in tuner(model).layers():
        layer.register_forward_pre_hook(lambda at, x: seen.setdefault(at, []).append(x[0]))
        layer.base_layer.register_forward_pre_hook(lambda at, x: seen.setdefault(at, []).append(x[0]))
    logits(model)
    assert seen
    for path, module in model.named_modules():
        if module not in seen or not hasattr(module, "base_layer"):
            continue
        (z,), (reached,) = seen[module], seen[module.base_layer]
        at = next(i for i in range(layout.layers) if path.endswith(layout.output_module(i)))
        tensors = {
            key: getattr(module, key)["default"]
            for key in module.adapter_layer_names
            if "default" in getattr(module, key)
        }
        with torch.no_grad():
            expected = by_hand(layout, z, tensors, at, heads)
        assert not torch.equal(reached, z)
        torch.testing.assert_close(reached, expected)


def test_gates_by_hand() -> None:
    """(ζ - γ) · σ(...) + γ with γ = -0.1 and ζ = 1.1, cut at 0 and 1."""
    alphas = torch.tensor([[-3.0], [-2.41], [-2.39], [0.0], [1.0], [3.0]])
    plain = [0, 0, 1.2 / (1 + math.exp(2.39)) - 0.1, 0.5, 1.2 / (1 + math.exp(-1)) - 0.1, 1]
    torch.testing.assert_close(jola.gate(alphas).flatten(), torch.tensor(plain))
    drawn = [
        min(1, max(0, 1.2 / (1 + math.exp(-(math.log(0.3 / 0.7) + a) / 0.33)) - 0.1)) for a in alphas.flatten().tolist()
    ]
    torch.testing.assert_close(jola.gate(alphas, torch.full_like(alphas, 0.3)).flatten(), torch.tensor(drawn))
    open_by_hand = [1 / (1 + math.exp(-(a - 0.33 * math.log(0.1 / 1.1)))) for a in alphas.flatten().tolist()]
    torch.testing.assert_close(jola.open_probability(alphas).flatten(), torch.tensor(open_by_hand))


def test_open_probability_is_how_often_a_drawn_gate_is_open() -> None:
    torch.manual_seed(0)
    for alpha in (-1.5, 0.0, 1.0):
        drawn = jola.gate(torch.full((200_000,), alpha), torch.rand(200_000)) > 0
        assert float(drawn.float().mean()) == pytest.approx(float(jola.open_probability(torch.tensor(alpha))), abs=5e-3)


def test_gates_are_drawn_in_training_only() -> None:
    model = edited("llama", JolaConfig(init_std=0.5))
    first, second = (logits(model.train()) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(logits(model.eval()), logits(model.eval()))
    torch.manual_seed(5)
    third = logits(model.train())
    torch.manual_seed(5)
    assert torch.equal(logits(model.train()), third)


def test_penalty_of_jola_by_hand() -> None:
    model = edited("llama", JolaConfig())
    layout, weight = HeadLayout.of(model), 0.07
    total = 0.0
    for layer in tuner(model).layers():
        for gates, share in ((layer.jola_offset_gate, weight), (layer.jola_scale_gate, 1 - weight)):
            open_ = [1 / (1 + math.exp(-(a - 0.33 * math.log(0.1 / 1.1)))) for a in gates["default"].flatten().tolist()]
            total += share * sum(open_) / len(open_)
    assert float(tuner(model).penalty(weight).detach()) == pytest.approx(
        total / (layout.layers * layout.heads), rel=1e-6
    )
    assert float(tuner(edited("llama", JolaConfig(gated=False))).penalty(weight)) == 0
    only = tuner(edited("llama", JolaConfig(edits="additive")))
    assert float(only.penalty(0.0).detach()) == 0
    assert float(only.penalty(1.0).detach()) > 0
    assert float(tuner(model).penalty(0.0)) == 0  # λ = 0: none on the scale's gates either


def test_penalty_of_lofit_by_hand() -> None:
    model = edited("llama", LofitConfig(stage="scale", l1=0.25))
    values = [value.detach().abs().sum() for name, value in model.named_parameters() if "lofit" in name]
    assert float(tuner(model).penalty().detach()) == pytest.approx(0.25 * float(sum(values)))
    assert float(tuner(edited("llama", LofitConfig())).penalty()) == 0


def test_weight_of_the_gates_by_hand() -> None:
    assert jola.gate_weight("exponential", 0, 100) == 0.1
    assert jola.gate_weight("exponential", 50, 100) == pytest.approx(0.1 * math.exp(-0.5))
    assert [jola.gate_weight("linear", step, 100) for step in (0, 50, 100)] == pytest.approx([0, 0.1, 0.2])
    assert [jola.gate_weight("cyclic", step, 100) for step in (0, 2, 5, 10, 15, 20, 25)] == pytest.approx(
        [0.5, 0.5 + 0.5 * math.sin(0.2 * math.pi), 1, 0.5, 0, 0.5, 1]
    )
    assert all(jola.gate_weight("cyclic", step, 100) == 0 for step in (15, 35, 55))  # no penalty at all in these


def test_performance_schedule_by_hand() -> None:
    """From 0.1, up where a step's loss fell and down where it rose, cut at 0 and 1 in every step."""
    losses = [3.0, 2.0, 1.0, 1.5, 1.5, 1.4]
    found = [jola.gate_weight("performance", step, 100, losses[:step]) for step in range(7)]
    assert found == pytest.approx([0.1, 0.1, 0.11, 0.12, 0.11, 0.11, 0.12])
    falling, rising = list(range(200, 0, -1)), list(range(200))
    assert jola.gate_weight("performance", 200, 200, falling) == 1
    assert jola.gate_weight("performance", 200, 200, rising) == 0
    assert jola.gate_weight("performance", 201, 300, [*rising, 0]) == pytest.approx(0.01)  # not below 0 before


def test_closed_gates_are_counted() -> None:
    model = edited("llama", JolaConfig())
    layout = HeadLayout.of(model)
    assert tuner(model).closed_gates() == {"scale": (0, layout.total), "offset": (0, layout.total)}
    first = tuner(model).layers()[0]
    with torch.no_grad():
        first.jola_scale_gate["default"][1:3] = -2.41
        first.jola_offset_gate["default"][0] = -2.39
    assert tuner(model).closed_gates() == {"scale": (2, layout.total), "offset": (0, layout.total)}


# What is trained


def test_parameters_of_jola_on_llama_3_1_8b() -> None:
    """L · H · (2 · d_k + 2)."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with init_empty_weights():
        model = get_peft_model(AutoModelForCausalLM.from_config(config), JolaConfig())
    assert model.get_nb_trainable_parameters()[0] == 264_192 == 32 * 32 * (2 * 128 + 2)


@pytest.mark.parametrize("name", TINY)
def test_closed_forms(name: str) -> None:
    layout = HeadLayout.of(some_model(name, **still(name)))
    numbers = {
        "jola": layout.total * (2 * layout.head_dim + 2),
        "jola additive": layout.total * (layout.head_dim + 1),
        "jola multiplicative": layout.total * (layout.head_dim + 1),
        "jola ungated": layout.total * 2 * layout.head_dim,
        "lofit scale": layout.total * layout.head_dim,
        "lofit offset": len(HEADS) * layout.head_dim,
    }
    for kind, number in numbers.items():
        assert edited(name, CONFIGS[kind]()).get_nb_trainable_parameters()[0] == number, kind


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TINY)
def test_starts_as_the_base_within_its_noise(name: str, kind: str) -> None:
    base = logits(some_model(name, **still(name)).eval())
    assert torch.equal(logits(edited(name, CONFIGS[kind](init_std=0)).eval()), base)
    usual, small = (
        float((logits(edited(name, CONFIGS[kind](init_std=std)).eval()) - base).abs().max()) for std in (1e-3, 1e-5)
    )
    assert 0 < small < 0.03 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_gqa", "phi3"])
def test_life_of_an_adapter(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Trained, saved and loaded onto another copy of the base, it gives the same logits; the base is not touched."""
    torch.manual_seed(3)
    base = some_model(name, dtype, **still(name))
    before = state(base)
    model = get_peft_model(base, CONFIGS[kind]())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    start = logits(model.eval())
    train(model.train())
    after = logits(model.eval())
    assert not torch.equal(after, start)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(some_model(name, dtype, **still(name)), tmp_path)
    assert torch.equal(logits(loaded.eval()), after)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(some_model(name, dtype, **still(name)).eval()))
    assert same(state(model.unload()), before)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", TINY)
def test_merge(name: str, kind: str) -> None:
    """Equal logits where scales and offsets have a place; a sentence where saving would lose them."""
    model = edited(name, CONFIGS[kind](init_std=0.3)).eval()
    biased = all(layer.base_layer.bias is not None for layer in tuner(model).layers())
    before = logits(model)
    if kind not in SCALES and not biased:
        with pytest.raises(UserError, match="which has no bias to fold it into"):
            model.merge_and_unload()
        assert torch.equal(logits(model), before)
        return
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not any("jola" in key or "lofit" in key for key in merged.state_dict())


def test_merged_model_is_saved_whole(tmp_path: Path) -> None:
    model = edited("gpt2", LofitConfig(init_std=0.3, heads=HEADS)).eval()
    before = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)


def test_two_adapters_are_one_after_the_other() -> None:
    model = edited("llama", LofitConfig(stage="offset", init_std=0.3))
    model.add_adapter("scales", LofitConfig(stage="scale", init_std=0.3))
    layer = tuner(model).layers()[0]
    x = torch.randn(2, 5, layer.width)
    offset, scale = layer.lofit_offset["default"].flatten(), layer.lofit_scale["scales"].flatten()
    tuner(model).set_adapter(["default", "scales"])
    torch.testing.assert_close(layer(x), layer.base_layer((x + offset) * (1 + scale)))
    tuner(model).set_adapter(["scales", "default"])
    torch.testing.assert_close(layer(x), layer.base_layer(x * (1 + scale) + offset))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized(name: str, kind: str, quantization: str, tmp_path: Path) -> None:
    """Trained on a quantized base, loaded onto another copy of it; folded into the model in floating point."""
    folder = tiny_checkpoint(tmp_path / "base", name, **WIDE[name])
    base, _ = load_model(folder, quantization)
    plain = logits(base)
    torch.manual_seed(3)
    model = get_peft_model(base, CONFIGS[kind](init_std=0))
    assert torch.equal(logits(model.eval()), plain)
    train(model.train())
    after = logits(model.eval())
    assert not torch.equal(after, plain)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(folder, quantization)[0], tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), after)
    if kind not in SCALES and name == "llama":
        with pytest.raises(UserError, match="which has no bias to fold it into"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload().eval()
    # LLM.int8 rounds what enters a projection, too, which the merged model in floating point does not.
    near = {"4bit": {"rtol": 1e-3, "atol": 1e-4}, "8bit": {"rtol": 0.3, "atol": 0.3}}[quantization]
    torch.testing.assert_close(logits(merged), after, **near)


def test_lofit_s_score_is_the_norm_of_a_scale(tmp_path: Path) -> None:
    model = edited("llama", LofitConfig(stage="scale", init_std=0.3))
    layout = HeadLayout.of(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    found = lofit.norms(stored, layout)
    by_hand_ = np.array(
        [layer.lofit_scale["default"].detach().double().norm(dim=1).numpy() for layer in tuner(model).layers()]
    )
    np.testing.assert_allclose(found, by_hand_, rtol=1e-7)
    edited("llama", LofitConfig(stage="offset")).save_pretrained(tmp_path / "offsets")
    with pytest.raises(UserError, match="train LoFiT's stage 'scale' on all heads"):
        lofit.norms(load_file(tmp_path / "offsets" / "adapter_model.safetensors"), layout)


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JolaConfig(edits="bot"), "no edit of JoLA 'bot': did you mean 'both'"),
        (lambda: JolaConfig(schedule="linaer"), "no schedule of JoLA 'linaer': did you mean 'linear'"),
        (lambda: LofitConfig(stage="scales"), "no stage of LoFiT 'scales': did you mean 'scale'"),
        (lambda: JolaConfig(heads=5), r"JolaConfig\(heads=...\) takes \(layer, head\) pairs"),
        (lambda: LofitConfig(heads=[]), r"LofitConfig\(heads=...\) got no head"),
    ],
)
def test_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_adapter_refuses_another_base(tmp_path: Path) -> None:
    edited("llama", JolaConfig()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained on another model of the same shape"):
        PeftModel.from_pretrained(some_model("llama", seed=1), tmp_path)


def test_nothing_else_is_trained() -> None:
    """The released code of JoLA leaves the output layer trainable."""
    model = edited("llama", JolaConfig())
    assert all(("jola_" in name) == p.requires_grad for name, p in model.named_parameters())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
