"""Run a call in a fork of this process, and kill it at its n-th change to files."""

import builtins
import io
import os
import signal
import traceback
from collections.abc import Callable
from itertools import count
from typing import Any


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a fork and return its process id; its exit code is 0, or 1 if `work` raised."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - reported by the exit code
            traceback.print_exc()
        os._exit(code)
    return child


CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "truncate", "ftruncate", "symlink")
"""Functions of `os` that change files and folders."""


def killed_at_change(work: Callable[[], object], number: int) -> bool:
    """Run `work` in a fork that is killed at its n-th change to files and folders, from 0.

    A file that is opened for writing counts twice: before it is there, and when it is empty. Writes into open files
    are not counted, nor what torch does without Python.

    Returns:
        Whether it was killed before it finished.
    """
    left = count(number, -1)

    def step() -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            step()
            return change(*args, **options)

        return wrapped

    def opening(function: Callable[..., Any], writes: Callable[[Any], bool]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **options: Any) -> Any:
            if not writes(args[0] if args else options.get("mode", "r")):
                return function(path, *args, **options)
            step()
            file = function(path, *args, **options)
            step()
            return file

        return wrapped

    def mortal() -> None:
        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        os.open = opening(os.open, lambda flags: bool(flags & (os.O_CREAT | os.O_TRUNC)))
        builtins.open = io.open = opening(io.open, lambda mode: bool({*"wax"} & {*str(mode)}))
        work()

    code = os.waitstatus_to_exitcode(os.waitpid(fork(mortal), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0
