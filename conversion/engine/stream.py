"""Moving bytes at the speed of the disk: tasks of work that read, compute and write, several at once.

A task is done by one thread from beginning to end; torch, xxhash and the kernel let go of the interpreter, so the
threads' reading, computing and writing overlap. Each thread has two buffers, made once and as large as the largest
task asks for, so the memory of a run is known before it starts. Files are read and written around the page cache where
the file system allows it; what the page cache holds of them, a fresh download for example, is read from there.
"""

import ctypes
import errno
import mmap
import os
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...atomic import sync
from ...terminal import Progress
from .journal import Journal, folders_of

BLOCK = 4096
"""What direct input and output are aligned to, in the file and in memory: a page, the largest sector in use."""

STEP = 16 * 2**20
"""Bytes that a task handles at a time where it is free to choose."""

SECONDS_BETWEEN_SYNCS = 2.0

LIBC = ctypes.CDLL(None, use_errno=True)
CACHESTAT = 451
"""The number of a call of Linux, on every architecture, that the C library does not name."""


class Buffer:
    """Page-aligned memory for direct input and output, as bytes of torch; no other process shares it."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._memory = mmap.mmap(-1, room_for(capacity), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)

    def view(self, start: int, nbytes: int) -> memoryview:
        """Bytes of the buffer for the kernel to read or fill."""
        return memoryview(self._memory)[start : start + nbytes]


class File:
    """A file that is read or written at any offset from any thread, around the page cache where that is possible."""

    def __init__(self, path: Path, *, size: int | None = None):
        """Open for reading or, with the `size` that it will have, for writing; room for it is reserved on the disk."""
        self.path = path
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT
        self.plain = os.open(path, flags, 0o644)
        self.size = os.fstat(self.plain).st_size
        if size is not None and self.size != size:
            self._grow(size)
        try:
            self.direct = os.open(path, flags & ~os.O_CREAT | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                os.close(self.plain)
                raise
            self.direct = self.plain  # this file system has no direct input and output

    def _grow(self, size: int) -> None:
        """Give the file its size, all at once or not at all; zeros take the place of what had another."""
        try:
            os.ftruncate(self.plain, 0)
            _reserve(self.plain, size)
            os.ftruncate(self.plain, size)
        except OSError:
            os.ftruncate(self.plain, 0)  # ext4 would keep all the room that there was
            os.close(self.plain)
            raise
        self.size = size

    def read(self, buffer: Buffer, offset: int, nbytes: int, *, at: int = 0) -> torch.Tensor:
        """Fill `buffer` from its byte `at`, a multiple of BLOCK, on; the bytes asked for, as a view of it.

        Raises:
            OSError: when the file ends before.
        """
        lead = offset % BLOCK
        wanted = min(_round_up(lead + nbytes), _round_up(self.size - offset + lead))
        assert at % BLOCK == 0 and at + wanted <= len(buffer.bytes)
        source = self.plain if self._is_cached(offset - lead, wanted) else self.direct
        done = 0
        while done < lead + nbytes:
            got = os.preadv(source, [buffer.view(at + done, wanted - done)], offset - lead + done)
            done += got
            if (got % BLOCK and done < lead + nbytes) or not got:
                raise OSError(f"{self.path} ends before byte {offset + nbytes}; copy it again")
        if self.direct == self.plain:
            os.posix_fadvise(self.plain, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return buffer.bytes[at + lead : at + lead + nbytes]

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether the page cache holds all of it; False where the kernel does not say (Linux before 6.5)."""
        asked, told = (ctypes.c_uint64 * 2)(offset, nbytes), (ctypes.c_uint64 * 5)()
        failed = LIBC.syscall(CACHESTAT, self.plain, asked, told, 0)
        return not failed and told[0] * mmap.PAGESIZE >= nbytes

    def write(self, buffer: Buffer, start: int, offset: int, nbytes: int) -> None:
        """Write `nbytes` of `buffer` from its byte `start` on, which lies as `offset` does between two blocks.

        What shares a block with other bytes of the file goes through the page cache, the rest around it.
        """
        assert start % BLOCK == offset % BLOCK
        head = min(-offset % BLOCK, nbytes)
        body = (nbytes - head) // BLOCK * BLOCK
        for descriptor, skip, count in (
            (self.plain, 0, head),
            (self.direct, head, body),
            (self.plain, head + body, nbytes - head - body),
        ):
            while count:
                written = os.pwrite(descriptor, buffer.view(start + skip, count), offset + skip)
                skip, count = skip + written, count - written

    def close(self) -> None:
        """Close both descriptors."""
        if self.direct != self.plain:
            os.close(self.direct)
        os.close(self.plain)


