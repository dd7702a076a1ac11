"""Where a run computes: on a GPU, on the CPU, or, if a GPU is present and cannot be used, not at all."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from alps_repro.errors import UserError

#: Devices that can be requested; `auto` takes the GPU if there is one.
Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)

#: Precisions of matrix products that can be requested; `auto` stands for what `resolved_precision` says.
Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

#: CUDA's compute capability from which GPUs multiply bfloat16 fast.
FAST_BFLOAT16 = (8, 0)

#: Accelerate's names of a recipe's precisions.
MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}

#: Environment variables that make accelerate shard or split a model, which `finetune` cannot save.
SHARDING = (
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

#: Numbers of processes as set by launchers other than torchrun; accelerate reads them on a CPU.
LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def device(requested: str = "auto") -> str:
    """`cpu` or `cuda`, for one of `DEVICES`.

    Raises:
        UserError: a GPU is requested or present, and torch cannot use it.
    """
    if requested not in DEVICES:
        raise UserError(
            f"There is no device '{requested}': known are {', '.join(DEVICES)}; CUDA_VISIBLE_DEVICES chooses among "
            "GPUs."
        )
    if requested == "cpu":
        return "cpu"
    why = unusable()
    if why is None:
        return "cuda"
    if requested == "cuda":
        raise UserError(
            f"A GPU is requested (device 'cuda') and none can be used: {why}; fix that, or use device 'cpu'."
        )
    if present() and not hidden():
        raise UserError(
            f"There is an NVIDIA GPU here that torch cannot use: {why}; fix that, or continue without it by device "
            "'cpu' or an empty CUDA_VISIBLE_DEVICES."
        )
    return "cpu"


def resolved_precision(precision: str, requested: str = "auto") -> str:
    """`float32`, `bfloat16` or `float16`, for one of `PRECISIONS`.

    `auto` is bfloat16 where the device multiplies it fast (GPUs since 2020, processors with AMX), else float32. On a
    machine without a GPU, `auto` for the device `cuda` is bfloat16.

    Args:
        precision: that is requested.
        requested: the device, one of `DEVICES`.
    """
    if precision != "auto":
        return precision
    if requested == "cpu" or (requested == "auto" and (hidden() or not present())):
        return "bfloat16" if amx() else "float32"
    import torch

    slow = torch.cuda.is_available() and torch.cuda.get_device_capability() < FAST_BFLOAT16
    return "float32" if slow else "bfloat16"


@functools.cache
def amx() -> bool:
    """Whether this processor has matrix units for bfloat16."""
    try:
        return re.search(r"^flags\s*:.*\bamx_bf16\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def unusable() -> str | None:
    """Why torch can use no GPU, in a few words; None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is built without CUDA"
    if hidden():
        return f"CUDA_VISIBLE_DEVICES is '{visible}' and hides every GPU"
    if not present():
        return "there is no NVIDIA GPU"
    try:
        torch.cuda.init()
        reason = "torch gives no reason"
    except Exception as error:  # whatever the driver does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150].rstrip(".: ")
    return reason + (f" (CUDA_VISIBLE_DEVICES is '{visible}')" if visible else "")


def hidden() -> bool:
    """Whether `CUDA_VISIBLE_DEVICES` hides every GPU on purpose."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


@functools.cache
def present() -> bool:
    """Whether the system has an NVIDIA GPU, independently of torch."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:  # the program may be installed without a GPU; under WSL only it shows one
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith("GPU")


def processes() -> int:
    """Number of processes that train together, as set by torchrun and accelerate launch."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_launch(precision: str, where: str) -> None:
    """Raise `UserError` if an environment variable would make accelerate train differently.

    Such variables are not part of a run's configuration, so their effect would go unnoticed.

    Args:
        precision: in which the run trains, a key of `MIXED`.
        where: `cpu` or `cuda`.
    """
    count = processes()
    if count > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE says that {count} processes train together, and LOCAL_RANK is not set: start them with "
            "torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    for name in LAUNCHED:
        if where == "cpu" and count == 1 and int(os.environ.get(name) or 1) > 1:
            raise UserError(
                f"{name} says that {os.environ[name]} processes train together, and WORLD_SIZE is not set: start them "
                "with torchrun, which sets what is needed."
            )
    for name, value in _contrary(precision, where):
        raise UserError(
            f"The environment sets {name}={value}, and this run trains in {precision} on '{where}', unsharded and not "
            "compiled: unset it, and set precision and device in the recipe."
        )


def _contrary(precision: str, where: str) -> Iterator[tuple[str, str]]:
    def value_of(name: str) -> str:
        return os.environ.get(name, "").strip()

    same = {
        "ACCELERATE_MIXED_PRECISION": value_of("ACCELERATE_MIXED_PRECISION").lower() in ("", "no", MIXED[precision]),
        "ACCELERATE_USE_CPU": where == "cpu" or _off(value_of("ACCELERATE_USE_CPU")),
        "ACCELERATE_TORCH_DEVICE": value_of("ACCELERATE_TORCH_DEVICE").split(":")[0] in ("", where),
        **{name: _off(value_of(name)) for name in ("ACCELERATE_DYNAMO_BACKEND", *SHARDING)},
    }
    yield from ((name, value_of(name)) for name, holds in same.items() if not holds)


def check_products(dtype: str, where: str) -> None:
    """Raise `UserError` if float32 matrices would be multiplied in lower precision.

    Args:
        dtype: of the matrices; only `float32` is checked.
        where: `cpu` or `cuda`.
    """
    import torch

    if dtype != "float32":
        return
    if where == "cuda" and not _off(os.environ.get("NVIDIA_TF32_OVERRIDE", "")):
        raise UserError(
            "The environment sets NVIDIA_TF32_OVERRIDE, which rounds float32 matrices to 10 bits in products: unset it."
        )
    # By backend, since torch's common setting raises if a backend has been set on its own.
    name = "cuda" if where == "cuda" else "mkldnn"
    if (precision := getattr(torch.backends, name).matmul.fp32_precision) not in ("none", "ieee"):
        raise UserError(
            f"torch is set to multiply float32 matrices in {precision}: set torch.backends.{name}.matmul."
            "fp32_precision to 'ieee', and unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE if it is set."
        )


def _off(value: str) -> bool:
    return value.strip().lower() in ("", "0", "n", "no", "f", "false", "off")
