"""ONNX's own test cases for normalization operators, through the public functions."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pytest
from tolerances import ONNX_ATOL, ONNX_RTOL

import numbanorm as nn

COUNTS = {
    "BatchNormalization": 4,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LayerNormalization": 19,
    "MeanVarianceNormalization": 1,
    "RMSNormalization": 19,
}


@cache
def cases() -> dict[str, list[Any]]:
    """Return the cases whose graph is one node, by operator (the `_expanded` ones spell the operator out in others)."""
    loader = pytest.importorskip("onnx.backend.test.loader")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases of other operators divide by zero as they are made
        loaded = loader.load_model_tests(kind="node")
    found = defaultdict(list)
    for case in loaded:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in COUNTS:
            found[nodes[0].op_type].append(case)
    return found


def test_number_of_cases() -> None:
    assert {op: len(found) for op, found in sorted(cases().items())} == COUNTS
    assert sum(COUNTS.values()) == 47


def batch_normalization(attributes: dict[str, Any], x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> list[Any]:
    eps = attributes.get("epsilon", 1e-5)
    if not attributes.get("training_mode", 0):
        return [nn.batch_norm(x, mean, var, scale, bias, eps=eps)]
    y, batch_mean, rstd = nn.batch_norm(x, None, None, scale, bias, training=True, eps=eps, return_stats=True)
    keep = attributes.get("momentum", 0.9)
    biased = 1 / rstd**2 - eps
    return [y, keep * mean + (1 - keep) * batch_mean, keep * var + (1 - keep) * biased]


def group_normalization(attributes: dict[str, Any], x: Any, scale: Any, bias: Any) -> list[Any]:
    return [nn.group_norm(x, attributes["num_groups"], scale, bias, attributes.get("epsilon", 1e-5))]


def instance_normalization(attributes: dict[str, Any], x: Any, scale: Any, bias: Any) -> list[Any]:
    return [nn.instance_norm(x, weight=scale, bias=bias, eps=attributes.get("epsilon", 1e-5))]


def trailing(attributes: dict[str, Any], x: Any) -> tuple[int, ...]:
    axis = attributes.get("axis", -1) % x.ndim
    return x.shape[axis:]


def layer_normalization(attributes: dict[str, Any], x: Any, scale: Any, bias: Any = None) -> list[Any]:
    eps = attributes.get("epsilon", 1e-5)
    return list(nn.layer_norm(x, trailing(attributes, x), scale, bias, eps, return_stats=True))


def mean_variance_normalization(attributes: dict[str, Any], x: Any) -> list[Any]:
    axes = tuple(attributes.get("axes", (0, 2, 3)))
    return [nn.layer_norm(x, tuple(x.shape[a] for a in axes), eps=0.0, axis=axes)]


def rms_normalization(attributes: dict[str, Any], x: Any, scale: Any) -> list[Any]:
    return [nn.rms_norm(x, trailing(attributes, x), scale, attributes.get("epsilon", 1e-5))]


OPERATORS = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
}


@pytest.mark.parametrize(("operator", "number"), [(op, i) for op, count in COUNTS.items() for i in range(count)])
def test_case(operator: str, number: int) -> None:
    helper = pytest.importorskip("onnx.helper")
    case = cases()[operator][number]
    attributes = {a.name: helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        results = OPERATORS[operator](attributes, *map(np.asarray, inputs))
        assert len(results) == len(outputs), case.name
        for result, output in zip(results, outputs, strict=True):
            assert result.shape == output.shape, case.name
            np.testing.assert_allclose(result, output, ONNX_RTOL, ONNX_ATOL, err_msg=case.name)
