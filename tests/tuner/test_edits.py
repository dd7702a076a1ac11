"""JoLA and LoFiT: forward, gates and penalties by hand; that they start as the base, save, load and merge."""

from __future__ import annotations

import copy
import itertools
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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
)

from alps_repro import HeadLayout, load_model
from alps_repro.errors import UserError
from alps_repro.tuner import jola, lofit
from alps_repro.tuner.base import fingerprint
from alps_repro.tuner.jola import JolaConfig
from alps_repro.tuner.lofit import LofitConfig
from alps_repro.tuner.rows import AlpsConfig

#: Everything that the two can be.
CONFIGS: dict[str, Any] = {
    "jola": lambda **own: JolaConfig(**own),
    "jola additive": lambda **own: JolaConfig(edits="additive", **own),
    "jola multiplicative": lambda **own: JolaConfig(edits="multiplicative", **own),
    "jola ungated": lambda **own: JolaConfig(gated=False, **own),
    "lofit scale": lambda **own: LofitConfig(stage="scale", **own),
    "lofit offset": lambda **own: LofitConfig(stage="offset", heads=HEADS, **own),
}

#: Every tuner, once.
KINDS: dict[str, Any] = {
    "rows": lambda **own: AlpsConfig(**{"heads": HEADS, **own}),
    "jola": lambda **own: JolaConfig(init_std=0.3, **own),
    "lofit": lambda **own: LofitConfig(init_std=0.3, **own),
}

#: Architectures whose output projection has a bias to fold an offset into.
BIASED = ("gpt2", "opt", "gpt_neox", "phi", "llama_mha_bias", "falcon_mha")

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


def several(name: str, kind: str) -> PeftModel:
    """A model with the adapters `x`, `y` and `z`, whose scales and offsets do not commute, or with scales alone."""
    if kind == "jola":
        edits = ("both", "additive", "multiplicative")
        first, *others = [JolaConfig(edits=e, init_std=0.3, heads=None if e == "both" else HEADS) for e in edits]
    elif kind == "jola scales":
        first, *others = [
            JolaConfig(edits="multiplicative", gated=gated, init_std=0.3) for gated in (True, False, True)
        ]
    else:
        stages = ("offset", "scale", "offset")
        first, *others = [LofitConfig(stage=stage, init_std=0.3) for stage in stages]
    torch.manual_seed(3)
    model = get_peft_model(some_model(name, **still(name)), first, adapter_name="x")
    for letter, config in zip("yz", others):
        model.add_adapter(letter, config)
    return model


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in BIASED for kind in ("jola", "lofit")]
    + [("llama", "jola scales"), ("phi3", "jola scales")],
)
@pytest.mark.filterwarnings("ignore:Already following adapters were merged", "ignore:The active adapters")
def test_merged_in_any_way_is_active_at_once(name: str, kind: str) -> None:
    model = several(name, kind).eval()
    before, close, seen = state(model), {"rtol": 1e-4, "atol": 2e-5}, {}
    three = itertools.permutations("xyz") if name == "gpt2" else [("z", "x", "y")]
    for names in [*three, ("x", "y"), ("y", "x")]:
        order = list(names)
        model.base_model.set_adapter(order)
        active = logits(model)
        seen[names] = active
        merged = []
        for groups in ([order], [[letter] for letter in order], [order[:1], order[1:]], [order[:-1], order[-1:]]):
            for group in filter(None, groups):
                model.merge_adapter(group)
            assert tuner(model).merged_adapters == order
            merged.append(logits(model))
            model.unmerge_adapter()
            assert same(state(model), before)  # bit by bit
        assert torch.equal(logits(model), active)
        torch.testing.assert_close(merged[0], active, **close)
        assert all(torch.equal(merged[0], other) for other in merged)
        model.merge_adapter(order[:1])  # one in place, the others as the model is taken apart
        for start in (model, several(name, kind).eval()):
            start = copy.deepcopy(start)
            if start.base_model.active_adapters != order:
                start.base_model.set_adapter(order)
            assert torch.equal(logits(start.merge_and_unload()), merged[0])
        model.unmerge_adapter()
    if kind != "jola scales":  # else the order would not be tested
        assert float((seen["x", "y"] - seen["y", "x"]).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged", "ignore:The active adapters")
def test_merging_in_half_precision_rounds_once(dtype: torch.dtype) -> None:
    """However many steps it takes: all adapters are written anew onto the base."""
    model = several("gpt2", "jola").to(dtype).eval()
    model.base_model.set_adapter(list("xyz"))
    model.merge_adapter()
    at_once = state(model)
    model.unmerge_adapter()
    for letter in "xyz":
        model.merge_adapter([letter])
    assert same(state(model), at_once)


def test_merging_draws_no_gates() -> None:
    """In training, gates are noise: a merged model is that of evaluation."""
    model = edited("gpt2", JolaConfig(init_std=0.5))
    evaluated = logits(model.eval())
    model.train()
    drawn = torch.get_rng_state()
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(logits(merged), evaluated, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), evaluated, rtol=1e-4, atol=1e-5)


