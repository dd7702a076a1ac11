"""Localization, files to scores: this package against the released code's way, and against one pass over the numbers.

`python benchmarks/localization.py [--quick]` measures both sides in turn, several times, and writes
`results/benchmarks/localization.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from measured import DATA, median, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance
from transformers import AutoModelForCausalLM, LlamaConfig

from alps_repro import HeadLayout, localize
from alps_repro.models.attention import open_attention
from alps_repro.models.embedded import embedded_model

#: Llama-3.1-8B's attention (its config.json), with as many layers as are measured.
LLAMA_8B = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
LAYERS_8B = 32


def perturbed_smollm2() -> tuple[Path, Path]:
    """SmolLM2 and a copy with 1e-4 · N(0, 1) added to every weight."""
    base, task = embedded_model(), DATA / "smollm2-perturbed"
    if not (task / "model.safetensors").exists():
        task.mkdir(parents=True, exist_ok=True)
        draw = torch.Generator().manual_seed(0)
        weights = load_file(base / "model.safetensors")
        moved = {name: w + 1e-4 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
        save_file(moved, task / "model.safetensors", metadata={"format": "pt"})
        (task / "config.json").write_text((base / "config.json").read_text())
    return base, task


def llama_8b(layers: int) -> tuple[Path, Path]:
    """Random bfloat16 checkpoints of Llama-3.1-8B's attention, one shard a layer, the second a perturbation of the
    first. Only what localization reads is in them."""
    folders = DATA / f"llama-8b-{layers}-base", DATA / f"llama-8b-{layers}-task"
    if (folders[1] / "model.safetensors.index.json").exists():
        return folders
    draw, where = torch.Generator().manual_seed(0), {}
    config = LlamaConfig(**LLAMA_8B, num_hidden_layers=layers)
    for folder in folders:
        config.save_pretrained(folder)
    for layer in range(layers):
        shard = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = ({}, {})
        for part, rows in (("q", 4096), ("k", 1024), ("v", 1024)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            weight = 0.02 * torch.randn(rows, 4096, generator=draw)
            tensors[0][name] = weight.bfloat16()
            tensors[1][name] = (weight + 2e-4 * torch.randn(rows, 4096, generator=draw)).bfloat16()
            where[name] = shard
        for folder, own in zip(folders, tensors):
            save_file(own, folder / shard, metadata={"format": "pt"})
    for folder in folders:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folders


def concatenated(rows: dict, layout: HeadLayout, head: int) -> torch.Tensor:
    """The head's q, k, v rows, joined (head matrix `concat`), in the stored dtype."""
    width, group = layout.head_dim, layout.group(head)
    parts = [("query", head), ("key", group), ("value", group)]
    return torch.cat([rows[part][i * width : (i + 1) * width].flatten() for part, i in parts])


def released_score(base: torch.Tensor, task: torch.Tensor) -> float:
    """One head as the released code scores it: float32 softmaxes, and scipy's distance on positions of [0, 1]."""
    p, q = (torch.softmax(x.float(), 0).numpy() for x in (base, task))
    positions = np.linspace(0, 1, len(p))
    return wasserstein_distance(positions, positions, p, q)


