"""Other systems beside ALPS: their training, what they choose heads by, and that all of it is recorded and repeats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training import LONG, files, interrupt
from tiny_models import tiny_checkpoint, tiny_model

from alps_repro import HeadLayout, HeadScores, Recipe, finetune, load_model
from alps_repro.data.prompts import Collate
from alps_repro.errors import UserError
from alps_repro.evaluation.harness import evaluate
from alps_repro.experiments.configs import FinetuneConfig, LocalizeConfig
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.runs import finetune_run, localize_run
from alps_repro.localization.hifi import correlation, hifi, page_rank, richness
from alps_repro.localization.selectors import RESULT_METRICS, batches, select_by
from alps_repro.models.folders import load_config
from alps_repro.training.adapters import ADAPTERS
from alps_repro.training.methods import METHODS
from alps_repro.tuner import jola
from alps_repro.tuner.jola import JolaConfig, JolaModel
from alps_repro.tuner.lofit import LofitConfig, LofitModel

ROOT = Path(__file__).parents[2]
SHORT = {"max_steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "float32"}

#: Methods that train something else than rows.
OTHERS = [name for name, method in METHODS.items() if method.adapter != "rows"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("systems") / "base", "llama")


def scores_of(base: Path) -> HeadScores:
    layout = HeadLayout.of(load_config(base))
    values = np.random.default_rng(0).uniform(size=(layout.layers, layout.heads))
    return HeadScores(values, layout, "base", "task")


def run(base: Path, output: Path, method: str, **asked: Any) -> Any:
    recipe = Recipe.check(**{**SHORT, **asked.pop("recipe", {})})
    scores = scores_of(base) if METHODS[method].uses_scores else None
    asked = {"ratio": 0.3, "scope": "heads", "scores": scores, "recipe": recipe, "progress": False, **asked}
    return finetune(base, "chain_sum", output, method=method, **asked)


# Training


@pytest.mark.parametrize("method", OTHERS)
def test_trains_as_many_numbers_as_it_says(method: str, base: Path, tmp_path: Path) -> None:
    """And what is saved gives the tuned model: another one than the base."""
    tuned = run(base, tmp_path / "tuned", method)
    layout, adapter = HeadLayout.of(load_config(base)), ADAPTERS[METHODS[method].adapter]
    assert tuned.trained_parameters == adapter.weights(layout, len(tuned.heads), tuned.rank or 0)
    stored = load_file(tuned.path / "adapter_model.safetensors")
    if METHODS[method].adapter != "shira":  # which stores where its entries lie, too
        assert sum(value.numel() for value in stored.values()) == tuned.trained_parameters
    model, tokenizer = load_model(tuned.path)
    assert isinstance(model, PeftModel)
    ids = tokenizer("1 + 2 =", return_tensors="pt").input_ids
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, load_model(base)[0](ids).logits)
    found = evaluate(tuned.path, ["chain_sum"], limit=2, progress=False)
    assert len(found.samples["chain_sum"]) in (2, 4)


@pytest.mark.parametrize("method", ["jola", "lofit_scales", "alps_offset", "dora_matched", "shira_matched"])
def test_same_seed_same_bytes(method: str, base: Path, tmp_path: Path) -> None:
    first, again, other = (run(base, tmp_path / str(i), method, seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert files(first.path) == files(again.path)
    assert first.losses == again.losses
    assert files(first.path).keys() == files(other.path).keys()
    assert files(first.path)["adapter_model.safetensors"] != files(other.path)["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("method", "quantization"),
    [("jola", "4bit"), ("jola", "8bit"), ("lofit_offset", "4bit"), ("lofit_offset", "8bit"), ("dora_matched", "4bit")],
)
def test_quantized_base(method: str, quantization: str, tmp_path: Path) -> None:
    wide = tiny_checkpoint(tmp_path / "base", "llama", hidden_size=64)
    tuned = run(wide, tmp_path / "tuned", method, quantization=quantization)
    assert tuned.losses[-1] < tuned.losses[0] * 1.5


def test_shira_needs_its_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'shira_matched' .* cannot be trained on a base in 4bit"):
        run(base, tmp_path / "tuned", "shira_matched", quantization="4bit")


@pytest.mark.parametrize("method", ["jola", "lofit_scales"])
def test_penalty_is_in_the_loss_of_a_step_once(method: str, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """However its batch is cut: with nothing to learn but the penalty, losses differ by it alone."""
    kind = JolaModel if method == "jola" else LofitModel
    monkeypatch.setattr(kind, "penalty", lambda self, *given: torch.tensor(0.0))
    plain = run(base, tmp_path / "plain", method, recipe={"max_steps": 1, "micro_batch_size": 4})
    monkeypatch.setattr(kind, "penalty", lambda self, *given: torch.tensor(5.0))
    for micro in (4, 2, 1):
        again = run(base, tmp_path / f"in {micro}", method, recipe={"max_steps": 1, "micro_batch_size": micro})
        # Gates are drawn anew for every micro-batch; what is edited is a thousandth.
        without = float(again.losses[0]) - 5
        assert without == pytest.approx(plain.losses[0], abs=0.02), micro


def test_weight_of_the_gates_moves_with_optimizer_steps_alone(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The released code moves it with micro-batches, and in evaluation too."""
    asked: list[tuple[int, int]] = []
    real = jola.gate_weight

    def gate_weight(schedule: str, step: int, steps: int, losses: Any = ()) -> float:
        asked.append((step, steps))
        return real(schedule, step, steps, losses)

    monkeypatch.setattr(jola, "gate_weight", gate_weight)
    recipe = {"max_steps": 4, "examples": 8, "validation": 4}
    tuned = run(base, tmp_path / "tuned", "jola", recipe=recipe)
    assert asked == [(step, 4) for step in range(4) for _ in range(2)]
    assert len(tuned.validation) == 2


