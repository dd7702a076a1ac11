"""What the time of a training step on a processor goes into: variants of one step, in turn, in one process.

`python benchmarks/variants.py heads` (or `all`) trains SmolLM2-135M on one batch in bfloat16 and writes
`results/benchmarks/variants-heads.json`. Every variant differs from the one before it in one thing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from engine import processor, rate, register_sdpa32

from alps_repro.data.datasets import training_examples
from alps_repro.data.prompts import IGNORED, Collate, tokenize_and_count
from alps_repro.experiments.provenance import provenance
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.models.embedded import embedded_model
from alps_repro.models.loading import load_model
from alps_repro.models.precision import round_frozen
from alps_repro.training.finetune import trainable
from alps_repro.training.loss import summed_loss

BATCH = 16

#: {name: (attention, loss, whether frozen weights are rounded once, whether decoder layers are compiled)}
VARIANTS = {
    "plain loss": ("eager", "plain", False, False),
    "loss tokens alone": ("eager", "chunked", False, False),
    "rounded once": ("eager", "chunked", True, False),
    "sdpa": ("sdpa", "chunked", True, False),
    "sdpa in float32": ("sdpa32", "chunked", True, False),
    "compiled": ("eager", "chunked", True, True),
    "compiled, sdpa in float32": ("sdpa32", "chunked", True, True),
}


def plain_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As transformers takes it: logits at every kept position."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def prepared(scope: str, attention: str, rounded: bool, compiled: bool) -> Any:
    model: Any = load_model(embedded_model(), dtype=torch.float32, device="cpu")[0]
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    heads = HeadSelection.random(HeadLayout.of(model), 0.1 if scope == "heads" else 1, seed=0)
    tuned = trainable(model, heads, scope).train()
    if rounded:
        round_frozen(tuned, "bfloat16")
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return tuned


def step_of(tuned: Any, loss: str, batch: dict[str, Any]) -> Callable[[], float]:
    of: Any = plain_loss if loss == "plain" else summed_loss

    def step() -> float:
        tuned.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = of(tuned, batch)
        value.backward()
        return float(value.detach())

    return step


def batch_of(tokenizer: Any) -> dict[str, Any]:
    rows, _ = tokenize_and_count(training_examples("family_relationships", size=BATCH, seed=0), tokenizer, 2048)
    return Collate(tokenizer.pad_token_id, "response")(list(rows))


def measured(scope: str, names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """What was measured so far, after every round of every variant; what is compiled comes last."""
    batch = batch_of(load_model(embedded_model())[1])
    found: dict[str, Any] = {name: {"seconds": []} for name in names}
    for together in (False, True):
        steps = {}
        for name in names:
            attention, loss, rounded, compiled = VARIANTS[name]
            if compiled is not together:
                continue
            steps[name] = step_of(prepared(scope, attention, rounded, compiled), loss, batch)
            start = time.perf_counter()
            found[name]["loss"] = steps[name]()
            found[name]["first"] = time.perf_counter() - start
            yield found
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                found[name]["seconds"].append(time.perf_counter() - start)
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scope", choices=["heads", "all"])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", action="store_true", help="print where the time of the first variant goes instead")
    given = parser.parse_args()
    torch.set_num_threads(2)
    register_sdpa32()
    if given.profile:
        attention, loss, rounded, compiled = VARIANTS[given.only[0]]
        step = step_of(
            prepared(given.scope, attention, rounded, compiled), loss, batch_of(load_model(embedded_model())[1])
        )
        step()
        with torch.profiler.profile() as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
        return
    out = given.out or Path(__file__).parents[1] / "results" / "benchmarks" / f"variants-{given.scope}.json"
    rates = {name: rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    whole = {"processor": processor(), "provenance": provenance(gpu=False).model_dump(), "operations_a_second": rates}
    for found in measured(given.scope, given.only, given.rounds):
        out.write_text(json.dumps({**whole, "batch": BATCH, "variants": found}, indent=1) + "\n")
    for name, own in found.items():
        print(f"{name}: {sorted(own['seconds'])[len(own['seconds']) // 2]:.3f} s, first {own['first']:.1f} s")


if __name__ == "__main__":
    main()
