"""The files of a run: its note and checkpoints during training, and the tuned model at the end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alps_repro.errors import UserError
from alps_repro.models.folders import ADAPTER, adapter_base, is_adapter, model_hash, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def base_hashes(base: str | Path) -> list[str]:
    """Hashes of what training starts from: the model's, or the adapter's and its base model's."""
    folder = resolve(base)
    return [model_hash(folder), *([model_hash(resolve(adapter_base(folder)))] if is_adapter(folder) else [])]


def last_checkpoint(folder: Path, note: dict[str, Any]) -> str | None:
    """The checkpoint to resume from, if there is one; else the note is written for those to come.

    Args:
        folder: of the run's checkpoints; the note is its `run.json`.
        note: everything that determines what the run trains.

    Raises:
        UserError: the folder holds checkpoints of a run with another note.
    """
    # Trainer writes trainer_state.json last: a checkpoint without it is incomplete.
    done = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json")]
    path, text = folder / "run.json", json.dumps(note, indent=1)
    if done:
        differs = _differences(path, json.loads(text))
        if differs:
            raise UserError(
                f"'{folder}' holds checkpoints of another run ({'; '.join(differs)}): remove it, or choose another "
                "output folder."
            )
        return str(max(done, key=lambda p: int(p.name.split("-")[1])))
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return None


def _differences(path: Path, note: dict[str, Any]) -> list[str]:
    """How a run differs from the one that left a note at `path`, in a few words each."""
    try:
        before = _flat(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [f"its {path.name} cannot be read"]
    now, differences = _flat(note), []
    for name in dict.fromkeys((*now, *before)):
        there, here = (json.dumps(run[name]) if name in run else None for run in (before, now))
        if there is None:
            differences.append(f"{name} is not noted there, as by an older version of this package")
        elif here is None:
            differences.append(f"{name} is noted there and unknown to this version of the package")
        elif there != here:
            differences.append(f"{name} {_short(there)} there, {_short(here)} here")
    return differences


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """A run's note, with the recipe's settings at the same level as the rest."""
    return {name: value for name, value in run.items() if name != "recipe"} | run.get("recipe", {})


def _short(text: str) -> str:
    text = text.strip('"')
    return text if len(text) <= 40 else f"{text[:40]}..."


def save(tuned: torch.nn.Module, tokenizer: Any, output: Path, base: str) -> None:
    """Save a checkpoint or an adapter next to `output`, then rename it, so that `output` is never incomplete.

    Args:
        tuned: what `finetune.trainable` made, after training.
        tokenizer: saved with a checkpoint; an adapter uses its base's.
        output: the folder to be made.
        base: name of the base model, noted in an adapter's configuration.
    """
    from peft import PeftModel

    from alps_repro.tuner.rows import AlpsModel

    beside = output.with_name(output.name + ".unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    if isinstance(tuned, PeftModel):
        tuned.peft_config["default"].base_model_name_or_path = base
        tuned.save_pretrained(str(beside), save_embedding_layers=False)
        (beside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        config = json.loads((beside / ADAPTER).read_text())
        if isinstance(config.get("target_modules"), list):  # peft's is a set, in another order in every process
            config["target_modules"].sort()
            (beside / ADAPTER).write_text(json.dumps(config, indent=2, sort_keys=True))
    else:
        model = cast("PreTrainedModel", tuned.merge_and_unload() if isinstance(tuned, AlpsModel) else tuned)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    beside.rename(output)