@pytest.mark.parametrize("schedule", jola.SCHEDULES)
def test_schedule_goes_on_in_a_resumed_run(schedule: str, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Also that of `performance`, which follows the training losses, and no validation."""
    weights: list[float] = []
    real = jola.gate_weight

    def gate_weight(*given: Any) -> float:
        weights.append(real(*given))
        return weights[-1]

    def own(target: Any) -> JolaConfig:
        return JolaConfig(heads=target.heads, schedule=schedule, task_type="CAUSAL_LM")

    monkeypatch.setattr(jola, "gate_weight", gate_weight)
    monkeypatch.setitem(ADAPTERS, "jola", replace(ADAPTERS["jola"], config=own))
    recipe = {"max_steps": 8, "checkpoint_steps": 2}
    whole = run(base, tmp_path / "whole", "jola", recipe=recipe)
    moved = weights[::2]  # two micro-batches a step
    assert moved == weights[1::2]
    assert moved == [real(schedule, step, 8, whole.losses[:step]) for step in range(8)]
    assert len(set(moved)) > 2
    with monkeypatch.context() as patch:
        interrupt(patch, at=12)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "out", "jola", recipe=recipe)
    weights.clear()
    resumed = run(base, tmp_path / "out", "jola", recipe=recipe)
    assert weights[::2] == moved[4:]
    assert resumed.losses == whole.losses
    assert files(resumed.path) == files(whole.path)
    weights.clear()
    validated = run(base, tmp_path / "validated", "jola", recipe={**recipe, "validation": 4, "examples": 32})
    assert weights[::2] == [jola.gate_weight(schedule, step, 8, validated.losses[:step]) for step in range(8)]


def test_closed_gates_are_reported(base: Path, tmp_path: Path) -> None:
    layout = HeadLayout.of(load_config(base))
    found = run(base, tmp_path / "tuned", "jola")
    assert found.closed_gates == {"scale": (0, layout.total), "offset": (0, layout.total)}
    assert run(base, tmp_path / "additive", "jola_additive").closed_gates == {"offset": (0, layout.total)}
    assert run(base, tmp_path / "ungated", "jola_ungated").closed_gates is None
    assert run(base, tmp_path / "lofit", "lofit_scales").closed_gates is None


@pytest.mark.parametrize("method", ["jola", "alps", "lora"])
def test_training_stops_early_and_keeps_the_best(method: str, base: Path, tmp_path: Path) -> None:
    """A rate at which validation only gets worse after a while."""
    recipe = {
        "max_steps": None,
        "epochs": 12,
        "examples": 8,
        "validation": 8,
        "patience": 2,
        "learning_rate": 0.3 if method == "jola" else 0.05,
        "min_lr_ratio": 1.0,
    }
    tuned = run(base, tmp_path / "tuned", method, recipe=recipe)
    best = int(np.argmin(tuned.validation))
    assert len(tuned.validation) == min(best + 3, 12)
    assert len(tuned.losses) == 2 * len(tuned.validation)
    # The saved model is that of the best epoch.
    model, tokenizer = load_model(tuned.path)
    (batch,), _ = batches("chain_sum", 8, tokenizer)
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    own = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    # That of an epoch is a mean over micro-batches of two.
    assert float(own) == pytest.approx(tuned.validation[best], rel=5e-3)


def test_validation_refused(base: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    own = Dataset.from_list([{"instruction": "a", "response": "b"}])
    with pytest.raises(UserError, match="Only offline data sets have validation examples"):
        finetune(base, own, tmp_path / "x", method="full", recipe=Recipe(validation=4), progress=False)
    with pytest.raises(UserError, match="validation examples: request no more"):
        run(base, tmp_path / "y", "jola", recipe={"validation": 10**6})
    with pytest.raises(UserError, match="patience is of losses on validation examples"):
        Recipe.check(patience=2)


# What heads are chosen by


def test_every_score_of_results_has_its_selector() -> None:
    of_methods = {method.metric[0] for method in METHODS.values() if method.metric and method.metric[1] == "result"}
    assert of_methods == {*RESULT_METRICS}


def test_richness_by_hand() -> None:
    """Singular values 4, 2 and 1 hold 16, 4 and 1 of 21: nine tenths are in the first two."""
    left, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 3)))
    assert richness(left @ np.diag([4.0, 2.0, 1.0])) == pytest.approx(6)
    assert richness(left @ np.diag([4.0, 0.1, 0.1])) == pytest.approx(4)
    assert richness(np.zeros((4, 3))) == 0


def test_correlation_is_pearson_s() -> None:
    results = np.random.default_rng(0).normal(size=(4, 6, 3))
    results[3] = 7.0
    expected = np.abs(np.corrcoef(results[:3].reshape(3, -1)))
    np.testing.assert_allclose(correlation(results)[:3, :3], expected, atol=1e-12)
    assert (correlation(results)[3] == 0).all()


def test_page_rank_is_the_stationary_share() -> None:
    """By the linear system that it solves: r = 0.15 s + 0.85 r P."""
    draw = np.random.default_rng(1)
    start, edges = draw.uniform(size=5), draw.uniform(size=(5, 5))
    steps = edges / edges.sum(1, keepdims=True)
    expected = 0.15 * (start / start.sum()) @ np.linalg.inv(np.eye(5) - 0.85 * steps)
    np.testing.assert_allclose(page_rank(start, edges), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_gqa", "phi3"])
def test_hifi_leaves_padding_out_and_the_model_alone(name: str) -> None:
    model = tiny_model(name, **LONG.get(name, {})).eval()
    rows = [{"input_ids": list(range(3, 3 + n)), "prompt_length": n - 3} for n in (12, 7, 9)]
    collate = Collate(0, "response")
    together = hifi(model, [collate(rows)])
    alone = hifi(model, [collate([row]) for row in rows])
    layout = HeadLayout.of(model)
    assert together.shape == (layout.layers, layout.heads)
    assert together.sum() == pytest.approx(1)
    np.testing.assert_allclose(together, alone, rtol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_lofit_from_first_stage_to_second(base: Path, tmp_path: Path) -> None:
    """Scales on all heads, the heads of the largest norms, an offset for each of those; run and recorded."""
    recipe = Recipe.check(**SHORT)
    shared = {"base": str(base), "dataset": "chain_sum", "scope": "heads", "recipe": recipe}
    stage = FinetuneConfig(method="lofit_scales", ratio=1.0, **shared)
    localization = LocalizeConfig(base=str(base), task_model=stage, metric="scale_norm", head_matrix="result")
    config = FinetuneConfig(method="lofit_offset", ratio=0.25, localization=localization, **shared)
    record, folder = finetune_run(config, tmp_path, progress=False)
    scores, _ = localize_run(localization, tmp_path, progress=False)
    stored = load_file(tmp_path / "models" / stage.name / "adapter_model.safetensors")
    for layer in range(scores.layout.layers):
        (own,) = (value for name, value in stored.items() if f"layers.{layer}." in name)
        np.testing.assert_allclose(scores.values[layer], own.double().norm(dim=1))
    assert [tuple(head) for head in record.result["heads"]] == list(scores.top(0.25))
    assert record.cost.trained_parameters == 2 * scores.layout.head_dim
    assert PeftModel.from_pretrained(load_model(base)[0], folder).peft_config["default"].stage == "offset"


def test_importance_and_hifi_are_localizations(base: Path, tmp_path: Path) -> None:
    from alps_repro.localization.ablation import importance

    task = tiny_checkpoint(tmp_path / "task", "llama", seed=1)
    asked = {"dataset": "chain_sum", "questions": 6}
    for metric in ("importance", "hifi"):
        config = LocalizeConfig(base=str(base), task_model=str(task), metric=metric, head_matrix="result", **asked)
        scores, record = localize_run(config, tmp_path / "results", progress=False)
        model, tokenizer = load_model(task if metric == "importance" else base)
        given, _ = batches("chain_sum", 6, tokenizer)
        expected = importance(model, given) if metric == "importance" else hifi(model, given)
        np.testing.assert_array_equal(scores.values, expected)
        assert (record.config.metric, scores.head_matrix) == (metric, "result")
    with pytest.raises(UserError, match="is not an adapter"):
        select_by("scale_norm", base, task)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"metric": "hifi", "head_matrix": "result"}, "use examples of a `dataset`"),
        ({"metric": "scale_norm", "head_matrix": "result", "dataset": "gcd"}, "scale_norm uses none"),
        ({"metric": "hifi", "dataset": "gcd"}, "say head_matrix 'result'"),
        ({"metric": "pad", "dataset": "gcd"}, "uses no examples"),
    ],
)
def test_localization_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LocalizeConfig.check(base="m", task_model="t", **asked)


def test_public_configurations_are_those_of_the_package() -> None:
    import alps_repro

    assert (alps_repro.JolaConfig, alps_repro.LofitConfig) == (JolaConfig, LofitConfig)


def test_equal_time_is_that_of_the_measured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile grid-time differs from grid by steps alone, and these by the bench alone."""
    grid, timed = Profile.load("grid"), Profile.load("grid-time")
    found = json.loads((ROOT / "results" / "benchmarks" / "gpu.json").read_text())["models"]["meta-llama/Llama-3.2-1B"]
    seconds = {name: np.median([s for one in rounds for s in one["seconds"]]) for name, rounds in found.items()}
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from training import variant_of

    ablations = {"jola_additive", "jola_multiplicative", "jola_ungated"}
    assert timed.methods == tuple(name for name in grid.methods if name not in ablations)
    for name in timed.methods:
        before, after = (profile.finetuning(profile.run(method=name)).recipe for profile in (grid, timed))
        assert after == before.model_copy(
            update={"max_steps": round(80 * seconds["alps_heads"] / seconds[variant_of(name)])}
        )
    own = {"about", "methods", "recipes", "results", "search", "tables"}
    assert timed.model_dump(exclude=own) == grid.model_dump(exclude=own)
