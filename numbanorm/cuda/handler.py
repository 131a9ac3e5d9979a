"""What serves CUDA arrays: `numbanorm.calls.dispatch.Handler`, and what layers and dask ask for beside.

A call reads addresses, makes outputs, and queues its kernels on the stream of `x`; nothing waits for the device but
`moments`, `partial_sums`, `placed` and whoever reads a `Counter`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..calls import check
from ..calls.dispatch import Outcome, Request
from ..calls.prepare import FLOAT64, of_running_statistics, public_statistic
from ..core.kinds import on_cuda
from ..core.layout import Layout
from ..core.norms import OF_AXES, record_of
from ..core.plan import COUNT, M2, MEAN, RSTD, Options
from ..core.spec import ArraySpec, contiguous, spec_of
from . import devices
from .arrays import DeviceArray, check_apart_from_each_other, check_no_overlap
from .arrays import share_memory as _share_memory
from .copying import copy
from .libraries import library_of, read, read_beside
from .memory import Span
from .prepared import Inputs, PreparedBackward, prepared_backward, prepared_forward
from .scratch import scratch_of
from .transfer import span_to_host, to_device, to_host, to_memory_of


class Counter:
    """Batches, counted on the device, so that a captured graph counts them too; as a float64."""

    def __init__(self, batches: int, device: int) -> None:
        self._array = to_device(np.array([batches], np.float64), device)
        self.device = device
        self.address = library_of(self._array).read(self._array, "num_batches_tracked").address

    def read(self) -> int:
        """Return the number, once the device has come so far."""
        return int(to_host(self._array)[0])


def forward(request: Request) -> Outcome:
    """Do a forward call, as `Handler` has it; batches are counted in a `Counter`."""
    record = record_of(request.norm)
    x = read(request.x, "x")
    form = check.check_format(x.dtype, "x")
    options = check.options_of(record, x.shape, *request.options)
    eps = form.epsilon if request.eps is None and record.eps is None else check.check_eps(request.eps)
    norm, from_input = request.norm, request.from_input
    given = _inputs(request, x)
    mask, out = given.mask, given.out
    if mask is not None:
        check.check_takes_mask(record)
    if not from_input:
        if mask is not None:
            check.check_mask(mask.spec, x.shape)
        # Statistics that are given are not limited by a mask.
        norm, given = of_running_statistics(norm), given._replace(mask=None)
    call = prepared_forward(norm, options, *given.specs, out is None or out.writeable)
    if out is not None:
        check_no_overlap(out, given)
    running = _running(request, x, options)
    scratch = scratch_of(x)
    if not from_input:
        with scratch:
            made = call.apply(given, running, None, eps, request.keep, scratch)
        return Outcome(made.y.owner, None, made.kept, call, request.batches)
    if record.tracks:
        check.check_count(call.call.plan.layout, x.spec)
    batches, momentum = request.batches, request.momentum
    if running is not None:
        if batches is None or momentum is not None:
            momentum = check.check_momentum(momentum)
        if batches is not None and not (isinstance(batches, Counter) and batches.device == x.device):
            batches = Counter(batches if isinstance(batches, int) else batches.read(), x.device)
    with scratch:
        made = call.forward(given, eps, request.keep, scratch)
        if running is not None and x.size:
            call.update(x, made, *running, momentum, 0 if batches is None else batches.address)
    return Outcome(made.y.owner, made.total and made.total.owner, made.kept, call, batches)


def _inputs(request: Request, x: DeviceArray) -> Inputs:
    weight, bias, mask, residual, out = request.weight, request.bias, request.mask, request.residual, request.out
    return Inputs(
        x,
        None if weight is None else read_beside(weight, "weight", x),
        None if bias is None else read_beside(bias, "bias", x),
        None if mask is None else read_beside(mask, "mask", x),
        None if residual is None else read_beside(residual, "residual", x),
        None if out is None else read_beside(out, "out", x),
    )


def _beside(value: Any, name: str, x: DeviceArray) -> DeviceArray | None:
    return None if value is None else read_beside(value, name, x)


def _spec(array: DeviceArray | None) -> ArraySpec | None:
    return None if array is None else array.spec


def _running(request: Request, x: DeviceArray, options: Options) -> tuple[DeviceArray, DeviceArray] | None:
    """Return running mean and variance; where the statistics are those of the input, they are to be updated."""
    if request.running_mean is request.running_var is None and request.from_input:
        return None
    check.check_both(request.running_mean, request.running_var)
    mean = _beside(request.running_mean, "running_mean", x)
    var = _beside(request.running_var, "running_var", x)
    check.check_running(_spec(mean), _spec(var), x.shape[options[0]])
    assert mean is not None
    assert var is not None
    if request.from_input:
        for name, array in (("running_mean", mean), ("running_var", var)):
            check.check_updatable(array.spec, name, array.writeable)
        check_apart_from_each_other(mean, var)
    return mean, var


def backward(
    norm: str,
    options: tuple[Any, Any],
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    fixed: bool,
) -> tuple[Any, ...]:
    """Return dx, dweight and, where the norm has a bias, dbias, as `Handler` has it."""
    record = record_of(norm)
    source = read(x, "x")
    own = check.options_of(record, source.shape, *options)
    if fixed:
        norm, mask = of_running_statistics(norm), None
    elif mask is not None:
        check.check_takes_mask(record)
    arrays = _Given(norm, own, dy, source, mean, rstd, weight, mask, fixed)
    scratch = scratch_of(source)
    with scratch:
        results = arrays.call.backward(*arrays.all, scratch)
    return tuple([array.owner for array in results])


class _Given:
    """The checked arrays of a backward call."""

    def __init__(
        self,
        norm: str,
        options: Options,
        dy: Any,
        x: DeviceArray,
        mean: Any,
        rstd: Any,
        weight: Any,
        mask: Any = None,
        fixed: bool = False,
    ) -> None:
        gradient = read_beside(dy, "dy", x)
        weights, masks = _beside(weight, "weight", x), _beside(mask, "mask", x)
        means = _beside(mean, "mean", x) if record_of(norm).centred else None
        stds = _beside(rstd, "rstd", x)
        specs = [_spec(array) for array in (weights, means, stds, masks)]
        self.call: PreparedBackward = prepared_backward(norm, options, x.spec, gradient.spec, *specs, fixed)
        self.all: Any = gradient, x, masks, weights, means, stds


def shape_of(x: Any) -> tuple[int, ...]:
    """Return the shape of an input, checked to be one that the kernels take."""
    array = read(x, "x")
    check.check_format(array.dtype, "x")
    return array.shape


def add_gradient(dx: Any, dtotal: Any, x: Any) -> Any:
    """Return `dx` with the gradient of the sum added, which is checked against the input."""
    source = read(x, "x")
    added = read_beside(dtotal, "dtotal", source)
    check.check_gradient(added.spec, source.spec, "dtotal")
    result = read_beside(dx, "dx", source)
    with scratch_of(source):
        copy(result, result, source.stream or 0, added)
    return dx


def moments(x: Any, axis: tuple[int, ...] | None, mask: Any) -> tuple[np.ndarray, ...]:
    """Return (count, mean, M2, low) over some axes (None: all), in host memory, once the device has come so far."""
    source = read(x, "x")
    if not source.shape:
        one = contiguous((1,), source.dtype)
        source = DeviceArray(source.owner, source.library, source.address, one, source.device, source.stream)
    counted = _beside(mask, "mask", source)
    axes = tuple(range(len(source.shape))) if axis is None else axis
    call = prepared_forward(OF_AXES, (1, None, axes), source.spec, None, None, _spec(counted))
    layout = call.call.plan.layout
    stats = np.zeros((4, layout.groups))
    if source.size:
        scratch = scratch_of(source)
        with scratch:
            span = call.statistics(Inputs(source, mask=counted), scratch)
            stats = span_to_host(span, scratch, source.stream or 0).reshape(4, -1)
    kept = tuple(n for a, n in enumerate(layout.shape) if a not in layout.reduced_axes)
    count, mean, m2 = (public_statistic(stats[row], layout).reshape(kept).copy() for row in (COUNT, MEAN, M2))
    whole = np.array(layout.count, np.int64)
    return whole if counted is None else count.astype(np.int64), mean, m2, np.zeros_like(mean)


def share_memory(a: Any, b: Any) -> bool:
    """Tell whether two arrays may share memory, from their bounds alone."""
    return _share_memory(*(library_of(array).read(array, "x") for array in (a, b)))


class OnStream:
    """The functions of this module, on a stream that the caller named in place of the library's current one."""

    def __init__(self, x: Any, stream: Any) -> None:
        self._array = library_of(x).read(x, "x")
        self._stream = devices.handle_of(stream)

    def __getattr__(self, name: str) -> Any:
        function = globals()[name]

        def on_stream(*arguments: Any, **options: Any) -> Any:
            with self._array.library.on(self._stream, self._array.device):
                return function(*arguments, **options)

        return on_stream


