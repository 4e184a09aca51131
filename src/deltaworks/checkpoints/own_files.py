"""The small files of a model folder: read and copied only where they belong to the model."""

import os
from pathlib import Path

from blake3 import blake3

from deltaworks.errors import CheckpointError
from deltaworks.regular_files import other_kind

_CHUNK = 1 << 20


def check_regular(path: Path, mode: int) -> None:
    """Refuse anything but a regular file, given its mode.

    Raises:
        CheckpointError: it is a named pipe, a device, a socket or a folder.
    """
    if (kind := other_kind(mode)) is not None:
        raise CheckpointError(f"{path} is {kind} and not a file; remove it from the model, or put the file there")


def own_file(path: Path, model: Path | None = None) -> Path | None:
    """The file that stands under a name in a model folder, links resolved; None where nothing does.

    A link may lead anywhere inside the model's repository. In a cache of the Hugging Face hub that is the folder that
    holds ``snapshots`` and ``blobs``; elsewhere it is the model folder itself.

    Args:
        path: the file.
        model: the model folder; the file's own folder where None.

    Raises:
        CheckpointError: the name is a link out of the repository or to nothing, or no regular file.
    """
    if not os.path.lexists(path):
        return None
    try:
        folder, target = (model or path.parent).resolve(), path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise CheckpointError(f"{path} cannot be followed: {reason}; is the download complete?") from error
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if (path.is_symlink() or model is not None) and repository not in target.parents:
        raise CheckpointError(
            f"{path} is a link to {target}, outside of the model; put the file itself there, or remove the link"
        )
    check_regular(path, mode)
    return target


def copy_own_file(source: Path, target: Path, model: Path | None = None) -> str:
    """Copy a file that belongs to a model, and flush it to the device; a file under the target's name is replaced.

    Args:
        source: the file.
        target: where the copy goes.
        model: the model folder; the file's own folder where None.

    Returns:
        The BLAKE3 of its contents, in hex.

    Raises:
        CheckpointError: see `own_file`; or it cannot be read.
        OSError: the copy cannot be written.
    """
    found = own_file(source, model)
    if found is None:
        raise CheckpointError(f"{source} is gone; was it removed meanwhile?")
    hasher = blake3()
    try:
        # Should a pipe take the file's place meanwhile, opening it must not wait for a writer.
        fd = os.open(found, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"cannot open {source}: {error.strerror}") from error
    with os.fdopen(fd, "rb", buffering=0) as reader:
        check_regular(source, os.fstat(fd).st_mode)
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with os.fdopen(out, "wb") as writer:
            while part := _read(reader.fileno(), source):
                hasher.update(part)
                writer.write(part)
            writer.flush()
            os.fsync(writer.fileno())
    return hasher.hexdigest()


def _read(fd: int, path: Path) -> bytes:
    try:
        return os.read(fd, _CHUNK)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