def released_way(base: Path, task: Path) -> np.ndarray:
    """Load both models, then score one head after another."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, task)]
    layout = HeadLayout.of(models[0])
    scores = np.empty((layout.layers, layout.heads))
    for layer in range(layout.layers):
        rows = []
        for model in models:
            attention = model.model.layers[layer].self_attn
            weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            rows.append(dict(zip(("query", "key", "value"), (w.detach() for w in weights))))
        for head in range(layout.heads):
            scores[layer, head] = released_score(*(concatenated(r, layout, head) for r in rows))
    return scores


def reference(base: torch.Tensor, task: torch.Tensor) -> float:
    """The same distance in extended precision (80 bits)."""
    p, q = (np.exp(x.double().numpy().astype(np.longdouble)) for x in (base, task))
    difference = np.cumsum(p / p.sum() - q / q.sum())
    return float(np.abs(difference).sum() / (len(p) - 1))


def errors(base: Path, task: Path, ours: np.ndarray, theirs: np.ndarray, step: int) -> dict[str, float]:
    """Largest relative error of both over every `step`-th head."""
    worst = {"ours": 0.0, "released": 0.0}
    with open_attention(base) as b, open_attention(task) as t:
        layout = b.layout
        for layer in range(0, layout.layers, step):
            rows = b.layer(layer), t.layer(layer)
            for head in range(layout.heads):
                true = reference(*(concatenated(r, layout, head) for r in rows))
                for name, scores in (("ours", ours), ("released", theirs)):
                    worst[name] = max(worst[name], abs(scores[layer, head] / true - 1))
    return worst


def timed(run, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    out = run(*arguments)
    return time.perf_counter() - start, out


def smollm2(rounds: int) -> dict:
    base, task = perturbed_smollm2()

    def ours(kind: str) -> np.ndarray:
        return localize(base, task, head_matrix=kind).values

    ours("concat")
    seconds = {"concat": [], "product": [], "released_way": []}
    for i in range(rounds):
        for kind in ("concat", "product"):
            taken, values = timed(ours, kind)
            seconds[kind].append(taken)
            if kind == "concat":
                mine = values
        if i < max(2, rounds // 2):
            taken, theirs = timed(released_way, base, task)
            seconds["released_way"].append(taken)
    return {
        "seconds": seconds,
        "single_pass": {kind: [single_pass(base, task, kind) for _ in range(rounds)] for kind in ("concat", "product")},
        "read": [read_alone(base, task) for _ in range(rounds)],
        "largest_relative_error": errors(base, task, mine, theirs, step=6),
    }


def read_alone(base: Path, task: Path) -> dict[str, float]:
    """Bytes of both models' query, key and value projections, and the seconds that only reading them takes."""
    found = {"bytes": 0, "seconds": 0.0}
    for folder in (base, task):
        with safe_open(folder / "model.safetensors", "pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                    start = time.perf_counter()
                    found["bytes"] += file.get_tensor(name).clone().nbytes
                    found["seconds"] += time.perf_counter() - start
    return found


def single_pass(base: Path, task: Path, kind: str) -> float:
    """Seconds of one float64 `exp` and one cumulative sum over the numbers that are scored, without reading them."""
    with open_attention(base) as b, open_attention(task) as t:
        layout, taken = b.layout, 0.0
        for layer in range(layout.layers):
            for rows in (b.layer(layer), t.layer(layer)):
                for head in range(layout.heads):
                    x = concatenated(rows, layout, head).double().numpy()
                    x = x if kind == "concat" else x[: layout.hidden_size * layout.head_dim]
                    start = time.perf_counter()
                    np.cumsum(np.exp(x))
                    taken += time.perf_counter() - start
    return taken


def peak_above_imports(layers: int, kind: str) -> int:
    """Bytes that localization holds above an interpreter with its imports, in a process of its own."""
    base, task = llama_8b(layers)
    code = (
        "import alps_repro, torch, transformers, scipy.stats, safetensors\n"
        "from pathlib import Path\n"
        "from transformers import AutoConfig\n"
        "localize = alps_repro.localize\n"
        f"AutoConfig.from_pretrained({str(base)!r})\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"  # the peak so far is forgotten: imports need much
        "held = lambda key: int(Path('/proc/self/status').read_text().split(key)[1].split()[0]) * 1024\n"
        "before = held('VmRSS:')\n"
        f"localize({str(base)!r}, {str(task)!r}, head_matrix={kind!r})\n"
        "print(held('VmHWM:') - before)\n"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def llama(rounds: int) -> dict:
    found: dict = {}
    for kind in ("concat", "product"):
        by_layers: dict[int, list[float]] = {}
        for layers in (1, 2, 4):
            folders = llama_8b(layers)
            by_layers[layers] = [timed(lambda f=folders, k=kind: localize(*f, head_matrix=k))[0] for _ in range(rounds)]
        passes = [single_pass(*llama_8b(2), kind) / 2 for _ in range(max(1, rounds // 2))]
        found[kind] = {
            "seconds_by_layers": by_layers,
            "seconds_32_layers": median(by_layers[4]) / 4 * LAYERS_8B,
            "single_pass_per_layer": passes,
            "times_a_single_pass": median(by_layers[4]) / 4 / median(passes),
            "peak_bytes_above_imports": {layers: peak_above_imports(layers, kind) for layers in (2, 4)},
        }
    base, task = llama_8b(1)
    with open_attention(base) as b, open_attention(task) as t:
        rows, layout = (b.layer(0), t.layer(0)), b.layout
        heads = [timed(released_score, *(concatenated(r, layout, h) for r in rows))[0] for h in range(0, 32, 8)]
    found["released_way_per_head"] = heads
    found["released_way_32_layers"] = median(heads) * layout.heads * LAYERS_8B
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    save("localization", {"smollm2": smollm2(rounds), "llama_3_1_8b": llama(rounds)})


if __name__ == "__main__":
    main()
