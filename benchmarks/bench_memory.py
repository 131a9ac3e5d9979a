"""Peak memory beside inputs and outputs, as `memory` measures it: the high-water mark of a process over one call."""

from __future__ import annotations

from pathlib import Path

from . import common, memory

STEP = 1 << 18
"""Bytes to which a peak is rounded up: pages that Python itself touches come and go by tens of KB."""


class Extra:
    """Inputs of 64 MB."""

    version = "1"
    param_names = ("case", "direction")
    params = (
        (
            "LayerNorm D=4096",
            "LayerNorm axis=1, C=768",
            "RMSNorm D=4096",
            "BatchNorm NCHW",
            "BatchNorm NHWC",
            "InstanceNorm NHWC",
            "GroupNorm NCHW",
        ),
        memory.DIRECTIONS,
    )

    def setup(self, name: str, direction: str) -> None:
        if not Path("/proc/self/clear_refs").exists():
            raise NotImplementedError("the high-water mark can be reset on Linux only")
        if direction == "backward":
            common.need("layer_norm_backward")

    @common.tracked("bytes")
    def track_peak(self, name: str, direction: str) -> int:
        """Bytes beside inputs and outputs at the peak of one call, in steps of 256 KiB."""
        found: dict[str, int] = memory.measure(memory.CASES[name], direction, threads=1)
        assert found["returned"] >= found["input"], "the call returned less than an output"
        return max(1, -(-found["extra"] // STEP)) * STEP
