"""Thousands of calls drawn by chance, compiled and interpreted; and that the fuzzer sees what it looks for."""

from __future__ import annotations

import ast
import mmap
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import interpreter
import numpy as np
import pytest
from check import WrongError, check, draw, make_arena
from draws import FEW_DTYPES, OTHERS, Case
from guarded import ALLOCATES, guarded_outputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, PACKAGE
from processes import environment
from registered import registered

import numbanorm as nn

ARENA = make_arena()


@pytest.fixture(scope="module", autouse=True)
def _others() -> Iterator[None]:
    """Keep the norms that the fuzzer draws beside those of the package in the table."""
    with registered(*OTHERS):
        yield


def fuzz(*options: str, **own: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run.py")), *options],
        env=environment(**own),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def fuzz_well(calls: int, *options: str, **own: str) -> None:
    status, text = fuzz("--calls", str(calls), *options, **own)
    assert status == 0, text[-5000:]
    counted = re.search(r"(\d+) calls passed in .*: (\d+) right", text)
    assert counted, text[-1000:]
    assert int(counted[1]) == calls
    assert int(counted[2]) > calls // 2


@pytest.mark.slow
def test_compiled() -> None:
    """`run.py --calls 100000` makes more, of all dtypes."""
    fuzz_well(300, "--few-dtypes")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--shrunk",)])
def test_interpreted(options: tuple[str, ...]) -> None:
    """The kernels as plain Python, which checks every index; shrunk, so that little arrays take all ways."""
    fuzz_well(1500, "--seed", "1", *options, NUMBA_DISABLE_JIT="1", NUMBA_NUM_THREADS="2")


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_hypothesis(rnd: Random) -> None:
    """The same calls, drawn by hypothesis: it finds the simplest that fails."""
    check(draw(rnd, ARENA, FEW_DTYPES), rnd)


def small(number: int = 0) -> Case:
    """Return a call with an output of its own: of `number`, the first one and those that follow."""
    while True:
        case = draw(Random(number), ARENA, [np.dtype(np.float32)])
        out = case.arguments.get("out")
        if case.name == "layer_norm" and not case.blamed and isinstance(out, np.ndarray) and out.size > 1:
            x = case.arguments["x"]
            if isinstance(x, np.ndarray) and x is not out and not np.shares_memory(x, out) and (np.abs(x) < 1e4).all():
                return case
        number += 1


def off(case: Case, results: Any) -> None:
    case.arguments["out"].flat[0] += np.float32(0.01)


def beside(case: Case, results: Any) -> None:
    out = case.arguments["out"]
    (target,) = (placed for placed in case.targets if placed.array is out)
    target.window[0 if target.below else -1] ^= 1


def changed(case: Case, results: Any) -> None:
    x = case.arguments["x"]
    x.setflags(write=True)
    x.flat[0] += 1


def raised(case: Case, results: Any) -> None:
    raise KeyError("no such thing")


def others(case: Case, results: Any) -> None:
    case.results.append(case.results[0])


@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_places_of_mutations(name: str, old: str, new: str) -> None:
    """Each stands once in its file, and what would stand there instead is another code; `mutations.py` runs them."""
    text = (PACKAGE / name).read_text()
    assert text.count(old) == 1
    changed = ast.dump(ast.parse(text.replace(old, new)))
    assert changed != ast.dump(ast.parse(text))


class TestTheFuzzerSees:
    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (off, "elements are off"),
            (beside, "wrote beside an output"),
            (changed, "changed memory of an input"),
            (raised, "raised KeyError"),
            (others, "expected .* results"),
        ],
    )
    def test_harm(self, harm: Callable[[Case, Any], None], message: str) -> None:
        case = small()
        function = case.function

        def harmful(**arguments: Any) -> Any:
            results = function(**arguments)
            harm(case, results)
            return results

        case.function = harmful
        with pytest.raises(WrongError, match=message):
            check(case, Random(2))  # which seals no input: `changed` must come to its end

    def test_silence(self) -> None:
        """What is wrong must not pass, and another argument must not take the blame."""
        case = small()
        case.blamed = ("mask",)
        with pytest.raises(WrongError, match="expected an error that blames"):
            check(case, Random(2))
        case = small()
        case.blamed = ("mask",)
        case.arguments["eps"] = -1.0
        with pytest.raises(WrongError, match="raised ValueError: eps"):
            check(case, Random(2))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_unguarded_outputs(self, channels_last: bool) -> None:
        """Whatever a call returns lies in guarded memory, which was NaN before."""
        x, dy = np.random.default_rng(0).standard_normal((2, 8, 32, 64), np.float32)
        if channels_last:  # statistics and results have another order in memory than the arrays that users get
            x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))

        def results() -> Iterator[np.ndarray]:
            yield nn.batch_norm(x, np.zeros(32), np.ones(32))
            yield from nn.layer_norm(x, 64, residual=dy, return_stats=True)
            yield from nn.rms_norm(x[..., ::2], 32, residual=dy[..., 1::2])  # which is summed first
            _, mean, rstd = nn.batch_norm(x, training=True, return_stats=True)
            yield from nn.batch_norm_backward(dy, x, mean, rstd)

        list(results())  # nothing is compiled where `np.empty` is another
        with guarded_outputs():
            made = list(results())
        for result in made:
            owner = result
            while isinstance(owner, np.ndarray):
                owner = owner.base
            assert isinstance(owner, memoryview)
            assert isinstance(owner.obj, mmap.mmap)
            assert np.isfinite(result).all()

    @pytest.mark.parametrize("turned", [slice(None), slice(None, None, -1)])
    def test_reads_and_writes_beyond_an_array(self, turned: slice) -> None:
        """What the interpreter takes for an address leads to the memory of its array, and no further."""
        wide = np.arange(24.0).reshape(4, 6)
        part = wide[turned, 1:4]
        place = interpreter.Place.of(part)
        first, last = (-18, 2) if part[0, 0] > part[-1, 0] else (0, 20)
        stand_ins = interpreter.StandIns
        for row in range(4):
            step = part.strides[0] // part.itemsize
            assert list(place.window(row * step, 3)) == list(part[row])
        for index in (first, last):
            assert stand_ins.load(place, index) == place.window(index, 1)[0]
            stand_ins.store(place, index, 7.0)
            assert (part == 7).any()
        for index in (first - 1, last + 1):
            with pytest.raises(IndexError, match="lie outside"):
                stand_ins.load(place, index)
            with pytest.raises(IndexError, match="lie outside"):
                stand_ins.store(stand_ins.shifted(place, index), 0, 7.0)
        with pytest.raises(IndexError, match="lie outside"):
            stand_ins.store_lanes(np.zeros(16), place, last - 14)

    def test_names_of_empty(self) -> None:
        """No module has another name for `numpy.empty` than those that are replaced."""
        own = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if "= np.empty\n" in path.read_text()}
        assert own == {Path(f"{name.replace('.', '/')}.py") for name in ALLOCATES}

    @pytest.mark.parametrize("where", ["array[-1:]", "array[:1]"])
    def test_touched_pages(self, where: str) -> None:
        """A read of a guarded page, and a write to a sealed one, end the process; `run.py` names the call."""
        beyond = "np.lib.stride_tricks.as_strided(region.bytes, (region.bytes.size + 1,), (1,))[-1]"
        code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import numpy as np
from guarded import Region
region = Region(100)
region.bytes[:] = 1
region.seal()
print(int(region.bytes.sum()) // region.bytes.size, flush=True)
{"region.bytes[0] = 2" if where == "array[:1]" else beyond}
print("still here")
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0
        assert done.stdout.split() == ["1"]
