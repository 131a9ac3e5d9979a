"""Arrays of torch, CuPy and numba: what comes back, on which stream the work is queued, and what memory it takes."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import normal
from same import assert_close, assert_same
from standin import (
    ALLOCATIONS,
    HOST,
    LAUNCHES,
    WAITS,
    DeviceNDArray,
    FakeStream,
    Foreign,
    host,
    use_own_kernels,
)

import numbanorm as nn
from numbanorm.cuda import libraries, scratch

X = (2 * normal(0, (4, 6)) + 1).astype(np.float32)
W = normal(1, (6,)).astype(np.float32)


def streams() -> set[int]:
    """Return the streams of all launches so far, and forget them."""
    found = {launch.stream for launch in LAUNCHES}
    LAUNCHES.clear()
    return found


# --- any array --------------------------------------------------------------------------------------------------------


class TestInterface:
    def test_numba_arrays_come_back(self) -> None:
        for result in nn.layer_norm(Foreign(X), 6, return_stats=True):
            assert type(result) is DeviceNDArray

    def test_the_default_stream(self) -> None:
        nn.layer_norm(Foreign(X), 6)
        assert streams() == {0}

    def test_its_stream(self) -> None:
        y = nn.layer_norm(Foreign(X, stream=72), 6, Foreign(W.astype(np.float64)))
        assert streams() == {72}
        assert y.stream == 72  # who uses it next knows what to wait for
        assert WAITS == []

    def test_a_named_stream(self) -> None:
        """It waits for the stream in which the array is being computed."""
        y = nn.layer_norm(Foreign(X, stream=72), 6, stream=88)
        assert streams() == {88}
        assert y.stream == 88
        assert WAITS == [(88, 72)]

    @pytest.mark.parametrize("attribute", ["cuda_stream", "ptr", "__cuda_stream__", "numba"])
    def test_stream_objects(self, attribute: str) -> None:
        stream: Any = FakeStream(88) if attribute == "numba" else types.SimpleNamespace()
        if attribute == "__cuda_stream__":
            stream = type("Stream", (), {"__cuda_stream__": lambda self: (0, 88)})()
        elif attribute != "numba":
            setattr(stream, attribute, 88)
        nn.layer_norm(Foreign(X), 6, stream=stream)
        assert streams() == {88}

    def test_the_next_call_is_on_the_default_stream_again(self) -> None:
        with pytest.raises(ValueError, match="eps"):
            nn.layer_norm(Foreign(X), 6, eps=-1.0, stream=88)
        nn.layer_norm(Foreign(X), 6)
        assert streams() == {0}

    def test_other_streams_are_waited_for(self) -> None:
        weight, out = Foreign(W, stream=80), Foreign(np.zeros_like(X), stream=96)
        nn.layer_norm(Foreign(X, stream=72), 6, weight, out=out)
        assert streams() == {72}
        assert sorted(WAITS) == [(72, 80), (72, 96)]

    @pytest.mark.parametrize("name", ["batch", "instance", "group", "layer", "rms"])
    def test_every_function_takes_one(self, name: str) -> None:
        x, dy = Foreign(normal(0, (4, 6, 5))), Foreign(normal(1, (4, 6, 5)))
        head: tuple[Any, ...] = {"layer": (5,), "rms": (5,), "group": (2,)}.get(name, ())
        training = {"training": True} if name == "batch" else {}
        _, *stats = getattr(nn, f"{name}_norm")(x, *head, **training, return_stats=True, stream=88)
        getattr(nn, f"{name}_norm_backward")(dy, x, *head, *stats, stream=88)
        assert streams() == {88}


# --- scratch memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_OF_STREAM", {})


@pytest.mark.usefixtures("no_scratch")
class TestScratch:
    def call(self, rows: int = 4, stream: int | None = 8) -> list[int]:
        """Normalize; return the bytes that were allocated beside the output."""
        x, out = Foreign(np.ones((rows, 6), np.float32), stream), Foreign(np.ones((rows, 6), np.float32), stream)
        ALLOCATIONS.clear()
        nn.layer_norm(x, 6, Foreign(W.astype(np.float64), stream), out=out)
        return list(ALLOCATIONS)

    def test_the_second_call_allocates_nothing(self) -> None:
        assert self.call()
        assert self.call() == []
        assert self.call(3) == []

    def test_backward_allocates_its_results_alone(self) -> None:
        _, mean, rstd = nn.layer_norm(Foreign(X), 6, return_stats=True)
        for _ in range(2):
            ALLOCATIONS.clear()
            nn.layer_norm_backward(Foreign(X), Foreign(X), 6, mean, rstd, Foreign(W.astype(np.float16)))
        assert sorted(ALLOCATIONS) == [12, 12, X.nbytes]

    def test_every_stream_has_its_own(self) -> None:
        first, second = self.call(stream=8), self.call(stream=16)
        assert first == second != []

    def test_it_grows_and_keeps_what_it_has_outgrown(self) -> None:
        """A captured graph goes on using the addresses that it has seen."""
        self.call()
        (held,) = scratch._OF_STREAM.values()
        before = [array.address for array in held._kept]
        assert self.call(1000)
        assert [array.address for array in held._kept][: len(before)] == before
        assert self.call(1000) == []
        assert self.call() == []

    def test_copies_of_inputs_are_not_kept(self) -> None:
        apart = Foreign(np.repeat(X, 2, 1)[:, ::2])
        for _ in range(2):
            ALLOCATIONS.clear()
            nn.layer_norm(apart, 6)
        assert sorted(ALLOCATIONS) == [X.nbytes, X.nbytes]  # the copy and the output
        (held,) = scratch._OF_STREAM.values()
        assert held._held == []

    def test_a_failed_call_holds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import standin

        def fails(*arguments: Any, **options: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(standin.backend, "prepare_forward", lambda call: fails)
        with pytest.raises(MemoryError):
            nn.layer_norm(Foreign(np.repeat(X, 2, 1)[:, ::2]), 6)
        (held,) = scratch._OF_STREAM.values()
        assert held._held == []
        assert held._lock.acquire(blocking=False)

    def test_threads_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two calls on one stream share buffers: the kernels of the one are queued before those of the other."""
        import standin

        inside, met = threading.Barrier(2, timeout=0.2), []

        def launch(*arguments: Any, **options: Any) -> None:
            try:
                inside.wait()
                met.append(True)
            except threading.BrokenBarrierError:
                pass

        monkeypatch.setattr(standin.backend, "prepare_forward", lambda call: launch)
        threads = [threading.Thread(target=nn.layer_norm, args=(Foreign(X), 6)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert met == []

    def test_the_per_thread_stream_is_not_shared(self) -> None:
        self.call(stream=scratch.PER_THREAD)
        thread = threading.Thread(target=self.call, kwargs={"stream": scratch.PER_THREAD})
        thread.start()
        thread.join()
        assert len(scratch._OF_STREAM) == 2


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return what makes tensors that say they are on a CUDA device; their memory is torch's own, of the host."""
    torch = pytest.importorskip("torch")
    current = [24]

    class Tensor(torch.Tensor):  # type: ignore[misc]
        is_cuda = True

        def get_device(self) -> int:
            return 0

    def registered(tensor: Any) -> Any:
        made = tensor.as_subclass(Tensor)
        size = made.numel() * made.element_size() if made.is_contiguous() else made.untyped_storage().nbytes()
        start = made.data_ptr() if made.is_contiguous() else made.untyped_storage().data_ptr()
        HOST.append((start, start + size))
        kept.append(made)
        return made

    kept: list[Any] = []
    empty = torch.empty_strided

    def empty_strided(shape: Any, strides: Any, *, dtype: Any, device: Any) -> Any:
        assert str(device) in ("cpu", "cuda:0")
        return registered(empty(shape, strides, dtype=dtype))

    @contextlib.contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        current.append(chosen.cuda_stream)
        yield
        current.pop()

    monkeypatch.setattr(torch, "empty_strided", empty_strided)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=current[-1]))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: types.SimpleNamespace(cuda_stream=handle))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(libraries, "_BY_TYPE", {})
    monkeypatch.setattr(scratch, "_OF_STREAM", {})
    libraries._torch.cache_clear()
    torch.on_cuda = registered
    yield torch
    HOST.clear()
    libraries._torch.cache_clear()


