"""Files that are made once of a data file, in the cache folder of the user, for all processes and later runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash


def cached(path: Path, folder: str, ending: str) -> Path:
    """Where what is made of a file is kept. The name depends on its path, size and time of the last change."""
    state = path.stat()
    name = xxhash.xxh3_64_hexdigest(os.fsencode(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gpt-oss-vision", folder)
    return cache / f"{name}{ending}"


@contextmanager
def made_once(kept: Path) -> Iterator[bool]:
    """Whether a file is still to be made; meanwhile other processes that need it wait.

    Raises:
        OSError: its folder cannot be written.
    """
    if kept.exists():
        yield False
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    lock = kept.with_suffix(".making")
    with lock.open("w") as file:
        with suppress(OSError):  # a file system without locks: several may make it, each of which is complete
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield not kept.exists()
        finally:
            lock.unlink(missing_ok=True)
