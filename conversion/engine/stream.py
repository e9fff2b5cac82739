"""Runs the tasks of a conversion in threads and records each in the journal once its bytes are on the disk.

A task reads, computes and writes. torch, xxhash and the kernel release the interpreter lock, so several tasks overlap.
"""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...atomic import sync
from ...terminal import Progress
from .files import BLOCK, Arena, File, bytes_of
from .journal import Journal, folders_of

STEP = 16 * 2**20
"""Bytes that a task handles at a time where it is free to choose."""

SECONDS_BETWEEN_SYNCS = 2.0

PADDING = 16 * BLOCK
"""Bytes by which the alignment of the tensors of one task can exceed `Task.memory`: two blocks of each of eight."""


@dataclass(frozen=True, slots=True)
class Task:
    """A part of a conversion that is done as a whole or not at all.

    Attributes:
        name: its name in the journal.
        files: output files that it writes, by name.
        run: does it; the result is JSON and is kept in the journal.
        memory: most bytes that `run` has taken from its worker at once; only the dry run uses this number.
        nbytes: bytes that it reads and writes, for the progress.
    """

    name: str
    files: tuple[str, ...]
    run: Callable[["Worker"], Any]
    memory: int
    nbytes: int


def write_header_task(file: str, data: bytes) -> Task:
    """A task that writes given bytes at the beginning of a file."""
    return Task(f"the beginning of {file}", (file,), lambda worker: worker.write(file, 0, data), 0, len(data))


def peak_memory(tasks: Iterable[Task], jobs: int) -> int:
    """Most bytes that `jobs` threads take for these tasks, beyond the interpreter and its libraries."""
    return jobs * (max((task.memory for task in tasks), default=0) + PADDING)


class Files:
    """The open files of a run.

    Attributes:
        progress: counts the bytes that are read and written.
        is_stopped: whether the threads are to end before their next write.
        outputs: by name.
    """

    def __init__(self, progress: Progress):
        self.progress, self.is_stopped = progress, False
        self.outputs, self._sources = dict[str, File](), dict[Path, File]()
        self._lock = threading.Lock()

    def create(self, folder: Path, sizes: Mapping[str, int]) -> None:
        """Open output files of given sizes; their names are on the disk afterwards, their bytes are not."""
        for name, size in sizes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.outputs[name] = File(folder / name, size=size)
        for parent in folders_of((folder / name for name in sizes), folder):
            sync(parent)

    def source(self, path: Path) -> File:
        """A file to read from, opened once."""
        with self._lock:
            if path not in self._sources:
                self._sources[path] = File(path)
            return self._sources[path]

    def check(self) -> None:
        """Raise `Stopped` where another task has failed."""
        if self.is_stopped:
            raise Stopped

    def close(self) -> None:
        """Close every file."""
        for file in (*self._sources.values(), *self.outputs.values()):
            file.close()


class Stopped(Exception):
    """Another task has failed."""


