"""Data sets: offline splits that cannot leak, hub data sets converted from files of their own shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from alps_repro.data import datasets as data
from alps_repro.data.datasets import DATASETS, HUB, OFFLINE, TEST_SIZE, VALIDATION_SIZE, data_hash, offline_splits
from alps_repro.data.datasets import training_examples as examples
from alps_repro.errors import UserError

FILES = Path(__file__).parent / "files"


def questions(rows: list[dict[str, str]]) -> set[str]:
    return {row["instruction"] for row in rows}


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_splits_share_no_question(name: str) -> None:
    fixed = offline_splits(name)
    assert len(questions(fixed["test"])) == TEST_SIZE, "every test question is there once"
    assert len(questions(fixed["validation"])) == VALIDATION_SIZE
    assert not questions(fixed["test"]) & questions(fixed["validation"])
    assert fixed["train"] == []
    held_out = questions(fixed["test"]) | questions(fixed["validation"])
    drawn = []
    for seed in (0, 1, 7, 123):
        splits = offline_splits(name, train_size=2000, seed=seed)
        assert splits["test"] == fixed["test"]
        assert splits["validation"] == fixed["validation"]
        assert len(splits["train"]) == 2000
        assert not questions(splits["train"]) & held_out
        drawn.append(splits["train"])
    for i, one in enumerate(drawn):
        for other in drawn[i + 1 :]:
            assert one != other
            # A seed that merely reordered the same questions would measure no spread over training sets.
            assert len(questions(one) - questions(other)) > 100


@pytest.mark.parametrize("name", OFFLINE)
def test_offline_training_questions_are_the_seeds(name: str) -> None:
    first = examples(name, size=64, seed=3)
    assert first.column_names == ["instruction", "response"]
    assert first.to_list() == examples(name, size=64, seed=3).to_list()
    # More examples of the same seed begin with the same ones: a longer run sees what a shorter one saw.
    assert examples(name, size=80, seed=3).to_list()[:64] == first.to_list()
    assert all(row["instruction"] and row["response"] for row in first)


def test_offline_answers_are_right() -> None:
    for row in offline_splits("chain_sum")["test"]:
        question = row["instruction"].removeprefix("State the final answer to the following arithmetic problem:")
        assert eval(question.removesuffix("=")) == int(row["response"])
    for row in offline_splits("spell_backward")["test"]:
        word = row["instruction"].rsplit(" ", 1)[1]
        assert word[::-1] == row["response"]


#: What the small files of the hub's shape must become.
CONVERTED = {
    "ultrachat": [("Name a gold symbol.", "Au"), ("Say hello.", "Hello.")],
    "alpaca": [("Name the capital.\n\nFrance", "Paris"), ("Count to three.", "1 2 3")],
    "codealpaca": [("Name the capital.\n\nFrance", "Paris"), ("Count to three.", "1 2 3")],
    "mathinstruct": [
        ("What is 2 + 2?", "The answer is 4"),
        ("What is 3 times 3? Write a program.", "print(3 * 3)"),
    ],
    "camel_math": [("Solve x + 1 = 3.", "x = 2."), ("Differentiate x^2.", "2x.")],
    "magicoder": [
        ("Write a function that adds.", "def add(a, b):\n    return a + b"),
        ("Print hello.", "print('hello')"),
    ],
}


def pairs(rows: Dataset) -> list[tuple[str, str]]:
    assert rows.column_names == ["instruction", "response"]
    return [(row["instruction"], row["response"]) for row in rows]


def test_every_hub_data_set_is_tried() -> None:
    assert CONVERTED.keys() == HUB.keys()
    assert set(DATASETS) == {*HUB, *OFFLINE}


@pytest.mark.parametrize("name", HUB)
def test_hub_data_set_from_a_file(name: str) -> None:
    """The first turn of a conversation, the input after the instruction, nothing else of the row."""
    assert pairs(examples(name, source=FILES / f"{name}.jsonl")) == CONVERTED[name]


@pytest.mark.parametrize("place", ["{split}.jsonl", "data/{split}-00000-of-00001.jsonl"])
@pytest.mark.parametrize("name", ["ultrachat", "alpaca"])
def test_hub_data_set_from_a_folder(name: str, place: str, tmp_path: Path) -> None:
    split, lines = HUB[name].split, (FILES / f"{name}.jsonl").read_text()
    # The other split holds the last row only, so that taking it, or both, would show.
    for which, rows in ((split, lines), (split.replace("train", "test"), lines.splitlines()[-1])):
        file = tmp_path / place.format(split=which)
        file.parent.mkdir(exist_ok=True)
        file.write_text(rows)
    assert pairs(examples(name, source=tmp_path)) == CONVERTED[name]


def test_hub_data_set_from_other_file_kinds(tmp_path: Path) -> None:
    rows = load_dataset("json", data_files={"train": str(FILES / "alpaca.jsonl")}, split="train")
    rows.to_parquet(tmp_path / "alpaca.parquet")
    rows.to_csv(tmp_path / "alpaca.csv")
    (tmp_path / "alpaca.json").write_text(json.dumps(rows.to_list()))
    # CSV gives an empty input back as null; it is left out like an empty one.
    for suffix in ("parquet", "csv", "json"):
        assert pairs(examples("alpaca", source=tmp_path / f"alpaca.{suffix}")) == CONVERTED["alpaca"]


def test_hub_data_set_of_a_size(tmp_path: Path) -> None:
    rows = [{"instruction": f"question {i}", "response": str(i)} for i in range(50)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {seed: examples("magicoder", size=20, seed=seed, source=file).to_list() for seed in (0, 1)}
    assert drawn[0] == examples("magicoder", size=20, seed=0, source=file).to_list()
    assert drawn[0] != drawn[1]
    for one in drawn.values():
        assert len({row["instruction"] for row in one}) == 20, "drawn without replacement"
    assert examples("magicoder", size=99, source=file).to_list() == rows, "no more than there are"
    assert examples("magicoder", source=file).to_list() == rows


@pytest.mark.parametrize("name", HUB)
def test_missing_column_is_named(name: str, tmp_path: Path) -> None:
    lacking = HUB[name].columns[-1]
    rows = [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text().splitlines()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != lacking}) + "\n" for row in rows))
    with pytest.raises(UserError, match=f"'{name}'.*'{lacking}' is expected"):
        examples(name, source=file)


@pytest.mark.parametrize("name", HUB)
def test_without_network_one_sentence_says_what_to_do(name: str) -> None:
    with pytest.raises(UserError) as caught:
        examples(name)
    text = str(caught.value)
    assert "\n" not in text
    assert HUB[name].hub_id in text
    assert "check the connection" in text
    assert "family_relationships" in text, "it names a data set that needs no network"


@pytest.mark.parametrize("content", [None, "folder", "{broken"])
def test_unreadable_local_copy(content: str | None, tmp_path: Path) -> None:
    source = tmp_path / "copy"
    if content == "folder":
        source.mkdir()
    elif content:
        source = tmp_path / "copy.jsonl"
        source.write_text(content)
    with pytest.raises(UserError, match=r"'alpaca'.*copy.*'train'") as caught:
        examples("alpaca", source=source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("alpacca", "alpaca"), ("chainsum", "chain_sum"), ("math_instruct", "mathinstruct"), ("ultra", "ultrachat")],
)
def test_unknown_name_gets_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"no data set '{wrong}'.*'{right}'"):
        examples(wrong)


def test_hash_is_over_content_and_order(tmp_path: Path) -> None:
    rows = examples("chain_sum", size=8)
    digest = data_hash(rows)
    assert len(digest) == 64
    assert digest == data_hash(examples("chain_sum", size=8))
    listed = rows.to_list()
    changed = [
        listed[::-1],
        listed[:-1],
        [*listed[:-1], {**listed[-1], "response": listed[-1]["response"] + " "}],
        [*listed[:-1], {**listed[-1], "instruction": listed[-1]["instruction"] + " "}],
        # Text that moves from one column to the other must not look the same.
        [*listed[:-1], {"instruction": listed[-1]["instruction"] + listed[-1]["response"], "response": ""}],
    ]
    digests = {data_hash(Dataset.from_list(other)) for other in changed}
    assert len(digests) == len(changed)
    assert digest not in digests


def test_hash_does_not_depend_on_where_the_copy_lies(tmp_path: Path) -> None:
    copy = shutil.copy(FILES / "alpaca.jsonl", tmp_path / "elsewhere.jsonl")
    assert data_hash(examples("alpaca", source=copy)) == data_hash(examples("alpaca", source=FILES / "alpaca.jsonl"))


def test_generator_with_too_few_questions_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_TRIES", 3)
    monkeypatch.setitem(OFFLINE, "few", data.OfflineDataset("lcm", {"max_value": 6}, r"(-?[0-9]+)"))
    with pytest.raises(UserError, match="different questions of 500: give the generator of this data set a wider"):
        offline_splits("few")
