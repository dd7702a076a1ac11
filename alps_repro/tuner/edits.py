"""Common parts of the tuners that edit per-head attention outputs and leave all weights unchanged.

A head's output z (head_dim numbers per token) becomes `scale · z + offset` before the output projection, whose layer
applies the edit: any attention, grouped or not, quantized or not, passes its per-head outputs to that projection in
query head order.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.tuner.base import HeadLayer, HeadTuner, Projection, dense_weight


class EditLayer(HeadLayer):
    """An output projection whose input is edited.

    An adapter's tensors have the shape (edited heads of this layer, head_dim, or 1), and are kept in dictionaries named
    by `adapter_layer_names`.
    """

    other_param_names = ("columns",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.width = dense_weight(base_layer).shape[1]
        self.columns = BufferDict(persistent=False)  # of the projection's input, (edited heads, head_dim)
        self.settings: dict[str, Any] = {}
        for kind in self.adapter_layer_names:
            setattr(self, kind, nn.ParameterDict())

    def update_layer(self, adapter_name: str, target: tuple[Any, torch.Tensor]) -> None:
        """Add an adapter; target: its configuration, and the columns (edited heads, head_dim) of its heads' outputs."""
        config, columns = target
        weight = dense_weight(self.base_layer)
        self.settings[adapter_name] = config
        self.columns[adapter_name] = columns.to(weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for kind, value in self.start(config, *columns.shape).items():
            getattr(self, kind)[adapter_name] = nn.Parameter(value.to(weight.device, dtype))
        self.set_adapter(self.active_adapters)

    def start(self, config: Any, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
        """An adapter's initial tensors, drawn from torch's global generator."""
        raise NotImplementedError

    def edit(self, adapter: str, drawn: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale and offset (edited heads, head_dim) of an adapter, None for one that it does not have.

        Args:
            adapter: its name.
            drawn: whether random parts are sampled, as in training.
        """
        raise NotImplementedError

    def _edits(self, adapters: list[str], drawn: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scale and offset of the projection's whole input under these adapters, in this order."""
        scale = offset = None
        for name in adapters:
            own_scale, own_offset = self.edit(name, drawn)
            columns = self.columns[name].flatten()
            if own_scale is not None:
                whole = own_scale.new_ones(self.width).index_copy(0, columns, own_scale.flatten())
                scale = whole if scale is None else scale * whole
                offset = None if offset is None else offset * whole
            if own_offset is not None:
                whole = own_offset.new_zeros(self.width).index_copy(0, columns, own_offset.flatten())
                offset = whole if offset is None else offset + whole
        return scale, offset

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        scale, offset = self._edits(self.in_use, self.training)
        edited = x
        if scale is not None:
            edited = edited * scale
        if offset is not None:
            edited = edited + offset
        return self.base_layer(edited.to(x.dtype), *args, **kwargs)

    @torch.no_grad()
    def write_into(self, dense: Projection, adapters: list[str]) -> None:
        """Fold scales into the weight's columns, and offsets into the bias, with their values in evaluation."""
        scale, offset = self._edits(self.own(adapters))
        weight = dense.weight.T if isinstance(dense, Conv1D) else dense.weight
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if offset is not None:
            assert dense.bias is not None  # see `EditTuner.check_merge`
            dense.bias.copy_(dense.bias.to(exact) + exact @ offset.to(exact))
        if scale is not None:
            weight.copy_(exact * scale.to(exact))


class EditTuner(HeadTuner):
    """A tuner whose layers are `EditLayer`s around the output projections."""

    tuner_layer_cls: type[EditLayer]

    def targets(self, config: Any, layout: HeadLayout) -> dict[str, tuple[Any, torch.Tensor]]:
        heads = HeadSelection.all(layout) if config.heads is None else HeadSelection(tuple(config.heads), layout)
        by_path: dict[str, list[torch.Tensor]] = {}
        for layer, head in heads:
            columns = torch.arange(head * layout.head_dim, (head + 1) * layout.head_dim)
            by_path.setdefault(layout.output_module(layer), []).append(columns)
        return {path: (config, torch.stack(columns)) for path, columns in by_path.items()}

    def check_merge(self, adapter_names: list[str] | None, safe_merge: bool = False) -> None:
        """Raise `UserError` if an offset has no bias to be folded into: saving the model would lose it."""
        super().check_merge(adapter_names)
        for name, layer in self._layers().items():
            assert isinstance(layer, EditLayer)
            _, offset = layer._edits(layer.own(layer.active_adapters if adapter_names is None else adapter_names))
            if offset is not None and layer.base_layer.bias is None:
                raise UserError(
                    f"The adapter adds an offset to what enters '{name}', which has no bias to fold it into in this "
                    "architecture: keep the adapter beside its base (save_pretrained), or train scales alone."
                )
        if safe_merge:
            super().check_merge(adapter_names, safe_merge)

    def layers(self) -> list[Any]:
        """The tuner's layers (`tuner_layer_cls`) with an active adapter, in the model's order."""
        return [layer for layer in self._layers().values() if layer.own(self.active_adapters)]
