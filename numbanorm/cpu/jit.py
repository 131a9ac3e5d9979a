"""How every CPU kernel is compiled: its options, its serial and its parallel twin, its cache on disk."""

from __future__ import annotations

import gc
import glob
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache, cached_property
from hashlib import sha256
from inspect import getfile, signature
from pathlib import Path
from typing import Any, cast

from numba import njit
from numba.core import caching
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.typed_passes import NativeLowering, NopythonRewrites
from numba.core.types import Function
from numba.core.untyped_passes import InlineClosureLikes

from ..core.stamp import stamp_of
from .board import add_launch, add_task


class _Part(JITCodeLibrary):
    """The LLVM module of a function that only other compiled functions call: linked into theirs, and no more.

    Numba optimizes each function and makes machine code of it before it links it into its callers, where the same
    happens again, level after level. Here only the kernel is optimized and made, all its parts at once: a first call
    with no cache takes 2.3 instead of 4.1 s for rows, 4.6 instead of 7.6 s for columns.
    """

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        """Link nothing either: the kernel links all parts, each once. See `parts`."""
        self._finalized = True

    def parts(self) -> list[Any]:
        """Return all that a caller has to link: this and what it calls, level after level."""
        return list(dict.fromkeys([self, *self._linking_libraries]))


@register_pass(mutates_CFG=False, analysis_only=False)
class _Uncallable(LoweringPass):
    """Give the dispatcher an object to keep as the function's entry from Python, which there is none of."""

    _name = "numbanorm_uncallable"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        entry: Any = {}.__getitem__  # a built-in function, as it must be, and a new one each time
        state["cr"] = state["cr"]._replace(cfunc=entry)
        state.targetctx.insert_user_function(entry, state["cr"].fndesc, state.library.parts())
        return False


@cache
def _remembering_typing(context: Any) -> Any:
    """Return a typing context that remembers what each function of Numba's returns for types of arguments.

    Numba tries all that it knows of ``+``, NumPy's ufuncs and Python's lists among them, each time that it meets one:
    0.1 to 0.25 s of a first call.
    """
    remembered: dict[Any, Any] = {}

    def resolve(function: Any, arguments: Any, keywords: Any) -> Any:
        if keywords or not isinstance(function, Function):
            return context.resolve_function_type(function, arguments, keywords)
        key = function, arguments
        if key not in remembered:
            signature = context.resolve_function_type(function, arguments, keywords)
            if signature is None:
                return None
            remembered[key] = signature
        return remembered[key]

    lean = copy(context)
    lean.resolve_function_type = resolve
    return lean


@cache
def _remembering_target(context: Any) -> Any:
    """Return a compilation target that remembers sizes of types and where to find what makes code of a function.

    Numba asks for the size of every variable, for debuggers, and LLVM has to read a module each time. 0.1 to 0.2 s.
    """
    return context.subtarget(get_abi_sizeof=cache(context.get_abi_sizeof), get_function=cache(context.get_function))


_UNUSED = (InlineClosureLikes, NopythonRewrites)
"""Passes for closures and for expressions of whole arrays, of which the kernels have none: a tenth of the time."""


class _PartCompiler(Compiler):
    """Numba's compiler, for functions that only other compiled functions call."""

    def define_pipelines(self) -> Any:
        self.state.flags.no_cpython_wrapper = True
        self.state.flags.no_cfunc_wrapper = True
        self.state.flags.no_compile = True
        self.state.typingctx = _remembering_typing(self.state.typingctx)
        self.state.targetctx = _remembering_target(self.state.targetctx)
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        (passes,) = super().define_pipelines()
        passes.add_pass_after(_Uncallable, NativeLowering)
        passes.passes = [(kind, told) for kind, told in passes.passes if kind not in _UNUSED]
        passes.finalize()
        return [passes]


class _SharingCompiler(Compiler):
    """Numba's compiler, for kernels that take a job: several threads may do one call, see `board`."""

    def define_pipelines(self) -> Any:
        target = self.state.targetctx
        # The loops that Numba's threads run are compiled for the same target.
        name = self.state.func_id.unique_name

        def add_entry(library: Any, fndesc: Any, *more: Any, **options: Any) -> None:
            add = add_launch if fndesc.unique_name == name else type(target).create_cpython_wrapper
            add(target, library, fndesc, *more, **options)

        def add_foreign_entry(library: Any, fndesc: Any, *more: Any) -> None:
            add = add_task if fndesc.unique_name == name else type(target).create_cfunc_wrapper
            add(target, library, fndesc, *more)

        own = {"create_cpython_wrapper": add_entry, "create_cfunc_wrapper": add_foreign_entry}
        self.state.targetctx = target.subtarget(**own)
        return super().define_pipelines()


