"""Keeps coverage out of compilations: Numba takes twice as long while each line of Python is traced."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

_START = threading.Thread.start  # as it is now: tests put others in its place


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs in a thread that is not traced, where the caller's is.

    To stop tracing and start again within one thread would count later lines to other files.
    """

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        if sys.gettrace() is None:
            return function(*arguments, **options)
        results: list[Any] = []
        errors: list[BaseException] = []

        def body() -> None:
            sys.settrace(None)
            try:
                results.append(function(*arguments, **options))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=body)
        _START(thread)
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return run
