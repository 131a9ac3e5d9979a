"""The norms, one function for each: they name what is to be done, and the call is made elsewhere."""

from __future__ import annotations

from typing import Any

from ..calls import host
from ..calls.check import options_for
from ..core.norms import record_of


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
    extras = None if mask is out is None else (mask, None, out)
    running = (running_mean, running_var, training, momentum)
    return host.tracked("batch", (channel_axis, None), x, running, weight, bias, eps, extras, return_stats, stream)


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
    extras = None if mask is out is None else (mask, None, out)
    running = (running_mean, running_var, use_input_stats, momentum)
    return host.tracked("instance", (channel_axis, None), x, running, weight, bias, eps, extras, return_stats, stream)


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
    extras = None if mask is out is None else (mask, None, out)
    return host.forward("group", (channel_axis, num_groups), x, weight, bias, eps, extras, return_stats, stream)


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
    extras = None if mask is residual is out is None else (mask, residual, out)
    return host.forward("layer", (normalized_shape, axis), x, weight, bias, eps, extras, return_stats, stream)


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
    extras = None if residual is out is None else (None, residual, out)
    return host.forward("rms", (normalized_shape, axis), x, weight, None, eps, extras, return_stats, stream)


def l2_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float = 1e-12,
    *,
    axis: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
    stream: Any = None,
) -> Any:
    """Divide each sample by its Euclidean norm over its last axes, or over any set of axes.

    It is torch's ``torch.nn.functional.normalize`` with ``p=2``: ``x / max(norm, eps)``.

    Parameters
    ----------
    x : array_like, shape (..., *normalized_shape)
        Dtypes as for `batch_norm`.
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    weight : array_like, shape `normalized_shape`, optional
        Multiplies the result; of any float dtype.
    eps : float, optional
        What the norm is at least, in units of ``x``.
    axis, residual, out, return_stats, stream
        As for `layer_norm`.

    Returns
    -------
    y : ndarray, shape of `x`
        The normalized array; a row of zeros stays one.
    rstd : ndarray, float64
        Only with `return_stats`: ``1/max(norm, eps)``, `x`'s shape with 1 for the normalized axes.
    total : ndarray, shape of `x`
        Only with `residual`: ``x + residual``, last.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.l2_norm(np.array([[3.0, 4.0], [0.0, 0.0]]), 2)
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    extras = None if residual is out is None else (None, residual, out)
    return host.forward("l2", (normalized_shape, axis), x, weight, None, eps, extras, return_stats, stream)


def normalize(
    kind: str,
    x: Any,
    normalized_shape: Any = None,
    num_groups: int | None = None,
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    channel_axis: int = 1,
    running_mean: Any = None,
    running_var: Any = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    mask: Any = None,
    residual: Any = None,
    out: Any = None,
    return_stats: bool = False,
    stream: Any = None,
) -> Any:
    """Normalize with any norm of the table, those that `register_norm` has added too.

    Parameters
    ----------
    kind : str
        The norm's name.
    x : array_like
        Dtypes as for `batch_norm`.
    normalized_shape, axis
        As for `layer_norm`, for norms over axes.
    num_groups, channel_axis
        As for `group_norm`, for norms by channel.
    weight, bias : array_like, optional
        gamma and beta; for a norm with one weight for all elements of shape ().
    eps : float, optional
        The norm's usual one if None.
    running_mean, running_var, use_input_stats, momentum
        As for `instance_norm`, for norms that may keep running statistics.
    mask, residual, out, return_stats, stream
        As for `layer_norm`.

    Returns
    -------
    y, mean, rstd, total
        As the norm's own function returns them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or is none of the norm's; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.normalize("layer", np.array([[1.0, 3.0]]), 2, eps=0.0)
    array([[-1.,  1.]])
    """
    record = record_of(kind)
    options = options_for(record, normalized_shape, axis, channel_axis, num_groups)
    number = record.eps if eps is None else eps
    extras = None if mask is residual is out is None else (mask, residual, out)
    own = (weight, bias, number, extras, return_stats, stream)
    if record.tracks:
        return host.tracked(kind, options, x, (running_mean, running_var, use_input_stats, momentum), *own)
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise TypeError(f"running_mean, running_var: expected None, {record.title} keeps no running statistics")
    return host.forward(kind, options, x, *own)
