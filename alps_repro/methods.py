"""The registry of methods: which heads each one trains.

A method is a name, a sentence and a function; one that is added to `METHODS` can be asked for everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alps_repro.errors import UserError
from alps_repro.heads import HeadLayout, HeadSelection
from alps_repro.scores import HeadScores

Select = Callable[[HeadLayout, float, "HeadScores | None", int], "HeadSelection | None"]


@dataclass(frozen=True)
class Method:
    """about: one line for tables and help. select: (layout, ratio, scores, choice seed) -> heads, or None for none.

    uses_scores: whether a localization has to come first. uses_ratio: whether the ratio changes anything.
    """

    about: str
    select: Select
    uses_scores: bool = False
    uses_ratio: bool = True


def _alps(layout: HeadLayout, ratio: float, scores: HeadScores | None, seed: int) -> HeadSelection:
    if scores is None:
        raise UserError("The method 'alps' needs head scores: localize first and pass them as scores.")
    if scores.layout != layout:
        raise UserError("The head scores belong to a model of another shape than the one to be trained: localize it.")
    return scores.top(ratio)


METHODS: dict[str, Method] = {
    "full": Method("all heads", lambda layout, ratio, scores, seed: HeadSelection.all(layout), uses_ratio=False),
    "no_attn": Method("no head (the paper's w/o attn)", lambda layout, ratio, scores, seed: None, uses_ratio=False),
    "random": Method(
        "heads drawn from the whole model",
        lambda layout, ratio, scores, seed: HeadSelection.random(layout, ratio, seed),
    ),
    "layer_consistent": Method(
        "the same number of drawn heads in every layer",
        lambda layout, ratio, scores, seed: HeadSelection.layer_consistent(layout, ratio, seed),
    ),
    "alps": Method("the heads that moved most in the task model", _alps, uses_scores=True),
}

SCOPES = {
    "all": "the method's heads and everything outside the query, key and value projections (the paper's setting)",
    "heads": "the method's heads and nothing else",
}
