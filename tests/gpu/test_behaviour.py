"""What a GPU alone can show: the same bits again, streams, a host that does not wait, captured graphs, layers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from gradients import backward, forward
from reference import ARRANGEMENTS, error, normal
from tolerances import FLOAT32, FLOAT32_HARD

import numbanorm as nn

pytestmark = pytest.mark.gpu


@pytest.fixture
def torch(gpu: None) -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("needs a torch that sees the GPU")
    return module


@pytest.mark.parametrize("name", ARRANGEMENTS)
@pytest.mark.parametrize("width", [64, 1000, 20000])
def test_the_same_bits_again(library: Any, name: str, width: int) -> None:
    x, dy = (ARRANGEMENTS[name].place(normal(seed, (48, width))) for seed in (1, 2))
    results = []
    for _ in range(4):
        y, mean, rstd = forward(name, library.put(x), 48)
        gradients = backward(name, library.put(dy), library.put(x), 48, mean, rstd)
        results.append([library.get(a).tobytes() for a in (y, rstd, *gradients) if a is not None])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "layer", "rms"])
def test_layers(library: Any, kind: str) -> None:
    """Training, backward, state and inference of every layer agree with the CPU's."""
    make = {
        "batch": lambda: nn.BatchNorm(12, momentum=None),
        "instance": lambda: nn.InstanceNorm(12, affine=True, track_running_stats=True),
        "group": lambda: nn.GroupNorm(3, 12),
        "layer": lambda: nn.LayerNorm(50),
        "rms": lambda: nn.RMSNorm(50),
    }[kind]
    ours, theirs = make().to("cuda"), make()
    for seed in range(3):
        x, dy = normal(seed, (8, 12, 50)), normal(seed + 5, (8, 12, 50))
        assert error(library.get(ours(library.put(x))), theirs(x)) <= FLOAT32_HARD
        assert error(library.get(ours.backward(library.put(dy))), theirs.backward(dy)) <= FLOAT32_HARD
        for name, gradient in theirs.grad.items():
            assert error(library.get(ours.grad[name]), gradient) <= FLOAT32_HARD
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert error(library.get(ours.eval()(library.put(x))), theirs.eval()(x)) <= FLOAT32_HARD
    assert error(ours.to("cpu")(x), theirs(x)) <= FLOAT32


def test_the_host_does_not_wait(torch: Any) -> None:
    """Calls return while the device is still busy with what was queued before them."""
    x, dy = (torch.randn(64, 12, 100, device="cuda") for _ in range(2))
    mask = x > -3
    layers = [nn.BatchNorm(12), nn.InstanceNorm(12), nn.GroupNorm(3, 12), nn.LayerNorm(100), nn.RMSNorm(100)]

    def calls() -> None:
        for layer in layers:
            layer.to("cuda")
            layer(x, **({} if layer.kind == "rms" else {"mask": mask}))
            layer.backward(dy)
            layer.eval()(x[:, :, ::2] if layer.kind in ("batch", "instance", "group") else x)
            layer.train()

    calls()
    torch.cuda.synchronize()
    held = [(layer, layer.to) for layer in layers]
    torch.cuda._sleep(2_000_000_000)  # about a second
    start = time.perf_counter()
    for layer, _ in held:
        layer(x, **({} if layer.kind == "rms" else {"mask": mask}))
        layer.backward(dy)
    seconds = time.perf_counter() - start
    assert not torch.cuda.current_stream().query(), "the device was done before the calls returned"
    assert seconds < 0.5
    torch.cuda.synchronize()


def test_the_current_stream(torch: Any) -> None:
    """A call on a side stream runs after what is queued there, and before what follows there."""
    side = torch.cuda.Stream()
    x = torch.zeros(64, 768, device="cuda")
    values = torch.randn(64, 768, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.copy_(values)
        y = nn.layer_norm(x, 768)
        x.zero_()
    side.synchronize()
    expected = torch.nn.functional.layer_norm(values.double(), (768,))
    assert (y.double() - expected).abs().max() <= 1e-5


def test_a_named_stream(torch: Any) -> None:
    side = torch.cuda.Stream()
    x = torch.randn(64, 768, device="cuda")
    torch.cuda.synchronize()
    for stream in (side, side.cuda_stream):
        y = nn.layer_norm(x, 768, stream=stream)
        side.synchronize()
        assert (y.double() - torch.nn.functional.layer_norm(x.double(), (768,))).abs().max() <= 1e-5


def test_a_thread_that_has_done_nothing_yet(torch: Any) -> None:
    """A new thread has no CUDA context, and torch gives it none for memory that it has at hand."""
    x = torch.randn(64, 768, device="cuda")
    y = nn.layer_norm(x, 768)
    del x
    x = torch.randn(64, 768, device="cuda")
    expected = nn.layer_norm(x, 768)
    del y
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(nn.layer_norm, x, 768).result(), expected)


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "layer", "rms"])
def test_torch_graph(torch: Any, kind: str) -> None:
    """A call captured after one warm call gives new results when its inputs change and the graph is replayed."""
    layer = {
        "batch": lambda: nn.BatchNorm(12),
        "instance": lambda: nn.InstanceNorm(12, affine=True),
        "group": lambda: nn.GroupNorm(3, 12),
        "layer": lambda: nn.LayerNorm((12, 5000)),
        "rms": lambda: nn.RMSNorm((12, 5000)),
    }[kind]().to("cuda")
    x, dy = (torch.randn(4, 12, 5000, device="cuda") for _ in range(2))
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        layer(x)
        layer.backward(dy)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        dx = layer.backward(dy)
    for _ in range(3):
        x.normal_()
        dy.normal_()
        graph.replay()
        twin = layer(x)
        assert torch.equal(y, twin)
        assert torch.equal(dx, layer.backward(dy))
    if kind == "batch":
        assert layer.num_batches_tracked == 1 + 3 + 3  # capture runs nothing; replays count, as eager calls do


def test_cupy_graph(gpu: None) -> None:
    cupy = pytest.importorskip("cupy")
    x, out = cupy.random.standard_normal((64, 768), dtype=cupy.float32), cupy.empty((64, 768), cupy.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        nn.layer_norm(x, 768, out=out)
        stream.synchronize()
        stream.begin_capture()
        nn.layer_norm(x, 768, out=out)
        graph = stream.end_capture()
        x += 1.0
        x *= 3.0
        graph.launch(stream)
        stream.synchronize()
    expected = nn.layer_norm(x.get().astype(np.float64), 768)
    assert error(out.get(), expected) <= FLOAT32


def test_devices_that_differ(torch: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    x = torch.randn(4, 64, device="cuda:1")
    with pytest.raises(ValueError, match="weight: expected an array on device 1, as x is, got one on 0"):
        nn.layer_norm(x, 64, torch.ones(64, device="cuda:0"))
    y = nn.layer_norm(x, 64)
    assert y.device == x.device
    assert (y.double() - torch.nn.functional.layer_norm(x.double(), (64,))).abs().max() <= 1e-5
