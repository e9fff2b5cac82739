"""Outputs that every conversion refuses before it begins."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gpt_oss_vision
from checkpoints import OBLONG, files_of, save_pair
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, and `megatron` made from it."""
    gpt_oss_vision.register()
    return save_pair(tmp_path_factory.mktemp("pair"), **OBLONG, dtype=torch.bfloat16)


@pytest.fixture
def project(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `pair` beside other work; the working directory is its folder `code`."""
    shutil.copytree(pair, tmp_path / "project")
    (tmp_path / "project" / "code").mkdir()
    (tmp_path / "project" / "code" / "thesis.py").write_text("mine")
    (tmp_path / "link").symlink_to("project/megatron")
    monkeypatch.chdir(tmp_path / "project" / "code")
    return tmp_path / "project"


SLIPS = {
    "the source": (
        lambda hf, out, **options: import_checkpoint(hf / "hf", hf / "hf", **options),
        "is what is converted",
    ),
    "the checkpoint": (
        lambda at, out, **options: export_checkpoint(at / "megatron", at / "megatron", **options),
        "is what",
    ),
    "its link": (
        lambda at, out, **options: export_checkpoint(out / "link", at / "megatron", **options),
        "is what is conv",
    ),
    "what holds it": (lambda at, out, **options: import_checkpoint(at / "hf", at, **options), "is the working folder"),
    "nothing": (
        lambda at, out, **options: import_checkpoint(at / "hf", "", **options),
        "is the working folder, or holds",
    ),
    "the parent": (
        lambda at, out, **options: import_checkpoint(at / "hf", "..", **options),
        "is the working folder, or",
    ),
    "the root": (
        lambda at, out, **options: import_checkpoint(at / "hf", "/", **options),
        "is the working folder, or hol",
    ),
    "a link": (
        lambda at, out, **options: import_checkpoint(at / "hf", out / "link", **options),
        "is no folder but a link",
    ),
}


@pytest.mark.parametrize("dry_run", [False, True], ids=["for good", "dry run"])
@pytest.mark.parametrize(("convert", "said"), SLIPS.values(), ids=SLIPS)
def test_overwriting_is_refused_where_it_would_destroy_an_input_or_other_files(
    convert: Callable[..., object], said: str, dry_run: bool, project: Path
):
    before = files_of(project.parent)
    with pytest.raises(FileExistsError, match=said):
        convert(project, project.parent, overwrite=True, dry_run=dry_run)
    assert files_of(project.parent) == before


def test_overwriting_replaces_only_an_output_or_an_empty_folder(project: Path, tmp_path: Path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine has no conversion\.json, so no conversion has made it"):
        import_checkpoint(project / "hf", mine, overwrite=True)
    (mine / "thesis.py").rename(tmp_path / "thesis.py")
    for _ in range(2):
        import_checkpoint(project / "hf", mine, overwrite=True)
        assert (mine / "conversion.json").is_file()


def test_a_dry_run_is_refused_as_the_call_itself_would_be(project: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis").touch()
    for out, said in (("out", "--overwrite"), ("other", "is in the way")):
        for dry_run in (False, True):
            with pytest.raises(FileExistsError, match=said):
                import_checkpoint(project / "hf", tmp_path / out, dry_run=dry_run)


def test_an_output_within_its_source_is_continued(project: Path, monkeypatch: pytest.MonkeyPatch):
    out = project / "hf" / "megatron"
    with monkeypatch.context() as patch:
        patch.setattr("gpt_oss_vision.conversion.engine.job.write_report", lambda *_: os.stat("/nowhere"))
        with pytest.raises(FileNotFoundError):
            import_checkpoint(project / "hf", out)
    assert (project / "hf" / "megatron.partial").is_dir()
    import_checkpoint(project / "hf", out)
    assert (out / "conversion.json").is_file()


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077], ids=oct)
def test_files_and_folders_have_the_permissions_that_the_umask_leaves(mask: int, pair: Path, tmp_path: Path):
    """For example for the group, where a cluster's users share a folder."""
    before = os.umask(mask)
    try:
        import_checkpoint(pair / "hf", tmp_path / "megatron")
        export_checkpoint(tmp_path / "megatron", tmp_path / "hf")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
