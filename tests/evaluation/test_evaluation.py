"""Evaluation: what is asked, how it is graded, what is left as it was; the paper's benchmarks on stand-in questions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import evaluate as hf_evaluate
import nltk
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tiny_models import tiny_checkpoint

from alps_repro.data.datasets import OFFLINE, VALIDATION_SIZE, offline_splits
from alps_repro.data.prompts import PROMPT
from alps_repro.devices import resolved_precision
from alps_repro.errors import UserError
from alps_repro.evaluation import harness as evaluation
from alps_repro.evaluation.benchmarks import BENCHMARKS, KNOWLEDGE, OFFLINE_METRIC, SPLITS
from alps_repro.evaluation.harness import Evaluation, _score, evaluate
from alps_repro.evaluation.sandbox import ProgramResult, why_not
from alps_repro.evaluation.tasks import offline
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import HeadSelection
from alps_repro.models.loading import load_model
from alps_repro.training.finetune import finetune
from alps_repro.training.recipe import Recipe

#: Needed by lm-eval's `ifeval` at import; part of the extra `benchmarks`.
try:
    import langdetect  # noqa: F401

    IFEVAL = True
except ImportError:
    IFEVAL = False


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Long enough for the benchmarks' prompts and for the 1280 tokens that ifeval asks for.
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return load_model(tiny)


# Offline tasks


def test_offline_tasks_give_results_errors_and_samples(tiny: Path) -> None:
    found = evaluate(tiny, list(OFFLINE), limit=5, progress=False)
    assert found.scores.keys() == found.results.keys() == found.samples.keys() == set(OFFLINE)
    for task in OFFLINE:
        rows, metrics = found.samples[task], found.results[task]
        questions = offline_splits(task)["test"][:5]
        for name in ("strict-match", "flexible-extract"):
            graded = [row for row in rows if row["filter"] == name]
            assert [row["doc_id"] for row in graded] == list(range(5))
            for row, question in zip(graded, questions, strict=True):
                # The model is asked what it was trained on, and nothing else.
                assert row["arguments"][0][0] == PROMPT.format(**question)
                assert row["target"] == question["response"]
                assert isinstance(row["resps"][0][0], str)
                assert row["exact_match"] in (0.0, 1.0)
            mean = np.mean([row["exact_match"] for row in graded])
            assert metrics[f"exact_match,{name}"] == mean
            assert metrics[f"exact_match_stderr,{name}"] == pytest.approx(math.sqrt(mean * (1 - mean) / 4))
        assert found.scores[task] == metrics[OFFLINE_METRIC]
        assert found.shots[task] == 0
        assert found.versions[task] == 1.0
        assert len(found.hashes[task]) == 64


def always_five(tiny: Path) -> tuple[Any, Any]:
    """A model that answers "5" whatever it is asked, and its tokenizer."""
    model, tokenizer = load_model(tiny)
    digit, end = tokenizer.convert_tokens_to_ids("5"), tokenizer.eos_token_id
    # The last token alone decides: after a line break "5", after "5" the end.
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for row, (token, answer) in enumerate([(tokenizer.convert_tokens_to_ids("\n"), digit), (digit, end)]):
            model.model.embed_tokens.weight[token, row] = 1
            model.lm_head.weight[answer, row] = 1
    return model, tokenizer


def test_standard_error_is_that_of_a_proportion(tiny: Path) -> None:
    """On graded answers that are not all alike: a model that always says the same is right now and then."""
    model, tokenizer = always_five(tiny)
    found = evaluate(model, ["chain_sum"], tokenizer=tokenizer, limit=200, progress=False)
    right = np.mean([row["response"] == "5" for row in offline_splits("chain_sum")["test"][:200]])
    assert 0 < right < 1
    assert found.scores["chain_sum"] == pytest.approx(right)
    expected = math.sqrt(right * (1 - right) / 199)
    assert found.results["chain_sum"]["exact_match_stderr,flexible-extract"] == pytest.approx(expected)
    assert {row["resps"][0][0] for row in found.samples["chain_sum"]} == {"5"}


# The right answers


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("task", OFFLINE)
def test_log_likelihood_of_right_answers_by_hand(loaded: tuple[Any, Any], task: str, batch_size: int) -> None:
    """The model's own logits on prompt and answer as training joins them."""
    model, tokenizer = loaded
    found = evaluate(model, [task], tokenizer=tokenizer, limit=7, batch_size=batch_size, progress=False)
    expected = []
    for question in offline_splits(task)["test"][:7]:
        prompt = tokenizer(PROMPT.format(**question)).input_ids
        answer = tokenizer(question["response"], add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected.append(float(logits.log_softmax(-1)[range(len(answer)), answer].sum()))
    rows = found.samples[task]
    assert len(rows) == 14, "one for each way of grading"
    for row in rows:
        assert row["answer_loglikelihood"] == pytest.approx(expected[row["doc_id"]], rel=1e-5)
    metrics = found.results[task]
    assert metrics["answer_loglikelihood,none"] == pytest.approx(np.mean(expected), rel=1e-5)
    error = np.std(expected, ddof=1) / math.sqrt(7)
    assert metrics["answer_loglikelihood_stderr,none"] == pytest.approx(error, rel=1e-4)


def test_share_of_answers_said_token_by_token(tiny: Path) -> None:
    """A model that says "5" after a line break, and the end after "5"."""
    model, tokenizer = always_five(tiny)
    found = evaluate(model, ["chain_sum"], tokenizer=tokenizer, limit=200, progress=False)
    right = [row["response"] == "5" for row in offline_splits("chain_sum")["test"][:200]]
    assert found.results["chain_sum"]["answer_accuracy,none"] == pytest.approx(np.mean(right))
    assert found.scores["chain_sum"] == pytest.approx(np.mean(right))
    likely = [row["answer_loglikelihood"] for row in found.samples["chain_sum"] if row["filter"] == "strict-match"]
    best = [value for value, is_right in zip(likely, right, strict=True) if is_right]
    assert min(best) == pytest.approx(max(likely))


def test_answers_are_beside_the_grades_and_nowhere_else(tiny: Path) -> None:
    """The hash and the shots are those of the questions asked, however often each was asked."""
    found = evaluate(tiny, ["chain_sum"], limit=3, progress=False)
    for part in (found.scores, found.results, found.samples, found.versions, found.shots, found.hashes):
        assert set(part) == {"chain_sum"}
    # Recorded when the task had YAML files and no log-likelihoods.
    assert found.hashes["chain_sum"] == "615bf5a07ed38f843a80a54a4dc003338ad1443979fc0cee9fe346820f13aa22"


def test_line_break_of_the_prompt_is_no_part_of_the_answer() -> None:
    """Also where a tokenizer has one token for the template's last colon and line break, as Llama 3's does."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([":", "\n", ":\n", "R", "1", "</s>"])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "\n")]))
    lm = object.__new__(offline.PromptedLM)
    lm.backend, lm.add_bos_token, lm.custom_prefix_token_id = "causal", None, 5
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>")
    assert lm._encode_pair("R:\n", "1") == ([3, 2], [4])
    lost, _ = super(offline.PromptedLM, lm)._encode_pair("R:\n", "1")
    assert lost == [3, 0], "what lm-eval would have shown the model"
    assert lm._encode_pair("R:", "1") == ([3, 0], [4])


# Splits


def test_validation_questions_are_others(tiny: Path) -> None:
    found = {split: evaluate(tiny, list(OFFLINE), limit=5, split=split, progress=False) for split in SPLITS}
    for task in OFFLINE:
        for split in SPLITS:
            questions = offline_splits(task)[split][:5]
            rows = [row for row in found[split].samples[task] if row["filter"] == "strict-match"]
            assert [row["doc"]["instruction"] for row in rows] == [row["instruction"] for row in questions]
            assert all("answer_loglikelihood" in row for row in rows)
        assert found["test"].hashes[task] != found["validation"].hashes[task]


def test_splits_share_no_question_that_is_asked() -> None:
    for task in OFFLINE:
        for configuration in (offline.graded, offline.answers):
            rows = {split: configuration(task, split)["dataset_kwargs"]["rows"] for split in SPLITS}
            asked = {split: {row["prompt"] for row in rows[split]} for split in SPLITS}
            assert len(asked["validation"]) == VALIDATION_SIZE
            assert not asked["test"] & asked["validation"]


def test_limit(tiny: Path) -> None:
    counts = [
        len({row["doc_id"] for row in evaluate(tiny, ["chain_sum"], limit=n, progress=False).samples["chain_sum"]})
        for n in (1, 7)
    ]
    assert counts == [1, 7]


def test_same_model_same_result_whatever_the_batch(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded

    def ask(batch_size: int) -> Evaluation:
        return evaluate(
            model,
            ["family_relationships"],
            tokenizer=tokenizer,
            limit=12,
            batch_size=batch_size,
            progress=False,
        )

    first = ask(5)
    assert ask(5) == first
    # The questions differ in length, so other batches are padded otherwise.
    for batch_size in (1, 12):
        other = ask(batch_size)
        assert other.scores == first.scores
        for row, same in zip(other.samples["family_relationships"], first.samples["family_relationships"], strict=True):
            # Sums in another order differ in their last digits.
            assert row.pop("answer_loglikelihood") == pytest.approx(same["answer_loglikelihood"], rel=1e-5)
            assert row == {key: value for key, value in same.items() if key != "answer_loglikelihood"}


def answers(model: Any, **requested: Any) -> list[float]:
    """Log-likelihoods of the right answers to a few questions."""
    found = evaluate(model, ["chain_sum"], limit=12, progress=False, **requested)
    return [row["answer_loglikelihood"] for row in found.samples["chain_sum"]]


def test_precision_is_of_products_and_nothing_else(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    exact = answers(model, tokenizer=tokenizer, precision="float32")
    rounded = answers(model, tokenizer=tokenizer, precision="bfloat16")
    assert all(a != b for a, b in zip(exact, rounded, strict=True))
    assert rounded == pytest.approx(exact, rel=2**-7)  # bfloat16 has 8 bits
    # Logarithms of probabilities are taken, and summed, in float32: in bfloat16 they would have 8 bits.
    assert not set(rounded) & set(torch.tensor(rounded).bfloat16().tolist())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    with pytest.raises(UserError, match="There is no precision 'fp16': known are"):
        evaluate(model, ["chain_sum"], tokenizer=tokenizer, precision="fp16")


def test_models_answer_alike_whatever_they_are_stored_in(tmp_path: Path, tiny: Path) -> None:
    """A tuned model is saved in float32, a base often in bfloat16: with the same weights they answer the same."""
    model, tokenizer = load_model(tiny, dtype=torch.bfloat16)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model.to(dtype).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for precision in ("float32", "bfloat16"):
        # Under autocast alone; float32 sums depend on where a tensor begins in memory.
        loaded, tokenizer = load_model(tmp_path / "float32", dtype=torch.float32)
        of_loaded = pytest.approx(answers(loaded, tokenizer=tokenizer, precision=precision), rel=1e-6)
        assert answers(tmp_path / "bfloat16", precision=precision) == of_loaded
        assert answers(tmp_path / "float32", precision=precision) == of_loaded
    assert answers(tmp_path / "float32") == answers(tmp_path / "float32", precision=resolved_precision("auto"))


@pytest.mark.parametrize("method", ["alps", "lora"])
def test_an_adapter_is_merged_and_answers_as_it_would_unmerged(method: str, tmp_path: Path, tiny: Path) -> None:
    rows = [{"instruction": f"What is {i} + 1?", "response": str(i + 1)} for i in range(8)]
    recipe = Recipe(learning_rate=1e-2, batch_size=4, micro_batch_size=4, max_steps=3, precision="float32")
    heads = {"heads": HeadSelection.random(HeadLayout.of(load_model(tiny)[0]), 0.3, seed=0)} if method == "alps" else {}
    finetune(tiny, rows, tmp_path / "out", method=method, scope="heads", recipe=recipe, progress=False, **heads)
    model, tokenizer = load_model(tmp_path / "out", dtype=torch.float32)
    unmerged = answers(model, tokenizer=tokenizer, precision="float32")
    assert answers(tmp_path / "out", precision="float32") == pytest.approx(unmerged, rel=1e-5)
    assert unmerged != pytest.approx(answers(tiny, precision="float32"), rel=1e-3)


def test_another_model_is_not_given_the_old_answers(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    other, _ = load_model(tiny_checkpoint(tmp_path / "other", seed=1))

    def answers(model: Any) -> list[Any]:
        found = evaluate(model, ["chain_sum"], tokenizer=tokenizer, limit=8, progress=False)
        return [row["resps"] for row in found.samples["chain_sum"]]

    assert answers(model) != answers(other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("template", ["none", "alpaca"])
def test_nothing_is_left_changed(loaded: tuple[Any, Any], training: bool, template: str) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.padding_side = "right"
    model.train(training)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        evaluate(model, ["chain_sum"], tokenizer=tokenizer, limit=2, template=template, progress=False)
        assert random.getstate() == before[0]
        assert (np.random.get_state()[1] == before[1]).all()
        assert torch.equal(torch.get_rng_state(), before[2])
        assert model.training is training
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        assert tokenizer.padding_side == "right"
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    finally:
        tokenizer.chat_template, tokenizer.padding_side = None, "left"
        model.eval()


def test_without_network_one_sentence_says_what_to_do(loaded: tuple[Any, Any]) -> None:
    """And a failure leaves nothing changed either."""
    model, tokenizer = loaded
    model.train()
    random.seed(6), torch.manual_seed(6)
    before = random.getstate(), torch.get_rng_state()
    message = "questions of gsm8k could not be loaded from the hub.*check the connection.*family_relationships"
    try:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(model, ["gsm8k"], tokenizer=tokenizer, limit=2, template="alpaca", progress=False)
        assert "\n" not in str(caught.value)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        assert model.training
        assert tokenizer.chat_template is None
    finally:
        model.eval()


# Grading


@pytest.fixture(scope="module")
def offline_tasks() -> dict[str, Any]:
    return TaskManager(include_defaults=False).load([offline.graded(task, "test") for task in OFFLINE])["tasks"]


def grades(task: Any, right: str, answer: str) -> dict[str, bool]:
    """How lm-eval grades an answer, by filter."""
    doc, out = {"instruction": "?", "response": right, "prompt": "?"}, {}
    for filters in task._filters:
        instance = Instance("generate_until", doc, ("?", {}), 0, metadata=(task.config.task, 0, 1))
        instance.resps = [answer]
        filters.apply([instance])
        graded = task.process_results(doc, [instance.filtered_resps[filters.name]])
        out[filters.name.split("-")[0]] = bool(graded["exact_match"])
    return out


@pytest.mark.parametrize(
    ("task", "right", "answer", "strict", "flexible"),
    [
        ("chain_sum", "12", "12", True, True),
        ("chain_sum", "12", " 12", True, True),
        ("chain_sum", "12", "12 ", True, True),
        ("chain_sum", "12", "The answer is 12.", False, True),
        ("chain_sum", "12", "5 + 7 = 12", False, True),
        ("chain_sum", "12", "12 = 5 + 7", False, False),
        ("chain_sum", "12", "-12", False, False),
        ("chain_sum", "-12", "-12", True, True),
        ("chain_sum", "-12", "12", False, False),
        ("chain_sum", "-12", "The answer is -12.", False, True),
        ("chain_sum", "12", "112", False, False),
        ("chain_sum", "12", "", False, False),
        ("chain_sum", "12", "twelve", False, False),
        ("family_relationships", "mother", "mother", True, True),
        ("family_relationships", "mother", "Mother", True, True),
        ("family_relationships", "mother", "Luna is the mother of Edward.", False, True),
        ("family_relationships", "mother", "mother-in-law", False, False),
        ("family_relationships", "mother-in-law", "mother-in-law", True, True),
        ("family_relationships", "mother-in-law", "She is his mother-in-law.", False, True),
        ("family_relationships", "mother-in-law", "mother", False, False),
        ("family_relationships", "mother", "grandmother", False, False),
        ("family_relationships", "grandmother", "mother", False, False),
        ("family_relationships", "grandmother", "a grandmother", False, True),
        ("family_relationships", "mother", "stepmother", False, False),
        ("family_relationships", "son", "person", False, False),
        ("family_relationships", "son", "not the father but the son", False, True),
        ("family_relationships", "son", "", False, False),
        ("spell_backward", "drib", "drib", True, True),
        ("spell_backward", "drib", "Drib", True, True),
        ("spell_backward", "drib", "bird spelled backward is drib.", False, True),
        ("spell_backward", "drib", "drib is bird spelled backward", False, False),
        ("spell_backward", "drib", "bird", False, False),
        ("spell_backward", "drib", "dribs", False, False),
        ("spell_backward", "drib", "", False, False),
    ],
)
def test_grades(
    offline_tasks: dict[str, Any], task: str, right: str, answer: str, strict: bool, flexible: bool
) -> None:
    assert grades(offline_tasks[task], right, answer) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize("name", OFFLINE)
def test_every_right_answer_is_right(offline_tasks: dict[str, Any], name: str) -> None:
    """Also where the data set has an answer that the flexible pattern was not written for."""
    rows = [row for split in offline_splits(name, train_size=200).values() for row in split]
    # Case does not count, so answers that differ by it alone are one.
    answers = sorted({row["response"].casefold(): row["response"] for row in rows}.values())
    task = offline_tasks[name]
    for right, wrong in zip(answers, [answers[-1], *answers], strict=False):
        assert grades(task, right, right) == {"strict": True, "flexible": True}
        assert grades(task, right, f"The answer is {right}.") == {"strict": False, "flexible": True}
        assert grades(task, right, wrong) == {"strict": False, "flexible": False}


# The paper's benchmarks


SUBJECT_ROWS = 6
SHORT = [{"question": f"Add {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(12)]
MATH = [{"problem": "What is $1 + 1$?", "solution": "It is $\\boxed{2}$."}]
CHOICES = [
    {
        "question": f"Which is number {i}?",
        "choices": {"text": ["one", "two", "three", "four"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[i % 4],
    }
    for i in range(3)
]
PROGRAM = {
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
    "text": "Write a function that adds.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"],
}


def stand_in(path: str, name: str | None = None, **settings: Any) -> DatasetDict:
    """What the hub would give under these names, cut down to a few rows of the same columns."""
    if path == "cais/mmlu":
        # One subject has more questions than the others, so that the two averages differ.
        count = SUBJECT_ROWS if name == "abstract_algebra" else 1
        rows = [
            {"question": f"About {name}, {i}?", "choices": ["a", "b", "c", "d"], "answer": (i + len(name)) % 4}
            for i in range(max(count, 5))
        ]
        return DatasetDict(test=Dataset.from_list(rows[:count]), dev=Dataset.from_list(rows[:5]))
    splits = {
        "openai/gsm8k": {"train": SHORT, "test": SHORT[:2]},
        "EleutherAI/hendrycks_math": {"train": MATH, "test": MATH},
        "allenai/ai2_arc": {"train": CHOICES, "validation": CHOICES, "test": CHOICES},
        "Idavidrein/gpqa": {
            "train": [
                {
                    "Question": "Which is a gas?",
                    "Correct Answer": "neon",
                    **{f"Incorrect Answer {i}": word for i, word in enumerate(["iron", "gold", "salt"], 1)},
                }
            ]
        },
        "google/IFEval": {
            "train": [
                {
                    "key": i,
                    "prompt": "Write no comma, and end with the word so.",
                    "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
                    "kwargs": [{"end_phrase": None}, {"end_phrase": "so"}],
                }
                for i in range(2)
            ]
        },
        "openai/openai_humaneval": {"test": [PROGRAM]},
        "evalplus/humanevalplus": {"test": [PROGRAM]},
        "google-research-datasets/mbpp": {"test": [PROGRAM]},
        "evalplus/mbppplus": {"test": [PROGRAM]},
    }[path]
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


class CodeEval:
    """Stands for the hub's `code_eval` metric, which lm-eval tries out when it reads its tasks, and which must never
    be given what a model wrote."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int]
    ) -> tuple[dict[str, float], dict]:
        assert references == ["assert add(2, 3)==5"], "lm-eval's own trial"
        return {"pass@1": 1.0}, {}


