"""The ALPS tuner: what it trains, what it leaves alone to the bit, and that it behaves as a PEFT tuner does."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from tiny_models import TINY, tiny_checkpoint, tiny_model
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from alps_repro import HeadLayout, HeadSelection, load_model
from alps_repro.errors import UserError
from alps_repro.tuner.base import dense_weight
from alps_repro.tuner.rows import AlpsConfig, AlpsLayer

#: In GQA the first two heads of layer 0 share a key/value group.
HEADS = ((0, 0), (0, 1), (1, 3))
#: Wide enough for a whole bitsandbytes block in every row, and without the dropout that training mode would turn on.
WIDE: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64},
    "llama_mha_bias": {"hidden_size": 64},
    "phi3": {"hidden_size": 64},
    "gpt_neox": {"hidden_size": 64},
    "gpt2": {"n_embd": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "dropout": 0.0},
}


def some_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A tiny model whose biases and norms are random too: fresh ones are all 0 or 1 and would hide mistakes."""
    model = tiny_model(name, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.data = parameter.to(dtype)  # `model.to` would round rotary frequencies too, loading does not
    return model


def tokens(seed: int = 0, rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: nn.Module, steps: int = 5, seed: int = 10) -> torch.optim.Optimizer:
    """Steps of AdamW with weight decay; the model stays in the mode it is in."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        ids = tokens(seed + step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def expected_rows(model: nn.Module, heads: Any = HEADS) -> dict[str, torch.Tensor]:
    """{projection: its selected rows as a boolean mask}, said again from the layout's own `rows`."""
    layout = HeadLayout.of(model)
    names = dict(model.named_modules())
    prefix = layout.prefix(names)
    masks: dict[str, torch.Tensor] = {}
    for layer, head in heads:
        for part, index in (("query", head), ("key", layout.group(head)), ("value", layout.group(head))):
            mask = masks.setdefault(
                prefix + layout.module(layer, part), torch.zeros(layout.projection_rows(part), dtype=torch.bool)
            )
            mask[list(layout.rows(part, index))] = True
    return masks


def closed_form(model: nn.Module, heads: Any = HEADS) -> int:
    """Parameters of the heads' query rows and their groups' key and value rows, each group once."""
    layout = HeadLayout.of(model)
    groups = {(layer, layout.group(head)) for layer, head in heads}
    projection = model.get_submodule(next(iter(expected_rows(model, heads))))
    columns = layout.hidden_size + (projection.bias is not None)
    return (len(set(heads)) + 2 * len(groups)) * layout.head_dim * columns


def assert_only_rows_changed(before: dict, after: dict, masks: dict[str, torch.Tensor], transposed: bool) -> None:
    """Every selected row (and its bias) differs, and every other number is the same to the bit."""
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        mask = masks.get(name.rsplit(".", 1)[0])
        if mask is None or name.rsplit(".", 1)[1] not in ("weight", "bias"):
            assert torch.equal(old, new), name
            continue
        if transposed and old.ndim == 2:
            old, new = old.T, new.T
        assert torch.equal(old[~mask], new[~mask]), name
        changed = (old[mask] != new[mask]).view(int(mask.sum()), -1).any(dim=1)
        # A key's bias has hardly any gradient, and its steps may round back in bfloat16.
        assert changed.any() if old.ndim == 1 and old.dtype == torch.bfloat16 else changed.all(), name


def test_registration() -> None:
    """peft knows the tuner by name.

    If this fails after an upgrade of peft: `alps_repro/tuner/base.py::add_peft_type` adds a member to peft's enum
    `PeftType`, which peft offers no way to do, and `alps_repro/tuner/__init__.py` calls `register_peft_method`.
    Compare both with the new `peft/utils/peft_types.py`. If peft can register new names by itself by then, use that
    and delete `_add_peft_type`; if not, pin peft to the last version that passes.
    """
    member = PeftType.ALPS
    assert member == "ALPS"
    assert PeftType("ALPS") is member
    assert PeftType["ALPS"] is member
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(PeftType.__members__)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
    assert (member.name, member.value, json.dumps(member)) == ("ALPS", "ALPS", '"ALPS"')
    with pytest.raises(AttributeError):  # as for any other member
        PeftType.ALPS = "other"
    model = get_peft_model(tiny_model("llama"), AlpsConfig(heads=HEADS))
    assert isinstance(model, PeftModel)
    assert model.peft_type == PeftType.ALPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_life_of_an_adapter(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Start, train, switch off, save, load, merge, save again: on every architecture, all to the bit."""
    base = some_model(name, dtype)
    before, start, masks, count = state(base), logits(base), expected_rows(base), closed_form(base)
    model = get_peft_model(base, AlpsConfig(heads=HEADS, task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(model), start)

    rows = trained(model)
    assert sum(p.numel() for p in rows) == count
    assert {p.dtype for p in rows} == {torch.float32}
    assert model.get_nb_trainable_parameters() == (count, sum(v.numel() for v in base.parameters()))
    optimizer = train(model)
    moments = [s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values()]
    assert sum(moments) == 2 * count

    tuned = logits(model)
    assert not torch.equal(tuned, start)
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), tuned)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(some_model(name, dtype), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), tuned)
    assert trained(loaded) == []
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.rsplit(".", 1)[1] for key in stored} <= {"alps_rows", "alps_bias"}
    assert sum(value.numel() for value in stored.values()) == count

    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), tuned)
    assert_only_rows_changed(before, state(merged), masks, HeadLayout.of(merged).transposed)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype).eval()
    assert torch.equal(logits(again), tuned)


def test_what_is_saved(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), AlpsConfig(heads=HEADS, task_type="CAUSAL_LM"))
    train(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["heads"] == [list(pair) for pair in HEADS]
    assert config["fingerprint"].keys() == {"layout", "outside", "projections"}
    assert config["target_modules"] is None  # it follows from the heads
    assert config["base_model_name_or_path"] == str(base)
    # peft's model card is all that may lie beside; nothing needs it.
    assert {p.name for p in (tmp_path / "adapter").iterdir()} - {"README.md"} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    (tmp_path / "adapter" / "README.md").unlink(missing_ok=True)
    read = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(read, AlpsConfig)
    assert read.heads == list(HEADS)
    # peft's ways of loading: by the adapter alone, for more training, and with rows made on no device first.
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(alone), logits(model))
    for options in ({"is_trainable": True}, {"low_cpu_mem_usage": True}):
        fresh = AutoModelForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", **options).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert bool(trained(loaded)) == ("is_trainable" in options)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture) -> None:
    base = some_model("qwen2")
    count, total = closed_form(base), sum(p.numel() for p in base.parameters())
    get_peft_model(base, AlpsConfig(heads=HEADS)).print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {total + count:,}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_all_heads_of_a_deep_model(name: str) -> None:
    # From 20 target modules on peft replaces their names by common endings.
    base = some_model(name, num_hidden_layers=24)
    layout = HeadLayout.of(base)
    everything = HeadSelection.all(layout)
    start, masks, before = logits(base), expected_rows(base, everything), state(base)
    model = get_peft_model(base, AlpsConfig(heads=everything)).eval()
    assert len(model.base_model.targeted_module_names) == 24 * len(layout.modules(0))
    assert torch.equal(logits(model), start)
    train(model, steps=1)
    assert all(mask.all() for mask in masks.values())
    assert_only_rows_changed(before, state(model.merge_and_unload()), masks, False)


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_full_training(name: str) -> None:
    """Those of the rows and of the input, after the rows have moved."""
    model = get_peft_model(some_model(name), AlpsConfig(heads=HEADS)).eval()
    train(model, steps=2)
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    ids = tokens()
    embedded = plain.get_input_embeddings()(ids).detach()
    gradients = []
    for each in (plain, model):
        x = embedded.clone().requires_grad_()
        each(inputs_embeds=x, labels=ids).loss.backward()
        gradients.append(x.grad)
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(gradients[1], gradients[0], **close)
    for path, mask in expected_rows(plain).items():
        projection = plain.get_submodule(path)
        layer = model.base_model.model.get_submodule(path)
        weight = projection.weight.grad.T if HeadLayout.of(plain).transposed else projection.weight.grad
        torch.testing.assert_close(layer.alps_rows["default"].grad, weight[mask], **close)
        if projection.bias is not None:
            torch.testing.assert_close(layer.alps_bias["default"].grad, projection.bias.grad[mask], **close)
        assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
def test_layer_gradcheck(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    base = (Conv1D(6, 5) if kind == "conv1d" else nn.Linear(5, 6, bias=kind == "bias")).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plain = base(x)
    layer = AlpsLayer(base, "default")
    layer.update_layer("default", torch.tensor([1, 2, 5]))
    assert torch.equal(layer(x), plain)
    own = {name: p for name, p in layer.named_parameters() if name.startswith("alps_")}
    assert len(own) == (1 if kind == "no bias" else 2)

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(own, values)), (x,))

    moved = [(p + torch.randn_like(p)).detach().requires_grad_() for p in own.values()]
    assert torch.autograd.gradcheck(call, (x, *moved))


def test_model_takes_flat_input() -> None:
    """A projection called with (tokens, hidden), as some models do, gives what it gives for (1, tokens, hidden)."""
    layer = (
        get_peft_model(some_model("llama"), AlpsConfig(heads=HEADS)).base_model.model.model.layers[0].self_attn.q_proj
    )
    x = torch.randn(7, 32)
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_gqa"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    ids = tokens()
    gradients = []
    for checkpointing in (False, True):
        still = WIDE["gpt2"] if name == "gpt2" else {}
        model = get_peft_model(some_model(name, **still), AlpsConfig(heads=HEADS)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:  # reentrant checkpointing passes gradients only where the input asks for one
                model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and "alps_" in n})
    assert all(g.abs().sum() > 0 for g in gradients[0].values())
    assert same(*gradients)


def test_autocast() -> None:
    base = some_model("qwen2")
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(base)
    model = get_peft_model(base, AlpsConfig(heads=HEADS)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), start)
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for parameter in trained(model):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


# Two adapters.

A, B, DISJOINT_LAYERS = ((0, 0), (0, 1)), ((0, 2), (0, 3), (1, 3)), ((1, 0),)


def saved_adapter(folder: Path, name: str, heads: Any, seed: int) -> torch.Tensor:
    """Train and save an adapter by itself; returns its logits."""
    model = get_peft_model(some_model(name), AlpsConfig(heads=heads)).eval()
    train(model, seed=seed)
    model.save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_gqa", "qwen2"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_two_adapters(name: str, tmp_path: Path) -> None:
    alone = {
        "one": saved_adapter(tmp_path / "one", name, A, 10),
        "two": saved_adapter(tmp_path / "two", name, B, 20),
    }
    base = some_model(name)
    start, before = logits(base), state(base)
    model = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one").eval()
    model.load_adapter(tmp_path / "two", "two")
    assert torch.equal(logits(model), alone["one"])  # loading the second one does not switch to it
    for adapter in ("two", "one"):
        model.set_adapter(adapter)
        assert torch.equal(logits(model), alone[adapter])
        mine = {n for n, p in model.named_parameters() if p.requires_grad}
        assert mine
        assert all(n.endswith(f".{adapter}") for n in mine)

    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not torch.equal(both, alone["one"])
    assert not torch.equal(both, alone["two"])

    # In place and back.
    model.merge_adapter()
    assert torch.equal(logits(model), both)
    model.unmerge_adapter()
    model.base_model.set_adapter("two")
    model.merge_adapter()
    assert torch.equal(logits(model), alone["two"])
    model.merge_adapter(["one"])
    assert torch.equal(logits(model), both)
    with model.disable_adapter():  # which takes merged rows out
        assert torch.equal(logits(model), start)

    model.base_model.set_adapter(["one", "two"])
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), both)
    parts = [PeftModel.from_pretrained(some_model(name), tmp_path / n).merge_and_unload() for n in ("one", "two")]
    expected = dict(before)
    for part, heads in zip(parts, (A, B)):
        for path, mask in expected_rows(part, heads).items():
            for kind in ("weight", "bias"):
                key = f"{path}.{kind}"
                if key in expected:
                    old, new = expected[key], part.state_dict()[key]
                    column = mask[None] if HeadLayout.of(part).transposed or old.ndim == 1 else mask[:, None]
                    expected[key] = torch.where(column if old.ndim == 2 else mask, new, old)
    assert same(state(merged), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merge_and_unmerge_in_place(name: str) -> None:
    base = some_model(name)
    model = get_peft_model(base, AlpsConfig(heads=HEADS)).eval()
    train(model)
    tuned, before = logits(model), state(model)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), tuned)
    assert not same(state(model), before)
    model.unmerge_adapter()
    assert same(state(model), before)
    assert torch.equal(logits(model), tuned)
    trained(model)[0].data[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        model.merge_adapter(safe_merge=True)


def test_unload_gives_the_base_back() -> None:
    base = some_model("llama")
    before = state(base)
    model = get_peft_model(base, AlpsConfig(heads=HEADS)).eval()
    train(model)
    assert same(state(model.unload()), before)


@pytest.mark.parametrize("other", [((0, 0),), ((0, 1), (1, 1))], ids=["same head", "same group"])
def test_overlapping_adapters_are_refused(other: tuple) -> None:
    model = get_peft_model(some_model("llama"), AlpsConfig(heads=((0, 0),)), adapter_name="one")
    model.add_adapter("two", AlpsConfig(heads=other))
    model.base_model.set_adapter(["one", "two"])
    before = state(model)
    for attempt in (lambda: logits(model), model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UserError, match="one, two train the same heads or groups"):
            attempt()
        assert same(state(model), before)  # none of the layers that would have fitted is merged


@pytest.mark.parametrize("second", [B, DISJOINT_LAYERS], ids=["same layer", "other layer"])
@pytest.mark.filterwarnings("ignore:Adapter one was active")
def test_delete_adapter(second: tuple, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "one", "llama", A, 10)
    alone = saved_adapter(tmp_path / "two", "llama", second, 20)
    for deleted_is_active in (True, False):
        base = some_model("llama")
        start = logits(base)
        model = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one").eval()
        model.load_adapter(tmp_path / "two", "two")
        model.set_adapter("one" if deleted_is_active else "two")
        model.delete_adapter("one")
        assert model.active_adapter == "two"
        assert model.base_model.active_adapters == ["two"]
        assert torch.equal(logits(model), alone)
        assert not [name for name, _ in model.named_parameters() if name.endswith(".one")]
        model.base_model.delete_adapter("two")
        assert not [name for name, _ in model.named_parameters() if "alps_" in name]
        assert torch.equal(logits(model.base_model), start)


# What is refused.


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `base` (hidden size 64) and an adapter for it, made on float32, `adapter`."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_checkpoint(folder / "base", "llama", **WIDE["llama"])
    model, _ = load_model(folder / "base")
    model = get_peft_model(model, AlpsConfig(heads=HEADS, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("name", "seed", "settings", "words"),
    [
        ("llama", 0, {"num_hidden_layers": 3}, "layers 2 and 3"),
        ("llama", 0, {"num_attention_heads": 8}, "heads 4 and 8"),
        ("llama", 0, {"num_key_value_heads": 4}, "groups 2 and 4"),
        ("mistral", 0, {}, "architecture llama and mistral"),
        ("gpt2", 0, {"n_embd": 64}, "architecture llama and gpt2"),
        ("llama", 1, {}, "trained on another model of the same shape"),
    ],
)
def test_adapter_refuses_another_base(adapters: Path, name: str, seed: int, settings: dict, words: str) -> None:
    settings = settings if name == "gpt2" else {**WIDE["llama"], "max_position_embeddings": 1024, **settings}
    base = tiny_model(name, seed, **settings)
    before = state(base)
    with pytest.raises(UserError, match=words) as error:
        PeftModel.from_pretrained(base, adapters / "adapter")
    assert "\n" not in str(error.value)
    assert same(state(base), before)  # and nothing was wrapped


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_adapter_refuses_other_quantized_weights(adapters: Path, tmp_path: Path, quantization: str) -> None:
    other, _ = load_model(tiny_checkpoint(tmp_path / "other", "llama", 1, **WIDE["llama"]), quantization)
    with pytest.raises(UserError, match="another model of the same shape"):
        PeftModel.from_pretrained(other, adapters / "adapter")


@pytest.mark.parametrize("one_changed", ["model.layers.0.self_attn.k_proj", "model.norm", "model.embed_tokens"])
def test_one_changed_weight_is_another_base(adapters: Path, one_changed: str) -> None:
    model, _ = load_model(adapters / "base")
    with torch.no_grad():
        model.get_submodule(one_changed).weight.view(-1)[3] += 0.1
    with pytest.raises(UserError, match="another model of the same shape"):
        PeftModel.from_pretrained(model, adapters / "adapter")


@pytest.mark.parametrize("loaded_as", ["bfloat16", "8bit", "4bit"])
def test_adapter_fits_its_base_in_any_precision(adapters: Path, loaded_as: str) -> None:
    stored = load_file(adapters / "adapter" / "adapter_model.safetensors")
    if loaded_as == "bfloat16":
        base, _ = load_model(adapters / "base", dtype=torch.bfloat16)
    else:
        base, _ = load_model(adapters / "base", loaded_as)
    start = logits(base)
    model = PeftModel.from_pretrained(base, adapters / "adapter").eval()
    moved = (logits(model) - start).abs().max()
    assert moved > 0.05
    own = {n.removesuffix(".default"): p for n, p in model.named_parameters() if "alps_" in n}
    assert same(own, stored)  # in full precision
    reference, _ = load_model(adapters / "adapter")
    assert (logits(model) - logits(reference)).abs().max() < moved / 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapter_made_on_a_quantized_base_fits_the_float_one(name: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", name, **WIDE[name])
    model, _ = load_model(tmp_path / "base", "4bit")
    get_peft_model(model, AlpsConfig(heads=HEADS)).save_pretrained(tmp_path / "adapter")
    for quantization in ("none", "8bit", "4bit"):
        PeftModel.from_pretrained(load_model(tmp_path / "base", quantization)[0], tmp_path / "adapter")


@pytest.mark.parametrize(
    "heads",
    [[], None, 5, "heads", [5], [(0,)], [(0, 1, 2)], [("0", "1")], ["01"], [(0, 1.5)], [(0, None)], {0: 1}],
)
def test_garbage_for_heads(heads: Any) -> None:
    with pytest.raises(UserError, match=r"AlpsConfig\(heads="):
        AlpsConfig(heads=heads)


@pytest.mark.parametrize("head", [(0, 4), (2, 0), (-1, 0), (0, -1)])
def test_heads_that_do_not_exist(head: tuple[int, int]) -> None:
    base = some_model("llama")
    before = state(base)
    with pytest.raises(UserError, match="There is no head"):
        get_peft_model(base, AlpsConfig(heads=[(0, 0), head]))
    assert same(state(base), before)
    model = get_peft_model(base, AlpsConfig(heads=[(0, 0)]))
    with pytest.raises(UserError, match="There is no head"):
        model.add_adapter("other", AlpsConfig(heads=[head]))
    assert list(model.peft_config) == ["default"]


def test_heads_are_sorted_and_counted_once() -> None:
    layout = HeadLayout.of(tiny_model("llama"))
    assert AlpsConfig(heads=[[1, 3], (0, 1), (0, 0), (0, 1)]).heads == list(HEADS)
    assert AlpsConfig(heads=HeadSelection(HEADS, layout)).heads == list(HEADS)
    assert AlpsConfig(heads=iter(HEADS)).heads == list(HEADS)


def test_unknown_projection_is_refused() -> None:
    with pytest.raises(UserError, match="type Embedding cannot be trained by heads"):
        AlpsLayer(nn.Embedding(4, 4), "default")


# Quantized bases.


@contextlib.contextmanager
def same_mode(model: nn.Module, training: bool) -> Iterator[None]:
    was = model.training
    model.train(training)
    yield
    model.train(was)


def assert_plain(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Nothing of bitsandbytes is left, nor a word of quantization."""
    for thing in (*model.modules(), *model.parameters()):
        assert "bitsandbytes" not in type(thing).__module__, type(thing)
    assert {value.dtype for value in (*model.parameters(), *model.state_dict().values())} == {dtype}
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not [name for name in vars(model) if "4bit" in name or "8bit" in name or name == "hf_quantizer"]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("name", WIDE)
def test_quantized(name: str, quantization: str, tmp_path: Path) -> None:
    """Start, train, merge, save and load on NF4 and LLM.int8.

    LLM.int8 rounds what flows through the model in eval mode, so both are compared in train mode; there it differs
    from the plain multiplication by float rounding.
    """
    some_model(name, **WIDE[name]).save_pretrained(tmp_path / "base")
    tiny_checkpoint(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.rename(tmp_path / "base" / file.name)
    base, _ = load_model(tmp_path / "base", quantization)
    tolerance = {"rtol": 0, "atol": 0 if quantization == "4bit" else 2e-6}
    layout = HeadLayout.of(base)
    masks, count = expected_rows(base), closed_form(base)
    prefix = layout.prefix(dict(base.named_modules()))
    before = {path: dense_weight(base.get_submodule(path)).clone() for path in masks}

    with same_mode(base, True):
        start = logits(base)
    model = get_peft_model(base, AlpsConfig(heads=HEADS, task_type="CAUSAL_LM")).train()
    torch.testing.assert_close(logits(model), start, **tolerance)
    assert sum(p.numel() for p in trained(model)) == count == model.get_nb_trainable_parameters()[0]
    assert {p.dtype for p in trained(model)} == {torch.float32}
    train(model, steps=2)
    tuned = logits(model)
    assert (tuned - start).abs().max() > 0.05
    with pytest.raises(UserError, match="merge_and_unload"):
        model.merge_adapter()

    merged = model.merge_and_unload()
    assert_plain(merged)
    with same_mode(merged, True):
        torch.testing.assert_close(logits(merged), tuned, **tolerance)
    for path, mask in masks.items():  # and every other row of these is the dequantized one
        after = dense_weight(merged.get_submodule(path))
        assert torch.equal(after[~mask], before[path][~mask])
        assert (after[mask] != before[path][mask]).any(dim=1).all()
    assert layout == HeadLayout.of(merged)
    assert layout.prefix(dict(merged.named_modules())) == prefix

    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_plain(again)
    assert same(state(again), state(merged))
    assert torch.equal(logits(again.eval()), logits(merged.eval()))


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=["bfloat16", "computing lower", "computing higher"],
)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_nf4_in_other_precisions(dtype: torch.dtype, compute: torch.dtype, double: bool, tmp_path: Path) -> None:
    """Merging is exact where bitsandbytes multiplies in the model's own dtype, which the merged model does.

    So is the start, and also where it multiplies in a lower one. In a higher one bitsandbytes also dequantizes to it,
    which nothing that is stored in the model's dtype can equal.
    """
    some_model("llama_mha_bias", **WIDE["llama_mha_bias"]).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=double,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config).train()
    start = logits(base)
    model = get_peft_model(base, AlpsConfig(heads=HEADS)).train()
    higher = torch.finfo(compute).eps < torch.finfo(dtype).eps
    torch.testing.assert_close(logits(model), start, rtol=0, atol=0.01 if higher else 0)
    train(model, steps=2)
    tuned = logits(model)
    merged = model.merge_and_unload()
    assert_plain(merged, dtype)
    torch.testing.assert_close(logits(merged), tuned, rtol=0, atol=0 if dtype == compute else 0.02)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_real_model(smollm2: Path, quantization: str, tmp_path: Path) -> None:
    base, _ = load_model(smollm2, quantization)
    heads = ((0, 0), (7, 4), (29, 8))
    base.train()
    start = logits(base)
    model = get_peft_model(base, AlpsConfig(heads=heads, task_type="CAUSAL_LM")).train()
    exact = quantization == "4bit"
    torch.testing.assert_close(logits(model), start, rtol=0, atol=0 if exact else 1e-3)
    assert sum(p.numel() for p in trained(model)) == closed_form(base, heads) == 3 * 3 * 64 * 576
    train(model, steps=2)
    tuned = logits(model)
    assert (tuned - start).abs().max() > 0.1
    merged = model.merge_and_unload()
    assert_plain(merged)
    torch.testing.assert_close(logits(merged), tuned, rtol=0, atol=0 if exact else 1e-3)
    if exact:
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(again.train()), tuned)
