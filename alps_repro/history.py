"""What settings were before they existed, or before their default changed: old records stay readable by it."""

from __future__ import annotations

from typing import Any

#: {class of settings: {setting: the value that counts in records that lack it}}. A setting that is added, or whose
#: default changes, gets a line: the value that runs had until then. It is also the value that is left out of the names
#: of runs, so that names stay as they are. (Nothing was checked against `max_lost` before it was there; no run of the
#: records lost a row or prompt.)
FORMER: dict[str, dict[str, Any]] = {
    "EmbedConfig": {"device": "auto"},
    "EvaluateConfig": {"autocast": "none", "dtype": "float32", "device": "auto", "max_lost": 0.05},
    "ImportanceConfig": {"device": "auto", "max_lost": 0.05},
    "LocalizeConfig": {"dataset": None, "questions": 64, "device": "auto", "max_lost": 0.05},
    "Recipe": {"warmup_steps": None, "validation": None, "patience": None, "device": "auto", "max_lost": 0.05},
}
