"""Where the rows of an attention head are, in each architecture.

A projection is a matrix of shape (output rows, input columns) here, as `torch.nn.Linear` stores it; row numbers below
count its outputs. Heads and key/value groups are counted from 0; query head `h` of `n` reads group
`h // (n / g)` of `g`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from alps_repro.errors import UserError

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")

#: Possible paths from the root of a model (or of its checkpoint's tensor names) to its decoder layers.
PREFIXES = (
    "",
    "model.",
    "transformer.",
    "gpt_neox.",
    "decoder.",
    "model.decoder.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
)


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` stores its attention projections.

    Attributes:
        attention: path of a layer's attention module, with a placeholder for the layer's number.
        projections: names of the query, key and value projections; three times the same name if they are fused.
        order: `separate` matrices; or fused as all query rows, then key, then value rows (`stacked`); or fused group by
            group, each group's query heads, then its key, then its value (`grouped`: GPT-NeoX's interleaving, with one
            head per group, and all of Falcon's variants).
        transposed: whether they are stored as (input, output), as in GPT-2's `Conv1D`.
        output: name of the output projection, whose input is the per-head attention outputs in query head order.
        bias: whether the projections have one: always, never, or as the setting of that name in a configuration says.
        output_bias: whether the output projection has one if they have.
        norms: names of the normalizations within attention.
    """

    attention: str
    projections: tuple[str, str, str]
    order: Literal["separate", "stacked", "grouped"] = "separate"
    transposed: bool = False
    output: str = "o_proj"
    bias: bool | str = False
    output_bias: bool = True
    norms: tuple[str, ...] = ()


_SEPARATE = Architecture("layers.{}.self_attn", ("q_proj", "k_proj", "v_proj"), bias="attention_bias")
_NORMED = replace(_SEPARATE, norms=("q_norm", "k_norm"))

#: Every supported architecture, by the `model_type` of its configuration. To add one: check in its modelling code how
#: the projection's output is split into heads, add a line, and add a tiny configuration to `tests/tiny_models.py`; the
#: tests in `tests/heads/test_heads.py` then compare it with the model's own forward pass.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _SEPARATE,
    "mistral": replace(_SEPARATE, bias=False),
    "qwen2": replace(_SEPARATE, bias=True, output_bias=False),
    "qwen3": _NORMED,
    "gemma": _SEPARATE,
    "gemma2": _SEPARATE,
    "gemma3_text": _NORMED,
    "olmo2": _NORMED,
    "smollm3": _SEPARATE,
    "phi": replace(_SEPARATE, output="dense", bias=True, norms=("q_layernorm", "k_layernorm")),
    "opt": replace(_SEPARATE, output="out_proj", bias="enable_bias"),
    "phi3": Architecture("layers.{}.self_attn", ("qkv_proj",) * 3, "stacked"),
    "gpt2": Architecture("h.{}.attn", ("c_attn",) * 3, "stacked", transposed=True, output="c_proj", bias=True),
    "gpt_neox": Architecture(
        "layers.{}.attention", ("query_key_value",) * 3, "grouped", output="dense", bias="attention_bias"
    ),
    "falcon": Architecture("h.{}.self_attention", ("query_key_value",) * 3, "grouped", output="dense", bias="bias"),
}


