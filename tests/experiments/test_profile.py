"""Settings: the paper's defaults, names that follow from everything that decides a result, refusals that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alps_repro.devices import resolved_precision
from alps_repro.errors import UserError
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.configure import SOURCES, Run
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.notebooks import check_parameters
from alps_repro.experiments.profile import Profile
from alps_repro.settings import Settings
from alps_repro.training.methods import METHODS
from alps_repro.training.recipe import Recipe

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
    assert recipe.data_share == 1
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
        "warmup_steps": 5,
        "min_lr_ratio": 0.0,
        "epochs": 1.0,
        "max_steps": 10,
        "batch_size": 64,
        "micro_batch_size": 8,
        "max_length": 512,
        "max_lost": 0.2,
        "loss_on": "prompt",
        "max_grad_norm": 0.5,
        "precision": "float32",
        "device": "cpu",
        "gradient_checkpointing": True,
        "examples": 100,
        "data_share": 0.5,
        "validation": 20,
        "patience": {"validation": 20, "patience": 2},
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
        "dataset": {"dataset": "gcd", "metric": "hifi", "head_matrix": "result"},
        "questions": {"questions": 8, "dataset": "gcd", "metric": "hifi", "head_matrix": "result"},
        "device": {"device": "cpu", "dataset": "gcd", "metric": "hifi", "head_matrix": "result"},
        "max_lost": {"max_lost": 0.2, "dataset": "gcd", "metric": "hifi", "head_matrix": "result"},
    },
    EvaluateConfig: {
        "model": FinetuneConfig(**FULL),
        "tasks": ("chain_sum", "gcd"),
        "limit": 10,
        "batch_size": 8,
        "quantization": "8bit",
        "template": "alpaca",
        "split": "validation",
        "precision": "float16",
        "device": "cpu",
        "allow_code": True,
        "max_lost": 0.2,
    },
    RecallConfig: {
        "base": "other",
        "factors": (1.0,),
        "seeds": (3,),
        "share": 0.2,
        "background": 1e-3,
    },
    ImportanceConfig: {
        "base": "other",
        "task_model": FinetuneConfig(**{**FULL, "seed": 1}),
        "questions": 8,
        "batch_size": 8,
        "head_matrix": "concat",
        "device": "cpu",
        "max_lost": 0.2,
    },
    EmbedConfig: {
        "base": "other",
        "datasets": ("gcd",),
        "questions": 8,
        "device": "cpu",
    },
}

#: A possible value of each configuration to start from.
START: dict[type[Settings], Settings] = {
    Recipe: Recipe(),
    FinetuneConfig: FinetuneConfig(**{**FULL, "scope": "heads"}),
    LocalizeConfig: LocalizeConfig(base="m", task_model="t"),
    EvaluateConfig: EvaluateConfig(model="m", tasks=("chain_sum",)),
    RecallConfig: RecallConfig(base="m"),
    ImportanceConfig: ImportanceConfig(base="m", task_model=FinetuneConfig(**FULL)),
    EmbedConfig: EmbedConfig(base="m", datasets=("chain_sum", "gcd")),
}


@pytest.mark.parametrize("kind", OTHER, ids=lambda kind: kind.__name__)
def test_digest_changes_with_every_field(kind: type[Settings]) -> None:
    """Two runs that differ in anything must not share a record."""
    assert OTHER[kind].keys() == kind.model_fields.keys(), "a new field wants a value here"
    start = START[kind].model_dump()
    digests = {START[kind].digest}
    for name, value in OTHER[kind].items():
        value = "all" if name == "scope" else value
        # Some mean nothing without others.
        changed = kind.check(**{**start, **(value if isinstance(value, dict) and name in value else {name: value})})
        assert getattr(changed, name) != getattr(START[kind], name)
        digests.add(changed.digest)
    assert len(digests) == len(OTHER[kind]) + 1


def test_setting_that_is_added_renames_no_run() -> None:
    """A digest is of what differs from the defaults, and a new setting's default is what runs did before it."""

    class Grown(RecallConfig):
        added: str = "as before"

    assert Grown(base="m", share=0.2).digest == RecallConfig(base="m", share=0.2).digest
    assert Grown(base="m", share=0.2, added="otherwise").digest != RecallConfig(base="m", share=0.2).digest


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
    *[Profile.load(name) for name in ("quick", "cpu", "paper", "gpu-4bit")],
    Profile.load("cpu").run(method="random", learning_rate=0.5, data_share=0.5),
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
        RecallConfig(base=base).name,
        ImportanceConfig(base=base, task_model=full).name,
        EmbedConfig(base=base, datasets=("chain_sum",)).name,
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


