"""Benchmarks and the tasks that need no hub: settings, metrics, and what an evaluation can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from alps_repro.data.datasets import OFFLINE
from alps_repro.errors import UserError, nearest
from alps_repro.evaluation.tasks import knowledge


@dataclass(frozen=True)
class Benchmark:
    """How the paper uses an lm-eval task (its section 4.1).

    Attributes:
        shots: number of few-shot examples; overrides lm-eval's task file.
        metrics: names in lm-eval's results whose mean is the paper's number.
        macro: whether the paper averages over subtasks (MMLU's 57 subjects), where lm-eval's group score weights them
            by size.
        runs_code: whether it runs code that the model wrote.
    """

    shots: int
    metrics: tuple[str, ...]
    macro: bool = False
    runs_code: bool = False


#: The paper's ten benchmarks by their lm-eval names.
BENCHMARKS: dict[str, Benchmark] = {
    "ifeval": Benchmark(
        0,
        tuple(f"{level}_level_{kind}_acc,none" for level in ("prompt", "inst") for kind in ("strict", "loose")),
    ),
    "gpqa_main_zeroshot": Benchmark(0, ("acc,none",)),
    "gsm8k": Benchmark(8, ("exact_match,strict-match",)),
    "hendrycks_math": Benchmark(0, ("exact_match,none",)),
    "humaneval": Benchmark(0, ("pass@1,create_test",), runs_code=True),
    "humaneval_plus": Benchmark(0, ("pass@1,create_test",), runs_code=True),
    "mbpp": Benchmark(0, ("pass_at_1,none",), runs_code=True),
    "mbpp_plus": Benchmark(0, ("pass_at_1,none",), runs_code=True),
    "mmlu": Benchmark(5, ("acc,none",), macro=True),
    "arc_challenge": Benchmark(0, ("acc,none",)),
}


@dataclass(frozen=True)
class Knowledge:
    """A task of general knowledge or language that needs no hub, to measure what fine-tuning cost elsewhere.

    Attributes:
        configuration: makes lm-eval's configuration.
        metric: name of the task's main metric.
        summary: metrics that lm-eval does not compute, from the task's samples and the model's function from a text to
            its tokens.
        higher_is_better: of the main metric.
        wraps: whether the template `alpaca` may wrap its questions.
    """

    configuration: Callable[[], dict[str, Any]]
    metric: str
    summary: Callable[[list[dict[str, Any]], Callable[[str], list[int]]], dict[str, float]] | None = None
    higher_is_better: bool = True
    wraps: bool = True


KNOWLEDGE: dict[str, Knowledge] = {
    "world_facts": Knowledge(knowledge.world_facts, "acc,none"),
    "mmlu_dev": Knowledge(knowledge.mmlu_dev, "acc_by_subject,none", knowledge.by_subject),
    "prose": Knowledge(
        knowledge.prose, "nats_per_token,none", knowledge.nats_per_token, higher_is_better=False, wraps=False
    ),
}

#: Prompt templates around lm-eval's own prompts.
Template = Literal["none", "alpaca"]
TEMPLATES: tuple[str, ...] = get_args(Template)

#: Questions of an offline task: for results, and for choosing settings.
Split = Literal["test", "validation"]
SPLITS: tuple[str, ...] = get_args(Split)

#: Main metric of an offline task in tables; the strict one is kept beside it.
OFFLINE_METRIC = "exact_match,flexible-extract"


def check_tasks(tasks: Sequence[str], allow_code: bool, split: str = "test") -> None:
    """Raise `UserError` if a task is unknown, runs code that is not allowed, or has no such split."""
    known = [*OFFLINE, *BENCHMARKS, *KNOWLEDGE]
    for task in tasks:
        if task not in known:
            raise UserError(f"There is no task '{task}': {nearest(task, known)}")
        if split != "test" and task not in OFFLINE:
            raise UserError(
                f"The task '{task}' has test questions only: leave split='{split}' to offline tasks "
                f"({', '.join(OFFLINE)})."
            )
        if runs_code(task) and not allow_code:
            raise UserError(
                f"The task '{task}' runs code that the model wrote: pass allow_code=True if this machine may run it, "
                "in a sandbox."
            )


def check_limit(limit: Any) -> int | None:
    """A number of questions per task, or None for all; `UserError` for any other (lm-eval would take 0.5 for half)."""
    if limit is None:
        return None
    number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
    if not number or not 1 <= limit < float("inf") or limit != int(limit):
        raise UserError(
            f"The parameter 'limit' is {limit!r}: give a whole number of questions, 1 or more, or leave it out for all."
        )
    return int(limit)


def shots(task: str) -> int:
    """Number of few-shot examples of a task."""
    return BENCHMARKS[task].shots if task in BENCHMARKS else 0


def wraps(task: str) -> bool:
    """Whether the template `alpaca` may wrap a task's questions."""
    return task in BENCHMARKS or (task in KNOWLEDGE and KNOWLEDGE[task].wraps)


def runs_code(task: str) -> bool:
    """Whether a task runs code that the model wrote."""
    return task in BENCHMARKS and BENCHMARKS[task].runs_code


def headline(task: str) -> tuple[str, ...]:
    """The metrics whose mean is a task's score."""
    if task in BENCHMARKS:
        return BENCHMARKS[task].metrics
    return (KNOWLEDGE[task].metric if task in KNOWLEDGE else OFFLINE_METRIC,)
