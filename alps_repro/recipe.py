"""What a run is asked to do, checked: unknown or impossible settings are refused with the nearest right one.

A run's configuration holds everything that decides its result, its predecessors' configurations included: an
evaluation holds the fine-tuning it evaluates, which holds the localization that chose its heads, and so on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from alps_repro.checkpoints import QUANTIZATIONS
from alps_repro.data import DATASETS
from alps_repro.errors import UserError, nearest, one_of
from alps_repro.evaluation import check_tasks
from alps_repro.methods import METHODS, SCOPES
from alps_repro.scores import check_metric


class Settings(BaseModel):
    """Base of all settings: frozen, strict about names, and with errors that say what would be right."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def check(cls, /, **settings: Any) -> Self:
        """Make the settings, or raise `UserError` with one sentence."""
        for name in settings:
            if name not in cls.model_fields:
                raise UserError(f"There is no parameter '{name}': {nearest(name, cls.model_fields)}")
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                owner = cls.model_fields[str(first["loc"][0])].annotation
                known = owner.model_fields if isinstance(owner, type) and issubclass(owner, Settings) else ()
                hint = nearest(str(first["loc"][-1]), known) if known else f"see {cls.__name__}."
                raise UserError(f"There is no parameter '{where}': {hint}") from None
            if first["type"] == "missing":
                raise UserError(f"The parameter '{where}' is missing: say what it is.") from None
            text = (
                str(cause) if cause else f"The parameter '{where}' is {reprlib.repr(first['input'])}: {first['msg']}."
            )
            raise UserError(text) from None

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, every setting included."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """First 10 hex digits of the SHA-256 of `dump`."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()[:10]


Share = Annotated[float, Field(ge=0, lt=1)]


class Recipe(Settings):
    """How to train. The defaults are the paper's (section 4.1); what it does not say is marked."""

    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on all but biases and norms")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with linear warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="share of the peak at which the cosine ends")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="in place of epochs")
    batch_size: int = Field(128, gt=0, description="examples per optimizer step, over all processes")
    micro_batch_size: int = Field(16, gt=0, description="examples per forward pass and process (not said)")
    max_length: int = Field(2048, gt=1, description="tokens of prompt and response; longer ones are cut (not said)")
    loss_on: Literal["response", "prompt"] = Field(
        "response", description="tokens that count: the response's, or the prompt's too (not said)"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to it (not said)")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto: float16 on a GPU, as in the paper, float32 on a CPU"
    )
    gradient_checkpointing: bool = False
    workers: int = Field(0, ge=0, description="processes that prepare batches; the result does not depend on it")
    examples: int | None = Field(None, gt=0, description="training examples; all of them where none is said")
    checkpoint_steps: int = Field(500, gt=0, description="steps between checkpoints that a stopped run resumes from")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.micro_batch_size and self.batch_size > self.micro_batch_size:
            raise ValueError(
                f"The batch_size {self.batch_size} is not a multiple of the micro_batch_size "
                f"{self.micro_batch_size}: choose one that divides it."
            )
        return self


class FinetuneConfig(Settings):
    """One fine-tuning run."""

    base: str
    dataset: str
    method: str = "alps"
    ratio: float = 0.1
    scope: str = "all"
    quantization: str = "none"
    seed: int = Field(0, ge=0, description="order of the data and which of it is drawn")
    choice_seed: int = Field(0, ge=0, description="which heads the random methods draw")
    localization: LocalizeConfig | None = Field(None, description="where the scores come from that the method uses")
    recipe: Recipe = Recipe()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        one_of("data set", self.dataset, DATASETS)
        one_of("method", self.method, METHODS)
        one_of("scope", self.scope, SCOPES)
        one_of("quantization", self.quantization, QUANTIZATIONS)
        check_ratio(self.ratio)
        check_scope(self.scope, self.quantization)
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

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # Now rather than when the task model has been made.
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
    limit: int | None = Field(None, gt=0, description="questions per task; all of them where none is said")
    batch_size: int = Field(16, gt=0)
    quantization: str = "none"
    template: Literal["none", "alpaca"] = Field(
        "none", description="prompt template around lm-eval's own text; offline tasks carry the Alpaca template"
    )
    allow_code: bool = Field(False, description="run code that the model wrote (HumanEval, MBPP)")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # Now rather than when the model has been tuned.
        one_of("quantization", self.quantization, QUANTIZATIONS)
        check_tasks(self.tasks, self.allow_code)
        return self

    @property
    def name(self) -> str:
        model = self.model if isinstance(self.model, str) else self.model.name.rsplit("-", 1)[0]
        return _slug(f"{model}-on-{'+'.join(self.tasks)}-{self.digest}")


FinetuneConfig.model_rebuild()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[-150:].strip("-.")


