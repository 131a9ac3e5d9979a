"""Units of work are claimed: whoever has time takes the next one, and nobody waits for a thread that has taken none.

A board is memory that the threads of a process share: which call is on it, and which of its units are taken. A job is
what one thread knows of a call. A kernel does unit after unit, and asks for the next one by its job: where that has no
board they are counted, else claimed. Helpers (`numbanorm.cpu.helpers`) look at the board; whoever of them has claimed
a unit runs the kernel with the caller's own arguments, which lie on the board (`numbanorm.cpu.board`). The caller does
not return before all units are done, so no array is gone while a helper is at work on it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .address import Address
from .board import (
    ARGUMENTS,
    AWAKE,
    BUSY,
    CALL_BITS,
    CALLED,
    COUNT,
    COUNT_BITS,
    DONE,
    FAILED,
    FROM_BACK,
    FROM_FRONT,
    HELPERS,
    JOB_BOARD,
    JOB_CALL,
    JOB_FIRST,
    JOB_HELD,
    JOB_MINE,
    JOB_SHARED,
    JOB_SIZE,
    LIMIT,
    LOCK,
    OF_HELPER,
    SLEEPING,
    STATE,
    TASK,
    TICKET,
    TOTAL,
)
from .dtypes import pointer
from .jit import Kernel, scalar

INT64 = types.int64
JOB = Address(INT64)
"""How kernels take a job."""

ALONE = np.zeros(JOB_SIZE, np.int64)
"""The job of every call on one thread: its units are counted, not claimed."""


def new_board(helpers: int) -> np.ndarray:
    """Return a board for so many helpers; there is none yet."""
    return np.zeros(HELPERS + OF_HELPER * helpers, np.int64)


def job_on(board: np.ndarray | None) -> np.ndarray:
    """Return the job of who calls for help by a board, if there is one; the number of helpers is to be set."""
    job = np.zeros(JOB_SIZE, np.int64)
    job[JOB_BOARD], job[JOB_SHARED], job[JOB_FIRST] = 0 if board is None else board.ctypes.data, 1, -1
    return job


@intrinsic
def _at(typing_context, number):
    """Return a board by its address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(JOB))

    return JOB(types.int64), generate


@intrinsic
def _add(typing_context, board, place, value):
    """Add to a number at once; return what it was."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), arguments[2], "seq_cst")

    return types.int64(board, types.intp, types.int64), generate


@intrinsic
def _look(typing_context, board, place):
    """Read a number that another thread may write."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.gep(arguments[0], [arguments[1]]), "seq_cst", 8)

    return types.int64(board, types.intp), generate


@intrinsic
def _tell(typing_context, board, place, value):
    """Write a number that another thread may read."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[2], builder.gep(arguments[0], [arguments[1]]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.none(board, types.intp, types.int64), generate


@intrinsic
def _swap(typing_context, board, place, old, new):
    """Write a number where another one lies, at once; tell whether it lay there."""

    def generate(context, builder, signature, arguments):
        at = builder.gep(arguments[0], [arguments[1]])
        both = builder.cmpxchg(at, arguments[2], arguments[3], "seq_cst", "seq_cst")
        return builder.extract_value(both, 1)

    return types.boolean(board, types.intp, types.int64, types.int64), generate


@intrinsic
def _run(typing_context, board, job):
    """Run the kernel whose arguments lie on a board, with another job; return what it returns, or -1 if it failed."""

    def generate(context, builder, signature, arguments):
        board, job = arguments
        word = ir.IntType(64)
        kind = ir.FunctionType(word, [word.as_pointer(), word.as_pointer()]).as_pointer()
        task = builder.load(builder.gep(board, [ir.Constant(word, TASK)]))
        given = builder.gep(board, [ir.Constant(word, ARGUMENTS)])
        return builder.call(builder.inttoptr(task, kind), [given, job])

    return types.int64(board, job), generate


def _python_function(name, result, arguments):
    """Return an intrinsic that calls a function of Python's on a lock, which needs no lock of Python's own."""

    @intrinsic
    def call(typing_context, lock):
        def generate(context, builder, signature, given):
            kind = ir.FunctionType(result, [_BYTES, *(part.type for part in arguments)])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [builder.inttoptr(given[0], _BYTES), *arguments])
            return context.get_dummy_value()

        return types.none(types.int64), generate

    return call


_BYTES = ir.IntType(8).as_pointer()
_wait_for = _python_function("PyThread_acquire_lock", ir.IntType(32), [ir.Constant(ir.IntType(32), 1)])
_release = _python_function("PyThread_release_lock", ir.VoidType(), [])


@intrinsic
def _new_lock(typing_context):
    """Return a lock of Python's, free, or 0 where there is no memory."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_BYTES, [])
        function = cgutils.get_or_insert_function(builder.module, kind, "PyThread_allocate_lock")
        return builder.ptrtoint(builder.call(function, []), ir.IntType(64))

    return types.int64(), generate


@scalar
def is_shared(job):
    """Tell whether a job was prepared for several threads, even if it is done alone as the board is taken."""
    return _look(job, JOB_SHARED) != 0


