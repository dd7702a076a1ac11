"""The paper's tables and figures from records that never took place: right to the digit, the same bytes every time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from scipy.stats import binomtest, t
from synthetic import draws, measure, right_answers, save, select_heads, small_profile

from alps_repro.analysis import figures, paper, tables
from alps_repro.analysis.figures import FIGURES, of_profile, write_figure
from alps_repro.analysis.tables import log_likelihoods, paper_layout, paper_table, spread_note, write_paper_table
from alps_repro.errors import UserError
from alps_repro.experiments.configs import FinetuneConfig
from alps_repro.experiments.grid import TABLES, cells
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import load_record, record_path

LLAMA = "meta-llama/Llama-3.2-1B"
SHARES = {"vanilla": 0.1, "no_attn": 0.2, "random": 0.5, "full": 0.6, "alps": 0.7}
TWO_FAMILIES = {
    "sums": {"datasets": ["chain_sum", "basic_arithmetic"]},
    "divisors": {"datasets": ["gcd", "lcm"]},
}


def by_method(cell: Any, task: str) -> float:
    """Seeds and tasks differ a little."""
    return SHARES[cell.run.method] + 0.03 * draws(cell.seed, cell.run.method, task).normal()


def entry(table: pd.DataFrame, row: str, column: str, model: str = "m") -> pd.Series:
    (found,) = table[(table["model"] == model) & (table["row"] == row) & (table["column"] == column)].iloc
    return found


def scores(profile: Profile, table: str, row: str, task: str) -> list[float]:
    """In percent, from the records, in the order of the seeds."""
    folder, found = Path(profile.results) / "records", {}
    for cell in cells(profile, table):
        if cell.row == row and task in cell.tasks:
            record = load_record(record_path(folder, "evaluate", cell.config.name))
            found[cell.seed] = 100 * record.result["scores"][task]
    return list(found.values())


def student(values: list[float]) -> float:
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def wilson(share: float, questions: int) -> float:
    found = binomtest(round(share * questions), questions).proportion_ci(method="wilson")
    return 50 * float(found.high - found.low)


# Numbers.


def test_mean_and_students_interval_over_seeds(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, seeds=[0, 1, 2, 3])
    measure(profile, right_answers(by_method))
    table = paper_table(profile, "table1")
    for row in ("full", "random", "alps"):
        found, values = entry(table, row, "chain_sum"), scores(profile, "table1", row, "chain_sum")
        assert len(values) == 4
        assert len(set(values)) > 1
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["half_width"] == pytest.approx(student(values))
        assert (found["spread"], found["seeds"]) == ("seeds", 4)
        assert len(found["records"].split()) == 4
        # The synthetic log-likelihoods are the answers less 2.
        assert found["log_likelihood"] == pytest.approx(np.mean(values) / 100 - 2)
        assert found["log_likelihood_half_width"] == pytest.approx(student(values) / 100)


def test_wilsons_interval_over_questions_of_one_seed(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, seeds=[0])
    measure(profile, right_answers(by_method))
    table = paper_table(profile, "table1")
    for row in ("vanilla", "full", "random", "alps"):
        found, (value,) = entry(table, row, "chain_sum"), scores(profile, "table1", row, "chain_sum")
        assert found["mean"] == value
        assert found["half_width"] == pytest.approx(wilson(value / 100, 200))
        assert (found["spread"], found["seeds"]) == ("questions", 0 if row == "vanilla" else 1)
        assert math.isnan(found["log_likelihood_half_width"])


def test_vanilla_stands_once_beside_many_seeds(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, methods=["full", "no_attn", "alps"])
    measure(profile, right_answers(by_method))
    table = paper_table(profile, "table1")
    vanilla, no_attn = entry(table, "vanilla", "chain_sum"), entry(table, "no_attn", "chain_sum")
    assert vanilla["records"] == no_attn["records"]
    assert vanilla["half_width"] == no_attn["half_width"] == pytest.approx(wilson(vanilla["mean"] / 100, 200))
    note = spread_note(table)
    assert "over 3 training seeds (Student's t)" in note
    assert "over questions, where there is one training seed or nothing was trained (Wilson)" in note


def test_average_is_there_where_all_its_parts_are(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, families=TWO_FAMILIES)
    # Random lacks a family in seed 2, and full lacks one altogether.
    missing = {("random", "divisors", 2), *(("full", "divisors", seed) for seed in (0, 1, 2))}
    measure(profile, right_answers(by_method), only=lambda cell: (cell.row, cell.family, cell.seed) not in missing)
    table = paper_table(profile, "table1")
    assert set(table.loc[table["column"] == "avg", "row"]) == {"vanilla", "random", "alps"}
    by_seed = np.mean([scores(profile, "table1", "alps", task) for task in ("chain_sum", "gcd")], axis=0)
    average = entry(table, "alps", "avg")
    assert average["mean"] == pytest.approx(by_seed.mean())
    assert average["half_width"] == pytest.approx(student(list(by_seed)))
    assert average["log_likelihood"] == pytest.approx(by_seed.mean() / 100 - 2)
    assert entry(table, "random", "avg")["seeds"] == 2
    assert entry(table, "random", "chain_sum")["seeds"] == 3
    assert list(table.loc[table["row"] == "alps", "column"]) == ["chain_sum", "gcd", "avg"]


def test_average_over_questions_is_as_sure_as_its_parts(tmp_path: Path) -> None:
    """A task of few questions is as large a part of the average as one of many, which do not make up for it."""
    profile = small_profile(tmp_path, seeds=[0], families=TWO_FAMILIES)
    few, many = right_answers(by_method, questions=20), right_answers(by_method, questions=2000)
    measure(profile, lambda cell, task: (few if task == "gcd" else many)(cell, task))
    table = paper_table(profile, "table1")
    for row in ("vanilla", "alps"):
        parts = [entry(table, row, task) for task in ("chain_sum", "gcd")]
        halves = [wilson(part["mean"] / 100, asked) for part, asked in zip(parts, (2000, 20))]
        assert [part["half_width"] for part in parts] == pytest.approx(halves)
        average = entry(table, row, "avg")
        assert average["spread"] == "questions"
        assert average["half_width"] == pytest.approx(math.hypot(*halves) / 2)
        assert average["half_width"] > 3 * wilson(average["mean"] / 100, 2020)


def test_one_column_has_no_average(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, right_answers(by_method))
    assert set(paper_table(profile, "table1")["column"]) == {"chain_sum"}


def test_family_is_the_mean_of_its_tasks(tmp_path: Path) -> None:
    families = {"math": {"datasets": ["mathinstruct", "camel_math"], "tasks": ["gsm8k", "hendrycks_math"]}}
    profile = small_profile(tmp_path, models=[LLAMA], families=families, scope="all", tables={"table4": {}})
    measure(profile, right_answers(by_method), log_likelihoods=False)
    table = paper_table(profile, "table4")
    assert set(table["column"]) == {"math"}
    by_seed = np.mean([scores(profile, "table4", "alps", task) for task in ("gsm8k", "hendrycks_math")], axis=0)
    found = entry(table, "alps", "math", LLAMA)
    assert found["mean"] == pytest.approx(by_seed.mean())
    assert found["half_width"] == pytest.approx(student(list(by_seed)))
    assert found["reported"] == entry(tables._reported("table4"), "alps", "math", LLAMA)["reported"]


# Knowledge: the same questions, asked of several families' models.


@pytest.fixture
def knowing(tmp_path: Path) -> Profile:
    asked = {"tables": {"table5": {}}, "knowledge": ["world_facts", "prose"], "families": TWO_FAMILIES}
    profile = small_profile(tmp_path, **asked)
    measure(profile, right_answers(by_method))
    return profile


def test_questions_that_are_asked_again_count_once(knowing: Profile) -> None:
    """Of vanilla, there is a record for every family, of the same model and the same questions."""
    found = entry(paper_table(knowing, "table5"), "vanilla", "world_facts")
    assert len(found["records"].split()) == 2
    assert found["half_width"] == pytest.approx(wilson(found["mean"] / 100, 200))
    one_seed = knowing.model_copy(update={"seeds": (0,)})
    for row in ("full", "alps"):
        found = entry(paper_table(one_seed, "table5"), row, "world_facts")
        assert found["spread"] == "questions"
        assert found["half_width"] == pytest.approx(wilson(found["mean"] / 100, 200))


def test_losses_are_in_nats_and_better_where_they_are_lower(knowing: Profile) -> None:
    table = paper_table(knowing, "table5")
    losses = table[table["column"] == "prose"].set_index("row")
    # By the synthetic records, whatever is right costs half a nat per token.
    assert losses.loc["full", "mean"] == pytest.approx(3.3, abs=0.05)
    assert list(losses[losses["best"]].index) == ["random"]  # vanilla is lower still, and stands apart
    assert losses["mean"].idxmin() == "vanilla"
    assert losses.loc["alps", "against_full"] > 0
    assert math.isnan(losses.loc["vanilla", "half_width"])
    assert losses.loc["vanilla", "spread"] == ""
    assert set(table["column"]) == {"world_facts", "prose"}  # accuracies and losses have no mean
    shown = paper_layout(table).set_index("row")
    assert re.fullmatch(r"3\.\d{4}", shown.loc["vanilla", "prose"])
    assert re.fullmatch(r"3\.\d{4} ± \d\.\d{4} ↑", shown.loc["alps", "prose"])
    assert re.fullmatch(r"\*\*\d+\.\d\d ± \d+\.\d\d\*\* ↑", shown.loc["alps", "world_facts"])
    assert spread_note(table).endswith(" prose: loss in nats per token, where lower is better.")


def test_summary_of_losses(knowing: Profile) -> None:
    table = tables.write_summary(knowing.results)[0]
    losses = table[table["task"] == "prose"]
    assert losses["score"].between(2, 4).all()
    shown = tables.to_read(table)
    assert shown.loc[shown["task"] == "prose", "score, %"].str.fullmatch(r"3\.\d{4} nats").all()
    assert shown.loc[shown["task"] == "chain_sum", "score, %"].str.fullmatch(r"\d+\.\d").all()


# What is printed.


def test_best_is_bold_and_arrows_point_from_full(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, methods=["full", "no_attn", "random", "alps"])
    shares = {"full": 0.6, "no_attn": 0.6, "random": 0.4, "alps": 0.8, "vanilla": 0.6}
    measure(
        profile,
        lambda cell, task: [1] * int(100 * shares[cell.run.method]) + [0] * int(100 - 100 * shares[cell.run.method]),
    )
    table = paper_table(profile, "table1")
    shown = paper_layout(table).set_index("row")["chain_sum"]
    assert shown["alps"] == "**80.00 ± 0.00** ↑"
    assert shown["random"] == "40.00 ± 0.00 ↓"
    assert shown["full"] == "60.00 ± 0.00"
    assert shown["no_attn"].endswith(" =")  # vanilla in scope heads, and here as good as full
    assert not re.search("[↑↓=*]", shown["vanilla"])
    assert [entry(table, row, "chain_sum")["against_full"] for row in ("alps", "random", "full")] == [20, -20, 0]
    assert list(shown.index) == ["vanilla", "full", "no_attn", "random", "alps"]


def test_vanilla_is_never_the_best(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, right_answers(lambda cell, task: 0.9 if cell.run.method == "vanilla" else 0.5))
    table = paper_table(profile, "table1")
    assert not entry(table, "vanilla", "chain_sum")["best"]
    assert table["best"].sum() >= 1


def test_papers_numbers_stand_beside_those_of_the_same_model(tmp_path: Path) -> None:
    families = {"math": {"datasets": ["mathinstruct"], "tasks": ["gsm8k", "hendrycks_math"]}}
    models = [LLAMA, "another/Llama-3.2-1B"]
    profile = small_profile(tmp_path, models=models, families=families, scope="all")
    measure(profile, right_answers(by_method), log_likelihoods=False)
    table = paper_table(profile, "table1")
    printed = paper.paper_table("table1").loc[("Llama-3.2-1B", "alps")]
    for column, name in (("gsm8k", "gsm8k"), ("hendrycks_math", "math"), ("avg", "avg")):
        found = entry(table, "alps", column, LLAMA)
        assert found["reported"] == printed[name]
        assert found["difference"] == pytest.approx(found["mean"] - printed[name])
        assert math.isnan(entry(table, "alps", column, models[1])["reported"])
    shown = paper_layout(table).set_index(["model", "row"])
    assert shown.loc[(LLAMA, "alps"), "gsm8k"].endswith(f" (paper {printed['gsm8k']:.2f})")
    assert "paper" not in shown.loc[(models[1], "alps"), "gsm8k"]
    assert math.isnan(entry(table, "vanilla", "gsm8k", LLAMA)["reported"])


def test_layout_keeps_the_grids_order_and_shows_gaps(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, families=TWO_FAMILIES, models=["z", "a"])
    measure(profile, right_answers(by_method), only=lambda cell: cell.family == "sums" or cell.row == "alps")
    shown = paper_layout(paper_table(profile, "table1"))
    assert list(shown.columns) == ["model", "row", "chain_sum", "gcd", "avg"]
    assert list(shown["model"]) == ["z"] * 4 + ["a"] * 4
    assert list(shown["row"]) == ["vanilla", "full", "random", "alps"] * 2
    assert list(shown["gcd"] == "–") == [True, True, True, False] * 2


def test_row_and_column_of_one_name_keep_their_places(tmp_path: Path) -> None:
    families = {"alps": {"datasets": ["chain_sum", "gcd"]}, "full": {"datasets": ["lcm", "basic_arithmetic"]}}
    profile = small_profile(tmp_path, families=families, tables={"table4": {}})
    measure(profile, right_answers(by_method))
    shown = paper_layout(paper_table(profile, "table4"))
    assert list(shown.columns) == ["model", "row", "alps", "full", "avg"]
    assert list(shown["row"]) == ["full", "random", "alps", "alps_own"]


def test_log_likelihoods_of_right_answers_stand_beneath(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, families=TWO_FAMILIES)
    measure(profile, right_answers(by_method))
    table = paper_table(profile, "table1")
    below = log_likelihoods(table)
    assert list(zip(below["row"], below["column"])) == list(zip(table["row"], table["column"]))
    assert list(below.loc[below["best"], "row"].unique()) == ["alps"]
    markdown = write_paper_table(profile, "table1")[1].read_text()
    above, said, under = markdown.split("\n\n")[1:]
    assert said.startswith("Log-likelihood of the correct answers, nats, where higher is better. ± is half the width")
    heads = [[word.strip() for word in block.splitlines()[0].split("|")] for block in (above, under)]
    assert heads[0] == heads[1] == ["", "model", "row", "chain_sum", "gcd", "avg", ""]
    lines = [[line.split("|")[2].strip() for line in block.splitlines()[2:]] for block in (above, under)]
    assert lines[0] == lines[1] == ["vanilla", "full", "random", "alps"]
    row = next(line for line in under.splitlines() if "| alps" in line)
    assert re.search(r"\| \*\*-1\.\d{3} ± \d\.\d{3}\*\* ↑", row)


def test_no_log_likelihoods_no_second_block(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, right_answers(by_method), log_likelihoods=False)
    assert log_likelihoods(paper_table(profile, "table1")).empty
    assert "Log-likelihood" not in write_paper_table(profile, "table1")[1].read_text()


def test_note_where_there_is_no_interval(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, seeds=[0], knowledge=["prose"], tables={"table5": {}})
    measure(profile, right_answers(by_method))
    table = paper_table(profile, "table5")
    assert table["half_width"].isna().all()
    assert spread_note(table) == (
        "There is no interval: there is only one training seed. prose: loss in nats per token, where lower is better."
    )


# Files.


def test_files_are_the_same_bytes_when_they_are_made_again(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, families=TWO_FAMILIES)
    measure(profile, right_answers(by_method))
    paths = write_paper_table(profile, "table1")
    assert [path.name for path in paths] == ["table1.csv", "table1.md", "table1.tex"]
    first = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert [path.read_bytes() for path in write_paper_table(profile, "table1")] == first
    table = pd.read_csv(paths[0])
    assert list(table.columns) == tables.PAPER_COLUMNS
    table = table.fillna({"records": "", "spread": ""})  # an average has no records of its own
    pd.testing.assert_frame_equal(table, paper_table(profile, "table1"), check_dtype=False)


def test_cells_lead_to_their_records(tmp_path: Path) -> None:
    """One of each training seed, as a link from the Markdown table."""
    profile = small_profile(tmp_path, families=TWO_FAMILIES)
    measure(profile, right_answers(by_method))
    markdown = write_paper_table(profile, "table1")[1]
    line, _ = (line for line in markdown.read_text().splitlines() if line.startswith("| m ") and "| alps" in line)
    row = paper_table(profile, "table1").query("row == 'alps'").set_index("column")
    for cell, column in zip(line.split("|")[3:], row.index):
        links = re.findall(r" \[(\d)\]\(([^)]*)\)", cell)
        names = row.loc[column, "records"].split()
        assert [number for number, _ in links] == [str(i + 1) for i in range(len(names))]
        found = [load_record((markdown.parent / unquote(path)).resolve()).name for _, path in links]
        assert found == names
        assert len(names) == (0 if column == "avg" else 3)


def test_two_versions_of_the_measuring_code_are_not_mixed(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    measure(profile, right_answers(by_method))
    assert len(paper_table(profile, "table1")) == 4
    measure(profile, right_answers(by_method), code="1" * 64, only=lambda cell: cell.row == "alps")
    with pytest.raises(UserError, match=r"come from 2 versions of the measuring code.*remove the older ones"):
        paper_table(profile, "table1")


def test_nothing_measured_yet(tmp_path: Path) -> None:
    profile = small_profile(tmp_path)
    with pytest.raises(UserError, match="No run of table1 is in"):
        write_paper_table(profile, "table1")
    assert not (tmp_path / "tables").exists()


#: What LaTeX takes as it is: words, escaped signs, commands with their arguments, and `&` between cells.
LATEX = re.compile(
    r"\\[_%&#${}]|\\(?:pm|uparrow|downarrow|toprule|midrule|bottomrule|\\)|\\textbf\{|\\begin\{tabular\}\{l+\}|"
    r"\\end\{tabular\}|\\text(?:backslash|asciitilde|asciicircum) |[\w\s.,:/()+*=|<>'\"–-]|[$&}]"
)


def test_latex_is_well_formed(tmp_path: Path) -> None:
    """Whatever a model's folder is called: braces and dollars in pairs, every sign that LaTeX reads escaped."""
    families = {"math": {"datasets": ["mathinstruct"], "tasks": ["gsm8k", "hendrycks_math"]}}
    odd = "/tmp/50%_of #1 & {more} $5 ~x^2\\y"
    profile = small_profile(tmp_path, models=[LLAMA, odd], families=families, scope="all")
    measure(profile, right_answers(by_method))
    text = write_paper_table(profile, "table1")[2].read_text()
    note, body = text.split("\n", 1)
    assert note.startswith("% ")
    rest = LATEX.sub("", body)
    assert not rest, f"LaTeX would stumble over {rest!r}"
    bare = re.sub(r"\\.", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert r"\textbf{" in body
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {4}
    assert len(lines) == 1 + 2 * 4
    assert r"50\%\_of \#1 \& \{more\} \$5 \textasciitilde x\textasciicircum 2\textbackslash y" in body


# Figures.


@pytest.fixture
def drawn(tmp_path: Path) -> Profile:
    profile = small_profile(
        tmp_path,
        models=["someone/small", "someone/large"],
        families={**TWO_FAMILIES, "kin": {"datasets": ["family_relationships"]}},
        tables={"table1": {}, "table3": {}, "table4": {}, "systems_200": {}, "systems_2000": {}},
        methods=["full", "no_attn", "random", "alps"],
    )
    measure(profile, right_answers(lambda cell, task: by_method(cell, task) - 0.1 * (1 - cell.run.ratio)))
    select_heads(profile)
    config = profile.embedding()
    save(profile, config, {name: draws(name).normal(size=(30, 3)).tolist() for name in config.datasets})
    return profile


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_the_same_bytes_when_they_are_drawn_again(drawn: Profile, name: str) -> None:
    assert of_profile(drawn) == list(FIGURES)
    paths = write_figure(drawn, name)
    assert [path.name for path in paths] == [f"{name}.svg", f"{name}.png"]
    first = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    assert [path.read_bytes() for path in write_figure(drawn, name)] == first
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [f"{name}.png", f"{name}.svg"]


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(drawn: Profile, name: str) -> None:
    """No ink at the rim of the picture."""
    pixels = imread(write_figure(drawn, name)[1])[..., :3]
    for rim in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
        assert rim.min() == 1, f"{name} is cut off"


def test_figure4_shows_table3(drawn: Profile) -> None:
    table = paper_table(drawn, "table3")
    panels = FIGURES["figure4"].draw(drawn).axes
    assert [panel.get_title() for panel in panels] == ["small", "large"]
    for panel, model in zip(panels, drawn.models, strict=True):
        lines = {bars.get_label(): bars.lines[0] for bars in panel.containers}
        assert list(lines) == ["chain_sum", "gcd", "family_relationships", "avg"]
        for column, line in lines.items():
            own = table[(table["model"] == model) & (table["column"] == column)]
            assert list(line.get_ydata()) == pytest.approx(list(own["mean"]))
            assert list(line.get_xdata()) == pytest.approx(list(own["row"].astype(float)), abs=1)
        assert list(panel.get_xticks()) == [0, 10, 30, 50, 70, 100]


def test_figure5_counts_the_seeds(drawn: Profile) -> None:
    folder = Path(drawn.results) / "records"
    counted: dict[tuple[str, str], np.ndarray] = {}
    for cell in cells(drawn, "table1"):
        if cell.row == "alps":
            assert isinstance(cell.config.model, FinetuneConfig)
            heads = load_record(record_path(folder, "finetune", cell.config.model.name)).result["heads"]
            own = counted.setdefault((cell.base, cell.family), np.zeros((6, 8)))
            own[tuple(zip(*heads))] += 1
    panels = FIGURES["figure5"].draw(drawn).axes[: len(counted)]
    order = [(model, family) for model in drawn.models for family in drawn.families]
    for panel, place in zip(panels, order, strict=True):
        assert np.array_equal(panel.collections[0].get_array().reshape(6, 8), counted[place])
    assert [panel.get_title() for panel in panels[:3]] == list(drawn.families)


def test_figure6_shows_table4(drawn: Profile) -> None:
    table = paper_table(drawn, "table4")
    for panel, model in zip(FIGURES["figure6"].draw(drawn).axes, drawn.models, strict=True):
        assert [label.get_text() for label in panel.get_xticklabels()] == ["sums", "divisors", "avg"]
        for bars in panel.containers:
            own = table[(table["model"] == model) & (table["row"] == bars.get_label())]
            assert list(bars.lines[0].get_ydata()) == pytest.approx(list(own["mean"]))


def test_figure7_gives_a_family_one_colour(drawn: Profile) -> None:
    """Also where another family has a single data set."""
    (axes,) = FIGURES["figure7"].draw(drawn).axes
    colours = {points.get_label(): tuple(points.get_facecolor()[0][:3]) for points in axes.collections}
    assert colours["chain_sum"] == colours["basic_arithmetic"]
    assert colours["gcd"] == colours["lcm"]
    assert len(set(colours.values())) == 3


def test_figures_before_their_records(tmp_path: Path) -> None:
    profile = small_profile(tmp_path, tables={"table1": {}, "table4": {}}, families=TWO_FAMILIES)
    assert of_profile(profile) == ["figure5", "figure6", "figure7"]
    with pytest.raises(UserError, match="No run of alps is among the records yet"):
        write_figure(profile, "figure5")
    with pytest.raises(UserError, match="No run of table4"):
        write_figure(profile, "figure6")
    with pytest.raises(UserError, match="have not been embedded yet"):
        write_figure(profile, "figure7")
    with pytest.raises(UserError, match="There is no figure of this profile 'figure4'"):
        write_figure(profile, "figure4")


def test_one_seed_and_one_task(tmp_path: Path) -> None:
    """The smallest profile has its figures, too."""
    profile = small_profile(tmp_path, seeds=[0], tables={"table1": {}, "table3": {}})
    measure(profile, right_answers(by_method))
    select_heads(profile)
    for name in of_profile(profile):
        assert all(path.stat().st_size > 5000 for path in write_figure(profile, name))


def test_many_training_curves_are_a_median_for_each_method(tmp_path: Path) -> None:
    from alps_repro.experiments.records import load_records

    profile = small_profile(tmp_path, seeds=list(range(6)))
    for cell in cells(profile, "table1"):
        if isinstance(cell.config.model, FinetuneConfig):
            seed = cell.config.model.seed
            save(profile, cell.config.model, {"heads": [], "losses": [seed + 0.0, seed - 0.5, seed - 1.0]})
    figure = figures.loss_curves(load_records(tmp_path / "records", "finetune"))
    assert [axes.get_title() for axes in figure.axes] == ["chain_sum"]
    assert [line.get_ydata().tolist() for line in figure.axes[0].get_lines()] == [[2.5, 2.0, 1.5]] * 3
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == [f"{method} (scope heads): 6 runs" for method in ("alps", "full", "random")]


def test_every_table_of_the_papers_profile_is_written(tmp_path: Path) -> None:
    """All of them from records, with the paper's numbers beside."""
    profile = Profile.load("paper", results=str(tmp_path), seeds=(0,))
    measure(profile, right_answers(lambda cell, task: 0.3 + 0.4 * draws(cell.config.name).uniform(), 50))
    for table in profile.tables:
        paths = write_paper_table(profile, table)
        long = pd.read_csv(paths[0])
        reported = tables._reported(table)
        assert long["reported"].notna().sum() == len(reported)
        assert (long["mean"].between(0, 100)).all()
        assert f"**{TABLES[table].title}.**" in paths[1].read_text()
