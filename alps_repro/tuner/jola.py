"""JoLA (arXiv 2502.01179) as a PEFT tuner: a scale and an offset for every head, with learned gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from alps_repro.errors import one_of
from alps_repro.tuner.base import HeadConfig, add_peft_type, checked_heads, checked_modules
from alps_repro.tuner.edits import EditLayer, EditTuner

#: The name under which peft knows the tuner.
NAME = "JOLA"

SCALE, OFFSET = "jola_scale", "jola_offset"
SCALE_GATE, OFFSET_GATE = "jola_scale_gate", "jola_offset_gate"

#: Of the hard-concrete gates: temperature; interval to which a gate is stretched before clipping to [0, 1]; epsilon.
BETA, GAMMA, ZETA, EPSILON = 0.33, -0.1, 1.1, 1e-6

EDITS = ("both", "multiplicative", "additive")
SCHEDULES = ("exponential", "linear", "cyclic", "performance")

#: Steps of a cycle of the cyclic schedule.
PERIOD = 20


@dataclass
class JolaConfig(HeadConfig):
    """z ← (1 + g_m · m) ⊙ z + g_a · a, for every head.

    Attributes:
        edits: both of them, or the `multiplicative` (m) or `additive` (a) one alone.
        gated: whether g_m and g_a are learned hard-concrete gates, or 1.
        schedule: of λ, the weight of the additive gates' penalty, over optimizer steps (`gate_weight`); that of the
            multiplicative ones is 1 - λ.
        heads: (layer, head) pairs counted from 0, or a `HeadSelection`; by default all of them.
        init_std: standard deviation of the initial m and a.
    """

    edits: Literal["both", "multiplicative", "additive"] = "both"
    gated: bool = True
    schedule: Literal["exponential", "linear", "cyclic", "performance"] = "exponential"
    init_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        one_of("edit of JoLA", self.edits, EDITS)
        one_of("schedule of JoLA", self.schedule, SCHEDULES)
        self.heads = None if self.heads is None else checked_heads(self)
        self.modules_to_save = checked_modules(self)


def gate_weight(schedule: str, step: int, steps: int, losses: Sequence[float] = ()) -> float:
    """λ of the penalty at an optimizer step.

    Args:
        schedule: `exponential`: 0.1 · exp(-0.01 t). `linear`: from 0 to 0.2. `cyclic`: 0.5 + 0.5 · sin(2πt / 20).
            `performance`: 0.1, and with each training step 0.01 more if the loss fell and 0.01 less if it rose, within
            0 and 1.
        step: number of optimizer steps so far (t).
        steps: total number of steps.
        losses: of the steps so far, including the penalty.
    """
    if schedule == "exponential":
        return 0.1 * math.exp(-0.01 * step)
    if schedule == "linear":
        return 0.2 * min(1.0, step / max(1, steps))
    if schedule == "cyclic":
        return 0.5 + 0.5 * math.sin(2 * math.pi * step / PERIOD)
    weight = 0.1
    for before, after in pairwise(losses):
        weight = min(1.0, max(0.0, weight + 0.01 * ((after < before) - (after > before))))
    return weight


def gate(log_alpha: torch.Tensor, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """A hard-concrete gate, between 0 and 1.

    Args:
        log_alpha: its parameter.
        uniform: uniform random numbers of the same shape, for a sampled gate; None for the gate in evaluation:
            σ(log α), stretched and clipped, without the temperature, closed below log α = -2.40.
    """
    if uniform is None:
        opened = torch.sigmoid(log_alpha)
    else:
        opened = torch.sigmoid((torch.logit(uniform, eps=EPSILON) + log_alpha) / BETA)
    return ((ZETA - GAMMA) * opened + GAMMA).clamp(0, 1)


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """The probability that a sampled gate is not 0, on which the penalty is based."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


class JolaLayer(EditLayer):
    """An output projection whose input is scaled and shifted, head by head, through the heads' gates."""

    adapter_layer_names = (SCALE, OFFSET, SCALE_GATE, OFFSET_GATE)
    jola_scale: nn.ParameterDict
    jola_offset: nn.ParameterDict

    def start(self, config: JolaConfig, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        edited = {"both": (SCALE, OFFSET), "multiplicative": (SCALE,), "additive": (OFFSET,)}[config.edits]
        tensors = {kind: config.init_std * torch.randn(heads, head_dim) for kind in edited}
        if config.gated:
            for kind in edited:
                gates = torch.nn.init.xavier_uniform_(torch.empty(heads, 1))
                tensors[SCALE_GATE if kind == SCALE else OFFSET_GATE] = gates
        return tensors

    def _gate(self, kind: str, adapter: str, drawn: bool) -> torch.Tensor | float:
        gates = getattr(self, kind)
        if adapter not in gates:
            return 1.0
        return gate(gates[adapter], torch.rand_like(gates[adapter]) if drawn else None)

    def edit(self, adapter: str, drawn: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        scale = offset = None
        if adapter in self.jola_scale:
            scale = 1 + self._gate(SCALE_GATE, adapter, drawn) * self.jola_scale[adapter]
        if adapter in self.jola_offset:
            offset = self._gate(OFFSET_GATE, adapter, drawn) * self.jola_offset[adapter]
        return scale, offset


class JolaModel(EditTuner):
    """The tuner that `get_peft_model` makes of a `JolaConfig`."""

    prefix = "jola_"
    tuner_layer_cls = JolaLayer

    def penalty(self, weight: float) -> torch.Tensor:
        """`λ · Σ_l mean_h p(g_a) / (L · H) + (1 - λ) · Σ_l mean_h p(g_m) / (L · H)`; 0 without gates, or with λ = 0.

        We take L · H to be the number of all edited heads; p is `open_probability`.
        """
        parts, heads = [], 0
        for layer in self.layers() if weight else ():
            for name in layer.own(self.active_adapters):
                heads += len(layer.columns[name])
                for gates, share in ((layer.jola_offset_gate, weight), (layer.jola_scale_gate, 1 - weight)):
                    if name in gates:
                        parts.append(share * open_probability(gates[name]).mean())
        return torch.stack(parts).sum() / heads if parts else torch.zeros(())

    @torch.no_grad()
    def closed_gates(self) -> dict[str, tuple[int, int]]:
        """Numbers of gates: {`scale`, `offset`: (closed in evaluation, all)}."""
        counts = {}
        for kind, name in (("scale", SCALE_GATE), ("offset", OFFSET_GATE)):
            gates = [getattr(layer, name)[adapter] for layer in self.layers() for adapter in getattr(layer, name)]
            if gates:
                closed = sum(int((gate(own) == 0).sum()) for own in gates)
                counts[kind] = (closed, sum(own.numel() for own in gates))
        return counts
