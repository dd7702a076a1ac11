"""How to train: hyper-parameters."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from alps_repro.data.prompts import MAX_LOST
from alps_repro.devices import Device, Precision, resolved_precision
from alps_repro.settings import Settings

Share = Annotated[float, Field(ge=0, lt=1)]
MaxLost = Annotated[float, Field(ge=0, le=1)]


class Recipe(Settings):
    """How to train. The defaults are those of the paper (section 4.1); * marks what it does not state."""

    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="of AdamW, on everything but biases and norms")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="of AdamW")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with linear warm-up")
    warmup_steps: int | None = Field(None, ge=0, description="instead of warmup_ratio")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="share of the peak at which the cosine ends")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="instead of epochs")
    batch_size: int = Field(128, gt=0, description="examples per optimizer step, over all processes")
    micro_batch_size: int = Field(16, gt=0, description="examples per forward pass and process *")
    max_length: int = Field(2048, gt=1, description="tokens of prompt and response; longer examples are truncated *")
    max_lost: MaxLost = Field(
        MAX_LOST, description="maximum share of examples that are truncated, dropped or empty; above it the run stops"
    )
    loss_on: Literal["response", "prompt"] = Field(
        "response", description="tokens in the loss: the response's, or also the prompt's *"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="maximum norm of the gradients (clipping) *")
    precision: Precision = Field(
        "auto",
        description="of matrix products; auto: bfloat16 where the device multiplies it fast, else float32; the paper "
        "says float16",
    )
    device: Device = Field("auto", description="auto: the GPU where there is one")
    gradient_checkpointing: bool = False
    workers: int = Field(0, ge=0, description="processes that prepare batches; the result does not depend on it")
    examples: int | None = Field(None, gt=0, description="training examples; None: all of them")
    data_share: float = Field(1.0, gt=0, le=1, description="share of the examples that are used")
    validation: int | None = Field(
        None,
        gt=0,
        description="validation examples of the offline data set: the model with the lowest loss on them is kept",
    )
    patience: int | None = Field(None, gt=0, description="epochs without a lower validation loss until training stops")
    checkpoint_steps: int = Field(
        500, gt=0, description="steps between the checkpoints that a stopped run resumes from"
    )

    @model_validator(mode="after")
    def _validates(self) -> Self:
        if self.patience is not None and self.validation is None:
            raise ValueError("The patience is of losses on validation examples: give their number as 'validation'.")
        return self

    def resolved(self) -> Self:
        """The recipe with the precision that `auto` stands for on this machine."""
        return self.model_copy(update={"precision": resolved_precision(self.precision, self.device)})

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.micro_batch_size and self.batch_size > self.micro_batch_size:
            raise ValueError(
                f"The batch_size {self.batch_size} is not a multiple of the micro_batch_size "
                f"{self.micro_batch_size}: choose one that divides it."
            )
        return self
