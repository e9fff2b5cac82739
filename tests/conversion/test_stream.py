"""Reading around the page cache, and from it."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_oss_vision.conversion.stream import BLOCK, Buffer, File

SIZE = 300 * BLOCK + 77
CONTENT = random.Random(0).randbytes(SIZE)
ASKS_THE_CACHE = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 5)


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
    """Bytes that this process has had read from disks so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize(("offset", "nbytes"), [(0, SIZE), (1, 1), (BLOCK - 1, 2), (5000, 90_000), (SIZE - 78, 78)])
@pytest.mark.parametrize("cached", ["all", "half", "none"])
def test_bytes_are_the_same_wherever_they_are_read_from(file: File, offset: int, nbytes: int, cached: str):
    if cached != "all":
        forget(file, 0, 0 if cached == "none" else SIZE // 2)
    buffer = Buffer(SIZE + 2 * BLOCK)
    found = file.read(buffer, offset, nbytes, at=BLOCK)
    assert bytes(found.numpy()) == CONTENT[offset : offset + nbytes]


@pytest.mark.skipif(not ASKS_THE_CACHE, reason="Linux before 6.5 does not say what the page cache holds")
def test_what_the_page_cache_holds_is_not_read_from_the_disk(file: File):
    if file.direct == file.plain:
        pytest.skip("this file system has no direct input")
    buffer, begun = Buffer(SIZE + BLOCK), read_from_the_disk()
    file.read(buffer, 0, SIZE)
    assert read_from_the_disk() == begun
    forget(file)
    file.read(buffer, 0, SIZE)
    assert read_from_the_disk() - begun >= SIZE // BLOCK * BLOCK


def test_a_cold_read_leaves_the_page_cache_as_it_was(file: File):
    if file.direct == file.plain:
        pytest.skip("this file system has no direct input")
    buffer = Buffer(SIZE + BLOCK)
    forget(file)
    for _ in range(2):
        begun = read_from_the_disk()
        file.read(buffer, 0, SIZE)
        assert read_from_the_disk() - begun >= SIZE // BLOCK * BLOCK


@pytest.mark.parametrize("cached", [True, False])
def test_a_file_that_was_cut_off_gets_a_sentence(file: File, cached: bool):
    buffer = Buffer(SIZE + BLOCK)
    os.truncate(file.path, 40_000)
    if not cached:
        forget(file)
    with pytest.raises(OSError, match="ends before byte 80000; copy it again"):
        file.read(buffer, 0, 80_000)
