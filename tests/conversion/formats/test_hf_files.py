"""Files beside the weights: kept with a Megatron checkpoint all together or not at all."""

from itertools import count
from pathlib import Path

import pytest
from kills import killed_at_change

from gpt_oss_vision.conversion.formats.hf_files import FILES, keep_files

ALL = {name.replace("*", "rag") for name in FILES}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder that has all of the files."""
    folder = tmp_path / "hf"
    for name in ALL:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def kept(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_a_kill_at_any_change_leaves_all_files_or_none_and_the_next_call_keeps_all(hf: Path, tmp_path: Path):
    for number in count():
        megatron = tmp_path / f"megatron {number}"
        was_killed = killed_at_change(lambda megatron=megatron: keep_files([hf], megatron), number)
        assert kept(megatron / "tokenizer") in ({}, {name: name for name in ALL})
        keep_files([hf], megatron)
        assert kept(megatron) == {f"tokenizer/{name}": name for name in ALL}
        if not was_killed:
            break
    assert number > 2 * len(ALL)


def test_other_files_of_the_folder_stay(hf: Path, tmp_path: Path):
    (tmp_path / "megatron" / "tokenizer").mkdir(parents=True)
    (tmp_path / "megatron" / "tokenizer" / "merges.txt").write_text("mine")
    keep_files([hf], tmp_path / "megatron")
    assert kept(tmp_path / "megatron" / "tokenizer").keys() == {*ALL, "merges.txt"}


def test_files_that_are_kept_already_are_not_replaced(hf: Path, tmp_path: Path):
    keep_files([hf], tmp_path)
    (hf / "config.json").write_text("another")
    keep_files([hf], tmp_path)
    assert (tmp_path / "tokenizer" / "config.json").read_text() == "config.json"


@pytest.fixture
def processor(tmp_path: Path) -> Path:
    """Another checkpoint, with another chat template."""
    folder = tmp_path / "processor"
    for name in ALL - {"special_tokens_map.json"}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"another {name}")
    return folder


def test_the_processor_of_training_is_kept_with_the_config_of_the_start(hf: Path, processor: Path, tmp_path: Path):
    keep_files([hf], tmp_path, processor)
    found, start = kept(tmp_path / "tokenizer"), {"config.json", "generation_config.json"}
    assert found.keys() == ALL - {"special_tokens_map.json"}
    assert found == {name: name if name in start else f"another {name}" for name in found}


def test_a_run_goes_on_with_its_own_processor_alone(hf: Path, processor: Path, tmp_path: Path):
    keep_files([hf], tmp_path, hf)
    keep_files([hf], tmp_path, hf)
    with pytest.raises(
        ValueError, match=r"processor has another \S+ than .*tokenizer, with which this run was trained"
    ):
        keep_files([hf], tmp_path, processor)


def test_a_folder_in_which_training_has_saved_nothing_yet_is_made(hf: Path, tmp_path: Path):
    keep_files([hf], tmp_path / "run" / "megatron")
    assert kept(tmp_path / "run" / "megatron" / "tokenizer").keys() == ALL
