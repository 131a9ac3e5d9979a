"""The examples run, and show what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "digits", module)
    spec.loader.exec_module(module)
    return module


def test_digits(digits: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "digits.png"
    worst, losses = digits.main(picture)
    assert worst < 1e-8  # float64, step 1e-5
    assert len(losses) == 4
    for curve in losses.values():
        assert len(curve) == digits.EPOCHS
        assert curve[-1] < 0.5 * curve[0]
    for rate in digits.LEARNING_RATES:
        assert losses["BatchNorm", rate][-1] < 0.5 * losses["plain", rate][-1]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("BatchNorm, eval()") == printed.count("BatchNorm, still train()") == 2


def test_the_picture_beside_the_script_is_there() -> None:
    assert (EXAMPLES / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "(digits.png)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_cluster(tmp_path: Path) -> None:
    """In a process of its own, as its workers are: what they import must not be what the tests have set up."""
    pytest.importorskip("distributed")
    pytest.importorskip("zarr", minversion="3")
    script = str(EXAMPLES / "cluster.py")
    done = subprocess.run(
        [sys.executable, script, "--gigabytes", "0.45", "--memory", "400MB", "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.match(r"4\d\d MB on disk, 2 workers of 400MB each", done.stdout)
    assert "killed worker process" in done.stdout
    assert float(re.search(r"(\S+) standard deviations off", done.stdout)[1]) < 1e-12
    assert "outputs with and without the killed worker: 0.0e+00 apart" in done.stdout
    assert not any(tmp_path.iterdir())
