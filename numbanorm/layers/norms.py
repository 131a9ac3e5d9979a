"""The layers: what their constructors take, and what batch norm alone does; all else is in `base` and `families`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from ..calls import check
from ..core.layout import Layout
from ..stats import fit as fitting
from ..stats import sync as synchronized
from ..stats.moments import Moments
from .base import FAMILIES, KINDS, Kept, Last, Norm
from .families import AxesNorm, ChannelNorm, of_channels


class BatchNorm(ChannelNorm):
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
    __module__ = "numbanorm"
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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, channel_axis=channel_axis)
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

    def _call(self, x: Any, mask: Any, residual: Any, out: Any) -> Any:
        if self.sync is None or not self.training:
            return super()._call(x, mask, residual, out)
        if residual is not None:
            raise TypeError(f"residual: expected None, {self.record.title} takes none")
        y, mean, rstd, self._shared = synchronized.forward(self, x, mask, out)
        self._last = Last(x, None, Kept(mean, rstd), mask)
        return y

    def _gradients(self, dy: Any, last: Last) -> tuple[Any, ...]:
        _, rstd = last.statistics
        if self._shared is None or self._shared.rstd is not rstd:
            return super()._gradients(dy, last)
        return synchronized.backward(self, dy, last, self._shared)

    def _arguments(self) -> list[str]:
        return super()._arguments() if self.sync is None else [*super()._arguments(), f"sync={self.sync!r}"]


class InstanceNorm(ChannelNorm):
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
    __module__ = "numbanorm"

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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, bias=bias, channel_axis=channel_axis)


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
    __module__ = "numbanorm"

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
        self.num_groups = check.positive(num_groups, "num_groups")
        self.num_channels = check.positive(num_channels, "num_channels")
        if self.num_channels % self.num_groups:
            raise ValueError(f"num_groups: expected a divisor of the {num_channels} channels, got {num_groups}")
        super().__init__((self.num_channels,), eps, affine, bias)
        self.channel_axis = check.integer(channel_axis, "channel_axis")

    @property
    def _options(self) -> tuple[Any, Any]:
        return self.channel_axis, self.num_groups

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        return of_channels(super()._layout(shape), self.num_channels, self.channel_axis)

    def _arguments(self) -> list[str]:
        parts = [str(self.num_groups), *super()._arguments()]
        return parts if self.channel_axis == 1 else [*parts, f"channel_axis={self.channel_axis}"]


class LayerNorm(AxesNorm):
    """Layer normalization: each sample over its last axes. See `layer_norm`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    eps : float, optional
        Added to the variance.
    elementwise_affine : bool, optional
        Whether there are weight and bias, shape `normalized_shape`.
    bias : bool, optional
        False: a weight alone.
    axis : int or tuple of int, optional
        The normalized axes, in the order of `normalized_shape`; the last ones if None.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.LayerNorm(2, eps=0.0)(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    kind = "layer"
    __module__ = "numbanorm"

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        axis: Any = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, axis=axis)


class RMSNorm(AxesNorm):
    """RMS normalization: each sample divided by its root mean square over its last axes. See `rms_norm`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    eps : float or None, optional
        Added to the mean square; None for the machine epsilon of the result's dtype.
    elementwise_affine : bool, optional
        Whether there is a weight, shape `normalized_shape`.
    axis : int or tuple of int, optional
        As for `LayerNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.RMSNorm(2, eps=0.0)(np.array([[3.0, 3.0]]))
    array([[1., 1.]])
    """

    kind = "rms"
    __module__ = "numbanorm"

    def __init__(
        self, normalized_shape: Any, eps: float | None = None, elementwise_affine: bool = True, *, axis: Any = None
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, axis=axis)


class L2Norm(AxesNorm):
    """L2 normalization: each sample divided by its Euclidean norm over its last axes. See `l2_norm`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Lengths of the normalized axes.
    eps : float, optional
        What the norm is at least.
    elementwise_affine : bool, optional
        Whether there is a weight, shape `normalized_shape`.
    axis : int or tuple of int, optional
        As for `LayerNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> import numbanorm as nn
    >>> nn.L2Norm(2)(np.array([[3.0, 4.0]]))
    array([[0.6, 0.8]])
    """

    kind = "l2"
    __module__ = "numbanorm"

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-12, elementwise_affine: bool = False, *, axis: Any = None
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, axis=axis)


FAMILIES |= {"channels": ChannelNorm, "groups": GroupNorm, "axes": AxesNorm}
KINDS |= {norm.kind: norm for norm in (BatchNorm, LayerNorm, InstanceNorm, GroupNorm, RMSNorm, L2Norm)}
