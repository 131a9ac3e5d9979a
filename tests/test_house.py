"""The rules of the house: no long file, no long function, no reach into another module's own names, no import circle.

Which folder may import which is a contract of import-linter's, in ``pyproject.toml``.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import numbanorm

HOME = Path(numbanorm.__file__).parent
FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 60, 10
COMPILED = {"Kernel", "device", "elementwise", "inlined", "intrinsic", "jit", "njit", "scalar"}
"""Decorators of what Numba compiles into a kernel, where a call costs registers, or hides what could be vectorized."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A module's name, as it is imported, and its code."""

    name: str
    package: bool
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The folder of the package that it lies in; "" for the package's own."""
        parts = self.name.split(".")[1:]
        return parts[0] if parts and (self.package or len(parts) > 1) else ""


Modules = dict[str, Module]


def module(name: str, text: str, package: bool = False) -> Module:
    return Module(name, package, text, ast.parse(text))


def read(home: Path) -> Modules:
    found = {}
    for path in sorted(home.rglob("*.py")):
        parts = path.relative_to(home.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if package else parts)
        found[name] = module(name, path.read_text(encoding="utf-8"), package)
    return found


@pytest.fixture(scope="module")
def modules() -> Modules:
    return read(HOME)


def none(said: list[str]) -> None:
    """Assert that there is nothing to say, or say all of it."""
    assert not said, "\n".join(["", *said])


# --- lengths --------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A function, the functions and classes around it, from the outermost, and its name with theirs."""

    node: Function
    around: tuple[ast.AST, ...]
    name: str


def functions(node: ast.AST, name: str, around: tuple[ast.AST, ...] = ()) -> Iterator[Found]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            own = f"{name}.{child.name}"
            if isinstance(child, Function):
                yield Found(child, around, own)
            yield from functions(child, own, (*around, child))
        else:
            yield from functions(child, name, around)


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold more than comments."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {line for t in tokens if t.type not in blank for line in range(t.start[0], t.end[0] + 1)}


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines of strings that stand for themselves."""
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def compiled(function: Found) -> bool:
    """Tell whether a function becomes a part of a kernel, or makes one of the functions within it."""

    def makes(node: ast.AST) -> bool:
        names = [n for d in getattr(node, "decorator_list", ()) for n in ast.walk(d)]
        returns = getattr(node, "returns", None)
        kernel = returns is not None and ast.unparse(returns) == "Kernel"
        return kernel or any(getattr(n, "id", getattr(n, "attr", None)) in COMPILED for n in names)

    return any(map(makes, (*function.around, *ast.walk(function.node))))


def public_signature(place: Module, function: Found) -> bool:
    """Tell whether the parameters are those that users give."""
    own, outer = function.node.name, function.around[-1:]
    if own == "__init__":
        return isinstance(outer[0], ast.ClassDef) and not outer[0].name.startswith("_")
    shown = place.folder in ("functional", "layers") or function.name == "numbanorm.files.apply.apply"
    return shown and not own.startswith("_")


def long_functions(place: Module) -> list[str]:
    code = code_lines(place.text) - docstring_lines(place.tree)
    said = []
    for function in functions(place.tree, place.name):
        if place.folder in ("cpu", "cuda") and compiled(function):
            continue
        node = function.node
        lines = len(code & set(range(node.lineno, node.end_lineno + 1)))
        if lines > FUNCTION_LINES:
            said.append(f"{function.name}: {lines} lines")
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > PARAMETERS and not public_signature(place, function):
            said.append(f"{function.name}: {count} parameters")
    return said


def is_kernel(place: Module) -> bool:
    """Tell whether a module is a kernel and its parts."""
    return place.folder in ("cpu", "cuda") and "\n@Kernel\ndef " in place.text


def test_no_long_file(modules: Modules) -> None:
    lines = {name: place.text.count("\n") for name, place in modules.items() if not is_kernel(place)}
    none([f"{name}: {count} lines" for name, count in lines.items() if count > FILE_LINES])


def test_no_long_function(modules: Modules) -> None:
    none([said for place in modules.values() for said in long_functions(place)])


# --- imports --------------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """One name that an import statement brings: of `source`, or `source` itself where `name` is None."""

    source: str
    name: str | None
    bound: str
    line: int


def imports(place: Module) -> Iterator[Import]:
    """Yield all imports, those within functions too; not those for type checkers alone."""
    waiting: list[ast.AST] = [place.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, alias.asname or alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = place.name.split(".")
                base = parts[: len(parts) + place.package - node.level]
                source = ".".join([*base, source] if source else base)
            for alias in node.names:
                yield Import(source, alias.name, alias.asname or alias.name, node.lineno)


def graph(modules: Modules) -> dict[str, set[str]]:
    """Return which modules each imports: a submodule where the name is one, else the module that the name is from."""
    edges: dict[str, set[str]] = {}
    for name, place in modules.items():
        targets = {f"{i.source}.{i.name}" if f"{i.source}.{i.name}" in modules else i.source for i in imports(place)}
        edges[name] = targets & modules.keys()
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return every largest set of modules that import one another, at however many removes."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        reached[start] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in edges if a in reached[a]}
    return sorted(sorted(names) for names in found)


def own(name: str | None) -> bool:
    """Tell whether a name is a module's own: underscored, but none of Python's."""
    return name is not None and name.startswith("_") and not name.endswith("__")


def reaches(place: Module, modules: Modules) -> list[str]:
    """Return where a module uses another's own names: imports them, or asks an imported module for them."""
    said, bound = [], {}
    for i in imports(place):
        whole = i.source if i.name is None else f"{i.source}.{i.name}"
        if own(i.name) and i.source in modules:
            said.append(f"{place.name}:{i.line}: {whole}")
        if whole in modules:
            bound[i.bound] = whole
    for node in ast.walk(place.tree):
        if isinstance(node, ast.Attribute) and own(node.attr) and ast.unparse(node.value) in bound:
            said.append(f"{place.name}:{node.lineno}: {bound[ast.unparse(node.value)]}.{node.attr}")
    return said


