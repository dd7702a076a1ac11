"""Loading a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alps_repro.devices import device as placed
from alps_repro.errors import UserError, explained, one_of
from alps_repro.models.checks import (
    QUANTIZATIONS,
    check_dtypes,
    check_kind,
    check_layers,
    check_stored_quantization,
    check_tensors,
    check_tokenizer,
    check_vocabulary,
    stored_dtypes,
    stored_quantization,
)
from alps_repro.models.files import first_line, tensor_files
from alps_repro.models.folders import adapter_base, is_adapter, load_config, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    name: str | Path, quantization: str = "none", *, dtype: torch.dtype | None = None, device: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: the embedded model, a checkpoint folder, a hub id, or an adapter folder (its base is loaded under it).
        quantization: `none`; `8bit` (LLM.int8) or `4bit` (NF4) by bitsandbytes, on GPU or CPU.
        dtype: of the weights that are not quantized; by default float32 on a CPU, the checkpoint's own on a GPU. For
            models that are to be compared, give one.
        device: of `devices.DEVICES`; `auto` is the GPU if there is one.

    Returns:
        The model in eval mode (with an adapter, a `peft.PeftModel`, which passes on what it lacks itself to the model
        within it) and the tokenizer, padding on the left.

    Raises:
        UserError: the name does not lead to readable weights; the quantization is unknown, unavailable, or differs
            from the stored one; tensors are missing or unused; the tokenizer does not fit; or a GPU is present or
            requested that cannot be used.
    """
    one_of("quantization", quantization, QUANTIZATIONS)
    gpu = placed(device) == "cuda"
    folder = resolve(name)
    if is_adapter(folder):
        base, tokenizer = load_model(adapter_base(folder), quantization, dtype=dtype, device=device)
        if (folder / "tokenizer_config.json").exists():  # of an adapter that was trained with another one
            tokenizer = _tokenizer(folder, base, name)
        return _adapted(base, folder, name), tokenizer
    config = load_config(folder)
    check_kind(config, name)
    settings = _settings(config, quantization, dtype, gpu, name)
    model = _read(folder, config, settings, name)
    if quantization != "none" and not any(hasattr(m, "source_cls") for m in model.modules()):
        raise UserError(f"bitsandbytes finds nothing to quantize in '{name}' ({model.config.model_type}): use 'none'.")
    tokenizer = _tokenizer(folder, model, name)
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first forward pass would repack NF4 weights in place, and they could never be
        # dequantized again.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose adapter is merged into its base, where its weights and biases can hold it; else the model."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not hasattr(model.base_model, "merge_and_unload"):
        return model
    try:
        return model.merge_and_unload()
    except UserError:  # an offset without a bias to fold it into, refused before anything is changed
        return model


def _adapted(base: PreTrainedModel, folder: Path, name: str | Path) -> PreTrainedModel:
    """A base model with the adapter saved in a folder."""
    from peft import PeftModel

    import alps_repro.tuner  # noqa: F401  registers AlpsConfig with peft

    try:
        model = PeftModel.from_pretrained(base, str(folder), torch_device=str(base.device)).eval()
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise explained(error) or UserError(
            f"The adapter '{name}' cannot be loaded ({first_line(error)}): save the adapter again."
        ) from error
    return cast("PreTrainedModel", model)


def _settings(config: Any, quantization: str, dtype: torch.dtype | None, gpu: bool, name: str | Path) -> dict[str, Any]:
    """Arguments of `from_pretrained`; `UserError` if the checkpoint is stored in another quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    if dtype is None and gpu and quantization != "none":
        dtype = torch.bfloat16
    settings: dict[str, Any] = {"dtype": dtype or ("auto" if gpu else torch.float32)}
    if gpu:
        settings["device_map"] = {"": torch.cuda.current_device()}
    if quantization == "8bit":
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif quantization == "4bit":
        # Multiplying in the dtype of the rest makes starting from, and merging into, these weights exact.
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype or torch.float32
        )
    if check_stored_quantization(config, quantization, name):
        settings["config"] = _with_own_compute(config, settings.pop("quantization_config"))
    return settings


def _read(folder: Path, config: Any, settings: dict[str, Any], name: str | Path) -> PreTrainedModel:
    """The model in a checkpoint folder; refused where tensors are missing, unused or not what they claim to be."""
    from transformers import AutoModelForCausalLM

    try:
        where = tensor_files(folder)
        check_layers(getattr(config.get_text_config(), "num_hidden_layers", 0), where, name)
        check_dtypes(stored_dtypes(folder, where), config, name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
        model: PreTrainedModel = loaded[0]
        report: dict[str, Any] = loaded[1]
        check_vocabulary(folder)
    except UserError:
        raise
    except Exception as error:
        raise explained(error) or UserError(
            f"'{name}' cannot be loaded ({first_line(error)}): check that its folder is complete."
        ) from error
    # transformers would go on with random weights in their place.
    missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if missing:
        raise UserError(
            f"'{name}' lacks {len(missing)} of the tensors that its config.json calls for, or has them in another "
            f"shape (the first is '{missing[0]}'): the checkpoint is incomplete; copy it again."
        )
    check_tensors(model, report["unexpected_keys"], folder, where, name)
    return model


def _with_own_compute(config: Any, ours: Any) -> Any:
    """The configuration of a quantized checkpoint, which computes as if `load_model` had quantized it."""
    own = {key: getattr(ours, key) for key in ("bnb_4bit_compute_dtype", "llm_int8_threshold")}
    config.quantization_config = {**stored_quantization(config), **own}
    return config


def _tokenizer(folder: Path, model: PreTrainedModel, name: str | Path) -> Any:
    """The tokenizer in a folder, padding on the left; refused if it does not fit the model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except Exception as error:
        raise explained(error) or UserError(
            f"The tokenizer of '{name}' cannot be loaded ({first_line(error)}): check that its folder is complete."
        ) from error
    check_tokenizer(tokenizer, model, name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
