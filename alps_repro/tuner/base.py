"""Common parts of the tuners of attention heads: a name in peft, the check of the base, merging.

A tuner is a configuration (`HeadConfig`), a layer that wraps the projections it changes (`HeadLayer`), and a model that
determines which those are (`HeadTuner`).
"""

from __future__ import annotations

import copy
import hashlib
import operator
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D

from alps_repro.errors import UserError, one_of
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection

#: The kinds of projections that can be adapted; bitsandbytes' are subclasses of `torch.nn.Linear`.
Projection = nn.Linear | Conv1D

#: By `task_type`, names of task heads in `transformers`; they are trained and saved as a whole. peft's models of a task
#: add them, too, but not all of them in time for the tuner's copy of the configuration.
NEW_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def add_peft_type(name: str) -> PeftType:
    """Add `PeftType.NAME`.

    `peft.utils.register_peft_method` only takes names in this enum, and an enum with members cannot be subclassed, so
    the member is made by hand. This is the one place that depends on internals of peft and `enum`; if
    `tests/tuner/test_tuner.py::test_registration` fails after an upgrade of peft, look here.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member: Any = str.__new__(PeftType, name)
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


@dataclass
class HeadConfig(PeftConfig):
    """What the configurations of all tuners of heads have.

    Attributes:
        heads: (layer, head) pairs counted from 0, or a `HeadSelection`.
        fingerprint: of the base model (see `fingerprint`); filled in when the adapter is made, and checked when it is
            loaded.
        target_modules: the projections that are changed; filled in from the model, as for other tuners.
        modules_to_save: modules that are trained and saved as a whole besides the heads, by the ends of their paths;
            the head of a `task_type` that has one (`score`, `classifier`, `qa_outputs`) is added.
    """

    heads: Iterable[tuple[int, int]] | None = None
    fingerprint: dict[str, Any] | None = None
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None


def checked_heads(config: HeadConfig) -> list[tuple[int, int]]:
    """The `heads` of a tuner's configuration, sorted, each once; `UserError` if there are none."""
    kind, heads = type(config).__name__, config.heads
    try:
        pairs: Any = heads.heads if isinstance(heads, HeadSelection) else heads
        unique = sorted({(operator.index(layer), operator.index(head)) for layer, head in pairs})
    except (TypeError, ValueError):
        raise UserError(f"{kind}(heads=...) takes (layer, head) pairs, counted from 0.") from None
    if not unique:
        raise UserError(f"{kind}(heads=...) got no head: select at least one.")
    return unique


def checked_modules(config: HeadConfig) -> list[str] | None:
    """The `modules_to_save` of a tuner's configuration, as a new list, each once: peft adds to it."""
    names = config.modules_to_save
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{type(config).__name__}(modules_to_save=...) takes a list of names of modules.")
    return list(dict.fromkeys(names))


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a base by their paths in it, without those that adapters add."""
    modules = {}
    for name, module in model.named_modules():
        if ".modules_to_save." not in name and not isinstance(module, AuxiliaryTrainingWrapper):
            modules[name.removesuffix(".base_layer").replace(".original_module", "")] = module
    return modules


def fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What identifies a base model, whatever dtype or quantization it was loaded in.

    Returns:
        `layout`: its `HeadLayout`. `outside`: SHA-256 of everything that quantization does not change (embeddings,
        norms), rounded to bfloat16. `projections`: the same for its query, key and value projections, or None if those
        are quantized. Task heads are in neither: new ones are random. None for a model without weights (on the meta
        device).
    """
    layout = HeadLayout.of(model)
    modules = {name: module for name, module in _base_modules(model).items() if hasattr(module, "weight")}
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
    """Raise `UserError` unless an adapter made on the model with the fingerprint `stored` fits this one."""
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
    weight: Any = module.weight
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        weight = dequantize_bnb_weight(weight, getattr(module, "state", None))
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach()


