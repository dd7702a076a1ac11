"""Fine-tuning by a method with `transformers.Trainer`: check, place, load, select, prepare, train, save."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.data.datasets import DATASETS, OFFLINE, data_hash, offline_splits, own_examples, training_examples
from alps_repro.data.prompts import Collate, check_rows, longest, tokenize_and_count
from alps_repro.devices import check_launch, check_products, device, processes, resolved_precision
from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.localization.scores import HeadScores
from alps_repro.models.checks import QUANTIZATIONS
from alps_repro.models.folders import resolve
from alps_repro.models.loading import load_model
from alps_repro.models.precision import restore, round_frozen
from alps_repro.training.adapters import ADAPTERS, Target
from alps_repro.training.checkpoints import base_hashes, last_checkpoint, save
from alps_repro.training.methods import METHODS, SCOPES, check_scope
from alps_repro.training.recipe import Recipe
from alps_repro.training.trainer import show_bar_only, skipped_steps, stop_if_diverged, trainer_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune`.

    Attributes:
        path: folder of the tuned model, a complete checkpoint (scope `all`) or an adapter (scope `heads`); the base's
            own folder where there was nothing to train.
        losses: mean loss in nats per loss token, one per optimizer step.
        heads: the trained heads.
        trained_parameters: number of trainable parameters.
        total_parameters: number of the base model's parameters.
        tokens: tokens seen in training, without padding.
        data_sha256: hash of the training examples in their order.
        rank: of LoRA and other adapters with a rank.
        validation: loss on the validation examples after each epoch, if the recipe has any; the model with the lowest
            one is kept.
        closed_gates: of JoLA, {`scale`, `offset`: (closed, all)}.
        rows: counts of training examples: `given` and `used`; `cut` at `max_length` tokens, the recipe's or the
            model's; `dropped`, because the prompt leaves no room for an answer; `empty`, without an instruction or a
            response; and those that spell out `special` tokens. Empty if nothing was trained.
        skipped: optimizer steps that changed nothing, because gradients overflowed in float16.
    """

    path: Path
    losses: tuple[float, ...]
    heads: tuple[tuple[int, int], ...]
    trained_parameters: int
    total_parameters: int
    tokens: int
    data_sha256: str
    rank: int | None = None
    validation: tuple[float, ...] = ()
    closed_gates: dict[str, tuple[int, int]] | None = None
    rows: dict[str, int] = field(default_factory=dict)
    skipped: int = 0


