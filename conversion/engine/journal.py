"""An output folder that appears under its name only when it is complete, and that a killed run can continue.

Everything is written into ``OUT.partial/output``, beside ``OUT``, and renamed at the end. ``OUT.partial/journal`` says
what is provably on the disk: a line per task, appended after the task's bytes have been synced. A call with the
same plan goes on from there; one with another plan is refused. An flock on ``OUT.partial/lock`` keeps a second call
out: on a file that is open for writing, as network file systems know no other between machines.
"""

import errno
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...atomic import remove, sync

SECONDS_OF_PATIENCE = 1.0
"""How long a call asks for the lock of another."""

REMOVALS = 1000
"""How often other calls may remove a folder between our making it and our locking it, before we call it broken."""

COMPLETE = "complete"
"""Name of the last line: all files are written and synced, only renaming is left."""

FORGOTTEN = "forgotten"
"""Name of a line with the tasks that earlier lines call done and that are not any more."""

OURS = {"lock", "journal", "output", "replaced", "rubbish"}
"""What a partial output's folder may hold."""

NFS_KEEPS = ".nfs"
"""How the names begin that NFS gives to removed files for as long as a process holds them open."""


class Journal:
    """The partial output of one run; made by `open_output`.

    Attributes:
        output: the folder to write into.
        results: what `record` was given for every task that is done, also by earlier runs.
    """

    def __init__(self, out: Path, partial: Path, lock: int):
        self.out, self.partial, self._lock = out, partial, lock
        self.output, self._replaced, self._file = output_of(partial), partial / "replaced", partial / "journal"
        self.results: dict[str, Any] = {}
        self._overwrite = False

    @property
    def is_begun(self) -> bool:
        """Whether there is something to continue."""
        return any(_read_lines(self._file))

    @property
    def is_complete(self) -> bool:
        """Whether everything was written, and at most the renaming is left."""
        return COMPLETE in self.results

    def record(self, results: Mapping[str, Any], files: Iterable[Path | str] = ()) -> None:
        """Remember tasks as done, when `files` and their names in the folders up to the output's are on the disk.

        Args:
            results: what the tasks returned, by their names.
            files: what they have written, as paths or by names within the output; none if that was synced before.
        """
        paths = [self.output / file for file in files]
        for path in {*paths, *folders_of(paths, self.output)}:
            sync(path)
        self._append(results)
        self.results |= results

    def forget(self, tasks: Iterable[str]) -> None:
        """Remember tasks as not done: what they had written is lost."""
        names = sorted(tasks)
        self._append({FORGOTTEN: names})
        for name in names:
            del self.results[name]

    def finish(self) -> None:
        """Sync all that was written and give it its name."""
        if not self.is_complete:
            self.record({COMPLETE: None}, [self.output, *self.output.rglob("*")])
        if self.output.exists():
            if os.path.lexists(self.out):
                if not self._overwrite:  # another program has made it in the meantime
                    raise exists(self.out)
                self._drop_replaced()
                self.out.rename(self._replaced)
            self.output.rename(self.out)
            sync(self.out.parent)
            sync(self.partial)
        self.remove()

    def start(self, plan: Mapping[str, Any], overwrite: bool) -> None:
        """Continue what is there, or begin anew; see `open_output` for what is refused."""
        self._overwrite = overwrite
        lines = list(_read_lines(self._file))
        # A complete output that is no longer here was renamed by a run that was killed right after it.
        is_renamed = len(lines) > 1 and COMPLETE in lines[-1] and not self.output.exists() and os.path.lexists(self.out)
        self._restore()
        if lines and not overwrite:
            _check_same_plan(lines[0], plan, self.partial)
        if os.path.lexists(self.out) and not overwrite and not is_renamed:
            raise exists(self.out)
        if not lines or lines[0] != plan or not (self.output.exists() or is_renamed):
            self._clear()
            self.output.mkdir()
            self._append(plan)
            sync(self.partial)
            return
        os.truncate(self._file, sum(len(_line(line)) for line in lines))  # without what a kill tore
        for line in lines[1:]:
            for name in line.pop(FORGOTTEN, ()):
                del self.results[name]
            self.results |= line

    def remove(self) -> None:
        """Remove everything but the folder, which `open_output` removes when the lock in it is closed."""
        if _is_named(lock_file(self.partial), self._lock):  # afterwards the folder may be another call's
            self._clear()
            lock_file(self.partial).unlink()

    def _clear(self) -> None:
        """Remove everything but the lock: the journal after what was replaced, and before all that it says is there."""
        self._restore()
        self._drop_replaced()
        self._file.unlink(missing_ok=True)
        sync(self.partial)
        for entry in self.partial.iterdir():
            if entry != lock_file(self.partial) and not entry.name.startswith(NFS_KEEPS):
                remove(entry)

    def _restore(self) -> None:
        """Give back what a run had moved away that was killed before it could put its own output there."""
        if os.path.lexists(self._replaced) and not os.path.lexists(self.out):
            self._replaced.rename(self.out)
            sync(self.out.parent)
            sync(self.partial)

    def _drop_replaced(self) -> None:
        """Remove what was replaced, by another name first: what bears this one is whole, and can be given back."""
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
    """The partial output of `out` for as long as the run lasts, held against other calls.

    A run that ends with a ValueError could never be continued, and one that the disk refused before its first file has
    nothing to continue, so they leave nothing; after any other end, a kill included, the next call with the same plan
    continues.

    Args:
        out: the folder to make; with `overwrite` it may exist, and is replaced only when the new one is complete.
        plan: everything that decides the bytes of the output; JSON values only.
        overwrite: replace `out`, and give up a partial output of another plan.

    Raises:
        FileExistsError: `out` exists, or the partial output that is there was begun with another plan.
        BlockingIOError: another call is writing it.
        OSError: the disk is full, or fails.
    """
    out = out.absolute()
    plan = json.loads(json.dumps(plan))
    partial = partial_of(out)
    refuse_foreign(partial)
    if not partial.exists() and os.path.lexists(out) and not overwrite:
        raise exists(out)
    new_folders = [folder for folder in out.parents if not folder.exists()]
    held = _hold(partial)
    try:
        journal = Journal(out, partial, held)
        try:
            journal.start(plan, overwrite)
        except OSError:
            if not journal.is_begun:  # also where a call had finished, and was killed before it could remove the folder
                journal.remove()
            raise
        try:
            yield journal
        except ValueError:
            journal.remove()
            raise
        except OSError as error:
            if not any(journal.output.rglob("*")):
                journal.remove()
            elif error.strerror == os.strerror(errno.ENOSPC):  # the kernel's words: neither where nor what now
                sentence = f"No space left on the disk of {out}; make room, and the same call continues"
                raise OSError(errno.ENOSPC, sentence) from error
            raise
    finally:
        os.close(held)  # before the folder goes: NFS keeps a file's name, changed, for as long as it is open
        with suppress(OSError):  # it is not empty, where there is something to continue or another call has come
            for folder in (partial, *new_folders):
                folder.rmdir()


