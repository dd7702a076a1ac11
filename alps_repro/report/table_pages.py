"""The profile's tables: each as the first page shows it, and a page that lists it number by number with its runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from alps_repro.analysis import tables, timing
from alps_repro.analysis.cite import number_text
from alps_repro.errors import UserError
from alps_repro.experiments.grid import TABLES, Cell, cells
from alps_repro.report.site import Key, Site, run_link, score_text
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

#: Links from a run's page to the numbers that the run is part of.
Backlinks = dict[Key, list[Markup]]


def write_tables(site: Site) -> tuple[list[dict[str, Any]], Backlinks]:
    """Write a page and a CSV file for every table of the profile.

    Returns:
        what the first page shows of each table, and links from each run to its numbers.
    """
    backlinks: Backlinks = {key: [] for key in site.records}
    return [_write_table(site, name, backlinks) for name in site.profile.tables], backlinks


def _write_table(site: Site, name: str, backlinks: Backlinks) -> dict[str, Any]:
    grid = {cell.config.name: cell for cell in cells(site.profile, name)}
    missing = [cell for config, cell in grid.items() if ("evaluate", config) not in site.records]
    shown = {
        "name": name,
        "title": TABLES[name].title,
        "needed": len(grid),
        "missing": _missing_text(missing, list(grid.values())),
        "measured": len(grid) - len(missing),
        "why_not": None,
    }
    try:
        long, parts = tables.paper_table(site.profile, name), tables.measured(site.profile, name)
    except UserError as error:
        return {**shown, "why_not": site.reason(error)}
    parts["column"] = parts["family"] if TABLES[name].by_family else parts["task"]
    site.write_csv(name, long.to_csv(index=False, lineterminator="\n"))
    numbers = [_number(site, name, entry, long, parts, backlinks) for _, entry in long.iterrows()]
    groups = [
        {
            "title": row if site.one_model else f"{model}, {row}",
            "numbers": [number for number in numbers if number["key"] == (model, row)],
        }
        for model, row in dict.fromkeys(number["key"] for number in numbers)
    ]
    shown |= {
        "note": tables.spread_note(long),
        "about": {row: METHODS[row].about for row in dict.fromkeys(long["row"]) if row in METHODS},
        "reported": bool(long["reported"].notna().any()),
        **_layout(site, name, long),
    }
    site.write_page(f"tables/{name}.html", "table", title=f"{name}: {shown['title']}", groups=groups, table=shown)
    return shown


def _missing_text(missing: Iterable[Cell], grid: Sequence[Cell]) -> str:
    """How many evaluations each row of a table lacks."""
    needed = Counter(cell.row for cell in grid)
    lacking = Counter(cell.row for cell in missing)
    return ", ".join(f"{row} {lacking[row]} of {needed[row]}" for row in needed if lacking[row])


def _anchor(model: str, row: str, column: str) -> str:
    return re.sub(r"[^\w.]+", "-", f"{row}-{column}-{model}")


def _layout(site: Site, name: str, long: pd.DataFrame) -> dict[str, Any]:
    """The table as `tables.paper_layout` prints it, every number a link to the place where its runs are listed."""
    wide = tables.paper_layout(long)
    columns = [column for column in wide.columns if column not in ("model", "row")]
    rows = []
    for line in wide.to_dict("records"):
        entries = []
        for column in columns:
            text = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", str(escape(line[column])))
            target = f"tables/{name}.html#{_anchor(line['model'], line['row'], column)}"
            entries.append(Markup(text if line[column] == "–" else f'<a href="{escape(target)}">{text}</a>'))
        heads = [line["row"]] if site.one_model else [line["model"], line["row"]]
        rows.append({"heads": heads, "cells": entries})
    return {"heads": ["row"] if site.one_model else ["model", "row"], "columns": columns, "rows": rows}


def _number(
    site: Site, name: str, entry: pd.Series, long: pd.DataFrame, parts: pd.DataFrame, backlinks: Backlinks
) -> dict[str, Any]:
    """A number of a table, with links to its runs, or to the numbers that it is the average of."""
    model, row, column = entry["model"], entry["row"], entry["column"]
    places = tables.digits(column)
    if column == "avg":
        line = long[(long["model"] == model) & (long["row"] == row)]
        others = [other for other in line["column"] if other != "avg" and not tables.lower_is_better(other)]
        links = [Markup('<a href="#{}">{}</a>').format(_anchor(model, row, other), other) for other in others]
    else:
        own = parts[(parts["model"] == model) & (parts["row"] == row) & (parts["column"] == column)]
        title = f"{name}, {row}, {column}" + ("" if site.one_model else f", {model}")
        back = Markup('<a href="../tables/{}.html#{}">{}</a>').format(name, _anchor(model, row, column), title)
        links = _links_to_runs(own, back, backlinks)
    return {
        "key": (model, row),
        "id": _anchor(model, row, column),
        "column": column,
        "number": number_text(entry),
        "over": f"{entry['seeds']} seeds" if entry["spread"] == "seeds" else entry["spread"] or "–",
        "best": bool(entry["best"]),
        "log_likelihood": _or_dash(entry["log_likelihood"], ".3f"),
        "against_full": _or_dash(entry["against_full"], f"+.{places}f"),
        "reported": _or_dash(entry["reported"], f".{places}f"),
        "links": list(dict.fromkeys(links)),  # a run that trains nothing stands for every seed
    }


def _links_to_runs(own: pd.DataFrame, back: Markup, backlinks: Backlinks) -> list[Markup]:
    """A link to each run of a number, labelled by what tells it from the others; `back` is noted for each of them."""
    several = own["family"].nunique() > 1 or own["task"].nunique() > 1
    links = []
    for part in own.to_dict("records"):
        labels = [f"{part['family']} {part['task']}"] if several else []
        labels += [f"seed {part['seed']:g}"] if part["seed"] is not None and part["seed"] == part["seed"] else []
        text = ": ".join([", ".join(labels)] * bool(labels) + [score_text(part["task"], part["score"])])
        links.append(run_link("evaluate", part["record"], "../", text))
        known = backlinks["evaluate", part["record"]]
        if back not in known:
            known.append(back)
    return links


def _or_dash(value: float, form: str) -> str:
    return "–" if value != value else f"{value:{form}}"


def write_training_time(site: Site) -> dict[str, Any] | None:
    """Table 11, which is of the benchmark rather than of runs, as the first page shows it; also its CSV file."""
    if timing.TABLE not in tables.of_profile(site.profile):
        return None
    table = timing.training_time()
    site.write_csv(timing.TABLE, table.to_csv(index=False, lineterminator="\n"))
    shown = timing.to_read(table)
    return {
        "name": timing.TABLE,
        "title": timing.TITLE,
        "note": timing.note(table),
        "columns": list(shown.columns),
        "rows": shown.to_numpy().tolist(),
        "commit": (timing.benchmark()["provenance"]["commit"] or "none")[:8],
    }
