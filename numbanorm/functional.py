"""The functions: check the arguments, plan from the shapes, hand to the backend."""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real
from typing import Any

import numpy as np

from . import arrays, cpu
from .layout import Layout
from .plan import Options, plan


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize each channel over the batch and all positions [1]_.

    Parameters
    ----------
    x : array_like, shape (N, C, ...)
        At least 2 dimensions. float16, bfloat16, float32, float64; integers and bool compute as described in `Notes`.
    running_mean, running_var : ndarray, shape (C,), optional
        Used in place of the batch's statistics where `training` is False; updated in place where it is True, the
        variance with the unbiased estimate.
    weight, bias : array_like, shape (C,), optional
        gamma and beta, of any float dtype.
    training : bool, optional
        True: normalize with the statistics of this batch.
    momentum : float, optional
        Share of this batch in the running statistics.
    eps : float, optional
        Added to the variance, in units of ``x**2``.
    channel_axis : int, optional
        Axis of the channels; -1 for channels last.
    mask : array_like of bool, broadcastable to `x`, optional
        True where an element counts for the statistics. Every element is normalized.
    out : ndarray, shape and dtype of the result, optional
        Where to write the result; may be `x` itself.
    return_stats : bool, optional
        Also return mean and rstd.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array, of `x`'s dtype where that is a float.
    mean, rstd : ndarray, shape (C,), float64
        Only with `return_stats`: the mean and ``1/sqrt(variance + eps)`` that were used.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then. In training, a channel must have more than one value.

    Notes
    -----
    8- and 16-bit integers and bool compute and return float32, wider integers float64. Statistics are taken in one
    pass by blocks, merged in float64; the variance that normalizes is the biased one.

    References
    ----------
    .. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
       Covariate Shift", 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> nn.batch_norm(x, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    own = (weight, bias, training, momentum, eps, channel_axis, mask, out, return_stats)
    return _tracked("batch", x, running_mean, running_var, *own)


def instance_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize each channel of each sample over its positions [1]_.

    Parameters
    ----------
    x : array_like, shape (N, C, ...)
        At least 2 dimensions; dtypes as for `batch_norm`.
    running_mean, running_var : ndarray, shape (C,), optional
        Updated in place with the samples' averages, or used where `use_input_stats` is False.
    weight, bias : array_like, shape (C,), optional
        gamma and beta, of any float dtype.
    use_input_stats : bool, optional
        False: normalize with the running statistics, as `batch_norm` does.
    momentum, eps, channel_axis, mask, out, return_stats
        As for `batch_norm`.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array.
    mean, rstd : ndarray, shape (N, C), float64
        Only with `return_stats`; shape (C,) where `use_input_stats` is False.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then. With `use_input_stats`, a sample's channel must have more
        than one value.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization",
       2016.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    own = (weight, bias, use_input_stats, momentum, eps, channel_axis, mask, out, return_stats)
    return _tracked("instance", x, running_mean, running_var, *own)


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize groups of channels of each sample over their positions [1]_.

    Parameters
    ----------
    x : array_like, shape (N, C, ...)
        At least 2 dimensions; dtypes as for `batch_norm`.
    num_groups : int
        Groups of neighbouring channels; divides C. 1 normalizes each sample as a whole.
    weight, bias : array_like, shape (C,), optional
        gamma and beta, of any float dtype.
    eps, channel_axis, mask, out, return_stats
        As for `batch_norm`.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array.
    mean, rstd : ndarray, shape (N, num_groups), float64
        Only with `return_stats`.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then.

    References
    ----------
    .. [1] Y. Wu, K. He, "Group Normalization", 2018.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    options = (integer(channel_axis, "channel_axis"), integer(num_groups, "num_groups"), None)
    eps = check_eps(eps)
    call = Call("group", options, x, arrays.as_input(x, "x"), weight, bias, mask=mask, out=out)
    return call.result(call.forward(eps), return_stats)


