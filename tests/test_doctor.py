"""The doctor lists what is installed, and ends with a verdict for each way to run."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

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


GROUPS = {
    "version 2": ("0::/job/step", {"job/step/memory.max": "1073741824", "memory.max": "max"}),
    "version 2, above": ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "1073741824"}),
    "version 2, in a container": ("0::/", {"memory.max": "1073741824"}),
    "version 1": ("4:memory:/job\n3:cpuset:/", {"memory/job/memory.limit_in_bytes": "1073741824"}),
    "version 1, the host's path": ("4:memory:/docker/12ab", {"memory/memory.limit_in_bytes": "1073741824"}),
}
UNLIMITED = {
    "version 2": ("0::/job", {"job/memory.max": "max"}),
    "version 1": ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "9223372036854771712"}),
    "both": ("4:memory:/\n0::/", {"memory/memory.limit_in_bytes": "9223372036854771712"}),
    "no control groups": ("", {}),
}


def examine_in(groups: str, limits: dict[str, str], folder: Path) -> tuple[str, bool]:
    """The doctor's report where /proc and /sys hold 8 GiB of free memory and these control groups."""
    files = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8388608 kB\n", "proc/self/cgroup": groups}
    for name, text in (files | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "ROOT", folder)
        return doctor.examine(folder)


@pytest.mark.parametrize(("groups", "limits"), GROUPS.values(), ids=GROUPS)
def test_a_control_group_limits_the_memory(groups: str, limits: dict[str, str], tmp_path: Path):
    text, is_ready = examine_in(groups, limits, tmp_path)
    assert not is_ready
    assert "1.0 GiB of memory are available, 4 GiB are needed" in text


@pytest.mark.parametrize(("groups", "limits"), UNLIMITED.values(), ids=UNLIMITED)
def test_without_a_limit_the_free_memory_counts(groups: str, limits: dict[str, str], tmp_path: Path):
    text, is_ready = examine_in(groups, limits, tmp_path)
    assert is_ready, text
    assert "memory available    8.0 GiB" in text


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
    assert (
        "no-such-package==1.0 is needed, none is here: run `uv sync`, or `pip install 'no-such-package==1.0'`" in text
    )
    assert "torch==2.11.0 is needed" not in text


def test_a_cudnn_that_torch_refuses_is_a_problem_and_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    """As on a machine whose LD_LIBRARY_PATH has an older cuDNN than torch's own."""

    def version() -> int:
        raise RuntimeError("cuDNN version incompatibility: compiled against (9, 19, 0)\nbut found (9, 14, 0)")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    monkeypatch.setattr(doctor, "_has_cuda", lambda: True)
    said = "cuDNN version incompatibility: compiled against (9, 19, 0) but found (9, 14, 0)"
    assert doctor._cudnn() == (None, said)
    assert f"torch cannot use cuDNN: {said}" in doctor._engine_problems()


def test_nemo_run_is_importable_and_its_dependency_is_checked():
    """nemo-run 0.11.1 imports modules of leptonai that 0.47, which its metadata allows, does not have."""
    # In a process of its own: leptonai's own imports are deprecated ones.
    subprocess.run([sys.executable, "-c", "from nemo_run import LocalExecutor, SlurmExecutor"], check=True)
    assert "leptonai" in doctor._needed()
