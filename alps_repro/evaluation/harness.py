"""Evaluation by lm-evaluation-harness, in this process and on the loaded model."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alps_repro.data.datasets import OFFLINE
from alps_repro.data.prompts import MAX_LOST, PROMPT
from alps_repro.devices import check_products
from alps_repro.devices import device as placed
from alps_repro.errors import UserError, one_of
from alps_repro.evaluation.benchmarks import (
    AUTOCASTS,
    BENCHMARKS,
    DTYPES,
    KNOWLEDGE,
    SPLITS,
    TEMPLATES,
    check_limit,
    check_tasks,
    headline,
    runs_code,
    shots,
    wraps,
)
from alps_repro.evaluation.sandbox import run_program, why_not
from alps_repro.models.loading import load_model

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    scores: {task: the number that stands for it, between 0 and 1; for prose, nats per token}. results: {task:
        {lm-eval's metric: value}}, with standard errors over items (`..._stderr`) where there are any; of an offline
        task also `answer_loglikelihood` (nats, mean over the right answers) and `answer_accuracy` (share of these that
        are what the model would say greedily, token by token); of one that runs code also `stalled` (programs that the
        machine had no time for). samples: {task: one dict per question, by `doc_id`, with prompt, answer and grade}.
        versions, shots, hashes: {task: ...}; a hash is over questions, prompts and answers. truncated: {task: questions
        whose prompt was cut from the left, since it did not fit into the model's positions with an answer behind it}.
        neutralized: what `greedy` set aside of the model's own settings.
    """

    scores: dict[str, float]
    results: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    versions: dict[str, Any]
    shots: dict[str, int]
    hashes: dict[str, str]
    truncated: dict[str, int] = field(default_factory=dict)
    neutralized: dict[str, Any] = field(default_factory=dict)


#: Settings of a generation_config.json that leave greedy decoding as it is, or that lm-eval gives itself.
_HARMLESS = (
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "use_cache", "pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
    "_from_model_config",
)


