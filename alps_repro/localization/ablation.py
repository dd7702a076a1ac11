"""Importance of heads: the increase in a model's loss with one head at a time zero-ablated (ALPS, Eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.data.prompts import IGNORED
from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout

if TYPE_CHECKING:
    import torch
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel


def importance(model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], *, progress: bool = False) -> np.ndarray:
    """The increase in a task model's loss with each of its query heads zero-ablated (ALPS, Eq. 3 and 4).

    We take the paper's "performance" to be the loss: the loss with the head's output set to zero before the output
    projection, minus the loss of the whole model. Higher means more important; a harmful head is below zero.

    Args:
        model: any that `load_model` returns, with or without an adapter; it is left unchanged.
        batches: as `data.prompts.Collate` makes them: input_ids, attention_mask, position_ids, labels (-100 for tokens
            that are not loss tokens), logits_to_keep. The layers' outputs are kept for one batch at a time:
            layers · tokens · hidden size numbers.
        progress: show a bar, one step per layer and batch.

    Returns:
        float64 (layers, heads), in nats per loss token of all batches together.

    Raises:
        UserError: the architecture is unknown, or there are no loss tokens.
    """
    import torch
    from tqdm.auto import tqdm

    layout = HeadLayout.of(model)
    tokens = sum(int(_loss_tokens(batch["labels"]).sum()) for batch in batches)
    if not tokens:
        raise UserError("The batches have no loss tokens, so no loss can be compared: give examples with responses.")
    increases = np.zeros((layout.layers, layout.heads))
    device = next(model.parameters()).device
    with (
        _ablatable(model, layout) as ablation,
        torch.no_grad(),
        tqdm(total=len(batches) * layout.layers, desc="zero-ablating heads", disable=not progress) as bar,
    ):
        for batch in batches:
            moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            increases += _increases(model, layout, moved, ablation, bar)
    return increases / tokens


@dataclass
class _Ablation:
    """The state of a model whose heads can be zero-ablated.

    Attributes:
        layers: the model's decoder layers.
        forwards: each layer's own `forward` where it is the instance's, else None.
        head: (layer, head) that is zero-ablated in the next forward pass; None for the whole model.
        outputs: {layer: its output in the first forward pass since the dictionary was cleared}.
    """

    layers: list[Any]
    forwards: list[Any]
    head: tuple[int, int] | None = None
    outputs: dict[int, Any] = field(default_factory=dict)

    def restore(self) -> None:
        """Give layers their own `forward` again: the class's or, if there was one, the instance's."""
        for layer, forward in zip(self.layers, self.forwards):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _increases(
    model: PreTrainedModel, layout: HeadLayout, batch: Mapping[str, Any], ablation: _Ablation, bar: tqdm[Any]
) -> np.ndarray:
    """The increase in a batch's summed loss with each head zero-ablated: (layers, heads)."""
    increases = np.zeros((layout.layers, layout.heads))
    ablation.outputs.clear()
    whole = _summed_loss(model, batch)
    for layer in range(layout.layers):
        for head in range(layout.heads):
            ablation.head = (layer, head)
            increases[layer, head] = _summed_loss(model, batch) - whole
        # For the layers above, whose heads follow, this layer's output is that of the whole model: reusing it instead
        # of computing it again saves half of all work.
        ablation.layers[layer].forward = lambda *_, _kept=ablation.outputs[layer], **__: _kept
        bar.update()
    ablation.head = None
    ablation.restore()
    return increases


def _loss_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Which labels are loss tokens: (examples, positions), without the first column, which nothing predicts."""
    return labels[:, 1:] != IGNORED


def _summed_loss(model: PreTrainedModel, batch: Mapping[str, Any]) -> float:
    """Cross entropy in nats of a batch's loss tokens, one float32 value per token, summed in float64."""
    import torch.nn.functional as F

    logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    tokens = _loss_tokens(batch["labels"])
    losses = F.cross_entropy(logits[:, :-1][tokens].float(), batch["labels"][:, 1:][tokens], reduction="none")
    return float(losses.double().sum())


@contextmanager
def _ablatable(model: PreTrainedModel, layout: HeadLayout) -> Iterator[_Ablation]:
    """Put a model in eval mode, with hooks that zero-ablate a head and keep layers' outputs; undone afterwards."""
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    prefix = layout.prefix(modules)
    paths = [prefix + layout.output_module(layer) for layer in range(layout.layers)]
    layers = [modules[path.rsplit(".", 2)[0]] for path in paths]
    ablation = _Ablation(layers, [layer.__dict__.get("forward") for layer in layers])

    def ablate(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if ablation.head is None or ablation.head[0] != layer:
                return None
            head, outputs = ablation.head[1], inputs[0].clone()
            outputs[..., head * layout.head_dim : (head + 1) * layout.head_dim] = 0
            return (outputs, *inputs[1:])

        return hook

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            ablation.outputs.setdefault(layer, output)

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [modules[path].register_forward_pre_hook(ablate(i)) for i, path in enumerate(paths)]
    hooks += [layer.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        model.eval()
        yield ablation
    finally:
        for hook in hooks:
            hook.remove()
        ablation.restore()
        for module, training in modes.items():
            module.training = training