@dataclass(frozen=True)
class HeadLayout:
    """The attention geometry of a model: how many heads it has, and in which rows of which projection each one is.

    Attributes:
        architecture: the configuration's `model_type`.
        layers: number of decoder layers.
        heads: number of query heads per layer.
        groups: number of key/value groups per layer.
        head_dim: rows of a head.
        hidden_size: columns of a projection.
    """

    architecture: str
    layers: int
    heads: int
    groups: int
    head_dim: int
    hidden_size: int

    @classmethod
    def of(cls, model_or_config: Any) -> HeadLayout:
        """The layout of a `transformers` model or configuration.

        Raises:
            UserError: the architecture is not in `ARCHITECTURES`, or its numbers do not fit together.
        """
        config = getattr(model_or_config, "config", model_or_config)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        name = getattr(config, "model_type", None)
        if name not in ARCHITECTURES:
            raise UserError(
                f"The architecture '{name}' is not known: add where its heads are to ARCHITECTURES in "
                "alps_repro/heads/layout.py (known are: " + ", ".join(sorted(ARCHITECTURES)) + ")."
            )
        heads = config.num_attention_heads
        if name == "falcon":
            grouped = config.new_decoder_architecture or not config.multi_query
            groups = config.num_kv_heads if grouped else 1
        else:
            groups = getattr(config, "num_key_value_heads", None) or heads
        layout = cls(
            architecture=name,
            layers=config.num_hidden_layers,
            heads=heads,
            groups=groups,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1),
            hidden_size=config.hidden_size,
        )
        if min(layout.layers, layout.heads, layout.groups, layout.head_dim, layout.hidden_size) < 1:
            raise UserError(
                f"The configuration has {layout.layers} layers, {layout.heads} query heads and {layout.groups} "
                f"key/value groups of width {layout.head_dim} on a hidden size of {layout.hidden_size}: each must be "
                "at least 1; check the config.json."
            )
        if layout.heads % layout.groups:
            raise UserError(
                f"The configuration has {layout.heads} query heads and {layout.groups} key/value groups; the groups "
                "must divide the heads: check num_attention_heads and num_key_value_heads."
            )
        return layout

    @property
    def total(self) -> int:
        """Number of query heads in the whole model."""
        return self.layers * self.heads

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that read one key/value group."""
        return self.heads // self.groups

    @property
    def transposed(self) -> bool:
        """Whether projections are stored as (input, output)."""
        return ARCHITECTURES[self.architecture].transposed

    def group(self, head: int) -> int:
        """The key/value group that query head `head` reads."""
        return head // self.heads_per_group

    def module(self, layer: int, part: Part) -> str:
        """Path of the projection that holds `part` in `layer`, from the decoder (see `PREFIXES`)."""
        architecture = ARCHITECTURES[self.architecture]
        return f"{architecture.attention.format(layer)}.{architecture.projections[PARTS.index(part)]}"

    def modules(self, layer: int) -> tuple[str, ...]:
        """The distinct projections of a layer: three paths, or one where they are fused."""
        return tuple(dict.fromkeys(self.module(layer, part) for part in PARTS))

    def tensors(self, layer: int, config: Any) -> set[str]:
        """Names of all tensors that the attention of `layer` may have, from the decoder (see `PREFIXES`).

        config: the model's configuration, which may say whether projections have biases.
        """
        architecture = ARCHITECTURES[self.architecture]
        where = architecture.attention.format(layer)
        bias = architecture.bias
        biased = bool(getattr(config, bias, False)) if isinstance(bias, str) else bias
        names = {f"{path}.weight" for path in (*self.modules(layer), self.output_module(layer))}
        names |= {f"{path}.bias" for path in self.modules(layer) if biased}
        names |= {f"{self.output_module(layer)}.bias"} if biased and architecture.output_bias else set()
        return names | {f"{where}.{norm}.{kind}" for norm in architecture.norms for kind in ("weight", "bias")}

    def output_module(self, layer: int) -> str:
        """Path of the projection behind the attention of `layer`, from the decoder (see `PREFIXES`).

        Its input (..., heads · head_dim) is the concatenation of the per-head outputs in query head order: head `h`
        is at `h · head_dim` to `(h + 1) · head_dim`.
        """
        architecture = ARCHITECTURES[self.architecture]
        return f"{architecture.attention.format(layer)}.{architecture.output}"

    def projection_rows(self, part: Part) -> int:
        """Number of output rows of the projection that holds `part`."""
        own = {"query": self.heads, "key": self.groups, "value": self.groups}[part]
        fused = ARCHITECTURES[self.architecture].order != "separate"
        return (self.heads + 2 * self.groups if fused else own) * self.head_dim

    def rows(self, part: Part, index: int) -> range:
        """The rows of query head `index`, or of key/value group `index`, in the projection that holds `part`.

        Raises:
            UserError: there is no such head or group.
        """
        count = self.heads if part == "query" else self.groups
        if not 0 <= index < count:
            raise UserError(f"There is no {part} {index}: a layer of this model has 0 to {count - 1}.")
        order = ARCHITECTURES[self.architecture].order
        block = index
        if order == "stacked":
            block += {"query": 0, "key": self.heads, "value": self.heads + self.groups}[part]
        elif order == "grouped":
            m = self.heads_per_group
            block = {
                "query": (index // m) * (m + 2) + index % m,
                "key": index * (m + 2) + m,
                "value": index * (m + 2) + m + 1,
            }[part]
        return range(block * self.head_dim, (block + 1) * self.head_dim)

    def split(self, part: Part) -> np.ndarray:
        """All rows of `part` in head (or group) order: int64 array, (heads or groups) · head_dim long."""
        count = self.heads if part == "query" else self.groups
        return np.concatenate([np.asarray(self.rows(part, i)) for i in range(count)])

    def prefix(self, names: Iterable[str]) -> str:
        """The one of `PREFIXES` that precedes the decoder layers in these module or tensor names.

        Raises:
            UserError: none or more than one fits.
        """
        names = set(names)
        first = self.module(0, "query")
        fitting = [p for p in PREFIXES if f"{p}{first}" in names or f"{p}{first}.weight" in names]
        if len(fitting) != 1:
            raise UserError(
                f"'{first}.weight' was found {len(fitting)} times in this {self.architecture} model, and must be there "
                "exactly once for its heads to be located: use a complete checkpoint of the architecture that its "
                "config.json names."
            )
        return fitting[0]

    def selected_rows(self, heads: Iterable[tuple[int, int]]) -> dict[str, np.ndarray]:
        """The rows that are trained with these heads: {projection path: sorted int64 row numbers}.

        A key/value group is taken once, however many of its heads are selected.
        """
        rows: dict[str, set[int]] = {}
        for layer, head in heads:
            for part, index in zip(PARTS, (head, self.group(head), self.group(head))):
                rows.setdefault(self.module(layer, part), set()).update(self.rows(part, index))
        return {module: np.array(sorted(r), dtype=np.int64) for module, r in sorted(rows.items())}
