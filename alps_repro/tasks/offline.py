"""The offline tasks: questions of `data.OFFLINE`, asked as models were tuned on them."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM

from alps_repro.data import OFFLINE, PROMPT, offline_splits
from alps_repro.tasks import configuration


def graded(name: str, split: str) -> dict[str, Any]:
    """Greedy answers, graded twice: `strict-match` compares all that the model says, `flexible-extract` the last
    thing in it that looks like an answer."""
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
    """The log-likelihood (nats) of the right answers to the same questions; says more than right or wrong."""
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
    """lm-eval's model, with prompt and answer made into tokens apart where the prompt ends as the template does.

    lm-eval counts white space at the end of a prompt as part of the answer, so that the template's last line break
    would be scored, and where a tokenizer has a token for ":\\n", the model would not even see it. Training, too, makes
    tokens of prompt and answer apart.
    """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context[-1:].isspace():
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
