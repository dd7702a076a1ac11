"""Executed notebooks as pages without scripts: their cells by nbconvert, their formulas as pictures."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from alps_repro.report.site import Site

#: The output type of a live widget, such as a progress bar: it would need scripts, and its text is its first state.
WIDGET = "application/vnd.jupyter.widget-view+json"

#: Commands that matplotlib's TeX lacks, and what it has in their place.
KNOWN_TEX = {r"\\[bB]ig(?=\W)": "", r"\\le(?!\w)": r"\\leq", r"\\mathcal (\w)": r"\\mathcal{\1}"}


@dataclass(frozen=True)
class ExecutedNotebook:
    """An executed copy of a notebook.

    Attributes:
        copy: Its name, without suffix.
        original: File name of the notebook that it is a copy of.
        title: The first heading.
        href: Its page, relative to the report's folder.
        command: How to execute it again.
    """

    copy: str
    original: str
    title: str
    href: str
    command: str


def write_notebooks(site: Site) -> dict[str, ExecutedNotebook]:
    """Write a page for every executed notebook of the results folder; returns these by the copies' names."""
    executed = {}
    for path in sorted((site.results / "notebooks").glob("*.ipynb")):
        if path.name.endswith((".failed.ipynb", ".unfinished.ipynb")):
            continue
        notebook = json.loads(path.read_text())
        executed[path.stem] = _described(path, notebook)
        body = Markup(_body(notebook))
        site.write_page(f"notebooks/{path.stem}.html", "notebook", title=path.stem, body=body)
    return executed


def grouped(executed: dict[str, ExecutedNotebook]) -> list[dict[str, Any]]:
    """Executed copies by their original: title and copies of each."""
    groups: dict[str, dict[str, Any]] = {}
    for one in executed.values():
        groups.setdefault(one.original, {"title": one.title, "copies": []})["copies"].append(one)
    return [groups[name] for name in sorted(groups)]


def _described(path: Path, notebook: dict[str, Any]) -> ExecutedNotebook:
    papermill = notebook["metadata"].get("papermill", {})
    original = Path(papermill.get("input_path") or f"{path.stem.split('-')[0]}.ipynb").name
    parameters = shlex.quote(json.dumps(papermill.get("parameters", {})))
    return ExecutedNotebook(
        copy=path.stem,
        original=original,
        title=next((line[2:] for line in _markdown_lines(notebook) if line.startswith("# ")), path.stem),
        href=f"notebooks/{quote(path.stem)}.html",
        command=f"papermill notebooks/{original} again.ipynb -y {parameters}",
    )


def _markdown_lines(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            yield from "".join(cell["source"]).splitlines()


def _body(notebook: dict[str, Any]) -> str:
    """A notebook's cells as HTML, without scripts."""
    import nbformat

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _formulas("".join(cell["source"]))
        elif cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell.get("outputs", []) if WIDGET not in output.get("data", {})]
    body, _ = _exporter().from_notebook_node(nbformat.reads(json.dumps(notebook), as_version=4))
    return re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)


@functools.cache
def _exporter() -> Any:
    from nbconvert import HTMLExporter
    from nbconvert.filters import clean_html

    # The bare body: the whole page would load fonts, formulas and scripts from elsewhere.
    exporter = HTMLExporter(template_name="basic", anchor_link_text=" ")
    exporter.register_filter("clean_html", functools.cache(clean_html))  # hundreds of copies hold the same cells
    return exporter


def _formulas(markdown: str) -> str:
    """TeX between dollars as pictures, drawn here, since MathJax would have to be fetched."""
    drawn = re.sub(r"\$\$(.+?)\$\$", lambda match: _formula(match[1], True), markdown, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+?)\$", lambda match: _formula(match[1], False), drawn)


@functools.cache
def _formula(tex: str, display: bool) -> str:
    """One formula as an SVG image, or as code where matplotlib's TeX cannot draw it."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    flat = " ".join(tex.split())
    for command, known in KNOWN_TEX.items():
        flat = re.sub(command, known, flat)
    picture = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "alps-repro", "mathtext.fontset": "cm", "savefig.transparent": True}):
        try:
            depth = math_to_image(f"${flat}$", picture, FontProperties(size=13), dpi=72, format="svg")
        except (ValueError, RuntimeError):
            return f"<code>{escape(tex)}</code>"
    svg = re.sub(rb"<metadata>.*?</metadata>", b"", picture.getvalue(), flags=re.DOTALL)  # it holds the time
    data = base64.b64encode(svg).decode()
    style = "" if display else f' style="vertical-align:-{depth:.1f}px"'
    image = f'<img class="tex" alt="{escape(flat)}"{style} src="data:image/svg+xml;base64,{data}">'
    return f'<span class="display">{image}</span>' if display else image
