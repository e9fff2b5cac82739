"""The crash-safe output folder: complete or absent, continued after any crash, locked by one call at a time."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import fork

from gpt_oss_vision.conversion.engine.journal import Journal, check_space, fingerprint, open_output
from gpt_oss_vision.errors import UserError

PLAN = {"action": "test", "source": {"a": [1, 2]}}


def write(out: Path, plan: dict = PLAN, **options: bool) -> None:
    """Write an output of two tasks."""
    with open_output(out, plan, **options) as journal:
        for task in ("one", "two"):
            if task not in journal.results:
                (journal.output / task).write_text(plan["action"])
                journal.record({task: None})
        journal.finish()


def interrupted(out: Path, plan: dict = PLAN, **options: bool) -> None:
    """The same, interrupted by an error after one task."""
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


def test_another_plan_is_refused_and_the_difference_named(tmp_path: Path):
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


class Listing(list[os.DirEntry[str]]):
    """The result of `os.scandir` in another order."""

    def __enter__(self) -> "Listing":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def dies(work: Callable[[], object], survived: int) -> bool:
    """Run `work` in a fork that exits before its rename or removal number `survived` (from 0); return whether it did.

    Folders list the journal last, an order that a file system may give.
    """
    left, scan = itertools.count(survived, -1), os.scandir

    def dying(step: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: Any, **options: Any) -> object:
            if not next(left):
                os._exit(9)
            return step(*args, **options)

        return wrapped

    def scandir(folder: Any) -> Listing:
        with scan(folder) as entries:
            return Listing(sorted(entries, key=lambda entry: entry.name == "journal"))

    def mortal() -> None:
        os.scandir, os.listdir = scandir, lambda folder: [entry.name for entry in scandir(folder)]
        for name in ("rename", "unlink", "rmdir"):  # what pathlib and shutil call in the end
            setattr(os, name, dying(getattr(os, name)))
        work()

    code = os.waitstatus_to_exitcode(os.waitpid(fork(mortal), 0)[1])
    assert code in (0, 9)
    return code == 9


def dies_replacing(out: Path, survived: int) -> bool:
    """The same for a call that replaces an old output."""
    write(out, PLAN | {"action": "old"})
    return dies(lambda: write(out, overwrite=True), survived)


def state(folder: Path) -> dict[str, bool]:
    """Which parts of a partial output exist."""
    return {name: os.path.lexists(folder / name) for name in ("journal", "output", "replaced")}


STEPS = range(14)
"""More steps than a call has; the first two remove possible leftovers of another call."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("survived", STEPS)
def test_a_crash_between_any_two_steps_of_finishing_is_continued(survived: int, overwrite: bool, tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    if overwrite:
        write(out, PLAN | {"action": "old"})
    died = dies(lambda: write(out, overwrite=overwrite), survived)
    assert died == (survived < (13 if overwrite else 7))
    assert state(partial)["journal"] or not state(partial)["replaced"]
    if died and (state(partial)["journal"] or overwrite or not out.exists()):
        write(out, overwrite=overwrite)
    elif died:  # only the lock and its folder were still to be removed
        with pytest.raises(FileExistsError):
            write(out)
    assert (out / "one").read_text() == "test"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("survived", STEPS)
def test_a_complete_output_survives_a_crash_in_overwriting_and_another_plan_after_it(survived: int, tmp_path: Path):
    """A complete output exists under the name until the next call has finished another one."""
    out = tmp_path / "out"
    dies_replacing(out, survived)
    interrupted(out, PLAN | {"action": "newer"}, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]
    assert (out / "one").read_text() == (out / "two").read_text() != "newer"
    write(out, PLAN | {"action": "newer"}, overwrite=True)
    assert (out / "two").read_text() == "newer"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("survived", STEPS)
def test_after_a_crash_in_overwriting_a_call_without_overwrite_replaces_nothing(survived: int, tmp_path: Path):
    out = tmp_path / "out"
    died = dies_replacing(out, survived)
    before = (out / "one").read_text() if out.exists() else "old"
    if died and before == "test" and state(tmp_path / "out.partial")["journal"]:
        write(out)  # the crashed call had finished this output
    else:
        with pytest.raises(FileExistsError, match=r"out exists; .* --overwrite"):
            write(out)
    assert (out / "one").read_text() == (out / "two").read_text() == before


def test_leftovers_of_overwriting_give_no_later_call_the_permission_to_overwrite(tmp_path: Path):
    out = tmp_path / "out"
    write(out)
    (tmp_path / "out.partial" / "replaced").mkdir(parents=True)
    (tmp_path / "out.partial" / "lock").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(out, PLAN | {"action": "new"})
    assert (out / "one").read_text() == "test"


def spoiled(out: Path) -> None:
    """Fail because of bad input, which removes the output."""
    with contextlib.suppress(UserError), open_output(out, PLAN):
        raise UserError("bad")


REMOVALS = {
    "by bad input": spoiled,
    "by another plan": lambda out: interrupted(out, PLAN | {"action": "new"}, overwrite=True),
}


@pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)
@pytest.mark.parametrize("survived", range(4))
def test_a_crash_in_removing_leaves_no_journal_of_missing_files(
    remove: Callable[[Path], object], survived: int, tmp_path: Path
):
    interrupted(tmp_path / "out")
    dies(lambda: remove(tmp_path / "out"), survived)
    with open_output(tmp_path / "out", PLAN, overwrite=True) as journal:
        assert journal.results.keys() == {path.name for path in journal.output.iterdir()}


