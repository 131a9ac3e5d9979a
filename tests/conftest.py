"""Fixtures of the whole suite: hypothesis profiles, threads, torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numba
import pytest
import sharing
from hypothesis import HealthCheck, settings
from untraced import untraced

import numbanorm as nn
from numbanorm.calls import host
from numbanorm.cpu import launch, profile
from numbanorm.cpu.jit import Kernel
from numbanorm.cpu.profile import CpuProfile

pytest.register_assert_rewrite("same")  # so that its failures show the values

Kernel.bound = untraced(Kernel.bound)  # type: ignore[method-assign]

# No deadline: the first example of a dtype compiles kernels for seconds.
settings.register_profile("default", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that no worker is left with it when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Every test starts on one thread; those about threads take `threads` or set their own."""
    nn.set_num_threads(1)
    yield
    nn.set_num_threads(1)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _one_thread: None) -> Iterator[int]:
    """Run a test on one thread, and on two with all calls shared that are large enough for Numba's threads."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"needs {request.param} threads")
    if request.param > 1:
        sharing.always(monkeypatch)
        host.forget()
    nn.set_num_threads(request.param)
    yield request.param
    host.forget()


_THREADS = ("share_from", "wake_from", "share", "split_from", "numba_from")


@pytest.fixture
def launch_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return what sets choices of the CPU kernels' launch, and attributes of a profile, for one test."""

    def forget() -> None:
        launch.geometry.cache_clear()
        host.forget()

    def choose(cpu: CpuProfile | None = None, **choices: Any) -> None:
        own = {name: choices.pop(name) for name in list(choices) if hasattr(CpuProfile, name)}
        now = profile.profile()
        shared = {name: getattr(now, name) for name in _THREADS}
        monkeypatch.setattr(profile, "_used", replace(cpu or now, **shared | own))
        for name, value in choices.items():
            monkeypatch.setattr(launch, name, value)
        forget()

    yield choose
    forget()


@pytest.fixture(scope="session")
def torch() -> Any:
    """Return torch, or skip where it is not installed."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module
