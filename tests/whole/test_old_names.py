"""What 0.1 called otherwise: its modules' names still lead somewhere, and its pickles load and go on."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from pickles import PATH, answers
from processes import run
from tolerances import FLOAT32

import numbanorm as nn

OLD = {
    "norm": ("numbanorm.layers", ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "Norm", "RMSNorm"]),
    "moments": ("numbanorm.stats.moments", ["Moments"]),
    "sync": ("numbanorm.stats.sync", ["Shared", "backward", "check_sync", "forward"]),
}
HELD: dict[str, tuple[bytes, dict[str, Any]]] = pickle.loads(PATH.read_bytes())


@pytest.fixture
def _unimported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the old modules be imported for the first time."""
    for old in OLD:
        monkeypatch.delitem(sys.modules, f"numbanorm.{old}", raising=False)
        monkeypatch.delattr(nn, old, raising=False)


@pytest.mark.usefixtures("_unimported")
@pytest.mark.parametrize("old", OLD)
def test_an_old_module(old: str) -> None:
    place, names = OLD[old]
    with pytest.warns(DeprecationWarning, match=rf"^numbanorm\.{old} is now {place}$") as warned:
        module = importlib.import_module(f"numbanorm.{old}")
    assert len(warned) == 1
    new = importlib.import_module(place)
    for name in names:
        assert getattr(module, name) is getattr(new, name)


@pytest.mark.parametrize("old", OLD)
def test_the_warning_names_the_line_that_imports(old: str) -> None:
    """Which must be one of the program's own: others' Python does not show."""
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as seen:
    import numbanorm.{old}
print(*(one.filename for one in seen))
"""
    assert run(code) == "<string>"


def same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            same(ours[name], theirs[name])
    elif theirs is None:
        assert ours is None
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_allclose(ours, theirs, rtol=FLOAT32, atol=FLOAT32)  # another CPU may have made them


@pytest.mark.usefixtures("_unimported")
@pytest.mark.parametrize("kind", HELD)
def test_a_pickle_of_the_last_release(kind: str) -> None:
    data, theirs = HELD[kind]
    with pytest.warns(DeprecationWarning, match="is now numbanorm"):
        loaded = pickle.loads(data)
    same(answers(loaded), theirs)


def test_every_kind_is_there() -> None:
    assert {kind.partition(",")[0] for kind in HELD} == {"batch", "instance", "group", "layer", "rms", "moments"}