@contextmanager
def hub() -> Iterator[None]:
    """A hub that is not there answers with stand-ins; everything from lm-eval's task files on is the real thing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", stand_in)
        patch.setattr(nltk, "download", lambda name: False)
        patch.setattr(hf_evaluate, "load", lambda name: {"code_eval": CodeEval()}[name])
        yield


ASKED = [task for task in BENCHMARKS if IFEVAL or task != "ifeval"]


@pytest.fixture(scope="module")
def benchmarks(tiny: Path) -> Evaluation:
    with hub():
        return evaluate(tiny, ASKED, limit=SUBJECT_ROWS, allow_code=True, progress=False)


@pytest.fixture(scope="module")
def wrapped(tiny: Path) -> Evaluation:
    tasks = ["gsm8k", "mmlu", "arc_challenge", "chain_sum"]
    with hub():
        return evaluate(tiny, tasks, limit=1, template="alpaca", progress=False)


def test_the_papers_ten() -> None:
    assert len(BENCHMARKS) == 10
    assert {task: benchmark.shots for task, benchmark in BENCHMARKS.items() if benchmark.shots} == {
        "gsm8k": 8,
        "mmlu": 5,
    }
    assert {task for task, benchmark in BENCHMARKS.items() if benchmark.runs_code} == {
        *["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"]
    }


def test_benchmarks_are_lm_evals_and_other_tasks_are_not() -> None:
    """A name that both have would be taken from lm-eval or from here by chance."""
    manager = TaskManager(include_defaults=True)
    assert set(BENCHMARKS) <= set(manager.all_tasks)
    assert not {*OFFLINE, *KNOWLEDGE} & set(manager.all_tasks)
    assert not set(OFFLINE) & set(KNOWLEDGE)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_benchmark_gives_the_metrics_it_is_read_by(task: str, request: pytest.FixtureRequest) -> None:
    if task not in ASKED:
        pytest.skip("ifeval needs the extra 'benchmarks'")
    found = request.getfixturevalue("benchmarks")
    benchmark = BENCHMARKS[task]
    assert set(benchmark.metrics) <= set(found.results[task])
    assert 0 <= found.scores[task] <= 1
    if benchmark.runs_code:
        # A random model writes no program; that it was run and found wrong is on record.
        assert found.scores[task] == 0.0
        assert {row["outcome"] for row in found.samples[task]} == {"failed"}
        assert found.results[task]["stalled"] == 0
    elif not benchmark.macro:
        assert found.scores[task] == np.mean([found.results[task][name] for name in benchmark.metrics])


@pytest.mark.parametrize(
    "task", ["gsm8k", "mmlu_anatomy", "arc_challenge", "mbpp", "mbpp_plus", "hendrycks_math_algebra"]
)
def test_shots_are_the_papers(benchmarks: Evaluation, task: str) -> None:
    """Counted in the prompts, since lm-eval's task files say other numbers and some win over the argument."""
    prompt = benchmarks.samples[task][0]["arguments"][0][0]
    shots = {"gsm8k": 8, "mmlu_anatomy": 5}.get(task, 0)
    assert benchmarks.shots[task] == shots
    if "mbpp" in task:
        assert prompt.count("[BEGIN]") == 1
        assert "[DONE]" not in prompt
    else:
        assert prompt.count("Answer:") == shots + 1


