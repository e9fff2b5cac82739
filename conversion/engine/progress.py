"""What a conversion shows while it runs: a bar with GB/s and time left on a terminal, lines in a log."""

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Bytes moved, of how many; `advance` may be called from any thread."""

    def __init__(self, title: str, total: int, console: Console | None = None):
        self.title, self.total, self.console = title, total, console or Console(quiet=True)
        self.moved = self.skipped = 0
        self._lock, self._started = threading.Lock(), time.monotonic()
        self._last = self._started
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Bar(*columns, TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(title, total=total)

    def skip(self, nbytes: int) -> None:
        """Count what an earlier run has done."""
        self.skipped += nbytes
        self._bar.update(self._task, completed=self.skipped)
        if nbytes:
            self.console.print(f"{self.title}: {nbytes / 1e9:.2f} of {self.total / 1e9:.2f} GB were done before")

    def advance(self, nbytes: int) -> None:
        """Count bytes read or written."""
        with self._lock:
            self.moved += nbytes
            now = time.monotonic()
            is_due = not self.console.is_terminal and now - self._last > SECONDS_BETWEEN_LINES
            self._last = now if is_due else self._last
        self._bar.advance(self._task, nbytes)
        if is_due:
            self._print_line(now - self._started)

    def _print_line(self, seconds: float) -> None:
        done, rate = self.moved + self.skipped, self.moved / seconds
        left = (self.total - done) / rate if rate else 0
        self.console.print(
            f"{self.title}: {done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left"
        )

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