def link(out: Path) -> None:
    (out.parent / "target").mkdir()
    (out.parent / "target" / "kept").touch()
    out.symlink_to("target")


KINDS = {
    "a symlink": link,
    "a symlink to nothing": lambda out: out.symlink_to("nothing"),
    "a file": lambda out: out.write_text("x"),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_file_or_link_is_replaced_only_on_request_and_links_are_not_followed(
    make: Callable[[Path], object], tmp_path: Path
):
    out = tmp_path / "out"
    make(out)
    others = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="--overwrite"):
        write(out)
    write(out, overwrite=True)
    assert not out.is_symlink() and (out / "one").read_text() == "test"
    assert {path.name for path in tmp_path.iterdir()} == others
    assert "target" not in others or (tmp_path / "target" / "kept").exists()


def test_a_file_that_another_program_makes_in_the_meantime_is_not_replaced(tmp_path: Path):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="--overwrite"), open_output(out, PLAN) as journal:
        (journal.output / "one").write_text("test")
        out.write_text("another's")
        journal.finish()
    assert out.read_text() == "another's"


def test_files_and_their_folders_are_synced_before_they_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with open_output(tmp_path / "out", PLAN) as journal:
        (journal.output / "a" / "b").mkdir(parents=True)
        (journal.output / "a" / "b" / "file").write_text("x")
        synced: list[Path] = []
        monkeypatch.setattr("gpt_oss_vision.conversion.engine.journal.sync", synced.append)
        append = Journal._append
        monkeypatch.setattr(Journal, "_append", lambda *args: (append(*args), synced.append(Path("recorded"))))
        journal.record({"task": None}, ["a/b/file"])
    assert synced.pop() == Path("recorded")
    assert set(synced) == {journal.output / name for name in (".", "a", "a/b", "a/b/file")}


def test_a_forgotten_task_is_pending_in_the_next_call_and_can_be_recorded_again(tmp_path: Path):
    out = tmp_path / "out"
    interrupted(out)
    with pytest.raises(OSError, match="disk"), open_output(out, PLAN) as journal:
        journal.forget(["one"])
        assert not journal.results
        raise OSError("the disk fails")
    with pytest.raises(OSError, match="disk"), open_output(out, PLAN) as journal:
        assert not journal.results
        journal.record({"one": 2})
        raise OSError("the disk fails")
    with open_output(out, PLAN) as journal:
        assert journal.results == {"one": 2}


def test_a_journal_whose_output_is_gone_begins_anew(tmp_path: Path):
    interrupted(tmp_path / "out")
    shutil.rmtree(tmp_path / "out.partial" / "output")
    with open_output(tmp_path / "out", PLAN) as journal:
        assert not journal.results
        assert journal.output.is_dir()