def finetune(
    base: str | Path,
    dataset: str | Dataset | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    method: str = "alps",
    ratio: float = 0.1,
    scope: str = "all",
    scores: HeadScores | str | Path | None = None,
    heads: HeadSelection | None = None,
    quantization: str = "none",
    seed: int = 0,
    choice_seed: int = 0,
    recipe: Recipe | None = None,
    progress: bool = True,
) -> Finetuned:
    """Fine-tune a model by a method and save it.

    Args:
        base: the embedded model's name, a checkpoint folder or a hub id.
        dataset: a name in `data.datasets.DATASETS`, or rows as `data.datasets.own_examples` takes them.
        output: folder for the tuned model; must not exist. During training, checkpoints are kept in
            `OUTPUT.checkpoints`; an interrupted run resumes from the last one.
        method: one of `METHODS`.
        ratio: share of the heads that the method selects, in (0, 1].
        scope: `all` also trains everything outside the query, key and value projections, as the paper does, and saves
            a checkpoint; `heads` trains nothing else and saves an adapter, as LoRA always does. With `heads`, the
            method `full` means all heads, and `no_attn` is the base itself: nothing is trained.
        scores: head scores, or a file of them, for methods that use a localization.
        heads: your own selection, in place of the method's.
        quantization: `none`, `8bit` or `4bit`; the last two only with scope `heads`.
        seed: of the order and the sampling of the examples.
        choice_seed: of the random methods' selection of heads.
        recipe: hyper-parameters; the paper's by default. Without a launcher one GPU is used, however many are visible.
        progress: show a progress bar.

    Returns:
        Where the model was saved, and what its training was like.

    Raises:
        UserError: an argument is unknown or impossible; `output` exists, or its checkpoints belong to another run; a
            GPU is requested or present and cannot be used; an environment variable contradicts the recipe; or more
            rows lose text than the recipe's `max_lost` allows.
    """
    job = _checked(
        _Job(base, dataset, Path(output), method, ratio, scope, quantization, seed, choice_seed, recipe or Recipe())
    )
    place = _place(job.recipe)
    model, tokenizer = _load(job, place)
    chosen = _choose(job, HeadLayout.of(model), scores, heads)
    total = _size(model, quantization)
    if chosen.heads is None and chosen.rank is None and scope == "heads":
        return Finetuned(resolve(base), (), (), 0, total, 0, "")
    examples = _prepare(job, tokenizer, longest(model, job.recipe.max_length))
    model.config.use_cache = False
    tuned = trainable(model, chosen.heads, scope, adapter=chosen.adapter, rank=chosen.rank or 0, seed=seed)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    rounded = round_frozen(tuned, place.precision)
    trainer = _trainer(job, place, examples, model, tuned, tokenizer, progress)
    result = trainer.train(resume_from_checkpoint=last_checkpoint(job.checkpoints, _note(job, place, chosen, examples)))
    if trainer.is_world_process_zero():
        model.config.use_cache = True
        restore(rounded)
        save(tuned, tokenizer, job.output, str(base))
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()  # no process returns before the model is there
    report = _report(job, chosen, examples, trainer.state, result.metrics, tuned, trained, total)
    return replace(report, skipped=skipped_steps(trainer))


@dataclass(frozen=True)
class _Job:
    """What `finetune` was called with, apart from where its heads come from."""

    base: str | Path
    dataset: str | Dataset | Sequence[Mapping[str, Any]]
    output: Path
    method: str
    ratio: float
    scope: str
    quantization: str
    seed: int
    choice_seed: int
    recipe: Recipe

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints made during training."""
        return self.output.with_name(self.output.name + ".checkpoints")


def _checked(job: _Job) -> _Job:
    """The job, with rows of one's own as a data set; `UserError` if it cannot be done, whatever the machine."""
    one_of("method", job.method, METHODS)
    one_of("scope", job.scope, SCOPES)
    one_of("quantization", job.quantization, QUANTIZATIONS)
    check_scope(job.scope, job.quantization, job.method)
    if job.output.exists():
        raise UserError(f"'{job.output}' exists already: remove it or choose another folder for the tuned model.")
    if isinstance(job.dataset, str) and job.dataset in DATASETS:
        return job
    return replace(job, dataset=own_examples(job.dataset))


