"""Kernels with one thing wrong: the fuzzer must see each. `python tests/fuzz/mutations.py` takes about six minutes.

Each mutation is one edit of one file in a copy of the package; the fuzzer then calls the kernels as plain Python, first
as they are, then with small chunks and tiles. A mutation whose text is no longer found is an error: take another place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "numbanorm"

MUTATIONS = [
    ("cpu/welford.py", "share = count_b / count", "share = count_a / count"),
    ("cpu/welford.py", "delta * delta * count_a * share", "delta * delta * count_b * share"),
    ("cpu/welford.py", "np.sqrt(variance + eps)", "np.sqrt(variance + eps * 1.001)"),
    ("cpu/welford.py", "TINY = 1e-30", "TINY = -1.0"),
    ("cpu/rows.py", "FLOAT32_SAFE = 1e30", "FLOAT32_SAFE = 1e45"),
    ("cpu/sums.py", "pivot + sum_of_lanes(s) / n", "pivot + sum_of_lanes(s) / (n + 1)"),
    ("cpu/rows.py", "of = of + 1 if of + 1 < g.size", "of = of if of + 1 < g.size"),
    ("cpu/rows.py", "y, b - held)", "y, b)"),
    ("cpu/rows.py", "held > 0 and after == b", "held > 0"),
    ("cpu/sums.py", "near_q + q, k", "q, k"),
    ("cpu/rows.py", "return y_at + g.R1, rest", "return y_at, rest"),
    ("cpu/rows.py", "written = stop if head == 0 or stop < g.R1 else stop - step", "written = stop"),
    ("cpu/sums.py", "at = start + i * g.x_K1 + r * g.x_R0 + j", "at = start + r * g.x_R0 + j"),
    ("cpu/rows_backward.py", "channel = first + i + c", "channel = first + c"),
    ("cpu/rows.py", "channel = k1 * g.R1 + j if g.size", "channel = j if g.size"),
    ("cpu/columns.py", "_EXACT = 0, 3 * TILE, 6 * TILE, 9 * TILE", "_EXACT = 0, 3 * TILE, 6 * TILE, 8 * TILE"),
    ("cpu/columns.py", "shift_of(offset, mean - np.float64(hi), gain)", "shift_of(offset, 0.0, gain)"),
    ("cpu/columns.py", "first = head % lanes", "first = 0"),
    ("cpu/columns.py", "chunk = unit // tiles % pieces * g.piece_chunks", "chunk = unit // tiles % pieces"),
    ("cpu/columns.py", "stop = least(chunk + g.piece_chunks, g.chunks)", "stop = least(chunk + 1, g.chunks)"),
    ("cpu/columns.py", "fused(d, d, fused(c, c, fused(b, b", "fused(c, d, fused(c, c, fused(b, b"),
    ("cpu/rows_backward.py", "return total * (1.0 / count)", "return total * (1.0 / (count + 1.0))"),
    ("cpu/along_backward.py", "return fused(d, h, of_h), of_d + d", "return fused(d, h, of_h), d"),
    ("cpu/along_backward.py", "* scale, fused(d, h, of_h), of_d + d", "* scale, of_h, of_d + d"),
    ("cpu/rows_backward.py", "slab * 2 * size + i", "i"),
    ("cpu/along_backward.py", "b = _row(maps, x, row + 1,", "b = _row(maps, x, row,"),
    ("cpu/along_backward.py", "dx_at += g.K1 * g.R1", "dx_at += g.R1 + 1"),
    ("cpu/along_backward.py", "store_sums(e, f, g, h, sums", "store_sums(e, f, h, g, sums"),
    ("cpu/sums.py", "c = d = (base + n - 1) * g.x_K0", "c = d = a"),
    ("cpu/rows.py", "load_some(no, bias, j, part)", "load_some(no, bias, 0, part)"),
    ("cpu/rows.py", "starts = first * g.x_K0, first * g.R1", "starts = base * g.x_K0, first * g.R1"),
    ("cpu/along_backward.py", "dx_at += 2 * dx_step", "dx_at += dx_step"),
    ("cpu/along_backward.py", "load(means, group * mean_step)", "load(means, 0)"),
    ("cpu/along_backward.py", "sums, n, dy_at, g.y_K0, x_at", "sums, n - 1, dy_at, g.y_K0, x_at"),
    ("cpu/along_backward.py", "load(maps, _E + i)", "load(maps, _C + i)"),
    ("cpu/columns.py", "_add_rows(x, at + TOGETHER * stride,", "_add_rows(x, at + stride,"),
    ("cpu/columns.py", "load_lanes(no, turned, _TURNED + step)", "load_lanes(no, turned, _TURNED)"),
    ("cpu/rows.py", "(a + 3 * a_row, t + 3 * row, none)", "(a + 2 * a_row, t + 3 * row, none)"),
    ("cpu/rows.py", "(a + 2 * a_row, t + 2 * row, none)", "(a + 2 * a_row, t + row, none)"),
    ("cpu/welford.py", "else bias - low", "else bias + low"),
    ("cpu/rows.py", "run[1] + g.y_K1", "run[1] + g.x_K1 + 1"),
    ("cpu/rows.py", "base + i, count, mean, m2, rstd", "base, count, mean, m2, rstd"),
    ("cpu/rows.py", "(k1, j) if g.inner == g.R1", "(0, j) if g.inner == g.R1"),
    ("cpu/rows.py", "load_after(hi, bias, channel - held, held)", "load_after(hi, bias, channel, held)"),
    ("cpu/rows.py", "store_after(v, total, t - held, held)", "store_after(v, total, t, held)"),
    ("cpu/rows.py", "held = 0 if joins else held", "held = 0"),
    (
        "cpu/rows.py",
        "store_part(v, total, t + i, part)\n    store_part(_affine",
        "store_part(v, total, t, part)\n    store_part(_affine",
    ),
    ("cpu/columns.py", "np.int64(_TOTAL), _TOTAL + copy, np", "np.int64(_TOTAL), _TOTAL + once, np"),
    ("cpu/columns_backward.py", "add_to(gradients, channel, b)", "store(gradients, channel, b)"),
    ("cpu/columns_backward.py", "add_to(gradients, channel, sum_of", "store(gradients, channel, sum_of"),
    ("cpu/columns_backward.py", "load(means, (group) * g.mean_step)", "load(means, group)"),
    ("cpu/columns_backward.py", "group = group + 1 if group + 1 < start + g.K1 else start", "group = start"),
    ("cpu/columns_backward.py", "load(total, TILE + copy + i)", "load(total, copy + i)"),
    (
        "cpu/launch.py",
        'g["chunks"] = -(-r0 // g["chunk_runs"]) * g["across"]',
        'g["chunks"] = r0 // g["chunk_runs"] * g["across"]',
    ),
    ("cpu/welford.py", "1.0 / (eps if norm < eps else norm)", "1.0 / (norm if norm > eps else eps)"),
    ("cpu/welford.py", "_L2 = SCALES.index(L2)", "_L2 = -1"),
    ("cpu/rows_backward.py", "own = unit if size == 1 else slab", "own = unit"),
    ("cpu/launch.py", "slabs * plan.layout.view[2] if", "slabs if"),
    (
        "cpu/launch.py",
        'g["mean_step"], g["count_step"] = plan.layout.centred',
        'g["mean_step"], g["count_step"] = False',
    ),
    ("cpu/backward.py", "CLAMPED = 1e-5", "CLAMPED = 1.0"),
    ("cpu/backward.py", 'rstd.ravel("K") < 1.0', "rstd.reshape(-1) < 1.0"),
    ("cpu/backward.py", "sums = np.empty((2, self._work.plan.layout.groups))", "sums = np.zeros((2, 1))"),
    (
        "cpu/backward.py",
        "gradients[0], gradients[1] = sums[1], sums[0]",
        "gradients[0], gradients[1] = sums[0], sums[1]",
    ),
    ("cpu/guard.py", "start < at + high and at + low < stop", "start < at + high and at + high < stop"),
    (
        "cpu/running.py",
        "squares += load(stats, M2 * groups + group) / most(n - 1.0, 1.0)",
        "squares += load(stats, M2 * groups + group) / n",
    ),
    ("cpu/running.py", "_move(mean, channel, momentum, total / seen)", "_move(mean, channel, momentum, total)"),
    ("cpu/running.py", "new_var if n > 0.0 else old_var", "new_var"),
    ("cpu/running.py", "sample * g.run_sample_step + channel", "sample + channel"),
    ("cpu/running.py", "if not is_shared(job):", "if is_shared(job):"),
    ("cpu/claims.py", "after = unit + 1", "after = unit + 2"),
]
"""The file, what stands there once, and what stands there instead."""


def caught(site: Path) -> bool:
    """Tell whether a round of the fuzzer fails on the package in a folder."""
    environment = os.environ | {"PYTHONPATH": str(site), "NUMBA_DISABLE_JIT": "1", "NUMBA_NUM_THREADS": "2"}
    for options in ((), ("--shrunk",)):
        run = [sys.executable, str(HERE / "run.py"), "--calls", "4000", "--few-dtypes", "--most", "1", *options]
        if subprocess.run(run, env=environment, capture_output=True, check=False).returncode != 0:
            return True
    return False


def main() -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        package = shutil.copytree(PACKAGE, site / "numbanorm")
        assert not caught(site), "the fuzzer fails on the package as it is"
        for name, old, new in MUTATIONS:
            path = Path(package) / name
            text = path.read_text()
            assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
            path.write_text(text.replace(old, new))
            seen = caught(site)
            path.write_text(text)
            missed += not seen
            change = f"{old} -> {new}".replace("\n        ", "; ")
            print(f"{'caught' if seen else 'MISSED'}: {name}: {change}", flush=True)
    print(f"{len(MUTATIONS) - missed} of {len(MUTATIONS)} mutations were caught")
    return min(missed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
