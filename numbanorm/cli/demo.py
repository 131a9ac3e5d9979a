"""The demonstration: every norm on real data, against a float64 reference, plain NumPy and a trained model."""
# ruff: noqa: RUF001 (γ and × are meant)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.threads import get_num_threads, set_num_threads
from ..layers import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, Norm, RMSNorm

Array = NDArray[Any]

BUDGET = 0.3
"""Seconds to spend on timing one norm."""


def load(name: str) -> dict[str, Array]:
    """Load one of the data sets that come with the package.

    Parameters
    ----------
    name : str
        ``"minilm_tokens"`` or ``"astronaut_patches"``.

    Returns
    -------
    dict of str to ndarray
        Its arrays.

    Examples
    --------
    >>> load("astronaut_patches")["x"].shape
    (16, 3, 64, 64)
    """
    with resources.files("numbanorm").joinpath("data", f"{name}.npz").open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


@dataclass(frozen=True)
class Trial:
    """A norm on data, and the same norm as one would write it in plain NumPy.

    Attributes
    ----------
    data : str
        What the data are.
    norm : Norm
        The layer.
    x : ndarray
        The data.
    """

    data: str
    norm: Norm
    x: Array

    @property
    def name(self) -> str:
        """Name of the norm."""
        return type(self.norm).__name__

    def plain(self, dtype: Any) -> Array:
        """Normalize in plain NumPy, computing in `dtype`."""
        x, norm, layout = self.x.astype(dtype, copy=False), self.norm, self.norm.layout(self.x.shape)
        axes = layout.reduced_axes
        if layout.centred:
            moved, square = x - x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        else:
            moved, square = x, np.mean(x * x, axes, keepdims=True)
        y = moved * layout.record.rstd(square, layout.count, norm.eps)
        across = (-1, 1, 1) if x.ndim == 4 else (-1,)  # patches have their channels first, tokens last
        if norm.weight is not None:
            y = y * norm.weight.astype(dtype).reshape(across)
        if norm.bias is not None:
            y = y + norm.bias.astype(dtype).reshape(across)
        return np.asarray(y)

    def error(self) -> float:
        """Return the largest difference from plain NumPy in float64."""
        return difference(self.norm(self.x), self.plain(np.float64))

    def seconds(self, budget: float) -> tuple[float, float]:
        """Time plain NumPy in float32 and the layer, in turns, for about `budget` seconds; return the medians."""
        times: tuple[list[float], list[float]] = [], []
        calls: tuple[Callable[[], Array], ...] = (lambda: self.plain(np.float32)), (lambda: self.norm(self.x))
        for call in calls:
            call()
        end = perf_counter() + budget
        while perf_counter() < end or len(times[0]) < 5:
            for call, spent in zip(calls, times, strict=True):
                start = perf_counter()
                call()
                spent.append(perf_counter() - start)
        return median(times[0]), median(times[1])


def trials(tokens: dict[str, Array], patches: Array) -> list[Trial]:
    """Return every norm on the data that it suits.

    Parameters
    ----------
    tokens : dict of str to ndarray
        The token embeddings with the weights of the model's own LayerNorm.
    patches : ndarray
        The photograph's patches.
    """
    x, size = tokens["x"], tokens["x"].shape[-1]
    layer = LayerNorm(size, eps=float(tokens["eps"])).load_state_dict({k: tokens[k] for k in ("weight", "bias")})
    channels = patches.shape[1]
    return [
        Trial("tokens", layer, x),
        Trial("tokens", RMSNorm(size, eps=1e-6), x),
        Trial("tokens", BatchNorm(size, channel_axis=-1), x),
        Trial("patches", BatchNorm(channels), patches),
        Trial("patches", InstanceNorm(channels, affine=True), patches),
        Trial("patches", GroupNorm(1, channels), patches),
    ]


