"""A projection some of whose rows are trained in place of the base's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError

#: Names under which the trained rows (rows, inputs) and biases (rows,) are stored.
ROWS = "alps_rows"
BIAS = "alps_bias"


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a projection as a float matrix (outputs, inputs): dequantized, or as it is (a view)."""
    weight = module.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        weight = dequantize_bnb_weight(weight, getattr(module, "state", None))
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def _replaced(weight: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    # A clone keeps the strides, `index_copy` would not: with others a product may round differently than the base's.
    return weight.clone().index_copy_(0, index, rows.to(weight.dtype))


class _ReplacedRows(torch.autograd.Function):
    """`x @ W.T + b` with some rows of W replaced, whose backward pass computes no gradient of the rows that stay.

    Shapes: x (..., inputs), weight (outputs, inputs), index (rows,), rows (rows, inputs). fused: whether the bias is
    added before the product is rounded. Plain autograd through an index_copy would first compute the gradient of
    all of W.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, index, rows, row_bias, fused):
        ctx.save_for_backward(x, weight, index, rows)
        if row_bias is not None:
            bias = bias.index_copy(0, index, row_bias.to(bias.dtype))
        weight = _replaced(weight, index, rows)
        return F.linear(x, weight, bias) if fused or bias is None else F.linear(x, weight) + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, index, rows = ctx.saved_tensors
        grad_x = grad_rows = grad_bias = None
        grad = grad.reshape(-1, grad.shape[-1])  # once: attention's backward pass hands it over transposed
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _replaced(weight, index, rows)).view(x.shape)
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            own = grad.index_select(1, index)
            if ctx.needs_input_grad[4]:
                grad_rows = (own.T @ x.reshape(-1, x.shape[-1])).to(rows.dtype)
            if ctx.needs_input_grad[5]:
                grad_bias = own.sum(0).to(rows.dtype)
        return grad_x, None, None, None, grad_rows, grad_bias, None


class AlpsLayer(nn.Module, BaseTunerLayer):
    """Wraps a projection: `torch.nn.Linear`, GPT-2's `Conv1D`, or bitsandbytes' `Linear4bit` / `Linear8bitLt`.

    The trained rows are weights, not differences: they start as the base's own and take its rows' place.
    """

    adapter_layer_names = (ROWS, BIAS)
    other_param_names = ("row_index",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, rows: torch.Tensor) -> None:
        super().__init__()
        if not (isinstance(base_layer, (nn.Linear, Conv1D))):
            raise UserError(f"A projection of type {type(base_layer).__name__} cannot be trained by rows.")
        self.base_layer = base_layer
        self.row_index = BufferDict(persistent=False)
        self.alps_rows = nn.ParameterDict()
        self.alps_bias = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, rows)

    def update_layer(self, adapter_name: str, rows: torch.Tensor) -> None:
        """Add an adapter that trains these rows (int64, sorted), starting as the base's own, in float32 at least."""
        weight = dense_weight(self.base_layer)
        rows = rows.to(weight.device)
        self.row_index[adapter_name] = rows
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.alps_rows[adapter_name] = nn.Parameter(weight[rows].to(dtype))
        if self.base_layer.bias is not None:
            self.alps_bias[adapter_name] = nn.Parameter(self.base_layer.bias.detach()[rows].to(dtype))
        self.set_adapter(self.active_adapters)

    @property
    def _in_int8(self) -> bool:
        return type(self.base_layer.weight).__name__ == "Int8Params"

    def own(self, adapters: list[str]) -> list[str]:
        """The adapters that train rows of this projection, which must not overlap when used together."""
        own = [name for name in adapters if name in self.alps_rows]
        rows = [r for name in own for r in self.row_index[name].tolist()] if len(own) > 1 else []
        if len(rows) != len(set(rows)):
            raise UserError(f"The adapters {', '.join(own)} train the same heads or groups: activate one at a time.")
        return own

    def _replacement(self, adapters: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Row numbers, rows and biases of these adapters taken together."""
        if len(adapters) == 1:
            name = adapters[0]
            return self.row_index[name], self.alps_rows[name], self.alps_bias.get(name)
        joined = [torch.cat([d[name] for name in adapters]) for d in (self.row_index, self.alps_rows)]
        bias = torch.cat([self.alps_bias[name] for name in adapters]) if len(self.alps_bias) else None
        return joined[0], joined[1], bias

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [] if self.disable_adapters or self.merged else self.own(self.active_adapters)
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        index, rows, row_bias = self._replacement(adapters)
        if self._in_int8:
            # LLM.int8 multiplies in its own way (and differently in training), so its result is kept for all other
            # rows, and the selected ones are computed in floating point beside it.
            out = self.base_layer(x, *args, **kwargs)
            own = F.linear(x, rows.to(x.dtype), None if row_bias is None else row_bias.to(x.dtype))
            return out.index_copy(-1, index, own.to(out.dtype))
        weight, bias = dense_weight(self.base_layer), self.base_layer.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:  # bitsandbytes may multiply in another dtype than it dequantizes to
            dtype = getattr(self.base_layer, "compute_dtype", None) or weight.dtype
        bias = None if bias is None else bias.to(dtype)
        fused = type(self.base_layer).__name__ != "FalconLinear"
        out = _ReplacedRows.apply(x.to(dtype), weight.to(dtype), bias, index, rows, row_bias, fused)
        return out if torch.is_autocast_enabled(x.device.type) else out.to(x.dtype)

    def merged_weight(self) -> torch.Tensor:
        """The weight (outputs, inputs) that the active adapters amount to, dequantized, in the base's dtype."""
        weight = dense_weight(self.base_layer)
        adapters = [] if self.disable_adapters or self.merged else self.own(self.active_adapters)
        if not adapters:
            return weight
        index, rows, _ = self._replacement(adapters)
        return _replaced(weight, index, rows.detach())

    @torch.no_grad()
    def write_into(self, dense: nn.Module, adapters: list[str]) -> None:
        """Write these adapters' rows into an unquantized projection of the same shape."""
        index, rows, row_bias = self._replacement(self.own(adapters))
        weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        weight[index] = rows.to(weight.dtype)
        if row_bias is not None:
            dense.bias[index] = row_bias.to(dense.bias.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the rows into the base layer; `unmerge` brings the base's own back, bit by bit."""
        adapters = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.alps_rows]
        if not adapters:
            return
        if hasattr(self.base_layer.weight, "quant_state") or self._in_int8:
            raise UserError(
                "Rows cannot be merged into a quantized projection in place: use merge_and_unload(), which gives a "
                "plain float model."
            )
        _, rows, _ = self._replacement(self.own(self.merged_adapters + adapters))
        if safe_merge and not torch.isfinite(rows).all():
            raise UserError(f"The adapter {adapters[0]} holds NaN or infinite weights and was not merged.")
        if not self.merged_adapters:
            base = self.base_layer
            self._kept = (base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone())
        self.write_into(self.base_layer, adapters)
        self.merged_adapters.extend(adapters)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`."""
        if not self.merged:
            return
        weight, bias = self._kept
        self.base_layer.weight.copy_(weight)
        if bias is not None:
            self.base_layer.bias.copy_(bias)
        self.merged_adapters.clear()
        del self._kept
