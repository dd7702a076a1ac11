"""Whether head scores find what they are meant to find: heads that truly moved, and heads that truly matter.

ALPS takes a head's distance from the base as a proxy for its importance, which the paper defines as what the task
model loses when the head is ablated (Eq. 3 and 4), and does not measure how good a proxy it is. Two truths to hold
scores against: checkpoints whose attention was moved by a known amount (`moved`, `recall`), and the loss of the task
model with one head at a time silenced (`importance`, `correlations`).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.errors import UserError, one_of
from alps_repro.heads.selection import HeadSelection, head_count
from alps_repro.localization.metrics import METRICS
from alps_repro.localization.scores import HeadScores, localize
from alps_repro.models.attention import open_attention
from alps_repro.models.folders import is_adapter, resolve

if TYPE_CHECKING:
    import pandas as pd


#: What can be compared, as arguments of `localize`: every metric, and PAD on the ground that the paper leaves open.
READINGS: dict[str, dict[str, str]] = {
    **{name: {"metric": name} for name in METRICS},
    "pad_value": {"metric": "pad", "ground": "value"},
}

#: What is compared unless asked otherwise. `wasserstein` is `pad` times a constant and ranks heads alike.
COMPARED = tuple(name for name in READINGS if name != "wasserstein")


# --- heads that truly moved -----------------------------------------------------------------------------------------


def moved(
    base: str | Path,
    output: str | Path,
    *,
    share: float = 0.1,
    factor: float = 5.0,
    background: float = 1e-4,
    seed: int = 0,
) -> HeadSelection:
    """Write a checkpoint's attention with every weight moved a little and those of some heads moved more.

    Each weight of the query, key and value projections is shifted by independent normal noise, and that of the moved
    heads by `factor` times as much. Moved are all heads of `ceil(share · groups)` key/value groups drawn from the
    whole model, with their query rows and the group's key and value rows, so that no head is moved by half.

    base: the embedded model, a checkpoint folder or a hub id. output: a folder that does not exist yet. It gets
        config.json and the query, key and value weights, which is all that `localize` reads; it is no whole model.
        Weights narrower than float32 are written as float32, so that rounding does not swallow the noise.
    background: standard deviation of the noise, in the weights' own unit. seed: of the draw and of the noise; with
        the same seed, factors differ in nothing but the scale of the moved heads' noise.

    Returns:
        the heads that were moved more.

    Raises:
        UserError: a number makes no sense, `output` exists, or `base` is an adapter or not readable.
    """
    import torch
    from safetensors.torch import save_file

    for name, value in (("factor", factor), ("background", background)):
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise UserError(f"The {name} {value!r} is no positive number: give by how much weights are to move.")
    folder, output = resolve(base), Path(output)
    if is_adapter(folder):
        raise UserError(f"'{base}' is an adapter, and only whole checkpoints can be moved: give its base model.")
    if output.exists():
        raise UserError(f"'{output}' exists already: remove it or choose another folder for the moved weights.")
    draw, tensors = np.random.default_rng(seed), {}
    with open_attention(folder) as attention:
        layout = attention.layout
        total = layout.layers * layout.groups
        groups = {divmod(int(i), layout.groups) for i in draw.choice(total, head_count(share, total), replace=False)}
        chosen = ((layer, head) for layer, head in HeadSelection.all(layout) if (layer, layout.group(head)) in groups)
        truth = HeadSelection(tuple(chosen), layout)
        rows = layout.selected_rows(truth)
        for layer in range(layout.layers):
            attention.layer(layer)  # refuses weights of another shape, or that are not finite
            for path, weight in attention.projections(layout.modules(layer)).items():
                noise = draw.normal(0, background, weight.shape)
                noise[rows.get(path, [])] *= factor
                weight = (weight + torch.from_numpy(noise)).to(torch.promote_types(weight.dtype, torch.float32))
                tensors[f"{path}.weight"] = (weight.T if layout.transposed else weight).contiguous()
    output.mkdir(parents=True)
    shutil.copy(folder / "config.json", output)
    save_file(tensors, output / "model.safetensors")
    return truth


def highest_places(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the highest values in the flattened array; ties as in `HeadScores.top`."""
    return np.argsort(-values, axis=None, kind="stable")[:count]


def recall(scores: HeadScores, truth: HeadSelection) -> float:
    """Which share of the truly moved heads is among as many highest scores, in [0, 1].

    Scores that know nothing reach the share of the moved heads in the model.

    Raises:
        UserError: the two are of different models, or no head was moved.
    """
    if scores.layout != truth.layout:
        raise UserError("The scores and the moved heads are of models of different shape: localize the moved model.")
    if not len(truth):
        raise UserError("No head was moved, so there is none to be found: move at least one.")
    places = {layer * truth.layout.heads + head for layer, head in truth}
    return len(places.intersection(highest_places(scores.values, len(truth)).tolist())) / len(truth)