def in_int8(module: nn.Module) -> bool:
    """Whether a projection is bitsandbytes' LLM.int8."""
    return type(module.weight).__name__ == "Int8Params"


def _conv1d(linear: nn.Linear) -> Conv1D:
    """The same projection as GPT-2 stores it; dequantizing always returns `torch.nn.Linear`."""
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = linear.bias
    return conv


class HeadLayer(nn.Module, BaseTunerLayer):
    """A projection with adapters: `torch.nn.Linear`, GPT-2's `Conv1D`, or bitsandbytes' `Linear4bit` / `Linear8bitLt`.

    A tuner's layer names the tensors of an adapter that are its own (`adapter_layer_names`), adds an adapter
    (`update_layer`), and writes adapters into a plain projection (`write_into`).
    """

    base_layer: Projection

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        if not (isinstance(base_layer, (nn.Linear, Conv1D))):
            raise UserError(f"A projection of type {type(base_layer).__name__} cannot be trained by heads.")
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self._kept: tuple[torch.Tensor, torch.Tensor | None] | None = None  # the base's own while adapters are merged

    def update_layer(self, adapter_name: str, target: Any) -> None:
        """Add an adapter; target: this projection's value of `HeadTuner.targets`."""
        raise NotImplementedError

    def write_into(self, dense: Projection, adapters: list[str]) -> None:
        """Write these adapters into an unquantized projection of the same shape."""
        raise NotImplementedError

    def own(self, adapters: list[str]) -> list[str]:
        """The adapters among these that change this projection.

        Raises:
            UserError: they cannot be used together.
        """
        names = dict.fromkeys(adapters)
        return [name for name in names if any(name in getattr(self, kind) for kind in self.adapter_layer_names)]

    @property
    def in_use(self) -> list[str]:
        """The adapters that take part in the forward pass."""
        return [] if self.disable_adapters or self.merged else self.own(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base layer; `unmerge` restores the base's own weights exactly.

        All merged adapters are written again, so that merging one after the other equals using them at once.
        `merged_adapters` also names those without a part in this projection: no layer continues with others.

        Args:
            safe_merge: whether to check first that merged weights are finite.
            adapter_names: the adapters; by default the active ones.

        Raises:
            UserError: the base is quantized, or merged weights would not be finite.
        """
        adapters = list(dict.fromkeys(check_adapters_to_merge(self, adapter_names)))
        both = [*self.merged_adapters, *adapters]
        if self.own(adapters):
            self.check_in_place(both)
            if safe_merge:
                self.check_finite(both)
            base = self.base_layer
            if self._kept is None:
                self._kept = (base.weight.detach().clone(), None if base.bias is None else base.bias.detach().clone())
            self._restore(base)
            self.write_into(base, self.own(both))
        self.merged_adapters = both

    def check_in_place(self, adapters: list[str]) -> None:
        """Raise `UserError` if these adapters cannot be written into the base layer itself."""
        if self.own(adapters) and (hasattr(self.base_layer.weight, "quant_state") or in_int8(self.base_layer)):
            raise UserError(
                "An adapter cannot be merged into a quantized projection in place: use merge_and_unload(), which gives "
                "a plain float model."
            )

    def check_finite(self, adapters: list[str]) -> None:
        """Raise `UserError` if merging would write NaN or infinite weights, which is likely in float16."""
        own, kinds = self.own(adapters), [getattr(self, kind) for kind in self.adapter_layer_names]
        broken = [n for n in own if not all(torch.isfinite(kind[n]).all() for kind in kinds if n in kind)]
        if own and not broken and self.base_layer.weight.is_floating_point():
            dense = copy.deepcopy(self.base_layer)
            self._restore(dense)
            self.write_into(dense, own)
            if not all(torch.isfinite(p).all() for p in (dense.weight, dense.bias) if p is not None):
                broken = own
        if broken:
            raise UserError(
                f"Merging {', '.join(broken)} would write NaN or infinite weights, so nothing was merged: train again "
                "at a lower rate, or load the base in a wider dtype."
            )

    @torch.no_grad()
    def _restore(self, module: Projection) -> None:
        if self._kept is not None:
            weight, bias = self._kept
            module.weight.copy_(weight)
            if bias is not None:
                assert module.bias is not None
                module.bias.copy_(bias)

    def unmerge(self) -> None:
        """Undo `merge`."""
        self._restore(self.base_layer)
        self._kept = None
        self.merged_adapters = []


class HeadTuner(BaseTuner):
    """The tuner that `get_peft_model` makes of a `HeadConfig`."""

    tuner_layer_cls: type[HeadLayer]

    def targets(self, config: Any, layout: HeadLayout) -> dict[str, Any]:
        """{path of a projection, from the decoder: what its layer needs to add an adapter}."""
        raise NotImplementedError

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters that are merged into the base's weights, in the order of merging."""
        return next((list(layer.merged_adapters) for layer in self._layers().values()), [])

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A copy: it is completed for this model below, and the caller may use the configuration on another.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        assert isinstance(config, HeadConfig)
        merged = self.merged_adapters
        if merged:  # a new adapter starts from, and is checked against, the base's own weights
            self.unmerge_adapter()
        try:
            layout = HeadLayout.of(model)
            targets = self.targets(config, layout)
            prefix = layout.prefix(_base_modules(model))
            self._targets = {prefix + path: target for path, target in targets.items()}
            new_heads = NEW_HEADS.get(config.task_type or "", ())
            config.modules_to_save = list(dict.fromkeys([*(checked_modules(config) or ()), *new_heads])) or None
            self._check_modules_to_save(config, model)
            if config.fingerprint is None:
                config.fingerprint = fingerprint(model)
            else:
                check_fingerprint(config.fingerprint, model)
            config.target_modules = list(self._targets)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config.target_modules = None  # it follows from the heads, and is not saved with them
        finally:
            if merged:
                self.merge_adapter(merged)

    def _check_modules_to_save(self, config: HeadConfig, model: nn.Module) -> None:
        """Raise `UserError` for names that peft would ignore, or of modules that the adapter trains itself."""
        modules = dict(model.named_modules())
        taken = {*self._targets, *(name for name, module in modules.items() if isinstance(module, HeadLayer))}
        paths = {name: [key for key in modules if key.endswith(name)] for name in config.modules_to_save or ()}
        for name, keys in paths.items():
            if not keys and name not in {head for heads in NEW_HEADS.values() for head in heads}:
                raise UserError(f"There is no module '{name}' in this model: correct modules_to_save.")
            for key in keys:
                if any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for path in taken):
                    raise UserError(
                        f"The module '{key}' of modules_to_save holds heads that the adapter trains itself: name "
                        "modules outside of them, such as 'lm_head'."
                    )
        new_heads = NEW_HEADS.get(config.task_type or "", ())
        if new_heads and not any(paths[name] for name in new_heads):
            raise UserError(
                f"The task_type calls for a model with a new head ({' or '.join(new_heads)}), and this one has none: "
                "load it with the task's AutoModel class, or leave task_type out."
            )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    # peft calls it on the tuner, and its own is a static method.
    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:  # type: ignore[override]
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
        """Delete an adapter; if it was active, another one becomes active, or none if it was the last."""
        active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if active:
            # peft lets every layer choose its next adapter, and layers have different ones.
            self.set_adapter(self.active_adapter or list(self.peft_config)[:1])

    def _layers(self) -> dict[str, HeadLayer]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, HeadLayer)}

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter, or several, which are applied in this order."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for name in names:
            one_of("adapter", name, self.peft_config)
        super().set_adapter(adapter_name if isinstance(adapter_name, str) else names, inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_mixed(kwargs)
        return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # `PeftModel` calls this first, and then does not pass `adapter_names` on.
        self._refuse_mixed(kwargs)
        yield

    def _refuse_mixed(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "The adapters of a batch cannot be mixed by adapter_names: call the model once for each adapter, after "
                "set_adapter(name)."
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """An adapter's tensors by their names in the model; peft itself ignores missing or surplus ones.

        Raises:
            UserError: they are not those that the configuration calls for, or the adapter is merged.
        """
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected: set[str] = set()
        for path, module in model.named_modules():
            if isinstance(module, HeadLayer):
                if adapter_name in module.merged_adapters:
                    raise UserError(f"The adapter {adapter_name} is merged: call unmerge_adapter() before you load it.")
                kinds = [kind for kind in module.adapter_layer_names if adapter_name in getattr(module, kind)]
                expected.update(f"{path}.{kind}.{adapter_name}" for kind in kinds)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                expected.update(f"{path}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
        own = model.state_dict()
        lacking, surplus = expected - tensors.keys(), tensors.keys() - expected
        others = {name for name in expected & tensors.keys() if own[name].shape != tensors[name].shape}
        for what, names in (
            ("lacks '{}', which its configuration calls for", lacking),
            ("holds '{}', which its configuration does not call for", surplus),
            ("holds '{}' in another shape", others),
        ):
            if names:
                raise UserError(
                    f"The file of the adapter {adapter_name} {what.format(min(names))} ({len(names)} such tensors): "
                    "save the adapter again, with save_embedding_layers=False."
                )
        return tensors

    def check_merge(self, adapter_names: list[str] | None, safe_merge: bool = False) -> None:
        """Raise `UserError` if adapters (by default the active ones) cannot be merged, before the first layer is."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if isinstance(names, str):
            raise UserError(f"Adapters to merge are given as a list: ['{names}'].")
        for name in names:
            one_of("adapter", name, self.peft_config)
        names = [*self.merged_adapters, *names]
        for name in names:
            config = self.peft_config[name]
            assert isinstance(config, HeadConfig)
            if name not in self.active_adapters and config.modules_to_save:
                raise UserError(
                    f"The adapter {name} has modules of its own (modules_to_save), and a merged model has those of the "
                    f"active adapter: call set_adapter('{name}') before you merge it."
                )
        for layer in self._layers().values():
            layer.own(names)
            if safe_merge:
                layer.check_finite(names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters (by default the active ones) into the base's own weights; `unmerge_adapter` undoes it.

        Until then the model computes with the merged adapters alone.

        Args:
            adapter_names: the adapters.
            safe_merge: whether to check first that merged weights are finite.

        Raises:
            UserError: adapters cannot be merged, or not in place.
        """
        self.check_merge(adapter_names, safe_merge)
        for layer in self._layers().values():
            layer.check_in_place(self.active_adapters if adapter_names is None else adapter_names)
        super().merge_adapter(adapter_names)
        left = [name for name in self.active_adapters if name not in self.merged_adapters]
        if self.merged_adapters and left:
            warnings.warn(
                f"The active adapters {', '.join(left)} are not merged: the model computes with "
                f"{', '.join(self.merged_adapters)} alone until they are, or until unmerge_adapter().",
                UserWarning,
                stacklevel=2,
            )

    def _unload_and_optionally_merge(  # type: ignore[override]  # peft's annotation lacks what it returns
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        quantized = getattr(self.model, "hf_quantizer", None) is not None
        if merge:
            self.check_merge(adapter_names, safe_merge)
        elif self.merged_adapters:
            self.unmerge_adapter()
        if not (merge and quantized):
            return self._unloaded(merge, progressbar, False, adapter_names)
        # A row in full precision cannot be put back among quantized ones: the whole model becomes a float model.
        layers = self._layers()
        adapters = self.active_adapters if adapter_names is None else adapter_names
        model = self._unloaded(False, progressbar)
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

    def _unloaded(self, *settings: Any) -> Any:
        """peft's own unloading, which returns the model although its annotation says None."""
        unload: Any = super()._unload_and_optionally_merge
        return unload(*settings)
