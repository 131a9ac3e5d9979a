"""The examples in the package's docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import numbanorm

HOME = Path(numbanorm.__file__).parent


def examples() -> Iterator[doctest.DocTest]:
    """Yield every docstring that holds examples, of all modules that can be imported here.

    pytest's own ``--doctest-modules`` would, in its mode importlib, leave in `sys.modules` what cannot be imported.
    """
    for path in sorted(HOME.rglob("*.py")):
        parts = path.relative_to(HOME.parent).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        name = ".".join(parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of old names
                module = importlib.import_module(name)
        except ImportError as error:  # of an extra that is not installed; a name of our own must be there
            if (error.name or "").partition(".")[0] == "numbanorm":
                raise
            continue
        if module.__name__ == name:  # not what an old name leads to
            yield from (test for test in doctest.DocTestFinder().find(module) if test.examples)


EXAMPLES = list(examples())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: doctest.DocTest) -> None:
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=said.append)
    assert tried
    assert not failed, "".join(said)


def test_every_norm_has_an_example() -> None:
    """So that the tests above cannot become none unseen."""
    shown = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {name for name in numbanorm.__all__ if name.endswith(("Norm", "_norm"))} <= shown
