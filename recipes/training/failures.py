"""The first failure of a run: of the ranks that fail, one prints its sentence, and the others stay silent."""

import errno
import re
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
    The first writes the outcome of the run (`outcome`), a file that all ranks share.

    Args:
        folder: of the run; made here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = outcome.file_of(folder)
    try:
        with _lost_connection(), _as_exception(CheckpointException):
            yield
    except Exception as error:
        kind = outcome.REFUSED if _is_for_the_user(error) else outcome.FAILED
        is_first = outcome.write(file, kind, f"{error or type(error).__name__} ({ranks.place()})")
        if ranks.world_size() > 1:
            if not is_first:
                raise SystemExit(1) from error
            error.add_note(f"on {ranks.place()}")
        raise


def _is_for_the_user(error: Exception) -> bool:
    """Whether trying again does not help: a wrong value, a file that is missing or may not be read, a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, UserError | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError)


_LOST = re.compile(r"Connection closed by peer|Connection reset|Broken pipe|remote process exited|NCCL.*timeout", re.I)


@contextmanager
def _lost_connection() -> Iterator[None]:
    """Name what has happened where a communication of torch fails: it is no fault of this rank."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise ConnectionError(
            f"the connection to another rank was lost: it was killed, or its node is down ({error})"
        ) from error


@contextmanager
def _as_exception(kind: type[BaseException]) -> Iterator[None]:
    """Raise a RuntimeError in place of an exception that is no `Exception`."""
    try:
        yield
    except kind as error:
        raise RuntimeError(str(error)) from error