def test_mmlu_is_the_mean_over_subjects(benchmarks: Evaluation) -> None:
    subjects = {task: rows for task, rows in benchmarks.samples.items() if task.startswith("mmlu_")}
    assert len(subjects) == 57
    assert len(subjects["mmlu_abstract_algebra"]) == SUBJECT_ROWS
    accuracies = [np.mean([row["acc"] for row in rows]) for rows in subjects.values()]
    assert benchmarks.scores["mmlu"] == pytest.approx(np.mean(accuracies))
    questions = [row["acc"] for rows in subjects.values() for row in rows]
    assert benchmarks.results["mmlu"]["acc,none"] == pytest.approx(np.mean(questions)), "lm-eval's own is the other one"
    assert np.mean(accuracies) != np.mean(questions)


@pytest.mark.skipif(why_not() is not None, reason="bubblewrap cannot be used on this machine")
def test_programs_are_counted_that_pass_their_tests() -> None:
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)"
    samples = [{"filtered_resps": [[program]], "target": test} for program in (right, wrong, right, right)]
    found = evaluation._pass_at_1("humaneval", samples)
    assert found["pass@1,create_test"] == 0.75
    assert found["pass@1_stderr,create_test"] == pytest.approx(0.25)
    assert found["stalled"] == 0
    assert [sample["outcome"] for sample in samples] == ["passed", "failed", "passed", "passed"]


