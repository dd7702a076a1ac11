"""The report: pages in which every number leads to its record, that need no network, and come out the same twice."""

from __future__ import annotations

import functools
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from tiny_models import tiny_checkpoint
from typer.testing import CliRunner

from alps_repro.analysis import claims, tables
from alps_repro.cli import app
from alps_repro.errors import UserError
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_records
from alps_repro.experiments.runs import evaluate_run
from alps_repro.report.build import write_report

#: Settings of a profile of tiny runs; of Table 3, only what stands in Table 1 as well will be measured.
SETTINGS = {
    "about": "A profile that is <tiny>.",
    "families": {"relations": {"datasets": ["family_relationships", "chain_sum"]}},
    "methods": ["full", "alps"],
    "scope": "heads",
    "tables": {"table1": {}, "table3": {}, "table4": {"seeds": [0]}},
    "ratio": 0.25,
    "seeds": [0, 1],
    "limit": 8,
    "recipe": {"max_steps": 2, "batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-3},
}


@functools.cache
def tiny_profile(folder: Path) -> Path:
    """A profile and its results folder in `folder`, not quite complete; made once for all tests that look at it."""
    folder = folder / "tiny-profile"
    base = tiny_checkpoint(folder / "base")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "results": str(folder / "tiny"), "models": [str(base)]}))
    profile = Profile.load(str(path))
    for cell in evaluations(profile).values():
        if cell.row not in ("70", "50", "30", "alps_own"):
            evaluate_run(cell.config, profile.results, progress=False)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_profile(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    """The tiny profile, with two executed notebooks."""
    profile = Profile.load(str(path))
    run = load_records(Path(profile.results) / "records", "finetune")[0].name
    for name, asked in ((f"02_finetune-{run}", {"method": "alps"}), ("06_report", {})):
        cells = [
            nbformat.v4.new_markdown_cell(f"# Notebook {name}\n\nWith $h \\le 2$ and\n\n$$\\big(W_q^h\\big)$$", id="a"),
            nbformat.v4.new_code_cell("print(1)", id="b", execution_count=1),
        ]
        widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "bar"}
        cells[1].outputs = [nbformat.v4.new_output("display_data", widget)]
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata["papermill"] = {
            "parameters": {"profile": "tiny", **asked},
            "input_path": f"/home/someone/notebooks/{name.split('-')[0]}.ipynb",
        }
        folder = Path(profile.results) / "notebooks"
        folder.mkdir(exist_ok=True)
        nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "03_evaluate.failed.ipynb").write_text("half of it")
    (folder / "03_evaluate.unfinished.ipynb").write_text("half of it")
    return profile


@pytest.fixture(scope="module")
def report(profile: Profile) -> Path:
    return write_report(profile).parent