class InMemoryJournal:
    """Stands for a journal where nothing is written, so that nothing has to outlive a kill."""

    output = Path()

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def record(self, results: Mapping[str, Any]) -> None:
        """Remember what tasks returned."""
        self.results |= results

    def forget(self, tasks: Iterable[str]) -> None:
        """Remember tasks as not done."""
        for name in tasks:
            del self.results[name]


class Worker:
    """What a thread works with: a buffer to read into, one to write from, scratch memory, and the files."""

    def __init__(self, run: "Run", read_capacity: int, write_capacity: int, scratch_capacity: int):
        self.inbox, self.outbox = Buffer(read_capacity), Buffer(write_capacity)
        self.scratch = Buffer(scratch_capacity).bytes
        self.tools: dict[Any, Any] = {}
        self._run = run

    def read(self, path: Path, offset: int, nbytes: int, *, at: int = 0) -> torch.Tensor:
        """Bytes of a source file, in the inbox from byte `at` on, a multiple of BLOCK."""
        data = self._run.source(path).read(self.inbox, offset, nbytes, at=at)
        self._run.progress.advance(nbytes)
        return data

    def read_small(self, path: Path, offset: int, nbytes: int) -> bytes:
        """A few bytes of a source file, through the page cache."""
        return os.pread(self._run.source(path).plain, nbytes, offset)

    def room(self, offset: int, nbytes: int, *, at: int = 0) -> torch.Tensor:
        """The part of the outbox, from byte `at` on, a multiple of BLOCK, for what goes to `offset` of a file."""
        start = at + offset % BLOCK
        return self.outbox.bytes[start : start + nbytes]

    def write(self, name: str, offset: int, nbytes: int, *, at: int = 0) -> None:
        """Write what was put into ``room(offset, nbytes, at=at)`` into an output file."""
        self._run.check()
        self._run.outputs[name].write(self.outbox, at + offset % BLOCK, offset, nbytes)
        self._run.progress.advance(nbytes)

    def tool[T](self, make: Callable[..., T], *args: Any) -> T:
        """``make(*args)``, made once in this thread: an object that keeps scratch memory."""
        key = (make, *args)
        if key not in self.tools:
            self.tools[key] = make(*args)
        return self.tools[key]


@dataclass(frozen=True, slots=True)
class Task:
    """Work that is done or not done.

    Attributes:
        name: its name in the journal.
        files: output files that it writes, by name.
        run: does the work; what it returns is JSON and is kept in the journal.
        read_capacity: bytes of inbox that it needs.
        write_capacity: bytes of outbox that it needs.
        scratch_capacity: bytes of scratch that it needs.
        nbytes: bytes that it reads and writes, for the progress.
    """

    name: str
    files: tuple[str, ...]
    run: Callable[[Worker], Any]
    read_capacity: int
    write_capacity: int
    scratch_capacity: int
    nbytes: int


def room_for(nbytes: int) -> int:
    """Bytes of a buffer that a read of `nbytes` from anywhere in a file can touch."""
    return _round_up(nbytes) + BLOCK


def write_header_task(file: str, data: bytes) -> Task:
    """A task that begins a file with given bytes."""

    def run(worker: Worker) -> None:
        worker.room(0, len(data)).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        worker.write(file, 0, len(data))

    return Task(f"the beginning of {file}", (file,), run, 0, len(data), 0, len(data))


def peak_memory(tasks: Iterable[Task], jobs: int) -> int:
    """Bytes of buffers that a run will hold: what it needs beyond the interpreter and its libraries."""
    tasks = list(tasks)
    return jobs * sum(max((getattr(task, name) for task in tasks), default=0) for name in CAPACITIES)


CAPACITIES = ("read_capacity", "write_capacity", "scratch_capacity")


