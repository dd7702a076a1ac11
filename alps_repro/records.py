"""One JSON record a run: what was asked, what came out, and where it came from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alps_repro.errors import UserError, explained
from alps_repro.recipe import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)

SCHEMA_VERSION = 1

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


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Provenance(Block):
    """Where a run came from."""

    commit: str | None = Field(description="git commit of the package's checkout; null outside of one")
    dirty: bool | None = Field(description="whether tracked files outside results/ differed from that commit")
    code: str | None = Field(None, description="SHA-256 of the modules that measure, the same in all of a table")
    versions: dict[str, str]
    python: str
    system: str
    processor: str
    threads: int
    gpu: str | None
    model_sha256: dict[str, str] = Field(default_factory=dict, description="by role: base, task, tuned")
    data_sha256: dict[str, str] = Field(default_factory=dict, description="by data set or task")


class Cost(Block):
    """What a run took."""

    seconds: float
    peak_memory_bytes: int = Field(description="of this process, on the GPU where there is one")
    trained_parameters: int | None = None
    total_parameters: int | None = None


Config = LocalizeConfig | FinetuneConfig | EvaluateConfig | RecallConfig | ImportanceConfig | EmbedConfig

KINDS = {
    LocalizeConfig: "localize",
    FinetuneConfig: "finetune",
    EvaluateConfig: "evaluate",
    RecallConfig: "recall",
    ImportanceConfig: "importance",
    EmbedConfig: "embed",
}


class Record(Block):
    """A run. `result` is empty where `status` is `failed`; `error` is the sentence that says why."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["localize", "finetune", "evaluate", "recall", "importance", "embed"]
    name: str
    status: Literal["completed", "failed"]
    config: Config
    result: dict[str, Any] = Field(default_factory=dict)
    provenance: Provenance
    cost: Cost
    finished: str = Field(description="UTC time, ISO 8601")
    error: str | None = None

    def save(self, folder: Path) -> Path:
        """Write `folder/KIND-NAME.json`, whole or not at all; a failure never replaces a completed record."""
        path = record_path(folder, self.kind, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.status == "failed":
            path = path.with_suffix(".failed.json")
        write_whole(path, self.model_dump_json(indent=1) + "\n")
        if self.status == "completed":
            path.with_suffix(".failed.json").unlink(missing_ok=True)
        return path


def record_path(folder: Path, kind: str, name: str) -> Path:
    """Where the record of a run lies."""
    path = folder / f"{kind}-{name}.json"
    if path.parent != folder:
        raise UserError(f"The name {name!r} of a record leads out of its folder: give one without '/'.")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, sync it, and rename it there: it is never half-written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):  # the folder itself may be what is wrong
            beside.unlink()
        why = error.strerror
        raise UserError(f"'{path}' cannot be written ({why}): make room or choose another folder.") from error


def load_record(path: Path) -> Record:
    """Read one record.

    Raises:
        UserError: it is not there, not JSON, or not of this schema version.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The record '{path}' cannot be read ({error}): remove it and run again.") from error
    version = stored.get("schema_version") if isinstance(stored, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"The record '{path}' has schema version {version}, this package reads {SCHEMA_VERSION}: remove it and run "
            "again, or read it with the version of the package that wrote it."
        )
    try:
        return Record.model_validate(stored)
    except ValidationError as error:
        # A configuration is tried as each of its kinds: a sentence of our own says more than a missing field.
        first = max(error.errors(), key=lambda entry: "error" in entry.get("ctx", {}))
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        raise UserError(
            f"The record '{path}' does not fit its schema ({where}: {first['msg']}): remove it and run again."
        ) from None


def load_records(folder: Path, kind: str | None = None) -> list[Record]:
    """All completed records of a folder in name order, of one kind or of all."""
    paths = sorted(folder.glob(f"{kind or '*'}-*.json"))
    return [load_record(path) for path in paths if not path.name.endswith(".failed.json")]


def _git(*arguments: str) -> str | None:
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _code() -> str:
    """SHA-256 of what decides a run's result, given its configuration."""
    package = Path(__file__).parent
    measuring = (
        *("heads", "checkpoints", "data", "scores", "importance", "hifi", "selectors", "methods", "adapters"),
        *("training", "evaluation", "sandbox"),
    )
    files = [*(package / f"{name}.py" for name in measuring), *(package / "tuner").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([*files, *(package / "tasks").glob("*.*")]):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _on_gpu(config: Config) -> bool:
    """Whether a run computes on a GPU: there is one, and it was not told to leave it alone."""
    import torch

    asked = config.recipe.device if isinstance(config, FinetuneConfig) else getattr(config, "device", "auto")
    return asked != "cpu" and torch.cuda.is_available()


def provenance(gpu: bool | None = None, **hashes: dict[str, str]) -> Provenance:
    """The provenance of a run in this process; gpu: whether it used one, by default whether there is one."""
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
        processor=_processor(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if (torch.cuda.is_available() if gpu is None else gpu) else None,
        **hashes,
    )


def peak_memory_bytes(gpu: bool | None = None) -> int:
    """The most memory this process has held: on the GPU where it used one (by default: where there is one), or
    resident."""
    torch = sys.modules.get("torch")
    if torch is not None and (torch.cuda.is_available() if gpu is None else gpu):
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Outcome(Block):
    """What a run's body fills in while `recorded` is open."""

    result: dict[str, Any] = Field(default_factory=dict)
    model_sha256: dict[str, str] = Field(default_factory=dict)
    data_sha256: dict[str, str] = Field(default_factory=dict)
    trained_parameters: int | None = None
    total_parameters: int | None = None
    record: Record | None = None


@contextmanager
def recorded(folder: Path, config: Config) -> Iterator[Outcome]:
    """Time a run and write its record when it ends, as `failed` where it ends by an exception, which goes on."""
    kind = KINDS[type(config)]
    outcome, start = Outcome(), time.perf_counter()

    def write(status: Literal["completed", "failed"], error: str | None) -> Record:
        record = Record(
            kind=kind,
            name=config.name,
            status=status,
            config=config,
            result=outcome.result if status == "completed" else {},
            provenance=provenance(_on_gpu(config), model_sha256=outcome.model_sha256, data_sha256=outcome.data_sha256),
            cost=Cost(
                seconds=round(time.perf_counter() - start, 3),
                peak_memory_bytes=peak_memory_bytes(_on_gpu(config)),
                trained_parameters=outcome.trained_parameters,
                total_parameters=outcome.total_parameters,
            ),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            error=error,
        )
        record.save(folder)
        return record

    try:
        yield outcome
        outcome.record = write("completed", None)
    except BaseException as error:
        reason = explained(error) or error
        with suppress(UserError):  # where nothing can be written, the error still has to be heard
            write("failed", (str(reason).strip().splitlines() or [type(error).__name__])[0])
        if reason is not error:
            raise reason from error
        raise


def schema() -> dict[str, Any]:
    """The records' JSON schema, as `alps_repro/record.schema.json` holds it."""
    return {"$id": f"alps-repro-record-{SCHEMA_VERSION}", **Record.model_json_schema()}
