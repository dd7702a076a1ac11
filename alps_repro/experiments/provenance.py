"""Where a run came from: the commit, the code that measures, versions of packages, machine, hashes of its inputs."""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field

from alps_repro.settings import Strict

#: Packages whose versions can change a result.
PACKAGES = (
    "alps-repro",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "lm-eval",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "reasoning-gym",
)


class Provenance(Strict):
    """Where a run came from."""

    commit: str | None = Field(description="git commit of the package's checkout; null outside of one")
    dirty: bool | None = Field(description="whether tracked files outside results/ differed from that commit")
    code: str | None = Field(None, description="SHA-256 of the modules that measure, the same in all of a table")
    versions: dict[str, str]
    python: str
    system: str
    processor: str
    cpu: str | None = Field(None, description="family, model, stepping of the processor; torch's instructions for it")
    threads: int
    gpu: str | None
    model_sha256: dict[str, str] = Field(default_factory=dict, description="by role: base, task, tuned")
    data_sha256: dict[str, str] = Field(default_factory=dict, description="by data set or task")
    files_sha256: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="by role: every file of weights, configuration and tokenizer that was read"
    )


def _git(*arguments: str) -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


#: The module that makes runs: what it imports, directly or not, is what can change a number.
MEASURES = "experiments/runs.py"


@functools.cache
def _code() -> str:
    """SHA-256 of what decides a run's result, given its configuration: the modules behind `MEASURES`."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in measuring_code(package):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def measuring_code(package: Path) -> list[Path]:
    """The files of the package that `MEASURES` imports, wherever in a module, and what lies in their sub-packages."""
    found: set[Path] = {package / "__init__.py"}
    waiting = [package / MEASURES]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.parent != package:  # with what it may read, too
            beside = path.parent.iterdir()
            found |= {other for other in beside if other.is_file() and other.suffix not in (".py", ".pyc")}
        waiting += _imported(path, package)
    return sorted(found)


def _imported(path: Path, package: Path) -> Iterator[Path]:
    """The files of a package's modules that a file imports."""
    for name in _imports(path.read_bytes()):
        first, *rest = name.split(".")
        for end in range(1, len(rest) + 1) if first == package.name else ():
            place = package.joinpath(*rest[:end])
            yield from (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file())


@functools.lru_cache
def _imports(source: bytes) -> list[str]:
    """What a module imports, by full names; a name that it takes from a module may be a module itself."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def processor() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpu() -> str:
    """What decides how a processor rounds, beside its name, which may be that of many."""
    import torch

    own = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    known = [f"{word} {_cpuinfo()[name]}" for word, name in own.items() if name in _cpuinfo()]
    return ", ".join([*known, torch.backends.cpu.get_cpu_capability()])


def provenance(gpu: bool | None = None, **hashes: dict[str, Any]) -> Provenance:
    """The provenance of a run in this process.

    Args:
        gpu: whether it used one; by default whether there is one.
        **hashes: the fields of `Provenance` that hold hashes.
    """
    import torch

    # What runs write into a checkout's results is no change of what made them.
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results")
    return Provenance(
        commit=_git("rev-parse", "HEAD"),
        dirty=None if status is None else bool(status),
        code=_code(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        cpu=_cpu(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if (torch.cuda.is_available() if gpu is None else gpu) else None,
        **hashes,
    )


def release_memory() -> None:
    """Release what earlier runs of this process left behind, and let peaks begin anew where the system can do so."""
    gc.collect()  # a Trainer and its model refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(gpu: bool | None = None) -> int:
    """The peak memory of this process in bytes, since `release_memory` if that was called: on the GPU, or resident.

    Args:
        gpu: whether it used one; by default whether there is one.
    """
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_available() if gpu is None else gpu):
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
