"""What the offline tasks' YAML files call: their questions as lm-eval documents."""

from typing import Any

from datasets import Dataset

from alps_repro.data import PROMPT, offline_splits


def load(dataset: str, **metadata: Any) -> dict[str, Dataset]:
    """The validation and test questions of an offline data set, with the prompt that training used."""
    splits = offline_splits(dataset)
    return {
        split: Dataset.from_list([{**row, "prompt": PROMPT.format(**row)} for row in splits[split]])
        for split in ("validation", "test")
    }
