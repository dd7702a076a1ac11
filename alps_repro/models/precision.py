"""The precision of matrix products: frozen weights are rounded to it once, and everything else is in float32.

Under autocast, products of float32 weights are the same bit for bit, but each weight would be rounded anew in every
forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Linear layers, and their weights before they were rounded.
Rounded = list[tuple["nn.Module", "nn.Parameter"]]


def round_frozen(model: nn.Module, precision: str) -> Rounded:
    """Round the frozen weights of linear layers to a precision, in place; all other weights become float32.

    The forward pass has to run under autocast in that precision. Trained weights keep their full precision, as do
    biases, norms and embeddings; an output layer that shares a frozen embedding gets a rounded weight of its own.
    Bases in 4 bit are multiplied in that precision; those in 8 bit are multiplied as integers, and take and return it.

    Args:
        model: any that `load_model` or `finetune.trainable` returns.
        precision: `float32`, `bfloat16` or `float16`.

    Returns:
        What `restore` takes to undo the rounding. It holds the weights before, so drop it where that is not needed.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    dtype: torch.dtype = getattr(torch, precision)
    rounded: Rounded = []
    linear: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight: Any = module.weight
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            _multiply_in(module, dtype)
        elif weight.is_floating_point() and not weight.requires_grad and weight.dtype != dtype:
            rounded.append((module, weight))
            if id(weight) not in linear:
                linear[id(weight)] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            module.weight = linear[id(weight)]
    own = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in own:
            parameter.data = parameter.data.float()
    return rounded


def restore(rounded: Rounded) -> None:
    """Give linear layers their weights from before `round_frozen` back."""
    for module, weight in rounded:
        module.weight = weight


def _multiply_in(module: Any, dtype: torch.dtype) -> None:
    """Let a quantized layer take its input in a dtype, as autocast would, so that its output has it as well."""
    if hasattr(module.weight, "quant_state"):  # in 4 bit: dequantized to that dtype, too
        module.compute_dtype = module.weight.quant_state.dtype = dtype
    module.register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))
