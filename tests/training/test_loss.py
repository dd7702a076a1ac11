"""The loss at loss tokens equals the plain one, and so do its gradients, on every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY, tiny_model

from alps_repro.data.prompts import IGNORED
from alps_repro.training.loss import summed_loss


def batch(vocabulary: int, answers: list[int], width: int = 12, seed: int = 0) -> dict[str, Any]:
    """Rows padded on the left, each with an answer of its own length at its end."""
    ids = torch.randint(0, vocabulary, (len(answers), width), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    for i, length in enumerate(answers):
        mask[i, :i] = 0
        if length:
            labels[i, -length:] = ids[i, -length:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model: Any, given: dict[str, Any]) -> torch.Tensor:
    logits = model(**{name: value for name, value in given.items() if name != "labels"}).logits.float()
    counted = given["labels"][:, 1:] != IGNORED
    return F.cross_entropy(logits[:, :-1][counted], given["labels"][:, 1:][counted], reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("answers", [[3, 1, 5], [11, 11, 11], [1, 0, 0]], ids=["unequal", "prompts too", "one token"])
@pytest.mark.parametrize("kind", TINY)
def test_equals_the_plain_loss(kind: str, answers: list[int]) -> None:
    model = tiny_model(kind)
    given = batch(model.config.get_text_config().vocab_size, answers)
    expected = plain(model, given)
    whole = gradients(model, expected)
    for chunk in (1024, 2):
        found = summed_loss(model, given, chunk=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        own = gradients(model, found)
        assert own.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(own[name], whole[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model, given, chunk=2), expected, rtol=1e-6, atol=1e-6)


def test_no_loss_token() -> None:
    model = tiny_model("llama")
    given = batch(model.config.vocab_size, [0, 0])
    loss = summed_loss(model, given)
    assert loss.item() == 0
    assert all(not value.any() for value in gradients(model, loss).values())
