"""Frozen weights are rounded once: no number of a forward pass under autocast changes, and no stored byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_checkpoint, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.models.loading import load_model
from alps_repro.models.precision import restore, round_frozen
from alps_repro.training.finetune import trainable

IDS = torch.tensor([[5, 9, 33, 2, 8], [7, 7, 1, 40, 3]])
ADAPTERS = ("rows", "lora", "dora", "shira", "scales", "offsets", "jola")


def logits_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=IDS).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tuned_model(kind: str, scope: str, adapter: str = "rows") -> nn.Module:
    model = tiny_model(kind)
    heads = HeadSelection.random(HeadLayout.of(model), 0.3, seed=0)
    torch.manual_seed(1)
    return trainable(model, heads, scope, adapter=adapter, rank=2)


@pytest.mark.parametrize("scope", ["heads", "all"])
@pytest.mark.parametrize("kind", TINY)
def test_same_products(kind: str, scope: str) -> None:
    """Logits and gradients under autocast are the same bits, whether weights are rounded once or in every pass."""
    tuned = tuned_model(kind, scope)
    logits, gradients = logits_and_gradients(tuned)
    round_frozen(tuned, "bfloat16")
    own_logits, own_gradients = logits_and_gradients(tuned)
    assert torch.equal(own_logits, logits)
    assert own_gradients.keys() == gradients.keys()
    assert all(torch.equal(own_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_same_products_with_adapters(adapter: str) -> None:
    tuned = tuned_model("llama", "heads", adapter)
    logits, gradients = logits_and_gradients(tuned)
    round_frozen(tuned, "bfloat16")
    own_logits, own_gradients = logits_and_gradients(tuned)
    if adapter in ("dora", "shira"):  # peft computes with the frozen weight itself: its norm, a sum with entries
        torch.testing.assert_close(own_logits, logits, rtol=0.02, atol=0.02)
        return
    assert torch.equal(own_logits, logits)
    assert all(torch.equal(own_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("scope", ["heads", "all"])
@pytest.mark.parametrize("kind", TINY)
def test_frozen_linear_weights_alone_are_rounded(kind: str, scope: str) -> None:
    tuned = tuned_model(kind, scope)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters(remove_duplicate=False)}
    rounded = round_frozen(tuned, "bfloat16")
    dtypes = {p.dtype for p in tuned.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    linear = [m.weight for m in tuned.modules() if isinstance(m, (nn.Linear, Conv1D)) and not m.weight.requires_grad]
    assert all(weight.dtype == torch.bfloat16 for weight in linear)
    assert {m.weight.dtype for m in tuned.modules() if isinstance(m, nn.Embedding)} == {torch.float32}
    restore(rounded)
    after = dict(tuned.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in before)


def test_a_shared_output_layer_is_shared_again() -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    rounded = round_frozen(model, "bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.embed_tokens.weight.dtype == torch.float32
    restore(rounded)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_layers_take_and_return_the_precision(quantization: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path, hidden_size=64, num_attention_heads=4)
    model, _ = load_model(base, quantization, dtype=torch.float32, device="cpu")
    round_frozen(model, "bfloat16")
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(layers) == 14
    for layer in layers:
        layer.register_forward_hook(lambda m, given, out: seen.add((given[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(input_ids=IDS)
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_a_base_in_bfloat16_is_computed_as_one_in_float32() -> None:
    """Stored in bfloat16: rounding to it loses nothing, and everything else is in float32."""
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(False)
    exact = tiny_model("llama").to(torch.bfloat16).float().requires_grad_(False)
    assert not any(weight.dtype != torch.bfloat16 for _, weight in round_frozen(model, "bfloat16"))
    round_frozen(exact, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, exact(input_ids=IDS).logits)
    round_frozen(model, "float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
