"""What lies in a run's folder while it trains, and the tuned model in the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alps_repro.errors import UserError
from alps_repro.models.folders import ADAPTER, adapter_base, is_adapter, model_hash, resolve

if TYPE_CHECKING:
    import torch


def base_hashes(base: str | Path) -> list[str]:
    """Hashes of what training starts from: a model's, or an adapter's and that of the model under it."""
    folder = resolve(base)
    return [model_hash(folder), *([model_hash(resolve(adapter_base(folder)))] if is_adapter(folder) else [])]


def last_checkpoint(folder: Path, asked: dict[str, Any]) -> str | None:
    """The checkpoint to resume from, if there is one; `asked` is everything that decides what a run trains."""
    # Trainer writes trainer_state.json last: a checkpoint without it was cut off.
    done = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    note, text = folder / "run.json", json.dumps(asked, indent=1)
    if done:
        differs = _differences(note, json.loads(text))
        if differs:
            raise UserError(
                f"'{folder}' holds checkpoints of another run ({'; '.join(differs)}): remove it, or choose another "
                "output folder."
            )
        return str(max(done, key=lambda p: int(p.name.split("-")[1])))
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(text)
    return None


def _differences(note: Path, asked: dict[str, Any]) -> list[str]:
    """How a run differs from the one whose note lies beside its checkpoints, in a few words each."""
    try:
        before = _flat(json.loads(note.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"its {note.name} cannot be read"]
    now, found = _flat(asked), []
    for name in dict.fromkeys((*now, *before)):
        there, here = (json.dumps(run[name]) if name in run else None for run in (before, now))
        if there is None:
            found.append(f"{name} is not noted there, as by an older version of this package")
        elif here is None:
            found.append(f"{name} is noted there and unknown to this version of the package")
        elif there != here:
            found.append(f"{name} {_short(there)} there, {_short(here)} here")
    return found


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """The note of a run with the settings of its recipe among the others."""
    return {name: value for name, value in run.items() if name != "recipe"} | run.get("recipe", {})


def _short(text: str) -> str:
    text = text.strip('"')
    return text if len(text) <= 40 else f"{text[:40]}..."


def save(tuned: torch.nn.Module, tokenizer: Any, output: Path, base: str) -> None:
    """Save a checkpoint or an adapter beside its place, then rename it there."""
    from peft import PeftModel

    from alps_repro.tuner.rows import AlpsModel

    beside = output.with_name(output.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    if isinstance(tuned, PeftModel):
        tuned.peft_config["default"].base_model_name_or_path = base
        tuned.save_pretrained(beside, save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        config = json.loads((beside / ADAPTER).read_text())
        if isinstance(config.get("target_modules"), list):  # a set within peft: in another order in every process
            config["target_modules"].sort()
            (beside / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True))
    else:
        model = tuned.merge_and_unload() if isinstance(tuned, AlpsModel) else tuned
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    beside.rename(output)
