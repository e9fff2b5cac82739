"""Megatron → Hugging Face, streamed: sharded safetensors from any `torch_dist` checkpoint, without building a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..bridge.ops.mxfp4 import MXFP4_PARTS, VALUES_PER_SCALE, Quantizer
from ..bridge.weight_map import LANGUAGE_MODEL, group_of
from ..errors import UserError
from .dtypes import EXPORTED, FLOATS, most_common, rounding_warnings
from .engine.job import ConversionPlan, run_conversion
from .engine.report import Digest
from .engine.stream import Task, Worker
from .formats.hf_config import read_config
from .formats.hf_files import meta_model, reference_folder, tensors_of, write_files
from .formats.hf_source import shapes_of
from .formats.run_config import check_config
from .formats.safetensors import SHARD_BYTES, ShardPlan, TensorSpec, plan_shards
from .formats.torch_dist_reader import (
    TorchDistCheckpoint,
    blocks_of,
    check_tensors,
    memory_of,
    open_checkpoint,
    read_region,
    region_of,
)
from .lora import Adapters, check_adapters, is_adapter_checkpoint, open_base, read_adapters
from .parameters import KEPT_WHOLE, MegatronParameter, needs_scratch, pack, parameters, to_hf


@dataclass(frozen=True)
class Export:
    """Inputs and outputs of an export.

    Attributes:
        checkpoint: the Megatron one.
        reference: folder of config, tokenizer and processor.
        model: the transformers model, without weights.
        parameters: that are read.
        targets: tensors that are written, by name.
        shards: the files of the output.
        dtype: of the output, as in ``--dtype``.
        adapters: LoRA to be merged.
    """

    checkpoint: TorchDistCheckpoint
    reference: Path
    model: PreTrainedModel
    parameters: list[MegatronParameter]
    targets: dict[str, TensorSpec]
    shards: ShardPlan
    dtype: str
    adapters: Adapters | None = None

    def conversion_plan(self, settings: Mapping[str, Any]) -> ConversionPlan:
        """The plan, given the settings that decide the output's bytes."""
        adapters, source = self.adapters, {"source": self.checkpoint.folder}
        stored = (prod(each.shape) * self.checkpoint.tensors[each.key].dtype.itemsize for each in self.parameters)
        resident_bytes = adapters.nbytes if adapters else 0
        if adapters:
            source = {"source": adapters.folder, "base": self.checkpoint.folder}
        return ConversionPlan(
            action="export",
            title="Exporting",
            settings=settings,
            sources=source | {"reference": self.reference},
            tasks=self.tasks(),
            file_sizes=self.shards.sizes,
            bytes_read=sum(stored) + resident_bytes,
            write_files=self._write_files,
            build_report=self._build_report,
            resident_bytes=resident_bytes,
            warnings=rounding_warnings(self._casts()),
        )

    def _casts(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """The stored and the new type of each parameter that is not packed."""
        for parameter in self.parameters:
            if not self._is_packed(parameter):
                yield self.checkpoint.tensors[parameter.key].dtype, self.targets[parameter.hf[0]].dtype

    def _write_files(self, output: Path) -> None:
        self.shards.write_index(output)
        write_files(self.model, self.reference, output, packed=self.dtype == "mxfp4")

    def _build_report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        adapters = {"adapters": str(self.adapters.folder)} if self.adapters else {}
        entries = {parameter.name: results[parameter.name] for parameter in self.parameters}
        return {"source": str(self.checkpoint.folder), **adapters, "written_as": self.dtype, "tensors": entries}

    def tasks(self) -> list[Task]:
        """The headers, then the largest parameters first, so that no large one is left at the end."""
        ordered = sorted(self.parameters, key=lambda parameter: -prod(parameter.shape))
        return [*self.shards.header_tasks(), *map(self._task, ordered)]

    def _task(self, parameter: MegatronParameter) -> Task:
        stored, places = self.checkpoint.tensors[parameter.key], self._places(parameter)
        blocks = blocks_of(parameter, stored.dtype)
        memory = max(memory_of(stored, region_of(parameter, block)) for block in blocks)
        written = sum(nbytes for _, _, nbytes in places)
        share = blocks[0].stop / blocks[-1].stop
        memory += ceil(written * share)
        memory += written if needs_scratch(parameter) and not self._is_packed(parameter) else 0
        memory += ceil(4 * prod(parameter.shape) * share) if self._is_adapted(parameter) else 0
        files = tuple(sorted({file for file, _, _ in places}))
        nbytes = written + prod(parameter.shape) * stored.dtype.itemsize
        return Task(parameter.name, files, partial(self._write, parameter), memory, nbytes)

    def _is_adapted(self, parameter: MegatronParameter) -> bool:
        return self.adapters is not None and parameter.key in self.adapters.pairs

    def _is_packed(self, parameter: MegatronParameter) -> bool:
        return parameter.hf[0] not in self.targets

    def _places(self, parameter: MegatronParameter) -> list[tuple[str, int, int]]:
        """File, offset and bytes of every tensor, or part of one, that a parameter becomes."""
        places = []
        for name in parameter.hf:
            for part in MXFP4_PARTS if self._is_packed(parameter) else ("",):
                place, nbytes = self.shards.places[name + part], self.targets[name + part].nbytes
                if parameter.expert is not None:
                    nbytes //= self.targets[name + part].shape[0]
                places.append((place.file, place.offset + nbytes * (parameter.expert or 0), nbytes))
        return places

    def _write(self, parameter: MegatronParameter, worker: Worker) -> dict[str, Any]:
        """Read a parameter, convert it and write it, a block of rows after the other."""
        stored, places, digest = self.checkpoint.tensors[parameter.key], self._places(parameter), Digest()
        blocks = blocks_of(parameter, stored.dtype)
        for rows in blocks:
            with worker.scope():
                values = read_region(worker, stored, region_of(parameter, rows)).view(-1, *parameter.shape[1:])
                if self.adapters and self._is_adapted(parameter):
                    values = worker.take(values.shape, torch.float32).copy_(values)
                    self.adapters.merge(parameter, rows, values)
                digest.update(values)
                offsets = [offset + nbytes * rows.start // blocks[-1].stop for _, offset, nbytes in places]
                converted = self._convert(worker, parameter, values, offsets)
                for (file, _, _), offset, part in zip(places, offsets, converted, strict=True):
                    worker.write(file, offset, part)
        return digest.entry(parameter.hf, parameter.shape, values.dtype)

    def _convert(
        self, worker: Worker, parameter: MegatronParameter, values: torch.Tensor, offsets: Sequence[int]
    ) -> list[torch.Tensor]:
        """Rows of a parameter as they are written at some offsets, in the order of `_places`."""
        if self._is_packed(parameter):
            return pack_rows(worker, parameter, values, offsets)
        targets = [self.targets[name] for name in parameter.hf]
        if parameter.layout in KEPT_WHOLE:
            return [worker.cast(values, targets[0].dtype, offsets[0])]
        parts = [
            worker.take(target.shape[parameter.expert is not None :], target.dtype, offset)
            for target, offset in zip(targets, offsets, strict=True)
        ]
        to_hf(parameter, values.view(parameter.shape), parts, worker.take)
        return parts


def pack_rows(
    worker: Worker, parameter: MegatronParameter, values: torch.Tensor, offsets: Sequence[int]
) -> list[torch.Tensor]:
    """Blocks ``[r, g, 16]`` and scales ``[r, g]`` of rows ``[r, 32g]``, given the offsets of both in their files.

    Raises:
        UserError: an element is not finite.
    """
    shape = len(values), values.shape[1] // VALUES_PER_SCALE
    blocks = worker.take((*shape, VALUES_PER_SCALE // 2), torch.uint8, offsets[0])
    scales = worker.take(shape, torch.uint8, offsets[1])
    try:
        pack(parameter, values, blocks, scales, worker.tool(Quantizer))
    except ValueError as error:
        raise UserError(f"{parameter.name}: {error} Export it with --dtype bf16.") from error
    return [blocks, scales]


def prepare_export(
    checkpoint: TorchDistCheckpoint,
    folder: Path,
    *,
    dtype: str | None,
    text_only: bool,
    adapters: Adapters | None = None,
) -> Export:
    """Compare a checkpoint with the model of a config, and plan the files of the output.

    Args:
        checkpoint: the Megatron one.
        folder: of the model's config.
        dtype: ``bf16``, ``fp16``, ``fp32`` or ``mxfp4``; None is the stored type.
        text_only: without the vision parameters, as a stock gpt-oss.
        adapters: LoRA to be merged.

    Raises:
        ValueError: `dtype` is unknown, tensors are missing, foreign or of the wrong shape, or the model was trained
            with another config.
    """
    config = read_config(folder)
    everything = parameters(shapes_of(config), config.num_key_value_heads)
    check_tensors(checkpoint, everything)
    dtype = dtype or _stored_dtype(checkpoint)
    if dtype not in EXPORTED:
        raise UserError(f"--dtype {dtype} is unknown; choose {', '.join(EXPORTED)}")
    check_config(checkpoint.folder, config)
    if adapters:
        check_adapters(adapters, everything)
        check_config(adapters.folder, config)
    model = meta_model(config, EXPORTED[dtype], text_only=text_only)
    targets = tensors_of(model, packed=dtype == "mxfp4")
    written = [one for one in everything if not text_only or group_of(one.name) == LANGUAGE_MODEL]
    shards = plan_shards(targets, shard_bytes=SHARD_BYTES)
    by_name = {target.name: target for target in targets}
    return Export(checkpoint, folder, model, written, by_name, shards, dtype, adapters)


def _stored_dtype(checkpoint: TorchDistCheckpoint) -> str:
    """The type of most elements, which the routers' vision biases do not decide, as in ``--dtype``."""
    found = most_common((tensor.dtype, prod(tensor.shape)) for tensor in checkpoint.tensors.values())
    return next(name for name, dtype in FLOATS.items() if dtype == found)


def export_checkpoint(
    megatron: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    text_only: bool = False,
    hf: str | Path | None = None,
    base: str | Path | None = None,
    jobs: int = 4,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write a Megatron checkpoint in Hugging Face format.

    Args:
        megatron: a checkpoint's root, whose latest iteration is taken, or the folder of one iteration; converted, or
            saved by training at any parallel layout. Adapters of LoRA are merged, in fp32.
        out: the folder to make. A call that was interrupted is continued by the same call.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``mxfp4`` as gpt-oss itself ships it: experts packed, the rest in bf16;
            None is the type that `megatron`, or with adapters `base`, is stored in.
        text_only: leave out the vision parameters and write a stock gpt-oss.
        hf: a Hugging Face checkpoint to take config, tokenizer and processor from, where `megatron` keeps none.
        base: with adapters, the checkpoint that they adapt, where it is not where training found it.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only check, and return what would be done.
        console: where progress and warnings go; None is nowhere.

    Returns:
        The report that lies in `out` too, see `engine/report.py`, tensors under their Megatron names; for a dry
        run its totals and ``peak_memory``.

    Raises:
        FileNotFoundError: a part of the checkpoint is missing.
        FileExistsError: `out` exists, or holds another conversion's beginning.
        ValueError: the checkpoint is damaged, or not of this model.
        OSError: the disk is too small, or fails.
    """
    out, checkpoint = Path(out).absolute(), open_checkpoint(Path(megatron).absolute())
    folder = reference_folder(checkpoint, Path(hf).absolute() if hf else None)
    settings = {"megatron": str(checkpoint.folder), "text_only": text_only}
    adapters = None
    if is_adapter_checkpoint(checkpoint):
        adapters = read_adapters(checkpoint)
        checkpoint = open_base(adapters, Path(base).absolute() if base else None)
    elif base:
        raise UserError(f"{checkpoint.folder} holds weights, no adapters; call without --base")
    export = prepare_export(checkpoint, folder, dtype=dtype, text_only=text_only, adapters=adapters)
    plan = export.conversion_plan(settings | {"dtype": export.dtype})
    return run_conversion(plan, out, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)
