"""The gradients of the norms, one function for each."""

from __future__ import annotations

from typing import Any

from ..calls import host
from ..calls.check import options_for
from ..core.norms import record_of


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
    fixed = not training
    return host.backward("batch", (channel_axis, None), dy, x, mean, rstd, weight, mask, fixed, stream)


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
    return host.backward("instance", (channel_axis, None), dy, x, mean, rstd, weight, mask, False, stream)


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
    return host.backward("group", (channel_axis, num_groups), dy, x, mean, rstd, weight, mask, False, stream)


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
    return host.backward("layer", (normalized_shape, axis), dy, x, mean, rstd, weight, mask, False, stream)


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
    return host.backward("rms", (normalized_shape, axis), dy, x, None, rstd, weight, None, False, stream)


def l2_norm_backward(
    dy: Any, x: Any, normalized_shape: Any, rstd: Any, weight: Any = None, *, axis: Any = None, stream: Any = None
) -> Any:
    """Return the gradients of `l2_norm`.

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

    Notes
    -----
    With ``u = x * rstd`` and ``g = dy * weight``, ``dx = rstd * (g - u * sum(g * u))``; where the norm was less than
    eps, the factor is a constant and ``dx = rstd * g``.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[3.0, 4.0]])
    >>> y, rstd = nn.l2_norm(x, 2, return_stats=True)
    >>> dx, dweight = nn.l2_norm_backward(np.array([[1.0, 0.0]]), x, 2, rstd)
    >>> np.round(dx, 4)
    array([[ 0.128, -0.096]])
    """
    return host.backward("l2", (normalized_shape, axis), dy, x, None, rstd, weight, None, False, stream)


def normalize_backward(
    kind: str,
    dy: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    *,
    normalized_shape: Any = None,
    num_groups: int | None = None,
    axis: Any = None,
    channel_axis: int = 1,
    use_input_stats: bool = True,
    mask: Any = None,
    stream: Any = None,
) -> Any:
    """Return the gradients of `normalize`.

    Parameters
    ----------
    kind : str
        The norm's name.
    dy, x, mean, rstd, weight
        As for `batch_norm_backward`; `mean` is None where the norm has none.
    normalized_shape, num_groups, axis, channel_axis
        Those of the forward call.
    use_input_stats : bool, optional
        False: the statistics were running ones, which do not depend on `x`.
    mask, stream
        As for `batch_norm_backward`.

    Returns
    -------
    dx, dweight, dbias
        As the norm's own function returns them.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, rstd = nn.normalize("layer", x, 3, return_stats=True)
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> np.round(nn.normalize_backward("layer", dy, x, mean, rstd, normalized_shape=3)[0], 4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """
    options = options_for(record_of(kind), normalized_shape, axis, channel_axis, num_groups)
    fixed = not use_input_stats
    return host.backward(kind, options, dy, x, mean, rstd, weight, mask, fixed, stream)
