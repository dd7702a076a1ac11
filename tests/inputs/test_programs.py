"""Programs that a model wrote, and their tests: only what solves the task passes."""

from __future__ import annotations

import pytest
from brought import brought

from alps_repro.evaluation import sandbox

pytestmark = pytest.mark.skipif(sandbox.why_not() is not None, reason="bubblewrap cannot be used on this machine")

KIND = "Programs that a model wrote"
TEST = "assert f(1) == 2\nassert f(5) == 6"
EQUAL = "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
LIST = "assert f([2, 1]) == [1, 2]"


@pytest.mark.parametrize(
    ("program", "tests", "happens"),
    [
        brought(KIND, "a right function", "passed", "def f(x): return x + 1", TEST),
        brought(KIND, "a wrong function", "failed: AssertionError", "def f(x): return 2", TEST),
        brought(
            KIND,
            "a function that leaves Python (`sys.exit(0)`)",
            "failed: it raised SystemExit",
            "def f(x):\n    import sys; sys.exit(0)",
            TEST,
        ),
        brought(
            KIND,
            "a program that ends its process (`os._exit(0)`)",
            "failed: it ended before its tests did",
            "import os; os._exit(0)",
            TEST,
        ),
        brought(
            KIND,
            "a program without tests that leaves Python before its end",
            "failed: SystemExit",
            "def f(x):\n    import sys; sys.exit(0)\nassert f(1) == 2\n",
            "",
        ),
        brought(
            KIND, "a program without tests that runs to its end", "passed", "def f(x): return x\nassert f(1) == 1", ""
        ),
        brought(KIND, "a program with a syntax error", "failed: SyntaxError", "def f(x): return x +", TEST),
        brought(KIND, "a program without the function", "failed: NameError", "def g(x): return x + 1", TEST),
        brought(
            KIND,
            "a number that says that it equals everything",
            "failed: AssertionError",
            EQUAL + "def f(x): return A(0)",
            TEST,
        ),
        brought(
            KIND,
            "an object of an own class that says so",
            "failed: cannot be compared",
            "from unittest.mock import ANY\ndef f(x): return ANY",
            TEST,
        ),
        brought(
            KIND,
            "a program that replaces what its tests judge by",
            "failed: AssertionError",
            "import builtins, math\nbuiltins.abs = abs = lambda x: 0\nmath.isclose = lambda *a: 1\ndef f(x): return 0",
            "assert abs(f(1) - 2) < 1e-6 or math.isclose(f(1), 2)",
        ),
        brought(
            KIND,
            "tests that use a module which the program imports",
            "passed",
            "import math\ndef f(x): return x + 1",
            "assert math.isclose(f(1), 2)",
        ),
        brought(
            KIND,
            "a function named as one of Python's own",
            "passed",
            "def sum(a, b): return next(d + 1 for d in range(min(a, b), 0, -1) if not (a % d or b % d))",
            "assert sum(10, 15) == 6",
        ),
        brought(
            KIND,
            "a subclass of a dictionary (Counter)",
            "passed",
            "from collections import Counter as f",
            "assert f('aab') == {'a': 2, 'b': 1}",
        ),
        brought(
            KIND,
            "a named tuple",
            "passed",
            "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(x): return P(x, x)",
            "assert f(1) == (1, 1)",
        ),
        brought(
            KIND,
            "an array of NumPy's where a list is expected",
            "passed",
            "import numpy\ndef f(x): return numpy.sort(x)",
            LIST,
        ),
        brought(KIND, "a number of NumPy's", "passed", "import numpy\ndef f(x): return numpy.int64(x + 1)", TEST),
        brought(
            KIND,
            "sets, bytes, complex numbers, infinity, very long integers",
            "passed",
            "def f(x): return x",
            "for x in ({1, (2,)}, {'a': frozenset('b')}, b'\\0', 1j, [float('inf')], -(10**9999), range(3), 'ä'):\n"
            "    assert f(x) == x and type(f(x)) is type(x)",
        ),
        brought(
            KIND,
            "an iterator where a list is expected",
            "failed: cannot be compared",
            "def f(x): return iter(sorted(x))",
            LIST,
        ),
        brought(
            KIND,
            "an iterator that the tests make a list of",
            "passed",
            "def f(x): yield from sorted(x)",
            "assert list(f([2, 1])) == [1, 2]",
        ),
        brought(
            KIND,
            "objects of own classes that are given back to the program",
            "passed",
            "class N:\n    def __init__(self, v): self.v, self.n = v, None\n"
            "def f(n): return n.v + f(n.n) if n.n else n.v",
            "a, b = N(1), N(2)\na.n = b\nassert f(a) == 3 and a.n.v == 2",
        ),
        brought(
            KIND,
            "a function that is given a function of the tests",
            "passed",
            "def f(g, x): return sorted((g(i) for i in x), key=g)",
            "assert f(lambda i: -i, [1, 2]) == [-1, -2] and f(abs, [-2, 1]) == [1, 2]",
        ),
        brought(
            KIND,
            "a function that is given an iterator",
            "passed",
            "def f(x): return sorted(x)",
            "assert f(i for i in (2, 1)) == [1, 2]",
        ),
        brought(
            KIND,
            "a function that changes its argument where the tests look",
            "failed: AssertionError",
            "def f(x): x.sort()",
            "x = [2, 1]\nf(x)\nassert x == [1, 2]",
        ),
        brought(
            KIND,
            "an error that the tests expect",
            "passed",
            "class E(ValueError): pass\ndef f(x): raise E('no')",
            "try:\n    f(1)\n    assert False\nexcept ValueError as error:\n    assert str(error) == 'no'",
        ),
        brought(KIND, "a program that reads input", "failed: EOFError", "x = input()", TEST),
        brought(
            KIND,
            "a program with a part for the command line",
            "passed",
            "def f(x): return x + 1\nif __name__ == '__main__':\n    f(int(input()))",
            TEST,
        ),
        brought(KIND, "a program that computes without end", "timeout", "while True: pass", TEST),
        brought(
            KIND,
            "a program that waits without end",
            "timeout",
            "import threading\ndef f(x): threading.Event().wait()",
            TEST,
        ),
    ],
)
def test_programs(program: str, tests: str, happens: str) -> None:
    reason, _, said = happens.partition(": ")
    outcome = sandbox.run_program(program, tests, seconds=10 if reason != "timeout" else 1)
    assert outcome.reason == reason, outcome.output
    assert said in outcome.output
