"""A path to the source that reads it: the kind of a file is found from its content."""

from glob import glob, has_magic
from pathlib import Path

from ....errors import UserError
from ..pictures import Pictures
from .base import Joined, Source
from .json_files import JSONFile


def open_source(
    path: str | Path, *, image_folder: str | Path | None = None, allowed_hosts: frozenset[str] = frozenset()
) -> Source:
    """Open the rows of a file, of a folder, or of all files that match a pattern.

    Args:
        path: JSON, or a pattern such as ``data/*.jsonl``.
        image_folder: that relative paths of images start from; None for the folder of each file.
        allowed_hosts: from which images may be fetched.

    Raises:
        UserError: nothing is there, or it is not of a kind that is read.
        OSError: it cannot be read.
    """
    files = [Path(path)]
    if has_magic(str(path)) and not Path(path).exists():
        files = sorted(Path(found) for found in glob(str(path), recursive=True))
        if not files:
            raise UserError(f"no file matches {path}")
    sources = [_open(file, Pictures(Path(image_folder or file.parent), allowed_hosts)) for file in files]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _open(path: Path, pictures: Pictures) -> Source:
    return JSONFile(path, pictures)
