"""A real disk that is too small, or that another program fills: a small tmpfs, mounted where only a fork sees it."""

import contextlib
import ctypes
import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crashes import fork, many_small_units

import gpt_oss_vision
from checkpoints import OBLONG, files_of, save_tiny
from gpt_oss_vision import cli
from gpt_oss_vision.conversion import exporting, importing
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.journal import Journal, check_space

TOO_SMALL, LARGE_ENOUGH = 8 * 2**20, 64 * 2**20
CONVERSIONS = {"import": ("import", "--hf", "hf"), "export": ("export", "--megatron", "megatron")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and `megatron`, 18 MB each, which is larger than the small disk."""
    gpt_oss_vision.register()
    folder = tmp_path_factory.mktemp("checkpoints")
    save_tiny(folder / "hf", **OBLONG, dtype=torch.bfloat16, vocab_size=65536)
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder


def on_disk(nbytes: int, disk: Path, work: Callable[[], object]) -> None:
    """Run something in a fork for which `disk` is a file system of that many bytes; skip where none can be mounted."""

    def with_disk() -> None:
        _mount_tmpfs(disk, nbytes)
        work()

    if not _succeeds(lambda: _mount_tmpfs(disk, nbytes)):
        pytest.skip("This user may not mount a file system here")
    assert _succeeds(with_disk)


def _succeeds(work: Callable[[], object]) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0


def _mount_tmpfs(folder: Path, nbytes: int) -> None:
    """Mount in a name space of this process's own, which a user may have too; the mount ends with the process."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWNS | (os.CLONE_NEWUSER if user else 0))
    if user:
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", file).write_text(text)
    private_and_recursive = 1 << 18 | 1 << 14
    for arguments in (
        (None, b"/", None, private_and_recursive, None),
        (b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % nbytes),
    ):
        if ctypes.CDLL(None, use_errno=True).mount(*arguments):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))


def convert(arguments: tuple[str, str, str], checkpoints: Path, out: Path) -> tuple[int, str]:
    """Exit code, and the last line of what the command said."""
    action, option, source = arguments
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(["convert", action, option, str(checkpoints / source), "--out", str(out)])
    assert "Traceback" not in said.getvalue()
    return code, said.getvalue().splitlines()[-1]


def fill(disk: Path, leaving: int) -> None:
    """Take the room of a disk, as another program would."""
    free = os.statvfs(disk)
    with (disk / "another").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leaving)


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_too_small_from_the_start_it_is_told_in_numbers_and_nothing_is_left(
    arguments: tuple[str, str, str], checkpoints: Path, tmp_path: Path
):
    def run() -> None:
        code, sentence = convert(arguments, checkpoints, tmp_path / "out")
        assert code == 1
        numbers = r"needs 0\.02 GB more and its disk has 0\.01 GB free"
        assert re.fullmatch(rf"gpt-oss-vision: {tmp_path}/out {numbers}; make room or name .* disk", sentence), sentence
        assert not list(tmp_path.iterdir())

    on_disk(TOO_SMALL, tmp_path, run)


def before_it_is_reserved(disk: Path, patch: pytest.MonkeyPatch) -> None:
    """Another program takes all but 1 MiB when there was found to be enough."""

    def check_and_fill(journal: Journal, needed: int) -> None:
        check_space(journal, needed)
        fill(disk, leaving=2**20)

    for module in (importing, exporting):
        patch.setattr(module, "check_space", check_and_fill)


def while_it_is_written(disk: Path, patch: pytest.MonkeyPatch) -> None:
    """Another program takes all that is left when the first unit of work has been recorded."""
    record = Journal.record

    def record_and_fill(journal: Journal, results: dict) -> None:
        record(journal, results)
        if not (disk / "another").exists():
            fill(disk, leaving=0)

    patch.setattr(Journal, "record", record_and_fill)


@pytest.mark.parametrize("taken", [before_it_is_reserved, while_it_is_written])
@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_filled_by_another_program_it_is_told_and_continued_to_the_same_bytes_when_there_is_room(
    arguments: tuple[str, str, str],
    taken: Callable[[Path, pytest.MonkeyPatch], None],
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    many_small_units(monkeypatch)
    out = tmp_path / "out"

    def run() -> None:
        assert convert(arguments, checkpoints, out)[0] == 0
        expected = files_of(out)
        shutil.rmtree(out)
        with pytest.MonkeyPatch.context() as patch:
            taken(tmp_path, patch)
            code, sentence = convert(arguments, checkpoints, out)
        assert code == 1
        room = f"No space left on the disk of {out}; make room, and the same call continues"
        assert sentence == f"gpt-oss-vision: {room}"
        assert {path.name for path in tmp_path.iterdir()} == {"another", "out.partial"}
        (tmp_path / "another").unlink()
        assert convert(arguments, checkpoints, out)[0] == 0
        assert files_of(out) == expected

    on_disk(LARGE_ENOUGH, tmp_path, run)