RUN = Profile.load("quick").run().model_dump(exclude={"data_share"})


def refusals(*cases: tuple[Any, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "message"), cases)


@refusals(
    (lambda: Recipe.check(learning_rat=1e-4), "no parameter 'learning_rat': did you mean 'learning_rate'"),
    (lambda: Recipe.check(batchsize=4), "did you mean 'batch_size'"),
    (lambda: FinetuneConfig.check(**FULL, recipe={"warmup": 0.1}), "'recipe.warmup': did you mean 'warmup_"),
    (lambda: FinetuneConfig.check(**FULL, rato=0.1), "'rato': did you mean 'ratio'"),
    (lambda: FinetuneConfig.check(**FULL, localization={"metrik": "kl"}), "'localization.metrik': did you mean 'metr"),
    (lambda: FinetuneConfig.check(dataset="chain_sum", method="full"), "'base' is missing"),
    (lambda: FinetuneConfig.check(**{**FULL, "method": "alpz"}), "no method 'alpz': did you mean 'alps'"),
    (lambda: FinetuneConfig.check(**{**FULL, "dataset": "alpacca"}), "no data set 'alpacca': did you mean 'alpaca'"),
    (lambda: FinetuneConfig.check(**{**FULL, "scope": "head"}), "no scope 'head': did you mean 'heads'"),
    (lambda: FinetuneConfig.check(**{**FULL, "quantization": "4-bit"}), "did you mean '4bit'"),
    (lambda: FinetuneConfig.check(**{**FULL, "quantization": "4bit"}), "4bit.*use scope='heads'"),
    (lambda: FinetuneConfig.check(**{**FULL, "method": "alps"}), "'alps' needs head scores"),
    (lambda: FinetuneConfig.check(**{**FULL, "seed": -1}), "'seed' is -1"),
    (lambda: LocalizeConfig.check(base="m", task_model={**FULL, "seeds": 1}), "seeds': did you mean 'seed'"),
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
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), max_lost=-0.1), "'max_lost' is -0.1"),
    (lambda: LocalizeConfig.check(base="m", task_model="t", max_lost=0.5), "uses no examples"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), template="alpacca"), "'template' is 'alpacca'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), quantization="3bit"), "quantization '3bit'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), split="train"), "'split' is 'train'"),
    (lambda: EvaluateConfig.check(model="m", tasks=("gsm8k",), split="validation"), "'gsm8k' has test questions"),
    (lambda: EvaluateConfig.check(model="m", tasks=("prose",), split="validation"), "'prose' has test questions"),
    (lambda: RecallConfig.check(base="m", share=0), "'share' is 0"),
    (lambda: RecallConfig.check(base="m", factor=2), "'factor': did you mean 'factors'"),
    (lambda: ImportanceConfig.check(base="m", task_model=FULL, questions=0), "'questions' is 0"),
    (lambda: ImportanceConfig.check(base="m", task_model={**FULL, "dataset": "alpaca"}), "no offline data set 'alpaca"),
    (lambda: EmbedConfig.check(base="m", datasets=("gcd",), questions=2), "'questions' is 2"),
    (lambda: Run.check(**RUN, data_share=0), "'data_share' is 0"),
    (lambda: Run.check(**RUN, data_share=1.5), "'data_share' is 1.5"),
    (lambda: Run.check(**RUN, learning_rat=1), "'learning_rat': did you mean 'learning_rate'"),
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


