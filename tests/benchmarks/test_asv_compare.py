"""`suite.py compare` tells a slower kernel from a change that changes nothing, in a scratch clone."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("numbanorm/cpu/rows.py")
COMPARED = r"bench_throughput\.Seconds\.time_forward\('(LayerNorm|RMSNorm) 4096x1024 float32'\)"
"""Far from the sizes of caches: in one of 1 MiB a copy of 128 x 768 takes 9 or 15 us, as its pages happen to lie."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="measures time: run it without other tests"),
]


class AllOfItAgain(ast.NodeTransformer):
    """Let every `prange` loop of a module be followed by itself: twice the work, which is clear of any noise."""

    found = 0

    def visit_For(self, node: ast.For) -> list[ast.For]:
        loop = ast.unparse(node.iter)
        if not loop.startswith("prange("):
            return [node]
        self.found += 1
        again = ast.For(node.target, node.iter, node.body, [])
        return [node, ast.fix_missing_locations(ast.copy_location(again, node))]


def slower(code: str) -> str:
    transformer = AllOfItAgain()
    changed = ast.unparse(transformer.visit(ast.parse(code)))
    assert transformer.found, f"{KERNELS} has no prange loop: this test must learn how the kernels look now"
    return changed


def same(code: str) -> str:
    return code + "\n# A comment, and nothing else.\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clone with two commits on top: `slower` and `same`; its suite is that of the working tree."""
    pytest.importorskip("asv", reason="asv is not installed (it is in the bench extra)")
    pytest.importorskip("virtualenv", reason="virtualenv is not installed (it is in the bench extra)")
    folder = tmp_path_factory.mktemp("scratch") / "numbanorm"
    git("clone", "-q", "--no-hardlinks", str(ROOT), str(folder))
    shutil.copy(ROOT / "asv.conf.json", folder)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
    own = ("-C", str(folder))
    changes: tuple[Callable[[str], str], ...] = (slower, same)
    git(*own, "checkout", "-q", "--detach")
    for change in changes:
        name = change.__name__
        git(*own, "checkout", "-q", "-b", name, "HEAD" if change is slower else "slower^")
        (folder / KERNELS).write_text(change((folder / KERNELS).read_text()))
        git(*own, "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-q", "-m", name, str(KERNELS))
    return folder


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True)


def compare(clone: Path, name: str) -> tuple[int, str]:
    """Return the exit status and the output of a comparison of a branch with its parent."""
    command = [sys.executable, "benchmarks/suite.py", "compare", f"{name}^", name, "--bench", COMPARED, "--rounds", "2"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA", "PYTHON"))}
    done = subprocess.run(
        command, cwd=clone, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    print(done.stdout)
    assert "Running 2 total benchmarks (2 commits * 1 environments * 1 benchmarks)" in done.stdout
    return done.returncode, done.stdout


def test_slower_kernel_is_caught(clone: Path) -> None:
    status, output = compare(clone, "slower")
    assert status == 1
    caught = [line for line in output.splitlines() if line.startswith("| +")]
    assert len(caught) == 4  # both, and both once more


def test_no_change_passes(clone: Path) -> None:
    status, _ = compare(clone, "same")
    assert status == 0
