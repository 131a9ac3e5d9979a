"""Calls that are shared whatever else runs: which are depends on the machine, and on the time between them."""

from __future__ import annotations

from typing import Any

from numbanorm.cpu import engine, helpers


def always(patch: Any = None, elements: int = 1 << 17) -> None:
    """Share every call on so many elements and more with as many helpers as there may be.

    Parameters
    ----------
    patch : pytest.MonkeyPatch, optional
        What undoes it.
    elements : int, optional
        How many.
    """
    change = setattr if patch is None else patch.setattr
    change(engine, "SHARE_FROM", elements)
    change(engine, "WAKE_FROM", 0)
    change(engine, "SPLIT_FROM", 0)
    change(engine, "ELEMENTS", max(elements // 8, 1))
    change(helpers, "idle_cores", lambda: helpers.MOST)
    change(helpers.helpers(), "_ask_at", 0.0)
    change(helpers.helpers(), "_alone_until", 0.0)