def layer_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: Any = None,
    mask: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Normalize each sample over its last axes, or over any set of axes [1]_.

    Parameters
    ----------
    x : array_like, shape (..., *normalized_shape)
        Dtypes as for `batch_norm`.
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    weight, bias : array_like, shape `normalized_shape`, optional
        gamma and beta, of any float dtype.
    eps : float, optional
        Added to the variance, in units of ``x**2``.
    axis : int or tuple of int, optional
        The normalized axes, in the order of `normalized_shape`; the last ones if None.
    mask : array_like of bool, broadcastable to `x`, optional
        True where an element counts for the statistics.
    residual : array_like, shape and dtype of `x`, optional
        Added to `x` before it is normalized; the sum is returned too.
    out : ndarray, shape and dtype of the result, optional
        Where to write the result; may be `x` itself.
    return_stats : bool, optional
        Also return mean and rstd.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array.
    mean, rstd : ndarray, float64
        Only with `return_stats`: `x`'s shape with 1 for the normalized axes.
    total : ndarray, shape of `x`
        Only with `residual`: ``x + residual``, last.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> nn.layer_norm(x, 2, eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    >>> nn.layer_norm(x, 2, axis=0, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    source = arrays.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    eps = check_eps(eps)
    call = Call("layer", options, x, source, weight, bias, mask=mask, residual=residual, out=out)
    return call.result(call.forward(eps), return_stats)


def rms_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
) -> Any:
    """Divide each sample by its root mean square over its last axes, or over any set of axes [1]_.

    Parameters
    ----------
    x : array_like, shape (..., *normalized_shape)
        Dtypes as for `batch_norm`.
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    weight : array_like, shape `normalized_shape`, optional
        gamma, of any float dtype.
    eps : float, optional
        Added to the mean square; if None, the machine epsilon of the result's dtype.
    axis, residual, out, return_stats
        As for `layer_norm`.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array.
    rstd : ndarray, float64
        Only with `return_stats`: ``1/sqrt(mean(x**2) + eps)``, `x`'s shape with 1 for the normalized axes.
    total : ndarray, shape of `x`
        Only with `residual`: ``x + residual``, last.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then.

    References
    ----------
    .. [1] B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.rms_norm(np.array([[3.0, 4.0]]), 2, eps=0.0) * np.sqrt(12.5)
    array([[3., 4.]])
    """
    source = arrays.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    eps = arrays.machine_epsilon(source.dtype) if eps is None else check_eps(eps)
    call = Call("rms", options, x, source, weight, None, residual=residual, out=out)
    return call.result(call.forward(eps), return_stats)


def batch_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    training: bool = True,
    channel_axis: int = 1,
    mask: Any = None,
) -> Any:
    """Return the gradients of `batch_norm`.

    Parameters
    ----------
    dy : array_like, shape of `x`
        Gradient of the output, of a float dtype.
    x : array_like, shape (N, C, ...)
        The input of the forward call.
    mean, rstd : array_like, shape (C,)
        What the forward call returned with `return_stats`.
    weight : array_like, shape (C,), optional
        gamma.
    training : bool, optional
        False: the statistics were the running ones, which do not depend on `x`.
    channel_axis : int, optional
        Axis of the channels.
    mask : array_like of bool, broadcastable to `x`, optional
        The mask of the forward call.

    Returns
    -------
    dx : ndarray, shape of `x`
        Gradient of the input, of the output's dtype.
    dweight, dbias : ndarray, shape (C,)
        Gradients of weight and bias, of `weight`'s dtype; float32 without one, float64 for wide inputs.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Notes
    -----
    With ``h = (x - mean) * rstd`` and ``g = dy * weight``, in training
    ``dx = rstd * (g - avg(g) - h * avg(g * h))``, averages taken over the elements that share the mean.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, rstd = nn.batch_norm(x, training=True, return_stats=True)
    >>> dx, dweight, dbias = nn.batch_norm_backward(np.array([[1.0], [0.0], [0.0]]), x, mean, rstd)
    >>> np.round(dx.ravel(), 4), dbias
    (array([ 0.1763, -0.2204,  0.0441]), array([1.]))
    """
    options = (integer(channel_axis, "channel_axis"), None, None)
    return _backward("batch", options, dy, x, arrays.as_input(x, "x"), mean, rstd, weight, mask, fixed=not training)


