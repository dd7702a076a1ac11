"""Two processes train what one does, batch for batch; what is saved is saved once, and resumed by both.

The number of examples is a multiple of the batch. Where it is not, one process takes a smaller last step in every
epoch, and several fill it up with the epoch's first examples, as accelerate does: there they differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint

from alps_repro.training.finetune import finetune
from alps_repro.training.recipe import Recipe

ROWS = [{"instruction": f"add {i} and {i % 7}", "response": "so " * (i % 3) + str(i + i % 7)} for i in range(20)]
#: Seven steps over twenty examples; two passes of two examples each a step in one process, one each in two.
SHORT = {
    "max_steps": 7,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "checkpoint_steps": 2,
    "precision": "float32",
}
CASES: dict[str, dict[str, Any]] = {
    "all": {"method": "random", "scope": "all"},
    "heads": {"method": "random", "scope": "heads"},
    "lora": {"method": "lora", "scope": "heads"},
    "checkpointing": {"method": "full", "scope": "all", "recipe": {"gradient_checkpointing": True}},
}
#: Stopped in the fourth step, behind the checkpoint of the second.
STOPPED = {"method": "random", "scope": "all"}

#: Run by every process of the launcher.
SCRIPT = """
import json, os, sys
from pathlib import Path
from datasets import Dataset
from transformers import Trainer
from alps_repro.training import finetune as training
from alps_repro.errors import UserError
from alps_repro.training.recipe import Recipe

base, folder, given = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
rank, save, step = int(os.environ["RANK"]), training.save, Trainer.training_step

def noted_save(tuned, tokenizer, output, *rest):
    with (folder / "saved").open("a") as file:
        file.write(f"{output.name} {rank}\\n")
    save(tuned, tokenizer, output, *rest)

def run(name, method, scope, recipe={}):
    recipe = Recipe.check(**{**given["short"], **recipe})
    rows = Dataset.from_list(given["rows"])
    asked = {"method": method, "scope": scope, "ratio": 0.3, "recipe": recipe, "progress": False}
    return training.finetune(base, rows, folder / name, **asked)

training.save = noted_save
found = {name: run(name, **case) for name, case in given["cases"].items()}

passes = 0
def stop_in_step_4(*args, **kwargs):
    global passes
    passes += 1
    if passes == 4:
        raise KeyboardInterrupt
    return step(*args, **kwargs)

Trainer.training_step = stop_in_step_4
try:
    run("stopped", **given["stopped"])
except KeyboardInterrupt:
    passes = 0
assert not (folder / "stopped").exists()
def counted(*args, **kwargs):
    global passes
    passes += 1
    return step(*args, **kwargs)
Trainer.training_step = counted
found["stopped"] = run("stopped", **given["stopped"])
assert passes == given["short"]["max_steps"] - 2, passes
try:
    run("stopped", **given["stopped"])
except UserError as error:
    assert "exists already" in str(error)
else:
    raise AssertionError("a model was written over")
told = {name: [result.losses, result.tokens, result.trained_parameters] for name, result in found.items()}
(folder / f"told-{rank}.json").write_text(json.dumps(told))
"""


def launch(script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes of one thread each, without a GPU.

    By torchrun, which `accelerate launch` calls for several GPUs; on CPUs it would want MPI.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *words]
    given = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=given, timeout=300)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="two processes talk over Linux's loopback device")
def test_two_processes_are_one(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {"short": SHORT, "rows": ROWS, "cases": CASES, "stopped": STOPPED}
    done = launch(tmp_path / "script.py", str(base), str(two), json.dumps(given))
    assert done.returncode == 0, done.stderr[-3000:]

    names = [*CASES, "stopped"]
    # Saved once each, by the first process, with nothing left beside.
    assert (two / "saved").read_text().splitlines() == [f"{name} 0" for name in names]
    assert {path.name for path in two.iterdir()} == {*names, "saved", "told-0.json", "told-1.json"}
    told = [json.loads((two / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]

    for name, case in {**CASES, "stopped": STOPPED}.items():
        recipe = Recipe.check(**{**SHORT, **case.get("recipe", {})})
        asked = {"method": case["method"], "scope": case["scope"], "ratio": 0.3, "recipe": recipe, "progress": False}
        alone = finetune(base, Dataset.from_list(ROWS), one / name, **asked)
        losses, tokens, trained = told[0][name]
        assert (tokens, trained) == (alone.tokens, alone.trained_parameters)
        assert losses == pytest.approx(alone.losses, abs=1e-6)
        (file,) = (path.name for path in (one / name).glob("*.safetensors"))
        expected, got = load_file(one / name / file), load_file(two / name / file)
        assert expected.keys() == got.keys()
        for tensor, value in expected.items():
            # Sums of gradients may be taken in another order.
            assert (value - got[tensor]).abs().max() <= 1e-6, (name, tensor)
