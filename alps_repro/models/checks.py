"""Checks that a model's folder holds what its configuration says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError
from alps_repro.models.files import PLAIN, Opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATIONS = ("none", "8bit", "4bit")

#: Patterns of tensors that a checkpoint may hold besides its model's; no computation of a text model depends on them.
#: (Tied heads and layers for multi-token prediction follow from the configuration, too.)
EXTRAS = {
    "rotary frequencies": r"(^|\.)(maybe_)?rotary(_emb)?(_local)?\.(original_)?inv_freq$",
    "causal masks": r"(^|\.)(attn|attention|crossattention)\.(masked_)?bias$",
    "vision towers": r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector)\.",
    "multi-token prediction": r"^(model\.)?mtp(_layers)?\.",
}
FREQUENCIES = EXTRAS["rotary frequencies"]

#: Files that may contain a tokenizer's vocabulary. Without any, transformers creates an empty tokenizer.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")

#: Gemma 3's text models come with the tokenizer of its multimodal models, which has this one token for images.
PICTURE = "<image_soft_token>"


def check_kind(config: Any, name: str | Path) -> None:
    """Raise `UserError` unless a model is a causal language model (LLaVA is not: its language model is a part)."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    text = config.get_text_config()
    if text is not config:
        raise UserError(
            f"'{name}' is a {config.model_type} model, whose language model ({text.model_type}) is only a part of it: "
            "save that part with its output layer as a checkpoint of its own, and name its folder."
        )
    raise UserError(f"'{name}' is a {config.model_type} model: name a causal language model's checkpoint.")


def stored_quantization(config: Any) -> dict[str, Any]:
    """The quantization settings of a checkpoint that is stored quantized; empty for others."""
    for own in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            settings: Any = getattr(own, key, None)
            settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
            if settings:
                return dict(settings) if isinstance(settings, dict) else {"quant_method": settings}
    return {}


def quantized_as(stored: dict[str, Any]) -> str:
    """The name of a stored quantization: one of `QUANTIZATIONS` if `load_model` would quantize in the same way."""
    if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type", "fp4") == "nf4":
        return "4bit"
    if stored.get("load_in_4bit"):
        return f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
    return "8bit" if stored.get("load_in_8bit") else str(stored.get("quant_method") or "an unnamed quantization")


def check_stored_quantization(config: Any, quantization: str, name: str | Path) -> bool:
    """Whether the checkpoint is stored in the requested quantization; `UserError` if it is stored in another."""
    stored = stored_quantization(config)
    if stored and (kind := quantized_as(stored)) != quantization:
        raise UserError(
            f"'{name}' is stored in {kind} (quantization_config in its config.json), and quantization "
            f"'{quantization}' was requested: "
            + (f"ask for '{kind}'" if kind in QUANTIZATIONS else "use a checkpoint that is not quantized")
            + ", since rounding cannot be undone."
        )
    return bool(stored)


