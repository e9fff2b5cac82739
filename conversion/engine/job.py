"""A planned conversion, and the one function that runs it: into an output that appears only when it is complete."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...atomic import exists_error
from ...terminal import Progress
from .journal import check_space, fingerprint, open_output, partial_of, refuse_foreign
from .report import REPORT, make_report, nonfinite_warnings, package_versions, read_report, write_report
from .stream import Task, peak_memory, stream


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion reads, does and writes.

    Attributes:
        action: its name in the journal and in the report.
        title: its name beside the progress.
        settings: JSON values that decide the output's bytes, beside package versions and the files of the sources.
        sources: the folders that are read, by the names of their fingerprints in the journal.
        tasks: in the order in which they begin.
        file_sizes: bytes of every file that the tasks write, by its name within the output.
        bytes_read: of the weights.
        write_files: writes the files that no task writes into the output folder.
        build_report: the report's fields, ``tensors`` among them, from the tasks' results by name.
        resident_bytes: memory that the plan holds while the tasks run.
        warnings: sentences that are printed at the start.
    """

    action: str
    title: str
    settings: Mapping[str, Any]
    sources: Mapping[str, Path]
    tasks: Sequence[Task]
    file_sizes: Mapping[str, int]
    bytes_read: int
    write_files: Callable[[Path], object]
    build_report: Callable[[Mapping[str, Any]], dict[str, Any]]
    resident_bytes: int = 0
    warnings: Sequence[str] = ()


def run_conversion(
    plan: ConversionPlan, out: Path, *, jobs: int, overwrite: bool, dry_run: bool, console: Console | None
) -> dict[str, Any]:
    """Make the output, or continue making it.

    Args:
        plan: what to do.
        out: absolute path of the folder to make.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only check whether the conversion could begin.
        console: where progress and warnings go; None is nowhere.

    Returns:
        The report, as in the output; for a dry run its totals, ``peak_memory``, bytes ``free`` on the disk, and the
        number of ``files``.

    Raises:
        FileExistsError: `out` exists, holds another conversion's partial output, or must not be replaced.
        OSError: the disk is too small, or fails.
    """
    console = console or Console(quiet=True)
    totals = {"bytes_read": plan.bytes_read, "bytes_written": sum(plan.file_sizes.values())}
    refuse_to_lose(out, plan.sources.values(), overwrite=overwrite)
    _warn(plan.warnings, console)
    if dry_run:
        refuse_foreign(partial_of(out))
        if os.path.lexists(out) and not overwrite:
            raise exists_error(out)
        memory = peak_memory(plan.tasks, jobs) + plan.resident_bytes
        free = check_space(out, totals["bytes_written"])
        return totals | {"peak_memory": memory, "free": free, "files": len(plan.file_sizes)}
    inputs = {"action": plan.action, "versions": package_versions(), "out": str(out), **plan.settings}
    inputs |= {name: fingerprint(folder, apart_from=out) for name, folder in plan.sources.items()}
    with open_output(out, inputs, overwrite=overwrite) as journal:
        if not journal.is_complete:
            check_space(journal.out, totals["bytes_written"])
            with Progress(plan.title, sum(task.nbytes for task in plan.tasks), console, in_bytes=True) as progress:
                results = stream(plan.tasks, journal, plan.file_sizes, jobs=jobs, progress=progress)
            plan.write_files(journal.output)
            fields = plan.build_report(results)
            report = make_report(plan.action, fields.pop("tensors"), **fields, **totals)
            _warn(nonfinite_warnings(report), console)
            write_report(report, journal.output)
        journal.finish()
    return read_report(out)


def _warn(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(f"Warning: {warning}", soft_wrap=True)


def refuse_to_lose(out: Path, sources: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an `--out` that would overwrite or contain an input, the working folder, or a folder of another origin.

    Args:
        out: the folder to make, or to replace.
        sources: the folders that are read.
        overwrite: whether `out` may be replaced.

    Raises:
        FileExistsError: `out` is or contains the working folder or a source; is a mount point, which cannot be renamed;
            or is to be replaced and was made by no conversion.
    """
    place = out.resolve()
    for folder, what in [(Path.cwd(), "the working folder"), *((source, "what is converted") for source in sources)]:
        if folder.resolve().is_relative_to(place):
            raise FileExistsError(f"--out {out} is {what}, or holds it ({folder}); name another folder")
    if os.path.ismount(out):
        raise FileExistsError(f"--out {out} is a mount point, which cannot be replaced; name a folder in it")
    if not overwrite or not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        kind = "link" if out.is_symlink() else "file"
        raise FileExistsError(f"--out {out} is no folder but a {kind}; remove it first")
    if any(out.iterdir()) and not (out / REPORT).is_file():
        raise FileExistsError(f"--out {out} has no {REPORT}, so no conversion has made it; remove it first")
