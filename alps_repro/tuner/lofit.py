"""LoFiT (arXiv 2406.01563) as a PEFT tuner: scales for choosing heads, then an offset for each chosen head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import HeadLayout
from alps_repro.tuner.base import HeadConfig, add_peft_type, checked_heads, checked_modules
from alps_repro.tuner.edits import EditLayer, EditTuner

#: The name under which peft knows the tuner.
NAME = "LOFIT"

SCALE = "lofit_scale"
OFFSET = "lofit_offset"


@dataclass
class LofitConfig(HeadConfig):
    """One of LoFiT's two stages.

    Attributes:
        stage: `scale` trains z ← (1 + A) ⊙ z, whose norms choose heads (`norms`); `offset` trains z ← z + v.
        heads: (layer, head) pairs counted from 0, or a `HeadSelection`; by default all of them.
        l1: weight of the sum of |A| in the loss, for the stage `scale` (`LofitModel.penalty`).
        init_std: standard deviation of the initial A and v.
    """

    stage: Literal["scale", "offset"] = "offset"
    l1: float = 1e-3
    init_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        one_of("stage of LoFiT", self.stage, ("scale", "offset"))
        self.heads = None if self.heads is None else checked_heads(self)
        self.modules_to_save = checked_modules(self)


class LofitLayer(EditLayer):
    """An output projection whose input is scaled, or shifted by an offset."""

    adapter_layer_names = (SCALE, OFFSET)
    lofit_scale: nn.ParameterDict
    lofit_offset: nn.ParameterDict

    def start(self, config: LofitConfig, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        return {SCALE if config.stage == "scale" else OFFSET: config.init_std * torch.randn(heads, head_dim)}

    def edit(self, adapter: str, drawn: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if adapter in self.lofit_scale:
            return 1 + self.lofit_scale[adapter], None
        return None, self.lofit_offset[adapter]


class LofitModel(EditTuner):
    """The tuner that `get_peft_model` makes of a `LofitConfig`."""

    prefix = "lofit_"
    tuner_layer_cls = LofitLayer

    def penalty(self) -> torch.Tensor:
        """`l1 · Σ|A|` over the scales of the active adapters; 0 where there are none."""
        parts = [
            layer.settings[name].l1 * layer.lofit_scale[name].abs().sum()
            for layer in self.layers()
            for name in layer.own(self.active_adapters)
            if name in layer.lofit_scale
        ]
        return torch.stack(parts).sum() if parts else torch.zeros(())


def norms(scales: dict[str, torch.Tensor], layout: HeadLayout) -> np.ndarray:
    """LoFiT's score of each head, the Euclidean norm of its learned scale A: float64 (layers, heads).

    Args:
        scales: tensors of an adapter of the stage `scale` on all heads, by their names in its file.
        layout: of the base model.

    Raises:
        UserError: a layer's scales are missing, or have another shape.
    """
    scores = np.zeros((layout.layers, layout.heads))
    for layer in range(layout.layers):
        own = [value for name, value in scales.items() if f"{layout.output_module(layer)}.{SCALE}" in name]
        if len(own) != 1 or own[0].shape != (layout.heads, layout.head_dim):
            raise UserError(
                f"The adapter holds no scales of all heads of layer {layer}: train LoFiT's stage 'scale' on all heads."
            )
        scores[layer] = own[0].double().norm(dim=1).numpy()
    return scores