# --- where and in what precision ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where and in what precision a run trains.

    Attributes:
        device: `cpu` or `cuda`.
        processes: number of processes that train together.
        precision: of the forward pass: `float32`, `bfloat16` or `float16`.
        micro_batch_size: examples per forward pass and process.
        accumulation: forward passes per optimizer step and process.
    """

    device: str
    processes: int
    precision: str
    micro_batch_size: int
    accumulation: int

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


def _place(recipe: Recipe) -> Place:
    """Where this machine trains by a recipe; on a GPU, this process takes its card."""
    where, count = device(recipe.device), processes()
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    if recipe.batch_size % (micro * count):
        raise UserError(
            f"The batch_size {recipe.batch_size} is not a multiple of micro_batch_size {micro} times {count} "
            "processes: change one of them."
        )
    precision = resolved_precision(recipe.precision, recipe.device)
    if precision == "float16" and where != "cuda":
        raise UserError("Training in float16 needs a GPU: use precision 'float32' or 'bfloat16' on a CPU.")
    place = Place(where, count, precision, micro, recipe.batch_size // (micro * count))
    check_launch(place.precision, where)
    check_products(place.precision, where)
    if place.gpu:
        _take_card(count)
    return place


def _take_card(count: int) -> None:
    """Give this process a GPU of its own: the one that the launcher names, else the first visible one."""
    import torch

    cards = torch.cuda.device_count()
    card = int(os.environ.get("LOCAL_RANK") or 0)
    if card >= cards:
        raise UserError(
            f"This is process {card + 1} on a machine with {cards} visible GPUs: start no more processes than GPUs."
        )
    if count == 1 and cards > 1:
        warnings.warn(
            f"{cards} GPUs are visible and one is used: choose it by CUDA_VISIBLE_DEVICES, or start a process for each "
            "with torchrun.",
            UserWarning,
            stacklevel=4,
        )
    torch.cuda.set_device(card)


# --- the model and its heads ----------------------------------------------------------------------------------------


def _load(job: _Job, place: Place) -> tuple[PreTrainedModel, Any]:
    """The base model and its tokenizer, after all random generators were seeded."""
    import torch
    from transformers import set_seed

    set_seed(job.seed)
    # On a GPU as stored, where nothing has to start in more than that: `round_frozen` does the rest.
    stored = place.gpu and job.scope == "heads" and job.quantization == "none"
    dtype = None if stored else torch.float32
    model, tokenizer = load_model(job.base, job.quantization, dtype=dtype, device=place.device)
    if place.precision == "bfloat16" and not place.gpu:
        model.set_attn_implementation("eager")  # torch's fused attention is slow there
    return model, tokenizer


@dataclass(frozen=True)
class _Chosen:
    """What of attention is trained: heads, or all projections at a rank; and the adapter that does it."""

    heads: HeadSelection | None
    rank: int | None
    adapter: str

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return () if self.heads is None else self.heads.heads


def _choose(
    job: _Job, layout: HeadLayout, scores: HeadScores | str | Path | None, heads: HeadSelection | None
) -> _Chosen:
    """One's own heads, or those (or the rank) that the method selects."""
    if heads is not None:
        return _Chosen(heads, None, "rows")
    method = METHODS[job.method]
    stored = HeadScores.load(scores) if isinstance(scores, (str, Path)) else scores
    if method.uses_scores and stored is None:
        raise UserError(f"The method '{job.method}' needs head scores: localize first and pass them as scores.")
    rank = method.rank(layout, job.ratio, stored) if method.rank else None
    if method.select:
        heads = method.select(layout, job.ratio, stored, job.choice_seed)
    if method.uses_scores and stored is not None:
        stored.checked()
    return _Chosen(heads, rank, method.adapter)


def _size(model: PreTrainedModel, quantization: str) -> int:
    """Number of the model's parameters; quantized ones are packed, and transformers counts them."""
    return sum(p.numel() for p in model.parameters()) if quantization == "none" else model.num_parameters()


