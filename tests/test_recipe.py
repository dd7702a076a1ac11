"""Settings: the paper's defaults, names that follow from everything that decides a result, refusals that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alps_repro.errors import UserError
from alps_repro.methods import METHODS
from alps_repro.recipe import (
    EvaluateConfig,
    FinetuneConfig,
    LocalizeConfig,
    Profile,
    Recipe,
    Settings,
    check_parameters,
)

FULL = {"base": "m", "dataset": "chain_sum", "method": "full", "ratio": 1.0}


def alps(**settings: Any) -> FinetuneConfig:
    localization = LocalizeConfig(base="m", task_model=FinetuneConfig(**FULL))
    return FinetuneConfig.check(**{**FULL, "method": "alps", "ratio": 0.1, "localization": localization, **settings})


def test_defaults_are_the_papers() -> None:
    """Section 4.1: what the paper says, number by number."""
    recipe = Recipe()
    assert recipe.learning_rate == 2e-5
    assert recipe.weight_decay == 0.1
    assert recipe.betas == (0.9, 0.999)
    assert recipe.warmup_ratio == 0.1
    assert recipe.min_lr_ratio == 0.1
    assert recipe.batch_size == 128
    assert recipe.epochs == 3
    assert recipe.max_steps is None
    assert recipe.examples is None
    assert recipe.loss_on == "response"
    config = alps()
    assert (config.ratio, config.scope, config.quantization) == (0.1, "all", "none")
    assert (config.localization.metric, config.localization.head_matrix) == ("pad", "product")
    assert (config.localization.tau, config.localization.ground) == (1.0, "position")


#: For every field of every configuration another possible value.
OTHER: dict[type[Settings], dict[str, Any]] = {
    Recipe: {
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "betas": (0.9, 0.95),
        "warmup_ratio": 0.0,
        "min_lr_ratio": 0.0,
        "epochs": 1.0,
        "max_steps": 10,
        "batch_size": 64,
        "micro_batch_size": 8,
        "max_length": 512,
        "loss_on": "prompt",
        "max_grad_norm": 0.5,
        "precision": "float32",
        "gradient_checkpointing": True,
        "examples": 100,
        "checkpoint_steps": 50,
        "workers": 2,
    },
    FinetuneConfig: {
        "base": "other",
        "dataset": "alpaca",
        "method": "random",
        "ratio": 0.2,
        "scope": "heads",
        "quantization": "4bit",
        "seed": 1,
        "choice_seed": 1,
        "localization": LocalizeConfig(base="m", task_model="t"),
        "recipe": Recipe(epochs=1),
    },
    LocalizeConfig: {
        "base": "other",
        "task_model": "other",
        "metric": "l2",
        "head_matrix": "concat",
        "tau": 2.0,
        "ground": "value",
    },
    EvaluateConfig: {
        "model": FinetuneConfig(**FULL),
        "tasks": ("chain_sum", "gsm8k"),
        "limit": 10,
        "batch_size": 8,
        "quantization": "8bit",
        "template": "alpaca",
        "allow_code": True,
    },
}

#: A possible value of each configuration to start from.
START: dict[type[Settings], Settings] = {
    Recipe: Recipe(),
    FinetuneConfig: FinetuneConfig(**{**FULL, "scope": "heads"}),
    LocalizeConfig: LocalizeConfig(base="m", task_model="t"),
    EvaluateConfig: EvaluateConfig(model="m", tasks=("chain_sum",)),
}


@pytest.mark.parametrize("kind", OTHER, ids=lambda kind: kind.__name__)
def test_digest_changes_with_every_field(kind: type[Settings]) -> None:
    """Two runs that differ in anything must not share a record."""
    assert OTHER[kind].keys() == kind.model_fields.keys(), "a new field wants a value here"
    start = START[kind].model_dump()
    digests = {START[kind].digest}
    for name, value in OTHER[kind].items():
        value = "all" if name == "scope" else value
        changed = kind.check(**{**start, name: value})
        assert getattr(changed, name) != getattr(START[kind], name)
        digests.add(changed.digest)
    assert len(digests) == len(OTHER[kind]) + 1


def test_digest_changes_with_what_lies_deep_within() -> None:
    """An evaluation of ALPS depends on the recipe of the full run that its localization came from."""

    def evaluation(**recipe: Any) -> EvaluateConfig:
        full = FinetuneConfig(**FULL, recipe=Recipe(**recipe))
        localization = LocalizeConfig(base="m", task_model=full)
        return EvaluateConfig(model=alps(localization=localization), tasks=("chain_sum",))

    assert evaluation().name == evaluation().name
    assert evaluation().name != evaluation(learning_rate=3e-5).name


CONFIGS = [
    *START.values(),
    alps(),
    alps(scope="heads", quantization="4bit", recipe=Recipe(max_steps=7, betas=(0.8, 0.9))),
    LocalizeConfig(base="m", task_model=FinetuneConfig(**FULL), metric="kl", tau=0.5),
    EvaluateConfig(model=alps(), tasks=("chain_sum", "gsm8k"), limit=5, template="alpaca"),
    Profile.load("quick"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_json_gives_the_same_back(config: Settings) -> None:
    again = type(config).model_validate_json(json.dumps(config.dump()))
    assert again == config
    assert again.digest == config.digest
    assert type(config).model_validate(config.model_dump()) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_settings_cannot_be_changed(config: Settings) -> None:
    name = next(iter(type(config).model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(config, name, getattr(config, name))


@pytest.mark.parametrize(
    "base",
    [
        "smollm2-135m",
        "meta-llama/Llama-3.1-8B",
        "/data/models/mine",
        "../../mine",
        "..",
        "a/../b",
        "C:\\models\\mine",
        "spaces and\nbreaks",
        "x" * 300,
        "漢" * 200,
        "a/." + "b" * 149,
    ],
)
def test_names_are_file_names(base: str, tmp_path: Path) -> None:
    full = FinetuneConfig(**{**FULL, "base": base})
    localization = LocalizeConfig(base=base, task_model=base)
    names = [
        full.name,
        localization.name,
        LocalizeConfig(base=base, task_model=full).name,
        EvaluateConfig(model=base, tasks=("chain_sum", "gsm8k")).name,
        EvaluateConfig(model=full, tasks=("chain_sum",)).name,
    ]
    assert len(set(names)) == len(names)
    for name, config in zip(names, [full, localization], strict=False):
        assert name.endswith(config.digest)
    for name in names:
        path = tmp_path / f"evaluate-{name}.failed.json"
        path.write_text("")
        assert path.parent == tmp_path
        assert path.resolve().parent == tmp_path.resolve()
        assert name[0] not in ".-", "neither hidden nor an option"


def refusals(*cases: tuple[Any, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "message"), cases)


@refusals(
    (lambda: Recipe.check(learning_rat=1e-4), "no parameter 'learning_rat': did you mean 'learning_rate'"),
    (lambda: Recipe.check(batchsize=4), "did you mean 'batch_size'"),
    (lambda: FinetuneConfig.check(**FULL, recipe={"warmup": 0.1}), "'recipe.warmup': did you mean 'warmup_ratio'"),
    (lambda: FinetuneConfig.check(**FULL, rato=0.1), "'rato': did you mean 'ratio'"),
    (lambda: FinetuneConfig.check(dataset="chain_sum", method="full"), "'base' is missing"),
    (lambda: FinetuneConfig.check(**{**FULL, "method": "alpz"}), "no method 'alpz': did you mean 'alps'"),
    (lambda: FinetuneConfig.check(**{**FULL, "dataset": "alpacca"}), "no data set 'alpacca': did you mean 'alpaca'"),
    (lambda: FinetuneConfig.check(**{**FULL, "scope": "head"}), "no scope 'head': did you mean 'heads'"),
    (lambda: FinetuneConfig.check(**{**FULL, "quantization": "4-bit"}), "did you mean '4bit'"),
    (lambda: FinetuneConfig.check(**{**FULL, "quantization": "4bit"}), "4bit.*use scope='heads'"),
    (lambda: FinetuneConfig.check(**{**FULL, "method": "alps"}), "'alps' needs head scores"),
    (lambda: FinetuneConfig.check(**{**FULL, "seed": -1}), "'seed' is -1"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", metric="padd"), "no metric 'padd': did you mean 'pad'"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", head_matrix="produkt"), "did you mean 'product'"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", ground="values"), "did you mean 'value'"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", tau=0), "tau is 0.*positive"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", metric="kl", ground="value"), "belongs to.*'pad'"),
    (lambda: EvaluateConfig.check(model="m", tasks=()), "'tasks'"),
    (lambda: EvaluateConfig.check(model="m", tasks="chain_sum"), "'tasks' is 'chain_sum'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chainsum",)), "did you mean 'chain_sum'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("humaneval",)), "allow_code"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), limit=0), "'limit' is 0"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), template="alpacca"), "'template' is 'alpacca'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), quantization="3bit"), "quantization '3bit'"),
    *[(lambda ratio=ratio: alps(ratio=ratio), r"not in \(0, 1\]") for ratio in (0, -0.1, 1.5, 10)],
    *[
        (lambda settings=settings: Recipe.check(**settings), f"'{next(iter(settings))}")
        for settings in (
            {"learning_rate": "fast"},
            {"learning_rate": 0},
            {"learning_rate": float("nan")},
            {"learning_rate": float("inf")},
            {"betas": (0.9,)},
            {"betas": (0.9, 1.0)},
            {"betas": 0.9},
            {"warmup_ratio": 1.0},
            {"min_lr_ratio": 1.1},
            {"batch_size": 2.5},
            {"batch_size": 0},
            {"max_steps": 0},
            {"loss_on": "answer"},
            {"precision": "fp16"},
            {"gradient_checkpointing": "perhaps"},
        )
    ],
    (lambda: Recipe.check(batch_size=100), "batch_size 100 is not a multiple of the micro_batch_size 16"),
)
def test_refused_in_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_small_batches_need_no_micro_batch_size() -> None:
    assert Recipe.check(batch_size=2).batch_size == 2


# Profiles


def profile_file(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


MINE = "results: out\nbase: m\ndataset: chain_sum\ntasks: [chain_sum]\n"


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("profiles/*.yaml")), ids=lambda path: path.stem)
def test_every_profile_can_be_run(path: Path) -> None:
    profile = Profile.load(path.stem)
    assert profile == Profile.load(str(path))
    for method in profile.methods:
        assert profile.finetuning(method).method == method
        assert profile.evaluation(method).model == profile.finetuning(method)
    assert profile.evaluation("vanilla").model == profile.base
    assert profile.localization().task_model.scope == "all"


def test_overrides() -> None:
    quick = Profile.load("quick")
    assert Profile.load("quick", base=None, ratio=None, results=None) == quick
    other = Profile.load("quick", base="m", ratio=0.5, results=None)
    assert (other.base, other.ratio, other.results) == ("m", 0.5, quick.results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE + "metrik: pad\n", "no parameter 'metrik': did you mean 'metric'"),
        (MINE + "recipe: {learning_rat: 1}\n", "'recipe.learning_rat': did you mean 'learning_rate'"),
        (MINE + "recipes: {alps: {learning_rat: 1}}\n", "'learning_rat': did you mean 'learning_rate'"),
        (MINE + "recipes: {alpz: {}}\n", "no method 'alpz'"),
        (MINE + "recipes: {random: {batch_size: 100}}\n", "not a multiple"),
        (MINE + "scopes: {alps: head}\n", "no scope 'head'"),
        (MINE + "scope: head\n", "no scope 'head'"),
        (MINE + "methods: [full, alpz]\n", "no method 'alpz': did you mean 'alps'"),
        (MINE + "quantization: 3bit\n", "no quantization '3bit'"),
        (MINE + "ratio: 0\n", r"not in \(0, 1\]"),
        (MINE + "ratio: much\n", "'ratio' is 'much'"),
        (MINE.replace("chain_sum\n", "chainsum\n"), "no data set 'chainsum'"),
        (MINE.replace("base: m\n", ""), "'base' is missing"),
        ("- a\n- b\n", "holds no settings"),
        ("", "holds no settings"),
        ("a: [", "not readable YAML"),
        ("\x00", "not readable YAML"),
    ],
)
def test_profile_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Profile.load(profile_file(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["quik", "QUICK", "/nowhere/quick.yaml", "", 5])
def test_unknown_profile(name: Any) -> None:
    with pytest.raises(UserError, match=f"no profile '{name}'.*quick"):
        Profile.load(name)


def test_unknown_override() -> None:
    with pytest.raises(UserError, match="'raito': did you mean 'ratio'"):
        Profile.load("quick", raito=0.1)


@pytest.mark.parametrize("settings", ["", "scope: heads\n", "scopes: {full: heads}\n"])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_task_model_is_the_full_run_in_scope_all(settings: str, quantization: str, tmp_path: Path) -> None:
    """Whatever the profile says of the other runs: the paper's task model has everything trained."""
    profile = Profile.load(profile_file(tmp_path, MINE + settings), quantization=quantization)
    task_model = profile.localization().task_model
    assert (task_model.method, task_model.ratio) == ("full", 1.0)
    assert (task_model.scope, task_model.quantization) == ("all", "none")
    heads = profile.for_method("alps", scope="heads").finetuning("alps")
    assert heads.quantization == quantization
    assert heads.localization == profile.localization()


