"""gpt-oss and a vision tower → a first GPT-OSS-Vision checkpoint, in Hugging Face format, streamed.

Text weights are copied as they are, packed ones too. Tower weights may have any of the names that transformers renames
on loading. The norm, projector, pool token and vision biases, which neither checkpoint has, are new.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..bridge.hf.configuration_gpt_oss_vision import TOWERS, GPTOSSVisionConfig, tower_config
from ..bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ..bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from ..bridge.ops.mxfp4 import MXFP4_PARTS
from ..errors import UserError
from .dtypes import FLOATS, rounding_warnings
from .engine.job import ConversionPlan, run_conversion
from .engine.report import Digest
from .engine.stream import STEP, Task, Worker
from .formats.hf_config import TEXT_MODEL_TYPE, buildable, config_fields
from .formats.hf_files import meta_model, write_files
from .formats.hf_source import open_source
from .formats.safetensors import ShardPlan, TensorInfo, TensorSpec, plan_shards, read_index
from .messages import listed

ADAPTER, TOWER = "model.vision_adapter.", "model.vision_adapter.vit."


def assemble(
    text: str | Path,
    vision: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    jobs: int = 4,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Write a first checkpoint.

    Args:
        text: folder of a gpt-oss checkpoint, bf16 or MXFP4.
        vision: folder of a ViT, CLIP or SigLIP checkpoint; of a whole CLIP or SigLIP only the tower is taken.
        out: the folder to make. A call that was interrupted is continued by the same call.
        seed: of the new weights.
        jobs: threads.
        overwrite: replace `out`.
        dry_run: only check, and return what would be done.
        console: where progress goes; None is nowhere.
        **fields: of `GPTOSSVisionConfig`, for what is added, for example ``use_nope`` or ``image_token_id``.

    Returns:
        The report that lies in `out` too: with ``added``, the new weights, and ``left_out``, what the tower's
        checkpoint has and the model does not take. For a dry run its totals and ``peak_memory``.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `out` exists, or holds another conversion's beginning.
        ValueError: a checkpoint is of another architecture, damaged or incomplete.
        OSError: the disk is too small, or fails.
    """
    text, vision, out = (Path(path).absolute() for path in (text, vision, out))
    assembly = prepare_assembly(text, vision, seed, fields)
    plan = assembly.conversion_plan({"seed": seed, "fields": fields, "folders": [str(text), str(vision)]})
    return run_conversion(plan, out, jobs=jobs, overwrite=overwrite, dry_run=dry_run, console=console)


@dataclass(frozen=True)
class Assembly:
    """Inputs and outputs of an assembly.

    Attributes:
        text: folder of the gpt-oss checkpoint.
        vision: folder of the tower's.
        seed: of the new weights.
        config: of the new model.
        dtype: of its weights that are not packed.
        tensors: of the output, in the model's order.
        copied: the stored tensors that are copied, by their new names.
        new: functions that initialise the others, by name.
        left_out: tensors of the tower's checkpoint that the model does not have.
        shards: the files of the output.
    """

    text: Path
    vision: Path
    seed: int
    config: GPTOSSVisionConfig
    dtype: torch.dtype
    tensors: list[TensorSpec]
    copied: dict[str, TensorInfo]
    new: dict[str, Callable[[], torch.Tensor]]
    left_out: list[str]
    shards: ShardPlan

    def conversion_plan(self, settings: Mapping[str, Any]) -> ConversionPlan:
        """The plan, given the settings that decide the output's bytes; the largest tensors first."""
        ordered = sorted(self.tensors, key=lambda tensor: -tensor.nbytes)
        return ConversionPlan(
            action="assemble",
            title="Assembling",
            settings=settings,
            sources={"text": self.text, "vision": self.vision},
            tasks=[*self.shards.header_tasks(), *map(self._task, ordered)],
            file_sizes=self.shards.sizes,
            bytes_read=sum(stored.nbytes for stored in self.copied.values()),
            write_files=self._write_files,
            build_report=self._build_report,
            warnings=rounding_warnings(
                (self.copied[tensor.name].dtype, tensor.dtype) for tensor in self.tensors if tensor.name in self.copied
            ),
        )

    def _task(self, tensor: TensorSpec) -> Task:
        stored, place = self.copied.get(tensor.name), self.shards.places[tensor.name]
        step, size = STEP // tensor.dtype.itemsize, tensor.dtype.itemsize

        def run(worker: Worker) -> dict[str, Any]:
            digest, total = Digest(), prod(tensor.shape)
            values = torch.empty(0) if stored else self.new[tensor.name]().flatten().to(tensor.dtype)
            for first in range(0, total, step):
                count = min(step, total - first)
                with worker.scope():
                    part = stored.read_flat(worker, first, count) if stored else values[first : first + count]
                    part = worker.cast(part, tensor.dtype, place.offset + first * size)
                    digest.update(part)
                    worker.write(place.file, place.offset + first * size, part)
            return digest.entry([stored.name] if stored else [], tensor.shape, tensor.dtype)

        memory = min(STEP, tensor.nbytes) + (min(step * stored.dtype.itemsize, stored.nbytes) if stored else 0)
        return Task(tensor.name, (place.file,), run, memory, tensor.nbytes + (stored.nbytes if stored else 0))

    def _write_files(self, output: Path) -> None:
        model = meta_model(self.config, self.dtype)
        write_files(model, self.text, output, packed=any(name.endswith(MXFP4_PARTS) for name in self.copied))
        self.shards.write_index(output)
        if (self.text / "tokenizer.json").is_file():
            tokenizer = GPTOSSVisionTokenizer.from_pretrained(self.text)
            GPTOSSVisionProcessor.from_config(self.config, tokenizer).save_pretrained(output)

    def _build_report(self, results: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "text": str(self.text),
            "vision": str(self.vision),
            "seed": self.seed,
            "added": [*self.new],
            "left_out": self.left_out,
            "tensors": {tensor.name: results[tensor.name] for tensor in self.tensors},
        }