def trainable(
    model: torch.nn.Module,
    heads: HeadSelection | None,
    scope: str,
    *,
    adapter: str = "rows",
    rank: int = 0,
    seed: int = 0,
) -> torch.nn.Module:
    """Prepare a model so that exactly what a scope and a selection name is trained.

    Args:
        model: any that `load_model` returns.
        heads: the heads to train; None for none.
        scope: of `SCOPES`.
        adapter: of `ADAPTERS`, how heads are trained with scope `heads`. Random initial values are drawn from torch's
            global generator.
        rank: of an adapter that has one and trains no single heads.
        seed: of SHiRA's random entries.

    Returns:
        With scope `heads` a `peft.PeftModel`. With scope `all` the model, or, where only some heads are trained, an
        `AlpsModel` around it; the model within it has trainable rows in its projections, so that its own state holds
        everything that trains.
    """
    layout = HeadLayout.of(model)
    prefix = layout.prefix(name for name, _ in model.named_modules())
    modules = tuple(prefix + path for layer in range(layout.layers) for path in layout.modules(layer))
    if scope == "heads":
        from peft import get_peft_model

        target = Target(layout, modules, heads, rank, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a name of transformers that is to change
            return get_peft_model(model, ADAPTERS[adapter].config(target))
    if heads is not None and len(heads) == layout.total:
        return model.requires_grad_(True)
    frozen = {id(p) for path in modules for p in model.get_submodule(path).parameters()}
    tuned = model
    if heads is not None:
        from alps_repro.tuner.rows import AlpsConfig, AlpsModel

        tuned = AlpsModel(model, AlpsConfig(heads=heads), "default")
    for parameter in tuned.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return tuned


# --- the examples ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Examples:
    """Tokenized examples: for training, with their hash and counts (`Finetuned.rows`), and for validation."""

    training: Dataset
    sha256: str
    rows: dict[str, int]
    validation: Dataset | None


def _prepare(job: _Job, tokenizer: Any, max_length: int) -> _Examples:
    """Read, sample and tokenize the examples; rows that lose text are counted and checked."""
    recipe, validation = job.recipe, _validation(job)
    examples = _training(job)
    if recipe.data_share < 1:
        examples = examples.shuffle(seed=job.seed).select(range(math.ceil(recipe.data_share * len(examples))))
    tokenized, rows = tokenize_and_count(examples, tokenizer, max_length)
    sha256 = data_hash(examples)
    check_rows(rows, recipe.max_lost)
    if validation is not None:
        validation, counts = tokenize_and_count(validation, tokenizer, max_length)
        check_rows(counts, recipe.max_lost, "validation examples")
    return _Examples(tokenized, sha256, rows, validation)


def _training(job: _Job) -> Dataset:
    if not isinstance(job.dataset, str):
        return job.dataset
    recipe = job.recipe
    size = recipe.examples or (recipe.max_steps and recipe.max_steps * recipe.batch_size)
    return training_examples(job.dataset, size=size, seed=job.seed)


def _validation(job: _Job) -> Dataset | None:
    """Validation examples of an offline data set, as many as the recipe requests."""
    number = job.recipe.validation
    if number is None:
        return None
    if not isinstance(job.dataset, str) or job.dataset not in OFFLINE:
        raise UserError("Only offline data sets have validation examples: leave 'validation' out, or use one of them.")
    from datasets import Dataset

    rows = offline_splits(job.dataset)["validation"]
    if number > len(rows):
        raise UserError(f"The data set '{job.dataset}' has {len(rows)} validation examples: request no more.")
    return Dataset.from_list(rows[:number])


# --- training -------------------------------------------------------------------------------------------------------


def _trainer(
    job: _Job,
    place: Place,
    examples: _Examples,
    model: PreTrainedModel,
    tuned: torch.nn.Module,
    tokenizer: Any,
    progress: bool,
) -> Trainer:
    """The Trainer, with its callbacks; model: the base, tuned: what `trainable` made of it."""
    from transformers import EarlyStoppingCallback

    recipe = job.recipe
    trainer = trainer_of(
        tuned,
        model=tuned if job.scope == "heads" else model,
        args=_arguments(job, place, validates=examples.validation is not None, progress=progress),
        train_dataset=examples.training,
        eval_dataset=examples.validation,
        data_collator=Collate(tokenizer.pad_token_id, recipe.loss_on),
        processing_class=tokenizer,
    )
    show_bar_only(trainer)
    trainer.add_callback(stop_if_diverged(4 * math.log(model.config.get_text_config().vocab_size), job.checkpoints))
    if recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    return trainer


def _arguments(job: _Job, place: Place, *, validates: bool, progress: bool) -> TrainingArguments:
    """Trainer's arguments; `UserError` if a step would not take the recipe's batch_size."""
    from transformers import TrainingArguments

    recipe = job.recipe
    arguments = TrainingArguments(
        output_dir=str(job.checkpoints),
        max_steps=recipe.max_steps or -1,
        num_train_epochs=recipe.epochs,
        seed=job.seed,
        data_seed=job.seed,
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        **_optimizer(recipe),
        **_hardware(recipe, place),
        **_checkpointing(recipe, validates),
        logging_steps=1,
        logging_nan_inf_filter=False,  # otherwise a loss of NaN would be logged as 0
        report_to="none",
        disable_tqdm=not progress,
    )
    if place.gpu:
        arguments._n_gpu = 1  # Trainer would spread one process over all cards, and the batch would grow with them
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if step != recipe.batch_size:
        raise UserError(
            f"A step would take {step} examples and not the batch_size {recipe.batch_size}: transformers sees "
            f"{arguments.world_size} processes, the environment says {place.processes}; start them with torchrun or "
            "accelerate launch."
        )
    return arguments


def _optimizer(recipe: Recipe) -> dict[str, Any]:
    return {
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "max_grad_norm": recipe.max_grad_norm,
        "optim": "adamw_torch_fused",
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": recipe.min_lr_ratio},
        "warmup_steps": recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
    }


def _hardware(recipe: Recipe, place: Place) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": place.micro_batch_size,
        "per_device_eval_batch_size": place.micro_batch_size,
        "gradient_accumulation_steps": place.accumulation,
        "bf16": place.precision == "bfloat16",
        "fp16": place.precision == "float16",
        "activation_checkpointing": recipe.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": not place.gpu,
        "dataloader_pin_memory": place.gpu,
    }


