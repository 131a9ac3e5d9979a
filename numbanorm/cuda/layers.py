"""Layers on CUDA arrays: what a `Norm` does with one, and where its state lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..calls.check import check_eps, normalized_axes
from ..calls.dispatch import on_cuda
from ..core.dtypes import Format, is_float
from . import calls, devices
from .arrays import DeviceArray, share_memory
from .copying import copy
from .libraries import library_of, read_beside
from .scratch import scratch_of
from .transfer import to_device, to_host

if TYPE_CHECKING:
    from ..layers.base import Norm


_ARRAYS = ("weight", "bias", "running_mean", "running_var")


class Counter:
    """Batches, counted on the device, so that a captured graph counts them too; as a float64."""

    def __init__(self, batches: int, device: int) -> None:
        self._array = to_device(np.array([batches], np.float64), device)
        self.device = device
        self.address = library_of(self._array).read(self._array, "num_batches_tracked").address

    def read(self) -> int:
        """Return the number, once the device has come so far."""
        return int(to_host(self._array)[0])


def forward(layer: Norm, x: Any, mask: Any, residual: Any, out: Any) -> Any:
    """Do what ``layer(x, ...)`` does."""
    source, form = calls.as_input(x, "x")
    try:
        return _forward(layer, x, source, form, mask, residual, out)
    except TypeError as error:
        if any(type(getattr(layer, name)) is np.ndarray for name in _ARRAYS):
            raise TypeError(f"{error}; move the layer there with .to('cuda:{source.device}')") from None
        raise


def _forward(layer: Norm, x: Any, source: DeviceArray, form: Format, mask: Any, residual: Any, out: Any) -> Any:
    training = layer.training
    if layer.kind in ("batch", "instance"):
        call = _tracked(layer, source, mask, out)
    else:
        options: Any = (1, None, None)
        if layer.kind == "group":
            layer._layout(source.shape)
            options = (layer.channel_axis, layer.num_groups, None)
        else:
            if layer.kind == "rms" and mask is not None:
                raise TypeError("mask: expected None, RMSNorm takes none")
            options = (1, None, normalized_axes(source.shape, layer._shape, None))
        eps = form.epsilon if layer.eps is None and layer.kind == "rms" else check_eps(layer.eps)
        call = calls.Call(layer.kind, options, source, layer.weight, layer.bias, mask=mask, residual=residual, out=out)
        scratch = scratch_of(source)
        with scratch:
            call.forward(eps, training, scratch)
    if training:
        layer._last = _last(call, x, mask)
    return call.result(False)


def _tracked(layer: Any, x: DeviceArray, mask: Any, out: Any) -> calls.Call:
    layer._layout(x.shape)
    batches = layer._batches
    from_input = layer.training or batches is None
    update = layer.training and batches is not None
    counter = batches
    if update and not (isinstance(batches, Counter) and batches.device == x.device):
        counter = Counter(layer.num_batches_tracked, x.device)
    call = calls.tracked(
        layer.kind,
        x,
        layer.running_mean if update or not from_input else None,
        layer.running_var if update or not from_input else None,
        layer.weight,
        layer.bias,
        from_input,
        layer.momentum,
        layer.eps,
        layer.channel_axis,
        mask,
        out,
        layer.training,
        counter.address if update else 0,
    )
    if update:
        layer._batches = counter
    return call


def _last(call: calls.Call, x: Any, mask: Any) -> Any:
    """Return what backward needs: the statistics as addresses, for which no array has to be made."""
    from ..layers.base import _Last

    stats = call.stats
    assert stats is not None
    views = [
        DeviceArray(stats.owner, stats.library, stats.address + offset, lies, stats.device)
        for offset, lies in call.recipe.statistics
    ]
    overwritten = call.total is None and call.out is not None and share_memory(call.out, call.x)
    normalized = x if call.total is None else call.total.owner
    mean = views[0] if len(views) > 1 else None
    return _Last(normalized, mean, views[-1], mask, call.total is not None, overwritten)


def backward(layer: Norm, last: Any, dy: Any, dtotal: Any) -> tuple[Any, ...]:
    """Return dx, to which `dtotal` is added, and the gradients of weight and bias."""
    source, _ = calls.as_input(last.x, "x")
    added: DeviceArray | None = None
    if dtotal is not None:
        added = read_beside(dtotal, "dtotal", source)
        if added.shape != source.shape:
            raise ValueError(f"dtotal: expected the shape of the input, {source.shape}, got {added.shape}")
        if not is_float(added.dtype):
            raise TypeError(f"dtotal: expected a float dtype, got {added.dtype}")
    results = layer._gradients(dy, last)
    if added is not None:
        dx = library_of(results[0]).read(results[0], "dx")
        with scratch_of(source):
            copy(dx, dx, source.stream or 0, added)
    return results


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


def placed(value: Any, device: str) -> Any:
    """Return an array on a device; itself if it is there already."""
    if device == "cpu":
        return to_host(value)
    number = int(device.partition(":")[2])
    if on_cuda(value):
        if library_of(value).read(value, "value").device == number:
            return value
        value = to_host(value)
    return to_device(np.asarray(value), number)
