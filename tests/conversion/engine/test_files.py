"""Arenas reuse memory; files are read and written with direct I/O, and ranges in the page cache are read from it."""

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints import at_most_open
from gpt_oss_vision.conversion.engine.files import BLOCK, SMALL, Arena, File, bytes_of
from gpt_oss_vision.conversion.engine.stream import Files, Worker
from gpt_oss_vision.terminal import Progress

SIZE = 300 * BLOCK + 77
CONTENT = random.Random(0).randbytes(SIZE)
HAS_CACHESTAT = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 5)


def blocks(nbytes: int) -> torch.Tensor:
    """A buffer of whole blocks with at least `nbytes` bytes."""
    return Arena().take((-(-nbytes // BLOCK) * BLOCK,), torch.uint8)


def test_tensors_of_a_scope_do_not_overlap_and_the_next_scope_uses_their_memory_again():
    arena, addresses = Arena(), []
    for size in (100, 100_000, 100_000, 100):
        with arena.scope():
            tensors = [arena.take((size,), torch.int64).fill_(number) for number in range(5)]
            with arena.scope():
                arena.take((size,), torch.int64).fill_(9)
            tensors.append(arena.take((), torch.bfloat16).fill_(5))
            assert [[*{*tensor.view(-1).tolist()}] for tensor in tensors] == [[number] for number in range(6)]
            addresses.append(tensors[0].data_ptr())
    assert addresses[2] == addresses[3]


@pytest.mark.parametrize("offset", [0, 1, 64, BLOCK - 1, 5 * BLOCK + 7])
def test_memory_for_a_file_has_the_offset_of_the_file_within_a_block(offset: int):
    arena = Arena()
    for _ in range(3):
        assert (arena.take((1000,), torch.uint8, offset).data_ptr() - offset) % BLOCK == 0


def anonymous_memory() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_an_arena_occupies_private_memory_of_its_peak_size():
    arena, before = Arena(), anonymous_memory()
    for nbytes in (2**20, 2**25, 2**26):
        with arena.scope():
            tensors = [arena.take((nbytes // 2,), torch.uint8).fill_(1) for _ in range(2)]
            taken = anonymous_memory() - before
            assert 0.9 * nbytes < taken < 1.1 * nbytes + 2**20
            del tensors
    assert arena.peak == 2**26


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened = File(path)
    os.fsync(opened.plain)
    yield opened
    opened.close()


def forget(file: File, offset: int = 0, nbytes: int = 0) -> None:
    os.posix_fadvise(file.plain, offset, nbytes, os.POSIX_FADV_DONTNEED)


def read_from_the_disk() -> int:
    """Bytes that were read from disks for this process so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize(("offset", "nbytes"), [(0, SIZE), (1, 1), (BLOCK - 1, 2), (5000, 90_000), (SIZE - 78, 78)])
@pytest.mark.parametrize("cached", ["all", "half", "none"])
def test_bytes_are_the_same_wherever_they_are_read_from(file: File, offset: int, nbytes: int, cached: str):
    if cached != "all":
        forget(file, 0, 0 if cached == "none" else SIZE // 2)
    worker = Worker(Files(Progress("", 0)))
    found = worker.read(file.path, offset, (nbytes,), torch.uint8)
    assert bytes(found.numpy()) == CONTENT[offset : offset + nbytes]


@pytest.mark.parametrize("offset", [0, 1, 4, BLOCK + 3])
def test_elements_may_begin_at_any_byte_of_a_file(file: File, offset: int):
    found = Worker(Files(Progress("", 0))).read(file.path, offset, (1000, 3), torch.float32)
    assert bytes(bytes_of(found).numpy()) == CONTENT[offset : offset + 12000]


@pytest.mark.parametrize("nbytes", [1, SMALL - 1, SMALL, 5 * SMALL + 9])
@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, 3 * BLOCK])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_bytes_are_written_where_they_belong_and_nowhere_else(
    offset: int, nbytes: int, is_aligned: bool, tmp_path: Path
):
    size = 10 * SMALL
    (tmp_path / "file").write_bytes(bytes(size))
    file = File(tmp_path / "file", size=size)
    data = Arena().take((nbytes,), torch.uint8, offset if is_aligned else offset + 1)
    file.write(data.copy_(torch.frombuffer(bytearray(CONTENT[:nbytes]), dtype=torch.uint8)), offset)
    file.close()
    written = (tmp_path / "file").read_bytes()
    assert written == bytes(offset) + CONTENT[:nbytes] + bytes(size - offset - nbytes)


@pytest.mark.skipif(not HAS_CACHESTAT, reason="Linux before 6.5 does not say what the page cache holds")
def test_cached_bytes_are_not_read_from_the_disk(file: File):
    if file.direct == file.plain:
        pytest.skip("this file system has no direct input")
    data, begun = blocks(SIZE), read_from_the_disk()
    file.read(data, 0, SIZE)
    assert read_from_the_disk() == begun
    forget(file)
    file.read(data, 0, SIZE)
    assert read_from_the_disk() - begun >= SIZE // BLOCK * BLOCK


def test_a_cold_read_leaves_the_page_cache_as_it_was(file: File):
    if file.direct == file.plain:
        pytest.skip("this file system has no direct input")
    data = blocks(SIZE)
    forget(file)
    for _ in range(2):
        begun = read_from_the_disk()
        file.read(data, 0, SIZE)
        assert read_from_the_disk() - begun >= SIZE // BLOCK * BLOCK


@pytest.mark.parametrize("cached", [True, False])
def test_a_truncated_file_is_an_error_with_advice(file: File, cached: bool):
    data = blocks(SIZE)
    os.truncate(file.path, 40_000)
    if not cached:
        forget(file)
    with pytest.raises(OSError, match="ends before byte 80000; copy it again"):
        file.read(data, 0, 80_000)


def test_too_many_open_files_is_an_error_and_leaves_none_open(file: File):
    """The error is not mistaken for a file system without `O_DIRECT`."""
    free = os.dup(file.plain)
    os.close(free)
    with at_most_open(free + 1), pytest.raises(OSError, match="Too many open files") as failure:
        File(file.path)
    assert failure.value.errno == errno.EMFILE
    again = os.dup(file.plain)
    os.close(again)
    assert again == free


def test_a_file_system_without_direct_io_is_read_buffered(file: File, monkeypatch: pytest.MonkeyPatch):
    opening = os.open

    def refusing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opening(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    indirect = File(file.path)
    assert indirect.direct == indirect.plain
    data = blocks(SIZE)
    indirect.read(data, 0, SIZE)
    assert bytes(data[:SIZE].numpy()) == CONTENT
    indirect.close()