def instance_norm_backward(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, *, channel_axis: int = 1, mask: Any = None
) -> Any:
    """Return the gradients of `instance_norm` with the input's statistics.

    Parameters
    ----------
    dy, x, weight, channel_axis, mask
        As for `batch_norm_backward`.
    mean, rstd : array_like, shape (N, C)
        What the forward call returned with `return_stats`.

    Returns
    -------
    dx, dweight, dbias : ndarray
        As `batch_norm_backward` returns them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> y, mean, rstd = nn.instance_norm(x, return_stats=True)
    >>> dx, dweight, dbias = nn.instance_norm_backward(np.array([[[1.0, 0.0, 0.0]]]), x, mean, rstd)
    >>> np.round(dx.ravel(), 4)
    array([ 0.1763, -0.2204,  0.0441])
    """
    options = (integer(channel_axis, "channel_axis"), None, None)
    return _backward("instance", options, dy, x, arrays.as_input(x, "x"), mean, rstd, weight, mask)


def group_norm_backward(
    dy: Any,
    x: Any,
    num_groups: int,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    channel_axis: int = 1,
    mask: Any = None,
) -> Any:
    """Return the gradients of `group_norm`.

    Parameters
    ----------
    dy, x, weight, channel_axis, mask
        As for `batch_norm_backward`.
    num_groups : int
        Groups of the forward call.
    mean, rstd : array_like, shape (N, num_groups)
        What the forward call returned with `return_stats`.

    Returns
    -------
    dx, dweight, dbias : ndarray
        As `batch_norm_backward` returns them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, rstd = nn.group_norm(x, 1, return_stats=True)
    >>> dx, dweight, dbias = nn.group_norm_backward(np.array([[1.0, 0.0, 0.0]]), x, 1, mean, rstd)
    >>> np.round(dx, 4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """
    options = (integer(channel_axis, "channel_axis"), integer(num_groups, "num_groups"), None)
    return _backward("group", options, dy, x, arrays.as_input(x, "x"), mean, rstd, weight, mask)


def layer_norm_backward(
    dy: Any,
    x: Any,
    normalized_shape: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    axis: Any = None,
    mask: Any = None,
) -> Any:
    """Return the gradients of `layer_norm`.

    Parameters
    ----------
    dy, mask
        As for `batch_norm_backward`.
    x : array_like
        The array that was normalized: with `residual`, the sum that the forward call returned; its gradient is that
        of both summands.
    normalized_shape, axis
        Those of the forward call.
    mean, rstd : array_like
        What the forward call returned with `return_stats`.
    weight : array_like, shape `normalized_shape`, optional
        gamma.

    Returns
    -------
    dx : ndarray, shape of `x`
        Gradient of the input.
    dweight, dbias : ndarray, shape `normalized_shape`
        Gradients of weight and bias.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, rstd = nn.layer_norm(x, 3, return_stats=True)
    >>> dx, dweight, dbias = nn.layer_norm_backward(np.array([[1.0, 0.0, 0.0]]), x, 3, mean, rstd)
    >>> np.round(dx, 4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """
    source = arrays.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    return _backward("layer", options, dy, x, source, mean, rstd, weight, mask)


