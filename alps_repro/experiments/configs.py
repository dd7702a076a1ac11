"""Configurations of runs: everything that decides a run's result, its predecessors' configurations included.

An evaluation holds the fine-tuning it evaluates, which holds the localization that chose its heads, and so on.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from alps_repro.data.datasets import OFFLINE, check_dataset
from alps_repro.data.prompts import MAX_LOST
from alps_repro.devices import Device, Precision, resolved_precision
from alps_repro.errors import one_of
from alps_repro.evaluation.benchmarks import Split, Template, check_limit, check_tasks
from alps_repro.localization.metrics import RESULT, check_metric
from alps_repro.localization.selectors import RESULT_METRICS
from alps_repro.models.checks import QUANTIZATIONS
from alps_repro.settings import Settings
from alps_repro.training.methods import METHODS, SCOPES, check_ratio, check_scope
from alps_repro.training.recipe import MaxLost, Recipe

Limit = Annotated[int | None, BeforeValidator(check_limit)]


class FinetuneConfig(Settings):
    """One fine-tuning run."""

    base: str
    dataset: str
    method: str = "alps"
    ratio: float = 0.1
    scope: str = "all"
    quantization: str = "none"
    seed: int = Field(0, ge=0, description="order of the data, and which examples are sampled")
    choice_seed: int = Field(0, ge=0, description="which heads the random methods select")
    localization: LocalizeConfig | None = Field(None, description="which makes the scores that the method uses")
    recipe: Recipe = Field(Recipe(), validate_default=True)

    @field_validator("recipe")
    @classmethod
    def _resolved(cls, recipe: Recipe) -> Recipe:
        return recipe.resolved()  # what `auto` stands for decides numbers

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_dataset(self.dataset)
        one_of("method", self.method, METHODS)
        one_of("scope", self.scope, SCOPES)
        one_of("quantization", self.quantization, QUANTIZATIONS)
        check_ratio(self.ratio)
        check_scope(self.scope, self.quantization, self.method)
        if METHODS[self.method].uses_scores and self.localization is None:
            raise ValueError(f"The method '{self.method}' needs head scores: say which localization they come from.")
        return self

    @property
    def name(self) -> str:
        share = f"-{self.ratio:g}" if METHODS[self.method].uses_ratio else ""
        quantized = "" if self.quantization == "none" else f"-{self.quantization}"
        return _slug(
            f"{self.base}-{self.dataset}-{self.method}{share}-{self.scope}{quantized}-seed{self.seed}-{self.digest}"
        )


class LocalizeConfig(Settings):
    """One localization; `task_model` is a named model, or the fine-tuning run that makes it."""

    base: str
    task_model: str | FinetuneConfig
    metric: str = "pad"
    head_matrix: str = "product"
    tau: float = 1.0
    ground: str = "position"
    dataset: str | None = Field(None, description="whose examples importance and hifi use")
    questions: int = Field(64, gt=0, description="number of these examples")
    device: Device = Field("auto", description="where importance and hifi run a model")
    max_lost: MaxLost = Field(MAX_LOST, description="share of them that may be cut, dropped or empty")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # Now rather than when the task model has been made.
        fields = type(self).model_fields
        asks = next((name for name in ("questions", "max_lost") if getattr(self, name) != fields[name].default), None)
        if self.metric in RESULT_METRICS:
            if (self.dataset is None) != (self.metric == "scale_norm"):
                raise ValueError("The metrics importance and hifi use examples of a `dataset`, scale_norm uses none.")
            if self.metric == "scale_norm" and asks:
                raise ValueError(f"The metric scale_norm uses no examples: leave {asks} out.")
            if self.metric == "scale_norm" and self.device != "auto":
                raise ValueError("The metric scale_norm is of weights and runs no model: leave device out.")
            if self.head_matrix != RESULT:
                raise ValueError(f"The metric {self.metric} is of attention outputs: say head_matrix '{RESULT}'.")
            return self
        if self.device != "auto":
            raise ValueError(f"The metric {self.metric} is of weights and runs no model: leave device out.")
        if self.dataset is not None or asks:
            raise ValueError(f"The metric {self.metric} is of weights and uses no examples: leave dataset out.")
        check_metric(self.metric, self.head_matrix, self.tau, self.ground)
        return self

    @property
    def name(self) -> str:
        task = self.task_model if isinstance(self.task_model, str) else self.task_model.dataset
        return _slug(f"{self.base}-{task}-{self.metric}-{self.head_matrix}-{self.digest}")


class EvaluateConfig(Settings):
    """One evaluation of a named model, or of what a fine-tuning run makes, on lm-eval tasks."""

    model: str | FinetuneConfig
    tasks: tuple[str, ...] = Field(min_length=1)
    limit: Limit = Field(None, description="questions per task; None: all of them")
    batch_size: int = Field(16, gt=0)
    quantization: str = "none"
    template: Template = Field(
        "none", description="prompt template around lm-eval's own text; offline tasks carry the Alpaca template"
    )
    split: Split = Field("test", description="of offline tasks; validation questions are for choosing learning rates")
    precision: Precision = Field(
        "auto",
        description="of matrix products, the same for every model of a comparison; auto becomes bfloat16 where the "
        "device multiplies it fast, else float32",
    )
    device: Device = Field("auto", description="auto: the GPU where there is one")
    allow_code: bool = Field(False, description="run code that the model wrote (HumanEval, MBPP)")
    max_lost: MaxLost = Field(MAX_LOST, description="share of a task's prompts that may be cut; above it the run stops")

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, given: Any) -> Any:
        if isinstance(given, dict):  # what `auto` stands for decides numbers
            precision = resolved_precision(given.get("precision", "auto"), given.get("device", "auto"))
            return {**given, "precision": precision}
        return given

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # Now rather than when the model has been tuned.
        one_of("quantization", self.quantization, QUANTIZATIONS)
        check_tasks(self.tasks, self.allow_code, self.split)
        return self

    @property
    def name(self) -> str:
        model = self.model if isinstance(self.model, str) else self.model.name.rsplit("-", 1)[0]
        return _slug(f"{model}-on-{'+'.join(self.tasks)}-{self.digest}")


class RecallConfig(Settings):
    """How many of the heads that were changed each metric finds, on copies of a model with known changes."""

    base: str
    factors: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = Field(0.1, gt=0, lt=1, description="of the heads, which are changed `factor` times as much")
    background: float = Field(1e-4, gt=0, description="standard deviation of the shift of every weight")

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{self.digest}")


class ImportanceConfig(Settings):
    """How much a task model loses with each head zero-ablated (Eq. 3), on validation questions of its data set."""

    base: str
    task_model: FinetuneConfig
    questions: int = Field(64, gt=0)
    batch_size: int = Field(16, gt=0)
    head_matrix: str = "product"
    device: Device = Field("auto", description="auto: the GPU where there is one")
    max_lost: MaxLost = Field(MAX_LOST, description="share of the questions that may be cut, dropped or empty")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        one_of("offline data set", self.task_model.dataset, OFFLINE)
        return self

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{self.task_model.dataset}-{self.digest}")


class EmbedConfig(Settings):
    """A model's embeddings of the questions of data sets: the mean of its last hidden states (Figure 7)."""

    base: str
    datasets: tuple[str, ...]
    questions: int = Field(100, gt=2, description="of each data set")
    device: Device = Field("auto", description="auto: the GPU where there is one")

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{'+'.join(self.datasets)}-{self.digest}")


FinetuneConfig.model_rebuild()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[-150:].strip("-.")
