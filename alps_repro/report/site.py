"""What the pages of one report share: the profile and its records, where the pages go, and how one is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from alps_repro.analysis.tables import lower_is_better
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import Record

if TYPE_CHECKING:
    import jinja2

#: In every page's head: a folder whose first page has it may be replaced by a new report.
MARK = '<meta name="generator" content="alps-repro report">'

#: Kind and name of a run.
Key = tuple[str, str]


@dataclass(frozen=True)
class Site:
    """A report that is being made.

    Attributes:
        profile: The profile that is reported on.
        records: The completed runs in its results folder.
        folder: Where the pages are written.
    """

    profile: Profile
    records: dict[Key, Record]
    folder: Path

    @cached_property
    def results(self) -> Path:
        """The profile's results folder."""
        return Path(self.profile.results)

    @cached_property
    def shown_results(self) -> Path:
        """The results folder relative to the checkout: the same words wherever the report is made."""
        checkout = Path(__file__).parents[2]
        whole = self.results.resolve()
        return whole.relative_to(checkout) if whole.is_relative_to(checkout) else Path(whole.name)

    @property
    def one_model(self) -> bool:
        """Whether the profile has a single model, which tables then need not name."""
        return len(self.profile.models) == 1

    def write_page(self, path: str, template: str, **content: Any) -> None:
        """Render `templates/TEMPLATE.html.j2` to a path relative to the report's folder."""
        page = _templates().get_template(f"{template}.html.j2")
        root = "../" * path.count("/")
        self.place(path).write_text(page.render(root=root, profile=self.results.name, mark=Markup(MARK), **content))

    def write_csv(self, name: str, text: str) -> None:
        """Write `tables/NAME.csv`."""
        self.place(f"tables/{name}.csv").write_text(text)

    def place(self, path: str) -> Path:
        """The whole path of a file of the report, whose folder is made if need be."""
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def reason(self, error: Exception) -> str:
        """An error's message, with the results folder named relative to the checkout."""
        return str(error).replace(str(self.results), str(self.shown_results))


def run_link(kind: str, name: str, root: str, text: str | None = None) -> Markup:
    """A link to a run's page from a page whose way up to the report's folder is `root`."""
    href = f"{root}runs/{quote(f'{kind}-{name}')}.html"
    return Markup('<a href="{}">{}</a>').format(href, text or name)


def score_text(task: str, score: float) -> str:
    """A task's score as lm-eval gives it, in percent, or nats of a loss."""
    return f"{score:.4f} nats" if lower_is_better(task) else f"{100 * score:.2f} %"


def style_sheet() -> str:
    """`style.css`, and the colours of code in notebooks."""
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    own = (Path(__file__).parent / "style.css").read_text()
    return f"{own}{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


@cache
def _templates() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("alps_repro.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
