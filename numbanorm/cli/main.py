"""The commands ``numbanorm explain``, ``demo``, ``apply``, ``stats``, ``warmup`` and ``info``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..core.norms import NORMS, record_of
from ..stats.moments import Moments
from .explain import Case, Reading, compare, describe, textbook

_WIDTH = 100  # longer lines are hard to read
_MOST_ROWS = 20  # of a table of statistics
_PICTURE = click.Path(dir_okay=False, path_type=Path)
_ARRAY = click.Path(path_type=Path)


class _Norm(click.ParamType):  # type: ignore[type-arg] # generic in later versions
    """The name of a norm, from the table as it is when a command runs: norms may be registered after the import."""

    name = "norm"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return click.Choice(list(NORMS)).convert(value, param, ctx)

    def get_metavar(self, *given: Any, **named: Any) -> str | None:
        return click.Choice(list(NORMS)).get_metavar(*given, **named)

    def shell_complete(self, *given: Any) -> Any:
        return click.Choice(list(NORMS)).shell_complete(*given)


_HELP = """Show what batch, layer, instance, group, RMS and L2 norm do, and how fast.

\b
Who shares a mean, and who a weight, in words and as a picture:
    numbanorm explain batch --shape 4,6,8,8 -o batch.png
The same for four norms side by side:
    numbanorm explain batch --shape 4,6,8,8 --all -o norms.png
A file of any size, larger than memory too:
    numbanorm apply x.npy -o y.npy --norm layer
    numbanorm stats x.npy --axis 0,2,3
