"""What the package asks of the world around: no connection."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run

WATCH = """
import sys
opened = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.client", "ftplib.", "smtplib.")):
        opened.append((event, str(arguments)[:80]))
sys.addaudithook(watch)
"""

USE = """
import numpy as np, numbanorm as nn
x = np.random.default_rng(0).standard_normal((4, 6, 8, 8), dtype=np.float32)
for kind, arguments in {"batch": (6,), "layer": (8,), "instance": (6,), "group": (2, 6), "rms": (8,)}.items():
    layer = nn.Norm(kind, *arguments)
    layer.backward(layer(x))
    layer.load_state_dict(layer.state_dict())
nn.Moments.of(x, 0).update(x)
nn.warmup(["rms"], ["float32"])
nn.show_config()
"""


def test_no_connection() -> None:
    """Import, every norm, cache and configuration: nothing asks for a socket, not even to look up a name."""
    assert run(WATCH + USE + "print('events', opened)").splitlines()[-1] == "events []"


@pytest.mark.slow
def test_no_connection_of_the_commands(tmp_path: Path) -> None:
    pytest.importorskip("click")
    pytest.importorskip("matplotlib")
    code = f"""
import os
os.chdir({str(tmp_path)!r})
from numbanorm.cli.main import cli
for arguments in (["explain", "group", "--shape", "4,6,8,8", "--groups", "2", "-o", "group.png"], ["demo"]):
    cli(arguments, standalone_mode=False)
print("events", opened)
"""
    assert run(WATCH + code, MPLBACKEND="agg").splitlines()[-1] == "events []"


def test_the_watch_sees() -> None:
    """What it must not see in the tests above, it sees here."""
    code = """
import contextlib, socket
with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 9), 0.1)
print(opened)
"""
    assert "socket.connect" in run(WATCH + code)
