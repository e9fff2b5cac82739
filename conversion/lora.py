"""LoRA adapters that Megatron-Bridge has trained: into PEFT's format, and merged into the weights of an export.

Its checkpoint holds only what was trained: parameters as in any checkpoint, where some are trained as full weights
(`recipes/training/peft.py`), and the adapters, as ``KEY.adapter.linear_in.weight [L, r, in]`` (LoRA's A) and
``KEY.adapter.linear_out.weight [L, out, r]`` (its B); those of experts are ``[L, E, …]``, also where all experts share
one. The weights are in the checkpoint that training started from. The adapted weight is ``W + alpha / r · B·A``, in
Megatron's layout.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..bridge.weight_map import LANGUAGE_MODEL, PARAM_GROUPS, Layout, group_of
from ..errors import UserError
from ..terminal import Progress
from .engine.job import ConversionPlan, run_conversion
from .engine.report import Digest
from .engine.stream import InMemoryJournal, Task, Worker, stream
from .formats import run_config
from .formats.hf_config import read_config
from .formats.hf_files import reference_folder
from .formats.hf_source import shapes_of
from .formats.run_config import check_config
from .formats.safetensors import TensorSpec, plan_shards
from .formats.torch_dist_reader import (
    ShardedTensor,
    TorchDistCheckpoint,
    memory_of,
    open_checkpoint,
    read_region,
    whole,
)
from .messages import listed
from .parameters import MegatronParameter, parameters, to_hf

if TYPE_CHECKING:
    from peft import LoraConfig

IN, OUT = ".adapter.linear_in.weight", ".adapter.linear_out.weight"
ADAPTED = (
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.mlp.experts.experts.linear_fc1",
    "decoder.layers.mlp.experts.experts.linear_fc2",
)
"""The layers whose adapters can be exported."""

TARGETS = r"model\.layers\.\d+\.self_attn\.(?:%s)"
"""PEFT's ``target_modules``: without the prefix it would adapt the tower's projections, which have the same names."""

EXPERTS = {"gate_up_proj": ".base_layer", "down_proj": ""}
"""The weights of the module with all experts, and what follows the module's name in PEFT's keys when both are adapted:
PEFT wraps the module once for each, the second around the first."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint.

    Attributes:
        folder: the iteration folder.
        alpha: numerator of the scale ``alpha / r``.
        base: the Megatron checkpoint that they adapt, as ``run_config.yaml`` names it.
        pairs: A ``[L, r, in]`` and B ``[L, out, r]``, or ``[L, E, …]`` of experts, in fp32, by the key of the weight.
        full_weights: parameters that were trained themselves, by key.
        full_groups: their groups, as ``run_config.yaml`` names them.
    """

    folder: Path
    alpha: float
    base: Path | None
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    full_weights: Mapping[str, ShardedTensor]
    full_groups: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)

    def merge(self, parameter: MegatronParameter, rows: slice, values: torch.Tensor) -> torch.Tensor:
        """Add the adapter of a parameter to some rows of the parameter, in place.

        Args:
            parameter: an adapted parameter.
            rows: the rows of its weight.
            values: the weight's rows ``[rows, in]``, fp32.
        """
        a, b = self.of(parameter)
        return values.addmm_(b[rows], a, alpha=self.alpha / len(a))

    def of(self, parameter: MegatronParameter) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in]`` and B ``[out, r]`` of an adapted parameter."""
        a, b = (tensor[parameter.index] for tensor in self.pairs[parameter.key])
        return a, b


def is_adapter_checkpoint(checkpoint: TorchDistCheckpoint) -> bool:
    """Whether a checkpoint holds adapters in place of weights."""
    return any(key.endswith((IN, OUT)) for key in checkpoint.tensors)


