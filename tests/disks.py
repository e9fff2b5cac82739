"""Small file systems, mounted in the namespace of a fork."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import fork

Disk = Callable[[Path, int, Callable[[], object]], None]


@pytest.fixture(params=["tmpfs", "ext4"])
def on_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A function that runs `work` in a fork where a folder is a file system of `nbytes`; skips if mounting is denied.

    tmpfs can be mounted by any user in a namespace of their own; ext4 has blocks and `O_DIRECT`.
    """

    def mount(folder: Path, nbytes: int) -> None:
        _unshare()
        if request.param == "tmpfs":
            _mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=%d" % nbytes)
            return
        image = tmp_path_factory.mktemp("disk") / "image"
        with image.open("wb") as file:
            file.truncate(nbytes)
        for words in (
            ("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image),
            ("mount", "-o", "loop", image, folder),
        ):
            subprocess.run(words, check=True, capture_output=True)
        (folder / "lost+found").rmdir()

    def run(folder: Path, nbytes: int, work: Callable[[], object]) -> None:
        def with_disk() -> None:
            mount(folder, nbytes)
            work()

        if not _succeeds(lambda: mount(folder, nbytes)):
            pytest.skip(f"This user may not mount {request.param} here")
        assert _succeeds(with_disk)

    return run


def _succeeds(work: Callable[[], object]) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) == 0


def _unshare() -> None:
    """Move this process into its own mount namespace, also without root; its mounts end with the process."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWNS | (os.CLONE_NEWUSER if user else 0))
    if user:
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", file).write_text(text)
    private_and_recursive = 1 << 18 | 1 << 14
    _mount(None, b"/", None, private_and_recursive, None)


def _mount(*arguments: bytes | int | None) -> None:
    if ctypes.CDLL(None, use_errno=True).mount(*arguments):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
