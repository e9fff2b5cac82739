"""What every conversion does with its plan: tell it, or carry it out into an output that appears when it is whole."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from ...terminal import Progress
from ..formats.safetensors import ShardPlan
from .journal import check_space, exists, fingerprint, open_output, partial_of, refuse_foreign
from .report import REPORT, make_report, nonfinite_warnings, package_versions, read_report, write_report
from .stream import Task, peak_memory, stream, write_header_task


class Work(ABC):
    """A conversion, planned.

    Attributes:
        action: its name, in the journal's plan and in the report.
        title: its name beside the progress.
    """

    action: ClassVar[str]
    title: ClassVar[str]

    @property
    @abstractmethod
    def sources(self) -> Mapping[str, Path]:
        """The folders that are read, under the names that the journal's plan has for their files."""

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file that the tasks write, by its name within the output."""

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of the weights that are read."""

    @property
    def held(self) -> int:
        """Bytes of memory that it keeps beside the buffers."""
        return 0

    @abstractmethod
    def tasks(self) -> list[Task]:
        """What is done, in the order in which it is begun."""

    @abstractmethod
    def write_files(self, output: Path) -> None:
        """Write the files that no task writes, into the folder of the others."""

    @abstractmethod
    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """What the report says of this conversion, its ``tensors`` above all, given what the tasks returned."""


class ShardedWork(Work):
    """A conversion into safetensors files, each of which begins with a header.

    Attributes:
        shards: where everything will lie.
    """

    shards: ShardPlan

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of the files of weights."""
        return self.shards.sizes

    def tasks(self) -> list[Task]:
        """The headers, then the tensors."""
        return [*(write_header_task(*header) for header in self.shards.headers.items()), *self.tensor_tasks()]

    @abstractmethod
    def tensor_tasks(self) -> Iterable[Task]:
        """What writes the tensors, in the order in which it is begun."""


def run_conversion(
    work: Work,
    out: Path,
    plan: Mapping[str, Any],
    *,
    jobs: int,
    overwrite: bool,
    dry_run: bool,
    console: Console | None,
) -> dict[str, Any]:
    """Make the output, or continue making it.

    Args:
        work: what to do.
        out: absolute path of the folder to make.
        plan: what decides the bytes of the output, beside the action, the versions of packages and the files of the
            sources; JSON values.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only say what would be done.
        console: where progress and warnings go; None is nowhere.

    Returns:
        The report that lies in `out` too; for a dry run its totals, ``peak_memory``, bytes ``free`` on the disk, and
        how many ``files``.

    Raises:
        FileExistsError: `out` exists, or holds another conversion's beginning, or is no folder to be replaced.
        OSError: the disk is too small, or fails.
    """
    tasks, console = work.tasks(), console or Console(quiet=True)
    totals = {"bytes_read": work.bytes_read, "bytes_written": sum(work.sizes.values())}
    refuse_to_lose(out, work.sources.values(), overwrite=overwrite)
    if dry_run:
        refuse_foreign(partial_of(out))
        if os.path.lexists(out) and not overwrite:
            raise exists(out)
        free = check_space(out, totals["bytes_written"])
        return totals | {"peak_memory": peak_memory(tasks, jobs) + work.held, "free": free, "files": len(work.sizes)}
    read = {name: fingerprint(folder, apart_from=out) for name, folder in work.sources.items()}
    plan = {"action": work.action, "versions": package_versions(), "out": str(out), **plan, **read}
    with open_output(out, plan, overwrite=overwrite) as journal:
        if not journal.is_complete:
            check_space(journal.out, totals["bytes_written"])
            total = sum(task.nbytes for task in tasks)
            with Progress(work.title, total, console, in_bytes=True) as progress:
                results = stream(tasks, journal, work.sizes, jobs=jobs, progress=progress)
            work.write_files(journal.output)
            told = work.report(results)
            report = make_report(work.action, told.pop("tensors"), **told, **totals)
            for warning in nonfinite_warnings(report):
                console.print(f"Warning: {warning}", soft_wrap=True)
            write_report(report, journal.output)
        journal.finish()
    return read_report(out)


def refuse_to_lose(out: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """Keep a slip of the hand from costing more than a conversion made.

    Args:
        out: the folder to make, or to replace.
        sources: what it is made from.
        overwrite: whether what is there may be replaced.

    Raises:
        FileExistsError: `out` is or holds the working folder or a source, or is to be replaced and no conversion's.
    """
    place = out.resolve()
    for folder, what in [(Path.cwd(), "the working folder"), *((source, "what is converted") for source in sources)]:
        if folder.resolve().is_relative_to(place):
            raise FileExistsError(f"--out {out} is {what}, or holds it ({folder}); name another folder")
    if not overwrite or not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(
            f"--out {out} is no folder but a {'link' if out.is_symlink() else 'file'}; remove it first"
        )
    if any(out.iterdir()) and not (out / REPORT).is_file():
        raise FileExistsError(f"--out {out} has no {REPORT}, so no conversion has made it; remove it first")
