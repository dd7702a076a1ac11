"""HiFi's choice of heads (arXiv 2305.04573): rich in information, and correlated with others; forward passes only.

The paper's formulas were not at hand; docs/systems.md says how they are read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.heads.layout import HeadLayout

if TYPE_CHECKING:
    import torch

#: Share of a head's energy (squared singular values) that the counted singular values hold.
ENERGY = 0.9

DAMPING = 0.85


def richness(results: np.ndarray, energy: float = ENERGY) -> float:
    """The sum of the leading singular values that hold a share of the energy; results: (tokens, head_dim)."""
    values = np.linalg.svd(results, compute_uv=False)
    held = np.cumsum(values**2)
    if held[-1] == 0:
        return 0.0
    return float(values[: int(np.searchsorted(held, energy * held[-1])) + 1].sum())


def correlation(results: np.ndarray) -> np.ndarray:
    """Absolute Pearson correlation of heads' results, all numbers of a head as one sample: (heads, heads).

    results: (heads, tokens, head_dim). A head whose results are constant is correlated with none.
    """
    flat = results.reshape(len(results), -1)
    flat = flat - flat.mean(1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0)
    return np.abs(flat @ flat.T)


def page_rank(start: np.ndarray, edges: np.ndarray, damping: float = DAMPING, tolerance: float = 1e-12) -> np.ndarray:
    """The stationary shares of a walk that follows the edges with probability `damping`, and starts anew otherwise.

    start: (heads,), what a walk starts by, and goes back to, in proportion. edges: (heads, heads), from row to column,
    in proportion within a row; a head without edges hands on nothing.
    """
    first = start / start.sum()
    sums = edges.sum(1, keepdims=True)
    steps = np.divide(edges, sums, out=np.zeros_like(edges), where=sums > 0)
    ranks = first
    for _ in range(1000):
        moved = (1 - damping) * first + damping * ranks @ steps
        if np.abs(moved - ranks).sum() < tolerance:
            break
        ranks = moved
    return moved


def hifi(model: torch.nn.Module, batches: Sequence[Mapping[str, Any]], *, progress: bool = False) -> np.ndarray:
    """HiFi's score of each query head: float64 (layers, heads).

    model: the base, not tuned. batches: as `training.Collate` makes them; padding is left out. Richness and
    correlations are means over the examples; heads are linked with all others of the model.
    """
    import torch
    from tqdm.auto import tqdm

    layout = HeadLayout.of(model)
    modules = dict(model.named_modules())
    prefix = layout.prefix(modules)
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[layer] = inputs[0].detach()

        return hook

    hooks = [
        modules[prefix + layout.output_module(layer)].register_forward_pre_hook(keep(layer))
        for layer in range(layout.layers)
    ]
    rich, linked, examples = np.zeros(layout.total), np.zeros((layout.total, layout.total)), 0
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="heads' results", disable=not progress):
                given = {
                    name: value.to(device) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                    if name != "labels"
                }
                model(**given, use_cache=False)
                stacked = torch.stack([seen[layer] for layer in range(layout.layers)]).double().cpu().numpy()
                for i, mask in enumerate(batch["attention_mask"].bool().numpy()):
                    own = stacked[:, i, mask].reshape(layout.layers, -1, layout.heads, layout.head_dim)
                    own = own.transpose(0, 2, 1, 3).reshape(layout.total, -1, layout.head_dim)
                    rich += [richness(head) for head in own]
                    linked += correlation(own)
                    examples += 1
    finally:
        for hook in hooks:
            hook.remove()
    np.fill_diagonal(linked, 0)  # a head is not its own neighbour
    return page_rank(rich / examples, linked / examples).reshape(layout.layers, layout.heads)
