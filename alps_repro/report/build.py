"""A profile's report: one set of static pages, made from records alone, in which every number leads to its runs.

`index.html` has the claims, tables and figures; `tables/` each table number by number; `runs/` a page a record with
what was run, on what, and how to run it again; `records/` the records themselves; `notebooks/` the executed notebooks.
The pages need no server and no network, and the same records give the same bytes.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup, escape

from alps_repro.analysis import claims, figures, tables, timing
from alps_repro.analysis.cite import listed, number_text, package_bibtex, paper_bibtex, what_was_run
from alps_repro.errors import UserError, explained
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.grid import TABLES, Cell, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import KINDS, Config, Record, load_record, load_records, predecessors
from alps_repro.models.embedded import EMBEDDED
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

MARK = '<meta name="generator" content="alps-repro report">'

#: Which notebook makes a kind of run; the executed copy is called by it and the run.
NOTEBOOKS = {"localize": "01_localize_heads", "finetune": "02_finetune", "evaluate": "03_evaluate"}

Records = dict[tuple[str, str], Record]  # by kind and name


def write_report(profile: Profile, folder: str | Path | None = None) -> Path:
    """Make a profile's report from its results folder; returns `index.html`.

    folder: where the pages go, `results/PROFILE/report` by default. An earlier report there is replaced as a whole.

    Raises:
        UserError: there is no record yet, or the folder holds something else than a report.
    """
    results = Path(profile.results)
    records = {(record.kind, record.name): record for record in load_records(results / "records")}
    if not records:
        raise UserError(f"There is no record in '{results / 'records'}' to report of: run the profile first.")
    with _replaced(Path(folder or results / "report")) as new:
        _Report(profile, records, new).write()
    return Path(folder or results / "report") / "index.html"


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the old one's place once it is whole."""
    index = folder / "index.html"
    if folder.exists() and any(folder.iterdir()) and not (index.is_file() and MARK in index.read_text()):
        raise UserError(f"'{folder}' holds something else than a report: choose another folder.")
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{which}") for which in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        raise explained(error) or error from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class _Report:
    """What the pages of one report share."""

    def __init__(self, profile: Profile, records: Records, folder: Path) -> None:
        self.profile, self.records, self.folder = profile, records, folder
        self.results = Path(profile.results)
        self.name = self.results.name
        self.pages = _environment()
        self.used: dict[tuple[str, str], list[Markup]] = {key: [] for key in records}  # in which numbers
        self.after: dict[tuple[str, str], list[tuple[str, str]]] = {key: [] for key in records}  # what needs it

    def write(self) -> None:
        for key, record in self.records.items():
            for before in _held(record.config):
                self.after.get(before, []).append(key)
        notebooks = self._notebooks()
        shown = [self._table(name) for name in self.profile.tables]
        for key in self.records:
            self._run(key, notebooks)
        self._page(
            "index.html",
            "index",
            title=f"ALPS reproduced: {self.name}",
            about=self.profile.about,
            tables=shown,
            times=self._times(),
            claims=self._claims(),
            figures=self._figures(),
            notebooks=_grouped(notebooks),
            **self._overview(),
        )
        (self.folder / "style.css").write_text(STYLE + _code_colours())

    def _page(self, path: str, template: str, **content: Any) -> None:
        place = self.folder / path
        place.parent.mkdir(exist_ok=True)
        root = "../" * path.count("/")
        page = self.pages.get_template(template).render(root=root, profile=self.name, mark=Markup(MARK), **content)
        place.write_text(page)

    def _why(self, reason: UserError) -> str:
        """A reason with the folder as it is named from the checkout: the same words wherever the report is made."""
        return str(reason).replace(str(self.results), str(_shown(self.results)))

    # The first page

    def _overview(self) -> dict[str, Any]:
        records = list(self.records.values())
        kinds = {
            kind: [self._listed(record) for record in records if record.kind == kind]
            for kind in KINDS.values()
            if any(record.kind == kind for record in records)
        }
        needed = {cell.config.name for name in self.profile.tables for cell in cells(self.profile, name)}
        failed = [load_record(path) for path in sorted((self.results / "records").glob("*.failed.json"))]
        commits = sorted({(r.provenance.commit or "", bool(r.provenance.dirty)) for r in records})
        return {
            "models": listed(self.profile.models),
            "needed": len(needed),
            "measured": sum(("evaluate", name) in self.records for name in needed),
            "failed": failed,
            "unused": sum(kind == "evaluate" and name not in needed for kind, name in self.records),
            "runs": kinds,
            "hours": sum(record.cost.seconds for record in records) / 3600,
            "where": _where(records),
            "small": self._small(),
            "bibtex": [package_bibtex(commits), paper_bibtex()],
        }

    def _listed(self, record: Record) -> dict[str, Any]:
        cost = record.cost
        said = ""
        if isinstance(record.config, EvaluateConfig):
            said = ", ".join(f"{task} {_score(task, score)}" for task, score in record.result["scores"].items())
        elif isinstance(record.config, FinetuneConfig):
            losses = record.result.get("losses")
            said = f"{cost.trained_parameters:,} parameters" if cost.trained_parameters is not None else ""
            said += f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
        commit = (record.provenance.commit or "none")[:8] + (" (changed)" if record.provenance.dirty else "")
        return {
            "link": self._link(record.kind, record.name, ""),
            "said": said,
            "seconds": f"{cost.seconds:,.0f}",
            "commit": commit,
        }

    def _small(self) -> dict[str, Any] | None:
        """What the paragraph on small models says, where all of the profile's models are the embedded one."""
        if set(self.profile.models) != {EMBEDDED}:
            return None
        steps = {r.config.recipe.max_steps for r in self.records.values() if isinstance(r.config, FinetuneConfig)}
        return {"steps": listed(sorted(n for n in steps if n)), "tasks": listed(self._own_tasks())}

    def _own_tasks(self) -> list[str]:
        return [name for family in self.profile.families.values() for name in family.tasks or family.datasets]

    def _claims(self) -> dict[str, Any]:
        try:
            found = claims.decided(self.profile)
        except UserError as reason:
            return {"why_not": self._why(reason)}
        read = claims.to_read(found).drop(columns=["claim", "here"]).to_dict("records")
        groups: dict[str, dict[str, Any]] = {}
        for row, words in zip(found.itertuples(), read):
            table = claims.CLAIMS[row.claim].table if row.claim in claims.CLAIMS else None
            group = groups.setdefault(row.claim, {"says": row.says, "table": table, "rows": []})
            group["rows"].append({"test": row.test, "verdict": row.verdict, "read": words})
        untested = [
            claim.says
            for name, claim in claims.CLAIMS.items()
            if claim.table in self.profile.tables and name not in set(found["claim"])
        ]
        margins = [f"{measure.replace('_', '-')} {margin:g}" for measure, margin in claims.MARGINS.items()]
        return {
            "why_not": None,
            "groups": list(groups.values()),
            "columns": list(read[0]),
            "untested": untested,
            "verdicts": Counter(found["verdict"]),
            "total": len(found),
            "margins": listed(margins),
        }

    def _figures(self) -> list[dict[str, Any]]:
        """The profile's figures, drawn from its records, then what its notebooks have drawn besides."""
        place, found = self.folder / "figures", []
        for name in figures.of_profile(self.profile):
            figure, why_not = figures.FIGURES[name], None
            try:
                figures.save(figure.draw(self.profile), place, name)
            except UserError as reason:
                why_not = self._why(reason)
            found.append({"name": name, "title": figure.title, "table": figure.table, "why_not": why_not})
        for path in sorted((self.results / "figures").glob("*.svg")):
            if path.stem not in figures.FIGURES:
                place.mkdir(exist_ok=True)
                shutil.copyfile(path, place / path.name)
                title = f"{path.stem} (drawn by a notebook)"
                found.append({"name": path.stem, "title": title, "table": None, "why_not": None})
        return found

    # Tables

    def _table(self, name: str) -> dict[str, Any]:
        """What the first page shows of a table; its own page, number by number, is written."""
        grid = {cell.config.name: cell for cell in cells(self.profile, name)}
        missing = [cell for config, cell in grid.items() if ("evaluate", config) not in self.records]
        shown = {
            "name": name,
            "title": TABLES[name].title,
            "needed": len(grid),
            "missing": _missing(missing, list(grid.values())),
            "measured": len(grid) - len(missing),
            "why_not": None,
        }
        try:
            long, parts = tables.paper_table(self.profile, name), tables.measured(self.profile, name)
        except UserError as reason:
            return {**shown, "why_not": self._why(reason)}
        parts["column"] = parts["family"] if TABLES[name].by_family else parts["task"]
        (self.folder / "tables").mkdir(exist_ok=True)
        (self.folder / "tables" / f"{name}.csv").write_text(long.to_csv(index=False, lineterminator="\n"))
        lines = [self._numbers(name, entry, long, parts) for _, entry in long.iterrows()]
        groups = [
            {"title": _row_title(self.profile, *key), "lines": [line for line in lines if line["key"] == key]}
            for key in dict.fromkeys(line["key"] for line in lines)
        ]
        note = tables.spread_note(long)
        about = {row: METHODS[row].about for row in dict.fromkeys(long["row"]) if row in METHODS}
        shown |= {"note": note, "about": about, **self._layout(name, long)}
        shown["reported"] = bool(long["reported"].notna().any())
        self._page(f"tables/{name}.html", "table", title=f"{name}: {shown['title']}", groups=groups, table=shown)
        return shown

    def _layout(self, name: str, long: pd.DataFrame) -> dict[str, Any]:
        """The table as `tables.paper_layout` prints it, every number a link to the place where its runs are named."""
        wide = tables.paper_layout(long)
        one = len(self.profile.models) == 1
        columns = [column for column in wide.columns if column not in ("model", "row")]
        rows = []
        for line in wide.to_dict("records"):
            entries = []
            for column in columns:
                text = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", str(escape(line[column])))
                target = f"tables/{name}.html#{_anchor(line['model'], line['row'], column)}"
                entries.append(Markup(text if line[column] == "–" else f'<a href="{escape(target)}">{text}</a>'))
            rows.append({"heads": [line["row"]] if one else [line["model"], line["row"]], "cells": entries})
        return {"heads": ["row"] if one else ["model", "row"], "columns": columns, "rows": rows}

    def _numbers(self, name: str, entry: pd.Series, long: pd.DataFrame, parts: pd.DataFrame) -> dict[str, Any]:
        """A number of a table, with links to its runs, or to the numbers that it is the average of."""
        model, row, column = entry["model"], entry["row"], entry["column"]
        anchor = _anchor(model, row, column)
        own = parts[(parts["model"] == model) & (parts["row"] == row) & (parts["column"] == column)]
        title = f"{name}, {row}, {column}" + ("" if len(self.profile.models) == 1 else f", {model}")
        links = []
        for part in own.itertuples():
            of = [] if own["family"].nunique() == 1 and own["task"].nunique() == 1 else [f"{part.family} {part.task}"]
            of += [] if part.seed is None or part.seed != part.seed else [f"seed {part.seed:g}"]
            text = ": ".join([", ".join(of)] * bool(of) + [_score(part.task, part.score)])
            links.append(self._link("evaluate", part.record, "../", text))
            back = Markup('<a href="../tables/{}.html#{}">{}</a>').format(name, anchor, title)
            used = self.used["evaluate", part.record]
            used += [] if back in used else [back]
        if column == "avg":
            line = long[(long["model"] == model) & (long["row"] == row)]
            others = [other for other in line["column"] if other != "avg" and not tables.lower_is_better(other)]
            links = [Markup('<a href="#{}">{}</a>').format(_anchor(model, row, other), other) for other in others]
        return {
            "key": (model, row),
            "id": anchor,
            "column": column,
            "number": number_text(entry),
            "over": f"{entry['seeds']} seeds" if entry["spread"] == "seeds" else entry["spread"] or "–",
            "best": bool(entry["best"]),
            "log_likelihood": _number(entry["log_likelihood"], ".3f"),
            "against_full": _number(entry["against_full"], f"+.{tables.digits(column)}f"),
            "reported": _number(entry["reported"], f".{tables.digits(column)}f"),
            "links": list(dict.fromkeys(links)),  # what trains nothing stands for every seed
        }

    def _times(self) -> dict[str, Any] | None:
        """Table 11, which is of the benchmark, not of runs."""
        if "table11" not in tables.of_profile(self.profile):
            return None
        found = timing.training_time()
        (self.folder / "tables").mkdir(exist_ok=True)
        (self.folder / "tables" / "table11.csv").write_text(found.to_csv(index=False, lineterminator="\n"))
        read = timing.to_read(found)
        return {
            "title": timing.TITLE,
            "note": timing.note(found),
            "columns": list(read.columns),
            "rows": read.to_numpy().tolist(),
            "commit": (timing.benchmark()["provenance"]["commit"] or "none")[:8],
        }

    # Runs

    def _link(self, kind: str, name: str, root: str, text: str | None = None) -> Markup:
        where = f"{root}runs/{quote(f'{kind}-{name}')}.html"
        return Markup('<a href="{}">{}</a>').format(where, text or name)

    def _run(self, key: tuple[str, str], notebooks: dict[str, dict[str, Any]]) -> None:
        kind, name = key
        record, stem = self.records[key], f"{kind}-{name}"
        (self.folder / "records").mkdir(exist_ok=True)
        shutil.copyfile(self.results / "records" / f"{stem}.json", self.folder / "records" / f"{stem}.json")
        commands = [f"alps-repro verify {shlex.quote(str(_shown(self.results) / 'records' / f'{stem}.json'))}"]
        if made_by := notebooks.get(f"{NOTEBOOKS.get(kind)}-{name}"):
            commands.append(made_by["command"])
        where = record.provenance.model_dump(
            exclude={"dirty", "versions", "model_sha256", "data_sha256", "files_sha256"}
        )
        where["commit"] = f"{where['commit'] or 'none'}{' with changes on top' if record.provenance.dirty else ''}"
        hashes = {f"model, {role}": value for role, value in record.provenance.model_sha256.items()}
        hashes |= {f"data, {of}": value for of, value in record.provenance.data_sha256.items()}
        before = [self._known(*one) for one in _held(record.config)]
        self._page(
            f"runs/{stem}.html",
            "run",
            title=f"{kind} {name}",
            record=record,
            said=what_was_run([record]),
            result=list(_result(record)),
            heat_map=self._heat_map(record),
            commands=commands,
            notebook=made_by,
            versions=record.provenance.versions,
            where={name: "none" if value is None else value for name, value in where.items()},
            hashes=hashes,
            before=before,
            after=[self._known(*one) for one in self.after[key]],
            used=self.used[key],
            json=f"../records/{quote(stem)}.json",
            config=json.dumps(record.config.dump(), indent=1),
        )

    def _known(self, kind: str, name: str) -> Markup:
        here = (kind, name) in self.records
        return Markup("{} {}").format(kind, self._link(kind, name, "../") if here else f"{name} (not in this folder)")

    def _heat_map(self, record: Record) -> str | None:
        path = self.results / "figures" / "heads" / f"{record.name}.svg"
        if record.kind != "localize" or not path.exists():
            return None
        place = self.folder / "figures" / "heads"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place / path.name)
        return f"../figures/heads/{quote(path.name)}"

    # Notebooks

    def _notebooks(self) -> dict[str, dict[str, Any]]:
        """Pages of the executed notebooks: {name of the copy: what is known of it}."""
        found = {}
        for path in sorted((self.results / "notebooks").glob("*.ipynb")):
            if path.name.endswith((".failed.ipynb", ".unfinished.ipynb")):
                continue
            notebook = json.loads(path.read_text())
            title = next((line[2:] for line in _sources(notebook) if line.startswith("# ")), path.stem)
            asked = notebook["metadata"].get("papermill", {})
            original = Path(asked.get("input_path") or f"{path.stem.split('-')[0]}.ipynb").name
            parameters = shlex.quote(json.dumps(asked.get("parameters", {})))
            found[path.stem] = {
                "copy": path.stem,
                "original": original,
                "title": title,
                "href": f"notebooks/{quote(path.stem)}.html",
                "command": f"papermill notebooks/{original} again.ipynb -y {parameters}",
            }
            body = Markup(_notebook_body(notebook))
            self._page(f"notebooks/{path.stem}.html", "notebook", title=path.stem, body=body)
        return found


