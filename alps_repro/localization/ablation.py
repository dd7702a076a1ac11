"""What a model loses with one head at a time zero-ablated (ALPS, Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout

if TYPE_CHECKING:
    import torch


# --- importance -----------------------------------------------------------------------------------------------------


def _counted(labels: torch.Tensor) -> torch.Tensor:
    """Which labels count in the loss: (examples, positions), all but the first column, which nothing predicts."""
    from alps_repro.data.prompts import IGNORED

    return labels[:, 1:] != IGNORED


def _summed_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> float:
    """Cross entropy in nats of a batch's counted tokens, one float32 value a token, added in float64."""
    import torch.nn.functional as F

    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    counted = _counted(batch["labels"])
    losses = F.cross_entropy(logits[:, :-1][counted].float(), batch["labels"][:, 1:][counted], reduction="none")
    return float(losses.double().sum())


def importance(model: torch.nn.Module, batches: Sequence[Mapping[str, Any]], *, progress: bool = False) -> np.ndarray:
    """What a task model loses with each of its query heads silenced (ALPS, Eq. 3 and 4).

    The paper's "performance" is taken as the loss: loss with the head's result set to zero before the output
    projection, minus loss as it is, so that higher means more important and a head that does harm is below zero.

    model: any that `load_model` gives, with or without an adapter; it is left as it was.
    batches: as `training.Collate` makes them: input_ids, attention_mask, position_ids, labels (-100 where a token
        does not count), logits_to_keep. What enters a layer is kept for one batch at a time: layers · tokens · hidden
        size numbers.
    progress: show a bar, one step a layer and batch.

    Returns:
        float64 (layers, heads), in nats per counted token of all batches together.

    Raises:
        UserError: the architecture is not known, or no token counts.
    """
    import torch
    from tqdm.auto import tqdm

    layout = HeadLayout.of(model)
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    prefix = layout.prefix(modules)
    paths = [prefix + layout.output_module(layer) for layer in range(layout.layers)]
    layers = [modules[path.rsplit(".", 2)[0]] for path in paths]
    counted = sum(int(_counted(batch["labels"]).sum()) for batch in batches)
    if not counted:
        raise UserError("No token of the batches counts, so there is no loss to compare: give examples with responses.")

    silenced: tuple[int, int] | None = None
    outputs: dict[int, Any] = {}

    def silence(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if silenced is None or silenced[0] != layer:
                return None
            heads = inputs[0].clone()
            heads[..., silenced[1] * layout.head_dim : (silenced[1] + 1) * layout.head_dim] = 0
            return (heads, *inputs[1:])

        return hook

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs.setdefault(layer, output)

        return hook

    modes = {module: module.training for module in model.modules()}
    forwards = [layer.__dict__.get("forward") for layer in layers]
    hooks = [modules[path].register_forward_pre_hook(silence(i)) for i, path in enumerate(paths)]
    hooks += [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    lost = np.zeros((layout.layers, layout.heads))
    device = next(model.parameters()).device
    bar = tqdm(total=len(batches) * layout.layers, desc="silencing heads", disable=not progress)
    try:
        model.eval()
        with torch.no_grad(), bar:
            for batch in batches:
                batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                outputs.clear()
                whole = _summed_loss(model, batch)
                for i in range(layout.layers):
                    for head in range(layout.heads):
                        silenced = (i, head)
                        lost[i, head] += _summed_loss(model, batch) - whole
                    # The layers above are silenced next, and to them this one gives what it gave to the whole model:
                    # with what is kept in place of computing it anew, half of all work is saved.
                    layers[i].forward = lambda *_, _kept=outputs[i], **__: _kept
                    bar.update()
                silenced = None
                _put_back(layers, forwards)
    finally:
        for hook in hooks:
            hook.remove()
        _put_back(layers, forwards)
        for module, training in modes.items():
            module.training = training
    return lost / counted


def _put_back(layers: Sequence[torch.nn.Module], forwards: Sequence[Any]) -> None:
    """Give layers their own `forward` again: the class's, or, where there was one, the instance's."""
    for layer, forward in zip(layers, forwards):
        layer.__dict__.pop("forward", None)
        if forward is not None:
            layer.forward = forward