# error_model="numpy": the default's branch on division by zero blocks vectorization (0.47 -> 2.1 Gelem/s on 1/sqrt).
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}
_PART: dict[str, Any] = _OPTIONS | {"pipeline_class": _PartCompiler}

scalar = njit(**_PART)
"""Decorates whatever is not a loop over elements: merges, roots, addresses."""

inlined = njit(**_PART, forceinline=True)
"""Decorates what works on lanes: in a call they go through memory, and a row of 64 takes 80 ns instead of 44."""

elementwise = njit(**_PART, fastmath={"contract"})
"""Decorates a loop that does each element, or each lane, by itself: a product and a sum may fuse, nothing is reordered.

No kernel may reorder a sum (`reassoc`): its bits would depend on what LLVM makes of its surroundings. See `lanes`.
"""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage again and again in what a compilation makes: a tenth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


_warned = False


class Kernel:
    """One function, compiled on demand: `serial`, and `parallel` where its `prange` loop uses Numba's threads.

    A kernel's `prange` loop is over workers, each of which claims units of work (`claims`) until none is left. One
    worker is a call on one thread; further threads of Python's run the serial twin on the same job; the parallel twin
    runs as many workers as Numba has threads. All do the same units, so all give the same bits.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self.shares = [*signature(function).parameters][:2] == ["job", "workers"]
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.__doc__ = function.__doc__

    @cached_property
    def serial(self) -> Callable[..., None]:
        """The twin without threads."""
        return _compiled(self._function, shares=self.shares, parallel=False)

    @cached_property
    def parallel(self) -> Callable[..., None]:
        """The twin with threads."""
        return _compiled(self._function, shares=self.shares, parallel=True)

    def bound(self, *kinds: Any, parallel: bool = False) -> Callable[..., Any]:
        """Return the entry point for arguments of these types, compiled or loaded now: no later call looks at types."""
        dispatcher: Any = self.parallel if parallel else self.serial
        with _no_collection():
            dispatcher.compile(kinds)
        entry: Callable[..., Any] = dispatcher.overloads[kinds].entry_point
        return entry


def _compiled(function: Callable[..., None], *, shares: bool, parallel: bool) -> Callable[..., None]:
    compiler = _SharingCompiler if shares else Compiler
    dispatcher: Any = njit(**_OPTIONS, pipeline_class=compiler, parallel=parallel)(function)
    try:
        dispatcher._cache = _DiskCache(function, "parallel" if parallel else "serial")
    except (RuntimeError, OSError) as error:  # Numba finds no folder that it can write
        _warn_no_cache(f"cannot write {Path(__file__).with_name('__pycache__')}, nor elsewhere: {error}")
    return cast("Callable[..., None]", dispatcher)


class _Files(caching.IndexDataCacheFile):
    """Numba's files of a function's code, each named after the types and the sources that it is for.

    Numba counts them, so two processes that compile a function for different types at once call both files by one
    number, and a later process is given the code of the one for the types of the other. A process that dies between
    index and code leaves an older version's code where the new one should be.
    """

    def save(self, key: Any, data: Any) -> None:
        """Save code under its key."""
        overloads = self._load_index()
        if not overloads:  # nobody's, or those of other sources
            for path in Path(self._cache_path).glob(glob.escape(self._index_name).replace(".nbi", ".*.nbc")):
                path.unlink(missing_ok=True)
        digest = sha256(repr((self._source_stamp, key)).encode()).hexdigest()
        name = self._index_name.replace(".nbi", f".{digest[:16]}.nbc")
        if overloads.get(key) != name:
            overloads[key] = name
            self._save_index(overloads)
        self._save_data(name, data)


class _DiskCache(caching.FunctionCache):
    """Numba's cache on disk, made safe for this package.

    Numba's own key holds neither `parallel`, so twins would load each other's code, nor the helpers in other files, so
    an edited helper would go unnoticed; and a truncated file raises. Here the file name tells the twins apart, the
    stamp covers all modules that the kernel's own takes something from, and whatever cannot be read or written is
    compiled anew.
    """

    def __init__(self, function: Callable[..., None], twin: str) -> None:
        super().__init__(function)
        base = f"{self._impl.filename_base}-{twin}"
        self._cache_file = _Files(self.cache_path, base, stamp_of(Path(getfile(function))))

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # whatever unpickling garbage may raise
            _warn_no_cache(f"cannot read {self.cache_path}: {error!r}")
            self._forget()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_no_cache(f"cannot write {self.cache_path}: {error!r}")

    def _forget(self) -> None:
        try:
            self.flush()
        except OSError:
            self.disable()


def _warn_no_cache(reason: str) -> None:
    """Warn, once a process: a folder that fails for one kernel fails for the next."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"numbanorm compiles kernels that its cache on disk should hold: {reason}. NUMBA_CACHE_DIR names another "
            "folder.",
            RuntimeWarning,
            stacklevel=2,
        )