def _grouped(notebooks: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Executed copies by the notebook that they are of."""
    groups: dict[str, dict[str, Any]] = {}
    for one in notebooks.values():
        groups.setdefault(one["original"], {"title": one["title"], "copies": []})["copies"].append(one)
    return [groups[name] for name in sorted(groups)]


def _held(config: Config) -> list[tuple[str, str]]:
    """Kind and name of the runs that a configuration holds directly."""
    return [(KINDS[type(before)], before.name) for before in predecessors(config).values()]


def _missing(missing: Iterable[Cell], grid: Sequence[Cell]) -> str:
    """Which rows of a table lack how many of their evaluations."""
    needed = Counter(cell.row for cell in grid)
    lacking = Counter(cell.row for cell in missing)
    return ", ".join(f"{row} {lacking[row]} of {needed[row]}" for row in needed if lacking[row])


def _row_title(profile: Profile, model: str, row: str) -> str:
    return row if len(profile.models) == 1 else f"{model}, {row}"


def _anchor(model: str, row: str, column: str) -> str:
    return re.sub(r"[^\w.]+", "-", f"{row}-{column}-{model}")


def _number(value: float, form: str) -> str:
    return "–" if value != value else f"{value:{form}}"


def _score(task: str, score: float) -> str:
    return f"{score:.4f} nats" if tables.lower_is_better(task) else f"{100 * score:.2f} %"


def _shown(results: Path) -> Path:
    """A results folder as it is named from the checkout, whatever the current folder is."""
    checkout = Path(__file__).parents[2]
    whole = results.resolve()
    return whole.relative_to(checkout) if whole.is_relative_to(checkout) else Path(whole.name)


def _where(records: Sequence[Record]) -> dict[str, str]:
    """On what a folder's runs were made: every different answer once."""
    found = [record.provenance for record in records]
    machines = listed(
        f"{p.processor} ({p.system}), {p.threads} {'thread' if p.threads == 1 else 'threads'}"
        + (f", {p.gpu}" if p.gpu else "")
        for p in found
    )
    commits = listed((p.commit or "none")[:10] + (" with changes on top" if p.dirty else "") for p in found)
    code = listed((p.code or "not noted")[:10] for p in found)
    names = dict.fromkeys(name for p in found for name in p.versions)
    versions = [f"{name} {listed(p.versions[name] for p in found if name in p.versions)}" for name in names]
    return {
        "machine": machines,
        "commit": commits,
        "measuring code (SHA-256)": code,
        "Python": listed(p.python for p in found),
        "packages": ", ".join(versions),
    }


def _result(record: Record) -> Iterator[tuple[str, str]]:
    """The numbers of a run that are worth a line."""
    config, result, cost = record.config, record.result, record.cost
    if isinstance(config, EvaluateConfig):
        for row in tables.summary([record]).to_dict("records"):
            task = row["task"]
            text = _score(task, result["scores"][task])
            if row["low"] == row["low"] and row["low"] is not None and not tables.lower_is_better(task):
                text += f" ({row['low']:.2f} to {row['high']:.2f}: 95 %, Wilson, {row['questions']} questions)"
            yield task, text
            for name, value in sorted(result["metrics"][task].items()):
                if "," in name and "_stderr," not in name:
                    error = result["metrics"][task].get(name.replace(",", "_stderr,"))
                    yield f"{task}: {name}", f"{value:.6g}" + (f" ± {error:.2g} (standard error)" if error else "")
    elif isinstance(config, FinetuneConfig):
        if losses := result.get("losses"):
            yield "loss", f"{losses[0]:.4f} to {losses[-1]:.4f} nats per token, in {len(losses)} steps"
        if heads := result.get("heads"):
            yield f"{len(heads)} heads (layer.head)", " ".join(f"{layer}.{head}" for layer, head in heads)
        if result.get("tokens"):
            yield "tokens", f"{result['tokens']:,}"
    if cost.trained_parameters is not None and cost.total_parameters:
        share = cost.trained_parameters / cost.total_parameters
        yield "trained", f"{cost.trained_parameters:,} of {cost.total_parameters:,} parameters ({share:.2%})"
    yield "time", f"{cost.seconds:,.0f} s"
    yield "peak memory", f"{cost.peak_memory_bytes / 2**30:.2f} GiB"


# Notebooks as pages

WIDGET = "application/vnd.jupyter.widget-view+json"


def _sources(notebook: dict[str, Any]) -> Iterator[str]:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            yield from "".join(cell["source"]).splitlines()


def _notebook_body(notebook: dict[str, Any]) -> str:
    import nbformat

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _formulas("".join(cell["source"]))
        # A live widget, such as a progress bar, would need scripts, and its text is its first state.
        outputs = [output for output in cell.get("outputs", []) if WIDGET not in output.get("data", {})]
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs
    notebook = nbformat.reads(json.dumps(notebook), as_version=4)
    body, _ = _exporter().from_notebook_node(notebook)
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
    drawn = re.sub(r"\$\$(.+?)\$\$", lambda found: _formula(found[1], True), markdown, flags=re.DOTALL)
    return re.sub(r"\$([^$\n]+?)\$", lambda found: _formula(found[1], False), drawn)


#: What matplotlib's TeX lacks, and what it has in its place.
KNOWN_TEX = {r"\\[bB]ig(?=\W)": "", r"\\le(?!\w)": r"\\leq", r"\\mathcal (\w)": r"\\mathcal{\1}"}


@functools.cache
def _formula(tex: str, display: bool) -> str:
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
        except (ValueError, RuntimeError):  # what matplotlib's TeX does not have
            return f"<code>{escape(tex)}</code>"
    svg = re.sub(rb"<metadata>.*?</metadata>", b"", picture.getvalue(), flags=re.DOTALL)  # the time is in there
    data = base64.b64encode(svg).decode()
    style = "" if display else f' style="vertical-align:-{depth:.1f}px"'
    image = f'<img class="tex" alt="{escape(flat)}"{style} src="data:image/svg+xml;base64,{data}">'
    return f'<span class="display">{image}</span>' if display else image


def _code_colours() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


# Pages


def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.DictLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


PAGES = {
    "page": """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{{ mark }}
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{{ root }}style.css">
</head>
<body>
{% if root %}
<nav><a href="{{ root }}index.html">ALPS reproduced: {{ profile }}</a></nav>
{% endif %}
<main>
{% block content %}{% endblock %}
</main>
</body>
</html>
""",
    "index": """\
{% extends "page" %}
{% block content %}
<h1>{{ title }}</h1>
<p class="lead">ALPS (arXiv 2505.18799) fine-tunes only the attention heads that moved most in a fine-tuned model. These
pages hold its claims against what came out here, with {{ models }}. Everything is made from the records of the runs,
and every number is a link to the runs behind it.</p>
{% if about %}
<p>{{ about }}</p>
{% endif %}
<p class="contents"><a href="#claims">Claims</a> <a href="#tables">Tables</a> <a href="#figures">Figures</a>
<a href="#notebooks">Notebooks</a> <a href="#runs">Runs</a> <a href="#citing">Citing</a></p>

{% if measured < needed or failed %}
<div class="notice">
{% if measured < needed %}
<p><b>Not complete: {{ measured }} of {{ needed }} evaluations are measured.</b> What is missing is left out below; a
mean is over the seeds that are there.</p>
<ul>
{% for table in tables if table.measured < table.needed %}
<li><a href="#{{ table.name }}">{{ table.name }}</a>: {{ table.needed - table.measured }} of {{ table.needed }}
missing</li>
{% endfor %}
</ul>
{% endif %}
{% for record in failed %}
<p><b>Failed:</b> {{ record.kind }} {{ record.name }}: {{ record.error }}</p>
{% endfor %}
</div>
{% else %}
<p>All {{ needed }} evaluations of this profile are measured.</p>
{% endif %}

<h2 id="claims">Claims</h2>
{% if claims.why_not %}
<p class="notice">{{ claims.why_not }}</p>
{% else %}
<p>Of {{ claims.total }} tests, {{ claims.verdicts["holds"] }} hold, {{ claims.verdicts["fails"] }} fail, and
{{ claims.verdicts["undecided"] }} are undecided
{%- if claims.verdicts["no verdict"] %}; {{ claims.verdicts["no verdict"] }} have no verdict{% endif %}.
What each compares was written down before the runs that it judges.</p>
<div class="box"><table class="claims">
<thead><tr><th>claim and test</th><th>here</th>
{% for column in claims.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
{% for group in claims.groups %}
<tbody>
{% for row in group.rows %}
<tr>
<td class="claim">
{%- if loop.first or row.test != group.rows[0].test %}
{% if loop.first %}{{ group.says }}<br>{% endif %}
<small>{% if group.table %}<a href="#{{ group.table }}">{{ row.test }}</a>{% else %}{{ row.test }}{% endif %}</small>
{%- endif -%}
</td>
<td class="{{ row.verdict | replace(" ", "-") }}">{{ row.verdict }}</td>
{% for column in claims.columns %}<td>{{ row.read[column] }}</td>{% endfor %}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
{% if claims.untested %}
<p><b>Not tested yet:</b> {{ claims.untested | join("; ") }}.</p>
{% endif %}
<p>A claim is a difference between two rows of a table, paired over questions and training seeds. Its 95 % interval
takes both as drawn: other questions, and other seeds, would have given other numbers. The variance of the seeds is
always counted, however close together they happen to lie. One training seed decides nothing: there the interval is over
questions alone, without a verdict. <i>Could have seen</i> is the
smallest true effect that this design shows in four of five tries. A claim <b class="holds">holds</b> where the interval
lies above zero, and <b class="fails">fails</b> where it leaves no room for an advantage worth the name
({{ claims.margins }}, in the units above); else it is <b class="undecided">undecided</b>: these runs cannot tell.
Accuracies are compared in points; beside them the log-likelihood of the right answers, which moves before an answer
changes. A claim with several rivals has to hold against each. Each verdict is of its own test: nothing is
corrected for the number of tests.</p>
{% endif %}

{% if small %}
<h3>What a model of 135 million parameters can tell about one of 8 billion</h3>
<p>The paper's models have 1 to 8 billion parameters; these runs were made with {{ models }}, in
{{ small.steps }} steps a training, on {{ small.tasks }}. They can tell whether the method does as described (heads
found, those and no others trained, the rest left bit by bit as it was), whether the heads that it finds serve better
than others <i>here</i>, and how large an effect would have to be to show. A claim about attention heads in general that
clearly fails here does not hold in general.</p>
<p>They cannot tell how large an effect is in an 8B model. SmolLM2 has 270 heads, where Llama-3.1-8B has 1,024, so that
a tenth is 27 heads; it learns these tasks nearly from nothing, where the paper adapts models that know theirs; and it
has little general knowledge to forget. So a verdict on this page is no verdict on the paper's numbers: neither does
what holds here have to hold there, nor the other way round.</p>
{% endif %}

<h2 id="tables">Tables</h2>
<p>In the paper's layout. Bold: the best of its column, without <i>vanilla</i>. ↑ ↓: above or below the row that trains
all heads. Numbers are percent, or nats per token where lower is better.</p>
{% for table in tables %}
<section>
<h3 id="{{ table.name }}">{{ table.name }}: {{ table.title }}</h3>
{% if table.missing %}
<p class="notice">{{ table.measured }} of {{ table.needed }} evaluations measured.
Missing: {{ table.missing }}.</p>
{% endif %}
{% if table.why_not %}
<p>{{ table.why_not }}</p>
{% else %}
<div class="box"><table>
<thead><tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}
{% for column in table.columns %}<th class="number">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for head in row.heads %}<th>{{ head }}</th>{% endfor %}
{% for cell in row.cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>{{ table.note }}
<a href="tables/{{ table.name }}.html">Number by number</a>, <a href="tables/{{ table.name }}.csv">CSV</a>.</p>
{% if table.about %}
<p><small>{% for row, about in table.about.items() %}<b>{{ row }}</b>: {{ about }}{{ "; " if not loop.last else "." }}
{% endfor %}</small></p>
{% endif %}
{% endif %}
</section>
{% endfor %}
{% if times %}
<section>
<h3 id="table11">table11: {{ times.title }}</h3>
<div class="box"><table>
<thead><tr>{% for column in times.columns %}<th{% if not loop.first %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in times.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th>{{ cell }}</th>{% else %}<td class="number">{{ cell }}</td>{% endif %}
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>{{ times.note }} Measured by <code>make bench</code> at commit {{ times.commit }};
<a href="tables/table11.csv">CSV</a>.</p>
</section>
{% endif %}

<h2 id="figures">Figures</h2>
{% for figure in figures %}
<figure id="{{ figure.name }}">
{% if figure.why_not %}
<p class="notice">{{ figure.why_not }}</p>
{% else %}
<div class="box"><img src="figures/{{ figure.name | urlencode }}.svg" alt="{{ figure.title }}"></div>
{% endif %}
<figcaption>{{ figure.title }}
{%- if figure.table %}, from <a href="#{{ figure.table }}">{{ figure.table }}</a>{% endif %}
</figcaption>
</figure>
{% else %}
<p>This profile has none.</p>
{% endfor %}

<h2 id="notebooks">Notebooks as they were executed</h2>
{% for group in notebooks %}
{% if group.copies | length == 1 %}
<p><a href="{{ group.copies[0].href }}">{{ group.title }}</a></p>
{% else %}
<details><summary>{{ group.title }} ({{ group.copies | length }} times)</summary>
<ul class="compact">
{% for copy in group.copies %}
<li><a href="{{ copy.href }}">{{ copy.copy }}</a></li>
{% endfor %}
</ul></details>
{% endif %}
{% else %}
<p>None has been.</p>
{% endfor %}

<h2 id="runs">Runs</h2>
<p>{{ "%.1f" | format(hours) }} hours of computing.
{% if unused %}{{ unused }} of the evaluations below stand in none of the profile's tables as it is now.{% endif %}</p>
<dl>
{% for name, value in where.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% for kind, listed in runs.items() %}
<details><summary>{{ kind }} ({{ listed | length }})</summary>
<div class="box"><table class="runs">
<thead><tr><th>run</th><th>came out</th><th class="number">seconds</th><th>commit</th></tr></thead>
<tbody>
{% for run in listed %}
<tr><td>{{ run.link }}</td><td>{{ run.said }}</td>
<td class="number">{{ run.seconds }}</td><td>{{ run.commit }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endfor %}

<h2 id="citing">Citing</h2>
<p>A single number, with what was run for it: <code>alps-repro cite {{ profile }} TABLE ROW COLUMN</code>.</p>
{% for entry in bibtex %}
<pre>{{ entry }}</pre>
{% endfor %}
{% endblock %}
""",
    "table": """\
{% extends "page" %}
{% block content %}
<h1>{{ title }}</h1>
<p>{{ table.note }} <a href="../index.html#{{ table.name }}">The table</a>,
<a href="{{ table.name }}.csv">CSV</a>. To cite a number:
<code>alps-repro cite {{ profile }} {{ table.name }} ROW COLUMN</code>.</p>
{% for group in groups %}
<h2>{{ group.title }}</h2>
<div class="box"><table>
<thead><tr><th>column</th><th class="number">number</th><th>± over</th><th>runs</th>
<th class="number">against full</th><th class="number">log-likelihood, nats</th>
{% if table.reported %}<th class="number">paper</th>{% endif %}</tr></thead>
<tbody>
{% for line in group.lines %}
<tr id="{{ line.id }}"><th>{{ line.column }}</th>
<td class="number">{% if line.best %}<b>{{ line.number }}</b>{% else %}{{ line.number }}{% endif %}</td>
<td>{{ line.over }}</td>
<td class="links">{{ "average of " if line.column == "avg" }}{{ line.links | join(", ") }}</td>
<td class="number">{{ line.against_full }}</td><td class="number">{{ line.log_likelihood }}</td>
{% if table.reported %}<td class="number">{{ line.reported }}</td>{% endif %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endblock %}
""",
    "run": """\
{% extends "page" %}
{% block content %}
<h1 class="name">{{ title }}</h1>
<p class="lead">{{ said }}</p>
<h2>Result</h2>
<dl>
{% for name, value in result %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% if heat_map %}
<figure><div class="box"><img src="{{ heat_map }}" alt="Heat map of the scores of all heads"></div></figure>
{% endif %}
<p><a href="{{ json }}">The whole record (JSON)</a>
{%- if notebook %}, <a href="../{{ notebook.href }}">the notebook as it was executed</a>{% endif %}</p>
<h2>Again</h2>
{% for command in commands %}
<pre>{{ command }}</pre>
{% endfor %}
<h2>Used in</h2>
<ul class="compact">
{% for link in used %}
<li>{{ link }}</li>
{% endfor %}
{% for link in after %}
<li>{{ link }}</li>
{% endfor %}
{% if not used and not after %}
<li>nothing of this profile</li>
{% endif %}
</ul>
<h2>Made from</h2>
<ul class="compact">
{% for link in before %}
<li>{{ link }}</li>
{% endfor %}
{% for name, value in hashes.items() %}
<li>{{ name }}: <code>{{ value }}</code></li>
{% endfor %}
</ul>
<h2>Made with</h2>
<dl>
{% for name, value in where.items() %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
<dt>packages</dt>
<dd>{% for name, version in versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</dd>
<dt>finished</dt><dd>{{ record.finished }}</dd>
</dl>
<h2>Configuration</h2>
<pre>{{ config }}</pre>
{% endblock %}
""",
    "notebook": """\
{% extends "page" %}
{% block content %}
<div class="notebook">
{{ body }}
</div>
{% endblock %}
""",
}

STYLE = """\
:root { color-scheme: light dark; --text: #1b1b1b; --quiet: #5a5a5a; --back: #fff; --panel: #f5f5f3; --line: #d8d8d4;
  --link: #0b5394; --good: #1a6b2f; --bad: #a3261c; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e4e0; --quiet: #a3a39d; --back: #161616; --panel: #222221; --line: #3b3b38; --link: #8fbdf0;
    --good: #7ccf8d; --bad: #f09a90; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 16px; }
main, nav { max-width: 70rem; margin: 0 auto; padding: 0 1.25rem; }
main { padding-bottom: 4rem; }
nav { padding-top: 1rem; font-size: .9rem; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 1.5rem 0 1rem; }
h1.name { font-size: 1.15rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .8rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p, ul, dl, .lead { max-width: 46rem; }
a { color: var(--link); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
p, li, dd { overflow-wrap: anywhere; }
small, figcaption { color: var(--quiet); font-size: .85rem; }
.contents a { margin-right: 1rem; }
.notice { border-left: 3px solid var(--bad); background: var(--panel); padding: .6rem 1rem; margin: 1rem 0;
  max-width: 46rem; }
.notice p, .notice ul { margin: .3rem 0; }
.box { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 400; }
.number { text-align: right; }
td b { font-weight: 700; }
.claims td { border-bottom: none; }
.claims tbody { border-bottom: 1px solid var(--line); }
td.links { white-space: normal; min-width: 15rem; }
td.claim { white-space: normal; min-width: 13rem; max-width: 26rem; }
tr:target { background: var(--panel); }
.holds { color: var(--good); }
.fails { color: var(--bad); }
td.holds, td.fails { font-weight: 600; }
.undecided, .no-verdict { color: var(--quiet); }
figure { margin: 1.5rem 0; }
figure img { max-width: max(100%, 30rem); height: auto; background: #fff; }
dl { font-size: .95rem; display: grid; grid-template-columns: minmax(7rem, auto) 1fr; gap: .2rem 1rem; }
dt { color: var(--quiet); overflow-wrap: anywhere; }
dd { margin: 0; }
ul.compact { padding-left: 1.1rem; font-size: .88rem; max-width: none; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem; }
code { overflow-wrap: anywhere; }
pre { background: var(--panel); padding: .7rem 1rem; overflow-x: auto; }
.notebook .prompt, .notebook .anchor-link { display: none; }
.notebook .highlight { background: none; }
.notebook .output_area { overflow-x: auto; margin: .8rem 0; }
.notebook .output_area pre { background: none; padding: 0; }
.notebook .output_area img { max-width: 100%; height: auto; background: #fff; }
.notebook .output_stderr pre { color: var(--quiet); }
.notebook .display { display: block; overflow-x: auto; padding: .5rem 0; }
@media (prefers-color-scheme: dark) { img.tex { filter: invert(.9); } }
@media (max-width: 40rem) {
  h1 { font-size: 1.35rem; }
  td.claim { min-width: 10rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .5rem; }
}
"""
