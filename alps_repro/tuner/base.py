"""What the tuners of attention heads share: a name in peft, the check of the base, merging.

A tuner is a configuration, a layer that wraps the projections it changes (`HeadLayer`), and a model that says which
those are (`HeadTuner`).
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError
from alps_repro.heads import HeadLayout, HeadSelection


def add_peft_type(name: str) -> PeftType:
    """Add `PeftType.NAME`.

    `peft.utils.register_peft_method` takes only names that stand in this enum, and an enum with members cannot be
    subclassed, so the member is made by hand. This is the one place that depends on how peft and `enum` work
    inside; if `tests/test_tuner.py::test_registration` fails after an upgrade of peft, look here.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.11 finds members through the map above, 3.12 and later as attributes, which `EnumType` would not let
    # be set under a member's name.
    type.__setattr__(PeftType, name, member)
    return member


def checked_heads(config: PeftConfig) -> list[tuple[int, int]]:
    """The `heads` of a tuner's configuration, (layer, head) pairs or a `HeadSelection`: sorted, each once."""
    kind, heads = type(config).__name__, config.heads
    try:
        pairs = heads.heads if isinstance(heads, HeadSelection) else heads
        found = sorted({(operator.index(layer), operator.index(head)) for layer, head in pairs})
    except (TypeError, ValueError):
        raise UserError(f"{kind}(heads=...) takes (layer, head) pairs, counted from 0.") from None
    if not found:
        raise UserError(f"{kind}(heads=...) got no head: select at least one.")
    return found


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


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a projection as a float matrix (outputs, inputs): dequantized, or as it is (a view)."""
    weight = module.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        weight = dequantize_bnb_weight(weight, getattr(module, "state", None))
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def in_int8(module: nn.Module) -> bool:
    """Whether a projection is bitsandbytes' LLM.int8."""
    return type(module.weight).__name__ == "Int8Params"


def _conv1d(linear: nn.Linear) -> Conv1D:
    """The same projection as GPT-2 stores it; dequantizing always gives `torch.nn.Linear`."""
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = linear.bias
    return conv


class HeadLayer(nn.Module, BaseTunerLayer):
    """A projection with adapters: `torch.nn.Linear`, GPT-2's `Conv1D`, or bitsandbytes' `Linear4bit` / `Linear8bitLt`.

    A layer of a tuner says which tensors of an adapter are its own (`adapter_layer_names`), takes one in
    (`update_layer`), and writes some of them into a plain projection (`write_into`).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        if not (isinstance(base_layer, (nn.Linear, Conv1D))):
            raise UserError(f"A projection of type {type(base_layer).__name__} cannot be trained by heads.")
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, target: Any) -> None:
        """Add an adapter; `target` is what `HeadTuner.targets` says of this projection."""
        raise NotImplementedError

    def write_into(self, dense: nn.Module, adapters: list[str]) -> None:
        """Write these adapters into an unquantized projection of the same shape."""
        raise NotImplementedError

    def own(self, adapters: list[str]) -> list[str]:
        """Those of the adapters that change this projection.

        Raises:
            UserError: they cannot be used together.
        """
        return [name for name in adapters if any(name in getattr(self, kind) for kind in self.adapter_layer_names)]

    @property
    def in_use(self) -> list[str]:
        """The adapters that the forward pass goes through."""
        return [] if self.disable_adapters or self.merged else self.own(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base layer; `unmerge` brings the base's own weights back, bit by bit."""
        adapters = self.own(check_adapters_to_merge(self, adapter_names))
        if not adapters:
            return
        if hasattr(self.base_layer.weight, "quant_state") or in_int8(self.base_layer):
            raise UserError(
                "An adapter cannot be merged into a quantized projection in place: use merge_and_unload(), which gives "
                "a plain float model."
            )
        self.own(self.merged_adapters + adapters)
        trained = [getattr(self, kind) for kind in self.adapter_layer_names]
        finite = all(torch.isfinite(kind[name]).all() for kind in trained for name in adapters if name in kind)
        if safe_merge and not finite:
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


class HeadTuner(BaseTuner):
    """The tuner that `get_peft_model` makes of a configuration with a `fingerprint` and `target_modules`."""

    tuner_layer_cls: type[HeadLayer]

    def targets(self, config: PeftConfig, layout: HeadLayout) -> dict[str, Any]:
        """{path of a projection, from the decoder: what its layer has to know of an adapter}."""
        raise NotImplementedError

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        layout = HeadLayout.of(model)
        targets = self.targets(config, layout)
        prefix = layout.prefix(name.removesuffix(".base_layer") for name, _ in model.named_modules())
        if config.fingerprint is None:
            config.fingerprint = fingerprint(model)
        else:
            check_fingerprint(config.fingerprint, model)
        self._targets = {prefix + path: target for path, target in targets.items()}
        config.target_modules = list(self._targets)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = None  # it follows from the heads, and is not saved beside them

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        return key in self._targets  # peft may have shortened target_modules to common endings

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        own = self._targets[current_key]
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, own)
            return
        layer = self.tuner_layer_cls(target, adapter_name)
        layer.update_layer(adapter_name, own)
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

    def _layers(self) -> dict[str, HeadLayer]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, HeadLayer)}

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise `UserError` where adapters (by default the active ones) cannot be merged, before the first layer is."""
        for layer in self._layers().values():
            layer.own(list(dict.fromkeys([*layer.merged_adapters, *(adapter_names or layer.active_adapters)])))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (by default the active ones) into the base's own weights; `unmerge_adapter` undoes it."""
        self.check_merge(adapter_names)
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
            self.check_merge(adapter_names)
        if not (merge and quantized):
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # A row in full precision cannot be put back among quantized ones: the whole model becomes a float model.
        layers = self._layers()
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
            if layer.own(adapters):
                layer.write_into(model.get_submodule(name), adapters)
        return model
