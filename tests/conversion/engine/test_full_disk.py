"""A file system, mounted in the namespace of a fork, that is too small, filled by another program, or the output."""

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from crashes import many_small_tasks
from disks import Disk
from safetensors.torch import save_file
from torch.distributed import checkpoint

import gpt_oss_vision
from checkpoints import OBLONG, files_of, save_pair
from gpt_oss_vision import cli
from gpt_oss_vision.atomic import atomic_folder
from gpt_oss_vision.conversion.engine import files, job
from gpt_oss_vision.conversion.engine.journal import Journal, check_space

TOO_SMALL, LARGE_ENOUGH = 8 * 2**20, 64 * 2**20
CONVERSIONS = {"import": ("import", "--hf", "hf"), "export": ("export", "--megatron", "megatron")}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and `megatron`, 18 MB each, which is larger than the small disk."""
    gpt_oss_vision.register()
    return save_pair(tmp_path_factory.mktemp("checkpoints"), **OBLONG, dtype=torch.bfloat16, vocab_size=65536)


def convert(arguments: tuple[str, str, str], checkpoints: Path, out: Path, *options: str) -> tuple[int, str]:
    """Run the command; return its exit code and its last line of output."""
    action, option, source = arguments
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = cli.main(["convert", action, option, str(checkpoints / source), "--out", str(out), *options])
    assert "Traceback" not in said.getvalue()
    return code, said.getvalue().splitlines()[-1]


def fill(disk: Path, leaving: int) -> None:
    """Fill a disk up to `leaving` free bytes, as another program would."""
    free = os.statvfs(disk)
    with (disk / "another").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - leaving)


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_disk_too_small_from_the_start_is_reported_in_numbers_and_nothing_is_left(
    arguments: tuple[str, str, str], checkpoints: Path, tmp_path: Path, on_disk: Disk
):
    def run() -> None:
        for options in (["--dry-run"], []):
            code, sentence = convert(arguments, checkpoints, tmp_path / "out", *options)
            assert code == 1
            numbers = rf"{tmp_path}/out needs 0\.02 GB more and its disk has 0\.01 GB free"
            assert re.fullmatch(rf"gpt-oss-vision: {numbers}; make room or name .* disk", sentence), sentence
            assert not list(tmp_path.iterdir())

    on_disk(tmp_path, TOO_SMALL, run)


def before_it_is_reserved(disk: Path, patch: pytest.MonkeyPatch) -> None:
    """Another program takes all but 1 MiB after the check of free space."""

    def check_and_fill(out: Path, needed: int) -> None:
        check_space(out, needed)
        fill(disk, leaving=2**20)

    patch.setattr(job, "check_space", check_and_fill)


def while_it_is_written(disk: Path, patch: pytest.MonkeyPatch) -> None:
    """Another program takes all free space after the first task is recorded."""
    record = Journal.record

    def record_and_fill(journal: Journal, results: dict, files: Iterable[Path] = ()) -> None:
        record(journal, results, files)
        if not (disk / "another").exists():
            fill(disk, leaving=0)

    patch.setattr(Journal, "record", record_and_fill)


@pytest.mark.parametrize("taken", [before_it_is_reserved, while_it_is_written])
@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_disk_filled_by_another_program_is_reported_and_the_next_call_continues_to_the_same_bytes(
    arguments: tuple[str, str, str],
    taken: Callable[[Path, pytest.MonkeyPatch], None],
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_disk: Disk,
):
    many_small_tasks(monkeypatch)
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

    on_disk(tmp_path, LARGE_ENOUGH, run)


@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_mount_point_is_refused_as_it_cannot_be_renamed(
    arguments: tuple[str, str, str], checkpoints: Path, tmp_path: Path, on_disk: Disk
):
    """For example the volume of a container."""

    def run() -> None:
        sentence = f"--out {tmp_path} is a mount point, which cannot be replaced; name a folder in it"
        for options in (["--dry-run"], []):
            found = convert(arguments, checkpoints, tmp_path, "--overwrite", *options)
            assert found == (1, f"gpt-oss-vision: {sentence}")
            assert list(tmp_path.iterdir()) == []
        assert convert(arguments, checkpoints, tmp_path / "out")[0] == 0

    on_disk(tmp_path, LARGE_ENOUGH, run)


@pytest.mark.parametrize("on_disk", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("arguments", CONVERSIONS.values(), ids=CONVERSIONS)
def test_only_the_disk_of_the_output_is_used(
    arguments: tuple[str, str, str], checkpoints: Path, tmp_path: Path, on_disk: Disk
):
    """Apart from some KB of temporary files."""
    (tmp_path / "small").mkdir()

    def run() -> None:
        tempfile.tempdir = str(tmp_path / "small")
        code, sentence = convert(arguments, checkpoints, tmp_path / "out")
        assert code == 0, sentence

    on_disk(tmp_path / "small", 20 * 1024, run)


DATA = torch.zeros(4 * 10**6)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * 10**7),
    "a copy": lambda path: shutil.copyfile(path.parents[2] / "large", path),
    "safetensors": lambda path: save_file({"a": DATA}, path),
    "torch.save": lambda path: torch.save(DATA, path),
    "a distributed checkpoint": lambda path: checkpoint.save({"a": DATA}, checkpoint_id=path, no_dist=True),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_is_named_whoever_writes(write: Callable[[Path], object], tmp_path: Path, on_disk: Disk):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**7)
    disk = tmp_path / "disk"
    disk.mkdir()

    def run() -> None:
        sentence = f"No space left on the disk of {disk}/out; make room, or name a folder on another disk"
        with pytest.raises(OSError, match=sentence) as failure, atomic_folder(disk / "out") as folder:
            write(folder / "file")
        assert failure.value.errno == errno.ENOSPC
        assert list(disk.iterdir()) == []

    on_disk(disk, TOO_SMALL, run)


def test_space_that_is_too_small_for_a_file_is_freed_again(tmp_path: Path, on_disk: Disk):
    def run() -> None:
        free, open_files = os.statvfs(tmp_path).f_bavail, os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="No space left on device"):
            files.File(tmp_path / "file", size=LARGE_ENOUGH)
        assert os.statvfs(tmp_path).f_bavail == free
        assert os.listdir("/proc/self/fd") == open_files

    on_disk(tmp_path, TOO_SMALL, run)