def test_named_task_model(tmp_path: Path) -> None:
    profile = Profile.load(profile_file(tmp_path, MINE))
    assert profile.localization("mine").task_model == "mine"


def test_finetuning_takes_what_the_method_needs() -> None:
    """A setting that changes nothing must not make another run of the same thing."""
    quick = Profile.load("quick", ratio=0.1)
    other = Profile.load("quick", ratio=0.3)
    for name, method in METHODS.items():
        config = quick.finetuning(name)
        assert (config.localization is not None) == method.uses_scores
        assert (config == other.finetuning(name)) == (not method.uses_ratio)


def test_for_method_changes_one_method_only() -> None:
    quick = Profile.load("quick")
    changed = quick.for_method("random", scope="all", learning_rate=0.5, max_steps=None)
    assert changed.finetuning("random").scope == "all"
    assert changed.finetuning("random").recipe == quick.finetuning("random").recipe.model_copy(
        update={"learning_rate": 0.5}
    )
    assert changed.finetuning("alps") == quick.finetuning("alps")
    assert quick.for_method("random") == quick


@refusals(
    (lambda profile: profile.for_method("alpz"), "no method 'alpz': did you mean 'alps'"),
    (lambda profile: profile.for_method("alps", scope="head"), "no scope 'head'"),
    (lambda profile: profile.for_method("alps", learning_rate=-1), "'learning_rate' is -1"),
    (lambda profile: profile.finetuning("vanilla"), "no method 'vanilla'"),
    (lambda profile: profile.evaluation("vanila"), "did you mean 'vanilla'"),
)
def test_method_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(Profile.load("quick"))


# Notebook parameters


KNOWN = ["profile", "ratio", "results"]


@pytest.mark.parametrize("value", ["x", 1, 0.5, True, None, [1], (1,), {"a": 1}])
def test_mistyped_parameter_is_found_whatever_its_value(value: Any) -> None:
    namespace = {"profile": "quick", "ratio": None, "results": None, "raito": value}
    with pytest.raises(UserError, match="no parameter 'raito': did you mean 'ratio'"):
        check_parameters(namespace, KNOWN)


def test_right_parameters_pass_before_and_after_the_notebook_ran() -> None:
    """In Jupyter the check cell runs again when modules, records, figures and so on have been made."""
    namespace: dict[str, Any] = {"profile": "quick", "ratio": 0.1, "results": None}
    # What IPython itself puts there.
    namespace |= {"In": [""], "Out": {}, "_i": "", "_": "", "__name__": "__main__", "_oh": {}, "exit": object()}
    check_parameters(namespace, KNOWN)
    namespace |= {"json": json, "settings": Profile.load("quick"), "folder": Path(), "Path": Path, "_rows": 3}
    namespace |= {"config": Profile.load("quick").localization()}
    check_parameters(namespace, KNOWN)
    check_parameters(namespace, KNOWN)
