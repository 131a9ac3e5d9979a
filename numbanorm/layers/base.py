"""Norm: parameters, running statistics and mode around the functions; five thin subclasses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from ..calls import arrays, quick
from ..calls.check import check_eps, check_momentum, integer, lengths, normalized_axes, positive
from ..calls.dispatch import calls_for, cuda_module, cuda_problem, on_cuda, uses_cuda, uses_dask
from ..core.dtypes import is_float
from ..core.layout import Layout
from ..functional.forward import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from ..stats import fit as fitting
from ..stats import sync as synchronized
from ..stats.moments import Moments


class _Dispatch(type):
    """Makes ``Norm("layer", 384)`` a ``LayerNorm(384)``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Norm:
            return super().__call__(*args, **kwargs)
        kind = args[0] if args else kwargs.pop("kind", None)
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        return KINDS[kind](*args[1:], **kwargs)


class _Last(NamedTuple):
    """What backward needs of the last call in training mode."""

    x: Any  # what was normalized, not copied
    mean: Any
    rstd: Any
    mask: Any
    summed: bool  # whether x is the sum of an input and a residual
    overwritten: bool


def _share_memory(a: Any, b: Any) -> bool:
    return bool(np.may_share_memory(arrays.as_array(a, "out"), arrays.as_array(b, "x")))


