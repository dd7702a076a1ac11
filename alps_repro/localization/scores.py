"""How much each attention head changed between a base model and a task model (ALPS, sections 3.2 and 3.3).

A head's matrix is made of its query, key and value rows (`head_matrix`), turned into a distribution by a softmax
(Eq. 6), and compared between the two models by a distance (`metric`; the paper's s_PAD is `pad`, Eq. 7).
Everything is computed in float64. `docs/deviations.md` lists differences between paper and authors' implementation.
"""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.errors import UserError
from alps_repro.heads.layout import PARTS, HeadLayout, Part
from alps_repro.heads.selection import HeadSelection, head_count
from alps_repro.localization.metrics import RESULT, Metric, Scratch, block, check_metric, join, middle, product
from alps_repro.models.attention import Attention, open_attention

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Rows = dict[Part, torch.Tensor]

#: Maximal number of layers that are read and scored at the same time.
THREADS = 4


@dataclass(frozen=True, eq=False)
class HeadScores:
    """One score per query head; higher means a larger change from the base.

    Attributes:
        values: float64, (layers, heads).
        layout: of both models.
        base: name of the base model.
        task: name of the task model.
        metric: as `localize` takes it.
        head_matrix: as `localize` takes it; `metrics.RESULT` for scores of per-head attention outputs.
        tau: as `localize` takes it.
        ground: as `localize` takes it.
        compared_in: the coarser dtype to which both models were rounded (several if it differs between tensors), or
            None if they were compared as stored.
    """

    values: np.ndarray
    layout: HeadLayout
    base: str
    task: str
    metric: str = "pad"
    head_matrix: str = "product"
    tau: float = 1.0
    ground: str = "position"
    compared_in: str | None = None

    def _ranked(self, order: np.ndarray, ratio: float) -> HeadSelection:
        # A stable sort: equal scores stay in the order of (layer, head).
        flat = np.argsort(order, axis=None, kind="stable")[: head_count(ratio, self.values.size)]
        return HeadSelection(tuple(divmod(int(i), self.layout.heads) for i in flat), self.layout)

    def _tie(self, order: np.ndarray, ratio: float) -> str | None:
        """A phrase if only some of the heads with the same score are selected, else None."""
        count = head_count(ratio, self.values.size)
        last = np.argsort(order, axis=None, kind="stable")[count - 1]
        edge = order.flat[last]
        tied, taken = int((order == edge).sum()), count - int((order < edge).sum())
        return None if taken == tied else f"{taken} of {tied} heads of the same score, {self.values.flat[last]:.3g}"

    def _selected(self, order: np.ndarray, ratio: float) -> HeadSelection:
        if tie := self._tie(order, ratio):
            warnings.warn(
                f"The selection of {ratio:.4g} of the heads by '{self.metric}' ends among {tie}: these are "
                "selected in the order of their numbers.",
                UserWarning,
                stacklevel=3,
            )
        return self._ranked(order, ratio)

    def top(self, ratio: float) -> HeadSelection:
        """The `ceil(ratio · total)` highest heads; ties go to the lower layer, then head (Algorithm 1).

        Warns if the last of them ties with a head that is left out, as unchanged heads do (score 0).
        """
        return self._selected(-self.values, ratio)

    def bottom(self, ratio: float) -> HeadSelection:
        """The `ceil(ratio · total)` lowest heads; ties go to the lower layer, then head; warns as `top` does."""
        return self._selected(self.values, ratio)

    def checked(self) -> HeadScores:
        """These scores.

        Raises:
            UserError: all heads have the same score, so that none can be selected.
        """
        if not self.values.any() and self.head_matrix != RESULT:
            rounded = f" (in {self.compared_in})" if self.compared_in else ""
            raise UserError(
                f"No head of '{self.task}' differs from '{self.base}'{rounded}: name the tuned model, with "
                "trained attention."
            )
        if self.values.size > 1 and np.ptp(self.values) == 0:
            raise UserError(
                f"All heads of '{self.task}' have the same score by '{self.metric}', so none can be selected by it: "
                "use another model or metric."
            )
        return self

    def dump(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        fields = {**self.__dict__, "values": self.values.tolist(), "layout": asdict(self.layout)}
        if self.compared_in is None:
            del fields["compared_in"]
        return fields

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; `load` gives the same float64 values bit for bit."""
        Path(path).write_text(json.dumps(self.dump(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what `save` wrote."""
        try:
            stored = json.loads(Path(path).read_text())
            stored["layout"] = layout = HeadLayout(**stored["layout"])
            stored["values"] = values = np.array(stored["values"], dtype=np.float64)
            scores = cls(**stored)
        except (OSError, TypeError, KeyError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"'{path}' is not a file of head scores ({error}).") from error
        if values.shape != (layout.layers, layout.heads) or not np.isfinite(values).all():
            raise UserError(f"'{path}' does not hold one finite score per head of its layout: localize again.")
        return scores

    def heatmap(self, ratio: float = 0.1) -> Figure:
        """Scores as a heat map, layers from the bottom up, with the heads that `top(ratio)` selects marked."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        layers, heads = self.values.shape
        cell = min(0.26, 7.0 / max(layers, heads))
        figure = Figure(figsize=(heads * cell + 2.6, layers * cell + 1.3), layout="constrained")
        axes = figure.add_subplot()
        # A few heads change a hundred times more than the rest, so the colour scale is logarithmic; a few hardly change
        # at all, so the lowest fortieth shares one colour. Zeros stay grey.
        axes.set_facecolor("0.85")
        shown = np.ma.masked_less_equal(self.values, 0)
        norm = None
        if shown.count():
            norm = LogNorm(np.percentile(shown.compressed(), 2.5), shown.max(), clip=True)
        image = axes.imshow(shown, origin="lower", cmap="cividis", norm=norm, aspect="equal", interpolation="nearest")
        self._mark(axes, ratio, size=(cell * 72 * 0.36) ** 2)
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")
        axes.set_xticks(range(0, heads, 1 if heads <= 12 else 4))
        axes.set_yticks(range(0, layers, 5 if layers > 10 else 1))
        axes.tick_params(length=2)
        bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03, extend="min")
        compared = f", compared in {self.compared_in}" if self.compared_in else ""
        bar.set_label(f"{self.metric} ({self.head_matrix}){compared}")
        figure.legend(loc="outside lower center", frameon=False, fontsize=9)
        return figure

    def _mark(self, axes: Axes, ratio: float, size: float) -> None:
        """Circles around the selected heads; size: of a circle, in square points."""
        chosen, tie = np.array(self._ranked(-self.values, ratio).heads), self._tie(-self.values, ratio)
        axes.scatter(
            chosen[:, 1],
            chosen[:, 0],
            s=size,
            marker="o",
            facecolors="none",
            edgecolors="#d62728",
            linewidths=1.4,
            label=f"top {ratio:.0%} ({len(chosen)} heads)" + (f",\nending among {tie}" if tie else ""),
        )


def _check_pair(base: Attention, task: Attention) -> None:
    if base.layout != task.layout:
        ours, theirs = asdict(base.layout), asdict(task.layout)
        differ = ", ".join(f"{k} {ours[k]} and {theirs[k]}" for k in ours if ours[k] != theirs[k])
        raise UserError(
            f"{base.source} and {task.source} are not a base and a model tuned from it: they differ in {differ}."
        )


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The less precise of two dtypes; float16 is more precise than bfloat16."""
    import torch

    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def _rounded(
    base: torch.Tensor, task: torch.Tensor, stored: tuple[torch.dtype, torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides in the coarser of the two dtypes in which they are stored, equal if they differ by rounding alone."""
    import torch

    if set(stored) != {torch.float16, torch.bfloat16}:
        coarse = _coarser(*stored)
        highest = torch.finfo(coarse).max
        return base.clamp(-highest, highest).to(coarse), task.clamp(-highest, highest).to(coarse)
    # float16 has more digits, bfloat16 a wider range: small numbers are rounded to float16, all to bfloat16. A number
    # half way between two others may have been rounded to either of them before.
    half, brain = (base, task) if stored[0] == torch.float16 else (task, base)
    half, brain = half.half().double(), brain.bfloat16().double()

    def nearest(x: torch.Tensor, dtype: torch.dtype, other: torch.Tensor) -> torch.Tensor:
        highest = torch.finfo(dtype).max
        y = x.clamp(-highest, highest).to(dtype).double()
        return torch.where((x - y).abs() == (x - other).abs(), other, y)

    ours = nearest(half, torch.bfloat16, brain), nearest(brain, torch.float16, half).bfloat16().double()
    return ours if stored[0] == torch.float16 else ours[::-1]


def localize(
    base: Any,
    task: Any,
    *,
    metric: str = "pad",
    head_matrix: str = "product",
    tau: float = 1.0,
    ground: str = "position",
    progress: bool = False,
) -> HeadScores:
    """Score every query head by how much it changed from `base` to `task`.

    If a projection is stored in different dtypes, both sides are rounded to the coarser one first, with a warning:
    rounding in storage is not a change by training. (An adapter's rows are compared as they are, among its base's own.)

    Args:
        base: a checkpoint folder (one or many safetensors shards), a hub id, the embedded model's name, or a loaded
            model. Folders are read tensor by tensor: no model is built, and memory use is a few layers' projections.
        task: as `base`, or the folder of a saved ALPS adapter.
        metric: one of `METRICS`.
        head_matrix: `product` (Eq. 5), `concat`, `released`.
        tau: softmax temperature (Eq. 6).
        ground: for `pad`, where the probabilities lie: at the `position` of their entry (as in the authors'
            implementation), or at their own `value`.
        progress: show a bar, one step per layer.

    Returns:
        The scores, float64.

    Raises:
        UserError: a name leads nowhere, the two models do not match, no head differs, or weights are NaN, missing or
            unreadable.
    """
    import torch
    from tqdm.auto import tqdm

    scorer = _Scorer(check_metric(metric, head_matrix, tau, ground), head_matrix, tau)
    # Each thread reads and scores layers of its own, computing alone: a head is too small to be worth splitting. Few
    # threads, so that few layers are in memory.
    threads = min(torch.get_num_threads(), THREADS)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with open_attention(base) as b, open_attention(task) as t, pool:
        _check_pair(b, t)
        # If two threads make a process's first product and exponentials at the same time, these are sometimes rounded
        # differently from all later ones: so they are made here, alone, and discarded.
        first = torch.ones(64, 64, dtype=torch.float64)
        torch.mm(first, first).exp_().cumsum_(0)
        layers = pool.map(lambda layer: scorer.layer(b, t, layer), range(b.layout.layers))
        values = np.array(list(tqdm(layers, desc="scoring layers", total=b.layout.layers, disable=not progress)))
        named = sorted([str(dtype).removeprefix("torch.") for dtype in (*s, _coarser(*s))] for s in scorer.differing)
        for kept_in, tuned_in, coarser in named:
            warnings.warn(
                f"'{b.source}' is stored in {kept_in} and '{t.source}' in {tuned_in}: both are compared in {coarser}, "
                "so that rounding does not count as change.",
                UserWarning,
                stacklevel=2,
            )
        compared = ", ".join(sorted({coarser for *_, coarser in named})) or None
        return HeadScores(
            values, b.layout, b.source, t.source, metric, head_matrix, float(tau), ground, compared
        ).checked()


class _Scorer:
    """Scores layers, in several threads at a time.

    Attributes:
        differing: pairs of dtypes in which a projection was stored, where base and task differ.
    """

    def __init__(self, distance: Metric, head_matrix: str, tau: float) -> None:
        self.distance, self.head_matrix, self.tau = distance, head_matrix, tau
        self.scratch = Scratch()
        self.differing: set[tuple[torch.dtype, torch.dtype]] = set()

    def layer(self, base: Attention, task: Attention, layer: int) -> list[float]:
        """The score of each head of a layer."""
        import torch

        with torch.no_grad():
            ours, theirs = self._read(base, task, layer)
            layout, tau = base.layout, self.tau
            if self.head_matrix != "product":
                size = 3 * layout.head_dim * layout.hidden_size
                return [
                    self.distance(
                        join(ours, head, layout, self.head_matrix, self.scratch("base", size)),
                        join(theirs, head, layout, self.head_matrix, self.scratch("task", size)),
                        tau,
                    )
                    for head in range(layout.heads)
                ]
            scores: list[float] = []
            for group in range(layout.groups):
                middles = [middle(rows, group, layout, self.scratch) for rows in (ours, theirs)]
                for head in range(group * layout.heads_per_group, (group + 1) * layout.heads_per_group):
                    matrices = (
                        product(block(rows["query"], head, layout), own, self.scratch, name)
                        for name, rows, own in zip(("base", "task"), (ours, theirs), middles)
                    )
                    scores.append(self.distance(next(matrices), next(matrices), tau))
            return scores

    def _read(self, base: Attention, task: Attention, layer: int) -> tuple[Rows, Rows]:
        """A layer's rows of both models, rounded to the coarser dtype where they are stored in different ones."""
        ours, theirs = base.layer(layer), task.layer(layer)
        kept, tuned = base.stored(layer), task.stored(layer)
        for part in PARTS:
            stored = kept[part], tuned[part]
            if stored[0] != stored[1]:
                self.differing.add(stored)
                ours[part], theirs[part] = _rounded(ours[part], theirs[part], stored)
        return ours, theirs
