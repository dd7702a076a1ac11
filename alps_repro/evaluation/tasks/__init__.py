"""What lm-eval is told of the tasks that need no hub. Its own benchmarks need nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def configuration(name: str, rows: list[dict[str, Any]], metrics: tuple[str, ...], **settings: Any) -> dict[str, Any]:
    """lm-eval's configuration of a zero-shot task on these questions, as its YAML files would say it.

    metrics: averaged over questions, more is better. settings: what else such a file may hold.
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
