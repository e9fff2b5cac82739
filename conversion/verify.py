"""Compare a Hugging Face checkpoint with a Megatron one: every tensor bit for bit, streamed; on request the logits.

Where the two store different types of numbers, the wider is rounded to the narrower; of fp16 and bf16 either may have
been rounded. Experts in MXFP4 are compared with what they were packed from: no number may be further off than packing
by the OCP rule can make it (see `Quantizer`). Of a stock gpt-oss and a Megatron checkpoint that sees, the text part is
compared.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isfinite, prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..atomic import check_file
from ..bridge.ops.mxfp4 import Dequantizer
from ..bridge.weight_map import LANGUAGE_MODEL, group_of
from ..terminal import Progress
from .comparison.difference import Difference
from .engine.report import Digest, make_report, save_report
from .engine.stream import InMemoryJournal, Task, Worker, stream
from .formats.hf_source import Source, open_source
from .formats.run_config import check_config, model_fields
from .formats.torch_dist_reader import (
    ShardedTensor,
    TorchDistCheckpoint,
    blocks_of,
    check_tensors,
    memory_of,
    open_checkpoint,
    read_region,
    region_of,
)
from .messages import listed
from .parameters import KEPT_WHOLE, MegatronParameter, needs_scratch, to_hf

VISION_FIELDS = ("use_vision", "vision_pool_token", "image_token_id", "num_image_tokens", "vision_config")
"""Of a config, in both its spellings: what a stock gpt-oss does not say."""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints to be compared, whose names and shapes agree.

    Attributes:
        source: the Hugging Face one.
        stored: the tensors of the Megatron one.
        parameters: what is compared.
    """

    source: Source
    stored: Mapping[str, ShardedTensor]
    parameters: list[MegatronParameter]

    def run(self, jobs: int, console: Console) -> dict[str, Any]:
        """The report's entries of all tensors."""
        tasks = [self._task(parameter) for parameter in self.parameters]
        with Progress("Comparing", sum(task.nbytes for task in tasks), console, in_bytes=True) as progress:
            return stream(tasks, InMemoryJournal(), {}, jobs=jobs, progress=progress)

    def _task(self, parameter: MegatronParameter) -> Task:
        stored, reads = self.stored[parameter.key], sum(self.source.nbytes(parameter))
        blocks, nbytes = blocks_of(parameter, stored.dtype), prod(parameter.shape) * stored.dtype.itemsize
        memory = max(memory_of(stored, region_of(parameter, block)) for block in blocks)
        memory += ceil(reads * blocks[0].stop / blocks[-1].stop)
        if parameter.layout not in KEPT_WHOLE and not self.source.is_packed(parameter):
            memory += nbytes * (2 if needs_scratch(parameter) else 1)
        return Task(parameter.name, (), partial(self._compare, parameter), memory, nbytes + reads)

    def _compare(self, parameter: MegatronParameter, worker: Worker) -> dict[str, Any]:
        stored, digest, found = self.stored[parameter.key], Digest(), Difference()
        for rows in blocks_of(parameter, stored.dtype):
            with worker.scope():
                values = read_region(worker, stored, region_of(parameter, rows)).view(-1, *parameter.shape[1:])
                digest.update(values)
                if parameter.layout in KEPT_WHOLE:
                    found.add(values.flatten(), self.source.read_rows(worker, parameter, rows))
                else:
                    self._add_transposed(worker, parameter, values, found)
        names = [part.name for name in parameter.hf for part in self.source.stored(name)]
        return digest.entry(names, parameter.shape, stored.dtype) | found.entry()

    def _add_transposed(
        self, worker: Worker, parameter: MegatronParameter, values: torch.Tensor, found: Difference
    ) -> None:
        """Compare a parameter with another order of elements in transformers' layout, each tensor in its own type."""
        parts = self.source.read(worker, parameter)
        if self.source.is_packed(parameter):
            for rows, blocks, scales in _halves(parameter, values, *parts):
                found.add_packed(rows, blocks, scales, worker.tool(Dequantizer, torch.float32))
            return
        mine = [worker.take(part.shape, values.dtype) for part in parts]
        to_hf(parameter, values.view(parameter.shape), mine, worker.take)
        for pair in zip(mine, parts, strict=True):
            found.add(*pair)


