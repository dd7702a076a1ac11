"""What a profile needs, before any of it is run: how many runs, and the memory, tokens and disk space of each kind.

No weight is loaded: parameters are counted on models without data, memory follows from formulas, whose assumptions
`assumptions` tells. GB are 10^9 bytes throughout.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from alps_repro.data.datasets import DEFAULT_TRAIN_SIZE, HUB, OFFLINE, offline_splits
from alps_repro.data.prompts import PROMPT
from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig, LocalizeConfig
from alps_repro.experiments.grid import evaluations
from alps_repro.experiments.profile import Profile
from alps_repro.experiments.records import KINDS, Config, Kind, predecessors
from alps_repro.heads.layout import HeadLayout
from alps_repro.heads.selection import head_count
from alps_repro.models.embedded import EMBEDDED, embedded_model
from alps_repro.training.adapters import ADAPTERS, lora_weights
from alps_repro.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

GB = 1e9

#: Data sets of the hub: examples as the paper counts them, and tokens of prompt and response. The tokens are rough
#: assumptions, not measured.
ASSUMED: dict[str, tuple[int, int]] = {
    "ultrachat": (200_000, 400),
    "alpaca": (52_000, 120),
    "mathinstruct": (262_000, 250),
    "camel_math": (50_000, 550),
    "magicoder": (110_000, 500),
    "codealpaca": (20_000, 120),
}

OFFLINE_EXAMPLES = 64  # measured for the length of an offline data set

#: Positions whose logits are held at a time: `training.loss.CHUNK`, which is not imported because torch is slow to.
CHUNK = 1024

#: Bytes that a card loses to CUDA's context and the libraries' workspaces: assumed, not measured.
CARD_OVERHEAD = 1 * GB


class Lengths(NamedTuple):
    """Tokens of a data set's examples: mean and longest of prompt and response, and the longest response."""

    mean: float
    longest: int
    response: int


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that memory follows from; all counts are of weights, tied ones once.

    attention: in the query, key and value projections, biases included (`biased`). linear: in all linear layers but
        the output layer, which is what bitsandbytes quantizes. stored: bytes of a weight in the checkpoint. gated:
        whether the MLP multiplies two projections of width `intermediate`.
    """

    layout: HeadLayout
    intermediate: int
    gated: bool
    vocabulary: int
    total: int
    attention: int
    linear: int
    biased: bool
    stored: int

    @property
    def row(self) -> int:
        """Weights in a row of the query, key and value projections."""
        return self.layout.hidden_size + self.biased


def _llama(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    head_dim: int,
    wide: int,
    vocabulary: int,
    tied: bool,
    stored: int,
) -> Shape:
    layout = HeadLayout("llama", layers, heads, groups, head_dim, hidden)
    attention = layers * (heads + 2 * groups) * head_dim * hidden
    linear = attention + layers * (heads * head_dim * hidden + 3 * hidden * wide)
    total = linear + (2 * layers + 1) * hidden + vocabulary * hidden * (1 if tied else 2)
    return Shape(layout, wide, True, vocabulary, total, attention, linear, False, stored)


#: From the config.json of these models, so that neither the hub nor leave to read from it is needed.
KNOWN: dict[str, Shape] = {
    EMBEDDED: _llama(30, 576, 9, 3, 64, 1536, 49_152, tied=True, stored=4),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 32, 8, 64, 8192, 128_256, tied=True, stored=2),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 24, 8, 128, 8192, 128_256, tied=True, stored=2),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 32, 8, 128, 14_336, 128_256, tied=False, stored=2),
}


@cache
def shape(name: str) -> Shape:
    """The shape of a model: one of `KNOWN`, a checkpoint folder, or a hub id, of which only config.json is read.

    Raises:
        UserError: no configuration can be had, or its architecture is not known.
    """
    return KNOWN[name] if name in KNOWN else _from_config(name)


def _from_config(name: str) -> Shape:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # hub, network and file errors have no common base class
        raise UserError(
            f"The configuration of '{name}' could not be had ({type(error).__name__}): give a checkpoint folder, a hub "
            f"id that can be reached, or one of {', '.join(KNOWN)}."
        ) from error
    layout = HeadLayout.of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    prefix = layout.prefix(modules)
    projections = [modules[prefix + path] for layer in range(layout.layers) for path in layout.modules(layer)]
    output = model.get_output_embeddings()
    linear = [m for m in modules.values() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not output]
    text = config.get_text_config()
    wide = (getattr(text, key, None) for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"))
    return Shape(
        layout=layout,
        intermediate=next((number for number in wide if number), 4 * layout.hidden_size),
        gated=any(path.endswith(("gate_proj", "gate_up_proj")) for path in modules),
        vocabulary=text.vocab_size,
        total=sum(p.numel() for p in model.parameters()),
        attention=sum(p.numel() for module in projections for p in module.parameters()),
        linear=sum(module.weight.numel() for module in linear),
        biased=projections[0].bias is not None,
        stored=getattr(text.dtype, "itemsize", 4),
    )


@cache
def lengths(dataset: str, max_length: int) -> Lengths:
    """Of an offline data set as its first examples are in the embedded model's tokens; of the others as assumed."""
    if dataset not in OFFLINE:
        return Lengths(min(ASSUMED[dataset][1], max_length), max_length, max_length)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    rows = offline_splits(dataset, train_size=OFFLINE_EXAMPLES)["train"]
    prompts = tokenizer.encode_batch([PROMPT.format(instruction=row["instruction"]) for row in rows])
    responses = [len(coded.ids) + 1 for coded in tokenizer.encode_batch([row["response"] for row in rows])]
    both = [min(len(coded.ids) + more, max_length) for coded, more in zip(prompts, responses)]
    return Lengths(sum(both) / len(both), max(both), max(responses))