class Norm(metaclass=_Dispatch):
    """A normalization layer; ``Norm(kind, ...)`` makes the subclass for `kind`.

    Parameters
    ----------
    kind : str
        ``"batch"``, ``"layer"``, ``"instance"``, ``"group"`` or ``"rms"``.
    *args, **kwargs
        Those of the subclass.

    Attributes
    ----------
    weight, bias : ndarray or None
        gamma and beta; None where the layer has none. Arrays of any float dtype may be assigned.
    running_mean, running_var : ndarray or None
        Running statistics of the channels, where they are tracked.
    num_batches_tracked : int or None
        Training calls that have updated them.
    grad : dict of str to ndarray
        Gradients of weight and bias, as the last `backward` left them.
    device : str
        Where parameters and running statistics lie: ``"cpu"`` or ``"cuda:0"``; set by `to`.
    training : bool
        The mode, set by `train` and `eval`. Only norms that track running statistics behave differently.

    Examples
    --------
    >>> import numbanorm as nn
    >>> nn.Norm("layer", 384)
    LayerNorm((384,), eps=1e-05)
    """

    kind: ClassVar[str]
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray | None
    running_var: np.ndarray | None

    def __init__(self, shape: tuple[int, ...], eps: float | None, affine: bool, bias: bool) -> None:
        self._shape = shape
        self.device = "cpu"
        self.eps: Any = None if eps is None and self.kind == "rms" else check_eps(eps)
        self.weight = np.ones(shape, np.float32) if affine else None
        self.bias = np.zeros(shape, np.float32) if affine and bias else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        self.training = True
        self.grad: dict[str, Any] = {}
        self._last: Any = None

    def __call__(self, x: Any, *, mask: Any = None, residual: Any = None, out: Any = None) -> Any:
        """Normalize `x`.

        Parameters
        ----------
        x : array_like
            Of the shape that the layer was made for.
        mask : array_like of bool, broadcastable to `x`, optional
            True where an element counts for the statistics (not for RMSNorm).
        residual : array_like, shape and dtype of `x`, optional
            Added to `x` first (LayerNorm and RMSNorm only).
        out : ndarray, optional
            Where to write the result.

        Returns
        -------
        y : ndarray
            The normalized array; with `residual` a tuple of it and ``x + residual``.

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit; nothing is written then.
        """
        if residual is not None and not self._takes_residual:
            raise TypeError(f"residual: expected None, {type(self).__name__} takes none")
        if type(x) is not np.ndarray and uses_cuda(x) and (self.sync is None or not self.training):
            return cuda_module("layers").forward(self, x, mask, residual, out)
        if not self.training:
            return self._run(x, mask, residual, out, False)
        if residual is None and out is None:
            results = self._run(x, mask, None, None, True)
            mean = results[1] if len(results) == 3 else None
            self._last = _Last(x, mean, results[-1], mask, False, False)
            return results[0]
        y, *rest = self._run(x, mask, residual, out, True)
        total = None if residual is None else rest.pop()
        mean = rest[0] if len(rest) > 1 else None
        overwritten = total is None and out is not None and _share_memory(out, x)
        self._last = _Last(x if total is None else total, mean, rest[-1], mask, total is not None, overwritten)
        return y if total is None else (y, total)

    def backward(self, dy: Any, dtotal: Any = None) -> Any:
        """Return the input's gradient for the last call in training mode; fill `grad`.

        The layer holds that call's input without a copy: it must not have changed since.

        Parameters
        ----------
        dy : array_like, shape of the input
            Gradient of the output.
        dtotal : array_like, shape of the input, optional
            After a call with `residual`: gradient of the sum that was returned.

        Returns
        -------
        dx : ndarray, shape of the input
            Gradient of the input, and of the residual where there was one.

        Raises
        ------
        ValueError
            If there was no call in training mode, or its input was overwritten by ``out=``.
        TypeError, ValueError
            If `dy` or `dtotal` do not fit; `grad` has not changed then.

        Examples
        --------
        >>> import numpy as np
        >>> import numbanorm as nn
        >>> norm = nn.LayerNorm(3)
        >>> y = norm(np.array([[1.0, 2.0, 6.0]]))
        >>> np.round(norm.backward(np.array([[1.0, 0.0, 0.0]])), 4)
        array([[ 0.1763, -0.2204,  0.0441]])
        >>> norm.grad["bias"]
        array([1., 0., 0.], dtype=float32)
        """
        last = self._last = self._remembered()
        if last is None:
            raise ValueError("backward: expected a call in training mode before, got none")
        if last.overwritten:
            raise ValueError("backward: expected the input of the last training call, but out= has overwritten it")
        added = None
        if dtotal is not None and not last.summed:
            raise ValueError("dtotal: expected None, the last call in training mode had no residual")
        if on_cuda(last.x):
            dx, *gradients = cuda_module("layers").backward(self, last, dy, dtotal)
            self._keep(gradients)
            return dx
        if dtotal is not None:
            calls = calls_for(last.x)
            added, form = calls.as_input(dtotal, "dtotal")
            shape = calls.as_input(last.x, "x")[0].shape
            if added.shape != shape:
                raise ValueError(f"dtotal: expected the shape of the input, {shape}, got {added.shape}")
            if not form.is_float:
                raise TypeError(f"dtotal: expected a float dtype, got {added.dtype}")
        dx, *gradients = self._gradients(dy, last)
        if added is not None and uses_dask(dx):
            dx = (dx + added).astype(dx.dtype)
        elif added is not None:
            plain = arrays.as_array(dx, "dx")
            np.add(plain, added, out=plain, casting="same_kind")
        self._keep(gradients)
        return dx

    def _remembered(self) -> _Last | None:
        """Return what the last call in training mode left."""
        last: _Last | None = self._last
        return last

    def _keep(self, gradients: list[Any]) -> None:
        self.grad = {
            name: gradient
            for name, gradient in zip(("weight", "bias"), gradients, strict=False)
            if getattr(self, name) is not None
        }

    @property
    def num_batches_tracked(self) -> int | None:
        """Training calls that have updated the running statistics; None where there are none.

        On a CUDA device it is counted there, and asking for it waits for the device.
        """
        batches = self._batches
        return batches if batches is None or isinstance(batches, int) else batches.read()

    @num_batches_tracked.setter
    def num_batches_tracked(self, batches: int | None) -> None:
        self._batches: Any = batches

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return which elements of an array of `shape` share statistics and weights.

        Parameters
        ----------
        shape : tuple of int
            Shape of an input.
        """
        return self._layout(tuple(shape))

    _takes_residual: ClassVar[bool] = False
    sync: Any = None

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        raise TypeError(f"{type(self).__name__}: expected a norm of its own")

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        raise TypeError(f"{type(self).__name__}: expected a norm of its own")

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        raise TypeError(f"{type(self).__name__}: expected a norm of its own")

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, and return the layer.

        Parameters
        ----------
        mode : bool, optional
            False is `eval`.
        """
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Set the mode for inference, and return the layer."""
        return self.train(False)

    def to(self, device: str) -> Self:
        """Move parameters and running statistics to a device, and return the layer.

        Parameters
        ----------
        device : str
            ``"cpu"``: NumPy arrays. ``"cuda"`` or ``"cuda:1"``: numba's device arrays, which need no library beside
            ``numbanorm[cuda]`` and serve inputs of any other. Arrays of torch or CuPy may be assigned instead, and stay
            where they are if that is the device.

        Raises
        ------
        ValueError
            If there is no such device.
        """
        if device != "cpu":
            found = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
            if found is None:
                raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:0' and so on, got {device!r}")
            if cuda_problem() is not None:
                raise ValueError(f"device: expected 'cpu', got {device!r}: {cuda_problem()}")
            device = cuda_module("layers").device_name(found[1])
        moved = {name: _placed(getattr(self, name), device) for name in _ARRAYS}
        batches = self.num_batches_tracked
        for name, array in moved.items():
            setattr(self, name, array)
        self.num_batches_tracked = batches
        self.device = device
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of parameters and running statistics in host memory, under torch's names, in torch's shapes."""
        state = {name: getattr(self, name) for name in _STATE}
        return {name: np.array(_placed(value, "cpu")) for name, value in state.items() if value is not None}

    def load_state_dict(self, mapping: Mapping[str, Any], strict: bool = True) -> Self:
        """Take parameters and running statistics from a mapping, all or none, and return the layer.

        Parameters
        ----------
        mapping : mapping of str to array_like
            NumPy arrays, torch tensors, what safetensors loads. Their float dtypes are kept.
        strict : bool, optional
            False: names that are missing or unknown are passed over.

        Raises
        ------
        ValueError
            If names or shapes do not fit; nothing has changed then.
        TypeError
            If a dtype does not fit.
        """
        own = [name for name in _STATE if getattr(self, name) is not None]
        missing = [name for name in own if name not in mapping]
        unknown = [name for name in mapping if name not in own]
        if strict and (missing or unknown):
            raise ValueError(f"mapping: expected the names {own}; missing {missing}, unknown {unknown}")
        taken = {name: self._checked_state(name, mapping[name]) for name in own if name in mapping}
        for name, value in taken.items():
            setattr(self, name, value)
        return self

    def _checked_state(self, name: str, value: Any) -> Any:
        array = arrays.as_array(_placed(value, "cpu"), name)
        if name == "num_batches_tracked":
            if array.size != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected one integer, got dtype {array.dtype} and shape {array.shape}")
            return int(array.reshape(())[()])
        if array.shape != self._shape:
            raise ValueError(f"{name}: expected shape {self._shape}, got {array.shape}")
        if not is_float(array.dtype.newbyteorder("=")):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        return _placed(np.array(array, dtype=array.dtype.newbyteorder("=")), self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        """Return the constructor's arguments as `repr` shows them: those that differ from what is usual."""
        parts = [
            f"{self._shape if len(self._shape) > 1 or self._takes_residual else self._shape[0]}",
            f"eps={self.eps}",
        ]
        if self.weight is None:
            parts.append("affine=False")
        elif self.bias is None and self.kind != "rms":
            parts.append("bias=False")
        return parts


_ARRAYS = ("weight", "bias", "running_mean", "running_var")
_STATE = (*_ARRAYS, "num_batches_tracked")


def _placed(value: Any, device: str) -> Any:
    """Return an array on a device; itself if it is there already."""
    if value is None or (device == "cpu" and not on_cuda(value)):
        return value
    return cuda_module("layers").placed(value, device)


def _any_counts(mask: Any) -> bool:
    """Tell whether a mask lets anything in; a dask array is computed for that. What is no mask the call will refuse."""
    if mask is None:
        return True
    array = mask if uses_dask(mask) else arrays.as_array(mask, "mask")
    return array.dtype == np.bool_ and bool(np.any(array))


class _Channelwise(Norm):
    """What batch and instance norm share: channels and running statistics."""

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        bias: bool,
        channel_axis: int,
    ) -> None:
        self.num_features = positive(num_features, "num_features")
        super().__init__((self.num_features,), eps, affine, bias)
        self.momentum = None if momentum is None else check_momentum(momentum)
        self.channel_axis = integer(channel_axis, "channel_axis")
        self.track_running_stats = track_running_stats
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Set the running statistics back to mean 0, variance 1 and no batches."""
        if self.track_running_stats:
            both = np.zeros(self._shape, np.float32), np.ones(self._shape, np.float32)
            self.running_mean, self.running_var = [_placed(one, self.device) for one in both]
            self.num_batches_tracked = 0

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        layout = Layout.of(self.kind, shape, channel_axis=self.channel_axis)
        if layout.size != self.num_features:
            channels = f"{self.num_features} channels along axis {self.channel_axis}"
            raise ValueError(f"x: expected {channels}, got shape {shape}")
        return layout

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        source, _ = calls_for(x).as_input(x, "x")
        self._layout(source.shape)
        tracked = self.num_batches_tracked
        from_input = self.training or tracked is None
        update = self.training and tracked is not None
        momentum: float | None = 0.0
        if update:
            momentum = 1.0 / (tracked + 1) if self.momentum is None else self.momentum  # type: ignore[operator]
        mean, var = (self.running_mean, self.running_var) if update or not from_input else (None, None)
        counts = update and source.size > 0 and _any_counts(mask)  # before the call: nothing may fail after it
        function = batch_norm if self.kind == "batch" else instance_norm
        result = function(
            x,
            mean,
            var,
            self.weight,
            self.bias,
            from_input,
            momentum,
            self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            out=out,
            return_stats=return_stats,
        )
        if counts:
            self.num_batches_tracked = tracked + 1  # type: ignore[operator]
        return result

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        function = batch_norm_backward if self.kind == "batch" else instance_norm_backward
        axis = self.channel_axis
        gradients: tuple[Any, ...] = function(
            dy, last.x, last.mean, last.rstd, self.weight, channel_axis=axis, mask=last.mask
        )
        return gradients

    def _arguments(self) -> list[str]:
        parts = [*super()._arguments(), f"momentum={self.momentum}"]
        if self.track_running_stats != (self.kind == "batch"):
            parts.append(f"track_running_stats={self.track_running_stats}")
        return parts if self.channel_axis == 1 else [*parts, f"channel_axis={self.channel_axis}"]


class BatchNorm(_Channelwise):
    """Batch normalization: each channel over the batch and all positions. See `batch_norm`.

    In training it normalizes with the batch's statistics and updates the running ones; in inference (`eval`) it uses
    the running ones, so a sample's result does not depend on what else is in the batch.

    Parameters
    ----------
    num_features : int
        Channels C.
    eps : float, optional
        Added to the variance.
    momentum : float or None, optional
        Share of a batch in the running statistics; None for the average over all batches.
    affine : bool, optional
        Whether there are weight and bias, shape (C,).
    track_running_stats : bool, optional
        False: no running statistics; inference uses the batch's too.
    bias : bool, optional
        False: a weight alone.
    channel_axis : int, optional
        Axis of the channels; -1 for channels last.
    sync : mpi4py communicator or callable, optional
        Makes training calls normalize with the statistics of all processes' batches, and `backward` go through them;
        inference does not communicate. A callable takes this process's float64 array of one axis, and returns a list
        of all processes' arrays, in the same order everywhere. See `numbanorm.sync`.

    Attributes
    ----------
    moments : Moments or None
        What `fit` and `partial_fit` have seen; None before, and after other running statistics were set by
        `load_state_dict` or `reset_running_stats`. It may be saved, loaded and assigned.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> norm = nn.BatchNorm(3)
    >>> y = norm(np.random.default_rng(0).standard_normal((8, 3, 4, 4), dtype=np.float32))
    >>> y.shape, norm.num_batches_tracked
    ((8, 3, 4, 4), 1)
    """

    kind = "batch"
    moments: Moments | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
        sync: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias, channel_axis)
        self.sync = synchronized.check_sync(sync)
        self._shared: synchronized.Shared | None = None

    def fit(self, batches: Any, *, mask: Any = None) -> Self:
        """Set the running statistics to those of all the data, exactly and in one pass, and return the layer.

        The variance is that of the population (ddof 0): in inference the layer then gives what a training call on all
        the data at once would give. Both become float64, so that a mean of 1e6 loses nothing. What was fitted before
        is forgotten; `partial_fit` continues.

        Parameters
        ----------
        batches : array_like of shape (N, C, ...), or iterable of these
            An array, in memory or mapped from a file, and what is sliced like one and read as it is (Zarr, h5py), are
            taken block by block; of an iterable, a list too, one batch is held at a time. A dask array is computed.
        mask : array_like of bool, or iterable of these, optional
            True where an element counts: broadcastable to the array, or one for each batch.

        Raises
        ------
        TypeError, ValueError
            If a batch does not fit, or nothing counts; the layer has not changed then.

        Notes
        -----
        `num_batches_tracked` becomes the number of batches in which something counted, an array being one. A channel
        of which nothing counted keeps mean 0 and variance 1. Order and size of the batches do not matter: statistics
        of float64 data differ by less than 1e-12, relative.

        Examples
        --------
        >>> import numpy as np
        >>> import numbanorm as nn
        >>> batches = (np.full((4, 1), mean) for mean in (1.0, 3.0))
        >>> norm = nn.BatchNorm(1, eps=0.0).fit(batches).eval()
        >>> norm.running_mean, norm.running_var
        (array([2.]), array([1.]))
        >>> norm(np.array([[1.0], [3.0]]))
        array([[-1.],
               [ 1.]])
        """
        fitting.fit(self, batches, mask)
        return self

    def partial_fit(self, x: Any, *, mask: Any = None) -> Self:
        """Take one more batch into the statistics that `fit` sets, and return the layer.

        It continues from `moments`, and sets the running statistics from them anew: what training calls in between
        made of these is lost. Where there are no moments it is `fit` of this batch alone, but that a batch of which
        nothing counts changes nothing.

        Parameters
        ----------
        x : array_like, shape (N, C, ...)
            One batch, of any kind that `fit` takes.
        mask : array_like of bool, broadcastable to `x`, optional
            True where an element counts.

        Raises
        ------
        TypeError, ValueError
            If the batch does not fit; the layer has not changed then.

        Examples
        --------
        >>> import numpy as np
        >>> import numbanorm as nn
        >>> norm = nn.BatchNorm(1)
        >>> for mean in (1.0, 3.0):
        ...     norm = norm.partial_fit(np.full((4, 1), mean))
        >>> norm.running_mean, norm.running_var, norm.num_batches_tracked
        (array([2.]), array([1.]), 2)
        """
        fitting.partial_fit(self, x, mask)
        return self

    def reset_running_stats(self) -> None:
        """Set the running statistics back to mean 0, variance 1 and no batches; forget what was fitted."""
        super().reset_running_stats()
        self.moments = None

    def load_state_dict(self, mapping: Mapping[str, Any], strict: bool = True) -> Self:
        """Do as for every layer; new running statistics forget what was fitted. See `Norm.load_state_dict`."""
        super().load_state_dict(mapping, strict)
        if "running_mean" in mapping or "running_var" in mapping:
            self.moments = None
        return self

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        if self.sync is None or not self.training:
            return super()._run(x, mask, residual, out, return_stats)
        y, mean, rstd, self._shared = synchronized.forward(self, x, mask, out)
        return y, mean, rstd

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        if self._shared is None or self._shared.rstd is not last.rstd:
            return super()._gradients(dy, last)
        return synchronized.backward(self, dy, last, self._shared)

    def _arguments(self) -> list[str]:
        return super()._arguments() if self.sync is None else [*super()._arguments(), f"sync={self.sync!r}"]


class InstanceNorm(_Channelwise):
    """Instance normalization: each channel of each sample over its positions. See `instance_norm`.

    Parameters
    ----------
    num_features, eps, momentum, bias, channel_axis
        As for `BatchNorm`.
    affine : bool, optional
        Whether there are weight and bias, shape (C,).
    track_running_stats : bool, optional
        True: inference normalizes with running statistics; otherwise training and inference are the same.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.InstanceNorm(1, eps=0.0)(np.array([[[1.0, 3.0]]]))
    array([[[-1.,  1.]]])
    """

    kind = "instance"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        channel_axis: int = 1,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias, channel_axis)


class GroupNorm(Norm):
    """Group normalization: groups of channels of each sample over their positions. See `group_norm`.

    Parameters
    ----------
    num_groups : int
        Groups of neighbouring channels.
    num_channels : int
        Channels C, a multiple of `num_groups`.
    eps : float, optional
        Added to the variance.
    affine : bool, optional
        Whether there are weight and bias, shape (C,).
    bias : bool, optional
        False: a weight alone.
    channel_axis : int, optional
        Axis of the channels; -1 for channels last.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.GroupNorm(2, 4, eps=0.0)(np.array([[1.0, 3.0, 10.0, 30.0]]))
    array([[-1.,  1., -1.,  1.]])
    """

    kind = "group"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        channel_axis: int = 1,
    ) -> None:
        self.num_groups = positive(num_groups, "num_groups")
        self.num_channels = positive(num_channels, "num_channels")
        if self.num_channels % self.num_groups:
            raise ValueError(f"num_groups: expected a divisor of the {num_channels} channels, got {num_groups}")
        super().__init__((self.num_channels,), eps, affine, bias)
        self.channel_axis = integer(channel_axis, "channel_axis")

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        layout = Layout.of(self.kind, shape, channel_axis=self.channel_axis, num_groups=self.num_groups)
        if layout.size != self.num_channels:
            channels = f"{self.num_channels} channels along axis {self.channel_axis}"
            raise ValueError(f"x: expected {channels}, got shape {shape}")
        return layout

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        self._layout(calls_for(x).as_input(x, "x")[0].shape)
        return group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            channel_axis=self.channel_axis,
            mask=mask,
            out=out,
            return_stats=return_stats,
        )

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        x, mean, rstd, mask, *_ = last
        axis = self.channel_axis
        gradients: tuple[Any, ...] = group_norm_backward(
            dy, x, self.num_groups, mean, rstd, self.weight, channel_axis=axis, mask=mask
        )
        return gradients

    def _arguments(self) -> list[str]:
        parts = [str(self.num_groups), *super()._arguments()]
        return parts if self.channel_axis == 1 else [*parts, f"channel_axis={self.channel_axis}"]


class _Rowwise(Norm):
    """What layer and RMS norm share: the last axes, the residual, and the quick way kept from call to call."""

    _takes_residual = True

    def __init__(self, normalized_shape: Any, eps: float | None, affine: bool, bias: bool) -> None:
        super().__init__(lengths(normalized_shape, "normalized_shape"), eps, affine, bias)
        self.normalized_shape = self._shape
        self._bound: quick.Bound | None = None

    def __call__(self, x: Any, *, mask: Any = None, residual: Any = None, out: Any = None) -> Any:
        """Normalize `x`, shape (..., *normalized_shape). See `Norm.__call__`."""
        if mask is residual is out is None:
            weight, bias, eps = self.weight, self.bias, self.eps
            bound = self._bound
            if bound is None or not bound.serves(x, weight, bias, eps):
                way = quick.find(self.kind, x, weight, bias, 0.0 if eps is None else eps, None, None, self._shape)
                bound = self._bound = None if way is None else quick.Bound(way, x, weight, bias, eps)
            if bound is not None:
                y, stats = bound.way.forward(x, weight, bias, bound.eps, None, self.training)
                if self.training:
                    self._last = x, stats, bound.way  # what backward needs is made of it there
                return y
        return super().__call__(x, mask=mask, residual=residual, out=out)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: not the quick way, compiled code that this process alone can call."""
        return {**self.__dict__, "_bound": None, "_last": self._remembered()}

    def _remembered(self) -> _Last | None:
        if type(self._last) is tuple:
            x, stats, way = self._last
            mean, rstd = (None, *way.public(stats))[-2:]
            return _Last(x, mean, rstd, None, False, False)
        return super()._remembered()

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return Layout.of(self.kind, shape, axis=normalized_axes(shape, self._shape, None))