class Worker(Arena):
    """What the tasks of one thread use: memory, files and tools."""

    def __init__(self, files: Files):
        super().__init__()
        self._files, self._tools = files, dict[Any, Any]()

    def read(self, path: Path, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of a source file, row-major from a byte on, in memory taken for it."""
        lead, nbytes = offset % BLOCK, prod(shape) * dtype.itemsize
        blocks = self.take((-(-(lead + nbytes) // BLOCK) * BLOCK,), torch.uint8)
        self._files.source(path).read(blocks, offset - lead, lead + nbytes)
        self._files.progress.advance(nbytes)
        shift = lead % dtype.itemsize  # chunks of a torch_dist checkpoint begin anywhere
        if shift:
            ctypes.memmove(blocks.data_ptr() + lead - shift, blocks.data_ptr() + lead, nbytes)
        return blocks[lead - shift : lead - shift + nbytes].view(dtype).view(tuple(shape))

    def read_small(self, path: Path, offset: int, nbytes: int) -> bytes:
        """A few bytes of a source file, through the page cache."""
        return os.pread(self._files.source(path).plain, nbytes, offset)

    def cast(self, values: torch.Tensor, dtype: torch.dtype, offset: int) -> torch.Tensor:
        """Values of a type, in memory that `write` can write to a file's `offset` around the page cache."""
        if values.dtype == dtype and (values.data_ptr() - offset) % BLOCK == 0:
            return values
        return self.take(values.shape, dtype, offset).copy_(values)

    def write(self, name: str, offset: int, data: torch.Tensor | bytes) -> None:
        """Write a contiguous tensor, or a few bytes, into an output file; see `File.write` for the fast way."""
        self._files.check()
        data = (
            bytes_of(data) if isinstance(data, torch.Tensor) else torch.frombuffer(bytearray(data), dtype=torch.uint8)
        )
        self._files.outputs[name].write(data, offset)
        self._files.progress.advance(len(data))

    def tool[T](self, make: Callable[..., T], *args: Any) -> T:
        """``make(*args)``, made once in this thread: an object that keeps scratch memory."""
        key = (make, *args)
        if key not in self._tools:
            self._tools[key] = make(*args)
        return self._tools[key]


class InMemoryJournal:
    """In-memory journal, for runs that write nothing (verify)."""

    output = Path()

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def record(self, results: Mapping[str, Any]) -> None:
        """Keep the results of tasks."""
        self.results |= results

    def forget(self, tasks: Iterable[str]) -> None:
        """Drop the results of tasks."""
        for name in tasks:
            del self.results[name]


def stream(
    tasks: Sequence[Task],
    journal: Journal | InMemoryJournal,
    sizes: Mapping[str, int],
    *,
    jobs: int,
    progress: Progress,
) -> dict[str, Any]:
    """Run the tasks that are not done yet, and record them as their bytes reach the disk.

    Tasks are run again where a file that they wrote has vanished since, or has another size.

    Args:
        tasks: in the order in which to begin them.
        journal: of the output to write into.
        sizes: bytes of every output file, by its name within the output.
        jobs: threads.
        progress: counts every byte read and written.

    Returns:
        The results of all tasks by name, those of earlier runs included.

    Raises:
        Exception: what the first task that failed raised.
    """
    _forget_lost(tasks, journal, sizes)
    left = [task for task in tasks if task.name not in journal.results]
    progress.skip(sum(task.nbytes for task in tasks) - sum(task.nbytes for task in left))
    files = Files(progress)
    with _one_thread_per_operation(), _as_many_files_as_allowed():
        try:
            files.create(journal.output, {name: sizes[name] for name in sorted(_files_of(left))})
            with ThreadPoolExecutor(jobs) as pool:
                _run(left, files, journal, pool)
        finally:
            files.close()
    return {task.name: journal.results[task.name] for task in tasks}


def _run(tasks: Sequence[Task], files: Files, journal: Journal | InMemoryJournal, pool: ThreadPoolExecutor) -> None:
    """Run tasks and record them, several at a time, after their files are synced."""
    threads, finished, last = threading.local(), dict[Task, Any](), time.monotonic()
    error: BaseException | None = None

    def run(task: Task) -> Any:
        files.check()
        if not hasattr(threads, "worker"):
            threads.worker = Worker(files)
        try:
            with threads.worker.scope():
                return task.run(threads.worker)
        except BaseException:
            files.is_stopped = True
            raise

    def record() -> None:
        for name in sorted(_files_of(finished)):
            os.fdatasync(files.outputs[name].plain)
        journal.record({task.name: result for task, result in finished.items()})
        finished.clear()

    futures = {pool.submit(run, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            failure = future.exception()
            if failure is None:
                finished[futures[future]] = future.result()
            elif not isinstance(failure, Stopped):
                error = error or failure
            if finished and time.monotonic() - last > SECONDS_BETWEEN_SYNCS:
                record()
                last = time.monotonic()
        if finished:
            record()
    finally:
        files.is_stopped = True  # where the caller was interrupted, or the journal fails
    if error is not None:
        raise error


def _forget_lost(tasks: Iterable[Task], journal: Journal | InMemoryJournal, sizes: Mapping[str, int]) -> None:
    """Remove from the journal, before any file is created anew, the tasks whose bytes are lost."""
    recorded = [task for task in tasks if task.name in journal.results]
    lost = {name for name in _files_of(recorded) if not _has_size(journal.output / name, sizes[name])}
    if lost:
        journal.forget(task.name for task in recorded if not lost.isdisjoint(task.files))


def _files_of(tasks: Iterable[Task]) -> set[str]:
    return {name for task in tasks for name in task.files}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextmanager
def _as_many_files_as_allowed() -> Iterator[None]:
    """Every file is open twice until the end, too often for the usual soft limit of 1,024 at 256 ranks and more."""
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
