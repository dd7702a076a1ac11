"""Embeddings of data sets' questions by a model (ALPS, Figure 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alps_repro.data.prompts import positions
from alps_repro.errors import UserError

BATCH = 16


def embed(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], progress: bool = False
) -> dict[str, np.ndarray]:
    """Embed texts as the mean of the last hidden states over their tokens.

    Args:
        model: as `load_model` returns it.
        tokenizer: the model's.
        texts: {name: texts}.
        progress: show a bar for each name.

    Returns:
        {name: float64 (texts, hidden size)}.

    Raises:
        UserError: a text has more tokens than the model has positions.
    """
    import torch
    from tqdm.auto import tqdm

    out: dict[str, np.ndarray] = {}
    room = positions(model.config) or float("inf")
    with torch.no_grad():
        for name, own in texts.items():
            points = []
            for i in tqdm(range(0, len(own), BATCH), desc=f"embedding {name}", disable=not progress):
                batch = tokenizer(list(own[i : i + BATCH]), return_tensors="pt", padding=True).to(model.device)
                if batch["input_ids"].shape[1] > room:
                    raise UserError(
                        f"A text of '{name}' has {batch['input_ids'].shape[1]} tokens, and the model {room:.0f} "
                        "positions: take shorter texts, or a model with more positions."
                    )
                states = model(**batch, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
                mask = batch["attention_mask"][..., None]
                points.append(((states * mask).sum(1) / mask.sum(1)).double().cpu().numpy())
            out[name] = np.concatenate(points)
    return out


def principal(points: Mapping[str, np.ndarray], dimensions: int = 3) -> dict[str, np.ndarray]:
    """Project all points on their common principal axes.

    The sign of an axis is such that its largest loading is positive, so that figures are reproducible.

    Args:
        points: {name: (texts, hidden size)}.
        dimensions: number of axes.

    Returns:
        {name: (texts, dimensions)}.
    """
    everything = np.concatenate(list(points.values()))
    mean = everything.mean(0)
    _, _, axes = np.linalg.svd(everything - mean, full_matrices=False)
    axes = axes[:dimensions]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    return {name: (own - mean) @ axes.T for name, own in points.items()}
