"""Text that people bring to training and evaluation: rows of every shape, tokenizers of every habit, long prompts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from brought import brought
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from tiny_models import tiny_checkpoint, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alps_repro import Recipe, evaluate, finetune
from alps_repro.data.datasets import own_examples, training_examples
from alps_repro.data.prompts import PROMPT, check_rows, longest, positions, said_lost, tokenize, tokenize_and_count
from alps_repro.errors import UserError
from alps_repro.evaluation.benchmarks import check_limit
from alps_repro.evaluation.tasks.offline import PromptedLM
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.profile import Profile
from alps_repro.localization.selectors import batches
from alps_repro.models.embeddings import embed

ROW = {"instruction": "what is red", "response": "cat"}


def rows_of(*others: Any, **columns: Any) -> list[dict[str, Any]]:
    """A whole row, and one more that is as said."""
    return [ROW, {**ROW, **columns}, *others]


# Training rows

REFUSED_ROWS = [
    brought(
        "Training rows", "a row without a response", "Row 1 (counted from 0) has no response", rows_of(response=None)
    ),
    brought(
        "Training rows",
        "a data set with an instruction that is null",
        "Row 1 (counted from 0) has no instruction",
        Dataset.from_list(rows_of(instruction=None)),
    ),
    brought(
        "Training rows",
        "a response that is NaN, as pandas has it",
        "Row 1 (counted from 0) has no response",
        rows_of(response=float("nan")),
    ),
    brought(
        "Training rows",
        "dicts of which one lacks a key",
        "Row 2 (counted from 0) has no response",
        rows_of({"instruction": "a"}),
    ),
    brought(
        "Training rows",
        "a response that is a list",
        "The response of row 1 (counted from 0) is a list",
        rows_of(response=["cat"]),
    ),
    brought(
        "Training rows",
        "an instruction in bytes",
        "The instruction of row 1 (counted from 0) is a bytes",
        rows_of(instruction=b"a"),
    ),
    brought(
        "Training rows",
        "half of a surrogate pair",
        "The response of row 1 (counted from 0) holds half a character ('\\ud83d')",
        rows_of(response="\ud83d"),
    ),
    brought(
        "Training rows",
        "a fourth column",
        "The column 'category' of the training examples would not be used",
        rows_of(category="open"),
    ),
    brought(
        "Training rows",
        "both an input and a context",
        "The column 'context' of the training examples would not be used",
        rows_of(input="a", context="b"),
    ),
    brought(
        "Training rows",
        "Alpaca's columns",
        "The training examples lack the column 'response'",
        [{"instruction": "a", "input": "", "output": "b"}],
    ),
    brought("Training rows", "no rows", "There are no training examples", []),
    brought(
        "Training rows", "columns by name, without rows", "choose one split", {"instruction": ["a"], "response": ["b"]}
    ),
    brought(
        "Training rows",
        "all splits at once",
        "choose one split, such as rows['train']",
        DatasetDict({"train": Dataset.from_list([ROW])}),
    ),
    brought(
        "Training rows",
        "a streamed data set",
        "take rows of it as a list",
        Dataset.from_list([ROW]).to_iterable_dataset(),
    ),
    brought("Training rows", "a generator", "The training examples are a generator", (row for row in [ROW])),
    brought("Training rows", "texts without columns", "The training examples are a list", ["a", "b"]),
    brought("Training rows", "the path of a JSON lines file", "datasets.load_dataset('json'", "rows/my.jsonl"),
    brought("Training rows", "a Path to a CSV file", "datasets.load_dataset('csv'", Path("my.csv")),
    brought("Training rows", "a folder", "is a file or folder, not the name of a data set", Path(__file__).parent),
    brought("Training rows", "a mistyped name", "did you mean 'chain_sum'?", "chain_sums"),
]


@pytest.mark.parametrize(("rows", "happens"), REFUSED_ROWS)
def test_rows_that_are_refused(rows: Any, happens: str, tmp_path: Path) -> None:
    """By `finetune`, before it looks for the model."""
    with pytest.raises(UserError) as caught:
        finetune("nowhere", rows, tmp_path / "out", method="random")
    assert happens in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


TAKEN_ROWS = [
    brought("Training rows", "a list of dicts", "taken as a data set", [ROW], [("what is red", "cat")]),
    brought(
        "Training rows",
        "whole numbers as responses",
        "written out",
        Dataset.from_list([{"instruction": "1+1", "response": 2}]),
        [("1+1", "2")],
    ),
    brought(
        "Training rows",
        "numbers of other kinds",
        "written out",
        [{"instruction": Decimal("1.50"), "response": 0.5}, {"instruction": np.int64(7), "response": "b"}],
        [("1.50", "0.5"), ("7", "b")],
    ),
    brought(
        "Training rows",
        "a context, empty in places",
        "follows the instruction after an empty line, where there is one",
        [{**ROW, "context": "the cat is"}, {**ROW, "context": ""}, {**ROW, "context": None}, ROW],
        [("what is red\n\nthe cat is", "cat"), *[("what is red", "cat")] * 3],
    ),
    brought(
        "Training rows",
        "an input that is a number",
        "follows the instruction after an empty line, where there is one",
        Dataset.from_list([{**ROW, "input": None}, {**ROW, "input": 5}]),
        [("what is red", "cat"), ("what is red\n\n5", "cat")],
    ),
    brought(
        "Training rows",
        "braces, line ends of Windows and white space around a text",
        "left as they are",
        [{"instruction": "{x} {{ y }}\r\nz ", "response": " {0}\r\n"}],
        [("{x} {{ y }}\r\nz ", " {0}\r\n")],
    ),
    brought(
        "Training rows",
        "a data set in the format of torch",
        "read as text",
        Dataset.from_list([{"instruction": "1+1", "response": 2}]).with_format("torch"),
        [("1+1", "2")],
    ),
]


@pytest.mark.parametrize(("rows", "expected", "happens"), TAKEN_ROWS)
def test_rows_that_are_taken(rows: Any, expected: list[tuple[str, str]], happens: str) -> None:
    found = own_examples(rows)
    assert found.column_names == ["instruction", "response"]
    assert [(row["instruction"], row["response"]) for row in found] == expected
    tokenizer = tiny_tokenizer()
    encoded = tokenize(found, tokenizer, 2048)
    for row, (instruction, response) in zip(encoded, expected, strict=True):
        prompt = tokenizer(PROMPT.replace("{instruction}", instruction)).input_ids
        assert row["input_ids"] == [*prompt, *tokenizer(response).input_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("name", "columns", "happens"),
    [
        brought(
            "Training rows",
            "a copy of CodeAlpaca with one more column",
            "has a column 'context' that would not be used",
            "codealpaca",
            {"instruction": "a", "input": "", "output": "b", "context": "c"},
        ),
        brought(
            "Training rows",
            "a copy of MathInstruct with an input",
            "has a column 'input' that would not be used",
            "mathinstruct",
            {"instruction": "a", "output": "b", "input": "c", "source": "d"},
        ),
        brought(
            "Training rows",
            "a copy of Alpaca with a missing instruction",
            "must hold text for an instruction and its response",
            "alpaca",
            {"instruction": None, "input": "c", "output": "b", "text": "d"},
        ),
    ],
)
def test_copies_of_named_data_sets(name: str, columns: dict[str, Any], happens: str, tmp_path: Path) -> None:
    Dataset.from_list([columns]).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(UserError) as caught:
        training_examples(name, source=tmp_path / "rows.jsonl")
    assert happens in str(caught.value)


def test_data_set_of_a_configuration_is_no_file() -> None:
    with pytest.raises(UserError, match=r"is a file or folder.*pass its rows to alps_repro\.finetune"):
        FinetuneConfig.check(base="m", dataset="mine.jsonl", method="full")


PREFIX = len(tiny_tokenizer()(PROMPT.format(instruction="")).input_ids)
WHOLE = [{"instruction": "a", "response": "b"}] * 19

LOST = [
    brought(
        "Training rows",
        "one row of twenty that is too long",
        "cut, counted and said by a warning",
        {"instruction": "a", "response": "b" * 50},
        {"given": 20, "used": 20, "cut": 1, "dropped": 0, "empty": 0, "special": 0},
        "of 20 rows, 1 cut at {max_length} tokens",
    ),
    brought(
        "Training rows",
        "one row of twenty whose prompt leaves no room for an answer",
        "dropped, counted and said by a warning",
        {"instruction": "a" * 50, "response": "b"},
        {"given": 20, "used": 19, "cut": 0, "dropped": 1, "empty": 0, "special": 0},
        "of 20 rows, 1 dropped, their prompts leaving no room for an answer in {max_length} tokens",
    ),
    brought(
        "Training rows",
        "one row of twenty whose response is white space",
        "trained on, counted and said by a warning",
        {"instruction": "a", "response": " \n"},
        {"given": 20, "used": 20, "cut": 0, "dropped": 0, "empty": 1, "special": 0},
        "of 20 rows, 1 without an instruction or without a response",
    ),
    brought(
        "Training rows",
        "an end token spelled out in a row",
        "read as text, and said by a warning",
        {"instruction": "a</s>b", "response": "<s>"},
        {"given": 20, "used": 20, "cut": 0, "dropped": 0, "empty": 0, "special": 1},
        "1 of the training examples spell out special tokens",
    ),
]


@pytest.mark.parametrize(("row", "counts", "said", "happens"), LOST)
def test_rows_that_lose_text(row: dict[str, str], counts: dict[str, int], said: str, happens: str) -> None:
    max_length, tokenizer = PREFIX + 10, tiny_tokenizer()
    kept, rows = tokenize_and_count(Dataset.from_list([*WHOLE, row]), tokenizer, max_length)
    assert rows == {**counts, "max_length": max_length}
    assert len(kept) == rows["used"]
    with pytest.warns(UserWarning, match=re.escape(said.format(max_length=max_length))):
        check_rows(rows, 0.05)
    for ids, start in zip(kept["input_ids"], kept["prompt_length"], strict=True):
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[:start])
    # One more of twenty is too many, unless one says so.
    rows = {name: 2 * number if name in ("cut", "dropped", "empty") else number for name, number in rows.items()}
    if lost := said_lost(rows):
        with pytest.raises(UserError) as refused:
            check_rows(rows, 0.05)
        assert lost in str(refused.value)
        assert "set max_lost to 1 to go on" in str(refused.value)
        with pytest.warns(UserWarning, match="lose text"):
            check_rows(rows, 1)


def test_whole_rows_are_passed_over_in_silence() -> None:
    _, rows = tokenize_and_count(Dataset.from_list(WHOLE), tiny_tokenizer(), 2048)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_rows(rows, 0)
    assert said_lost(rows) == ""


@pytest.mark.parametrize(
    ("name", "settings", "happens"),
    [
        brought("Training rows", "rows longer than GPT-2's positions", "cut at them", "gpt2", {"n_positions": 256}),
        brought(
            "Training rows", "rows longer than OPT's positions", "cut at them", "opt", {"max_position_embeddings": 256}
        ),
        brought(
            "Training rows",
            "rows longer than a rotary model's positions",
            "cut at them",
            "llama",
            {"max_position_embeddings": 256},
        ),
    ],
)
def test_rows_longer_than_the_model(name: str, settings: dict[str, int], happens: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", name, **settings)
    rows = [{"instruction": "a", "response": "b" * 300}, {"instruction": "a", "response": "b"}]
    recipe = {"max_steps": 1, "batch_size": 2, "micro_batch_size": 2}
    asked = {"method": "random", "scope": "heads", "progress": False}
    with pytest.raises(UserError, match="of 2 rows, 1 cut at 256 tokens"):
        finetune(base, rows, tmp_path / "out", recipe=Recipe(**recipe), **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    with pytest.warns(UserWarning, match="1 cut at 256 tokens"):
        tuned = finetune(base, rows, tmp_path / "out", recipe=Recipe(max_lost=1, **recipe), **asked)
    assert tuned.rows == {"given": 2, "used": 2, "cut": 1, "dropped": 0, "empty": 0, "special": 0, "max_length": 256}
    # What the recipe asks for holds where it is less.
    with pytest.warns(UserWarning, match="1 cut at 200 tokens"):
        finetune(base, rows, tmp_path / "less", recipe=Recipe(max_lost=1, max_length=200, **recipe), **asked)


# Prompts

BOS, EOS, UNKNOWN = 1, 2, 3


def ending(template: str, **tokens: int) -> Callable[[], PreTrainedTokenizerFast]:
    """A tokenizer that puts tokens before and behind every text."""

    def make() -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer()
        special = list({"<s>": BOS, "</s>": EOS, **tokens}.items())
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        return tokenizer

    return make


def flagged(**settings: bool) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer()
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return make


TOKENIZERS = [
    brought("Prompts", "a tokenizer that adds nothing", "nothing is added", tiny_tokenizer, []),
    brought("Prompts", "a tokenizer that begins a text", "each prompt begins so", ending("<s> $A"), [BOS]),
    brought(
        "Prompts",
        "a tokenizer that begins and ends a text",
        "no end token stands before the answer",
        ending("<s> $A </s>"),
        [BOS],
    ),
    brought("Prompts", "a tokenizer that ends a text", "no end token stands before the answer", ending("$A </s>"), []),
    brought(
        "Prompts",
        "a tokenizer with a separator behind a text",
        "no separator stands before the answer",
        ending("<s> $A <unk>", **{"<unk>": UNKNOWN}),
        [BOS],
    ),
    brought(
        "Prompts",
        "a tokenizer that begins a text with two tokens",
        "each prompt begins with both",
        ending("<unk> <s> $A", **{"<unk>": UNKNOWN}),
        [UNKNOWN, BOS],
    ),
    brought(
        "Prompts",
        "a tokenizer with add_bos_token and add_eos_token",
        "each prompt begins so, and no end token stands before the answer",
        flagged(add_bos_token=True, add_eos_token=True),
        [BOS],
    ),
    brought(
        "Prompts",
        "a tokenizer with add_bos_token off and add_eos_token on",
        "no end token stands before the answer",
        flagged(add_bos_token=False, add_eos_token=True),
        [],
    ),
]


def prompted(tokenizer: Any, **settings: Any) -> PromptedLM:
    return PromptedLM(
        pretrained=tiny_model("llama", max_position_embeddings=1024), tokenizer=tokenizer, batch_size=2, **settings
    )


@pytest.mark.parametrize(("make", "begins", "happens"), TOKENIZERS)
def test_prompts_are_the_same_in_training_and_evaluation(
    make: Callable[[], PreTrainedTokenizerFast], begins: list[int], happens: str, tmp_path: Path
) -> None:
    """As the tokenizer is, and as a tuned model's folder gives it back."""
    make().save_pretrained(tmp_path)
    plain = tiny_tokenizer()
    rows = [{"instruction": "add 1 and 2", "response": "3"}, {"instruction": "a</s>b <s>", "response": "long answer"}]
    asked = [(PROMPT.format(**row), row["response"]) for row in rows]
    for tokenizer in (make(), AutoTokenizer.from_pretrained(tmp_path, padding_side="left")):
        lm = prompted(tokenizer)
        trained = tokenize(Dataset.from_list(rows), tokenizer, 2048)
        shown, mask = lm.tok_batch_encode([prompt for prompt, _ in asked])
        for row, (prompt, answer), own, real in zip(trained, asked, shown, mask, strict=True):
            ids, said = row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]
            text = plain.encode(prompt, split_special_tokens=True)
            assert ids == [*begins, *text], "text alone behind what begins it"
            assert said == [*plain(answer).input_ids, EOS]
            assert own[real.bool()].tolist() == ids == lm.tok_encode(prompt)
            assert lm._encode_pair(prompt, answer) == (ids, said[:-1])
            # Where a prompt does not end as the template does, lm-eval cuts prompt and answer apart itself.
            assert lm._encode_pair(prompt.rstrip(), answer) == ([*begins, *text[:-1]], said[:-1])


