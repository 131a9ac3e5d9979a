"""State through files: what was saved comes back bit by bit, and what is damaged changes nothing."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run
from reference import normal

import numbanorm as nn

LAYERS: dict[str, Callable[[], Any]] = {
    "batch": lambda: nn.BatchNorm(6),
    "layer": lambda: nn.LayerNorm((3, 6)),
    "instance": lambda: nn.InstanceNorm(6, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(3, 6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
}


def randomized(name: str, dtype: Any = np.float32, seed: int = 1) -> Any:
    layer = LAYERS[name]()
    for i, own in enumerate(("weight", "bias", "running_mean", "running_var")):
        if getattr(layer, own) is not None:
            setattr(layer, own, np.abs(normal(seed + i, getattr(layer, own).shape)).astype(dtype))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = 2**40 + seed
    return layer


def bits(layer: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in layer.state_dict().items()}


def through_npz(path: Path, state: dict[str, np.ndarray]) -> Mapping[str, Any]:
    np.savez(path / "state.npz", **state)
    return np.load(path / "state.npz")


def through_safetensors(path: Path, state: dict[str, np.ndarray]) -> Mapping[str, Any]:
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file(state, path / "state.safetensors")
    return numpy.load_file(path / "state.safetensors")


def through_torch(path: Path, state: dict[str, np.ndarray]) -> Mapping[str, Any]:
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path / "state.pt")
    return torch.load(path / "state.pt", weights_only=True)


WAYS = [through_npz, through_safetensors, pytest.param(through_torch, marks=pytest.mark.torch)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("through", WAYS)
def test_round_trip(name: str, dtype: Any, through: Callable[[Path, Any], Mapping[str, Any]], tmp_path: Path) -> None:
    layer, other = randomized(name, dtype), LAYERS[name]()
    state = through(tmp_path, layer.state_dict())
    assert other.load_state_dict(state) is other
    assert bits(other) == bits(layer)
    x = normal(9, (4, 6, 3, 6))
    np.testing.assert_array_equal(other.eval()(x), layer.eval()(x))


def archive(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("seed", range(40))
def test_damaged_archive_changes_nothing(seed: int) -> None:
    """A bit flipped anywhere, or an end cut off: an error, or, where the bit means nothing, what was saved."""
    rnd = random.Random(seed)
    saved, layer = randomized("batch", seed=5), randomized("batch")
    before = bits(layer)
    content = bytearray(archive(**saved.state_dict()))
    if seed % 2:
        content[rnd.randrange(len(content))] ^= 1 << rnd.randrange(8)
    else:
        del content[rnd.randrange(len(content)) :]
    try:
        layer.load_state_dict(np.load(io.BytesIO(content)))
    except Exception:  # whatever NumPy finds wrong with it
        assert bits(layer) == before
    else:
        assert bits(layer) == bits(saved)


WRONG: dict[str, dict[str, Any]] = {
    "another shape": {"running_var": np.ones(7, np.float32)},
    "objects": {"running_var": np.array([Bomb()] * 6, object)},
    "words": {"bias": np.array(["a"] * 6)},
    "complex": {"weight": np.ones(6, np.complex64)},
    "one number": {"weight": np.float32(1)},
    "a count that is none": {"num_batches_tracked": np.float32(3)},
    "one too many": {"scale": np.ones(6)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_archive_changes_nothing(wrong: str, tmp_path: Path) -> None:
    """The last name in order is the wrong one: those before it are not taken either."""
    layer = randomized("batch")
    before = bits(layer)
    np.savez(tmp_path / "state.npz", allow_pickle=True, **(randomized("batch", seed=5).state_dict() | WRONG[wrong]))
    with pytest.raises((ValueError, TypeError)):
        layer.load_state_dict(np.load(tmp_path / "state.npz"))
    assert bits(layer) == before


def test_damaged_safetensors_changes_nothing(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    layer = randomized("batch")
    before = bits(layer)
    content = numpy.save(randomized("batch", seed=5).state_dict())
    for length in range(0, len(content), 7):
        with pytest.raises(Exception, match=r".") as caught:
            layer.load_state_dict(numpy.load(content[:length]))
        assert type(caught.value).__name__ == "SafetensorError"
    assert bits(layer) == before


def test_no_unpickling() -> None:
    """Files that hold a pickle are refused before Python looks up what is in it."""
    bomb = pickle.dumps(Bomb())
    code = f"""
import io, sys, tempfile, os
import numpy as np, numbanorm as nn
from numbanorm import files
folder = tempfile.mkdtemp()
names = [os.path.join(folder, name) for name in ("bomb.npz", "bomb.npy", "objects.npz", "objects.npy")]
for name in names[:2]:
    open(name, "wb").write({bomb!r})
objects = np.array([len, len], object)
np.savez(names[2], allow_pickle=True, weight=objects, count=objects, mean=objects, m2=objects)
np.save(names[3], objects, allow_pickle=True)
seen = []
sys.addaudithook(lambda event, arguments: seen.append(arguments) if event.startswith("pickle.") else None)
refused = 0
for name in names:
    for call in (
        nn.Moments.load,
        lambda name: nn.BatchNorm(2).load_state_dict(np.load(name), strict=False),
        lambda name: files.stats(name, axis=(0,)),
    ):
        try:
            call(name)
        except (ValueError, TypeError, OSError):
            refused += 1
print(refused, seen)
"""
    assert run(code) == "12 []"