def test_no_import_circle(modules: Modules) -> None:
    none([" <-> ".join(names) for names in circles(graph(modules))])


def test_no_reach_into_another_module(modules: Modules) -> None:
    none([said for place in modules.values() for said in reaches(place, modules)])


# --- the rules see --------------------------------------------------------------------------------------------------


def test_what_counts_as_a_line() -> None:
    body = '    """Of\n    three\n    lines."""\n\n    # a comment\n' + "    a = 1  # and code\n" * 59
    assert long_functions(module("n.a", "def f():\n" + body)) == []
    assert long_functions(module("n.a", "def f():\n" + body + "    return a\n")) == ["n.a.f: 61 lines"]
    many = f"def f(self, {', '.join(f'p{i}' for i in range(9))}, *, q): ...\n"
    assert long_functions(module("n.a", many)) == []
    assert long_functions(module("n.a", many.replace("q)", "q, **r)"))) == ["n.a.f: 11 parameters"]


@pytest.mark.parametrize(
    ("name", "code", "allowed"),
    [
        ("n.functional.a", "def f({}): ...", True),
        ("n.functional.a", "def _f({}): ...", False),
        ("n.core.a", "def f({}): ...", False),
        ("n.core.a", "class A:\n    def __init__(self, {}): ...", True),
        ("n.core.a", "class _A:\n    def __init__(self, {}): ...", False),
        ("n.cpu.a", "@scalar\ndef f({}): ...", True),
        ("n.cpu.a", "@cuda.jit(device=True)\ndef f({}): ...", True),
        ("n.cuda.a", "@cache\ndef f({}):\n    @device\n    def g({}): ...", True),
        ("n.cuda.a", "def f() -> Kernel:\n    def g({}): ...", True),
        ("n.cuda.a", "@cache\ndef f({}): ...", False),
        ("n.core.a", "@scalar\ndef f({}): ...", False),
        ("numbanorm.files.apply", "def apply({}): ...", True),
        ("numbanorm.files.apply", "def stats({}): ...", False),
    ],
)
def test_what_may_have_many_parameters(name: str, code: str, allowed: bool) -> None:
    many = code.replace("{}", ", ".join(f"p{i}" for i in range(11)))
    assert (long_functions(module(name, many)) == []) is allowed


def test_what_an_import_leads_to() -> None:
    texts = {
        "n": "from .a import f\n",
        "n.a": "def f():\n    from . import b\n",
        "n.b": "import n.c\n",
        "n.c": "if TYPE_CHECKING:\n    from .b import g\nfrom n.d import b\n",
        "n.d": "from .b import h\nfrom ..a import f\n",
        "n.d.b": "import numpy\n",
    }
    modules = {name: module(name, text, name in ("n", "n.d")) for name, text in texts.items()}
    edges = {"n": {"n.a"}, "n.a": {"n.b"}, "n.b": {"n.c"}, "n.c": {"n.d.b"}, "n.d": {"n.d.b", "n.a"}, "n.d.b": set()}
    assert graph(modules) == edges
    assert circles(edges) == []
    assert circles(edges | {"n.d.b": {"n.b", "n.d.b"}, "n.c": {"n.d"}}) == [["n.a", "n.b", "n.c", "n.d", "n.d.b"]]


def test_what_is_another_modules_own() -> None:
    text = "import numpy as np\nfrom . import b\nfrom .b import _x, __version__\nimport n.b\n"
    text += "b._y; n.b._z; b.w; np._q; self._v"
    modules = {"n": module("n", "", True), "n.b": module("n.b", ""), "n.a": module("n.a", text)}
    assert sorted(reaches(modules["n.a"], modules)) == ["n.a:3: n.b._x", "n.a:5: n.b._y", "n.a:5: n.b._z"]
