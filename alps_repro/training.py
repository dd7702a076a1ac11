"""Fine-tuning a method's heads with `transformers.Trainer`."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.adapters import ADAPTERS, Target
from alps_repro.checkpoints import (
    ADAPTER,
    QUANTIZATIONS,
    adapter_base,
    is_adapter,
    load_model,
    model_hash,
    resolve,
)
from alps_repro.data import DATASETS, OFFLINE, PROMPT, data_hash, offline_splits, own_examples, training_examples
from alps_repro.devices import check_launch, check_products, device, processes
from alps_repro.errors import UserError, one_of
from alps_repro.heads import HeadLayout, HeadSelection
from alps_repro.methods import METHODS, SCOPES
from alps_repro.recipe import Recipe, check_scope
from alps_repro.scores import HeadScores
from alps_repro.text import beginning, encode, positions, said_lost

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import Trainer

IGNORED = -100


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


def tokenize(examples: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Columns `input_ids` and `prompt_length`: the Alpaca prompt, the response, the end token, cut at `max_length`.

    Prompt and response are tokenized apart, as they are when the model answers, and nothing stands between them,
    whatever the tokenizer appends to a text. Examples whose prompt leaves no room for an answer are left out.
    """
    return tokenize_and_count(examples, tokenizer, max_length)[0]


def tokenize_and_count(examples: Dataset, tokenizer: Any, max_length: int) -> tuple[Dataset, dict[str, int]]:
    """What `tokenize` gives, and how much of the examples is in it, as `Finetuned.rows` says it."""
    for column in ("instruction", "response"):
        if column not in examples.column_names:
            raise UserError(f"The training examples lack the column '{column}': give rows of instruction and response.")
    first = beginning(tokenizer)
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or r"(?!)")

    def row_of(row: dict[str, str]) -> dict[str, Any]:
        instruction, response = row["instruction"], row["response"]
        prompt = [*first, *encode(tokenizer, PROMPT.format(instruction=instruction))]
        answer = encode(tokenizer, response)
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        dropped = len(prompt) >= max_length
        return {
            "input_ids": ids[:max_length],
            "prompt_length": len(prompt),
            "cut": not dropped and len(ids) > max_length,
            "dropped": dropped,
            "empty": not dropped and not (instruction.strip() and response.strip() and answer),
            "special": bool(special.search(instruction) or special.search(response)),
        }

    encoded = examples.map(row_of, remove_columns=examples.column_names, desc="tokenizing")
    counts = {name: sum(encoded[name][:]) for name in ("cut", "dropped", "empty", "special")}
    kept = encoded.filter(lambda row: not row["dropped"], desc="dropping overlong prompts")
    if not len(kept):
        raise UserError(
            f"No example's prompt fits into max_length {max_length}: raise it, or use a model with more positions."
        )
    rows = {"given": len(encoded), "used": len(kept), **counts, "max_length": max_length}
    return kept.remove_columns(list(counts)), rows


def longest(model: torch.nn.Module, asked: int) -> int:
    """Tokens that a row may have: as many as asked, and no more than the model has positions."""
    return min(asked, positions(model.config) or asked)


def check_rows(rows: dict[str, int], max_lost: float, what: str = "training examples") -> None:
    """Raise `UserError` where more rows lose text than may; say by a warning which do.

    rows: as `tokenize_and_count` gives them. max_lost: share of them that may be cut, dropped or empty.
    """
    said = said_lost(rows)
    if rows["cut"] + rows["dropped"] + rows["empty"] > max_lost * rows["given"]:
        raise UserError(
            f"Too many of the {what} would lose text ({said}), and max_lost allows {max_lost:.3g} of them: choose or "
            "mend them, raise max_length if the model has the positions, or set max_lost to 1 to go on."
        )
    if said:
        warnings.warn(f"Some of the {what} lose text: {said}.", stacklevel=3)
    if rows["special"]:
        warnings.warn(
            f"{rows['special']} of the {what} spell out special tokens of the tokenizer, which are read as text.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Collate:
    """Makes a batch, padded on the left, that asks the model for the logits it needs only.

    The output layer costs about a quarter of a small model's step; with the answers at the right edge, only the last
    `logits_to_keep` positions have to pass through it. Labels are cut alike, so that the model's own loss applies.
    """

    pad_token_id: int
    loss_on: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        keep = 1
        for i, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            start = width - len(tokens)
            ids[i, start:], mask[i, start:] = tokens, 1
            first = row["prompt_length"] if self.loss_on == "response" else 1
            labels[i, start + first :] = tokens[first:]
            keep = max(keep, len(tokens) - first + 1)
        # One logit before the first answer token predicts it. Positions count from the first real token.
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels[:, -keep:],
            "logits_to_keep": keep,
        }


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
        from alps_repro.tuner import AlpsConfig, AlpsModel

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


def _base_hashes(base: str | Path) -> list[str]:
    """Hashes of what training starts from: a model's, or an adapter's and that of the model under it."""
    folder = resolve(base)
    return [model_hash(folder), *([model_hash(resolve(adapter_base(folder)))] if is_adapter(folder) else [])]


def _last_checkpoint(folder: Path, asked: dict[str, Any]) -> str | None:
    """The checkpoint to resume from, if there is one; `asked` is everything that decides what a run trains."""
    # Trainer writes trainer_state.json last: a checkpoint without it was cut off.
    done = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    note, text = folder / "run.json", json.dumps(asked, indent=1)
    if done:
        differs = _differences(note, json.loads(text))
        if differs:
            raise UserError(
                f"'{folder}' holds checkpoints of another run ({'; '.join(differs)}): remove it, or choose another "
                "output folder."
            )
        return str(max(done, key=lambda p: int(p.name.split("-")[1])))
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(text)
    return None


