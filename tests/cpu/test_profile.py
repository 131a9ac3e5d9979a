"""Profiles: which is chosen, what a file may say, and that none of them changes a bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from processes import run

import numbanorm as nn
from numbanorm.cpu import profile
from numbanorm.cpu.profile import EMERALD_RAPIDS, TUNED, ZEN4, CpuProfile, caches, choose, derived

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("znver4", "zen4"),
        ("znver5", "zen4"),
        ("sapphirerapids", "emeraldrapids"),
        ("skylake", "default"),  # AVX-512 or not
        ("haswell", "default"),  # AVX2 alone
        ("neoverse-v1", "default"),
        ("apple-m1", "default"),
        ("generic", "default"),
    ],
)
def test_chosen_by_the_name_of_the_cpu(cpu: str, name: str) -> None:
    assert choose(cpu, "").name == name


@pytest.mark.parametrize("name", [*TUNED, "default"])
def test_asked_for_by_name(name: str) -> None:
    assert choose("znver4", name).name == choose("haswell", name).name == name


def test_asked_for_by_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("pairs = true\nstream_from = 12345\n")
    found = choose("znver4", str(file))
    assert found == replace(derived(str(file), *caches("znver4")), pairs=True, stream_from=12345)
    file.write_text('name = "mine"')
    assert choose("znver4", str(file)).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs = ", "is no TOML file"),
        ("speed = 9", "expected name, l1, .*, got 'speed'"),
        ("pairs = 1", "pairs: expected true or false, got 1"),
        ("ahead = true", "ahead: expected an integer of 0 or more, got True"),
        ("ahead = -1", "ahead: expected an integer of 0 or more, got -1"),
        ("share = 0", "share: expected an integer of 1 or more, got 0"),
        ("name = 3", "name: expected a string, got 3"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        choose("znver4", str(file))


def test_no_such_profile() -> None:
    with pytest.raises(ValueError, match="expected zen4, emeraldrapids, default, or a file, got 'zen9'"):
        choose("znver4", "zen9")


def test_what_the_environment_says() -> None:
    code = "import numbanorm as nn; print(nn.calls.config.config()['profile'])"
    assert run(code, NUMBANORM_PROFILE="emeraldrapids") == EMERALD_RAPIDS.describe()
    assert run(code, NUMBANORM_PROFILE="", NUMBA_CPU_NAME="generic").startswith("default (L1 ")
    assert run(code, NUMBANORM_PROFILE="", NUMBA_CPU_NAME="znver4") == "zen4 (L1 32 KiB, L2 1 MiB, L3 32 MiB)"


def test_caches_as_linux_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [("Data", "1", "48K"), ("Instruction", "1", "32K"), ("Unified", "2", "2048K"), ("Unified", "3", "?")]
    for index, values in enumerate(told):
        place = tmp_path / f"index{index}"
        place.mkdir()
        for name, value in zip(("type", "level", "size"), values, strict=True):
            (place / name).write_text(value + "\n")
    (tmp_path / "index9").mkdir()
    told_by = profile._told
    monkeypatch.setattr(profile, "_told", lambda: told_by(tmp_path))
    assert caches("haswell") == (48 * KIB, 2 * MIB, 0)
    monkeypatch.setattr(profile, "_told", lambda: told_by(tmp_path / "nowhere"))
    assert caches("haswell") == (32 * KIB, MIB, 0)
    assert caches("apple-m2") == (128 * KIB, 4 * MIB, 0)


PROFILES = {
    "zen4": ZEN4,
    "emeraldrapids": EMERALD_RAPIDS,
    "small caches": derived("small", 16 * KIB, 256 * KIB, 0),
    "large caches": derived("large", 128 * KIB, 16 * MIB, 64 * MIB),
    "all past the caches": replace(EMERALD_RAPIDS, stream_from=1, ahead_from=1, unit_bytes=2048),
    "nothing past them": replace(ZEN4, stream_from=1 << 40, ahead_from=1 << 40),
}


def results(dtype: object) -> dict[str, str]:
    """Return digests of what each kernel gives for arrays that one profile or another takes otherwise."""
    digests = {}

    def add(name: str, *arrays: np.ndarray | None) -> None:
        digest = hashlib.sha256()
        for array in arrays:
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        digests[name] = digest.hexdigest()

    rng = np.random.default_rng(5)
    for shape in [(3000, 24), (1100, 64), (1030, 256), (130, 2048), (37, 20_000)]:
        x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
        weight = rng.standard_normal(shape[1], np.float32).astype(dtype)
        y, mean, rstd = nn.layer_norm(x, shape[1], weight, return_stats=True)
        add(f"layer {shape}", y, mean, rstd, *nn.layer_norm_backward(dy, x, shape[1], mean, rstd, weight))
        y, total = nn.rms_norm(x, shape[1], weight, residual=dy)
        add(f"rms {shape}", y, total)
    for shape in [(6, 16, 28, 28), (40, 48, 7, 7), (8, 24, 64, 64)]:
        x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
        weight = rng.standard_normal(shape[1], np.float32).astype(dtype)
        for order in ("first", "last"):
            axis = 1 if order == "first" else -1
            a, b = (x, dy) if axis == 1 else (np.ascontiguousarray(np.moveaxis(v, 1, -1)) for v in (x, dy))
            y, mean, rstd = nn.batch_norm(a, weight=weight, training=True, return_stats=True, channel_axis=axis)
            back = nn.batch_norm_backward(b, a, mean, rstd, weight, channel_axis=axis)
            given = nn.batch_norm(a, mean.ravel().astype(np.float32), np.ones(shape[1], np.float32), channel_axis=axis)
            add(f"batch {order} {shape}", y, mean, rstd, given, *back)
            y, mean, rstd = nn.group_norm(a, 4, weight, return_stats=True, channel_axis=axis)
            back = nn.group_norm_backward(b, a, 4, mean, rstd, weight, channel_axis=axis)
            add(f"group {order} {shape}", y, mean, rstd, *back)
    return digests


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_no_profile_changes_a_bit(dtype: object, threads: int, launch_with: Callable[..., None]) -> None:
    found = {}
    for name, cpu in PROFILES.items():
        launch_with(cpu)
        found[name] = results(dtype)
    wanted = found["zen4"]
    for name, digests in found.items():
        assert digests == wanted, name


def test_a_profile_is_frozen() -> None:
    with pytest.raises(AttributeError):
        ZEN4.pairs = True  # type: ignore[misc]
    assert isinstance(profile.profile(), CpuProfile)
