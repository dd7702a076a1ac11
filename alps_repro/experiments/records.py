"""One JSON record per run: its configuration, its result, and where it came from.

A `Record` knows its configuration and result loosely; the record of one kind (`EvaluateRecord` and so on), which
`find_record`, `load_records` with a kind, and `isinstance` lead to, knows both by their types.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints, overload

from pydantic import Field, GetPydanticSchema, ValidationError

from alps_repro.errors import UserError, explained
from alps_repro.experiments.configs import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    ImportanceConfig,
    LocalizeConfig,
    RecallConfig,
)
from alps_repro.experiments.provenance import Provenance, peak_memory_bytes, provenance, release_memory
from alps_repro.experiments.results import (
    EmbedResult,
    EvaluateResult,
    FinetuneResult,
    ImportanceResult,
    LocalizeResult,
    RecallResult,
)
from alps_repro.settings import GONE, Settings, Strict, differences, with_former

SCHEMA_VERSION: Literal[1] = 1


class Cost(Strict):
    """What a run took."""

    seconds: float
    peak_memory_bytes: int = Field(description="of this process, on the GPU where there is one")
    trained_parameters: int | None = None
    total_parameters: int | None = None


Config = LocalizeConfig | FinetuneConfig | EvaluateConfig | RecallConfig | ImportanceConfig | EmbedConfig
Kind = Literal["localize", "finetune", "evaluate", "recall", "importance", "embed"]

#: Marks a type of results for the type checker: what is stored is read as it is, whichever version wrote it.
AS_STORED = GetPydanticSchema(lambda source, handler: handler(dict[str, Any]))


class Record(Strict):
    """A run. `result` is empty where `status` is `failed`; `error` is the sentence that says why."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    name: str
    status: Literal["completed", "failed"]
    config: Config
    result: Mapping[str, Any] = Field(default_factory=dict)
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


class LocalizeRecord(Record):
    """A localization."""

    kind: Literal["localize"]
    config: LocalizeConfig
    result: Annotated[LocalizeResult, AS_STORED]


class FinetuneRecord(Record):
    """A fine-tuning."""

    kind: Literal["finetune"]
    config: FinetuneConfig
    result: Annotated[FinetuneResult, AS_STORED]


class EvaluateRecord(Record):
    """An evaluation."""

    kind: Literal["evaluate"]
    config: EvaluateConfig
    result: Annotated[EvaluateResult, AS_STORED]


class RecallRecord(Record):
    """A test of the metrics on heads that were changed by a known amount."""

    kind: Literal["recall"]
    config: RecallConfig
    result: Annotated[RecallResult, AS_STORED]


class ImportanceRecord(Record):
    """A measurement of how important each head is."""

    kind: Literal["importance"]
    config: ImportanceConfig
    result: Annotated[ImportanceResult, AS_STORED]


class EmbedRecord(Record):
    """Embeddings of the questions of data sets."""

    kind: Literal["embed"]
    config: EmbedConfig
    result: Annotated[EmbedResult, AS_STORED]


RecordT = TypeVar("RecordT", bound=Record)

#: The record of each kind of run, typed by its configuration and its result.
RECORDS: dict[Kind, type[Record]] = {
    "localize": LocalizeRecord,
    "finetune": FinetuneRecord,
    "evaluate": EvaluateRecord,
    "recall": RecallRecord,
    "importance": ImportanceRecord,
    "embed": EmbedRecord,
}

#: The class of each kind's configuration, and the kind of each configuration.
CONFIGS: dict[Kind, type[Settings]] = {kind: get_type_hints(record)["config"] for kind, record in RECORDS.items()}
KINDS: dict[type[Any], Kind] = {config: kind for kind, config in CONFIGS.items()}


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


def make_folder(folder: Path) -> None:
    """Make a folder with its parents where it does not exist.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{folder}' cannot be made ({error.strerror}): choose another results folder.") from error


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
        kind = next((kind for kind in RECORDS if kind == stored.get("kind")), None)
        if kind is None:
            return Record.model_validate(stored)  # which says what is wrong
        config = CONFIGS[kind]
        if isinstance(stored.get("config"), dict):
            made = stored.get("provenance")
            gpu = isinstance(made, dict) and made.get("gpu") is not None
            stored = {**stored, "config": config.model_validate(with_former(config, stored["config"], gpu))}
        return RECORDS[kind].model_validate({"result": {}, **stored})
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
            f"The record '{path}' is of another run than the requested one ({shown}): make that run again, or keep its "
            "results in another folder."
        )


@overload
def find_record(folder: Path, config: LocalizeConfig) -> LocalizeRecord | None: ...
@overload
def find_record(folder: Path, config: FinetuneConfig) -> FinetuneRecord | None: ...
@overload
def find_record(folder: Path, config: EvaluateConfig) -> EvaluateRecord | None: ...
@overload
def find_record(folder: Path, config: RecallConfig) -> RecallRecord | None: ...
@overload
def find_record(folder: Path, config: ImportanceConfig) -> ImportanceRecord | None: ...
@overload
def find_record(folder: Path, config: EmbedConfig) -> EmbedRecord | None: ...
@overload
def find_record(folder: Path, config: Config) -> Record | None: ...
def find_record(folder: Path, config: Config) -> Record | None:
    """The record of a completed run in a folder of records; None where there is none.

    The only way to a run's record. Its whole configuration is compared, defaults included, and the hashes of its models
    with those in the records of its predecessors, where these exist; the models themselves need not exist.

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
    settings = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: value for name, value in settings.items() if type(value) in KINDS}


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


