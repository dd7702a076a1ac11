"""Fine-tuning: what each method and scope trains, that runs repeat and resume to the bit, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import TINY, tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from alps_repro import Finetuned, HeadLayout, HeadScores, HeadSelection, Recipe, finetune, load_model
from alps_repro.data.datasets import training_examples
from alps_repro.data.prompts import IGNORED, PROMPT, Collate, tokenize
from alps_repro.errors import UserError
from alps_repro.training.finetune import Place, _Job, _load
from alps_repro.training.trainer import FIRST_SCALE, trainer_of

ROWS = [
    {"instruction": f"add {i} and {3 * i % 7}", "response": "so " * (i % 3) + str(i + 3 * i % 7)} for i in range(20)
]
DATA = Dataset.from_list(ROWS)
#: Eight steps over twenty examples: the second epoch begins at the sixth.
SHORT = {"max_steps": 8, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "float32"}
#: Long enough for the prompt, letter by letter; no dropout, so that batches may be cut differently.
LONG: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 1024, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def base_of(bases: Path):
    """A function from the name of a tiny model to the folder of its checkpoint, made once."""

    def folder(name: str, **settings: Any) -> Path:
        path = bases / "-".join([name, *(f"{k}{v}" for k, v in settings.items())])
        return path if path.exists() else tiny_checkpoint(path, name, **{**LONG.get(name, {}), **settings})

    return folder


def run(base: Path, output: Path, dataset: Any = DATA, *, method: str = "random", **asked: Any) -> Finetuned:
    """`finetune` with the short recipe; settings of the recipe may stand among its own."""
    recipe = {name: asked.pop(name) for name in list(asked) if name in Recipe.model_fields}
    recipe = Recipe.check(**{**SHORT, **recipe})
    asked = {"ratio": 0.3, "progress": False, **asked}
    return finetune(base, dataset, output, method=method, recipe=recipe, **asked)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, or those of an adapter's merged model."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    model = load_model(folder)[0].merge_and_unload()
    return {name: value.clone() for name, value in model.state_dict().items()}


def weights_of_base(base: Path) -> dict[str, torch.Tensor]:
    """A base's tensors by the names of a loaded model, tied ones included."""
    return {k: v.clone() for k, v in AutoModelForCausalLM.from_pretrained(base).state_dict().items()}


def row_masks(base: Path, heads: Any) -> dict[str, torch.Tensor]:
    """{name of a q/k/v tensor: which of its rows the heads select}, all such tensors of the model included."""
    model = AutoModelForCausalLM.from_pretrained(base)
    layout = HeadLayout.of(model)
    modules = dict(model.named_modules())
    prefix = layout.prefix(modules)
    selected = layout.selected_rows(heads)
    masks = {}
    for layer in range(layout.layers):
        for path in layout.modules(layer):
            projection = modules[prefix + path]
            count = projection.weight.shape[1 if layout.transposed else 0]
            mask = torch.zeros(count, dtype=torch.bool)
            mask[selected.get(path, [])] = True
            masks |= {f"{prefix}{path}.{name}": mask for name, _ in projection.named_parameters()}
    return masks