def profile_of(folder: Path, text: str = "", **overrides: Any) -> Profile:
    """Of the settings `MINE` and `text`, as they would stand in a file."""
    path = folder / "mine.yaml"
    path.write_text(MINE + text)
    return Profile.load(str(path), **overrides)


MINE = (
    "results: out\nmodels: [m]\nfamilies: {sums: {datasets: [chain_sum, basic_arithmetic]}, gcds: {datasets: [gcd]}}\n"
)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("profiles/*.yaml")), ids=lambda path: path.stem)
def test_every_profile_can_be_run(path: Path) -> None:
    profile = Profile.load(path.stem)
    assert profile == Profile.load(str(path))
    for method in profile.methods:
        run = profile.run(method=method)
        assert profile.finetuning(run).method == method
        assert profile.evaluation(run).model == profile.finetuning(run)
    assert profile.evaluation(profile.run(method="vanilla")).model == profile.models[0]
    assert len(evaluations(profile)) > 0


@pytest.mark.parametrize("name", ["quick", "cpu", "paper"])
def test_task_models_of_the_profiles_have_everything_trained(name: str) -> None:
    """As the paper's; on a card that holds no more than a quantized base, only the heads can be."""
    profile = Profile.load(name)
    for dataset in (name for family in profile.families.values() for name in family.datasets):
        task_model = profile.localization(profile.run(dataset=dataset)).task_model
        assert (task_model.method, task_model.scope, task_model.ratio) == ("full", "all", 1.0)
        assert (task_model.dataset, task_model.quantization) == (dataset, "none")
    assert Profile.load("gpu-4bit").localization(Profile.load("gpu-4bit").run()).task_model.scope == "heads"


def test_overrides() -> None:
    quick = Profile.load("quick")
    assert Profile.load("quick", models=None, ratio=None, results=None) == quick
    other = Profile.load("quick", models=["m"], ratio=0.5, results=None)
    assert (other.models, other.ratio, other.results) == (("m",), 0.5, quick.results)


