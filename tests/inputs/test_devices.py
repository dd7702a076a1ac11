"""Machines: GPUs that are many, missing or broken, and environments that would have a run computed otherwise."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import state
from brought import brought
from datasets import Dataset
from tiny_models import tiny_checkpoint
from transformers import Trainer

from alps_repro import Recipe, devices, finetune, load_model
from alps_repro.errors import UserError
from alps_repro.evaluation import harness
from alps_repro.evaluation.harness import evaluate
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.models import loading
from alps_repro.settings import with_former
from alps_repro.training import finetune as training

KIND = "Machines"
ROWS = Dataset.from_list([{"instruction": f"add {i}", "response": str(i % 7)} for i in range(16)])
SHORT = {"max_steps": 4, "batch_size": 4, "micro_batch_size": 2, "checkpoint_steps": 2, "precision": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("devices") / "base")


def run(base: Path, output: Path, **recipe: Any) -> Any:
    asked = {"method": "random", "ratio": 0.3, "scope": "heads", "progress": False}
    return finetune(base, ROWS, output, recipe=Recipe.check(**{**SHORT, **recipe}), **asked)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that has torch and the system tell of another machine than this one."""

    def made(cards: int, built: str | None = "13.0", present: bool = True, broken: str = "No CUDA GPUs") -> None:
        def init() -> None:
            raise RuntimeError(broken)

        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
        monkeypatch.setattr(torch.cuda, "set_device", lambda card: None)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(state, "check_cuda_p2p_ib_support", lambda: True)
        monkeypatch.setattr(devices, "present", lambda: present)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return made


# How many cards


class Arguments(Exception):
    """No error: what training was about to begin with."""


@pytest.fixture
def asked_of_trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that fine-tunes up to the Trainer, and gives the arguments that it would have been made with."""
    real = load_model

    def on_cpu(*words: Any, device: str, **asked: Any) -> Any:
        assert device == "cuda"
        with monkeypatch.context() as patch:
            patch.setattr(loading, "placed", lambda asked: "cpu")
            return real(*words, device="cpu", **asked)

    def stop(*words: Any, args: Any, **asked: Any) -> Any:
        raise Arguments(args)

    monkeypatch.setattr(training, "load_model", on_cpu)
    monkeypatch.setattr(training, "trainer_of", stop)

    def asked(base: Path, output: Path, **recipe: Any) -> Any:
        with pytest.raises(Arguments) as caught:
            run(base, output, **recipe)
        return caught.value.args[0]

    return asked


@pytest.mark.parametrize(
    ("cards", "happens"),
    [
        brought(KIND, "one visible GPU", "it is used", 1),
        brought(KIND, "two visible GPUs and no launcher", "one is used, and a warning says so", 2),
        brought(KIND, "eight visible GPUs and no launcher", "one is used, and a warning says so", 8),
    ],
)
def test_cards(cards: int, happens: str, base: Path, tmp_path: Path, machine: Any, asked_of_trainer: Any) -> None:
    """The batch is the recipe's, however many cards are visible: Trainer would multiply it by their number."""
    machine(cards)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        arguments = asked_of_trainer(base, tmp_path / "out", precision="float32")
    assert arguments.device.type == "cuda"
    assert arguments.n_gpu == 1  # above one, Trainer wraps the model in DataParallel
    assert (arguments.train_batch_size, arguments.gradient_accumulation_steps) == (2, 2)
    own = [str(one.message) for one in told if "GPUs are visible" in str(one.message)]
    assert len(own) == ("a warning" in happens)
    assert all(f"{cards} GPUs are visible and one is used" in text for text in own)


