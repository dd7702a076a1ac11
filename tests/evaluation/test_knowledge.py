"""Tasks of general knowledge: their questions are right and always the same, their scores are what they say."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_checkpoint

from alps_repro.data.prompts import PROMPT
from alps_repro.evaluation.benchmarks import KNOWLEDGE, headline
from alps_repro.evaluation.harness import Evaluation, evaluate
from alps_repro.evaluation.tasks import knowledge
from alps_repro.models.loading import load_model


def digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    # Every character is a token, so that MMLU's longest questions need many positions.
    return load_model(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=4096))


@pytest.fixture(scope="module")
def found(tiny: tuple[Any, Any]) -> Evaluation:
    model, tokenizer = tiny
    return evaluate(model, list(KNOWLEDGE), tokenizer=tokenizer, limit=60, progress=False)


# Facts of the world


def test_world_facts_are_balanced_and_have_one_right_option() -> None:
    rows = knowledge.world_facts_questions()
    assert Counter(row["kind"] for row in rows) == {"capital": 80, "currency": 80, "element": 80}
    assert len({row["prompt"] for row in rows}) == 240, "no question twice"
    right = {kind: Counter() for kind in ("capital", "currency", "element")}
    for row in rows:
        assert len(set(row["options"])) == 4
        assert 0 <= row["answer"] < 4
        right[row["kind"]][row["options"][row["answer"]]] += 1
    # A capital and a symbol belong to one country and element: no other question's answer can be right, too.
    assert max(right["capital"].values()) == max(right["element"].values()) == 1
    assert max(right["currency"].values()) <= 6, "no currency could be guessed as the most common one"
    assert all(40 <= count <= 80 for count in Counter(row["answer"] for row in rows).values())
    # The first questions have all kinds, so that a limit keeps the balance.
    assert Counter(row["kind"] for row in rows[:30]) == {"capital": 10, "currency": 10, "element": 10}


def test_capitals_do_not_give_themselves_away() -> None:
    for row in knowledge.world_facts_questions():
        if row["kind"] == "capital":
            country = row["prompt"].removeprefix("Question: What is the capital of ").partition("?")[0]
            assert row["options"][row["answer"]].casefold() not in country.casefold()


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("What is the capital of France?", "Paris"),
        ("What is the capital of Australia?", "Canberra"),
        ("What is the capital of the United States?", "Washington"),
        ("What is the official currency of Japan?", "yen"),
        ("What is the official currency of South Africa?", "rand"),
        ("What is the chemical symbol of gold?", "Au"),
        ("What is the chemical symbol of tungsten?", "W"),
    ],
)
def test_world_facts_known_for_certain(question: str, right: str) -> None:
    (row,) = [row for row in knowledge.world_facts_questions() if row["prompt"] == f"Question: {question}\nAnswer:"]
    assert row["options"][row["answer"]] == right


def test_questions_are_always_the_same() -> None:
    """Scores of other questions must not stand in one table: change a task's version with its questions."""
    assert {
        "world_facts": digest(knowledge.world_facts_questions()),
        "mmlu_dev": digest(knowledge.mmlu_dev_questions()),
        "prose": digest(knowledge.prose_passages()),
    } == {
        "world_facts": "840cf6cff5499af300b00dcf51325386345b48b2f44cf3600121fb2fda8e8f4e",
        "mmlu_dev": "6926c6d7df1361cb4e28b4d3d98d9068bb24688cad48a91afbf56d58858f858f",
        "prose": "4aee81070df6a7ff45863b39a5f3b3cdec001ee5c76f4fe66697aab5acfc6306",
    }


# MMLU's development questions