@pytest.mark.skipif(why_not() is not None, reason="bubblewrap cannot be used on this machine")
@pytest.mark.parametrize("helper", ["", "def twice(x): return 0\n"], ids=["as it is", "made anew by the program"])
def test_prompts_functions_are_the_prompts(helper: str) -> None:
    """HumanEval's prompts define functions that tests judge by; a program that makes these anew passes nothing."""
    prompt = 'import math\n\ndef twice(x):\n    return 2 * x\n\ndef half(x):\n    """Half of x."""\n'
    target = "def check(candidate):\n    assert math.isclose(twice(candidate(3)), 3)\n\ncheck(half)"
    ends = {}
    for body in ("return x / 2", "return x"):
        sample = {"filtered_resps": [[f"{prompt}    {body}\n{helper}"]], "target": target}
        sample["doc"] = {"prompt": prompt, "entry_point": "half"}
        evaluation._pass_at_1("humaneval", [sample])
        ends[body] = sample["outcome"]
    assert ends == {"return x / 2": "passed", "return x": "failed"}


def test_programs_that_the_machine_had_no_time_for_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = iter(["passed", "stalled", "failed", "stalled"])
    monkeypatch.setattr(evaluation, "run_program", lambda program, tests: ProgramResult(False, next(reasons), ""))
    samples = [{"filtered_resps": ["x = 1"], "target": "assert x == 1"} for _ in range(4)]
    with pytest.warns(UserWarning, match="2 of 4 programs of 'mbpp'"):
        found = evaluation._pass_at_1("mbpp", samples)
    assert (found["pass_at_1,none"], found["stalled"]) == (0.25, 2)


