"""Where a run computes: on a GPU, on the processor, or, where a GPU is there and cannot be used, not at all."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from alps_repro.errors import UserError

#: Where a run may be asked to compute: `auto` takes the GPU where there is one.
DEVICES = ("auto", "cpu", "cuda")

#: What accelerate calls a recipe's precisions.
MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}

#: Variables that make accelerate shard or cut a model, which `finetune` does not save.
SHARDING = (
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

#: What launchers other than torchrun tell a process of the number of its like; accelerate reads them on a CPU.
LAUNCHED = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def device(asked: str = "auto") -> str:
    """`cpu` or `cuda`: where a run computes that was asked for one of `DEVICES`.

    Raises:
        UserError: a GPU is asked for, or there, and torch cannot use it.
    """
    if asked not in DEVICES:
        raise UserError(
            f"There is no device '{asked}': known are {', '.join(DEVICES)}; CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
    if asked == "cpu":
        return "cpu"
    why = unusable()
    if why is None:
        return "cuda"
    if asked == "cuda":
        raise UserError(
            f"A GPU is asked for (device 'cuda') and none can be used: {why}; mend that, or say device 'cpu'."
        )
    if present() and not hidden():
        raise UserError(
            f"There is an NVIDIA GPU here that torch cannot use: {why}; mend that, or go on without it by device 'cpu' "
            "or an empty CUDA_VISIBLE_DEVICES."
        )
    return "cpu"


def unusable() -> str | None:
    """Why torch can use no GPU, in a few words; None where it can."""
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
    """Whether there is an NVIDIA GPU, by the system and whatever torch makes of it."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    try:  # the program may be there without a GPU; under WSL it is all that shows one
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.startswith("GPU")


def processes() -> int:
    """How many processes train together, as torchrun and accelerate launch tell each of them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_launch(precision: str, where: str) -> None:
    """Raise `UserError` where a variable would have accelerate train otherwise than in `precision` on `where`.

    Variables are no part of a run's configuration, so what they change would be changed without a word.
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
            "compiled: unset it, and say precision and device in the recipe."
        )


def _contrary(precision: str, where: str) -> Iterator[tuple[str, str]]:
    def found(name: str) -> str:
        return os.environ.get(name, "").strip()

    same = {
        "ACCELERATE_MIXED_PRECISION": found("ACCELERATE_MIXED_PRECISION").lower() in ("", "no", MIXED[precision]),
        "ACCELERATE_USE_CPU": where == "cpu" or _off(found("ACCELERATE_USE_CPU")),
        "ACCELERATE_TORCH_DEVICE": found("ACCELERATE_TORCH_DEVICE").split(":")[0] in ("", where),
        **{name: _off(found(name)) for name in ("ACCELERATE_DYNAMO_BACKEND", *SHARDING)},
    }
    yield from ((name, found(name)) for name, holds in same.items() if not holds)


def check_products(dtype: str, where: str) -> None:
    """Raise `UserError` where float32 matrices, if that is the `dtype`, are set to be multiplied in fewer bits."""
    import torch

    if dtype != "float32":
        return
    if where == "cuda" and not _off(os.environ.get("NVIDIA_TF32_OVERRIDE", "")):
        raise UserError(
            "The environment sets NVIDIA_TF32_OVERRIDE, which rounds float32 matrices to 10 bits where they are "
            "multiplied: unset it."
        )
    # By backend, since torch's one word for both raises where a backend has been set on its own.
    name = "cuda" if where == "cuda" else "mkldnn"
    if (asked := getattr(torch.backends, name).matmul.fp32_precision) not in ("none", "ieee"):
        raise UserError(
            f"torch is set to multiply float32 matrices in {asked}: set torch.backends.{name}.matmul.fp32_precision to "
            "'ieee', and unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE if it is set."
        )


def _off(value: str) -> bool:
    return value.strip().lower() in ("", "0", "n", "no", "f", "false", "off")
