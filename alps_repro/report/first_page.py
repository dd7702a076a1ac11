"""What `index.html` shows beside the tables: claims, figures, runs, and where they were made."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from alps_repro.analysis import claims, figures
from alps_repro.analysis.cite import commit_text, commits, listed, package_bibtex, paper_bibtex
from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.grid import cells
from alps_repro.experiments.records import KINDS, Record, load_record
from alps_repro.models.embedded import EMBEDDED
from alps_repro.report.site import Site, run_link, score_text

if TYPE_CHECKING:
    import pandas as pd


def overview(site: Site) -> dict[str, Any]:
    """What was run, on what, what is missing, and how to cite it."""
    records = list(site.records.values())
    needed = {cell.config.name for name in site.profile.tables for cell in cells(site.profile, name)}
    return {
        "models": listed(site.profile.models),
        "needed": len(needed),
        "measured": sum(("evaluate", name) in site.records for name in needed),
        "failed": [load_record(path) for path in sorted((site.results / "records").glob("*.failed.json"))],
        "unused": sum(kind == "evaluate" and name not in needed for kind, name in site.records),
        "runs": {
            kind: [_run_line(record) for record in records if record.kind == kind]
            for kind in KINDS.values()
            if any(record.kind == kind for record in records)
        },
        "hours": sum(record.cost.seconds for record in records) / 3600,
        "where": _where(records),
        "small": _small_model(site),
        "bibtex": [package_bibtex(commits(records)), paper_bibtex()],
    }


def _run_line(record: Record) -> dict[str, Any]:
    """A run's line in the list of runs."""
    cost, text = record.cost, ""
    if isinstance(record.config, EvaluateConfig):
        text = ", ".join(f"{task} {score_text(task, score)}" for task, score in record.result["scores"].items())
    elif isinstance(record.config, FinetuneConfig):
        losses = record.result.get("losses")
        text = f"{cost.trained_parameters:,} parameters" if cost.trained_parameters is not None else ""
        text += f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    commit = (record.provenance.commit or "none")[:8] + (" (changed)" if record.provenance.dirty else "")
    link = run_link(record.kind, record.name, "")
    return {"link": link, "result": text, "seconds": f"{cost.seconds:,.0f}", "commit": commit}


def _where(records: Sequence[Record]) -> dict[str, str]:
    """Machines, commits and packages that the runs were made with, each different one once."""
    provenance = [record.provenance for record in records]
    machines = listed(
        f"{p.processor} ({p.system}), {p.threads} {'thread' if p.threads == 1 else 'threads'}"
        + (f", {p.gpu}" if p.gpu else "")
        for p in provenance
    )
    names = dict.fromkeys(name for p in provenance for name in p.versions)
    versions = [f"{name} {listed(p.versions[name] for p in provenance if name in p.versions)}" for name in names]
    return {
        "machine": machines,
        "commit": listed(commit_text(p.commit, p.dirty, 10) for p in provenance),
        "measuring code (SHA-256)": listed((p.code or "not noted")[:10] for p in provenance),
        "Python": listed(p.python for p in provenance),
        "packages": ", ".join(versions),
    }


def _small_model(site: Site) -> dict[str, Any] | None:
    """For the paragraph on small models, where all of the profile's models are the embedded one."""
    if set(site.profile.models) != {EMBEDDED}:
        return None
    recipes = [r.config.recipe for r in site.records.values() if isinstance(r.config, FinetuneConfig)]
    steps = sorted({recipe.max_steps for recipe in recipes if recipe.max_steps})
    tasks = [name for family in site.profile.families.values() for name in family.tasks or family.datasets]
    return {"steps": listed(steps), "tasks": listed(tasks)}


def claims_section(site: Site) -> dict[str, Any]:
    """The claims with their tests, in groups of one claim, or the reason why none can be tested."""
    try:
        decided = claims.decided(site.profile)
    except UserError as error:
        return {"why_not": site.reason(error)}
    shown = claims.to_read(decided).drop(columns=["claim", "verdict"])
    groups: dict[str, dict[str, Any]] = {}
    for row, cells_of_row in zip(decided.to_dict("records"), shown.to_dict("records")):
        name = str(row["claim"])
        table = claims.CLAIMS[name].table if name in claims.CLAIMS else None
        group = groups.setdefault(name, {"statement": claims.statement(name), "table": table, "rows": []})
        group["rows"].append({"test": row["test"], "verdict": row["verdict"], "cells": cells_of_row})
    untested = [
        claim.statement
        for name, claim in claims.CLAIMS.items()
        if claim.table in site.profile.tables and name not in groups
    ]
    return {
        "why_not": None,
        "groups": list(groups.values()),
        "columns": list(shown.columns),
        "untested": untested,
        "verdicts": Counter(decided["verdict"]),
        "total": len(decided),
        "explanation": [_marked(part) for part in claims.EXPLANATION.split("\n\n")],
        "note": claims.note(decided),
        "figures": _forest_plots(site, decided),
    }


def _marked(markdown: str) -> Markup:
    """Escaped text, with each verdict in asterisks in its colour."""
    return Markup(re.sub(r"\*(\w+)\*", r'<b class="\1">\1</b>', str(escape(markdown))))


def _forest_plots(site: Site, decided: pd.DataFrame) -> list[dict[str, str]]:
    drawn = claims.claim_figures(decided)
    for name, figure in drawn.items():
        figures.save(figure, site.folder / "figures", name)
    return [{"name": name, "title": claims.CLAIM_FIGURES[name][0]} for name in drawn]


def figures_section(site: Site) -> list[dict[str, Any]]:
    """The profile's figures, drawn from its records, then those that its notebooks have drawn besides."""
    shown: list[dict[str, Any]] = []
    for name in figures.of_profile(site.profile):
        figure, why_not = figures.FIGURES[name], None
        try:
            figures.save(figure.draw(site.profile), site.folder / "figures", name)
        except UserError as error:
            why_not = site.reason(error)
        shown.append({"name": name, "title": figure.title, "table": figure.table, "why_not": why_not})
    for path in sorted((site.results / "figures").glob("*.svg")):
        if path.stem not in {*figures.FIGURES, *claims.CLAIM_FIGURES}:
            shutil.copyfile(path, site.place(f"figures/{path.name}"))
            title = f"{path.stem} (drawn by a notebook)"
            shown.append({"name": path.stem, "title": title, "table": None, "why_not": None})
    return shown
