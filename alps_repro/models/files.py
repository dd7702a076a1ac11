"""A folder's safetensors files: where each tensor is, reading them one at a time; hashes of files."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Dtypes of weights that can be read as they are; all others need a quantization_config.
PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".: ")


def tensor_files(folder: Path) -> dict[str, str]:
    """{tensor name: name of the file that holds it} for a checkpoint."""
    from safetensors import safe_open

    if (folder / SINGLE).exists():
        with safe_open(folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    return {str(name): str(file) for name, file in index.items()}


class Opened(threading.local):
    """Each thread's open file of a checkpoint, reopened if another one is read or much has been read from it.

    Opening reads the whole header, and pages that were read count as memory until the file is closed.
    """

    #: Bytes read before a file is reopened.
    BYTES = 64 << 20

    def __init__(self, folder: Path) -> None:
        self.folder, self.taken = folder, 0
        self.file: Any = None
        self.state: tuple[str, int, int, int] | None = None

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        path = self.folder / name
        now = path.stat()  # a file that was removed or truncated meanwhile must not be read through its old mapping
        state = (name, now.st_ino, now.st_size, now.st_mtime_ns)
        if state != self.state or self.taken > self.BYTES:
            self.file = None
            self.file, self.state, self.taken = safe_open(path, "pt"), state, 0
        return self.file

    def dtype(self, name: str, tensor: str) -> torch.dtype:
        """The dtype of a tensor in the file `name`."""
        import torch

        return getattr(torch, PLAIN[self._open(name).get_slice(tensor).get_dtype()])

    def read(self, name: str, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        """{key: tensor} from the file `name`; tensors: {key: name of the tensor}."""
        file = self._open(name)
        out = {path: file.get_tensor(tensor) for path, tensor in tensors.items()}
        self.taken += sum(tensor.nbytes for tensor in out.values())
        return out


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