def _halves(
    parameter: MegatronParameter, values: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows of an expert in Megatron's order with the packed rows that they became: gate and up alternate there."""
    count = len(parameter.chunks)
    for start, half in enumerate(values.chunk(count)):
        yield half, blocks[start::count], scales[start::count]


def verify(
    hf: str | Path,
    megatron: str | Path,
    *,
    logits: bool = False,
    report: str | Path | None = None,
    overwrite: bool = False,
    jobs: int = 4,
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare a Hugging Face checkpoint with a Megatron one.

    Args:
        hf: with all of the model, as GPT-OSS-Vision or as a stock gpt-oss that the other was made from; or the text
            part of a Megatron checkpoint that sees, as a stock gpt-oss.
        megatron: a checkpoint's root, whose latest iteration is taken, or the folder of one iteration.
        logits: run both models too, in fp32 on the CPU; one after the other has to fit in memory. Where rounding or
            packing has changed numbers, the difference is reported and not judged.
        report: a JSON file for the returned report, written after the tensors and again after the logits.
        overwrite: replace the file `report`.
        jobs: threads.
        console: where progress goes; None is nowhere.

    Returns:
        The report: see `engine/report.py`. ``agrees`` says whether everything does, ``worst`` which tensor is
        furthest off, in a sentence; ``left_out`` names what only Megatron has and was not compared. A difference is
        None where a number is NaN or infinite, and so is ``logits["agrees"]`` where it was not judged.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `report` exists.
        ValueError: a checkpoint is damaged, or names, shapes or what else makes the model differ; lists them.
        OSError: `report` cannot be written; says all the same whether the checkpoints agree.
    """
    target = Path(os.path.realpath(report)) if report else None
    if target:
        check_file(target, "--report", overwrite=overwrite)
    hf, megatron, console = Path(hf).absolute(), Path(megatron).absolute(), console or Console(quiet=True)
    source, checkpoint = open_source(hf), open_checkpoint(megatron)
    compared, left_out = _in_common(source, checkpoint)
    entries = compared.run(jobs, console)
    said = {"hf": str(hf), "megatron": str(checkpoint.folder), "left_out": left_out, "worst": _worst(entries)}
    found = make_report("verify", entries, agrees=not said["worst"], **said)
    _save(found, target)
    if logits:
        console.print(f"Before the logits: {found['worst'] or agreement(found)}", markup=False, soft_wrap=True)
        found |= _with_logits(found, source, checkpoint.folder)
        _save(found, target)
    return found


def _in_common(source: Source, checkpoint: TorchDistCheckpoint) -> tuple[Comparison, list[str]]:
    """What is to be compared, and the Megatron tensors that are not: those of vision, where the source is a stock
    gpt-oss and the Megatron checkpoint sees.

    Raises:
        ValueError: names, shapes or what else makes the model differ; lists them.
    """
    parameters, config, left_out = source.parameters, source.config, []
    if source.missing and any(key.startswith("vision_adapter.") for key in checkpoint.tensors):
        left_out = sorted(key for key in checkpoint.tensors if group_of(key) != LANGUAGE_MODEL)
        parameters = [parameter for parameter in parameters if group_of(parameter.key) == LANGUAGE_MODEL]
        tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if group_of(key) == LANGUAGE_MODEL}
        checkpoint = replace(checkpoint, tensors=tensors)
        trained = model_fields(checkpoint.folder)
        vision = {name: trained[name] for name in VISION_FIELDS if name in trained}
        config = type(config).from_dict(config.to_dict() | vision)
    check_tensors(checkpoint, parameters)
    check_config(checkpoint.folder, config)
    return Comparison(source, checkpoint.tensors, parameters), left_out


def _with_logits(found: Mapping[str, Any], source: Source, folder: Path) -> dict[str, Any]:
    """What changes in a report when both models have run; judged only where no number was packed or rounded."""
    from .comparison.logits import compare_logits  # imports Megatron-Bridge

    logits = compare_logits(source, folder)
    if _changes(found["tensors"]):
        return {"logits": logits | {"agrees": None}}
    worst = found["worst"]
    if not worst and not logits["agrees"]:
        off = logits["largest_difference"]
        worst = "The logits hold NaN or infinity" if off is None else f"The logits differ by {off:.3g}"
    return {"logits": logits, "worst": worst, "agrees": not worst}


def _changes(entries: Mapping[str, dict[str, Any]]) -> list[str]:
    """What has changed numbers of the tensors that are compared: ``packing``, ``rounding``, both or nothing."""
    packed = any(_differs_by_packing(entry) for entry in entries.values())
    rounded = any("rounded" in entry for entry in entries.values())
    return [name for name, is_so in {"packing": packed, "rounding": rounded}.items() if is_so]


def _differs_by_packing(entry: Mapping[str, Any]) -> bool:
    return {"different", "share_of_bound"} <= entry.keys()


def _worst(entries: Mapping[str, dict[str, Any]]) -> str:
    """A sentence about the tensor that is furthest off; empty where all agree."""
    off = {name: entry for name, entry in entries.items() if not entry["agrees"]}
    if not off:
        return ""
    far = {name: torch.inf if (by := entry["largest_difference"]) is None else by for name, entry in off.items()}
    name = max(far, key=lambda name: far[name])
    how = f"by up to {far[name]:.3g}" if far[name] else "in their bits, not their values"
    how = how if isfinite(far[name]) else "NaN or infinity among them"
    return (
        f"{len(off)} of {len(entries)} tensors differ; {name} the most: {off[name]['different']} of "
        f"{prod(off[name]['shape'])} numbers, {how} (others: {listed(sorted(off.keys() - {name})) or 'none'})"
    )


def agreement(report: Mapping[str, Any]) -> str:
    """What a report without differences says, in words for a terminal."""
    entries = report["tensors"].values()
    packed = sum(_differs_by_packing(entry) for entry in entries)
    rounded = sum("rounded" in entry and "different" not in entry for entry in entries)
    said = [f"{len(entries) - packed - rounded} tensors bit for bit"]
    said += [f"{packed} within the bound of MXFP4"] if packed else []
    said += [f"{rounded} after rounding to the narrower type"] if rounded else []
    said += [f"without Megatron's {len(report['left_out'])} tensors of vision"] if report["left_out"] else []
    return ", ".join(said + ([_about_logits(report)] if "logits" in report else []))


def _about_logits(report: Mapping[str, Any]) -> str:
    logits = report["logits"]
    off, scale = (
        "infinity" if logits[key] is None else f"{logits[key]:.2g}" for key in ("largest_difference", "largest_logit")
    )
    if logits["agrees"]:
        return f"logits to {off}"
    changes = _changes(report["tensors"])
    have = "has" if len(changes) == 1 else "have"
    return f"logits differ by up to {off} of {scale}, as {' and '.join(changes)} {have} changed numbers (not judged)"


def _save(found: Mapping[str, Any], path: Path | None) -> None:
    """Write a report, whole or not at all.

    Raises:
        OSError: it cannot be written; says what it would have said.
    """
    if path is None:
        return
    try:
        save_report(found, path)
    except OSError as error:
        verdict = found["worst"] or f"{found['hf']} and {found['megatron']} agree: {agreement(found)}"
        raise OSError(f"{verdict}; but the report was not written: {error.strerror}: {path}") from error