def test_prose_begins_once_and_ends_nowhere() -> None:
    """Where a tokenizer adds nothing, lm-eval begins prose by the same token."""
    model, found = tiny_model("llama", max_position_embeddings=1024), set()
    for make in (tiny_tokenizer, ending("<s> $A"), ending("<s> $A </s>"), flagged(add_eos_token=True)):
        (row,) = evaluate(model, ["prose"], tokenizer=make(), limit=1, progress=False).samples["prose"]
        found.add((row["loglikelihood"], row["tokens"]))
    assert len(found) == 1


def test_special_tokens_in_the_real_model_are_text(smollm2: Path) -> None:
    """And text without any gives the tokens it gave before."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = Dataset.from_list(
        [
            {"instruction": "Say <|im_end|> twice", "response": "<|endoftext|>"},
            {"instruction": "é 你好 {x}", "response": "ok"},
        ]
    )
    spelled, usual = tokenize(rows, tokenizer, 2048)["input_ids"]
    specials = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert not specials & set(spelled[:-1])
    assert tokenizer.decode(spelled[:-1]) == PROMPT.format(**rows[0]) + "<|endoftext|>"
    assert usual == [*tokenizer(PROMPT.format(**rows[1])).input_ids, *tokenizer("ok").input_ids, tokenizer.eos_token_id]


LENGTHS = [
    brought("Prompts", "GPT-2", "its n_positions hold", "gpt2", {}, 128),
    brought("Prompts", "OPT, with two positions more than it says", "what it says holds", "opt", {}, 128),
    brought(
        "Prompts", "a rotary model with a sliding window", "its positions hold", "mistral", {"sliding_window": 8}, 128
    ),
    brought("Prompts", "Falcon with ALiBi", "its max_position_embeddings hold", "falcon_mha", {"alibi": True}, 2048),
]


@pytest.mark.parametrize(("name", "settings", "expected", "happens"), LENGTHS)
def test_positions_are_the_model_s(name: str, settings: dict[str, Any], expected: int, happens: str) -> None:
    model = tiny_model(name, **settings)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 33  # says nothing of the model
    assert positions(model.config) == expected
    assert PromptedLM(pretrained=model, tokenizer=tokenizer, batch_size=1).max_length == expected
    with torch.no_grad():
        assert model(torch.full((1, expected), 5)).logits.shape[1] == expected


@pytest.mark.parametrize(
    ("ask", "happens"),
    [
        brought(
            "Prompts",
            "prompts longer than the model",
            "3 of 3 prompts do not fit into the model's 128 positions",
            lambda model: evaluate(model, ["chain_sum"], tokenizer=tiny_tokenizer(), limit=3, progress=False),
        ),
        brought(
            "Prompts",
            "questions with options longer than the model",
            "2 of 2 prompts do not fit into the model's 128 positions",
            lambda model: evaluate(model, ["mmlu_dev"], tokenizer=tiny_tokenizer(), limit=2, progress=False),
        ),
        brought(
            "Prompts",
            "as many new tokens as the model has positions",
            "takes answers of 128 tokens, which leave no room for a prompt",
            lambda model: generate(model, "a", max_gen_toks=128),
        ),
        brought(
            "Prompts",
            "an answer longer than the model",
            "takes answers of 200 tokens, which leave no room for a prompt",
            lambda model: score(model, "a", "b" * 200),
        ),
        brought(
            "Prompts",
            "questions to embed that are longer than the model",
            "A text of 'mine' has 200 tokens, and the model 128 positions",
            lambda model: embed(model, tiny_tokenizer(), {"mine": ["a" * 200]}),
        ),
        brought(
            "Prompts",
            "questions to choose heads by that are longer than the model",
            "No example's prompt fits into max_length 128",
            lambda model: batches("chain_sum", 4, tiny_tokenizer(), max_length=longest(model, 2048)),
        ),
    ],
)
def test_prompts_that_do_not_fit(ask: Callable[[Any], Any], happens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is not asked at all."""
    model = tiny_model("gpt2")
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(UserError) as caught:
        ask(model)
    assert happens in str(caught.value)
    assert "\n" not in str(caught.value)