@contextmanager
def greedy(model: torch.nn.Module, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Let a model generate the likeliest token each time and nothing else, whatever its generation_config.json says.

    An answer ends at the tokenizer's end token, which models are trained with (behind it a batch would go on), and at
    those of the model's own end tokens that are special or added ones: an ordinary one would cut answers off.

    Yields:
        {setting that was set aside: its value}, of those that would change what is generated.
    """
    from transformers import GenerationConfig

    # An adapter's model and the one around it may each have one.
    owners = [(module, vars(module)["generation_config"]) for module in model.modules() if _generates(module)]
    own = owners[0][1] if owners else GenerationConfig()
    ends = own.eos_token_id if isinstance(own.eos_token_id, (list, tuple)) else [own.eos_token_id]
    ends = [number for number in ends if number is not None]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    kept = list(dict.fromkeys([n for n in ends if n in special] + [tokenizer.eos_token_id]))
    neutral = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=kept[0] if len(kept) == 1 else kept,
        pad_token_id=own.pad_token_id,
    )
    defaults = GenerationConfig._get_default_generation_params()
    aside = {
        name: value
        for name, value in json.loads(own.to_json_string(use_diff=True)).items()
        if name in vars(neutral) and name not in (*_HARMLESS, "eos_token_id") and value != defaults.get(name)
    }
    if set(ends) != set(kept):
        aside["eos_token_id"] = own.eos_token_id
    if aside:
        listed = ", ".join(f"{name} = {value}" for name, value in aside.items())
        warnings.warn(
            f"Settings of the model's generation_config.json that change greedy decoding are set aside: {listed}.",
            UserWarning,
            stacklevel=4,
        )
    try:
        for module, _ in owners:
            module.generation_config = neutral
        yield aside
    finally:
        for module, before in owners:
            module.generation_config = before


def _generates(module: torch.nn.Module) -> bool:
    return vars(module).get("generation_config") is not None


@contextmanager
def kept_generators() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's global generators as they were; lm-eval reseeds all three."""
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what lm-eval says of every loaded model and task; errors still show."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def evaluate(
    model: str | Path | torch.nn.Module,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    quantization: str = "none",
    batch_size: int = 16,
    limit: int | None = None,
    template: str = "none",
    split: str = "test",
    autocast: str = "none",
    dtype: str | None = None,
    device: str = "auto",
    allow_code: bool = False,
    max_lost: float = MAX_LOST,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model on tasks with lm-evaluation-harness. No weights are written to disk for it.

    model: a name, checkpoint folder, hub id or adapter folder; or a loaded model, with its `tokenizer`.
        Answers are generated greedily: other settings of its generation_config.json are set aside, with a warning.
    tasks: of `BENCHMARKS` (the paper's ten, with its shots), `data.OFFLINE` or `KNOWLEDGE`.
    limit: questions per task. batch_size: fixed, since scores on GPUs move with it.
    template: `none` asks lm-eval's own text; `alpaca` wraps it, examples included, in the template that models were
        tuned on. Offline tasks carry that template already and are never wrapped; prose is none to be answered.
    split: `validation` asks an offline task's other questions, for choosing settings; none of them is in `test`.
    autocast: of `AUTOCASTS`; bfloat16 is the faster one on processors that multiply it (AMX).
    dtype: of `DTYPES`, what the weights of a named model are loaded in, float32 where none is said: models that are
        compared want the same one, whatever each is stored in. A loaded model is taken as it is.
    device: of `devices.DEVICES`, for a named model.
    allow_code: run code that the model wrote (HumanEval, MBPP), in `alps_repro.sandbox`: lm-eval, which would run it
        in this process, only generates it.
    max_lost: share of a task's questions whose prompt may be cut to the model's positions, as lm-eval does it; more of
        them stop the run before the model is asked, and 1 goes on whatever is cut.

    Raises:
        UserError: a task is unknown, needs the network where there is none, or runs code without leave; a loaded model
            is in another dtype, or elsewhere, than is asked for; a GPU is asked for, or there, and cannot be used; or
            its prompts do not fit into the model.
    """
    if isinstance(tasks, str) or not tasks:
        raise UserError("evaluate takes a list of task names, such as ['chain_sum'].")
    one_of("template", template, TEMPLATES)
    one_of("autocast", autocast, AUTOCASTS)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    check_tasks(tasks, allow_code, one_of("split", split, SPLITS))
    limit = check_limit(limit)
    if batch_size < 1:
        raise UserError(f"The batch_size {batch_size} asks no question at a time: give 1 or more.")
    if any(runs_code(task) for task in tasks) and (reason := why_not()):
        raise UserError(reason)
    if isinstance(model, (str, Path)):
        import torch

        model, tokenizer = load_model(model, quantization, dtype=getattr(torch, dtype or "float32"), device=device)
    else:
        _check_loaded(model, quantization, dtype, device)
    own_dtype = str(model.dtype).removeprefix("torch.")
    check_products(own_dtype, model.device.type)
    if tokenizer is None:
        raise UserError("A loaded model needs its tokenizer: pass tokenizer=...")

    from lm_eval import simple_evaluate

    from alps_repro.evaluation.tasks.offline import PromptedLM

    shown = None if progress else "1"
    training, before = model.training, os.environ.get("TQDM_DISABLE")
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if shown:
        os.environ["TQDM_DISABLE"] = shown
    own_template = tokenizer.chat_template
    if template == "alpaca":
        # All messages, since a task's description is one of its own; Jinja drops the last line break.
        tokenizer.chat_template = PROMPT.format(instruction="{{ messages | map(attribute='content') | join }}") + "\n"
    try:
        with greedy(model, tokenizer) as aside, kept_generators(), quiet():
            lm = PromptedLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_lost=max_lost,
                mixed_precision_dtype=None if autocast == "none" else autocast,
                # Of logits in 8 or 11 bits; their logarithms, summed over an answer, want more.
                softmax_dtype=None if own_dtype == "float32" else "float32",
            )
            manager = _manager(any(task in BENCHMARKS for task in tasks))
            found: dict[str, Any] = {}
            # lm-eval takes one number of shots a call, and wraps all of its tasks or none.
            wrap = template == "alpaca"
            asked = {task: (shots(task), wrap and wraps(task), runs_code(task)) for task in tasks}
            for few, wrapped, code in sorted(set(asked.values())):
                alike = [task for task, how in asked.items() if how == (few, wrapped, code)]
                part = simple_evaluate(
                    model=lm,
                    tasks=[configuration for task in alike for configuration in _configurations(task, split)],
                    num_fewshot=few,
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=1000,
                    log_samples=True,
                    apply_chat_template=wrapped,
                    fewshot_as_multiturn=False,
                    confirm_run_unsafe_code=code,  # it only generates, but asks all the same
                    predict_only=code,
                )
                if code:
                    part["results"] = {task: _pass_at_1(task, rows) for task, rows in part["samples"].items()}
                for key in ("results", "samples", "versions", "n-shot", "group_subtasks"):
                    found.setdefault(key, {}).update(part.get(key) or {})
            for task in asked:
                if task in OFFLINE:
                    _add_answers(task, found)
                elif task in KNOWLEDGE and (summary := KNOWLEDGE[task].summary):
                    found["results"][task].update(summary(found["samples"][task], lm.tok_text))
            found["truncated"] = _truncated(lm.truncated, found["samples"])
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"The tasks {', '.join(tasks)} need the package '{error.name}': run pip install 'alps-repro[benchmarks]'."
        ) from error
    except Exception as error:
        # What nltk's tokenizer data lacks is a bare LookupError.
        missing = isinstance(error, OSError) or type(error) is LookupError
        if missing or "offline" in str(error).lower() or _is_hub_error(error):
            raise UserError(
                f"The questions of {', '.join(tasks)} could not be had from the hub ({type(error).__name__}): check "
                f"the connection, or use offline tasks: {', '.join(OFFLINE)}."
            ) from error
        raise
    finally:
        tokenizer.chat_template = own_template
        model.train(training)
        if shown:
            os.environ.pop("TQDM_DISABLE")
            if before is not None:
                os.environ["TQDM_DISABLE"] = before
    for task, number in found["truncated"].items():
        if number:
            asked = len({row["doc_id"] for row in found["samples"][task]})
            warnings.warn(
                f"Of the task '{task}', {number} of {asked} prompts were cut from the left: with an answer they do not "
                f"fit into the model's {lm.max_length} positions.",
                stacklevel=2,
            )
    return _evaluation(found, tasks, aside)


def _check_loaded(model: Any, quantization: str, dtype: str | None, device: str) -> None:
    """Raise `UserError` where a loaded model is not as it was asked to be loaded."""
    own = str(model.dtype).removeprefix("torch.")
    if dtype is not None and dtype != own:
        raise UserError(
            f"The loaded model is in {own}, and dtype '{dtype}' is asked for: leave dtype out, or load the model in it."
        )
    if device != "auto" and placed(device) != model.device.type:
        raise UserError(
            f"The loaded model is on '{model.device.type}', and device '{device}' is asked for: leave device out, or "
            "load the model there."
        )
    if quantization != "none" and not getattr(model, f"is_loaded_in_{quantization}", False):
        raise UserError(
            f"The loaded model is not quantized to {quantization}: leave quantization out, or load the model with it."
        )


def _truncated(found: dict[str, set[int]], samples: dict[str, Any]) -> dict[str, int]:
    """How many questions of each task lost a part of their prompt, asked for an answer or for its likelihood."""
    names = {task: (task, f"{task}_answer") if task in OFFLINE else (task,) for task in samples}
    return {task: len(set().union(*(found.get(name, ()) for name in own))) for task, own in names.items()}


def _configurations(task: str, split: str) -> list[Any]:
    """What lm-eval is given for a task: the name of its own, or the configuration of one that is not."""
    if task in OFFLINE:
        from alps_repro.evaluation.tasks import offline

        return [offline.graded(task, split), offline.answers(task, split)]
    return [KNOWLEDGE[task].configuration() if task in KNOWLEDGE else task]


def _add_answers(task: str, found: dict[str, Any]) -> None:
    """Put what lm-eval found of an offline task's right answers beside the grades of what the model said."""
    name = f"{task}_answer"
    for key in ("versions", "n-shot"):
        del found[key][name]
    metrics = found["results"].pop(name)
    found["results"][task].update({key: value for key, value in metrics.items() if key.startswith("answer_")})
    loglikelihoods = {row["doc_id"]: row["answer_loglikelihood"] for row in found["samples"].pop(name)}
    for row in found["samples"][task]:
        row["answer_loglikelihood"] = loglikelihoods[row["doc_id"]]


@functools.cache  # lm-eval reads its 14,000 task files for one with its own tasks: 5 to 10 s
def _manager(benchmarks: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=benchmarks)


def _is_hub_error(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("huggingface_hub", "datasets", "httpx", "requests", "fsspec")


def _pass_at_1(task: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Run each sample's program beside its tests in the sandbox, note how it ended, and count those that pass."""
    for sample in samples:
        program = sample["filtered_resps"][0]
        while not isinstance(program, str):  # lists of one, as the task's filter made them
            program = program[0]
        tests, question = f"{sample['target']}\n", sample.get("doc", {})
        if entry := question.get("entry_point"):
            # HumanEval's prompts define functions that its tests judge by (`poly`, `encode_shift`): these are the
            # prompt's, whatever the program makes of them. The one that is asked for stands there without a body.
            tests = f"{question['prompt']}\n    pass\ndel {entry}\n{tests}"
        sample["outcome"] = run_program(program, tests).reason
    passed = np.array([sample["outcome"] == "passed" for sample in samples], dtype=float)
    stalled = sum(sample["outcome"] == "stalled" for sample in samples)
    if stalled:
        warnings.warn(
            f"{stalled} of {len(samples)} programs of '{task}' were stopped while this machine had no time for them, "
            "and count as not passed: evaluate again when it is idle.",
            UserWarning,
            stacklevel=2,
        )
    (metric,) = BENCHMARKS[task].metrics
    error = float(passed.std(ddof=1) / np.sqrt(len(passed))) if len(passed) > 1 else float("nan")
    return {metric: float(passed.mean()), metric.replace(",", "_stderr,"): error, "stalled": float(stalled)}


def _evaluation(found: dict[str, Any], tasks: Sequence[str], neutralized: dict[str, Any]) -> Evaluation:
    import hashlib

    from lm_eval.utils import handle_non_serializable

    samples = json.loads(json.dumps(found["samples"], default=handle_non_serializable))
    hashes = {
        task: hashlib.sha256(
            json.dumps(sorted([s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in rows)).encode()
        ).hexdigest()
        for task, rows in samples.items()
    }
    results = {
        task: {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for task, row in found["results"].items()
    }
    return Evaluation(
        scores={task: _score(task, results, found["group_subtasks"]) for task in tasks},
        results=results,
        samples=samples,
        versions=dict(found["versions"]),
        shots={task: int(n) for task, n in found["n-shot"].items()},
        hashes=hashes,
        truncated=found["truncated"],
        neutralized=neutralized,
    )


def _score(task: str, results: dict[str, dict[str, float]], groups: dict[str, list[str]]) -> float:
    rows = [results[task]]
    if task in BENCHMARKS and BENCHMARKS[task].macro:
        rows = [results[name] for name in _leaves(task, groups)]
    return float(np.mean([[row[metric] for metric in headline(task)] for row in rows]))


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    below = groups.get(task)
    return [leaf for name in below for leaf in _leaves(name, groups)] if below else [task]