def _checkpointing(recipe: Recipe, validates: bool) -> dict[str, Any]:
    """With validation examples a checkpoint each epoch, so that the best one is there in the end."""
    return {
        "eval_strategy": "epoch" if validates else "no",
        "save_strategy": "epoch" if validates else "steps",
        "prediction_loss_only": True,
        "load_best_model_at_end": validates,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_steps": recipe.checkpoint_steps,
        "save_total_limit": 2,  # if the last one turns out broken, the one before it is there
    }


# --- what is kept ---------------------------------------------------------------------------------------------------


def _note(job: _Job, place: Place, chosen: _Chosen, examples: _Examples) -> dict[str, Any]:
    """Everything that determines what a run trains; kept beside its checkpoints as `run.json`."""
    return {
        "base": str(job.base),
        "base_sha256": base_hashes(job.base),
        "precision": place.precision,
        "device": place.device,
        "processes": place.processes,
        "heads": chosen.pairs,
        "adapter": chosen.adapter,
        "rank": chosen.rank,
        "scope": job.scope,
        "quantization": job.quantization,
        "seed": job.seed,
        "data": examples.sha256,
        # What `auto` stands for is noted above.
        "recipe": {name: value for name, value in job.recipe.dump().items() if name not in ("precision", "device")},
    }


def _report(
    job: _Job,
    chosen: _Chosen,
    examples: _Examples,
    state: TrainerState,
    metrics: Mapping[str, float],
    tuned: torch.nn.Module,
    trained: int,
    total: int,
) -> Finetuned:
    return Finetuned(
        path=job.output,
        losses=_logged(state.log_history, "loss"),
        heads=chosen.pairs,
        trained_parameters=trained,
        total_parameters=total,
        tokens=int(metrics.get("train_num_tokens", 0)) or _tokens(examples.training, state.epoch),
        data_sha256=examples.sha256,
        rank=chosen.rank,
        validation=_logged(state.log_history, "eval_loss"),
        closed_gates=_closed_gates(tuned) if chosen.adapter.startswith("jola") else None,
        rows=examples.rows,
    )


def _logged(log_history: Sequence[dict[str, Any]], name: str) -> tuple[float, ...]:
    return tuple(entry[name] for entry in log_history if name in entry)


def _tokens(train_set: Dataset, epochs: float | None) -> int:
    return round(sum(len(ids) for ids in train_set["input_ids"]) * (epochs or 0))


def _closed_gates(tuned: torch.nn.Module) -> dict[str, tuple[int, int]] | None:
    from alps_repro.tuner.jola import JolaModel

    tuner = tuned.base_model
    assert isinstance(tuner, JolaModel)
    return tuner.closed_gates() or None