def rms_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, rstd: Any, weight: Any = None, *, axis: Any = None
) -> Any:
    """Return the gradients of `rms_norm`.

    Parameters
    ----------
    dy, x, normalized_shape, weight, axis
        As for `layer_norm_backward`.
    rstd : array_like
        What the forward call returned with `return_stats`.

    Returns
    -------
    dx : ndarray, shape of `x`
        Gradient of the input.
    dweight : ndarray, shape `normalized_shape`
        Gradient of the weight.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[3.0, 4.0]])
    >>> y, rstd = nn.rms_norm(x, 2, return_stats=True)
    >>> dx, dweight = nn.rms_norm_backward(np.array([[1.0, 0.0]]), x, 2, rstd)
    >>> np.round(dx, 4)
    array([[ 0.181 , -0.1358]])
    """
    source = arrays.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    return _backward("rms", options, dy, x, source, None, rstd, weight, None)[:2]


def _backward(
    norm: str,
    options: Options,
    dy: Any,
    x: Any,
    source: np.ndarray,
    mean: Any,
    rstd: Any,
    weight: Any,
    mask: Any,
    *,
    fixed: bool = False,
) -> tuple[Any, Any, Any]:
    """Return dx, dweight, dbias; with `fixed` the statistics do not depend on x."""
    shape = source.shape
    dtype = arrays.result_dtype(source.dtype)
    gradient = arrays.as_input(dy, "dy")
    if gradient.shape != shape:
        raise ValueError(f"dy: expected the shape of x, {shape}, got {gradient.shape}")
    if gradient.dtype.name not in arrays.FLOATS:
        raise TypeError(f"dy: expected a float dtype, got {gradient.dtype}")
    gradient = gradient.astype(dtype, copy=False)
    counted = None if mask is None or fixed else arrays.as_mask(mask, shape)
    work = plan(
        norm,
        options,
        shape,
        (source.strides, source.itemsize),
        (gradient.strides, gradient.itemsize),
        None if counted is None else counted.strides,
        separable=True,
    )
    layout = work.layout
    lane = cpu.lane_dtype(source.dtype)
    flat_weight = None if weight is None else _parameter(weight, "weight", layout, lane)
    stats = np.zeros((4, layout.groups))
    stats[cpu.RSTD] = _given_statistic(rstd, "rstd", layout)
    if layout.centred:
        stats[cpu.MEAN] = _given_statistic(mean, "mean", layout)
    dx = arrays.fresh(work, dtype)
    gradients = np.zeros((2, layout.size))
    if work.size > 0:
        flat_x = arrays.flat(source, work.x, work)
        flat_mask = None if counted is None else arrays.flat(counted, work.mask, work)
        if flat_mask is not None:
            stats[cpu.COUNT] = cpu.statistics(work, flat_x, flat_mask)[cpu.COUNT]
        elif not fixed:
            stats[cpu.COUNT] = layout.count
        flat_dy = arrays.flat(gradient, work.y, work)
        gradients = cpu.backward(
            work, flat_dy, flat_x, arrays.flat(dx, work.packed, work), flat_weight, stats, flat_mask
        )
    kind = lane if weight is None else arrays.as_array(weight, "weight").dtype
    results = [dx]
    for gradient_row in gradients:
        values = gradient_row
        if layout.affine_order is not None:
            lengths_in_memory = [layout.affine_shape[a] for a in layout.affine_order]
            values = values.reshape(lengths_in_memory).transpose(np.argsort(layout.affine_order))
        results.append(values.reshape(layout.affine_shape).astype(kind))
    back = None if type(x) is np.ndarray else arrays.way_back(x)
    first, second, third = results if back is None else map(back, results)
    return first, second, third


def _given_statistic(value: Any, name: str, layout: Layout) -> np.ndarray:
    """Return a statistic that the caller gave, in the order of memory of the input."""
    array = arrays.as_array(value, name)
    if array.shape != layout.stats_shape:
        raise ValueError(f"{name}: expected shape {layout.stats_shape}, got {array.shape}")
    if array.dtype.name not in arrays.FLOATS:
        raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    if layout.stats_order is None:
        return array.reshape(-1)
    lengths_in_order = [layout.stats_lengths[a] for a in layout.stats_order]
    return array.reshape(lengths_in_order).transpose(np.argsort(layout.stats_order)).reshape(-1)


