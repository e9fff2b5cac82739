"""A limit for the time of a step: a run that hangs ends, and says where."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import faulthandler
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron.bridge.training.callbacks import Callback, CallbackContext

from ...terminal import terminal_descriptor
from . import outcome, ranks

SECONDS_FOR_OTHER_RANKS = 2.0
"""They hang in the same step, and write where they stand, before a launcher kills them."""
SECONDS_UNTIL_KILLED = 30.0
"""If no thread of Python can run for so long after the limit, the process is ended from C."""


@dataclass(eq=False)
class Heartbeat(Callback):
    """Ends this process when a step, a step of the validation or a save takes longer than a limit.

    The stack of every thread is written to the log of the rank, and the outcome of the run to its folder. The exit code
    is 1, so that a launcher starts the run again from its newest checkpoint.

    Args:
        run: folder of the run.
        seconds: the limit.
        log: open file for the stacks.
    """

    run: Path
    seconds: float
    log: TextIO

    def on_train_start(self, context: CallbackContext) -> None:
        """Start to watch."""
        self._step, self._last, self._ended = context.state.train_state.step, time.monotonic(), threading.Event()
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """A step is done."""
        self._step = context.state.train_state.step
        self._beat()

    def on_eval_step_end(self, context: CallbackContext) -> None:
        """A step of the validation is done."""
        self._beat()

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        """A checkpoint is saved."""
        self._beat()

    def on_train_end(self, context: CallbackContext) -> None:
        """Stop watching."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            left = self._last + self.seconds - time.monotonic()
            if left < 0:
                self._end()
            faulthandler.dump_traceback_later(left + SECONDS_UNTIL_KILLED, exit=True, file=self.log)

    def _end(self) -> None:
        faulthandler.dump_traceback(self.log)
        sentence = (
            f"the step after step {self._step} has taken more than {self.seconds:.0f} seconds ({ranks.place()}); where "
            f"each thread stands is in {self.log.name}"
        )
        if outcome.write(outcome.file_of(self.run), outcome.FAILED, sentence):
            os.write(terminal_descriptor(), f"gpt-oss-vision: {sentence}\n".encode())
        time.sleep(SECONDS_FOR_OTHER_RANKS)
        os._exit(1)