def test_defaults_of_a_profile(tmp_path: Path) -> None:
    """The paper's grid: what no profile says."""
    profile = profile_of(tmp_path)
    assert profile.methods == ("full", "no_attn", "random", "layer_consistent", "lora", "alps")
    assert (profile.scope, profile.task_scope, profile.ratio, profile.ratios) == ("all", "all", 0.1, (0.7, 0.5, 0.3))
    assert (profile.metric, profile.metrics) == ("pad", ("cosine", "euclidean", "kl", "pad"))
    assert (profile.head_matrix, profile.tau, profile.ground) == ("product", 1.0, "position")
    assert profile.recipe == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrik: pad\n", "no parameter 'metrik': did you mean 'metric'"),
        ("recipe: {learning_rat: 1}\n", "'recipe.learning_rat': did you mean 'learning_rate'"),
        ("recipes: {heads: {alps: {learning_rat: 1}}}\n", "'learning_rat': did you mean 'learning_rate'"),
        ("recipes: {heads: {alpz: {}}}\n", "no method 'alpz': did you mean 'alps'"),
        ("recipes: {head: {alps: {}}}\n", "no scope 'head': did you mean 'heads'"),
        ("recipes: {alps: {learning_rate: 1}}\n", "recipes.alps.learning_rate"),
        ("recipes: {heads: {random: {batch_size: 100}}}\n", "not a multiple"),
        ("recipes: {heads: {alps@x: {}}}\n", "'alps@x' is for no ratio: write it like alps@0.3"),
        ("recipes: {heads: {alpz@0.3: {}}}\n", "no method 'alpz': did you mean 'alps'"),
        ("recipes: {heads: {defaults: {}}}\n", "no method 'defaults': did you mean 'default'"),
        ("scopes: {alps: head}\n", "no scope 'head'"),
        ("scopes: {alpz: heads}\n", "no method 'alpz'"),
        ("scope: head\n", "no scope 'head'"),
        ("task_scope: head\n", "no scope 'head'"),
        ("methods: [full, alpz]\n", "no method 'alpz': did you mean 'alps'"),
        ("methods: [vanilla]\n", "no method 'vanilla'"),
        ("quantization: 3bit\n", "no quantization '3bit'"),
        ("ratio: 0\n", r"not in \(0, 1\]"),
        ("ratio: much\n", "'ratio' is 'much'"),
        ("ratios: [0.5, 2]\n", r"2.0 is not in \(0, 1\]"),
        ("metrics: [pad, padd]\n", "no metric 'padd': did you mean 'pad'"),
        ("tau: 0\n", "positive temperature"),
        ("seeds: []\n", "'seeds' is"),
        ("models: []\n", "'models' is"),
        ("models: m\n", "'models' is 'm'"),
        ("families: {}\n", "'families' is"),
        ("families: {sums: {dataset: [gcd]}}\n", "'families.sums.dataset': did you mean 'datasets'"),
        ("families: {sums: {datasets: [chainsum]}}\n", "no data set 'chainsum': did you mean 'chain_sum'"),
        ("families: {sums: {datasets: []}}\n", "'families.sums.datasets' is"),
        ("families: {sums: {datasets: [gcd, lcm, chain_sum]}}\n", "'families.sums.datasets' is"),
        ("families: {math: {datasets: [mathinstruct]}}\n", "'mathinstruct' has no task of its own"),
        ("families: {math: {datasets: [mathinstruct], tasks: [gsm9k]}}\n", "no task 'gsm9k': did you mean 'gsm8k'"),
        ("families: {code: {datasets: [magicoder], tasks: [mbpp]}}\n", "allow_code"),
        ("tables: {tabel1: {}}\n", "no table 'tabel1': did you mean 'table1'"),
        ("tables: {table1: {method: [alps]}}\n", "'tables.table1.method': did you mean 'methods'"),
        ("tables: {table1: {methods: [alpz]}}\n", "no method 'alpz'"),
        ("tables: {table1: {families: [sum]}}\n", "no family 'sum': did you mean 'sums'"),
        ("candidates: [gdc]\n", "no offline data set 'gdc': did you mean 'gcd'"),
        ("candidates: [alpaca]\n", "no offline data set 'alpaca'"),
        ("knowledge: [world_fact]\n", "no task 'world_fact': did you mean 'world_facts'"),
        ("search: [{method: alpz, scope: heads, learning_rates: [1]}]\n", "no method 'alpz'"),
        ("search: [{method: alps, scope: head, learning_rates: [1]}]\n", "no scope 'head'"),
        (
            "search: [{method: alps, scope: heads, learning_rate: 1}]\n",
            "'search.0.learning_rate': did you mean 'learning_rates'",
        ),
        ("search: [{method: alps, scope: heads}]\n", "'search.0.learning_rates' is missing"),
    ],
)
def test_profile_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        profile_of(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE.replace("models: [m]\n", ""), "'models' is missing"),
        (MINE.replace("results: out\n", ""), "'results' is missing"),
        ("- a\n- b\n", "holds no settings"),
        ("", "holds no settings"),
        ("a: [", "not readable YAML"),
        ("\x00", "not readable YAML"),
    ],
)
def test_file_refused_in_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Profile.load(str(tmp_path / "mine.yaml"))
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
    profile = profile_of(tmp_path, settings, quantization=quantization)
    task_model = profile.localization(profile.run()).task_model
    assert (task_model.method, task_model.ratio) == ("full", 1.0)
    assert (task_model.scope, task_model.quantization) == ("all", "none")
    heads = profile.finetuning(profile.run(method="alps", scope="heads"))
    assert heads.quantization == quantization
    assert heads.localization == profile.localization(profile.run())


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_task_scope(quantization: str, tmp_path: Path) -> None:
    """In scope heads the task model is trained on the base as the profile loads it, and by that scope's recipe."""
    text = "task_scope: heads\nrecipes: {heads: {default: {learning_rate: 0.5}}}\n"
    profile = profile_of(tmp_path, text, quantization=quantization, scope="heads")
    task_model = profile.localization(profile.run()).task_model
    assert task_model == profile.finetuning(profile.run(method="full", scope="heads"))
    assert (task_model.scope, task_model.quantization) == ("heads", quantization)
    assert task_model.recipe.learning_rate == 0.5


