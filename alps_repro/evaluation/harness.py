"""Evaluation with lm-evaluation-harness, in this process and on the loaded model."""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from alps_repro.data.datasets import OFFLINE
from alps_repro.data.prompts import MAX_LOST, PROMPT
from alps_repro.devices import PRECISIONS, check_products, resolved_precision
from alps_repro.devices import device as placed
from alps_repro.errors import UserError, one_of
from alps_repro.evaluation.benchmarks import (
    BENCHMARKS,
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
from alps_repro.models.folders import is_adapter, resolve
from alps_repro.models.loading import load_model, merged
from alps_repro.models.precision import round_frozen

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel

    from alps_repro.evaluation.tasks.offline import PromptedLM


@dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`.

    Attributes:
        scores: {task: its main metric, between 0 and 1; for prose, nats per token}.
        results: {task: {lm-eval's metric: value}}, with standard errors over questions (`..._stderr`) where there are
            any; for an offline task also `answer_loglikelihood` (nats, mean over the right answers) and
            `answer_accuracy` (share of these that are the model's greedy prediction, token by token); for a task that
            runs code also `stalled` (programs that the machine had no time for).
        samples: {task: one dict per question, by `doc_id`, with prompt, answer and grade}.
        versions: {task: lm-eval's version of it}.
        shots: {task: number of few-shot examples}.
        hashes: {task: SHA-256 over questions, prompts and answers}.
        truncated: {task: questions whose prompt was truncated on the left, because with an answer it does not fit into
            the model's positions}.
        neutralized: the model's own generation settings that `greedy` set aside.
    """

    scores: dict[str, float]
    results: dict[str, dict[str, float]]
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    versions: dict[str, Any]
    shots: dict[str, int]
    hashes: dict[str, str]
    truncated: dict[str, int] = field(default_factory=dict)
    neutralized: dict[str, Any] = field(default_factory=dict)


#: Settings of a generation_config.json that do not affect greedy decoding, or that lm-eval sets itself.
_HARMLESS = (
    *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "use_cache", "pad_token_id", "bos_token_id", "decoder_start_token_id", "renormalize_logits"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("compile_config", "disable_compile", "continuous_batching_config", "transformers_version"),
    "_from_model_config",
)


@contextmanager
def greedy(model: torch.nn.Module, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Make a model decode greedily and nothing else, whatever its generation_config.json says.

    An answer ends at the tokenizer's end token, which models are trained with (without it, a batch would continue past
    the answer), and at those of the model's own end tokens that are special or added ones: an ordinary token among them
    would truncate answers.

    Args:
        model: its generation configuration is replaced within the context.
        tokenizer: the model's.

    Yields:
        {setting that was set aside: its value}, for those that would change what is generated.
    """
    from transformers import GenerationConfig

    # An adapter's model and the one around it may each have one.
    owners: list[tuple[Any, GenerationConfig]]
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
    """Restore Python's, NumPy's and torch's global random generators afterwards; lm-eval reseeds all three."""
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
    """Suppress lm-eval's messages about every loaded model and task; errors are still shown."""
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
    model: str | Path | PreTrainedModel,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    quantization: str = "none",
    batch_size: int = 16,
    limit: int | None = None,
    template: str = "none",
    split: str = "test",
    precision: str | None = None,
    device: str = "auto",
    allow_code: bool = False,
    max_lost: float = MAX_LOST,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model on tasks with lm-evaluation-harness. No weights are written to disk for it.

    Args:
        model: a name, checkpoint folder, hub id or adapter folder; or a loaded model, with its `tokenizer`. Answers are
            generated greedily: other settings of its generation_config.json are set aside, with a warning.
        tasks: of `BENCHMARKS` (the paper's ten, with its shots), `data.datasets.OFFLINE` or `KNOWLEDGE`.
        tokenizer: of a loaded model.
        quantization: for a named model: `none`, `8bit` or `4bit`.
        batch_size: fixed, because scores on GPUs depend on it.
        limit: number of questions per task; all by default.
        template: `none` uses lm-eval's own prompts; `alpaca` wraps them, few-shot examples included, in the template
            that models were tuned with. Offline tasks already use that template; prose is never wrapped.
        split: `validation` evaluates an offline task on its validation questions, for choosing settings; none of them
            is in `test`.
        precision: of matrix products, one of `devices.PRECISIONS`; all else, and the softmax of log-likelihoods, is in
            float32. Models that are compared should have the same one, whatever each is stored in: `auto`, the default
            for a named model, is the same for all on one machine. A loaded model's weights stay as they are; by
            default it is used in its own dtype, else under autocast.
        device: of `devices.DEVICES`, for a named model.
        allow_code: run code that the model wrote (HumanEval, MBPP), in `alps_repro.evaluation.sandbox`: lm-eval, which
            would run it in this process, only generates it.
        max_lost: share of a task's questions whose prompt may be truncated to the model's positions, as lm-eval does
            it; above it the run stops before the model is evaluated. 1 accepts any number.
        progress: show progress bars.

    Returns:
        Scores, all metrics and all samples.

    Raises:
        UserError: a task is unknown, needs the network where there is none, or runs code without `allow_code`; a loaded
            model has another dtype or device than requested; a GPU is requested or present and cannot be used; or the
            prompts do not fit into the model.
    """
    if isinstance(tasks, str) or not tasks:
        raise UserError("evaluate takes a list of task names, such as ['chain_sum'].")
    job = _checked(_Job(tuple(tasks), batch_size, limit, template, split, precision, allow_code, max_lost, progress))
    loaded, tokenizer, precision = _loaded(model, tokenizer, quantization, precision, device)
    with _tidied(job, loaded, tokenizer), _explained(job.tasks):
        with greedy(loaded, tokenizer) as aside, kept_generators(), quiet():
            lm = _lm(job, loaded, tokenizer, precision)
            answers = _ask(job, lm)
            truncated = _truncated(lm.truncated, answers["samples"])
    for task, number in truncated.items():
        if number:
            total = len({row["doc_id"] for row in answers["samples"][task]})
            warnings.warn(
                f"For the task '{task}', {number} of {total} prompts were truncated on the left: with an answer they "
                f"do not fit into the model's {lm.max_length} positions.",
                stacklevel=2,
            )
    return _evaluation(answers, job.tasks, truncated, aside)


@dataclass(frozen=True)
class _Job:
    """What a model is evaluated on, and how; as `evaluate` takes it."""

    tasks: tuple[str, ...]
    batch_size: int
    limit: int | None
    template: str
    split: str
    precision: str | None
    allow_code: bool
    max_lost: float
    progress: bool


def _checked(job: _Job) -> _Job:
    """The job with its limit as a whole number; `UserError` if it is impossible for any model."""
    one_of("template", job.template, TEMPLATES)
    if job.precision is not None:
        one_of("precision", job.precision, PRECISIONS)
    check_tasks(job.tasks, job.allow_code, one_of("split", job.split, SPLITS))
    limit = check_limit(job.limit)
    if job.batch_size < 1:
        raise UserError(f"The batch_size is {job.batch_size}: give 1 or more.")
    if any(runs_code(task) for task in job.tasks) and (reason := why_not()):
        raise UserError(reason)
    return replace(job, limit=limit)


def _loaded(
    model: str | Path | PreTrainedModel, tokenizer: Any, quantization: str, precision: str | None, device: str
) -> tuple[PreTrainedModel, Any, str]:
    """The model, loaded and merged if it is named, its tokenizer, and the precision of its products."""
    if isinstance(model, (str, Path)):
        import torch

        precision = resolved_precision(precision or "auto", device)
        # An adapter is merged in float32, before anything is rounded.
        stored = None if quantization == "none" and not is_adapter(resolve(model)) else torch.float32
        model, tokenizer = load_model(model, quantization, dtype=stored, device=device)
        model = cast("PreTrainedModel", merged(model)) if quantization == "none" else model
        round_frozen(model.requires_grad_(False), precision)
    else:
        _check_loaded(model, quantization, precision, device)
        precision = resolved_precision(precision, device) if precision else _dtype(model)
    check_products(precision, model.device.type)
    if tokenizer is None:
        raise UserError("A loaded model needs its tokenizer: pass tokenizer=...")
    return model, tokenizer, precision


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_loaded(model: PreTrainedModel, quantization: str, precision: str | None, device: str) -> None:
    """Raise `UserError` if a loaded model cannot be used as requested."""
    own = _dtype(model)
    if precision is not None and own not in ("float32", precision):
        raise UserError(
            f"The loaded model is in {own}, and precision '{precision}' is requested: leave precision out, or load the "
            "model in float32."
        )
    if device != "auto" and placed(device) != model.device.type:
        raise UserError(
            f"The loaded model is on '{model.device.type}', and device '{device}' is requested: leave device out, or "
            "load the model there."
        )
    if quantization != "none" and not getattr(model, f"is_loaded_in_{quantization}", False):
        raise UserError(
            f"The loaded model is not quantized to {quantization}: leave quantization out, or load the model with it."
        )


@contextmanager
def _tidied(job: _Job, model: PreTrainedModel, tokenizer: Any) -> Iterator[None]:
    """Set the environment and the tokenizer's template for a job; restore both, and the model's mode, afterwards."""
    training, before, own_template = model.training, os.environ.get("TQDM_DISABLE"), tokenizer.chat_template
    if job.allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if not job.progress:
        os.environ["TQDM_DISABLE"] = "1"
    if job.template == "alpaca":
        # All messages, since a task's description is one of its own; Jinja drops the last line break.
        tokenizer.chat_template = PROMPT.format(instruction="{{ messages | map(attribute='content') | join }}") + "\n"
    try:
        yield
    finally:
        tokenizer.chat_template = own_template
        model.train(training)
        if not job.progress:
            os.environ.pop("TQDM_DISABLE")
            if before is not None:
                os.environ["TQDM_DISABLE"] = before


@contextmanager
def _explained(tasks: Sequence[str]) -> Iterator[None]:
    """Raise `UserError` for a package or a network connection that the tasks need and do not find."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"The tasks {', '.join(tasks)} need the package '{error.name}': run pip install 'alps-repro[benchmarks]'."
        ) from error
    except Exception as error:
        # A bare LookupError is how nltk reports missing tokenizer data.
        missing = isinstance(error, OSError) or type(error) is LookupError
        if missing or "offline" in str(error).lower() or _is_hub_error(error):
            raise UserError(
                f"The questions of {', '.join(tasks)} could not be loaded from the hub ({type(error).__name__}): check "
                f"the connection, or use offline tasks: {', '.join(OFFLINE)}."
            ) from error
        raise


def _is_hub_error(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("huggingface_hub", "datasets", "httpx", "requests", "fsspec")


def _lm(job: _Job, model: PreTrainedModel, tokenizer: Any, precision: str) -> PromptedLM:
    from alps_repro.evaluation.tasks.offline import PromptedLM

    return PromptedLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=job.batch_size,
        max_lost=job.max_lost,
        mixed_precision_dtype=None if precision == _dtype(model) else precision,
        softmax_dtype="float32",  # logits may have 8 bits; their logarithms, summed over an answer, need more
    )


def _ask(job: _Job, lm: PromptedLM) -> dict[str, Any]:
    """lm-eval's `results`, `samples`, `versions`, `n-shot` and `group_subtasks`, all tasks together."""
    from lm_eval import simple_evaluate

    manager = _manager(any(task in BENCHMARKS for task in job.tasks))
    answers: dict[str, Any] = {}
    # One call of lm-eval has one number of shots, and wraps all of its tasks or none.
    wrap = job.template == "alpaca"
    kinds = {task: (shots(task), wrap and wraps(task), runs_code(task)) for task in job.tasks}
    for few, wrapped, code in sorted(set(kinds.values())):
        alike = [task for task, kind in kinds.items() if kind == (few, wrapped, code)]
        part = simple_evaluate(
            model=lm,
            tasks=[configuration for task in alike for configuration in _configurations(task, job.split)],
            num_fewshot=few,
            task_manager=manager,
            limit=job.limit,
            bootstrap_iters=1000,
            log_samples=True,
            apply_chat_template=wrapped,
            fewshot_as_multiturn=False,
            confirm_run_unsafe_code=code,  # needed even though it only generates
            predict_only=code,
        )
        if code:
            part["results"] = {task: _pass_at_1(task, rows) for task, rows in part["samples"].items()}
        for key in ("results", "samples", "versions", "n-shot", "group_subtasks"):
            answers.setdefault(key, {}).update(part.get(key) or {})
    for task in kinds:
        if task in OFFLINE:
            _add_answers(task, answers)
        elif task in KNOWLEDGE and (summary := KNOWLEDGE[task].summary):
            answers["results"][task].update(summary(answers["samples"][task], lm.tok_text))
    return answers


def _truncated(questions: dict[str, set[int]], samples: dict[str, Any]) -> dict[str, int]:
    """Number of questions of each task whose prompt was truncated, for generation or for the answer's likelihood."""
    names = {task: (task, f"{task}_answer") if task in OFFLINE else (task,) for task in samples}
    return {task: len(set().union(*(questions.get(name, ()) for name in own))) for task, own in names.items()}


def _configurations(task: str, split: str) -> list[Any]:
    """A task as lm-eval takes it: by name if it is lm-eval's own, else by its configuration."""
    if task in OFFLINE:
        from alps_repro.evaluation.tasks import offline

        return [offline.graded(task, split), offline.answers(task, split)]
    return [KNOWLEDGE[task].configuration() if task in KNOWLEDGE else task]


def _add_answers(task: str, answers: dict[str, Any]) -> None:
    """Merge the likelihoods of an offline task's right answers with the grades of the generated ones."""
    name = f"{task}_answer"
    for key in ("versions", "n-shot"):
        del answers[key][name]
    metrics = answers["results"].pop(name)
    answers["results"][task].update({key: value for key, value in metrics.items() if key.startswith("answer_")})
    loglikelihoods = {row["doc_id"]: row["answer_loglikelihood"] for row in answers["samples"].pop(name)}
    for row in answers["samples"][task]:
        row["answer_loglikelihood"] = loglikelihoods[row["doc_id"]]


@functools.cache  # with lm-eval's own tasks it reads 14,000 files: 5 to 10 s
def _manager(benchmarks: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=benchmarks)


def _pass_at_1(task: str, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Run each sample's program with its tests in the sandbox, store how it ended, and count those that pass."""
    for sample in samples:
        program = sample["filtered_resps"][0]
        while not isinstance(program, str):  # lists of one, as the task's filter made them
            program = program[0]
        tests, question = f"{sample['target']}\n", sample.get("doc", {})
        if entry := question.get("entry_point"):
            # HumanEval's prompts define functions that its tests use (`poly`, `encode_shift`): the prompt's own are
            # taken, even if the program redefines them. The requested function has no body there.
            tests = f"{question['prompt']}\n    pass\ndel {entry}\n{tests}"
        sample["outcome"] = run_program(program, tests).reason
    passed = np.array([sample["outcome"] == "passed" for sample in samples], dtype=float)
    stalled = sum(sample["outcome"] == "stalled" for sample in samples)
    if stalled:
        warnings.warn(
            f"{stalled} of {len(samples)} programs of '{task}' were stopped because this machine had no time for them, "
            "and count as not passed: evaluate again when it is idle.",
            UserWarning,
            stacklevel=2,
        )
    (metric,) = BENCHMARKS[task].metrics
    error = float(passed.std(ddof=1) / np.sqrt(len(passed))) if len(passed) > 1 else float("nan")
    return {metric: float(passed.mean()), metric.replace(",", "_stderr,"): error, "stalled": float(stalled)}


def _evaluation(
    answers: dict[str, Any], tasks: Sequence[str], truncated: dict[str, int], neutralized: dict[str, Any]
) -> Evaluation:
    import hashlib

    from lm_eval.utils import handle_non_serializable

    samples = json.loads(json.dumps(answers["samples"], default=handle_non_serializable))
    hashes = {
        task: hashlib.sha256(
            json.dumps(sorted([s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in rows)).encode()
        ).hexdigest()
        for task, rows in samples.items()
    }
    results = {
        task: {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for task, row in answers["results"].items()
    }
    return Evaluation(
        scores={task: _score(task, results, answers["group_subtasks"]) for task in tasks},
        results=results,
        samples=samples,
        versions=dict(answers["versions"]),
        shots={task: int(n) for task, n in answers["n-shot"].items()},
        hashes=hashes,
        truncated=truncated,
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
