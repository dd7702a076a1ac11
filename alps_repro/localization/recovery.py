"""Validity of head scores: do they find heads that truly changed, and heads that truly matter?

ALPS takes a head's distance from the base as a proxy for its importance, which the paper defines as the task model's
loss of performance when the head is ablated (Eq. 3 and 4), and does not measure how good a proxy it is. Scores are
compared with two ground truths here: checkpoints whose attention was changed by a known amount (`moved`, `recall`), and
the task model's loss with one head at a time zero-ablated (`importance`, `correlations`).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection, head_count
from alps_repro.localization.metrics import METRICS
from alps_repro.localization.scores import HeadScores, localize
from alps_repro.models.attention import open_attention
from alps_repro.models.folders import is_adapter, resolve

if TYPE_CHECKING:
    import pandas as pd


class MetricSettings(TypedDict, total=False):
    """Arguments of `localize` that determine a metric."""

    metric: str
    ground: str


#: What can be compared: every metric, and PAD with the ground metric that the paper leaves open.
METRIC_VARIANTS: dict[str, MetricSettings] = {
    **{name: MetricSettings(metric=name) for name in METRICS},
    "pad_value": MetricSettings(metric="pad", ground="value"),
}

#: What is compared by default. `wasserstein` is `pad` times a constant and ranks heads in the same order.
COMPARED = tuple(name for name in METRIC_VARIANTS if name != "wasserstein")


# --- heads that truly changed ---------------------------------------------------------------------------------------


def moved(
    base: str | Path,
    output: str | Path,
    *,
    share: float = 0.1,
    factor: float = 5.0,
    background: float = 1e-4,
    seed: int = 0,
) -> HeadSelection:
    """Write a checkpoint's attention with all weights changed a little, and those of some heads changed more.

    Independent normal noise is added to each weight of the query, key and value projections, and `factor` times as much
    for the changed heads. These are all heads of `ceil(share · groups)` randomly selected key/value groups of the whole
    model, with their query rows and the group's key and value rows, so that no head is changed in part.

    Args:
        base: the embedded model, a checkpoint folder or a hub id.
        output: a folder that does not exist yet. It gets config.json and the query, key and value weights, which is all
            that `localize` reads; it is no complete model. Weights narrower than float32 are written as float32, so
            that rounding does not hide the noise.
        share: of the key/value groups that are changed more.
        factor: of their noise.
        background: standard deviation of the noise, in the weights' own unit.
        seed: of the selection and the noise; with the same seed, factors differ only in the scale of the changed heads'
            noise.

    Returns:
        The heads that were changed more.

    Raises:
        UserError: a number is not positive, `output` exists, or `base` is an adapter or not readable.
    """
    import torch
    from safetensors.torch import save_file

    folder, output = _checked(base, Path(output), factor=factor, background=background)
    draw, tensors = np.random.default_rng(seed), {}
    with open_attention(folder) as attention:
        layout = attention.layout
        truth = _whole_groups(layout, share, draw)
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


def _checked(base: str | Path, output: Path, **positive: float) -> tuple[Path, Path]:
    """The folder of a base and the output folder, if weights can be changed by these numbers."""
    for name, value in positive.items():
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise UserError(f"The {name} {value!r} is not a positive number: give by how much weights are to change.")
    folder = resolve(base)
    if is_adapter(folder):
        raise UserError(f"'{base}' is an adapter, and only whole checkpoints can be changed: give its base model.")
    if output.exists():
        raise UserError(f"'{output}' exists already: remove it or choose another folder for the changed weights.")
    return folder, output


def _whole_groups(layout: HeadLayout, share: float, draw: np.random.Generator) -> HeadSelection:
    """All heads of a share of the model's key/value groups."""
    total = layout.layers * layout.groups
    groups = {divmod(int(i), layout.groups) for i in draw.choice(total, head_count(share, total), replace=False)}
    chosen = ((layer, head) for layer, head in HeadSelection.all(layout) if (layer, layout.group(head)) in groups)
    return HeadSelection(tuple(chosen), layout)


