"""The tables that README and docs show are those of the results folder.

`python tests/documents.py` writes them anew between their marks; `tests/test_project.py` compares. A mark names the
table's file: `<!-- table: results/cpu/tables/table1.md -->`, with `plain` behind the file's name where the links from
cells to records are left out. `<!-- end of table -->` ends it.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = re.compile(r"<!-- table: (\S+)( plain)? -->\n.*?<!-- end of table -->", flags=re.DOTALL)


def table(name: str, plain: bool, document: Path) -> str:
    """A table's text for a document, its links relative to that."""
    text = (ROOT / name).read_text().strip()
    if plain:
        text = re.sub(r"(?<=\S) \[\d+\]\([^)]*\)", "", text).replace(
            " The numbers behind a cell lead to its records.", ""
        )
        return re.sub(r"(?<=\S) {2,}(?=\|)", " ", re.sub(r"-{4,}", "---", text))
    records = os.path.relpath(ROOT / Path(name).parents[1] / "records", document.parent)
    return text.replace("](../records/", f"]({records}/")


def with_tables(document: Path) -> str:
    """The text of a document with its tables as the results folder has them."""

    def shown(mark: re.Match[str]) -> str:
        made = table(mark[1], bool(mark[2]), document)
        return f"<!-- table: {mark[1]}{mark[2] or ''} -->\n{made}\n<!-- end of table -->"

    return SHOWN.sub(shown, document.read_text())


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(with_tables(path))
