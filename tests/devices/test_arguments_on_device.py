"""Wrong calls on CUDA arrays raise what the same calls on NumPy arrays raise; and what only devices can get wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import wrong_calls as on_host
from standin import LAUNCHES, Foreign

import numbanorm as nn
from numbanorm.cuda import devices


def plain(value: Any) -> bool:
    return type(value) is np.ndarray and value.dtype.kind not in "OUSMmV" and value.dtype.isnative


ARRAYS = ("x", "weight", "bias", "mask", "out", "residual", "running_mean", "running_var")
CASES = [
    pytest.param(function, arguments, kind, message, id=f"{function}-{number}")
    for number, (functions, arguments, kind, message) in enumerate(on_host.CASES)
    for function in functions
    if all(plain(value) for name, value in arguments.items() if name in ARRAYS)
    if "overlap" not in message  # with x, of which the device has a copy; see TestOverlap
    if not message.endswith(("memory of their own", "element of memory for each channel"))  # as the device's copies are
]


@pytest.mark.parametrize(("function", "arguments", "kind", "message"), CASES)
def test_as_on_the_host(function: str, arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"x": on_host.X, **arguments}
    if function == "batch, eval":
        given = {"running_mean": on_host.ZEROS, "running_var": on_host.ONES} | given
    device = {
        name: Foreign(value, read_only=not value.flags.writeable) if name in ARRAYS else value
        for name, value in given.items()
    }
    with pytest.raises(kind, match=message):
        on_host.FUNCTIONS[function](**device)
    assert not LAUNCHES


@pytest.mark.parametrize("value", [[1.0] * 6, 1.0, "words"])
@pytest.mark.parametrize("name", ["weight", "bias", "mask", "residual", "out"])
def test_what_lies_on_no_device(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a CUDA array, as x is, got {type(value).__name__} in host"):
        nn.layer_norm(Foreign(X), 6, **{name: value})
    assert not LAUNCHES


X = np.arange(24, dtype=np.float32).reshape(4, 6)


class TestMixes:
    @pytest.mark.parametrize("name", ["weight", "bias", "mask", "residual", "out"])
    def test_host_array_beside_a_cuda_array(self, name: str) -> None:
        value = {"mask": X > 3, "residual": X, "out": X.copy()}.get(name, np.ones(6, np.float32))
        with pytest.raises(TypeError, match=f"{name}: expected a CUDA array, as x is, got ndarray in host memory"):
            nn.layer_norm(Foreign(X), 6, **{name: value})

    @pytest.mark.parametrize("name", ["weight", "bias", "mask", "residual", "out"])
    def test_cuda_array_beside_a_host_array(self, name: str) -> None:
        value = {"mask": X > 3, "residual": X, "out": X.copy()}.get(name, np.ones(6, np.float32))
        with pytest.raises(TypeError, match=f"{name}: expected an array"):
            nn.layer_norm(X, 6, **{name: Foreign(value)})

    @pytest.mark.parametrize("name", ["dy", "mean", "rstd", "weight", "mask"])
    def test_backward(self, name: str) -> None:
        host = {"dy": X, "x": X, "mean": np.zeros(6), "rstd": np.ones(6), "weight": np.ones(6), "mask": X > 3}
        given = {n: v if n == name else Foreign(v) for n, v in host.items()}
        with pytest.raises(TypeError, match=f"{name}: expected a CUDA array, as x is, got ndarray in host memory"):
            nn.batch_norm_backward(**given)

    @pytest.mark.parametrize(
        ("changed", "kind", "message"),
        [
            ({"dy": X[:3]}, ValueError, r"dy: expected the shape of x, \(4, 6\), got \(3, 6\)"),
            ({"dy": X.astype(np.int32)}, TypeError, "dy: expected a float dtype, got int32"),
            ({"mean": None}, (TypeError, ValueError), "mean: expected .*, got"),
            ({"mean": np.zeros((4, 1))}, ValueError, r"mean: expected shape \(6,\), got \(4, 1\)"),
            ({"rstd": np.ones(6, np.int64)}, TypeError, "rstd: expected a float dtype, got int64"),
        ],
    )
    def test_backward_of_what_does_not_fit(self, changed: dict[str, Any], kind: type[Exception], message: str) -> None:
        given = {"dy": X, "x": X, "mean": np.zeros(6), "rstd": np.ones(6)} | changed
        on_device = {name: None if value is None else Foreign(value) for name, value in given.items()}
        for arguments in (given, on_device):
            with pytest.raises(kind, match=message):
                nn.batch_norm_backward(**arguments)
        assert not LAUNCHES

    def test_another_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = Foreign(np.ones(6, np.float32))
        address = weight.span.address
        monkeypatch.setattr(devices, "device_of", lambda at: int(at == address))
        with pytest.raises(ValueError, match="weight: expected an array on device 0, as x is, got one on 1"):
            nn.layer_norm(Foreign(X), 6, weight)


class TestInterface:
    def test_masked(self) -> None:
        class Masked(Foreign):
            @property
            def __cuda_array_interface__(self) -> dict[str, Any]:
                return super().__cuda_array_interface__ | {"mask": self}

        with pytest.raises(TypeError, match="x: expected an array, got a masked Masked"):
            nn.layer_norm(Masked(X), 6)

    def test_unaligned(self) -> None:
        x = Foreign(X)
        x.offset += 2
        with pytest.raises(ValueError, match="x: expected an address that is a multiple of 4, got 0x"):
            nn.layer_norm(x, 6)

    def test_no_address(self) -> None:
        x = Foreign(X)
        x.span = x.span._replace(address=0)
        with pytest.raises(
            TypeError, match="x: expected an array in host memory or in CUDA memory, got one at the addr"
        ):
            nn.layer_norm(x, 6)

    def test_address_of_no_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(address: int) -> int:
            raise ValueError(f"expected an address of CUDA memory, got {address:#x} (CUDA_ERROR_INVALID_VALUE)")

        monkeypatch.setattr(devices, "device_of", unknown)  # what it says where the driver does not know the address
        with pytest.raises(ValueError, match="x: expected an address of CUDA memory, got 0x"):
            nn.layer_norm(Foreign(X), 6)

    def test_read_only_out(self) -> None:
        with pytest.raises(ValueError, match="out: expected a writeable array, got a read-only one"):
            nn.layer_norm(Foreign(X), 6, out=Foreign(X, read_only=True))

    def test_read_only_running_statistics(self) -> None:
        var = Foreign(np.ones(6), read_only=True)
        with pytest.raises(ValueError, match="running_var: expected a writeable array, got a read-only one"):
            nn.batch_norm(Foreign(X), Foreign(np.zeros(6)), var, training=True)
        nn.batch_norm(Foreign(X), Foreign(np.zeros(6)), var)

    def test_read_only_input(self) -> None:
        nn.layer_norm(Foreign(X, read_only=True), 6)

    def test_foreign_byte_order(self) -> None:
        with pytest.raises(TypeError, match=r"x: expected float16, .*got >f4"):
            nn.layer_norm(Foreign(X.astype(">f4")), 6)

    def test_type_string_alone(self) -> None:
        class Bare:
            def __init__(self, array: np.ndarray) -> None:
                self.__cuda_array_interface__ = Foreign(array).__cuda_array_interface__

        assert nn.layer_norm(Bare(X), 6).dtype == np.float32


class TestOverlap:
    """`out` may be x as a whole, or apart from it."""

    def parts(self, shift: int) -> tuple[Foreign, Foreign]:
        memory = Foreign(np.zeros((6, 6), np.float32))
        parts = []
        for start in (0, shift):
            part = Foreign(X)
            part.span, part.offset = memory.span, start * 4
            parts.append(part)
        return parts[0], parts[1]

    def test_in_part(self) -> None:
        x, out = self.parts(6)
        with pytest.raises(ValueError, match=r"out: expected memory apart from x .or all of x itself., got a partial"):
            nn.layer_norm(x, 6, out=out)
        assert not LAUNCHES

    def test_whole(self) -> None:
        x, out = self.parts(0)
        assert nn.layer_norm(x, 6, out=out) is out

    def test_interleaved(self) -> None:
        memory = Foreign(np.zeros((4, 12), np.float32))
        x, out = Foreign(np.zeros((4, 12), np.float32)[:, ::2]), Foreign(np.zeros((4, 12), np.float32)[:, ::2])
        x.span = out.span = memory.span
        x.offset, out.offset = 0, 4
        assert nn.layer_norm(x, 6, out=out) is out

    def test_with_a_weight(self) -> None:
        x, _ = self.parts(0)
        weight = Foreign(np.ones(6, np.float32))
        weight.span = x.span
        with pytest.raises(ValueError, match="out: expected memory apart from weight"):
            nn.layer_norm(Foreign(X), 6, weight, out=x)


class TestStream:
    @pytest.mark.parametrize("stream", [-1, True, 1.5, "1", object()])
    def test_no_stream(self, stream: Any) -> None:
        with pytest.raises(TypeError, match="stream: expected a raw handle or a stream of torch, CuPy"):
            nn.layer_norm(Foreign(X), 6, stream=stream)

    def test_host_array(self) -> None:
        for function in (lambda: nn.layer_norm(X, 6, stream=0), lambda: nn.rms_norm_backward(X, X, 6, X, stream=0)):
            with pytest.raises(TypeError, match="stream: expected None for an array in host memory, got int"):
                function()