class LayerNorm(_Rowwise):
    """Layer normalization: each sample over its last axes. See `layer_norm`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the last axes.
    eps : float, optional
        Added to the variance.
    elementwise_affine : bool, optional
        Whether there are weight and bias, shape `normalized_shape`.
    bias : bool, optional
        False: a weight alone.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.LayerNorm(2, eps=0.0)(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    kind = "layer"

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias)

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        return layer_norm(
            x,
            self._shape,
            self.weight,
            self.bias,
            self.eps,
            mask=mask,
            residual=residual,
            out=out,
            return_stats=return_stats,
        )

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        x, mean, rstd, mask, *_ = last
        gradients: tuple[Any, ...] = layer_norm_backward(dy, x, self._shape, mean, rstd, self.weight, mask=mask)
        return gradients


class RMSNorm(_Rowwise):
    """RMS normalization: each sample divided by its root mean square over its last axes. See `rms_norm`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the last axes.
    eps : float or None, optional
        Added to the mean square; None for the machine epsilon of the result's dtype.
    elementwise_affine : bool, optional
        Whether there is a weight, shape `normalized_shape`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.RMSNorm(2, eps=0.0)(np.array([[3.0, 3.0]]))
    array([[1., 1.]])
    """

    kind = "rms"

    def __init__(self, normalized_shape: Any, eps: float | None = None, elementwise_affine: bool = True) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, False)

    def _run(self, x: Any, mask: Any, residual: Any, out: Any, return_stats: bool) -> Any:
        if mask is not None:
            raise TypeError("mask: expected None, RMSNorm takes none")
        options = {"residual": residual, "out": out, "return_stats": return_stats}
        return rms_norm(x, self._shape, self.weight, self.eps, **options)

    def _gradients(self, dy: Any, last: _Last) -> tuple[Any, ...]:
        gradients: tuple[Any, ...] = rms_norm_backward(dy, last.x, self._shape, last.rstd, self.weight)
        return gradients


KINDS: dict[str, type[Norm]] = {norm.kind: norm for norm in (BatchNorm, LayerNorm, InstanceNorm, GroupNorm, RMSNorm)}
"""The layers by the names that `Norm` takes."""
