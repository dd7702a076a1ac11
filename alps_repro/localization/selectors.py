"""Head scores from other sources than the distance of two models' weights: what other systems choose heads by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.data.datasets import OFFLINE, data_hash, offline_splits, training_examples
from alps_repro.data.prompts import MAX_LOST, Collate, check_rows, longest, tokenize_and_count
from alps_repro.errors import UserError
from alps_repro.heads.layout import HeadLayout
from alps_repro.localization.ablation import importance
from alps_repro.localization.hifi import hifi
from alps_repro.localization.metrics import RESULT
from alps_repro.localization.scores import HeadScores
from alps_repro.models.folders import is_adapter, load_config, resolve
from alps_repro.models.loading import load_model

if TYPE_CHECKING:
    import torch

#: Tokens of an example that heads are chosen by, where the model has the positions.
MAX_LENGTH = 2048


def batches(
    dataset: str,
    questions: int,
    tokenizer: Any,
    size: int = 16,
    *,
    max_length: int = MAX_LENGTH,
    max_lost: float = MAX_LOST,
) -> tuple[list[dict[str, Any]], str]:
    """Batches of validation examples, and their hash; of a hub data set, of its first training examples.

    max_lost: share of them that may be cut at `max_length` tokens, dropped or empty.
    """
    from datasets import Dataset

    if dataset in OFFLINE:
        examples = Dataset.from_list(offline_splits(dataset)["validation"][:questions])
    else:
        examples = training_examples(dataset, size=questions)
    tokenized, counts = tokenize_and_count(examples, tokenizer, max_length)
    check_rows(counts, max_lost, "examples that heads are chosen by")
    rows, collate = list(tokenized), Collate(tokenizer.pad_token_id, "response")
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)], data_hash(examples)


def scale_norm(base: str | Path, task: str | Path, **_: Any) -> np.ndarray:
    """LoFiT's: the norms of scales that were learned; `task` is the folder of their adapter."""
    from safetensors.torch import load_file

    from alps_repro.tuner.lofit import norms

    folder = resolve(task)
    if not is_adapter(folder):
        raise UserError(f"'{task}' is no adapter: train LoFiT's scales (method lofit_scales) and name their folder.")
    return norms(load_file(folder / "adapter_model.safetensors"), HeadLayout.of(load_config(resolve(base))))


def model_and_batches(
    folder: str | Path,
    dataset: str,
    questions: int,
    *,
    size: int = 16,
    max_lost: float = MAX_LOST,
    device: str = "auto",
) -> tuple[torch.nn.Module, list[dict[str, Any]], str]:
    """A stored model in float32, the batches of a data set that its heads are scored on, and their hash.

    max_lost: as in `batches`. device: of `devices.DEVICES`.
    """
    import torch

    model, tokenizer = load_model(folder, dtype=torch.float32, device=device)
    length = longest(model, MAX_LENGTH)
    return model, *batches(dataset, questions, tokenizer, size, max_length=length, max_lost=max_lost)


def importance_of(base: str | Path, task: str | Path, *, progress: bool = False, **examples: Any) -> np.ndarray:
    """Eq. 3's: what the task model loses on examples with each head zero-ablated, nats a token.

    examples: as `model_and_batches` takes them.
    """
    model, data, _ = model_and_batches(task, **examples)
    return importance(model, data, progress=progress)


def richness_of(base: str | Path, task: str | Path, *, progress: bool = False, **examples: Any) -> np.ndarray:
    """HiFi's: of the base's own per-head attention outputs on examples, as `model_and_batches` takes them."""
    model, data, _ = model_and_batches(base, **examples)
    return hifi(model, data, progress=progress)


#: By the names of `scores.RESULT_METRICS`.
SELECTORS: dict[str, Callable[..., np.ndarray]] = {
    "scale_norm": scale_norm,
    "importance": importance_of,
    "hifi": richness_of,
}


def select_by(metric: str, base: str | Path, task: str | Path, **asked: Any) -> HeadScores:
    """Scores by one of `SELECTORS`; `task`, and what is `asked`, as the selector takes it.

    Raises:
        UserError: as the selector raises it, or all heads score the same.
    """
    values = SELECTORS[metric](base, task, **asked)
    layout = HeadLayout.of(load_config(resolve(base)))
    return HeadScores(values, layout, str(base), str(task), metric, RESULT).checked()