@dataclass(frozen=True)
class Runs:
    """What a profile's tables need: each run once, by name."""

    finetunings: dict[str, FinetuneConfig] = field(default_factory=dict)
    localizations: dict[str, LocalizeConfig] = field(default_factory=dict)
    evaluations: dict[str, EvaluateConfig] = field(default_factory=dict)

    @property
    def by_kind(self) -> dict[Kind, dict[str, Any]]:
        """{kind of run: {name: configuration}}."""
        return {"finetune": self.finetunings, "localize": self.localizations, "evaluate": self.evaluations}

    @property
    def configs(self) -> list[Config]:
        """All of them."""
        return [config for runs in self.by_kind.values() for config in runs.values()]

    def add(self, config: Config) -> None:
        """Add a run and what has to be run before it; a model that is named is there already."""
        known = self.by_kind.get(KINDS[type(config)])
        if known is not None and config.name not in known:
            known[config.name] = config
            for before in predecessors(config).values():
                self.add(before)


def needed(profile: Profile) -> Runs:
    """Every run that a profile's tables need, task models of localizations included, whether done yet or not."""
    runs = Runs()
    for cell in evaluations(profile).values():
        runs.add(cell.config)
    return runs


@cache
def trained_parameters(config: FinetuneConfig) -> tuple[int, int]:
    """Least and most weights that a fine-tuning trains.

    The two differ where heads follow from scores that are not there yet: query heads of one group share its key and
    value rows, so that the same number of heads trains most where no two are of one group.
    """
    model = shape(config.base)
    method, layout = METHODS[config.method], model.layout
    outside = model.total - model.attention if config.scope == "all" else 0
    adapter, count = ADAPTERS[method.adapter], head_count(config.ratio if method.uses_ratio else 1.0, layout.total)
    if adapter.weights and not adapter.by_rank:
        own = adapter.weights(layout, count, 0)
        return own, own
    if not method.uses_scores and method.rank:
        assert adapter.weights is not None
        own = adapter.weights(layout, 0, method.rank(layout, config.ratio, None))
        return own, own
    if not method.uses_scores:
        assert method.select is not None
        heads = method.select(layout, config.ratio, None, config.choice_seed)
        rows = 0 if heads is None else sum(map(len, layout.selected_rows(heads).values()))
        return outside + rows * model.row, outside + rows * model.row
    least = count + 2 * math.ceil(count / layout.heads_per_group)
    most = count + 2 * min(count, layout.layers * layout.groups)
    if method.rank:  # matched to the weights of such a selection
        assert adapter.weights is not None
        unit, besides = lora_weights(layout), adapter.weights(layout, 0, 0)
        matched = (blocks * layout.head_dim * layout.hidden_size - besides for blocks in (least, most))
        least, most = (adapter.weights(layout, 0, max(1, round(weights / unit))) for weights in matched)
        return least, most
    if method.draws:  # matched, too, and may stop short of it by less than a head with its group
        least = max(least - 2, 0)
    return outside + least * layout.head_dim * model.row, outside + most * layout.head_dim * model.row