def test_offsets_without_a_bias_stay_refused_after_a_merge() -> None:
    model = several("llama", "lofit").eval()
    model.base_model.set_adapter(["y", "x"])
    active, before = logits(model), state(model)
    with pytest.raises(UserError, match="which has no bias to fold it into"):
        model.merge_adapter()
    assert same(state(model), before)
    model.merge_adapter(["y"])
    with pytest.raises(UserError, match="which has no bias to fold it into"):
        model.merge_adapter(["x"])
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(logits(model), active)


# Heads of tasks


TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}


def task_model(name: str, task: str, seed: int) -> torch.nn.Module:
    """A task's model on the decoder of `some_model`; its head is random, another one by seed."""
    base = some_model(name, **still(name))
    torch.manual_seed(seed)
    labels = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    config = AutoConfig.for_model(**{**base.config.to_dict(), **labels})
    model = TASKS[task].from_config(config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    return model.eval()


def answers(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=tokens())
    return found.logits if "logits" in found else torch.stack([found.start_logits, found.end_logits])


def train_task(model: torch.nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        answers_ = model(input_ids=tokens())
        out = answers_.logits if "logits" in answers_ else answers_.start_logits
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "task"),
    [
        *[("llama", task) for task in TASKS],
        *[("gpt2", task) for task in TASKS],
        ("falcon_gqa", "TOKEN_CLS"),
        ("opt", "SEQ_CLS"),
        ("gpt_neox", "QUESTION_ANS"),
        ("phi3", "SEQ_CLS"),
    ],
)
def test_new_head_is_trained_and_saved(name: str, task: str, kind: str, tmp_path: Path) -> None:
    """And an adapter loads onto a model of the task whose own head is another random one."""
    base = task_model(name, task, seed=1)
    assert fingerprint(base) == fingerprint(some_model(name, **still(name)))
    model = get_peft_model(base, KINDS[kind](task_type=task))
    heads = [n for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in n]
    assert heads
    start = state(model)
    train_task(model)
    after = state(model)
    assert all(not torch.equal(start[n], after[n]) for n in heads if n.endswith("weight"))
    trained = answers(model.eval())
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(task_model(name, task, seed=2), tmp_path, **options).eval()
        assert torch.equal(answers(loaded), trained)
        assert sorted(n for n, p in loaded.named_parameters() if p.requires_grad) == (
            sorted(n for n, p in model.named_parameters() if p.requires_grad) if "is_trainable" in options else []
        )
    if kind == "rows" or name not in ("llama", "falcon_gqa", "phi3"):
        torch.testing.assert_close(answers(loaded.merge_and_unload()), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_to_save(kind: str, tmp_path: Path) -> None:
    own = ["lm_head", "model.norm"]
    model = get_peft_model(some_model("llama"), KINDS[kind](modules_to_save=own, task_type="CAUSAL_LM"))
    train(model)
    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    whole = {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"}
    assert whole <= stored.keys()
    assert not any(torch.equal(stored[n], some_model("llama").state_dict()[n[17:]]) for n in whole)
    loaded = PeftModel.from_pretrained(some_model("llama"), tmp_path)
    assert torch.equal(logits(loaded.eval()), trained)
    assert own == ["lm_head", "model.norm"]
    # A second adapter, beside one that has modules of its own, is of the same base.
    loaded.add_adapter("two", KINDS[kind](task_type="CAUSAL_LM"))
    assert loaded.peft_config["two"].fingerprint == fingerprint(some_model("llama"))
    loaded.set_adapter("two")
    with pytest.raises(UserError, match="The adapter default has modules of its own"):
        loaded.merge_adapter(["default"])


@pytest.mark.parametrize("kind", KINDS)
def test_task_s_head_on_a_quantized_base(kind: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    task_model("gpt2", "SEQ_CLS", seed=1).save_pretrained(tmp_path / "base")
    load = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    bases = [AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **load) for _ in range(2)]
    model = get_peft_model(bases[0], KINDS[kind](task_type="SEQ_CLS"))
    train_task(model)
    trained = answers(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(bases[1], tmp_path / "adapter").eval()
    assert torch.equal(answers(loaded), trained)
    torch.testing.assert_close(answers(loaded.merge_and_unload()), trained, rtol=1e-3, atol=1e-4)


# What a configuration and another adapter leave alone


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_serves_two_bases(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind](task_type="CAUSAL_LM")
    given = copy.deepcopy(config)
    models = [get_peft_model(some_model(name), config) for name in ("llama", "qwen2")]
    models.append(get_peft_model(some_model("llama", seed=1), config))
    assert config == given
    prints = [model.peft_config["default"].fingerprint for model in models]
    assert prints == [fingerprint(some_model("llama")), fingerprint(some_model("qwen2")), prints[2]]
    assert prints[0] != prints[2]
    models[0].add_adapter("two", config)
    assert config == given
    models[0].save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "two"):
        PeftModel.from_pretrained(some_model("llama"), folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_adapter_beside_a_merged_one_is_of_the_base(kind: str, loaded: bool, tmp_path: Path) -> None:
    """It starts from the base's weights, is fingerprinted by them, and what was merged stays so."""
    heads = {"heads": [(0, 0), (0, 1), (1, 0), (1, 1)]}
    model = get_peft_model(some_model("gpt2", **still("gpt2")), KINDS[kind](**heads), adapter_name="one").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and "_gate" not in name:
                value.add_(0.5)
    before, alone = state(model), logits(model)
    model.merge_adapter()
    merged, weights = logits(model), state(model)
    other = KINDS[kind](heads=[(0, 3), (1, 3)])
    if loaded:
        apart = get_peft_model(some_model("gpt2", **still("gpt2")), other)
        apart.save_pretrained(tmp_path / "two")
        model.load_adapter(tmp_path / "two", "two")
    else:
        model.add_adapter("two", other)
    assert tuner(model).merged_adapters == ["one"]
    assert torch.equal(logits(model), merged)
    assert all(torch.equal(state(model)[name], value) for name, value in weights.items())
    model.save_pretrained(tmp_path / "all")
    model.unmerge_adapter()
    assert all(torch.equal(state(model)[name], value) for name, value in before.items())
    assert torch.equal(logits(model), alone)
    again = PeftModel.from_pretrained(some_model("gpt2", **still("gpt2")), tmp_path / "all" / "two").eval()
    if kind == "rows":
        assert torch.equal(logits(again), logits(some_model("gpt2", **still("gpt2"))))
    # What was saved while it was merged is the adapter, and not the merged model.
    again.load_adapter(tmp_path / "all" / "one", "one")
    again.set_adapter("one")
    assert torch.equal(logits(again), alone)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["jola", "jola additive", "lofit scale"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_gradient_checkpointing(name: str, kind: str, reentrant: bool) -> None:
    """The gates drawn in the forward pass are those that it is computed with again: the same gradients, to the bit."""
    ids, gradients = tokens(), []
    for checkpointing, seed in ((False, 8), (True, 8), (True, 9)):
        model = edited(name, CONFIGS[kind](init_std=0.3)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:  # reentrant checkpointing passes gradients only where the input asks for one
                model.enable_input_require_grads()
        torch.manual_seed(seed)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert sum(float(g.abs().sum()) for g in gradients[0].values()) > 0
    assert same(*gradients[:2])
    assert same(*gradients[1:]) == (kind == "lofit scale")  # which draws nothing


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