def on_stream(x: Any, stream: Any) -> OnStream:
    """Return what serves `x` on a stream: a raw handle, or a stream of torch, CuPy, numba or cuda.core."""
    return OnStream(x, stream)


# --- layers


describe = devices.describe


def device_name(index: str | None) -> str:
    """Return the full name of a device, the current one if it is not numbered.

    Raises
    ------
    ValueError
        If there is no such device.
    """
    number = devices.current_device() if index is None else int(index)
    if number >= devices.device_count():
        raise ValueError(f"device: expected one of {devices.device_count()} CUDA device(s), got 'cuda:{number}'")
    return f"cuda:{number}"


def device_of(x: Any) -> str:
    """Return the full name of the device that an array lies on."""
    return f"cuda:{library_of(x).read(x, 'x').device}"


def placed(value: Any, device: str) -> Any:
    """Return an array on a device, ``"cpu"`` or ``"cuda:0"`` and so on; itself if it is there already."""
    if device == "cpu":
        return to_host(value)
    number = int(device.partition(":")[2])
    if on_cuda(value):
        if library_of(value).read(value, "value").device == number:
            return value
        value = to_host(value)
    return to_device(np.asarray(value), number)


# --- dask's chunks: parameters and statistics lie in host memory


def beside(value: Any, x: Any) -> Any:
    """Return an array on the device of `x`, for the call on it alone; itself if it is None or lies on a device."""
    if value is None or type(value) is DeviceArray or on_cuda(value):
        return value
    source = read(x, "x")
    with scratch_of(source):
        return to_memory_of(source, np.asarray(value))