def _on_gpu(base: str, device: str) -> bool:
    """Whether a run is planned for a GPU: all are but those of the embedded model, unless its device says so."""
    return device == "cuda" or (device == "auto" and base != EMBEDDED)


def memory(config: FinetuneConfig, size: Lengths | None = None) -> dict[str, float]:
    """Bytes that a fine-tuning holds at once, by what they are; not all of it peaks together.

    Interpreter and libraries come on top. The sum was compared with trainings of SmolLM2 on a CPU and steps of
    Llama-3.2-1B on an H100 (`tests/experiments/test_plan.py`). By default a batch is as wide as the data set's longest
    example, and has as many loss tokens as the longest response.

    weights: float32 where the scope is `all` (frozen rows included); else in the precision or quantized, and float32
        for embeddings, norms and the trained rows. copies: weights in the precision, where they are kept in another
        one. gradients,
        optimizer: float32, two moments of AdamW. activations: what the backward pass has to find again, see `_layer`.
        logits: see `_logits`.
    """
    model = shape(config.base)
    recipe, layout = config.recipe, model.layout
    size = size or lengths(config.dataset, recipe.max_length)
    gpu, quantized = _on_gpu(config.base, recipe.device), config.quantization != "none"
    number = 4 if recipe.precision == "float32" else 2
    trained = trained_parameters(config)[1]
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    output = model.vocabulary * layout.hidden_size

    if config.scope == "all":
        # The rows of selected heads are parameters of their own beside the frozen matrix they replace.
        rows = trained - (model.total - model.attention)
        weights: float = 4 * (model.total + (rows if rows < model.attention else 0))
        copies: float = 0 if number == 4 else number * (model.linear + output)
    else:
        # NF4: half a byte, and a float32 per block of 64. LLM.int8: a byte, and a float32 per row.
        share = {"none": number, "4bit": 0.5 + 4 / 64, "8bit": 1 + 4 / layout.hidden_size}[config.quantization]
        outside = model.total - model.linear
        # The output layer is rounded: beside the embedding that it shares, or in place of its own weight.
        shared = outside < 1.5 * output
        rounded = 0 if number == 4 else number * output if shared else (number - 4) * output
        weights = share * model.linear + 4 * outside + rounded + 4 * trained
        # Query, key and value are dequantized anew in every layer, and kept for its backward pass.
        cast = model.attention / (layout.layers if recipe.gradient_checkpointing else 1)
        copies = number * cast if quantized else 0

    layers = layout.layers
    layer = _layer(config, number, size.longest)
    # With checkpointing, what enters each layer, and one layer in full.
    per_token = layers * 4 * layout.hidden_size + layer if recipe.gradient_checkpointing else layers * layer
    if config.quantization == "8bit" and recipe.gradient_checkpointing:
        per_token += layers * number * _int8_inputs(model)
    return {
        "weights": weights,
        "copies": copies,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": micro * size.longest * per_token,
        "logits": _logits(config, number, size),
        "overhead": CARD_OVERHEAD if gpu else 0,
    }


def _logits(config: FinetuneConfig, number: int, size: Lengths) -> float:
    """Bytes that `training.loss` holds besides activations; `number`: bytes of the forward pass' numbers.

    Thrice in float32, the logits of a chunk: themselves or their gradient, their logarithms, the loss' gradient. For
    every loss token the input of the output layer and its gradient. Where that layer trains and gradients of earlier
    micro-batches are held, its own are new: their sum, those of a chunk, and these before they became float32.
    """
    model, recipe = shape(config.base), config.recipe
    micro = min(recipe.micro_batch_size, recipe.batch_size)
    positions = micro * (min(size.response, size.longest - 1) if recipe.loss_on == "response" else size.longest - 1)
    held = 12 * min(CHUNK, positions) * model.vocabulary + 8 * positions * model.layout.hidden_size
    if config.scope == "all" and recipe.batch_size > micro:
        held += (8 if number == 4 else 10) * model.vocabulary * model.layout.hidden_size
    return held


def _int8_inputs(model: Shape) -> int:
    """Inputs of a layer's products, of which bitsandbytes' LLM.int8 holds each until its backward pass.

    Checkpointing does not free them: `MatMul8bitLt` and `MatMul8bitFp` do not hold them by `save_for_backward`.
    """
    return 2 * model.layout.hidden_size + model.layout.heads * model.layout.head_dim + model.intermediate


