"""Whether jobs can be launched at a site: its scheduler, partition, account, shared folder, container and Python."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...bridge import resiliency
from .plan import RESILIENCY
from .site import Site

SECONDS_OF_SKEW = 2.0
SECONDS_FOR_A_COMMAND = 20.0


def problems(site: Site) -> list[str]:
    """What is missing, each with what to do."""
    return [*_scheduler(site), *_shared_folder(site), *_container(site), *_python(site)]


def _scheduler(site: Site) -> Iterator[str]:
    if shutil.which("sbatch") is None:
        yield "sbatch is not on this machine: run this where jobs are submitted"
        return
    answer = _run("scontrol", "ping")
    if answer is None or " UP" not in answer:
        yield f"SLURM's controller does not answer (`scontrol ping`: {_first_line(answer)}): ask the administrators"
        return
    if site.partition is not None:
        yield from _partition(site)
    yield from _account(site)


def _partition(site: Site) -> Iterator[str]:
    shown = _run("scontrol", "show", "partition", str(site.partition))
    if shown is None:
        names = sorted({name.rstrip("*") for name in (_run("sinfo", "--noheader", "--format=%P") or "").split()})
        yield f"there is no partition {site.partition}; this cluster has {', '.join(names)}"
        return
    fields = dict(re.findall(r"(\w+)=(\S+)", shown))
    if fields.get("State", "UP") != "UP":
        yield f"partition {site.partition} is {fields['State']}: jobs wait until it is UP"
    if site.time and _minutes(site.time) > _minutes(fields.get("MaxTime", "UNLIMITED")):
        yield f"time {site.time} is longer than partition {site.partition} permits, {fields['MaxTime']}"
    if site.gpus_per_node:
        offered = _run("sinfo", "--noheader", f"--partition={site.partition}", "--format=%G") or ""
        most = max((int(count) for count in re.findall(r"gpu(?::[^:,(\s]+)?:(\d+)", offered)), default=0)
        if most < site.gpus_per_node:
            yield f"nodes of partition {site.partition} have {most} GPUs, and gpus_per_node is {site.gpus_per_node}"


def _account(site: Site) -> Iterator[str]:
    if site.account is None or shutil.which("sacctmgr") is None:
        return
    user = os.environ.get("USER", str(os.getuid()))
    known = _run("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account")
    if known and site.account not in known.split():
        yield f"account {site.account} is not yours; yours are {', '.join(sorted(set(known.split())))}"


def _shared_folder(site: Site) -> Iterator[str]:
    folder = Path(site.runs).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError as error:
        yield f"{folder}, the folder of the runs, cannot be written ({error.strerror}): name another with `runs:`"
        return
    if abs(skew) > SECONDS_OF_SKEW:
        yield f"the clock of the disk of {folder} is {skew:+.0f} s off that of this machine: let both follow one server"


def _container(site: Site) -> Iterator[str]:
    if site.container == "none":
        return
    if site.container == "pyxis":
        if "--container-image" not in (_run("srun", "--help") or ""):
            yield "srun has no --container-image: pyxis is not installed; use `container: apptainer`, or none"
    elif shutil.which(site.container) is None:
        yield f"{site.container} is not on this machine; if the nodes have it, `module load` it in `modules:`"
    if site.container_image.startswith(("/", ".")) and not Path(site.container_image).exists():
        yield f"{site.container_image}, the image, is not there"
    for mount in site.mounts:
        if not Path(mount.partition(":")[0]).exists():
            yield f"{mount.partition(':')[0]}, a mount of the container, is not there"


def _python(site: Site) -> Iterator[str]:
    if site.container != "none" or site.python is None:
        return
    if shutil.which(site.python) is None:
        yield f"{site.python}, the Python of the nodes, is not there"
    elif _run(site.python, "-c", "import gpt_oss_vision") is None:
        install = f"uv pip install --python {site.python} gpt-oss-vision"
        yield f"{site.python} does not import gpt_oss_vision: install it there, `{install}`"
    elif site.start == "ft_launcher":
        yield from _ft_launcher(site.python)


def _ft_launcher(python: str) -> Iterator[str]:
    install = f"install it, `uv pip install --python {python} {RESILIENCY}`"
    if _run(python, "-c", "import nvidia_resiliency_ext.fault_tolerance") is None:
        yield f"{python} has no nvidia-resiliency-ext, which `start: ft_launcher` needs: {install}"
        return
    found = (versions_of(python, [resiliency.PACKAGE]) or {}).get(resiliency.PACKAGE)
    if found is not None and resiliency.is_too_old(found):
        yield f"{python} has nvidia-resiliency-ext {found}, which is too old for Megatron-Core: {install}"


def versions_of(python: str, packages: Sequence[str]) -> dict[str, str | None] | None:
    """The versions of packages in another Python; None where it does not run."""
    code = (
        "import json, sys; from importlib.metadata import distributions as all; "
        "found = {each.name.lower(): each.version for each in all() if each.name}; "
        "print(json.dumps({name: found.get(name) for name in sys.argv[1:]}))"
    )
    shown = _run(python, "-c", code, *packages)
    return None if shown is None else json.loads(shown)


def _run(*command: str) -> str | None:
    """What a command prints; None where it fails or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_A_COMMAND)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_line(text: str | None) -> str:
    return text.splitlines()[0] if text and text.strip() else "nothing"


def _minutes(time: str) -> float:
    """A time of SLURM in minutes: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``."""
    if time in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    if len(parts) == 3:
        return parts[0] * 60 + parts[1] + parts[2] / 60
    return parts[0] + (parts[1] / 60 if len(parts) > 1 else 0)
