"""How kernels are compiled."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding as llvm
import numba
from numba.core import environment
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.runtime.nrt import rtsys

F = TypeVar("F", bound=Callable[..., Any])


class _Library(JITCodeLibrary):
    """Machine code, with what compiles others with it in them; that is seldom asked for once all are compiled.

    To read it takes ten times as long as to load the code.
    """

    _bitcode: bytes | None = None

    @classmethod
    def _unserialize(cls, codegen: Any, state: Any) -> Any:
        name, kind, data = state
        if kind != "object":
            return super()._unserialize(codegen, state)  # type: ignore[no-untyped-call]
        library = codegen.create_library(name)
        code, library._bitcode = data  # noqa: SLF001
        library.enable_object_caching()
        library._set_compiled_object(code)  # noqa: SLF001
        library._finalize_final_module()  # noqa: SLF001
        return library

    def get_pointer_to_function(self, name: str) -> int:
        """The address of a function; 0 where this has none of that name."""
        if self._bitcode is None:
            return int(super().get_pointer_to_function(name))  # type: ignore[no-untyped-call]
        return int(self.codegen._engine.get_function_address(name))  # noqa: SLF001

    def _get_module_for_linking(self) -> Any:
        if self._bitcode is not None:
            bitcode, self._bitcode = self._bitcode, None
            self._shared_module = llvm.parse_bitcode(bitcode)
            self.codegen._engine._load_defined_symbols(self._shared_module)  # noqa: SLF001
        return super()._get_module_for_linking()  # type: ignore[no-untyped-call]


class _Cache(FunctionCache):
    """Compiled kernels on disk, loaded without what only compiling needs.

    Before it loads one, Numba declares everything it could compile: an eighth of a second of imports, and as much again
    for SciPy's BLAS where there is one. With one, it imports every module of its own that had a part in it. Machine
    code has no use for that; where something is compiled after all, Numba does it then.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """See Numba, which holds its global lock here."""
        target_context.refresh = lambda: rtsys.initialize(target_context)
        target_context.codegen()._library_class = _Library  # noqa: SLF001
        environment._rebuild_env = _rebuild_environment  # noqa: SLF001
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        finally:
            environment._rebuild_env = _rebuild_with_module  # noqa: SLF001
            del target_context.refresh


_rebuild_with_module = environment._rebuild_env  # noqa: SLF001


def _rebuild_environment(module: str, constants: list[Any], name: str) -> Any:
    """As Numba's own, but that its modules are not imported for this: their compiled code looks up nothing there."""
    found = environment.lookup_environment(name)  # type: ignore[no-untyped-call]
    if found is not None or module in sys.modules or not module.startswith("numba."):
        return _rebuild_with_module(module, constants, name)  # type: ignore[no-untyped-call]
    made = environment.Environment({"__name__": module})
    made.consts[:] = constants
    made.env_name = name
    environment.Environment._memo[name] = made  # noqa: SLF001
    return made


def kernel(function: F, *, forceinline: bool = False, counts: bool = True) -> F:
    """Compile with Numba: without the GIL, cached on disk where there is a place, IEEE arithmetic as written.

    No `fastmath`: a result must not hang on how a loop was vectorised. Division by zero gives infinity as in NumPy.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "forceinline": forceinline, "_nrt": counts}
    compiled: Any = numba.njit(**options)(function)
    # Without, where neither the package's folder nor the user's cache can be written.
    with suppress(RuntimeError):
        # As Numba's own `cache=True` does.
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]  # noqa: SLF001
    return cast("F", compiled)


def inner(function: F) -> F:
    """A kernel that makes no array, returns none and counts no references.

    Counting takes an atomic operation for every array, and every field of a named tuple, that a call is given; that
    added a sixth to kernels that call others for every tile. Numba compiles none that makes or returns an array.
    """
    return kernel(function, counts=False)


def inlined(function: F) -> F:
    """A kernel that becomes part of whatever kernel calls it: for small ones that take or return vectors.

    It counts no references, so only a kernel that counts none either may be given an array by it; see `inner`.
    """
    return kernel(function, forceinline=True, counts=False)


def forget_stale_kernels(package: Path) -> None:
    """Delete the compiled kernels in a package that are older than the source of any.

    Numba inlines kernels, and the vectors they work with, into each other, and looks only at the file of the outer one
    to tell whether a compiled kernel is still valid.
    """
    try:
        compiled = {path: path.stat().st_mtime for path in package.rglob("__pycache__/*.nb[ic]")}
        sources = {path.parent.parent / f"{path.name.partition('.')[0]}.py" for path in compiled}
        sources.update((package / "checkpoints").glob("*vector.py"))
        newest = max((path.stat().st_mtime for path in sources if path.exists()), default=0.0)
        for path, written in compiled.items():
            if written < newest:
                path.unlink(missing_ok=True)
    except OSError:  # another process was faster, or the folder cannot be written
        pass


forget_stale_kernels(Path(__file__).parents[1])


def compiled_before(name: str = "codec.decode") -> bool:
    """Whether a compiled kernel lies on disk for this user; if not, the first calls take half a minute or more.

    Args:
        name: Its module's and its own, as Numba names its files.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).parents[1]
    folders = [Path(chosen)] if chosen else [*beside.glob("*/__pycache__"), Path.home() / ".cache" / "numba"]
    return any(next(f.rglob(f"{name}-*.nbi"), None) is not None for f in folders if f.is_dir())
