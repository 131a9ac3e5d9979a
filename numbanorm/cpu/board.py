"""How a call comes to be done by several threads: what lies where on a board, and code around each kernel.

A kernel's own code knows nothing of threads but its job. When it is called by a job that has a board, `launch` puts its
arguments there, and where `task` is: a function that other threads may call, which runs the kernel with these arguments
and a job of their own. Both are a few instructions beside the kernel, of which there is one copy.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core.callwrapper import PyCallWrapper

_LINE = 8
TICKET, TOTAL = 0, 1
DONE = _LINE
BUSY, TASK, LIMIT, FAILED = 2 * _LINE, 2 * _LINE + 1, 2 * _LINE + 2, 2 * _LINE + 3
ARGUMENTS = 3 * _LINE
MOST_ARGUMENTS = 32
HELPERS = ARGUMENTS + MOST_ARGUMENTS
STATE, LOCK, OF_HELPER = 0, 1, _LINE
"""Where a board, of int64, holds the ticket; how many batches of units there are (0: nothing to claim yet), and how
many are done; whether a call is on it; where its task is; how many helpers may take part; whether one of them has
failed; the arguments. For each helper follow, `OF_HELPER` words apart, what it does, and the lock that it waits for
while it sleeps."""

SLEEPING, AWAKE, CALLED = range(3)
"""What a helper does; who is not there yet sleeps, and has no lock."""

JOB_BOARD, JOB_SHARED, JOB_LIMIT, JOB_MINE, JOB_FIRST, JOB_CALL, JOB_HELD = range(7)
JOB_SIZE = 8
"""Where a job, of int64, holds the board's address, or 0 for one that is done alone; whether the caller has prepared it
for several threads; how many helpers may take part; whether its call is on the board; the batch that a helper has
claimed first, or -1 for the caller; the call's number; whether a batch is claimed that is not done."""

COUNT_BITS = 20
CALL_BITS = 2 * COUNT_BITS
COUNT = (1 << COUNT_BITS) - 1
FROM_FRONT, FROM_BACK = 1, 1 << COUNT_BITS
"""A ticket tells, from its low bits on, how many batches of units were claimed from the front, how many from the back,
and the call's number."""

_WORD = ir.IntType(64)
_WORDS = _WORD.as_pointer()
_TASK = ir.FunctionType(_WORD, [_WORDS, _WORDS])

FAILED_TASK = -1


def _word(value: int) -> ir.Constant:
    return ir.Constant(_WORD, value)


def _place(builder: Any, words: Any, index: int) -> Any:
    return builder.gep(words, [_word(index)])


def _kernel(context: Any, module: Any, fndesc: Any) -> Any:
    """Declare a kernel in another module: its arguments follow where it puts its result and its error."""
    return ir.Function(
        module, context.call_conv.get_function_type(fndesc.restype, fndesc.argtypes), fndesc.llvm_func_name
    )


def add_task(context: Any, library: Any, fndesc: Any, env: Any, call_helper: Any) -> None:
    """Make a kernel's task, in the place of Numba's entry for other languages."""
    module = context.create_module("task")
    kernel = _kernel(context, module, fndesc)
    task = ir.Function(module, _TASK, fndesc.llvm_cfunc_wrapper_name)
    builder = ir.IRBuilder(task.append_basic_block("entry"))
    given, job = task.args
    result, error, *kinds = kernel.function_type.args
    places = [builder.alloca(kind.pointee) for kind in (result, error)]
    for place in places:
        builder.store(ir.Constant(place.type.pointee, None), place)
    own = [builder.load(builder.bitcast(_place(builder, given, i), kind.as_pointer())) for i, kind in enumerate(kinds)]
    own[0] = builder.bitcast(job, kinds[0])
    status = builder.call(kernel, [*places, *own])
    fine = builder.icmp_signed("==", status, ir.Constant(status.type, 0))
    builder.ret(builder.select(fine, _word(0), _word(FAILED_TASK)))
    library.add_ir_module(module)


def add_launch(context: Any, library: Any, fndesc: Any, env: Any, call_helper: Any, release_gil: bool = False) -> None:
    """Make a kernel's entry from Python, which offers its call to helpers where its job has a board that is free."""
    module = context.create_module("launch")
    kernel = _kernel(context, module, fndesc)
    launch = ir.Function(module, kernel.function_type, f"launch.{fndesc.llvm_func_name}")
    launch.linkage = "internal"
    _, _, job, *_ = launch.args
    builder = ir.IRBuilder(launch.append_basic_block("entry"))
    board = builder.load(_place(builder, job, JOB_BOARD))
    with builder.if_then(builder.icmp_unsigned("!=", board, _word(0)), likely=False):
        _offer(builder, module, fndesc, launch.args[2:], builder.inttoptr(board, _WORDS))
    builder.ret(builder.call(kernel, launch.args))
    PyCallWrapper(context, module, launch, fndesc, env, call_helper=call_helper, release_gil=release_gil).build()
    library.add_ir_module(module)


def _offer(builder: Any, module: Any, fndesc: Any, arguments: Any, board: Any) -> None:
    """Put a call on its board; if another one is there, take the board out of its job."""
    if len(arguments) > MOST_ARGUMENTS:
        raise ValueError(f"{fndesc.qualname}: expected at most {MOST_ARGUMENTS} arguments, got {len(arguments)}")
    job = arguments[0]
    both = builder.cmpxchg(_place(builder, board, BUSY), _word(0), _word(1), "seq_cst", "seq_cst")
    with builder.if_else(builder.extract_value(both, 1)) as (free, busy):
        with free:
            task = ir.Function(module, _TASK, fndesc.llvm_cfunc_wrapper_name)
            builder.store(_word(1), _place(builder, job, JOB_MINE))
            for index in (TOTAL, DONE, FAILED):
                builder.store_atomic(_word(0), _place(builder, board, index), "seq_cst", 8)
            call = builder.lshr(builder.load(_place(builder, board, TICKET)), _word(CALL_BITS))
            next_call = builder.shl(builder.add(call, _word(1)), _word(CALL_BITS))
            builder.store_atomic(next_call, _place(builder, board, TICKET), "seq_cst", 8)
            builder.store(builder.ptrtoint(task, _WORD), _place(builder, board, TASK))
            builder.store(builder.load(_place(builder, job, JOB_LIMIT)), _place(builder, board, LIMIT))
            for i, argument in enumerate(arguments):
                place = _place(builder, board, ARGUMENTS + i)
                builder.store(argument, builder.bitcast(place, argument.type.as_pointer()))
        with busy:
            builder.store(_word(0), _place(builder, job, JOB_BOARD))
