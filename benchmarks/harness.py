"""What surrounds a run: the import, and everything of a fine-tuning that is not training.

`python benchmarks/harness.py` writes `results/benchmarks/harness.json`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time

from measured import save


def wall(*command: str) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - start


def one_example() -> float:
    """Seconds of a fine-tuning of SmolLM2 on one example for one step, from the shell's prompt to the next."""
    recipe = ["max_steps=1", "batch_size=1", "micro_batch_size=1"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["finetune", "smollm2-135m", "chain_sum", "--method", "random", "--scope", "heads"]
        settings = [word for setting in recipe for word in ("--set", setting)]
        return wall(sys.executable, "-m", "alps_repro.cli", *words, *settings, "--results", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    imported = [wall(sys.executable, "-c", "import alps_repro") - wall(sys.executable, "-c", "pass") for _ in rounds]
    one = [one_example() for _ in rounds]
    save("harness", {"import_seconds": imported, "one_example_seconds": one})


if __name__ == "__main__":
    main()
