"""Devices and streams: where an array lies, and in which order work is done."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any

from .toolchain import SIMULATED, cuda


@cache
def device_count() -> int:
    """Return the number of devices."""
    return len(cuda.gpus.lst)


def current_device() -> int:
    """Return the number of the current device."""
    return 0 if device_count() == 1 else int(cuda.get_current_device().id)


def device_of(address: int) -> int:
    """Return the device on which an address lies; the current one for the address 0, which empty arrays have.

    Raises
    ------
    ValueError
        If it is no address of CUDA memory.
    """
    if device_count() == 1:  # asking the driver costs 1 us
        return 0
    if address == 0:
        return current_device()
    driver = cuda.cudadrv.driver
    attribute = driver.binding.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    try:
        return int(driver.driver.cuPointerGetAttribute(attribute, driver.binding.CUdeviceptr(address)))
    except driver.CudaAPIError as error:
        raise ValueError(f"expected an address of CUDA memory, got {address:#x} ({error})") from None


def describe() -> str:
    """Name the devices, the CUDA version of the driver, and that of numba-cuda."""
    names = []
    for device in cuda.gpus.lst:
        major, minor = device.compute_capability
        name = getattr(device, "name", "simulated device")
        names.append(f"{name.decode() if isinstance(name, bytes) else name} (compute capability {major}.{minor})")
    driver = "" if SIMULATED else "driver for CUDA {}.{}, ".format(*cuda.cudadrv.driver.driver.get_version())
    return f"{', '.join(names)}; {driver}numba-cuda {version('numba-cuda')}"


def within(device: int) -> Any:
    """Return a context in which `device` is the current one; None where there is no other."""
    return cuda.gpus[device] if device_count() > 1 else None  # to enter one costs 3 us


@lru_cache(maxsize=256)
def numba_stream(handle: int) -> Any:
    """Return numba's stream for a raw handle; 0 is numba's own word for the default stream."""
    return cuda.external_stream(handle) if handle else 0


def wait(stream: int, producer: int) -> None:
    """Let what is queued on `stream` from now on wait for what is queued on `producer`; the host waits for neither."""
    make: Any = cuda.event  # whose annotations are the simulator's, which takes no argument
    event = make(timing=False)
    event.record(numba_stream(producer))
    event.wait(numba_stream(stream))


def synchronize(stream: int) -> None:
    """Let the host wait for what is queued on a stream."""
    (numba_stream(stream) or cuda.default_stream()).synchronize()


def handle_of(stream: Any) -> int:
    """Return the raw handle of a stream: of an integer, or of a stream of torch, CuPy, numba or cuda.core.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr"):  # torch and CuPy before they had the protocol
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    if type(stream) is not int or stream < 0:
        raise TypeError(f"stream: expected a raw handle or a stream of torch, CuPy, numba or cuda.core, got {stream!r}")
    return stream
