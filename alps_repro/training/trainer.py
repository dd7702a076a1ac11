"""`transformers.Trainer` with the loss at loss tokens, penalties, a loss scale, one progress bar, and a stop at NaN."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainerCallback, TrainerState


#: Loss scale that a training in float16 begins with. At torch's 65,536 gradients of SmolLM2 overflow, and at half of it
#: too, so that the first steps would be lost.
FIRST_SCALE = 2.0**12

#: Share of skipped steps above which a training warns.
MANY_SKIPPED = 0.1


def trainer_of(tuned: torch.nn.Module, **arguments: Any) -> Trainer:
    """A Trainer with the loss at loss tokens only, and in training the penalty of JoLA's gates or LoFiT's scales.

    Args:
        tuned: what `finetune.trainable` made.
        arguments: as `transformers.Trainer` takes them.
    """
    from transformers import Trainer

    from alps_repro.data.prompts import IGNORED
    from alps_repro.training.loss import summed_loss

    class LossTrainer(Trainer):
        loss_is_scaled_for_ga = True  # by the loss tokens of the whole step

        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named)
            self.model_accepts_loss_kwargs = self._loss_shifts_labels = True  # so that loss tokens are counted

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # The output layer is called outside of the model's own forward, which alone is under autocast.
            with self.accelerator.autocast():
                loss = summed_loss(model, inputs)
            if num_items_in_batch is None:  # in evaluation
                loss = loss / (inputs["labels"][:, 1:] != IGNORED).sum()
            else:
                # The processes' gradients are averaged, and the tokens are those of all processes.
                loss = loss / num_items_in_batch * self.accelerator.num_processes
            if model.training and (penalty := _penalty(tuned, self.state)) is not None:
                loss = loss + penalty / self.current_gradient_accumulation_steps
            return (loss, {"loss": loss}) if return_outputs else loss

    trainer = LossTrainer(**arguments)
    if (scaler := trainer.accelerator.scaler) is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": FIRST_SCALE})
    return trainer


def skipped_steps(trainer: Trainer) -> int:
    """Optimizer steps of a float16 training that changed nothing, since gradients overflowed; 0 without a loss scale.

    From the optimizer's own count of the steps that it took, which checkpoints keep: accelerate does not notice a step
    that the fused AdamW skips (its issue 4242), so that the learning rate's schedule goes on.

    Args:
        trainer: of a finished training. A UserWarning is given where more than `MANY_SKIPPED` of its steps were
            skipped.
    """
    if trainer.accelerator.scaler is None or trainer.optimizer is None:
        return 0
    steps = trainer.state.global_step
    skipped = steps - max((int(own["step"]) for own in trainer.optimizer.state.values()), default=0)
    if skipped > MANY_SKIPPED * steps:
        warnings.warn(
            f"{skipped} of {steps} optimizer steps were skipped, because gradients overflowed in float16: train in "
            "precision 'bfloat16'.",
            UserWarning,
            stacklevel=3,
        )
    return skipped


def _penalty(tuned: torch.nn.Module, state: TrainerState) -> torch.Tensor | None:
    """What JoLA's gates or LoFiT's scales add to the loss of a step; None for other tuners."""
    from alps_repro.tuner.jola import JolaConfig, JolaModel, gate_weight
    from alps_repro.tuner.lofit import LofitModel

    tuner = getattr(tuned, "base_model", None)
    if isinstance(tuner, LofitModel):
        return tuner.penalty()
    if not isinstance(tuner, JolaModel):
        return None
    # The weight depends on optimizer steps alone, not on micro-batches or evaluations.
    (config,) = tuner.peft_config.values()
    assert isinstance(config, JolaConfig)
    # Checkpoints keep these losses, so that a resumed run goes on with the same weight.
    history = state.log_history if config.schedule == "performance" else ()
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return tuner.penalty(gate_weight(config.schedule, state.global_step, state.max_steps, losses))


def show_bar_only(trainer: Trainer) -> None:
    """Keep the progress bar, if any, without the line that Trainer would print for every step."""
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from transformers.trainer_callback import PrinterCallback

    class Bar(DEFAULT_PROGRESS_CALLBACK):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            tracker = getattr(self, "training_tracker", None)
            if tracker is not None:  # a notebook's bar, with a table below
                tracker.inner_table = None

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            pass

    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
        trainer.add_callback(Bar)


def stop_if_diverged(limit: float, checkpoints: Path) -> TrainerCallback:
    """A callback that ends training by `UserError` if the loss is NaN or reaches a limit.

    The loss of a step is that of the weights after the step before, so a checkpoint made by then may already be broken
    and is removed.

    Args:
        limit: in nats; `finetune` takes four times the loss of uniform guessing, ln(vocabulary size).
        checkpoints: folder of the run's checkpoints.
    """
    from transformers import TrainerCallback

    class StopIfDiverged(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss: float | None = kwargs["logs"].get("loss")
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
