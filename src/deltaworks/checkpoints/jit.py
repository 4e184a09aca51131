"""How kernels are compiled."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile with Numba: without the GIL, cached on disk where there is a place, IEEE arithmetic as written.

    No `fastmath`: a result must not hang on how a loop was vectorised. Division by zero gives infinity as in NumPy.
    """
    try:
        return cast("F", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return cast("F", numba.njit(nogil=True, error_model="numpy")(function))


def forget_stale_kernels(package: Path) -> None:
    """Delete the compiled kernels in a package that are older than the source of any.

    Numba inlines kernels into each other, and looks only at the file of the outer one to tell whether a compiled
    kernel is still valid.
    """
    try:
        compiled = {path: path.stat().st_mtime for path in package.rglob("__pycache__/*.nb[ic]")}
        sources = {path.parent.parent / f"{path.name.partition('.')[0]}.py" for path in compiled}
        newest = max((path.stat().st_mtime for path in sources if path.exists()), default=0.0)
        for path, written in compiled.items():
            if written < newest:
                path.unlink(missing_ok=True)
    except OSError:  # another process was faster, or the folder cannot be written
        pass


forget_stale_kernels(Path(__file__).parents[1])


@intrinsic
def _fma(context: Any, first: Any, second: Any, addend: Any) -> Any:
    """Numba's view of LLVM's fused multiply-add on float32."""
    del context
    kinds = (first, second, addend)
    if any(kind != numba.types.float32 for kind in kinds):
        return None

    def generate(compiler: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del compiler, signature
        return builder.fma(*arguments)

    return numba.types.float32(*kinds), generate


fma = cast("Callable[[np.float32, np.float32, np.float32], np.float32]", _fma)
"""Inside kernels: ``first * second + addend`` in float32, rounded once (IEEE 754 fusedMultiplyAdd)."""


def fma_reference(first: np.float32, second: NDArray[np.float32], addend: NDArray[np.float32]) -> NDArray[np.float32]:
    """`fma` with NumPy: the product is exact in float64, and the sum is rounded to odd so that rounding twice is safe.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 2008.
    """
    product = np.float64(first) * second.astype(np.float64)
    other = addend.astype(np.float64)
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    inexact = (error != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def compiled_before(name: str = "codec.decode") -> bool:
    """Whether a compiled kernel lies on disk for this user; if not, the first call takes some seconds.

    Args:
        name: Its module's and its own, as Numba names its files.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    beside = Path(__file__).parents[1]
    folders = [Path(chosen)] if chosen else [*beside.glob("*/__pycache__"), Path.home() / ".cache" / "numba"]
    return any(next(f.rglob(f"{name}-*.nbi"), None) is not None for f in folders if f.is_dir())
