"""Write outputs, and check that they do not destroy other files, what they are made from, or the catalog."""

from collections.abc import Iterable
from pathlib import Path

from deltaworks.checkpoints.partial import replacing
from deltaworks.errors import OutputError
from deltaworks.regular_files import other_kind


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


def check_file(file: Path, own: str, *, force: bool) -> None:
    """Refuse to write a file over one of another kind, unless that is asked for.

    Args:
        file: The file to be written; devices and pipes can be written to.
        own: A key that stands in the first kilobyte of every JSON file of its kind; such a file may be replaced.
        force: Whether any file may be replaced.

    Raises:
        OutputError: `file` is a folder, or it is there, of another kind, and `force` is not set.
    """
    if file.is_dir():
        raise OutputError(f"{file}: is a folder; choose a file with -o")
    if force or not file.is_file():
        return
    with file.open("rb") as opened:
        head = opened.read(1024)
    if f'"{own}":'.encode() not in head:
        raise OutputError(f"{file}: exists and is something else; add --force to replace it, or choose another -o")


def write_file(file: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all, and the folders above it.

    Links are followed: the file that a link leads to is replaced, and the link stays.

    Args:
        file: Where.
        text: What.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    try:
        if file.exists() and other_kind(file.stat().st_mode) is not None:
            file.write_text(text, encoding="utf-8")  # a device or a pipe, which nothing may take the place of
            return
        target = file.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as opened:
            opened.write(text.encode())
    except OSError as error:  # name the file that was asked for, and not the partial one
        raise OSError(error.errno, error.strerror, str(file)) from None


def _is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file or folder, such as two hard links or a bind mount."""
    try:
        return one.samefile(other)
    except OSError:
        return False
