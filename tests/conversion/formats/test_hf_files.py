"""Files beside the weights: kept with a Megatron checkpoint all together or not at all."""

import os
import shutil
from pathlib import Path

import pytest
from crashes import fork

from gpt_oss_vision.conversion.formats.hf_files import FILES, keep_files


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A folder that has all of the files."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("copied", range(len(FILES)))
def test_a_kill_at_any_file_leaves_none_and_the_next_call_keeps_all(copied: int, hf: Path, tmp_path: Path):
    megatron, copy, calls = tmp_path / "megatron", shutil.copyfile, []
    megatron.mkdir()

    def dies(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) > copied:
            os._exit(9)
        copy(source, target)

    def killed() -> None:
        shutil.copyfile = dies
        keep_files([hf], megatron)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(killed), 0)[1]) == 9
    assert not (megatron / "tokenizer").exists()
    keep_files([hf], megatron)
    assert sorted(path.name for path in megatron.iterdir()) == ["tokenizer"]
    assert {path.name: path.read_text() for path in (megatron / "tokenizer").iterdir()} == {
        name: name for name in FILES
    }


def test_other_files_of_the_folder_stay(hf: Path, tmp_path: Path):
    (tmp_path / "megatron" / "tokenizer").mkdir(parents=True)
    (tmp_path / "megatron" / "tokenizer" / "merges.txt").write_text("mine")
    keep_files([hf], tmp_path / "megatron")
    names = {path.name for path in (tmp_path / "megatron" / "tokenizer").iterdir()}
    assert names == {*FILES, "merges.txt"}


def test_files_that_are_kept_already_are_not_replaced(hf: Path, tmp_path: Path):
    keep_files([hf], tmp_path)
    (hf / "config.json").write_text("another")
    keep_files([hf], tmp_path)
    assert (tmp_path / "tokenizer" / "config.json").read_text() == "config.json"


@pytest.fixture
def processor(tmp_path: Path) -> Path:
    """Another checkpoint, with another chat template."""
    folder = tmp_path / "processor"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(f"another {name}")
    (folder / "special_tokens_map.json").unlink()
    return folder


def test_the_processor_of_training_is_kept_with_the_config_of_the_start(hf: Path, processor: Path, tmp_path: Path):
    keep_files([hf], tmp_path, processor)
    found = {path.name: path.read_text() for path in (tmp_path / "tokenizer").iterdir()}
    assert {name for name, text in found.items() if text == name} == {"config.json", "generation_config.json"}
    assert {name for name, text in found.items() if text == f"another {name}"} == found.keys() - {
        "config.json",
        "generation_config.json",
    }
    assert found.keys() == {*FILES} - {"special_tokens_map.json"}


def test_a_run_goes_on_with_its_own_processor_alone(hf: Path, processor: Path, tmp_path: Path):
    keep_files([hf], tmp_path, hf)
    keep_files([hf], tmp_path, hf)
    with pytest.raises(ValueError, match=r"processor has another tokenizer\.json than .*tokenizer"):
        keep_files([hf], tmp_path, processor)


def test_a_folder_in_which_training_has_saved_nothing_yet_is_made(hf: Path, tmp_path: Path):
    keep_files([hf], tmp_path / "run" / "megatron")
    assert {path.name for path in (tmp_path / "run" / "megatron" / "tokenizer").iterdir()} == {*FILES}
