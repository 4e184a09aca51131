import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltaworks.checkpoints.jit import compiled_before, forget_stale_kernels


def make(path: Path, time: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    os.utime(path, (time, time))
    return path


def test_kernels_older_than_any_kernel_source_are_forgotten(tmp_path: Path) -> None:
    """One kernel's file changed after both were compiled; the other may have it inlined."""
    make(tmp_path / "inner.py", 300)
    make(tmp_path / "outer.py", 100)
    names = [f"{n}.f-1.py311.{kind}" for n in ("inner", "outer") for kind in ("nbi", "nbc")]
    old = [make(tmp_path / "__pycache__" / name, 200) for name in names]
    new = make(tmp_path / "__pycache__" / "inner.g-9.py311.nbi", 400)
    forget_stale_kernels(tmp_path)
    assert not any(path.exists() for path in old)
    assert new.exists()


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "cli.py", 900)
    make(tmp_path / "kernels.py", 100)
    kept = make(tmp_path / "__pycache__" / "kernels.f-1.py311.nbi", 200)
    forget_stale_kernels(tmp_path)
    forget_stale_kernels(tmp_path / "nothing")
    assert kept.exists()


def test_the_first_run_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert not compiled_before()
    make(tmp_path / "somewhere" / "codec.decode-47.py311.1.nbi", 100)
    assert compiled_before()


def test_compiled_kernels_load_without_what_compiling_needs() -> None:
    """Declaring all of NumPy to Numba takes longer than everything here takes to start, and so does SciPy's BLAS."""
    script = (
        "import sys; import numpy as np; from deltaworks.checkpoints.codec import decode;"
        "decode(np.zeros(16, np.uint8), 0, 0, 8, np.zeros(8, np.float32));"
        "print({'scipy.linalg', 'numba.np.arraymath'} & sys.modules.keys());"
        "import numba; print(numba.njit(lambda x: np.linalg.norm(x))(np.full(4, 3.0)))"
    )
    for _ in range(2):  # the first time may have to compile
        done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n6.0\n"
