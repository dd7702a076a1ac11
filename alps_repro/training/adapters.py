"""Ways to train a method's heads, or all of attention, and nothing else: one PEFT configuration each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alps_repro.heads.layout import PARTS, HeadLayout
from alps_repro.heads.selection import HeadSelection

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class Target:
    """What an adapter is made for.

    Attributes:
        layout: of the base model.
        modules: full paths of the query, key and value projections.
        heads: the heads to train; None for adapters of all projections.
        rank: of low-rank matrices; SHiRA's number of entries follows from it, too.
        seed: of random choices, such as SHiRA's entries.
    """

    layout: HeadLayout
    modules: tuple[str, ...]
    heads: HeadSelection | None
    rank: int
    seed: int


def _rows(target: Target) -> PeftConfig:
    from alps_repro.tuner.rows import AlpsConfig

    assert target.heads is not None
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


def _lofit(target: Target, stage: Literal["scale", "offset"]) -> PeftConfig:
    from alps_repro.tuner.lofit import LofitConfig

    return LofitConfig(stage=stage, heads=target.heads, task_type="CAUSAL_LM")


def _jola(target: Target, **own: Any) -> PeftConfig:
    from alps_repro.tuner.jola import JolaConfig

    return JolaConfig(heads=target.heads, task_type="CAUSAL_LM", **own)


@dataclass(frozen=True)
class Adapter:
    """One way to train.

    Attributes:
        about: what it trains, in words.
        config: makes its PEFT configuration.
        weights: (layout, number of heads, rank) -> number of trainable parameters; None for rows, where it depends on
            which heads share a group, and on biases.
        by_rank: whether it trains all projections at a rank rather than single heads.
        quantized: quantizations in which its base may be loaded.
    """

    about: str
    config: Callable[[Target], PeftConfig]
    weights: Callable[[HeadLayout, int, int], int] | None = None
    by_rank: bool = False
    quantized: tuple[str, ...] = ("4bit", "8bit")


def lora_weights(layout: HeadLayout) -> int:
    """Number of weights of LoRA with rank 1 on all query, key and value projections."""
    return layout.layers * sum(layout.hidden_size + rows for rows in _outputs(layout))


def dora_magnitudes(layout: HeadLayout) -> int:
    """Number of DoRA's magnitudes, which it trains besides LoRA's weights: one per output of these projections."""
    return layout.layers * sum(_outputs(layout))


def _outputs(layout: HeadLayout) -> list[int]:
    """Output sizes of a layer's query, key and value projections; a fused one counts once."""
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
        "random entries of q, k and v (SHiRA)",
        _shira,
        lambda layout, heads, rank: rank * lora_weights(layout),
        by_rank=True,
        quantized=(),
    ),
    "scales": Adapter(
        "a scale for each element of the per-head attention outputs (LoFiT's first stage)",
        lambda target: _lofit(target, "scale"),
        lambda layout, heads, rank: heads * layout.head_dim,
    ),
    "offsets": Adapter(
        "an offset of the per-head attention outputs (LoFiT's second stage)",
        lambda target: _lofit(target, "offset"),
        lambda layout, heads, rank: heads * layout.head_dim,
    ),
    "jola": Adapter(
        "a gated scale and a gated offset of the per-head attention outputs (JoLA)",
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
