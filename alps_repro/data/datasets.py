"""Training examples: the paper's six data sets from the hub, and offline ones made by `reasoning-gym`.

Every data set becomes rows of `instruction` and `response`; `PROMPT` makes the prompt of an instruction.
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError, one_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubDataset:
    """One of the paper's data sets.

    Attributes:
        hub_id: on the hub.
        split: for training.
        columns: those that are used, in the order in which `convert` takes them.
        convert: makes (instruction, response) of a row's columns.
        ignored: columns without further information.
    """

    hub_id: str
    split: str
    columns: tuple[str, ...]
    convert: Callable[..., tuple[str, str]]
    ignored: tuple[str, ...] = ()


def _plain(instruction: str, response: str) -> tuple[str, str]:
    return instruction, response


def _with_input(instruction: str, input: str | None, output: str) -> tuple[str, str]:
    # The paper's template has no input field: the input, if there is one, follows the instruction.
    return (instruction + "\n\n" + input if input else instruction), output


def _first_turn(messages: list[dict[str, str]]) -> tuple[str, str]:
    # The first user turn and the answer to it; the paper does not state how later turns were used.
    turns: dict[str, str] = {}
    for message in messages:
        turns.setdefault(message["role"], message["content"])
    return turns["user"], turns["assistant"]


_ALPACA_COLUMNS = ("instruction", "input", "output")

#: The paper's data sets by the names used here (ALPS, section 4.1).
HUB: dict[str, HubDataset] = {
    "ultrachat": HubDataset(
        "HuggingFaceH4/ultrachat_200k", "train_sft", ("messages",), _first_turn, ("prompt", "prompt_id")
    ),
    "alpaca": HubDataset("tatsu-lab/alpaca", "train", _ALPACA_COLUMNS, _with_input, ("text",)),
    "mathinstruct": HubDataset("TIGER-Lab/MathInstruct", "train", ("instruction", "output"), _plain, ("source",)),
    "camel_math": HubDataset(
        "camel-ai/math", "train", ("message_1", "message_2"), _plain, ("role_1", "topic", "topic;", "sub_topic")
    ),
    "magicoder": HubDataset("ise-uiuc/Magicoder-Evol-Instruct-110K", "train", ("instruction", "response"), _plain),
    "codealpaca": HubDataset("sahil2801/CodeAlpaca-20k", "train", _ALPACA_COLUMNS, _with_input),
}


@dataclass(frozen=True)
class OfflineDataset:
    """A `reasoning-gym` generator with one right answer per question; its lm-eval task has the same name.

    Attributes:
        generator: its name in reasoning-gym.
        config: its settings.
        answer: pattern of an answer, ignoring case; the last match in a model's output is graded.
    """

    generator: str
    config: dict[str, Any]
    answer: str


_RELATION = (
    r"\b((?:grand)?(?:father|mother|son|daughter)(?:-in-law)?"
    r"|husband|wife|brother|sister|uncle|aunt|nephew|niece|cousin)\b"
)
_NUMBER = r"(-?[0-9]+)"
_WORDS = r"([\w'-]+(?:, *[\w'-]+)*)\W*$"
_TWO_TERMS = {
    "min_terms": 2,
    "max_terms": 2,
    "max_digits": 2,
    "operators": ["+", "-"],
    "allow_parentheses": False,
    "allow_negation": False,
}

OFFLINE: dict[str, OfflineDataset] = {
    "family_relationships": OfflineDataset("family_relationships", {"max_family_size": 6}, _RELATION),
    "large_families": OfflineDataset("family_relationships", {"min_family_size": 7, "max_family_size": 8}, _RELATION),
    "chain_sum": OfflineDataset("chain_sum", {"min_terms": 2, "max_terms": 3, "max_digits": 2}, _NUMBER),
    "short_chain_sum": OfflineDataset("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 2}, _NUMBER),
    "basic_arithmetic": OfflineDataset("basic_arithmetic", _TWO_TERMS, _NUMBER),
    "gcd": OfflineDataset("gcd", {"max_value": 100}, _NUMBER),
    "lcm": OfflineDataset("lcm", {"max_value": 60}, _NUMBER),
    "short_word_reversal": OfflineDataset("word_sequence_reversal", {"min_words": 2, "max_words": 3}, _WORDS),
    "word_reversal": OfflineDataset("word_sequence_reversal", {"min_words": 4, "max_words": 5}, _WORDS),
    "long_word_reversal": OfflineDataset("word_sequence_reversal", {"min_words": 6, "max_words": 7}, _WORDS),
    "spell_backward": OfflineDataset("spell_backward", {"max_word_len": 5}, r"([a-z]+)\W*$"),
}

#: Every data set that can be trained on.
DATASETS = {**HUB, **OFFLINE}

#: Number of questions in an offline data set's test and validation splits.
TEST_SIZE = VALIDATION_SIZE = 500
DEFAULT_TRAIN_SIZE = 10_000

# reasoning-gym makes question i of seed s with Random(s + i), so nearby seeds share questions: each split gets a range
# of seeds of its own.
_TEST_SEED, _VALIDATION_SEED, _TRAIN_SEED, _STRETCH = 0, 1_000_000, 10_000_000, 10_000_000

#: Draws per question after which a generator is considered to have too few different ones.
_TRIES = 200


def _questions(dataset: OfflineDataset, seed: int, forbidden: set[str]) -> Iterator[dict[str, str]]:
    import reasoning_gym

    for item in reasoning_gym.create_dataset(dataset.generator, size=_STRETCH, seed=seed, **dataset.config):
        if item["question"] not in forbidden:
            yield {"instruction": item["question"].strip(), "response": item["answer"], "question": item["question"]}


def _take(questions: Iterator[dict[str, str]], size: int, seen: set[str], unique: bool) -> list[dict[str, str]]:
    taken: list[dict[str, str]] = []
    for tried, item in enumerate(questions):
        if len(taken) == size:
            break
        if tried > _TRIES * (size + 1):
            raise UserError(
                f"After {tried} draws there were {len(taken)} different questions of {size}: give the generator of "
                "this data set a wider configuration."
            )
        if unique and item["question"] in seen:
            continue
        if unique:
            seen.add(item["question"])
        taken.append({"instruction": item["instruction"], "response": item["response"]})
    return taken


def offline_splits(name: str, *, train_size: int = 0, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The `train`, `validation` and `test` questions of an offline data set; no question is in two splits.

    Args:
        name: of `OFFLINE`.
        train_size: number of training questions.
        seed: of the training questions; validation and test are always the same.
    """
    one_of("offline data set", name, OFFLINE)
    dataset = OFFLINE[name]
    held_out: set[str] = set()
    splits = {
        "test": _take(_questions(dataset, _TEST_SEED, set()), TEST_SIZE, held_out, unique=True),
        "validation": _take(_questions(dataset, _VALIDATION_SEED, set()), VALIDATION_SIZE, held_out, unique=True),
    }
    start = _TRAIN_SEED + _STRETCH * seed
    splits["train"] = _take(_questions(dataset, start, held_out), train_size, held_out, unique=False)
    return splits