def recall_by_metric(
    base: str | Path,
    *,
    factors: Iterable[float] = (1.0, 1.5, 2.0, 3.0, 5.0),
    seeds: Iterable[int] = (0, 1, 2),
    metrics: Sequence[str] = COMPARED,
    head_matrices: Sequence[str] = ("product", "concat"),
    share: float = 0.1,
    background: float = 1e-4,
    progress: bool = False,
) -> pd.DataFrame:
    """How many of the heads that truly moved each metric finds, over factors and seeds.

    base, share, background: as in `moved`. metrics: of `READINGS`. head_matrices: of `scores.HEAD_MATRICES`.
    Each moved checkpoint is made once, in a temporary folder, read by every metric, and removed.

    Returns:
        columns metric, head_matrix, factor, seed, recall (in [0, 1]); a row per combination, in the order asked for.

    Raises:
        UserError: as `moved` and `localize` raise it, or a metric is unknown.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    for metric in metrics:
        one_of("metric", metric, READINGS)
    seeds = list(seeds)
    asked = [(float(factor), seed) for factor in factors for seed in seeds]
    rows: list[dict[str, Any]] = []
    for factor, seed in tqdm(asked, desc="moving heads", disable=not progress):
        with tempfile.TemporaryDirectory() as work:
            truth = moved(base, Path(work) / "moved", share=share, factor=factor, background=background, seed=seed)
            for head_matrix in head_matrices:
                for metric in metrics:
                    scores = localize(base, Path(work) / "moved", head_matrix=head_matrix, **READINGS[metric])
                    rows.append(
                        {
                            "metric": metric,
                            "head_matrix": head_matrix,
                            "factor": factor,
                            "seed": seed,
                            "recall": recall(scores, truth),
                        }
                    )
    return pd.DataFrame(rows, columns=["metric", "head_matrix", "factor", "seed", "recall"])


def peaks(model: Any) -> dict[str, np.ndarray]:
    """The largest probability in each head's distribution (Eq. 6, tau 1): {head matrix: float64 (layers, heads)}.

    Where one entry holds nearly all of it, the distribution hardly moves, whatever the head does.
    """
    import torch

    with open_attention(model) as attention:
        layout = attention.layout
        found = {kind: np.empty((layout.layers, layout.heads)) for kind in ("product", "concat")}
        for layer in range(layout.layers):
            rows = {
                part: own.double().view(-1, layout.head_dim, layout.hidden_size)
                for part, own in attention.layer(layer).items()
            }
            for head in range(layout.heads):
                query, key, value = (
                    rows[p][i] for p, i in (("query", head), ("key", layout.group(head)), ("value", layout.group(head)))
                )
                found["product"][layer, head] = torch.softmax((query.T @ (key @ value.T)).flatten(), 0).max()
                found["concat"][layer, head] = torch.softmax(torch.cat([query, key, value]).flatten(), 0).max()
    return found


# --- scores against importance --------------------------------------------------------------------------------------


def correlations(
    scores: Mapping[str, np.ndarray],
    importance: np.ndarray,
    *,
    ratio: float = 0.1,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each metric's scores agree with the heads' importance.

    scores: {metric: (layers, heads)}; importance: (layers, heads). ratio: share of heads in the two top sets that are
    compared. resamples, seed: of the bootstrap, which draws heads with replacement, the same for every metric: it
    shows the spread over heads, not over questions or training runs.

    Returns:
        a row per metric: metric, spearman with low and high (95 % bootstrap), kendall (tau-b), top (heads in each top
        set), overlap (heads in both), expected (overlap of a random choice), p_value (of that overlap or more by
        chance; hypergeometric).

    Raises:
        UserError: scores and importance are of different shapes.
    """
    import pandas as pd
    from scipy.stats import hypergeom, kendalltau, rankdata, spearmanr

    total, top = importance.size, head_count(ratio, importance.size)
    drawn = np.random.default_rng(seed).integers(total, size=(resamples, total))

    def ranks(values: np.ndarray) -> np.ndarray:
        """Of every resample, centred and of length 1."""
        centred = rankdata(values.ravel()[drawn], axis=1) - (total + 1) / 2
        with np.errstate(invalid="ignore"):  # a resample of equal values has no correlation
            return centred / np.linalg.norm(centred, axis=1, keepdims=True)

    own, highest = ranks(importance), set(highest_places(importance, top).tolist())
    rows = []
    for metric, values in scores.items():
        if values.shape != importance.shape:
            raise UserError(
                f"The scores '{metric}' are of shape {values.shape} and the importance of {importance.shape}: "
                "compare heads of the same model."
            )
        low, high = np.nanpercentile((ranks(values) * own).sum(1), [2.5, 97.5])
        overlap = len(highest.intersection(highest_places(values, top).tolist()))
        rows.append(
            {
                "metric": metric,
                "spearman": float(spearmanr(values, importance, axis=None).statistic),
                "low": float(low),
                "high": float(high),
                "kendall": float(kendalltau(values, importance).statistic),
                "top": top,
                "overlap": overlap,
                "expected": top * top / total,
                "p_value": float(hypergeom.sf(overlap - 1, total, top, top)),
            }
        )
    return pd.DataFrame(rows)
