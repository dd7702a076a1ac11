"""Reading only the query, key and value projections of a model, from its files or from memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError
from alps_repro.heads.layout import PARTS, HeadLayout, Part
from alps_repro.heads.selection import HeadSelection
from alps_repro.models.checks import QUANTIZATIONS, check_layers, is_extra, quantized_as, stored_quantization, unused
from alps_repro.models.files import Opened, first_line, tensor_files
from alps_repro.models.folders import adapter_base, is_adapter, load_config, resolve

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Attention:
    """Read access to the attention projections of one model.

    Attributes:
        layout: of the model.
        projections: paths as `HeadLayout.module` returns them -> tensors (outputs, inputs) in the stored dtype.
        source: the name by which the model was given.
        dtypes: paths -> the dtypes in which they are stored; with an adapter, its base's, whose other rows stay as they
            are.
    """

    layout: HeadLayout
    projections: Callable[[Sequence[str]], dict[str, torch.Tensor]]
    source: str
    dtypes: Callable[[Sequence[str]], dict[str, torch.dtype]]

    def stored(self, layer: int) -> dict[Part, torch.dtype]:
        """The dtypes in which the query, key and value rows of a layer are stored."""
        dtypes = self.dtypes(self.layout.modules(layer))
        return {part: dtypes[self.layout.module(layer, part)] for part in PARTS}

    def layer(self, layer: int) -> dict[Part, torch.Tensor]:
        """The query, key and value rows of a layer in head (group) order, each (rows, hidden size), on the CPU.

        Raises:
            UserError: they have another shape than the configuration says, or are not finite.
        """
        import torch

        layout = self.layout
        read = {path: weight.cpu() for path, weight in self.projections(layout.modules(layer)).items()}
        out: dict[Part, torch.Tensor] = {}
        for part in PARTS:
            weight = read[layout.module(layer, part)]
            expected = (layout.projection_rows(part), layout.hidden_size)
            if tuple(weight.shape) != expected:
                raise UserError(
                    f"'{layout.module(layer, part)}' of {self.source} has shape {tuple(weight.shape)}, not {expected} "
                    "as its configuration says: the checkpoint and its config.json do not belong together."
                )
            rows = layout.split(part)
            own = rows[0] + len(rows) == rows[-1] + 1  # one contiguous block: a view, not a copy
            out[part] = weight[rows[0] : rows[-1] + 1] if own else weight[torch.from_numpy(rows)]
            # NaN and infinity carry over to a sum, which is faster than a check of every weight.
            if not torch.isfinite(out[part].sum()) and not torch.isfinite(out[part]).all():
                raise UserError(
                    f"'{layout.module(layer, part)}' of {self.source} holds NaN or infinite weights: the model is "
                    "broken, most likely by a diverged training; use another checkpoint."
                )
        return out


@contextmanager
def open_attention(source: Any) -> Iterator[Attention]:
    """Open a model's attention projections for reading: a folder, hub id or adapter by name, or a loaded model.

    Folders are read tensor by tensor; nothing else is kept in memory.

    Args:
        source: the name, or a loaded model.

    Yields:
        Access to them, within the context.

    Raises:
        UserError: the name leads nowhere, or its weights are not readable or not those of its configuration.
    """
    if not isinstance(source, (str, Path)):
        yield _from_model(source)
        return
    folder = resolve(source)
    if not is_adapter(folder):
        yield _from_folder(folder, str(source))
        return
    with open_attention(adapter_base(folder)) as base:
        yield _with_adapter(base, folder, str(source))


def _from_model(model: Any) -> Attention:
    from alps_repro.tuner.base import dense_weight

    layout = HeadLayout.of(model)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if not name.endswith(".base_layer")
    }
    prefix = layout.prefix(modules)

    def projection(path: str) -> torch.Tensor:
        module = modules[prefix + path]
        if hasattr(module, "merged_weight"):
            return module.merged_weight()
        inner = getattr(module, "base_layer", module)
        if inner is not module and not (module.merged or module.disable_adapters):
            raise UserError(
                f"'{path}' has an adapter other than ALPS, whose part of the weights would be left out: call "
                "merge_and_unload() on the model first."
            )
        return dense_weight(inner)

    def dtype(path: str) -> torch.dtype:
        module = modules[prefix + path]
        # For quantized weights the dtype of computation.
        return dense_weight(getattr(module, "base_layer", module)).dtype

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {path: projection(path) for path in paths}

    def dtypes(paths: Sequence[str]) -> dict[str, torch.dtype]:
        return {path: dtype(path) for path in paths}

    return Attention(layout, projections, getattr(model, "name_or_path", "") or type(model).__name__, dtypes)


def _from_folder(folder: Path, source: str) -> Attention:
    from safetensors import SafetensorError

    config = load_config(folder)
    layout = HeadLayout.of(config)
    if stored := stored_quantization(config):
        kind = quantized_as(stored)
        raise UserError(
            f"'{source}' is stored in {kind} (quantization_config in its config.json): "
            + (f"pass what load_model(..., '{kind}') gives." if kind in QUANTIZATIONS else "use one in float.")
        )
    try:
        where = tensor_files(folder)
        prefix = layout.prefix(where)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{source}: {error}") from error
        raise UserError(f"The weights of '{source}' cannot be read ({first_line(error)}): copy them again.") from error

    check_layers(layout.layers, where, source)
    _check_attention(layout, config, prefix, where, source)
    opened = Opened(folder)

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        names = {path: f"{prefix}{path}.weight" for path in paths}
        lacking = [name for name in names.values() if name not in where]
        if lacking:
            raise UserError(f"'{source}' lacks the tensor '{lacking[0]}': the checkpoint is incomplete.")
        for file_name in dict.fromkeys(where[name] for name in names.values()):
            try:
                out |= opened.read(file_name, {p: name for p, name in names.items() if where[name] == file_name})
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"'{folder / file_name}' cannot be read ({first_line(error)}): the file is damaged or gone; "
                    "copy it again."
                ) from error
        for path, weight in out.items():
            if weight.ndim != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
                raise UserError(
                    f"'{names[path]}' of '{source}' is {weight.dtype} of shape {tuple(weight.shape)}, not a float "
                    "matrix: read quantized checkpoints with load_model and pass the model."
                )
        return {path: weight.T for path, weight in out.items()} if layout.transposed else out

    def dtypes(paths: Sequence[str]) -> dict[str, torch.dtype]:
        names = {path: f"{prefix}{path}.weight" for path in paths}
        return {path: opened.dtype(where[name], name) for path, name in names.items()}

    return Attention(layout, projections, source, dtypes)


def _check_attention(layout: HeadLayout, config: Any, prefix: str, where: dict[str, str], source: str) -> None:
    """Refuse surplus layers, and attention tensors that such a model does not have, such as scales or biases.

    No model is built: `load_model` checks all tensors, and here only attention is read.
    """
    text = config.get_text_config()
    before = prefix + layout.module(0, "query").partition("0.")[0]
    attention = "." + layout.output_module(0).split(".")[-2] + "."
    refused = []
    for tensor in where:
        match = re.match(re.escape(before) + r"(\d+)(\..*)", tensor)
        if not match or is_extra(tensor, config):
            continue
        layer, rest = int(match[1]), match[2]
        if layer >= layout.layers or (
            rest.startswith(attention) and tensor.removeprefix(prefix) not in layout.tensors(layer, text)
        ):
            refused.append(tensor)
    if refused:
        raise unused(source, sorted(refused), config)


def _with_adapter(base: Attention, folder: Path, source: str) -> Attention:
    from safetensors.torch import load_file

    from alps_repro.tuner.rows import ROWS, AlpsConfig

    layout = base.layout
    try:
        config = AlpsConfig.from_pretrained(str(folder))
        stored = load_file(folder / "adapter_model.safetensors")
    except Exception as error:  # peft's configurations have no common base class of errors
        raise UserError(
            f"'{source}' is not a readable ALPS adapter ({first_line(error)}): save the adapter again."
        ) from error
    if not isinstance(config, AlpsConfig):
        raise UserError(
            f"'{source}' is a {config.peft_type.value} adapter, and only ALPS adapters can be read without their "
            "model: load it with load_model, and pass what merge_and_unload() gives."
        )
    if isinstance(config.fingerprint, dict) and config.fingerprint.get("layout", asdict(layout)) != asdict(layout):
        raise UserError(
            f"The adapter '{source}' does not fit its base '{base.source}', which has other layers, heads or groups "
            "than the model that it was made on: correct base_model_name_or_path in its adapter_config.json."
        )
    rows = layout.selected_rows(HeadSelection(tuple(config.heads), layout))

    def merged(path: str, weight: torch.Tensor) -> torch.Tensor:
        import torch

        if path not in rows:
            return weight
        own = next((value for name, value in stored.items() if name.endswith(f".{path}.{ROWS}")), None)
        if (
            own is None
            or not own.is_floating_point()
            or own.dtype.itemsize <= 1
            or own.shape != (len(rows[path]), weight.shape[1])
        ):
            raise UserError(
                f"The adapter '{source}' does not fit its base '{base.source}' at '{path}': check "
                "base_model_name_or_path in its adapter_config.json, or save the adapter again."
            )
        dtype = torch.promote_types(weight.dtype, own.dtype)
        return weight.to(dtype).index_copy(0, torch.from_numpy(rows[path]), own.to(dtype))

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {path: merged(path, weight) for path, weight in base.projections(paths).items()}

    return Attention(layout, projections, source, base.dtypes)
