"""Compare a Hugging Face checkpoint with a Megatron one: every tensor bit for bit, streamed; on request the logits.

Where the dtypes differ, the wider is rounded to the narrower; of fp16 and bf16 either may have been rounded. Experts in
MXFP4 may differ from Megatron's by the rounding error of the OCP rule (see `Quantizer`). Of a stock gpt-oss and a
Megatron checkpoint with vision, the text part is compared.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, inf, prod
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

VISION_FIELDS = ("use_vision", "vision_pool_token", "image_token_id", "vision_config")
"""Fields of both configs, transformers' and Megatron's, that a stock gpt-oss lacks."""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints with the same names and shapes.

    Attributes:
        source: the Hugging Face checkpoint.
        stored: tensors of the Megatron checkpoint, by key.
        parameters: the parameters to compare.
    """

    source: Source
    stored: Mapping[str, ShardedTensor]
    parameters: list[MegatronParameter]

    def run(self, jobs: int, console: Console) -> dict[str, Any]:
        """Compare all tensors; return their entries in the report."""
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
        """Compare a parameter whose elements transformers stores in another order; packed, or in their own dtype."""
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
    """Pair rows of an expert with their packed rows, where gate and up alternate."""
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
        logits: also run both models, one after the other, in fp32 on the CPU. Where rounding or packing has changed
            values, the difference is reported and not judged.
        report: a JSON file for the returned report, written after the tensors and again after the logits.
        overwrite: replace the file `report`.
        jobs: threads.
        console: prints progress; None prints nothing.

    Returns:
        The report: see `engine/report.py`. ``agrees`` is whether everything agrees, ``worst`` a sentence on the
        tensor with the largest difference, empty if all agree; ``left_out`` names the tensors that only Megatron has.
        A difference is None where a value is NaN or infinite, ``logits["agrees"]`` where it was not judged.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `report` exists.
        ValueError: a checkpoint is damaged, or names, shapes or configs differ; lists the differences.
        OSError: `report` cannot be written; the message still says whether the checkpoints agree.
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
    """Pair the parameters of both; also return the Megatron tensors without a counterpart in a stock gpt-oss.

    Raises:
        ValueError: names, shapes or configs differ; lists the differences.
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
    """Run both models; return the changed fields of the report. Judged only if nothing was packed or rounded."""
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
    """The reasons why values differ that agree: ``packing``, ``rounding``, both or none."""
    marks = {"packing": {"different", "share_of_bound"}, "rounding": {"rounded"}}
    return [name for name, keys in marks.items() if any(keys <= entry.keys() for entry in entries.values())]


def _worst(entries: Mapping[str, dict[str, Any]]) -> str:
    """A sentence on the tensor with the largest difference; empty if all tensors agree."""
    by = {
        name: inf if entry["largest_difference"] is None else entry["largest_difference"]
        for name, entry in entries.items()
        if not entry["agrees"]
    }
    if not by:
        return ""
    name = max(by, key=by.__getitem__)
    how = {0: "in their bits, not their values", inf: "with NaN or infinity"}.get(by[name], f"by up to {by[name]:.3g}")
    return (
        f"{len(by)} of {len(entries)} tensors differ; {name} the most: {entries[name]['different']} of "
        f"{prod(entries[name]['shape'])} values, {how} (others: {listed(sorted(by.keys() - {name})) or 'none'})"
    )


def agreement(report: Mapping[str, Any]) -> str:
    """Summarise a report without differences for the terminal."""
    entries = report["tensors"].values()
    packed = sum("different" in entry for entry in entries)
    rounded = sum("rounded" in entry and "different" not in entry for entry in entries)
    counts = {
        " tensors bit for bit": len(entries) - packed - rounded,
        " within the rounding error of MXFP4": packed,
        " after rounding to the narrower type": rounded,
        " vision tensors of Megatron's not compared": len(report["left_out"]),
    }
    said = [f"{count}{what}" for what, count in counts.items() if count]
    return ", ".join(said + ([_about_logits(report)] if "logits" in report else []))


def _about_logits(report: Mapping[str, Any]) -> str:
    logits = report["logits"]
    off, scale = (
        "infinity" if logits[key] is None else f"{logits[key]:.2g}" for key in ("largest_difference", "largest_logit")
    )
    if logits["agrees"]:
        return f"logits to {off}"
    return f"logits differ by up to {off} of {scale} after {' and '.join(_changes(report['tensors']))} (not judged)"


def _save(found: Mapping[str, Any], path: Path | None) -> None:
    """Write a report, if it has a path.

    Raises:
        OSError: it cannot be written; the message contains the report's summary.
    """
    if path is None:
        return
    try:
        save_report(found, path)
    except OSError as error:
        verdict = found["worst"] or f"{found['hf']} and {found['megatron']} agree: {agreement(found)}"
        raise OSError(f"{verdict}; but the report was not written: {error.strerror}: {path}") from error
