"""Memory and files of a conversion's threads: tensors that are read and written around the page cache.

`O_DIRECT` is used where the file system supports it; ranges that are cached already, as after a download, are read from
the cache (cachestat, Linux >= 6.5). Buffered reads and writes would be simpler, and cost CPU that the conversion needs:
at 17a182e an import of 4 layers of gpt-oss-20b (14.4 GB moved, two shared cores) took 64 and 56 s in place of 46 and
38 s, with 36 s of system time in place of 3 s; an export with mxfp4 55 s in place of 53 s.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

BLOCK = 4096
"""Alignment of direct I/O, in the file and in memory: a page, and the largest sector in use."""

SMALL = 16 * BLOCK
"""Bytes below which a write goes through the page cache: each direct one waits for the disk."""

LIBC = ctypes.CDLL(None, use_errno=True)
CACHESTAT = 451
"""Number of the system call, on every architecture; the C library has no name for it."""


class Arena:
    """A stack of tensors in memory that is used again and again, private to this process.

    Fresh memory costs a page fault every 4 KiB, which adds up to seconds for the bytes of a checkpoint.

    Attributes:
        peak: most bytes that were taken at once.
    """

    def __init__(self) -> None:
        self._memory, self._end, self.peak = mmap.mmap(-1, BLOCK), 0, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        """An uninitialised tensor, valid until the end of the innermost `scope`.

        Args:
            shape: of the tensor.
            dtype: of the tensor.
            offset: position in a file that it will be written to; its memory has the same offset within a block.
        """
        start, count = self._end + (offset - self._end) % BLOCK, prod(shape)
        self._end = start + count * dtype.itemsize
        self.peak = max(self.peak, self._end)
        if self._end > len(self._memory):
            # Tensors keep the old mapping for as long as they live, and the new one's pages before `start` stay
            # untouched until then: together they take no more memory than was taken from the arena.
            self._memory = mmap.mmap(-1, 2 * self._end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(tuple(shape))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Free at the end what is taken within."""
        end = self._end
        try:
            yield
        finally:
            self._end = end


class File:
    """A file that any thread may read or write at any offset, by direct I/O where the file system supports it."""

    def __init__(self, path: Path, *, size: int | None = None):
        """Open for reading or, with the `size` that it will have, for writing; its blocks are reserved on the disk."""
        self.path = path
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT
        self.plain = os.open(path, flags, 0o666)
        self.size = os.fstat(self.plain).st_size
        try:
            if size is not None and self.size != size:
                self._resize(size)
            self.direct = os.open(path, flags & ~os.O_CREAT | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                os.close(self.plain)
                raise
            self.direct = self.plain

    def _resize(self, size: int) -> None:
        """Fill the file with zeros up to its size, or leave it empty where the disk is too small."""
        try:
            os.ftruncate(self.plain, 0)
            _reserve(self.plain, size)
            os.ftruncate(self.plain, size)
        except OSError:
            os.ftruncate(self.plain, 0)  # ext4 would keep all blocks that there were
            raise
        self.size = size

    def read(self, data: torch.Tensor, offset: int, nbytes: int) -> None:
        """Fill memory with a file's bytes, in whole blocks as far as the file goes.

        Args:
            data: whole blocks of memory, as bytes.
            offset: first byte, a multiple of `BLOCK`.
            nbytes: how many are needed.

        Raises:
            OSError: the file ends before.
        """
        wanted, done = min(len(data), _round_up(self.size - offset)), 0
        source = self.plain if self._is_cached(offset, wanted) else self.direct
        while done < nbytes:
            count = os.preadv(source, [memoryview(data.numpy())[done:wanted]], offset + done)
            done += count
            if (count % BLOCK and done < nbytes) or not count:
                raise OSError(f"{self.path} ends before byte {offset + nbytes}; copy it again")
        if self.direct == self.plain:
            os.posix_fadvise(self.plain, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether the page cache holds all of a range; False where the kernel has no such call."""
        wanted, found = (ctypes.c_uint64 * 2)(offset, nbytes), (ctypes.c_uint64 * 5)()
        failed = LIBC.syscall(CACHESTAT, self.plain, wanted, found, 0)
        return not failed and found[0] * mmap.PAGESIZE >= nbytes

    def write(self, data: torch.Tensor, offset: int) -> None:
        """Write bytes; whole blocks around the page cache where they have the same offset within a block in memory."""
        view, head = memoryview(data.numpy()), -offset % BLOCK
        body = (len(view) - head) // BLOCK * BLOCK
        if len(view) < SMALL or (data.data_ptr() - offset) % BLOCK:
            head = body = 0
        for descriptor, start, end in (
            (self.plain, 0, head),
            (self.direct, head, head + body),
            (self.plain, head + body, len(view)),
        ):
            while start < end:
                start += os.pwrite(descriptor, view[start:end], offset + start)

    def close(self) -> None:
        """Close both descriptors."""
        if self.direct != self.plain:
            os.close(self.direct)
        os.close(self.plain)


def bytes_of(data: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, in place."""
    return data.view(-1).view(torch.uint8)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve disk blocks for a file, so that the disk cannot become full half-way.

    By Linux's fallocate: `os.posix_fallocate` writes into every block where the file system does not support it.
    """
    if LIBC.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        error = ctypes.get_errno()
        if error not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(error, os.strerror(error))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK
