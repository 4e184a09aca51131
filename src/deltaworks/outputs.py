"""Check that an output does not destroy what it is made from, or the catalog."""

from collections.abc import Iterable
from pathlib import Path

from deltaworks.errors import OutputError


def check_apart(out: Path, inputs: Iterable[tuple[str, Path]]) -> None:
    """Refuse an output that is, contains, or lies inside a file or folder that must be kept.

    Links are followed. A link at `out` itself counts both as the link and as its target.

    Args:
        out: The file or folder to be written; need not exist.
        inputs: What must be kept: a word for it, such as ``the input``, and its path.

    Raises:
        OutputError: `out` and one of them overlap.
    """
    places = {out.resolve(), out.parent.resolve() / out.name}
    for what, path in inputs:
        kept = path.resolve()
        if any(p == kept or p in kept.parents or kept in p.parents for p in places) or _is_same_file(out, path):
            raise OutputError(f"{out} and {what} {path} overlap; choose another place for the output")


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder, such as two hard links or a bind mount."""
    try:
        return one.samefile(other)
    except OSError:
        return False
