"""A headless Chromium that tells what it loaded, and a server of files for it."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback; yield its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a selenium driver of the Chromium that is installed, with logs of the network and the console; or skip."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (it is in the bench extra)")
    browser, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no browser: expected chromium and chromedriver on the path (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options, service) as opened:
        yield opened


def requests(driver: Any) -> tuple[dict[str, int], list[str]]:
    """Return the status of every address that was asked for since the last call, and the requests that failed."""
    statuses, failures = {}, []
    addresses = {}
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        method, given = message["method"], message["params"]
        if method == "Network.requestWillBeSent":
            addresses[given["requestId"]] = given["request"]["url"]
        elif method == "Network.responseReceived":
            statuses[given["response"]["url"]] = given["response"]["status"]
        elif method == "Network.loadingFailed" and not given.get("canceled"):
            failures.append(f"{addresses.get(given['requestId'])}: {given['errorText']}")
    return statuses, failures