@scalar
def _left(ticket, total):
    """Return how many of so many batches nobody has claimed."""
    return total - (ticket & COUNT) - (ticket >> COUNT_BITS & COUNT)


@scalar
def _take(job, board, total):
    """Claim a batch of a job's call; return -1 where none is left, or another call is on the board.

    The caller takes them from the front and helpers from the back: with calls that follow one another on the same
    arrays, each finds what it has read and written before in its own core's cache.
    """
    ticket = _look(board, TICKET)
    while ticket >> CALL_BITS == _look(job, JOB_CALL) and _left(ticket, total) > 0:
        helps = _look(job, JOB_FIRST) >= 0
        if _swap(board, TICKET, ticket, ticket + (FROM_BACK if helps else FROM_FRONT)):
            _tell(job, JOB_HELD, 1)
            return total - 1 - (ticket >> COUNT_BITS & COUNT) if helps else ticket & COUNT
        ticket = _look(board, TICKET)
    return np.int64(-1)


@scalar
def claim(job, unit, total):
    """Return the next unit after `unit`, which is done; -1 is before the first, and `total` is none.

    Units are claimed in batches, of one unit each if there are not more than a ticket can count.
    """
    after = unit + 1
    address = _look(job, JOB_BOARD)
    if address == 0:
        return after
    board = _at(address)
    size = 1 + (total >> COUNT_BITS)
    batches = -(-total // size)
    if unit >= 0:
        if after < total and after % size != 0:
            return after
        _tell(job, JOB_HELD, 0)
        _add(board, DONE, 1)
    elif _look(job, JOB_FIRST) >= 0:
        return _look(job, JOB_FIRST) * size
    else:
        _tell(job, JOB_CALL, _look(board, TICKET) >> CALL_BITS)
        _tell(board, TOTAL, batches)
    batch = _take(job, board, batches)
    return total if batch < 0 else batch * size


@scalar
def _look_for_work(board, job, helper):
    """Claim a batch, if there is one, and run its kernel until none is left; tell whether there was one."""
    ticket = _look(board, TICKET)
    total = _look(board, TOTAL)
    if _left(ticket, total) <= 0 or helper >= _look(board, LIMIT) or _look(board, FAILED) != 0:
        return False
    if not _swap(board, TICKET, ticket, ticket + FROM_BACK):
        return False
    _tell(job, JOB_FIRST, total - 1 - (ticket >> COUNT_BITS & COUNT))
    _tell(job, JOB_CALL, ticket >> CALL_BITS)
    _tell(job, JOB_HELD, 1)
    if _run(board, job) != 0 and _look(job, JOB_HELD) != 0:
        _tell(board, FAILED, 1)
        _add(board, DONE, 1)
    return True


@Kernel
def enlist(board, helper):
    """Make a place for a helper on a board: it sleeps; return whether there was memory for its lock."""
    p_board = pointer(board)
    lock = _new_lock()
    if lock == 0:
        return False
    _wait_for(lock)
    _tell(p_board, HELPERS + OF_HELPER * helper + LOCK, lock)
    return True


@Kernel
def serve(board, job, helper, turns):
    """Help with all calls on a board for ever: look for one so many times, then sleep until somebody calls."""
    p_board, p_job = pointer(board), pointer(job)
    own = HELPERS + OF_HELPER * helper
    lock = _look(p_board, own + LOCK)
    while True:
        _wait_for(lock)
        _tell(p_board, own + STATE, AWAKE)
        left = turns
        while left > 0:
            left = turns if _look_for_work(p_board, p_job, helper) else left - 1
        _tell(p_board, own + STATE, SLEEPING)


@Kernel
def wake(board, number):
    """Call so many helpers, unless they are awake."""
    p_board = pointer(board)
    for helper in range(number):
        own = HELPERS + OF_HELPER * helper
        lock = _look(p_board, own + LOCK)
        if lock != 0 and _swap(p_board, own + STATE, SLEEPING, CALLED):
            _release(lock)


WAITING, FINISHED, LOST = 0, 1, 2


@Kernel
def finish(job, turns):
    """Return FINISHED once all units are done, LOST if one never will be, WAITING after so many looks."""
    p_job = pointer(job)
    if _look(p_job, JOB_MINE) == 0:
        return FINISHED
    board = _at(_look(p_job, JOB_BOARD))
    for _ in range(turns):
        if _look(board, DONE) >= _look(board, TOTAL):
            answer = LOST if _look(board, FAILED) != 0 else FINISHED
            _tell(p_job, JOB_MINE, 0)
            _tell(board, BUSY, 0)
            return answer
    return WAITING


@Kernel
def close(job):
    """Let nobody claim a unit of a call any more, whose caller has failed."""
    p_job = pointer(job)
    if _look(p_job, JOB_MINE) == 0:
        return
    board = _at(_look(p_job, JOB_BOARD))
    total = _look(board, TOTAL)
    ticket = _look(board, TICKET)
    while not _swap(board, TICKET, ticket, ticket | COUNT):
        ticket = _look(board, TICKET)
    left = _left(ticket, total)
    _add(board, DONE, (left if left > 0 else 0) + _look(p_job, JOB_HELD))
    _tell(p_job, JOB_HELD, 0)