def generate(model: Any, *prompts: str, max_lost: float = 0.05, max_gen_toks: int = 8) -> PromptedLM:
    lm = PromptedLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4, max_lost=max_lost)
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": max_gen_toks}
    asked = [Instance("generate_until", {}, (text, settings), 0, ("mine", i, 1)) for i, text in enumerate(prompts)]
    lm.generate_until(asked, disable_tqdm=True)
    return lm


def score(model: Any, prompt: str, answer: str) -> PromptedLM:
    lm = PromptedLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=4)
    lm.loglikelihood([Instance("loglikelihood", {}, (prompt, answer), 0, ("mine", 0, 1))], disable_tqdm=True)
    return lm


def test_the_edge_of_what_fits() -> None:
    """Of 128 positions, 8 for an answer: 120 tokens are whole, and one more is cut and counted."""
    model = tiny_model("gpt2")
    assert generate(model, "a" * 120).truncated == {}
    assert generate(model, *["a"] * 19, "a" * 121).truncated == {"mine": {19}}
    with pytest.raises(UserError, match="1 of 19 prompts"):
        generate(model, *["a"] * 18, "a" * 121)
    assert generate(model, "a" * 121, max_lost=1).truncated == {"mine": {0}}
    # The last token of an answer is predicted, and needs no position.
    assert score(model, "a" * 120, "b" * 9).truncated == {}
    with pytest.raises(UserError, match="1 of 1 prompts"):
        score(model, "a" * 120, "b" * 10)


