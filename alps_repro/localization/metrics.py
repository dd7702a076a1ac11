"""Metrics: distances between a head's weights, or the distributions made of them, in two models."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import PARTS, HeadLayout, Part

if TYPE_CHECKING:
    import torch


#: Head-matrix variants: Eq. 5's product; the head's rows concatenated; the rows as the authors' implementation slices
#: them.
HEAD_MATRICES = ("product", "concat", "released")

#: Ground metrics of PAD's Wasserstein distance: between positions of entries, or between their probabilities.
GROUNDS = ("position", "value")


class Scratch(threading.local):
    """A scoring thread's buffers, reused from head to head: allocating them each time would cost as much as scoring."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, size: int) -> torch.Tensor:
        """A float64 vector of that size, with undefined contents."""
        import torch

        if name not in self.kept or len(self.kept[name]) < size:
            self.kept[name] = torch.empty(size, dtype=torch.float64)
        return self.kept[name][:size]


def block(rows: torch.Tensor, index: int, layout: HeadLayout) -> torch.Tensor:
    """The rows of one head (or group), (head dim, hidden size), of all rows in head order."""
    return rows[index * layout.head_dim : (index + 1) * layout.head_dim]


def middle(rows: dict[Part, torch.Tensor], group: int, layout: HeadLayout, scratch: Scratch) -> torch.Tensor:
    """W_kᵀ · W_v of a group, (head dim, head dim) in float64: the factor that its heads' products share."""
    key, value = block(rows["key"], group, layout), block(rows["value"], group, layout)
    wide = [scratch(name, own.numel()).view_as(own).copy_(own) for name, own in (("key", key), ("value", value))]
    return wide[0] @ wide[1].T


def product(query: torch.Tensor, middle: torch.Tensor, scratch: Scratch, name: str) -> torch.Tensor:
    """A head's matrix by Eq. 5, W_q · (W_kᵀ · W_v), flattened row by row: (hidden size · head dim,).

    Args:
        query: the head's query rows, (head dim, hidden size).
        middle: its group's product, see `middle`.
        scratch: the thread's buffers.
        name: of the buffer in it that holds the matrix.
    """
    import torch

    own = scratch("query", query.numel()).view_as(query).copy_(query)
    out = scratch(name, query.shape[1] * len(middle))
    torch.mm(own.T, middle, out=out.view(query.shape[1], len(middle)))
    return out


def join(rows: dict[Part, torch.Tensor], head: int, layout: HeadLayout, kind: str, out: torch.Tensor) -> torch.Tensor:
    """A head's query, key and value rows concatenated, flattened as stored: a view of `out`.

    Args:
        rows: of the layer, in head (group) order.
        head: its number.
        layout: of the model.
        kind: `concat` takes the key and value group that the head reads; `released` slices as `find_heads` in the
            authors' implementation does, by the query head's number: without such a group (head >= groups), k and v are
            empty.
        out: buffer of float64 for at least 3 · head dim · hidden size numbers.
    """
    group = layout.group(head) if kind == "concat" else head
    end = 0
    for part, index in zip(PARTS, (head, group, group)):
        own = block(rows[part], index, layout)
        out[end : end + own.numel()].view_as(own).copy_(own)
        end += own.numel()
    return out[:end]


def _log_softmax(x: torch.Tensor, tau: float) -> torch.Tensor:
    import torch

    return torch.log_softmax(x / tau, 0)


def _exponentials(x: torch.Tensor, tau: float) -> float:
    """Write exp(x / tau), up to a factor, over `x`; returns its sum."""
    if tau != 1:
        x.div_(tau)
    highest = float(x.amax())  # a third of the time of max(), which also finds the index
    if abs(highest) > 100:  # otherwise neither overflow nor a sum of 0 is near, and a pass is saved
        x.sub_(highest)
    return float(x.exp_().sum())


def _softmax(x: torch.Tensor, tau: float) -> torch.Tensor:
    """The softmax, written over `x`."""
    total = _exponentials(x, tau)
    return x.mul_(1 / total)


