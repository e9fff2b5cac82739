"""The doctor lists what is installed, and ends with a verdict for each way to run."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from gpt_oss_vision import doctor
from gpt_oss_vision.recipes import kernels
from gpt_oss_vision.recipes.catalog import RECIPES


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


def kernels_of(name: str, *, engine: str | None, cudnn: str | None) -> str:
    """What is said of a recipe: the lines from its answer on."""
    versions = {"torch": "2.11.0", kernels.ENGINE: engine, kernels.CUDNN: cudnn}
    answers = "\n".join(kernels.lines(versions)).split("- back end ")
    (found,) = [answer for answer in answers if f" {name}_" in answer]
    return found


SFT, LONG = "gpt_oss_vision_20b_sft_8gpu", "gpt_oss_vision_20b_long_context_16gpu"
KERNELS = {
    "all is there": (SFT, "2.12.0", "9.19.0.56", "transformer_engine, attention by cuDNN's fused kernel: sinks need"),
    "no engine": (SFT, None, "9.19.0.56", "torch, attention by torch's flash attention"),
    "cuDNN too old": (SFT, "2.12.0", "9.10.2.21", "sinks need cuDNN 9.13.1, 9.10.2.21 is there"),
    "no cuDNN": (SFT, "2.12.0", None, "sinks need cuDNN 9.13.1, none is there"),
    "too old for packs": (
        SFT,
        "2.12.0",
        "9.15.1.9",
        "refused: sinks of packed rows need cuDNN 9.18.0, 9.15.1.9 is there",
    ),
    "context parallel": (LONG, "2.12.0", "9.19.0.56", "model.context_parallel_size=4: ranks exchange heads"),
    "no GPU": ("gpt_oss_vision_tiny_sft_1cpu", "2.12.0", "9.19.0.56", "there is no GPU"),
}


@pytest.mark.parametrize(("name", "engine", "cudnn", "said"), KERNELS.values(), ids=KERNELS)
def test_back_end_and_attention_of_a_recipe_are_named_with_the_reason(
    name: str, engine: str | None, cudnn: str | None, said: str
):
    assert said in kernels_of(name, engine=engine, cudnn=cudnn)


def test_every_recipe_is_found_with_its_gpu(tmp_path: Path):
    text, _ = doctor.examine(tmp_path)
    assert text.count("gpt_oss_vision_20b_lora_1gpu_h200_bf16, on an H200 SXM 141 GB") == 1
    assert all(text.count(f" {recipe.name}, on a") == 1 for recipe in RECIPES)


def test_the_versions_are_those_of_the_nodes(tmp_path: Path):
    (tmp_path / "site.yaml").write_text(f"python: {sys.executable}\nruns: {tmp_path}")
    text, _ = doctor.examine(tmp_path, tmp_path / "site.yaml")
    assert f"recipes, with torch {version('torch')}, " in text and f" ({sys.executable}):" in text
    (tmp_path / "site.yaml").write_text(f"python: /no/python\nruns: {tmp_path}")
    text, _ = doctor.examine(tmp_path, tmp_path / "site.yaml")
    assert "back end and attention of the recipes: unknown" in text


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
