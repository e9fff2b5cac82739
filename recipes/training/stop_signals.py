"""The signals that ask a run to end, before its first step: what is still importing Megatron has nothing to save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_TO_BE_CONTINUED = 75
"""EX_TEMPFAIL of sysexits.h: the run was saved, and the same command continues it."""


class Stopped(BaseException):  # as KeyboardInterrupt: no `except Exception` may hold it up
    """The run was asked to end before its first step; there is nothing to save."""


@contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Raise `Stopped` inside this context at SIGTERM and SIGUSR1.

    The signals are handled too where this process was started to ignore them.
    """
    handlers = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
