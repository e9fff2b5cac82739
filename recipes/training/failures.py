"""The first failure of a run: of the ranks that fail, one prints its sentence, and the others stay silent."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from . import ranks

FAILURE = "failure.json"


@contextmanager
def first_failure(folder: Path) -> Iterator[None]:
    """Let an exception through on the rank that fails first, and exit with 1 on the others.

    A rank that fails leaves the others waiting; they fail a moment later with a lost connection, which says nothing.
    The first creates a file in the folder of the run, which all ranks share.

    Args:
        folder: of the run; made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FAILURE
    if ranks.rank() == 0:
        file.unlink(missing_ok=True)
    try:
        with _as_exception(CheckpointException):
            yield
    except Exception as error:
        if ranks.world_size() > 1:
            if not _is_first(file, error):
                raise SystemExit(1) from error
            error.add_note(f"on rank {ranks.rank()} of {ranks.world_size()}, {socket.gethostname()}")
        raise


@contextmanager
def _as_exception(kind: type[BaseException]) -> Iterator[None]:
    """Raise a RuntimeError in place of an exception that is no `Exception`."""
    try:
        yield
    except kind as error:
        raise RuntimeError(str(error)) from error


def _is_first(file: Path, error: Exception) -> bool:
    """Create the file, which only one rank can; where the disk does not let it, every rank is the first."""
    with suppress(FileExistsError):
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        except OSError:
            return True
        with os.fdopen(descriptor, "w") as opened:
            json.dump({"rank": ranks.rank(), "host": socket.gethostname(), "error": str(error)}, opened)
    return True
