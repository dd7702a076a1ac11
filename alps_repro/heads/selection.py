"""Sets of attention heads."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout


def head_count(ratio: float, total: int) -> int:
    """`ceil(ratio · total)` in exact decimal arithmetic (0.07 · 100 is 7, not 8).

    Raises:
        UserError: the ratio is outside (0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise UserError(f"The ratio {ratio!r} is not in (0, 1]: give the share of heads to select, such as 0.1.")
    return math.ceil(Fraction(str(ratio)) * total)


@dataclass(frozen=True)
class HeadSelection:
    """A set of query heads of one layout; `heads` is sorted by (layer, head), both from 0, each head once."""

    heads: tuple[tuple[int, int], ...]
    layout: HeadLayout

    def __post_init__(self) -> None:
        heads = []
        if not isinstance(self.heads, Iterable):
            raise UserError(f"{self.heads!r} is not a list of heads: give (layer, head) pairs, counted from 0.")
        for pair in self.heads:
            try:
                layer, head = (operator.index(i) for i in pair)
            except (TypeError, ValueError):
                raise UserError(f"{pair!r} is not a head: give (layer, head) pairs, counted from 0.") from None
            if not (0 <= layer < self.layout.layers and 0 <= head < self.layout.heads):
                raise UserError(
                    f"There is no head {head} in layer {layer}: this model has layers 0 to {self.layout.layers - 1} "
                    f"with heads 0 to {self.layout.heads - 1}."
                )
            heads.append((layer, head))
        object.__setattr__(self, "heads", tuple(sorted(set(heads))))

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.heads)

    @classmethod
    def all(cls, layout: HeadLayout) -> HeadSelection:
        """Every head (the paper's `full`, as far as attention goes)."""
        return cls(tuple((layer, head) for layer in range(layout.layers) for head in range(layout.heads)), layout)

    @classmethod
    def random(cls, layout: HeadLayout, ratio: float, seed: int) -> HeadSelection:
        """`ceil(ratio · total)` randomly selected heads of the whole model (the paper's `random`)."""
        drawn = np.random.default_rng(seed).choice(layout.total, head_count(ratio, layout.total), replace=False)
        return cls(tuple(divmod(int(i), layout.heads) for i in drawn), layout)

    @classmethod
    def layer_consistent(cls, layout: HeadLayout, ratio: float, seed: int) -> HeadSelection:
        """`ceil(ratio · heads)` randomly selected heads in every layer (the paper's LC).

        The same number in every layer cannot always be `ratio` of the model: with 9 heads per layer, 10 % is 1 of 9.
        """
        draw = np.random.default_rng(seed)
        count = head_count(ratio, layout.heads)
        return cls(
            tuple(
                (layer, int(head))
                for layer in range(layout.layers)
                for head in draw.choice(layout.heads, count, replace=False)
            ),
            layout,
        )

    def save(self, path: str | Path) -> None:
        """Write the selection as JSON."""
        Path(path).write_text(json.dumps({"layout": asdict(self.layout), "heads": self.heads}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadSelection:
        """Read what `save` wrote."""
        try:
            stored = json.loads(Path(path).read_text())
            return cls(tuple(map(tuple, stored["heads"])), HeadLayout(**stored["layout"]))
        except (OSError, TypeError, KeyError, ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"'{path}' is not a saved head selection ({error}).") from error
