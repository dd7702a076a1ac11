"""The language-model loss at loss tokens only, without the memory of all logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from alps_repro.data.prompts import IGNORED

if TYPE_CHECKING:
    from torch import nn

#: Positions whose logits are held at a time.
CHUNK = 1024


def summed_loss(model: nn.Module, batch: Mapping[str, Any], *, chunk: int = CHUNK) -> torch.Tensor:
    """Cross-entropy in nats, summed over the loss tokens of a batch, in float32.

    The output layer runs only on positions that predict a loss token, `chunk` of them at a time, and the gradient of
    each chunk is computed with it, so that logits of `(chunk, vocabulary)` are the most that is ever held.
    The products are those of the plain loss, with no recomputation.

    Args:
        model: a causal language model of `transformers`, or one within PEFT's or a launcher's wrapper.
        batch: what the model takes; `labels` (examples, positions) hold `IGNORED` where no loss is taken.
        chunk: positions per chunk.

    Returns:
        A scalar; 0 where the batch has no loss token.
    """
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden, head, finish = _last_hidden(model, inputs)
    counted = labels != IGNORED
    states, targets = hidden[:, :-1][counted], labels[counted]
    if not torch.is_grad_enabled():
        return _total(states, targets, lambda h: finish(head(h)), chunk)
    weights = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _ChunkedLoss.apply(states, targets, lambda h: finish(head(h)), chunk, *weights)


def _last_hidden(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, nn.Module, Callable[..., Any]]:
    """The input of the output layer at every position, that layer, and what the model does to its logits."""
    head = _within(model).get_output_embeddings()
    found: list[torch.Tensor] = []

    def keep(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        found.append(given[0])
        return (given[0][:1, :1],)  # the model's own logits are not needed

    handle = head.register_forward_pre_hook(keep)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    cap = getattr(_within(model).config.get_text_config(), "final_logit_softcapping", None)
    return found[0], head, (lambda logits: cap * torch.tanh(logits / cap)) if cap else (lambda logits: logits)


def _within(model: nn.Module) -> Any:
    """The causal language model within wrappers."""
    return next(module for module in model.modules() if hasattr(module, "get_output_embeddings"))


def _total(
    states: torch.Tensor, targets: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor], chunk: int
) -> torch.Tensor:
    parts = zip(states.split(chunk), targets.split(chunk))
    return sum(
        (F.cross_entropy(logits(h).float(), target, reduction="sum") for h, target in parts),
        start=torch.zeros((), device=states.device),
    )


class _ChunkedLoss(torch.autograd.Function):
    """The sum, with gradients computed chunk by chunk in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        targets: torch.Tensor,
        logits: Callable[[torch.Tensor], torch.Tensor],
        chunk: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), device=states.device)
        of_states = torch.empty_like(states)
        of_weights = [torch.zeros_like(weight) for weight in weights]
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            own = states[part].detach().requires_grad_()
            with torch.enable_grad():
                loss = F.cross_entropy(logits(own).float(), targets[part], reduction="sum")
            grads = list(torch.autograd.grad(loss, [own, *weights]))
            while len(grads) > 1:  # each is freed as soon as it is added: that of the output layer is large
                of_weights[len(grads) - 2] += grads.pop()
            of_states[part] = grads.pop()
            total += loss.detach()
        ctx.save_for_backward(of_states, *of_weights)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        of_states, *of_weights = ctx.saved_tensors
        return (of_states * gradient, None, None, None, *(own * gradient for own in of_weights))
