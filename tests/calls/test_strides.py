"""Inputs and outputs as they may lie in memory: the values must not depend on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from reference import error, normal, sealed
from tolerances import FLOAT32, FLOAT64

import numbanorm as nn

Norm = Callable[..., Any]

SHAPE = (4, 6, 8, 40)
WEIGHT, BIAS = normal(10, (6,)), normal(11, (6,))
ROW_WEIGHT, ROW_BIAS = normal(12, (40,)), normal(13, (40,))
PLANE_WEIGHT = normal(14, (6, 40))

NORMS: dict[str, tuple[Norm, Callable[[np.ndarray], reference.Expected]]] = {
    "batch": (
        lambda x, **o: nn.batch_norm(x, None, None, WEIGHT, BIAS, True, **o),
        lambda x: reference.batch_norm(x, None, None, WEIGHT, BIAS, True),
    ),
    "batch, eval": (
        lambda x, **o: nn.batch_norm(x, WEIGHT, WEIGHT**2, BIAS, WEIGHT, **o),
        lambda x: reference.batch_norm(x, WEIGHT, WEIGHT**2, BIAS, WEIGHT),
    ),
    "instance": (
        lambda x, **o: nn.instance_norm(x, None, None, WEIGHT, BIAS, **o),
        lambda x: reference.instance_norm(x, None, None, WEIGHT, BIAS),
    ),
    "group": (
        lambda x, **o: nn.group_norm(x, 3, WEIGHT, BIAS, **o),
        lambda x: reference.group_norm(x, 3, WEIGHT, BIAS),
    ),
    "layer": (
        lambda x, **o: nn.layer_norm(x, 40, ROW_WEIGHT, ROW_BIAS, **o),
        lambda x: reference.layer_norm(x, (-1,), ROW_WEIGHT, ROW_BIAS),
    ),
    "layer, all": (
        lambda x, **o: nn.layer_norm(x, SHAPE[1:], **o),
        lambda x: reference.layer_norm(x, (1, 2, 3)),
    ),
    "layer, channels": (
        lambda x, **o: nn.layer_norm(x, 6, WEIGHT, BIAS, axis=1, **o),
        lambda x: reference.layer_norm(x, (1,), WEIGHT, BIAS),
    ),
    "layer, apart": (
        lambda x, **o: nn.layer_norm(x, (6, 40), PLANE_WEIGHT, axis=(1, 3), **o),
        lambda x: reference.layer_norm(x, (1, 3), PLANE_WEIGHT),
    ),
    "rms": (
        lambda x, **o: nn.rms_norm(x, 40, ROW_WEIGHT, **o),
        lambda x: reference.rms_norm(x, (-1,), ROW_WEIGHT),
    ),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


def base(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return (3 * normal(0, shape, np.float64) + 2).astype(dtype)


def odd_address(array: np.ndarray) -> np.ndarray:
    """Return a copy one byte past where its elements ought to lie."""
    room = np.zeros(array.nbytes + 1, np.uint8)
    moved = room[1:].view(array.dtype) if array.dtype.itemsize == 1 else np.frombuffer(room.data[1:], array.dtype)
    moved = moved.reshape(array.shape)
    moved[...] = array
    assert not moved.flags.aligned
    return moved


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


LAYOUTS: dict[str, Callable[[], np.ndarray]] = {
    "c": lambda: base(SHAPE),
    "channels last": lambda: base((4, 8, 40, 6)).transpose(0, 3, 1, 2),
    "fortran": lambda: np.asfortranarray(base(SHAPE)),
    "transposed pairs": lambda: base((6, 4, 40, 8)).transpose(1, 0, 3, 2),
    "every second sample": lambda: base((8, 6, 8, 40))[::2],
    "every third channel": lambda: base((4, 18, 8, 40))[:, 1::3],
    "every second row": lambda: base((4, 6, 16, 40))[:, :, ::2],
    "every second element": lambda: base((4, 6, 8, 80))[..., 1::2],
    "cropped": lambda: base((5, 9, 11, 50))[1:, 2:8, 3:, 7:47],
    "channels last, cropped": lambda: base((5, 11, 50, 9))[1:, 3:, 7:47, 2:8].transpose(0, 3, 1, 2),
    "samples backwards": lambda: base(SHAPE)[::-1],
    "channels backwards": lambda: base(SHAPE)[:, ::-1],
    "elements backwards": lambda: base(SHAPE)[..., ::-1],
    "all backwards": lambda: base(SHAPE)[::-1, ::-1, ::-1, ::-1],
    "channels last, samples backwards": lambda: base((4, 8, 40, 6))[::-1].transpose(0, 3, 1, 2),
    "channels last, backwards": lambda: base((4, 8, 40, 6))[::-1, ::-2, ::-1, ::-1].repeat(2, 1).transpose(0, 3, 1, 2),
    "samples broadcast": lambda: np.broadcast_to(base((1, 6, 8, 40)), SHAPE),
    "channels broadcast": lambda: np.broadcast_to(base((4, 1, 8, 40)), SHAPE),
    "rows broadcast": lambda: np.broadcast_to(base((4, 6, 1, 40)), SHAPE),
    "elements broadcast": lambda: np.broadcast_to(base((4, 6, 8, 1)), SHAPE),
    "channels last, rows broadcast": lambda: np.broadcast_to(base((4, 1, 40, 6)), (4, 8, 40, 6)).transpose(0, 3, 1, 2),
    "odd address": lambda: odd_address(base(SHAPE)),
    "odd address, channels last": lambda: odd_address(base((4, 8, 40, 6))).transpose(0, 3, 1, 2),
    "field of a record": lambda: field(base(SHAPE)),
    "big endian": lambda: base(SHAPE).astype(">f4"),
    "big endian, channels last": lambda: base((4, 8, 40, 6)).astype(">f4").transpose(0, 3, 1, 2),
    "read-only": lambda: read_only(base(SHAPE)),
    "read-only, sliced": lambda: read_only(base((8, 6, 8, 40)))[::2],
    "read-only, channels last": lambda: read_only(base((4, 8, 40, 6))).transpose(0, 3, 1, 2),
}


def field(array: np.ndarray) -> np.ndarray:
    """Return the array as one field of packed records: strides are no multiple of its item size."""
    records = np.zeros(array.shape, [("flag", np.int8), ("value", array.dtype)])
    records["value"] = array
    return records["value"]


@every_norm
@pytest.mark.parametrize("layout", LAYOUTS)
class TestInput:
    def test_values(self, norm: str, layout: str) -> None:
        x = LAYOUTS[layout]()
        before = x.copy()
        assert x.shape == SHAPE
        y, *statistics = NORMS[norm][0](x, return_stats=True)
        expected = NORMS[norm][1](x)
        assert y.dtype == np.float32
        assert y.dtype.isnative
        assert error(y, expected.y) <= FLOAT32
        np.testing.assert_allclose(statistics[-1], expected.rstd, 1e-6)
        if norm != "rms":
            assert float(np.abs(statistics[0] - expected.mean).max()) <= 1e-5
        np.testing.assert_array_equal(x, before)

    def test_output_in_c_order(self, norm: str, layout: str) -> None:
        x = LAYOUTS[layout]()
        out = sealed(SHAPE)
        assert NORMS[norm][0](x, out=out) is out
        assert error(out, NORMS[norm][1](x).y) <= FLOAT32


@every_norm
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2), (2, 0, 1, 3)], ids=str)
def test_output_keeps_the_order_of_memory(norm: str, order: tuple[int, ...]) -> None:
    x = base(tuple(SHAPE[a] for a in order)).transpose([order.index(a) for a in range(4)])
    assert x.shape == SHAPE
    y = NORMS[norm][0](x)
    assert error(y, NORMS[norm][1](x).y) <= FLOAT32
    assert y.strides == x.strides


@every_norm
def test_same_bits_in_every_c_like_layout(norm: str) -> None:
    """Where the elements lie changes nothing, as long as their order in memory is the same."""
    x = base(SHAPE)
    expected = NORMS[norm][0](x)
    room = np.zeros((8, 6, 8, 40), np.float32)
    room[::2] = x
    np.testing.assert_array_equal(NORMS[norm][0](room[::2]), expected)
    room = np.zeros((5, 9, 11, 50), np.float32)
    room[1:, 2:8, 3:, 7:47] = x
    np.testing.assert_array_equal(NORMS[norm][0](room[1:, 2:8, 3:, 7:47]), expected)
    np.testing.assert_array_equal(NORMS[norm][0](odd_address(x)), expected)
    np.testing.assert_array_equal(NORMS[norm][0](x.astype(">f4")), expected)
    np.testing.assert_array_equal(NORMS[norm][0](read_only(x.copy())), expected)


OUTPUTS: dict[str, Callable[[], np.ndarray]] = {
    "c": lambda: sealed(SHAPE),
    "channels last": lambda: sealed((4, 8, 40, 6)).transpose(0, 3, 1, 2),
    "fortran": lambda: np.asfortranarray(sealed(SHAPE)),
    "every second sample": lambda: sealed((8, 6, 8, 40))[::2],
    "every second channel": lambda: sealed((4, 12, 8, 40))[:, ::2],
    "every second element": lambda: sealed((4, 6, 8, 80))[..., ::2],
    "cropped": lambda: sealed((5, 9, 11, 50))[1:, 2:8, 3:, 7:47],
    "backwards": lambda: sealed(SHAPE)[::-1, ::-1, ::-1, ::-1],
    "samples backwards": lambda: sealed(SHAPE)[::-1],
    "odd address": lambda: odd_address(sealed(SHAPE)),
    "field of a record": lambda: field(sealed(SHAPE)),
}


@every_norm
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("layout", ["c", "channels last", "every second sample", "every second element"])
def test_output(norm: str, output: str, layout: str) -> None:
    x = LAYOUTS[layout]()
    out = OUTPUTS[output]()
    around = out if out.base is None else out.base
    untouched = np.isnan(around).sum() - out.size if around.dtype == np.float32 else None
    result = NORMS[norm][0](x, out=out)
    assert result is out
    assert error(out, NORMS[norm][1](x).y) <= FLOAT32
    if untouched is not None and around.size >= out.size:
        assert np.isnan(around).sum() == untouched  # not an element between those of `out` was written


IN_PLACE = {name: make for name, make in LAYOUTS.items() if "broadcast" not in name and "read-only" not in name}


@every_norm
@pytest.mark.parametrize("layout", [name for name in IN_PLACE if "endian" not in name])
def test_in_place(norm: str, layout: str) -> None:
    x = LAYOUTS[layout]()
    expected = NORMS[norm][0](x.copy("K"))
    result = NORMS[norm][0](x, out=x)
    assert result is x
    assert error(x, reference.double(expected)) <= FLOAT32


@every_norm
def test_in_place_has_the_same_bits(norm: str) -> None:
    x = base(SHAPE)
    expected = NORMS[norm][0](x)
    NORMS[norm][0](x, out=x)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("norm", ["layer", "layer, channels", "layer, all", "layer, apart", "rms"])
@pytest.mark.parametrize("layout", ["c", "channels last", "every second sample", "every second element", "odd address"])
@pytest.mark.parametrize("target", ["x", "residual", "fresh"])
def test_residual_and_out(norm: str, layout: str, target: str) -> None:
    x = LAYOUTS[layout]()
    residual = LAYOUTS[layout]()
    residual[...] = normal(5, SHAPE)
    total_expected = x + residual
    expected = NORMS[norm][1](total_expected)
    out = {"x": x, "residual": residual, "fresh": sealed(SHAPE)}[target]
    y, total = NORMS[norm][0](x, residual=residual, out=out)
    assert y is out
    np.testing.assert_array_equal(total, total_expected)
    assert error(y, expected.y) <= FLOAT32
    assert not np.shares_memory(total, out)


@every_norm
class TestOverlap:
    def test_shifted_by_samples(self, norm: str) -> None:
        room = base((5, *SHAPE[1:]))
        before = room.copy()
        with pytest.raises(ValueError, match=r"out: .*overlap"):
            NORMS[norm][0](room[:4], out=room[1:])
        np.testing.assert_array_equal(room, before)

    def test_shifted_by_an_element(self, norm: str) -> None:
        room = base((4, 6, 8, 41))
        before = room.copy()
        with pytest.raises(ValueError, match=r"out: .*overlap"):
            NORMS[norm][0](room[..., 1:], out=room[..., :-1])
        np.testing.assert_array_equal(room, before)

    def test_same_memory_in_another_order(self, norm: str) -> None:
        x = base(SHAPE)
        with pytest.raises(ValueError, match=r"out: .*overlap"):
            NORMS[norm][0](x, out=x[::-1])

    def test_interleaved_does_not_overlap(self, norm: str) -> None:
        room = base((4, 6, 8, 80))
        x, out = room[..., ::2], room[..., 1::2]
        expected = NORMS[norm][1](x)
        NORMS[norm][0](x, out=out)
        assert error(out, expected.y) <= FLOAT32

    def test_neighbours_do_not_overlap(self, norm: str) -> None:
        room = base((8, *SHAPE[1:]))
        expected = NORMS[norm][1](room[:4])
        NORMS[norm][0](room[:4], out=room[4:])
        assert error(room[4:], expected.y) <= FLOAT32


def test_out_over_a_parameter_or_the_mask() -> None:
    square = base((40, 40))
    for out, given in [(square, {"weight": square[3]}), (square, {"bias": square[39]})]:
        with pytest.raises(ValueError, match=r"out: .*overlap"):
            nn.layer_norm(base((40, 40)), 40, out=out, **given)
    room = np.zeros(40 * 40 * 4, np.bool_)
    out = room.view(np.float32).reshape(40, 40)
    with pytest.raises(ValueError, match=r"out: .*mask"):
        nn.layer_norm(base((40, 40)), 40, mask=room[: 40 * 40].reshape(40, 40), out=out)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8, np.bool_, np.int64])
@every_norm
def test_strides_of_other_dtypes(norm: str, dtype: Any) -> None:
    room = (20 * normal(0, (8, 16, 40, 12), np.float64)).astype(dtype)
    room = np.abs(room) if dtype == np.uint8 else room
    for x in (
        room[::2, ::2, :, ::2].transpose(0, 3, 1, 2),
        room[:4, :8, :, 6:][::-1].transpose(0, 3, 1, 2),
        np.ascontiguousarray(room[:4, :8, :, :6].transpose(0, 3, 1, 2)),
    ):
        assert x.shape == SHAPE
        y = NORMS[norm][0](x)
        narrow = np.dtype(dtype).itemsize < 4
        assert y.dtype == (np.float32 if narrow else np.float64)
        assert error(y, NORMS[norm][1](np.asarray(x, np.float64) if narrow else x).y) <= (
            FLOAT32 if narrow else FLOAT64
        )


class TestKinds:
    """What is an array, though not of the class ndarray."""

    def test_list(self) -> None:
        x = [[1.0, 2.0, 4.0], [3.0, -1.0, 5.0]]
        y = nn.layer_norm(x, 3, [1.0, 2.0, 3.0], [0, 0, 1])
        assert isinstance(y, np.ndarray)
        assert y.dtype == np.float64
        expected = reference.layer_norm(np.array(x), (-1,), np.array([1.0, 2.0, 3.0]), np.array([0.0, 0, 1]))
        assert error(y, expected.y) <= FLOAT64

    def test_tuple_of_integers(self) -> None:
        y = nn.layer_norm(((1, 2, 6), (3, 4, 4)), 3)
        assert y.dtype == np.float64
        assert error(y, reference.layer_norm(np.array([[1, 2, 6], [3, 4, 4]]), (-1,)).y) <= FLOAT64

    def test_memmap(self, tmp_path: Path) -> None:
        x = base((64, 40))
        held = np.memmap(tmp_path / "x", np.float32, "w+", shape=(64, 40))
        held[...] = x
        held.flush()
        mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(64, 40))
        np.testing.assert_array_equal(nn.layer_norm(mapped, 40), nn.layer_norm(x, 40))
        assert nn.layer_norm(held, 40, out=held) is held
        np.testing.assert_array_equal(held, nn.layer_norm(x, 40))
        del held, mapped

    def test_subclass(self) -> None:
        class Tagged(np.ndarray):
            pass

        x = base((8, 40))
        np.testing.assert_array_equal(nn.layer_norm(x.view(Tagged), 40), nn.layer_norm(x, 40))

    def test_parameters_of_other_strides_and_dtypes(self) -> None:
        x = base(SHAPE)
        expected = nn.group_norm(x, 3, WEIGHT, BIAS)
        strided = np.zeros((6, 2), np.float64)
        strided[:, 0], strided[:, 1] = WEIGHT, BIAS
        np.testing.assert_array_equal(nn.group_norm(x, 3, strided[:, 0], strided[:, 1]), expected)
        backwards = WEIGHT[::-1].copy()[::-1]
        np.testing.assert_array_equal(nn.group_norm(x, 3, backwards, BIAS.astype(">f8")), expected)
        np.testing.assert_array_equal(nn.group_norm(x, 3, odd_address(WEIGHT), read_only(BIAS.copy())), expected)
        np.testing.assert_array_equal(nn.group_norm(x, 3, WEIGHT.tolist(), BIAS.tolist()), expected)
        ones = np.broadcast_to(np.float32(1), (6,))
        np.testing.assert_array_equal(nn.group_norm(x, 3, ones), nn.group_norm(x, 3))

    def test_float16_parameters(self) -> None:
        x = base(SHAPE)
        weight, bias = WEIGHT.astype(np.float16), BIAS.astype(np.float16)
        expected = nn.group_norm(x, 3, weight.astype(np.float32), bias.astype(np.float32))
        np.testing.assert_array_equal(nn.group_norm(x, 3, weight, bias), expected)

    def test_float64_parameters_of_float64_input_are_not_rounded(self) -> None:
        x = base((8, 40), np.float64)
        weight = np.full(40, 1 + 2.0**-40)
        y = nn.layer_norm(x, 40, weight)
        np.testing.assert_allclose(y / nn.layer_norm(x, 40), 1 + 2.0**-40, 1e-15)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f8", np.float16])
    def test_running_statistics_of_any_float_and_strides(self, dtype: Any) -> None:
        x = base(SHAPE)
        room = np.ones((6, 2), dtype)
        mean, var = room[:, 0], room[:, 1]
        nn.batch_norm(x, mean, var, training=True)
        expected = reference.batch_norm(x, np.ones(6), np.ones(6), training=True)
        rtol = 1e-3 if dtype == np.float16 else 1e-6
        np.testing.assert_allclose(room[:, 0].astype(float), expected.running_mean, rtol)
        np.testing.assert_allclose(room[:, 1].astype(float), expected.running_var, rtol)

    @pytest.mark.parametrize("kind", ["float32", "float64"])
    def test_running_statistics_for_evaluation(self, kind: str) -> None:
        x = base(SHAPE, kind)
        mean, var = normal(1, (6,), np.float64), normal(2, (6,), np.float64) ** 2 + 0.1
        expected = reference.batch_norm(x, mean, var).y
        assert error(nn.batch_norm(x, mean, var), expected) <= (FLOAT32 if kind == "float32" else FLOAT64)
        assert error(nn.batch_norm(x, mean.tolist(), var.tolist()), expected) <= FLOAT32
        assert error(nn.batch_norm(x, read_only(mean), read_only(var)), expected) <= FLOAT32
