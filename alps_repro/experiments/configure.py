"""From a profile's settings to configurations of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from alps_repro.errors import UserError, one_of
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.localization.metrics import RESULT
from alps_repro.localization.selectors import RESULT_METRICS
from alps_repro.settings import Settings
from alps_repro.training.methods import METHODS, SCOPES
from alps_repro.training.recipe import Recipe

if TYPE_CHECKING:
    from alps_repro.experiments.profile import Profile

#: {where the task model of a localization comes from: its row in Table 10, by the names of `reported.csv`}, in the
#: paper's order.
SOURCES = {
    "ready_made": "alps_ready_made_model",  # the profile's `ready_made`
    "data_10pct": "alps_10pct_data",  # full fine-tuning on 10 % of the examples, in 10 % of the steps
    "attn_only_10pct": "alps_attn_only_10pct",  # fine-tuning of q, k and v alone, about 10 % of the parameters
    "full": "alps",  # full fine-tuning
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


def family_of(profile: Profile, dataset: str) -> str | None:
    """The name of the family that a data set belongs to, or None."""
    return next((name for name, family in profile.families.items() if dataset in family.datasets), None)


def run_of(profile: Profile, **given: Any) -> Run:
    """A run of this profile: `given` fields of `Run`, the profile's own for those that are not given or None."""
    given = {name: value for name, value in given.items() if value is not None}
    method = one_of("method", given.get("method", "alps"), ("vanilla", *METHODS))
    adapted = method != "vanilla" and METHODS[method].adapter != "rows"
    dataset = given.get("dataset", next(iter(profile.families.values())).datasets[0])
    defaults = {
        "base": profile.models[0],
        "dataset": dataset,
        "method": method,
        "ratio": profile.ratio,
        "scope": "heads" if adapted else profile.scopes.get(method, profile.scope),
        "seed": profile.seeds[0],
        "metric": profile.metric,
        "head_matrix": profile.head_matrix,
        "heads_from": dataset,
        "quantization": profile.quantization,
    }
    run = Run.check(**{**defaults, **given})
    one_of("source", run.source, SOURCES)
    one_of("scope", run.scope, SCOPES)
    return run


def finetuning(profile: Profile, run: Run) -> FinetuneConfig:
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
        choice_seed=profile.choice_seed + run.seed if method.draws else 0,
        localization=localization(profile, run) if method.uses_scores else None,
        recipe=_recipe(profile, run),
    )


def task_model_of(profile: Profile, run: Run) -> Run | None:
    """The run that makes the task model of a run's localization; None where that is ready-made, or needs none."""
    metric, _ = _scored_by(profile, run)
    if metric == "hifi" or (run.source == "ready_made" and metric != "scale_norm"):
        return None
    given = {"base": run.base, "dataset": run.heads_from, "seed": run.seed, "examples": run.examples}
    if metric == "scale_norm":  # LoFiT's first stage
        return run_of(profile, method="lofit_scales", quantization=run.quantization, **given)
    scope = "heads" if run.source == "attn_only_10pct" else profile.task_scope
    return run_of(
        profile,
        method="full",
        scope=scope,
        quantization=profile.quantization if scope == "heads" else "none",
        data_share=0.1 if run.source == "data_10pct" else None,
        **given,
    )


