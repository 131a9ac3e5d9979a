"""No module names a norm by hand: what the package does for one follows from its record in `core/norms.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numbanorm
from numbanorm.core.norms import NORMS

PACKAGE = Path(numbanorm.__file__).parent
TABLE = Path("core/norms.py")


def names_in(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every string that is a norm's name, but for those where a norm may be named.

    These are docstrings, the public functions in ``functional/``, and ``kind = "..."`` of the classes of layers.
    """
    tree = ast.parse(source)
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # docstrings, of modules, classes, functions and what stands above them
            allowed.add(node.value)
        public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if public and path.parts[0] == "functional":
            allowed.update(ast.walk(node))
        if isinstance(node, ast.ClassDef) and path == Path("layers/norms.py"):
            allowed.update(
                statement.value
                for statement in node.body
                if isinstance(statement, ast.Assign)
                and isinstance(statement.targets[0], ast.Name)
                and statement.targets[0].id == "kind"
            )
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in allowed]
    yield from sorted((node.lineno, node.value) for node in constants if node.value in NORMS)


def test_no_module_names_a_norm_by_hand() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE) != TABLE
        for line, name in names_in(path.read_text("utf-8"), path.relative_to(PACKAGE))
    ]
    assert not found, "\n".join(["what depends on a norm stands in core/norms.py, not here:", *found])


def test_what_counts_as_a_name() -> None:
    source = '''
"""layer"""
FIRST = "layer"
def layer_norm(x): return call("layer", x)
def _call(norm): return norm == "group"
class LayerNorm:
    """A layer."""
    kind = "layer"
    other = {"rms": 1}
'''
    everywhere = {(3, "layer"), (4, "layer"), (5, "group"), (8, "layer"), (9, "rms")}
    assert set(names_in(source, Path("cli/main.py"))) == everywhere
    assert set(names_in(source, Path("functional/forward.py"))) == everywhere - {(4, "layer")}
    assert set(names_in(source, Path("layers/norms.py"))) == everywhere - {(8, "layer")}
