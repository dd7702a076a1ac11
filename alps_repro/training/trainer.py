"""`transformers.Trainer` with penalties, one progress bar, and an end where training diverges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


def trainer_of(tuned: torch.nn.Module, **arguments: Any) -> Trainer:
    """A Trainer whose loss has the penalty of JoLA's gates or LoFiT's scales added to it, in training."""
    from transformers import Trainer

    from alps_repro.tuner.jola import JolaModel, gate_weight
    from alps_repro.tuner.lofit import LofitModel

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


def show_bar_only(trainer: Any) -> None:
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


def stop_if_diverged(limit: float, checkpoints: Path) -> Any:
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
