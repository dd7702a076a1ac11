"""The whole chain on a tiny model, for tests that stop it: `python chain.py RESULTS BASE [--kill SEED TIMES]`.

With `--kill`, the chain runs in a forked child that is killed (SIGKILL) at a random moment, TIMES times over, each time
on what the one before left; then once to its end. After every kill all records must be whole.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# Imported before forking: the child's life is the chain and nothing else.
import lm_eval.models.huggingface  # noqa: F401
import peft  # noqa: F401
import transformers  # noqa: F401

from alps_repro.analysis.tables import write_summary
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.records import load_record
from alps_repro.experiments.runs import evaluate_run
from alps_repro.localization.scores import HeadScores
from alps_repro.training.recipe import Recipe


def chain(results: Path, base: str) -> None:
    """Full fine-tuning, localization, fine-tuning of the selected heads, evaluation, table."""
    recipe = Recipe(max_steps=6, batch_size=4, micro_batch_size=2, learning_rate=1e-3, checkpoint_steps=2)
    shared = {"base": base, "dataset": "chain_sum", "recipe": recipe}
    full = FinetuneConfig(method="full", ratio=1.0, scope="all", **shared)
    localization = LocalizeConfig(base=base, task_model=full)
    for scope in ("all", "heads"):
        alps = FinetuneConfig(method="alps", ratio=0.3, scope=scope, localization=localization, **shared)
        evaluate_run(EvaluateConfig(model=alps, tasks=("chain_sum",), limit=6), results, progress=False)
    write_summary(results)


def check_whole(results: Path) -> None:
    """Every record and every file of scores that is there can be read."""
    for path in (results / "records").glob("*.json"):
        load_record(path)
    for path in (results / "scores").glob("*.json"):
        HeadScores.load(path)


def kill_at_random(results: Path, base: str, seed: int, times: int) -> None:
    """Kill the chain `times` times at random moments, then let it end."""
    draw, killed = random.Random(seed), 0
    while killed < times:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            chain(results, base)
            os._exit(0)
        time.sleep(draw.uniform(0.0, 1.6))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        check_whole(results)
        if os.WIFSIGNALED(status):
            killed += 1
        else:  # it was faster: what it made is taken away again, so that there is something to kill
            for path in sorted((results / "records").glob("*.json"))[:: draw.choice((1, 2))]:
                path.unlink()
    chain(results, base)
    print(f"killed {killed} times")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--kill" in arguments:
        kill_at_random(Path(arguments[0]), arguments[1], int(arguments[3]), int(arguments[4]))
    else:
        chain(Path(arguments[0]), arguments[1])
