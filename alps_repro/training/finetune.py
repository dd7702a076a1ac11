"""Fine-tuning a method's heads with `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.data.datasets import DATASETS, OFFLINE, data_hash, offline_splits, own_examples, training_examples
from alps_repro.data.prompts import Collate, check_rows, longest, tokenize_and_count
from alps_repro.devices import check_launch, check_products, device, processes
from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.localization.scores import HeadScores
from alps_repro.models.checks import QUANTIZATIONS
from alps_repro.models.folders import resolve
from alps_repro.models.loading import load_model
from alps_repro.training.adapters import ADAPTERS, Target
from alps_repro.training.checkpoints import base_hashes, last_checkpoint, save
from alps_repro.training.methods import METHODS, SCOPES, check_scope
from alps_repro.training.recipe import Recipe
from alps_repro.training.trainer import show_bar_only, stop_if_diverged, trainer_of

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` made.

    path: the folder with the tuned model, a whole checkpoint (scope `all`) or an adapter (scope `heads`); the base's
        own folder where there was nothing to train. losses: mean loss in nats per counted token, one per optimizer
        step. heads: that were trained; rank: of LoRA and its like. tokens: seen in training, padding left out.
    validation: loss on the validation examples after each epoch, where the recipe has some; the model is that of the
        lowest. closed_gates: of JoLA, {`scale`, `offset`: (closed, all)}.
    rows: of the training examples how many were `given` and `used`; `cut` at `max_length` tokens, the recipe's or the
        model's; `dropped`, since the prompt leaves no room for an answer; `empty`, that is without an instruction or a
        response; and those that spell out `special` tokens. Nothing where nothing was trained.
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


def trainable(
    model: torch.nn.Module,
    heads: HeadSelection | None,
    scope: str,
    *,
    adapter: str = "rows",
    rank: int = 0,
    seed: int = 0,
) -> torch.nn.Module:
    """Prepare a model so that exactly what a scope and a selection say is trained.

    adapter: of `ADAPTERS`, how heads are trained in scope `heads`; rank: of one that is of no heads; seed: of the
        entries that SHiRA draws. What starts at random is drawn from torch's global generator.

    Returns:
        scope `heads`: a `peft.PeftModel`. Scope `all`: the model, or, where only some heads are trained, an
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
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is to change
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


def _precision(recipe: Recipe, gpu: bool) -> str:
    if recipe.precision != "auto":
        if recipe.precision == "float16" and not gpu:
            raise UserError("Training in float16 needs a GPU: use precision 'float32' or 'bfloat16' on a CPU.")
        return recipe.precision
    return "float16" if gpu else "float32"