class Call:
    """One checked call: its arrays as the backend reads them, its plan, its output.

    Parameters
    ----------
    norm, options
        As `numbanorm.plan.plan` takes them.
    x : array_like
        What the caller gave; results are of its kind.
    source : np.ndarray
        The same as an array of a supported dtype.
    weight, bias, mask, residual, out : array_like, optional
        As the functions take them.
    """

    __slots__ = ("_back", "_mask", "_out", "_residual", "_source", "_target", "_total", "_y", "bias", "plan", "weight")

    def __init__(
        self,
        norm: str,
        options: Options,
        x: Any,
        source: np.ndarray,
        weight: Any,
        bias: Any,
        *,
        mask: Any = None,
        residual: Any = None,
        out: Any = None,
    ) -> None:
        shape = source.shape
        dtype = arrays.result_dtype(source.dtype)
        counted = None if mask is None else arrays.as_mask(mask, shape)
        added = None
        if residual is not None:
            added = _residual(residual, source)
            source = source.astype(dtype, copy=False)
            added = added.astype(dtype, copy=False)
        target = None
        if out is not None:
            inputs = {"x": source, "residual": added, "weight": weight, "bias": bias, "mask": counted}
            held = {name: arrays.as_array(array, name) for name, array in inputs.items() if array is not None}
            target = arrays.as_output(out, shape, dtype, held)
        y = None if target is None or not target.flags.aligned else (target.strides, target.itemsize)
        masked = None if counted is None else counted.strides
        self.plan = plan(norm, options, shape, (source.strides, source.itemsize), y, masked)
        layout = self.plan.layout
        lane = cpu.lane_dtype(source.dtype)
        self.weight = None if weight is None else _parameter(weight, "weight", layout, lane)
        self.bias = None if bias is None else _parameter(bias, "bias", layout, lane)
        total: np.ndarray | None = None
        if added is not None:
            if self.plan.columns or self.plan.x is None or added.strides != source.strides:
                # Only the rows kernel adds on the fly, and only where both lie alike.
                source = total = np.add(source, added)
                added = None
                self.plan = plan(norm, options, shape, (source.strides, source.itemsize), y, masked)
            else:
                total = arrays.fresh(self.plan, dtype)
        self._source = source
        self._residual = added
        self._total = total
        self._mask = counted
        self._out, self._target = out, target
        direct = y is not None and self.plan.y is not None
        self._y = target if direct and target is not None else arrays.fresh(self.plan, dtype)
        self._back = None if type(x) is np.ndarray else arrays.way_back(x)

    def forward(self, eps: float) -> np.ndarray:
        """Normalize with the statistics of the input, and return them as `cpu.forward` does."""
        plan = self.plan
        if plan.size == 0:
            return self._nothing(eps)
        x = arrays.flat(self._source, plan.x, plan)
        y = arrays.flat(self._y, plan.y or plan.packed, plan)
        mask = residual = total = None
        if self._mask is not None:
            mask = arrays.flat(self._mask, plan.mask, plan)
        if self._residual is not None and self._total is not None:
            residual = arrays.flat(self._residual, plan.x, plan)
            total = arrays.flat(self._total, plan.packed, plan)
        stats = cpu.forward(plan, x, y, self.weight, self.bias, eps, mask, residual, total)
        self._deliver()
        return stats

    def apply(self, stats: np.ndarray) -> None:
        """Normalize with given statistics."""
        plan = self.plan
        if plan.size > 0:
            x = arrays.flat(self._source, plan.x, plan)
            y = arrays.flat(self._y, plan.y or plan.packed, plan)
            cpu.apply(plan, x, y, self.weight, self.bias, stats)
        self._deliver()

    def result(self, stats: np.ndarray, return_stats: bool) -> Any:
        """Return what the caller gets: y, then (mean,) rstd, then the sum with the residual, as asked for."""
        back = self._back
        y = self._y if back is None else back(self._y)
        if self._out is not None:
            y = self._out
        if not return_stats and self._total is None:
            return y
        items: list[Any] = []
        if return_stats:
            layout = self.plan.layout
            rows = (cpu.MEAN, cpu.RSTD) if layout.centred else (cpu.RSTD,)
            items += [public_statistic(stats[row], layout) for row in rows]
        if self._total is not None:
            items.append(self._total)
        return (y, *(items if back is None else map(back, items)))

    def _deliver(self) -> None:
        """Copy the result to `out` where it could not be written there directly."""
        if self._target is not None and self._y is not self._target:
            np.copyto(self._target, self._y)

    def _nothing(self, eps: float) -> np.ndarray:
        """Return the statistics of no elements: mean 0, variance 0."""
        stats = np.zeros((4, self.plan.layout.groups))
        with np.errstate(divide="ignore"):
            stats[cpu.RSTD] = 1.0 / np.sqrt(np.float64(eps))
        if self._total is not None and self._residual is not None:
            np.add(self._source, self._residual, out=self._total)
        return stats


