"""Each input file of a conversion, damaged in four ways: refused without an output, or nothing else is different."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import files_of, save_tiny
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.errors import UserError


def remove(file: Path) -> None:
    file.unlink()


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nothing"))


def invert_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - byte for byte in data[middle : middle + 8])
    file.write_bytes(data)


DAMAGES = (remove, halve, link_to_nothing, invert_middle)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, its import `megatron`, and the export of that, `back`."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder / "hf", num_hidden_layers=2)
    import_checkpoint(folder / "hf", folder / "megatron")
    export_checkpoint(folder / "megatron", folder / "back")
    return folder


def convert_damaged(whole: Path, source: str, file: Path, damage: Callable[[Path], None], folder: Path) -> None:
    """Convert a copy of `source` with one damaged file, and check what comes out, or that nothing does."""
    convert, target = (import_checkpoint, "megatron") if source == "hf" else (export_checkpoint, "back")
    copy, out = shutil.copytree(whole / source, folder / source), folder / "out"
    damage(copy / file)
    refusal = None
    try:
        convert(copy, out)
    except (UserError, OSError) as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal and {path.name for path in folder.iterdir()} == {source}
        return
    assert file.suffix != ".json" or file.name == "conversion.json" or not (copy / file).is_file()
    found, expected = files_of(out), files_of(whole / target)
    different = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    # The report and the run's configuration name the folders.
    assert different <= {"conversion.json", "iter_0000000/run_config.yaml", *copies_of(file), *holding_weights(file)}


def copies_of(file: Path) -> set[str]:
    """The names that a file which is copied has in both kinds of checkpoint."""
    return {file.name, f"iter_0000000/tokenizer/{file.name}"}


def holding_weights(file: Path) -> set[str]:
    """Where changed bytes of a weight file are found again: without a checksum they are other weights."""
    return {
        ".safetensors": {f"iter_0000000/__0_{number}.distcp" for number in range(3)},
        ".distcp": {"model.safetensors"},
    }.get(file.suffix, set())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("source", ["hf", "megatron"])
def test_a_damaged_file_is_named_or_changes_nothing_else(
    source: str, damage: Callable[[Path], None], whole: Path, tmp_path: Path
):
    for number, file in enumerate(sorted(path for path in (whole / source).rglob("*") if path.is_file())):
        convert_damaged(whole, source, file.relative_to(whole / source), damage, tmp_path / str(number))
