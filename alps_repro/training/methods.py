"""The registry of methods: what each one trains of attention.

A method is a name, a description and a function; one that is added to `METHODS` can be used everywhere, and appears in
every table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.localization.metrics import RESULT
from alps_repro.localization.scores import HeadScores
from alps_repro.training.adapters import ADAPTERS, dora_magnitudes, lora_weights


def check_ratio(ratio: float) -> None:
    """Raise `UserError` unless a ratio is in (0, 1]."""
    if not 0 < ratio <= 1:
        raise UserError(f"The ratio {ratio} is not in (0, 1]: give the share of heads to train, such as 0.1.")


def check_scope(scope: str, quantization: str, method: str) -> None:
    """Raise `UserError` if a scope cannot be trained by a method, or on a quantized base."""
    if quantization != "none" and scope != "heads":
        raise UserError(
            f"With a base loaded in {quantization}, what lies outside the heads cannot be trained: use scope='heads'."
        )
    adapter = ADAPTERS[METHODS[method].adapter]
    if METHODS[method].adapter != "rows" and scope != "heads":
        raise UserError(f"The method '{method}' trains {adapter.about} and nothing else: use scope='heads'.")
    if quantization != "none" and quantization not in adapter.quantized:
        raise UserError(
            f"The method '{method}' ({adapter.about}) cannot be trained on a base in {quantization}: use "
            f"quantization={' or '.join(map(repr, (*adapter.quantized, 'none')))}."
        )


Select = Callable[[HeadLayout, float, "HeadScores | None", int], "HeadSelection | None"]
Rank = Callable[[HeadLayout, float, "HeadScores | None"], int]

#: The rank of LoRA in the paper. It trains 9 to 19 % of the Llamas' query, key and value weights, 62 % of SmolLM2's.
LORA_RANK = 128


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        about: one line for tables and help.
        select: (layout, ratio, scores, choice seed) -> heads, or None for no heads.
        adapter: of `ADAPTERS`, how the heads are trained with scope `heads`; other than `rows`, that is the only scope.
        rank: (layout, ratio, scores) -> rank, for adapters of all projections, in place of heads.
        uses_scores: whether it needs a localization first.
        metric: (metric, head matrix) of that localization, if it is not the run's.
        uses_ratio: whether the ratio has an effect.
        draws: whether the choice seed has an effect.
        source: `paper`; `control`, which the paper lacks; or the other system that it is, or takes its heads from.
    """

    about: str
    select: Select | None = None
    adapter: str = "rows"
    rank: Rank | None = None
    uses_scores: bool = False
    metric: tuple[str, str] | None = None
    uses_ratio: bool = True
    draws: bool = False
    source: str = "paper"


def _top(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int = 0) -> HeadSelection:
    return _checked(layout, scores).top(ratio)


def _checked(layout: HeadLayout, scores: HeadScores | None) -> HeadScores:
    assert scores is not None  # `finetune` has checked that
    if scores.layout != layout:
        raise UserError("The head scores belong to a model of another shape than the one to be trained: localize it.")
    return scores


def row_weights(heads: HeadSelection) -> int:
    """Number of weights in the query, key and value rows of these heads, each group's once, without biases."""
    layout = heads.layout
    return sum(map(len, layout.selected_rows(heads).values())) * layout.hidden_size


def _random_matched(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int) -> HeadSelection:
    """Heads in random order, each taken unless there would be more weights than `alps` trains."""
    left = row_weights(_top(layout, ratio, scores))
    block = layout.head_dim * layout.hidden_size
    chosen: list[tuple[int, int]] = []
    groups: set[tuple[int, int]] = set()
    for i in np.random.default_rng(seed).permutation(layout.total):
        layer, head = divmod(int(i), layout.heads)
        group = (layer, layout.group(head))
        weights = block if group in groups else 3 * block
        if weights <= left:
            chosen.append((layer, head))
            groups.add(group)
            left -= weights
    return HeadSelection(tuple(chosen), layout)


def _matched(layout: HeadLayout, ratio: float, scores: HeadScores | None, besides: int = 0) -> int:
    """The rank at which the number of weights, and those `besides`, is nearest to that of `alps`."""
    return max(1, round((row_weights(_top(layout, ratio, scores)) - besides) / lora_weights(layout)))


