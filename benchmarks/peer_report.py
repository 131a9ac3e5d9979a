"""What the comparison with peers found, as a table, a plot and the README's tables."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

PEERS = ("torch", "onnxruntime", "JAX", "NumPy")
README = Path(__file__).parents[1] / "README.md"
BEHIND = 0.95
"""A best peer's time over ours from which on downward we are behind, beyond noise."""

Report = dict[str, Any]

README_CELLS = (
    "layer 1x768 float32",
    "layer 128x768 float32",
    "layer 128x768 float32, sliced",
    "layer 4096x1024 float32",
    "layer 16384x4096 float32",
    "layer 16384x16 float32",
    "rms 128x768 float32",
    "rms 4096x1024 float32",
    "rms 16384x16 float32",
    "layer masked 128x768 float32",
    "batch running 32x256 float32",
    "batch running 8x64x28x28 float32",
    "batch running 8x64x28x28 float32, channels last",
    "batch running 32x64x56x56 float32",
    "batch eval 1x64x56x56 float32",
    "batch eval 32x64x56x56 float32",
    "batch masked 64x128x100 float32",
    "instance 32x64x56x56 float32",
    "group 32x64x56x56 float32",
    "group 4x1280x7x7 float32, channels last",
    "layer backward 4096x1024 float32",
    "batch backward 32x64x56x56 float32",
    "module layer eval 1x768 float32",
    "module layer step 128x768 float32",
    "module batch training 32x256 float32",
    "module batch step 8x64x28x28 float32",
)
README_PEERS = ("torch", "onnxruntime", "JAX")
WORDS = {"1": "one thread", "all": "all threads"}


def read(path: Path) -> Report:
    """Return a report that was written before."""
    report: Report = json.loads(path.read_text())
    if report.get("schema") != 2:
        raise SystemExit(f"{path}: expected a report of schema 2, got {report.get('schema', 'one without a schema')}")
    return report


def labels(report: Report) -> list[str]:
    """Return the numbers of threads, the largest first: that is what users have."""
    counts = report["threads"]
    return sorted(counts, key=lambda label: -counts[label])


def words(label: str) -> str:
    return WORDS.get(label, f"{label} threads")


def rows_of(report: Report, label: str, part: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return names and results on a number of threads; of one set of cells, or of all."""
    return [
        (row["cell"], row["threads"][label])
        for row in report["cells"]
        if label in row["threads"] and part in (None, row["set"])
    ]


def means(report: Report, label: str, part: str | None = None) -> dict[str, float]:
    """Return each peer's geometric mean ratio over the cells that it takes part in."""
    rows = rows_of(report, label, part)
    found = {name: [result["over"][name] for _, result in rows if name in result["over"]] for name in PEERS}
    return {name: statistics.geometric_mean(ratios) for name, ratios in found.items() if ratios}


def behind(report: Report, label: str) -> list[tuple[float, str, str]]:
    """Return ratio, cell and peer where the best peer is faster than we are, the worst first."""
    found = []
    for name, result in rows_of(report, label):
        best = result["best"]
        if best and result["over"][best] < BEHIND:
            found.append((result["over"][best], name, best))
    return sorted(found)


def number(value: float | None, factor: float, digits: int) -> str:
    return "n/a" if value is None else f"{value * factor:,.{digits}f}"


def line(row: dict[str, Any]) -> str:
    """Return a cell's results on one line."""
    parts = [f"{row['cell']:50s}"]
    for label, result in row["threads"].items():
        ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in result["over"].items())
        own = f", {result['over_one_thread']:.2f} of one thread" if "over_one_thread" in result else ""
        parts.append(f"{label}: {result['seconds']['numbanorm'] * 1e6:,.1f} us{own}  {ratios}")
    return "  | ".join(parts)


