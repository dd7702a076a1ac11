"""HiFi's choice of heads (arXiv 2305.04573): rich in information, and correlated with others; forward passes only.

The paper's formulas were not available to us; docs/systems.md describes our interpretation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.heads.layout import HeadLayout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Share of a head's energy (sum of squared singular values) in the singular values that are summed.
ENERGY = 0.9

#: PageRank's damping factor.
DAMPING = 0.85


def richness(outputs: np.ndarray, energy: float = ENERGY) -> float:
    """The sum of the leading singular values of a head's outputs that hold a share of the energy.

    Args:
        outputs: (tokens, head_dim).
        energy: the share.
    """
    values = np.linalg.svd(outputs, compute_uv=False)
    cumulative = np.cumsum(values**2)
    if cumulative[-1] == 0:
        return 0.0
    return float(values[: int(np.searchsorted(cumulative, energy * cumulative[-1])) + 1].sum())


def correlation(outputs: np.ndarray) -> np.ndarray:
    """Absolute Pearson correlation between heads' outputs, all numbers of a head as one sample: (heads, heads).

    Args:
        outputs: (heads, tokens, head_dim). A head with constant outputs is correlated with none.
    """
    flat = outputs.reshape(len(outputs), -1)
    flat = flat - flat.mean(1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    flat = np.divide(flat, lengths, out=np.zeros_like(flat), where=lengths > 0)
    return np.abs(flat @ flat.T)


def page_rank(start: np.ndarray, edges: np.ndarray, damping: float = DAMPING, tolerance: float = 1e-12) -> np.ndarray:
    """Personalized PageRank: the stationary distribution of a random walk with restarts.

    Args:
        start: (heads,), proportional to the probabilities of a start or restart.
        edges: (heads, heads), weights from row to column; a head without edges passes on nothing.
        damping: probability of following an edge.
        tolerance: of the iteration, on the sum of absolute changes.
    """
    first = start / start.sum()
    sums = edges.sum(1, keepdims=True)
    steps = np.divide(edges, sums, out=np.zeros_like(edges), where=sums > 0)
    ranks = first
    for _ in range(1000):
        following = (1 - damping) * first + damping * ranks @ steps
        if np.abs(following - ranks).sum() < tolerance:
            break
        ranks = following
    return following


def hifi(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, progress: bool = False) -> np.ndarray:
    """HiFi's score of each query head: float64 (layers, heads).

    Richness and correlations are means over the examples; heads are linked with all others of the model.

    Args:
        model: the base, not tuned.
        batches: as `data.prompts.Collate` makes them; padding is left out.
        progress: show a bar, one step per batch.
    """
    import torch
    from tqdm.auto import tqdm

    layout = HeadLayout.of(model)
    rich, linked, examples = np.zeros(layout.total), np.zeros((layout.total, layout.total)), 0
    device = next(model.parameters()).device
    with torch.no_grad(), _kept_outputs(model, layout) as kept:
        for batch in tqdm(batches, desc="per-head outputs", disable=not progress):
            inputs = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            model(**inputs, use_cache=False)
            # Layer by layer: in float64 they would fill a GPU.
            stacked = np.stack([kept[layer].cpu().double().numpy() for layer in range(layout.layers)])
            for i, mask in enumerate(batch["attention_mask"].bool().numpy()):
                tokens = stacked[:, i, mask].reshape(layout.layers, -1, layout.heads, layout.head_dim)
                outputs = tokens.transpose(0, 2, 1, 3).reshape(layout.total, -1, layout.head_dim)
                rich += [richness(head) for head in outputs]
                linked += correlation(outputs)
                examples += 1
    np.fill_diagonal(linked, 0)  # a head is not its own neighbour
    return page_rank(rich / examples, linked / examples).reshape(layout.layers, layout.heads)


@contextmanager
def _kept_outputs(model: PreTrainedModel, layout: HeadLayout) -> Iterator[dict[int, torch.Tensor]]:
    """{layer: the input of its output projection in the last forward pass}, kept up to date within the context."""
    modules = dict(model.named_modules())
    prefix = layout.prefix(modules)
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            kept[layer] = inputs[0].detach()

        return hook

    hooks = [
        modules[prefix + layout.output_module(layer)].register_forward_pre_hook(keep(layer))
        for layer in range(layout.layers)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
