"""The first failure of a run: of the ranks that fail, one prints its sentence, and the others stay silent."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from ...errors import UserError
from . import outcome, ranks


@contextmanager
def first_failure(folder: Path) -> Iterator[None]:
    """Let an exception through on the rank that fails first, and exit with 1 on the others.

    A rank that fails leaves the others waiting; they fail a moment later with a lost connection, which says nothing.
    The first creates `outcome.OUTCOME` in the folder of the run, which all ranks share.

    Args:
        folder: of the run; made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.rank() == 0:
        outcome.forget(folder)
    try:
        with _as_exception(CheckpointException):
            yield
    except Exception as error:
        where = f"rank {ranks.rank()} of {ranks.world_size()}, {_node()}"
        kind = outcome.REFUSED if isinstance(error, UserError) else outcome.FAILED
        is_first = outcome.write(folder, kind, f"{error or type(error).__name__} ({where})")
        if ranks.world_size() > 1:
            if not is_first:
                raise SystemExit(1) from error
            error.add_note(f"on {where}")
        raise


def _node() -> str:
    """The name of this machine, as SLURM has it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@contextmanager
def _as_exception(kind: type[BaseException]) -> Iterator[None]:
    """Raise a RuntimeError in place of an exception that is no `Exception`."""
    try:
        yield
    except kind as error:
        raise RuntimeError(str(error)) from error