def test_named_task_model(tmp_path: Path) -> None:
    profile = profile_of(tmp_path)
    assert profile.localization(profile.run(), "mine").task_model == "mine"


def test_finetuning_takes_what_the_method_needs() -> None:
    """A setting that changes nothing must not make another run of the same thing."""
    quick = Profile.load("quick", ratio=0.1)
    other = Profile.load("quick", ratio=0.3)
    for name, method in METHODS.items():
        config = quick.finetuning(quick.run(method=name))
        assert (config.localization is not None) == method.uses_scores
        assert (config == other.finetuning(other.run(method=name))) == (not method.uses_ratio)
        assert (config == quick.finetuning(quick.run(method=name, heads_from="gcd"))) == (not method.uses_scores)
        no_task_model = not method.uses_scores or (method.metric or ("",))[0] in ("scale_norm", "hifi")
        assert (config == quick.finetuning(quick.run(method=name, source="data_10pct"))) == no_task_model
        own = not method.uses_scores or method.metric is not None
        assert (config == quick.finetuning(quick.run(method=name, metric="kl"))) == own


@pytest.mark.parametrize("method", METHODS)
def test_choice_follows_the_training_seed_where_heads_are_drawn(method: str, tmp_path: Path) -> None:
    """Another draw with every seed, and none of them by chance that of the examples; nothing of it elsewhere."""
    profile = profile_of(tmp_path, "scope: heads\nchoice_seed: 700\n")
    seeds = [profile.finetuning(profile.run(method=method, seed=seed)).choice_seed for seed in (0, 1, 5)]
    assert seeds == ([700, 701, 705] if METHODS[method].draws else [0, 0, 0])


# One run of a profile's grid


def changes(one: Any, other: Any, at: str = "") -> dict[str, Any]:
    """{place: new value} where two configurations differ, as they are written out."""
    if isinstance(one, dict) and isinstance(other, dict):
        places = [changes(one.get(key), other.get(key), f"{at}.{key}".lstrip(".")) for key in one.keys() | other.keys()]
        return {place: value for found in places for place, value in found.items()}
    return {} if one == other else {at: other}


TASK_MODEL = "localization.task_model"

#: For every axis of `Run`: another value, and all that it changes of the fine-tuning and of the evaluation of alps.
AXES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "base": ("n", {"base": "n", "localization.base": "n", f"{TASK_MODEL}.base": "n"}, {}),
    "dataset": ("gcd", {"dataset": "gcd", f"{TASK_MODEL}.dataset": "gcd"}, {"tasks": ["gcd"]}),
    "method": ("bottom", {"method": "bottom"}, {}),
    "ratio": (0.3, {"ratio": 0.3}, {}),
    "scope": ("all", {"scope": "all", "recipe.learning_rate": 2e-5}, {}),
    "seed": (4, {"seed": 4, f"{TASK_MODEL}.seed": 4}, {}),
    "metric": ("kl", {"localization.metric": "kl"}, {}),
    "head_matrix": ("concat", {"localization.head_matrix": "concat"}, {}),
    "heads_from": ("gcd", {f"{TASK_MODEL}.dataset": "gcd"}, {}),
    "source": ("data_10pct", {f"{TASK_MODEL}.recipe.max_steps": 4}, {}),
    "quantization": ("4bit", {"quantization": "4bit"}, {"quantization": "4bit"}),
    "data_share": (0.5, {"recipe.max_steps": 20}, {}),
    "learning_rate": (0.7, {"recipe.learning_rate": 0.7}, {}),
    "max_steps": (9, {"recipe.max_steps": 9}, {}),
    "examples": (5, {"recipe.examples": 5, f"{TASK_MODEL}.recipe.examples": 5}, {}),
}


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_changes_its_part_and_nothing_else(axis: str, tmp_path: Path) -> None:
    assert AXES.keys() == Run.model_fields.keys(), "a new axis wants a value here"
    text = "scope: heads\nrecipe: {max_steps: 40}\nrecipes: {heads: {default: {learning_rate: 0.001}}}\n"
    profile = profile_of(tmp_path, text)
    value, of_training, of_evaluation = AXES[axis]
    usual, other = profile.run(), profile.run(**{axis: value})
    assert changes(profile.finetuning(usual).dump(), profile.finetuning(other).dump()) == of_training
    own = {f"model.{place}": new for place, new in of_training.items()}
    assert changes(profile.evaluation(usual).dump(), profile.evaluation(other).dump()) == {**own, **of_evaluation}
    localized = {place.removeprefix("localization."): new for place, new in of_training.items() if "locali" in place}
    assert changes(profile.localization(usual).dump(), profile.localization(other).dump()) == localized
    assert profile.run(**{axis: None}) == usual, "None leaves it to the profile"


