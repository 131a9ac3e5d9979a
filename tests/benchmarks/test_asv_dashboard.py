"""The dashboard, as a browser shows it: published from the tracked results, loaded from this machine alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import chromium, requests, served

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / ".asv" / "screenshots"
BENCHMARK = "bench_latency.Hot.time_forward"
PIXELS = """
const canvas = arguments[0];
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let coloured = 0;
for (let i = 0; i < data.length; i += 4) {
    const most = Math.max(data[i], data[i + 1], data[i + 2]), least = Math.min(data[i], data[i + 1], data[i + 2]);
    coloured += data[i + 3] > 128 && most - least > 64;
}
return coloured;
"""
"""Axes and labels are grey: what has colour was drawn by a series."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("asv", reason="asv is not installed (it is in the bench extra)")
    pytest.importorskip("asv_tachyon", reason="asv-tachyon is not installed (it is in the bench extra)")
    folder = tmp_path_factory.mktemp("dashboard") / "html"
    command = [sys.executable, "benchmarks/suite.py", "publish", "--html", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def page(html: Path) -> Iterator[Any]:
    """Yield a browser that shows the first page; then look at all that it has asked for and complained about."""
    with served(html) as address, chromium() as driver:
        driver.get(address)
        yield driver
        statuses, failures = requests(driver)
        assert not failures
        assert not {url: status for url, status in statuses.items() if status >= 400}
        assert {urlsplit(url).netloc for url in statuses} - {""} == {urlsplit(address).netloc}
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(condition: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def visit(driver: Any, view: str, heading: str) -> str:
    """Open a view by its button, keep its screenshot, and return its text."""
    until(lambda: driver.find_elements("xpath", f"//button[normalize-space()='{view}']"), view)[0].click()
    until(lambda: any(h.text == heading for h in driver.find_elements("xpath", "//h1 | //h2")), heading)
    time.sleep(1)  # what scripts do after the heading, errors among it
    shoot(driver, view)
    return str(driver.find_element("tag name", "body").text)


def lines(driver: Any, selector: str) -> int:
    """Return how many canvases have lines on them."""
    return sum(driver.execute_script(PIXELS, canvas) > 100 for canvas in driver.find_elements("css selector", selector))


def shoot(driver: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(SHOTS / f"{name.lower()}.png"))


def test_history_covers_ten_commits(html: Path) -> None:
    index = json.loads((html / "index.json").read_text())
    (graph,) = html.rglob(f"graphs/**/machine-*/**/{BENCHMARK}.json")
    points = [point for point in json.loads(graph.read_text()) if point[1] is not None]
    assert len(points) >= 10
    assert len(index["revision_to_hash"]) >= 10


def test_list(page: Any) -> None:
    text = visit(page, "Overview", "Performance atlas")
    for module in ("latency", "throughput", "backward", "accuracy", "stats"):
        assert f"bench_{module}." in text
    until(lambda: lines(page, "canvas.spark") >= 3, "a line on three of the tiles in sight")


def test_grid(page: Any) -> None:
    text = visit(page, "Grid", "Summary grid")
    assert "case='LayerNorm 1x768 float32'" in text
    assert "µs" in text


def test_regressions(page: Any) -> None:
    visit(page, "Regressions", "Regressions")


def test_graph(page: Any) -> None:
    tile = until(lambda: page.find_elements("xpath", f"//*[text()='{BENCHMARK}']"), BENCHMARK)[0]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", tile)
    tile.click()
    until(lambda: "view=explore" in page.current_url, "the view of one benchmark")
    until(lambda: lines(page, ".u-wrap canvas") == 1, "lines on the graph")
    canvas = page.find_element("css selector", ".u-wrap canvas")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(1)
    shoot(page, "graph")