class Page(HTMLParser):
    """What a page holds: ids, links, what it loads, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.ids |= {found["id"]} if found.get("id") else set()
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.loads += [found[name] for name in ("src", "href", "srcset", "data") if name in found and tag != "a"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pages(report: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(report.rglob("*.html"))}


def test_pages_load_nothing_from_elsewhere(report: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 15
    for path, page in pages.items():
        assert not page.tags & {"script", "iframe", "object", "embed", "base", "form"}, path
        assert all(urlsplit(address).scheme in ("", "data") for address in [*page.loads, *page.links]), path
        for address in page.loads:
            assert address.startswith("data:") or (path.parent / unquote(address)).is_file(), (path, address)
    for path in [*report.rglob("*.css"), *report.rglob("*.html")]:
        assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", path.read_text()), path
    for path in report.rglob("*.svg"):
        # Namespaces and the document type are names; only these attributes load anything.
        assert not re.search(r"(?:xlink:href|src)=\"(?!#|data:)", path.read_text()), path


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert page.links or "notebooks" in path.parts, path
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.is_file(), (path, link)
            assert not anchor or unquote(anchor) in pages[target].ids, (path, link)


def test_every_number_leads_to_its_records(profile: Profile, report: Path, pages: dict[Path, Page]) -> None:
    index = (report / "index.html").read_text()
    for name in profile.tables:
        long = tables.paper_table(profile, name)
        for entry in long.to_dict("records"):
            (anchor,) = re.findall(rf'href="tables/{name}.html#({entry["row"]}-{entry["column"]}-[^"]*)"', index)
            shown = f"{entry['mean']:.2f} ± {entry['half_width']:.2f}"
            assert f'#{anchor}">' in index
            row = (report / "tables" / f"{name}.html").read_text().split(f'id="{anchor}"')[1].split("</tr>")[0]
            assert shown in html.unescape(row)
            linked = [unquote(link) for link in re.findall(r'href="\.\./runs/evaluate-([^"]*)\.html"', row)]
            assert sorted(linked) == sorted(entry["records"].split()) != []
        assert (report / "tables" / f"{name}.csv").read_text() == long.to_csv(index=False, lineterminator="\n")


def test_page_of_a_run(profile: Profile, report: Path, pages: dict[Path, Page]) -> None:
    for record in load_records(Path(profile.results) / "records"):
        stem = f"{record.kind}-{record.name}"
        copied = report / "records" / f"{stem}.json"
        assert copied.read_bytes() == (Path(profile.results) / "records" / copied.name).read_bytes()
        page = pages[report / "runs" / f"{stem}.html"]
        assert any(unquote(link) == f"../records/{stem}.json" for link in page.links)
        assert f"alps-repro verify tiny/records/{stem}.json" in page.text
        assert (record.provenance.commit or "none") in page.text
        assert record.provenance.processor in page.text
        assert record.provenance.versions["torch"] in page.text
        assert json.dumps(record.config.dump(), indent=1) in page.text
        assert "nothing in this profile" not in page.text


def test_notebooks_are_linked_from_their_runs(profile: Profile, report: Path, pages: dict[Path, Page]) -> None:
    run = load_records(Path(profile.results) / "records", "finetune")[0].name
    page = pages[report / "runs" / f"finetune-{run}.html"]
    assert f"../notebooks/02_finetune-{run}.html" in map(unquote, page.links)
    command = """papermill notebooks/02_finetune.ipynb again.ipynb -y '{"method": "alps", "profile": "tiny"}'"""
    assert command in page.text
    shown = (report / "notebooks" / f"02_finetune-{run}.html").read_text()
    assert shown.count('class="tex"') == 2
    assert "bar" not in shown.split("<body>")[1]  # a live widget has nothing to show here
    assert not list(report.glob("notebooks/*failed*"))
    assert "/home/someone" not in "".join(path.read_text() for path in pages)


def test_what_it_is_and_what_is_missing_is_said_first(profile: Profile, pages: dict[Path, Page], report: Path) -> None:
    text = " ".join(pages[report / "index.html"].text.split())
    assert "A profile that is <tiny>." in text
    assert text.index("Not complete: 7 of 14 evaluations") < re.search(r"Of \d+ tests", text).start()
    assert "table3: 6 of 11 missing" in text
    assert "Missing: 70 2 of 2, 50 2 of 2, 30 2 of 2." in text
    assert "Missing: alps_own 1 of 1." in text


def test_claims_come_with_their_tests(report: Path, pages: dict[Path, Page]) -> None:
    page = (report / "index.html").read_text()
    assert page.index('src="figures/claims_points.svg"') < page.index('src="figures/claims_nats.svg"')
    assert page.index('src="figures/claims_nats.svg"') < page.index('<table class="claims">')
    text = " ".join(pages[report / "index.html"].text.split())
    assert "training 10 % of the heads beats training all of them" in text
    assert " ".join(claims.EXPLANATION.replace("*", "").split()) in text
    assert "alps - full in table1, paired over seeds and questions" in text
    assert re.search(r"Of \d+ tests, \d+ hold, \d+ fail, and \d+ are undecided", text)
    assert "Not tested yet: alps beats random heads" in text
    # Of Table 4 there is one seed.
    assert re.search(r"are undecided; [1-9]\d* have no verdict", text)
    assert "alps - full in table4, paired over questions; one training seed" in text
    assert '<td class="no-verdict">no verdict</td>' in (report / "index.html").read_text()


def test_small_models_are_put_in_their_place(profile: Profile, report: Path, pages: dict[Path, Page]) -> None:
    assert "135 million" not in pages[report / "index.html"].text
    small = profile.model_copy(update={"models": ("smollm2-135m",), "tables": {"table1": profile.tables["table1"]}})
    text = write_report(small, report.with_name("small")).read_text()
    assert "135 million" in text
    assert "0 of 5 evaluations are measured" in text
    assert "No run of table1 is in" in text


def test_same_records_same_bytes(profile: Profile, report: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(path.relative_to(report)): path.read_bytes() for path in report.rglob("*") if path.is_file()}

    before = state()
    (report / "runs" / "of-a-run-that-is-gone.html").write_text("")
    write_report(profile)
    assert state() == before
    assert not [path for path in report.parent.iterdir() if path.name.startswith(".report")]


def test_other_folders_are_left_alone(profile: Profile, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my own page")
    with pytest.raises(UserError, match="holds something other than a report"):
        write_report(profile, tmp_path)
    assert (tmp_path / "index.html").read_text() == "my own page"
    with pytest.raises(UserError, match=r"holds something other than a report"):
        write_report(profile, profile.results)
    with pytest.raises(UserError, match=r"no record in .* run the profile first"):
        write_report(profile.model_copy(update={"results": str(tmp_path / "empty")}))


def test_command(path: Path, report: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(report / "index.html")


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TELLS = """<script>addEventListener("load", () => parent.postMessage(
[document.title, innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).marginTop], "*"))
</script></body>"""
ASKS = """<p id="told"></p><script>
const told = [];
addEventListener("message", event => {
told.push(event.data); document.getElementById("told").textContent = JSON.stringify(told) })</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_browser_shows_pages_without_errors_or_overflow(report: Path, tmp_path: Path) -> None:
    """In frames as wide as a laptop's and a phone's screen; a script in copies of the pages tells their true width."""
    copies = tmp_path / "copies"
    shutil.copytree(report, copies)
    names = ["index.html", *(f"{kind}/{next((copies / kind).glob('*.html')).name}" for kind in ("tables", "notebooks"))]
    names += [f"runs/{next((copies / 'runs').glob(f'{kind}-*')).name}" for kind in ("evaluate", "finetune", "localize")]
    for name in names:
        page = (copies / name).read_text()
        (copies / name).write_text(page.replace("</body>", TELLS))
    frames = [f'<iframe src="copies/{name}" width="{width}"></iframe>' for name in names for width in (1280, 390)]
    (tmp_path / "asks.html").write_text(f"<!doctype html>{ASKS}{''.join(frames)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--window-size=1400,900", "--dump-dom"]
    address = (tmp_path / "asks.html").as_uri()
    done = subprocess.run([CHROMIUM, *options, address], capture_output=True, text=True, timeout=120)
    told = json.loads(html.unescape(re.search(r'<p id="told">(.*?)</p>', done.stdout)[1]))
    assert len(told) == 2 * len(names)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    for title, width, needed, margin in told:
        assert needed <= width, f"'{title}' is {needed} wide in {width}"
        assert margin == "0px", f"'{title}' has no style"