def by_rows(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return value.T if value.ndim == 2 and value.shape[0] != len(mask) else value


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop the next training at its `at`-th forward pass, as Ctrl-C would."""
    original, count = Trainer.training_step, 0

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)


# What is trained.

#: Losses in nats per token of the tiny Llama on `DATA`.
PINNED = {
    "heads": (4.125096, 4.180691, 4.133685, 4.128763, 4.05398, 4.055494, 4.068508, 4.047058),
    "all": (4.125096, 4.180691, 3.786894, 4.017381, 3.442061, 3.095957, 3.197443, 2.881833),
}


@pytest.mark.parametrize("scope", PINNED)
def test_pinned_losses(scope: str, base_of: Any, tmp_path: Path) -> None:
    result = run(base_of("llama"), tmp_path / "out", scope=scope)
    assert result.losses == pytest.approx(PINNED[scope], rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama_mha_bias", "gpt2", "falcon_gqa"])
def test_scope_heads(name: str, base_of: Any, tmp_path: Path) -> None:
    base = base_of(name)
    result = run(base, tmp_path / "out", scope="heads")
    assert result.path == tmp_path / "out"
    assert {p.name for p in result.path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((result.path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert len(result.heads) == 3  # 0.3 of 8, rounded up
    assert result.trained_parameters == sum(
        v.numel() for v in load_file(result.path / "adapter_model.safetensors").values()
    )
    before, after, masks = weights_of_base(base), weights(result.path), row_masks(base, result.heads)
    assert before.keys() == after.keys()
    for tensor, old in before.items():
        mask = masks.get(tensor)
        if mask is None:
            assert torch.equal(old, after[tensor]), tensor
            continue
        old, new = by_rows(old, mask), by_rows(after[tensor], mask)
        assert torch.equal(old[~mask], new[~mask]), tensor
        changed = (old != new).view(len(mask), -1).any(dim=1)
        assert torch.equal(changed, mask), tensor


@pytest.mark.parametrize("method", ["random", "layer_consistent", "alps", "full", "no_attn"])
@pytest.mark.parametrize("name", ["llama", "llama_mha_bias", "gpt2"])
def test_scope_all(name: str, method: str, base_of: Any, tmp_path: Path) -> None:
    """Unselected rows stay to the bit although the weight decay is 0.1; everything else moves."""
    base = base_of(name)
    layout = HeadLayout.of(AutoModelForCausalLM.from_pretrained(base))
    values = np.arange(8.0).reshape(2, 4)
    scores = HeadScores(values, layout, "base", "task")
    result = run(base, tmp_path / "out", method=method, scope="all", scores=scores, checkpoint_steps=3)
    expected = {
        "random": HeadSelection.random(layout, 0.3, 0).heads,
        "layer_consistent": HeadSelection.layer_consistent(layout, 0.3, 0).heads,
        "alps": ((1, 1), (1, 2), (1, 3)),
        "full": HeadSelection.all(layout).heads,
        "no_attn": (),
    }[method]
    assert result.heads == expected
    assert not (tmp_path / "out.checkpoints").exists()

    before, after, masks = load_file(base / "model.safetensors"), weights(result.path), row_masks(base, expected)
    assert before.keys() == after.keys()  # a plain checkpoint, with no name of the tuner's in it
    assert masks.keys() <= before.keys()
    frozen = 0
    for tensor, old in before.items():
        new = after[tensor]
        mask = masks.get(tensor, torch.ones(len(old), dtype=torch.bool))
        old, new = by_rows(old, mask), by_rows(new, mask)
        assert torch.equal(old[~mask], new[~mask]), tensor
        changed = (old != new).view(len(old), -1).any(dim=1)
        if tensor.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight")):
            # A zero row of an unused token has nothing to decay.
            assert changed.float().mean() > 0.9, tensor
        else:
            assert torch.equal(changed, mask), tensor
        frozen += int((~mask).sum()) * (old[0].numel() if old.ndim == 2 else 1)
    total = sum(v.numel() for v in before.values())
    assert (result.trained_parameters, result.total_parameters) == (total - frozen, total)

    loaded, tokenizer = load_model(result.path)
    assert type(loaded).__name__ == type(AutoModelForCausalLM.from_pretrained(base)).__name__
    assert tokenizer("12").input_ids == tiny_tokenizer()("12").input_ids
    assert loaded.config.use_cache


@pytest.mark.parametrize("scope", ["heads", "all"])
@pytest.mark.parametrize("name", TINY)
def test_frozen_weights_keep_their_bytes_in_bfloat16(name: str, scope: str, base_of: Any, tmp_path: Path) -> None:
    """Whatever products are computed in: the base is stored in float32, which bfloat16 rounds."""
    base = base_of(name)
    result = run(base, tmp_path / "out", scope=scope, precision="bfloat16", max_steps=2, warmup_ratio=0.0)
    before, after, masks = weights_of_base(base), weights(result.path), row_masks(base, result.heads)
    for tensor, mask in masks.items():
        old, new = (by_rows(value, mask) for value in (before[tensor], after[tensor]))
        assert torch.equal(new[~mask], old[~mask]), tensor
        assert not mask.any() or not torch.equal(new[mask], old[mask]), tensor
    if scope == "heads":
        assert all(torch.equal(after[tensor], before[tensor]) for tensor in before.keys() - masks.keys())


def test_full_in_scope_heads_is_all_heads(base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama", num_hidden_layers=8)  # more projections than peft lists one by one
    result = run(base, tmp_path / "out", method="full", scope="heads", max_steps=2)
    assert len(result.heads) == 32
    before, after, masks = weights_of_base(base), weights(result.path), row_masks(base, result.heads)
    assert all(mask.all() for mask in masks.values())
    assert {name for name in before if not torch.equal(before[name], after[name])} == masks.keys()


def test_no_attn_in_scope_heads_is_the_base(base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama")
    result = run(base, tmp_path / "out", method="no_attn", scope="heads")
    assert (result.path, result.losses, result.heads, result.trained_parameters) == (base, (), (), 0)
    assert result.total_parameters == sum(v.numel() for v in load_file(base / "model.safetensors").values())
    assert list(tmp_path.iterdir()) == []


def test_own_selection_and_tokens(base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama")
    heads = HeadSelection(((1, 2),), HeadLayout.of(AutoModelForCausalLM.from_pretrained(base)))
    result = run(base, tmp_path / "out", method="full", heads=heads, scope="heads", max_steps=None, epochs=2.0)
    assert result.heads == ((1, 2),)
    assert len(result.losses) == 10
    encoded = tokenize(DATA, tiny_tokenizer(), 2048)
    assert result.tokens == 2 * sum(len(row) for row in encoded["input_ids"])


def test_offline_data_by_name(base_of: Any, tmp_path: Path) -> None:
    by_name = run(base_of("llama"), tmp_path / "a", "chain_sum", scope="heads", max_steps=2, seed=3)
    rows = training_examples("chain_sum", size=8, seed=3)
    by_rows = run(base_of("llama"), tmp_path / "b", rows, scope="heads", max_steps=2, seed=3)
    assert by_name.losses == by_rows.losses
    assert by_name.data_sha256 == by_rows.data_sha256


# Runs repeat, and resume as if they had never been stopped.


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["heads", "all"])
def test_same_seed_same_bytes(scope: str, precision: str, base_of: Any, tmp_path: Path) -> None:
    asked = {"scope": scope, "precision": precision}
    first = run(base_of("llama"), tmp_path / "a", **asked)
    torch.manual_seed(99)  # what happened before must not matter
    again = run(base_of("llama"), tmp_path / "b", **asked)
    assert files(first.path) == files(again.path)
    assert first.losses == again.losses
    other = run(base_of("llama"), tmp_path / "c", seed=1, **asked)
    assert other.heads == first.heads  # drawn by choice_seed
    assert other.losses != first.losses
    assert files(other.path) != files(first.path)
    chosen = run(base_of("llama"), tmp_path / "d", choice_seed=1, **asked)
    assert chosen.heads != first.heads


def test_saved_modules_are_in_one_order(base_of: Any, tmp_path: Path) -> None:
    """They are a set within peft, whose order is another in every process."""
    made = run(base_of("llama"), tmp_path / "tuned", method="lora", scope="heads")
    modules = json.loads((made.path / "adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules)
    assert len(modules) == 6


@pytest.mark.parametrize(
    ("name", "method", "scope", "precision", "stop"),  # stop: forward pass, two a step, ten an epoch
    [
        ("llama", "random", "heads", "float32", 9),
        ("llama", "random", "heads", "bfloat16", 14),
        ("llama", "random", "all", "float32", 9),
        ("llama", "random", "all", "bfloat16", 14),
        ("llama", "full", "all", "float32", 14),
        ("gpt2", "random", "heads", "float32", 14),
        ("gpt2", "random", "all", "bfloat16", 9),
    ],
)
def test_resume_equals_uninterrupted(
    name: str,
    method: str,
    scope: str,
    precision: str,
    stop: int,
    base_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # GPT-2 with dropout: the random numbers have to go on where they were, too. Its embeddings are tied.
    base = base_of(name, **({"resid_pdrop": 0.1} if name == "gpt2" else {}))
    asked = {"method": method, "scope": scope, "precision": precision, "checkpoint_steps": 2}
    whole = run(base, tmp_path / "whole", **asked)

    with monkeypatch.context() as patch:
        interrupt(patch, at=stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    step = (stop - 1) // 4 * 2
    made = (tmp_path / "out.checkpoints").glob("checkpoint-*")
    checkpoint = max(made, key=lambda path: int(path.name.split("-")[1]))
    assert checkpoint.name == f"checkpoint-{step}"
    if scope == "all" and method == "random":
        stored = load_file(checkpoint / "model.safetensors")
        plain = load_file(base / "model.safetensors")
        rows = sum(v.numel() for k, v in stored.items() if ".alps_" in k)
        masks = row_masks(base, whole.heads)
        assert rows == sum(int(m.sum()) * (plain[k].numel() // len(m)) for k, m in masks.items())
        others = {k for k in plain if k not in masks}
        assert others <= stored.keys()  # everything else that trains
        assert not any(torch.equal(stored[k], plain[k]) for k in others)

    # One that was cut off while it was being written is passed over.
    cut = tmp_path / "out.checkpoints" / f"checkpoint-{step + 2}"
    shutil.copytree(checkpoint, cut)
    (cut / "trainer_state.json").unlink()

    steps = []
    original = Trainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", lambda self, *a, **k: steps.append(1) or original(self, *a, **k))
        resumed = run(base, tmp_path / "out", **asked)
    assert len(steps) == 2 * (8 - step)
    assert resumed.losses == whole.losses
    assert files(resumed.path) == files(whole.path)
    assert (resumed.tokens, resumed.trained_parameters) == (whole.tokens, whole.trained_parameters)
    assert not (tmp_path / "out.checkpoints").exists()


def test_checkpoints_of_another_run_are_refused(base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"scope": "heads", "checkpoint_steps": 2}
    with monkeypatch.context() as patch:
        interrupt(patch, at=7)
        with pytest.raises(KeyboardInterrupt):
            run(base_of("llama"), tmp_path / "out", **asked)
    checkpoints = sorted(p.name for p in (tmp_path / "out.checkpoints").iterdir())
    for other in ({"choice_seed": 1}, {"seed": 1}, {"learning_rate": 1e-3}, {"dataset": DATA.select(range(8))}):
        with pytest.raises(UserError, match="holds checkpoints of another run"):
            run(base_of("llama"), tmp_path / "out", **{**asked, **other})
    assert sorted(p.name for p in (tmp_path / "out.checkpoints").iterdir()) == checkpoints
    run(base_of("llama"), tmp_path / "out", **asked)


# The loss.


@pytest.mark.parametrize("loss_on", ["response", "prompt"])
@pytest.mark.parametrize("name", TINY)
def test_loss_and_gradients_are_those_of_the_plain_computation(name: str, loss_on: str) -> None:
    """Padding on the left and logits for some positions only change neither, whatever positions a model counts."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 10, 11, 2], "prompt_length": 3},
        {"input_ids": [12, 13, 14, 2], "prompt_length": 2},
        {"input_ids": [15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 2], "prompt_length": 8},
    ]
    batch = Collate(0, loss_on)(rows)
    assert batch["labels"].shape[1] == batch["logits_to_keep"]
    count = int((batch["labels"] != IGNORED).sum())

    model = tiny_model(name)
    model(**batch, num_items_in_batch=torch.tensor(count)).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}

    model.zero_grad()
    total = torch.tensor(0.0)
    for row in rows:  # one by one: no padding, no positions, no cut
        ids = torch.tensor(row["input_ids"])
        first = row["prompt_length"] if loss_on == "response" else 1
        logits = model(input_ids=ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum")
    (total / count).backward()
    ours = model(**batch).loss
    torch.testing.assert_close(ours.detach(), (total / count).detach(), rtol=1e-5, atol=1e-6)
    for n, p in model.named_parameters():
        torch.testing.assert_close(gradients[n], p.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("llama", "heads"),
        ("llama", "all"),
        *((name, "heads") for name in ("gpt2", "opt", "falcon_mqa", "gpt_neox", "phi3", "gemma3_text")),
    ],
)
def test_batch_cut_differently_trains_the_same(name: str, scope: str, base_of: Any, tmp_path: Path) -> None:
    """Answers differ in length, so a mean over micro-batches would not be the mean over tokens."""
    results = [
        run(base_of(name), tmp_path / str(micro), scope=scope, micro_batch_size=micro, max_steps=3)
        for micro in ((1, 2, 4) if name == "llama" else (1, 4))
    ]
    for other in results[1:]:
        assert other.losses == pytest.approx(results[0].losses, rel=1e-5)