def test_going_on_with_prompts_that_are_cut() -> None:
    tokenizer, asked = tiny_tokenizer(), {"limit": 2, "progress": False, "max_lost": 1}
    with pytest.warns(UserWarning, match=r"For the task 'chain_sum', 2 of 2 prompts were truncated.*128 positions"):
        found = evaluate(tiny_model("gpt2"), ["chain_sum", "prose"], tokenizer=tokenizer, **asked)
    # Longer prose is scored in windows, and none of it is lost.
    assert found.truncated == {"chain_sum": 2, "prose": 0}
    assert found.samples["prose"][0]["tokens"] > 128


LIMITS = [
    brought("Prompts", "a limit of 0 questions", "'limit' is 0: give a whole number of questions", 0),
    brought("Prompts", "a negative limit", "'limit' is -1: give a whole number of questions", -1),
    brought("Prompts", "a limit of half of the questions", "'limit' is 0.5: give a whole number of questions", 0.5),
    brought("Prompts", "a limit that is true", "'limit' is True: give a whole number of questions", True),
    brought("Prompts", "a limit in words", "'limit' is 'all': give a whole number of questions", "all"),
]


@pytest.mark.parametrize(("limit", "happens"), LIMITS)
def test_limits_that_ask_nothing(limit: Any, happens: str) -> None:
    """Wherever a limit can be given; by `evaluate` before it looks for the model."""
    for refuse in (
        lambda: evaluate("nowhere", ["chain_sum"], limit=limit),
        lambda: EvaluateConfig.check(model="m", tasks=("chain_sum",), limit=limit),
        lambda: Profile.load("quick", limit=limit),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        assert happens in str(caught.value)


def test_limits_that_ask_something() -> None:
    assert [check_limit(limit) for limit in (None, 1, 500, 10.0)] == [None, 1, 500, 10]
    with pytest.raises(UserError, match="'search_limit' is 0"):
        Profile.load("quick", search_limit=0)
    with pytest.raises(UserError, match="'questions' is -1"):
        Profile.load("quick", questions=-1)
    with pytest.raises(UserError, match="A size of 0 takes no examples"):
        training_examples("chain_sum", size=0)
    with pytest.raises(UserError, match="The batch_size is 0: give 1 or more"):
        evaluate("nowhere", ["chain_sum"], batch_size=0)


def test_share_that_may_be_lost_reaches_every_run() -> None:
    """From the profile to trainings, localizations and evaluations; left out, names are what they were."""
    usual, lenient = Profile.load("quick"), Profile.load("quick", max_lost=1)
    run = usual.run(method="hifi")
    for config in (usual.evaluation(run), usual.finetuning(run).recipe, usual.localization(run), usual.importance()):
        assert config.max_lost == 0.05
    for config in (lenient.evaluation(run), lenient.finetuning(run).recipe, lenient.localization(run)):
        assert config.max_lost == 1
    assert lenient.importance().max_lost == lenient.importance().task_model.recipe.max_lost == 1
    assert lenient.evaluation(run).name != usual.evaluation(run).name
