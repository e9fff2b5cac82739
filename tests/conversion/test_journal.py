"""The crash-safe output folder: complete or not there, continued after any death, held by one call at a time."""

import errno
import os
from pathlib import Path

import pytest
from crashes import fork

from gpt_oss_vision.conversion.journal import check_space, open_output

PLAN = {"action": "test", "source": {"a": [1, 2]}}


def write(out: Path, plan: dict = PLAN, **options: bool) -> None:
    """An output of two units."""
    with open_output(out, plan, **options) as journal:
        for unit in ("one", "two"):
            if unit not in journal.results:
                (journal.output / unit).write_text(plan["action"])
                journal.record({unit: None})
        journal.finish()


def interrupted(out: Path, plan: dict = PLAN, **options: bool) -> None:
    """The same, given up after one unit."""
    with pytest.raises(OSError, match="disk"), open_output(out, plan, **options) as journal:
        (journal.output / "one").write_text("from the first call")
        journal.record({"one": {"kept": 1}})
        raise OSError("the disk fails")


def test_the_output_appears_only_when_it_is_finished(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        (journal.output / "file").write_text("x")
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
        journal.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_the_next_call_continues(tmp_path: Path):
    interrupted(tmp_path / "out")
    with open_output(tmp_path / "out", PLAN) as journal:
        assert journal.results == {"one": {"kept": 1}}
        journal.finish()
    assert (tmp_path / "out" / "one").read_text() == "from the first call"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_does_not_count(cut: int, tmp_path: Path):
    interrupted(tmp_path / "out")
    file = tmp_path / "out.partial" / "journal"
    whole = file.read_bytes()
    file.write_bytes(whole + whole.splitlines(keepends=True)[-1].replace(b"one", b"two")[:-cut])
    with open_output(tmp_path / "out", PLAN) as journal:
        assert journal.results.keys() == {"one"}
        assert file.read_bytes() == whole


def test_another_plan_is_refused_by_what_differs(tmp_path: Path):
    interrupted(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"begun with another source; .* --overwrite"):
        write(tmp_path / "out", PLAN | {"source": {"a": [1, 3]}})
    assert (tmp_path / "out.partial" / "output" / "one").exists()
    write(tmp_path / "out", PLAN | {"action": "new"}, overwrite=True)
    assert (tmp_path / "out" / "one").read_text() == "new"


def test_an_output_that_exists_is_not_touched(tmp_path: Path):
    write(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(tmp_path / "out", PLAN | {"action": "new"})
    assert (tmp_path / "out" / "one").read_text() == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_only_when_the_new_one_is_complete(tmp_path: Path):
    write(tmp_path / "out")
    interrupted(tmp_path / "out", PLAN | {"action": "new"}, overwrite=True)
    assert (tmp_path / "out" / "one").read_text() == "test"
    write(tmp_path / "out", PLAN | {"action": "newer"}, overwrite=True)
    assert (tmp_path / "out" / "one").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("survived", range(5))
def test_a_death_between_any_two_steps_of_finishing_is_continued(
    survived: int, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Finishing renames and removes; the process dies before each of these in turn, and is called again as before."""
    out = tmp_path / "out"
    if overwrite:
        write(out, PLAN | {"action": "old"})
    steps = iter(range(100))

    def dying(name: str):
        original = getattr(Path, name)

        def step(*args: object) -> object:
            if next(steps) == survived:
                os._exit(9)
            return original(*args)

        return step

    def write_and_die() -> None:
        for name in ("rename", "unlink", "rmdir"):
            monkeypatch.setattr(Path, name, dying(name))
        write(out, overwrite=overwrite)

    code = os.waitstatus_to_exitcode(os.waitpid(fork(write_and_die), 0)[1])
    assert code == (9 if survived < (4 if overwrite else 3) else 0)
    journal = tmp_path / "out.partial" / "journal"
    if code and (journal.exists() or overwrite):
        write(out, overwrite=overwrite)
    elif code:  # nothing was left to do but to remove an empty folder
        with pytest.raises(FileExistsError):
            write(out)
    assert (out / "one").read_text() == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_call_is_refused_and_harms_nothing(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        with pytest.raises(BlockingIOError, match="being written by another process"):
            write(tmp_path / "out", overwrite=True)
        (journal.output / "file").write_text("x")
        journal.finish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_bad_input_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="bad"), open_output(tmp_path / "out", PLAN):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_told_with_both_numbers(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        with pytest.raises(OSError, match=r"needs 1000000.00 GB more and its disk has \d+\.\d\d GB free") as failure:
            check_space(journal, 10**15)
        assert failure.value.errno == errno.ENOSPC


def test_what_is_written_already_counts_as_paid_for(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        (journal.output / "file").write_bytes(bytes(2**20))
        os.sync()
        disk = os.statvfs(tmp_path)
        check_space(journal, disk.f_bavail * disk.f_frsize + 2**19)