def test_first_loss_is_the_mean_over_answer_tokens(base_of: Any, tmp_path: Path) -> None:
    """The loss that is reported, against one computed from the text itself."""
    base = base_of("llama")
    result = run(base, tmp_path / "out", DATA.select(range(4)), max_steps=1, scope="heads")
    model, tokenizer = load_model(base)
    total, count = 0.0, 0
    for row in ROWS[:4]:
        prompt = tokenizer(PROMPT.format(instruction=row["instruction"])).input_ids
        answer = [*tokenizer(row["response"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            log_probabilities = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_probabilities[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert result.losses == pytest.approx([total / count], rel=1e-5)


def test_collate() -> None:
    rows = [{"input_ids": [5, 6, 7, 2], "prompt_length": 2}, {"input_ids": [8, 9, 10, 11, 12, 2], "prompt_length": 5}]
    batch = Collate(0, "response")(rows)
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 7, 2], [8, 9, 10, 11, 12, 2]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert batch["logits_to_keep"] == 3  # of two answer tokens and the one before
    assert batch["labels"].tolist() == [[-100, 7, 2], [-100, -100, 2]]

    prompt = Collate(0, "prompt")(rows)
    assert prompt["labels"].tolist() == [[-100, -100, -100, 6, 7, 2], [-100, 9, 10, 11, 12, 2]]
    assert prompt["logits_to_keep"] == 6


def test_end_is_learnt_where_it_pads_too() -> None:
    """Many tokenizers have no padding token and pad with the end token; labels go by position, not by value."""
    rows = [{"input_ids": [5, 6, 7, 2], "prompt_length": 2}, {"input_ids": [8, 9, 10, 11, 12, 2], "prompt_length": 4}]
    assert Collate(2, "response")(rows)["labels"].tolist() == Collate(0, "response")(rows)["labels"].tolist()
    assert Collate(2, "response")(rows)["input_ids"].tolist()[0] == [2, 2, 5, 6, 7, 2]
    assert (Collate(2, "response")(rows)["labels"][:, -1] == 2).all()


def test_tokenize() -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(PROMPT.format(instruction="go")).input_ids
    rows = Dataset.from_list(
        [
            {"instruction": "go", "response": "abc"},
            {"instruction": "go", "response": "a" * 50},
            {"instruction": "go" * 50, "response": "abc"},
        ]
    )
    encoded = tokenize(rows, tokenizer, len(prompt) + 10)
    assert encoded.column_names == ["input_ids", "prompt_length"]
    assert encoded["prompt_length"] == [len(prompt)] * 2  # the overlong prompt is left out
    assert encoded["input_ids"][0] == [*prompt, *tokenizer("abc").input_ids, 2]
    assert encoded["input_ids"][1] == [*prompt, *tokenizer("a" * 10).input_ids]  # cut, so without an end
    with pytest.raises(UserError, match=f"fits into max_length {len(prompt)}"):
        tokenize(rows, tokenizer, len(prompt))


# The recipe.


def test_learning_rate_schedule(base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear to the peak over 10 % of the steps, then a cosine to 10 % of it."""
    logs: list[dict[str, float]] = []
    original = Trainer.log
    monkeypatch.setattr(
        Trainer, "log", lambda self, log, *a, **k: logs.append(dict(log)) or original(self, log, *a, **k)
    )
    run(base_of("llama"), tmp_path / "out", scope="heads", max_steps=20, batch_size=2, learning_rate=1e-3)
    rates = [log["learning_rate"] for log in logs if "learning_rate" in log]
    warm_up = [1e-3 * step / 2 for step in range(2)]
    cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 18))) for step in range(18)]
    assert rates == pytest.approx([*warm_up, *cosine], rel=1e-6)


def test_weight_decay_spares_biases_and_norms(base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[dict[str, Any]]] = []
    names: dict[int, str] = {}
    original = Trainer.create_optimizer

    def create_optimizer(self: Trainer, *args: Any) -> Any:
        optimizer = original(self, *args)
        groups.append(optimizer.param_groups)
        names.update({id(p): n for n, p in self.model.named_parameters()})
        return optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", create_optimizer)
    for scope in ("heads", "all"):
        own = {"weight_decay": 0.2, "betas": (0.8, 0.99)}
        run(base_of("llama_mha_bias"), tmp_path / scope, scope=scope, max_steps=1, **own)
    for group in (g for run_groups in groups for g in run_groups):
        assert group["betas"] == (0.8, 0.99)
        assert group["weight_decay"] in (0.0, 0.2)
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0.0) == (parameter.ndim == 1), names[id(parameter)]
    counts = [sum(len(g["params"]) for g in run_groups) for run_groups in groups]
    assert all(counts)
    assert not any("base_layer" in names[id(p)] for g in groups[0] for p in g["params"])


@pytest.mark.parametrize("scope", ["heads", "all"])
def test_gradient_checkpointing_and_bfloat16(scope: str, base_of: Any, tmp_path: Path) -> None:
    plain = run(base_of("llama"), tmp_path / "plain", scope=scope)
    again = run(base_of("llama"), tmp_path / "checkpointing", scope=scope, gradient_checkpointing=True)
    assert again.losses == plain.losses
    assert files(again.path) == files(plain.path)
    rounded = run(base_of("llama"), tmp_path / "rounded", scope=scope, precision="bfloat16")
    assert rounded.losses != plain.losses
    assert rounded.losses == pytest.approx(plain.losses, rel=0.02)
    assert {v.dtype for v in weights(rounded.path).values()} == {torch.float32}


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make later trainings have a loss scale, as in float16, at which the gradients of the first step overflow."""

    def scaled(tuned: Any, **arguments: Any) -> Trainer:
        trainer = trainer_of(tuned, **arguments)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=1e-32)
        return trainer

    return lambda: monkeypatch.setattr("alps_repro.training.finetune.trainer_of", scaled)


@pytest.mark.parametrize("scope", ["heads", "all"])
def test_skipped_steps_are_counted(
    scope: str, overflow: Any, base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(base_of("llama"), tmp_path / "plain", scope=scope)
    assert plain.skipped == 0
    overflow()
    with pytest.warns(UserWarning, match="^1 of 8 optimizer steps were skipped, .* 'bfloat16'.$"):
        once = run(base_of("llama"), tmp_path / "once", scope=scope, checkpoint_steps=2)
    assert once.skipped == 1
    assert once.losses[0] == plain.losses[0]  # what is trained is not the scaled loss
    assert once.losses[1:] != plain.losses[1:]

    interrupt(monkeypatch, at=9)  # counted across a stop
    with pytest.raises(KeyboardInterrupt):
        run(base_of("llama"), tmp_path / "resumed", scope=scope, checkpoint_steps=2)
    with pytest.warns(UserWarning, match="^1 of 8"):
        again = run(base_of("llama"), tmp_path / "resumed", scope=scope, checkpoint_steps=2)
    assert (again.skipped, again.losses) == (1, once.losses)


def test_few_skipped_steps_need_no_warning(
    overflow: Any, base_of: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    overflow()
    assert run(base_of("llama"), tmp_path / "out", max_steps=10).skipped == 1
    assert not [warning for warning in recwarn if "skipped" in str(warning.message)]


def test_first_loss_scale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Below those at which SmolLM2's gradients overflow; what a checkpoint holds goes before it."""
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(Accelerator, "scaler", property(lambda self: scaler, lambda self, value: None), raising=False)
    model = tiny_model("llama")
    trainer_of(model, model=model, args=TrainingArguments(tmp_path, use_cpu=True))
    assert scaler.get_scale() == FIRST_SCALE < 32_768
    assert scaler.get_growth_interval() == 2000  # torch's


@pytest.mark.parametrize(
    ("scope", "quantization", "where", "dtype"),
    [
        ("all", "none", "cuda", torch.float32),
        ("heads", "none", "cuda", None),  # as stored
        ("heads", "4bit", "cuda", torch.float32),
        ("heads", "none", "cpu", torch.float32),
    ],
)
def test_dtype_in_which_a_base_is_loaded(
    scope: str, quantization: str, where: str, dtype: torch.dtype | None, monkeypatch: Any
) -> None:
    """As stored where nothing has to start in float32; frozen weights are rounded afterwards."""
    loaded = []
    model = tiny_model("llama")
    monkeypatch.setattr(
        "alps_repro.training.finetune.load_model", lambda *a, **k: (loaded.append(k["dtype"]), (model, None))[1]
    )
    job = _Job("base", "data", Path("out"), "full", 1.0, scope, quantization, 0, 0, Recipe())
    _load(job, Place(where, 1, "bfloat16", 1, 1))
    assert loaded == [dtype]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_base(quantization: str, base_of: Any, tmp_path: Path) -> None:
    base = base_of("llama", hidden_size=64)
    result = run(base, tmp_path / "out", scope="heads", quantization=quantization)
    assert result.losses[-1] < result.losses[0]
    assert result.total_parameters == sum(v.numel() for v in load_file(base / "model.safetensors").values())
    stored = load_file(result.path / "adapter_model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float32}
    assert result.trained_parameters == sum(v.numel() for v in stored.values())
    for loaded_as in ("none", quantization):
        model, _ = load_model(result.path, loaded_as)
        assert isinstance(model, PeftModel)
        assert model.peft_config["default"].heads == list(result.heads)


def test_real_model(smollm2: Path, tmp_path: Path) -> None:
    result = run(smollm2, tmp_path / "out", scope="heads", ratio=0.01, max_steps=2, batch_size=2, warmup_ratio=0.0)
    assert len(result.heads) == 3
    assert result.total_parameters == 134_515_008
    before, after = weights_of_base(smollm2), weights(result.path)
    masks = row_masks(smollm2, result.heads)
    assert before.keys() == after.keys()
    for tensor, old in before.items():
        mask = masks.get(tensor, torch.zeros(len(old), dtype=torch.bool))
        changed = (old != after[tensor]).view(len(old), -1).any(dim=1)
        assert torch.equal(changed, mask), tensor


# What is refused.


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "alsp"}, "no method 'alsp': did you mean 'alps'"),
        ({"scope": "head"}, "no scope 'head': did you mean 'heads'"),
        ({"quantization": "4bits"}, "no quantization '4bits': did you mean '4bit'"),
        ({"dataset": "chain_sums"}, "no data set 'chain_sums': did you mean 'chain_sum'"),
        ({"quantization": "4bit"}, "in 4bit, what lies outside the heads cannot be trained: use scope='heads'"),
        ({"quantization": "8bit"}, "in 8bit, what lies outside the heads cannot be trained: use scope='heads'"),
        pytest.param(
            {"precision": "float16"},
            "float16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"method": "alps"}, "needs head scores: localize first"),
        ({"ratio": 0.0}, r"not in \(0, 1\]"),
        ({"ratio": 1.5}, r"not in \(0, 1\]"),
        ({"batch_size": 6, "micro_batch_size": 4}, "batch_size 6 is not a multiple of the micro_batch_size 4"),
        ({"max_length": 20}, "fits into max_length 20"),
        ({"loss_on": "answer"}, "loss_on"),
    ],
)
def test_refusals(asked: dict[str, Any], words: str, base_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        run(base_of("llama"), tmp_path / "out", **asked)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_of_the_recipe() -> None:
    with pytest.raises(UserError, match="no parameter 'learning_rates': did you mean 'learning_rate'"):
        Recipe.check(learning_rates=1)


def test_existing_output_is_left_alone(base_of: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        run(base_of("llama"), tmp_path / "out")
    assert files(tmp_path / "out") == {"precious": b"kept"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scores_of_another_model_are_refused(base_of: Any, tmp_path: Path) -> None:
    layout = HeadLayout.of(tiny_model("llama_mha_bias"))
    scores = HeadScores(np.zeros((2, 4)), layout, "base", "task")
    with pytest.raises(UserError, match="belong to a model of another shape"):
        run(base_of("llama"), tmp_path / "out", method="alps", scores=scores)
    scores.save(tmp_path / "scores.json")
    with pytest.raises(UserError, match="belong to a model of another shape"):
        run(base_of("llama"), tmp_path / "out", method="alps", scores=tmp_path / "scores.json")


def test_processes_must_share_the_batch(base_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="micro_batch_size 2 times 3 processes"):
        run(base_of("llama"), tmp_path / "out")


def test_data_without_its_columns(base_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lack the column 'response'"):
        run(base_of("llama"), tmp_path / "out", Dataset.from_list([{"instruction": "a", "output": "b"}]))
