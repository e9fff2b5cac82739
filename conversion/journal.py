"""An output folder that appears under its name only when it is complete, and that a killed run can continue.

Everything is written into ``OUT.partial/output``, beside ``OUT``, and renamed at the end. ``OUT.partial/journal`` says
what is provably on the disk: a line per unit of work, appended after the unit's bytes have been synced. A call with the
same plan goes on from there; one with another plan is refused. An flock on the folder keeps a second call out.
"""

import errno
import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS_OF_PATIENCE = 1.0

COMPLETE = "complete"
"""Name of the last line: all files are written and synced, only renaming is left."""


class Journal:
    """The partial output of one run; made by `open_output`.

    Attributes:
        output: the folder to write into.
        results: what `record` was given for every unit that is done, also by earlier runs.
    """

    def __init__(self, out: Path, partial: Path, lock: int):
        self.out, self.partial, self._lock = out, partial, lock
        self.output, self._replaced, self._file = partial / "output", partial / "replaced", partial / "journal"
        self.results: dict[str, Any] = {}

    @property
    def is_begun(self) -> bool:
        """Whether there is something to continue."""
        return any(_read_lines(self._file))

    @property
    def is_complete(self) -> bool:
        """Whether everything was written, and at most the renaming is left."""
        return COMPLETE in self.results

    def record(self, results: Mapping[str, Any]) -> None:
        """Remember units as done. Their bytes must have been synced before."""
        self._append(results)
        self.results |= results

    def allocated(self) -> int:
        """Bytes that the partial output takes on the disk already."""
        return sum(file.stat().st_blocks * 512 for file in self.output.rglob("*") if file.is_file())

    def release(self) -> None:
        """Close this process's end of the lock. In a fork: the lock stays the parent's alone."""
        os.close(self._lock)

    def finish(self) -> None:
        """Sync all that was written and give it its name."""
        if not self.is_complete:
            for path in [*self.output.rglob("*"), self.output]:
                sync(path)
            self.record({COMPLETE: None})
        if self.output.exists():
            if self.out.exists():
                self.out.rename(self._replaced)
            self.output.rename(self.out)
            sync(self.out.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._file.unlink()  # last: as long as there is anything to do, it says so
        self.partial.rmdir()

    def start(self, plan: Mapping[str, Any], overwrite: bool) -> None:
        """Continue what is there, or begin anew; see `open_output` for what is refused."""
        lines = list(_read_lines(self._file))
        # A complete output that is no longer here was renamed by a run that was killed right after it.
        is_renamed = len(lines) > 1 and COMPLETE in lines[-1] and not self.output.exists()
        if lines and not overwrite:
            _check_same_plan(lines[0], plan, self.partial)
        if self.out.exists() and not overwrite and not is_renamed and not self._replaced.exists():
            raise FileExistsError(f"{self.out} exists; name another folder, or replace it with --overwrite")
        if not lines or lines[0] != plan:
            _empty(self.partial)
            self.output.mkdir()
            self._append(plan)
            sync(self.partial)
            return
        os.truncate(self._file, sum(len(_line(line)) for line in lines))  # without what a kill tore
        for line in lines[1:]:
            self.results |= line

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
    partial = out.with_name(out.name + ".partial")
    if not partial.exists() and out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; name another folder, or replace it with --overwrite")
    held = _hold(partial)
    try:
        journal = Journal(out, partial, held)
        try:
            journal.start(plan, overwrite)
        except OSError:
            if not journal.is_begun:  # also where a call had finished, and was killed before it could remove the folder
                shutil.rmtree(partial)
            raise
        try:
            yield journal
        except ValueError:
            shutil.rmtree(partial)
            raise
        except OSError as error:
            if not any(journal.output.rglob("*")):
                shutil.rmtree(partial)
            elif error.strerror == os.strerror(errno.ENOSPC):  # the kernel's words: neither where nor what now
                sentence = f"No space left on the disk of {out}; make room, and the same call continues"
                raise OSError(errno.ENOSPC, sentence) from error
            raise
    finally:
        os.close(held)


def check_space(journal: Journal, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        journal: its partial output counts as paid for.
        needed: bytes of the whole output.

    Raises:
        OSError: naming both numbers.
    """
    disk = os.statvfs(journal.partial)
    missing, free = needed - journal.allocated(), disk.f_bavail * disk.f_frsize
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"{journal.out} needs {missing / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            "make room or name a folder on another disk",
        )


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file in a folder: by these a plan knows its sources again."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hold(partial: Path) -> int:
    """Make the folder and lock it; the descriptor holds the lock until it is closed, by us or by our death.

    A process that was killed may have had a fork, which dies a moment later; so the lock is asked for more than once.
    """
    patience = time.monotonic() + SECONDS_OF_PATIENCE
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another call has just finished
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(os.fstat(held), partial.stat()):
                return held
        except BlockingIOError as error:
            if time.monotonic() > patience:
                os.close(held)
                sentence = f"{partial.with_suffix('')} is being written by another process; wait for it"
                raise BlockingIOError(error.errno, sentence) from error
            time.sleep(0.01)
        os.close(held)


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


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
