"""Megatron → Hugging Face, streamed: sharded safetensors from any `torch_dist` checkpoint, without building a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..bridge.ops.mxfp4 import BLOCK as VALUES_PER_SCALE
from ..bridge.ops.mxfp4 import Quantizer
from ..bridge.weight_map import LANGUAGE_MODEL, group_of
from ..errors import UserError
from .engine.job import ShardedWork, run_conversion
from .engine.report import Digest
from .engine.stream import Task, Worker, room_for
from .formats.hf_config import read_config
from .formats.hf_files import DTYPES, meta_model, reference_folder, tensors_of, write_files
from .formats.hf_source import shapes_of
from .formats.run_config import check_config
from .formats.safetensors import SHARD_BYTES, ShardPlan, TensorSpec, plan_shards
from .formats.torch_dist_reader import (
    TorchDistCheckpoint,
    blocks_of,
    check_tensors,
    open_checkpoint,
    read_region,
    region_of,
)
from .lora import Adapters, check_adapters, is_adapter_checkpoint, open_base, read_adapters
from .parameters import KEPT_WHOLE, MXFP4_PARTS, MegatronParameter, pack, parameters, to_hf


@dataclass(frozen=True)
class Export(ShardedWork):
    """One export, planned.

    Attributes:
        checkpoint: what is read.
        reference: folder of config, tokenizer and processor.
        model: what is written, without weights.
        parameters: what it is made of.
        targets: its tensors, by name.
        shards: where they go.
        dtype: as ``--dtype`` has it.
        adapters: to be merged.
    """

    checkpoint: TorchDistCheckpoint
    reference: Path
    model: PreTrainedModel
    parameters: list[MegatronParameter]
    targets: dict[str, TensorSpec]
    shards: ShardPlan
    dtype: str
    adapters: Adapters | None = None

    action, title = "export", "Exporting"

    @property
    def sources(self) -> dict[str, Path]:
        """The checkpoint, or that of the adapters and the one that they adapt, and where the config is."""
        folders = {"source": self.checkpoint.folder, "reference": self.reference}
        return folders | ({"source": self.adapters.folder, "base": self.checkpoint.folder} if self.adapters else {})

    @property
    def bytes_read(self) -> int:
        """Bytes of the weights that are read, and of the adapters."""
        sizes = (prod(each.shape) * self.checkpoint.tensors[each.key].dtype.itemsize for each in self.parameters)
        return sum(sizes) + self.held

    @property
    def held(self) -> int:
        """Bytes of the adapters, which are small."""
        return self.adapters.nbytes if self.adapters else 0

    def write_files(self, output: Path) -> None:
        """Config, index, code, tokenizer and processor."""
        self.shards.write_index(output)
        write_files(self.model, self.reference, output, packed=self.dtype == "mxfp4")

    def report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all parameters, in the model's order."""
        adapters = {"adapters": str(self.adapters.folder)} if self.adapters else {}
        entries = {parameter.name: results[parameter.name] for parameter in self.parameters}
        return {"source": str(self.checkpoint.folder), **adapters, "written_as": self.dtype, "tensors": entries}

    def tensor_tasks(self) -> Iterable[Task]:
        """The largest parameters first, so that none is left alone at the end."""
        return map(self._task, sorted(self.parameters, key=lambda parameter: -prod(parameter.shape)))

    def _task(self, parameter: MegatronParameter) -> Task:
        stored, places = self.checkpoint.tensors[parameter.key], self._places(parameter)
        blocks = blocks_of(parameter, stored.dtype)
        (rows, count), read = (blocks[0].stop, blocks[-1].stop), prod(parameter.shape) * stored.dtype.itemsize
        written = [nbytes * rows // count for _, _, nbytes in places]
        parts = [part for block in blocks for part in stored.read_plan(region_of(parameter, block))]
        turned = sum(written) if parameter.layout not in KEPT_WHOLE and not self._is_packed(parameter) else 0
        return Task(
            parameter.name,
            tuple(sorted({file for file, _, _ in places})),
            partial(self._write, parameter),
            max(room_for(part.count * stored.dtype.itemsize) for part in parts),
            sum(map(room_for, written)),
            room_for(read * rows // count) + turned + self._room_to_merge(parameter, rows),
            read + sum(nbytes for _, _, nbytes in places),
        )

    def _room_to_merge(self, parameter: MegatronParameter, rows: int) -> int:
        """Bytes of scratch for rows of a parameter with its adapter, at the scratch's end; 0 where it has none."""
        return 4 * rows * prod(parameter.shape[1:]) if self._adapters_of(parameter) else 0

    def _adapters_of(self, parameter: MegatronParameter) -> Adapters | None:
        return self.adapters if self.adapters and parameter.key in self.adapters.pairs else None

    def _is_packed(self, parameter: MegatronParameter) -> bool:
        return parameter.hf[0] not in self.targets

    def _places(self, parameter: MegatronParameter) -> list[tuple[str, int, int]]:
        """File, offset and bytes of everything that a parameter becomes."""
        places = []
        for name in parameter.hf:
            for part in MXFP4_PARTS if self._is_packed(parameter) else ("",):
                place, nbytes = self.shards.places[name + part], self.targets[name + part].nbytes
                if parameter.expert is not None:
                    nbytes //= self.targets[name + part].shape[0]
                places.append((place.file, place.offset + nbytes * (parameter.expert or 0), nbytes))
        return places

    def _write(self, parameter: MegatronParameter, worker: Worker) -> dict[str, Any]:
        """Read a parameter, lay it out and write it, a block of rows after the other."""
        stored, digest = self.checkpoint.tensors[parameter.key], Digest()
        blocks = blocks_of(parameter, stored.dtype)
        for block in blocks:
            numbers = read_region(worker, stored, region_of(parameter, block))
            if adapters := self._adapters_of(parameter):
                merged = worker.scratch[-self._room_to_merge(parameter, block.stop - block.start) :]
                numbers = adapters.merge(parameter, block, numbers, merged.view(torch.float32))
            digest.update(numbers)
            places = [_rows_of(place, block, blocks[-1].stop) for place in self._places(parameter)]
            self._lay_out(worker, parameter, numbers.view(-1, *parameter.shape[1:]), places)
        return digest.entry(parameter.hf, parameter.shape, numbers.dtype)

    def _lay_out(
        self,
        worker: Worker,
        parameter: MegatronParameter,
        numbers: torch.Tensor,
        places: Sequence[tuple[str, int, int]],
    ) -> None:
        starts = [sum(room_for(nbytes) for _, _, nbytes in places[:i]) for i in range(len(places))]
        rooms = [
            worker.room(offset, nbytes, at=start) for (_, offset, nbytes), start in zip(places, starts, strict=True)
        ]
        if self._is_packed(parameter):
            _pack(worker, parameter, numbers, *rooms)
        else:
            dtype = self.targets[parameter.hf[0]].dtype
            self._turn(worker, parameter, numbers, [room.view(dtype) for room in rooms])
        for (file, offset, nbytes), start in zip(places, starts, strict=True):
            worker.write(file, offset, nbytes, at=start)

    def _turn(
        self, worker: Worker, parameter: MegatronParameter, numbers: torch.Tensor, rooms: Sequence[torch.Tensor]
    ) -> None:
        if parameter.layout in KEPT_WHOLE:
            rooms[0].copy_(numbers.view(-1))
            return
        shapes = [self.targets[name].shape[parameter.expert is not None :] for name in parameter.hf]
        parts = [room.view(shape) for room, shape in zip(rooms, shapes, strict=True)]
        stored = self.checkpoint.tensors[parameter.key].dtype
        start = room_for(numbers.numel() * stored.itemsize)  # after what was read; merged numbers lie elsewhere
        scratch = worker.scratch[start : start + numbers.numel() * parts[0].itemsize].view(parts[0].dtype)
        to_hf(parameter, numbers.view(parameter.shape), parts, scratch.view(parameter.shape))


def _pack(
    worker: Worker, parameter: MegatronParameter, numbers: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> None:
    shape = len(numbers), numbers.shape[1] // VALUES_PER_SCALE
    try:
        packed = blocks.view(*shape, VALUES_PER_SCALE // 2), scales.view(shape)
        pack(parameter, numbers, *packed, worker.tool(Quantizer))
    except ValueError as error:
        raise UserError(f"{parameter.name}: {error} Export it with --dtype bf16.") from error


def _rows_of(place: tuple[str, int, int], block: slice, count: int) -> tuple[str, int, int]:
    file, offset, nbytes = place
    start, stop = nbytes * block.start // count, nbytes * block.stop // count
    return file, offset + start, stop - start


def plan_export(
    checkpoint: TorchDistCheckpoint,
    folder: Path,
    *,
    dtype: str,
    text_only: bool,
    adapters: Adapters | None = None,
) -> Export:
    """Compare a checkpoint with the model that it should hold, and lay the output out.

    Args:
        checkpoint: the Megatron one.
        folder: of the model's config.
        dtype: ``bf16``, ``fp32`` or ``mxfp4``.
        text_only: without what is visual, as a stock gpt-oss.
        adapters: LoRA to be merged.

    Raises:
        ValueError: `dtype` is unknown, tensors are missing, foreign or of the wrong shape, or the model was trained
            with other numbers than the config's.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; choose {', '.join(DTYPES)}")
    config = read_config(folder)
    everything = parameters(shapes_of(config), config.num_key_value_heads)
    check_tensors(checkpoint, everything)
    check_config(checkpoint.folder, config)
    if adapters:
        check_adapters(adapters, everything)
        check_config(adapters.folder, config)
    model = meta_model(config, DTYPES[dtype], text_only=text_only)
    targets = tensors_of(model, packed=dtype == "mxfp4")
    written = [one for one in everything if not text_only or group_of(one.name) == LANGUAGE_MODEL]
    shards = plan_shards(targets, shard_bytes=SHARD_BYTES)
    by_name = {target.name: target for target in targets}
    return Export(checkpoint, folder, model, written, by_name, shards, dtype, adapters)


def export_checkpoint(
    megatron: str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
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
        dtype: ``bf16``, ``fp32``, or ``mxfp4`` as gpt-oss itself ships it: experts packed, the rest in bf16.
        text_only: leave out what is visual and write a stock gpt-oss.
        hf: a Hugging Face checkpoint to take config, tokenizer and processor from, where `megatron` keeps none.
        base: with adapters, the checkpoint that they adapt, where it is not where training found it.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only say what would be done.
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
    plan = {"megatron": str(checkpoint.folder), "dtype": dtype, "text_only": text_only}
    adapters = None
    if is_adapter_checkpoint(checkpoint):
        adapters = read_adapters(checkpoint)
        checkpoint = open_base(adapters, Path(base).absolute() if base else None)
    elif base:
        raise UserError(f"{checkpoint.folder} holds weights, no adapters; call without --base")
    work = plan_export(checkpoint, folder, dtype=dtype, text_only=text_only, adapters=adapters)
    return run_conversion(work, out, plan, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)
