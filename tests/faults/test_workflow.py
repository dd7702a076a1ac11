"""The whole workflow, killed at random moments and started again, with a run that fails, and twice at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from tiny_models import tiny_checkpoint

from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_record
from alps_repro.localization.scores import HeadScores

pytestmark = pytest.mark.long

#: A kill each, a random while after so many jobs of that start have begun: before any, in the first two, and later on.
KILLS = (0, 2, 3, 1, 3, 2)
SETTINGS = {
    "families": {"sums": {"datasets": ["chain_sum"]}},
    "tables": {"table1": {"methods": ["full", "random", "alps"]}},
    "scope": "heads",
    "limit": 4,
    "threads": 1,
    "recipe": {"learning_rate": 1e-3, "batch_size": 2, "micro_batch_size": 2, "max_steps": 2, "checkpoint_steps": 1},
}

#: The same runs without a workflow, in one process.
THROUGH = """
import sys
from alps_repro.analysis.claims import write_claims
from alps_repro.experiments.grid import evaluations
from alps_repro.analysis.figures import write_figure
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.runs import evaluate_run
from alps_repro.analysis.tables import write_paper_table

profile = Profile.load(sys.argv[1], results=sys.argv[2])
for cell in evaluations(profile).values():
    evaluate_run(cell.config, profile.results, progress=False)
