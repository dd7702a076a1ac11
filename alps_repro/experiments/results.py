"""What the record of each kind of run holds as its result: JSON values, by name.

The types are for readers and the type checker. A key may be missing (`NotRequired`) where the record is older than the
key, or where the run has no such value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

#: A number for each head, (layers, heads).
PerHead = list[list[float]]


class LayoutResult(TypedDict):
    """The arguments of a `HeadLayout`."""

    architecture: str
    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden_size: int


class LocalizeResult(TypedDict):
    """A localization.

    Attributes:
        scores: name of the file in the results folder's `scores/`.
        values: the scores.
        layout: of the model's heads.
        compared_in: the dtype that both models were compared in, where they are stored in different ones.
    """

    scores: str
    values: PerHead
    layout: LayoutResult
    compared_in: NotRequired[str]


class FinetuneResult(TypedDict):
    """A fine-tuning; the attributes are those of `Finetuned`.

    Attributes:
        heads: the trained heads, (layer, head) each.
        losses: training loss of each optimizer step, nats per loss token.
        tokens: seen in training, padding left out.
        rank: of LoRA and similar methods.
        rows: counts of training examples: given, used, cut, dropped and so on.
        validation: loss on the validation examples after each epoch.
        closed_gates: of JoLA, {kind of gate: (closed, all)}.
        skipped: optimizer steps that changed nothing, because gradients overflowed in float16; missing if there are
            none.
    """

    heads: Sequence[Sequence[int]]
    losses: Sequence[float]
    tokens: int
    rank: int | None
    rows: NotRequired[dict[str, int]]
    validation: NotRequired[Sequence[float]]
    closed_gates: NotRequired[dict[str, Sequence[int]]]
    skipped: NotRequired[int]


class PerQuestion(TypedDict, total=False):
    """What a paired test needs of a task's questions, in the order of `doc_id`.

    Attributes:
        correct: a digit per question, 1 for a right answer.
        answer_loglikelihood: of the right answers, nats.
        loglikelihood: of passages of prose, nats.
        tokens: of passages of prose.
    """

    correct: str
    answer_loglikelihood: list[float]
    loglikelihood: list[float]
    tokens: list[float]


class EvaluateResult(TypedDict):
    """An evaluation; but for the last ones, {task: value}.

    Attributes:
        scores: the headline number: a share in [0, 1]; of prose, nats per token.
        metrics: all of lm-eval's metrics and their standard errors.
        questions: how many were asked.
        shots: examples in the prompt.
        task_versions: lm-eval's.
        headline_metric: the metrics whose mean the score is.
        per_question: the grade of each question.
        truncated: questions whose prompt was cut from the left.
        samples: name of the file in the results folder's `samples/`.
        neutralized: the model's own generation settings that were set aside.
        training_seconds: of the fine-tuning that made the model.
    """

    scores: dict[str, float]
    metrics: dict[str, dict[str, float]]
    questions: dict[str, int]
    shots: dict[str, int]
    task_versions: dict[str, Any]
    headline_metric: dict[str, Sequence[str]]
    per_question: dict[str, PerQuestion]
    truncated: NotRequired[dict[str, int]]
    samples: str
    neutralized: NotRequired[dict[str, Any]]
    training_seconds: NotRequired[float]


class RecallRow(TypedDict):
    """The recall of one metric on one checkpoint, in [0, 1]."""

    metric: str
    head_matrix: str
    factor: float
    seed: int
    recall: float


class RecallResult(TypedDict):
    """How many of the changed heads each metric finds.

    Attributes:
        rows: the table that `recall_by_metric` gives.
        peaks: {head matrix: the largest probability in each head's distribution}.
    """

    rows: list[RecallRow]
    peaks: dict[str, PerHead]


class ImportanceResult(TypedDict):
    """Importance and scores of a task model's heads.

    Attributes:
        importance: nats per loss token.
        scores: {metric: scores}.
    """

    importance: PerHead
    scores: dict[str, PerHead]


#: {data set: three principal coordinates for each question}
EmbedResult = dict[str, list[list[float]]]