def show(report: Report) -> None:
    """Print the tables and the geometric means."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=170)
    for label in labels(report):
        table = Table(title=f"{words(label)}; times in microseconds, fresh outputs unless told")
        table.add_column("")
        for column in ("ours", "out=", *PEERS, "best peer / ours", "ours in copies", "over one thread"):
            table.add_column(column, justify="right")
        for name, result in rows_of(report, label):
            micro = [number(result["seconds"].get(k), 1e6, 1) for k in ("numbanorm", "numbanorm out", *PEERS)]
            ratio = result["over"].get(result["best"])
            colour = "red" if ratio and ratio < BEHIND else "green"
            shown = f"[{colour}]{ratio:.2f}[/] {result['best']}" if ratio else "n/a"
            rest = number(result["copies"], 1, 2), number(result.get("over_one_thread"), 1, 2)
            table.add_row(name, *micro, shown, *rest)
        console.print(table)
        console.print(*summary(report, label), sep="\n")
    for heading, lines in (("Programs", programs_table(report)), ("Costs over the plain call", costs_table(report))):
        if lines:
            console.print("", heading, *lines, sep="\n", markup=False)


def summary(report: Report, label: str) -> list[str]:
    """Return sentences: the means over all cells and over the first 93, and where we are behind."""
    lines = []
    for part, what in ((None, "all"), ("kernels", "the first")):
        found = means(report, label, part)
        if found and (part is None or len(rows_of(report, label, part)) < len(report["cells"])):
            count = len(rows_of(report, label, part))
            ratios = ", ".join(f"{name} {mean:.2f}" for name, mean in found.items())
            lines.append(f"Geometric mean over {what} {count} cells, {words(label)}: {ratios}.")
    slower = behind(report, label)
    worst = "; ".join(f"{name} ({ratio:.2f}, {peer})" for ratio, name, peer in slower[:5])
    told = f"{len(slower)} cells, first of all {worst}" if len(slower) > 5 else worst or "no cell"
    lines.append(f"Behind the best peer by more than 5 per cent, {words(label)}: {told}.")
    return lines


def cells_table(report: Report) -> list[str]:
    """Return the README's rows: ratios on all threads first."""
    shown = labels(report)
    heads = []
    for label in shown:
        heads += [f"numbanorm, {words(label)}", *(f"{peer} / ours" for peer in README_PEERS)]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    found = {row["cell"]: row["threads"] for row in report["cells"]}
    for name in README_CELLS:
        if not found.get(name):
            continue
        values = []
        for label in shown:
            result = found[name].get(label)
            values.append(f"{result['seconds']['numbanorm'] * 1e6:,.1f} µs" if result else "n/a")
            values += [number(result["over"].get(peer) if result else None, 1, 1) for peer in README_PEERS]
        lines.append(f"| {name.replace(' float32', '')} | {' | '.join(values)} |")
    return lines


def programs_table(report: Report) -> list[str]:
    if not report["programs"]:
        return []
    lines = ["| program | without norm | norm on one thread | by default | default / one |", "|---|--:|--:|--:|--:|"]
    for row in report["programs"]:
        times = [row["seconds"].get(way) for way in ("without", "one", "default")]
        shown = " | ".join("n/a" if t is None else f"{t * 1e3:,.2f} ms" for t in times)
        lines.append(f"| {row['program']} | {shown} | {row['ratio']:.2f} |")
    return lines


def costs_table(report: Report) -> list[str]:
    """Return one row for each option, one column for each norm."""
    if not report["costs"]:
        return []
    norms = list(dict.fromkeys(row["norm"] for row in report["costs"]))
    found = {(row["option"], row["norm"]): row for row in report["costs"]}
    lines = ["| one thread, in cache | " + " | ".join(norms) + " |", "|---|" + "--:|" * len(norms)]
    for option in dict.fromkeys(row["option"] for row in report["costs"]):
        values = []
        for norm in norms:
            row = found.get((option, norm), {})
            if "seconds" not in row:
                values.append("n/a")
            elif option == "plain":
                values.append(f"{row['seconds'] * 1e6:.1f} µs")
            else:
                values.append(f"{row['extra'] * 1e6:+.1f} µs")
        lines.append(f"| {option} | {' | '.join(values)} |")
    return lines


def write_readme(report: Report, path: Path = README) -> None:
    """Put the tables of some cells, the programs and the options between the README's markers."""
    lines = ["float32, fresh outputs:", "", *cells_table(report), ""]
    for label in labels(report):
        lines += [*summary(report, label), ""]
    programs, costs = programs_table(report), costs_table(report)
    if programs:
        lines += ["Norms in NumPy programs, with as many threads as numbanorm takes by default, and with one:", ""]
        lines += [*programs, ""]
    if costs:
        lines += ["What an option costs over the plain call (batch norm in training):", "", *costs, ""]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines.append(f"Measured by `benchmarks/peers.py`: {about}.")
    pattern = r"(<!-- peers: begin -->\n).*(<!-- peers: end -->)"
    text, count = re.subn(pattern, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], path.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"{path.name}: expected one pair of peers markers")
    path.write_text(text)


def plot(report: Report, path: Path) -> None:
    """Draw every peer's time over ours, cell by cell, all threads beside one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = [row["cell"] for row in report["cells"]]
    shown = labels(report)
    size = (4.5 + 4.5 * len(shown), 0.15 * len(names) + 1.4)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", **shared)
    drawn = {}
    for label, panel in zip(shown, axes[0], strict=True):
        over = {name: result["over"] for name, result in rows_of(report, label)}
        for peer, marker, colour in zip(PEERS, "osD^", ("C0", "C1", "C2", "C3"), strict=True):
            points = [(over[name][peer], y) for y, name in enumerate(names) if peer in over.get(name, ())]
            if points:
                drawn[peer] = panel.scatter(*zip(*points, strict=True), marker=marker, s=14, color=colour)
        panel.axvline(1.0, color="black", linewidth=1)
        panel.set_xscale("log")
        panel.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32])
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_yticks(range(len(names)), names, fontsize=6)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_title(words(label), fontsize=9)
        panel.grid(axis="x", alpha=0.25)
    figure.supxlabel("time over numbanorm's: right of the line numbanorm is faster", fontsize=9)
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
