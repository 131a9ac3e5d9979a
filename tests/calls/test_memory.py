"""Memory that runs out, at any allocation of a call: running statistics have moved, all of them, or none has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from allocations import Allocations
from reference import normal

import numbanorm as nn
from numbanorm.calls import host
from numbanorm.core import plan, pool
from numbanorm.cpu import launch

CHANNELS = 6
allocations = Allocations()


def forget() -> None:
    """Make the next call plan, fill tables and take memory as a process's first one does."""
    plan.plan.cache_clear()
    launch.geometry.cache_clear()
    host.forget()
    pool.POOL.clear()


def attempts(make: Callable[[], Any], call: Callable[[Any], Any], state: Callable[[Any], Any], all_later: bool) -> int:
    """Let each allocation of a call fail in turn, until it needs no more; return how many failures it survived.

    Each attempt has what `make` returns to itself; `state` returns what must change as a whole or not at all.
    """
    changed = make()
    before = state(changed)
    expected = call(changed)  # compiles
    after = state(changed)
    assert after != before
    number = survived = 0
    while True:
        subject, number = make(), number + 1
        forget()
        try:
            with allocations.failing(number, all_later=all_later):
                result = call(subject)
        except MemoryError:
            assert state(subject) == before, f"allocation {number} of {allocations.count} failed"
        else:
            assert state(subject) == after, f"allocation {number} of {allocations.count} failed"
            np.testing.assert_array_equal(result, expected)
            if allocations.count < number:
                break
            survived += 1
        assert call(subject) is not None  # no lock, no half of a table is left behind
    assert number > 2  # the allocations of the call were seen at all
    return survived


every_failure = pytest.mark.parametrize("all_later", [False, True], ids=["one allocation", "all from one on"])


class Case(NamedTuple):
    x: Any
    options: dict[str, Any] = {}  # noqa: RUF012
    dtype: Any = np.float32  # of the running statistics


LAST = normal(1, (5, 7, CHANNELS))
MASK = normal(2, (5, 1, 7)) > 0
CASES: dict[str, Case] = {
    "channels first": Case(normal(0, (5, CHANNELS, 7))),
    "channels last": Case(LAST, {"channel_axis": -1}),
    "channels last in memory": Case(np.moveaxis(LAST, -1, 1)),
    "every other": Case(normal(0, (5, CHANNELS, 14))[..., ::2]),
    "float16": Case(normal(0, (5, CHANNELS, 7), np.float16), dtype=np.float16),
    "int16": Case(np.rint(normal(0, (5, CHANNELS, 7)) * 9).astype(np.int16), dtype=np.float64),
    "other byte order": Case(normal(0, (5, CHANNELS, 7)).astype(">f4"), dtype=">f4"),
    "mask": Case(normal(0, (5, CHANNELS, 7)), {"mask": MASK}),
    "mask in a list": Case(normal(0, (5, CHANNELS, 7)), {"mask": MASK.tolist()}),
    "statistics asked for": Case(np.moveaxis(LAST, -1, 1), {"return_stats": True}),
    "memory of the pool": Case(normal(0, (64, CHANNELS, 3000))),
}
every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("kind", ["batch", "instance"])


@every_failure
@every_kind
@every_case
def test_functions(case: str, kind: str, all_later: bool, threads: int) -> None:
    x, options, dtype = CASES[case]
    function = nn.batch_norm if kind == "batch" else nn.instance_norm
    weight, bias = normal(3, (CHANNELS,)), normal(4, (CHANNELS,), np.float64)

    def call(running: tuple[np.ndarray, np.ndarray]) -> Any:
        result = function(x, *running, weight, bias, True, **options)
        return result[0] if options.get("return_stats") else result

    survived = attempts(
        lambda: (np.zeros(CHANNELS, dtype), np.ones(CHANNELS, dtype)),
        call,
        lambda running: [array.tobytes() for array in running],
        all_later,
    )
    # The pool gives what it keeps back to the system, and asks again.
    assert survived == (1 if case == "memory of the pool" and not all_later else 0)


@every_failure
@every_kind
def test_output_of_the_caller(kind: str, all_later: bool) -> None:
    """What is in it after the error is not said, but the statistics are as they were."""
    x, out = normal(0, (5, CHANNELS, 7)), np.empty((5, CHANNELS, 7), np.float32)
    function = nn.batch_norm if kind == "batch" else nn.instance_norm
    attempts(
        lambda: (np.zeros(CHANNELS), np.ones(CHANNELS)),
        lambda running: function(x, *running, None, None, True, out=out),
        lambda running: [array.tobytes() for array in running],
        all_later,
    )


def layer_state(layer: nn.BatchNorm | nn.InstanceNorm) -> dict[str, bytes]:
    state = {name: array.tobytes() for name, array in layer.state_dict().items()}
    moments = getattr(layer, "moments", None)
    return state if moments is None else state | {"moments": moments.mean.tobytes() + moments.var().tobytes()}


@every_failure
@every_kind
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("masked", [False, True])
def test_layers(kind: str, momentum: float | None, masked: bool, all_later: bool) -> None:
    """The number of batches belongs to it: it weighs the next one where momentum is None."""
    x = normal(0, (5, CHANNELS, 7))
    attempts(
        lambda: nn.Norm(kind, CHANNELS, momentum=momentum, track_running_stats=True),
        lambda layer: layer(x, mask=MASK if masked else None),
        layer_state,
        all_later,
    )


@every_failure
def test_synchronized(all_later: bool) -> None:
    x = normal(0, (5, CHANNELS, 7))
    make = lambda: nn.BatchNorm(CHANNELS, sync=lambda own: [own, own])  # noqa: E731
    attempts(make, lambda layer: layer(x), layer_state, all_later)


@every_failure
def test_dask(all_later: bool) -> None:
    dask, da = pytest.importorskip("dask"), pytest.importorskip("dask.array")
    x = da.from_array(normal(0, (6, CHANNELS, 7)), chunks=(3, -1, -1))
    with dask.config.set(scheduler="synchronous"):  # in this thread, whose allocations fail
        attempts(lambda: nn.BatchNorm(CHANNELS), lambda layer: layer(x), layer_state, all_later)


def trained(seed: int = 5) -> nn.BatchNorm:
    layer = nn.BatchNorm(CHANNELS)
    layer.weight, layer.bias = normal(seed + 1, (CHANNELS,)), normal(seed + 2, (CHANNELS,))
    layer(normal(seed, (5, CHANNELS, 7)))
    return layer


OTHER = trained(10).state_dict()

WAYS: dict[str, Callable[[nn.BatchNorm], Any]] = {
    "fit": lambda layer: layer.fit(normal(0, (5, CHANNELS, 7))),
    "partial_fit": lambda layer: layer.partial_fit(normal(0, (5, CHANNELS, 7))),
    "load_state_dict": lambda layer: layer.load_state_dict(OTHER),
    "reset_running_stats": lambda layer: layer.reset_running_stats() or layer,
}


@every_failure
@pytest.mark.parametrize("way", ["fit", "partial_fit", "load_state_dict", "reset_running_stats"])
def test_other_ways_to_set_them(way: str, all_later: bool) -> None:
    attempts(trained, lambda layer: WAYS[way](layer).running_mean, layer_state, all_later)
