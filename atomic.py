"""The one way to write a file or a folder that appears under its name complete or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import TextIO


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Write a text file: a temporary file beside it is synced and renamed at the end, and removed on any failure.

    A symbolic link stays, and the file that it leads to is replaced. What is no regular file, such as a pipe or
    /dev/stdout, is written directly.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    partial = _partial_of(path)
    try:
        with naming_full_disk(path), partial.open("x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def check_file(path: Path, option: str, *, overwrite: bool) -> None:
    """Refuse a file that `atomic_file` could not write, or may not replace, before the work whose result it holds.

    Args:
        path: the file. Devices and pipes, such as /dev/stdout, are allowed.
        option: of the command that names it, for the message.
        overwrite: whether an existing file may be replaced.

    Raises:
        FileExistsError: it exists, and `overwrite` is False.
        OSError: it is a folder, its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; name a file in it")
    if path.is_file() and not overwrite:
        raise FileExistsError(f"{option} {path} exists; name another file, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The parent folder {path.parent} of {option} does not exist; make it first")
    if path.is_file() or not path.exists():
        try:
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise type(error)(f"{option} {path} cannot be written ({error.strerror}); name a file elsewhere") from error


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder: yield a temporary one beside it, which is renamed at the end, and removed on any failure.

    With `overwrite`, a folder of that name is moved to `.NAME.replaced` before the renaming, and removed after it. A
    kill of the process (contents are not synced against a loss of power) leaves the old folder or the new one under the
    name, or the old one as `.NAME.replaced`, which the next call moves back. Each temporary folder is locked while its
    process lives, so that the next call can remove those of processes that were killed.

    Raises:
        FileExistsError: the name is taken, and `overwrite` is False.
        OSError: the folder above does not exist or cannot be written, or `path` is a mount point.
    """
    path = Path(os.path.realpath(path))
    _clean_up(path)
    if os.path.lexists(path) and not overwrite:
        raise exists_error(path)
    if path.is_mount():
        raise OSError(f"{path} is a mount point, which cannot be replaced; name a folder in it")
    partial = _partial_of(path)
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot lock a folder; see _is_abandoned
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with naming_full_disk(path):
            yield partial
        if overwrite and os.path.lexists(path):
            path.rename(_replaced_of(path))
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        _clean_up(path)


def exists_error(folder: Path) -> FileExistsError:
    """The error of a call without `overwrite`."""
    return FileExistsError(f"{folder} exists; name another folder, or replace it with --overwrite")


@contextmanager
def naming_full_disk(path: Path, advice: str = "make room, or name a folder on another disk") -> Iterator[None]:
    """Name the disk of `path` in the error of a full one, which names no file, or only the one that was copied from.

    Raises:
        OSError: with ``errno.ENOSPC``, also in place of an error of torch or safetensors.
    """
    try:
        yield
    except BaseException as error:
        if not _is_of_full_disk(error, path):
            raise
        named = OSError(errno.ENOSPC, f"No space left on the disk of {path}; {advice}")
        for note in getattr(error, "__notes__", ()):
            named.add_note(note)
        raise named from error


def _is_of_full_disk(error: BaseException, path: Path) -> bool:
    """Whether a full disk has caused an error; those of `torch.save` and of torch's distributed checkpoints hide it."""
    if os.strerror(errno.ENOSPC) in str(error):
        return True
    if not any(word in f"{type(error).__name__}: {error}" for word in ("inline_container", "CheckpointException")):
        return False
    disk = os.statvfs(next(folder for folder in (path, *path.absolute().parents) if folder.exists()))
    return disk.f_bavail * disk.f_frsize < 16 * 2**20  # ext4 refuses a write some MiB before it is full


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists; a symbolic link itself, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{token_hex(4)}")


def _replaced_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _clean_up(path: Path) -> None:
    """Finish what a killed call has begun: move back or remove what it had replaced, remove its temporary folder."""
    replaced = _replaced_of(path)
    if os.path.lexists(replaced):
        if not os.path.lexists(path):
            replaced.rename(path)
        else:
            rubbish = replaced.rename(_partial_of(path))  # a folder called `.replaced` is always whole
            remove(rubbish)
    for partial in path.parent.glob(f".{escape(path.name)}.partial-*/"):
        if _is_abandoned(partial):
            shutil.rmtree(partial, ignore_errors=True)


def _is_abandoned(partial: Path) -> bool:
    """Whether no living process holds the lock of a temporary folder; False where the file system has no locks."""
    try:
        lock = os.open(partial, os.O_RDONLY)
    except OSError:  # its process has just renamed or removed it
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
