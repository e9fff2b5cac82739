"""An output folder that appears under its name only when it is complete, and that a killed run can continue.

All files are written into ``OUT.partial/output``, beside ``OUT``, which is renamed at the end. ``OUT.partial/journal``
lists the tasks whose bytes are on the disk: one line each, appended after its files are synced. A call with the same
plan continues from there; one with another plan is refused. A second call is refused while the first holds an flock on
``OUT.partial/lock``. That file is opened read-write: NFS emulates flock by byte-range locks, which need it.

Resuming is kept although a 20B import takes half a minute on a local disk: network disks are slower, and 120B larger.
"""

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...atomic import exists_error, naming_full_disk, remove, sync
from ...errors import UserError

REMOVALS = 1000
"""How often other calls may remove the folder between our making and our locking it, before that is an error."""

COMPLETE = "complete"
"""Name of the last line: all files are written and synced, only renaming is left."""

FORGOTTEN = "forgotten"
"""Name of a line with tasks that earlier lines list and whose bytes are lost."""

ENTRIES = {"lock", "journal", "output", "replaced", "rubbish"}
"""Names in the folder of a partial output."""

NFS_PREFIX = ".nfs"
"""Of the names of removed files that a process still holds open on NFS."""


class Journal:
    """The partial output of one run; made by `open_output`.

    Attributes:
        output: the folder to write into.
        results: of all recorded tasks by name, those of earlier runs included.
    """

    def __init__(self, out: Path, partial: Path, lock: int):
        self.out, self.partial, self._lock = out, partial, lock
        self.output, self._replaced, self._file = output_of(partial), partial / "replaced", partial / "journal"
        self.results: dict[str, Any] = {}
        self._overwrite = False

    @property
    def is_begun(self) -> bool:
        """Whether the journal has a first line, so that another call can continue."""
        return any(_read_lines(self._file))

    @property
    def is_complete(self) -> bool:
        """Whether all files are written and synced, and at most the renaming is left."""
        return COMPLETE in self.results

    def record(self, results: Mapping[str, Any], files: Iterable[Path | str] = ()) -> None:
        """Record tasks as done, after syncing `files` and the folders above them up to the output.

        Args:
            results: of the tasks, by name.
            files: that they have written, as paths or by names within the output; none if these are synced already.
        """
        paths = [self.output / file for file in files]
        for path in {*paths, *folders_of(paths, self.output)}:
            sync(path)
        self._append(results)
        self.results |= results

    def forget(self, tasks: Iterable[str]) -> None:
        """Record tasks as not done, because their bytes are lost."""
        names = sorted(tasks)
        self._append({FORGOTTEN: names})
        for name in names:
            del self.results[name]

    def finish(self) -> None:
        """Sync all files and rename the output to its final name."""
        if not self.is_complete:
            self.record({COMPLETE: None}, [self.output, *self.output.rglob("*")])
        if self.output.exists():
            if os.path.lexists(self.out):
                if not self._overwrite:  # another program has made it in the meantime
                    raise exists_error(self.out)
                self._drop_replaced()
                self.out.rename(self._replaced)
            self.output.rename(self.out)
            sync(self.out.parent)
            sync(self.partial)
        self.remove()

    def start(self, plan: Mapping[str, Any], overwrite: bool) -> None:
        """Continue a partial output, or begin a new one; see `open_output` for the errors."""
        self._overwrite = overwrite
        lines = list(_read_lines(self._file))
        # A complete output that is missing here was renamed by a run that was killed right after that.
        is_renamed = len(lines) > 1 and COMPLETE in lines[-1] and not self.output.exists() and os.path.lexists(self.out)
        self._restore()
        if lines and not overwrite:
            _check_same_plan(lines[0], plan, self.partial)
        if os.path.lexists(self.out) and not overwrite and not is_renamed:
            raise exists_error(self.out)
        if not lines or lines[0] != plan or not (self.output.exists() or is_renamed):
            self._clear()
            self.output.mkdir()
            self._append(plan)
            sync(self.partial)
            return
        os.truncate(self._file, sum(len(_line(line)) for line in lines))  # without a line that a kill has cut off
        for line in lines[1:]:
            for name in line.pop(FORGOTTEN, ()):
                del self.results[name]
            self.results |= line

    def remove(self) -> None:
        """Remove everything but the folder itself, which `open_output` removes after closing the lock in it."""
        if _is_named(lock_file(self.partial), self._lock):  # afterwards the folder may be another call's
            self._clear()
            lock_file(self.partial).unlink()

    def _clear(self) -> None:
        """Remove everything but the lock: first the replaced output, then the journal, then the files that it lists."""
        self._restore()
        self._drop_replaced()
        self._file.unlink(missing_ok=True)
        sync(self.partial)
        for entry in self.partial.iterdir():
            if entry != lock_file(self.partial) and not entry.name.startswith(NFS_PREFIX):
                remove(entry)

    def _restore(self) -> None:
        """Rename a replaced output back, if a run was killed between moving it away and renaming its own."""
        if os.path.lexists(self._replaced) and not os.path.lexists(self.out):
            self._replaced.rename(self.out)
            sync(self.out.parent)
            sync(self.partial)

    def _drop_replaced(self) -> None:
        """Remove the replaced output, after a renaming: under the name ``replaced`` it must always be complete."""
        rubbish = self.partial / "rubbish"
        remove(rubbish)
        if os.path.lexists(self._replaced):
            self._replaced.rename(rubbish)
            remove(rubbish)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with self._file.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fdatasync(file.fileno())