def test_macro_average_by_hand() -> None:
    """Groups within groups, subjects of unequal size."""
    groups = {"mmlu": ["mmlu_stem", "mmlu_humanities"], "mmlu_stem": ["a", "b"], "mmlu_humanities": ["c"]}
    results = {task: {"acc,none": value} for task, value in {"a": 0.2, "b": 0.4, "c": 0.9, "mmlu": 0.77}.items()}
    assert _score("mmlu", results, groups) == pytest.approx(0.5)


def test_ifeval_is_the_mean_of_four() -> None:
    accuracies = dict(zip(BENCHMARKS["ifeval"].metrics, (0.1, 0.2, 0.3, 0.8), strict=True))
    assert set(accuracies) == {
        f"{level}_level_{kind}_acc,none" for level in ("prompt", "inst") for kind in ("strict", "loose")
    }
    row = {**accuracies, "prompt_level_strict_acc_stderr,none": 0.5}
    assert _score("ifeval", {"ifeval": row}, {}) == pytest.approx(0.35)


def test_hash_is_of_the_questions_asked(benchmarks: Evaluation, wrapped: Evaluation) -> None:
    assert set(benchmarks.hashes) == set(benchmarks.samples)
    assert len(set(benchmarks.hashes.values())) > 60, "each task its own"
    assert wrapped.hashes["arc_challenge"] != benchmarks.hashes["arc_challenge"], "another prompt, another hash"


