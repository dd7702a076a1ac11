"""Head scores from other sources than the distance of two models' weights: what other systems choose heads by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from alps_repro.checkpoints import is_adapter, load_config, load_model, resolve
from alps_repro.data import OFFLINE, data_hash, offline_splits, training_examples
from alps_repro.errors import UserError
from alps_repro.heads import HeadLayout
from alps_repro.hifi import hifi
from alps_repro.importance import importance
from alps_repro.scores import RESULT, HeadScores
from alps_repro.training import Collate, tokenize


def batches(dataset: str, questions: int, tokenizer: Any, size: int = 16) -> tuple[list[dict[str, Any]], str]:
    """Batches of validation examples, and their hash; of a hub data set, of its first training examples."""
    from datasets import Dataset

    if dataset in OFFLINE:
        examples = Dataset.from_list(offline_splits(dataset)["validation"][:questions])
    else:
        examples = training_examples(dataset, size=questions)
    rows, collate = list(tokenize(examples, tokenizer, 2048)), Collate(tokenizer.pad_token_id, "response")
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)], data_hash(examples)


def scale_norm(base: str | Path, task: str | Path, **_: Any) -> np.ndarray:
    """LoFiT's: the norms of scales that were learned; `task` is the folder of their adapter."""
    from safetensors.torch import load_file

    from alps_repro.tuner.lofit import norms

    folder = resolve(task)
    if not is_adapter(folder):
        raise UserError(f"'{task}' is no adapter: train LoFiT's scales (method lofit_scales) and name their folder.")
    return norms(load_file(folder / "adapter_model.safetensors"), HeadLayout.of(load_config(resolve(base))))


def importance_of(
    base: str | Path, task: str | Path, *, dataset: str, questions: int, progress: bool = False
) -> np.ndarray:
    """Eq. 3's: what the task model loses on examples of a data set with each head silenced, nats per token."""
    model, tokenizer = load_model(task)
    return importance(model, batches(dataset, questions, tokenizer)[0], progress=progress)


def richness_of(
    base: str | Path, task: str | Path, *, dataset: str, questions: int, progress: bool = False
) -> np.ndarray:
    """HiFi's: of the base's own results on examples of a data set."""
    model, tokenizer = load_model(base)
    return hifi(model, batches(dataset, questions, tokenizer)[0], progress=progress)


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