def stored_dtypes(folder: Path, where: dict[str, str]) -> dict[str, str]:
    """{tensor name: its dtype as safetensors calls it}, from the files' headers."""
    from safetensors import safe_open

    dtypes: dict[str, str] = {}
    for name in dict.fromkeys(where.values()):
        with safe_open(folder / name, "pt") as file:
            dtypes |= {tensor: file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118
    return dtypes


def check_dtypes(dtypes: dict[str, str], config: Any, name: str | Path) -> None:
    """Raise `UserError` for weights that need scales to be read; transformers would take them as they are."""
    if stored_quantization(config):
        if not any(name.endswith((".absmax", ".SCB")) for name in dtypes):
            raise UserError(
                f"The config.json of '{name}' has a quantization_config, and its weights are not quantized: remove it."
            )
        return
    for tensor, dtype in dtypes.items():
        weight = tensor.endswith(("weight", "bias")) or dtype.startswith("F")
        if dtype not in PLAIN and weight and not is_extra(tensor, config):
            raise UserError(
                f"'{tensor}' of '{name}' is stored in {dtype}, and no quantization_config in its config.json says how "
                "to read that: use a checkpoint in float32, bfloat16 or float16."
            )


def is_extra(tensor: str, config: Any) -> bool:
    """Whether a tensor that the model does not use is allowed; see `EXTRAS`."""
    if any(re.search(pattern, tensor) for pattern in EXTRAS.values()):
        return True
    layer = _layer_number(tensor)
    return layer is not None and layer in _predicting_layers(config)


def _layer_number(tensor: str) -> int | None:
    match = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", tensor)
    return int(match[1]) if match else None


def _predicting_layers(config: Any) -> range:
    """Numbers of the layers for multi-token prediction, which follow the model's own (DeepSeek, GLM)."""
    text = config.get_text_config()
    layers, more = (getattr(text, key, None) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    return range(layers, layers + more) if isinstance(layers, int) and isinstance(more, int) else range(0)


def check_tensors(
    model: PreTrainedModel, unexpected: Iterable[str], folder: Path, where: dict[str, str], name: str | Path
) -> None:
    """Check that all tensors of a checkpoint are used, and unambiguously.

    Args:
        model: loaded from it.
        unexpected: unused tensors as transformers reports them, which omits those that match patterns of its own.
        folder: of the checkpoint.
        where: {tensor name: name of the file that holds it}.
        name: of the model, for messages.

    Raises:
        UserError: a tensor would be left out, or it is not clear which one is used.
    """
    own = {tensor for tensor, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    prefix = f"{model.base_model_prefix}."
    twice = [tensor for tensor in where if prefix + tensor in where]
    if twice:
        raise UserError(f"'{name}' holds both '{twice[0]}' and '{prefix}{twice[0]}', which are one tensor: remove one.")
    silent = "|".join([*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", "position_ids$"])
    left_out = {
        tensor
        for tensor in where
        if re.search(silent, tensor) and own.isdisjoint({tensor, prefix + tensor, tensor.removeprefix(prefix)})
    }
    refused = sorted(tensor for tensor in {*unexpected, *left_out} if not is_extra(tensor, model.config))
    if refused:
        raise unused(name, refused, model.config)
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise UserError(
                f"'{name}' holds '{one}' and '{other}' with different values, and its config.json ties them: set "
                "tie_word_embeddings to false if both are meant, or remove one."
            )
    _compare_frequencies(model, folder, where, name)


def unused(name: str | Path, tensors: Sequence[str], config: Any) -> UserError:
    """The error for a checkpoint with tensors that its model does not use."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    deepest = max((number for tensor in tensors if (number := _layer_number(tensor)) is not None), default=-1)
    too_deep = isinstance(layers, int) and deepest >= layers
    return UserError(
        f"'{name}' holds {len(tensors)} tensors that the {config.model_type} model of its config.json does not use"
        + (f" (num_hidden_layers is {layers})" if too_deep else "")
        + f", the first being {', '.join(map(repr, tensors[:3]))}: correct config.json, or use the checkpoint that "
        "belongs to it."
    )


def _compare_frequencies(model: PreTrainedModel, folder: Path, where: dict[str, str], name: str | Path) -> None:
    """Warn if stored rotary frequencies, which are not used, differ from those that follow from config.json."""
    import torch

    ours = [buffer for tensor, buffer in model.named_buffers() if tensor.endswith("inv_freq")]
    for tensor, file in where.items():
        if re.search(FREQUENCIES, tensor) and ours:
            stored = Opened(folder).read(file, {"": tensor})[""].float()
            # Old checkpoints have them in half precision.
            near = [torch.allclose(stored, own.cpu().float(), rtol=0.01) for own in ours if own.shape == stored.shape]
            if not any(near):
                warnings.warn(
                    f"'{tensor}' of '{name}' differs from the rotary frequencies that follow from its config.json, "
                    "which are used: check rope_theta and rope_scaling there.",
                    UserWarning,
                    stacklevel=5,
                )
                return


def check_vocabulary(folder: Path) -> None:
    """Raise `UserError` if a folder has no tokenizer."""
    if not any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise UserError(
            f"'{folder}' cannot be loaded: it holds no tokenizer ({', '.join(VOCABULARIES)}); save the model's there."
        )


def check_tokenizer(tokenizer: Any, model: PreTrainedModel, name: str | Path) -> None:
    """Raise `UserError` if a tokenizer has tokens without an embedding in the model, or no end token."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows and token != PICTURE}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"The tokenizer of '{name}' has {len(beyond)} tokens beyond the {rows} rows of the model's embedding (the "
            f"first is '{beyond[first]}', number {first}): use the tokenizer that belongs to the model, or resize its "
            "embedding and save it."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of '{name}' has no end token, and answers could not end: set eos_token in its "
            "tokenizer_config.json."
        )


def check_layers(layers: Any, where: dict[str, str], source: str | Path) -> None:
    """Raise `UserError` if a configuration has more layers than its checkpoint has tensors."""
    # Work is distributed, and models are built, layer by layer: with far too many it would never end.
    if isinstance(layers, int) and layers > len(where):
        raise UserError(
            f"'{source}' cannot be loaded: its config.json calls for {layers} layers, and it holds {len(where)} "
            "tensors in all: correct it."
        )
