"""The functions: check the arguments, plan from the shapes, hand to the backend."""

from __future__ import annotations

from typing import Any

from ..calls import quick
from ..calls.check import check_eps, integer, normalized_axes
from ..calls.dispatch import calls_for


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
    stream: Any = None,
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
    stream : int or stream, optional
        For CUDA arrays: where the kernels run, as a raw handle or a stream of torch, CuPy, numba or cuda.core. If None,
        in the current stream of the library that `x` is of.

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
    if mask is stream is None:
        if not training and not return_stats:
            way = quick.find_given(x, running_mean, running_var, weight, bias, eps, channel_axis, out)
            if way is not None:
                return way.apply(x, running_mean, running_var, weight, bias, eps, out)
        elif training and running_mean is running_var is None:
            way = quick.find_by_channel("batch", x, weight, bias, eps, out, channel_axis)
            if way is not None:
                return way.run(x, weight, bias, eps, return_stats, out)
    own = (weight, bias, training, momentum, eps, channel_axis, mask, out, return_stats)
    return calls_for(x, stream).run_tracked("batch", x, running_mean, running_var, *own)


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
    stream: Any = None,
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
    momentum, eps, channel_axis, mask, out, return_stats, stream
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
    if mask is stream is None:
        if not use_input_stats and not return_stats:
            way = quick.find_given(x, running_mean, running_var, weight, bias, eps, channel_axis, out)
            if way is not None:
                return way.apply(x, running_mean, running_var, weight, bias, eps, out)
        elif use_input_stats and running_mean is running_var is None:
            way = quick.find_by_channel("instance", x, weight, bias, eps, out, channel_axis)
            if way is not None:
                return way.run(x, weight, bias, eps, return_stats, out)
    own = (weight, bias, use_input_stats, momentum, eps, channel_axis, mask, out, return_stats)
    return calls_for(x, stream).run_tracked("instance", x, running_mean, running_var, *own)


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
    stream: Any = None,
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
    eps, channel_axis, mask, out, return_stats, stream
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
    if mask is stream is None:
        way = quick.find_by_channel("group", x, weight, bias, eps, out, channel_axis, num_groups)
        if way is not None:
            return way.run(x, weight, bias, eps, return_stats, out)
    options = (integer(channel_axis, "channel_axis"), integer(num_groups, "num_groups"), None)
    calls = calls_for(x, stream)
    return calls.run(
        "group",
        options,
        x,
        *calls.as_input(x, "x"),
        weight,
        bias,
        check_eps(eps),
        mask=mask,
        out=out,
        return_stats=return_stats,
    )


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
    stream: Any = None,
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
    stream : int or stream, optional
        As for `batch_norm`.

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
    if mask is stream is None:
        way = quick.find("layer", x, weight, bias, eps, out, residual, normalized_shape, axis)
        if way is not None:
            return way.run(x, weight, bias, eps, return_stats, out, residual)
    calls = calls_for(x, stream)
    source, form = calls.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    return calls.run(
        "layer",
        options,
        x,
        source,
        form,
        weight,
        bias,
        check_eps(eps),
        mask=mask,
        residual=residual,
        out=out,
        return_stats=return_stats,
    )


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
    stream: Any = None,
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
    axis, residual, out, return_stats, stream
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
    if stream is None:
        way = quick.find("rms", x, weight, None, 0.0 if eps is None else eps, out, residual, normalized_shape, axis)
        if way is not None:
            return way.run(x, weight, None, way.epsilon if eps is None else eps, return_stats, out, residual)
    calls = calls_for(x, stream)
    source, form = calls.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    eps = form.epsilon if eps is None else check_eps(eps)
    return calls.run(
        "rms", options, x, source, form, weight, None, eps, residual=residual, out=out, return_stats=return_stats
    )


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
    stream: Any = None,
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
    stream : int or stream, optional
        As for `batch_norm`.

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
    if training and mask is stream is None:
        way = quick.find_backward_by_channel("batch", dy, x, mean, rstd, weight, channel_axis)
        if way is not None:
            return way.run(dy, x, mean, rstd, weight)
    options = (integer(channel_axis, "channel_axis"), None, None)
    calls = calls_for(x, stream)
    own = (mean, rstd, weight, mask)
    return calls.run_backward("batch", options, dy, x, *calls.as_input(x, "x"), *own, fixed=not training)


def instance_norm_backward(
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    channel_axis: int = 1,
    mask: Any = None,
    stream: Any = None,
) -> Any:
    """Return the gradients of `instance_norm` with the input's statistics.

    Parameters
    ----------
    dy, x, weight, channel_axis, mask, stream
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
    if mask is stream is None:
        way = quick.find_backward_by_channel("instance", dy, x, mean, rstd, weight, channel_axis)
        if way is not None:
            return way.run(dy, x, mean, rstd, weight)
    options = (integer(channel_axis, "channel_axis"), None, None)
    calls = calls_for(x, stream)
    return calls.run_backward("instance", options, dy, x, *calls.as_input(x, "x"), mean, rstd, weight, mask)


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
    stream: Any = None,
) -> Any:
    """Return the gradients of `group_norm`.

    Parameters
    ----------
    dy, x, weight, channel_axis, mask, stream
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
    if mask is stream is None:
        way = quick.find_backward_by_channel("group", dy, x, mean, rstd, weight, channel_axis, num_groups)
        if way is not None:
            return way.run(dy, x, mean, rstd, weight)
    options = (integer(channel_axis, "channel_axis"), integer(num_groups, "num_groups"), None)
    calls = calls_for(x, stream)
    return calls.run_backward("group", options, dy, x, *calls.as_input(x, "x"), mean, rstd, weight, mask)


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
    stream: Any = None,
) -> Any:
    """Return the gradients of `layer_norm`.

    Parameters
    ----------
    dy, mask, stream
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
    if mask is stream is None:
        way = quick.find_backward("layer", dy, x, mean, rstd, weight, normalized_shape, axis)
        if way is not None:
            return way.run(dy, x, mean, rstd, weight)
    calls = calls_for(x, stream)
    source, form = calls.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    return calls.run_backward("layer", options, dy, x, source, form, mean, rstd, weight, mask)


def rms_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, rstd: Any, weight: Any = None, *, axis: Any = None, stream: Any = None
) -> Any:
    """Return the gradients of `rms_norm`.

    Parameters
    ----------
    dy, x, normalized_shape, weight, axis, stream
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
    if stream is None:
        way = quick.find_backward("rms", dy, x, None, rstd, weight, normalized_shape, axis)
        if way is not None:
            return way.run(dy, x, None, rstd, weight)
    calls = calls_for(x, stream)
    source, form = calls.as_input(x, "x")
    options = (1, None, normalized_axes(source.shape, normalized_shape, axis))
    return calls.run_backward("rms", options, dy, x, source, form, None, rstd, weight, None)