class Run:
    """The state that the threads of one run share."""

    def __init__(self, progress: Progress):
        self.progress, self.outputs = progress, dict[str, File]()
        self.todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[tuple[Task, Any] | BaseException | None] = queue.SimpleQueue()
        self._sources: dict[Path, File] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()

    def source(self, path: Path) -> File:
        """A file to read from, opened once."""
        with self._lock:
            if path not in self._sources:
                self._sources[path] = File(path)
            return self._sources[path]

    def check(self) -> None:
        """End this thread when another has failed."""
        if self._stop.is_set():
            raise Stopped

    def stop(self) -> None:
        """Let every thread end before its next write."""
        self._stop.set()

    def close(self) -> None:
        """Close every file."""
        for file in (*self._sources.values(), *self.outputs.values()):
            file.close()

    def work(self, capacities: Sequence[int]) -> None:
        """What a thread does: tasks until there are none. An error is handed to the caller, who ends the others."""
        try:
            worker = Worker(self, *capacities)
            while not self._stop.is_set():
                task = self.todo.get_nowait()
                self.done.put((task, task.run(worker)))
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self.done.put(error)
        finally:
            self.done.put(None)


class Stopped(Exception):
    """Another thread has failed."""


def stream(
    tasks: Sequence[Task],
    journal: Journal | InMemoryJournal,
    sizes: Mapping[str, int],
    *,
    jobs: int,
    progress: Progress,
) -> dict[str, Any]:
    """Do the tasks that are not done yet, and record them as they become durable.

    Those that wrote into a file that has vanished since, or has another size, are done again.

    Args:
        tasks: in the order in which to begin them.
        journal: the output to write into.
        sizes: bytes of every output file, by its name within the output.
        jobs: threads.
        progress: told of every byte read and written.

    Returns:
        What every task returned, by its name, tasks of earlier runs included.

    Raises:
        Exception: what the first task that failed raised.
    """
    _forget_lost(tasks, journal, sizes)
    left = [task for task in tasks if task.name not in journal.results]
    progress.skip(sum(task.nbytes for task in tasks) - sum(task.nbytes for task in left))
    names = sorted({name for task in left for name in task.files})
    run = Run(progress)
    for task in left:
        run.todo.put(task)
    capacities = [max((getattr(task, name) for task in left), default=0) for name in CAPACITIES]
    threads = [threading.Thread(target=run.work, args=(capacities,), daemon=True) for _ in range(jobs)]
    with _one_thread_per_operation(), _as_many_files_as_allowed():
        try:
            for name in names:
                run.outputs[name] = _create(journal.output / name, sizes[name])
            for folder in folders_of((journal.output / name for name in names), journal.output):
                sync(folder)
            for thread in threads:
                thread.start()
            _collect(run, journal, jobs)
        finally:
            run.stop()
            for thread in threads:
                if thread.ident:
                    thread.join()
            run.close()
    return {task.name: journal.results[task.name] for task in tasks}


def _collect(run: Run, journal: Journal | InMemoryJournal, jobs: int) -> None:
    """Take the threads' results until all have ended, and record them, several at a time, after their bytes."""
    finished: dict[Task, Any] = {}
    last, error, running = time.monotonic(), None, jobs
    while running:
        item = run.done.get()
        if isinstance(item, BaseException):
            error = error or item
            run.stop()
        elif item is None:
            running -= 1
        else:
            task, result = item
            finished[task] = result
        if finished and (not running or time.monotonic() - last > SECONDS_BETWEEN_SYNCS):
            for name in sorted({name for task in finished for name in task.files}):
                os.fdatasync(run.outputs[name].plain)
            journal.record({task.name: result for task, result in finished.items()})
            finished, last = {}, time.monotonic()
    if error is not None:
        raise error


def _forget_lost(tasks: Iterable[Task], journal: Journal | InMemoryJournal, sizes: Mapping[str, int]) -> None:
    """Take back, before any file is made anew, that tasks are done whose bytes are not there."""
    recorded = [task for task in tasks if task.name in journal.results]
    names = {name for task in recorded for name in task.files}
    lost = {name for name in names if not _has_size(journal.output / name, sizes[name])}
    if lost:
        journal.forget(task.name for task in recorded if not lost.isdisjoint(task.files))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _create(path: Path, size: int) -> File:
    path.parent.mkdir(parents=True, exist_ok=True)
    return File(path, size=size)


@contextmanager
def _as_many_files_as_allowed() -> Iterator[None]:
    """Every file is open twice until the end; the usual soft limit of 1,024 would stop at a checkpoint of 256 ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _one_thread_per_operation():
    """Parallel tasks, not parallel operations: each of our threads would start an OpenMP pool of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _reserve(descriptor: int, size: int) -> None:
    """Take room on the disk for a file, so that it cannot run full half-way.

    By Linux's own call: where a file system knows none, the C library's would write into every block instead.
    """
    if LIBC.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        error = ctypes.get_errno()
        if error not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error, os.strerror(error))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
