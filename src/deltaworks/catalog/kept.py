"""The small files of an expert that are kept beside its layers: all there is of its tokenizer once it is gone."""

import os
from pathlib import Path

from deltaworks.catalog.fingerprint import hash_file
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import copy_sidecars, sidecar_names
from deltaworks.checkpoints.writer import fsync_folder
from deltaworks.errors import DamagedError
from deltaworks.layers.file import LayerIndex
from deltaworks.progress import Silent

LAYERS = ".layers"
FILES = "files"
"""The member of what layers say of themselves that holds the digest of each file, by its name."""


def keep_files(expert: Path, kept: Path) -> dict[str, str]:
    """Copy the small files of the model at `expert` to a folder of the catalog, durably, and nothing else stays there.

    Returns:
        The BLAKE3 of each, in hex, by its name.

    Raises:
        CheckpointError: one is not a file of the model.
        DamagedError: the folder is a link.
        OSError: it cannot be written.
    """
    if kept.is_symlink():
        raise DamagedError(f"{kept} is a link, which the catalog did not make; remove it")
    kept.mkdir(exist_ok=True)
    digests = copy_sidecars(expert, kept)
    for folder, _, files, fd in os.fwalk(kept):
        for name in files:
            if (Path(folder) / name).relative_to(kept).as_posix() not in digests:
                os.unlink(name, dir_fd=fd)
        os.fsync(fd)
    fsync_folder(kept.parent)
    return digests


def check_kept_files(name: str, kept: Path) -> None:
    """Make sure that the files kept of an expert are what was kept.

    Args:
        name: of the expert.
        kept: the folder.

    Raises:
        DamagedError: one is gone, differs, or was added.
        CatalogError: the expert's layers, which tell, are damaged.
    """
    digests = LayerIndex(kept.with_suffix(LAYERS)).about.get(FILES)
    if not isinstance(digests, dict):  # of an earlier version, which did not say
        return
    present = sidecar_names(kept)
    wrong = [f"{n} is gone" for n in digests if n not in present]
    wrong += [f"{n} was added" for n in present if n not in digests]
    both = (n for n in present if n in digests)
    wrong += [f"{n} differs" for n in both if hash_file(kept / n, ByteCounter(), Silent()) != digests[n]]
    if wrong:
        raise DamagedError(
            f"the files that {kept} keeps of {name} are damaged ({', '.join(wrong[:3])}); bring its model folder back"
            f" and keep them again: deltaworks analyze {name} --layers --force"
        )