def empty(x: Any) -> Any:
    """Return the result for a piece without elements."""
    source = read(x, "x")
    form = check.check_format(source.dtype, "x")
    return source.library.empty(contiguous(source.shape, form.result), source).owner


def normalize(norm: str, options: Options, x: Any, mean: Any, rstd: Any, weight: Any = None, bias: Any = None) -> Any:
    """Normalize a piece with the statistics of its groups.

    Parameters
    ----------
    norm, options
        As `numbanorm.core.plan.plan` takes them.
    x : CUDA array
        The piece.
    mean, rstd : array_like
        In host memory, shaped as the functions return them for the piece; `mean` is not read where the norm has none.
    weight, bias : array_like, optional
        In host or device memory.
    """
    source = read(x, "x")
    given = Inputs(source, beside(weight, source), beside(bias, source))
    call = prepared_forward(norm, options, *given.specs)
    layout = call.call.plan.layout
    stats = np.zeros((4, layout.groups))
    stats[COUNT] = layout.count
    for row, value, name in ((MEAN, mean, "mean"), (RSTD, rstd, "rstd")):
        if name in call.call.record.statistics:
            _write_statistic(stats[row], value, name, layout)
    scratch = scratch_of(source)
    with scratch:
        there = to_memory_of(source, stats)
        scratch.hold(there)
        made = call.apply(given, None, Span(there.address, FLOAT64, stats.size), 0.0, False, scratch)
    return made.y.owner


def _write_statistic(row: np.ndarray, value: Any, name: str, layout: Layout) -> None:
    """Write a statistic, shaped as users have it, to a row of a backend's statistics."""
    values = None if value is None else np.asarray(value)
    check.check_statistic(None if values is None else spec_of(values), name, layout)
    public_statistic(row, layout)[...] = values


def partial_sums(
    norm: str, options: Options, dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of ``g`` and ``g * (x - mean) * rstd`` over the part of every group that lies in a piece.

    ``g`` is dy, times the weight where weights differ within the groups.

    Parameters
    ----------
    norm, options, x, mean, rstd, weight
        As `normalize` takes them.
    dy : CUDA array
        The gradient of the piece's result.

    Returns
    -------
    sum_g, sum_gh : ndarray, float64, in the shape of `rstd`
        In host memory, once the device has come so far.
    """
    source = read(x, "x")
    arrays = _Given(norm, options, dy, source, *(beside(array, source) for array in (mean, rstd, weight)))
    layout = arrays.call.call.plan.layout
    sums = np.zeros((2, layout.groups))
    if source.size:
        gradient, _, _, weights, means, stds = arrays.all
        scratch = scratch_of(source)
        with scratch:
            span = arrays.call.sums(gradient, source, weights, means, stds, scratch)
            sums = span_to_host(span, scratch, source.stream or 0).reshape(2, -1)
    first, second = (public_statistic(row, layout) for row in sums)
    return first, second


def partial_gradient(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    mean_g: Any,
    mean_gh: Any,
    weight: Any = None,
    mask: Any = None,
) -> tuple[Any, ...]:
    """Return dx of a piece and, where weights differ within the groups, its share of dweight and dbias.

    Parameters
    ----------
    norm, options, dy, x, mean, rstd, weight
        As `partial_sums` takes them.
    mean_g, mean_gh : array_like, shape of `rstd`
        What that returns, added over all pieces and divided by the count of the whole group; 0 where nothing counts.
    mask : array_like of bool, optional
        Where True, the element counted.
    """
    source = read(x, "x")
    own = (beside(array, source) for array in (mean, rstd, weight, mask))
    arrays = _Given(norm, options, dy, source, *own)
    call = arrays.call.call
    layout = call.plan.layout
    means = np.zeros((2, layout.groups))
    for row, value, name in zip(means, (mean_g, mean_gh), ("mean_g", "mean_gh"), strict=True):
        _write_statistic(row, value, name, layout)
    scratch = scratch_of(source)
    with scratch:
        there = to_memory_of(source, means)
        scratch.hold(there)
        span = Span(there.address, FLOAT64, means.size)
        results = arrays.call.backward(*arrays.all, scratch, means=span, gradients=call.record.weights_within_groups)
    return tuple([array.owner for array in results])
