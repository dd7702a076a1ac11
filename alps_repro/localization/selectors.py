"""Head scores other than distances between two models' weights: those by which other systems choose heads."""

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
    from transformers import PreTrainedModel

#: Maximal tokens of an example that heads are chosen by, if the model has as many positions.
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
    """Batches of validation examples, and their hash; of a hub data set, of training examples.

    Args:
        dataset: a name in `data.datasets.DATASETS`.
        questions: number of examples.
        tokenizer: the model's.
        size: examples per batch.
        max_length: in tokens, at which examples are truncated.
        max_lost: share of them that may be truncated, dropped or empty.
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
    """LoFiT's score: the norms of learned scales, float64 (layers, heads).

    Args:
        base: the model that they were trained on.
        task: folder of their adapter.

    Raises:
        UserError: `task` is no adapter, or one without scales of all heads.
    """
    from safetensors.torch import load_file

    from alps_repro.tuner.lofit import norms

    folder = resolve(task)
    if not is_adapter(folder):
        raise UserError(
            f"'{task}' is not an adapter: train LoFiT's scales (method lofit_scales) and name their folder."
        )
    return norms(load_file(folder / "adapter_model.safetensors"), HeadLayout.of(load_config(resolve(base))))


def model_and_batches(
    folder: str | Path,
    dataset: str,
    questions: int,
    *,
    size: int = 16,
    max_lost: float = MAX_LOST,
    device: str = "auto",
) -> tuple[PreTrainedModel, list[dict[str, Any]], str]:
    """A stored model in float32, the batches of a data set that its heads are scored on, and their hash.

    Args:
        folder: of the model, or its name.
        dataset: as in `batches`.
        questions: as in `batches`.
        size: as in `batches`.
        max_lost: as in `batches`.
        device: of `devices.DEVICES`.
    """
    import torch

    model, tokenizer = load_model(folder, dtype=torch.float32, device=device)
    length = longest(model, MAX_LENGTH)
    return model, *batches(dataset, questions, tokenizer, size, max_length=length, max_lost=max_lost)


def importance_of(base: str | Path, task: str | Path, *, progress: bool = False, **examples: Any) -> np.ndarray:
    """Eq. 3's score: the increase in the task model's loss (nats per loss token) with each head zero-ablated.

    Args:
        base: not used.
        task: the task model.
        progress: show a bar.
        examples: as `model_and_batches` takes them.
    """
    model, data, _ = model_and_batches(task, **examples)
    return importance(model, data, progress=progress)


def richness_of(base: str | Path, task: str | Path, *, progress: bool = False, **examples: Any) -> np.ndarray:
    """HiFi's score, of the base's per-head attention outputs.

    Args:
        base: the model that is run.
        task: not used.
        progress: show a bar.
        examples: as `model_and_batches` takes them.
    """
    model, data, _ = model_and_batches(base, **examples)
    return hifi(model, data, progress=progress)


#: Every metric of per-head attention outputs, in place of a head matrix: {name: function of base and task model}.
RESULT_METRICS: dict[str, Callable[..., np.ndarray]] = {
    "scale_norm": scale_norm,
    "importance": importance_of,
    "hifi": richness_of,
}


def select_by(metric: str, base: str | Path, task: str | Path, **settings: Any) -> HeadScores:
    """Head scores by a metric of per-head attention outputs.

    Args:
        metric: of `RESULT_METRICS`.
        base: the base model.
        task: the task model, or an adapter, as the metric's function takes it.
        settings: as the metric's function takes them.

    Raises:
        UserError: as the metric's function raises it, or all heads score the same.
    """
    values = RESULT_METRICS[metric](base, task, **settings)
    layout = HeadLayout.of(load_config(resolve(base)))
    return HeadScores(values, layout, str(base), str(task), metric, RESULT).checked()
