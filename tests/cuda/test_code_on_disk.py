"""The code of CUDA kernels on disk: kept, found again, and made anew when it does not serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

toolchain = pytest.importorskip("numbanorm.cuda.toolchain", exc_type=ImportError)
if toolchain.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from compiled import dispatcher  # noqa: E402

from numbanorm.cuda import copying, sums  # noqa: E402


class Loader:
    """What cuda.core loads code with; without a device it can only tell code from garbage."""

    from_ptx = staticmethod(toolchain.ObjectCode.from_ptx)

    def __init__(self, cubin: bytes) -> None:
        self.cubin = cubin

    @classmethod
    def from_cubin(cls, cubin: bytes) -> Loader:
        return cls(cubin)

    def get_kernel(self, name: str) -> tuple[bytes, str]:
        if not self.cubin.startswith(b"\x7fELF") or name.encode() not in self.cubin:
            raise RuntimeError("no kernel")
        return self.cubin, name


@pytest.fixture
def assembled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Return the names of the kernels that are compiled, with a cache of their own that is empty."""
    names = []
    assemble = toolchain.Kernel.assemble

    def counted(self: Any, capability: tuple[int, int]) -> Any:
        names.append(self.name)
        with mock.patch.object(dispatcher, "get_current_device"):
            return assemble(self, capability)

    monkeypatch.setattr(toolchain.Kernel, "assemble", counted)
    monkeypatch.setattr(toolchain, "ObjectCode", Loader)
    monkeypatch.setattr(toolchain.config, "CACHE_DIR", str(tmp_path))
    toolchain._store.cache_clear()
    toolchain._warn_no_cache.cache_clear()
    yield names
    toolchain._store.cache_clear()


def slabs(wide: bool = False) -> Any:
    sums.slabs_kernel.cache_clear()
    return sums.slabs_kernel(wide)


def test_compiled_once(assembled: list[str]) -> None:
    first, second = slabs()._load((9, 0)), slabs()._load((9, 0))
    assert first == second
    assert first[1] == "numbanorm_slab_sums"
    assert assembled == ["numbanorm_slab_sums"]


def test_every_choice_and_device_has_its_own(assembled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [slabs()._load((9, 0)), slabs(True)._load((9, 0)), slabs()._load((8, 0))]
    assert len(set(codes)) == len(assembled) == 3
    monkeypatch.setattr(toolchain, "_stamp", lambda module: "another version")
    slabs()._load((9, 0))
    assert len(assembled) == 4


def damaged(folder: Path, content: bytes) -> None:
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    file.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_garbage(assembled: list[str], tmp_path: Path, content: bytes) -> None:
    """Code that cannot be loaded is made anew, with a warning, and replaced."""
    slabs()._load((9, 0))
    damaged(tmp_path, content)
    with pytest.warns(RuntimeWarning, match="cannot read it"):
        again = slabs()._load((9, 0))
    assert slabs()._load((9, 0)) == again
    assert len(assembled) == 2


def test_no_folder(assembled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing can be written, kernels are compiled, with a warning."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(toolchain.config, "CACHE_DIR", str(tmp_path / "file" / "folder"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "home"))
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        slabs()._load((9, 0))
    assert len(assembled) == 1


def test_the_user_folder(assembled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the package's folder cannot be written, the user's takes the code."""
    monkeypatch.setattr(toolchain.config, "CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setattr(toolchain.os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    slabs()._load((9, 0))
    slabs()._load((9, 0))
    assert len(assembled) == 1
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_devices_too_old_for_bfloat16(assembled: list[str]) -> None:
    """Their assembler knows no instruction that rounds to it."""
    copying._kernel("float32", "float16", "")._load((7, 5))
    with pytest.raises(TypeError, match=r"bfloat16: expected a device of compute capability 8\.0 or later, got 7\.5"):
        copying._kernel("bfloat16", "float32", "")._load((7, 5))
    assert assembled == ["numbanorm_copy"]
