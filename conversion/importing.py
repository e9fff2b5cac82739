"""Hugging Face → Megatron, streamed: a `torch_dist` checkpoint written tensor by tensor, without building a model."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..bridge.ops.mxfp4 import Dequantizer
from .dtypes import FLOATS, rounding_warnings
from .engine.job import ConversionPlan, run_conversion
from .engine.report import Digest
from .engine.stream import Task, Worker, write_header_task
from .formats.hf_config import check_json_files
from .formats.hf_source import Source, open_source
from .formats.megatron_metadata import ITERATION, run_config, write_metadata
from .formats.torch_dist_reader import blocks_of
from .formats.torch_dist_writer import TorchDistPlan, WriteBatch, WriteItem
from .parameters import KEPT_WHOLE, MegatronParameter, needs_scratch, to_megatron, unpack

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
        dry_run: only check, and return what would be done.
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
    layout = TorchDistPlan(source.parameters, FLOATS[dtype] if dtype else source.dtype)
    plan = plan_import(source, layout, run_config(source.config, layout.dtype, hf, out))
    return run_conversion(plan, out, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)


def plan_import(source: Source, layout: TorchDistPlan, config: dict[str, Any]) -> ConversionPlan:
    """The import of a checkpoint into the files of a layout.

    Args:
        source: what is read.
        layout: the files of tensors that are written.
        config: the content of ``run_config.yaml``.

    Raises:
        FileNotFoundError: a file beside the weights is a link to nowhere.
    """
    assets = find_assets(source.folder)
    batches = sorted(layout.batches, key=lambda batch: batch.start - batch.end)  # the largest first
    objects = write_header_task(f"{ITERATION}/{layout.OBJECTS_FILE}", layout.objects)

    def write_files(output: Path) -> None:
        write_metadata(config, output)
        (output / ITERATION / ".metadata").write_bytes(layout.metadata)
        for file in assets:
            copy = output / ITERATION / "tokenizer" / file  # where Megatron-Bridge keeps tokenizers
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / file, copy)

    def build_report(results: Mapping[str, Any]) -> dict[str, Any]:
        entries = {name: entry for result in results.values() for name, entry in (result or {}).items()}
        tensors = {parameter.name: entries[parameter.name] for parameter in source.parameters}
        return {"source": str(source.folder), "added": sorted(source.missing), "tensors": tensors}

    return ConversionPlan(
        action="import",
        title="Importing",
        settings={"hf": str(source.folder), "dtype": str(layout.dtype), "assets": [*map(str, assets)]},
        sources={"source": source.folder},
        tasks=[objects, *(batch_task(source, batch) for batch in batches)],
        file_sizes={f"{ITERATION}/{name}": size for name, size in layout.sizes.items()},
        bytes_read=sum(stored.nbytes for stored in source.tensors.values()),
        write_files=write_files,
        build_report=build_report,
        warnings=rounding_warnings(_casts(source, layout)),
    )


def _casts(source: Source, layout: TorchDistPlan) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """The stored and the new type of each parameter; bf16 holds every number of MXFP4."""
    for parameter in source.parameters:
        for stored in source.stored(parameter.hf[0])[:1]:
            yield torch.bfloat16 if source.is_packed(parameter) else stored.dtype, layout.dtype_of(parameter)


def find_assets(folder: Path) -> list[Path]:
    """Config, tokenizer, processor and chat templates, which are copied beside the weights, by names in the folder.

    Raises:
        FileNotFoundError: one of them is a link to nowhere.
        ValueError: one is not JSON and should be.
    """
    check_json_files(folder)
    found = [file for file in sorted(folder.iterdir()) if file.suffix in ASSET_SUFFIXES]
    found += sorted(folder.glob("additional_chat_templates/*.jinja"))
    lost = [file for file in found if file.is_symlink() and not file.exists()]
    if lost:
        raise FileNotFoundError(f"{lost[0]} is a link to a file that is not there; copy the checkpoint again")
    kept = [file for file in found if file.is_file() and not file.name.endswith(".index.json")]
    return [file.relative_to(folder) for file in kept]


def batch_task(source: Source, batch: WriteBatch) -> Task:
    """The task that converts the parameters of a batch, one after the other; it returns their report entries."""
    file, memory, nbytes = f"{ITERATION}/{batch.file}", 0, 0
    for parameter, items in zip(batch.parameters, batch.items, strict=True):
        read, written = sum(source.nbytes(parameter)), sum(item.nbytes for item in items)
        blocks = blocks_of(parameter, items[0].dtype)
        share = blocks[0].stop / blocks[-1].stop
        scratch = written if needs_scratch(parameter) and not source.is_packed(parameter) else 0
        memory = max(memory, ceil((read + written) * share) + scratch)
        nbytes += read + written

    def run(worker: Worker) -> dict[str, Any]:
        pairs = zip(batch.parameters, batch.items, strict=True)
        return {parameter.name: write_parameter(worker, source, parameter, items, file) for parameter, items in pairs}

    return Task(batch.name, (file,), run, memory, nbytes)


def write_parameter(
    worker: Worker, source: Source, parameter: MegatronParameter, items: Sequence[WriteItem], file: str
) -> dict[str, Any]:
    """Read a parameter, convert it to Megatron's layout and write its archives; returns its entry of the report.

    A parameter whose elements keep their order is converted in blocks of rows, any other at once.
    """
    digest, dtype = Digest(), items[0].dtype
    for item in items:
        worker.write(file, item.offset, item.header)
        worker.write(file, item.start + item.nbytes, item.footer)
    if parameter.layout in KEPT_WHOLE:
        (item,), width = items, prod(parameter.shape[1:])
        for rows in blocks_of(parameter, dtype):
            with worker.scope():
                offset = item.start + rows.start * width * dtype.itemsize
                values = worker.cast(source.read_rows(worker, parameter, rows), dtype, offset)
                digest.update(values)
                worker.write(file, offset, values)
    else:
        with worker.scope():
            outputs = [worker.take(item.shape[len(parameter.axes) :], dtype, item.start) for item in items]
            is_finite = fill(worker, source, parameter, outputs)
            for item, output in zip(items, outputs, strict=True):
                digest.update(output, is_finite=is_finite)
                worker.write(file, item.start, output)
    names = [stored.name for name in parameter.hf for stored in source.stored(name)]
    return digest.entry(names, parameter.shape, dtype)


def fill(worker: Worker, source: Source, parameter: MegatronParameter, outputs: Sequence[torch.Tensor]) -> bool:
    """Compute a parameter from the source.

    Args:
        worker: this thread's.
        source: what is read.
        parameter: one that is stored, with its elements in another order than Megatron's.
        outputs: memory for ``parameter.chunks``.

    Returns:
        Whether all elements are known to be finite, by the scales of MXFP4 alone.
    """
    parts = source.read(worker, parameter)
    if not source.is_packed(parameter):
        to_megatron(parameter, parts, outputs, worker.take)
        return False
    dequantizer = worker.tool(Dequantizer, outputs[0].dtype)
    unpack(parameter, parts[0], parts[1], outputs, dequantizer)
    return dequantizer.is_finite(parts[1])
