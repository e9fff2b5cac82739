"""The script behind `just gpu`."""

import subprocess
import sys
from pathlib import Path

import pytest

from gpu import run


def call(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, run.__file__, *map(str, arguments)]
    environment = {"PYTHONPATH": str(run.ROOT / "tests"), "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_part_leaves_its_output_and_results(tmp_path: Path):
    found = call(tmp_path / "out", "kernels")
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith("kernels: passed, ")
    assert ", 25 skipped; see " in found.stdout
    assert "25 skipped" in (tmp_path / "out" / "kernels.txt").read_text()


def test_a_part_that_does_not_exist_is_refused(tmp_path: Path):
    found = call(tmp_path / "out", "kernel")
    assert found.returncode == 2
    assert "there is no part 'kernel'; the parts are environment, kernels, model, " in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", run.PARTS)
def test_a_part_runs_files_that_exist(name: str, tmp_path: Path):
    part = run.PARTS[name]
    files = [argument for argument in part.command(name, tmp_path) if argument.startswith("tests/")]
    assert files
    assert all((run.ROOT / file).exists() for file in files)


def test_every_test_file_of_this_folder_is_in_a_part():
    named = {argument for part in run.PARTS.values() for argument in part.tests}
    here = {f"tests/gpu/{file.name}" for file in Path(__file__).parent.glob("test_*.py")}
    assert here - named == {"tests/gpu/test_run.py"}
