"""What a run is asked to do, checked: unknown or impossible settings are refused with the nearest right one.

A run's configuration holds everything that decides its result, its predecessors' configurations included: an
evaluation holds the fine-tuning it evaluates, which holds the localization that chose its heads, and so on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from alps_repro.adapters import ADAPTERS
from alps_repro.checkpoints import QUANTIZATIONS
from alps_repro.data import DATASETS, OFFLINE, check_dataset
from alps_repro.errors import UserError, nearest, one_of
from alps_repro.evaluation import check_limit, check_tasks
from alps_repro.history import FORMER
from alps_repro.methods import METHODS, SCOPES
from alps_repro.scores import RESULT, RESULT_METRICS, check_metric
from alps_repro.text import MAX_LOST


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
            errors = error.errors()
            # A name that is mistyped is missing, too: it is told as what it was meant to be.
            first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
            cause = first.get("ctx", {}).get("error")
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise UserError(
                    f"There is no parameter '{where}': {nearest(str(first['loc'][-1]), _known_at(cls, first['loc']))}"
                ) from None
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
        """First 10 hex digits of the SHA-256 of the settings that are not the defaults (or what was, see `FORMER`).

        With the defaults in it, a setting that is added would rename every run there is. A name therefore says less
        than a configuration: records are compared by the whole of it.
        """
        return hashlib.sha256(json.dumps(_named(self), sort_keys=True).encode()).hexdigest()[:10]


def _named(settings: Settings) -> dict[str, Any]:
    """The settings that a name is made of, as plain JSON values."""
    former, whole, found = FORMER.get(type(settings).__name__, {}), settings.dump(), {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value != former.get(name, field.default):
            found[name] = _named(value) if isinstance(value, Settings) else whole[name]
    return found


def with_former(kind: type[Settings], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with the settings that it lacks, at the values that they had when it was stored.

    Raises:
        UserError: it lacks a setting, and `FORMER` does not say what that was.
    """
    former, found = FORMER.get(kind.__name__, {}), dict(stored)
    for name, field in kind.model_fields.items():
        if name not in found and name not in former:
            raise UserError(f"the setting '{name}' is missing, and nothing says what it was")
        value = found.setdefault(name, former.get(name))
        if isinstance(value, Mapping) and (inner := _settings_in(field.annotation)):
            found[name] = with_former(inner[0], value)
    return found


def differences(then: Settings, now: Settings, of: str = "") -> list[str]:
    """What differs between two configurations of one kind, a phrase a setting."""
    found = []
    for name in type(then).model_fields:
        a, b, path = getattr(then, name), getattr(now, name), f"{of}{name}"
        if isinstance(a, Settings) and type(a) is type(b):
            found += differences(a, b, f"{path}.")
        elif a != b:
            found.append(f"{path} was {_short(a)} and is {_short(b)} now")
    return found


def _short(value: Any) -> str:
    return f"the run {value.name}" if hasattr(value, "name") else reprlib.repr(value)


def _known_at(kind: type[Settings], place: Sequence[str | int]) -> set[str]:
    """The parameters that are known where pydantic found one that is not; `place` ends with that one."""
    owners = [kind]
    for part in place[:-1]:
        inner = [owner.model_fields[part].annotation for owner in owners if part in owner.model_fields]
        owners = [found for annotation in inner for found in _settings_in(annotation)] or owners
        owners = [owner for owner in owners if owner.__name__ == part] or owners  # which of several it was tried as
    return {name for owner in owners for name in owner.model_fields}


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _settings_in(inner)]


Share = Annotated[float, Field(ge=0, lt=1)]
Limit = Annotated[int | None, BeforeValidator(check_limit)]
MaxLost = Annotated[float, Field(ge=0, le=1)]


