"""Hugging Face → Megatron, streamed: a `torch_dist` checkpoint written tensor by tensor, without building a model."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..bridge.ops.mxfp4 import Dequantizer
from .engine.job import Work, run_conversion
from .engine.report import Digest
from .engine.stream import BLOCK, STEP, Task, Worker, room_for, write_header_task
from .formats.hf_source import Source, open_source
from .formats.megatron_metadata import ITERATION, run_config, write_metadata
from .formats.torch_dist_writer import TorchDistPlan, WriteBatch, WriteItem
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
    number_type = DTYPES[dtype] if dtype else source.dtype
    config = run_config(source.config, number_type, hf, out)
    work = Import(source, TorchDistPlan(source.parameters, number_type), config)
    plan = {"hf": str(hf), "dtype": str(number_type), "assets": [file.name for file in work.assets]}
    return run_conversion(work, out, plan, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)


@dataclass(frozen=True)
class Import(Work):
    """One import, planned: what is read and what is written."""

    source: Source
    layout: TorchDistPlan
    run_config: dict[str, Any]

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

    def write_files(self, output: Path) -> None:
        """What describes the files of tensors, and what goes along with the weights."""
        write_metadata(self.run_config, output)
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
        groups = sorted(self.layout.batches, key=lambda batch: batch.start - batch.end)
        objects = write_header_task(f"{ITERATION}/{TorchDistPlan.OBJECTS_FILE}", self.layout.objects)
        return [objects, *map(self._task, groups)]

    def _task(self, batch: WriteBatch) -> Task:
        reads = [self.source.nbytes(parameter) for parameter in batch.parameters]
        written, first = batch.end - batch.start, batch.parameters[0]
        nbytes = sum(map(sum, reads)) + written
        files = (f"{ITERATION}/{batch.file}",)
        if written > 2 * STEP and first.layout in KEPT_WHOLE:
            size = self.source.stored(first.hf[0])[0].dtype.itemsize
            inbox = room_for(STEP // self.layout.dtype.itemsize * size)
            return Task(batch.name, files, partial(self._write_in_steps, batch), inbox, STEP + 2 * BLOCK, 0, nbytes)
        inbox = max(sum(map(room_for, each)) for each in reads)
        turned = [
            items for parameter, items in zip(batch.parameters, batch.items, strict=True) if self._turns(parameter)
        ]
        scratch = max((sum(item.nbytes for item in items) for items in turned), default=0)
        return Task(batch.name, files, partial(self._write_at_once, batch), inbox, written, scratch, nbytes)

    def _turns(self, parameter: MegatronParameter) -> bool:
        """Whether the numbers of an expert have to be transposed: packed ones are stored the other way round."""
        return parameter.expert is not None and len(self.source.stored(parameter.hf[0])) == 1

    def _write_at_once(self, batch: WriteBatch, worker: Worker) -> dict[str, Any]:
        """Fill whole blocks with the archives of a batch."""
        room, done, entries = worker.room(batch.start, batch.end - batch.start), batch.start, {}
        for parameter, items in zip(batch.parameters, batch.items, strict=True):
            for item in items:
                _put(room, done - batch.start, bytes(item.offset - done) + item.header)
                _put(room, item.start + item.nbytes - batch.start, item.footer)
                done = item.end
            numbers = [_numbers(room, item, item.start - batch.start, parameter) for item in items]
            is_finite = self._fill(worker, parameter, numbers)
            digest = Digest()
            for part in numbers:
                digest.update(part, is_finite=is_finite)
            entries |= self._entry(parameter, digest)
        _put(room, done - batch.start, bytes(batch.end - done))
        worker.write(f"{ITERATION}/{batch.file}", batch.start, batch.end - batch.start)
        return entries

    def _write_in_steps(self, batch: WriteBatch, worker: Worker) -> dict[str, Any]:
        """Write one large tensor, whose numbers keep their order, through a small buffer.

        Every step ends between two blocks, where the next begins; the first writes the header too, the last the footer.
        """
        (parameter,), ((item,),) = batch.parameters, batch.items
        (stored,) = self.source.stored(parameter.hf[0])
        size, total, digest = item.dtype.itemsize, item.nbytes // item.dtype.itemsize, Digest()
        first, begin = 0, batch.start
        while first < total:
            count = min((begin + STEP - item.start) // size - first, total - first)
            is_last = first + count == total
            end = batch.end if is_last else item.start + (first + count) * size
            room = worker.room(begin, end - begin)
            if begin == batch.start:
                _put(room, 0, bytes(item.offset - begin) + item.header)
            numbers = room[item.start + first * size - begin :][: count * size].view(item.dtype)
            numbers.copy_(stored.read(worker, first, count))
            digest.update(numbers)
            if is_last:
                _put(room, item.start + item.nbytes - begin, item.footer + bytes(end - item.end))
            worker.write(f"{ITERATION}/{batch.file}", begin, end - begin)
            first, begin = first + count, end
        return self._entry(parameter, digest)

    def _fill(self, worker: Worker, parameter: MegatronParameter, items: Sequence[torch.Tensor]) -> bool:
        """Compute the numbers of a parameter into the places where they will be written from.

        Returns:
            Whether they are known to be finite, without a look at each.
        """
        parts = self.source.read(worker, parameter)
        if not parts:
            items[0].zero_()
        elif parts[0].dtype == torch.uint8:
            dequantizer = worker.tool(Dequantizer, items[0].dtype)
            unpack(parameter, parts[0], parts[1], items, dequantizer)
            return dequantizer.is_finite(parts[1])
        else:
            nbytes = sum(item.nbytes for item in items) if self._turns(parameter) else 0
            scratch = worker.scratch[:nbytes]
            to_megatron(parameter, parts, items, scratch.view(items[0].dtype).view(-1, *items[0].shape[1:]))
        return not parts

    def _entry(self, parameter: MegatronParameter, digest: Digest) -> dict[str, Any]:
        names = [stored.name for name in parameter.hf for stored in self.source.stored(name)]
        return {parameter.name: digest.entry(names, parameter.shape, self.layout.dtype_of(parameter))}


def _put(room: torch.Tensor, at: int, data: bytes) -> None:
    if data:
        room[at : at + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _numbers(room: torch.Tensor, item: WriteItem, at: int, parameter: MegatronParameter) -> torch.Tensor:
    """The place of an item's numbers, without the axes of layers and experts."""
    return room[at : at + item.nbytes].view(item.dtype).view(item.shape[len(parameter.axes) :])