def _layer(config: FinetuneConfig, number: int, longest: int) -> float:
    """Bytes of activations per token that a layer keeps for its backward pass; `number`: bytes of most of them.

    The inputs of both norms, in float32; q, k, v (key and value repeated for every query head) and attention's result,
    and of its mask a number per position; gate, up and the activated gate of the MLP; the inputs of the projections
    whose weights are trained or in int8, and of the norms' weights. Layers below the lowest trained one keep nothing,
    which is left out here.
    """
    model = shape(config.base)
    hidden, attended = model.layout.hidden_size, model.layout.heads * model.layout.head_dim
    wide = (3 if model.gated else 1) * model.intermediate
    if config.scope == "all":
        norms, inputs, wide = 4 * 4 * hidden, 2 * hidden, wide + model.intermediate
    else:
        inputs = hidden
        if ADAPTERS[METHODS[config.method].adapter].by_rank:
            inputs += 3 * trained_parameters(config)[1] // lora_weights(model.layout)
        norms = 2 * 4 * hidden
        if config.quantization == "8bit":
            inputs, wide = inputs + hidden, wide + model.intermediate
    return norms + 4 * model.layout.heads + number * (4 * attended + longest + inputs + wide)


def _steps(config: FinetuneConfig) -> tuple[int, float]:
    """Optimizer steps, and passes of an example."""
    recipe = config.recipe
    if recipe.max_steps:
        return recipe.max_steps, recipe.max_steps * recipe.batch_size
    examples = recipe.examples or (ASSUMED[config.dataset][0] if config.dataset in HUB else DEFAULT_TRAIN_SIZE)
    examples = math.ceil(examples * recipe.data_share)
    return math.ceil(examples / recipe.batch_size * recipe.epochs), examples * recipe.epochs


def _tokens(config: FinetuneConfig) -> float:
    return _steps(config)[1] * lengths(config.dataset, config.recipe.max_length).mean


def _disk(config: FinetuneConfig) -> tuple[float, float]:
    """Bytes of the saved model, and of checkpoints beside it while it is trained (two are kept, a third written)."""
    trained = trained_parameters(config)[1]
    saved = 4 * (shape(config.base).total if config.scope == "all" else trained)
    made = math.ceil(_steps(config)[0] / config.recipe.checkpoint_steps)
    return saved, min(made, 3) * (saved + 8 * trained)


def plan(profile: Profile, card: float = 80.0) -> pd.DataFrame:
    """What a profile's fine-tunings need: a row for each model, method, ratio, scope and quantization.

    Args:
        profile: the profile.
        card: memory of a GPU in GB, with which `fits` compares the total.

    Returns:
        columns model, method, ratio (NaN where it changes nothing), scope, quantization; runs; trained_least and
        trained_most (weights); weights, copies, gradients, optimizer, activations, logits, overhead and total (GB of
        one run, see `memory`; the largest of the data sets); fits; tokens (of all runs together); models (GB on disk
        of all saved models), checkpoints (GB beside them while one is trained). `attrs` counts the profile's runs.

    Raises:
        UserError: the configuration of a model cannot be had.
    """
    import pandas as pd

    runs = needed(profile)
    alike: dict[tuple[Any, ...], list[FinetuneConfig]] = defaultdict(list)
    for config in runs.finetunings.values():
        ratio = config.ratio if METHODS[config.method].uses_ratio else math.nan
        # As text, since NaN is not equal to itself.
        alike[config.base, config.method, str(ratio), config.scope, config.quantization].append(config)
    rows = []
    methods = list(METHODS)
    for (base, method, ratio, scope, quantization), configs in sorted(
        alike.items(), key=lambda kind: (profile.models.index(kind[0][0]), methods.index(kind[0][1]), kind[0][2:])
    ):
        ranges = [trained_parameters(config) for config in configs]
        needs = max((memory(config) for config in configs), key=lambda need: sum(need.values()))
        total = sum(needs.values()) / GB
        disks = [_disk(config) for config in configs]
        row: dict[str, Any] = {"model": base, "method": method, "ratio": float(ratio), "scope": scope}
        row |= {"quantization": quantization, "runs": len(configs)}
        row |= {"trained_least": min(least for least, _ in ranges), "trained_most": max(most for _, most in ranges)}
        row |= {name: size / GB for name, size in needs.items()}
        row |= {"total": total, "fits": total <= card, "tokens": sum(map(_tokens, configs))}
        row |= {"models": sum(saved for saved, _ in disks) / GB, "checkpoints": max(beside for _, beside in disks) / GB}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.attrs = {kind: len(getattr(runs, kind)) for kind in ("finetunings", "localizations", "evaluations")}
    return table