def test_more_processes_than_cards(base: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 2 on a machine with 1 visible GPUs: start no more"):
        run(base, tmp_path / "out", precision="float32")


def test_each_process_of_a_launcher_has_its_card(
    base: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(4)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def loaded(*words: Any, **asked: Any) -> Any:
        raise Arguments

    monkeypatch.setattr(training, "load_model", loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(Arguments):
            run(base, tmp_path / "out", precision="float32")
    assert taken == [1]


# A GPU that is asked for, or there, and cannot be used

OLD = "The NVIDIA driver on your system is too old (found version 11040). Update it."


@pytest.mark.parametrize(
    ("asked", "built", "present", "visible", "happens"),
    [
        brought(KIND, "device 'cuda', torch built without CUDA", "is built without CUDA", "cuda", None, True, None),
        brought(KIND, "device 'cuda', no GPU", "there is no NVIDIA GPU", "cuda", "13.0", False, None),
        brought(KIND, "device 'cuda', GPUs hidden", "hides every GPU", "cuda", "13.0", True, ""),
        brought(KIND, "device 'cuda', GPUs hidden by -1", "hides every GPU", "cuda", "13.0", True, "-1"),
        brought(KIND, "device 'cuda', an old driver", "driver on your system is too old", "cuda", "13.0", True, None),
        brought(
            KIND, "a GPU, torch built without CUDA", "GPU here that torch cannot use: torch", "auto", None, True, None
        ),
        brought(KIND, "a GPU, an old driver", "GPU here that torch cannot use: The NVIDIA", "auto", "13.0", True, None),
        brought(
            KIND,
            "CUDA_VISIBLE_DEVICES names a card that is not there",
            "(CUDA_VISIBLE_DEVICES is '9')",
            *("auto", "13.0", True, "9"),
        ),
        brought(KIND, "device 'gpu'", "no device 'gpu': known are auto, cpu, cuda", "gpu", "13.0", True, None),
        brought(KIND, "device 'cuda:1'", "CUDA_VISIBLE_DEVICES chooses among GPUs", "cuda:1", "13.0", True, None),
    ],
)
def test_gpu_that_cannot_be_used(
    asked: str,
    built: str | None,
    present: bool,
    visible: str | None,
    happens: str,
    base: Path,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(0, built, present, OLD)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for use in (
        lambda: load_model(base, device=asked),
        lambda: evaluate(base, ["chain_sum"], device=asked),
        lambda: finetune(base, ROWS, base / "never", recipe=Recipe.model_construct(device=asked), progress=False),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert happens in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "built", "present", "visible", "happens"),
    [
        brought(KIND, "no GPU", "the run is on the CPU", "auto", "13.0", False, None),
        brought(KIND, "no GPU, torch built without CUDA", "the run is on the CPU", "auto", None, False, None),
        brought(
            KIND, "a GPU, hidden by an empty CUDA_VISIBLE_DEVICES", "the run is on the CPU", "auto", None, True, ""
        ),
        brought(KIND, "a GPU that torch cannot use, device 'cpu'", "the run is on the CPU", "cpu", "13.0", True, None),
    ],
)
def test_no_gpu(
    asked: str,
    built: str | None,
    present: bool,
    visible: str | None,
    happens: str,
    base: Path,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(0, built, present)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.device(asked) == "cpu"
    assert load_model(base, device=asked)[0].device.type == "cpu"


def test_cpu_that_is_asked_for_leaves_a_gpu_alone(
    base: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(2)
    # Generators are kept, whether they are used or not.
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", list)
    monkeypatch.setattr(torch.cuda.random, "get_rng_state", torch.get_rng_state)
    assert load_model(base, device="cpu")[0].device.type == "cpu"
    assert len(run(base, tmp_path / "out", device="cpu").losses) == 4
    assert evaluate(base, ["chain_sum"], limit=1, precision="bfloat16", device="cpu", progress=False).scores


# One precision for all that is compared


@pytest.fixture(scope="module")
def stored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model as a checkpoint in two dtypes, and as an adapter that changes nothing much."""
    folder = tmp_path_factory.mktemp("stored")
    model, tokenizer = load_model(base)
    for name in ("float32", "bfloat16"):
        model.to(getattr(torch, name)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model.float()
    run(folder / "bfloat16", folder / "adapter", max_steps=1)
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "happens"),
    [
        brought(KIND, "a checkpoint stored in float32, evaluated", "multiplied in its precision", "float32"),
        brought(KIND, "a checkpoint stored in bfloat16, evaluated", "multiplied in its precision", "bfloat16"),
        brought(KIND, "an adapter of a bfloat16 base, evaluated", "multiplied in its precision", "adapter"),
    ],
)
def test_evaluated_in_one_precision(
    name: str, happens: str, precision: str, stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def stop(job: Any, model: Any, tokenizer: Any, of_products: str) -> Any:
        given.append((model, of_products))
        raise UserError("loaded.")

    monkeypatch.setattr(harness, "_lm", stop)
    with pytest.raises(UserError, match="loaded"):
        evaluate(stored[name], ["chain_sum"], precision=precision)
    ((model, of_products),) = given
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert of_products == precision
    assert {w.dtype for w in linear} == {getattr(torch, precision)}
    assert {p.dtype for p in model.parameters() if p not in linear} == {torch.float32}
    assert not hasattr(model, "peft_config")  # merged


def test_a_machine_decides_what_auto_stands_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, when a configuration is made; records from before read it as what it was then."""
    for amx, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(devices, "amx", lambda amx=amx: amx)
        assert devices.resolved_precision("auto") == precision
        config = EvaluateConfig(model="m", tasks=("chain_sum",))
        tuning = FinetuneConfig(base="m", dataset="chain_sum", method="full")
        assert (config.precision, tuning.recipe.precision) == (precision, precision)
        assert run(base, base.parent / f"{precision}", max_steps=1).losses
    assert devices.resolved_precision("auto", "cuda") == "bfloat16"  # on a machine without a GPU, for one that has one
    assert devices.resolved_precision("float16", "cpu") == "float16"
    old = {"base": "m", "dataset": "chain_sum", "method": "full", "recipe": {"precision": "auto"}}
    whole = {**FinetuneConfig(**old).dump(), "recipe": {**Recipe().dump(), "precision": "auto"}}
    assert with_former(FinetuneConfig, whole)["recipe"]["precision"] == "float32"
    assert with_former(FinetuneConfig, whole, gpu=True)["recipe"]["precision"] == "float16"


@pytest.mark.parametrize(
    ("asked", "happens"),
    [
        brought(KIND, "a model loaded in bfloat16, precision 'float32'", "is in bfloat16", {"precision": "float32"}),
        brought(KIND, "a model loaded in bfloat16, precision 'fp32'", "no precision 'fp32'", {"precision": "fp32"}),
        brought(
            KIND,
            "a model loaded as it is stored, quantization '4bit'",
            "not quantized to 4bit",
            {"quantization": "4bit"},
        ),
        brought(KIND, "a model on the CPU, device 'cuda'", "is on 'cpu'", {"device": "cuda"}),
    ],
)
def test_loaded_model_is_not_as_asked(asked: dict[str, Any], happens: str, base: Path, machine: Any) -> None:
    model, tokenizer = load_model(base, dtype=torch.bfloat16)
    machine(1)
    with pytest.raises(UserError) as caught:
        evaluate(model, ["chain_sum"], tokenizer=tokenizer, **asked)
    assert happens in str(caught.value)


# What the environment would change


@pytest.mark.parametrize(
    ("variables", "happens"),
    [
        brought(
            KIND,
            "accelerate set to float16 by its environment",
            "ACCELERATE_MIXED_PRECISION=fp16, and this run trains in float32",
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
        ),
        brought(
            KIND,
            "accelerate set to compile by its environment",
            "ACCELERATE_DYNAMO_BACKEND=inductor",
            {"ACCELERATE_DYNAMO_BACKEND": "inductor"},
        ),
        brought(
            KIND,
            "accelerate set to shard by its environment",
            "ACCELERATE_USE_FSDP=true",
            {"ACCELERATE_USE_FSDP": "true"},
        ),
        brought(
            KIND,
            "accelerate set to another device by its environment",
            "ACCELERATE_TORCH_DEVICE=meta",
            {"ACCELERATE_TORCH_DEVICE": "meta"},
        ),
        brought(KIND, "several processes without a launcher", "LOCAL_RANK is not set", {"WORLD_SIZE": "2"}),
        brought(KIND, "several processes of mpirun", "OMPI_COMM_WORLD_SIZE says that 4", {"OMPI_COMM_WORLD_SIZE": "4"}),
    ],
)
def test_environment(
    variables: dict[str, str], happens: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        run(base, tmp_path / "out", precision="float32")
    assert happens in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_environment_of_a_launcher_that_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch` sets it where nothing is asked for."""
    for name, value in {
        "MIXED_PRECISION": "no",
        "DYNAMO_BACKEND": "no",
        "USE_CPU": "False",
        "USE_FSDP": "false",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert len(run(base, tmp_path / "out", precision="bfloat16").losses) == 4


@pytest.mark.parametrize(
    ("where", "asked", "happens"),
    [
        brought(KIND, "torch set to TensorFloat-32", "set to multiply float32 matrices in tf32", "cuda", "tf32"),
        brought(KIND, "torch set to round on the CPU", "set to multiply float32 matrices in bf16", "mkldnn", "bf16"),
        brought(KIND, "CUDA set to TensorFloat-32 by its environment", "NVIDIA_TF32_OVERRIDE", "cuda", "environment"),
    ],
)
def test_products_that_are_rounded(
    where: str, asked: str, happens: str, base: Path, tmp_path: Path, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(int(where == "cuda"), present=False)
    backend = getattr(torch.backends, where).matmul
    before = backend.fp32_precision
    if asked == "environment":
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    else:
        backend.fp32_precision = asked
    try:
        with pytest.raises(UserError) as caught:
            run(base, tmp_path / "out", precision="float32")
        assert happens in str(caught.value)
        devices.check_products("bfloat16", "cuda" if where == "cuda" else "cpu")  # nothing is left to be rounded
        if where == "mkldnn":
            with pytest.raises(UserError, match="in bf16"):
                evaluate(base, ["chain_sum"], precision="float32")
    finally:
        backend.fp32_precision = before


# Checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and the checkpoints of a run on it, stopped in its third step."""
    folder = tmp_path_factory.mktemp("stopped")
    tiny_checkpoint(folder / "base")
    step, passes = Trainer.training_step, 0

    def training_step(self: Trainer, *words: Any, **asked: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 6:
            raise KeyboardInterrupt
        return step(self, *words, **asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "base", folder / "out")
    assert [path.name for path in (folder / "out.checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    return folder


def _without(*names: str) -> Any:
    """A change of a run's note: as one that was made before these were noted."""

    def change(note: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in note.items() if name not in names}

    return change


@pytest.mark.parametrize(
    ("change", "happens"),
    [
        brought(
            KIND,
            "checkpoints of a run in another precision",
            "precision float16 there, float32 here",
            lambda note: note | {"precision": "float16"},
        ),
        brought(
            KIND,
            "checkpoints of a run on a GPU, resumed on a CPU",
            "device cuda there, cpu here",
            lambda note: note | {"device": "cuda"},
        ),
        brought(
            KIND,
            "checkpoints of a run in more processes",
            "processes 4 there, 1 here",
            lambda note: note | {"processes": 4},
        ),
        brought(
            KIND,
            "checkpoints of a run on a base that has changed since",
            "base_sha256 [",
            lambda note: note | {"base_sha256": ["0" * 64]},
        ),
        brought(
            KIND,
            "checkpoints of a run by another learning rate",
            "learning_rate 0.5 there, 2e-05 here",
            lambda note: note | {"recipe": note["recipe"] | {"learning_rate": 0.5}},
        ),
        brought(
            KIND,
            "checkpoints of an older version, which did not note the precision",
            "precision is not noted there, as by an older version",
            _without("precision", "device"),
        ),
    ],
)
def test_checkpoints(change: Any, happens: str, stopped: Path) -> None:
    note = stopped / "out.checkpoints" / "run.json"
    before = note.read_text()
    note.write_text(json.dumps(change(json.loads(before))))
    try:
        with pytest.raises(UserError) as caught:
            run(stopped / "base", stopped / "out")
        assert f"'{stopped / 'out.checkpoints'}' holds checkpoints of another run" in str(caught.value)
        assert happens in str(caught.value)
    finally:
        note.write_text(before)


def test_checkpoints_whose_note_is_gone(stopped: Path) -> None:
    note = stopped / "out.checkpoints" / "run.json"
    before = note.read_text()
    for text in ("{", "[]", '{"recipe": 1}'):
        note.write_text(text)
        with pytest.raises(UserError, match=r"run\.json cannot be read"):
            run(stopped / "base", stopped / "out")
    note.write_text(before)


def test_checkpoints_resume_where_auto_means_the_same(stopped: Path) -> None:
    assert len(run(stopped / "base", stopped / "out", precision="float32", device="cpu").losses) == 4
