"""lm-eval configurations of the tasks that need no hub. Its own benchmarks need none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def configuration(name: str, rows: list[dict[str, Any]], metrics: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """lm-eval's configuration of a zero-shot task, as its YAML files would have it.

    Args:
        name: of the task.
        rows: its questions.
        metrics: averaged over questions; higher is better.
        settings: other entries of such a file.
    """
    return {
        "task": name,
        "custom_dataset": _documents,
        "dataset_kwargs": {"rows": rows},
        "test_split": "test",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1.0},
        **settings,
    }


def _documents(rows: list[dict[str, Any]], **metadata: Any) -> dict[str, Dataset]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
