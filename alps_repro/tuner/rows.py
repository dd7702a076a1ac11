"""Selected head rows as a PEFT tuner: the rows are trained in place of the base's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.tuner.base import (
    HeadConfig,
    HeadLayer,
    HeadTuner,
    Projection,
    add_peft_type,
    checked_heads,
    checked_modules,
    dense_weight,
    in_int8,
)

#: The name under which peft knows the tuner.
NAME = "ALPS"

#: Names under which the trained rows (rows, inputs) and biases (rows,) are stored.
ROWS = "alps_rows"
BIAS = "alps_bias"


@dataclass
class AlpsConfig(HeadConfig):
    """Train only the rows of the selected heads.

    Attributes:
        heads: (layer, head) pairs counted from 0, or a `HeadSelection`. Their query rows and the key and value rows of
            the groups they read are trained, including biases of those rows.
    """

    heads: Iterable[tuple[int, int]] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(NAME)
        self.heads = checked_heads(self)
        self.modules_to_save = checked_modules(self)


def _replaced(weight: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # A clone keeps the strides, `index_copy` would not: with others a product may be rounded differently.
    return weight.clone().index_copy_(0, index, rows.to(weight.dtype))


class _ReplacedRows(torch.autograd.Function):
    """`x @ W.T + b` with some rows of W replaced, whose backward pass computes no gradient of the other rows.

    Shapes: x (..., inputs), weight (outputs, inputs), index (rows,), rows (rows, inputs). fused: whether the bias is
    added before the product is rounded. Plain autograd through an index_copy would first compute the gradient of
    all of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        index: torch.Tensor,
        rows: torch.Tensor,
        row_bias: torch.Tensor | None,
        fused: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, index, rows)
        if row_bias is not None:
            assert bias is not None
            bias = bias.index_copy(0, index, row_bias.to(bias.dtype))
        weight = _replaced(weight, index, rows)
        return F.linear(x, weight, bias) if fused or bias is None else F.linear(x, weight) + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, index, rows = ctx.saved_tensors
        grad_x = grad_rows = grad_bias = None
        grad = grad.reshape(-1, grad.shape[-1])  # once: it comes transposed from attention's backward pass
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _replaced(weight, index, rows)).view(x.shape)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            own = grad.index_select(1, index)
            if ctx.needs_input_grad[4]:
                grad_rows = (own.T @ x.reshape(-1, x.shape[-1])).to(rows.dtype)
            if ctx.needs_input_grad[5]:
                grad_bias = own.sum(0).to(rows.dtype)
        return grad_x, None, None, None, grad_rows, grad_bias, None


class AlpsLayer(HeadLayer):
    """A projection some of whose rows are trained in place of the base's.

    The trained rows are weights, not differences: they start as the base's own and replace them.
    """

    adapter_layer_names = (ROWS, BIAS)
    other_param_names = ("row_index",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.row_index = BufferDict(persistent=False)
        self.alps_rows = nn.ParameterDict()
        self.alps_bias = nn.ParameterDict()

    def update_layer(self, adapter_name: str, rows: torch.Tensor) -> None:
        """Add an adapter that trains these rows (int64, sorted), starting as the base's own, at least in float32."""
        weight = dense_weight(self.base_layer)
        rows = rows.to(weight.device)
        self.row_index[adapter_name] = rows
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.alps_rows[adapter_name] = nn.Parameter(weight[rows].to(dtype))
        if self.base_layer.bias is not None:
            self.alps_bias[adapter_name] = nn.Parameter(self.base_layer.bias.detach()[rows].to(dtype))
        self.set_adapter(self.active_adapters)

    def own(self, adapters: list[str]) -> list[str]:
        """The adapters among these that train rows of this projection; `UserError` if they overlap."""
        own = super().own(adapters)
        rows = [r for name in own for r in self.row_index[name].tolist()] if len(own) > 1 else []
        if len(rows) != len(set(rows)):
            raise UserError(f"The adapters {', '.join(own)} train the same heads or groups: activate one at a time.")
        return own

    def _replacement(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Row numbers, rows and biases of all these adapters."""
        if len(adapters) == 1:
            name = adapters[0]
            return self.row_index[name], self.alps_rows[name], self.alps_bias.get(name)
        joined = [torch.cat([d[name] for name in adapters]) for d in (self.row_index, self.alps_rows)]
        bias = torch.cat([self.alps_bias[name] for name in adapters]) if len(self.alps_bias) else None
        return joined[0], joined[1], bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.in_use
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        index, rows, row_bias = self._replacement(adapters)
        if in_int8(self.base_layer):
            # LLM.int8 multiplies in its own way (and differently in training), so its result is kept for all other
            # rows, and the selected ones are computed separately in floating point.
            out = self.base_layer(x, *args, **kwargs)
            own = F.linear(x, rows.to(x.dtype), None if row_bias is None else row_bias.to(x.dtype))
            return out.index_copy(-1, index, own.to(out.dtype))
        weight = dense_weight(self.base_layer)
        bias: torch.Tensor | None = self.base_layer.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:  # bitsandbytes may multiply in another dtype than that of the dequantized weight
            dtype = getattr(self.base_layer, "compute_dtype", None) or weight.dtype
        bias = None if bias is None else bias.to(dtype)
        fused = type(self.base_layer).__name__ != "FalconLinear"
        out = _ReplacedRows.apply(x.to(dtype), weight.to(dtype), bias, index, rows, row_bias, fused)
        return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)

    def merged_weight(self) -> torch.Tensor:
        """The weight (outputs, inputs) under the active adapters, dequantized, in the base's dtype."""
        weight = dense_weight(self.base_layer)
        adapters = self.in_use
        if not adapters:
            return weight
        index, rows, _ = self._replacement(adapters)
        return _replaced(weight, index, rows.detach())

    @torch.no_grad()
    def write_into(self, dense: Projection, adapters: list[str]) -> None:
        """Write these adapters' rows into an unquantized projection of the same shape."""
        index, rows, row_bias = self._replacement(self.own(adapters))
        weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        weight[index] = rows.to(weight.dtype)
        if row_bias is not None:
            assert dense.bias is not None
            dense.bias[index] = row_bias.to(dense.bias.dtype)


class AlpsModel(HeadTuner):
    """The tuner that `get_peft_model` makes of an `AlpsConfig`."""

    prefix = "alps_"
    tuner_layer_cls = AlpsLayer

    def targets(self, config: AlpsConfig, layout: HeadLayout) -> dict[str, torch.Tensor]:
        rows = layout.selected_rows(HeadSelection(tuple(config.heads), layout))
        return {path: torch.from_numpy(own) for path, own in rows.items()}
