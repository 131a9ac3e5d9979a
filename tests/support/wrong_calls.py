"""Wrong calls of the functions: arguments, the error that each raises, and what its message must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from reference import normal

import numbanorm as nn

X = normal(0, (4, 6, 5))
FLAT = normal(0, (4, 6))


class Cuda:
    """What an array on a GPU looks like from outside."""

    shape, dtype = (4, 6, 5), np.dtype(np.float32)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": "<f4", "data": (0, False), "version": 3}


class Lazy:
    """What a dask array looks like from outside."""

    shape, dtype = (4, 6, 5), np.dtype(np.float32)

    def __dask_graph__(self) -> dict[str, Any]:
        return {}


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "batch": lambda x=X, **o: nn.batch_norm(x, training=True, **o),
    "batch, eval": lambda x=X, **o: nn.batch_norm(x, **{"running_mean": ZEROS, "running_var": ONES, **o}),
    "instance": lambda x=X, **o: nn.instance_norm(x, **o),
    "group": lambda x=X, num_groups=3, **o: nn.group_norm(x, num_groups, **o),
    "layer": lambda x=X, normalized_shape=5, **o: nn.layer_norm(x, normalized_shape, **o),
    "rms": lambda x=X, normalized_shape=5, **o: nn.rms_norm(x, normalized_shape, **o),
}
ZEROS, ONES = np.zeros(6, np.float32), np.ones(6, np.float32)
PAIRS = np.zeros((6, 2), np.float32)
CHANNELS = ["batch", "batch, eval", "instance", "group"]
TRACKED = ["batch", "batch, eval", "instance"]
AXES = ["layer", "rms"]
ALL = CHANNELS + AXES

# functions, arguments, error, what the message must say
CASES: list[tuple[list[str], dict[str, Any], type[Exception], str]] = [
    # x: what is no array of numbers
    (ALL, {"x": X.astype(np.complex64)}, TypeError, "x: .*got complex64"),
    (ALL, {"x": X.astype(np.complex128)}, TypeError, "x: .*got complex128"),
    (ALL, {"x": np.full((4, 6, 5), "a")}, TypeError, "x: .*got <U1"),
    (ALL, {"x": np.full((4, 6, 5), b"a")}, TypeError, r"x: .*got (\|S1|bytes)"),
    (ALL, {"x": X.astype(object)}, TypeError, "x: .*got object"),
    (ALL, {"x": X.astype(np.longdouble)}, TypeError, "x: .*got (float128|longdouble)"),
    (ALL, {"x": np.zeros((4, 6, 5), "M8[s]")}, TypeError, "x: .*got datetime64"),
    (ALL, {"x": np.zeros((4, 6, 5), "m8[s]")}, TypeError, "x: .*got timedelta64"),
    (ALL, {"x": np.zeros((4, 6, 5), [("a", np.float32)])}, TypeError, "x: .*got .*a"),
    (ALL, {"x": np.ma.masked_array(X, X > 0)}, TypeError, r"x: .*masked array.*mask="),
    (ALL, {"x": Cuda()}, TypeError, "x: expected an array in host memory.*CUDA"),
    (ALL, {"x": Lazy()}, TypeError, r"x: .*lazy Lazy.*\.compute\(\)"),
    (ALL, {"x": "words"}, TypeError, "x: .*got (<U5|str)"),
    (ALL, {"x": None}, TypeError, "x: .*got (object|NoneType)"),
    (ALL, {"x": {"a": 1}}, TypeError, "x: .*got (object|dict)"),
    (ALL, {"x": [[1.0, 2.0], [3.0]]}, TypeError, "x: .*got list"),
    # x: shape
    (CHANNELS, {"x": X[0, 0]}, ValueError, r"x: expected at least 2 dimensions.*got shape \(5,\)"),
    (CHANNELS, {"x": X[0, 0, 0]}, ValueError, r"x: expected at least 2 dimensions.*got shape \(\)"),
    (CHANNELS, {"x": 3.0}, ValueError, r"x: expected at least 2 dimensions.*got shape \(\)"),
    (AXES, {"x": X[0, 0, 0]}, ValueError, r"x: .*\(5,\).*got shape \(\)"),
    (["batch"], {"x": X[:1, :, :1]}, ValueError, r"x: expected more than 1 value per channel.*got shape \(1, 6, 1\)"),
    (["batch"], {"x": FLAT[:1]}, ValueError, r"x: expected more than 1 value per channel.*\(1, 6\)"),
    (["instance"], {"x": X[:, :, :1]}, ValueError, r"x: expected more than 1 value per channel.*\(4, 6, 1\)"),
    (["instance"], {"x": FLAT}, ValueError, r"x: expected more than 1 value per channel.*\(4, 6\)"),
    # channel_axis
    (CHANNELS, {"channel_axis": 3}, ValueError, r"channel_axis: .*\(4, 6, 5\), got 3"),
    (CHANNELS, {"channel_axis": -4}, ValueError, r"channel_axis: .*got -4"),
    (CHANNELS, {"channel_axis": 1.0}, TypeError, "channel_axis: expected an integer, got float"),
    (CHANNELS, {"channel_axis": True}, TypeError, "channel_axis: expected an integer, got bool"),
    (CHANNELS, {"channel_axis": "last"}, TypeError, "channel_axis: expected an integer, got str"),
    (CHANNELS, {"channel_axis": None}, TypeError, "channel_axis: expected an integer, got NoneType"),
    # weight, bias
    *[
        (functions, {name: value}, error, f"{name}: {message}")
        for functions, n, name in [
            (CHANNELS, 6, "weight"),
            (CHANNELS, 6, "bias"),
            (AXES, 5, "weight"),
            (["layer"], 5, "bias"),
        ]
        for value, error, message in [
            (np.ones(n + 1, np.float32), ValueError, rf"expected shape \({n},\), got \({n + 1},\)"),
            (np.ones((n, 1), np.float32), ValueError, rf"expected shape \({n},\), got \({n}, 1\)"),
            (np.ones((1, n), np.float32), ValueError, rf"expected shape \({n},\), got \(1, {n}\)"),
            (np.float32(1), ValueError, rf"expected shape \({n},\), got \(\)"),
            (1.0, ValueError, rf"expected shape \({n},\), got \(\)"),
            (np.ones(n, int), TypeError, "expected a float dtype, got int64"),
            (np.ones(n, np.uint8), TypeError, "expected a float dtype, got uint8"),
            (np.ones(n, bool), TypeError, "expected a float dtype, got bool"),
            ([True] * n, TypeError, "expected a float dtype, got bool"),
            (np.ones(n, complex), TypeError, "expected a float dtype, got complex128"),
            (np.ones(n, object), TypeError, "expected a float dtype, got object"),
            (np.ones(n, np.longdouble), TypeError, "expected a float dtype, got (float128|longdouble)"),
            (["a"] * n, TypeError, "expected a float dtype, got <U1"),
            (np.ma.masked_array(np.ones(n)), TypeError, "expected an array, got a masked array"),
            (Cuda(), TypeError, "expected an array in host memory, got a CUDA array"),
        ]
    ],
    (
        AXES,
        {"normalized_shape": (6, 5), "weight": np.ones(30, np.float32)},
        ValueError,
        r"weight: .*\(6, 5\), got \(30",
    ),
    (AXES, {"normalized_shape": (6, 5), "weight": np.ones((5, 6))}, ValueError, r"weight: .*\(6, 5\), got \(5, 6\)"),
    # eps
    (ALL, {"eps": -1e-5}, ValueError, "eps: expected a finite number not below 0, got -1e-05"),
    (ALL, {"eps": float("nan")}, ValueError, "eps: .*got nan"),
    (ALL, {"eps": float("inf")}, ValueError, "eps: .*got inf"),
    (ALL, {"eps": "1e-5"}, TypeError, "eps: expected a number, got str"),
    (ALL, {"eps": True}, TypeError, "eps: expected a number, got bool"),
    (ALL, {"eps": 1e-5j}, TypeError, "eps: expected a number, got complex"),
    (ALL, {"eps": np.array([1e-5])}, TypeError, "eps: expected a number, got ndarray"),
    ([f for f in ALL if f != "rms"], {"eps": None}, TypeError, "eps: expected a number, got NoneType"),
    # num_groups
    (["group"], {"num_groups": 4}, ValueError, "num_groups: expected a divisor of the 6 channels, got 4"),
    (["group"], {"num_groups": 0}, ValueError, "num_groups: .*got 0"),
    (["group"], {"num_groups": -2}, ValueError, "num_groups: .*got -2"),
    (["group"], {"num_groups": 12}, ValueError, "num_groups: .*got 12"),
    (["group"], {"x": np.ones((4, 0, 5)), "num_groups": 2**63}, ValueError, "num_groups: .*the 0 channels, got 9223"),
    (["group"], {"num_groups": 2.0}, TypeError, "num_groups: expected an integer, got float"),
    (["group"], {"num_groups": True}, TypeError, "num_groups: expected an integer, got bool"),
    (["group"], {"num_groups": "2"}, TypeError, "num_groups: expected an integer, got str"),
    (["group"], {"num_groups": None}, TypeError, "num_groups: expected an integer, got NoneType"),
    (["group"], {"num_groups": (2,)}, TypeError, "num_groups: expected an integer, got tuple"),
    # normalized_shape, axis
    (AXES, {"normalized_shape": 6}, ValueError, r"x: expected lengths \(6,\).*last axes, got shape \(4, 6, 5\)"),
    (AXES, {"normalized_shape": (5, 6)}, ValueError, r"x: expected lengths \(5, 6\).*got shape \(4, 6, 5\)"),
    (AXES, {"normalized_shape": (1, 4, 6, 5)}, ValueError, r"x: expected lengths \(1, 4, 6, 5\).*got shape"),
    (AXES, {"normalized_shape": ()}, ValueError, r"normalized_shape: expected one or more lengths, got \(\)"),
    (AXES, {"normalized_shape": -5}, ValueError, "normalized_shape: .*got -5"),
    (AXES, {"normalized_shape": 5.0}, TypeError, "normalized_shape: expected an integer, got float"),
    (AXES, {"normalized_shape": (6, "5")}, TypeError, "normalized_shape: expected an integer, got str"),
    (AXES, {"normalized_shape": None}, TypeError, "normalized_shape: expected an integer, got NoneType"),
    (AXES, {"normalized_shape": True}, TypeError, "normalized_shape: expected an integer, got bool"),
    (AXES, {"axis": 1}, ValueError, r"x: expected lengths \(5,\).*axes \(1,\), got shape \(4, 6, 5\)"),
    (AXES, {"axis": (1, 2)}, ValueError, r"x: expected lengths \(5,\).*axes \(1, 2\), got shape"),
    (AXES, {"axis": 3}, ValueError, r"axis: expected axes.*\(4, 6, 5\), got \(3,\)"),
    (AXES, {"axis": -4}, ValueError, r"axis: .*got \(-4,\)"),
    (AXES, {"axis": (2, 2), "normalized_shape": (5, 5)}, ValueError, r"axis: expected different axes, got \(2, 2\)"),
    (AXES, {"axis": (2, -1), "normalized_shape": (5, 5)}, ValueError, r"axis: .*got \(2, -1\)"),
    (AXES, {"axis": ()}, ValueError, r"axis|x: expected lengths \(5,\)"),
    (AXES, {"axis": 2.0}, TypeError, "axis: expected an integer, got float"),
    (AXES, {"axis": "last"}, TypeError, "axis: expected an integer, got str"),
    # mask
    *[
        ([f for f in ALL if f != "rms"], {"mask": mask}, error, f"mask: .*{message}")
        for mask, error, message in [
            (np.ones((4, 6, 5)), TypeError, "expected dtype bool.*got float64"),
            (np.ones((4, 6, 5), np.uint8), TypeError, "expected dtype bool.*got uint8"),
            ([1, 0, 1, 0, 1], TypeError, "expected dtype bool.*got int64"),
            ("mask", TypeError, "expected dtype bool.*got <U4"),
            (np.ones(6, bool), ValueError, r"expected a shape that broadcasts to \(4, 6, 5\), got \(6,\)"),
            (np.ones((4, 6), bool), ValueError, r"broadcasts to \(4, 6, 5\), got \(4, 6\)"),
            (np.ones((1, 4, 6, 5), bool), ValueError, r"broadcasts to \(4, 6, 5\), got \(1, 4, 6, 5\)"),
            (np.ones((2, 6, 5), bool), ValueError, r"broadcasts to \(4, 6, 5\), got \(2, 6, 5\)"),
            (np.ma.masked_array(np.ones(5, bool)), TypeError, "masked array"),
        ]
    ],
    # out
    *[
        (ALL, {"out": out}, error, f"out: .*{message}")
        for out, error, message in [
            (np.ones((4, 6, 4), np.float32), ValueError, r"expected shape \(4, 6, 5\), got \(4, 6, 4\)"),
            (np.ones((4, 30), np.float32), ValueError, r"expected shape \(4, 6, 5\), got \(4, 30\)"),
            (np.ones((4, 6, 5)), TypeError, "expected dtype float32, got float64"),
            (np.ones((4, 6, 5), np.float16), TypeError, "expected dtype float32, got float16"),
            (np.ones((4, 6, 5), np.int32), TypeError, "expected dtype float32, got int32"),
            (np.ones((4, 6, 5), ">f4"), TypeError, "expected dtype float32, got >f4"),
            (read_only(np.ones((4, 6, 5), np.float32)), ValueError, "expected a writeable array, got a read-only one"),
            (np.lib.stride_tricks.as_strided(np.ones(30, np.float32), (4, 6, 5), (0, 20, 4)), ValueError, "broadcast"),
            (X[::-1], ValueError, "overlap"),
            ([[[0.0] * 5] * 6] * 4, TypeError, "expected an array, got list"),
            (True, TypeError, "expected an array, got bool"),
            ("out", TypeError, "expected an array, got str"),
            (Cuda(), TypeError, "(CUDA|Cuda)"),
            (np.ma.masked_array(np.ones((4, 6, 5), np.float32)), TypeError, "masked array"),
        ]
    ],
    # residual
    *[
        (AXES, {"residual": residual}, error, f"residual: .*{message}")
        for residual, error, message in [
            (X[:, :, :4], ValueError, r"expected the shape of x, \(4, 6, 5\), got \(4, 6, 4\)"),
            (X[0], ValueError, r"expected the shape of x, \(4, 6, 5\), got \(6, 5\)"),
            (np.float32(1), ValueError, r"got \(\)"),
            (X.astype(np.float64), TypeError, "expected the dtype of x, float32, got float64"),
            (X.astype(np.int32), TypeError, "expected the dtype of x, float32, got int32"),
            (X.astype(complex), TypeError, "got complex128"),
            (X.tolist(), TypeError, "expected the dtype of x, float32, got float64"),
            (Cuda(), TypeError, "host memory"),
        ]
    ],
    # running statistics
    (["batch", "instance"], {"running_mean": ZEROS}, ValueError, "running_mean, running_var: expected both or neither"),
    (["batch", "instance"], {"running_var": ONES}, ValueError, "running_mean, running_var: expected both or neither"),
    (
        ["batch", "instance"],
        {"running_mean": PAIRS[:, 0], "running_var": np.broadcast_to(np.ones(1, np.float32), 6)},
        ValueError,
        "running_var: expected a writeable array",
    ),
    (
        ["batch", "instance"],
        {"running_mean": PAIRS[:, 0], "running_var": np.lib.stride_tricks.as_strided(np.ones(1), (6,), (0,))},
        ValueError,
        "running_var: expected an element of memory for each channel",
    ),
    (
        ["batch", "instance"],
        {"running_mean": PAIRS.reshape(-1)[:6], "running_var": PAIRS.reshape(-1)[5:11]},
        ValueError,
        "running_mean, running_var: expected memory of their own",
    ),
    (["batch, eval"], {"running_mean": None}, ValueError, "running_mean, running_var: expected both"),
    (["batch, eval"], {"running_var": None}, ValueError, "running_mean, running_var: expected both"),
    (
        ["batch, eval"],
        {"running_mean": None, "running_var": None},
        ValueError,
        "running_mean, running_var: expected both",
    ),
    *[
        (
            ["batch", "batch, eval", "instance"],
            {"running_mean": ZEROS, "running_var": ONES, name: value},
            error,
            message,
        )
        for name in ("running_mean", "running_var")
        for value, error, message in [
            (np.ones(5, np.float32), ValueError, rf"{name}: expected shape \(6,\), got \(5,\)"),
            (np.ones((6, 1), np.float32), ValueError, rf"{name}: expected shape \(6,\), got \(6, 1\)"),
            (np.ones((4, 6), np.float32), ValueError, rf"{name}: expected shape \(6,\), got \(4, 6\)"),
            (np.ones(6, int), TypeError, f"{name}: expected a float dtype, got int64"),
            (np.ones(6, complex), TypeError, f"{name}: expected a float dtype, got complex128"),
            (np.ma.masked_array(np.ones(6)), TypeError, f"{name}: .*masked array"),
        ]
    ],
    *[
        (["batch", "instance"], {"running_mean": ZEROS, "running_var": ONES, name: value}, error, message)
        for name in ("running_mean", "running_var")
        for value, error, message in [
            ([0.5] * 6, TypeError, f"{name}: expected an array to update in place, got list"),
            ((0.5,) * 6, TypeError, f"{name}: expected an array to update in place, got tuple"),
            (read_only(np.ones(6, np.float32)), ValueError, f"{name}: expected a writeable array, got a read-only one"),
        ]
    ],
    # momentum
    *[
        (
            ["batch", "instance"],
            {"running_mean": ZEROS, "running_var": ONES, "momentum": momentum},
            TypeError,
            f"momentum: expected a number, got {kind}",
        )
        for momentum, kind in [("0.1", "str"), (True, "bool"), (0.1j, "complex"), ([0.1], "list")]
    ],
]
