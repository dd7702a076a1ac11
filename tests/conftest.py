"""Settings for all tests: no network to the hub, no GPU but for the tests marked for one, no progress bars."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("ALPS_REPRO_TEST_DEVICE") != "cuda":  # as make test-gpu sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what results are held against is computed on a CPU
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from pathlib import Path

import pytest

from alps_repro.models.embedded import embedded_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded model; converted on the first use on a machine."""
    return embedded_model()
