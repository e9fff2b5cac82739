"""What a long run shows: a progress bar on a terminal, plain lines elsewhere; what libraries print goes to a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES_PER_STAGE = 10


class Stage:
    """Progress of one stage of a run: ``advance`` after every step, with a few words about it."""

    def __init__(self, console: Console, title: str, total: int, *, shown: bool = True):
        self.console, self.title, self.total, self.shown = console, title, total, shown
        self.is_drawn = shown and console.is_terminal
        self.done, self.started, self.every = 0, time.monotonic(), max(1, total // LINES_PER_STAGE)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
            console=console,
            redirect_stdout=False,  # what others print belongs into the log, not above the bar
            redirect_stderr=False,
        )
        self.task = self.bar.add_task(title, total=total, words="")

    def advance(self, words: str = "") -> None:
        """One step further."""
        self.done += 1
        if self.is_drawn:
            self.bar.update(self.task, completed=self.done, words=words)
        elif self.shown and (self.done % self.every == 0 or self.done == self.total):
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            self.console.print(f"{self.title}: {self.done}/{self.total} {words} {left:.0f} s left")

    def __enter__(self) -> "Stage":
        if self.is_drawn:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_drawn:
            self.bar.stop()


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Send whatever this process and its libraries write to the terminal into ``log``; give a console that still shows.

    Works on file descriptors, because Megatron prints from every layer, forked workers included.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    shown, errors = os.dup(1), os.dup(2)
    with log.open("a") as file, os.fdopen(os.dup(1), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=terminal, highlight=False, soft_wrap=True)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(shown, 1)
            os.dup2(errors, 2)
            os.close(shown)
            os.close(errors)
