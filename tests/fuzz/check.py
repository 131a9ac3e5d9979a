"""One call of the fuzzer: draw it, make it, judge it."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import numpy as np
from draws import ALL_DTYPES, ARENA_BYTES, Case, Maker
from guarded import Arena, Placed, guarded_outputs
from wrong import spoil

WRONG = 0.3
"""Share of the calls that are spoiled."""


class WrongError(AssertionError):
    """What a call did that it must not do."""


def draw(rnd: Random, arena: Arena, dtypes: Any = ALL_DTYPES) -> Case:
    """Draw a call, right or wrong."""
    with np.errstate(all="ignore"):
        case = Maker(rnd, arena, dtypes).draw()
    if not case.blamed and rnd.random() < WRONG:
        spoil(rnd, case)
    return case


def _flat(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple) else (results,)


def _call(case: Case, rnd: Random) -> Any:
    """Call, some with inputs that nobody can write to, some where NumPy raises what it warns of otherwise."""
    written = {id(placed.region) for placed in case.targets}
    sealed = [p for p in case.inputs if id(p.region) not in written] if rnd.random() < 0.5 else []
    for placed in sealed:
        placed.region.seal()
    try:
        if rnd.random() < 0.3:
            with np.errstate(all="raise"):
                return case.function(**case.arguments)
        return case.function(**case.arguments)
    finally:
        for placed in sealed:
            placed.region.open()


def check(case: Case, rnd: Random) -> str:
    """Make a call and judge it; return what came of it: "right" or "refused".

    Raises
    ------
    WrongError
        If a result is wrong, an error is none that is documented, or memory has changed that must not.
    """
    text = str(case)
    try:
        results = _call(case, rnd)
    except Exception as error:
        if not case.blamed or not isinstance(error, (TypeError, ValueError)):
            raise WrongError(f"{text}\nraised {type(error).__name__}: {error}") from error
        begin = re.match(r"[a-z_0-9]+(, [a-z_0-9]+)*(?=: )", str(error))
        if begin is None or not set(begin[0].split(", ")) & set(case.blamed):
            raise WrongError(f"{text}\nblamed {case.blamed}, raised {type(error).__name__}: {error}") from error
        _same([*case.inputs, *case.targets], text)
        return "refused"
    if case.blamed:
        raise WrongError(f"{text}\nexpected an error that blames {case.blamed}")
    with np.errstate(all="ignore"):
        _judge(case, results, text)
    _same(case.inputs, text)
    for placed in case.targets:
        if not placed.unchanged_around():
            raise WrongError(f"{text}\nwrote beside an output")
    if not case.targets and rnd.random() < 0.1:
        with guarded_outputs():
            again = _flat(case.function(**case.arguments))
        for result, first, second in zip(case.results, _flat(results), again, strict=True):
            if np.ascontiguousarray(first).tobytes() != np.ascontiguousarray(second).tobytes():
                raise WrongError(f"{text}\n{result.name}: other bits at the second call\n{first}\n{second}")
    return "right"


def _judge(case: Case, results: Any, text: str) -> None:
    flat = _flat(results)
    if len(flat) != len(case.results):
        raise WrongError(f"{text}\nexpected {[r.name for r in case.results]}, got {len(flat)} results")
    if "out" in case.arguments and flat[0] is not case.arguments["out"]:
        raise WrongError(f"{text}\nexpected out itself")
    for result, ours in [*zip(case.results, flat, strict=True), *((r, a) for a, r in case.moved)]:
        complaint = result.complaint(ours)
        if complaint is not None:
            raise WrongError(f"{text}\n{complaint}")


def _same(watched: list[Placed], text: str) -> None:
    for placed in watched:
        if not placed.unchanged():
            raise WrongError(f"{text}\nchanged memory of an input, or an output of a call that failed")


def make_arena() -> Arena:
    """Return memory for one call's arrays."""
    return Arena(16, ARENA_BYTES)
