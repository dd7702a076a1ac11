"""The package's layers: data flows one way, and a module imports only from its own layer and those below."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import alps_repro

PACKAGE = Path(alps_repro.__file__).parent

#: From the bottom to the top, modules and sub-packages; those in one tuple do not know each other.
LAYERS = [
    ("errors",),
    ("settings", "devices", "heads"),
    ("data", "tuner"),
    ("models",),
    ("localization",),
    ("training", "evaluation"),
    ("experiments",),
    ("analysis",),
    ("report",),
    ("doctor",),
    ("cli",),
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere in it, but for type checking alone."""
    return {name for node in _running(ast.parse(path.read_text())) for name in _modules(node)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from _running(child)


def _modules(node: ast.AST) -> Iterator[str]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        package, _, module = name.partition(".")
        if package == "alps_repro" and module in MODULES:
            yield module


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_upwards(module):
    own = module.split(".")[0]
    wrong = {
        name for name in imported(MODULES[module]) if (top := name.split(".")[0]) != own and HEIGHT[top] >= HEIGHT[own]
    }
    assert not wrong


def test_no_cycle():
    graph = {name: imported(path) - {name, name.rpartition(".")[0]} for name, path in MODULES.items()}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError


def test_an_upward_import_is_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from alps_repro.cli import app\n"
        "def late():\n    from alps_repro.models import files\n    import alps_repro.report.build\n"
    )
    assert imported(file) == {"models", "models.files", "report.build"}
