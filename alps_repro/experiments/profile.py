"""A profile: the models, data, methods and budget of an experiment, as a file says them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from alps_repro.data.datasets import DATASETS, OFFLINE
from alps_repro.devices import Device, Precision
from alps_repro.errors import UserError, nearest, one_of
from alps_repro.evaluation.benchmarks import Template, check_tasks
from alps_repro.experiments import configure
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    Limit,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.configure import Run
from alps_repro.experiments.grid import TABLES
from alps_repro.localization.metrics import check_metric
from alps_repro.models.checks import QUANTIZATIONS
from alps_repro.settings import Settings
from alps_repro.training.methods import METHODS, SCOPES, check_ratio
from alps_repro.training.recipe import MaxLost, Recipe


class Family(Settings):
    """Data sets of one kind of task: heads are localized and trained on the first, and transferred to the second."""

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
    """The part of the profile that a table shows; None: all of it."""

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
    tables: dict[str, Coverage] = Field(default_factory=dict, description="which tables are made, and what they show")
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
    eval_precision: Precision = Field(
        "auto", description="of matrix products in evaluations, as the recipe in training"
    )
    device: Device = Field(
        "auto", description="of all runs; cuda: where no GPU can be used, they stop; `recipe` may say another one"
    )
    template: Template = "none"
    allow_code: bool = False
    keep_models: bool = Field(True, description="False: remove each tuned model once all that needs it is done")
    threads: int | None = Field(None, gt=0, description="processor threads of a run; None: all")
    questions: int = Field(64, gt=0, description="validation examples, for selectors that use examples")
    score_and_truth: bool = Field(False, description="compare scores with known changes, and with importance")
    knowledge: tuple[str, ...] = Field((), description="tasks of general knowledge, for Table 1's models")

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
                method, at, own_ratio = name.partition("@")
                one_of("method", method, ("default", *METHODS))
                if at and not re.fullmatch(r"0\.\d+|1", own_ratio):
                    raise ValueError(f"The recipe of '{name}' is for no ratio: write it like alps@0.3.")
                Recipe.check(**{**self.recipe.model_dump(), **settings})
        for name in self.candidates:
            one_of("offline data set", name, OFFLINE)
        for table, coverage in self.tables.items():
            one_of("table", table, TABLES)
            for name in coverage.families or ():
                one_of("family", name, self.families)
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

        folder = Path(__file__).parents[2] / "profiles"
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
            settings = {**settings, "results": os.path.relpath(Path(__file__).parents[2] / results)}
        return cls.check(**{str(k): v for k, v in {**settings, **given}.items()})

    # From settings to configurations.

    def family(self, dataset: str) -> str | None:
        """The name of the family that a data set belongs to, or None."""
        return configure.family_of(self, dataset)

    def run(self, **given: Any) -> Run:
        """A run of this profile: `given` fields of `Run`, the profile's own for those that are not given or None."""
        return configure.run_of(self, **given)

    def finetuning(self, run: Run) -> FinetuneConfig:
        """The fine-tuning of a run, its localization included."""
        return configure.finetuning(self, run)

    def task_model(self, run: Run) -> Run | None:
        """The run that makes the task model of a run's localization; None where that is ready-made or not needed."""
        return configure.task_model_of(self, run)

    def localization(self, run: Run, task_model: str | None = None) -> LocalizeConfig:
        """The localization that a run's heads come from; `task_model` names another task model."""
        return configure.localization(self, run, task_model)

    def evaluation(
        self, run: Run, tasks: Sequence[str] | None = None, split: str = "test", limit: int | None = None
    ) -> EvaluateConfig:
        """The evaluation of a run's model on tasks; by default on those of its data set's family, or its own."""
        return configure.evaluation(self, run, tasks, split, limit)

    def recall(self) -> RecallConfig:
        """The test of the metrics on heads that were changed by a known amount."""
        return configure.recall(self)

    def importance(self, dataset: str | None = None) -> ImportanceConfig:
        """The importance (Eq. 3) of the heads of the task model of a data set."""
        return configure.importance(self, dataset)

    def embedding(self) -> EmbedConfig:
        """The embeddings of all data sets of the profile, by its first model."""
        return configure.embedding(self)
