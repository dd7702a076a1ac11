"""The registry of methods: what each one trains of attention.

A method is a name, a sentence and a function; one that is added to `METHODS` can be asked for everywhere, and stands in
every table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alps_repro.errors import UserError
from alps_repro.heads import PARTS, HeadLayout, HeadSelection
from alps_repro.scores import HeadScores

Select = Callable[[HeadLayout, float, "HeadScores | None", int], "HeadSelection | None"]
Rank = Callable[[HeadLayout, float, "HeadScores | None"], int]

#: The rank of LoRA in the paper. It trains 9 to 19 % of the Llamas' query, key and value weights, 62 % of SmolLM2's.
LORA_RANK = 128


@dataclass(frozen=True)
class Method:
    """about: one line for tables and help. select: (layout, ratio, scores, choice seed) -> heads, or None for none.

    rank: (layout, ratio, scores) -> rank, for methods that train LoRA on q, k and v in place of rows.
    uses_scores: whether a localization has to come first; metric: the (metric, head matrix) of that localization where
    it is not the run's. uses_ratio: whether the ratio changes anything. draws: whether the choice seed does.
    control: not in the paper.
    """

    about: str
    select: Select | None = None
    rank: Rank | None = None
    uses_scores: bool = False
    metric: tuple[str, str] | None = None
    uses_ratio: bool = True
    draws: bool = False
    control: bool = False


def _top(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int = 0) -> HeadSelection:
    return _checked(layout, scores).top(ratio)


def _checked(layout: HeadLayout, scores: HeadScores | None) -> HeadScores:
    assert scores is not None  # `finetune` has asked for them
    if scores.layout != layout:
        raise UserError("The head scores belong to a model of another shape than the one to be trained: localize it.")
    return scores


def row_weights(heads: HeadSelection) -> int:
    """Weights in the query, key and value rows of these heads, each group's once; biases left out."""
    layout = heads.layout
    return sum(map(len, layout.selected_rows(heads).values())) * layout.hidden_size


def lora_weights(layout: HeadLayout) -> int:
    """Weights of LoRA of rank 1 on all query, key and value projections."""
    total = 0
    for layer in range(layout.layers):
        outputs = {
            layout.module(layer, part): layout.projection_rows(part) for part in PARTS
        }  # a fused one counts once
        total += sum(layout.hidden_size + rows for rows in outputs.values())
    return total


def _random_matched(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int) -> HeadSelection:
    """Heads in a drawn order, each taken unless it would lead over the weights that `alps` trains."""
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


def _lora_matched(layout: HeadLayout, ratio: float, scores: HeadScores | None) -> int:
    """The rank whose weights come nearest to those that `alps` trains."""
    return max(1, round(row_weights(_top(layout, ratio, scores)) / lora_weights(layout)))


METHODS: dict[str, Method] = {
    "full": Method("all heads", lambda layout, ratio, scores, seed: HeadSelection.all(layout), uses_ratio=False),
    "no_attn": Method("no head (the paper's w/o attn)", lambda layout, ratio, scores, seed: None, uses_ratio=False),
    "random": Method(
        "heads drawn from the whole model",
        lambda layout, ratio, scores, seed: HeadSelection.random(layout, ratio, seed),
        draws=True,
    ),
    "layer_consistent": Method(
        "the same number of drawn heads in every layer",
        lambda layout, ratio, scores, seed: HeadSelection.layer_consistent(layout, ratio, seed),
        draws=True,
    ),
    "lora": Method(
        f"LoRA of rank {LORA_RANK} on q, k and v", rank=lambda layout, ratio, scores: LORA_RANK, uses_ratio=False
    ),
    "alps": Method("the heads that moved most in the task model", _top, uses_scores=True),
    "bottom": Method(
        "the heads that moved least",
        lambda layout, ratio, scores, seed: _checked(layout, scores).bottom(ratio),
        uses_scores=True,
        control=True,
    ),
    "l2": Method(
        "the heads whose weights moved most, by their plain norm",
        _top,
        uses_scores=True,
        metric=("l2", "concat"),
        control=True,
    ),
    "random_matched": Method(
        "drawn heads with as many weights as alps trains", _random_matched, uses_scores=True, draws=True, control=True
    ),
    "lora_matched": Method(
        "LoRA on q, k and v with as many weights as alps trains", rank=_lora_matched, uses_scores=True, control=True
    ),
}

SCOPES = {
    "all": "the method's heads and everything outside the query, key and value projections (the paper's setting)",
    "heads": "the method's heads and nothing else",
}
