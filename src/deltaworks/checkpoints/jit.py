"""How kernels are compiled."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime.nrt import rtsys

F = TypeVar("F", bound=Callable[..., Any])


class _Cache(FunctionCache):
    """Compiled kernels on disk, loaded without what only compiling needs.

    Before it loads one, Numba declares everything it could compile: an eighth of a second of imports, and as much again
    for SciPy's BLAS where there is one. Machine code has no use for that; where something is compiled after all, Numba
    declares it then.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """See Numba, which holds its global lock here."""
        target_context.refresh = lambda: rtsys.initialize(target_context)
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        finally:
            del target_context.refresh


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
    """Whether a compiled kernel lies on disk for this user; if not, the first call takes some seconds.

    Args:
        name: Its module's and its own, as Numba names its files.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).parents[1]
    folders = [Path(chosen)] if chosen else [*beside.glob("*/__pycache__"), Path.home() / ".cache" / "numba"]
    return any(next(f.rglob(f"{name}-*.nbi"), None) is not None for f in folders if f.is_dir())
