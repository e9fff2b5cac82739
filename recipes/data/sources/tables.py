"""Tables: Parquet, and folders that `datasets` has saved, read by that library as memory-mapped Arrow."""

from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UserError
from ..formats import parse_record
from ..pictures import Pictures
from ..rows import Row
from .base import Source, UnchangedFile

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Source):
    """Rows of a table; nothing of a row is decoded, and images are the bytes that its columns hold.

    Args:
        path: of the file or the folder.
        kind: what it is.
        dataset: its rows.
        pictures: where other images are looked up.
    """

    def __init__(self, path: Path, kind: str, dataset: "Dataset", pictures: Pictures) -> None:
        self.path = path
        self.kind = kind
        self.pictures = pictures
        self.files = (path,) if path.is_file() else tuple(sorted(file for file in path.iterdir() if file.is_file()))
        # Of a folder, what `save_to_disk` writes anew each time; there may be thousands of other files.
        self._written = UnchangedFile(path if path.is_file() else path / "state.json")
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """Convert one row from Arrow."""
        self._written.check()
        [record] = self._dataset[index : index + 1].to_pylist()
        return parse_record(_without_absent(record), self.pictures, for_training=for_training)

    def place(self, index: int) -> tuple[str, int | str]:
        """Its number in the table."""
        return str(self.path), f"row {index}"


def open_parquet(path: Path, pictures: Pictures) -> Table:
    """Open a Parquet file by its copy in Arrow, which `datasets` writes into its cache when it first reads the file.

    Raises:
        UserError: it is damaged, or has columns of a type that `datasets` does not read.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            is_empty = file.metadata.num_rows == 0
        if is_empty:  # which `datasets` refuses
            return Table(path, "Parquet", Dataset.from_dict({}), pictures)
        # A copy of a file that has changed is not used: its name has the time of the last change.
        dataset = Dataset.from_parquet(escape(str(path)))  # it takes a path as a pattern
    except (ArrowInvalid, OSError, DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # such as a full disk
            raise cause from error
        is_damage = isinstance(cause, OSError) or isinstance(error, ArrowInvalid)  # of Arrow, on reading
        problem = "is cut off or damaged" if is_damage else "cannot be read by `datasets`"
        raise UserError(f"{path} {problem} ({cause})") from error
    return Table(path, "Parquet", dataset, pictures)


def open_saved(folder: Path, pictures: Pictures) -> Table:
    """Open what `save_to_disk` has written; of several splits, one must be named.

    Raises:
        UserError: it has several splits, or is damaged.
    """
    from datasets import Dataset

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(found.parent.name for found in folder.glob("*/state.json"))
        if len(splits) != 1:
            raise UserError(
                f"{folder} has the splits {', '.join(splits)}; name one of them, such as {folder / splits[0]}"
            )
        folder = folder / splits[0]
    try:
        dataset = Dataset.load_from_disk(str(folder))
    except (ValueError, FileNotFoundError) as error:  # Arrow's errors are ValueErrors
        raise UserError(f"{folder} is cut off or damaged ({error})") from error
    return Table(folder, "datasets folder", dataset, pictures)


def _without_absent(value: Any) -> Any:
    """A value of a table without the keys that are null: all rows of a table have all keys."""
    if isinstance(value, dict):
        return {key: _without_absent(held) for key, held in value.items() if held is not None}
    return [_without_absent(held) for held in value] if isinstance(value, list) else value