def padding(tokens: dict[str, Array], more: int = 37) -> Iterator[tuple[str, list[str]]]:
    """Show what padded positions do to BatchNorm, to BatchNorm with a mask, and to LayerNorm.

    Parameters
    ----------
    tokens : dict of str to ndarray
        The token embeddings.
    more : int, optional
        Positions of padding to append.

    Yields
    ------
    tuple of str and list of str
        What is compared, and how it is for each of the three.
    """
    x, mask = tokens["x"], tokens["mask"]
    sentences, _, size = x.shape
    pad = np.broadcast_to(x[~mask][-1], (sentences, more, size))
    longer, longer_mask = np.concatenate([x, pad], axis=1), np.pad(mask, ((0, 0), (0, more)))

    def results(x: Array, mask: Array) -> tuple[Array, Array, Array]:
        batch, layer = BatchNorm(size, channel_axis=-1), LayerNorm(size)
        return batch(x)[mask], batch(x, mask=mask[..., None])[mask], layer(x)[mask]

    before, after = results(x, mask), results(longer, longer_mask)
    words = x[mask].astype(np.float64)
    off = np.abs(x.mean((0, 1), dtype=np.float64) - words.mean(0)) / words.std(0)
    yield "positions that share a mean", [f"{mask.size}", f"{mask.sum()}", "1"]
    yield "a mean is off by up to", [f"{off.max():.1f} std", "0 std", ""]
    yield "words come out with a std of", [f"{_std(y):.2f}" for y in before]
    yield (
        f"{more} more pads move words by up to",
        [small(difference(*pair)) for pair in zip(before, after, strict=True)],
    )


def company(tokens: dict[str, Array], patches: Array) -> Iterator[tuple[str, list[str]]]:
    """Show whose result depends on the mode, and on what else is in the batch.

    Parameters
    ----------
    tokens : dict of str to ndarray
        The token embeddings.
    patches : ndarray
        The photograph's patches.

    Yields
    ------
    tuple of str and list of str
        What is compared, and the difference it makes to BatchNorm and LayerNorm on tokens, and to BatchNorm and
        GroupNorm on patches.
    """
    x, mask = tokens["x"], tokens["mask"][..., None]
    size, channels = x.shape[-1], patches.shape[1]
    found = [
        _company(BatchNorm(size, channel_axis=-1), x, mask),
        _company(LayerNorm(size), x, None),
        _company(BatchNorm(channels), patches, None),
        _company(GroupNorm(1, channels), patches, None),
    ]
    names = "alone or in a batch, training", "alone or in a batch, evaluation", "training or evaluation"
    for name, values in zip(names, zip(*found, strict=True), strict=True):
        yield name, [small(value) for value in values]


def _company(norm: Norm, x: Array, mask: Array | None) -> tuple[float, float, float]:
    """Train on batches of a quarter of the data; return how much the first sample depends on company and mode."""

    def first(samples: int) -> Array:
        y = norm(x[:samples], mask=None if mask is None else mask[:samples])[0]
        return np.asarray(y if mask is None else y[mask[0, :, 0]])

    for _ in range(10):
        for part in np.split(np.arange(len(x)), 4):
            norm(x[part], mask=None if mask is None else mask[part])
    norm.eval()
    alone, among = first(1), first(len(x))
    norm.train()
    return difference(first(1), first(len(x))), difference(alone, among), difference(first(len(x)), among)


def difference(a: Array, b: Array) -> float:
    """Return the largest difference between two arrays."""
    return float(np.abs(a.astype(np.float64) - b).max())


def small(value: float) -> str:
    """Write a difference: ``"0.25"``, ``"3e-07"``, or ``"exactly 0"``."""
    if value == 0:
        return "exactly 0"
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}"


def run(console: Console) -> None:
    """Run the demonstration, on one thread.

    Parameters
    ----------
    console : rich.console.Console
        Where to print it.
    """
    threads = get_num_threads()
    set_num_threads(1)  # as NumPy: a fair race, and half as many kernels to compile
    try:
        _run(console)
    finally:
        set_num_threads(threads)