def prepare_assembly(text: Path, vision: Path, seed: int, fields: Mapping[str, Any]) -> Assembly:
    """Check both checkpoints and find the source of every tensor of the new one; see `assemble`."""
    source = open_source(text)
    if not source.missing:
        raise UserError(f"{text} is no stock {TEXT_MODEL_TYPE!r} checkpoint: it has vision biases already")
    config = config_of(text, vision, source.dtype, fields)
    with buildable(vision / "config.json"):
        model = meta_model(config, source.dtype)
    tower, left_out = tower_tensors(vision, model.model.vision_adapter.vit)
    tensors, copied = [], {f"{TOWER}{name}": stored for name, stored in tower.items()}
    for name, tensor in model.state_dict().items():
        parts = source.stored(name)
        copied |= {part.name: part for part in parts}
        tensors += [TensorSpec(part.name, part.dtype, part.shape) for part in parts]
        if not parts:
            tensors.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
    lacking = [tensor.name for tensor in tensors if tensor.name.startswith(TOWER) and tensor.name not in copied]
    if lacking:
        raise UserError(
            f"{vision} lacks tensors of its tower: {listed([name.removeprefix(TOWER) for name in lacking])}"
        )
    wrong = [
        tensor.name
        for tensor in tensors
        if (stored := tower.get(tensor.name.removeprefix(TOWER)))
        and (stored.shape != tensor.shape or stored.dtype not in FLOATS.values())
    ]
    if wrong:
        raise UserError(f"{vision} holds tensors that do not match its config: {listed(wrong)}")
    new = {tensor.name: _initialiser(tensor, config, seed) for tensor in tensors if tensor.name not in copied}
    return Assembly(text, vision, seed, config, source.dtype, tensors, copied, new, left_out, plan_shards(tensors))


def config_of(text: Path, vision: Path, dtype: torch.dtype, fields: Mapping[str, Any]) -> GPTOSSVisionConfig:
    """The config of the new model.

    Raises:
        FileNotFoundError: `vision` has no config.
        ValueError: its architecture is none of the towers', or no model can be built from it.
    """
    tower = config_fields(vision, "ViT, CLIP or SigLIP")
    kind = tower.get("model_type")
    for name, row in TOWERS.items():
        if row.outer and kind == row.outer:
            tower, kind = tower.get("vision_config"), name
            break
    if not isinstance(tower, dict):
        raise UserError(f"{vision / 'config.json'} has {tower!r} for vision_config, not its fields; copy it again")
    if kind not in [*TOWERS]:
        raise UserError(f"{vision} is a checkpoint of {kind!r}, not of {', '.join(map(repr, TOWERS))}")
    own = {name: value for name, value in tower.items() if name not in ("architectures", "torch_dtype", "dtype")}
    base = {name: value for name, value in config_fields(text).items() if name not in REPLACED_FIELDS}
    new = {"vision_config": own | {"model_type": kind}, "dtype": dtype}
    with buildable(vision / "config.json"):
        tower_config(own | {"model_type": kind})  # by itself, so that an error names the tower's config
    return GPTOSSVisionConfig.from_dict(base | new | dict(fields))


REPLACED_FIELDS = ("model_type", "architectures", "quantization_config", "dtype", "torch_dtype", "transformers_version")


def tower_tensors(folder: Path, tower: PreTrainedModel) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors of a checkpoint that a tower has, by the tower's own names, and the names of the others.

    Raises:
        ValueError: two tensors are the same one of the tower, or some belong to layers that its config does not have.
    """
    weights, wanted = get_model_conversion_mapping(tower), tower.state_dict()
    renamings = [weight for weight in weights if isinstance(weight, WeightRenaming)]
    converters = [weight for weight in weights if isinstance(weight, WeightConverter)]

    def renamed(name: str) -> str:
        return rename_source_key(name, renamings, converters, tower.base_model_prefix, wanted)[0]

    taken, left_out = {}, []
    for name, stored in read_index(folder).items():
        new = renamed(name)
        if new in taken:
            raise UserError(f"{folder} holds {new} of its tower twice, as {taken[new].name} and {name}")
        if new in wanted:
            taken[new] = stored
        else:
            left_out.append(name)
    if beyond := [name for name in left_out if renamed(re.sub(r"\.\d+\.", ".0.", name)) in wanted]:
        raise UserError(f"{folder / 'config.json'} has no layers for some tensors of its tower: {listed(beyond)}")
    return taken, left_out


def _initialiser(tensor: TensorSpec, config: GPTOSSVisionConfig, seed: int) -> Callable[[], torch.Tensor]:
    """The initial values of a new weight, as in a new model: random, one for the norm's weight, zero for the others."""

    def values() -> torch.Tensor:
        if tensor.name == f"{ADAPTER}norm.weight":
            return torch.ones(tensor.shape)
        if tensor.name in (f"{ADAPTER}proj.weight", f"{ADAPTER}pool_token"):
            generator = torch.Generator().manual_seed(crc32(f"{seed} {tensor.name}".encode()))
            return config.initializer_range * torch.randn(tensor.shape, generator=generator)
        return torch.zeros(tensor.shape)

    return values
