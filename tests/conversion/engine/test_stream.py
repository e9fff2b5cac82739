"""Tasks of a conversion: recorded after their bytes are on the disk, and run again if these are lost."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import at_most_open
from gpt_oss_vision.conversion.engine.files import BLOCK
from gpt_oss_vision.conversion.engine.journal import Journal, open_output
from gpt_oss_vision.conversion.engine.stream import InMemoryJournal, Task, Worker, stream
from gpt_oss_vision.terminal import Progress

SIZES = {"a/b/one": 2 * BLOCK, "c/two": 2 * BLOCK, "a/b/three": 100}
"""Files of an output. The first two have a task for each half; one of these tasks also writes the third file."""

EXPECTED = {"a/b/one": b"1" * BLOCK + b"2" * BLOCK, "c/two": b"1" * BLOCK + b"2" * BLOCK, "a/b/three": b"3" * 100}


def tasks(done: list[str], failing: str = "") -> list[Task]:
    """Tasks that write EXPECTED and append their names to `done`; the task named `failing` raises instead."""

    def task(name: str, places: Mapping[str, tuple[int, int]]) -> Task:
        def run(worker: Worker) -> None:
            if name == failing:
                raise OSError("the disk fails")
            for file, (offset, nbytes) in places.items():
                worker.write(file, offset, EXPECTED[file][offset : offset + nbytes])
            done.append(name)

        return Task(name, tuple(places), run, 0, 0)

    return [
        task("one, first half", {"a/b/one": (0, BLOCK)}),
        task("two, first half", {"c/two": (0, BLOCK)}),
        task("one, second half, and three", {"a/b/one": (BLOCK, BLOCK), "a/b/three": (0, 100)}),
        task("two, second half", {"c/two": (BLOCK, BLOCK)}),
    ]


def call(out: Path, failing: str = "") -> list[str]:
    """Run the pending tasks of an unfinished output; return the names of those that ran in this call."""
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
def test_every_task_that_wrote_into_a_lost_file_runs_again(
    lose: Callable[[Path], object], name: str, again: list[str], tmp_path: Path
):
    out = tmp_path / "out"
    assert call(out) == [task.name for task in tasks([])]
    assert call(out) == []
    lose(tmp_path / "out.partial" / "output" / name)
    assert call(out) == again
    assert written(out) == EXPECTED
    assert call(out) == []


def test_a_lost_file_of_an_interrupted_run_is_written_again(tmp_path: Path):
    out = tmp_path / "out"
    assert call(out, failing="two, second half") == [task.name for task in tasks([])][:3]
    (tmp_path / "out.partial" / "output" / "a" / "b" / "one").unlink()
    assert call(out) == ["one, first half", "one, second half, and three", "two, second half"]
    assert written(out) == EXPECTED


def test_a_lost_file_counts_as_lost_even_after_a_failed_call_has_created_it(tmp_path: Path):
    out = tmp_path / "out"
    call(out)
    (tmp_path / "out.partial" / "output" / "c" / "two").unlink()
    assert call(out, failing="two, first half") == []
    assert written(out)["c/two"] == bytes(2 * BLOCK)
    assert call(out) == ["two, first half", "two, second half"]
    assert written(out) == EXPECTED


def test_before_a_task_is_recorded_its_files_and_their_folders_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After a power cut, the journal must not list a task whose bytes or files are lost."""
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


def test_more_files_can_be_read_than_the_soft_limit_of_open_files(tmp_path: Path):
    files = [tmp_path / str(number) for number in range(300)]
    for file in files:
        file.write_bytes(file.name.encode())

    def task(file: Path) -> Task:
        def run(worker: Worker) -> str:
            return bytes(worker.read(file, 0, (len(file.name),), torch.uint8).numpy()).decode()

        return Task(file.name, (), run, 0, 0)

    with at_most_open(256):
        results = stream([task(file) for file in files], InMemoryJournal(), {}, jobs=2, progress=Progress("", 0))
    assert list(results.items()) == [(file.name, file.name) for file in files]