def read_adapters(checkpoint: TorchDistCheckpoint) -> Adapters:
    """Read all adapters of a checkpoint.

    Raises:
        FileNotFoundError: it has no ``run_config.yaml``.
        ValueError: the adapters are not LoRA, or are of layers that cannot be exported.
    """
    file = checkpoint.folder / run_config.RUN_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{checkpoint.folder} has no {file.name}, which holds alpha; copy it again")
    config = run_config.read_run_config(checkpoint.folder)
    settings = run_config.section(checkpoint.folder, config, "peft")
    if not str(settings.get("_target_")).endswith((".LoRA", ".GPTOSSVisionLoRA")):
        raise UserError(f"{file} says {settings.get('_target_')}; only Megatron-Bridge's LoRA can be exported")
    alpha, base = settings.get("alpha"), run_config.section(checkpoint.folder, config, "checkpoint")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{file} has {alpha!r} for peft.alpha, not a number; copy it again")
    if settings.get("experts_shared_outer_loras"):
        raise UserError(f"{file} says experts_shared_outer_loras; only adapters that share all or nothing are exported")
    halves = {layer + part for layer in ADAPTED for part in (IN, OUT)}
    groups = _full_groups(checkpoint.folder, config)
    full_weights = {key: tensor for key, tensor in checkpoint.tensors.items() if group_of(key) in groups}
    unknown = sorted(checkpoint.tensors.keys() - halves - full_weights.keys())
    if unknown:
        raise UserError(f"{checkpoint.folder} has adapters that cannot be exported: {listed(unknown)}")
    found = [layer for layer in ADAPTED if {layer + IN, layer + OUT} & checkpoint.tensors.keys()]
    lacking = sorted({layer + part for layer in found for part in (IN, OUT)} - checkpoint.tensors.keys())
    if lacking:
        raise UserError(f"{checkpoint.folder} lacks halves of adapters: {listed(lacking)}; copy it again")
    read = _read_all({key: tensor for key, tensor in checkpoint.tensors.items() if key in halves})
    pairs = {layer + ".weight": (read[layer + IN], read[layer + OUT]) for layer in found}
    where = base.get("pretrained_checkpoint")
    base_folder = Path(where) if isinstance(where, str) else None
    return Adapters(checkpoint.folder, alpha, base_folder, pairs, full_weights, groups)


