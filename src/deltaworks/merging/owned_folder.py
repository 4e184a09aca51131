"""A hidden folder in which a merge builds its output: made by us, locked by one process, emptied of nothing else.

Anybody who may write beside an output can put a folder or a link where a merge wants to build. A folder is ours when it
belongs to this user, is not a link, and holds nothing but what its journal lists (or, when the journal is removed just
before the output appears, its manifest). Everything is done relative to the open folder, so that a link which takes its
place later leads nowhere.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from deltaworks.checkpoints.partial import lock
from deltaworks.documents import parse_json
from deltaworks.errors import OutputError, quoted
from deltaworks.merging.manifest import MANIFEST, is_inside, listed_files, read_manifest

JOURNAL = ".journal.json"
_NEW = f"{JOURNAL}.new"
SPOOL = ".spool-"
"""Prefix of spool files; they are unlinked immediately after creation."""
_MARK = "deltaworks_staging"
_JOURNAL_BYTES = 64 << 20


class OwnedFolder:
    """An open, locked folder of ours.

    Args:
        path: where it is.
        create: make it where it does not exist.
        replaced: the identity (see `identity`) that a folder had which was to be replaced: if the one at `path` is
            that, a run was killed while it removed it, and all of it may go.

    Attributes:
        path: where it is.
        journal: what its journal says besides the list of files; empty where there is none.
        is_locked: no other process can hold it; False on a file system without locks, where nobody can tell.

    Raises:
        OutputError: it was not created by deltaworks, or another process holds it.
        OSError: it cannot be made or opened.
    """

    def __init__(self, path: Path, *, create: bool = True, replaced: str | None = None) -> None:
        self.path, self.journal = path, dict[str, Any]()
        self._names: set[str] = set()
        self._fd, self.is_locked = -1, False
        if replaced is not None and (path.is_symlink() or not path.is_dir()) and _identity_or_none(path) == replaced:
            path.unlink()  # a file or a link that changed places with a folder of ours
        while self._fd < 0:
            is_new = False
            if create:
                with suppress(FileExistsError):
                    path.mkdir()
                    is_new = True
            self._fd = self._open()
        try:
            if replaced is not None and identity(path) == replaced:
                self._remove_all()
            elif not is_new:
                self._check_owner()
            self._read_journal()
            self._check_entries()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        """Open and lock the folder; -1 where it was renamed meanwhile."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise self._foreign("it is a link" if self.path.is_symlink() else "it is not a folder") from error
        try:
            self.is_locked = lock(fd)
            if os.path.samestat(os.fstat(fd), os.lstat(self.path)):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise OutputError(
                f"another process is writing {output_of(self.path)}; wait for it, or choose another folder"
            ) from error
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return -1

    def _foreign(self, why: str) -> OutputError:
        return OutputError(
            f"{self.path} exists and was not created by deltaworks: {why}; move it away, or choose another output"
        )

    def _check_owner(self) -> None:
        if os.fstat(self._fd).st_uid != os.geteuid():
            raise self._foreign("it belongs to another user")

    def _read_journal(self) -> None:
        try:
            fd = os.open(JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except FileNotFoundError:
            if _is_regular(self._fd, MANIFEST):
                self._names = {MANIFEST, *listed_files(read_manifest(self.path))}
                if not self.is_there():  # the manifest was read by its path
                    raise self._foreign("it was replaced while it was being opened") from None
            return
        except OSError as error:
            raise self._foreign(f"its {JOURNAL} cannot be read ({error.strerror})") from error
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise self._foreign(f"its {JOURNAL} is not a file")
            raw = file.read(_JOURNAL_BYTES)
        where = str(self.path / JOURNAL)
        content = parse_json(raw, where, "the journal of a merge", OutputError)
        if not (
            isinstance(content, dict)
            and content.get(_MARK) == 1
            and isinstance(content.get("plan"), str)
            and _is_mapping(content.get("shards"), str)
            and _is_mapping(content.get("expert_bytes"), int)
            and content["shards"].keys() <= content["expert_bytes"].keys()
            and isinstance(content.get("files"), list)
            and all(isinstance(n, str) and is_inside(n) for n in content["files"])
        ):
            raise OutputError(f"{where} is not the journal of a merge by this version; move {self.path} away")
        self._names = set(content.pop("files"))
        self.journal = content

    def _check_entries(self) -> None:
        known = self._names | {JOURNAL, _NEW}
        for name, is_file in self._entries():
            if not (is_file and (name in known or name.startswith(SPOOL))):
                raise self._foreign(f"it holds {quoted(name)}, which no merge put there")

    def _entries(self) -> Iterator[tuple[str, bool]]:
        """Everything in the folder but folders that hold something: its name, and whether it is a regular file."""
        for folder, folders, files, fd in os.fwalk(".", dir_fd=self._fd, follow_symlinks=False):
            inside = folder.removeprefix(".").removeprefix("/")
            if inside and not folders and not files:
                yield inside, any(n.startswith(f"{inside}/") for n in self._names)
            for name in (*files, *(n for n in folders if stat.S_ISLNK(os.lstat(n, dir_fd=fd).st_mode))):
                yield os.path.join(inside, name), _is_regular(fd, name)  # noqa: PTH118  # a relative name

    def claim(self, names: Iterable[str], **journal: Any) -> None:
        """Note in the journal, durably, which files will be written, and whatever else it is to hold.

        Raises:
            OutputError: a name leads out of the folder.
            OSError: it cannot be written.
        """
        self._names |= set(names)
        self.journal |= journal
        if outside := [n for n in self._names if not is_inside(n)]:
            self._names -= set(outside)
            raise OutputError(f"{quoted(outside[0])} is not the name of a file inside of an output")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(_NEW, flags, 0o666, dir_fd=self._fd), "w", encoding="utf-8") as file:
            json.dump({_MARK: 1, "files": sorted(self._names), **self.journal}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(_NEW, JOURNAL, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def seal(self) -> list[str]:
        """Remove the journal: from now on, what is here is what the manifest lists. Returns unclaimed names."""
        unclaimed = [n for n, _ in self._entries() if n not in self._names and n not in (JOURNAL, _NEW)]
        self._unlink(JOURNAL)
        os.fsync(self._fd)
        return unclaimed

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove every file that was claimed but some; where none stays, the journal as well. Nothing else goes."""
        for name, _ in list(self._entries()):
            if name not in keep and (name in self._names or name.startswith(SPOOL) or name == _NEW):
                self._unlink(name)
        folders = {str(p) for n in self._names - set(keep) for p in Path(n).parents if str(p) != "."}
        for folder in sorted(folders, key=len, reverse=True):
            with suppress(FileNotFoundError):
                os.rmdir(folder, dir_fd=self._fd)
        self._names &= set(keep)
        if not keep:
            self._unlink(JOURNAL)
            self.journal = {}

    def discard(self) -> None:
        """Remove the folder with every file that was claimed.

        Raises:
            OSError: it holds something else by now, or cannot be removed.
        """
        self.clear()
        if self.is_there():
            self.path.rmdir()

    def is_there(self) -> bool:
        """Whether the open folder still stands at its path."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _remove_all(self) -> None:
        for name in os.listdir(self._fd):  # noqa: PTH208  # of a descriptor
            if stat.S_ISDIR(os.lstat(name, dir_fd=self._fd).st_mode):
                shutil.rmtree(name, dir_fd=self._fd)
            else:
                self._unlink(name)

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Unlock the folder."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def staging_path(out: Path) -> Path:
    """Where the merge into `out` builds."""
    return out.parent / f".{out.name}.deltaworks"


def output_of(staging: Path) -> Path:
    """The inverse of `staging_path`."""
    return staging.parent / staging.name[1:].removesuffix(".deltaworks")


def identity(path: Path) -> str:
    """What tells a file or folder from all others of this system, whatever it is called; links are not followed.

    Raises:
        OSError: there is none.
    """
    found = path.lstat()
    return f"{found.st_dev}:{found.st_ino}"


def _identity_or_none(path: Path) -> str | None:
    return identity(path) if os.path.lexists(path) else None


def _is_regular(folder: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode)
    except FileNotFoundError:
        return False


def _is_mapping(content: object, kind: type) -> bool:
    return isinstance(content, dict) and all(
        isinstance(k, str) and isinstance(v, kind) and not isinstance(v, bool) for k, v in content.items()
    )
