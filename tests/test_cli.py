"""The command line: the library's words, its results, and one sentence where something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import tiny_checkpoint

from alps_repro import doctor
from alps_repro.analysis import tables
from alps_repro.cli import app, main
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_records
from alps_repro.experiments.runs import evaluate_run
from alps_repro.localization.scores import HeadScores

SMALL = [f"--set={setting}" for setting in ("max_steps=2", "batch_size=2", "micro_batch_size=2", "learning_rate=1e-3")]


class Ran(NamedTuple):
    status: int
    out: str
    err: str


class Shell:
    """Runs `alps-repro` in this process, as its entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str | Path) -> Ran:
        self.monkeypatch.setattr(sys, "argv", ["alps-repro", *map(str, words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return Ran(int(caught.value.code or 0), *self.capsys.readouterr())


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint(folder / "base")
    tiny_checkpoint(folder / "task", seed=1)
    tiny_checkpoint(folder / "deep", num_hidden_layers=3)
    shutil.copytree(folder / "task", folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (folder / "pickled").mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder that holds a localization; made by the command itself, as a shell would call it."""
    results = tmp_path_factory.mktemp("finished")
    script = Path(sys.executable).with_name("alps-repro")
    words = [str(script), "localize", str(models / "base"), str(models / "task"), f"--results={results}"]
    done = subprocess.run([*words, "--ratio=0.25"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (results / "stdout").write_text(done.stdout)
    return results


def state(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_entry_point() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="alps-repro")
    assert script.load() is main


def test_localize_prints_the_top_heads_and_writes_scores_and_map(finished: Path) -> None:
    lines = (finished / "stdout").read_text().splitlines()
    paths = [Path(line) for line in lines if line.startswith(str(finished))]
    assert [path.suffix for path in paths] == [".json", ".svg", ".png"]
    assert all(path.stat().st_size > 500 for path in paths)
    scores = HeadScores.load(paths[0])
    rows = re.findall(r"│\s+(\d+)\s+│\s+(\d+)\s+│", "\n".join(lines))
    printed = [(int(layer), int(head)) for layer, head in rows]
    assert sorted(printed) == list(scores.top(0.25))
    values = [scores.values[head] for head in printed]
    assert values == sorted(values, reverse=True)
    for value in values:
        assert f"{value:.4g}" in "\n".join(lines)
    assert "2 of 8 heads" in lines[0]


def test_localize_says_the_librarys_words(shell: Shell, models: Path, tmp_path: Path) -> None:
    settings = ["--metric=kl", "--head-matrix=concat", "--tau=0.5"]
    ran = shell("localize", models / "base", models / "task", *settings, "--results", tmp_path)
    assert ran.status == 0
    (record,) = load_records(tmp_path / "records", "localize")
    config = record.config
    assert (config.metric, config.head_matrix, config.tau, config.ground) == ("kl", "concat", 0.5, "position")


def test_localize_says_ties_and_dtypes(models: Path, tmp_path: Path) -> None:
    """One line each on standard error; what was compared in, on standard output, in the record and in the picture."""
    task = Path(shutil.copytree(models / "base", tmp_path / "task"))
    tensors = load_file(task / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][:8] += 1
    save_file({name: t.bfloat16() for name, t in tensors.items()}, task / "model.safetensors", {"format": "pt"})
    script = Path(sys.executable).with_name("alps-repro")
    words = [str(script), "localize", str(models / "base"), str(task), "--ratio=0.25", f"--results={tmp_path}"]
    first, again = (subprocess.run(words, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0)
    warned = [line for line in first.stderr.splitlines() if line.startswith("alps-repro: ")]
    assert len(warned) == 2
    assert warned[0].endswith("both are compared in bfloat16, so that rounding does not count as change.")
    assert "ends among 1 of 7 heads of the same score, 0: these are selected" in warned[1]
    assert warned[1:] == [line for line in again.stderr.splitlines() if line.startswith("alps-repro: ")]
    for done in (first, again):
        assert "both models compared in bfloat16, the coarser of what they are stored in" in done.stdout
    (record,) = load_records(tmp_path / "records", "localize")
    assert record.result["compared_in"] == "bfloat16"
    (picture,) = (tmp_path / "figures").glob("heatmap-*.svg")
    assert picture.stat().st_size > 500


def test_localize_a_copy(shell: Shell, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "same")
    ran = shell("localize", models / "base", tmp_path / "same", "--results", tmp_path)
    assert (ran.status, ran.out) == (2, "")
    assert f"No head of '{tmp_path / 'same'}' differs from '{models / 'base'}'" in ran.err


def test_finetune_evaluate_table(shell: Shell, models: Path, tmp_path: Path) -> None:
    results = f"--results={tmp_path}"
    words = ["finetune", models / "base", "chain_sum", "--method=random", "--scope=heads", *SMALL, results]
    tuned = shell(*words)
    assert tuned.status == 0
    said, model = tuned.out.splitlines()
    (record,) = load_records(tmp_path / "records", "finetune")
    assert re.fullmatch(r"trained 768 of 19,616 parameters in \d+ s, loss \d\.\d{3} to \d\.\d{3}", said)
    assert Path(model) == tmp_path / "models" / record.name
    assert (Path(model) / "adapter_model.safetensors").is_file()
    # YAML alone would read 1e-3 as text.
    assert (record.config.recipe.learning_rate, record.config.recipe.max_steps) == (1e-3, 2)
    assert (record.config.method, record.config.scope) == ("random", "heads")

    asked = shell("evaluate", model, "chain_sum", "spell_backward", "--limit=4", results)
    assert asked.status == 0
    first, second, samples = asked.out.splitlines()
    assert re.fullmatch(r"chain_sum: \d+\.\d\d %", first)
    assert re.fullmatch(r"spell_backward: \d+\.\d\d %", second)
    rows = [json.loads(line) for line in Path(samples).read_text().splitlines()]
    assert {(row["task"], row["doc_id"]) for row in rows} == {
        (task, i) for task in ("chain_sum", "spell_backward") for i in range(4)
    }

    made = shell("table", tmp_path)
    assert made.status == 0
    assert "| chain_sum" in made.out
    assert (tmp_path / "tables" / "summary.md").read_text() in made.out
    for suffix in ("csv", "md", "tex"):
        assert str(tmp_path / "tables" / f"summary.{suffix}") in made.out.splitlines()

    before = state(tmp_path)
    assert shell(*words).out == tuned.out
    assert shell("evaluate", model, "chain_sum", "spell_backward", "--limit=4", results).out == asked.out
    assert shell("table", tmp_path).out == made.out
    assert state(tmp_path) == before, "once is enough"


def test_what_was_lost_is_said(shell: Shell, tmp_path: Path) -> None:
    """Each time, whether the run is made or was there."""
    base, results = tiny_checkpoint(tmp_path / "base", max_position_embeddings=128), f"--results={tmp_path}"
    refused = shell("evaluate", base, "chain_sum", "--limit=4", results)
    assert (refused.status, refused.out) == (2, "")
    assert "4 of 4 prompts do not fit into the model's 128 positions" in refused.err
    asked = [shell("evaluate", base, "chain_sum", "--limit=4", "--max-lost=1", results) for _ in range(2)]
    assert asked[0].out == asked[1].out
    assert asked[0].out.splitlines()[1] == "chain_sum: 4 of 4 prompts were cut from the left to fit into the model"

    long = tiny_checkpoint(tmp_path / "long")
    words = ["finetune", long, "chain_sum", "--method=random", "--scope=heads", *SMALL, "--set=max_length=208", results]
    tuned = shell(*words)
    assert (tuned.status, tuned.out) == (2, "")
    tuned = [shell(*words, "--set=max_lost=1") for _ in range(2)]
    assert tuned[0].out == tuned[1].out
    (record,) = [r for r in load_records(tmp_path / "records", "finetune") if r.status == "completed"]
    rows = record.result["rows"]
    assert rows["cut"] + rows["dropped"] > 0.05 * rows["given"] == 0.05 * 4
    assert f"lost: of 4 rows, {rows['cut']} cut at 208 tokens" in tuned[0].out


def test_ratio_of_a_method_that_has_none_makes_no_other_run(shell: Shell, models: Path, tmp_path: Path) -> None:
    """ALPS' own full run and one that was asked for by name are the same."""
    results = f"--results={tmp_path}"
    assert shell("finetune", models / "base", "chain_sum", "--method=full", *SMALL, results).status == 0
    assert shell("finetune", models / "base", "chain_sum", "--method=alps", "--ratio=0.2", *SMALL, results).status == 0
    methods = [record.config.method for record in load_records(tmp_path / "records", "finetune")]
    assert sorted(methods) == ["alps", "full"]


@pytest.fixture(scope="module")
def profile(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile, all of whose runs are done."""
    folder = tmp_path_factory.mktemp("profile")
    settings = {
        "results": str(folder / "results"),
        "models": [str(models / "base")],
        "families": {"sums": {"datasets": ["chain_sum"]}},
        "tables": {"table1": {"methods": ["full", "alps"]}, "table2": {}},
        "metrics": ["pad"],
        "scope": "heads",
        "ratio": 0.25,
        "limit": 4,
        "recipe": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    for cell in evaluations(Profile.load(str(path))).values():
        evaluate_run(cell.config, folder / "results", progress=False)
    return path


def test_tables_and_figures_of_a_profile(shell: Shell, profile: Path) -> None:
    """All of them, or those that are named; each once, and printed."""
    results = profile.with_name("results")
    for words, names in ((["table2"], ["table2"]), ([], ["table1", "table2", "table11"])):
        shutil.rmtree(results / "tables", ignore_errors=True)
        made = shell("table", profile, *words)
        assert made.status == 0
        assert {path.name for path in (results / "tables").iterdir()} == {
            f"{name}.{suffix}" for name in names for suffix in ("csv", "md", "tex")
        }
        for path in (results / "tables").iterdir():
            assert str(path) in made.out.splitlines()
            assert path.suffix != ".md" or path.read_text() in made.out
    table = tables.paper_table(Profile.load(str(profile)), "table1")
    assert (results / "tables" / "table1.csv").read_text() == table.to_csv(index=False, lineterminator="\n")
    for words in (["figure5"], []):
        drawn = shell("figure", profile, *words)
        assert drawn.status == 0
        paths = [results / "figures" / f"figure5.{suffix}" for suffix in ("svg", "png")]
        assert drawn.out.splitlines() == [str(path) for path in paths]
        assert all(path.stat().st_size > 1000 for path in paths)


def test_folder_has_one_table_whatever_made_its_records(shell: Shell, profile: Path) -> None:
    """A results folder is known by its records/, and its summary needs no profile."""
    made = shell("table", profile.with_name("results"))
    assert made.status == 0
    assert [Path(line).name for line in made.out.splitlines() if line.startswith("/")] == [
        f"summary.{suffix}" for suffix in ("csv", "md", "tex")
    ]


def test_report_cite_verify_plan(shell: Shell, profile: Path, tmp_path: Path) -> None:
    """That each is there and ends well; what it says is tested where it is made."""
    results = profile.with_name("results")
    report = shell("report", profile)
    assert report.status == 0
    assert Path(report.out.strip()).is_file()
    cited = shell("cite", profile, "table1", "alps", "chain_sum", "--model", Profile.load(str(profile)).models[0])
    assert cited.status == 0
    assert "@" in cited.out
    planned = shell("plan", profile, "--card=24")
    assert planned.status == 0
    assert planned.out.startswith("3 finetunings, 1 localizations, 3 evaluations; ")
    (record,) = (results / "records").glob("localize-*.json")
    refused = shell("verify", record, "--results", results)
    assert (refused.status, refused.out) == (2, "")
    assert "holds a record of this run" in refused.err
    verified = shell("verify", record, "--results", tmp_path)
    assert verified.status == 0
    assert verified.out.splitlines()[-1] == "The record is reproduced bit for bit."


PLACES = ("BASE", "TASK", "DEEP", "CUT", "PICKLED", "MINE", "FAR")

ERRORS = [
    ("localize nowhere TASK", "no checkpoint 'nowhere'"),
    ("localize BASE nowhere", "no checkpoint 'nowhere'"),
    ("localize BASE BASE/config.json", "is a file: give the folder"),
    ("localize BASE some/model", "the hub could not provide it"),
    ("localize BASE DEEP", "differ in layers 2 and 3"),
    ("localize BASE CUT", "copy"),
    ("localize BASE PICKLED", "pickled weights"),
    ("localize BASE TASK --metric=padd", "no metric 'padd': did you mean 'pad'"),
    ("localize BASE TASK --head-matrix=produkt", "did you mean 'product'"),
    ("localize BASE TASK --ground=place", "no ground 'place'"),
    ("localize BASE TASK --tau=0", "positive temperature"),
    ("localize BASE TASK --ratio=0", "not in (0, 1]"),
    ("localize BASE TASK --ratio=1.1", "not in (0, 1]"),
    ("finetune nowhere chain_sum --method=random", "no checkpoint 'nowhere'"),
    ("finetune BASE chain_sum --method=alpz", "no method 'alpz': did you mean 'alps'"),
    ("finetune BASE chain_sum --method=random --ratio=0", "not in (0, 1]"),
    ("finetune BASE chainsum --method=random", "no data set 'chainsum': did you mean 'chain_sum'"),
    ("finetune BASE chain_sum --method=random --scope=head", "did you mean 'heads'"),
    ("finetune BASE chain_sum --method=random --quantization=4bit", "use scope='heads'"),
    ("finetune BASE chain_sum --method=random --quantization=3bit --scope=heads", "no quantization '3bit'"),
    ("finetune BASE chain_sum --method=random --seed=-1", "'seed' is -1"),
    ("finetune BASE chain_sum --method=random --set=max_steps", "not NAME=VALUE"),
    ("finetune BASE chain_sum --method=random --set=max_step=2", "did you mean 'max_steps'"),
    ("finetune BASE chain_sum --method=random --set=max_steps=many", "'max_steps' is 'many'"),
    ("finetune BASE chain_sum --method=random --set=betas=[0.9", "is not YAML"),
    ("finetune BASE chain_sum --method=random --set=batch_size=20", "not a multiple"),
    ("finetune BASE chain_sum --task-model=nowhere", "no checkpoint 'nowhere'"),
    ("finetune BASE chain_sum --metric=padd", "no metric 'padd'"),
    ("evaluate nowhere chain_sum", "no checkpoint 'nowhere'"),
    ("evaluate BASE chainsum", "no task 'chainsum': did you mean 'chain_sum'"),
    ("evaluate BASE humaneval", "allow_code"),
    ("evaluate BASE chain_sum --limit=0", "'limit' is 0"),
    ("evaluate BASE chain_sum --limit=-3", "'limit' is -3"),
    ("evaluate BASE chain_sum --max-lost=1.5", "'max_lost' is 1.5"),
    ("finetune BASE rows.jsonl --method=random", "'rows.jsonl' is a file or folder"),
    ("evaluate BASE chain_sum --template=alpacca", "'template' is 'alpacca'"),
    ("evaluate BASE chain_sum --batch-size=0", "'batch_size' is 0"),
    ("table nowhere", "no profile 'nowhere': known are: cpu"),
    ("table BASE", "no profile '"),
    ("table MINE table1", "No run of table1 is in"),
    ("table MINE tabel1", "no table of this profile 'tabel1': did you mean 'table1'"),
    ("table MINE table2", "no table of this profile 'table2'"),
    ("figure MINE figure55", "no figure of this profile 'figure55': did you mean 'figure5'"),
    ("figure MINE", "No run of alps is among the records yet"),
    ("report quik", "did you mean 'quick'"),
    ("cite MINE table1 alps chain_sum", "No run of table1 is in"),
    ("cite MINE table1 alps avg", "no column in table1 'avg': known are: chain_sum"),
    ("cite MINE tabel1 alps avg", "did you mean 'table1'"),
    ("verify nowhere.json", "cannot be read"),
    ("verify BASE/config.json", "has schema version None"),
    ("plan quik", "did you mean 'quick'"),
    ("plan FAR", "The configuration of 'some/model' could not be had"),
    ("reproduce quik", "no profile 'quik': did you mean 'quick'"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=[words for words, _ in ERRORS])
def test_errors_are_one_line_and_touch_nothing(
    shell: Shell, models: Path, finished: Path, tmp_path: Path, words: str, message: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "results")
    for name, base in {"mine": str(models / "base"), "far": "some/model"}.items():
        settings = {"results": str(folder), "models": [base], "families": {"sums": {"datasets": ["chain_sum"]}}}
        (models / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "tables": {"table1": {}}}))
    files = {"MINE": models / "mine.yaml", "FAR": models / "far.yaml"}
    places = {name: str(files.get(name, models / name.lower())) for name in PLACES}
    named = [re.sub(rf"^({'|'.join(PLACES)})\b", lambda m: places[m[0]], word) for word in words.split()]
    results = [f"--results={folder}"] if words.split()[0] in ("localize", "finetune", "evaluate") else []
    before = state(folder)
    ran = shell(*named, *results)
    assert ran.status == 2
    assert ran.out == ""
    # A progress bar may have begun before the error was found; it ends its own line.
    *bars, line = ran.err.strip().splitlines()
    assert line.startswith("alps-repro: ")
    assert message in line
    assert all("%|" in bar or "it/s" in bar or not bar for bar in bars)
    assert "Traceback" not in ran.err
    after = state(folder)
    assert before.items() <= after.items()
    # What may come is the record of the failure itself.
    assert all(name.endswith(".failed.json") for name in set(after) - set(before))


@pytest.mark.parametrize(
    "words",
    [
        *["localize --nope", "localize BASE", "nope", "--nope", "finetune BASE chain_sum --ratio=much", "table --nope"],
        *["figure --nope", "report a b", "cite quick table1", "verify", "plan", "plan quick --card=much"],
        "reproduce a b",
    ],
)
def test_usage_errors(shell: Shell, words: str) -> None:
    ran = shell(*words.split())
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err.startswith("Usage: ")
    assert "Traceback" not in ran.err


def test_error_of_the_command_itself(models: Path, tmp_path: Path) -> None:
    """In a process of its own, where libraries could say something of their own too."""
    script = Path(sys.executable).with_name("alps-repro")
    words = [str(script), "finetune", str(models / "base"), "chain_sum", "--quantization=4bit", "--method=random"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"alps-repro: [^\n]+use scope='heads'\.\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


COMMANDS = [
    "localize",
    "finetune",
    "evaluate",
    "table",
    "figure",
    "reproduce",
    "report",
    "cite",
    "verify",
    "plan",
    "tidy",
    "doctor",
]


def test_every_command_is_tested_here() -> None:
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(shell: Shell, command: str) -> None:
    ran = shell(*command.split(), "--help")
    assert ran.status == 0
    assert ran.err == ""
    assert "Usage: " in ran.out


@pytest.mark.parametrize(
    ("why", "present", "good", "says"),
    [
        (
            "torch is built without CUDA",
            True,
            False,
            "There is a GPU that torch cannot use: torch is built without CUDA;",
        ),
        ("torch is built without CUDA", False, True, "No GPU: torch is built without CUDA; profile quick"),
        ("there is no NVIDIA GPU", False, True, "runs with device 'cuda' stop"),
    ],
)
def test_doctor_says_what_is_wrong_with_a_gpu(
    why: str, present: bool, good: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "unusable", lambda: why)
    monkeypatch.setattr(doctor, "present", lambda: present)
    monkeypatch.setattr(doctor, "hidden", lambda: False)
    found = next(doctor._device())
    assert says in found.text
    assert (found.good, found.needed) == (good, True)


def _smi(text: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, text, "")


@pytest.mark.parametrize(
    ("shown", "built", "good", "says"),
    [
        (
            "Driver Version: 550.54.15   CUDA Version: 12.4 |",
            "12.8",
            True,
            "Driver 550.54.15 for CUDA 12.4; torch is b",
        ),
        ("Driver Version: 550.54.15   CUDA Version: 12.4 |", "13.0", False, "built for CUDA 13.0: update the driver"),
        ("", "12.8", True, "Driver unknown for CUDA unknown; torch is built for CUDA 12.8."),
        ("Driver Version: 550.54.15   CUDA Version: 12.4 |", None, True, "torch is built for CUDA none."),
    ],
)
def test_doctor_knows_driver_and_cuda(
    shown: str, built: str | None, good: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.subprocess, "run", _smi(shown))
    monkeypatch.setattr(torch.version, "cuda", built)
    found = doctor._driver()
    assert says in found.text
    assert found.good == good


def test_doctor_knows_the_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: by what torch would say of two."""
    cards = {"device_count": 2, "mem_get_info": (70 * 2**30, 79 * 2**30), "get_device_name": "NVIDIA H100"}
    for name, value in {**cards, "get_device_capability": (9, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *card, value=value: value)
    lines = [found.text for found in doctor._cards()]
    assert lines[1] == "GPU 1, NVIDIA H100: 70 of 79 GiB free, compute capability 9.0, bfloat16 is fast."
    assert lines[2] == "A run without a launcher uses one of 2 GPUs."
    assert "scope all meta-llama/Llama-3.2-3B; scope heads meta-llama/Llama-3.1-8B." in lines[3]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *card: (7, 5))
    assert next(doctor._cards()).text.endswith("bfloat16 is slow there: train in float32.")


def test_doctor_knows_what_fits() -> None:
    assert "scope all none of the known models; scope heads none" in doctor._fits(1e8)
    assert "scope all meta-llama/Llama-3.1-8B" in doctor._fits(200e9)


def test_doctor_knows_when_bitsandbytes_has_no_library_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._bitsandbytes().good
    monkeypatch.setattr(doctor, "unusable", lambda: None)
    found = doctor._bitsandbytes()
    assert (found.good, found.needed) == (False, False)
    assert "loads no CUDA library" in found.text


def test_device_and_precision_are_those_of_the_run(shell: Shell, models: Path, tmp_path: Path) -> None:
    """GPUs are hidden from the tests: one that is asked for stops the run."""
    results, words = f"--results={tmp_path}", (str(models / "base"), "chain_sum", "--device=cuda")
    asked = {"finetune": ["--method=full", *SMALL], "evaluate": ["--limit=1", "--precision=bfloat16"]}
    for command, own in asked.items():
        ran = shell(command, *words, *own, results)
        assert ran.status == 2
        assert "A GPU is requested (device 'cuda') and none can be used" in ran.err
        (path,) = (tmp_path / "records").glob(f"{command}-*.failed.json")
        record = json.loads(path.read_text())
        assert record["provenance"]["gpu"] is None
        config = record["config"] if command == "evaluate" else record["config"]["recipe"]
        assert config["device"] == "cuda"
        assert config["precision"] == "bfloat16"


def test_doctor_says_a_line_a_thing_and_no_secret(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ran = shell("doctor")
    assert ran.status in (0, 1)
    lines = ran.out.splitlines()
    assert all(re.match(r"(ok     |missing)  \S.*\.$", line) for line in lines)
    for thing in (
        "Python",
        "ackages",
        "memory",
        "Processor: ",
        "bitsandbytes",
        "disk",
        "smollm2-135m",
        "hub can",
        "hub token",
    ):
        assert sum(thing in line for line in lines) == 1, thing
    assert "hf_secret" not in ran.out + ran.err
    assert "A hub token is set." in ran.out
