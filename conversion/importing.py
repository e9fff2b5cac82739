"""Hugging Face → Megatron, streamed: a `torch_dist` checkpoint written piece by piece, without building a model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..bridge.config_map import megatron_fields
from ..bridge.ops.mxfp4 import Dequantizer
from .engine import report as reports
from .engine.job import Work, run_conversion
from .engine.journal import Journal
from .engine.stream import BLOCK, STEP, Task, Worker, room_for, write_header_task
from .formats.hf_source import Source, open_source
from .formats.megatron_metadata import ITERATION, Describing
from .formats.torch_dist_writer import Group, Piece, TorchDistPlan
from .parameters import KEPT_WHOLE, MegatronParameter, to_megatron, unpack

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ASSET_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")


def import_checkpoint(
    hf: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    jobs: int = 4,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the Megatron checkpoint of a Hugging Face one.

    Args:
        hf: a folder with safetensors of GPT-OSS-Vision, or of a stock gpt-oss, which becomes a model without vision;
            bf16, fp16, fp32, or experts in MXFP4.
        out: the folder to make. A call that was interrupted is continued by the same call.
        dtype: of the new weights, "bf16", "fp16" or "fp32"; None is that of the checkpoint's config.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only say what would be done.
        console: where progress and warnings go; None is nowhere.

    Returns:
        The report that lies in `out` too, see `engine/report.py`; for a dry run its totals and ``peak_memory``.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        FileExistsError: `out` exists, or holds another conversion's beginning.
        ValueError: the checkpoint is of another architecture, damaged or incomplete.
        OSError: the disk is too small, or fails.
    """
    hf, out = Path(hf).absolute(), Path(out).absolute()
    source = open_source(hf)
    megatron_fields(source.config)  # what Megatron cannot express is refused before anything is written
    number_type = DTYPES[dtype] if dtype else source.dtype
    work = Import(source, TorchDistPlan(source.parameters, number_type))
    plan = {"hf": str(hf), "dtype": str(number_type), "assets": [file.name for file in work.assets]}
    return run_conversion(work, out, plan, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)