def assumptions(profile: Profile) -> list[str]:
    """The assumptions behind the numbers of `plan`, in lines to be read."""
    configs = needed(profile).finetunings.values()
    names = sorted({config.dataset for config in configs})
    hub = [name for name in names if name in HUB]
    own = [name for name in names if name not in HUB]
    said = [f"{name} {ASSUMED[name][0]:,} of {ASSUMED[name][1]}" for name in hub]
    longest = max((config.recipe.max_length for config in configs), default=0)
    measured = [f"{name} {lengths(name, longest).mean:.0f} to {lengths(name, longest).longest}" for name in own]
    bases = sorted({config.base for config in configs})
    on_gpu = sorted({config.base for config in configs if _on_gpu(config.base, config.recipe.device)})
    lines = [
        "GB are 10^9 bytes, of one process; the total adds up what does not all peak together. "
        "Weights that are trained are held in float32, with a gradient and two moments of AdamW. 'models': all saved "
        "models of the runs; 'beside': checkpoints while one of them is trained.",
        "Where heads follow from scores, trained weights are a range: they depend on which heads share a group; memory "
        "is that of the largest.",
    ]
    if on_gpu:
        lines.append(
            f"{', '.join(on_gpu)}: on a GPU, in the recipe's precision with copies of trained weights in it, "
            f"and {CARD_OVERHEAD / GB:.0f} GB for CUDA. Steps of Llama-3.2-1B and 3B on an H100 and an H200 held 8 to "
            "16 % less than this says; larger models were not measured."
        )
    if EMBEDDED in bases and EMBEDDED not in on_gpu:
        lines.append(
            f"{EMBEDDED}: in float32 on a CPU; interpreter and libraries (0.6 GB) come on top, and freed blocks that "
            "the C library's allocator keeps."
        )
    if hub:
        lines.append(
            f"Activations and logits: every example of a micro-batch as long as max_length ({longest}), all of it "
            f"response. Tokens: examples of assumed mean length ({'; '.join(said)}), not measured."
        )
    if own:
        lines.append(
            f"Tokens of examples, mean to longest, measured on {OFFLINE_EXAMPLES} in {EMBEDDED}'s tokens: "
            f"{'; '.join(measured)}."
        )
    if shipped := sorted(KNOWN.keys() & bases):
        lines.append(f"From config.json numbers that this package brings along: {', '.join(shipped)}.")
    return lines


#: Of a job besides its tensors, in bytes: two Python processes (papermill and the kernel) with their libraries.
PROCESSES = 1.5 * GB
#: Tokens of a prompt in an evaluation on a CPU: above what offline tasks ask.
CPU_PROMPT = 512


def resources(config: FinetuneConfig | LocalizeConfig | EvaluateConfig) -> dict[str, int]:
    """What a run asks a cluster for: `mem_mb` (main memory, 10^6 bytes) and `gpu` (how many).

    All models but the embedded one are taken to run on a GPU, and that one where its device is `cuda`; localizations
    read projections one by one and run on the CPU. An evaluation makes its fine-tuning where that is not there, and
    asks for the larger of the two. On a CPU half as much again as planned is asked for, and what checkpointing saves
    is not taken off: the C library's allocator keeps freed blocks, up to that much in trainings of SmolLM2. Beside a
    GPU: the float32 weights once, for saving them.
    """
    if isinstance(config, LocalizeConfig):
        return {"mem_mb": 4000, "gpu": 0}
    tuning = config if isinstance(config, FinetuneConfig) else config.model
    base = tuning if isinstance(tuning, str) else tuning.base
    model = shape(base)
    device = config.recipe.device if isinstance(config, FinetuneConfig) else config.device
    if _on_gpu(base, device):
        return {"mem_mb": math.ceil((4 * model.total + 4 * GB) / 1e6), "gpu": 1}
    tensors = 0.0
    if isinstance(tuning, FinetuneConfig):
        recipe = tuning.recipe.model_copy(update={"gradient_checkpointing": False})
        tensors = 1.5 * sum(memory(tuning.model_copy(update={"recipe": recipe})).values())
    if isinstance(config, EvaluateConfig):  # logits, and their logarithms
        asked = 4 * model.total + 8 * config.batch_size * CPU_PROMPT * model.vocabulary
        tensors = max(tensors, asked)
    return {"mem_mb": math.ceil((tensors + PROCESSES) / 1e6), "gpu": 0}
