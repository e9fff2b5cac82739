"""LoRA adapters that Megatron-Bridge has trained: into PEFT's format, and merged into the weights of an export.

Its checkpoint holds the adapters alone, under ``KEY.adapter.linear_in.weight [L, r, in]`` (LoRA's A) and
``KEY.adapter.linear_out.weight [L, out, r]`` (its B); those of experts have the axis of experts after that of layers,
also where all experts share one. The weights are in the checkpoint that training started from. The adapted weight is
``W + alpha / r · B·A``, in Megatron's layout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..bridge.weights import Layout
from . import run_config
from .checkpoint import MODEL_TYPE, read_json
from .hf_side import reference_folder
from .journal import open_output
from .layouts import Parameter, parameters, to_hf
from .progress import Progress
from .safetensors_reader import listed
from .source import read_config, room_for, shapes_of
from .stream import Memory, Unit, Worker, stream
from .torch_dist_reader import StoredTensor, TorchDistCheckpoint, open_checkpoint, read_region, whole

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
"""Of PEFT, which would otherwise find the tower's projections under the same names."""

EXPERTS = ("gate_up_proj", "down_proj")
"""Tensors of one module that hold all experts; PEFT wraps it once for each that is adapted, in this order."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint.

    Attributes:
        folder: of the iteration that holds them.
        alpha: of the scale ``alpha / r``.
        base: the Megatron checkpoint that they adapt.
        pairs: A ``[L, r, in]`` and B ``[L, out, r]``, or ``[L, E, …]`` of experts, in fp32, by the key of the weight.
    """

    folder: Path
    alpha: float
    base: Path | None
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def merge(self, parameter: Parameter, rows: slice, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows of a parameter with its adapter added, in fp32; as they are where it has none."""
        if parameter.key not in self.pairs:
            return numbers
        a, b = self.of(parameter)
        return torch.addmm(numbers.view(-1, a.shape[1]).float(), b[rows], a, alpha=self.alpha / len(a))

    def of(self, parameter: Parameter) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in]`` and B ``[out, r]`` of a parameter that is adapted."""
        a, b = (tensor[parameter.index] for tensor in self.pairs[parameter.key])
        return a, b


def is_adapter_checkpoint(checkpoint: TorchDistCheckpoint) -> bool:
    """Whether a checkpoint holds adapters instead of weights."""
    return any(key.endswith((IN, OUT)) for key in checkpoint.tensors)


def read_adapters(checkpoint: TorchDistCheckpoint) -> Adapters:
    """All adapters of a checkpoint.

    Raises:
        FileNotFoundError: it has no ``run_config.yaml``.
        ValueError: adapters of layers that cannot be exported, or of another kind than LoRA.
    """
    file = checkpoint.folder / run_config.NAME
    if not file.is_file():
        raise FileNotFoundError(f"{checkpoint.folder} has no {file.name}, which knows alpha; copy it again")
    config = run_config.read_run_config(checkpoint.folder)
    settings, base = config["peft"] or {}, config["checkpoint"].get("pretrained_checkpoint")
    if not str(settings.get("_target_")).endswith(".LoRA"):
        raise ValueError(f"{file} says {settings.get('_target_')}; only Megatron-Bridge's LoRA can be exported")
    if settings.get("experts_shared_outer_loras"):
        raise ValueError(
            f"{file} says experts_shared_outer_loras; only adapters that share all or nothing are exported"
        )
    unknown = sorted(checkpoint.tensors.keys() - {layer + part for layer in ADAPTED for part in (IN, OUT)})
    if unknown:
        raise ValueError(f"{checkpoint.folder} has adapters that cannot be exported: {listed(unknown)}")
    read = _read_all(checkpoint.tensors)
    found = [layer for layer in ADAPTED if layer + IN in read]
    pairs = {layer + ".weight": (read[layer + IN], read[layer + OUT]) for layer in found}
    return Adapters(checkpoint.folder, settings["alpha"], Path(base) if base else None, pairs)


def open_base(adapters: Adapters, given: Path | None) -> TorchDistCheckpoint:
    """The checkpoint with the weights: `given`, or where training found it.

    Raises:
        FileNotFoundError: it is not there.
    """
    base = given or adapters.base
    if base is None or not base.is_dir():
        raise FileNotFoundError(f"The adapters are for the weights in {base}, which is not there; name it with --base")
    return open_checkpoint(base)


def _read_all(tensors: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Whole tensors in fp32: adapters are small."""
    found: dict[str, torch.Tensor] = {}

    def unit(key: str, tensor: StoredTensor) -> Unit:
        def run(worker: Worker) -> None:
            found[key] = read_region(worker, tensor, whole(tensor.shape)).to(torch.float32, copy=True)

        nbytes = room_for(math.prod(tensor.shape) * tensor.dtype.itemsize)
        return Unit(key, (), run, nbytes, 0, nbytes, 0)

    units = [unit(key, tensor) for key, tensor in tensors.items()]
    stream(units, Memory(), {}, jobs=1, progress=Progress("", 0))
    return found


def export_adapters(
    megatron: str | Path, out: str | Path, *, hf: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write an adapter checkpoint in the format of PEFT.

    Args:
        megatron: root or iteration folder of a checkpoint that Megatron-Bridge's LoRA has saved.
        out: folder to make, for ``peft.PeftModel.from_pretrained``.
        hf: the Hugging Face checkpoint of the weights, where `megatron` keeps no config.
        overwrite: replace `out`.

    Returns:
        The config that was written.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: a part of the checkpoint is missing.
        ValueError: the checkpoint is damaged, or holds adapters that cannot be exported.
    """
    checkpoint = open_checkpoint(Path(megatron).absolute())
    if not is_adapter_checkpoint(checkpoint):
        raise ValueError(f"{checkpoint.folder} holds no adapters; export it without --adapter")
    adapters = read_adapters(checkpoint)
    folder = reference_folder(checkpoint, Path(hf).absolute() if hf else None)
    config = read_config(folder, with_vision=read_json(folder / "config.json").get("model_type") == MODEL_TYPE)
    shapes = shapes_of(config)
    adapted = [one for one in parameters(shapes, config.num_key_value_heads) if one.key in adapters.pairs]
    tensors = _peft_tensors(adapters, adapted, shapes)
    described = _peft_config(adapters, adapted)
    with open_output(
        Path(out), {"action": "adapters", "source": str(checkpoint.folder)}, overwrite=overwrite
    ) as journal:
        save_file(tensors, journal.output / "adapter_model.safetensors", metadata={"format": "pt"})
        described.save_pretrained(str(journal.output))
        journal.finish()
    return described.to_dict()


def _peft_tensors(
    adapters: Adapters, adapted: Sequence[Parameter], shapes: Mapping[str, Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Every A and B under PEFT's name; those of experts side by side, as PEFT keeps them."""
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
        wraps = "".join(
            ".base_layer" for other in EXPERTS[EXPERTS.index(tensor) + 1 :] if f"{module}.{other}" in of_experts
        )
        a, b = (list(each) for each in zip(*pairs, strict=True))
        tensors |= _named(module + wraps, torch.cat(a), torch.stack(b, dim=-1).flatten(1))
    return tensors


def _named(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{module}.lora_{letter}.weight": each for letter, each in (("A", a), ("B", b))}


def _laid_out(parameter: Parameter, b: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """B cut, or its rows ordered, as transformers has those of the weight: ``[out, r]`` as ``[out, in]`` is."""
    if parameter.layout is Layout.EXPERT_GATE_UP:
        for half, start in zip(b.chunk(2), (0, 1), strict=True):
            parts[0][start::2] = half
    elif parameter.layout is Layout.EXPERT_DOWN:
        parts[0].copy_(b)
    else:
        to_hf(parameter, b, parts, torch.empty(0))
    return parts


def _peft_config(adapters: Adapters, adapted: Sequence[Parameter]) -> "LoraConfig":
    """What PEFT has to know.

    Raises:
        ValueError: the ranks differ.
    """
    from peft import LoraConfig  # takes seconds, which every export would wait for

    ranks = sorted({a.shape[-2] for a, _ in adapters.pairs.values()})
    if len(ranks) > 1:
        raise ValueError(
            f"The adapters have ranks {ranks}, and PEFT one for all; export them merged, without --adapter"
        )
    names = [name for parameter in adapted if parameter.expert is None for name in parameter.hf]
    layers = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
    experts = {
        name.rpartition(".")[2] for parameter in adapted if parameter.expert is not None for name in parameter.hf
    }
    return LoraConfig(
        r=ranks[0],
        lora_alpha=adapters.alpha,  # pyright: ignore[reportArgumentType] - any number will do
        target_modules=TARGETS % "|".join(layers) if layers else [],
        target_parameters=[f"mlp.experts.{name}" for name in EXPERTS if name in experts] or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
