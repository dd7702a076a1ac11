"""Checks on a GPU that no test on a CPU can make: one JSON line each, with what was measured.

`python benchmarks/gpu_checks.py` takes eight minutes at most and writes `results/benchmarks/gpu-checks.json`. Every
check is a process of its own with a time limit; the file is written after each, so that nothing done is lost.
`ok` is true or false by the check's stated `criterion`, and null where it did not end or could not be made.
With `--device cpu` every check runs in miniature, on a tiny random model: that tests this script and says nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from alps_repro.devices import DEVICES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "benchmarks" / "gpu-checks.json"
BUDGET = 480.0

#: Seconds below which no further check is started.
LEAST = 15.0

#: What a process imports while the check before it still runs.
AHEAD = ("alps_repro.training.finetune", "alps_repro.evaluation.harness", "alps_repro.evaluation.tasks.offline", "peft")

ROWS = [{"instruction": f"Add {i} and {3 * i % 7}.", "response": f"It is {i + 3 * i % 7}."} for i in range(160)]
RECIPE: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-4, "weight_decay": 0.1}
TASK = "chain_sum"

#: GB that a plan for one card of 80 GB reckons with, for the 3B in scope all with two examples of 2,048 tokens at once.
MOST_3B = 67.0


@dataclass
class Check:
    """One check's surroundings, and what it has measured so far.

    Attributes:
        device: `cuda` or `cpu`.
        base: folder of the model that is trained and evaluated.
        work: a folder of the check's own.
        values: what was measured.
        keep: called with the values after every change, so that they outlive the process.
    """

    device: str
    base: Path
    work: Path
    values: dict[str, Any] = field(default_factory=dict)
    keep: Callable[[Mapping[str, Any]], None] = lambda values: None

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def mixed(self) -> str:
        """The precision of checks that use only one."""
        return "bfloat16"

    def note(self, **values: Any) -> None:
        self.values.update(values)
        self.keep(self.values)

    def finetune(self, name: str, *, dataset: Any = None, scope: str = "all", quantization: str = "none", **own: Any):
        """`alps_repro.finetune` of the base by 10 % of its heads; own: of the recipe, beside `RECIPE`."""
        from alps_repro import HeadLayout, HeadSelection, Recipe, finetune
        from alps_repro.models.folders import load_config

        layout = HeadLayout.of(load_config(self.base))
        return finetune(
            self.base,
            ROWS if dataset is None else dataset,
            self.work / name,
            method="random",
            heads=HeadSelection.random(layout, 0.1, seed=0),
            scope=scope,
            quantization=quantization,
            recipe=Recipe.check(**{**RECIPE, "device": self.device, **own}),
            progress=False,
        )


# --- measuring ------------------------------------------------------------------------------------------------------


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_available() else None


def allocated_gb() -> float | None:
    return round(torch.cuda.memory_allocated() / 1e9, 4) if torch.cuda.is_available() else None


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(make: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, after one that warms up."""
    make()
    taken = []
    for _ in range(repeats):
        start = now()
        make()
        taken.append(now() - start)
    return median(taken)


class Stopped(Exception):
    """Raised within training, as if the process had been stopped."""


