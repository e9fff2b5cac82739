"""The doctor lists what is installed, and ends with a verdict for each way to run."""

from importlib.metadata import version
from pathlib import Path

import pytest

from gpt_oss_vision import doctor


def test_installed_versions_are_shown(tmp_path: Path):
    text, _ = doctor.examine(tmp_path)
    rows = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("torch ", "megatron-core ")))
    assert rows == {"torch": version("torch"), "megatron-core": version("megatron-core")}


def test_a_machine_that_holds_every_pin_is_ready(tmp_path: Path):
    text, is_ready = doctor.examine(tmp_path)
    assert is_ready, text
    assert "yes  quickstart" in text


def test_too_little_memory_is_a_problem_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "QUICKSTART_MEMORY_GIB", 2**20)
    text, is_ready = doctor.examine(tmp_path)
    assert not is_ready
    assert "GiB of memory are available, 1048576 GiB are needed" in text


def test_another_system_than_linux_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    text, is_ready = doctor.examine(tmp_path)
    assert not is_ready
    assert "Linux is needed, this is Darwin" in text


def test_a_missing_package_comes_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ["no-such-package==1.0", "torch==2.11.0", "x==1; extra == 'te'"])
    text, is_ready = doctor.examine(tmp_path)
    assert not is_ready
    assert "no-such-package 1.0 is needed, none is here: run `uv sync`, or `pip install no-such-package==1.0`" in text
    assert "torch 2.11.0 is needed" not in text
