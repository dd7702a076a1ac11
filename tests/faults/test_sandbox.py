"""The sandbox holds against programs that try to get out; and right programs pass in it."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from alps_repro import sandbox

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
    outcome = sandbox.run_program(program, seconds=3)
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
    assert sandbox.run_program("while True: pass", seconds=2).reason == "timeout"


def test_without_bubblewrap_nothing_runs(tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setenv("PATH", "/nonexistent")
    sandbox.why_not.cache_clear()
    try:
        with pytest.raises(sandbox.UserError, match="bubblewrap"):
            sandbox.run_program(f"open({str(mark)!r}, 'w')")
    finally:
        monkeypatch.undo()
        sandbox.why_not.cache_clear()
    assert not mark.exists()
    assert os.environ["PATH"] != "/nonexistent"
