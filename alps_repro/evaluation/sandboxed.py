"""What runs in the sandboxes of `alps_repro.evaluation.sandbox`: a program in one, the tests that judge it in another.

The two share two pipes and nothing else. The tests call the program's functions over them; return values are sent as
plain built-in values and reconstructed on the other side, where the tests compare them. No code of the program ever
runs in the tests' process, and only the tests' side knows the token that says that they ran to their end.

    python sandboxed.py program REQUESTS REPLIES         stdin: the program
    python sandboxed.py tests REPLIES REQUESTS RESULT    stdin: the token, a line break, the tests

It uses the standard library alone and nothing of this package, which neither sandbox has.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

TYPE_CHECKING = False  # as in `typing`, whose import takes as long as the rest
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, BinaryIO

#: The first line of a sandbox in which nothing of the program has run yet.
READY = "ready"

#: Bytes of the largest value that is sent.
LARGEST = 64 << 20

#: Modules that tests may use by these names if the program imports them, besides those of the standard library.
_MODULES = {"np": "numpy", "numpy": "numpy"}

_CONTAINERS = {"t": tuple, "s": set, "f": frozenset}


class Over(BaseException):
    """The program can no longer answer; not an `Exception`, so that no `except Exception` in the tests hides it."""


class Foreign:
    """An object of the other side that is no plain value.

    It can be called, iterated, passed back, and asked for attributes and items, which are plain values or foreign
    again. Tests may not compare it: the program would decide the result.
    """

    __slots__ = ("_number", "_side")

    def __init__(self, side: Side, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._side.ask("call", self, list(args), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._side.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._side.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._side.ask("getitem", self, key)

    def __len__(self) -> int:
        return self._side.ask("len", self)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._side.ask("iter", self)
        while True:
            try:
                item = self._side.ask("next", iterator)
            except StopIteration:
                return
            yield item

    def __next__(self) -> Any:
        return self._side.ask("next", self)

    def __bool__(self) -> bool:
        if not self._side.trusted:
            return True
        raise TypeError("an object that is no plain built-in value is neither true nor false here")

    def __eq__(self, other: object) -> bool:
        if self is other or not self._side.trusted:
            return self is other
        raise TypeError("an object that is no plain built-in value cannot be compared")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = object.__hash__


class Side:
    """One end of the pipes: sends requests to the other end, and answers its requests with named operations.

    Attributes:
        trusted: whether this is the tests' end.
        over: why the other side can no longer answer; stays set, whatever the tests do with the exception.
    """

    def __init__(
        self, reads: BinaryIO, writes: BinaryIO, operations: dict[str, Callable[..., Any]], *, trusted: bool
    ) -> None:
        self._reads, self._writes, self._operations = reads, writes, operations
        self.trusted = trusted
        self.over: str | None = None
        self._own: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._foreign: dict[int, Foreign] = {}

    def ask(self, *question: Any) -> Any:
        """The other side's answer; an exception there is raised here, as the nearest built-in one."""
        if self.over:
            raise Over(self.over)
        self._send({"ask": self._plain(list(question))})
        while True:
            message = self._receive()
            if "ask" in message:  # a function of this side's, called by the other before it answers
                self._answer(message["ask"])
            elif "raised" in message:
                raise self._exception(*message["raised"])
            else:
                return self._value(message["value"])

    def answer_all(self) -> None:
        """Answer requests until the other side ends."""
        try:
            while True:
                self._answer(self._receive()["ask"])
        except Over:
            pass

    def _answer(self, question: Any) -> None:
        try:
            operation, *operands = self._value(question)
            answer = {"value": self._plain(self._operations[operation](*operands))}
        except Over:
            raise
        except BaseException as error:
            names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            try:
                args = self._plain(list(error.args))
            except Exception:
                args = [str(error)]
            answer = {"raised": [names, args]}
        if not self.trusted:
            for stream in (sys.stdout, sys.stderr):  # it may be killed as soon as its tests are done
                try:
                    stream.flush()
                except Exception:
                    pass
        self._send(answer)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._writes.write(json.dumps(message).encode() + b"\n")
            self._writes.flush()
        except OSError:
            raise self.ended("it ended before its tests did") from None

    def _receive(self) -> dict[str, Any]:
        line = self._reads.readline(LARGEST)
        if not line.endswith(b"\n"):
            raise self.ended(
                f"it sent more than {LARGEST >> 20} MB at once" if line else "it ended before its tests did"
            )
        try:
            message = json.loads(line)
            if len(message) == 1 and message.keys() <= {"ask", "value", "raised"}:
                return message
        except (ValueError, AttributeError, RecursionError):
            pass
        raise self.ended("it sent no valid answer")

    def _exception(self, names: list[str], args: Any) -> BaseException:
        for name in names:
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return kind(*self._value(args))
                except TypeError:  # other arguments are needed; the next class is more general
                    continue
        return self.ended(f"it raised {names[0] if names else None}")

    def ended(self, reason: str) -> Over:
        self.over = reason
        return Over(reason)

    def _plain(self, value: Any) -> Any:
        """A value as JSON; subclasses as their built-in base, NumPy's objects as what `tolist` returns."""
        kind = type(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            value = int.__index__(value)  # long ones as hexadecimal, whose digits Python does not limit
            return value if value.bit_length() < 1000 else {"i": hex(value)}
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, complex):
            return {"c": [value.real, value.imag]}
        if isinstance(value, (bytes, bytearray)):
            return {"b" if isinstance(value, bytes) else "y": value.hex()}
        if isinstance(value, list):
            return [self._plain(item) for item in list.__iter__(value)]
        if isinstance(value, dict):
            return {"d": [[self._plain(key), self._plain(item)] for key, item in dict.items(value)]}
        for tag, container in _CONTAINERS.items():
            if isinstance(value, container):
                return {tag: [self._plain(item) for item in container.__iter__(value)]}
        if kind is range:
            return {"r": [value.start, value.stop, value.step]}
        if isinstance(value, Foreign):
            return {"yours": value._number}
        if kind.__module__ == "numpy" and hasattr(value, "tolist"):
            return self._plain(value.tolist())
        if self.trusted:
            name = getattr(value, "__name__", "")
            if getattr(builtins, name, None) is value:
                return {"builtin": name}
            if not callable(value) and not hasattr(kind, "__iter__"):
                raise TypeError(f"the tests pass a value of type {kind.__name__}, which cannot be sent")
        # It is kept alive here, so that its id is not used again.
        number = self._numbers.setdefault(id(value), len(self._own))
        if number == len(self._own):
            self._own.append(value)
        return {"mine": number}

    def _value(self, plain: Any) -> Any:
        """The value that `_plain` turned into JSON, made of this side's built-in types."""
        if isinstance(plain, list):
            return [self._value(item) for item in plain]
        if not isinstance(plain, dict):
            return plain
        try:
            ((tag, content),) = plain.items()
            if tag == "d":
                return {self._value(key): self._value(item) for key, item in content}
            if tag in _CONTAINERS:
                return _CONTAINERS[tag]([self._value(item) for item in content])
            if tag == "i":
                return int(content, 16)
            if tag == "c":
                return complex(*content)
            if tag in ("b", "y"):
                return (bytes if tag == "b" else bytearray).fromhex(content)
            if tag == "r":
                return range(*content)
            if tag == "mine":
                return self._foreign.setdefault(int(content), Foreign(self, int(content)))
            if tag == "yours":
                return self._own[int(content)]
            if tag == "builtin" and not self.trusted:
                return getattr(builtins, content)
        except (ValueError, TypeError, LookupError):
            pass
        raise self.ended("it sent no valid value")


