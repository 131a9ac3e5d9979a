"""Norm: parameters, running statistics and mode around a norm's calls; the layers are thin subclasses in `norms`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from ..calls import check, host
from ..calls.arrays import as_array, as_input
from ..calls.dispatch import Outcome, Request, cuda_problem, handler, handler_of
from ..core.dtypes import is_float
from ..core.kinds import on_cuda
from ..core.layout import Layout
from ..core.norms import NORMS, NormRecord
from ..core.spec import spec_of

_ARRAYS = ("weight", "bias", "running_mean", "running_var")
_STATE = (*_ARRAYS, "num_batches_tracked")

_ndarray = np.ndarray

USUAL: Any = object()
"""An argument of a constructor in whose place the norm's record says what is usual."""

KINDS: dict[str, type[Norm]] = {}
"""The layers by the names that `Norm` takes; a registered norm's is made when it is first asked for."""


class _Dispatch(type):
    """Makes ``Norm("layer", 384)`` a ``LayerNorm(384)``."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Norm:
            return super().__call__(*args, **kwargs)
        kind = args[0] if args else kwargs.pop("kind", None)
        if kind not in NORMS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, NORMS))}, got {kind!r}")
        return layer_of(kind)(*args[1:], **kwargs)


def layer_of(kind: str) -> type[Norm]:
    """Return the class of a norm's layers.

    Parameters
    ----------
    kind : str
        A key of `numbanorm.core.norms.NORMS`.
    """
    if kind not in KINDS:
        record = NORMS[kind]
        about = f"{record.title}, a registered norm. See `{FAMILIES[_family(record)].__name__}`."
        made: Any = _Dispatch(record.title, (FAMILIES[_family(record)],), {"kind": kind, "__doc__": about})
        KINDS[kind] = made
    return KINDS[kind]


def _family(record: NormRecord) -> str:
    if not record.by_channel:
        return "axes"
    return "groups" if record.grouped else "channels"


FAMILIES: dict[str, type[Norm]] = {}
"""Base classes of layers: of norms over axes, by channel, and by groups of channels."""


class Last(NamedTuple):
    """What backward needs of the last call in training mode."""

    x: Any  # what was normalized, not copied
    stats: Any  # as whatever served the call keeps them
    prepared: Any  # what served it
    mask: Any = None
    summed: bool = False  # whether x is the sum of an input and a residual
    overwritten: bool = False

    @property
    def statistics(self) -> tuple[Any, Any]:
        """Mean, None where there is none, and rstd."""
        public = self.prepared.public(self.stats)
        return (None, *public)[-2:]


class Kept(NamedTuple):
    """Statistics as users get them, in the place of what served a call."""

    mean: Any
    rstd: Any

    def public(self, stats: Any) -> tuple[Any, ...]:
        """Return them."""
        return (self.rstd,) if self.mean is None else (self.mean, self.rstd)


class Norm(metaclass=_Dispatch):
    """A normalization layer; ``Norm(kind, ...)`` makes the subclass for `kind`.

    Parameters
    ----------
    kind : str
        A norm's name: ``"batch"``, ``"layer"``, ``"instance"``, ``"group"``, ``"rms"``, ``"l2"``, or one that
        `register_norm` has added.
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

    __module__ = "numbanorm"

    kind: ClassVar[str]
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    sync: Any = None
    _batches: Any

    def __init__(self, shape: tuple[int, ...], eps: Any, affine: Any, bias: bool) -> None:
        record = self.record
        eps = record.eps if eps is USUAL else eps
        affine = record.affine_by_default if affine is USUAL else affine
        self._shape = shape
        self.device = "cpu"
        self.eps: Any = None if eps is None and record.eps is None else check.check_eps(eps)
        if affine and record.weights_by_sample:
            raise ValueError(f"affine: expected False, {record.title} has weights for each sample, given in the call")
        own = shape if record.affine_roles else ()
        self._affine_shape = own
        self.weight = np.ones(own, np.float32) if affine else None
        self.bias = np.zeros(own, np.float32) if affine and bias and "bias" in record.parameters else None
        self.running_mean = self.running_var = self.num_batches_tracked = None
        self.training = True
        self.grad: dict[str, Any] = {}
        self._last: Any = None
        self._served: Any = None

    @property
    def record(self) -> NormRecord:
        """What is to be known of the norm."""
        return NORMS[self.kind]

    @property
    def _options(self) -> tuple[Any, Any]:
        """The norm's options as `numbanorm.calls.dispatch.Request` has them."""
        raise TypeError(f"{type(self).__name__}: expected a norm of its own")

    def __call__(self, x: Any, *, mask: Any = None, residual: Any = None, out: Any = None) -> Any:
        """Normalize `x`.

        Parameters
        ----------
        x : array_like
            Of the shape that the layer was made for.
        mask : array_like of bool, broadcastable to `x`, optional
            True where an element counts for the statistics (not for norms without a mean).
        residual : array_like, shape and dtype of `x`, optional
            Added to `x` first (norms over axes only).
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
        if type(x) is _ndarray and mask is residual is out is None:
            weight, bias, eps = self.weight, self.bias, self.eps
            served = self._served
            if served is None or not (
                x.shape == served[0]
                and x.strides == served[1]
                and x.dtype is served[2]
                and weight is served[3]
                and bias is served[4]
                and eps is served[5]
            ):
                served = self._remember(x, weight, bias, eps)
            if served is not None:
                prepared = served[7]
                y, stats, _ = prepared.run(x, weight, bias, served[6], None, None, None, self.training)
                if self.training:
                    self._last = x, stats, prepared
                return y
        return self._call(x, mask, residual, out)

    def _remember(self, x: np.ndarray, weight: Any, bias: Any, eps: Any) -> Any:
        """Find what serves inputs that look like this one, and keep it; None where the long way round does."""
        if not (host.are_plain((weight, bias)) and x.flags.aligned and x.dtype.isnative):
            return None
        self._check_input(x.shape)
        number, prepared = host.find(self.kind, self._options, x, weight, bias, eps)
        self._served = x.shape, x.strides, x.dtype, weight, bias, eps, number, prepared
        return self._served

    def _call(self, x: Any, mask: Any, residual: Any, out: Any) -> Any:
        """Normalize an array of any kind, with any option."""
        serving = handler_of(x)
        self._check_input(as_input(x, "x").shape if serving is None else serving.shape_of(x))
        request = self._request(x, mask, residual, out)
        outcome = self._outcome(request, serving)
        if request.batches is not None:
            self._batches = outcome.batches
        if self.training:
            total = outcome.total
            overwritten = total is None and out is not None and _share_memory(out, x, serving)
            self._last = Last(
                x if total is None else total, outcome.stats, outcome.prepared, mask, total is not None, overwritten
            )
        return outcome.y if outcome.total is None else (outcome.y, outcome.total)

    def _outcome(self, request: Request, serving: Any) -> Outcome:
        """Do a call; where an input on a device meets a layer in host memory, say how to move the layer."""
        try:
            return host.serve(request)
        except TypeError as error:
            if on_cuda(request.x) and any(type(getattr(self, name)) is _ndarray for name in _ARRAYS):
                raise TypeError(f"{error}; move the layer there with .to({serving.device_of(request.x)!r})") from None
            raise

    def _request(self, x: Any, mask: Any, residual: Any, out: Any) -> Request:
        return Request(
            self.kind, self._options, x, self.weight, self.bias, self.eps, mask, residual, out, keep=self.training
        )

    def _check_input(self, shape: tuple[int, ...]) -> None:
        """Check the shape of an input."""
        self._layout(shape)

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
        last = self._remembered()
        if last is None:
            raise ValueError("backward: expected a call in training mode before, got none")
        if last.overwritten:
            raise ValueError("backward: expected the input of the last training call, but out= has overwritten it")
        if dtotal is not None and not last.summed:
            raise ValueError("dtotal: expected None, the last call in training mode had no residual")
        dx, *gradients = self._gradients(dy, last)
        if dtotal is not None:
            serving = handler_of(last.x)
            dx = _added(dx, dtotal, last.x) if serving is None else serving.add_gradient(dx, dtotal, last.x)
        self.grad = {
            name: gradient
            for name, gradient in zip(("weight", "bias"), gradients, strict=False)
            if getattr(self, name) is not None
        }
        return dx

    def _remembered(self) -> Last | None:
        """Return what the last call in training mode left."""
        last = self._last
        return Last(*last) if type(last) is tuple else last

    def _gradients(self, dy: Any, last: Last) -> tuple[Any, ...]:
        mean, rstd = last.statistics
        own = (dy, last.x, mean, rstd, self.weight, last.mask)
        gradients: tuple[Any, ...] = host.backward(self.kind, self._options, *own, False, None)
        return gradients

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds: not what serves calls, which this process alone can call."""
        last = self._remembered()
        if last is not None:
            last = last._replace(stats=None, prepared=Kept(*last.statistics))
        return {**self.__dict__, "_served": None, "_last": last}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a pickle held, of version 0.1 too."""
        self.__dict__.update({"_served": None, "_affine_shape": state["_shape"], "axis": None, **state})
        self.__dict__.pop("_bound", None)
        last = self._last
        if last is not None and not hasattr(last.prepared, "public"):  # it had the mean and rstd in these places
            self._last = last._replace(stats=None, prepared=Kept(last.stats, last.prepared))

    @property
    def num_batches_tracked(self) -> int | None:
        """Training calls that have updated the running statistics; None where there are none.

        On a CUDA device it is counted there, and asking for it waits for the device.
        """
        batches = self._batches
        return batches if batches is None or isinstance(batches, int) else batches.read()

    @num_batches_tracked.setter
    def num_batches_tracked(self, batches: int | None) -> None:
        self._batches = batches

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Return which elements of an array of `shape` share statistics and weights.

        Parameters
        ----------
        shape : tuple of int
            Shape of an input.
        """
        return self._layout(tuple(shape))

    def _layout(self, shape: tuple[int, ...]) -> Layout:
        channel_axis, num_groups, axis = check.options_of(self.record, shape, *self._options)
        return Layout.of(self.kind, shape, channel_axis=channel_axis, num_groups=num_groups, axis=axis)

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
            device = handler("cuda").device_name(found[1])
        moved = {name: placed(getattr(self, name), device) for name in _ARRAYS}
        batches = self.num_batches_tracked
        for name, array in moved.items():
            setattr(self, name, array)
        self.num_batches_tracked = batches
        self.device = device
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of parameters and running statistics in host memory, under torch's names, in torch's shapes."""
        state = {name: getattr(self, name) for name in _STATE}
        return {name: np.array(placed(value, "cpu")) for name, value in state.items() if value is not None}

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
        array = as_array(placed(value, "cpu"), name)
        if name == "num_batches_tracked":
            if array.size != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name}: expected one integer, got dtype {array.dtype} and shape {array.shape}")
            return int(array.reshape(())[()])
        shape = self._affine_shape if name in ("weight", "bias") else self._shape
        check.check_shape(spec_of(array), name, shape)
        if not is_float(array.dtype.newbyteorder("=")):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        return placed(np.array(array, dtype=array.dtype.newbyteorder("=")), self.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        """Return the constructor's arguments as `repr` shows them: those that differ from what is usual."""
        parts = [f"{self._shape[0] if self.record.by_channel and len(self._shape) == 1 else self._shape}"]
        parts.append(f"eps={self.eps}")
        if self.weight is None:
            parts.append("affine=False")
        elif self.weight is not None and self.bias is None and "bias" in self.record.parameters:
            parts.append("bias=False")
        return parts


def placed(value: Any, device: str) -> Any:
    """Return an array on a device; itself if it is there already."""
    if value is None or (device == "cpu" and not on_cuda(value)):
        return value
    return handler("cuda").placed(value, device)


def _share_memory(out: Any, x: Any, serving: Any) -> bool:
    """Tell whether an output may share memory with an input."""
    if serving is not None:
        return bool(serving.share_memory(out, x))
    return bool(np.may_share_memory(as_array(out, "out"), as_array(x, "x")))


def _added(dx: Any, dtotal: Any, x: Any) -> Any:
    """Return dx, to which the gradient of the sum is added in place."""
    added = as_input(dtotal, "dtotal")
    check.check_gradient(spec_of(added), spec_of(as_array(x, "x")), "dtotal")
    plain = as_array(dx, "dx")
    np.add(plain, added, out=plain, casting="same_kind")
    return dx
