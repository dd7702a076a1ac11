"""A profile's report: static pages made from records alone, in which every number leads to its runs.

`index.html` has the claims, tables and figures; `tables/` each table number by number; `runs/` a page for each record
with what was run, on what, and how to run it again; `records/` the records themselves; `notebooks/` the executed
notebooks. The pages need no server and no network, and the same records give the same bytes.

How the pages look is in `templates/` and `style.css`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alps_repro.errors import UserError, explained
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import Record, load_records
from alps_repro.report.first_page import claims_section, figures_section, overview
from alps_repro.report.notebooks import grouped, write_notebooks
from alps_repro.report.run_pages import write_runs
from alps_repro.report.site import MARK, Key, Site, style_sheet
from alps_repro.report.table_pages import write_tables, write_training_time


def write_report(profile: Profile, folder: str | Path | None = None) -> Path:
    """Make a profile's report from its results folder.

    Args:
        profile: Whose results to report.
        folder: Where the pages go, `results/PROFILE/report` by default. An earlier report there is replaced as a whole.

    Returns:
        the path of `index.html`.

    Raises:
        UserError: there is no record yet, or the folder holds something other than a report.
    """
    results = Path(profile.results)
    records: dict[Key, Record] = {(record.kind, record.name): record for record in load_records(results / "records")}
    if not records:
        raise UserError(f"There is no record in '{results / 'records'}' to report: run the profile first.")
    folder = Path(folder or results / "report")
    with _replaced(folder) as new:
        _write_pages(Site(profile, records, new))
    return folder / "index.html"


def _write_pages(site: Site) -> None:
    notebooks = write_notebooks(site)
    tables, backlinks = write_tables(site)
    write_runs(site, notebooks, backlinks)
    site.write_page(
        "index.html",
        "index",
        title=f"ALPS reproduced: {site.results.name}",
        about=site.profile.about,
        tables=tables,
        times=write_training_time(site),
        claims=claims_section(site),
        figures=figures_section(site),
        notebooks=grouped(notebooks),
        **overview(site),
    )
    (site.folder / "style.css").write_text(style_sheet())


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the old one's place once it is whole."""
    index = folder / "index.html"
    if folder.exists() and any(folder.iterdir()) and not (index.is_file() and MARK in index.read_text()):
        raise UserError(f"'{folder}' holds something other than a report: choose another folder.")
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
