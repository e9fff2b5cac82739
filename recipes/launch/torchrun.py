"""`torchrun` that waits for its workers: signals are passed on, and nothing is killed after 30 seconds.

    python -m gpt_oss_vision.recipes.launch.torchrun RANKS_PER_NODE train RECIPE key=value ...

The agent of torch 2.11 passes SIGTERM on and kills its workers 30 seconds later, which cuts a save. Here SIGTERM,
SIGUSR1 and SIGINT are passed on alone, and the exit code is that of the workers where all have the same.
Nodes are those of the step of SLURM that this runs in; without SLURM it is one.
"""

import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from types import FrameType

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STILL_HANDLED_BY_TORCHRUN = "SIGHUP,SIGQUIT"
WORKER = ("--module", "gpt_oss_vision.cli")


def main(arguments: list[str]) -> int:
    """Start the ranks of this node, and return when all have ended."""
    pass_signals_on()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which prints a warning for each process
    try:
        torchrun([*_options(arguments[0]), *WORKER, *arguments[1:]])
    except ChildFailedError as error:
        return exit_code({failure.exitcode for failure in error.failures.values()})
    return 0


def exit_code(codes: Collection[int]) -> int:
    """The exit code for those of the workers: 128 + N where signal N ended all, which a shell has too."""
    (code,) = codes if len(codes) == 1 else (1,)
    return 128 - code if code < 0 else code


def _options(ranks: str) -> list[str]:
    options = ["--nproc-per-node", ranks, "--signals-to-handle", STILL_HANDLED_BY_TORCHRUN]
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", "1")
    if nodes == "1":
        return [*options, "--standalone"]
    return [
        *options,
        *("--nnodes", nodes, "--node-rank", os.environ["SLURM_NODEID"]),
        *("--master-addr", os.environ["MASTER_ADDR"], "--master-port", os.environ["MASTER_PORT"]),
    ]


def pass_signals_on() -> None:
    """Pass SIGTERM, SIGUSR1 and SIGINT on to the workers; end by them while there are none."""
    for number in PASSED_ON:
        signal.signal(number, _pass_on)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Send a signal to the workers: the child processes, each in a session of its own."""
    files = Path("/proc/self/task").glob("*/children")
    workers = [child for file in files for child in map(int, file.read_text().split()) if os.getsid(child) == child]
    for worker in workers:
        os.kill(worker, number)
    if not workers:
        ignore_signals()  # a second one would cut the end of the launcher
        sys.exit(128 + number)


def ignore_signals() -> None:
    """Let the launcher end by itself: there are no workers any more."""
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