class TestTorch:
    def test_tensors_come_back(self, on_cuda: Any) -> None:
        x = on_cuda.on_cuda(on_cuda.from_numpy(X.copy()))
        ours = nn.layer_norm(x, 6, return_stats=True)
        assert all(isinstance(tensor, on_cuda.Tensor) for tensor in ours)
        assert_same(host(ours), nn.layer_norm(X, 6, return_stats=True))
        assert streams() == {24}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint8", "bool"])
    def test_dtypes(self, on_cuda: Any, dtype: str) -> None:
        kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        x, weight = X.astype(kind), W.astype(ml_dtypes.bfloat16)

        def tensor(array: np.ndarray, name: str) -> Any:
            raw = on_cuda.from_numpy(array.view(np.uint8)).view(getattr(on_cuda, name))
            return on_cuda.on_cuda(raw.reshape(array.shape))

        y = nn.layer_norm(tensor(x, dtype), 6, tensor(weight, "bfloat16"))
        expected = nn.layer_norm(x, 6, weight)
        assert str(y.dtype) == f"torch.{expected.dtype}"
        ours = y.as_subclass(on_cuda.Tensor).view(on_cuda.uint8).numpy().view(expected.dtype)
        assert_same(ours, expected)

    def test_memory_formats(self, on_cuda: Any) -> None:
        values = on_cuda.from_numpy(normal(0, (4, 6, 5, 3))).contiguous(memory_format=on_cuda.channels_last)
        y, mean, _ = nn.instance_norm(on_cuda.on_cuda(values), return_stats=True)
        assert y.is_contiguous(memory_format=on_cuda.channels_last)
        assert mean.shape == (4, 6)
        assert_same((host(y), host(mean)), nn.instance_norm(values.numpy(), return_stats=True)[:2])

    def test_streams(self, on_cuda: Any) -> None:
        x = on_cuda.on_cuda(on_cuda.from_numpy(X.copy()))
        with on_cuda.cuda.stream(types.SimpleNamespace(cuda_stream=56)):
            nn.layer_norm(x, 6)
        assert streams() == {56}
        nn.layer_norm(x, 6, stream=64)
        assert streams() == {64}
        nn.layer_norm(x, 6)
        assert streams() == {24}
        nn.layer_norm(x, 6, Foreign(W), Foreign(W, stream=80))  # arrays of two libraries
        assert WAITS == [(24, 80)]
        nn.layer_norm(Foreign(X), 6, on_cuda.on_cuda(on_cuda.from_numpy(W)))
        assert WAITS == [(24, 80), (0, 24)]

    def test_layers(self, on_cuda: Any) -> None:
        x = normal(0, (5, 6, 7)).astype(np.float32)
        ours, theirs = nn.BatchNorm(6).to("cuda"), nn.BatchNorm(6)
        y = ours(on_cuda.on_cuda(on_cuda.from_numpy(x.copy())))
        assert_same(host(y), theirs(x))
        dx = ours.backward(on_cuda.on_cuda(on_cuda.from_numpy(x.copy())))
        assert_close((host(dx),), (theirs.backward(x),))
        assert isinstance(ours.grad["weight"], on_cuda.Tensor)

    def test_what_is_refused(self, on_cuda: Any) -> None:
        x = on_cuda.on_cuda(on_cuda.from_numpy(X.copy()))
        with pytest.raises(TypeError, match="weight: expected a CUDA array, as x is, got a tensor on cpu"):
            nn.layer_norm(x, 6, on_cuda.ones(6))
        with pytest.raises(TypeError, match=r"x: expected float16, .*got torch.complex64"):
            nn.layer_norm(on_cuda.on_cuda(on_cuda.ones(4, 6, dtype=on_cuda.complex64)), 6)
        with pytest.raises(TypeError, match=r"weight: expected a tensor that does not require grad .call .detach"):
            nn.layer_norm(x, 6, on_cuda.on_cuda(on_cuda.ones(6, requires_grad=True)))
        with pytest.raises(TypeError, match=r"x: expected a tensor that is in memory as it reads; call .resolve_neg"):
            nn.layer_norm(on_cuda.on_cuda(on_cuda.ones(4, 6, dtype=on_cuda.complex64).conj().imag), 6)

    def test_bfloat16_without_ml_dtypes(self, on_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(TypeError, match="x: bfloat16 needs ml_dtypes, which is not installed: pip install"):
            nn.layer_norm(on_cuda.on_cuda(on_cuda.ones(4, 6, dtype=on_cuda.bfloat16)), 6)


# --- CuPy -------------------------------------------------------------------------------------------------------------


class Pointer:
    """cupy.cuda.MemoryPointer."""

    def __init__(self, ptr: int, owner: Any) -> None:
        self.ptr, self.owner = ptr, owner

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.ptr + offset, self.owner)