def watcher(steps: list[dict[str, Any]], stop_after: int | None = None) -> Any:
    """A callback that appends each step's seconds, learning rate, loss scale and number of steps really taken."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        trainer: Any = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step: dict[str, Any] = {"seconds": round(now() - self.start, 4)}
            scaler = self.trainer.accelerator.scaler
            if scaler is not None and scaler.is_enabled():
                step["scale"] = scaler.get_scale()
            # Fused AdamW counts a step only if its gradients were finite, whatever the schedule does.
            taken = [float(own["step"]) for own in self.trainer.optimizer.state.values() if "step" in own]
            step |= {"taken": int(max(taken, default=0)), "rate": self.trainer.lr_scheduler.get_last_lr()[0]}
            steps.append(step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stop_after is not None and state.global_step >= stop_after:
                raise Stopped

    return Watcher()


@contextlib.contextmanager
def watched(stop_after: int | None = None) -> Iterator[dict[str, Any]]:
    """Within it `finetune` leaves its steps under `steps` and its Trainer under `trainer`."""
    from alps_repro.training import finetune as module

    seen: dict[str, Any] = {"steps": []}
    make = module.trainer_of

    def watching(tuned: Any, **arguments: Any) -> Any:
        trainer = make(tuned, **arguments)
        watch = watcher(seen["steps"], stop_after)
        watch.trainer = seen["trainer"] = trainer
        trainer.add_callback(watch)
        return trainer

    module.trainer_of = watching
    try:
        yield seen
    finally:
        module.trainer_of = make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def difference(one: Path, other: Path) -> float:
    """The largest absolute difference of two folders' tensors."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def tiny_model(folder: Path) -> Path:
    """A checkpoint of a tiny random model with characters as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *map(chr, (10, *range(32, 127)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    geometry("tiny").save_pretrained(folder)
    return folder


def geometry(name: str) -> Any:
    """A model of a known model's geometry with random float32 weights; `tiny` for a tiny one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from alps_repro.experiments.plan import KNOWN

    shape, where = KNOWN.get(name), "cpu" if name == "tiny" else "cuda"
    settings: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 2048,
    }
    if shape is not None:
        settings = {
            "num_hidden_layers": shape.layout.layers,
            "hidden_size": shape.layout.hidden_size,
            "num_attention_heads": shape.layout.heads,
            "num_key_value_heads": shape.layout.groups,
            "head_dim": shape.layout.head_dim,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": shape.total - shape.linear < 1.5 * shape.vocabulary * shape.layout.hidden_size,
        }
    config = LlamaConfig(**settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(where):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(trained: Any, kind: Callable[..., Any], check: Check, batch: tuple[int, int], steps: int, **own: Any) -> Any:
    """Steps on random tokens, a loss on three quarters of them: first loss, seconds a step, tokens a second, peak.

    kind: makes the Trainer of its arguments. own: of `TrainingArguments`.
    """
    from datasets import Dataset
    from transformers import TrainingArguments

    micro, length = batch
    model = trained
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (micro * steps, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 4] = -100
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    seen: list[dict[str, Any]] = []
    watch = watcher(seen)
    reset_peak()
    trainer = kind(
        model=model,
        args=TrainingArguments(
            output_dir=str(check.work / "trainer"),
            per_device_train_batch_size=micro,
            max_steps=steps,
            learning_rate=1e-5,
            weight_decay=0.1,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=not check.gpu,
            dataloader_pin_memory=check.gpu,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **own,
        ),
        train_dataset=rows,
        data_collator=lambda own: {key: torch.tensor([row[key] for row in own]) for key in own[0]},
        callbacks=[watch],
    )
    watch.trainer = trainer
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = median([step["seconds"] for step in seen[1:]])
    return {
        "first_loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
        "seconds_a_step": seconds,
        "tokens_a_second": round(micro * length / seconds),
        "peak_gb": peak_gb(),
    }


# --- the checks -----------------------------------------------------------------------------------------------------


def versions(check: Check) -> bool | None:
    from alps_repro.experiments.provenance import provenance

    check.note(**{key: value for key, value in provenance().model_dump().items() if value})
    check.note(torch_build=torch.__version__, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,mig.mode.current"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
        check.note(nvidia_smi=dict(zip(query.split(","), done.stdout.strip().split(", "))))
    if check.gpu:
        capability, (free, total) = torch.cuda.get_device_capability(), torch.cuda.mem_get_info()
        check.note(capability=list(capability), free_gb=round(free / 1e9, 1), total_gb=round(total / 1e9, 1))
        check.note(bfloat16=torch.cuda.is_bf16_supported(), architectures=torch.cuda.get_arch_list())
    import bitsandbytes as bnb
    from bitsandbytes import cextension

    check.note(bitsandbytes=bnb.__version__, library=type(cextension.lib).__name__)
    dtype = torch.bfloat16 if check.gpu else torch.float32
    layer = bnb.nn.Linear4bit(256, 256, bias=False, quant_type="nf4", compute_dtype=dtype).to(check.device)
    x = torch.randn(64, 256, device=check.device, dtype=dtype)
    expected = x.float() @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
    error = float((layer(x).float() - expected).abs().max() / expected.abs().max())
    check.note(four_bit_relative_error=error)
    return error < 0.02 and (not check.gpu or bool(getattr(cextension.lib, "compiled_with_cuda", False)))


def rates(check: Check) -> bool | None:
    size = 8192 if check.gpu else 256
    for name in ("bfloat16", "float16", "float32"):
        one, other = (torch.randn(size, size, device=check.device).to(getattr(torch, name)) for _ in range(2))
        seconds = timed(lambda one=one, other=other: one @ other, 10)
        check.note(**{f"{name}_tflops": round(2 * size**3 / seconds / 1e12, 3)})
    source = torch.randn((2**32 if check.gpu else 2**22) // 4, device=check.device)
    target = torch.empty_like(source)
    check.note(copy_tb_a_second=round(2 * source.nbytes / timed(lambda: target.copy_(source), 10) / 1e12, 3))
    check.note(size=size, copied_gb=round(source.nbytes / 1e9, 2), allow_tf32=torch.backends.cuda.matmul.allow_tf32)
    return not check.gpu or check.values["bfloat16_tflops"] > 4 * check.values["float32_tflops"]


def precision(check: Check) -> bool | None:
    good = []
    for name in ("bfloat16", "float16") if check.gpu else ("float32", "bfloat16"):
        with watched() as seen:
            tuned = check.finetune(name, precision=name, max_steps=12, warmup_steps=2)
        steps = seen.pop("steps")
        skipped = len(steps) - steps[-1]["taken"]
        finite = all(abs(loss) < float("inf") for loss in tuned.losses)
        falls = sum(tuned.losses[-3:]) < sum(tuned.losses[:3])
        # A float16 run begins with a scale that is far too high, and halves it until gradients are finite.
        good.append(finite and falls and skipped <= (4 if name == "float16" else 0))
        check.note(
            **{
                name: {
                    "skipped": skipped,
                    "scales": [step.get("scale") for step in steps],
                    "rates": [step["rate"] for step in steps],
                    "steps_taken": [step["taken"] for step in steps],
                    "losses": tuned.losses,
                }
            }
        )
        del seen
        reset_peak()
    return all(good)


def frozen(check: Check) -> bool | None:
    from alps_repro import HeadLayout, HeadSelection
    from alps_repro.models.folders import load_config

    layout = HeadLayout.of(load_config(check.base))
    before = tensors(check.base)
    prefix = layout.prefix(before)
    good = []
    for name in ("float32", "bfloat16", "float16")[: 3 if check.gpu else 2]:
        tuned = check.finetune(name, precision=name, max_steps=20, learning_rate=1e-3)
        after = tensors(tuned.path)
        selected = layout.selected_rows(HeadSelection(tuned.heads, layout))
        kept = moved = rows = 0
        for layer in range(layout.layers):
            for path in layout.modules(layer):
                old, new = before[f"{prefix}{path}.weight"], after[f"{prefix}{path}.weight"]
                own = torch.zeros(len(old), dtype=torch.bool)
                own[selected.get(path, [])] = True
                changed = (old.view(torch.int32) != new.to(old.dtype).view(torch.int32)).any(1)
                kept += int((changed & ~own).sum())
                moved += int((changed & own).sum())
                rows += int(own.sum())
        others = sum(not torch.equal(before[key], after[key]) for key in after if key in before)
        good.append(kept == 0 and moved == rows)
        measured = {"frozen_rows_changed": kept, "selected_rows": rows, "selected_rows_changed": moved}
        check.note(**{name: {**measured, "tensors_changed": others, "last_loss": tuned.losses[-1]}})
    return all(good)


@torch.no_grad()
def logits(model: Any, tokenizer: Any, precision: str) -> torch.Tensor:
    """As training computes them, in a precision that frozen weights are rounded to."""
    from alps_repro.models.precision import round_frozen

    texts = [row["instruction"] for row in ROWS[:8]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    round_frozen(model, precision)
    model.set_attn_implementation("eager")  # the same for all
    # On a CPU bitsandbytes' 8-bit product rounds its input in eval mode only, which a merged model never does.
    with torch.autocast(model.device.type, getattr(torch, precision)):
        return model.train()(**batch, use_cache=False).logits.float()


def quantized(check: Check) -> bool | None:
    from alps_repro import load_model

    good = []
    for bits in ("8bit", "4bit"):
        own: dict[str, Any] = {}
        for checkpointing in (False, True):
            reset_peak()
            with watched() as seen:
                tuned = check.finetune(
                    f"{bits}-{checkpointing}",
                    scope="heads",
                    quantization=bits,
                    max_steps=5,
                    learning_rate=1e-3,
                    gradient_checkpointing=checkpointing,
                    precision=check.mixed,
                )
            own["peak_gb_checkpointing" if checkpointing else "peak_gb"] = peak_gb()
            own["losses_checkpointing" if checkpointing else "losses"] = tuned.losses
            if not checkpointing:
                path, trainer = tuned.path, seen["trainer"]
                # Without the autocast that accelerate puts around the model's forward.
                trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
                del trainer
            seen.clear()
        load = partial(load_model, quantization=bits, dtype=torch.float32, device=check.device)
        model, tokenizer = load(path)
        merged = load(path)[0].merge_and_unload().requires_grad_(False)
        expected, loaded, start, merged = (
            logits(own_model, tokenizer, check.mixed) for own_model in (trained, model, load(check.base)[0], merged)
        )
        own["largest_logit"] = float(expected.abs().max())
        own["changed_by_training"] = float((expected - start).abs().max())
        own["loaded_difference"] = float((loaded - expected).abs().max())
        own["merged_difference"] = float((merged - expected).abs().max())
        own["merged_mean_difference"] = float((merged - expected).abs().mean())
        # The rounding of a dtype, summed over layers; on a GPU the 8-bit product also rounds its input to 8 bit.
        share = 0.2 if bits == "8bit" and check.gpu else 0.05
        own["tolerance"] = share * own["largest_logit"]
        good.append(own["loaded_difference"] <= 1e-6 * own["largest_logit"])
        good.append(own["merged_difference"] <= own["tolerance"] and own["changed_by_training"] > 0)
        check.note(**{bits: own})
        del model, trained
    return all(good)


def resume(check: Check) -> bool | None:
    own: dict[str, Any] = {"max_steps": 8, "checkpoint_steps": 4, "learning_rate": 1e-3, "precision": check.mixed}
    paths = [check.finetune(name, **own).path for name in ("one", "two")]
    again = difference(*paths)
    check.note(two_runs_differ_by=again)
    with watched(stop_after=4), contextlib.suppress(Stopped):
        check.finetune("stopped", **own)
    left = sorted(path.name for path in (check.work / "stopped.checkpoints").glob("checkpoint-*"))
    resumed = check.finetune("stopped", **own).path
    found = difference(paths[0], resumed)
    check.note(checkpoints_when_stopped=left, resumed_differs_by=found, deterministic=again == 0)
    return left == ["checkpoint-4"] and found <= 3 * again


def loss_memory(check: Check) -> bool | None:
    from transformers import Trainer

    from alps_repro.training.trainer import trainer_of

    model = geometry("meta-llama/Llama-3.2-1B" if check.gpu else "tiny")
    model.config.use_cache = False
    parameters = sum(p.numel() for p in model.parameters())
    check.note(parameters=parameters)
    good = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for micro, length in ((8, 512), (2, 2048)) if check.gpu else ((2, 16), (1, 32)):
        both = {}
        for name, kind in (("plain", Trainer), ("own", partial(_of_tuned, trainer_of))):
            model.load_state_dict(start)
            both[name] = train(model, kind, check, (micro, length), 6 if check.gpu else 2)
            both[name]["tflops"] = round(6 * parameters * both[name]["tokens_a_second"] / 1e12, 1)
            check.note(**{f"{micro}x{length}": both})
        good.append(abs(both["own"]["first_loss"] / both["plain"]["first_loss"] - 1) < 1e-3)
        good.append(not check.gpu or both["own"]["peak_gb"] < both["plain"]["peak_gb"])
    return all(good)


def heads_alone(check: Check) -> bool | None:
    """Scope heads on a base in bfloat16: what is between the layers in bfloat16, or in float32 as `finetune` does."""
    from alps_repro import HeadLayout, HeadSelection
    from alps_repro.models.precision import round_frozen
    from alps_repro.training.finetune import trainable
    from alps_repro.training.trainer import trainer_of

    for name in ("as stored", "rounded", "as stored again", "rounded again"):
        model = geometry("meta-llama/Llama-3.2-1B" if check.gpu else "tiny").to(torch.bfloat16)
        model.config.use_cache = False
        tuned = trainable(model, HeadSelection.random(HeadLayout.of(model), 0.1, seed=0), "heads")
        if name.startswith("rounded"):
            round_frozen(tuned, "bfloat16")
        make = partial(_of_tuned, trainer_of)
        found = train(tuned, make, check, (8, 512) if check.gpu else (2, 16), 8 if check.gpu else 2)
        check.note(**{name: found})
        del model, tuned
        reset_peak()
    return check.values["rounded"]["seconds_a_step"] < 1.3 * check.values["as stored"]["seconds_a_step"]


def _of_tuned(make: Callable[..., Any], **given: Any) -> Any:
    return make(given["model"], **given)


def large(check: Check) -> bool | None:
    from alps_repro import HeadLayout, HeadSelection
    from alps_repro.experiments.configs import FinetuneConfig
    from alps_repro.experiments.plan import Lengths, memory
    from alps_repro.models.precision import round_frozen
    from alps_repro.training.finetune import trainable
    from alps_repro.training.trainer import trainer_of

    name, batch = "meta-llama/Llama-3.2-3B", (2, 2048) if check.gpu else (2, 16)
    recipe = {"batch_size": 2, "micro_batch_size": 2, "precision": "bfloat16", "gradient_checkpointing": True}
    config = FinetuneConfig.check(base=name, dataset="alpaca", method="random", scope="all", recipe=recipe)
    parts = memory(config, Lengths(2048, 2048, 1536))
    planned = sum(size for part, size in parts.items() if part != "overhead") / 1e9
    check.note(planned_gb=round(planned, 2), parts_gb={part: round(size / 1e9, 2) for part, size in parts.items()})
    model = geometry(name if check.gpu else "tiny")
    model.config.use_cache = False
    tuned = trainable(model, HeadSelection.random(HeadLayout.of(model), 0.1, seed=0), "all")
    rounded = round_frozen(tuned, "bfloat16")
    check.note(parameters=sum(p.numel() for p in tuned.parameters()), rounded=len(rounded))
    check.note(trained=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
    own = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
    found = train(model, lambda **given: trainer_of(tuned, **given), check, batch, 4 if check.gpu else 2, **own)
    check.note(**found)
    if not check.gpu:
        return found["first_loss"] > 0
    check.note(of_plan=round(found["peak_gb"] / planned, 3), tflops=round(6e-12 * 3.2e9 * found["tokens_a_second"], 1))
    return found["peak_gb"] <= MOST_3B and 0.6 <= found["peak_gb"] / planned <= 1.05


def evaluation(check: Check) -> bool | None:
    from alps_repro import evaluate

    limit, sizes = (200, (16, 128)) if check.gpu else (4, (2, 4))
    grades: dict[str, list[float]] = {}
    means: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        for size in sizes:
            name = f"{precision}, batch {size}"
            reset_peak()
            start = now()
            found = evaluate(
                check.base,
                [TASK],
                precision=precision,
                batch_size=size,
                limit=limit,
                device=check.device,
                max_lost=1,
                progress=False,
            )
            seconds = now() - start
            rows = sorted(
                (row for row in found.samples[TASK] if row.get("filter") == "flexible-extract"),
                key=lambda row: row["doc_id"],
            )
            grades[name] = [row["exact_match"] for row in rows]
            means[name] = found.results[TASK]["answer_loglikelihood,none"]
            first = next(iter(grades))
            changed = sum(one != other for one, other in zip(grades[first], grades[name]))
            own = {"seconds": round(seconds, 2), "score": found.scores[TASK], "loglikelihood": means[name]}
            check.note(**{name: {**own, "grades_changed": changed, "peak_gb": peak_gb()}}, questions=len(rows))
    first, second, *coarse = means
    check.note(criterion_differences=[means[first] - means[name] for name in (second, *coarse)])
    return abs(means[first] - means[second]) < 1e-3 and all(
        abs(means[first] - means[name]) < 0.02 * max(1, abs(means[first])) for name in coarse
    )


def generation(check: Check) -> bool | None:
    """Tokens a second of greedy decoding with Llama-3.2-1B's geometry: by precision and batch."""
    from alps_repro.models.precision import round_frozen

    prompt, answer, sizes = (256, 64, (16, 128)) if check.gpu else (8, 4, (1, 2))
    ways = {
        "float32": ("float32", False),
        "bfloat16, products": ("float32", True),
        "bfloat16, whole": ("bfloat16", False),
    }
    for name, (dtype, rounded) in ways.items():
        model = geometry("meta-llama/Llama-3.2-1B" if check.gpu else "tiny").to(getattr(torch, dtype)).eval()
        model.requires_grad_(False)
        if rounded:
            round_frozen(model, "bfloat16")
        for size in sizes:
            ids = torch.randint(3, model.config.vocab_size, (size, prompt), device=check.device)
            tokens = {"min_new_tokens": answer, "max_new_tokens": answer, "do_sample": False, "pad_token_id": 0}
            asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tokens}
            with torch.autocast(check.device, torch.bfloat16, enabled=rounded), torch.no_grad():
                seconds = timed(partial(model.generate, **asked), 2)
            reset_peak()
            check.note(
                **{f"{name}, batch {size}": {"seconds": round(seconds, 2), "rate": round(size * answer / seconds)}}
            )
        del model
        reset_peak()
    return None


def agreement(check: Check) -> bool | None:
    import numpy as np
    from scipy.stats import spearmanr

    from alps_repro import load_model
    from alps_repro.data.datasets import offline_splits
    from alps_repro.localization.ablation import importance
    from alps_repro.localization.hifi import hifi
    from alps_repro.localization.selectors import batches
    from alps_repro.models.embeddings import embed
    from alps_repro.models.folders import model_hash

    found: dict[str, dict[str, Any]] = {}
    questions = 4 if check.gpu else 2
    texts = {"texts": [row["instruction"] for row in offline_splits(TASK)["validation"][:questions]]}
    for device in dict.fromkeys((check.device, "cpu")):
        model, tokenizer = load_model(check.base, dtype=torch.float32, device=device)
        rows, _ = batches(TASK, questions, tokenizer, 8, max_lost=1)
        found[device] = {}
        makers: dict[str, Callable[[], Any]] = {
            "importance": partial(importance, model, rows),
            "hifi": partial(hifi, model, rows),
            "embedding": partial(embed, model, tokenizer, texts),
            "model_hash": partial(model_hash, check.base),
        }
        for name, make in makers.items():
            start = now()
            found[device][name] = make()
            check.note(**{f"{name}_seconds_{device}": round(now() - start, 2)})
    good = []
    here, there = found[check.device], found["cpu"]
    for name in ("importance", "hifi"):
        one, other = here[name].ravel(), there[name].ravel()
        top = max(1, round(0.1 * len(one)))
        shared = len({*np.argsort(one)[-top:]} & {*np.argsort(other)[-top:]}) / top
        rank = float(spearmanr(one, other).statistic)
        good.append(rank > 0.99 and shared >= 0.9)
        size = float(np.abs(other).max())
        values = {"largest_difference": float(np.abs(one - other).max()), "largest_value": size}
        check.note(**{name: {**values, "rank_correlation": rank, "top_tenth_shared": shared}})
    one, other = (own["embedding"]["texts"] for own in (here, there))
    apart = float(np.abs(one - other).max() / np.abs(other).max())
    check.note(embedding_relative_difference=apart)
    return all(good) and apart < 1e-3 and here["model_hash"] == there["model_hash"]


def release(check: Check) -> bool | None:
    from alps_repro import evaluate

    def state(name: str) -> None:
        check.note(**{f"allocated_gb_{name}": allocated_gb(), f"peak_gb_{name}": peak_gb()})

    if check.gpu:
        torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")  # cuBLAS keeps its workspace
    state("before")
    path = check.finetune("tuned", precision=check.mixed, max_steps=5).path
    state("trained")
    reset_peak()
    state("collected")
    evaluate(path, [TASK], limit=8, batch_size=8, precision="float32", device=check.device, max_lost=1, progress=False)
    state("evaluated")
    reset_peak()
    state("end")
    if not check.gpu:
        return True
    left = check.values["allocated_gb_end"] - check.values["allocated_gb_before"]
    check.note(left_gb=round(left, 4))
    return left < 0.1 and check.values["peak_gb_evaluated"] < check.values["peak_gb_trained"]


def tests(check: Check) -> bool | None:
    import xml.etree.ElementTree as ElementTree

    report = check.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "ALPS_REPRO_TEST_DEVICE": check.device}
    done = subprocess.run([*command, "tests/gpu"], cwd=ROOT, env=environment, capture_output=True, text=True)
    if not report.exists():
        check.note(tail=(done.stdout + done.stderr)[-2000:])
        return None
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        case.get("name"): (found.get("message") or "")[:300]
        for case in cases
        for kind in ("failure", "error")
        if (found := case.find(kind)) is not None
    }
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    check.note(passed=len(cases) - len(failed) - len(skipped), failed=failed, skipped=skipped)
    return not failed and len(cases) > len(skipped)


@dataclass(frozen=True)
class Kind:
    """A check: the function, its limit in seconds, and when it is ok."""

    make: Callable[[Check], bool | None]
    limit: float
    criterion: str


CHECKS = {
    "versions": Kind(versions, 60, "a 4-bit product is right within 2 %, and bitsandbytes has its CUDA library"),
    "rates": Kind(rates, 45, "a bfloat16 product is at least 4 times as fast as a float32 one"),
    "frozen": Kind(frozen, 75, "after 20 steps every selected row differs from the base's, and no other row by a bit"),
    "precision": Kind(precision, 60, "losses finite and falling; bfloat16 skips no step of 12, float16 no more than 4"),
    "quantized": Kind(
        quantized,
        90,
        "logits of the saved adapter within 1e-6 of the trained model's, merged ones within the tolerance; of the "
        "largest logit",
    ),
    "large": Kind(large, 90, f"peak at most {MOST_3B:g} GB, and 0.6 to 1.05 of the plan"),
    "heads_alone": Kind(heads_alone, 60, "float32 between the layers takes less than 1.3 of the time in bfloat16"),
    "loss_memory": Kind(loss_memory, 75, "first losses within 0.1 %, and a lower peak than with transformers' loss"),
    "resume": Kind(resume, 60, "a resumed run differs by at most three times what two whole runs differ by"),
    "evaluation": Kind(evaluation, 100, "mean log-likelihood within 0.001 nats in float32, 2 % in bfloat16"),
    "generation": Kind(generation, 60, "none: a measurement"),
    "agreement": Kind(
        agreement, 90, "GPU against CPU: rank correlation over 0.99, 90 % of the top tenth, embeddings within 0.1 %"
    ),
    "release": Kind(release, 60, "less than 0.1 GB stay allocated; evaluation's peak is its own, below training's"),
    "tests": Kind(tests, 120, "no test marked gpu fails, and some were run"),
}


# --- running them ---------------------------------------------------------------------------------------------------


def child(name: str, device: str, base: Path, folder: Path) -> None:
    """Run one check in this process, once a line arrives, and leave its values in `folder`."""
    for module in AHEAD:
        importlib.import_module(module)
    warnings.simplefilter("ignore")
    (folder / "ready").touch()
    if not sys.stdin.readline():
        return

    def keep(values: Mapping[str, Any]) -> None:
        beside = folder / "values.unfinished"
        beside.write_text(json.dumps(values, default=str))
        beside.rename(folder / "values.json")

    work = folder / "work"
    work.mkdir()
    check = Check(device, base, work, keep=keep)
    try:
        ok = CHECKS[name].make(check)
    except Exception as error:
        traceback.print_exc()
        check.note(error=f"{type(error).__name__}: {error}"[:1000], where=traceback.format_exc()[-1500:])
        raise SystemExit(1) from None
    check.note(ok=ok if ok is None else bool(ok), process_peak_gb=peak_gb())


class Running:
    """A check's process, which imports what it needs and then waits."""

    def __init__(self, name: str, device: str, base: Path, folder: Path) -> None:
        self.name, self.device, self.folder = name, device, folder
        folder.mkdir()
        command = [sys.executable, __file__, "--child", name, "--device", device, "--base", str(base)]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [*command, "--work", str(folder)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def result(self, left: float) -> dict[str, Any]:
        """The check's line, made within the seconds left."""
        kind, begun, reason = CHECKS[self.name], time.perf_counter(), None
        while not (self.folder / "ready").exists() and self.process.poll() is None:
            if time.perf_counter() - begun > left:
                break
            time.sleep(0.05)
        start = time.perf_counter()
        most = kind.limit if self.device == "cuda" else 10 * kind.limit
        limit = max(0.1, min(most, left - (start - begun)))
        try:
            self.process.communicate("go\n", timeout=limit)
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        except BrokenPipeError:
            reason = "ended before it began"
        self.end()
        line: dict[str, Any] = {"check": self.name, "ok": None, "seconds": round(time.perf_counter() - start, 1)}
        line |= {"waited_for_imports": round(start - begun, 1), "criterion": kind.criterion}
        with contextlib.suppress(OSError, ValueError):
            line |= json.loads((self.folder / "values.json").read_text())
        if reason or ("ok" not in line and "error" not in line) or self.process.returncode not in (0, 1, -9):
            line["reason"] = reason or f"ended with {self.process.returncode}"
        if line["ok"] is None:
            line["log"] = (self.folder / "log").read_text(errors="replace")[-1500:]
        return line


def run(names: list[str], device: str, base: Path | None, out: Path, budget: float) -> list[dict[str, Any]]:
    """Run checks one after the other, print their lines, and keep them in `out`."""
    begun = time.perf_counter()
    lines: list[dict[str, Any]] = []

    def add(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line, default=str), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"device": device, "checks": lines}, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:

        def start(i: int) -> Running | None:
            if i >= len(names):
                return None
            running = Running(names[i], device, model, Path(folder) / names[i])
            stack.callback(running.end)
            return running

        model = base or made(device, Path(folder))
        add({"check": "model", "ok": True, "seconds": round(time.perf_counter() - begun, 1), "base": model.name})
        following = start(0)
        for i, name in enumerate(names):
            running, following = following, start(i + 1)
            assert running is not None
            left = budget - (time.perf_counter() - begun)
            if left < LEAST:
                add({"check": name, "ok": None, "seconds": 0, "reason": "skipped: no time"})
            else:
                add(running.result(left))
            running.end()
    return lines


def made(device: str, folder: Path) -> Path:
    """The model that checks train: the embedded one, or on a CPU a tiny one."""
    from alps_repro.models.embedded import embedded_model

    return embedded_model() if device == "cuda" else tiny_model(folder / "tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=[name for name in DEVICES if name != "auto"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), help="these checks, in this order")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds that all of them may take")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--base", type=Path, help="folder of another model than the embedded one")
    parser.add_argument("--child", choices=list(CHECKS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.device, given.base, given.work)
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU that torch can use; --device cpu tests the script in miniature.")
    run(given.only or list(CHECKS), given.device, given.base, given.out, given.budget)


if __name__ == "__main__":
    main()