def public_statistic(row: np.ndarray, layout: Layout) -> np.ndarray:
    """Return one row of a backend's statistics in the shape that users get."""
    if layout.stats_order is None:
        return row.reshape(layout.stats_shape)
    return row.reshape(layout.stats_lengths).transpose(layout.stats_order).reshape(layout.stats_shape)


class _Running:
    """Running statistics of the channels, as arrays that can be updated in place."""

    def __init__(self, mean: Any, var: Any, channels: int) -> None:
        self.mean = arrays.as_array(mean, "running_mean")
        self.var = arrays.as_array(var, "running_var")
        for name, array in (("running_mean", self.mean), ("running_var", self.var)):
            if array.shape != (channels,):
                raise ValueError(f"{name}: expected shape {(channels,)}, got {array.shape}")
            if array.dtype.name not in arrays.FLOATS:
                raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")

    def check_writeable(self, mean: Any, var: Any) -> None:
        for name, given, array in (("running_mean", mean, self.mean), ("running_var", var, self.var)):
            if not hasattr(given, "dtype"):
                raise TypeError(f"{name}: expected an array to update in place, got {type(given).__name__}")
            if not array.flags.writeable:
                raise ValueError(f"{name}: expected a writeable array, got a read-only one")

    def update(self, stats: np.ndarray, momentum: float) -> None:
        """Move towards the statistics (3 rows: count, mean, M2; channels last), averaged over samples that count."""
        count, mean, m2 = stats[cpu.COUNT], stats[cpu.MEAN], stats[cpu.M2]
        if count.ndim == 1:
            count, mean, m2 = count[None], mean[None], m2[None]
        seen = count > 0
        samples = seen.sum(axis=0)
        unbiased = m2 / np.maximum(count - 1.0, 1.0)
        for array, values in ((self.mean, mean), (self.var, unbiased)):
            batch = np.where(seen, values, 0.0).sum(axis=0) / np.maximum(samples, 1)
            old = array.astype(np.float64)
            array[...] = np.where(samples > 0, (1.0 - momentum) * old + momentum * batch, old)