def test_the_lock_is_on_a_file_that_is_open_for_writing(tmp_path: Path):
    """NFS emulates `flock` by byte-range locks, and an exclusive one needs a writable descriptor."""
    with open_output(tmp_path / "out", PLAN) as journal:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")]
        held = [each for each in descriptors if Path(f"/proc/self/fd/{each}").readlink().parent == journal.partial]
        assert [stat.S_ISREG(os.fstat(each).st_mode) for each in held] == [True]
        assert fcntl.fcntl(held[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        with open(f"/proc/self/fd/{held[0]}", "rb+") as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def quick(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder, and how often it can be written in a second or two; in memory this is often enough to hit the races."""
    if request.param == "disk":
        yield tmp_path, 30
    elif not os.access(MEMORY, os.W_OK):
        pytest.skip(f"no {MEMORY}")
    else:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            yield Path(folder), 600


def test_calls_that_come_as_others_finish_do_not_harm_each_other(quick: tuple[Path, int]):
    """Each call removes the lock file that others may have just opened, and the folder that others may be listing."""
    folder, times = quick
    out = folder / "out"

    def write_often(action: str) -> None:
        for _ in range(times):
            with contextlib.suppress(BlockingIOError):
                write(out, PLAN | {"action": action}, overwrite=True)

    children = [fork(lambda action=action: write_often(action)) for action in ("a", "b", "c")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (out / "one").read_text() == (out / "two").read_text()
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_a_second_call_is_refused_and_harms_nothing(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        with pytest.raises(BlockingIOError, match="being written by another process"):
            write(tmp_path / "out", overwrite=True)
        (journal.output / "file").write_text("x")
        journal.finish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


FAILURES = {
    "bad input": UserError("bad"),
    "a bug": ValueError("zip() argument 2 is longer than argument 1"),
    "the disk": OSError("the disk fails"),
    "no memory": MemoryError(),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_only_bad_input_removes_what_is_written(failure: BaseException, tmp_path: Path):
    """The same call would fail again; after any other failure it may succeed."""
    with pytest.raises(type(failure)), open_output(tmp_path / "out", PLAN) as journal:
        (journal.output / "one").write_text("kept")
        journal.record({"one": None})
        raise failure
    assert (tmp_path / "out.partial").exists() == (not isinstance(failure, UserError))
    write(tmp_path / "out")
    is_kept = (tmp_path / "out" / "one").read_text() == "kept"
    assert is_kept == (not isinstance(failure, UserError))


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_before_the_first_file_leaves_nothing(failure: BaseException, tmp_path: Path):
    with pytest.raises(type(failure)), open_output(tmp_path / "out", PLAN):
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_reported_with_both_numbers(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        with pytest.raises(OSError, match=r"needs 1000000.00 GB more and its disk has \d+\.\d\d GB free") as failure:
            check_space(journal.out, 10**15)
        assert failure.value.errno == errno.ENOSPC


def test_bytes_that_are_already_written_need_no_more_space(tmp_path: Path):
    with open_output(tmp_path / "out", PLAN) as journal:
        (journal.output / "file").write_bytes(bytes(2**20))
        os.sync()
        disk = os.statvfs(tmp_path)
        check_space(journal.out, disk.f_bavail * disk.f_frsize + 2**19)


def test_an_output_within_the_source_is_no_part_of_it(tmp_path: Path):
    (tmp_path / "hf" / "more").mkdir(parents=True)
    (tmp_path / "hf" / "more" / "weights").write_text("x")
    (tmp_path / "link").symlink_to("hf")
    out, alone = tmp_path / "hf" / "out", fingerprint(tmp_path / "hf")
    assert alone.keys() == {"more/weights"}
    interrupted(out)
    write(tmp_path / "hf" / "out2")
    assert fingerprint(tmp_path / "hf").keys() > alone.keys()
    without = fingerprint(tmp_path / "hf", apart_from=out)
    assert without.keys() == {"more/weights", "out2/one", "out2/two"}
    write(out)
    assert fingerprint(tmp_path / "hf", apart_from=out) == without
    assert fingerprint(tmp_path / "hf", apart_from=tmp_path / "link" / "out") == without
    for other in (tmp_path / "hf", tmp_path, tmp_path / "elsewhere"):  # the source itself is never left out
        assert fingerprint(tmp_path / "hf", apart_from=other) == fingerprint(tmp_path / "hf")


FOREIGN = {
    "a folder": lambda path: (path.mkdir(), (path / "thesis").write_text("x")),
    "a folder with names like ours": lambda path: (
        (path / "output").mkdir(parents=True),
        (path / "output" / "x").touch(),
    ),
    "a file": lambda path: path.write_text("x"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("there", [False, True], ids=["no output", "an output"])
def test_a_foreign_file_or_folder_with_the_name_of_a_partial_output_is_left_alone(
    make: Callable[[Path], object], there: bool, tmp_path: Path
):
    if there:
        write(tmp_path / "out")
    make(tmp_path / "out.partial")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"out\.partial is in the way, and no conversion has made it"):
            write(tmp_path / "out", overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_file_that_nfs_keeps_for_another_call_is_left_alone(tmp_path: Path):
    kept = tmp_path / "out.partial" / ".nfs00000001"
    kept.parent.mkdir()
    kept.touch()
    write(tmp_path / "out")
    assert (tmp_path / "out" / "two").is_file()
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_new_parent_folders_are_removed_when_the_output_fails(tmp_path: Path):
    spoiled(tmp_path / "new" / "newer" / "out")
    assert list(tmp_path.iterdir()) == []
    interrupted(tmp_path / "new" / "newer" / "out")
    write(tmp_path / "new" / "newer" / "out")
    assert [path.name for path in (tmp_path / "new" / "newer").iterdir()] == ["out"]