@dataclass(frozen=True)
class Import(Work):
    """One import, planned: what is read and what is written."""

    source: Source
    layout: TorchDistPlan

    action, title = "import", "Importing"

    @property
    def sources(self) -> dict[str, Path]:
        """The checkpoint."""
        return {"source": self.source.folder}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the files of tensors."""
        return {f"{ITERATION}/{name}": size for name, size in self.layout.sizes.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of weights in the source."""
        return sum(stored.nbytes for stored in self.source.tensors.values())

    def beside(self, journal: Journal) -> Describing:
        """The files that Megatron-Bridge writes."""
        return Describing(self.source, self.layout.dtype, journal)

    def write_files(self, output: Path) -> None:
        """What describes the files of tensors, and what goes along with the weights."""
        (output / ITERATION / ".metadata").write_bytes(self.layout.metadata)
        folder = output / ITERATION / "tokenizer"
        folder.mkdir(exist_ok=True)
        for file in self.assets:  # as they are; where Megatron-Bridge keeps tokenizers
            shutil.copyfile(file, folder / file.name)

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all parameters, in the model's order."""
        entries = {name: entry for result in results.values() for name, entry in (result or {}).items()}
        return {
            "source": str(self.source.folder),
            "added": sorted(self.source.missing),
            "tensors": {parameter.name: entries[parameter.name] for parameter in self.source.parameters},
        }

    @cached_property
    def assets(self) -> list[Path]:
        """Config, tokenizer, processor and template, which go along with the weights.

        Raises:
            FileNotFoundError: one of them is a link to nowhere.
        """
        found = [file for file in sorted(self.source.folder.iterdir()) if file.suffix in ASSET_SUFFIXES]
        lost = [file for file in found if file.is_symlink() and not file.exists()]
        if lost:
            raise FileNotFoundError(f"{lost[0]} is a link to a file that is not there; copy the checkpoint again")
        return [file for file in found if file.is_file() and not file.name.endswith(".index.json")]

    def tasks(self) -> list[Task]:
        """The work, the largest tensors first, so that none is left alone at the end."""
        groups = sorted(self.layout.groups, key=lambda group: group.start - group.end)
        objects = write_header_task(f"{ITERATION}/{TorchDistPlan.OBJECTS_FILE}", self.layout.objects)
        return [objects, *map(self._task, groups)]

    def _task(self, group: Group) -> Task:
        reads = [self.source.nbytes(parameter) for parameter in group.parameters]
        written, first = group.end - group.start, group.parameters[0]
        nbytes = sum(map(sum, reads)) + written
        files = (f"{ITERATION}/{group.file}",)
        if written > 2 * STEP and first.layout in KEPT_WHOLE:
            size = self.source.stored(first.hf[0])[0].dtype.itemsize
            inbox = room_for(STEP // self.layout.dtype.itemsize * size)
            return Task(group.name, files, partial(self._write_in_steps, group), inbox, STEP + 2 * BLOCK, 0, nbytes)
        inbox = max(sum(map(room_for, each)) for each in reads)
        turned = [
            pieces for parameter, pieces in zip(group.parameters, group.pieces, strict=True) if self._turns(parameter)
        ]
        scratch = max((sum(piece.nbytes for piece in pieces) for pieces in turned), default=0)
        return Task(group.name, files, partial(self._write_at_once, group), inbox, written, scratch, nbytes)

    def _turns(self, parameter: MegatronParameter) -> bool:
        """Whether the numbers of an expert have to be transposed: packed ones are stored the other way round."""
        return parameter.expert is not None and len(self.source.stored(parameter.hf[0])) == 1

    def _write_at_once(self, group: Group, worker: Worker) -> dict[str, Any]:
        """Fill whole blocks with the archives of a group."""
        room, done, entries = worker.room(group.start, group.end - group.start), group.start, {}
        for parameter, pieces in zip(group.parameters, group.pieces, strict=True):
            for piece in pieces:
                _put(room, done - group.start, bytes(piece.offset - done) + piece.head)
                _put(room, piece.start + piece.nbytes - group.start, piece.tail)
                done = piece.end
            numbers = [_numbers(room, piece, piece.start - group.start, parameter) for piece in pieces]
            is_finite = self._fill(worker, parameter, numbers)
            digest = reports.Digest()
            for part in numbers:
                digest.update(part, is_finite=is_finite)
            entries |= self._entry(parameter, digest)
        _put(room, done - group.start, bytes(group.end - done))
        worker.write(f"{ITERATION}/{group.file}", group.start, group.end - group.start)
        return entries

    def _write_in_steps(self, group: Group, worker: Worker) -> dict[str, Any]:
        """Write one large tensor, whose numbers keep their order, through a small buffer.

        Every step ends between two blocks, where the next begins; head and tail go along with the first and the last.
        """
        (parameter,), ((piece,),) = group.parameters, group.pieces
        (stored,) = self.source.stored(parameter.hf[0])
        size, total, digest = piece.dtype.itemsize, piece.nbytes // piece.dtype.itemsize, reports.Digest()
        first, begin = 0, group.start
        while first < total:
            count = min((begin + STEP - piece.start) // size - first, total - first)
            is_last = first + count == total
            end = group.end if is_last else piece.start + (first + count) * size
            room = worker.room(begin, end - begin)
            if begin == group.start:
                _put(room, 0, bytes(piece.offset - begin) + piece.head)
            numbers = room[piece.start + first * size - begin :][: count * size].view(piece.dtype)
            numbers.copy_(stored.read(worker, first, count))
            digest.update(numbers)
            if is_last:
                _put(room, piece.start + piece.nbytes - begin, piece.tail + bytes(end - piece.end))
            worker.write(f"{ITERATION}/{group.file}", begin, end - begin)
            first, begin = first + count, end
        return self._entry(parameter, digest)

    def _fill(self, worker: Worker, parameter: MegatronParameter, pieces: Sequence[torch.Tensor]) -> bool:
        """Compute the numbers of a parameter into the places where they will be written from.

        Returns:
            Whether they are known to be finite, without a look at each.
        """
        parts = self.source.read(worker, parameter)
        if not parts:
            pieces[0].zero_()
        elif parts[0].dtype == torch.uint8:
            dequantizer = worker.tool(Dequantizer, pieces[0].dtype)
            unpack(parameter, parts[0], parts[1], pieces, dequantizer)
            return dequantizer.is_finite(parts[1])
        else:
            nbytes = sum(piece.nbytes for piece in pieces) if self._turns(parameter) else 0
            scratch = worker.scratch[:nbytes]
            to_megatron(parameter, parts, pieces, scratch.view(pieces[0].dtype).view(-1, *pieces[0].shape[1:]))
        return not parts

    def _entry(self, parameter: MegatronParameter, digest: reports.Digest) -> dict[str, Any]:
        names = [stored.name for name in parameter.hf for stored in self.source.stored(name)]
        return {parameter.name: digest.entry(names, parameter.shape, self.layout.dtype_of(parameter))}


def _put(room: torch.Tensor, at: int, data: bytes) -> None:
    if data:
        room[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _numbers(room: torch.Tensor, piece: Piece, at: int, parameter: MegatronParameter) -> torch.Tensor:
    """The place of a piece's numbers, without the axes of layers and experts."""
    return room[at : at + piece.nbytes].view(piece.dtype).view(piece.shape[len(parameter.axes) :])
