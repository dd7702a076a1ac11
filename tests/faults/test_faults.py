"""What goes wrong on real machines, provoked for real: kills, full disks, missing memory, two runs at once, NaN."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint

from alps_repro.errors import UserError
from alps_repro.experiments.configs import EvaluateConfig, FinetuneConfig
from alps_repro.experiments.records import load_record
from alps_repro.experiments.runs import finetune_run
from alps_repro.models.attention import open_attention
from alps_repro.training.recipe import Recipe

CHAIN = Path(__file__).parent / "chain.py"
VARIES = {"seconds", "peak_memory_bytes", "finished", "training_seconds", "processor", "system", "gpu", "threads"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "tiny")


def run_chain(results: Path, base: Path, *more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHAIN.parents[1])}
    command = [sys.executable, str(CHAIN), str(results), str(base), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=570)


def lasting(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {key: lasting(v) for key, v in value.items() if key not in VARIES}
    return [lasting(v) for v in value] if isinstance(value, list) else value


def records(results: Path) -> dict[str, dict]:
    return {p.name: lasting(json.loads(p.read_text())) for p in sorted((results / "records").glob("*.json"))}


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_ends_as_if_never_stopped(tmp_path, base, seed):
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    assert run_chain(through, base).returncode == 0
    done = run_chain(stopped, base, "--kill", str(seed), "18")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed 18 times" in done.stdout
    assert records(stopped) == records(through)
    for path in (through / "models").rglob("*.safetensors"):
        assert (stopped / path.relative_to(through)).read_bytes() == path.read_bytes()
    # Times are in the table too, so its numbers are compared without them.
    tables = [(folder / "tables/summary.csv").read_text().splitlines() for folder in (through, stopped)]
    untimed = [[row.split(",")[:16] for row in table] for table in tables]
    assert untimed[0][0][-2:] == ["trained_parameters", "trained_share"]
    assert untimed[0] == untimed[1]


def in_small_world(tmp_path: Path, base: Path, mount: str, prepare: str = "") -> subprocess.CompletedProcess:
    """Run the chain in a mount namespace of its own, with `mount` over its results folder."""
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    spaces = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*spaces, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no mount namespaces")
    script = (
        f"mount -t tmpfs -o {mount} none '{results}' && {prepare or 'true'} && "
        f"'{sys.executable}' '{CHAIN}' '{results}' '{base}'; code=$?; ls -A '{results}'/records 2>/dev/null; exit $code"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHAIN.parents[1])}
    return subprocess.run([*spaces, "sh", "-c", script], capture_output=True, text=True, env=environment, timeout=300)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_full_disk(tmp_path, base):
    done = in_small_world(tmp_path, base, "size=300k")
    assert done.returncode != 0
    assert "UserError: The disk is full" in done.stderr
    assert not [name for name in done.stdout.split() if name.endswith(".json") and "failed" not in name]


def test_read_only_results_folder(tmp_path, base):
    results = tmp_path / "results"
    done = in_small_world(tmp_path, base, "size=10m", f"mount -o remount,ro none '{results}'")
    assert done.returncode != 0
    assert "UserError" in last_line(done.stderr)
    assert "another results folder" in last_line(done.stderr)


def test_checkpoint_that_vanishes_while_it_is_read(tmp_path):
    folder = tiny_checkpoint(tmp_path / "base", num_hidden_layers=4)
    with open_attention(folder) as attention:
        attention.layer(0)
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="damaged or gone"):
            attention.layer(1)


def test_two_runs_at_once_make_it_once(tmp_path, base):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHAIN.parents[1])}
    command = [sys.executable, str(CHAIN), str(tmp_path / "results"), str(base)]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for it" in text for text in said) >= 1
    assert len(records(tmp_path / "results")) == 6  # full, localization, two of alps, two evaluations


def test_no_memory_names_the_setting_that_helps(tmp_path, smollm2):
    code = (
        "import resource, transformers, peft, alps_repro\n"
        "from pathlib import Path\n"
        "from alps_repro.experiments.configs import FinetuneConfig\n"
        "from alps_repro.training.recipe import Recipe\n"
        "from alps_repro.experiments.runs import finetune_run\n"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (700 << 20),) * 2)\n"
        f"config = FinetuneConfig(base={str(smollm2)!r}, dataset='chain_sum', method='full', ratio=1.0,\n"
        "    recipe=Recipe(max_steps=1, batch_size=16))\n"
        f"finetune_run(config, {str(tmp_path)!r}, progress=False)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert "UserError: There is not enough memory" in last_line(done.stderr)
    assert "micro_batch_size" in last_line(done.stderr)


def diverging(base: Path, **recipe) -> FinetuneConfig:
    return FinetuneConfig(
        base=str(base),
        dataset="chain_sum",
        method="full",
        ratio=1.0,
        recipe=Recipe(batch_size=2, micro_batch_size=2, max_steps=30, max_grad_norm=1e9, **recipe),
    )


def test_loss_that_explodes_stops_the_run(tmp_path, base):
    config = diverging(base, learning_rate=30.0, checkpoint_steps=1)
    with pytest.raises(UserError, match=r"The loss became .* at step \d+"):
        finetune_run(config, tmp_path, progress=False)
    (path,) = (tmp_path / "records").glob("*.failed.json")
    record = load_record(path)
    assert record.status == "failed"
    assert record.result == {}
    assert "at step" in record.error
    kept = list((tmp_path / "models").rglob("checkpoint-*/model.safetensors"))
    assert kept, "the last good checkpoint is kept"
    for path in kept:
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def test_loss_that_is_no_number_stops_the_run(tmp_path, base):
    # Infinite weights after the first real step: every loss from then on is NaN, which Trainer would log as 0.
    recipe = Recipe(max_steps=8, batch_size=2, learning_rate=1e38, warmup_ratio=0.0, max_grad_norm=1e38)
    config = FinetuneConfig(base=str(base), dataset="chain_sum", method="full", ratio=1.0, recipe=recipe)
    with pytest.raises(UserError, match=r"The loss became nan at step \d+"):
        finetune_run(config, tmp_path, progress=False)
    (record,) = [load_record(path) for path in (tmp_path / "records").glob("*.failed.json")]
    assert record.status == "failed"
    assert record.result == {}
    assert not (tmp_path / "models" / config.name).exists()


def test_a_launcher_is_told_what_to_call(tmp_path, base, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = FinetuneConfig(base=str(base), dataset="chain_sum", method="random")
    with pytest.raises(UserError, match=r"call alps_repro\.finetune itself"):
        finetune_run(config, tmp_path, progress=False)


def test_workers_do_not_change_the_weights(tmp_path, base):
    bytes_of = []
    for workers in (0, 2):
        config = diverging(base, learning_rate=1e-3, workers=workers)
        config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"max_steps": 3})})
        model = finetune_run(config, tmp_path / str(workers), progress=False)[1]
        bytes_of.append((model / "model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1]


def test_names_stay_in_the_results_folder(tmp_path, base):
    link = tmp_path / "link"
    link.symlink_to(base)
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b", str(link), "..", "\x00/..", "x" * 4000):
        for config in (
            EvaluateConfig(model=name, tasks=("chain_sum",)),
            FinetuneConfig(base=name, dataset="chain_sum", method="random"),
        ):
            path = (tmp_path / "results" / config.name).resolve()
            assert path.parent == (tmp_path / "results").resolve()
            assert len(path.name) < 200


def test_tokens_reach_no_record(tmp_path, base):
    environment = {**os.environ, "HF_TOKEN": "hf_" + "secret" * 5, "PYTHONPATH": str(CHAIN.parents[1])}
    done = subprocess.run(
        [sys.executable, str(CHAIN), str(tmp_path), str(base)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"secretsecret" not in path.read_bytes(), path