def _rows(wanted: HubDataset, source: str | Path | None) -> Dataset:
    from datasets import load_dataset

    if source is None:
        return load_dataset(wanted.hub_id, split=wanted.split)
    folder, files = Path(source).absolute(), f"{wanted.split}.*"
    if folder.is_file():
        folder, files = folder.parent, folder.name
    elif not any(folder.glob(files)):
        return load_dataset(str(folder), split=wanted.split)
    # By default, `datasets` would name the split of `train_sft.jsonl` `train`.
    return load_dataset(str(folder), data_files={wanted.split: files}, split=wanted.split)


def training_examples(
    name: str, *, size: int | None = None, seed: int = 0, source: str | Path | None = None
) -> Dataset:
    """The training examples of a data set, as columns `instruction` and `response`.

    Args:
        name: of `DATASETS`.
        size: number of examples; by default all of a hub data set, or 10,000 of an offline one.
        seed: of an offline data set's questions, or of the sample of `size` examples of a hub one.
        source: a local copy in place of the hub: one file (JSON, JSON lines, Parquet, CSV), or a folder. In a folder,
            files named after the split (`train_sft.jsonl`) are used; without any, it is read as a copy of the hub's
            repository (`data/train_sft-00000-of-00001.parquet` and so on).

    Raises:
        UserError: unknown name, no network, no readable local copy, or columns other than expected. No columns are
            dropped except those that `HUB` names.
    """
    from datasets import Dataset

    check_dataset(name)
    if size is not None and size < 1:
        raise UserError(f"A size of {size} takes no examples: give 1 or more, or leave it out.")
    if name in OFFLINE:
        size = DEFAULT_TRAIN_SIZE if size is None else size
        return Dataset.from_list(offline_splits(name, train_size=size, seed=seed)["train"])
    rows = _hub_rows(name, source)
    if size is not None and size < len(rows):
        rows = rows.shuffle(seed=seed).select(range(size))
    wanted = HUB[name]

    def convert(row: dict[str, Any]) -> dict[str, str]:
        try:
            instruction, response = wanted.convert(*(row[column] for column in wanted.columns))
            return {"instruction": instruction.strip(), "response": response.strip()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"A row of the data set '{name}' is not as expected ({reprlib.repr(row)}): its "
                f"'{', '.join(wanted.columns)}' must hold text for an instruction and its response."
            ) from error

    return rows.map(convert, remove_columns=rows.column_names, desc=f"reading {name}")