"""


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH})
@click.version_option(package_name="numbanorm", prog_name="numbanorm", message="%(prog)s %(version)s")
def cli() -> None:
    """Run a command of the command line."""


@cli.command(short_help="Explain a norm over a shape, in words and as a picture.")
@click.argument("norm", type=_Norm())
@click.option("--shape", required=True, metavar="N,C,...", help="Shape of the array, such as 4,6,8,8.")
@click.option("--groups", type=int, metavar="G", help="Number of groups of channels, for group norm.")
@click.option("--channel-axis", type=int, metavar="AXIS", help="Axis of the channels: 1, or -1 for channels last.")
@click.option("--axis", metavar="AXIS,...", help="Axes to average over, for layer norm and its like: -1, or 1,2,3.")
@click.option("--all", "side_by_side", is_flag=True, help="Put it beside batch, layer, instance and group norm.")
@click.option("-o", "--output", type=_PICTURE, metavar="FILE", help="Draw it too, as .png or .svg.")
def explain(
    norm: str,
    shape: str,
    groups: int | None,
    channel_axis: int | None,
    axis: str | None,
    side_by_side: bool,
    output: Path | None,
) -> None:
    """Explain what a norm does to an array of a shape: in words, and as a picture with -o.

    Two axes are read as (N, C) and four as (N, C, H, W). Three are read as (N, C, L), or as (sentence, position,
    embedding) if the channels are last, which they are for layer norm and its like unless --channel-axis says
    otherwise.
    """
    with _one_line_errors():
        if output is not None:
            _check_output(output)
        lengths = _integers("--shape", shape)
        if channel_axis is None:
            channel_axis = -1 if len(lengths) == 3 and not record_of(norm).by_channel else 1
        reading = Reading.of(lengths, channel_axis)
        axes = None if axis is None else _integers("--axis", axis)
        case = Case.of(norm, reading, num_groups=groups, axis=axes)
        cases = [case]
        if side_by_side:
            cases = [Case.of(name, reading, num_groups=groups, axis=axes) for name in textbook(norm)]
    console = _console()
    _print_words(console, case)
    if side_by_side:
        _print_comparison(console, cases)
    if len(lengths) == 3 and not reading.tokens:
        console.print("For an array (sentence, position, embedding), add --channel-axis -1.\n", style="dim")
    if output is not None:
        _write_picture(console, cases, output)


@cli.command(short_help="Run every norm on real data.")
@click.option(
    "-o",
    "--output",
    type=_PICTURE,
    metavar="FILE",
    default="numbanorm-demo.png",
    show_default=True,
    help="Where to draw the norms side by side, as .png or .svg.",
)
def demo(output: Path) -> None:
    """Run every norm on real data, sentences and a photograph, and show what each is good for.

    Takes a few seconds, and some more while the kernels are compiled for the first time.
    """
    with _one_line_errors():
        _check_output(output)
    from .demo import run

    console = _console()
    run(console)
    _write_picture(console, [Case.of(name, Reading.of((4, 6, 8, 8))) for name in textbook()], output)


@cli.command(short_help="Normalize an array in a file of any size.")
@click.argument("source", metavar="IN", type=_ARRAY)
@click.option("-o", "--output", required=True, type=_ARRAY, metavar="OUT", help="Where to, .npy or .zarr; may be IN.")
@click.option("--norm", required=True, type=_Norm(), help="The norm.")
@click.option("--groups", type=int, metavar="G", help="Number of groups of channels, for group norm.")
@click.option("--channel-axis", type=int, default=1, show_default=True, metavar="AXIS", help="Axis of the channels.")
@click.option("--axis", metavar="AXIS,...", help="Axes to average over, for layer norm and its like: -1 if not given.")
@click.option("--eps", type=float, help="Keeps it from dividing by 0: the norm's usual one if not given.")
@click.option("--weight", type=_ARRAY, metavar="FILE", help="gamma, as .npy.")
@click.option("--bias", type=_ARRAY, metavar="FILE", help="beta, as .npy.")
@click.option("--moments", type=_ARRAY, metavar="FILE", help="For batch norm: use these, from stats --save.")
def apply(
    source: Path,
    output: Path,
    norm: str,
    groups: int | None,
    channel_axis: int,
    axis: str | None,
    eps: float | None,
    weight: Path | None,
    bias: Path | None,
    moments: Path | None,
) -> None:
    """Normalize the array in IN, a .npy file or a Zarr folder, into OUT.

    Neither has to fit in memory. OUT appears, or is replaced, when all of it is on the disk.
    """
    from .. import files

    with _one_line_errors(), _progress("normalizing") as show:
        files.apply(
            source,
            output,
            norm,
            num_groups=groups,
            weight=_parameter("--weight", weight),
            bias=_parameter("--bias", bias),
            eps=eps,
            axis=None if axis is None else _integers("--axis", axis),
            channel_axis=channel_axis,
            moments=None if moments is None else Moments.load(moments),
            progress=show,
        )
    _console().print(Text.assemble("The result is in ", (str(output), "bold")), soft_wrap=True)


@cli.command(short_help="Count, mean and deviation of an array in a file of any size.")
@click.argument("source", metavar="IN", type=_ARRAY)
@click.option("--axis", metavar="AXIS,...", help="Axes along which to take them, such as 0,2,3; all if not given.")
@click.option("--save", type=_ARRAY, metavar="FILE", help="Write them to an .npz file, for apply --moments.")
@click.option("--json", "as_json", is_flag=True, help="Print all of them as JSON.")
def stats(source: Path, axis: str | None, save: Path | None, as_json: bool) -> None:
    """Take count, mean, variance and standard deviation of the array in IN, a .npy file or a Zarr folder."""
    from .. import files

    with _one_line_errors():
        axes = None if axis is None else _integers("--axis", axis)
        with _progress("reading") as show:
            moments = files.stats(source, axes, progress=show)
        if save is not None:
            moments.save(save)
    if as_json:
        click.echo(_as_json(moments))
    else:
        _print_moments(_console(), moments)


@cli.command(short_help="Show versions, processor, threads and cache.")
def info() -> None:
    """Show versions, processor, threads and the kernels' cache on disk."""
    from ..calls.config import config

    _print_pairs(_console(), config().items())


