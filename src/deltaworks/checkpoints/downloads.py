"""Files that are not what their names say, because a download stopped, failed, or was of something else."""

import os
from pathlib import Path

from deltaworks.checkpoints.own_files import own_file
from deltaworks.errors import CheckpointError

HEAD_BYTES = 64
"""As many bytes of a file as tell what it is."""

_AGAIN = "the download failed: fetch it again"
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "fetch the file with git lfs pull"),
    (b"# xet version", "a Xet pointer in place of the file", "fetch the file with a client of the Hugging Face hub"),
    (b"<!doctype html", "a web page", _AGAIN),
    (b"<html", "a web page", _AGAIN),
    (b"<?xml", "an XML page", _AGAIN),
    (b"entry not found", "an error message of the hub", _AGAIN),
    (b"invalid username or password", "an error message of the hub", "log in, and fetch it again"),
    (b"access to model", "an error message of the hub", "ask for access to the model, and fetch it again"),
)
"""Leading bytes of files that are not model files (lower case)."""

_WEIGHT_KINDS = (
    (b"gguf", "a GGUF file", "merge the model's unquantized safetensors"),
    (b"pk\x03\x04", "a PyTorch archive", "convert it to safetensors first"),
    (b"\x80\x02", "a PyTorch pickle", "convert it to safetensors first"),
    (b"\x89hdf", "an HDF5 file", "convert it to safetensors first"),
)
"""Leading bytes of weight files in other formats (lower case)."""


def explain_weights(head: bytes, size: int) -> str | None:
    """What a file of `size` bytes beginning with `head` is in place of safetensors, and what to do; None if unknown."""
    if size == 0:
        return f"is empty; {_AGAIN}"
    if not head.strip(b"\0"):
        return "begins with zeros; the download did not finish: fetch it again"
    return _explain(head, _KINDS + _WEIGHT_KINDS)


def check_file(path: Path, head: bytes, size: int) -> None:
    """Refuse a small file of a model, of `size` bytes beginning with `head`, that is a pointer or an error page.

    Raises:
        CheckpointError: it is; the message says what to do.
    """
    problem = _explain(head, _KINDS)
    if size == 0 and path.suffix == ".json":
        problem = f"is empty; {_AGAIN}"
    if problem is not None:
        raise CheckpointError(f"{path} {problem}")


def check_files(folder: Path, names: list[str]) -> None:
    """Refuse small files of a model folder that are pointers, error pages or empty; see `check_file`."""
    for name in names:
        found = own_file(folder / name, folder)
        if found is None:
            continue
        try:
            with found.open("rb") as file:
                check_file(folder / name, file.read(HEAD_BYTES), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from error


def _explain(head: bytes, kinds: tuple[tuple[bytes, str, str], ...]) -> str | None:
    start = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \r\n").lower()
    return next((f"is {what}; {advice}" for begin, what, advice in kinds if start.startswith(begin)), None)