def _hub_rows(name: str, source: str | Path | None) -> Dataset:
    """The rows of a hub data set, with the columns that `HUB` names and no others."""
    wanted = HUB[name]
    try:
        rows = _rows(wanted, source)
    except Exception as error:  # hub, network and file errors have no common base class
        where = f"'{source}'" if source is not None else f"the hub ('{wanted.hub_id}')"
        what = (
            f"give a file or folder that holds its split '{wanted.split}'"
            if source is not None
            else f"check the connection, or use one that needs none: {', '.join(OFFLINE)}"
        )
        raise UserError(
            f"The data set '{name}' could not be loaded from {where}: {type(error).__name__}; {what}."
        ) from error
    missing = set(wanted.columns) - set(rows.column_names)
    if missing:
        raise UserError(
            f"The data set '{name}' has columns {rows.column_names}, but '{', '.join(sorted(missing))}' is expected: "
            "is it another version?"
        )
    unknown = [column for column in rows.column_names if column not in (*wanted.columns, *wanted.ignored)]
    if unknown:
        raise UserError(
            f"The data set '{name}' has a column '{unknown[0]}' that would not be used: is it another version? Give a "
            f"copy with {', '.join(wanted.columns)} alone."
        )
    return rows


#: File endings and the names of their formats in `datasets.load_dataset`.
_KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def check_dataset(name: str) -> str:
    """`name`, or `UserError` if it is not in `DATASETS`; for a file, the error says how to read its rows."""
    path = Path(name)
    kind = _KINDS.get(path.suffix.lower())
    if name not in DATASETS and (kind or os.path.exists(name)):
        how = f"datasets.load_dataset('{kind}', data_files='{path}', split='train')" if kind else "datasets"
        raise UserError(
            f"'{path}' is a file or folder, not the name of a data set: read it with {how}, and pass its rows to "
            "alps_repro.finetune."
        )
    return one_of("data set", name, DATASETS)


#: Columns of a user's rows: instruction and response, and at most one that follows the instruction.
_OWN, _AFTER = ("instruction", "response"), ("input", "context")


