"""A model by its name: its folder, its configuration, the base of an adapter, hashes of its files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from alps_repro.errors import UserError
from alps_repro.models.embedded import EMBEDDED, embedded_model
from alps_repro.models.files import INDEX, SINGLE, first_line, sha256

ADAPTER = "adapter_config.json"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a saved PEFT adapter."""
    return (folder / ADAPTER).exists()


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint or adapter: the embedded model, a local folder, or a download from the hub.

    Raises:
        UserError: there is no such folder, the hub cannot be reached or refuses, or the weights are pickled.
    """
    if str(name) == EMBEDDED:
        return embedded_model()
    folder = Path(name)
    if os.path.isdir(folder):  # the methods of `Path` raise if a name is too long
        _check_weights(folder)
        return folder
    if os.path.isfile(folder):
        raise UserError(f"'{name}' is a file: give the folder that holds config.json and *.safetensors.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or os.path.isdir(folder.parent):
        raise UserError(
            f"There is no checkpoint '{name}': give an existing folder, a hub id such as "
            f"'meta-llama/Llama-3.2-1B', or '{EMBEDDED}'."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:  # hub, network and permission errors have no common base class
        gated = "gated" in type(error).__name__.lower() or " 401 " in str(error) or " 403 " in str(error)
        raise UserError(
            f"'{name}' is no local folder, and the hub "
            + (
                "refuses access: request it on the model's page and log in with 'hf auth login'."
                if gated
                else f"could not provide it ({type(error).__name__}): check the name and the connection, or use "
                f"'{EMBEDDED}', which needs no hub."
            )
        ) from error
    _check_weights(folder)
    return folder


def _check_weights(folder: Path) -> None:
    if is_adapter(folder) and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"The adapter folder '{folder}' holds no adapter_model.safetensors: save the adapter again.")
    if is_adapter(folder):
        return
    if not (folder / "config.json").exists():
        raise UserError(f"'{folder}' is not a checkpoint: it holds no config.json.")
    if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
        pickled = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.ckpt")])
        if pickled:
            raise UserError(
                f"'{folder}' holds pickled weights ({pickled[0]}), which can run code when read: save the model again "
                "with save_pretrained, which writes safetensors."
            )
        raise UserError(f"'{folder}' holds no weights: expected {SINGLE} or {INDEX}.")


def load_config(folder: Path) -> Any:
    """The `transformers` configuration of a checkpoint folder.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"The config.json of '{folder}' cannot be read ({first_line(error)}): copy it again, or correct it."
        ) from error


def adapter_base(folder: Path) -> str:
    """The name of the model that a saved adapter was trained on.

    Raises:
        UserError: the adapter's configuration cannot be read, or does not name a base that is a whole model.
    """
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"The {ADAPTER} of '{folder}' cannot be read ({first_line(error)}): save the adapter again."
        ) from error
    if not base or not isinstance(base, str):
        raise UserError(f"The {ADAPTER} of '{folder}' does not name its base model: set base_model_name_or_path.")
    if os.path.exists(os.path.join(base, ADAPTER)):
        raise UserError(
            f"The {ADAPTER} of '{folder}' names '{base}' as its base model, which is an adapter itself: set "
            "base_model_name_or_path to a whole model."
        )
    return base


#: Patterns of the files that are read from a model's folder, its tokenizer's included.
READ = (
    *("*.safetensors", INDEX, "config.json", "generation_config.json", ADAPTER),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template.*", "additional_chat_templates/*"),
)


def file_hashes(name: str | Path) -> dict[str, str]:
    """{path in the folder: SHA-256} for every file that is read of a model; for an adapter also of its base's.

    Raises:
        UserError: there is no such model.
    """
    folder = resolve(name)
    files = sorted({path for pattern in READ for path in folder.glob(pattern) if path.is_file()})
    hashes = {path.relative_to(folder).as_posix(): _file_hash(path) for path in files}
    if is_adapter(folder):
        hashes |= {f"base/{path}": value for path, value in file_hashes(adapter_base(folder)).items()}
    return hashes


def model_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's config and safetensors files, in name order."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json"), *folder.glob(ADAPTER)])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{_file_hash(path)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, computed once for each state of it."""
    state = path.stat()
    if time.time() - state.st_ctime < 2:  # within the clock's resolution a second change would not show
        return sha256(path)
    # The time of change is set by the system: unlike that of modification, it cannot be set back.
    return _kept_hash(str(path.resolve()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1024)
def _kept_hash(path: str, *state: int) -> str:
    return sha256(Path(path))
