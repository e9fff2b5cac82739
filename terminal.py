"""What a long run shows: a progress bar on a terminal, plain lines elsewhere; what libraries print goes to a log."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of a long task, in steps or in bytes: a bar on a terminal, a line every ten seconds in a log.

    Args:
        title: name of the task.
        total: steps or bytes of the whole task.
        console: where it is shown; None shows nothing.
        in_bytes: count bytes, and show GB and GB/s.
    """

    def __init__(self, title: str, total: int, console: Console | None = None, *, in_bytes: bool = False):
        self.title, self.total, self.in_bytes = title, total, in_bytes
        self.console = console or Console(quiet=True)
        self.done = self.skipped = 0
        self._lock, self._started = threading.Lock(), time.monotonic()
        self._printed, self._draws = self._started, console is not None and console.is_terminal
        steps = (MofNCompleteColumn(), TextColumn("{task.fields[words]}"))
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            *((DownloadColumn(), TransferSpeedColumn()) if in_bytes else steps),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._draws,
            redirect_stdout=False,  # what libraries print belongs into the log, not above the bar
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(title, total=total, words="")

    def skip(self, amount: int) -> None:
        """Count what an earlier run has done; the rate leaves it out."""
        self.done = self.skipped = amount
        self._bar.reset(self._task, completed=amount)
        if amount:
            self.console.print(f"{self.title}: {self._counted()} were done before", soft_wrap=True)

    def advance(self, amount: int = 1, words: str = "") -> None:
        """Count steps or bytes that are done, from any thread, and show a few words about the last one."""
        with self._lock:
            self.done += amount
            now = time.monotonic()
            is_due = now - self._printed >= SECONDS_BETWEEN_LINES or self.done == self.total
            self._printed = now if is_due else self._printed
        self._bar.update(self._task, advance=amount, words=words)
        if is_due and not self._draws:
            rate = (self.done - self.skipped) / max(now - self._started, 1e-9)
            left = f"{(self.total - self.done) / rate:.0f} s left" if rate else ""
            said = f"{rate / 1e9:.2f} GB/s" if self.in_bytes else words
            parts = (part for part in (self._counted(), said, left) if part)
            self.console.print(f"{self.title}: {', '.join(parts)}", soft_wrap=True)

    def _counted(self) -> str:
        if self.in_bytes:
            return f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        return f"{self.done} of {self.total}"

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


_consoles: list[Console] = []


def say(sentence: str) -> None:
    """Print a sentence for the user; inside `quiet` it is written to the terminal and to the log."""
    print(sentence, flush=True)
    if _consoles:
        _consoles[-1].print(sentence, markup=False)


def terminal_descriptor() -> int:
    """The file descriptor of the terminal, also inside `quiet`: for signal handlers, which may not print."""
    return _consoles[-1].file.fileno() if _consoles else 1


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Append what this process and its libraries write to the terminal to `log`; yield a console that still shows.

    Works on file descriptors, because Megatron prints from every layer, forked workers included.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    shown, errors = os.dup(1), os.dup(2)
    with log.open("a") as file, os.fdopen(os.dup(1), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        _consoles.append(Console(file=terminal, highlight=False, soft_wrap=True))
        try:
            yield _consoles[-1]
        finally:
            _consoles.pop()
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(shown, 1)
            os.dup2(errors, 2)
            os.close(shown)
            os.close(errors)