# The template


@pytest.mark.parametrize("task", ["gsm8k", "mmlu_anatomy", "arc_challenge"])
def test_template_wraps_everything_that_lm_eval_asks(benchmarks: Evaluation, wrapped: Evaluation, task: str) -> None:
    """Description and examples included, to the last line break of the prompt that models were tuned on."""
    plain, asked = (found.samples[task][0]["arguments"] for found in (benchmarks, wrapped))
    assert len(plain) == len(asked)
    for (prompt, answer), (wrapped_prompt, wrapped_answer) in zip(plain, asked, strict=True):
        assert wrapped_prompt == PROMPT.format(instruction=prompt)
        if isinstance(answer, str):
            # The space before a choice belongs to running text; after the template's line break there is none.
            assert wrapped_answer == answer.removeprefix(" ")


def test_template_is_not_put_around_itself(wrapped: Evaluation) -> None:
    question = offline_splits("chain_sum")["test"][0]
    assert wrapped.samples["chain_sum"][0]["arguments"][0][0] == PROMPT.format(**question)


# What is refused


@pytest.mark.parametrize("task", [task for task, benchmark in BENCHMARKS.items() if benchmark.runs_code])
def test_code_is_not_run_unasked(loaded: tuple[Any, Any], task: str) -> None:
    model, tokenizer = loaded
    with pytest.raises(UserError, match=rf"'{task}' runs code.*allow_code=True") as caught:
        evaluate(model, ["chain_sum", task], tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named(loaded: tuple[Any, Any]) -> None:
    if IFEVAL:
        pytest.skip("the extra 'benchmarks' is installed")
    model, tokenizer = loaded
    with pytest.raises(UserError, match=r"ifeval need the package 'langdetect'.*benchmarks"):
        evaluate(model, ["ifeval"], tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["chainsum"], {}, "no task 'chainsum': did you mean 'chain_sum'"),
        (["gsm8k_8shot"], {}, "did you mean 'gsm8k'"),
        ("chain_sum", {}, "a list of task names"),
        ([], {}, "a list of task names"),
        (["chain_sum"], {"template": "alpacca"}, "no template 'alpacca': did you mean 'alpaca'"),
        (["chain_sum"], {"precision": "fp16"}, "no precision 'fp16': known are: auto, bfloat16, float16, float32"),
        (["chain_sum"], {"quantization": "8bit"}, "loaded model is not quantized to 8bit"),
        (["chain_sum"], {"tokenizer": None}, "needs its tokenizer"),
        (["chain_sum"], {"split": "valid"}, "no split 'valid': did you mean 'validation'"),
        (["chain_sum", "gsm8k"], {"split": "validation"}, "'gsm8k' has test questions only.*chain_sum"),
        (["world_facts"], {"split": "validation"}, "'world_facts' has test questions only"),
    ],
)
def test_refused(loaded: tuple[Any, Any], tasks: Any, settings: dict[str, Any], message: str) -> None:
    model, tokenizer = loaded
    with pytest.raises(UserError, match=message):
        evaluate(model, tasks, **{"tokenizer": tokenizer, **settings})
