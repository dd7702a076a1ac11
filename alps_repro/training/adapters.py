"""How a method's heads, or all of attention, are trained where nothing else is: one PEFT configuration each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alps_repro.heads.layout import PARTS, HeadLayout
from alps_repro.heads.selection import HeadSelection

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Target:
    """What an adapter is made for.

    modules: full paths of the query, key and value projections. rank: of low-rank matrices, and of SHiRA's count.
    seed: of what is drawn, such as SHiRA's entries.
    """

    layout: HeadLayout
    modules: tuple[str, ...]
    heads: HeadSelection | None
    rank: int
    seed: int


def _rows(target: Target) -> PeftConfig:
    from alps_repro.tuner.rows import AlpsConfig

    return AlpsConfig(heads=target.heads, task_type="CAUSAL_LM")


def _lora(target: Target, **own: Any) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=target.rank,
        lora_alpha=target.rank,  # a scale of 1 at every rank
        target_modules=list(target.modules),
        fan_in_fan_out=target.layout.transposed,
        task_type="CAUSAL_LM",
        **own,
    )


def _dora(target: Target) -> PeftConfig:
    return _lora(target, use_dora=True)


def _shira(target: Target) -> PeftConfig:
    from peft import ShiraConfig

    return ShiraConfig(
        r=target.rank,
        random_seed=target.seed,
        target_modules=list(target.modules),
        fan_in_fan_out=target.layout.transposed,
        task_type="CAUSAL_LM",
    )


def _lofit(target: Target, stage: str) -> PeftConfig:
    from alps_repro.tuner.lofit import LofitConfig

    return LofitConfig(stage=stage, heads=target.heads, task_type="CAUSAL_LM")


def _jola(target: Target, **own: Any) -> PeftConfig:
    from alps_repro.tuner.jola import JolaConfig

    return JolaConfig(heads=target.heads, task_type="CAUSAL_LM", **own)


@dataclass(frozen=True)
class Adapter:
    """about: what it trains, in words. config: its PEFT configuration.

    weights: (layout, heads, rank) -> how many numbers it trains; None for rows, whose number depends on which heads
    share a group, and on biases. by_rank: whether it is of all projections at a rank, and of no heads. quantized: what
    its base may be loaded in.
    """

    about: str
    config: Callable[[Target], PeftConfig]
    weights: Callable[[HeadLayout, int, int], int] | None = None
    by_rank: bool = False
    quantized: tuple[str, ...] = ("4bit", "8bit")


def lora_weights(layout: HeadLayout) -> int:
    """Weights of LoRA of rank 1 on all query, key and value projections."""
    return layout.layers * sum(layout.hidden_size + rows for rows in _outputs(layout))


def dora_magnitudes(layout: HeadLayout) -> int:
    """What DoRA trains beside LoRA: a length for each output of these projections."""
    return layout.layers * sum(_outputs(layout))


def _outputs(layout: HeadLayout) -> list[int]:
    """The outputs of a layer's query, key and value projections; a fused one counts once."""
    return list({layout.module(0, part): layout.projection_rows(part) for part in PARTS}.values())


ADAPTERS: dict[str, Adapter] = {
    "rows": Adapter("the heads' query rows and their groups' key and value rows", _rows),
    "lora": Adapter("LoRA on q, k and v", _lora, lambda layout, heads, rank: rank * lora_weights(layout), by_rank=True),
    "dora": Adapter(
        "DoRA on q, k and v",
        _dora,
        lambda layout, heads, rank: rank * lora_weights(layout) + dora_magnitudes(layout),
        by_rank=True,
        quantized=("4bit",),  # in 8 bit its first step fails within bitsandbytes
    ),
    "shira": Adapter(
        "drawn entries of q, k and v (SHiRA)",
        _shira,
        lambda layout, heads, rank: rank * lora_weights(layout),
        by_rank=True,
        quantized=(),
    ),
    "scales": Adapter(
        "a scale of each number of the heads' results (LoFiT's first stage)",
        lambda target: _lofit(target, "scale"),
        lambda layout, heads, rank: heads * layout.head_dim,
    ),
    "offsets": Adapter(
        "an offset of the heads' results (LoFiT's second stage)",
        lambda target: _lofit(target, "offset"),
        lambda layout, heads, rank: heads * layout.head_dim,
    ),
    "jola": Adapter(
        "a scale and an offset of the heads' results, each behind a gate (JoLA)",
        _jola,
        lambda layout, heads, rank: heads * (2 * layout.head_dim + 2),
    ),
    "jola_additive": Adapter(
        "JoLA's gated offset alone",
        lambda target: _jola(target, edits="additive"),
        lambda layout, heads, rank: heads * (layout.head_dim + 1),
    ),
    "jola_multiplicative": Adapter(
        "JoLA's gated scale alone",
        lambda target: _jola(target, edits="multiplicative"),
        lambda layout, heads, rank: heads * (layout.head_dim + 1),
    ),
    "jola_ungated": Adapter(
        "JoLA's scale and offset without gates",
        lambda target: _jola(target, gated=False),
        lambda layout, heads, rank: heads * 2 * layout.head_dim,
    ),
}
