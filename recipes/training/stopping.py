"""Signals and a time limit that end a run early: the step is finished, a checkpoint is saved, the command exits 75."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from types import FrameType
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from ...terminal import terminal_descriptor
from .stop_signals import Stopped

STOPS_BY = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
SECONDS_OF_ONE_INTERRUPT = 1.0
"""A terminal and `torchrun` each send SIGINT for one Ctrl-C."""


@dataclass
class StopRequests(Callback):
    """Ends the run after the current step, saved, when this process receives SIGTERM, SIGUSR1, SIGINT or SIGALRM.

    Each is passed on as SIGTERM to Megatron-Bridge's own handler (``train.exit_signal_handler``), by which the ranks
    agree after every step. It is enough that one rank receives a signal. Child processes, such as the data loader's
    workers, receive signals of the process group too, and ignore them.

    Attributes:
        received: the first signal.
        process: the number of this process.
        interrupted: when the first SIGINT came.
        save: the handler of Megatron-Bridge, from the first step on.
    """

    received: signal.Signals | None = None
    process: int = field(default_factory=os.getpid)
    interrupted: float | None = None
    save: Any = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        if os.getpid() != self.process:
            return
        if number == signal.SIGINT:
            self._leave_on_second_interrupt()
        if self.received is None:
            self.received = signal.Signals(number)
            if self.save is None and number != signal.SIGALRM:
                raise Stopped
            os.write(terminal_descriptor(), self._announcement().encode())
        if self.save is not None:
            self._save(frame)

    def _save(self, frame: FrameType | None) -> None:
        # Megatron-Bridge 0.6.2's handler prints first: where the signal comes while the run prints, Python refuses
        # that (`RuntimeError: reentrant call`), and the run would end without being saved.
        with redirect_stdout(StringIO()):
            self.save(signal.SIGTERM, frame)

    def on_train_start(self, context: CallbackContext) -> None:
        """Take SIGTERM over from Megatron-Bridge, which has set its handler by now."""
        self.save = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self.handle)
        if self.received is not None:  # the time limit was over before the first step, which is done all the same
            self._save(None)

    def _leave_on_second_interrupt(self) -> None:
        now = time.monotonic()
        if self.interrupted is None:
            self.interrupted = now
        elif now - self.interrupted > SECONDS_OF_ONE_INTERRUPT:
            os._exit(128 + signal.SIGINT)

    def _announcement(self) -> str:
        assert self.received is not None
        reason = "the time limit" if self.received is signal.SIGALRM else self.received.name
        second = "; Ctrl-C once more leaves at once" if self.received is signal.SIGINT else ""
        return f"Stopped by {reason}: saving after this step{second}\n"


@contextmanager
def stop_requests(seconds: float | None = None) -> Iterator[StopRequests]:
    """Handle the signals inside this context.

    Args:
        seconds: time limit from now on; None for no limit. At least one step is done, so that a run goes on.
    """
    requests = StopRequests()
    handlers = {number: signal.signal(number, requests.handle) for number in STOPS_BY}
    signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
    try:
        yield requests
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