def _run(console: Console) -> None:
    tokens, patches = load("minilm_tokens"), load("astronaut_patches")["x"]
    runs = trials(tokens, patches)

    _heading(console, "The data")
    _say(
        console,
        f"[bold]tokens[/] {tokens['x'].shape} float32: {len(tokens['x'])} English sentences on their way into a "
        "LayerNorm of MiniLM, a trained language model. The axes are (sentence, position, feature). Short sentences "
        f"are padded: only {tokens['mask'].sum()} of the {tokens['mask'].size} positions are words.",
        f"[bold]patches[/] {patches.shape} {patches.dtype}: squares of a photograph of an astronaut (NASA). The axes "
        "are (patch, colour, row, column), the values go from 0 to 255.",
    )

    _heading(console, "What the norms do")
    with console.status("Compiling kernels; from the second time on they are read from disk"):
        rows = [_effect(trial) for trial in runs]
    _table(console, ["", "norm", "means,\nvariances", "γ and β", "mean\nbefore → after", "std\nbefore → after"], rows)
    _say(
        console,
        "A norm subtracts a mean and divides by a standard deviation (std): the result has mean 0 and std 1. The norms "
        "differ in which elements share a mean, and [bold]numbanorm explain[/] shows which. RMSNorm subtracts none. "
        "This LayerNorm carries the weight γ and the bias β that the model has learned, which change the std again.",
    )

    _heading(console, "How exact, and how fast")
    with console.status("Measuring"):
        rows = [_measured(trial) for trial in runs]
    _table(console, ["", "norm", "largest error", "NumPy", "numbanorm", "faster"], rows)
    model = difference(runs[0].norm(runs[0].x), tokens["expected"])
    _say(
        console,
        "The error is the largest difference from the same formula in NumPy with float64. The times are medians of "
        "calls in turns, on one thread and after compilation; NumPy computes in float32, as one would write it.",
        "What the model's own LayerNorm makes of these tokens is known, too: the largest difference is "
        f"[bold]{small(model)}[/].",
    )

    _heading(console, "What padding does")
    _table(console, ["", "BatchNorm", "BatchNorm\nwith mask=", "LayerNorm"], [[n, *v] for n, v in padding(tokens)])
    _say(
        console,
        "BatchNorm averages over all positions of all sentences. It takes padding for words, unless a mask tells it "
        "which are words; then the padding no longer counts. LayerNorm looks at one token at a time, so padding "
        "cannot disturb it.",
    )

    _heading(console, "Training and evaluation")
    names = [
        "difference for one sample",
        *("BatchNorm\ntokens", "LayerNorm\ntokens", "BatchNorm\npatches", "GroupNorm\npatches"),
    ]
    _table(console, names, [[n, *v] for n, v in company(tokens, patches)])
    _say(
        console,
        "In training, BatchNorm's result for a sentence, or a patch, depends on the others in the batch. In evaluation "
        "it uses the statistics that it has collected in training: the others no longer matter, but the result is not "
        "the one of training. LayerNorm and GroupNorm make no difference.\n",
    )


def _effect(trial: Trial) -> list[str]:
    layout, y = trial.norm.layout(trial.x.shape), trial.norm(trial.x)
    means = (_mean(trial.x), _mean(y)), (_std(trial.x), _std(y))
    return [
        trial.data,
        trial.name,
        f"{layout.groups} each" if layout.centred else f"{layout.groups} squares",
        str(layout.affine_shape),
        *(f"{before:.2f} → {round(after, 2) + 0:.2f}" for before, after in means),  # + 0: no "-0.00"
    ]


def _mean(x: Array) -> float:
    return float(x.mean(dtype=np.float64))


def _std(x: Array) -> float:
    return float(x.std(dtype=np.float64))


def _measured(trial: Trial) -> list[str]:
    numpy, ours = trial.seconds(BUDGET)
    return [
        trial.data,
        trial.name,
        small(trial.error()),
        f"{numpy * 1e3:.2f} ms",
        f"{ours * 1e3:.3f} ms",
        f"{numpy / ours:.1f}×",
    ]


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def _say(console: Console, *paragraphs: str) -> None:
    for paragraph in paragraphs:
        console.print(paragraph)


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 or name == "norm" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