def _pad(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """W1 with the i-th probability at position i / (N - 1) of [0, 1]: sum |CDF_B - CDF_T| / (N - 1)."""
    z_b, z_t = _exponentials(base, tau), _exponentials(task, tau)
    # Summing the difference, not each distribution, keeps the cumulative sum as small as the signal. Both stay
    # z_b times too large until the end, which saves a pass over each.
    return float(base.sub_(task, alpha=z_b / z_t).cumsum_(0).abs_().sum()) / z_b / (len(base) - 1)


def _pad_value(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """W1 between the probabilities as samples on the real line: mean |sort(P_B) - sort(P_T)|."""
    difference = _softmax(base, tau).sort().values.sub_(_softmax(task, tau).sort().values)
    return float(difference.abs_().mean())


def _wasserstein(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    return _pad(base, task, tau) * (len(base) - 1)


def _kl_divergence(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> float:
    # p d + q - p with d = log(p / q), written so that nothing cancels where p and q are close (each term is >= 0 and
    # of second order), and nothing overflows where they are not.
    import torch

    return float(torch.where(d < -1, p * d + (q - p), p * (d + torch.expm1(-d))).sum())


def _kl(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """D(P_B || P_T), as the paper's appendix E writes it; exact, in nats."""
    log_b, log_t = _log_softmax(base, tau), _log_softmax(task, tau)
    return _kl_divergence(log_b.exp(), log_t.exp(), log_b - log_t)


def _kl_released(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """D(P_T || P_B) with 1e-8 added to every entry, as the authors' implementation computes it."""
    p_b, p_t = _softmax(base, tau) + 1e-8, _softmax(task, tau) + 1e-8
    return _kl_divergence(p_t, p_b, p_t.log() - p_b.log())


def _js(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """Jensen-Shannon divergence (not its root), in nats."""
    import torch

    log_b, log_t = _log_softmax(base, tau), _log_softmax(task, tau)
    p_b, p_t, zero = log_b.exp(), log_t.exp(), torch.zeros(1, dtype=log_b.dtype)
    mean = (p_b + p_t) / 2
    # log(p / mean) = log 2 - log(1 + q / p)
    d_b = math.log(2) - torch.logaddexp(zero, log_t - log_b)
    d_t = math.log(2) - torch.logaddexp(zero, log_b - log_t)
    return 0.5 * (_kl_divergence(p_b, mean, d_b) + _kl_divergence(p_t, mean, d_t))


def _cosine(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """1 - cos(P_B, P_T), as half the squared distance of the unit vectors, which does not cancel."""
    p_b, p_t = _softmax(base, tau), _softmax(task, tau)
    return float(((p_b / p_b.norm()) - (p_t / p_t.norm())).square().sum()) / 2


def _euclidean(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """|P_B - P_T|_2."""
    return float((_softmax(base, tau) - _softmax(task, tau)).norm())


def _l2(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """|M_B - M_T|_2 of the head matrices themselves, without a softmax."""
    return float((base - task).norm())


def _relative_l2(base: torch.Tensor, task: torch.Tensor, tau: float) -> float:
    """|M_B - M_T|_2 / |M_B|_2."""
    size = float(base.norm())
    if size == 0:
        raise UserError("A head of the base model is all zeros, so relative_l2 is undefined: use the metric l2.")
    return _l2(base, task, tau) / size


Metric = Callable[["torch.Tensor", "torch.Tensor", float], float]

#: Every metric of two models' weights by name: (base matrix, task matrix, tau) -> distance. Both matrices are flattened
#: float64 and may be overwritten.
METRICS: dict[str, Metric] = {
    "pad": _pad,
    "wasserstein": _wasserstein,
    "kl": _kl,
    "kl_released": _kl_released,
    "js": _js,
    "cosine": _cosine,
    "euclidean": _euclidean,
    "l2": _l2,
    "relative_l2": _relative_l2,
}

#: Metrics without a softmax, and so without a temperature.
WITHOUT_SOFTMAX = ("l2", "relative_l2")

#: In place of a head matrix: scores of per-head attention outputs (`selectors`).
RESULT = "result"


def check_metric(metric: str, head_matrix: str, tau: float, ground: str) -> Metric:
    """The metric's function.

    Args:
        metric: of `METRICS`.
        head_matrix: of `HEAD_MATRICES`.
        tau: softmax temperature.
        ground: of `GROUNDS`; other than `position` for the metric `pad` only.

    Raises:
        UserError: one of them is unknown, or they do not go together.
    """
    one_of("metric", metric, METRICS)
    one_of("head matrix", head_matrix, HEAD_MATRICES)
    one_of("ground", ground, GROUNDS)
    if not (isinstance(tau, (int, float)) and 0 < tau < math.inf):
        raise UserError(f"tau is {tau!r}: the softmax needs a positive temperature; the paper's is 1.")
    if ground != "position" and metric != "pad":
        raise UserError(f"The ground '{ground}' belongs to the metric 'pad'; '{metric}' has none: leave it out.")
    if tau != 1 and metric in WITHOUT_SOFTMAX:
        raise UserError(f"The metric '{metric}' uses no softmax, so tau = {tau} has no effect: leave it out.")
    return _pad_value if ground == "value" else METRICS[metric]