def localization(profile: Profile, run: Run, task_model: str | None = None) -> LocalizeConfig:
    """The localization that a run's heads come from.

    Args:
        profile: of the run.
        run: whose heads are selected.
        task_model: another task model, by its name; by default the one that the profile and the run say.

    Raises:
        UserError: the task model should be ready-made, and the profile names none.
    """
    metric, head_matrix = _scored_by(profile, run)
    tuned = task_model_of(profile, run)
    if task_model is None and tuned is None and metric != "hifi" and run.base not in profile.ready_made:
        raise UserError(f"The profile names no ready-made model for '{run.base}': add it to ready_made.")
    task: str | FinetuneConfig = task_model or profile.ready_made.get(run.base, run.base)
    if task_model is None and tuned is not None:
        task = finetuning(profile, tuned)
    if metric == "scale_norm":
        return LocalizeConfig.check(metric=metric, head_matrix=RESULT, base=run.base, task_model=task)
    if metric in RESULT_METRICS:
        return LocalizeConfig.check(
            metric=metric,
            head_matrix=RESULT,
            base=run.base,
            task_model=run.base if metric == "hifi" else task,
            dataset=run.heads_from,
            questions=profile.questions,
            device=profile.device,
            **_lost(profile),
        )
    return LocalizeConfig.check(
        base=run.base,
        task_model=task,
        metric=metric,
        head_matrix=head_matrix,
        tau=profile.tau if metric == profile.metric else 1.0,
        ground=profile.ground if metric == "pad" else "position",
    )


def evaluation(
    profile: Profile, run: Run, tasks: Sequence[str] | None = None, split: str = "test", limit: int | None = None
) -> EvaluateConfig:
    """The evaluation of a run's model on tasks; by default on those of its data set's family, or its own."""
    if tasks is None:
        family = family_of(profile, run.dataset)
        tasks = (profile.families[family].tasks if family else ()) or (run.dataset,)
    return EvaluateConfig.check(
        model=run.base if run.method == "vanilla" else finetuning(profile, run),
        tasks=tuple(tasks),
        limit=profile.limit if limit is None else limit,
        batch_size=profile.eval_batch_size,
        quantization=run.quantization,
        template=profile.template,
        precision=profile.eval_precision,
        device=profile.device,
        allow_code=profile.allow_code,
        split=split,
        **_lost(profile),
    )


def recall(profile: Profile) -> RecallConfig:
    """The test of the metrics on heads that were moved by a known amount."""
    return RecallConfig.check(base=profile.models[0])


def importance(profile: Profile, dataset: str | None = None) -> ImportanceConfig:
    """The importance (Eq. 3) of the heads of the task model of a data set."""
    task_model = task_model_of(profile, run_of(profile, dataset=dataset))
    if task_model is None:
        raise UserError("A ready-made task model has no questions of its own: take a data set's task model.")
    return ImportanceConfig.check(
        base=task_model.base,
        task_model=finetuning(profile, task_model),
        head_matrix=profile.head_matrix,
        device=profile.device,
        **_lost(profile),
    )


def embedding(profile: Profile) -> EmbedConfig:
    """The embeddings of all data sets of the profile, by its first model."""
    datasets = tuple(name for family in profile.families.values() for name in family.datasets)
    return EmbedConfig.check(base=profile.models[0], datasets=datasets, device=profile.device)


def _recipe(profile: Profile, run: Run) -> Recipe:
    own = profile.recipes.get(run.scope, {})
    given = {"learning_rate": run.learning_rate, "max_steps": run.max_steps, "examples": run.examples}
    given["max_lost"] = profile.max_lost
    given = {name: value for name, value in given.items() if value is not None}
    places = ("default", run.method, f"{run.method}@{run.ratio:g}")
    recipe = profile.recipe.model_dump()
    if profile.recipe.device == "auto":
        recipe["device"] = profile.device
    recipe |= {k: v for place in places for k, v in own.get(place, {}).items()} | given
    if run.data_share < 1 and recipe["max_steps"]:
        # As many passes over the data as before; an offline data set is as long as its steps need it.
        recipe["max_steps"] = math.ceil(recipe["max_steps"] * run.data_share)
    elif run.data_share < 1:
        recipe["data_share"] = run.data_share
    return Recipe.check(**recipe)


def _scored_by(profile: Profile, run: Run) -> tuple[str, str]:
    """The metric and the head matrix of a run's localization: its method's own, or the run's."""
    return (METHODS[run.method].metric if run.method != "vanilla" else None) or (run.metric, run.head_matrix)


def _lost(profile: Profile) -> dict[str, float]:
    return {} if profile.max_lost is None else {"max_lost": profile.max_lost}