@contextmanager
def open_output(out: Path, plan: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[Journal]:
    """The partial output of `out`, locked for as long as the run lasts.

    A run that ends with a UserError, which the same call would raise again, or before its first file, leaves nothing.
    After any other end, a kill included, the next call with the same plan continues.

    Args:
        out: the folder to make; with `overwrite` it may exist, and is replaced only when the new one is complete.
        plan: everything that decides the bytes of the output; JSON values only.
        overwrite: replace `out`, and remove a partial output of another plan.

    Raises:
        FileExistsError: `out` exists, or a partial output that was begun with another plan.
        BlockingIOError: another call is writing it.
        OSError: the disk is full, or fails.
    """
    out = out.absolute()
    plan = json.loads(json.dumps(plan))
    partial = partial_of(out)
    refuse_foreign(partial)
    if not partial.exists() and os.path.lexists(out) and not overwrite:
        raise exists_error(out)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    held = _hold(partial)
    try:
        journal = Journal(out, partial, held)
        with naming_full_disk(out, "make room, and the same call continues"):
            try:
                journal.start(plan, overwrite)
            except OSError:
                if not journal.is_begun:  # or a call had finished, and was killed before it removed the folder
                    journal.remove()
                raise
            try:
                yield journal
            except BaseException as error:
                if isinstance(error, UserError) or not any(journal.output.rglob("*")):
                    journal.remove()
                raise
    finally:
        os.close(held)  # before the folder is removed: NFS keeps an open file under another name
        with suppress(OSError):  # not empty: there is something to continue, or another call has begun
            for folder in (partial, *new_folders):
                folder.rmdir()


def check_space(out: Path, needed: int) -> int:
    """Refuse an output that the disk has no space for.

    Args:
        out: absolute path of the output; blocks that its partial output has already are not needed again.
        needed: bytes of the whole output.

    Returns:
        Free bytes on its disk.

    Raises:
        OSError: the disk is too small; names both numbers.
    """
    partial = partial_of(out)
    disk = os.statvfs(next(folder for folder in (partial, *partial.parents) if folder.exists()))
    written = (file for file in output_of(partial).rglob("*") if file.is_file())
    allocated = sum(file.stat().st_blocks * 512 for file in written)
    missing, free = needed - allocated, disk.f_bavail * disk.f_frsize
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs {missing / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            "make room or name a folder on another disk",
        )
    return free


def refuse_foreign(partial: Path) -> None:
    """Refuse a file or folder with the name of a partial output that no conversion has made.

    Raises:
        FileExistsError: there is one.
    """
    try:
        # Listed once: between two calls of the system, another conversion may make the folder or remove it.
        names = {name for name in os.listdir(partial) if not name.startswith(NFS_PREFIX)}
    except NotADirectoryError:
        names = {partial.name}
    except FileNotFoundError:
        names = {partial.name} if partial.is_symlink() else set()
    if names and not (names <= ENTRIES and names & {"lock", "journal"}):
        raise FileExistsError(f"{partial} is in the way, and no conversion has made it; move it away")


def partial_of(out: Path) -> Path:
    """The folder of an output until it is complete."""
    return out.parent / f"{out.name}.partial"


def output_of(partial: Path) -> Path:
    """The folder of the files of a partial output."""
    return partial / "output"


def fingerprint(folder: Path, *, apart_from: Path | None = None) -> dict[str, list[int]]:
    """Size and time of every file in a source folder, by which a later call with other sources is refused.

    Args:
        folder: of a source.
        apart_from: the output, which may lie within the folder, and is no part of the source; nor is its partial one.
    """
    folder, ours = folder.resolve(), []
    if apart_from is not None:
        out = apart_from.parent.resolve() / apart_from.name
        ours = [path for path in (out, partial_of(out)) if folder in path.parents]
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(folder)): [file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if not any(file.is_relative_to(path) for path in ours)
    }


def folders_of(paths: Iterable[Path], top: Path) -> set[Path]:
    """The folders above some paths, up to and including `top`."""
    return {folder for path in paths for folder in path.parents if folder.is_relative_to(top)}


def lock_file(partial: Path) -> Path:
    """The file that a call locks."""
    return partial / "lock"


def _hold(partial: Path) -> int:
    """Make the folder and lock it; the lock is held until the returned descriptor is closed, or the process ends."""
    removals = 0
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            held = os.open(lock_file(partial), os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, FileNotFoundError):  # another call has just finished, and removed them
            removals += 1
            if removals > REMOVALS:
                raise
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(held)
            if isinstance(error, BlockingIOError):
                sentence = f"{partial.with_suffix('')} is being written by another process; wait for it"
                raise BlockingIOError(error.errno, sentence) from error
            raise  # the file system has no locks
        if _is_named(lock_file(partial), held):
            return held
        os.close(held)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name; a call that finishes removes its lock file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_same_plan(before: Mapping[str, Any], plan: Mapping[str, Any], partial: Path) -> None:
    differing = sorted(key for key in {*before, *plan} if before.get(key) != plan.get(key))
    if differing:
        raise FileExistsError(
            f"{partial} was begun with another {', '.join(differing)}; call as before to continue it, "
            "or start afresh with --overwrite"
        )


def _line(entry: Mapping[str, Any]) -> bytes:
    text = json.dumps(entry).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal up to the first incomplete line."""
    if not file.exists():
        return
    for line in file.read_bytes().splitlines(keepends=True):
        if line[:9] != b"%08x " % zlib.crc32(line[9:-1]) or line[-1:] != b"\n":
            return
        yield json.loads(line[9:])
