"""What people bring, as parameters of tests: `docs/inputs.md` is made from them.

`python tests/brought.py` writes the page anew; `tests/inputs/test_page.py` holds it against the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "inputs.md"

HEAD = """# What people bring

Inputs that are wrong, unusual or ambiguous, and what happens. Where an input is refused, the second column quotes a
part of the sentence that refuses it. The tables are made from the parameters of the tests in `tests/inputs`
(`python tests/brought.py`); each row is tested.
"""


def brought(kind: str, what: str, happens: str, *values: Any) -> Any:
    """A test's parameters: `values`, then `happens`.

    kind: the heading it stands under. what: the input, a phrase. happens: what the package does, in words, or a part of
        the sentence that it refuses the input with, as the test expects it.
    """
    return pytest.param(*values, happens, id=what, marks=pytest.mark.brought(kind, what, happens))


def page(rows: list[tuple[str, str, str]]) -> str:
    """The page of (kind, what, happens) rows, kinds in their order."""
    parts = [HEAD]
    for kind in dict.fromkeys(kind for kind, _, _ in rows):
        own = dict.fromkeys((what, happens) for other, what, happens in rows if other == kind)
        lines = [f"| {_cell(what)} | {_cell(happens)} |" for what, happens in own]
        parts.append("\n".join([f"## {kind}\n", "| input | what happens |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def collected() -> list[tuple[str, str, str]]:
    """The rows of all tests in `tests/inputs`, in the order of the tests."""

    class Collector:
        rows: list[tuple[str, str, str]]

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.rows = [mark.args for item in session.items for mark in item.iter_markers("brought")]

    collector = Collector()
    folder = Path(__file__).parent / "inputs"
    asked = ["--collect-only", "-m", "brought", "-p", "no:terminal", "-o", "addopts=", str(folder)]
    pytest.main(asked, plugins=[collector])
    return collector.rows


if __name__ == "__main__":
    PAGE.write_text(page(collected()))
