"""The command line in a fork of this process, so that Megatron is imported once; it can be sent signals."""

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from gpt_oss_vision import cli

SECONDS = 180.0


class Command:
    """A running `gpt-oss-vision` in a process group of its own.

    Args:
        *arguments: of the command line.
        output: file for what it prints.
        environment: variables that are set for it.
    """

    def __init__(self, *arguments: str, output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        self.process = os.fork()
        if not self.process:
            os.environ |= environment or {}
            _run(arguments, output)

    def wait_until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for an event while the command runs."""
        end = time.monotonic() + SECONDS
        while not is_reached():
            assert time.monotonic() < end, self.output.read_text()
            assert os.waitpid(self.process, os.WNOHANG) == (0, 0), self.output.read_text()
            time.sleep(0.005)

    def send(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command, or to all processes of its group, as SLURM and terminals do."""
        (os.killpg if group else os.kill)(self.process, number)

    def exit_code(self) -> int:
        """Wait for the end; the number of a signal that ended it is negative."""
        end = time.monotonic() + SECONDS
        while True:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                break
            if time.monotonic() > end:
                self.send(signal.SIGKILL, group=True)
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(status)


def run(*arguments: str, output: Path) -> int:
    """Run the command line to its end; its exit code."""
    return Command(*arguments, output=output).exit_code()


def _run(arguments: tuple[str, ...], output: Path) -> None:
    os.setpgrp()
    gc.freeze()
    torch.set_num_threads(1)
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = ["gpt-oss-vision", *arguments]
    code = 70
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - pytest must not go on in this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