class ndarray:  # noqa: N801 (its name in CuPy)
    """cupy.ndarray, as far as it is asked for anything."""

    __module__ = "cupy"

    def __init__(self, shape: Any, dtype: Any, memptr: Pointer | None = None, strides: Any = None) -> None:
        if memptr is None:
            assert strides is None, "CuPy takes strides with memory alone"
            memptr = Pointer(Foreign(np.zeros(shape, dtype)).span.address, None)
        self.shape, self.dtype, self.data = tuple(shape), np.dtype(dtype), memptr
        self.strides = strides or np.empty(shape, dtype).strides
        self.device = types.SimpleNamespace(id=0)
        self.size = int(np.prod(self.shape))

    @classmethod
    def of(cls, array: np.ndarray) -> ndarray:
        foreign = Foreign(array)
        return cls(array.shape, array.dtype, Pointer(foreign.span.address + foreign.offset, foreign), array.strides)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise AssertionError("CuPy is asked directly")

    def copy_to_host(self) -> np.ndarray:
        twin = Foreign(np.zeros(self.shape, self.dtype))
        memory = Foreign.__new__(Foreign)
        memory.__dict__ |= twin.__dict__
        size = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + self.dtype.itemsize
        memory.span, memory.offset, memory.strides = (
            type(twin.span)(self.data.ptr, np.dtype(np.uint8), size),
            0,
            self.strides,
        )
        return memory.copy_to_host()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module: Any = types.ModuleType("cupy")
    module.ndarray, module.empty, module.current = ndarray, lambda shape, dtype: ndarray(shape, dtype), [40]

    @contextlib.contextmanager
    def external(handle: int, device: int) -> Iterator[None]:
        module.current.append(handle)
        yield
        module.current.pop()

    module.cuda = types.SimpleNamespace(
        get_current_stream=lambda: types.SimpleNamespace(ptr=module.current[-1]), ExternalStream=external
    )
    ndarray.__module__ = "cupy"
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(libraries, "_BY_TYPE", {})
    monkeypatch.setattr(scratch, "_OF_STREAM", {})
    libraries._cupy.cache_clear()
    monkeypatch.setattr("numbanorm.calls.dispatch.on_cuda", lambda value: isinstance(value, (ndarray, Foreign)))
    yield module
    libraries._cupy.cache_clear()