def scores_hash(result: Mapping[str, Any]) -> str:
    """SHA-256 of the scores in the result of a localization."""
    return hashlib.sha256(json.dumps(result["values"]).encode()).hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=4096)
def _load(path: Path, *state: int) -> Record:
    """`load_record`, once for each state of a file: a table's cells share most of their predecessors."""
    return load_record(path)


@overload
def load_records(folder: Path, kind: Literal["localize"]) -> list[LocalizeRecord]: ...
@overload
def load_records(folder: Path, kind: Literal["finetune"]) -> list[FinetuneRecord]: ...
@overload
def load_records(folder: Path, kind: Literal["evaluate"]) -> list[EvaluateRecord]: ...
@overload
def load_records(folder: Path, kind: Literal["recall"]) -> list[RecallRecord]: ...
@overload
def load_records(folder: Path, kind: Literal["importance"]) -> list[ImportanceRecord]: ...
@overload
def load_records(folder: Path, kind: Literal["embed"]) -> list[EmbedRecord]: ...
@overload
def load_records(folder: Path, kind: Kind | None = None) -> Sequence[Record]: ...
def load_records(folder: Path, kind: Kind | None = None) -> Sequence[Record]:
    """All completed records of a folder in name order, of one kind or of all."""
    paths = sorted(folder.glob(f"{kind or '*'}-*.json"))
    return [load_record(path) for path in paths if not path.name.endswith(".failed.json")]


def _on_gpu(config: Config) -> bool:
    """Whether a run computes on a GPU: there is one, and it was not told to leave it alone."""
    import torch

    device = config.recipe.device if isinstance(config, FinetuneConfig) else getattr(config, "device", "auto")
    return device != "cpu" and torch.cuda.is_available()


@dataclass
class Outcome:
    """What a run's body fills in while `recorded` is open; `record` is written at its end."""

    result: Mapping[str, Any] = field(default_factory=dict)
    model_sha256: dict[str, str] = field(default_factory=dict)
    data_sha256: dict[str, str] = field(default_factory=dict)
    files_sha256: dict[str, dict[str, str]] = field(default_factory=dict)
    trained_parameters: int | None = None
    total_parameters: int | None = None
    record: Record | None = None

    def written(self, kind: type[RecordT]) -> RecordT:
        """The record of a run that has been completed."""
        assert isinstance(self.record, kind)
        return self.record


@contextmanager
def recorded(folder: Path, config: Config) -> Iterator[Outcome]:
    """Time a run and write its record when it ends, as `failed` where it ends by an exception, which is raised again.

    What earlier runs of this process left in memory is released first.

    Args:
        folder: of the records.
        config: of the run.

    Yields:
        what the run fills in.
    """
    release_memory()
    outcome, start = Outcome(), time.perf_counter()
    try:
        yield outcome
        outcome.record = _write(folder, config, outcome, start)
    except BaseException as error:
        reason = explained(error) or error
        with suppress(UserError):  # where nothing can be written, the error still has to be raised
            sentence = (str(reason).strip().splitlines() or [type(error).__name__])[0]
            _write(folder, config, outcome, start, sentence)
        if reason is not error:
            raise reason from error
        raise


def _write(folder: Path, config: Config, outcome: Outcome, start: float, error: str | None = None) -> Record:
    """Write the record of a run that began at `start`; `error`: the sentence that says why it failed."""
    kind, gpu = KINDS[type(config)], _on_gpu(config)
    record = RECORDS[kind](
        kind=kind,
        name=config.name,
        status="completed" if error is None else "failed",
        config=config,
        result=outcome.result if error is None else {},
        provenance=provenance(
            gpu,
            model_sha256=outcome.model_sha256,
            data_sha256=outcome.data_sha256,
            files_sha256=outcome.files_sha256,
        ),
        cost=Cost(
            seconds=round(time.perf_counter() - start, 3),
            peak_memory_bytes=peak_memory_bytes(gpu),
            trained_parameters=outcome.trained_parameters,
            total_parameters=outcome.total_parameters,
        ),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        error=error,
    )
    record.save(folder)
    return record


def schema() -> dict[str, Any]:
    """The records' JSON schema, as `record.schema.json` beside this module holds it."""
    made = Record.model_json_schema()
    for kind, names in GONE.items():
        older = {name: {"description": "in older records", "type": "string"} for name in names}
        made["$defs"][kind]["properties"] |= older
    return {"$id": f"alps-repro-record-{SCHEMA_VERSION}", **made}