def _full_groups(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """The groups of parameters that were trained as full weights beside the adapters: those that were not frozen."""
    model = run_config.section(folder, config, "model")
    groups = run_config.section(folder, config, "peft").get("full_weights") or []
    if not isinstance(groups, list) or not {*groups} <= {*PARAM_GROUPS} - {LANGUAGE_MODEL}:
        raise UserError(f"{folder / run_config.RUN_CONFIG} has {groups!r} for peft.full_weights; copy it again")
    return tuple(group for group in groups if not model.get(f"freeze_{group}"))


def open_base(adapters: Adapters, given: Path | None) -> TorchDistCheckpoint:
    """Open the checkpoint with the weights: `given`, or the one that training started from.

    Those that were trained as full weights are the trained ones in it.

    Raises:
        FileNotFoundError: it does not exist, or none is named.
        ValueError: the checkpoint of the adapters lacks full weights.
    """
    base = given or adapters.base
    if base is None:
        raise FileNotFoundError(
            f"{adapters.folder / run_config.RUN_CONFIG} does not say which weights these are for; name them with --base"
        )
    if not base.is_dir():
        raise FileNotFoundError(f"The adapters are for the weights in {base}, which is not there; name it with --base")
    opened = open_checkpoint(base)
    wanted = {key for key in opened.tensors if group_of(key) in adapters.full_groups}
    if lacking := sorted(wanted - adapters.full_weights.keys()):
        raise UserError(f"{adapters.folder} lacks full weights: {listed(lacking)}; copy it again")
    return replace(opened, tensors={**opened.tensors, **adapters.full_weights})


def _read_all(tensors: Mapping[str, ShardedTensor]) -> dict[str, torch.Tensor]:
    """Read whole tensors, as fp32; adapters are small."""
    found: dict[str, torch.Tensor] = {}

    def task(key: str, tensor: ShardedTensor) -> Task:
        def run(worker: Worker) -> None:
            found[key] = read_region(worker, tensor, whole(tensor.shape)).to(torch.float32, copy=True)

        return Task(key, (), run, memory_of(tensor, whole(tensor.shape)), 0)

    tasks = [task(key, tensor) for key, tensor in tensors.items()]
    stream(tasks, InMemoryJournal(), {}, jobs=1, progress=Progress("", 0))
    return found


def export_adapters(
    megatron: str | Path,
    out: str | Path,
    *,
    hf: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Write an adapter checkpoint in PEFT's format.

    Args:
        megatron: root or iteration folder of a checkpoint that Megatron-Bridge's LoRA has saved.
        out: folder to make, for ``peft.PeftModel.from_pretrained``.
        hf: the Hugging Face checkpoint of the weights, where `megatron` keeps no config.
        overwrite: replace `out`.
        dry_run: only check whether the export could begin.
        console: prints progress and warnings; None prints nothing.

    Returns:
        The report that is also in `out`, see `engine/report.py`; for a dry run its totals and ``peak_memory``.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a part of the checkpoint is missing.
        ValueError: the checkpoint is damaged, or holds adapters that cannot be exported.
    """
    out, checkpoint = Path(out).absolute(), open_checkpoint(Path(megatron).absolute())
    if not is_adapter_checkpoint(checkpoint):
        raise UserError(f"{checkpoint.folder} holds no adapters; export it without --adapter")
    folder = reference_folder(checkpoint, Path(hf).absolute() if hf else None)
    adapters = read_adapters(checkpoint)
    if adapters.full_weights:
        # PEFT saves modules whole; the pool token and the vision bias are parameters of the adapter with the tower, and
        # of the router.
        raise UserError(
            f"{checkpoint.folder} holds full weights of {' and '.join(adapters.full_groups)} beside its adapters, "
            "which PEFT's format has no place for; export them merged, without --adapter"
        )
    plan = plan_adapter_export(adapters, folder, {"megatron": str(checkpoint.folder)})
    return run_conversion(plan, out, jobs=1, overwrite=overwrite, dry_run=dry_run, console=console)


def plan_adapter_export(adapters: Adapters, folder: Path, settings: Mapping[str, Any]) -> ConversionPlan:
    """Check adapters against the model that they adapt, and convert them to PEFT's layout, in memory.

    Args:
        adapters: all adapters of a checkpoint.
        folder: folder of the model's config.
        settings: settings of the plan.

    Raises:
        ValueError: they do not fit this model.
    """
    config = read_config(folder)
    shapes = shapes_of(config)
    everything = parameters(shapes, config.num_key_value_heads)
    check_adapters(adapters, everything)
    check_config(adapters.folder, config)
    adapted = [parameter for parameter in everything if parameter.key in adapters.pairs]
    described, tensors = _peft_config(adapters, adapted), _peft_tensors(adapters, adapted, shapes)
    planned = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = plan_shards(planned, "adapter_model", sys.maxsize)

    def task(name: str, values: torch.Tensor) -> Task:
        def run(worker: Worker) -> dict[str, Any]:
            digest = Digest()
            digest.update(values)
            worker.write(shards.places[name].file, shards.places[name].offset, values)
            return digest.entry([], values.shape, values.dtype)

        return Task(name, (shards.places[name].file,), run, 0, values.nbytes)

    return ConversionPlan(
        action="adapters",
        title="Exporting",
        settings=settings,
        sources={"source": adapters.folder, "reference": folder},
        tasks=[*shards.header_tasks(), *(task(*item) for item in tensors.items())],
        file_sizes=shards.sizes,
        bytes_read=adapters.nbytes,
        write_files=lambda output: described.save_pretrained(str(output)),
        build_report=lambda results: {
            "source": str(adapters.folder),
            "tensors": {name: results[name] for name in tensors},
        },
        resident_bytes=adapters.nbytes + sum(tensor.nbytes for tensor in tensors.values()),
    )


def check_adapters(adapters: Adapters, wanted: Sequence[MegatronParameter]) -> None:
    """Check that every adapter fits a weight of the model.

    Raises:
        ValueError: some do not; lists them.
    """
    weights = {parameter.key: parameter for parameter in wanted}
    wrong = []
    for key, (a, b) in adapters.pairs.items():
        axes, (outside, inside) = weights[key].axes, weights[key].shape
        fitting = (*axes, a.shape[-2], inside), (*axes, outside, a.shape[-2])
        wrong += [
            f"{key.removesuffix('.weight') + part} is {list(half.shape)}, not {list(shape)}"
            for part, half, shape in zip((IN, OUT), (a, b), fitting, strict=True)
            if half.shape != shape
        ]
    if wrong:
        raise UserError(f"{adapters.folder} does not fit its model: {listed(wrong)}")


def _peft_tensors(
    adapters: Adapters, adapted: Sequence[MegatronParameter], shapes: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Every A and B by PEFT's name; those of experts are concatenated, as PEFT stores them."""
    tensors: dict[str, torch.Tensor] = {}
    of_experts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for parameter in adapted:
        a, b = adapters.of(parameter)
        parts = [
            torch.empty(shapes[name][-1 if parameter.expert is not None else 0], b.shape[1]) for name in parameter.hf
        ]
        for name, part in zip(parameter.hf, _laid_out(parameter, b, parts), strict=True):
            if parameter.expert is None:
                tensors |= _named(name.removesuffix(".weight"), a.clone(), part)
            else:
                of_experts.setdefault(name, []).append((a, part))
    for name, pairs in of_experts.items():
        module, _, tensor = name.rpartition(".")
        if all(f"{module}.{other}" in of_experts for other in EXPERTS):
            module += EXPERTS[tensor]
        a, b = (list(each) for each in zip(*pairs, strict=True))
        tensors |= _named(module, torch.cat(a), torch.stack(b, dim=-1).flatten(1))
    return tensors


def _named(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{module}.lora_{letter}.weight": each for letter, each in (("A", a), ("B", b))}


def _laid_out(parameter: MegatronParameter, b: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Arrange the rows of B ``[out, r]`` as transformers arranges those of the weight ``[out, in]``."""
    if parameter.layout is Layout.EXPERT_GATE_UP:
        for half, start in zip(b.chunk(2), (0, 1), strict=True):
            parts[0][start::2] = half
    elif parameter.layout is Layout.EXPERT_DOWN:
        parts[0].copy_(b)
    else:
        to_hf(parameter, b, parts, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    return parts


def _peft_config(adapters: Adapters, adapted: Sequence[MegatronParameter]) -> "LoraConfig":
    """PEFT's config. Its rank is that of the experts; layers with another are in its rank pattern.

    They differ with ``normalize_moe_lora``. PEFT 0.21.2 warns where a key of the pattern matches parameters alone.
    """
    from peft import LoraConfig  # takes seconds, which every export would wait for

    ranks = {
        name.removesuffix(".weight").rpartition(".")[2]: adapters.of(parameter)[0].shape[0]
        for parameter in adapted
        for name in parameter.hf
    }
    attention = sorted(ranks.keys() - EXPERTS.keys())
    default = next((ranks[name] for name in EXPERTS if name in ranks), max(ranks.values()))
    return LoraConfig(
        r=default,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != default},
        lora_alpha=adapters.alpha,  # pyright: ignore[reportArgumentType] - any number will do
        target_modules=TARGETS % "|".join(attention) if attention else [],
        target_parameters=[f"mlp.experts.{name}" for name in EXPERTS if name in ranks] or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
