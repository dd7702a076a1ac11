"""The offline tasks: questions of `data.datasets.OFFLINE`, in the prompt format that models were tuned with."""

from __future__ import annotations

import functools
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from alps_repro.data.datasets import OFFLINE, offline_splits
from alps_repro.data.prompts import MAX_LOST, PROMPT, beginning, encode, positions
from alps_repro.errors import UserError
from alps_repro.evaluation.tasks import configuration

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance


def graded(name: str, split: str) -> dict[str, Any]:
    """lm-eval's configuration for greedy answers, graded twice.

    `strict-match` compares the whole output, `flexible-extract` the last part of it that looks like an answer.
    """
    patterns = {"strict-match": r"(?s)^\s*(.*?)\s*$", "flexible-extract": f"(?i){OFFLINE[name].answer}"}
    return configuration(
        name,
        _questions(name, split),
        (),
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="response",
        generation_kwargs={"until": ["\n", "###"], "do_sample": False, "max_gen_toks": 24},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}],
        filter_list=[
            {
                "name": filter_name,
                "filter": [
                    {"function": "regex", "regex_pattern": pattern, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
            for filter_name, pattern in patterns.items()
        ],
    )


def answers(name: str, split: str) -> dict[str, Any]:
    """lm-eval's configuration for the log-likelihood (nats) of the right answers to the same questions."""
    return configuration(
        f"{name}_answer",
        _questions(name, split),
        ("answer_loglikelihood", "answer_accuracy"),
        output_type="loglikelihood",
        doc_to_text="prompt",
        doc_to_target="response",
        process_results=_answer,
    )


def _answer(doc: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, float]:
    ((loglikelihood, greedy),) = results
    return {"answer_loglikelihood": loglikelihood, "answer_accuracy": float(greedy)}


def _questions(name: str, split: str) -> list[dict[str, str]]:
    return [{**row, "prompt": PROMPT.format(**row)} for row in offline_splits(name)[split]]


class PromptedLM(HFLM):
    """lm-eval's model with prompts tokenized as in training, which counts the prompts that do not fit.

    If a prompt ends as the template does, prompt and answer are tokenized separately, as in training: lm-eval counts
    white space at the end of a prompt as part of the answer, so that the template's last line break would be scored,
    and if a tokenizer has a token for ":\\n", the model would not even see it. Nothing that a tokenizer appends follows
    a prompt, and a prompt begins as in training.

    Prompts that are too long are truncated on the left, as lm-eval does it: for generation to the model's positions
    minus the maximal length of an answer, for the likelihood of an answer to its positions. Prose is scored in windows,
    each of its tokens once, so that nothing is lost.

    Attributes:
        max_lost: share of a task's questions whose prompt may be truncated.
        truncated: {task: `doc_id`s of the questions whose prompt was truncated}.
    """

    _rolling = False

    def __init__(self, *, max_lost: float = MAX_LOST, **settings: Any) -> None:
        super().__init__(**settings)
        self.max_lost = max_lost
        self.truncated: dict[str, set[int]] = {}

    @cached_property
    def _beginning(self) -> list[int]:
        return beginning(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        return self._beginning[-1] if self._beginning else super().prefix_token_id

    @property
    def max_length(self) -> int:
        return positions(self.model.config) or self._DEFAULT_MAX_LENGTH

    def tok_text(self, string: str) -> list[int]:
        return encode(self.tokenizer, string)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        # Windows of prose already begin with `prefix_token_id`.
        begins = not self._rolling if add_special_tokens is None else add_special_tokens
        tokens = [*(self._beginning if begins else ()), *self.tok_text(string)]
        return tokens[-left_truncate_len:] if left_truncate_len else tokens

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        rows = [torch.tensor(self.tok_encode(string, left_truncate_len=left_truncate_len)) for string in strings]
        pad = functools.partial(pad_sequence, batch_first=True, padding_side=padding_side)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0)
        return pad(rows, padding_value=self.tokenizer.pad_token_id), mask

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            return self._beginning or [self.prefix_token_id], self.tok_text(continuation)
        if not context[-1:].isspace():
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_text(continuation)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        for request, (_, _, answer) in zip(requests, pairs):
            self._check_room(request, len(answer))
        # The last token is predicted and not seen.
        self._count(requests, [len(context) + len(answer) - 1 > self.max_length for _, context, answer in pairs])
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._rolling = False

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        cut = []
        for request in requests:
            prompt, settings = request.args
            answer = normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"]
            self._check_room(request, answer)
            cut.append(len(self.tok_encode(prompt)) > self.max_length - answer)
        self._count(requests, cut)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _check_room(self, request: Instance, answer: int) -> None:
        if answer >= self.max_length:
            raise UserError(
                f"The task '{request.task_name}' takes answers of {answer} tokens, which leave no room for a prompt in "
                f"the model's {self.max_length} positions: use a model with more of them, or another task."
            )

    def _count(self, requests: list[Instance], cut: list[bool]) -> None:
        """Record whose prompts are truncated, before the model is evaluated."""
        everyone, lost = defaultdict(set), defaultdict(set)
        for request, is_cut in zip(requests, cut):
            everyone[request.task_name].add(request.doc_id)
            if is_cut:
                lost[request.task_name].add(request.doc_id)
        for task, questions in lost.items():
            if len(questions) > self.max_lost * len(everyone[task]):
                raise UserError(
                    f"For the task '{task}', {len(questions)} of {len(everyone[task])} prompts do not fit into the "
                    f"model's {self.max_length} positions with an answer, and max_lost allows {self.max_lost:.3g} of "
                    "them to be truncated: use a model with more positions, or set max_lost to 1 to go on."
                )
            self.truncated.setdefault(task, set()).update(questions)