def _call(function: Callable[..., Any], args: list[Any], named: dict[str, Any]) -> Any:
    return function(*args, **named)


# The program's side


def run_program(reads: BinaryIO, writes: BinaryIO) -> None:
    source = sys.stdin.buffer.read()
    module = type(sys)("program")

    def load(token: str, name: str) -> str:
        module.__name__ = name
        sys.modules[name] = module
        try:
            exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise
        return token

    def named(name: str) -> Any:
        if name not in module.__dict__:
            raise NameError(f"name '{name}' is not defined")
        return module.__dict__[name]

    operations: dict[str, Callable[..., Any]] = {
        "load": load,
        "has": module.__dict__.__contains__,
        "name": named,
        "call": _call,
        "getattr": getattr,
        "setattr": setattr,
        "getitem": lambda owner, key: owner[key],
        "len": len,
        "iter": iter,
        "next": next,
    }
    writes.write(f"{READY}\n".encode())
    writes.flush()
    Side(reads, writes, operations, trusted=False).answer_all()


# The tests' side


class Names(dict):
    """The tests' own names; any other name is a built-in if there is one, and else the program's."""

    def __init__(self, side: Side, tests: str) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._side = side
        self._modules, self._under_test = free_names(tests)

    def __missing__(self, name: str) -> Any:
        if name == self._under_test and self._side.ask("has", name) is True:
            return self._side.ask("name", name)
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        if name in self._modules:
            if self._side.ask("has", name) is not True:
                raise NameError(f"name '{name}' is not defined")
            return __import__(_MODULES.get(name, name))
        return self._side.ask("name", name)


def free_names(tests: str) -> tuple[set[str], str | None]:
    """Names that the tests use and do not define.

    Returns:
        Those used as modules, which are imported on the tests' side; and the name of a built-in function that stands
        for the program's, as in `assert sum(10, 15) == 6`. The latter only if the tests use no other name that is not
        their own: what tests judge by is never the program's.
    """
    import ast
    import symtable

    top = symtable.symtable(tests, "<tests>", "exec")
    scopes = [top]
    for scope in scopes:
        scopes += scope.get_children()
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    free = {symbol.get_name() for scope in scopes for symbol in scope.get_symbols() if symbol.is_global()} - own
    owners = {node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute)}
    modules = free & {owner.id for owner in owners if isinstance(owner, ast.Name)}
    name = free.pop() if len(free) == 1 else None
    return modules & (sys.stdlib_module_names | _MODULES.keys()), name if hasattr(builtins, name or "") else None


def run_tests(reads: BinaryIO, writes: BinaryIO, result: BinaryIO) -> None:
    token, tests = sys.stdin.buffer.read().split(b"\n", 1)
    if reads.readline(LARGEST) != f"{READY}\n".encode():
        return
    result.write(f"{READY}\n".encode())
    # For functions and iterators that tests pass. No attributes: those of a generator lead to its frame.
    operations: dict[str, Callable[..., Any]] = {"call": _call, "len": len, "iter": iter, "next": next}
    side = Side(reads, writes, operations, trusted=True)
    verdict = b"failed"
    try:
        code = compile(tests, "<tests>", "exec", dont_inherit=True)
        names, loaded = Names(side, tests.decode()), os.urandom(16).hex()
        if side.ask("load", loaded, "program") != loaded:
            raise side.ended("it did not run to its end")
        exec(code, names)
        if side.over:
            raise Over(side.over)
        verdict = b"passed"
    except BaseException:
        sys.excepthook(*sys.exc_info())
    result.write(verdict + b" " + token + b"\n")
    result.flush()


if __name__ == "__main__":
    role, reading, *writing = sys.argv[1:]
    ends: list[Any] = [os.fdopen(int(reading), "rb"), *(os.fdopen(int(number), "wb") for number in writing)]
    (run_tests if role == "tests" else run_program)(*ends)
