"""Selected head rows as a PEFT tuner: injection, the check of the base, merging."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError
from alps_repro.heads import HeadLayout, HeadSelection
from alps_repro.tuner.config import AlpsConfig
from alps_repro.tuner.layer import AlpsLayer


def fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What identifies a base model, whatever dtype or quantization it was loaded in.

    `layout`: its `HeadLayout`. `outside`: SHA-256 of everything that quantization leaves alone (embeddings, norms),
    rounded to bfloat16. `projections`: the same of its query, key and value projections, or None where those are
    quantized. None for a model whose weights are not there (on the meta device).
    """
    layout = HeadLayout.of(model)
    modules = {name.removesuffix(".base_layer"): m for name, m in model.named_modules() if hasattr(m, "weight")}
    prefix = layout.prefix(modules)
    attention = {prefix + path for layer in range(layout.layers) for path in layout.modules(layer)}
    outside, projections, quantized = hashlib.sha256(), hashlib.sha256(), False
    for name, module in sorted(modules.items()):
        weight = module.weight
        if not isinstance(weight, torch.Tensor) or (isinstance(module, (nn.Linear, Conv1D)) and name not in attention):
            continue
        if weight.device.type == "meta":
            return None
        if not weight.is_floating_point():
            quantized = True
            continue
        digest = projections if name in attention else outside
        digest.update(f"{name.removeprefix(prefix)}:{tuple(weight.shape)}".encode())
        digest.update(weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().data)
    return {
        "layout": asdict(layout),
        "outside": outside.hexdigest(),
        "projections": None if quantized else projections.hexdigest(),
    }


def check_fingerprint(stored: dict[str, Any], model: nn.Module) -> None:
    """Raise `UserError` unless an adapter made on the model behind `stored` fits this one."""
    layout = asdict(HeadLayout.of(model))
    if not isinstance(stored, dict) or not isinstance(stored.get("layout"), dict):
        raise UserError("The adapter's fingerprint of its base is damaged: save the adapter again.")
    if stored["layout"] != layout:
        theirs = stored["layout"]
        differ = ", ".join(f"{k} {theirs.get(k)} and {v}" for k, v in layout.items() if theirs.get(k) != v)
        raise UserError(
            f"The adapter does not fit this model: adapter and model differ in {differ or 'what is stored'}."
        )
    own = fingerprint(model)
    if own is None:
        return
    both = (stored.get("projections"), own["projections"])
    if stored.get("outside") != own["outside"] or (None not in both and both[0] != both[1]):
        raise UserError(
            "The adapter was trained on another model of the same shape: load it onto the base that its "
            "adapter_config.json names, in float32, bfloat16, 8 bit or 4 bit."
        )


def _conv1d(linear: nn.Linear) -> Conv1D:
    """The same projection as GPT-2 stores it; dequantizing always gives `torch.nn.Linear`."""
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = linear.bias
    return conv


class AlpsModel(BaseTuner):
    """The tuner that `get_peft_model` makes of an `AlpsConfig`."""

    prefix = "alps_"
    tuner_layer_cls = AlpsLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: AlpsConfig = self.peft_config[adapter_name]
        layout = HeadLayout.of(model)
        selection = HeadSelection(tuple(config.heads), layout)
        names = [name.removesuffix(".base_layer") for name, _ in model.named_modules()]
        prefix = layout.prefix(names)
        if config.fingerprint is None:
            config.fingerprint = fingerprint(model)
        else:
            check_fingerprint(config.fingerprint, model)
        self._rows = {prefix + path: torch.from_numpy(rows) for path, rows in layout.selected_rows(selection).items()}
        config.target_modules = list(self._rows)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = None  # it follows from the heads, and is not saved beside them

    def _prepare_adapter_config(self, peft_config: AlpsConfig, model_config: dict) -> AlpsConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: AlpsConfig, key: str) -> bool:
        return key in self._rows  # peft may have shortened target_modules to common endings

    def _create_and_replace(
        self,
        peft_config: AlpsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rows = self._rows[current_key]
        if isinstance(target, AlpsLayer):
            target.update_layer(adapter_name, rows)
            return
        layer = AlpsLayer(target, adapter_name, rows)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was active, another one is, or none if it was the last."""
        active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if active:
            # peft lets every layer choose its next adapter, and layers hold different ones.
            self.set_adapter(self.active_adapter or list(self.peft_config)[:1])

    def _check_disjoint(self, adapter_names: list[str] | None) -> None:
        # Before the first layer is merged, so that a refusal leaves nothing half merged.
        for layer in self.model.modules():
            if isinstance(layer, AlpsLayer):
                layer.own(list(dict.fromkeys([*layer.merged_adapters, *(adapter_names or layer.active_adapters)])))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (by default the active ones) into the base's own weights; `unmerge_adapter` undoes it."""
        self._check_disjoint(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        quantized = getattr(self.model, "hf_quantizer", None) is not None
        if merge:
            self._check_disjoint(adapter_names)
        if not (merge and quantized):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # A row in full precision cannot be put back among quantized ones: the whole model becomes a float model.
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, AlpsLayer)}
        adapters = adapter_names or self.active_adapters
        model = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        replaced = {name: m.source_cls for name, m in model.named_modules() if hasattr(m, "source_cls")}
        model = model.dequantize()
        for name, source in replaced.items():
            linear = model.get_submodule(name)
            linear.to(linear.weight.dtype)  # bitsandbytes leaves biases in the dtype that it multiplies in
            if source is Conv1D:
                model.set_submodule(name, _conv1d(linear))
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            vars(model).pop(flag, None)
        for name, layer in layers.items():
            if any(adapter in layer.alps_rows for adapter in adapters):
                layer.write_into(model.get_submodule(name), adapters)
        return model
