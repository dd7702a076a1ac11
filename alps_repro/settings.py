"""The base of all settings: strict about names, with errors that say what would be right, and a digest."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from alps_repro.errors import UserError, nearest


class Strict(BaseModel):
    """Base of what is stored: strict about names."""

    model_config = ConfigDict(extra="forbid")


class Settings(Strict):
    """Base of all settings: frozen, strict about names, and with errors that say what would be right."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    @classmethod
    def check(cls, /, **settings: Any) -> Self:
        """Make the settings.

        Raises:
            UserError: one sentence on the first setting that is unknown, missing or impossible.
        """
        for name in settings:
            if name not in cls.model_fields:
                raise UserError(f"There is no parameter '{name}': {nearest(name, cls.model_fields)}")
        try:
            return cls(**settings)
        except ValidationError as error:
            errors = error.errors()
            # A mistyped name is missing as well: the message is about the typing error.
            first = next((entry for entry in errors if entry["type"] == "extra_forbidden"), errors[0])
            cause = first.get("ctx", {}).get("error")
            where = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                raise UserError(
                    f"There is no parameter '{where}': {nearest(str(first['loc'][-1]), _known_at(cls, first['loc']))}"
                ) from None
            if first["type"] == "missing":
                raise UserError(f"The parameter '{where}' is missing: say what it is.") from None
            text = (
                str(cause) if cause else f"The parameter '{where}' is {reprlib.repr(first['input'])}: {first['msg']}."
            )
            raise UserError(text) from None

    def dump(self) -> dict[str, Any]:
        """As plain JSON values, every setting included."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """First 10 hex digits of the SHA-256 of the settings that are not the defaults (or what was, see `FORMER`).

        With the defaults in it, a setting that is added would rename every run there is. A name therefore says less
        than a configuration: records are compared by the whole of it.
        """
        return hashlib.sha256(json.dumps(_named(self), sort_keys=True).encode()).hexdigest()[:10]


def _named(settings: Settings) -> dict[str, Any]:
    """The settings that a name is made of, as plain JSON values."""
    former, whole, named = FORMER.get(type(settings).__name__, {}), settings.dump(), {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if value != former.get(name, field.default):
            inner = _named(value) if isinstance(value, Settings) else whole[name]
            if inner != {}:  # as of a recipe that differs from the default in what `auto` stands for
                named[IN_NAMES.get((type(settings).__name__, name), name)] = inner
    return named


def with_former(kind: type[Settings], stored: Mapping[str, Any], gpu: bool = False) -> dict[str, Any]:
    """A stored configuration as it would be stored today: with settings added since, and with today's words.

    Args:
        kind: the configuration's class.
        stored: its settings, as JSON values.
        gpu: whether the run used one.

    Raises:
        UserError: it lacks a setting, and `FORMER` does not say what that was.
    """
    former, whole = FORMER.get(kind.__name__, {}), _reworded(kind.__name__, stored, gpu)
    for name, field in kind.model_fields.items():
        if name not in whole and name not in former:
            raise UserError(f"the setting '{name}' is missing, and nothing says what it was")
        value = whole.setdefault(name, former.get(name))
        if isinstance(value, Mapping) and (inner := _settings_in(field.annotation)):
            whole[name] = with_former(inner[0], value, gpu)
    return whole


def _reworded(kind: str, stored: Mapping[str, Any], gpu: bool) -> dict[str, Any]:
    """Settings whose names or values have changed, as they are said today."""
    whole = dict(stored)
    if kind == "Recipe" and whole.get("precision") == "auto":  # until it was resolved beforehand
        whole["precision"] = "float16" if gpu else "float32"
    if kind == "EvaluateConfig" and "precision" not in whole:  # once two settings
        autocast, dtype = whole.pop("autocast", "none"), whole.pop("dtype", "float32")
        whole["precision"] = dtype if autocast == "none" else autocast
    return whole


def differences(then: Settings, now: Settings, of: str = "") -> list[str]:
    """How two configurations of one kind differ, a phrase for each setting.

    Args:
        then: the one that was run.
        now: the one that is requested.
        of: the place of both in a larger configuration, ending with a dot.
    """
    phrases = []
    for name in type(then).model_fields:
        a, b, path = getattr(then, name), getattr(now, name), f"{of}{name}"
        if isinstance(a, Settings) and type(a) is type(b):
            phrases += differences(a, b, f"{path}.")
        elif a != b:
            phrases.append(f"{path} was {_short(a)} and is {_short(b)} now")
    return phrases


def _short(value: Any) -> str:
    return f"the run {value.name}" if hasattr(value, "name") else reprlib.repr(value)


def _known_at(kind: type[Settings], place: Sequence[str | int]) -> set[str]:
    """The parameters that are known where pydantic found one that is not; `place` ends with that one."""
    owners = [kind]
    for part in place[:-1]:
        inner = [owner.model_fields[part].annotation for owner in owners if part in owner.model_fields]
        owners = [found for annotation in inner for found in _settings_in(annotation)] or owners
        owners = [owner for owner in owners if owner.__name__ == part] or owners  # which of several it was tried as
    return {name for owner in owners for name in owner.model_fields}


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _settings_in(inner)]


#: {class of settings: {setting: the value that counts in records that lack it}}. A setting that is added, or whose
#: default changes, gets a line: the value that runs had until then. It is also the value that is left out of the names
#: of runs, so that names stay as they are. (Nothing was checked against `max_lost` before it was there; no run of the
#: records lost a row or prompt.)
FORMER: dict[str, dict[str, Any]] = {
    "EmbedConfig": {"device": "auto"},
    "EvaluateConfig": {"precision": "float32", "device": "auto", "max_lost": 0.05},
    "ImportanceConfig": {"device": "auto", "max_lost": 0.05},
    "LocalizeConfig": {"dataset": None, "questions": 64, "device": "auto", "max_lost": 0.05},
    "Recipe": {
        "precision": "float32",
        "warmup_steps": None,
        "validation": None,
        "patience": None,
        "device": "auto",
        "max_lost": 0.05,
    },
}

#: {class of settings: settings that only older records have}; `_reworded` reads them.
GONE = {"EvaluateConfig": ("autocast", "dtype")}

#: {(class of settings, setting): what it is called in the digests of runs}, so that names stay as they are.
IN_NAMES = {("EvaluateConfig", "precision"): "autocast"}