def test_a_run_takes_the_profile_s_own(tmp_path: Path) -> None:
    text = (
        "methods: [alps, lora]\nscope: all\nscopes: {random: heads}\nratio: 0.2\nmetric: kl\nhead_matrix: concat\n"
        "seeds: [3, 4]\nquantization: none\n"
    )
    profile = profile_of(tmp_path, text)
    run = profile.run()
    assert (run.base, run.dataset, run.heads_from, run.method) == ("m", "chain_sum", "chain_sum", "alps")
    assert (run.ratio, run.scope, run.seed, run.metric, run.head_matrix) == (0.2, "all", 3, "kl", "concat")
    assert (run.source, run.quantization, run.data_share) == ("full", "none", 1.0)
    assert (run.learning_rate, run.max_steps, run.examples) == (None, None, None)
    assert profile.run(method="random").scope == "heads"
    assert profile.run(method="random", scope="all").scope == "all"
    # Nothing but LoRA is trained by these, whatever the profile's scope.
    assert {profile.run(method=name).scope for name in ("lora", "lora_matched")} == {"heads"}
    # Heads are found where they are trained, unless another place is said.
    assert profile.run(dataset="gcd").heads_from == "gcd"
    assert profile.run(dataset="gcd", heads_from="chain_sum").heads_from == "chain_sum"


@refusals(
    (lambda profile: profile.run(method="alpz"), "no method 'alpz': did you mean 'alps'"),
    (lambda profile: profile.run(method="vanila"), "did you mean 'vanilla'"),
    (lambda profile: profile.run(scope="head"), "no scope 'head'"),
    (lambda profile: profile.run(source="ful"), "no source 'ful': did you mean 'full'"),
    (lambda profile: profile.run(heads_form="gcd"), "'heads_form': did you mean 'heads_from'"),
    (lambda profile: profile.run(data_share=2), "'data_share' is 2"),
    (lambda profile: profile.finetuning(profile.run(learning_rate=-1)), "'learning_rate' is -1"),
    (lambda profile: profile.finetuning(profile.run(max_steps=0)), "'max_steps' is 0"),
    (lambda profile: profile.finetuning(profile.run(method="vanilla")), "no method 'vanilla'"),
    (lambda profile: profile.finetuning(profile.run(dataset="gdc")), "no data set 'gdc': did you mean 'gcd'"),
    (lambda profile: profile.finetuning(profile.run(heads_from="gdc")), "no data set 'gdc'"),
    (lambda profile: profile.finetuning(profile.run(metric="padd")), "no metric 'padd'"),
    (
        lambda profile: profile.finetuning(profile.run(method="lora", scope="all")),
        "LoRA on q, k and v and nothing else",
    ),
    (lambda profile: profile.finetuning(profile.run(source="ready_made")), "no ready-made model for 'smollm2-135m'"),
    (lambda profile: profile.evaluation(profile.run(), limit=0), "'limit' is 0"),
    (lambda profile: profile.evaluation(profile.run(), tasks=[]), "'tasks' is"),
    (lambda profile: profile.evaluation(profile.run(), split="dev"), "'split' is 'dev'"),
    (lambda profile: profile.importance("alpaca"), "no offline data set 'alpaca'"),
)
def test_run_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(Profile.load("quick"))
    assert "\n" not in str(caught.value)


