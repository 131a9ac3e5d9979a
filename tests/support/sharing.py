"""Calls that are shared whatever else runs: which are depends on the machine, and on the time between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from numbanorm.cpu import helpers, profile


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
    shares = {"share_from": elements, "wake_from": 0, "split_from": 0, "share": max(elements // 8, 1)}
    change(profile, "_used", replace(profile.profile(), **shares))
    change(helpers, "idle_cores", lambda: helpers.MOST)
    change(helpers.helpers(), "_ask_at", 0.0)
    change(helpers.helpers(), "_alone_until", 0.0)
