"""Rank and size of this process, under `torchrun`, as a task of `srun`, or alone, named as `torchrun` names them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import UsageError
from ...terminal import quiet


def name_ranks() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, unless `torchrun` has set them.

    A task of `srun` takes its own from SLURM; address and port are then found by Megatron-Bridge, from the list of
    nodes and the number of the job. Any other process is alone, also in a batch script of a job with many tasks.
    """
    if "RANK" in os.environ:
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_STEP_ID" in os.environ else "1"
    if tasks != "1":
        names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        os.environ |= {name: os.environ[theirs] for name, theirs in names.items()}
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}


def rank() -> int:
    """This process among all ranks."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place() -> str:
    """This rank among all, and its node as SLURM or the machine names it, for a message."""
    return f"rank {rank()} of {world_size()}, {os.environ.get('SLURMD_NODENAME') or socket.gethostname()}"


@contextmanager
def usage_errors_of_one_rank() -> Iterator[None]:
    """Let a wrong command line be reported by rank 0 alone: all ranks have the same one."""
    try:
        yield
    except UsageError as error:
        if rank():
            raise SystemExit(2) from error
        raise


@contextmanager
def log_of_rank(folder: Path) -> Iterator[None]:
    """Write what this process prints into a file of its rank; `terminal.say` still reaches the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet(folder / f"rank-{rank()}.txt"):
        yield


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
