"""Loading a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
                f"The adapter '{name}' cannot be loaded ({first_line(error)}): save the adapter again."
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
    check_kind(config, name)
    if check_stored_quantization(config, quantization, name):
        kwargs["config"] = _with_own_compute(config, kwargs.pop("quantization_config"))
    try:
        where = tensor_files(folder)
        check_layers(getattr(config.get_text_config(), "num_hidden_layers", 0), where, name)
        check_dtypes(stored_dtypes(folder, where), config, name)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
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
            f"shape (the first is '{missing[0]}'): the checkpoint is not complete; copy it again."
        )
    check_tensors(model, report["unexpected_keys"], folder, where, name)
    if quantization != "none" and not any(hasattr(m, "source_cls") for m in model.modules()):
        raise UserError(f"bitsandbytes finds nothing to quantize in '{name}' ({model.config.model_type}): use 'none'.")
    tokenizer = _tokenizer(folder, model, name)
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first forward would repack NF4 weights in place, and they could never be
        # dequantized again.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def _with_own_compute(config: Any, ours: Any) -> Any:
    """The configuration of a quantized checkpoint, computing as if `load_model` had quantized it."""
    own = {key: getattr(ours, key) for key in ("bnb_4bit_compute_dtype", "llm_int8_threshold")}
    config.quantization_config = {**stored_quantization(config), **own}
    return config


def _tokenizer(folder: Path, model: torch.nn.Module, name: str | Path) -> Any:
    """The tokenizer in a folder, padding on the left; one that does not fit the model is refused."""
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
