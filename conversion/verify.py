"""Holding a Hugging Face checkpoint against a Megatron one: every tensor bit for bit, streamed; on request the logits.

Where the two store different types of numbers, the wider is rounded to the narrower. Experts in MXFP4 are compared with
what they were packed from: no number may be further off than packing by the OCP rule can make it (see `Quantizer`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..bridge.ops.mxfp4 import BLOCK as VALUES_PER_SCALE
from ..bridge.ops.mxfp4 import EXPONENT_BIAS, Dequantizer, scales_of
from . import report as reports
from .exporting import blocks_of, check_tensors, region_of
from .layouts import KEPT_WHOLE, Parameter, to_megatron
from .progress import Progress
from .run_config import check_config
from .safetensors_reader import listed
from .source import Source, open_source, room_for
from .stream import Memory, Unit, Worker, stream
from .torch_dist_reader import StoredTensor, open_checkpoint, read_region

ROWS_AT_ONCE = 256
"""Of a packed tensor, whose errors are worked out in fp32."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints to be compared, whose names and shapes agree."""

    source: Source
    stored: Mapping[str, StoredTensor]

    def run(self, jobs: int, console: Console) -> dict[str, Any]:
        """The report's entries of all tensors."""
        units = [self._unit(parameter) for parameter in self.source.parameters]
        with Progress("Comparing", sum(unit.nbytes for unit in units), console) as progress:
            return stream(units, Memory(), {}, jobs=jobs, progress=progress)

    def _unit(self, parameter: Parameter) -> Unit:
        stored, reads = self.stored[parameter.key], self.source.nbytes(parameter)
        blocks = blocks_of(parameter, stored.dtype)
        rows, count = blocks[0].stop, blocks[-1].stop
        nbytes = prod(parameter.shape) * stored.dtype.itemsize
        parts = [part for block in blocks for part in stored.parts(region_of(parameter, block))]
        inbox = max(room_for(part.count * stored.dtype.itemsize) for part in parts)
        theirs = sum(room_for(-(-size * rows // count)) for size in reads)
        turned = 4 * prod(parameter.shape) if parameter.layout not in KEPT_WHOLE else 0
        mine = room_for(nbytes * rows // count)
        run = partial(self._compare, parameter)
        return Unit(parameter.name, (), run, max(inbox, theirs), turned, mine + turned, nbytes + sum(reads))

    def _compare(self, parameter: Parameter, worker: Worker) -> dict[str, Any]:
        stored, digest, found = self.stored[parameter.key], reports.Digest(), Difference()
        for block in blocks_of(parameter, stored.dtype):
            numbers = read_region(worker, stored, region_of(parameter, block))
            digest.update(numbers)
            numbers = numbers.view(-1, *parameter.shape[1:])
            if parameter.layout in KEPT_WHOLE:
                found.add(numbers, self._same_rows(worker, parameter, numbers, block.start))
            else:
                self._add_turned(worker, parameter, numbers, found)
        names = [part.name for name in parameter.hf for part in self.source.stored(name)]
        return digest.entry(names, parameter.shape, stored.dtype) | found.entry()

    def _same_rows(self, worker: Worker, parameter: Parameter, numbers: torch.Tensor, start: int) -> torch.Tensor:
        stored = self.source.stored(parameter.hf[0])
        if not stored:  # a stock gpt-oss has no vision bias; it counts as zeros
            return torch.zeros_like(numbers)
        first = start * prod(parameter.shape[1:])
        return stored[0].read(worker, first, numbers.numel()).view(numbers.shape)

    def _add_turned(self, worker: Worker, parameter: Parameter, numbers: torch.Tensor, found: "Difference") -> None:
        """Compare what has to be laid out as Megatron has it first."""
        parts = self.source.read(worker, parameter)
        if parts[0].dtype == torch.uint8:
            for rows, blocks, scales in _halves(parameter, numbers, *parts):
                found.add_packed(rows, blocks, scales, worker.tool(Dequantizer, torch.float32))
            return
        nbytes = numbers.numel() * parts[0].itemsize
        start = room_for(numbers.nbytes)
        scratch = worker.scratch[start : start + nbytes].view(parts[0].dtype).view(parameter.shape)
        theirs = worker.outbox.bytes[:nbytes].view(parts[0].dtype).view(parameter.shape)
        to_megatron(parameter, parts, theirs.chunk(len(parameter.chunks)), scratch)
        found.add(numbers, theirs)


def _halves(
    parameter: Parameter, numbers: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of an expert as Megatron has them, with the packed rows that they became: gate and up in turns."""
    pieces = len(parameter.chunks)
    for start, half in enumerate(numbers.chunk(pieces)):
        yield half, blocks[start::pieces], scales[start::pieces]


def _rule_scales(numbers: torch.Tensor) -> torch.Tensor:
    """The scales ``[r, g]`` by which ``[r, 32g]`` should have been packed; those of the file prove nothing."""
    largest = numbers.view(len(numbers), -1, VALUES_PER_SCALE).abs().amax(-1)
    return torch.exp2(scales_of(largest).float() - EXPONENT_BIAS)


@dataclass
class Difference:
    """How far apart the numbers of two tensors are.

    Attributes:
        count: numbers that differ.
        largest: the largest difference.
        bound_used: of packed numbers, the largest share of its bound that a difference takes.
        is_packed: whether there is a bound.
        rounded: numbers that the narrower type could not hold; they do not count as different.
    """

    count: int = 0
    rounded: int = 0
    largest: float = 0.0
    bound_used: float = 0.0
    is_packed: bool = False

    @property
    def is_allowed(self) -> bool:
        """Whether the tensors agree."""
        return self.bound_used <= 1 if self.is_packed else not self.count

    def add(self, mine: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare the bits of two tensors of the same shape, those of the wider type rounded to the narrower."""
        wide, narrow = sorted((mine, theirs), key=lambda tensor: -tensor.itemsize)
        rounded, bits = wide.to(narrow.dtype), BITS[narrow.itemsize]
        if wide.dtype != narrow.dtype:
            self.rounded += int(torch.count_nonzero(rounded.to(wide.dtype) != wide))
        if not torch.equal(rounded.view(bits), narrow.view(bits)):
            differ = rounded.view(bits) != narrow.view(bits)
            self.count += int(torch.count_nonzero(differ))
            self._widen((mine[differ].double() - theirs[differ].double()).abs().max())

    def add_packed(
        self, mine: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, dequantizer: Dequantizer
    ) -> None:
        """Compare ``[r, 32g]`` with blocks ``[r, g, 16]`` and scales ``[r, g]``."""
        self.is_packed = True
        values = torch.empty(min(len(mine), ROWS_AT_ONCE), mine.shape[1])
        for start in range(0, len(mine), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            numbers, theirs = mine[rows].float(), values[: len(mine[rows])]
            dequantizer.into(theirs, blocks[rows], scales[rows])
            if torch.equal(numbers, theirs):
                continue
            error = (theirs - numbers).abs()
            step = _rule_scales(numbers).repeat_interleave(VALUES_PER_SCALE, dim=1)
            share = (error / (torch.maximum(numbers.abs(), step) / 4)).nan_to_num(torch.inf)
            self.count += int(torch.count_nonzero(error))
            self._widen(error.max())
            self.bound_used = max(self.bound_used, float(share.max()))

    def _widen(self, largest: torch.Tensor) -> None:
        self.largest = max(self.largest, float(largest.nan_to_num(torch.inf)))

    def entry(self) -> dict[str, Any]:
        """What the report says of the tensor beyond its hash."""
        found: dict[str, Any] = {"agrees": self.is_allowed} | ({"rounded": self.rounded} if self.rounded else {})
        if self.count:
            found |= {"different": self.count, "largest_difference": self.largest}
        return found | ({"share_of_bound": self.bound_used} if self.is_packed else {})


def verify(
    hf: str | Path,
    megatron: str | Path,
    *,
    logits: bool = False,
    jobs: int = 4,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare a Hugging Face checkpoint with a Megatron one.

    Args:
        hf: with all of the model, as GPT-OSS-Vision or as a stock gpt-oss that the other was made from.
        megatron: a checkpoint's root, whose latest iteration is taken, or the folder of one iteration.
        logits: run both models too, in fp32 on the CPU; one after the other has to fit in memory. Where rounding or
            packing has changed numbers, the difference is reported and not judged.
        jobs: threads.
        console: where progress goes; None is nowhere.

    Returns:
        The report: see `conversion/report.py`. ``agrees`` says whether everything does, ``worst`` which tensor is
        furthest off, in a sentence.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a checkpoint is damaged, or names, shapes or what else makes the model differ; lists them.
    """
    hf, megatron = Path(hf).absolute(), Path(megatron).absolute()
    source, checkpoint = open_source(hf), open_checkpoint(megatron)
    check_tensors(checkpoint, source.parameters)
    check_config(checkpoint.folder, source.config)
    entries = Comparison(source, checkpoint.tensors).run(jobs, console or Console(quiet=True))
    worst = _worst(entries)
    report = reports.build("verify", entries, hf=str(hf), megatron=str(checkpoint.folder), worst=worst)
    if logits:
        from .logits import compare_logits  # imports Megatron-Bridge

        report["logits"] = compare_logits(source, checkpoint.folder)
        is_exact = not any({"different", "rounded"} & entry.keys() for entry in entries.values())
        if is_exact and not report["logits"]["agrees"]:
            report["worst"] = f"The logits differ by {report['logits']['largest_difference']:.3g}"
    return report | {"agrees": not report["worst"]}


def _worst(entries: Mapping[str, dict[str, Any]]) -> str:
    """A sentence about the tensor that is furthest off; empty where all agree."""
    off = {name: entry for name, entry in entries.items() if not entry["agrees"]}
    if not off:
        return ""
    name = max(off, key=lambda name: off[name]["largest_difference"])
    entry = off[name]
    return (
        f"{len(off)} of {len(entries)} tensors differ; {name} the most: {entry['different']} of {prod(entry['shape'])} "
        f"numbers, by up to {entry['largest_difference']:.3g} (others: {listed(sorted(off.keys() - {name})) or 'none'})"
    )


def agreement(report: Mapping[str, Any]) -> str:
    """What a report without differences says, in words for a terminal."""
    entries = report["tensors"].values()
    packed = sum("share_of_bound" in entry and "different" in entry for entry in entries)
    rounded = sum("rounded" in entry for entry in entries)
    said = [f"{len(entries) - packed - rounded} tensors bit for bit"]
    said += [f"{packed} within the bound of MXFP4"] if packed else []
    said += [f"{rounded} after rounding to the narrower type"] if rounded else []
    said += [f"logits to {report['logits']['largest_difference']:.2g}"] if "logits" in report else []
    return ", ".join(said)
