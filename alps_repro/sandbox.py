"""Programs that a model wrote, run apart: no network, no files of this machine, little time, memory and disk.

The walls are bubblewrap's (`bwrap`: namespaces of its own for network, processes, files and users) and the kernel's
resource limits. Where bubblewrap is missing nothing is run.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from alps_repro.errors import UserError

#: Limits of one program: seconds (wall clock and processor), bytes of memory per process, of a file and of all files,
#: and processes.
SECONDS = 10
MEMORY = 2 << 30
DISK = 16 << 20
PROCESSES = 24

_NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """passed: it ended by itself, without an exception. reason: `passed`, `failed` or `timeout`. output: its last
    words."""

    passed: bool
    reason: str
    output: str


@functools.cache
def why_not() -> str | None:
    """What keeps programs from being run here, as a sentence; None where nothing does."""
    if shutil.which("bwrap") is None or shutil.which("prlimit") is None or shutil.which("setpriv") is None:
        return "Code that a model wrote is run by bubblewrap, which is not installed: 'apt-get install bubblewrap'."
    outcome = _run("", SECONDS)
    if not outcome.passed:
        return f"bubblewrap cannot make its namespaces here ({outcome.output.strip()[-120:]}): allow user namespaces."
    return None


def _command(seconds: int) -> list[str]:
    python, packages = Path(os.path.realpath(sys.executable)), sysconfig.get_paths()["purelib"]
    # What Python needs to start, read-only, at places of its own; no home, no /etc, no results.
    wrap = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    wrap += ["--ro-bind", "/usr", "/usr", "--ro-bind", str(python.parents[1]), "/python"]
    wrap += ["--ro-bind", packages, "/packages", "--proc", "/proc", "--dev", "/dev"]
    for link in ("bin", "lib", "lib64"):
        wrap += ["--symlink", f"usr/{link}", f"/{link}"]
    wrap += ["--perms", "1777", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    wrap += ["--perms", "0555", "--size", "4096", "--tmpfs", "/dev/shm"]
    wrap += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    limits = ["prlimit", f"--cpu={seconds}", f"--as={MEMORY}", f"--fsize={DISK}", f"--nproc={PROCESSES}", "--core=0"]
    if os.geteuid() == 0:
        # The kernel does not count root's processes: root becomes nobody within the walls, which takes three
        # capabilities that are gone with the change of user.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            wrap += ["--cap-add", capability]
        nobody = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        limits = ["setpriv", *nobody, "--bounding-set=-all", "--no-new-privs", *limits]
    else:
        wrap += ["--unshare-user"]
    environment = ["PYTHONPATH=/packages", "PYTHONDONTWRITEBYTECODE=1", "OPENBLAS_NUM_THREADS=1", "OMP_NUM_THREADS=1"]
    return [*wrap, *limits, "env", *environment, f"/python/bin/{python.name}", "-"]


def _run(program: str, seconds: int) -> Outcome:
    # What it prints goes to a file, which the limit on files keeps small, and not to this process's memory.
    with tempfile.TemporaryFile() as printed:
        streams = {"stdin": subprocess.PIPE, "stdout": printed, "stderr": subprocess.STDOUT}
        with subprocess.Popen(_command(seconds), **streams, start_new_session=True) as process:
            try:
                process.communicate(program.encode(), timeout=seconds)
                reason = "passed" if process.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                process.kill()  # the sandbox's first process dies with bwrap, and all others with it
                reason = "timeout"
        printed.seek(max(0, printed.seek(0, os.SEEK_END) - 2000))
        return Outcome(reason == "passed", reason, printed.read().decode(errors="replace"))


def run_program(program: str, *, seconds: int = SECONDS) -> Outcome:
    """Run a Python program within the walls.

    Raises:
        UserError: there are no walls to be had on this machine; nothing was run.
    """
    reason = why_not()
    if reason:
        raise UserError(reason)
    return _run(program, seconds)
