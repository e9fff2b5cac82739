"""The defaults of a cluster, from a YAML file: what is the same for every job there."""

import dataclasses
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ...errors import UsageError
from .plan import ContainerKind, Starter


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """The options of `launch` that a site file may hold, by the same names.

    Attributes:
        account: of SLURM.
        partition: of SLURM.
        time: limit of a job, as SLURM writes it.
        sbatch: further options of `sbatch`, each as ``--name=value``.
        gpus_per_node: GPUs of a node.
        python: the interpreter on the nodes, or in the container.
        start: one `torchrun` or `ft_launcher` per node, or one task of `srun` per rank.
        container: kind of container.
        container_image: file or name of the image.
        mounts: folders for the container.
        modules: environment modules.
        env: names of variables that jobs need.
        runs: folder, shared by all nodes, in which runs get a folder each.
        hang: time of the longest step; a run that takes longer starts again from its newest checkpoint.
        seconds_to_save: how long before the time limit a run is asked to end.
        retries: restarts inside an allocation.
        requeues: returns to the queue.
    """

    account: str | None = None
    partition: str | None = None
    time: str | None = None
    sbatch: tuple[str, ...] = ()
    gpus_per_node: int | None = None
    python: str | None = None
    start: Starter = "torchrun"
    container: ContainerKind = "none"
    container_image: str = ""
    mounts: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    runs: str = "runs"
    hang: str = "1h"
    seconds_to_save: int = 300
    retries: int = 3
    requeues: int = 100


def read_site(file: Path | None, options: dict[str, Any]) -> Site:
    """The site file with the options of the command line, which win.

    Args:
        file: None for a site without defaults.
        options: by the names of `Site`; None and empty ones are not given.

    Raises:
        UsageError: the file has other keys, or values of another type.
    """
    kept = {} if file is None else _checked(_loaded(file), file)
    given = {name: value for name, value in options.items() if value not in (None, [])}
    return Site(**kept | {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _loaded(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        loaded = yaml.load(file.read_text(), Loader=yaml.BaseLoader)  # all values are text: `time: 4:00:00` too
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not loaded:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{file}: names with values are expected, such as `partition: batch`")
    return loaded


def _checked(values: dict[Any, Any], file: Path) -> dict[str, Any]:
    fields = {field.name: field.type for field in dataclasses.fields(Site)}
    found = {}
    for name, value in values.items():
        if name not in fields:
            near = get_close_matches(str(name), fields, n=1, cutoff=0.4)
            raise UsageError(f"{file}: {name} is no setting of a site{f'; near it is {near[0]}' if near else ''}")
        found[name] = _value(value, fields[name], f"{file}: {name}")
    return found


def _value(value: Any, kind: Any, where: str) -> Any:
    kind = getattr(kind, "__value__", kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"{where} is one of {', '.join(get_args(kind))}, and not {value}")
        return value
    if kind is int or kind == int | None:
        if not isinstance(value, str) or not value.isdecimal():
            raise UsageError(f"{where} is a whole number, and not {value}")
        return int(value)
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"{where} is a list, such as [{value}]")
        return tuple(value)
    if not isinstance(value, str):
        raise UsageError(f"{where} is a text, and not {value}")
    return value