def _tracked(
    norm: str,
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    from_input: bool,
    momentum: float | None,
    eps: float,
    channel_axis: int,
    mask: Any,
    out: Any,
    return_stats: bool,
) -> Any:
    """Run a norm that may keep running statistics: from its input and updating them, or from them."""
    eps = check_eps(eps)
    source = arrays.as_input(x, "x")
    options = (integer(channel_axis, "channel_axis"), None, None)
    if not from_input:
        norm, mask = "batch", None
    call = Call(norm, options, x, source, weight, bias, mask=mask, out=out)
    layout = call.plan.layout
    running = None
    if running_mean is not None or running_var is not None:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: expected both or neither, got one of them")
        running = _Running(running_mean, running_var, layout.size)
    if not from_input:
        if running is None:
            raise ValueError("running_mean, running_var: expected both to normalize with them, got None")
        stats = np.zeros((4, layout.size))
        stats[cpu.MEAN] = running.mean
        with np.errstate(divide="ignore", invalid="ignore"):
            stats[cpu.RSTD] = 1.0 / np.sqrt(running.var.astype(np.float64) + eps)
        call.apply(stats)
        return call.result(stats, return_stats)
    if running is not None:
        running.check_writeable(running_mean, running_var)
        if isinstance(momentum, bool) or not isinstance(momentum, Real):
            raise TypeError(f"momentum: expected a number, got {type(momentum).__name__}")
    if layout.count == 1 and source.size > 0:
        raise ValueError(
            f"x: expected more than 1 value per channel to normalize with its own statistics, got shape {source.shape}"
        )
    stats = call.forward(eps)
    if running is not None and source.size > 0:
        shape = layout.stats_shape
        rows = np.stack([public_statistic(row, layout).reshape(shape) for row in stats])
        running.update(rows, float(momentum))
    return call.result(stats, return_stats)


def normalized_axes(shape: tuple[int, ...], normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    """Check `normalized_shape` and `axis` against a shape; return the normalized axes, counted from the front."""
    wanted = lengths(normalized_shape, "normalized_shape")
    return _axes(shape, wanted, None if axis is None else integers(axis, "axis"))


@lru_cache(maxsize=4096)
def _axes(shape: tuple[int, ...], wanted: tuple[int, ...], axis: tuple[int, ...] | None) -> tuple[int, ...]:
    ndim = len(shape)
    axes = tuple(range(ndim - len(wanted), ndim)) if axis is None else axis
    where = "the last axes" if axis is None else f"axes {axes}"
    if axis is not None:
        if any(not -ndim <= a < ndim for a in axes):
            raise ValueError(f"axis: expected axes of an array of shape {shape}, got {axes}")
        axes = tuple(a % ndim for a in axes)
        if len(set(axes)) < len(axes):
            raise ValueError(f"axis: expected different axes, got {axis}")
    if len(axes) != len(wanted) or axes[0] < 0 or tuple(shape[a] for a in axes) != wanted:
        raise ValueError(f"x: expected lengths {wanted} (normalized_shape) along {where}, got shape {shape}")
    return axes


def lengths(value: Any, name: str) -> tuple[int, ...]:
    """Check one or more lengths of axes."""
    checked = integers(value, name)
    if not checked or min(checked) < 0:
        raise ValueError(f"{name}: expected one or more lengths, got {value}")
    return checked


def integers(value: Any, name: str) -> tuple[int, ...]:
    """Check one integer, or a tuple or list of them."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return tuple([integer(item, name) for item in items])


def integer(value: Any, name: str) -> int:
    """Check an integer (not a bool)."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return int(value)


def positive(value: Any, name: str) -> int:
    """Check an integer above 0."""
    checked = integer(value, name)
    if checked < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value}")
    return checked


def check_eps(eps: Any) -> float:
    """Check eps: a finite number, not negative."""
    if type(eps) is not float and (isinstance(eps, bool) or not isinstance(eps, Real)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    checked = float(eps)
    if not 0.0 <= checked < math.inf:
        raise ValueError(f"eps: expected a finite number not below 0, got {eps}")
    return checked


def _residual(value: Any, x: np.ndarray) -> np.ndarray:
    residual = arrays.as_input(value, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x, {x.shape}, got {residual.shape}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")
    return residual


def _parameter(value: Any, name: str, layout: Layout, lane: type[Any]) -> np.ndarray:
    """Return a weight or bias as the kernels read it: flat, in the lane dtype, in the order of memory of the input."""
    parameter = arrays.as_parameter(value, name, layout.affine_shape, lane)
    if layout.affine_order is not None:
        parameter = np.ascontiguousarray(parameter.transpose(layout.affine_order))
    return parameter.reshape(-1)