def highest_places(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the highest values in the flattened array; ties as in `HeadScores.top`."""
    return np.argsort(-values, axis=None, kind="stable")[:count]


def recall(scores: HeadScores, truth: HeadSelection) -> float:
    """The share of the truly changed heads among as many highest scores, in [0, 1].

    Uninformative scores reach, on average, the share of changed heads in the model.

    Args:
        scores: of the changed model.
        truth: the changed heads.

    Raises:
        UserError: the two are of different models, or no head was changed.
    """
    if scores.layout != truth.layout:
        raise UserError("The scores and the changed heads are of different models: localize the changed model.")
    if not len(truth):
        raise UserError("No head was changed, so there is none to be found: change at least one.")
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
    """The share of truly changed heads that each metric finds, over factors and seeds.

    Each changed checkpoint is made once, in a temporary folder, read by every metric, and removed.

    Args:
        base: as in `moved`.
        factors: as in `moved`.
        seeds: as in `moved`.
        metrics: of `METRIC_VARIANTS`.
        head_matrices: of `metrics.HEAD_MATRICES`.
        share: as in `moved`.
        background: as in `moved`.
        progress: show a bar, one step per changed checkpoint.

    Returns:
        Columns metric, head_matrix, factor, seed, recall (in [0, 1]); a row per combination, in the requested order.

    Raises:
        UserError: as `moved` and `localize` raise it, or a metric is unknown.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    for metric in metrics:
        one_of("metric", metric, METRIC_VARIANTS)
    seeds = list(seeds)
    settings = [(float(factor), seed) for factor in factors for seed in seeds]
    rows: list[dict[str, Any]] = []
    for factor, seed in tqdm(settings, desc="changing heads", disable=not progress):
        with tempfile.TemporaryDirectory() as work:
            truth = moved(base, Path(work) / "moved", share=share, factor=factor, background=background, seed=seed)
            for head_matrix in head_matrices:
                for metric in metrics:
                    scores = localize(base, Path(work) / "moved", head_matrix=head_matrix, **METRIC_VARIANTS[metric])
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
    """The largest probability in each head's distribution (Eq. 6, tau 1).

    If one entry has nearly all the probability, the distribution hardly changes, whatever the head does.

    Args:
        model: as `localize` takes it.

    Returns:
        {head matrix: float64 (layers, heads)}.
    """
    import torch

    with open_attention(model) as attention:
        layout = attention.layout
        highest = {kind: np.empty((layout.layers, layout.heads)) for kind in ("product", "concat")}
        for layer in range(layout.layers):
            rows = {
                part: own.double().view(-1, layout.head_dim, layout.hidden_size)
                for part, own in attention.layer(layer).items()
            }
            for head in range(layout.heads):
                group = layout.group(head)
                query, key, value = rows["query"][head], rows["key"][group], rows["value"][group]
                highest["product"][layer, head] = torch.softmax((query.T @ (key @ value.T)).flatten(), 0).max()
                highest["concat"][layer, head] = torch.softmax(torch.cat([query, key, value]).flatten(), 0).max()
    return highest


# --- scores against importance --------------------------------------------------------------------------------------


def correlations(
    scores: Mapping[str, np.ndarray],
    importance: np.ndarray,
    *,
    ratio: float = 0.1,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement between each metric's scores and the heads' importance.

    Args:
        scores: {metric: (layers, heads)}.
        importance: (layers, heads).
        ratio: share of heads in the two top sets that are compared.
        resamples: of the bootstrap over heads, drawn with replacement, the same for every metric. Its intervals reflect
            the variation over heads, not over questions or training runs.
        seed: of the bootstrap.

    Returns:
        A row per metric: metric, spearman with low and high (95 % bootstrap), kendall (tau-b), top (heads in each top
        set), overlap (heads in both), expected (overlap of a random selection), p_value (of that overlap or more by
        chance; hypergeometric).

    Raises:
        UserError: scores and importance have different shapes.
    """
    import pandas as pd
    from scipy.stats import bootstrap

    top, rows = head_count(ratio, importance.size), []
    for metric, values in scores.items():
        if values.shape != importance.shape:
            raise UserError(
                f"The scores '{metric}' have shape {values.shape} and the importance {importance.shape}: compare heads "
                "of the same model."
            )
        resampled = bootstrap(
            (values.ravel(), importance.ravel()),
            _spearman,
            paired=True,
            n_resamples=resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        low, high = np.nanpercentile(resampled.bootstrap_distribution, [2.5, 97.5])
        rows.append({"metric": metric, **_agreement(values, importance, top, low=float(low), high=float(high))})
    return pd.DataFrame(rows)


def _spearman(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
    from scipy.stats import ConstantInputWarning, pearsonr, rankdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)  # a resample of equal values has no correlation
        return pearsonr(rankdata(x, axis=axis), rankdata(y, axis=axis), axis=axis).statistic


def _agreement(values: np.ndarray, importance: np.ndarray, top: int, **interval: float) -> dict[str, float]:
    """A row of `correlations` but for its metric; interval: of Spearman's correlation."""
    from scipy.stats import hypergeom, kendalltau, spearmanr

    highest = set(highest_places(importance, top).tolist())
    overlap = len(highest.intersection(highest_places(values, top).tolist()))
    return {
        "spearman": float(spearmanr(values, importance, axis=None).statistic),
        **interval,
        "kendall": float(kendalltau(values, importance).statistic),
        "top": top,
        "overlap": overlap,
        "expected": top * top / importance.size,
        "p_value": float(hypergeom.sf(overlap - 1, importance.size, top, top)),
    }
