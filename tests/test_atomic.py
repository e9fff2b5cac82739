"""Files and folders appear under their names complete or not at all, whenever the process is killed."""

import os
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path

import pytest
from kills import killed_at_change

from gpt_oss_vision.atomic import atomic_file, atomic_folder


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_file_appears_at_the_end(tmp_path: Path):
    with atomic_file(tmp_path / "a.txt") as file:
        file.write("ü")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_bytes() == "ü".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.txt") as file:
        file.write("new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.txt": "old"}


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path):
    with atomic_file(tmp_path / "ours"):
        pass
    (tmp_path / "plain").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_to_a_file_stays_a_link(tmp_path: Path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with atomic_file(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_directly(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    with atomic_file(tmp_path / "pipe") as file:
        file.write("through")
    reader.join()
    assert read == ["through"]


def test_standard_output_is_written_directly():
    script = """
from pathlib import Path
from gpt_oss_vision.atomic import atomic_file
with atomic_file(Path("/dev/stdout")) as file:
    file.write("shown")
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "shown"


def test_a_folder_appears_at_the_end(tmp_path: Path):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "a").exists()
    assert contents(tmp_path) == {"a/file": "new"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_exists_is_refused_or_replaced(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with pytest.raises(FileExistsError, match="replace it with --overwrite"), atomic_folder(tmp_path / "a"):
        pass
    with atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert contents(tmp_path / "a") == {"old": "old"}
    assert contents(tmp_path) == {"a/new": "new"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "a", overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise ValueError("stop")
    assert contents(tmp_path) == {"a/old": "old"}
    assert os.listdir(tmp_path) == ["a"]


def test_a_mount_point_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "a")
    with pytest.raises(OSError, match="is a mount point"), atomic_folder(tmp_path / "a", overwrite=True):
        pass


def replace(folder: Path) -> None:
    with atomic_folder(folder, overwrite=True) as new:
        (new / "new").write_text("new")


def test_a_kill_at_any_change_leaves_the_old_or_the_new_folder_and_the_next_call_tidies_up(tmp_path: Path):
    old, new = {"old": "old", "old too": "old"}, {"new": "new"}
    for number in count():
        place = tmp_path / str(number)
        (place / "a").mkdir(parents=True)
        for name in old:
            (place / "a" / name).write_text("old")
        was_killed = killed_at_change(lambda place=place: replace(place / "a"), number)
        whole = place / ("a" if (place / "a").exists() else ".a.replaced")
        assert contents(whole) in (old, new)
        replace(place / "a")
        assert contents(place) == {"a/new": "new"}
        assert os.listdir(place) == ["a"]
        if not was_killed:
            break
    assert number > 8


def test_a_kill_at_any_change_leaves_the_old_or_the_new_file(tmp_path: Path):
    def write(path: Path) -> None:
        with atomic_file(path) as file:
            file.write("new")

    for number in count():
        (tmp_path / "a").write_text("old")
        was_killed = killed_at_change(lambda: write(tmp_path / "a"), number)
        assert (tmp_path / "a").read_text() in ("old", "new")
        if not was_killed:
            break
    assert number > 2


def test_a_folder_moved_aside_by_a_killed_call_is_back_when_the_next_one_refuses(tmp_path: Path):
    (tmp_path / ".a.replaced").mkdir()
    (tmp_path / ".a.replaced" / "old").write_text("old")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "a"):
        pass
    assert contents(tmp_path) == {"a/old": "old"}


def test_a_second_call_leaves_the_temporary_folder_of_a_running_one_alone(tmp_path: Path):
    with atomic_folder(tmp_path / "a", overwrite=True) as first:
        (first / "file").write_text("first")
        replace(tmp_path / "a")
        assert contents(first) == {"file": "first"}
    assert contents(tmp_path) == {"a/file": "first"}