def _every(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int) -> HeadSelection:
    return HeadSelection.all(layout)


METHODS: dict[str, Method] = {
    "full": Method("all heads", _every, uses_ratio=False),
    "no_attn": Method("no head (the paper's w/o attn)", lambda layout, ratio, scores, seed: None, uses_ratio=False),
    "random": Method(
        "randomly selected heads of the whole model",
        lambda layout, ratio, scores, seed: HeadSelection.random(layout, ratio, seed),
        draws=True,
    ),
    "layer_consistent": Method(
        "the same number of randomly selected heads in every layer",
        lambda layout, ratio, scores, seed: HeadSelection.layer_consistent(layout, ratio, seed),
        draws=True,
    ),
    "lora": Method(
        f"LoRA of rank {LORA_RANK} on q, k and v",
        adapter="lora",
        rank=lambda layout, ratio, scores: LORA_RANK,
        uses_ratio=False,
    ),
    "alps": Method("the heads that changed most in the task model", _top, uses_scores=True),
    "bottom": Method(
        "the heads that changed least",
        lambda layout, ratio, scores, seed: _checked(layout, scores).bottom(ratio),
        uses_scores=True,
        source="control",
    ),
    "l2": Method(
        "the heads whose weights changed most, by L2 norm",
        _top,
        uses_scores=True,
        metric=("l2", "concat"),
        source="control",
    ),
    "random_matched": Method(
        "randomly selected heads, parameter-matched to alps",
        _random_matched,
        uses_scores=True,
        draws=True,
        source="control",
    ),
    "lora_matched": Method(
        "LoRA on q, k and v, parameter-matched to alps",
        adapter="lora",
        rank=_matched,
        uses_scores=True,
        source="control",
    ),
}

# Other systems (docs/systems.md): how heads are selected and what of them is trained are two independent axes.

_SELECTORS: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "alps": ("that changed most in the task model", "ALPS", None),
    "lofit": ("whose learned scales are largest", "LoFiT", ("scale_norm", RESULT)),
    "hifi": ("with the richest and most correlated outputs", "HiFi", ("hifi", RESULT)),
    "importance": ("whose ablation hurts the task model most (Eq. 3)", "Eq. 3", ("importance", RESULT)),
}

METHODS |= {
    name: Method(f"the heads {about}", _top, uses_scores=True, metric=metric, source=source)
    for name, (about, source, metric) in _SELECTORS.items()
    if name != "alps"
}
METHODS |= {
    f"{name}_offset": Method(
        f"an offset for each of the heads {about}",
        _top,
        "offsets",
        uses_scores=True,
        metric=metric,
        source="LoFiT" if name == "lofit" else f"{source} + LoFiT",
    )
    for name, (about, source, metric) in _SELECTORS.items()
}
METHODS |= {
    "random_offset": Method(
        "an offset for each of randomly selected heads",
        METHODS["random"].select,
        "offsets",
        draws=True,
        source="LoFiT",
    ),
    "lofit_scales": Method(
        "a scale for each element of all per-head attention outputs", _every, "scales", uses_ratio=False, source="LoFiT"
    ),
    "jola": Method("a gated scale and a gated offset for every head", _every, "jola", uses_ratio=False, source="JoLA"),
    "jola_additive": Method("a gated offset for every head", _every, "jola_additive", uses_ratio=False, source="JoLA"),
    "jola_multiplicative": Method(
        "a gated scale for every head", _every, "jola_multiplicative", uses_ratio=False, source="JoLA"
    ),
    "jola_ungated": Method(
        "a scale and an offset for every head, without gates", _every, "jola_ungated", uses_ratio=False, source="JoLA"
    ),
    "dora_matched": Method(
        "DoRA on q, k and v, parameter-matched to alps",
        adapter="dora",
        rank=lambda layout, ratio, scores: _matched(layout, ratio, scores, dora_magnitudes(layout)),
        uses_scores=True,
        source="DoRA",
    ),
    "shira_matched": Method(
        "random entries of q, k and v, parameter-matched to alps",
        adapter="shira",
        rank=_matched,
        uses_scores=True,
        source="SHiRA",
    ),
}

SCOPES = {
    "all": "the method's heads and everything outside the query, key and value projections (the paper's setting)",
    "heads": "the method's heads and nothing else",
}