write_paper_table(profile, "table1")
write_figure(profile, "figure5")
write_claims(profile)
"""

#: The notebook of each kind of run (the task model has one of its own, other models are made where they are evaluated),
#: and how the copy of one ends that is being executed.
NOTEBOOK = {"localize": "01_localize_heads", "finetune": "02_finetune", "evaluate": "03_evaluate"}
UNFINISHED = ".unfinished.ipynb"

#: What differs from run to run: times, memory, host.
VARIES = {"seconds", "peak_memory_bytes", "finished", "training_seconds", "processor", "system", "gpu", "threads"}


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(own) for key, own in value.items() if key not in VARIES}
    return [lasting(own) for own in value] if isinstance(value, list) else value


def records(results: Path) -> dict[str, Any]:
    return {path.name: lasting(json.loads(path.read_text())) for path in sorted((results / "records").glob("*.json"))}


@dataclass
class World:
    """A folder with a base model, its profile and its results.

    said: the output of every start. killed: how many of them. taken: what was taken away between them.
    """

    folder: Path
    said: list[str] = field(default_factory=list)
    killed: int = 0
    taken: set[str] = field(default_factory=set)

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def profile(self, name: str = "profile", **settings: Any) -> Path:
        path = self.folder / f"{name}.yaml"
        own = {"results": str(self.results), "models": [str(self.folder / "base")]}
        path.write_text(yaml.safe_dump({**SETTINGS, **own, **settings}))
        return path

    def start(self, profile: Path) -> tuple[subprocess.Popen, Path]:
        """`alps-repro reproduce` in a process group of its own; and the file of what it says."""
        self.said.append("")
        output = self.folder / f"start-{len(self.said)}.log"
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "alps_repro.cli", "reproduce", str(profile)],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, output

    def finish(self, profile: Path) -> tuple[int, str]:
        process, output = self.start(profile)
        code = process.wait(timeout=280)
        return code, output.read_text()

    def check_whole(self) -> None:
        """Whatever has its name is whole; what is being written has another, and is in nobody's way."""
        for path in (self.results / "records").glob("*.json"):
            load_record(path)
        for path in (self.results / "scores").glob("*.json"):
            HeadScores.load(path)
        for path in (self.results / "samples").glob("*.jsonl"):
            assert all(json.loads(line) for line in path.read_text().splitlines())
        for path in (self.results / "notebooks").glob("*.ipynb"):
            if not path.name.endswith(UNFINISHED):
                nbformat.read(path, 4)
        for path in (self.results / "figures").glob("*.*"):
            content = path.read_bytes()
            assert content.endswith(b"</svg>\n" if path.suffix == ".svg" else b"IEND\xaeB`\x82"), path
        for path in (self.results / "tables").glob("*.tex"):
            assert path.read_text().endswith("\\end{tabular}\n")


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def kill_at_random(world: World, profile: Path, begun: int, draw: random.Random) -> None:
    """Start the workflow; kill all of its processes a random while after it has begun so many jobs."""
    process, output = world.start(profile)
    while process.poll() is None and output.read_text().count(" ...\n") < begun:
        time.sleep(0.05)
    time.sleep(draw.uniform(0, 3))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        world.killed += 1
    elif process.returncode == 0:  # it was faster: something is taken away again, so that there is something to kill
        path = draw.choice(sorted((world.results / "records").glob("evaluate-*.json")))
        world.taken.add(path.stem.replace("evaluate-", "evaluating ", 1))
        path.unlink()
        (world.results / "tables" / "table1.csv").unlink()  # while the table is there, nothing asks for the record
    process.wait()
    world.said[-1] = output.read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A workflow that has been killed at all of `KILLS`, and then ran to its end."""
    world = World(tmp_path_factory.mktemp("world"))
    tiny_checkpoint(world.folder / "base")
    profile, draw = world.profile(), random.Random(7)
    while world.killed < len(KILLS):
        kill_at_random(world, profile, KILLS[world.killed], draw)
        world.check_whole()
        assert "Error" not in world.said[-1], world.said[-1]
    code, said = world.finish(profile)
    assert code == 0, said
    world.said[-1] = said
    return world


def test_killed_workflow_ends_as_if_never_stopped(world: World) -> None:
    through = world.folder / "through"
    command = [sys.executable, "-c", THROUGH, str(world.profile()), str(through)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert world.killed == len(KILLS) == 6
    world.check_whole()
    # Full fine-tuning twice (task model, and heads alone), random and alps; four evaluations, one localization.
    assert len(records(through)) == 9
    assert records(world.results) == records(through)
    for made in ("table1.csv", "table1.md", "table1.tex"):
        assert (world.results / "tables" / made).read_bytes() == (through / "tables" / made).read_bytes()
    for made in ("figures/figure5.svg", "figures/figure5.png", "claims.csv", "claims.md"):
        assert (world.results / made).read_bytes() == (through / made).read_bytes(), made
    for path in sorted(through.glob("models/*/*.safetensors")) + sorted(through.glob("samples/*")):
        assert (world.results / path.relative_to(through)).read_bytes() == path.read_bytes()
    left = [path.name for path in (world.results / "models").iterdir()]
    assert not [name for name in left if name.endswith((".unfinished", ".checkpoints"))]
    # Nothing failed; a copy that was not finished is of a run that was recorded when it was killed.
    copies = {path.name for path in (world.results / "notebooks").iterdir()}
    assert not [name for name in copies if name.endswith(".failed.ipynb")]
    named = [name.removesuffix(".json").split("-", 1) for name in records(world.results)]
    runs = {f"{NOTEBOOK[kind]}-{name}" for kind, name in named if kind != "finetune" or "-full-all-" in name}
    assert {name.removesuffix(UNFINISHED).removesuffix(".ipynb") for name in copies} == {*runs, "06_report"}


def test_what_was_done_before_a_kill_is_not_done_again(world: World) -> None:
    """A run that was told to be done is in no later start."""
    begun: set[str] = set()
    done: set[str] = set()
    runs = ("evaluating ", "fine-tuning ", "localizing ")
    for said in world.said[: world.killed + 1]:
        lines = said.splitlines()
        begins = {line.removesuffix(" ...") for line in lines if line.endswith(" ...") and line.startswith(runs)}
        assert not done & begins - world.taken
        begun |= begins
        ended = [line.split("] ", 1)[1].removesuffix(": done") for line in lines if line.endswith(": done")]
        done |= {name for name in ended if name.startswith(runs)}
    assert len(begun) == 6
    assert done <= begun  # a kill between a run's end and the word of it leaves it out of `done`
    assert sum(": done" in said for said in world.said[: world.killed]) >= 2, "some kills came after a run's end"
    assert "everything: done" in world.said[world.killed]


def test_run_that_fails_is_told_and_leaves_the_rest(world: World) -> None:
    """A method whose training diverges: Table 1 waits for it, Table 3 does not need it."""
    hot = {"layer_consistent": {"learning_rate": 1e30, "max_grad_norm": 1e30, "max_steps": 4}}
    profile = world.profile(
        "failing",
        tables={"table1": {"methods": ["full", "random", "alps", "layer_consistent"]}, "table3": {}},
        ratios=[],
        recipes={"heads": hot},
    )
    before = records(world.results)
    made = [world.results / "tables" / f"{table}.csv" for table in ("table1", "table3")]
    for path in made[0].parent.glob("table1.*"):
        path.unlink()
    code, said = world.finish(profile)
    assert code == 2
    (told,) = [line for line in said.splitlines() if line.startswith("failed: ")]
    assert told.startswith("failed: finetune ")
    assert "layer_consistent" in told
    assert "The loss became " in told
    assert said.splitlines()[-1].startswith("alps-repro: 1 run of the profile failed, what does not need it is in ")
    assert [path.exists() for path in made] == [False, True]
    assert (world.results / "figures" / "figure4.png").exists()
    failed = {name for name in records(world.results) if name.endswith(".failed.json")}
    assert len(failed) == 1
    assert {name: own for name, own in records(world.results).items() if name not in failed} == before
    world.check_whole()


def test_two_workflows_at_once_do_each_run_once(world: World) -> None:
    """The second waits for the first and finds everything done."""
    before = {name: own for name, own in records(world.results).items() if not name.endswith(".failed.json")}
    settings = Profile.load(str(world.profile()))
    random_run = settings.evaluation(settings.run(method="random"))
    (world.results / "records" / f"evaluate-{random_run.name}.json").unlink()
    both = [world.start(world.profile()) for _ in range(2)]
    codes = [process.wait(timeout=280) for process, _ in both]
    said = [output.read_text() for _, output in both]
    assert codes == [0, 0], said
    assert sum("waiting for it" in text for text in said) == 1
    assert sum(f"evaluating {random_run.name} ..." in text for text in said) == 1
    after = {name: own for name, own in records(world.results).items() if not name.endswith(".failed.json")}
    assert after == before
    assert (world.results / "tables" / "table1.csv").exists()
    world.check_whole()
