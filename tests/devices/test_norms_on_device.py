"""Every norm of the table, and those that a user adds, on the CUDA kernels, simulated; and groups that lie in parts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from reference import normal
from registered import SCALE, UNUSUAL, by_formula, registered
from standin import Foreign, host, use_own_kernels

import numbanorm as nn
from numbanorm.calls.dispatch import Request
from numbanorm.calls.prepare import public_statistic
from numbanorm.core.layout import Layout
from numbanorm.core.norms import NORMS, NormRecord
from numbanorm.core.plan import Options
from numbanorm.cuda import handler

SHAPE = (3, 6, 5, 4)
RECORDS = {record.kind: record for record in (*NORMS.values(), *UNUSUAL)}
every_norm = pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)


@pytest.fixture(autouse=True)
def _own() -> Iterator[None]:
    use_own_kernels()
    with registered(*UNUSUAL):
        yield


def options_of(record: NormRecord, axis: tuple[int, ...] = (2, 3)) -> Options:
    return (1, 2 if record.grouped else None, None) if record.by_channel else (1, None, axis)


def named(options: Options) -> dict[str, Any]:
    """Return options as `nn.normalize` takes them."""
    channel_axis, groups, axis = options
    if axis is None:
        return {"channel_axis": channel_axis, "num_groups": groups}
    return {"normalized_shape": tuple(SHAPE[a] for a in axis), "axis": axis}


def layout_of(record: NormRecord, options: Options) -> Layout:
    channel_axis, groups, axis = options
    return Layout.of(record.kind, SHAPE, channel_axis=channel_axis, num_groups=groups, axis=axis)


def near(found: Any, expected: np.ndarray, tolerance: float = 3e-6) -> None:
    found = found if isinstance(found, np.ndarray) else host(found)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def parameters(record: NormRecord, layout: Layout) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(normal(i, layout.affine_shape, np.float64) + 1) for i, name in enumerate(record.parameters, 3)
    }


def foreign(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: Foreign(array) if isinstance(array, np.ndarray) else array for name, array in arrays.items()}


@every_norm
@pytest.mark.parametrize("last", [False, True])
def test_forward_and_backward(record: NormRecord, last: bool) -> None:
    options = options_of(record, (1,))
    x, dy = normal(1, SHAPE) + 0.5, normal(2, SHAPE)
    if last:  # in memory
        x, dy = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))
    own = parameters(record, layout_of(record, options))
    y, *stats = nn.normalize(record.kind, Foreign(x), **named(options), **foreign(own), return_stats=True)
    _, groups, axis = options
    near(y, by_formula(record, x, **own, num_groups=groups, axis=axis))
    theirs = nn.normalize(record.kind, x.astype(np.float64), **named(options), return_stats=True)
    for a, b in zip(stats, theirs[1:], strict=True):
        near(a, b)
    mean, rstd = (None, *theirs[1:])[-2:]
    given = [a if a is None else a.astype(np.float64) for a in (dy, x, mean, rstd, own["weight"])]
    expected = nn.normalize_backward(record.kind, *given, **named(options))
    given = [dy, x, mean, rstd, own["weight"]]
    found = nn.normalize_backward(record.kind, *map(on_device, given), **named(options))
    for a, b in zip(found, expected, strict=True):
        near(a, b)


def on_device(array: np.ndarray | None) -> Any:
    return None if array is None else Foreign(array)


@pytest.mark.parametrize("axis", [(3,), (1,)])
def test_norms_below_eps(axis: tuple[int, ...]) -> None:
    x, dy = normal(1, SHAPE), normal(2, SHAPE)
    x[0] *= 1e-3
    x[:, :, 0] = 0
    lengths = tuple(SHAPE[a] for a in axis)
    own = {"eps": 0.1, "axis": axis}
    y, rstd = nn.l2_norm(x.astype(np.float64), lengths, **own, return_stats=True)
    found = nn.l2_norm(Foreign(x), lengths, **own, return_stats=True)
    near(found[0], y)
    near(found[1], rstd)
    assert not host(found[0])[:, :, 0].any()
    expected = nn.l2_norm_backward(dy.astype(np.float64), x.astype(np.float64), lengths, rstd, axis=axis)
    found = nn.l2_norm_backward(Foreign(dy), Foreign(x), lengths, found[1], axis=axis)
    near(host(found[0])[0], expected[0][0])  # the clamped, which are large
    near(host(found[0])[1:, :, 1:], expected[0][1:, :, 1:])
    near(found[1], expected[1])


# --- groups that lie in parts -----------------------------------------------------------------------------------------


def cut(array: Any, part: tuple[slice, ...], axes: tuple[int, ...]) -> Any:
    """Return what of an array belongs to a part of x, whose axes are these of x."""
    lengths = () if array is None else array.shape
    own = tuple(part[a] if n > 1 else slice(None) for a, n in zip(axes, lengths, strict=False))
    return None if array is None else array[own]


PARTS = [
    (slice(0, 1), slice(None), slice(0, 2), slice(None)),
    (slice(0, 1), slice(None), slice(2, None), slice(None)),
    (slice(1, None), slice(None), slice(0, 2), slice(None)),
    (slice(1, None), slice(None), slice(2, None), slice(None)),
]


IN_PARTS = ("batch", "instance", "layer", "rms", "l2", "scale", "whole", "channel-rms")


@pytest.mark.parametrize(
    ("kind", "masked"),
    [(kind, masked) for kind in IN_PARTS for masked in (False, True) if RECORDS[kind].takes_mask or not masked],
)
def test_gradient_by_parts(kind: str, masked: bool) -> None:
    """Sums of all parts, divided by the count, give each part the gradient that it has as a part of the whole."""
    record = RECORDS[kind]
    options = options_of(record)
    layout = layout_of(record, options)
    x, dy = normal(1, SHAPE) + 0.5, normal(2, SHAPE)
    mask = np.random.default_rng(0).random(SHAPE) < 0.7 if masked else None
    weight = parameters(record, layout)["weight"]
    counted = {} if mask is None else {"mask": mask}
    wide = x.astype(np.float64)
    _, *stats = nn.normalize(kind, wide, **named(options), **counted, return_stats=True)
    mean, rstd = (None, *stats)[-2:]
    statistics = mean, rstd, weight
    theirs = nn.normalize_backward(kind, dy.astype(np.float64), wide, *statistics, **named(options), **counted)
    kept = tuple(range(4)) if options[2] else tuple(a for a in (0, 1) if a not in layout.reduced_axes)
    along = options[2] or (1,)
    sums = np.zeros((2, *rstd.shape))
    pieces = []
    for part in PARTS:
        own = cut(mean, part, kept), cut(rstd, part, kept), np.asarray(cut(weight, part, along))
        place = tuple(part[a] if n > 1 else slice(None) for a, n in zip(kept, rstd.shape, strict=True))
        pieces.append((part, own, place))
        found = handler.partial_sums(kind, options, Foreign(dy[part]), Foreign(x[part]), *own)
        for row, one in enumerate(found):
            assert type(one) is np.ndarray
            sums[(row, *place)] += one
    count: Any = 1 if record.scale == "l2" else layout.count
    if mask is not None:
        index = np.indices(SHAPE)
        flat = np.zeros(layout.groups)
        np.add.at(flat, np.broadcast_to(layout.statistic(*index), SHAPE), mask)
        count = np.maximum(public_statistic(flat, layout), 1)
    gradients: list[Any] = [np.zeros(layout.affine_shape) for _ in record.parameters]
    for part, (m, r, w), place in pieces:
        means = [(total / count)[place] for total in sums]
        own_mask = None if mask is None else mask[part]
        dx, *shares = handler.partial_gradient(
            kind, options, Foreign(dy[part]), Foreign(x[part]), m, r, *means, w, own_mask
        )
        near(dx, theirs[0][part])
        assert bool(shares) == record.weights_within_groups
        for total, share in zip(gradients, shares, strict=False):
            total[tuple(part[a] for a in along)] += host(share)
    if record.weights_within_groups:
        for ours, expected in zip(gradients, theirs[1:], strict=True):
            near(ours, expected)


def test_sums_of_nothing() -> None:
    x = Foreign(np.zeros((0, 6), np.float32))
    for total in handler.partial_sums("batch", (1, None, None), x, x, np.zeros(6), np.ones(6)):
        assert (total == np.zeros(6)).all()


def test_what_does_not_fit_a_part() -> None:
    x, zeros, ones = Foreign(normal(0, (4, 6))), np.zeros(6), np.ones(6)
    own = "batch", (1, None, None), x, x, zeros
    with pytest.raises(ValueError, match=r"rstd: expected shape \(6,\), got \(5,\)"):
        handler.partial_sums(*own, ones[:5])
    with pytest.raises(ValueError, match=r"mean_gh: expected shape \(6,\), got \(1,\)"):
        handler.partial_gradient(*own, ones, zeros, zeros[:1])
    with pytest.raises(TypeError, match="mean: expected an array, got None"):
        handler.normalize("batch", (1, None, None), x, None, ones)


# --- what the handler is asked for beside -----------------------------------------------------------------------------


def test_batches_become_a_counter() -> None:
    """An integer is counted on the device from the first call on; what counts nothing is no batch."""
    x, nothing = normal(0, (5, 3)), np.zeros((5, 3), bool)
    mean, var = Foreign(np.zeros(3)), Foreign(np.ones(3))

    def call(batches: Any, mask: Any = None) -> Any:
        own = (Foreign(x), None, None, 1e-5, mask, None, None, mean, var, None, True, False, batches)
        return handler.forward(Request("batch", (1, None), *own)).batches

    counter = call(4)
    assert isinstance(counter, handler.Counter)
    assert counter.read() == 5
    near(mean, x.mean(axis=0) / 5)  # momentum None: the average over all batches
    assert call(counter) is counter
    assert call(counter, Foreign(nothing)) is counter
    assert counter.read() == 6
    unmoved = Request("batch", (1, None), Foreign(x), None, None, 1e-5, None, None, None, mean, var, None, False)
    assert handler.forward(unmoved._replace(batches=counter)).batches is counter
    assert counter.read() == 6


def test_statistics_are_kept_where_they_are_wanted() -> None:
    x = normal(0, (5, 6))
    request = Request("layer", (6, None), Foreign(x), None, None, 1e-5)
    assert handler.forward(request).stats is None
    outcome = handler.forward(request._replace(keep=True))
    mean, rstd = outcome.prepared.public(outcome.stats)
    near(mean, x.mean(axis=1, keepdims=True))
    near(rstd, 1 / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5))
    assert len(outcome.results(True)) == 3


@pytest.mark.parametrize("name", ["weight", "bias", "dy", "rstd"])
def test_foreign_byte_order(name: str) -> None:
    """Kernels cannot read it, and no copy turns it."""
    x, ones = normal(0, (5, 6)), np.ones(6)
    given = {"weight": ones, "bias": ones, "dy": x, "rstd": np.ones((5, 1))}
    given[name] = given[name].astype(given[name].dtype.newbyteorder())
    own = foreign(given)
    call = (
        partial(nn.layer_norm, Foreign(x), 6, own["weight"], own["bias"])
        if name in ("weight", "bias")
        else partial(nn.rms_norm_backward, own["dy"], Foreign(x), 6, own["rstd"])
    )
    with pytest.raises(TypeError, match=f"{name}: expected the byte order of this machine, got >f"):
        call()


def test_running_statistics_with_one_memory() -> None:
    x, both = Foreign(normal(0, (5, 6))), Foreign(np.ones(6))
    with pytest.raises(ValueError, match="running_mean, running_var: expected memory of their own"):
        nn.batch_norm(x, both, both, training=True)
    broadcast = Foreign(np.broadcast_to(np.ones(1), 6))
    with pytest.raises(ValueError, match="running_var: expected an element of memory for each channel"):
        nn.batch_norm(x, both, broadcast, training=True)


def test_layers_of_registered_norms() -> None:
    layer, twin = nn.Norm(SCALE.kind, 6).to("cuda"), nn.Norm(SCALE.kind, 6)
    x, dy = normal(0, (5, 6)), normal(1, (5, 6))
    near(layer(Foreign(x)), twin(x))
    near(layer.backward(Foreign(dy)), twin.backward(dy))
    near(layer.grad["weight"], twin.grad["weight"])
