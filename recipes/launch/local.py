"""A plan on this machine: `torchrun` with restarts after failures, or `ft_launcher`, which restarts by itself."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..training import outcome
from .plan import Plan, local_command

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run(plan: Plan) -> int:
    """Run until the ranks end; return their exit code. Signals are passed on to them.

    A run that fails is started again, up to ``plan.retries_of_script`` times, unless the user has to mend something.
    """
    file = plan.launch_folder / f"outcome-local-{os.getpid()}.txt"
    os.environ[outcome.VARIABLE] = str(file)
    for left in range(plan.retries_of_script, -1, -1):
        file.unlink(missing_ok=True)
        code = _run_once(local_command(plan))
        how, sentence = outcome.read(file) or (outcome.FAILED, "a process was killed")
        if how == outcome.FINISHED:
            return _run_once((plan.python, "-m", "gpt_oss_vision.cli", *plan.export)) if plan.export else 0
        if how != outcome.FAILED or code == 2 or not left:
            break
        print(f"The run failed: {sentence}; restart {plan.retries - left + 1} of {plan.retries}", flush=True)
    return code


def _run_once(command: tuple[str, ...]) -> int:
    # In a session of its own: Ctrl-C of the terminal comes through `_passed_on` alone.
    with subprocess.Popen(command, start_new_session=True) as process, _passed_on(process):
        code = process.wait()
    return 128 - code if code < 0 else code


@contextmanager
def _passed_on(process: subprocess.Popen) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