# Where the task model comes from (Table 10)


SOURCED = "recipe: {max_steps: 40}\nrecipes: {heads: {default: {learning_rate: 0.001}}}\nready_made: {m: m-instruct}\n"


def test_sources_of_table_10(tmp_path: Path) -> None:
    """Only the task model is another; heads are trained as always."""
    profile = profile_of(tmp_path, SOURCED)
    tuned = {source: profile.finetuning(profile.run(source=source)) for source in SOURCES}
    assert tuned.keys() == {"full", "ready_made", "data_10pct", "attn_only_10pct"}
    for config in tuned.values():
        assert {place.split(".")[0] for place in changes(tuned["full"].dump(), config.dump())} <= {"localization"}
    made = {source: config.localization.task_model for source, config in tuned.items()}
    assert made["ready_made"] == "m-instruct"
    assert changes(made["full"].dump(), made["data_10pct"].dump()) == {"recipe.max_steps": 4}
    assert changes(made["full"].dump(), made["attn_only_10pct"].dump()) == {
        "scope": "heads",
        "recipe.learning_rate": 0.001,
    }
    for source in SOURCES:
        run = profile.task_model(profile.run(source=source))
        assert (run is None) == (source == "ready_made")
        assert run is None or profile.finetuning(run) == made[source]


def test_a_tenth_of_the_data_is_a_tenth_of_the_steps_or_of_the_examples(tmp_path: Path) -> None:
    """Passes over the data stay as many; what is not a whole step is rounded up."""
    for text, changed in (
        ("recipe: {max_steps: 41}\n", {"recipe.max_steps": 5}),
        ("recipe: {max_steps: 3}\n", {"recipe.max_steps": 1}),
        ("recipe: {epochs: 2}\n", {"recipe.data_share": 0.1}),
    ):
        profile = profile_of(tmp_path, text)
        full = profile.localization(profile.run()).task_model
        tenth = profile.localization(profile.run(source="data_10pct")).task_model
        assert changes(full.dump(), tenth.dump()) == changed


# Recipes by scope and method


def test_recipes_by_scope_and_method(tmp_path: Path) -> None:
    """What is said of a method counts more than of its scope, that more than of all, and what is asked for most."""
    text = (
        "recipe: {max_steps: 40, learning_rate: 0.1, weight_decay: 0.5}\n"
        "recipes: {heads: {default: {learning_rate: 0.2, warmup_ratio: 0.3}, alps: {learning_rate: 0.4}}}\n"
    )
    profile = profile_of(tmp_path, text)

    def recipe(**asked: Any) -> tuple[float, float, float, int]:
        found = profile.finetuning(profile.run(**asked)).recipe
        return found.learning_rate, found.warmup_ratio, found.weight_decay, found.max_steps

    assert recipe(method="alps", scope="all") == recipe(method="full", scope="all") == (0.1, 0.1, 0.5, 40)
    assert recipe(method="full", scope="heads") == recipe(method="lora") == (0.2, 0.3, 0.5, 40)
    assert recipe(method="alps", scope="heads") == (0.4, 0.3, 0.5, 40)
    assert recipe(method="alps", scope="heads", learning_rate=0.7, max_steps=3) == (0.7, 0.3, 0.5, 3)
    # The task model of a run is trained by its own recipe, not by the run's.
    run = profile.run(method="alps", scope="heads", learning_rate=0.7, max_steps=3)
    assert profile.localization(run).task_model == profile.finetuning(profile.run(method="full", scope="all"))


# Localizations and evaluations


