"""A path to the source that reads it: the kind of a file is found from its content."""

import re
import tarfile
import zlib
from collections.abc import Callable
from glob import glob, has_magic
from pathlib import Path

import zstandard
from braceexpand import braceexpand

from ....errors import UserError
from ..pictures import Pictures
from .archives import Archive
from .base import Joined, Source
from .energon import EnergonFolder, split_of
from .json_files import BYTE_ORDER_MARK, GZIP, WIDE, ZSTANDARD, JSONFile
from .tables import open_parquet, open_saved
from .token_files import TokenFile, prefix_of

READ = (
    "JSON and JSON lines (also in .gz or .zst), Parquet, tar files of WebDataset, Megatron's .bin and .idx, folders of "
    "`datasets` and of `energon prepare`, and folders of such files"
)
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet", ".tar", ".tar.gz", ".tgz")
"""Of the files in a folder that are its data; what they are is found from their content too."""
HEAD = 2**16
VALUE = re.compile(rb"[ \t\r\n]*([{\[\"]|-?[0-9]|true|false|null)")
"""How JSON begins."""
REFUSED = {
    b"PK\x03\x04": "is a zip file; unpack it",
    b"BZh": "is compressed by bzip2; decompress it",
    b"\xfd7zXZ\0": "is compressed by xz; decompress it",
    b"ARROW1": "is a single Arrow file; name the folder that `save_to_disk` has written",
    b"\xff\xff\xff\xff": "is a single Arrow file; name the folder that `save_to_disk` has written",
}
"""Files that are known and not read, by how they begin."""


def open_source(
    path: str | Path,
    *,
    image_folder: str | Path | None = None,
    allowed_hosts: frozenset[str] = frozenset(),
    seq_length: int | None = None,
) -> Source:
    """Open the rows of a file, of a folder, or of all files that match a pattern.

    Args:
        path: a file; a folder; a pattern such as ``data/*.jsonl`` or ``data/{00..31}.tar``; of Energon, and of
            `datasets` with several splits, ``FOLDER/SPLIT``; of Megatron's tokens, either file or what precedes its
            ending.
        image_folder: that relative paths of images start from; None for the folder of each file.
        allowed_hosts: from which images may be fetched.
        seq_length: most tokens of a row that is cut from tokens.

    Raises:
        UserError: nothing is there, or it is not of a kind that is read.
        OSError: it cannot be read.
    """

    def open_one(file: Path) -> Source:
        return _open(
            file, Pictures(Path(image_folder or (file if file.is_dir() else file.parent)), allowed_hosts), seq_length
        )

    sources = [open_one(file) for file in _matching(str(path))]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _matching(path: str) -> list[Path]:
    """The path, or the files that a pattern names, in the order of their names."""
    if Path(path).exists() or not (has_magic(path) or re.search(r"\{.*(,|\.\.).*\}", path)):
        return [Path(path)]
    found = []
    for one in braceexpand(path):
        if has_magic(one):  # also of the locks beside the data
            matches = [match for match in sorted(glob(one, recursive=True)) if not match.endswith(".lock")]
        else:
            matches = [one] if Path(one).exists() else []
        if not matches:
            raise UserError(f"no file matches {one}")
        found += map(Path, matches)
    # Of Megatron's two files one is enough.
    return [file for file in dict.fromkeys(found) if file.suffix != ".bin" or file.with_suffix(".idx") not in found]


def _open(path: Path, pictures: Pictures, seq_length: int | None) -> Source:
    if (split := split_of(path)) is not None:
        return EnergonFolder(*split, pictures)
    if path.is_dir():
        return _open_folder(path, pictures, seq_length)
    if (prefix := prefix_of(path)) is not None:
        if seq_length is None:
            raise UserError(f"{path} holds tokens, which are cut into rows for training alone")
        return TokenFile(prefix, seq_length)
    return _opener(path)(path, pictures)


def _open_folder(folder: Path, pictures: Pictures, seq_length: int | None) -> Source:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return open_saved(folder, pictures)
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files = [folder / name for name in names if name.lower().endswith(ENDINGS)]
    files += [folder / name for name in names if name.endswith(".idx") and prefix_of(folder / name)]
    kinds = {file: _opener(file) for file in files if file.suffix != ".idx"}
    if not files:
        held = ", ".join(names[:5]) or "nothing"
        raise UserError(f"{folder} has no data, but {held}; what is read: {READ}")
    if len(set(kinds.values())) + any(file.suffix == ".idx" for file in files) > 1:
        some = ", ".join(next(file.name for file in kinds if kinds[file] is kind) for kind in set(kinds.values()))
        raise UserError(
            f"{folder} has files of several kinds, such as {some}; name one kind, as {folder}/*{files[0].suffix}"
        )
    sources = [_open(file, pictures, seq_length) for file in files]
    return sources[0] if len(sources) == 1 else Joined(sources)


def _opener(path: Path) -> Callable[[Path, Pictures], Source]:
    """What opens a file, by its content.

    Raises:
        UserError: it is of no kind that is read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head:
        raise UserError(f"{path} is empty")
    if head.startswith(b"PAR1"):
        return open_parquet
    if _is_tar(head):
        return Archive
    inner = _decompressed(head)
    if inner is not None and _is_tar(inner):
        raise UserError(f"{path} is compressed, so its samples cannot be read by index; decompress it, as by gunzip")
    text = head if inner is None else inner
    is_text = b"\0" not in text
    if text.startswith(tuple(WIDE)) or (is_text and VALUE.match(text.removeprefix(BYTE_ORDER_MARK))):
        return JSONFile
    if reason := next((reason for begin, reason in REFUSED.items() if head.startswith(begin)), None):
        raise UserError(f"{path} {reason}")
    if b"Metadataset" in text and b"__class__" in text:
        raise UserError(f"{path} is a mixture of Energon; name its folders and weights in data.sources")
    if is_text and ".json" in path.name:  # a first line that is malformed is a row that is malformed
        return JSONFile
    raise UserError(f"{path} is of no kind that is read: {READ}")


def _is_tar(head: bytes) -> bool:
    if not head[: 2 * tarfile.BLOCKSIZE].strip(b"\0"):
        return len(head) >= 2 * tarfile.BLOCKSIZE  # the end mark alone
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _decompressed(head: bytes) -> bytes | None:
    """The first bytes of what is compressed; None where the file is not."""
    try:
        if head.startswith(GZIP):
            return zlib.decompressobj(wbits=31).decompress(head, HEAD)
        if head.startswith(ZSTANDARD):
            return zstandard.ZstdDecompressor().decompressobj().decompress(head)[:HEAD]
    except (zlib.error, zstandard.ZstdError):
        return b"{"  # damaged: reported where all of it is read
    return None
