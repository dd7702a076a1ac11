"""Citing: the number is the table's, the sentence says what was run, BibTeX is CITATION.cff's."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml
from test_report import tiny_profile
from typer.testing import CliRunner

from alps_repro.analysis.cite import CITATION, cite, listed, package_bibtex, what_was_run
from alps_repro.analysis.tables import write_paper_table
from alps_repro.cli import app
from alps_repro.errors import UserError
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_records


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_profile(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def profile(path: Path) -> Profile:
    return Profile.load(str(path))


@pytest.mark.parametrize("table", ["table1", "table3", "table4"])
def test_numbers_are_those_of_the_csv(profile: Profile, table: str) -> None:
    with write_paper_table(profile, table)[0].open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        found = cite(profile, table, row["row"], row["column"])
        assert (found.mean, found.half_width) == (float(row["mean"]), float(row["half_width"]))
        assert f"{float(row['mean']):.2f} ± {float(row['half_width']):.2f} %" in found.number
        assert (row["spread"] == "seeds") == ("2 training seeds" in found.number)
        assert list(found.records) == row["records"].split()


def test_sentence_says_what_was_run(profile: Profile) -> None:
    base = profile.models[0]
    alps = cite(profile, "table1", "alps", "family_relationships").sentence
    for words in (
        f"{base} trained on family_relationships by the method 'alps'",
        "nothing else (scope 'heads'), 25 % of the heads, scored by pad of product matrices",
        "against its fine-tuning on family_relationships (method 'full', scope 'all', 2 steps)",
        "2 steps of 2 examples at a learning rate of 0.001, training seeds 0 and 1",
        "evaluated on 8 test questions of family_relationships (alps-repro 0.1.0, ",
    ):
        assert words in alps
    vanilla = cite(profile, "table1", "vanilla", "family_relationships").sentence
    assert f"{base} as it is, not fine-tuned; evaluated on 8 test questions" in vanilla
    carried = cite(profile, "table4", "alps", "relations").sentence
    assert "trained on chain_sum" in carried
    assert "its fine-tuning on family_relationships" in carried
    commit = load_records(Path(profile.results) / "records")[0].provenance.commit
    assert commit is None or f"commit {commit[:10]}" in alps


def test_every_kind_of_run_has_a_sentence(profile: Profile) -> None:
    for record in load_records(Path(profile.results) / "records"):
        sentence = what_was_run([record])
        assert profile.models[0] in sentence
        assert sentence.endswith(").")


def test_bibtex(profile: Profile) -> None:
    found = cite(profile, "table1", "alps", "family_relationships")
    citation = yaml.safe_load(CITATION.read_text())
    package, paper = found.bibtex.split("\n\n")
    commit = load_records(Path(profile.results) / "records")[0].provenance.commit
    for words in (citation["title"], citation["authors"][0]["name"], citation["version"], commit or "alps"):
        assert words in package
    assert package.startswith("@software{")
    assert paper.startswith("@inproceedings{")
    for words in (citation["references"][0]["title"], citation["references"][0]["doi"], "Chen, Hao and Li, Haoze"):
        assert words in paper
    for entry in (package, paper):
        assert entry.count("{") == entry.count("}")
        assert len(re.findall(r"^  \w+ = \{.*\},$", entry, flags=re.MULTILINE)) == entry.count("\n") - 1
    assert "commit a and commit b with changes on top" in package_bibtex([("a", False), ("b", True), ("", False)])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("tabel1", "alps", "avg"), "no table of this profile 'tabel1': did you mean 'table1'"),
        (("table1", "alp", "avg"), "no row in table1 'alp': did you mean 'alps'"),
        (("table1", "alps", "family_relationship"), "no column in table1 .*: did you mean 'family_relationships'"),
        (("table4", "alps", "relation"), "no column in table4 'relation': did you mean 'relations'"),
        (("table1", "alps", "family_relationships", "llama"), "no model in this profile 'llama'"),
        (("table3", "70", "family_relationships"), "row 70 of table3 has no family_relationships yet"),
        (("table4", "alps_own", "relations"), "row alps_own of table4 has no relations yet"),
    ],
)
def test_what_is_not_there(profile: Profile, asked: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cite(profile, *asked)


def test_model_has_to_be_said_where_there_are_several(profile: Profile) -> None:
    several = profile.model_copy(update={"models": (*profile.models, "smollm2-135m")})
    with pytest.raises(UserError, match=r"several models: name one by --model"):
        cite(several, "table1", "alps", "family_relationships")
    asked = ("table1", "alps", "family_relationships")
    assert cite(several, *asked, profile.models[0]).mean == cite(profile, *asked).mean


def test_command(path: Path, profile: Profile) -> None:
    result = CliRunner().invoke(app, ["cite", str(path), "table1", "alps", "family_relationships"])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(cite(profile, "table1", "alps", "family_relationships"))


def test_listed() -> None:
    assert [listed(words) for words in ([], [1], [1, 2, 1], "abc")] == ["", "1", "1 and 2", "a, b and c"]
