"""One JSON record a run: what was asked, what came out, and where it came from."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alps_repro.errors import UserError, explained
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.settings import differences, with_former

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
    files_sha256: dict[str, dict[str, str]] = Field(
        default_factory=dict, description="by role: every file of weights, configuration and tokenizer that was read"
    )


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


_CONFIGS = {kind: config for config, kind in KINDS.items()}


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
    return _validated(path, stored)


def _validated(path: Path, stored: dict[str, Any]) -> Record:
    try:
        kind = _CONFIGS.get(str(stored.get("kind")))
        if kind is not None and isinstance(stored.get("config"), dict):
            stored = {**stored, "config": kind.model_validate(with_former(kind, stored["config"]))}
        return Record.model_validate(stored)
    except UserError as error:
        reason = str(error)
    except ValidationError as error:
        # A sentence of our own says more than a missing field.
        first = max(error.errors(), key=lambda entry: "error" in entry.get("ctx", {}))
        where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
        reason = f"{where}: {first['msg']}"
    raise UserError(f"The record '{path}' does not fit its schema ({reason}): remove it and run again.") from None


class OtherRun(UserError):
    """A record that lies where a run's own would, and is of another run. `differs`: how, a phrase each."""

    def __init__(self, path: Path, differs: list[str]) -> None:
        self.path, self.differs = path, differs
        shown = "; ".join(differs[:3]) + (f"; and {len(differs) - 3} more" if len(differs) > 3 else "")
        super().__init__(
            f"The record '{path}' is of another run than is asked for ({shown}): make that run again, or keep its "
            "results in another folder."
        )


def find_record(folder: Path, config: Config) -> Record | None:
    """The record of a completed run in a folder of records; None where there is none.

    The one way to a run's record. Its whole configuration is compared, defaults included, and what it says of its
    models with what the records of its predecessors say, where these are there; the models need not be.

    Raises:
        OtherRun: the record is of another configuration, or of other models than its predecessors made.
        UserError: it cannot be read.
    """
    path = record_path(folder, KINDS[type(config)], config.name)
    if not path.exists():
        return None
    record = _load(path, *_state(path))
    if record.status != "completed":
        return None
    if type(record.config) is not type(config):
        raise OtherRun(path, [f"it is of a run of the kind {record.kind}"])
    differs = differences(record.config, config)
    for role, before in predecessors(config).items():
        made = find_record(folder, before)
        if made is not None and not differs:
            differs += _broken(record, role, made)
    if differs:
        raise OtherRun(path, differs)
    return record


def predecessors(config: Config) -> dict[str, Config]:
    """The runs that a configuration holds directly, by the setting that holds them."""
    held = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: value for name, value in held.items() if type(value) in KINDS}


def _broken(record: Record, setting: str, made: Record) -> list[str]:
    """How a record's hashes differ from those of a predecessor's record."""
    pairs = []
    own, theirs = record.provenance.model_sha256, made.provenance.model_sha256
    if setting in ("model", "task_model"):  # what the predecessor made, or, where it trained nothing, its base
        role = "evaluated" if setting == "model" else "task"
        pairs.append((f"the {role} model", own.get(role), theirs.get("tuned", theirs.get("base"))))
    pairs.append(("the base model", own.get("base"), theirs.get("base")))
    if setting == "localization" and (scores := record.provenance.data_sha256.get(SCORES)):
        pairs.append(("the head scores", scores, scores_hash(made.result)))
    return [
        f"{what} is not the one of the record {made.kind}-{made.name}"
        for what, a, b in pairs
        if a is not None and b is not None and a != b
    ]


#: Among the data of a fine-tuning: the scores that its heads were selected by.
SCORES = "head scores"


def scores_hash(result: dict[str, Any]) -> str:
    """SHA-256 of the scores in the result of a localization."""
    return hashlib.sha256(json.dumps(result["values"]).encode()).hexdigest()


def check_consistent(records: Iterable[Record]) -> None:
    """Hold the hashes of records that are compared with each other: a name stands for one model, or set of questions.

    Raises:
        UserError: names two records that were made with different models or data of one name.
    """
    seen: dict[tuple[Any, ...], tuple[str, str]] = {}
    for record in records:
        for (what, *of), value in _named_inputs(record):
            first, other = seen.setdefault((what, *of), (value, record.name))
            if first != value:
                raise UserError(
                    f"The records {other} and {record.name} were made with different {what} of the name '{of[0]}': run "
                    "one of them again."
                )


def _named_inputs(record: Record) -> Iterator[tuple[tuple[Any, ...], str]]:
    """What a record's configuration names, and the hash of what it was: ((kind, name, what else decides it), hash)."""
    config, found = record.config, record.provenance
    hashes = found.model_sha256
    if isinstance(config, EvaluateConfig):
        if isinstance(config.model, str):
            yield ("models", config.model), hashes.get("evaluated", "")
        elif "base" in hashes:
            yield ("models", config.model.base), hashes["base"]
        for task, value in found.data_sha256.items():
            yield ("questions", task, config.split, config.limit, config.template), value
    else:
        if "base" in hashes:
            yield ("models", config.base), hashes["base"]
        if isinstance(config, LocalizeConfig) and isinstance(config.task_model, str) and "task" in hashes:
            yield ("models", config.task_model), hashes["task"]
    if isinstance(config, FinetuneConfig) and config.dataset in found.data_sha256:
        recipe = config.recipe
        size = (recipe.max_steps, recipe.batch_size, recipe.examples, recipe.data_share)
        yield ("training examples", config.dataset, config.seed, *size), found.data_sha256[config.dataset]


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _load(path: Path, *state: int) -> Record:
    """`load_record`, once for each state of a file: a table's cells share most of their predecessors."""
    return load_record(path)


def load_records(folder: Path, kind: str | None = None) -> list[Record]:
    """All completed records of a folder in name order, of one kind or of all."""
    paths = sorted(folder.glob(f"{kind or '*'}-*.json"))
    return [load_record(path) for path in paths if not path.name.endswith(".failed.json")]


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


def provenance(gpu: bool | None = None, **hashes: dict[str, Any]) -> Provenance:
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
    files_sha256: dict[str, dict[str, str]] = Field(default_factory=dict)
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
            provenance=provenance(
                _on_gpu(config),
                model_sha256=outcome.model_sha256,
                data_sha256=outcome.data_sha256,
                files_sha256=outcome.files_sha256,
            ),
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
