"""Hostile and malformed inputs: each either works or is refused in one sentence, soon, and leaves other files alone."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tiny_models import tiny_checkpoint, tiny_model

from alps_repro import HeadLayout, HeadSelection, UserError, load_model, localize
from alps_repro.data.datasets import HUB, training_examples
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.configure import Run
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.provenance import provenance
from alps_repro.experiments.records import Cost, Record, load_record, record_path
from alps_repro.localization.scores import HeadScores
from alps_repro.models.files import INDEX, SINGLE
from alps_repro.models.folders import ADAPTER
from alps_repro.settings import Settings
from alps_repro.training.recipe import Recipe
from alps_repro.tuner.rows import AlpsConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
LAYOUT = HeadLayout("llama", layers=2, heads=4, groups=2, head_dim=8, hidden_size=32)


def inputs(count: int) -> Callable:
    """As many generated inputs, the same ones in every run."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# --- the property ----------------------------------------------------------------------------------------------------


class Hung(BaseException):
    """Not an `Exception`, so that no `except` on the way takes it for a refusal."""


@contextmanager
def soon(seconds: int = 20) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hung(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def stands(call: Callable, *args: Any, **kwargs: Any) -> Any:
    """What the call gives, or None where it is refused in one line; whatever else is raised fails the test."""
    with soon(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*args, **kwargs)
        except UserError as error:
            message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 20_000
    return None


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """A configuration may ask for any size; the machine that runs the tests shall not pay for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def listing(folder: Path, but: Path) -> dict[str, Any]:
    paths = [path for path in folder.rglob("*") if path != but and but not in path.parents]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None for p in paths}


@pytest.fixture
def inside(tmp_path, monkeypatch) -> Iterator[Callable[[], Path]]:
    """Makes a new folder for each input; whatever lies around these folders must be the same after the test.

    Relative names lead out of them too, since the working directory is around them.
    """
    folder = tmp_path / "around" / "inside"
    folder.mkdir(parents=True)
    (tmp_path / "around" / "secret.json").write_text('{"schema_version": 1}')
    monkeypatch.chdir(tmp_path / "around")
    before, numbers = listing(tmp_path, folder), itertools.count()

    def new() -> Path:
        own = folder / str(next(numbers))
        own.mkdir()
        return own

    yield new
    assert listing(tmp_path, folder) == before


# --- what is generated -----------------------------------------------------------------------------------------------

NAMES = [
    "",
    ".",
    "..",
    "../secret.json",
    "../../outside",
    "/etc/passwd",
    "/dev/null",
    "~/x",
    "a/b",
    "a\nb",
    "a\r\nb\u2028c",
    "\x00",
    "x\x00.yaml",
    "x" * 5000,
    "\ud800",
    "$(touch hacked)",
    "%s{0}{x}",
    "cls",
    "self",
    "__class__",
    "nan",
    "1e999",
    "смотри",
    "inside",
]

names = st.sampled_from(NAMES) | st.text(max_size=12)
numbers = (
    st.sampled_from([0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**12, 10**400, 0.0, -0.0, 1e-320, 1e308])
    | st.integers(-9, 9)
    | st.floats()
)
scalars = st.none() | st.booleans() | numbers | names
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=6)

#: JSON that no Python value stands for: too deep for the parser's stack, too long for `int`, no JSON at all.
BROKEN: list[str] = [
    "",
    "{",
    "null",
    "[" * 100_000,
    '{"heads":' * 50_000,
    "1" * 5000,
    '{"layout": 1' + "0" * 5000 + "}",
    "\ufeff{}",
]


def paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The places within nested dictionaries and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from paths(inner, (*at, key))


@st.composite
def changed(draw: st.DrawFn, whole: Any, replacement: st.SearchStrategy = values) -> Any:
    """A JSON value with up to three places replaced, dropped or added to."""
    whole = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(whole))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        place = whole
        for key in way:
            place = place[key]
        what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if what == "replace":
            place[last] = draw(replacement)
        elif what == "drop":
            del place[last]
        elif isinstance(place, dict):
            place[draw(names)] = draw(replacement)
        else:
            place.append(draw(replacement))
    return whole


def text_of(whole: Any) -> st.SearchStrategy[str]:
    """A JSON file: changed, cut off, or none at all."""
    sound = json.dumps(whole)
    return st.one_of(
        changed(whole).map(json.dumps),
        changed(whole).map(json.dumps),
        st.integers(0, len(sound)).map(lambda end: sound[:end]),
        values.map(json.dumps),
        st.sampled_from(BROKEN),
    )


@st.composite
def bytes_of(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file's bytes, some of them flipped, cut off, or pushed in; those at its start more often."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(400, len(content))) | st.integers(0, len(content)))
        what = draw(st.sampled_from(["flip", "flip", "cut", "push"]))
        if what == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del content[at:]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


@st.composite
def tensors_of(draw: st.DrawFn, sound: bytes) -> bytes:
    """A safetensors file with a header that lies."""
    (length,) = struct.unpack("<Q", sound[:8])
    header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    what = draw(st.sampled_from(["bytes", "length", "header", "header", "tensor", "tensor", "any"]))
    if what == "bytes":
        return draw(bytes_of(sound))
    if what == "length":
        wrong = draw(st.sampled_from([0, 1, 7, length - 1, length + 1, 10**8, 2**62, 2**63, 2**64 - 1]))
        return struct.pack("<Q", wrong) + sound[8:]
    if what == "header":
        header = draw(changed(header))
    elif what == "any":
        header = draw(values)
    else:
        name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
        tensor = header[name]
        start, end = tensor["data_offsets"]
        field, value = draw(
            st.sampled_from(
                [
                    # The first three hold the same number of bytes, so that the file itself is sound.
                    ("dtype", "I32"),
                    ("dtype", "U32"),
                    ("shape", tensor["shape"][::-1]),
                    ("shape", [(end - start) // 4]),
                    ("dtype", "F8_E4M3"),
                    ("dtype", "C64"),
                    ("dtype", "F4"),
                    ("shape", []),
                    ("shape", [0]),
                    ("shape", [-1, 2]),
                    ("shape", [2**63, 2**63]),
                    ("shape", [2**32, 2**32, 0]),
                    ("data_offsets", [end, start]),
                    ("data_offsets", [0, 2**64 - 1]),
                    ("data_offsets", [start, start]),
                    ("data_offsets", [0, end - start]),
                    ("data_offsets", [-4, 4]),
                ]
            )
        )
        tensor[field] = value
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


# --- settings --------------------------------------------------------------------------------------------------------

FULL = {"base": "m", "dataset": "chain_sum", "method": "full", "ratio": 1.0}
ALPS = {**FULL, "method": "alps", "ratio": 0.1, "localization": {"base": "m", "task_model": FULL}}
SOUND: dict[type[Settings], dict[str, Any]] = {
    Recipe: Recipe().dump(),
    FinetuneConfig: FinetuneConfig.check(**ALPS).dump(),
    LocalizeConfig: LocalizeConfig.check(base="m", task_model=FULL).dump(),
    EvaluateConfig: EvaluateConfig.check(model=ALPS, tasks=["chain_sum", "gsm8k"]).dump(),
    RecallConfig: RecallConfig(base="m").dump(),
    ImportanceConfig: ImportanceConfig.check(base="m", task_model=FULL).dump(),
    EmbedConfig: EmbedConfig(base="m", datasets=("gcd",)).dump(),
    Run: Profile.load("quick").run().dump(),
    Profile: {**Profile.load("cpu").dump(), "seeds": [0]},
}


def runs_of(profile: Profile) -> list[str]:
    """The names of all runs that a profile asks for."""
    return [*evaluations(profile), *(config.name for config in (profile.recall(), profile.embedding()))]


@inputs(160)
@given(
    st.sampled_from(list(SOUND)).flatmap(
        lambda kind: st.tuples(
            st.just(kind),
            changed(SOUND[kind]) | st.dictionaries(names | st.sampled_from(sorted(kind.model_fields)), values),
        )
    )
)
def test_settings(inside, given):
    kind, chosen = given
    made = stands(kind.check, **chosen)
    if made is not None:
        assert len(made.digest) == 10
        assert kind.model_validate_json(json.dumps(made.dump())) == made
    named = [made.name] if hasattr(made, "name") else []
    for name in (stands(runs_of, made) or []) if isinstance(made, Profile) else named:
        # A name of a model, data set or task must not lead a record to another folder.
        path = record_path(Path("records"), "finetune", name)
        assert path.parent == Path("records")
        assert len(os.fsencode(path.name)) < 200


YAML = [
    "a: &a [*a]",
    "&a {recipe: *a}",
    "results: " + "[" * 5000,
    "search_seed: 2020-99-99",
    "search_seed: 0x_",
    "search_seed: !!int ''",
    "search_seed: !!float x",
    "search_seed: !!timestamp x",
    "search_seed: !!binary 'ä'",
    "results: !!python/object/apply:os.system ['touch hacked']",
    "results: !!python/name:os.system",
    "? [1, 2]\n: 3",
    "? {a: 1}\n: 3",
    "<<: 3",
    "cls: 1",
    "self: 1",
    "1: 2",
    "null: 3",
    "search_seed: " + "1" * 5000,
    "%YAML 9.9\n---\na: 1",
    "--- a\n--- b",
    "\t- x",
    "results: |\n a\n b\n",
    "methods: {full: 1}",
    "families: {? [1, 2] : {datasets: [gcd]}}",
    "families: {1: {datasets: [gcd]}}",
    "families: {../x: {datasets: [gcd]}}",
    "tables: {../../x: {}}",
    "tables: {table1: {families: [../x]}}",
    "recipes: {heads: {default: {cls: 1}}}",
    "recipes: {heads: {default: {null: 1}}}",
    "scopes: {full: [heads]}",
    "seeds: [-1]",
    "seeds: [1.5]",
    "choice_seed: -99",
    "choice_seed: 1" + "0" * 4000,
    "ready_made: {smollm2-135m: ../../etc/passwd}",
    "knowledge: [../prose]",
    "search: [{method: full, scope: all, learning_rates: [.nan, .inf, -1, 0]}]",
    "limit: 0",
    "eval_batch_size: 0",
    "threads: 0",
    # Nine times nine of the last: short as a file, endless once written out.
    "\n".join(["a: &a0 [x,x,x,x,x,x,x,x,x]", *(f"b{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]),
    "\n".join(
        ["results: &a0 [x,x,x,x,x,x,x,x,x]", *(f"k{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    )
    + "\nmethods: *a8",
]


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_hostile_yaml(inside, text):
    for start in ("", yaml.safe_dump(SOUND[Profile])):
        (path := inside() / "profile.yaml").write_text(start + text)
        profile = stands(Profile.load, str(path))
        if profile is not None:
            stands(runs_of, profile)


@inputs(80)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass"))
    | changed(SOUND[Profile]).map(lambda profile: yaml.dump(profile).encode(errors="surrogatepass"))
    | values.map(lambda value: yaml.dump(value).encode(errors="surrogatepass"))
)
def test_profile_files(inside, content):
    path = inside() / "profile.yaml"
    path.write_bytes(content)
    profile = stands(Profile.load, str(path))
    if profile is not None:
        stands(runs_of, profile)


@inputs(40)
@given(names | names.map(lambda name: f"{name}.yaml"))
def test_profile_names(inside, name):
    stands(Profile.load, name)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_models_and_data(inside, name):
    inside()
    for call in (
        lambda: load_model(name),
        lambda: localize(name, name),
        lambda: training_examples("alpaca", source=name),
    ):
        assert stands(call) is None
    assert stands(training_examples, name) is None
    assert stands(Profile.load, name) is None


# --- heads and scores ------------------------------------------------------------------------------------------------

heads = st.lists(st.tuples(numbers, numbers) | st.tuples(st.integers(0, 1), st.integers(0, 3)) | values) | values


@inputs(60)
@given(heads)
def test_head_lists(inside, pairs):
    selection = stands(HeadSelection, pairs, LAYOUT)
    config = stands(AlpsConfig, heads=pairs)
    if selection is not None:
        assert all(0 <= layer < 2 and 0 <= head < 4 for layer, head in selection)
        assert config is not None or not len(selection)


SELECTION = {"layout": vars(LAYOUT), "heads": [[0, 1], [1, 3]]}
SCORES = {
    "values": [[0.5] * 4] * 2,
    "layout": vars(LAYOUT),
    "base": "b",
    "task": "t",
    "metric": "pad",
    "head_matrix": "product",
    "tau": 1.0,
    "ground": "position",
}


@inputs(80)
@given(text_of(SELECTION), text_of(SCORES))
def test_files_of_heads_and_scores(inside, selection, scores):
    folder = inside()
    (folder / "heads.json").write_text(selection)
    (folder / "scores.json").write_text(scores)
    stands(HeadSelection.load, folder / "heads.json")
    read = stands(HeadScores.load, folder / "scores.json")
    if read is not None:
        assert len(read.top(0.5)) == 4


# --- records ---------------------------------------------------------------------------------------------------------


def sound_record() -> dict[str, Any]:
    config = EvaluateConfig.check(model=ALPS, tasks=["chain_sum"])
    record = Record(
        kind="evaluate",
        name=config.name,
        status="completed",
        config=config,
        result={"scores": {"chain_sum": 0.5}},
        provenance=provenance(),
        cost=Cost(seconds=1.0, peak_memory_bytes=1),
        finished="2026-01-01T00:00:00+00:00",
    )
    return json.loads(record.model_dump_json())


@inputs(80)
@given(text_of(sound_record()))
def test_records(inside, content):
    folder = inside()
    (folder / "evaluate-x.json").write_text(content)
    record = stands(load_record, folder / "evaluate-x.json")
    if record is not None:
        stands(record.save, folder)  # to wherever its name leads, which must not be out of the folder


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama in a folder; not to be written to."""
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = get_peft_model(tiny_model("llama", max_position_embeddings=1024), AlpsConfig(heads=[(0, 1), (1, 3)]))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


def altered(folder: Path, source: Path, **files: str | bytes | None) -> Path:
    """A folder of links to another's files, but with files of its own."""
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
    return folder


def read_everyhow(base: Path, folder: Path) -> None:
    """As a task's folder, as both sides, and as a model; what is read holds a finite score for every head."""
    for pair in ((base, folder), (folder, folder)):
        scores = stands(localize, *pair)
        assert scores is None or scores.values.shape == (scores.layout.layers, scores.layout.heads)
    loaded = stands(load_model, folder)
    if loaded is not None:
        assert not any(parameter.is_meta for parameter in loaded[0].parameters())


@inputs(45)
@given(data=st.data())
def test_weights(inside, base, data):
    weights = data.draw(tensors_of((base / SINGLE).read_bytes()))
    read_everyhow(base, altered(inside(), base, **{SINGLE: weights}))


#: Sizes that a configuration may ask for; those between would only fill the memory.
sizes = st.sampled_from([0, 1, -1, 2, 3, 5, 8, 31, 33, 64, 65, 10**12, 2**63, 0.5, True, None, "4", [4], {"a": 1}])
CONFIGURED = [
    *({"model_type": t} for t in ["gpt2", "falcon", "phi3", "opt", "gemma3", "bert", "t5", "whisper", "", "../x", 3]),
    *({"num_hidden_layers": n} for n in [0, -1, 1, 3, 10**9, 2**63, 0.5, "2"]),
    *({"num_attention_heads": n} for n in [0, -4, 3, 8, 10**12, 2**63, None]),
    *({"num_key_value_heads": n} for n in [0, -2, 3, 10**12, "2"]),
    *({"head_dim": n} for n in [0, -8, 7, 10**12, 8.0]),
    *({"hidden_size": n} for n in [0, -32, 31, 10**12, [32]]),
    *({"vocab_size": n} for n in [0, -1, 63, 10**12]),
    {"max_position_embeddings": 10**15},
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": 5},
    {"rope_parameters": {"rope_type": "longrope"}},
    {"text_config": {"model_type": "llama"}},
    {"dtype": "os.system"},
    {"_attn_implementation": "nobody/kernel"},
    {"architectures": ["os.system"]},
    {"pad_token_id": 10**6},
]


@pytest.mark.parametrize("setting", CONFIGURED, ids=json.dumps)
def test_hostile_model_configurations(inside, base, setting):
    sound = json.loads((base / "config.json").read_text())
    read_everyhow(base, altered(inside(), base, **{"config.json": json.dumps({**sound, **setting})}))


@inputs(45)
@given(data=st.data())
def test_model_configurations(inside, base, data):
    sound = json.loads((base / "config.json").read_text())
    content = data.draw(
        changed(sound, sizes).map(json.dumps)
        | changed(sound, sizes | names).map(json.dumps)
        | st.tuples(st.sampled_from(sorted(sound)), sizes).map(lambda new: json.dumps({**sound, new[0]: new[1]}))
        | bytes_of(json.dumps(sound).encode())
    )
    read_everyhow(base, altered(inside(), base, **{"config.json": content}))


@inputs(30)
@given(data=st.data())
def test_indices_of_shards(inside, base, data):
    (length,) = struct.unpack("<Q", (base / SINGLE).read_bytes()[:8])
    tensors = [n for n in json.loads((base / SINGLE).read_bytes()[8 : 8 + length]) if n != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "one.safetensors")}
    content = data.draw(text_of(index))
    folder = altered(inside(), base, **{SINGLE: None, INDEX: content})
    shutil.copy(base / SINGLE, folder / "one.safetensors")
    read_everyhow(base, folder)