def check_space(out: Path, needed: int) -> int:
    """Refuse to begin what the disk cannot hold.

    Args:
        out: absolute path of the output; what its partial output takes already counts as paid for.
        needed: bytes of the whole output.

    Returns:
        Bytes that are free on its disk.

    Raises:
        OSError: naming both numbers.
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
    """Leave alone what only happens to be called as a partial output is.

    Raises:
        FileExistsError: it is a file, or a folder that no call has begun.
    """
    try:
        # One look: between two, another call may have made the folder, or removed it.
        names = {name for name in os.listdir(partial) if not name.startswith(NFS_KEEPS)}
    except NotADirectoryError:
        names = {partial.name}
    except FileNotFoundError:
        names = {partial.name} if partial.is_symlink() else set()
    if names and not (names <= OURS and names & {"lock", "journal"}):
        raise FileExistsError(f"{partial} is in the way, and no conversion has made it; move it away")


def partial_of(out: Path) -> Path:
    """Where an output is until it is complete."""
    return out.parent / f"{out.name}.partial"


def output_of(partial: Path) -> Path:
    """Where the files of a partial output are."""
    return partial / "output"


def fingerprint(folder: Path, *, apart_from: Path | None = None) -> dict[str, list[int]]:
    """Size and time of every file in a folder: by these a plan knows its sources again.

    Args:
        folder: of a source.
        apart_from: the output, which may lie within the folder: neither it nor its partial one is a source.
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
    """The folders that hold some paths, up to and including `top`."""
    return {folder for path in paths for folder in path.parents if folder.is_relative_to(top)}


def lock_file(partial: Path) -> Path:
    """What is locked for as long as a call writes."""
    return partial / "lock"


def _hold(partial: Path) -> int:
    """Make the folder and lock it; the descriptor holds the lock until it is closed, by us or by our death.

    A process that was killed may have had a fork, which dies a moment later; so the lock is asked for more than once.
    """
    patience, removals = time.monotonic() + SECONDS_OF_PATIENCE, 0
    while True:
        try:
            partial.mkdir(parents=True, exist_ok=True)
            held = os.open(lock_file(partial), os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, FileNotFoundError):  # another call has just finished, and removed what was there
            removals += 1
            if removals > REMOVALS:
                raise
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(lock_file(partial), held):
                return held
        except BlockingIOError as error:
            if time.monotonic() > patience:
                os.close(held)
                sentence = f"{partial.with_suffix('')} is being written by another process; wait for it"
                raise BlockingIOError(error.errno, sentence) from error
            time.sleep(0.01)
        except OSError:  # this file system knows no locks
            os.close(held)
            raise
        os.close(held)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name; a call that has just finished removes its own."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def exists(out: Path) -> FileExistsError:
    """What a call without `overwrite` is refused with."""
    return FileExistsError(f"{out} exists; name another folder, or replace it with --overwrite")


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
    """The entries of a journal up to the first line that is torn."""
    if not file.exists():
        return
    for line in file.read_bytes().splitlines(keepends=True):
        if line[:9] != b"%08x " % zlib.crc32(line[9:-1]) or line[-1:] != b"\n":
            return
        yield json.loads(line[9:])