def check_ratio(ratio: float) -> None:
    """Raise `UserError` unless a ratio is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"The ratio {ratio} is not in (0, 1]: give the share of heads to train, such as 0.1.")


def check_scope(scope: str, quantization: str) -> None:
    """Raise `UserError` where a scope cannot be trained on a quantized base."""
    if quantization != "none" and scope != "heads":
        raise UserError(
            f"With a base loaded in {quantization}, what lies outside the heads cannot be trained: use scope='heads'."
        )


class Profile(Settings):
    """Everything the notebooks need that is not a notebook's own parameter; `profiles/NAME.yaml` holds the
    differences from these defaults."""

    results: str
    base: str
    dataset: str
    quantization: str = "none"
    methods: tuple[str, ...] = ("full", "alps", "random")
    scope: str = "all"
    scopes: dict[str, str] = Field(default_factory=dict, description="scope by method, where it is not `scope`")
    ratio: float = 0.1
    seed: int = 0
    choice_seed: int = 0
    metric: str = "pad"
    head_matrix: str = "product"
    tau: float = 1.0
    ground: str = "position"
    recipe: Recipe = Recipe()
    recipes: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="what a method's recipe has of its own"
    )
    tasks: tuple[str, ...]
    limit: int | None = None
    eval_batch_size: int = 16
    template: Literal["none", "alpaca"] = "none"
    allow_code: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        one_of("data set", self.dataset, DATASETS)
        one_of("quantization", self.quantization, QUANTIZATIONS)
        check_ratio(self.ratio)
        for method in (*self.methods, *self.recipes, *self.scopes):
            one_of("method", method, METHODS)
        for scope in (self.scope, *self.scopes.values()):
            one_of("scope", scope, SCOPES)
        for own in self.recipes.values():
            Recipe.check(**{**self.recipe.model_dump(), **own})
        return self

    @classmethod
    def load(cls, name: str, **overrides: Any) -> Profile:
        """Read a profile by name (from `profiles/`) or path; overrides that are None are left out.

        Raises:
            UserError: there is no such profile, or a setting in it is unknown or impossible.
        """
        import yaml

        folder = Path(__file__).parents[1] / "profiles"
        name = str(name)
        path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long
            raise UserError(f"There is no profile '{name}': {nearest(name, [p.stem for p in folder.glob('*.yaml')])}")
        try:
            settings = yaml.safe_load(path.read_text())
        except Exception as error:  # YAML's tags raise whatever int, datetime and others do
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"The profile '{path}' is not readable YAML ({reason}).") from None
        if not isinstance(settings, Mapping):
            raise UserError(f"The profile '{path}' holds no settings.")
        if isinstance(settings.get("results"), str) and not Path(settings["results"]).is_absolute():
            # Relative to the checkout, wherever a notebook or shell is: Jupyter starts kernels beside the notebook.
            settings["results"] = os.path.relpath(Path(__file__).parents[1] / settings["results"])
        settings = {**settings, **{k: v for k, v in overrides.items() if v is not None}}
        return cls.check(**{str(k): v for k, v in settings.items()})

    def for_method(self, method: str, *, scope: str | None = None, **recipe: Any) -> Profile:
        """This profile with another scope or recipe for one method; what is None stays as it is."""
        one_of("method", method, METHODS)
        own = {**self.recipes.get(method, {}), **{k: v for k, v in recipe.items() if v is not None}}
        scopes = {**self.scopes, **({} if scope is None else {method: scope})}
        return Profile.check(**{**self.model_dump(), "recipes": {**self.recipes, method: own}, "scopes": scopes})

    def finetuning(self, method: str) -> FinetuneConfig:
        """The fine-tuning run of a method, its localization included."""
        one_of("method", method, METHODS)
        uses_scores = METHODS[method].uses_scores
        return FinetuneConfig.check(
            base=self.base,
            dataset=self.dataset,
            method=method,
            ratio=self.ratio if METHODS[method].uses_ratio else 1.0,
            scope=self.scopes.get(method, self.scope),
            quantization=self.quantization,
            seed=self.seed,
            choice_seed=self.choice_seed,
            localization=self.localization() if uses_scores else None,
            recipe=Recipe.check(**{**self.recipe.model_dump(), **self.recipes.get(method, {})}),
        )

    def localization(self, task_model: str | None = None) -> LocalizeConfig:
        """The localization; the task model is the `full` run in scope `all` unless another is named."""
        if task_model is None:
            whole = self.model_copy(update={"scope": "all", "scopes": {}, "quantization": "none"})
            task_model = whole.finetuning("full")
        return LocalizeConfig.check(
            base=self.base,
            task_model=task_model,
            metric=self.metric,
            head_matrix=self.head_matrix,
            tau=self.tau,
            ground=self.ground,
        )

    def evaluation(self, method: str) -> EvaluateConfig:
        """The evaluation of a method's model, or of the base where `method` is `vanilla`."""
        one_of("method", method, ("vanilla", *METHODS))
        return EvaluateConfig.check(
            model=self.base if method == "vanilla" else self.finetuning(method),
            tasks=self.tasks,
            limit=self.limit,
            batch_size=self.eval_batch_size,
            quantization=self.quantization,
            template=self.template,
            allow_code=self.allow_code,
        )


def check_parameters(namespace: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a notebook's parameters where one is not known.

    namespace: the notebook's `globals()`; known: the names its parameters cell explains. Papermill puts a mistyped
        parameter there as one more variable and merely warns. Only plain values can be parameters, so other objects
        that a notebook has made by the time a cell is run again are passed over.

    Raises:
        UserError: names the nearest right one.
    """
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    for name, value in namespace.items():
        if type(value) in plain and not name.startswith("_") and name not in (*known, "In", "Out"):
            raise UserError(f"There is no parameter '{name}': {nearest(name, known)}")