def test_localization_of_a_method_with_a_metric_of_its_own(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, "tau: 2.0\nground: value\n")
    alps, l2 = (profile.localization(profile.run(method=name)) for name in ("alps", "l2"))
    assert (alps.metric, alps.head_matrix, alps.tau, alps.ground) == ("pad", "product", 2.0, "value")
    assert (l2.metric, l2.head_matrix, l2.tau, l2.ground) == ("l2", "concat", 1.0, "position")
    assert l2.task_model == alps.task_model
    # The profile's temperature and ground are its metric's: another one is taken as the paper has it.
    kl = profile.localization(profile.run(metric="kl"))
    assert (kl.metric, kl.tau, kl.ground) == ("kl", 1.0, "position")


def test_evaluation_asks_the_family_s_tasks(tmp_path: Path) -> None:
    paper, mine = Profile.load("paper"), profile_of(tmp_path, "limit: 30\n")
    for dataset in ("mathinstruct", "camel_math"):
        run = paper.run(dataset=dataset)
        assert paper.evaluation(run).tasks == ("gsm8k", "hendrycks_math")
        assert paper.evaluation(run, ["mmlu"]).tasks == ("mmlu",)
    for dataset in ("chain_sum", "basic_arithmetic", "spell_backward"):
        assert mine.evaluation(mine.run(dataset=dataset)).tasks == (dataset,)
    assert [mine.family(name) for name in ("basic_arithmetic", "gcd", "lcm")] == ["sums", "gcds", None]
    config = mine.evaluation(mine.run())
    assert (config.limit, config.split) == (30, "test")
    config = mine.evaluation(mine.run(), split="validation", limit=7)
    assert (config.limit, config.split) == (7, "validation")


def test_runs_about_the_whole_profile(tmp_path: Path) -> None:
    profile = profile_of(tmp_path, "head_matrix: concat\n")
    assert profile.recall() == RecallConfig(base="m")
    assert profile.importance().task_model == profile.localization(profile.run()).task_model
    assert profile.importance().head_matrix == "concat"
    assert profile.importance("gcd").task_model.dataset == "gcd"
    assert profile.embedding().datasets == ("chain_sum", "basic_arithmetic", "gcd")


def test_device_and_precision_of_a_profile_are_those_of_its_runs(tmp_path: Path) -> None:
    plain, mine = profile_of(tmp_path), profile_of(tmp_path, device="cuda", eval_precision="float16")
    for profile, device, precision in ((plain, "auto", resolved_precision("auto")), (mine, "cuda", "float16")):
        alps, base = (profile.evaluation(profile.run(method=name)) for name in ("alps", "vanilla"))
        assert (alps.precision, base.precision) == (precision, precision)
        hifi = profile.localization(profile.run(method="hifi"))
        runs = [alps, base, alps.model.recipe, alps.model.localization.task_model.recipe, hifi, profile.importance()]
        assert {run.device for run in [*runs, profile.embedding()]} == {device}
        assert alps.model.localization.device == "auto"  # of weights: no model is run
    own = profile_of(tmp_path, device="cuda", recipe={"device": "cpu"})
    assert (own.finetuning(own.run()).recipe.device, own.evaluation(own.run()).device) == ("cpu", "cuda")


@pytest.mark.parametrize("asked", [{}, {"metric": "scale_norm", "head_matrix": "result"}])
def test_device_of_a_localization_that_runs_no_model_is_refused(asked: dict[str, str]) -> None:
    with pytest.raises(UserError, match="of weights and runs no model: leave device out"):
        LocalizeConfig.check(base="m", task_model="t", device="cpu", **asked)


@pytest.mark.parametrize("name", ["paper", "gpu-4bit"])
def test_profiles_for_gpus_stop_without_one_and_evaluate_all_models_alike(name: str) -> None:
    profile = Profile.load(name)
    for run in (profile.run(method="vanilla"), profile.run(method="full"), profile.run(method="alps")):
        config = profile.evaluation(run)
        assert (config.precision, config.device) == ("bfloat16", "cuda")


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
    namespace |= {"run": Profile.load("quick").run(), "config": Profile.load("quick").recall()}
    check_parameters(namespace, KNOWN)
    check_parameters(namespace, KNOWN)
