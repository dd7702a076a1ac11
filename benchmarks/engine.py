"""This version against an earlier one on a processor: steps of training, peak memory, an evaluation.

`python benchmarks/engine.py --against FOLDER` alternates between this checkout and another one (`make bench-engine`
makes it). Each measurement is a process of its own on two threads. It writes
`results/benchmarks/engine.json`. The rate of matrix products on this processor is measured beside them: operations over
that rate are the least that a step can take.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
THREADS = 2
STEPS, BATCH = 8, 16
DATASET, QUESTIONS, EVAL_BATCH = "family_relationships", 200, 32

#: {name: (version, what is measured, precision)}. Profile `cpu` evaluates, and trains, in bfloat16.
CASES: dict[str, tuple[str, str, str]] = {
    "heads, before, float32": ("before", "heads", "float32"),
    "heads, before, bfloat16": ("before", "heads", "bfloat16"),
    "heads, now": ("now", "heads", "auto"),
    "all, before, float32": ("before", "all", "float32"),
    "all, before, bfloat16": ("before", "all", "bfloat16"),
    "all, now": ("now", "all", "auto"),
    "evaluation, before, bfloat16": ("before", "evaluation", "bfloat16"),
    "evaluation, now": ("now", "evaluation", "auto"),
}


def measure(what: str, precision: str, base: str, out: str) -> dict[str, Any]:
    """In a process of its own, with whichever version of the package is on the path."""
    import torch

    torch.set_num_threads(THREADS)
    if what == "rates":
        return {name: rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    found = evaluation(precision, base) if what == "evaluation" else training(what, precision, base, out)
    return {**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def rate(dtype: Any) -> float:
    """Operations a second in a product as of SmolLM2's MLP on a batch."""
    import torch

    x, w = torch.randn(2048, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        taken.append(time.perf_counter() - start)
    return 2 * x.numel() * w.shape[0] / sorted(taken)[len(taken) // 2]


def training(scope: str, precision: str, base: str, out: str) -> dict[str, Any]:
    import transformers

    from alps_repro import Recipe, finetune

    starts: list[float] = []
    step = transformers.Trainer.training_step

    def timed(self: Any, *given: Any, **named: Any) -> Any:
        starts.append(time.perf_counter())
        return step(self, *given, **named)

    transformers.Trainer.training_step = timed
    recipe = Recipe(learning_rate=1e-4, batch_size=BATCH, micro_batch_size=BATCH, max_steps=STEPS, precision=precision)
    method = "random" if scope == "heads" else "full"
    tuned = finetune(base, DATASET, out, method=method, scope=scope, recipe=recipe, progress=False)
    return {"seconds": [b - a for a, b in itertools.pairwise(starts[1:])], "losses": list(tuned.losses)}


def register_sdpa32() -> None:
    """Attention that multiplies query, key and value in float32, whatever the rest is in."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def in_float32(module: Any, query: Any, key: Any, value: Any, *given: Any, **named: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *given, **named)
        return out.to(query.dtype), weights

    AttentionInterface.register("sdpa32", in_float32)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa32", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def evaluation(precision: str, base: str) -> dict[str, Any]:
    from alps_repro import evaluate

    own = {"precision": precision}
    if "precision" not in inspect.signature(evaluate).parameters:
        own = {"autocast": precision}
    start = time.perf_counter()
    found = evaluate(base, [DATASET], limit=QUESTIONS, batch_size=EVAL_BATCH, progress=False, **own)
    metrics = found.results[DATASET]
    return {
        "seconds": [time.perf_counter() - start],
        "score": found.scores[DATASET],
        "loglikelihood": metrics["answer_loglikelihood,none"],
    }


def in_process(version: Path, what: str, precision: str, base: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        paths = [str(version), *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, __file__, "--child", what, precision, base, str(out)],
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {"error": done.stderr[-1500:]}
        return json.loads(done.stdout.splitlines()[-1])


def processor() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    words = {
        name: (re.search(rf"^{name}\s*: (.*)", info, re.MULTILINE) or ["", ""])[1]
        for name in ("model name", "cpu family", "model", "stepping")
    }
    return {**words, "machine": platform.machine(), "amx_bf16": " amx_bf16" in info, "threads": THREADS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose names begin like this")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks" / "engine.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(*given.child)))
        return
    from alps_repro.experiments.provenance import provenance
    from alps_repro.models.embedded import embedded_model

    base = str(embedded_model())
    measured: dict[str, Any] = {"processor": processor(), "provenance": provenance(gpu=False).model_dump()}
    measured |= {"steps": STEPS, "batch": BATCH, "dataset": DATASET, "questions": QUESTIONS, "cases": {}}
    versions = {"now": ROOT, "before": given.against and given.against.resolve()}
    chosen = {n: c for n, c in CASES.items() if not given.only or n.startswith(tuple(given.only))}
    for _ in range(given.rounds):
        measured.setdefault("operations_a_second", []).append(in_process(ROOT, "rates", "float32", base))
        for name, (version, what, precision) in chosen.items():
            if versions[version] is None:
                continue
            found = in_process(versions[version], what, precision, base)
            measured["cases"].setdefault(name, []).append(found)
            shown = {key: value for key, value in found.items() if key != "losses"}
            print(json.dumps({"case": name, **shown}), flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(measured, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