def own_examples(rows: Any) -> Dataset:
    """A user's rows as training examples: columns `instruction` and `response`, both text.

    Args:
        rows: a `datasets.Dataset` or a list of dicts, with `instruction` and `response`, and at most one of `input` and
            `context`, which follows the instruction after an empty line if there is any, as in Alpaca. Numbers are
            converted to text. Every other column is refused, since it would not be used.

    Raises:
        UserError: names the column, or the row by its number, and says what to do.
    """
    from datasets import Dataset, Features, Value

    columns = _own_columns(rows)
    after = _after(columns)

    def example(row: Mapping[str, Any], number: int) -> dict[str, str]:
        instruction, response = (_text(row, column, number) for column in _OWN)
        follows = _text(row, after, number, optional=True) if after else ""
        return {"instruction": f"{instruction}\n\n{follows}" if follows.strip() else instruction, "response": response}

    features = Features({column: Value("string") for column in _OWN})
    if not isinstance(rows, Dataset):
        return Dataset.from_list([example(row, i) for i, row in enumerate(rows)], features=features)
    plain = rows.with_format(None)
    return plain.map(example, with_indices=True, remove_columns=columns, features=features, desc="reading rows")


def _own_columns(rows: Any) -> list[str]:
    """The columns of a user's rows; `UserError` if they are of another kind, or there are none."""
    from datasets import Dataset, IterableDataset

    if isinstance(rows, (str, Path)):
        check_dataset(str(rows))
    if isinstance(rows, IterableDataset):
        raise UserError(
            "A streamed data set cannot be counted or shuffled before training: take rows of it as a list, such as "
            "list(rows.take(1000)), or load it without streaming."
        )
    if isinstance(rows, Mapping):
        raise UserError(
            f"The training examples are a {type(rows).__name__} of {', '.join(map(str, rows)) or 'nothing'}: choose "
            "one split, such as rows['train'], or make it a data set with datasets.Dataset.from_dict."
        )
    if isinstance(rows, Dataset):
        columns = rows.column_names
    elif isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows):
        columns = list(dict.fromkeys(column for row in rows for column in row))
    else:
        raise UserError(
            f"The training examples are a {type(rows).__name__}: give a datasets.Dataset, or a list of dicts with "
            "instruction and response."
        )
    if not len(rows):
        raise UserError("There are no training examples: give at least one row of instruction and response.")
    return columns


def _after(columns: list[str]) -> str | None:
    """The column that follows the instruction, if any; `UserError` for columns that are missing or not used."""
    for column in _OWN:
        if column not in columns:
            raise UserError(
                f"The training examples lack the column '{column}' among {', '.join(map(str, columns))}: give rows of "
                "instruction and response (dataset.rename_column renames a column)."
            )
    after = [column for column in _AFTER if column in columns]
    unused = [column for column in columns if column not in (*_OWN, *after)]
    if unused or len(after) > 1:
        raise UserError(
            f"The column '{unused[0] if unused else after[1]}' of the training examples would not be used: join it to "
            "the instruction, or leave it out (dataset.remove_columns)."
        )
    return after[0] if after else None


def _text(row: Mapping[str, Any], column: str, number: int, optional: bool = False) -> str:
    """A row's text in a column; numbers are converted. optional: a missing value is an empty text."""
    value = row.get(column)
    if value is None or (isinstance(value, Real) and value != value):  # NaN is pandas' missing value
        if optional:
            return ""
        raise UserError(f"Row {number} (counted from 0) has no {column}: fill it in, or leave the row out.")
    if isinstance(value, (Real, Decimal)):
        return str(value)
    if not isinstance(value, str):
        raise UserError(
            f"The {column} of row {number} (counted from 0) is a {type(value).__name__}, not a text: make it one, or "
            "leave the row out."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The {column} of row {number} (counted from 0) holds half a character ({error.object[error.start]!a}): "
            "read its source as UTF-8 again, or leave the row out."
        ) from None
    return value


def data_hash(examples: Dataset) -> str:
    """SHA-256 over the examples in their order."""
    digest = hashlib.sha256()
    for row in examples:
        digest.update(json.dumps([row["instruction"], row["response"]]).encode() + b"\n")
    return digest.hexdigest()
