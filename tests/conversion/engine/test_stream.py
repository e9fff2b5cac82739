"""Reading around the page cache, and from it; tasks of work that outlive what happens to their files."""

import errno
import os
import random
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_oss_vision.conversion.engine.journal import Journal, open_output
from gpt_oss_vision.conversion.engine.stream import BLOCK, Buffer, File, InMemoryJournal, Task, Worker, stream
from gpt_oss_vision.terminal import Progress

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


def anonymous_memory() -> int:
    """Bytes that this process has for itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_buffer_is_memory_of_this_process():
    buffer, before = Buffer(64 * 2**20), anonymous_memory()
    buffer.bytes.fill_(1)
    assert anonymous_memory() - before >= 60 * 2**20


SIZES = {"a/b/one": 2 * BLOCK, "c/two": 2 * BLOCK, "a/b/three": 100}
"""Of an output; the first two files have a task for each half, another task writes into the first and the third."""

EXPECTED = {"a/b/one": b"1" * BLOCK + b"2" * BLOCK, "c/two": b"1" * BLOCK + b"2" * BLOCK, "a/b/three": b"3" * 100}


def tasks(done: list[str], failing: str = "") -> list[Task]:
    """Tasks that write EXPECTED and tell their names; one fails in its place."""

    def task(name: str, places: Mapping[str, tuple[int, int]]) -> Task:
        def run(worker: Worker) -> None:
            if name == failing:
                raise OSError("the disk fails")
            for file, (offset, nbytes) in places.items():
                data = bytearray(EXPECTED[file][offset : offset + nbytes])
                worker.room(offset, nbytes).copy_(torch.frombuffer(data, dtype=torch.uint8))
                worker.write(file, offset, nbytes)
            done.append(name)

        return Task(name, tuple(places), run, 0, 2 * BLOCK, 0, 0)

    return [
        task("one, first half", {"a/b/one": (0, BLOCK)}),
        task("two, first half", {"c/two": (0, BLOCK)}),
        task("one, second half, and three", {"a/b/one": (BLOCK, BLOCK), "a/b/three": (0, 100)}),
        task("two, second half", {"c/two": (BLOCK, BLOCK)}),
    ]


def call(out: Path, failing: str = "") -> list[str]:
    """Do the tasks of an output that is not finished; the names of those that were done in this call."""
    done: list[str] = []
    with pytest.raises(OSError, match="the disk fails"), open_output(out, {}) as journal:
        stream(tasks(done, failing), journal, SIZES, jobs=1, progress=Progress("", 0))
        raise OSError("the disk fails")
    return done


def written(out: Path) -> dict[str, bytes]:
    folder = out.with_name(out.name + ".partial") / "output"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


LOSSES: dict[str, Callable[[Path], object]] = {
    "vanished": Path.unlink,
    "shorter": lambda file: os.truncate(file, 50),
    "longer": lambda file: file.write_bytes(b"x" * 5 * BLOCK),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("a/b/one", ["one, first half", "one, second half, and three"]),
        ("c/two", ["two, first half", "two, second half"]),
        ("a/b/three", ["one, second half, and three"]),
    ],
)
def test_all_that_wrote_into_a_lost_file_is_done_again(
    lose: Callable[[Path], object], name: str, again: list[str], tmp_path: Path
):
    out = tmp_path / "out"
    assert call(out) == [task.name for task in tasks([])]
    assert call(out) == []
    lose(tmp_path / "out.partial" / "output" / name)
    assert call(out) == again
    assert written(out) == EXPECTED
    assert call(out) == []


def test_a_lost_file_of_a_run_that_was_not_through_is_made_again(tmp_path: Path):
    out = tmp_path / "out"
    assert call(out, failing="two, second half") == [task.name for task in tasks([])][:3]
    (tmp_path / "out.partial" / "output" / "a" / "b" / "one").unlink()
    assert call(out) == ["one, first half", "one, second half, and three", "two, second half"]
    assert written(out) == EXPECTED


def test_that_a_file_was_lost_is_known_after_a_call_that_made_it_and_failed(tmp_path: Path):
    out = tmp_path / "out"
    call(out)
    (tmp_path / "out.partial" / "output" / "c" / "two").unlink()
    assert call(out, failing="two, first half") == []
    assert written(out)["c/two"] == bytes(2 * BLOCK)
    assert call(out) == ["two, first half", "two, second half"]
    assert written(out) == EXPECTED


def test_before_a_unit_is_recorded_its_files_and_their_folders_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A journal that outlives a power cut must not speak of bytes, or of files, that do not."""
    monkeypatch.setattr("gpt_oss_vision.conversion.engine.stream.SECONDS_BETWEEN_SYNCS", 0.0)
    happened: list[Path | str] = []

    def telling(call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            happened.append(Path(f"/proc/self/fd/{descriptor}").readlink())
            call(descriptor)

        return wrapped

    append = Journal._append

    def telling_append(journal: Journal, entry: Mapping[str, Any]) -> None:
        happened.extend(entry)
        append(journal, entry)

    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, telling(getattr(os, name)))
    monkeypatch.setattr(Journal, "_append", telling_append)
    call(tmp_path / "out")
    output = tmp_path / "out.partial" / "output"
    for task in tasks([]):
        before = happened[: happened.index(task.name)]
        for file in (output / name for name in task.files):
            folders = [folder for folder in file.parents if folder.is_relative_to(output)]
            assert output in folders
            assert {file, *folders} <= set(before)


@contextmanager
def at_most(descriptors: int) -> Iterator[None]:
    """With a soft limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        yield
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (descriptors, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_are_read_than_the_soft_limit_lets_be_open(tmp_path: Path):
    files = [tmp_path / str(number) for number in range(300)]
    for file in files:
        file.write_bytes(file.name.encode())

    def task(file: Path) -> Task:
        def run(worker: Worker) -> str:
            return bytes(worker.read(file, 0, len(file.name)).numpy()).decode()

        return Task(file.name, (), run, 2 * BLOCK, 0, 0, 0)

    with at_most(256):
        results = stream([task(file) for file in files], InMemoryJournal(), {}, jobs=2, progress=Progress("", 0))
    assert list(results.items()) == [(file.name, file.name) for file in files]


def test_too_many_open_files_is_an_error_and_leaves_none_open(file: File):
    """And not taken for a file system without direct input."""
    free = os.dup(file.plain)
    os.close(free)
    with at_most(free + 1), pytest.raises(OSError, match="Too many open files") as failure:
        File(file.path)
    assert failure.value.errno == errno.EMFILE
    again = os.dup(file.plain)
    os.close(again)
    assert again == free


def test_a_file_system_without_direct_input_is_read_without(file: File, monkeypatch: pytest.MonkeyPatch):
    opening = os.open

    def refusing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opening(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    indirect = File(file.path)
    assert indirect.direct == indirect.plain
    assert bytes(indirect.read(Buffer(SIZE + BLOCK), 0, SIZE).numpy()) == CONTENT
    indirect.close()
