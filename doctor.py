"""The report of `gpt-oss-vision doctor`: what this machine can run, what is missing, and the exact fix."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .recipes import kernels
from .recipes.kernels import CUDNN, ENGINE, PACKAGES
from .recipes.launch.site import Site, read_site
from .recipes.launch.site_check import problems as site_problems
from .recipes.launch.site_check import versions_of

GIB = 2**30
ROOT = Path("/")
QUICKSTART_MEMORY_GIB = 4  # it peaks at 2.2, and says so in report.json
QUICKSTART_DISK_GIB = 1


def examine(folder: Path, site: Path | None = None) -> tuple[str, bool]:
    """Return the report as text, and whether all of it can run.

    Args:
        folder: where the quickstart would write.
        site: a site file, by which jobs would be launched; the report is about these then.
    """
    if site is not None:
        chosen = read_site(site, {})
        problems = [*_system_problems(), *site_problems(chosen)]
        return f"{_recipes(chosen)}\n{_verdict(f'jobs at the site of {site}', problems)}", not problems
    problems = [*_system_problems(), *_package_problems(), *_space_problems(folder)]
    rows = [
        ("system", f"{platform.system()} {platform.release()}"),
        ("python", platform.python_version()),
        *((name, _installed(name) or "missing") for name in _needed()),
        ("CUDA", _cuda()),
        ("transformer-engine", _installed(ENGINE) or "missing"),
        ("apex", _installed("apex") or "missing; Megatron-Core then uses torch's and Transformer Engine's kernels"),
        ("NVIDIA driver", _driver()),
        ("NCCL", _installed("nvidia-nccl-cu13") or "missing"),
        ("cuDNN", _installed(CUDNN) or "missing"),
        ("glibc", " ".join(platform.libc_ver()) or "unknown"),
        ("processors", str(os.cpu_count())),
        ("memory available", _gib(_memory_available())),
        ("disk free", _gib(shutil.disk_usage(folder).free)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += [
        "",
        _verdict("quickstart on the CPU", problems),
        _verdict("back end transformer_engine", _engine_problems()),
        _recipes(),
    ]
    return "\n".join(lines), not problems


def _recipes(site: Site | None = None) -> str:
    """The back end and the attention of each recipe, by what this Python has, or that of a site's nodes."""
    python = site.python if site is not None and site.container == "none" else None
    versions = {name: _installed(name) for name in PACKAGES} if python is None else versions_of(python, PACKAGES)
    if versions is None or versions["torch"] is None:
        return (
            "     back end and attention of the recipes: unknown without torch; name the nodes' Python with `python:`"
        )
    found = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    title = f"     recipes, with {found}{f' ({python})' if python else ''}:"
    return "\n".join([title, *(f"     {line}" for line in kernels.lines(versions))])


def _driver() -> str:
    file = ROOT / "proc/driver/nvidia/version"
    found = re.search(r"  (\d+\.[\d.]+)  ", file.read_text()) if file.exists() else None
    return found[1] if found else "none"


def _verdict(what: str, problems: list[str]) -> str:
    if not problems:
        return f"yes  {what}"
    return "\n".join([f"no   {what}", *(f"     - {problem}" for problem in problems)])


def _needed() -> dict[str, SpecifierSet]:
    """Name and versions of every direct dependency, extras left out."""
    found = [Requirement(line) for line in requires("gpt-oss-vision") or []]
    return {requirement.name: requirement.specifier for requirement in found if requirement.marker is None}


def _system_problems() -> list[str]:
    if sys.platform == "linux":
        return []
    # fork, prctl, O_DIRECT, fallocate and posix_fadvise; Megatron-Bridge has wheels for Linux alone.
    return [f"Linux is needed, this is {platform.system()}: use a Linux machine, a virtual machine or a container"]


def _package_problems() -> list[str]:
    return [
        f"{name}{versions} is needed, {_installed(name) or 'none'} is here: run `uv sync`, or "
        f"`pip install '{name}{versions}'`"
        for name, versions in _needed().items()
        if not versions.contains(_installed(name) or "0", prereleases=True)  # "2.11.0+cu130" is torch 2.11.0
    ]


def _space_problems(folder: Path) -> list[str]:
    problems = []
    memory, disk = _memory_available(), shutil.disk_usage(folder).free
    if memory is not None and memory < QUICKSTART_MEMORY_GIB * GIB:
        problems.append(
            f"{_gib(memory)} of memory are available, {QUICKSTART_MEMORY_GIB} GiB are needed: end other programs, "
            "or raise the limit of this container"
        )
    if disk < QUICKSTART_DISK_GIB * GIB:
        problems.append(
            f"{_gib(disk)} are free in {folder}, {QUICKSTART_DISK_GIB} GiB are needed: choose another disk with --out"
        )
    return problems


def _engine_problems() -> list[str]:
    problems = []
    if not _has_cuda():
        problems.append("torch sees no CUDA device: use a machine with an NVIDIA GPU and its driver")
    else:
        cudnn, refusal = _cudnn()
        if cudnn is None:
            problems.append(f"torch cannot use cuDNN: {refusal}")
    if _installed(ENGINE) is None:
        problems.append("Transformer Engine is missing: run `uv sync --extra te` where the CUDA toolkit is installed")
    return problems


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _has_cuda() -> bool:
    if _installed("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _cuda() -> str:
    if _installed("torch") is None:
        return "unknown without torch"
    import torch

    if not torch.cuda.is_available():
        return f"no device (torch is built for {torch.version.cuda or 'the CPU only'})"
    device = torch.cuda.get_device_properties(0)
    cudnn, refusal = _cudnn()
    names = f"{torch.cuda.device_count()} × {device.name} with {_gib(device.total_memory)}"
    return f"{torch.version.cuda}, cuDNN {cudnn or refusal}, {names}"


def _cudnn() -> tuple[int | None, str]:
    """The version of the cuDNN that torch has loaded, or None and why torch refuses the one that it has found."""
    import torch

    try:
        return torch.backends.cudnn.version(), "missing"
    except RuntimeError as error:
        return None, " ".join(str(error).split())


def _memory_available() -> int | None:
    """Bytes that a new program can take, within the limit of its control group; None without /proc/meminfo."""
    file = ROOT / "proc/meminfo"
    if not file.exists():
        return None
    fields = dict(line.split(":") for line in file.read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """The memory limits of this process's control groups and of those above them, in version 1 and 2.

    In a container the groups above are not there, and a path of version 1 may be the host's.
    """
    groups = ROOT / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            file = ROOT / "sys/fs/cgroup" / mount / folder / name
            if file.is_file() and (limit := file.read_text().strip()) != "max":
                yield int(limit)


def _gib(amount: int | None) -> str:
    return "unknown" if amount is None else f"{amount / GIB:.1f} GiB"