class TestCuPy:
    def test_arrays_come_back(self, cupy: Any) -> None:
        ours = nn.layer_norm(ndarray.of(X), 6, ndarray.of(W.astype(np.float64)), return_stats=True)
        assert all(type(array) is ndarray for array in ours)
        assert_same(host(ours), nn.layer_norm(X, 6, W.astype(np.float64), return_stats=True))
        assert streams() == {40}

    def test_memory_order(self, cupy: Any) -> None:
        x = np.ascontiguousarray(np.moveaxis(normal(0, (4, 6, 5)), 1, -1)).transpose(0, 2, 1)
        ours = nn.instance_norm(ndarray.of(x), return_stats=True)
        assert ours[0].strides == x.strides
        assert_same(host(ours), nn.instance_norm(x, return_stats=True))

    def test_backward(self, cupy: Any) -> None:
        _, mean, rstd = nn.layer_norm(X, 6, return_stats=True)
        own = [ndarray.of(array) for array in (mean, rstd, W)]
        ours = nn.layer_norm_backward(ndarray.of(X), ndarray.of(X), 6, *own)
        assert all(type(array) is ndarray for array in ours)
        assert_close(host(ours), nn.layer_norm_backward(X, X, 6, mean, rstd, W))

    def test_streams(self, cupy: Any) -> None:
        nn.layer_norm(ndarray.of(X), 6, stream=64)
        assert streams() == {64}
        nn.layer_norm(Foreign(X, stream=72), 6, ndarray.of(W))
        assert WAITS == [(72, 40)]


# --- the CUDA kernels themselves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "instance", "group", "layer", "rms"])
def test_own_kernels(norm: str) -> None:
    """The whole way, with the CUDA kernels of the norms simulated."""
    use_own_kernels()
    x, dy = normal(0, (3, 4, 5)).astype(np.float32), normal(1, (3, 4, 5)).astype(np.float32)
    ours, theirs = (
        {"group": nn.GroupNorm(2, 4), "layer": nn.LayerNorm(5), "rms": nn.RMSNorm(5)}.get(norm)
        or nn.Norm(norm, 4, affine=True)
        for _ in range(2)
    )
    ours.to("cuda")
    assert_close((host(ours(Foreign(x))),), (theirs(x),))
    assert_close((host(ours.backward(Foreign(dy))),), (theirs.backward(dy),))
    assert_close([host(g) for g in ours.grad.values()], list(theirs.grad.values()))
    assert_close((host(ours.eval()(Foreign(x))),), (theirs.eval()(x),))