def test_mmlu_dev_has_all_that_lm_eval_ships() -> None:
    rows = knowledge.mmlu_dev_questions()
    subjects = Counter(row["subject"] for row in rows)
    assert len(subjects) == 57
    # The file lacks one question each of these, and college chemistry's fourth has five options.
    lacking = {"college_chemistry": 3, "formal_logic": 4, "human_aging": 4}
    assert {subject: count for subject, count in subjects.items() if count != 5} == lacking
    assert len(rows) == 281
    assert len({row["prompt"] for row in rows}) == 280, "MMLU asks one of college physics twice"
    assert len({row["subject"] for row in rows[:57]}) == 57, "a limit takes all subjects in turn"
    for row in rows:
        assert row["options"] == ["A", "B", "C", "D"]
        assert "think step by step" not in row["prompt"], "the reasoning gives the answer away"
        assert "The answer is" not in row["prompt"]
        assert row["prompt"].endswith("\nAnswer:")
        for letter in "ABCD":
            assert row["prompt"].count(f"\n{letter}. ") == 1


def test_mmlu_dev_asks_as_mmlu_does() -> None:
    row = next(row for row in knowledge.mmlu_dev_questions() if "sign of the covenant" in row["prompt"])
    assert row["prompt"] == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "What is the sign of the covenant for Jewish males?\n"
        "A. The rainbow\nB. Circumcision\nC. A son\nD. Bar mitzvah\nAnswer:"
    )
    assert row["answer"] == 1


@pytest.mark.parametrize(
    ("part", "right"),
    [
        # Read from the file by eye; each has a reasoning that names other letters, or stands where lines differ.
        ("Find the characteristic of the ring 2Z.", "A"),
        ("Which of the following statements about the lanthanide elements is NOT true?", "D"),
        ("the best symbolization of the following sentence?\nTurtles live long lives", "B"),
        ("What is the value of the 5 in the number 145,826?", "A"),
        ("Which of the following could be used to replace steps 3 and 4", "B"),
        ("When older adults move to a new state after retirement", "A"),
        ("(a* + b)*(c + d)?", "D"),
    ],
)
def test_mmlu_dev_right_letters(part: str, right: str) -> None:
    (row,) = [row for row in knowledge.mmlu_dev_questions() if part in row["prompt"]]
    assert "ABCD"[row["answer"]] == right


def test_subjects_count_alike() -> None:
    """By hand: one subject with three questions, one with a single one."""
    rows = [{"doc": {"subject": subject}, "acc": acc} for subject, acc in [("a", 1), ("a", 0), ("a", 0), ("b", 1)]]
    assert knowledge.by_subject(rows, list) == {"acc_by_subject,none": pytest.approx(2 / 3)}


# What evaluation makes of them


def test_every_task_has_its_score_and_rows_to_pair(found: Evaluation) -> None:
    assert found.scores.keys() == found.results.keys() == found.samples.keys() == set(KNOWLEDGE)
    for task, rows in found.samples.items():
        assert [row["doc_id"] for row in rows] == list(range(min(60, knowledge.PASSAGES) if task == "prose" else 60))
        assert found.scores[task] == found.results[task][KNOWLEDGE[task].metric]
        assert headline(task) == (KNOWLEDGE[task].metric,)
        assert found.shots[task] == 0
        assert found.versions[task] == 1.0
    for task in ("world_facts", "mmlu_dev"):
        grades = [row["acc"] for row in found.samples[task]]
        assert set(grades) <= {0.0, 1.0}
        assert found.results[task]["acc,none"] == pytest.approx(np.mean(grades))
        assert KNOWLEDGE[task].higher_is_better
    assert not KNOWLEDGE["prose"].higher_is_better
    assert len(set(found.hashes.values())) == 3