class Recipe(Settings):
    """How to train. The defaults are the paper's (section 4.1); what it does not say is marked."""

    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, on all but biases and norms")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with linear warm-up")
    warmup_steps: int | None = Field(None, ge=0, description="in place of warmup_ratio")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="share of the peak at which the cosine ends")
    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, gt=0, description="in place of epochs")
    batch_size: int = Field(128, gt=0, description="examples per optimizer step, over all processes")
    micro_batch_size: int = Field(16, gt=0, description="examples per forward pass and process (not said)")
    max_length: int = Field(2048, gt=1, description="tokens of prompt and response; longer ones are cut (not said)")
    max_lost: MaxLost = Field(
        MAX_LOST, description="share of the examples that may be cut, dropped or empty; above it the run stops"
    )
    loss_on: Literal["response", "prompt"] = Field(
        "response", description="tokens that count: the response's, or the prompt's too (not said)"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to it (not said)")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the forward pass; auto: float16 on a GPU, as in the paper, float32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    gradient_checkpointing: bool = False
    workers: int = Field(0, ge=0, description="processes that prepare batches; the result does not depend on it")
    examples: int | None = Field(None, gt=0, description="training examples; all of them where none is said")
    data_share: float = Field(1.0, gt=0, le=1, description="share of the examples that is used")
    validation: int | None = Field(
        None, gt=0, description="validation examples of the offline data set: the model of the lowest loss is kept"
    )
    patience: int | None = Field(None, gt=0, description="epochs without a lower loss on them until training stops")
    checkpoint_steps: int = Field(500, gt=0, description="steps between checkpoints that a stopped run resumes from")

    @model_validator(mode="after")
    def _validates(self) -> Self:
        if self.patience is not None and self.validation is None:
            raise ValueError("The patience is of losses on validation examples: say how many, as 'validation'.")
        return self

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
    dataset: str | None = Field(None, description="whose examples importance and hifi ask")
    questions: int = Field(64, gt=0, description="of them")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where importance and hifi run a model")
    max_lost: MaxLost = Field(MAX_LOST, description="share of them that may be cut, dropped or empty")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        # Now rather than when the task model has been made.
        fields = type(self).model_fields
        asks = next((name for name in ("questions", "max_lost") if getattr(self, name) != fields[name].default), None)
        if self.metric in RESULT_METRICS:
            if (self.dataset is None) != (self.metric == "scale_norm"):
                raise ValueError("The metrics importance and hifi ask examples of a `dataset`, and scale_norm none.")
            if self.metric == "scale_norm" and asks:
                raise ValueError(f"The metric scale_norm asks no examples: leave {asks} out.")
            if self.metric == "scale_norm" and self.device != "auto":
                raise ValueError("The metric scale_norm is of weights and runs no model: leave device out.")
            if self.head_matrix != RESULT:
                raise ValueError(f"The metric {self.metric} is of heads' results: say head_matrix '{RESULT}'.")
            return self
        if self.device != "auto":
            raise ValueError(f"The metric {self.metric} is of weights and runs no model: leave device out.")
        if self.dataset is not None or asks:
            raise ValueError(f"The metric {self.metric} is of weights and asks no examples: leave dataset out.")
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
    limit: Limit = Field(None, description="questions per task; all of them where none is said")
    batch_size: int = Field(16, gt=0)
    quantization: str = "none"
    template: Literal["none", "alpaca"] = Field(
        "none", description="prompt template around lm-eval's own text; offline tasks carry the Alpaca template"
    )
    split: Literal["test", "validation"] = Field(
        "test", description="of offline tasks; validation questions are for choosing learning rates"
    )
    autocast: Literal["none", "bfloat16", "float16"] = Field(
        "none", description="what matrices are multiplied in, where not in the weights' own dtype"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what weights are loaded in, those of every model that is compared alike"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    allow_code: bool = Field(False, description="run code that the model wrote (HumanEval, MBPP)")
    max_lost: MaxLost = Field(MAX_LOST, description="share of a task's prompts that may be cut; above it the run stops")

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
    """How many of the heads that truly moved each metric finds, on copies of a model whose heads were moved."""

    base: str
    factors: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = Field(0.1, gt=0, lt=1, description="of the heads that are moved `factor` times further")
    background: float = Field(1e-4, gt=0, description="standard deviation of the shift of every weight")

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{self.digest}")


class ImportanceConfig(Settings):
    """What a task model loses with each of its heads silenced (Eq. 3), on validation questions of its data set."""

    base: str
    task_model: FinetuneConfig
    questions: int = Field(64, gt=0)
    batch_size: int = Field(16, gt=0)
    head_matrix: str = "product"
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")
    max_lost: MaxLost = Field(MAX_LOST, description="share of the questions that may be cut, dropped or empty")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        one_of("offline data set", self.task_model.dataset, OFFLINE)
        return self

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{self.task_model.dataset}-{self.digest}")


class EmbedConfig(Settings):
    """Where a model puts the questions of data sets: the mean of its last hidden states (Figure 7)."""

    base: str
    datasets: tuple[str, ...]
    questions: int = Field(100, gt=2, description="of each data set")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU where there is one")

    @property
    def name(self) -> str:
        return _slug(f"{self.base}-{'+'.join(self.datasets)}-{self.digest}")


FinetuneConfig.model_rebuild()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[-150:].strip("-.")


def check_ratio(ratio: float) -> None:
    """Raise `UserError` unless a ratio is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"The ratio {ratio} is not in (0, 1]: give the share of heads to train, such as 0.1.")


def check_scope(scope: str, quantization: str, method: str) -> None:
    """Raise `UserError` where a scope cannot be trained by a method, or on a quantized base."""
    if quantization != "none" and scope != "heads":
        raise UserError(
            f"With a base loaded in {quantization}, what lies outside the heads cannot be trained: use scope='heads'."
        )
    adapter = ADAPTERS[METHODS[method].adapter]
    if METHODS[method].adapter != "rows" and scope != "heads":
        raise UserError(f"The method '{method}' trains {adapter.about} and nothing else: use scope='heads'.")
    if quantization != "none" and quantization not in adapter.quantized:
        raise UserError(
            f"The method '{method}' ({adapter.about}) cannot be trained on a base in {quantization}: use "
            f"quantization={' or '.join(map(repr, (*adapter.quantized, 'none')))}."
        )


#: Where the task model of a localization comes from (ALPS, Table 10).
SOURCES = {
    "full": "full fine-tuning",
    "ready_made": "a ready-made model (the profile's ready_made)",
    "data_10pct": "full fine-tuning on 10 % of the examples, in 10 % of the steps",
    "attn_only_10pct": "fine-tuning of q, k and v alone, about 10 % of the parameters",
}


class Run(Settings):
    """One cell of the profile's grid: a model, a data set, and what is done there. `Profile.run` fills the defaults."""

    base: str
    dataset: str
    method: str = Field(description="of METHODS, or vanilla: nothing is trained")
    ratio: float
    scope: str
    seed: int
    metric: str
    head_matrix: str
    heads_from: str = Field(description="the data set of the task model that the heads are localized on")
    source: str = "full"
    quantization: str = "none"
    data_share: float = Field(1.0, gt=0, le=1)
    learning_rate: float | None = None
    max_steps: int | None = None
    examples: int | None = Field(None, description="training examples, of the task model too; None: the recipe's")


class Family(Settings):
    """Data sets of one kind of task: heads are found and trained on the first, and carried over to the second."""

    datasets: tuple[str, ...] = Field(min_length=1, max_length=2)
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks; by default the offline task of the run's data set")

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.datasets:
            one_of("data set", name, DATASETS)
            if not self.tasks and name not in OFFLINE:
                raise ValueError(f"The data set '{name}' has no task of its own: say which `tasks` its family has.")
        return self


class Coverage(Settings):
    """What of the profile a table shows; None: all."""

    families: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


class Search(Settings):
    """Learning rates to try for a method on validation questions of the first family's first data set."""

    method: str
    scope: str
    learning_rates: tuple[float, ...]
    ratio: float | None = Field(None, description="where it is not the profile's")


class Profile(Settings):
    """The grid of runs behind the paper's tables; `profiles/NAME.yaml` holds the differences from these defaults."""

    about: str = Field("", description="what it is for, as its report says")
    results: str
    models: tuple[str, ...] = Field(min_length=1)
    families: dict[str, Family] = Field(min_length=1)
    tables: dict[str, Coverage] = Field(default_factory=dict, description="which tables are made, of what")
    quantization: str = "none"
    methods: tuple[str, ...] = ("full", "no_attn", "random", "layer_consistent", "lora", "alps")
    scope: str = "all"
    scopes: dict[str, str] = Field(default_factory=dict, description="scope by method, where it is not `scope`")
    task_scope: str = Field("all", description="scope of the full fine-tuning that makes task models")
    ratio: float = 0.1
    ratios: tuple[float, ...] = Field((0.7, 0.5, 0.3), description="Table 3's, beside all heads, `ratio`, and none")
    metric: str = "pad"
    metrics: tuple[str, ...] = Field(("cosine", "euclidean", "kl", "pad"), description="Table 2's")
    head_matrix: str = "product"
    tau: float = 1.0
    ground: str = "position"
    ready_made: dict[str, str] = Field(default_factory=dict, description="{model: a ready-made task model}, Table 10")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of training")
    choice_seed: int = Field(1000, description="of random choices of heads, plus the training seed")
    recipe: Recipe = Recipe()
    recipes: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="{scope: {default, a method, or method@ratio: what the recipe has of its own}}, in this order",
    )
    candidates: tuple[str, ...] = Field((), description="offline data sets that the families were chosen from")
    search: tuple[Search, ...] = ()
    search_limit: int = Field(200, gt=0)
    search_seed: int = Field(90, description="of training in the search, apart from `seeds`")
    limit: Limit = None
    max_lost: MaxLost | None = Field(None, description="of rows and prompts, in every run; None: what each run has")
    eval_batch_size: int = 16
    autocast: Literal["none", "bfloat16", "float16"] = Field("none", description="in evaluations")
    eval_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="what weights are loaded in to be evaluated, the base's and those of tuned models"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="of all runs; cuda: where no GPU can be used, they stop; `recipe` may say another one"
    )
    template: Literal["none", "alpaca"] = "none"
    allow_code: bool = False
    keep_models: bool = Field(True, description="or remove each tuned model once everything that needs it is done")
    threads: int | None = Field(None, gt=0, description="processor threads of a run; all there are by default")
    questions: int = Field(64, gt=0, description="validation examples that heads are chosen by, where they are")
    score_and_truth: bool = Field(False, description="hold the scores against heads that moved, and that matter")
    knowledge: tuple[str, ...] = Field((), description="tasks of general knowledge, asked of Table 1's models")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        one_of("quantization", self.quantization, QUANTIZATIONS)
        for ratio in (self.ratio, *self.ratios):
            check_ratio(ratio)
        for method in (*self.methods, *self.scopes, *(entry.method for entry in self.search)):
            one_of("method", method, METHODS)
        for scope in (
            self.scope,
            self.task_scope,
            *self.scopes.values(),
            *self.recipes,
            *(entry.scope for entry in self.search),
        ):
            one_of("scope", scope, SCOPES)
        for metric in (self.metric, *self.metrics):
            check_metric(metric, self.head_matrix, self.tau if metric == self.metric else 1.0, "position")
        for own in self.recipes.values():
            for name, settings in own.items():
                method, at, ratio = name.partition("@")
                one_of("method", method, ("default", *METHODS))
                if at and not re.fullmatch(r"0\.\d+|1", ratio):
                    raise ValueError(f"The recipe of '{name}' is for no ratio: write it like alps@0.3.")
                Recipe.check(**{**self.recipe.model_dump(), **settings})
        for name in self.candidates:
            one_of("offline data set", name, OFFLINE)
        from alps_repro.experiments import TABLES  # which is made of profiles

        for table, coverage in self.tables.items():
            one_of("table", table, TABLES)
            for family in coverage.families or ():
                one_of("family", family, self.families)
            for method in coverage.methods or ():
                one_of("method", method, METHODS)
        check_tasks(self.knowledge, self.allow_code)
        for family in self.families.values():
            check_tasks(family.tasks, self.allow_code)
        return self

    @classmethod
    def load(cls, name: str, **overrides: Any) -> Profile:
        """Read a profile by name (from `profiles/`) or path; overrides that are None are left out.

        Raises:
            UserError: there is no such profile, or a setting in it is unknown or impossible.
        """
        return cls.made(cls.read(name), **overrides)

    @classmethod
    def read(cls, name: str | Path) -> dict[str, Any]:
        """The settings in a profile's file, as they stand there."""
        import yaml

        folder = Path(__file__).parents[1] / "profiles"
        name = str(name)
        path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not folder.is_dir() and path.parent == folder:
            raise UserError(
                f"The profile '{name}' is not part of an installed package: run in a clone of its repository, or give "
                "a profile's file."
            )
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long
            raise UserError(f"There is no profile '{name}': {nearest(name, [p.stem for p in folder.glob('*.yaml')])}")
        try:
            settings = yaml.safe_load(path.read_text())
        except Exception as error:  # YAML's tags raise whatever int, datetime and others do
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"The profile '{path}' is not readable YAML ({reason}).") from None
        if not isinstance(settings, Mapping):
            raise UserError(f"The profile '{path}' holds no settings.")
        return dict(settings)

    @classmethod
    def made(cls, settings: Mapping[str, Any], **overrides: Any) -> Profile:
        """The profile of settings as they stand in a file, and of overrides as for `load`."""
        results, given = settings.get("results"), {k: v for k, v in overrides.items() if v is not None}
        if isinstance(results, str) and not Path(results).is_absolute():
            # Relative to the checkout, wherever a notebook or shell is: Jupyter starts kernels beside the notebook.
            settings = {**settings, "results": os.path.relpath(Path(__file__).parents[1] / results)}
        return cls.check(**{str(k): v for k, v in {**settings, **given}.items()})

    def family(self, dataset: str) -> str | None:
        """The name of the family that a data set belongs to, or None."""
        return next((name for name, family in self.families.items() if dataset in family.datasets), None)

    def run(self, **given: Any) -> Run:
        """A run of this profile: `given` fields of `Run`, the profile's own for those that are not given or None."""
        given = {name: value for name, value in given.items() if value is not None}
        method = one_of("method", given.get("method", "alps"), ("vanilla", *METHODS))
        adapted = method != "vanilla" and METHODS[method].adapter != "rows"
        dataset = given.get("dataset", next(iter(self.families.values())).datasets[0])
        defaults = {
            "base": self.models[0],
            "dataset": dataset,
            "method": method,
            "ratio": self.ratio,
            "scope": "heads" if adapted else self.scopes.get(method, self.scope),
            "seed": self.seeds[0],
            "metric": self.metric,
            "head_matrix": self.head_matrix,
            "heads_from": dataset,
            "quantization": self.quantization,
        }
        run = Run.check(**{**defaults, **given})
        one_of("source", run.source, SOURCES)
        one_of("scope", run.scope, SCOPES)
        return run

    def _recipe(self, run: Run) -> Recipe:
        own = self.recipes.get(run.scope, {})
        asked = {"learning_rate": run.learning_rate, "max_steps": run.max_steps, "examples": run.examples}
        asked["max_lost"] = self.max_lost
        asked = {name: value for name, value in asked.items() if value is not None}
        places = ("default", run.method, f"{run.method}@{run.ratio:g}")
        recipe = self.recipe.model_dump()
        if self.recipe.device == "auto":
            recipe["device"] = self.device
        recipe |= {k: v for place in places for k, v in own.get(place, {}).items()} | asked
        if run.data_share < 1 and recipe["max_steps"]:
            # As many passes over the data as before; an offline data set is as long as its steps need it.
            recipe["max_steps"] = math.ceil(recipe["max_steps"] * run.data_share)
        elif run.data_share < 1:
            recipe["data_share"] = run.data_share
        return Recipe.check(**recipe)

    def finetuning(self, run: Run) -> FinetuneConfig:
        """The fine-tuning of a run, its localization included."""
        method = METHODS[one_of("method", run.method, METHODS)]
        return FinetuneConfig.check(
            base=run.base,
            dataset=run.dataset,
            method=run.method,
            ratio=run.ratio if method.uses_ratio else 1.0,
            scope=run.scope,
            quantization=run.quantization,
            seed=run.seed,
            choice_seed=self.choice_seed + run.seed if method.draws else 0,
            localization=self.localization(run) if method.uses_scores else None,
            recipe=self._recipe(run),
        )

    def _scored_by(self, run: Run) -> tuple[str, str]:
        """The metric and the head matrix of a run's localization: its method's own, or the run's."""
        return (METHODS[run.method].metric if run.method != "vanilla" else None) or (run.metric, run.head_matrix)

    def task_model(self, run: Run) -> Run | None:
        """The run that makes the task model of a run's localization; None where that is ready-made, or needs none."""
        metric, _ = self._scored_by(run)
        if metric == "hifi" or (run.source == "ready_made" and metric != "scale_norm"):
            return None
        given = {"base": run.base, "dataset": run.heads_from, "seed": run.seed, "examples": run.examples}
        if metric == "scale_norm":  # LoFiT's first stage
            return self.run(method="lofit_scales", quantization=run.quantization, **given)
        scope = "heads" if run.source == "attn_only_10pct" else self.task_scope
        return self.run(
            method="full",
            scope=scope,
            quantization=self.quantization if scope == "heads" else "none",
            data_share=0.1 if run.source == "data_10pct" else None,
            **given,
        )

    def localization(self, run: Run, task_model: str | None = None) -> LocalizeConfig:
        """The localization that a run's heads come from; `task_model` names another task model."""
        metric, head_matrix = self._scored_by(run)
        tuned = self.task_model(run)
        if task_model is None and tuned is None and metric != "hifi" and run.base not in self.ready_made:
            raise UserError(f"The profile names no ready-made model for '{run.base}': add it to ready_made.")
        if task_model is None:
            task_model = self.finetuning(tuned) if tuned else self.ready_made.get(run.base, run.base)
        if metric in RESULT_METRICS:
            dataset = None if metric == "scale_norm" else run.heads_from
            asked = {"base": run.base, "task_model": run.base if metric == "hifi" else task_model, "dataset": dataset}
            asked |= {} if dataset is None else {"questions": self.questions, "device": self.device, **self._lost()}
            return LocalizeConfig.check(metric=metric, head_matrix=RESULT, **asked)
        return LocalizeConfig.check(
            base=run.base,
            task_model=task_model,
            metric=metric,
            head_matrix=head_matrix,
            tau=self.tau if metric == self.metric else 1.0,
            ground=self.ground if metric == "pad" else "position",
        )

    def recall(self) -> RecallConfig:
        """The test of the metrics on heads that were moved by a known amount."""
        return RecallConfig.check(base=self.models[0])

    def importance(self, dataset: str | None = None) -> ImportanceConfig:
        """The importance (Eq. 3) of the heads of the task model of a data set."""
        task_model = self.task_model(self.run(dataset=dataset))
        if task_model is None:
            raise UserError("A ready-made task model has no questions of its own: take a data set's task model.")
        return ImportanceConfig.check(
            base=task_model.base,
            task_model=self.finetuning(task_model),
            head_matrix=self.head_matrix,
            device=self.device,
            **self._lost(),
        )

    def embedding(self) -> EmbedConfig:
        """The embeddings of all data sets of the profile, by its first model."""
        datasets = tuple(name for family in self.families.values() for name in family.datasets)
        return EmbedConfig.check(base=self.models[0], datasets=datasets, device=self.device)

    def evaluation(
        self, run: Run, tasks: Sequence[str] | None = None, split: str = "test", limit: int | None = None
    ) -> EvaluateConfig:
        """The evaluation of a run's model on tasks; by default on those of its data set's family, or its own."""
        if tasks is None:
            family = self.family(run.dataset)
            tasks = (self.families[family].tasks if family else ()) or (run.dataset,)
        return EvaluateConfig.check(
            model=run.base if run.method == "vanilla" else self.finetuning(run),
            tasks=tuple(tasks),
            limit=self.limit if limit is None else limit,
            batch_size=self.eval_batch_size,
            quantization=run.quantization,
            template=self.template,
            autocast=self.autocast,
            dtype=self.eval_dtype,
            device=self.device,
            allow_code=self.allow_code,
            split=split,
            **self._lost(),
        )

    def _lost(self) -> dict[str, float]:
        return {} if self.max_lost is None else {"max_lost": self.max_lost}


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