@cli.command(short_help="Compile the kernels ahead.")
@click.option("--norms", metavar="NORM,...", show_default="all", help="Norms to compile.")
@click.option("--dtypes", metavar="DTYPE,...", default="float32", show_default=True, help="Dtypes of the inputs.")
@click.option("--forward", is_flag=True, help="Leave out the kernels that training needs.")
def warmup(norms: str | None, dtypes: str, forward: bool) -> None:
    """Compile the kernels ahead, into the cache on disk, so that no program has to wait for them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..layers.warmup import warmup as compile_ahead

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = _console()
    with _one_line_errors(), Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling")

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{name or 'done':<40}")

        chosen = list(NORMS) if norms is None else _words(norms)
        compile_ahead(chosen, _words(dtypes), backward=not forward, progress=show)


def _console() -> Console:
    console = Console(highlight=False)
    console.width = min(console.width, _WIDTH)
    return console


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _integers(option: str, text: str) -> tuple[int, ...]:
    parts = text.strip().strip("()[]").rstrip(",").split(",")
    if not all(re.fullmatch(r"\s*-?\d{1,18}\s*", part) for part in parts):
        raise ValueError(f"{option}: expected integers with commas between them, such as 4,6,8, got {text!r}")
    return tuple(map(int, parts))


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--output: expected a name that ends in .png or .svg, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--output: there is no folder {str(path.parent)!r}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what is wrong with the input into one line, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise click.ClickException(str(error)) from error


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with rate and time left, where there is a terminal; yield what is told of bytes done and in all."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _parameter(option: str, path: Path | None) -> np.ndarray | None:
    """Read a weight or bias."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except ValueError as error:
        raise ValueError(f"{option}: expected a .npy file of floats, got {str(path)!r}: {error}") from error


def _print_moments(console: Console, moments: Moments) -> None:
    mean, std = np.asarray(moments.mean), np.asarray(moments.std())
    console.print(f"\n{np.max(moments.count, initial=0):,} elements for each of {mean.size:,} means\n")
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("index", "mean", "variance", "standard deviation"):
        table.add_column(title, justify="right")
    indices = list(islice(np.ndindex(mean.shape), _MOST_ROWS))
    for index in indices:
        row = mean[index], std[index] ** 2, std[index]
        table.add_row(", ".join(map(str, index)) or "all", *(f"{value:.9g}" for value in row))
    console.print(table)
    if mean.size > len(indices):
        console.print(
            f"... and {mean.size - len(indices):,} more: --json prints, --save writes all of them\n", style="dim"
        )


def _as_json(moments: Moments) -> str:
    """Return JSON with count, mean, var and std; what is not finite is null."""
    shown = {}
    for name, values in (("mean", moments.mean), ("var", moments.var()), ("std", moments.std())):
        spelled = np.asarray(values, object)
        spelled[~np.isfinite(values)] = None
        shown[name] = spelled.tolist()
    return json.dumps({"count": np.asarray(moments.count).tolist(), **shown})


def _print_words(console: Console, case: Case) -> None:
    shape = f"({', '.join(case.reading.names)}) = {case.layout.shape}"
    console.print(Text.assemble("\n", (case.name, "bold"), f" of an array {shape}\n"))
    _print_pairs(console, describe(case))
    console.print()


def _print_pairs(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        table.add_row(name, Text(value))
    console.print(Padding(table, (0, 0, 0, 2)))


def _print_comparison(console: Console, cases: Sequence[Case]) -> None:
    many = len(cases) > 4
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0 if many else 1), show_edge=not many)
    table.add_column(style="cyan")
    for case in cases:
        table.add_column(case.name.replace(" (", "\n("), justify="right", overflow="fold")
    for name, values in compare(cases):
        table.add_row(name, *values)
    console.print(table)


def _write_picture(console: Console, cases: Sequence[Case], path: Path) -> None:
    from . import figures  # only now: matplotlib takes its time

    with _one_line_errors():
        figures.save(figures.draw(cases), path)
    console.print(Text.assemble("The picture is in ", (str(path), "bold")), soft_wrap=True)
