"""What must hold on a GPU; references are computed on the same device, and tolerances are those of the dtype.

`make test-gpu` runs them on a GPU. `pytest -m gpu` runs them on the CPU, which tests the tests.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint, tiny_model

from alps_repro import Finetuned, HeadLayout, HeadSelection, Recipe, evaluate, finetune, load_model
from alps_repro.data.prompts import IGNORED
from alps_repro.devices import device as usable
from alps_repro.localization.hifi import hifi
from alps_repro.localization.selectors import batches
from alps_repro.training.loss import summed_loss

pytestmark = pytest.mark.gpu

ROWS = [
    {"instruction": f"add {i} and {3 * i % 7}", "response": "so " * (i % 3) + str(i + 3 * i % 7)} for i in range(32)
]
SHORT = {"max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
#: The relative rounding of products of these dtypes, with room for sums in another order.
NEAR = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}


@pytest.fixture(scope="module")
def device() -> str:
    """`cuda` if `ALPS_REPRO_TEST_DEVICE` says so, which fails without a GPU."""
    return usable(os.environ.get("ALPS_REPRO_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide enough for bitsandbytes' blocks.
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "model", "llama", **settings)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def precision(request: pytest.FixtureRequest, device: str) -> str:
    if request.param == "float16" and device == "cpu":
        pytest.skip("float16 is trained in on a GPU only")
    return request.param


def run(
    base: Path, output: Path, device: str, *, scope: str = "all", quantization: str = "none", **own: Any
) -> Finetuned:
    recipe = Recipe.check(**{**SHORT, "device": device, "precision": "float32", **own})
    asked: dict[str, Any] = {"method": "random", "ratio": 0.3, "progress": False, "recipe": recipe}
    return finetune(base, ROWS, output, scope=scope, quantization=quantization, **asked)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(
            **{name: value for name, value in batch.items() if name != "labels"}, use_cache=False
        ).logits.float()


def batch_of(device: str, vocabulary: int = 64) -> dict[str, torch.Tensor]:
    """Rows padded on the left, with answers of unequal length."""
    ids = torch.randint(3, vocabulary, (4, 24), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    for i in range(len(ids)):
        mask[i, : 2 * i] = 0
        labels[i, -3 - i :] = ids[i, -3 - i :]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal within a share of the largest expected number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_frozen_rows_stay_to_the_bit(base: Path, device: str, precision: str, tmp_path: Path) -> None:
    result = run(base, tmp_path / "tuned", device, precision=precision)
    before, after = tensors(base), tensors(result.path)
    layout = HeadLayout.of(load_model(base, device=device)[0])
    prefix, selected = layout.prefix(before), layout.selected_rows(HeadSelection(result.heads, layout))
    for layer in range(layout.layers):
        for path in layout.modules(layer):
            changed = (before[f"{prefix}{path}.weight"] != after[f"{prefix}{path}.weight"]).any(1)
            expected = torch.zeros_like(changed)
            expected[selected.get(path, [])] = True
            assert torch.equal(changed, expected), path


def test_losses_are_near_those_of_float32(base: Path, device: str, precision: str, tmp_path: Path) -> None:
    own = {"learning_rate": 1e-4}
    expected = run(base, tmp_path / "expected", device, **own).losses
    found = run(base, tmp_path / "found", device, precision=precision, **own).losses
    assert found == pytest.approx(expected, rel=NEAR[precision])


@pytest.mark.parametrize("scope", ["all", "heads"])
def test_the_same_seed_gives_the_same_losses(base: Path, device: str, scope: str, tmp_path: Path) -> None:
    one, two = (run(base, tmp_path / name, device, scope=scope) for name in ("one", "two"))
    assert one.losses == pytest.approx(two.losses, rel=NEAR["float32"])
    assert one.heads == two.heads


def test_checkpointing_changes_nothing(base: Path, device: str, tmp_path: Path) -> None:
    plain = run(base, tmp_path / "plain", device)
    again = run(base, tmp_path / "again", device, gradient_checkpointing=True)
    assert again.losses == pytest.approx(plain.losses, rel=NEAR["float32"])


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_an_adapter_loads_and_merges(base: Path, device: str, quantization: str, tmp_path: Path) -> None:
    path = run(base, tmp_path / "tuned", device, scope="heads", quantization=quantization).path
    batch = batch_of(device)
    # On a CPU bitsandbytes' 8-bit product rounds its input in eval mode only, which a merged model never does.
    start = logits(load_model(base, quantization, device=device)[0].train(), batch)
    model, _ = load_model(path, quantization, device=device)
    tuned = logits(model.train(), batch)
    assert float((tuned - start).abs().max()) > 1e-3
    near(logits(load_model(path, quantization, device=device)[0].train(), batch), tuned, 1e-6)
    dtype = str(model.dtype).removeprefix("torch.")
    merged = model.merge_and_unload()
    rounds_input = quantization == "8bit" and device == "cuda"
    near(logits(merged.train(), batch), tuned, 0.2 if rounds_input else NEAR[dtype])
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged", dtype=merged.dtype).to(device)
    near(logits(again.train(), batch), logits(merged, batch), 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_is_the_plain_one(device: str, dtype: str) -> None:
    model: Any = tiny_model("llama").to(device)
    batch = batch_of(device)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        labels, outputs = batch["labels"][:, 1:], model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        counted = labels != IGNORED
        plain = F.cross_entropy(outputs[:, :-1][counted].float(), labels[counted], reduction="sum")
        found = summed_loss(model, batch, chunk=5)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    near(found.detach(), plain.detach(), NEAR[dtype] / 4)
    for one, other in zip(torch.autograd.grad(found, list(model.parameters())), expected):
        near(one, other, NEAR[dtype])


def test_evaluation_hardly_depends_on_the_batch(base: Path, device: str) -> None:
    given: dict[str, Any] = {"limit": 12, "device": device, "precision": "float32", "max_lost": 1, "progress": False}
    one, two = (evaluate(base, ["chain_sum"], batch_size=size, **given) for size in (2, 12))
    metric = "answer_loglikelihood,none"
    found, expected = (results.results["chain_sum"][metric] for results in (one, two))
    assert found == pytest.approx(expected, rel=1e-4)
    assert one.hashes == two.hashes


def test_hifi_agrees_with_the_cpu(base: Path, device: str) -> None:
    found = []
    for where in (device, "cpu"):
        model, tokenizer = load_model(base, dtype=torch.float32, device=where)
        found.append(hifi(model, batches("chain_sum", 4, tokenizer, 4, max_lost=1)[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