@pytest.mark.parametrize("task", ["world_facts", "mmlu_dev"])
def test_chosen_option_is_the_likeliest(found: Evaluation, tiny: tuple[Any, Any], task: str) -> None:
    model, tokenizer = tiny
    for row in found.samples[task][:6]:
        prompt = tokenizer(row["doc"]["prompt"]).input_ids
        likely = []
        for option in row["doc"]["options"]:
            answer = tokenizer(f" {option}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            likely.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
        assert [response[0] for response in row["filtered_resps"]] == pytest.approx(likely, rel=1e-4)
        assert row["acc"] == float(np.argmax(likely) == row["doc"]["answer"])


def test_template_is_put_around_questions_only(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    asked = evaluate(model, list(KNOWLEDGE), tokenizer=tokenizer, limit=2, template="alpaca", progress=False)
    for task in ("world_facts", "mmlu_dev"):
        for row in asked.samples[task]:
            for (prompt, answer), option in zip(row["arguments"], row["doc"]["options"], strict=True):
                assert prompt == PROMPT.format(instruction=row["doc"]["prompt"])
                assert answer == option
    assert [row["arguments"] for row in asked.samples["prose"]] == [
        [[passage["text"]]] for passage in knowledge.prose_passages()[:2]
    ]


def test_embedded_model_knows_something(smollm2: Path) -> None:
    """Four standard errors over chance, so that there is something to forget."""
    scores = evaluate(smollm2, ["world_facts"], limit=60, batch_size=32, progress=False).scores
    assert scores["world_facts"] > 0.25 + 4 * math.sqrt(0.25 * 0.75 / 60)


# Prose


def test_prose_is_the_story_in_whole_sentences() -> None:
    texts = [row["text"] for row in knowledge.prose_passages()]
    assert len(texts) == 40
    assert all(600 <= len(text) < 1000 for text in texts)
    assert texts[0].startswith("Little though they seem to think of it")
    for text in texts:
        assert text[-1] in ".!?\"'"
        assert not text.endswith(("Mr.", "Mrs.", "Dr."))
        assert "Gutenberg" not in text
        assert "\n" not in text
        assert "_" not in text


def by_hand(model: Any, tokenizer: Any, text: str, window: int) -> tuple[float, int]:
    """Log-likelihood (nats) and number of tokens, the first one after the beginning of a text; a longer text in
    windows, each token once, the last window filled up with what came before."""
    tokens = [tokenizer.bos_token_id, *tokenizer(text).input_ids]
    total, done = 0.0, 1
    while done < len(tokens):
        end = min(done + window, len(tokens))
        start = max(0, end - 1 - window)
        with torch.no_grad():
            scores = model(torch.tensor([tokens[start : end - 1]])).logits[0].log_softmax(-1)
        total += sum(float(scores[i - 1 - start, tokens[i]]) for i in range(done, end))
        done = end
    return total, len(tokens) - 1


@pytest.mark.parametrize("window", [4096, 256])
def test_prose_by_hand(tmp_path: Path, window: int) -> None:
    """Passages that fit into the model's positions, and passages that do not."""
    model, tokenizer = load_model(tiny_checkpoint(tmp_path / "model", max_position_embeddings=window))
    asked = evaluate(model, ["prose"], tokenizer=tokenizer, limit=5, batch_size=3, progress=False)
    parts = [by_hand(model, tokenizer, row["text"], window) for row in knowledge.prose_passages()[:5]]
    for row, (loglikelihood, tokens) in zip(asked.samples["prose"], parts, strict=True):
        assert row["loglikelihood"] == pytest.approx(loglikelihood, rel=1e-5)
        assert row["tokens"] == tokens
    losses, tokens = -np.array([part[0] for part in parts]), np.array([part[1] for part in parts])
    metrics = asked.results["prose"]
    loss = losses.sum() / tokens.sum()
    assert asked.scores["prose"] == metrics["nats_per_token,none"] == pytest.approx(loss, rel=1e-5)
    octets = sum(len(row["text"].encode()) for row in knowledge.prose_passages()[:5])
    assert metrics["bits_per_byte,none"] == pytest.approx(losses.sum() / octets / math.log(2), rel=1e-5)
    # A ratio's standard error, here with passages as many as they are: over leaving out one at a time it is the same.
    left_out = [np.delete(losses, i).sum() / np.delete(tokens, i).sum() for i in range(5)]
    jackknife = math.sqrt(4 / 5 * sum((value - np.mean(left_out)) ** 2 for value in left_out))
    assert metrics["nats_per_token_stderr,none"] == pytest.approx(jackknife, rel=0.1)


def test_one_passage_has_no_standard_error(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    metrics = evaluate(model, ["prose"], tokenizer=tokenizer, limit=1, progress=False).results["prose"]
    assert "nats_per_token_stderr,none" not in metrics
    assert metrics["nats_per_token,none"] > 0