# --- adapters --------------------------------------------------------------------------------------------------------


ATTACHED = [
    {"base_model_name_or_path": "inside/0"},  # itself
    {"base_model_name_or_path": "inside/../inside/0/."},
    {"base_model_name_or_path": ["a"]},
    {"base_model_name_or_path": {"a": 1}},
    {"base_model_name_or_path": 5},
    {"base_model_name_or_path": "x" * 5000},
    {"base_model_name_or_path": "\x00"},
    {"base_model_name_or_path": "../secret.json"},
    {"peft_type": "LORA"},
    {"peft_type": "XLORA"},
    {"peft_type": "NONE"},
    {"peft_type": ["ALPS"]},
    {"peft_type": None},
    {"task_type": "SEQ_CLS"},
    {"heads": [[0, 1], [1, 2]]},
    {"heads": [[10**30, 1]]},
    {"heads": "ab"},
    {"fingerprint": []},
    {"fingerprint": {"layout": 5}},
    {"fingerprint": {"layout": {"architecture": "a\nb"}}},
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
]


@pytest.mark.parametrize("setting", ATTACHED, ids=range(len(ATTACHED)))
def test_hostile_adapter_settings(inside, base, adapter, setting):
    sound = json.loads((adapter / ADAPTER).read_text())
    read_everyhow(base, altered(inside(), adapter, **{ADAPTER: json.dumps({**sound, **setting})}))


