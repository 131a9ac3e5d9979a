"""Norms put together from pieces of their groups give what they give on the whole."""

import numpy as np
import pytest

import numbanorm as nn
from numbanorm.stats import partials as pieces

CHANNEL_SHAPES = [((6, 5, 7, 9), 1), ((6, 7, 9, 5), -1), ((40, 70), 1), ((6, 5, 3), 1), ((5, 6, 40), 0)]


def draw(shape, seed, mean=0.0, dtype=np.float64):
    return (np.random.default_rng(seed).standard_normal(shape) + mean).astype(dtype)


def close(got, wanted, dtype):
    scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
    tolerance = 1e-12 if dtype == np.float64 else 2e-6
    assert got.shape == wanted.shape
    assert float(np.abs(got.astype(np.float64) - wanted).max(initial=0.0)) <= tolerance * scale


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(("shape", "channel_axis"), CHANNEL_SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_backward_from_pieces(shape, channel_axis, dtype, masked):
    x, dy = draw(shape, 0, dtype=dtype), draw(shape, 1, dtype=dtype)
    weight = draw((shape[channel_axis],), 2)
    weight[0] = 0.0
    mask = draw(shape, 3) > -0.5 if masked else None
    options = {"training": True, "channel_axis": channel_axis, "mask": mask}
    _, mean, rstd = nn.batch_norm(x, weight=weight, return_stats=True, **options)
    wanted = nn.batch_norm_backward(dy, x, mean, rstd, weight, **options)
    samples = 1 if channel_axis == 0 else 0
    cut = (slice(None),) * samples + (slice(0, 2),), (slice(None),) * samples + (slice(2, None),)
    sums = [pieces.channel_sums(dy[part], x[part], mean, rstd, channel_axis=channel_axis) for part in cut]
    sum_dy, sum_dyh = (np.sum([s[i] for s in sums], axis=0) for i in (0, 1))
    axes = tuple(a for a in range(len(shape)) if a != channel_axis % len(shape))
    count = (np.ones(shape, bool) if mask is None else mask).sum(axis=axes)
    close(sum_dy, wanted[2], dtype)
    close(sum_dyh, wanted[1], dtype)
    got = [
        pieces.channel_gradient(
            dy[part],
            x[part],
            mean,
            rstd,
            sum_dy / count,
            sum_dyh / count,
            weight,
            channel_axis=channel_axis,
            mask=None if mask is None else mask[part],
        )
        for part in cut
    ]
    close(np.concatenate(got, axis=samples), wanted[0], dtype)


@pytest.mark.parametrize(("shape", "channel_axis"), CHANNEL_SHAPES[:2])
def test_instance_norm_backward_from_pieces(shape, channel_axis):
    x, dy = draw(shape, 0), draw(shape, 1)
    weight = draw((5,), 2)
    _, mean, rstd = nn.instance_norm(x, weight=weight, channel_axis=channel_axis, return_stats=True)
    wanted = nn.instance_norm_backward(dy, x, mean, rstd, weight, channel_axis=channel_axis)
    space = 2 if channel_axis == 1 else 1
    cut = np.split(np.arange(shape[space]), [3])
    part = [(x.take(i, space), dy.take(i, space)) for i in cut]
    sums = [pieces.channel_sums(d, a, mean, rstd, channel_axis=channel_axis) for a, d in part]
    means = [np.sum([s[i] for s in sums], axis=0) / 63 for i in (0, 1)]
    got = [pieces.channel_gradient(d, a, mean, rstd, *means, weight, channel_axis=channel_axis) for a, d in part]
    close(np.concatenate(got, axis=space), wanted[0], np.float64)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("axis", [(2,), (1,), (1, 2)])
def test_layer_norm_from_pieces(norm, axis):
    x, dy = draw((4, 6, 50), 0, mean=1e6 if norm == "layer" else 0.0), draw((4, 6, 50), 1)
    lengths = tuple(x.shape[a] for a in axis)
    weight, bias = draw(lengths, 2), draw(lengths, 3)
    if norm == "layer":
        y, mean, rstd = nn.layer_norm(x, lengths, weight, bias, axis=axis, return_stats=True)
        wanted = nn.layer_norm_backward(dy, x, lengths, mean, rstd, weight, axis=axis)
    else:
        bias = mean = None
        y, rstd = nn.rms_norm(x, lengths, weight, axis=axis, return_stats=True)
        wanted = nn.rms_norm_backward(dy, x, lengths, rstd, weight, axis=axis)
    at = axis[0]
    cut = np.split(np.arange(x.shape[at]), [2])
    part = [(x.take(i, at), dy.take(i, at), weight.take(i, 0), None if bias is None else bias.take(i, 0)) for i in cut]
    got = [pieces.normalize(norm, (1, None, axis), a, mean, rstd, w, b) for a, _, w, b in part]
    close(np.concatenate(got, axis=at), y, np.float64)
    sums = [pieces.row_sums(d, a, mean, rstd, w, axis=axis) for a, d, w, _ in part]
    means = [np.sum([s[i] for s in sums], axis=0) / np.prod(lengths) for i in (0, 1)]
    results = [pieces.row_gradient(d, a, mean, rstd, *means, w, axis=axis) for a, d, w, _ in part]
    close(np.concatenate([r[0] for r in results], axis=at), wanted[0], np.float64)
    close(np.concatenate([r[1] for r in results]), wanted[1], np.float64)
    if norm == "layer":
        close(np.concatenate([r[2] for r in results]), wanted[2], np.float64)


def test_pieces_of_one_element_a_channel():
    """Rows by the strides of x alone, columns for x and dy together: these kernels take one sample at a time."""
    x, dy = draw((4, 6, 5, 3), 0), draw((4, 6, 5, 3), 1)
    _, mean, rstd = nn.instance_norm(x, channel_axis=0, return_stats=True)
    part = x[:, :, :1, :1], dy[:, :, :1, :1]
    sums = pieces.channel_sums(*part[::-1], mean, rstd, channel_axis=0)
    h = (part[0] - mean.T[..., None, None]) * rstd.T[..., None, None]
    close(sums[0], part[1][..., 0, 0].T, np.float64)
    close(sums[1], (part[1] * h)[..., 0, 0].T, np.float64)


@pytest.mark.parametrize("rows", [1, 24])
def test_rows_of_one_element_and_channels_of_one(rows):
    """Weights of one element look alike to the kernels, whether along rows or of a channel."""
    x, dy = draw((rows, 1), 0), draw((rows, 1), 1)
    mean, rstd, mean_g, mean_gh = (draw((rows, 1), seed) for seed in (2, 3, 4, 5))
    weight = np.array([3.0])
    h = (x - mean) * rstd
    for got, wanted in zip(pieces.row_sums(dy, x, mean, rstd, weight, axis=(1,)), (dy * 3, dy * 3 * h), strict=True):
        close(got, wanted, np.float64)
    dx, dweight, dbias = pieces.row_gradient(dy, x, mean, rstd, mean_g, mean_gh, weight, axis=(1,))
    close(dx, rstd * (dy * 3 - mean_g - h * mean_gh), np.float64)
    close(dweight, (dy * h).sum(0), np.float64)
    close(dbias, dy.sum(0), np.float64)
    statistics = mean[0], rstd[0], mean_g[0], mean_gh[0]
    dx = pieces.channel_gradient(dy, x, *statistics, weight)
    close(dx, rstd[0] * 3 * (dy - mean_g[0] - (x - mean[0]) * rstd[0] * mean_gh[0]), np.float64)