def _differences(note: Path, asked: dict[str, Any]) -> list[str]:
    """How a run differs from the one whose note lies beside its checkpoints, in a few words each."""
    try:
        before = _flat(json.loads(note.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"its {note.name} cannot be read"]
    now, found = _flat(asked), []
    for name in dict.fromkeys((*now, *before)):
        there, here = (json.dumps(run[name]) if name in run else None for run in (before, now))
        if there is None:
            found.append(f"{name} is not noted there, as by an older version of this package")
        elif here is None:
            found.append(f"{name} is noted there and unknown to this version of the package")
        elif there != here:
            found.append(f"{name} {_short(there)} there, {_short(here)} here")
    return found


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """The note of a run with the settings of its recipe among the others."""
    return {name: value for name, value in run.items() if name != "recipe"} | run.get("recipe", {})


def _short(text: str) -> str:
    text = text.strip('"')
    return text if len(text) <= 40 else f"{text[:40]}..."


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
    trainer = _trainer(
        tuned,
        model=tuned if scope == "heads" else model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=asked_rows,
        data_collator=Collate(tokenizer.pad_token_id, recipe.loss_on),
        processing_class=tokenizer,
    )
    _show_bar_only(trainer)
    trainer.add_callback(_stop_if_diverged(4 * math.log(model.config.get_text_config().vocab_size), checkpoints))
    if recipe.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.patience))
    chosen = heads.heads if heads is not None else ()
    asked = {
        "base": str(base),
        "base_sha256": _base_hashes(base),
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
    result = trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints, asked))
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    validation = tuple(_validation_losses(trainer.state.log_history))
    if trainer.is_world_process_zero():
        model.config.use_cache = True
        _save(tuned, tokenizer, output, str(base))
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


def _trainer(tuned: torch.nn.Module, **arguments: Any) -> Trainer:
    """A Trainer whose loss has the penalty of JoLA's gates or LoFiT's scales added to it, in training."""
    from transformers import Trainer

    from alps_repro.tuner import JolaModel, LofitModel, gate_weight

    tuner = getattr(tuned, "base_model", None)
    if not isinstance(tuner, (JolaModel, LofitModel)):
        return Trainer(**arguments)

    class PenalizedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if model.training:
                # Where a micro-batch's loss is its share of the step's already, its penalty has to be, too.
                whole = kwargs.get("num_items_in_batch") is not None and self.model_accepts_loss_kwargs
                loss = loss + self._penalty() / (self.current_gradient_accumulation_steps if whole else 1)
            return (loss, outputs) if return_outputs else loss

        def _penalty(self) -> torch.Tensor:
            if isinstance(tuner, LofitModel):
                return tuner.penalty()
            # By the optimizer's steps: neither micro-batches nor evaluations move it.
            (config,) = tuner.peft_config.values()
            # Losses out of what a checkpoint keeps, so that a resumed run goes on with the same weight.
            moved = self.state.log_history if config.schedule == "performance" else ()
            losses = [entry["loss"] for entry in moved if "loss" in entry]
            return tuner.penalty(gate_weight(config.schedule, self.state.global_step, self.state.max_steps, losses))

    return PenalizedTrainer(**arguments)


def _show_bar_only(trainer: Any) -> None:
    """Keep the progress bar, if any, without the line that Trainer would add for every step."""
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from transformers.trainer_callback import PrinterCallback

    class Bar(DEFAULT_PROGRESS_CALLBACK):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            if getattr(self, "training_tracker", None) is not None:  # a notebook's bar, with a table below
                self.training_tracker.inner_table = None

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
        trainer.add_callback(Bar)


def _stop_if_diverged(limit: float, checkpoints: Path) -> Any:
    """A callback that ends training by `UserError` where the loss is no number, or far above that of a blind guess.

    Guessing blindly costs ln(vocabulary) nats; `limit` is four times that. The loss of a step shows the weights that
    the step before left, so a checkpoint made by then may be broken already and is removed.
    """
    from transformers import TrainerCallback

    class StopIfDiverged(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            loss = logs.get("loss")
            if loss is None or loss < limit:
                return
            for folder in checkpoints.glob("checkpoint-*"):
                if not _finite(folder):
                    shutil.rmtree(folder)
            good = sorted(int(p.name.split("-")[1]) for p in checkpoints.glob("checkpoint-*"))
            kept = f"the checkpoint of step {good[-1]} is kept in '{checkpoints}'" if good else "no checkpoint was made"
            raise UserError(
                f"The loss became {loss:g} at step {state.global_step}: lower the learning rate or the precision's "
                f"risk (float32); {kept}."
            )

    return StopIfDiverged()


def _finite(checkpoint: Path) -> bool:
    """Whether all weights of a checkpoint are finite."""
    import torch
    from safetensors import safe_open

    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if not all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys()):  # noqa: SIM118
                return False
    return True


def _tokens(train_set: Dataset, epochs: float | None) -> int:
    return round(sum(len(ids) for ids in train_set["input_ids"]) * (epochs or 0))


def _save(tuned: torch.nn.Module, tokenizer: Any, output: Path, base: str) -> None:
    """Save a checkpoint or an adapter beside its place, then rename it there."""
    from peft import PeftModel

    from alps_repro.tuner import AlpsModel

    beside = output.with_name(output.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    if isinstance(tuned, PeftModel):
        tuned.peft_config["default"].base_model_name_or_path = base
        tuned.save_pretrained(beside, save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        config = json.loads((beside / ADAPTER).read_text())
        if isinstance(config.get("target_modules"), list):  # a set within peft: in another order in every process
            config["target_modules"].sort()
            (beside / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True))
    else:
        model = tuned.merge_and_unload() if isinstance(tuned, AlpsModel) else tuned
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    beside.rename(output)
