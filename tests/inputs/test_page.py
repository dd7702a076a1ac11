"""The page on what people bring says what the tests hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_page_is_made_from_the_parameters_of_these_tests():
    script = "import brought; print(brought.page(brought.collected()), end='')"
    made = subprocess.run([sys.executable, "-c", script], cwd=TESTS, capture_output=True, text=True, check=True)
    assert made.stdout == (TESTS.parent / "docs" / "inputs.md").read_text()
