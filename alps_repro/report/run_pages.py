"""A page for every run: what was run, its results, how to run it again, and what it was made from and used in."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from urllib.parse import quote

from markupsafe import Markup

from alps_repro.analysis import tables
from alps_repro.analysis.cite import commit_text, what_was_run
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.notebooks import NOTEBOOKS
from alps_repro.experiments.records import KINDS, Record, predecessors
from alps_repro.report.notebooks import ExecutedNotebook
from alps_repro.report.site import Key, Site, run_link, score_text
from alps_repro.report.table_pages import Backlinks


def write_runs(site: Site, notebooks: dict[str, ExecutedNotebook], backlinks: Backlinks) -> None:
    """Write a page for every run of a results folder, and copy its record.

    Args:
        site: The report.
        notebooks: The executed notebooks, by name.
        backlinks: By run, links to the numbers of tables that it is part of.
    """
    successors: dict[Key, list[Key]] = {}
    for key, record in site.records.items():
        for before in _predecessors(record):
            successors.setdefault(before, []).append(key)
    for key, record in site.records.items():
        notebook = notebooks.get(f"{NOTEBOOKS.get(record.kind)}-{record.name}")
        used = [*backlinks[key], *(_link(site, one) for one in successors.get(key, []))]
        _write_run(site, record, notebook, used)


def _write_run(site: Site, record: Record, notebook: ExecutedNotebook | None, used: list[Markup]) -> None:
    stem = f"{record.kind}-{record.name}"
    shutil.copyfile(site.results / "records" / f"{stem}.json", site.place(f"records/{stem}.json"))
    commands = [f"alps-repro verify {shlex.quote(str(site.shown_results / 'records' / f'{stem}.json'))}"]
    provenance = record.provenance
    hashes = {f"model, {role}": value for role, value in provenance.model_sha256.items()}
    hashes |= {f"data, {name}": value for name, value in provenance.data_sha256.items()}
    where = provenance.model_dump(exclude={"dirty", "versions", "model_sha256", "data_sha256", "files_sha256"})
    where["commit"] = commit_text(provenance.commit, provenance.dirty)
    site.write_page(
        f"runs/{stem}.html",
        "run",
        title=f"{record.kind} {record.name}",
        record=record,
        sentence=what_was_run([record]),
        result=list(_result(record)),
        heat_map=_heat_map(site, record),
        commands=commands + ([notebook.command] if notebook else []),
        notebook=notebook,
        versions=provenance.versions,
        where={name: "none" if value is None else value for name, value in where.items()},
        hashes=hashes,
        before=[_link(site, one) for one in _predecessors(record)],
        used=used,
        json=f"../records/{quote(stem)}.json",
        config=json.dumps(record.config.dump(), indent=1),
    )


def _predecessors(record: Record) -> list[Key]:
    """Kind and name of the runs that a run needs directly."""
    return [(KINDS[type(before)], before.name) for before in predecessors(record.config).values()]


def _link(site: Site, key: Key) -> Markup:
    kind, name = key
    link = run_link(kind, name, "../") if key in site.records else f"{name} (not in this folder)"
    return Markup("{} {}").format(kind, link)


def _heat_map(site: Site, record: Record) -> str | None:
    """The heat map of a localization's scores, copied, as its page names it; None where there is none."""
    path = site.results / "figures" / "heads" / f"{record.name}.svg"
    if record.kind != "localize" or not path.exists():
        return None
    shutil.copyfile(path, site.place(f"figures/heads/{path.name}"))
    return f"../figures/heads/{quote(path.name)}"


def _result(record: Record) -> Iterator[tuple[str, str]]:
    """The main numbers of a run: name and text of each."""
    if isinstance(record.config, EvaluateConfig):
        yield from _scores(record)
    elif isinstance(record.config, FinetuneConfig):
        yield from _training(record)
    cost = record.cost
    if cost.trained_parameters is not None and cost.total_parameters:
        share = cost.trained_parameters / cost.total_parameters
        yield "trained", f"{cost.trained_parameters:,} of {cost.total_parameters:,} parameters ({share:.2%})"
    yield "time", f"{cost.seconds:,.0f} s"
    yield "peak memory", f"{cost.peak_memory_bytes / 2**30:.2f} GiB"


def _scores(record: Record) -> Iterator[tuple[str, str]]:
    result = record.result
    for row in tables.summary([record]).to_dict("records"):
        task = str(row["task"])
        text = score_text(task, result["scores"][task])
        if row["low"] == row["low"] and row["low"] is not None and not tables.lower_is_better(task):
            text += f" ({row['low']:.2f} to {row['high']:.2f}: 95 %, Wilson, {row['questions']} questions)"
        yield task, text
        metrics = result["metrics"][task]
        for name, value in sorted(metrics.items()):
            if "," in name and "_stderr," not in name:
                error = metrics.get(name.replace(",", "_stderr,"))
                yield f"{task}: {name}", f"{value:.6g}" + (f" ± {error:.2g} (standard error)" if error else "")


def _training(record: Record) -> Iterator[tuple[str, str]]:
    result = record.result
    if losses := result.get("losses"):
        yield "loss", f"{losses[0]:.4f} to {losses[-1]:.4f} nats per token, in {len(losses)} steps"
    if heads := result.get("heads"):
        yield f"{len(heads)} heads (layer.head)", " ".join(f"{layer}.{head}" for layer, head in heads)
    if result.get("tokens"):
        yield "tokens", f"{result['tokens']:,}"