@inputs(60)
@given(data=st.data())
def test_adapter_settings(inside, base, adapter, data):
    sound, folder = json.loads((adapter / ADAPTER).read_text()), inside()
    content = data.draw(text_of(sound))
    folder = altered(folder, adapter, **{ADAPTER: content})
    read_everyhow(base, folder)


@inputs(45)
@given(data=st.data())
def test_adapter_weights(inside, base, adapter, data):
    weights = data.draw(tensors_of((adapter / ADAPTER_WEIGHTS).read_bytes()))
    read_everyhow(base, altered(inside(), adapter, **{ADAPTER_WEIGHTS: weights}))


def test_adapters_that_name_each_other(inside, adapter, base):
    sound, one, two = json.loads((adapter / ADAPTER).read_text()), inside(), inside()
    for own, other in ((one, two), (two, one)):
        altered(own, adapter, **{ADAPTER: json.dumps({**sound, "base_model_name_or_path": str(other)})})
    for folder in (one, two):
        read_everyhow(base, folder)


# --- training data ---------------------------------------------------------------------------------------------------

ROWS = {
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "ultrachat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "camel_math": {"message_1": "a", "message_2": "b"},
}


@inputs(60)
@given(
    st.sampled_from(sorted(ROWS)),
    st.data(),
    st.sampled_from(["jsonl", "json", "csv", "parquet", "txt", "py"]) | st.just("jsonl"),
)
def test_training_data(inside, monkeypatch, name, data, suffix):
    import datasets

    folder = inside()
    # What `datasets` makes of a file lies in its cache, which is as much inside as the file.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    row = ROWS[name]
    line = st.just(json.dumps(row)) | text_of(row) | changed(row).map(json.dumps)
    sound = "\n".join([json.dumps(row)] * 3).encode()
    lines = st.lists(line, min_size=1, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="replace"))
    alike = changed(row).map(lambda row: "\n".join([json.dumps(row)] * 3).encode())
    content = data.draw(lines | alike | alike | bytes_of(sound) | st.binary(max_size=40))
    file = folder / "in" / f"{HUB[name].split}.{suffix}"
    file.parent.mkdir()
    file.write_bytes(content)
    for source in (file, file.parent):
        examples = stands(training_examples, name, source=source)
        if examples is not None:
            assert all(isinstance(value, str) for row in examples for value in row.values())