def _take_card(count: int) -> None:
    """Give this process a GPU of its own: the one that the launcher says, else the first that is visible."""
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
            stacklevel=3,
        )
    torch.cuda.set_device(card)


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

    base: the embedded model's name, a checkpoint folder or a hub id. dataset: a name of `data.DATASETS`, or rows as
        `data.own_examples` takes them.
    output: folder of the tuned model; must not exist. While training, checkpoints lie in `OUTPUT.checkpoints`; a run
        that was stopped resumes from the last of them.
    method: one of `METHODS`, at `ratio`; `scores` (or a file of them) for those that use a localization. `heads`
        takes a selection of your own in place of the method's.
    scope: `all` trains everything outside q/k/v too, as the paper does, and saves a checkpoint; `heads` trains
        nothing else and saves an adapter, as LoRA always does. There `full` means all heads, and `no_attn` is
        the base itself: nothing is trained.
    quantization: `none`, `8bit` or `4bit`; with the last two only scope `heads`.
    seed: order of the examples and which of them are drawn; choice_seed: which heads the random methods draw.
    recipe: the paper's by default. Without a launcher one GPU is used, however many are visible.

    Raises:
        UserError: something asked for is unknown or impossible, `output` exists, or its checkpoints are another run's;
            a GPU is asked for, or there, and cannot be used; a variable of the environment asks for something else;
            more rows lose text than the recipe's `max_lost` allows.
    """
    recipe = recipe or Recipe()
    output = Path(output)
    one_of("method", method, METHODS)
    one_of("scope", scope, SCOPES)
    one_of("quantization", quantization, QUANTIZATIONS)
    check_scope(scope, quantization, method)
    if output.exists():
        raise UserError(f"'{output}' exists already: remove it or choose another folder for the tuned model.")
    if not isinstance(dataset, str) or dataset not in DATASETS:
        dataset = own_examples(dataset)

    import torch
    from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

    where, count = device(recipe.device), processes()
    gpu = where == "cuda"
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    if recipe.batch_size % (micro * count):
        raise UserError(
            f"The batch_size {recipe.batch_size} is not a multiple of micro_batch_size {micro} times {count} "
            "processes: change one of them."
        )
    precision = _precision(recipe, gpu)
    check_launch(precision, where)
    check_products(precision, where)
    if gpu:
        _take_card(count)
    set_seed(seed)
    # Weights that are trained themselves are kept in float32; frozen ones may stay as they are stored.
    dtype = torch.float32 if scope == "all" or not gpu else None
    model, tokenizer = load_model(base, quantization, dtype=dtype, device=where)
    if precision == "bfloat16" and not gpu:
        model.set_attn_implementation("eager")  # torch's fused attention is slow there
    layout = HeadLayout.of(model)
    rank = None
    adapter = METHODS[method].adapter if heads is None else "rows"
    if heads is None:
        stored = HeadScores.load(scores) if isinstance(scores, (str, Path)) else scores
        if METHODS[method].uses_scores and stored is None:
            raise UserError(f"The method '{method}' needs head scores: localize first and pass them as scores.")
        if METHODS[method].rank:
            rank = METHODS[method].rank(layout, ratio, stored)
        else:
            heads = METHODS[method].select(layout, ratio, stored, choice_seed)
        if METHODS[method].uses_scores:
            stored.checked()
    total = sum(p.numel() for p in model.parameters()) if quantization == "none" else model.num_parameters()
    if heads is None and rank is None and scope == "heads":
        return Finetuned(resolve(base), (), (), 0, total, 0, "")

    asked_rows = _validation(dataset, recipe)
    if isinstance(dataset, str):
        size = recipe.examples or (recipe.max_steps and recipe.max_steps * recipe.batch_size)
        dataset = training_examples(dataset, size=size, seed=seed)
    if recipe.data_share < 1:
        dataset = dataset.shuffle(seed=seed).select(range(math.ceil(recipe.data_share * len(dataset))))
    max_length = longest(model, recipe.max_length)
    (train_set, rows), sha256 = tokenize_and_count(dataset, tokenizer, max_length), data_hash(dataset)
    check_rows(rows, recipe.max_lost)
    if asked_rows is not None:
        asked_rows, counted = tokenize_and_count(asked_rows, tokenizer, max_length)
        check_rows(counted, recipe.max_lost, "validation examples")
    model.config.use_cache = False
    tuned = trainable(model, heads, scope, adapter=adapter, rank=rank or 0, seed=seed)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)

    checkpoints = output.with_name(output.name + ".checkpoints")
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // (micro * count),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr_ratio},
        warmup_steps=recipe.warmup_ratio if recipe.warmup_steps is None else recipe.warmup_steps,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=seed,
        data_seed=seed,
        # A checkpoint each epoch where there are validation examples, so that the best one is there in the end.
        eval_strategy="no" if asked_rows is None else "epoch",
        save_strategy="steps" if asked_rows is None else "epoch",
        per_device_eval_batch_size=micro,
        prediction_loss_only=True,
        load_best_model_at_end=asked_rows is not None,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,  # should the last one turn out broken, the one before it is there
        logging_steps=1,
        logging_nan_inf_filter=False,  # left on, a loss that is no number would be logged as 0
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not progress,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        dataloader_num_workers=recipe.workers,
    )
    if gpu:
        arguments._n_gpu = 1  # Trainer would spread one process over all cards, and the batch would grow with them
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if step != recipe.batch_size:
        raise UserError(
            f"A step would take {step} examples and not the batch_size {recipe.batch_size}: transformers sees "
            f"{arguments.world_size} processes, the environment says {count}; start them with torchrun or accelerate "
            "launch."
        )
    trainer = trainer_of(
        tuned,
        model=tuned if scope == "heads" else model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=asked_rows,
        data_collator=Collate(tokenizer.pad_token_id, recipe.loss_on),
        processing_class=tokenizer,
    )
    show_bar_only(trainer)
    trainer.add_callback(stop_if_diverged(4 * math.log(model.config.get_text_config().vocab_size), checkpoints))
    if recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    chosen = heads.heads if heads is not None else ()
    asked = {
        "base": str(base),
        "base_sha256": base_hashes(base),
        "precision": precision,
        "device": where,
        "processes": count,
        "heads": chosen,
        "adapter": adapter,
        "rank": rank,
        "scope": scope,
        "quantization": quantization,
        "seed": seed,
        "data": sha256,
        # What `auto` stands for is said above.
        "recipe": {name: value for name, value in recipe.dump().items() if name not in ("precision", "device")},
    }
    result = trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints, asked))
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    validation = tuple(_validation_losses(trainer.state.log_history))
    if trainer.is_world_process_zero():
        model.config.use_cache = True
        save(tuned, tokenizer, output, str(base))
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()  # no process returns before the model is there
    tokens = int(result.metrics.get("train_num_tokens", 0)) or _tokens(train_set, trainer.state.epoch)
    gates = tuned.base_model.closed_gates() if adapter.startswith("jola") else None
    return Finetuned(output, losses, chosen, trained, total, tokens, sha256, rank, validation, gates or None, rows)


def _validation(dataset: str | Dataset, recipe: Recipe) -> Dataset | None:
    """Validation examples of an offline data set, as many as the recipe asks for."""
    if recipe.validation is None:
        return None
    if not isinstance(dataset, str) or dataset not in OFFLINE:
        raise UserError("Only offline data sets have validation examples: leave 'validation' out, or use one of them.")
    from datasets import Dataset

    rows = offline_splits(dataset)["validation"]
    if recipe.validation > len(rows):
        raise UserError(f"The data set '{dataset}' has {len(rows)} validation examples: ask for no more.")
    return Dataset.from_list(rows[: recipe.validation])


def _validation_losses(log_history: Sequence[dict[str, Any]]) -> list[float]:
    return [entry["eval_loss"] for entry in log_history if "eval_loss" in entry]


def _tokens(train_set: Dataset, epochs: float | None) -> int:
    return round(sum(len(ids) for ids in train_set["input_ids"]) * (epochs or 0))
