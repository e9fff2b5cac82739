"""A stand-in for SLURM on one machine: `srun`, `scontrol` and `squeue`, as far as a batch script of ours calls them.

It runs the batch script itself, unchanged, where there is no SLURM: nodes are groups of processes. For `rehearse`, and
for tests of what a SLURM cannot be made to do. Standard library only.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

FOLDER = "GPT_OSS_VISION_STAND_IN"
"""The variable with the folder that the commands share with the controller."""

TASKS, REQUEUE = "tasks.json", "requeue"
SECONDS_UNTIL_KILLED = 30.0
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def srun(arguments: list[str]) -> int:
    """Start the tasks of a step on all nodes, and wait; when one fails the others are ended. The highest exit code."""
    while arguments and arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        if name in ("--nodes", "--ntasks-per-node"):
            os.environ["SLURM_NNODES" if name == "--nodes" else "SLURM_NTASKS_PER_NODE"] = value
    nodes, per_node = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = [
        subprocess.Popen(arguments, env=_environment(rank, nodes, per_node), start_new_session=True)
        for rank in range(nodes * per_node)
    ]
    _write(TASKS, json.dumps([task.pid for task in tasks]))

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal(tasks, signal.Signals(number))

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    return _wait(tasks)


def _environment(rank: int, nodes: int, per_node: int) -> dict[str, str]:
    node, local = divmod(rank, per_node)
    numbers = {"PROCID": rank, "LOCALID": local, "NODEID": node, "STEP_ID": 0}
    sizes = {"STEP_NUM_TASKS": nodes * per_node, "STEP_NUM_NODES": nodes}
    names = {f"SLURM_{name}": str(value) for name, value in (numbers | sizes).items()}
    return os.environ | names | {"SLURMD_NODENAME": f"node{node + 1}"}


def _wait(tasks: list[subprocess.Popen]) -> int:
    end = None
    while any(task.poll() is None for task in tasks):
        if end is None and any(task.poll() for task in tasks):
            _signal(tasks, signal.SIGTERM)
            end = time.monotonic() + SECONDS_UNTIL_KILLED
        if end is not None and time.monotonic() > end:
            _signal(tasks, signal.SIGKILL)
        time.sleep(0.05)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def _signal(tasks: list[subprocess.Popen], number: signal.Signals) -> None:
    for task in tasks:
        if task.poll() is None:
            signal_tree(task.pid, number)


def signal_tree(root: int, number: signal.Signals) -> None:
    """Send a signal to a process and its descendants, as SLURM does to all that a task has started.

    The process itself comes first: a script that sees its child end could go on before it is killed.
    """
    for process in sorted(tree_of({root}), key=lambda process: process != root):
        with suppress(ProcessLookupError):
            os.kill(process, number)


def tree_of(roots: set[int]) -> set[int]:
    """These processes, and their descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = set(roots)
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def scontrol(arguments: list[str]) -> int:
    """`show hostnames`, `show node NAME` and `requeue JOB`."""
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(arguments[2].split(",")))
    elif arguments[:2] == ["show", "node"]:
        print(f"NodeName={arguments[2]} NodeAddr=127.0.0.1 State=ALLOCATED")
    elif arguments[0] == "requeue":
        _write(REQUEUE, arguments[1])
    else:
        print(f"the stand-in has no scontrol {' '.join(arguments)}", file=sys.stderr)
        return 1
    return 0


def squeue(arguments: list[str]) -> int:
    """The state of the job, which runs."""
    print("RUNNING")
    return 0


def _write(name: str, text: str) -> None:
    folder = Path(os.environ[FOLDER])
    (folder / f"{name}.new").write_text(text)
    (folder / f"{name}.new").rename(folder / name)


def install(folder: Path, python: str) -> None:
    """Write the commands into a folder, for PATH."""
    for name in ("srun", "scontrol", "squeue"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{python}" -m {__name__} {name} "$@"\n')
        (folder / name).chmod(0o755)


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol, "squeue": squeue}[sys.argv[1]](sys.argv[2:]))
