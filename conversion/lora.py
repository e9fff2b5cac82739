"""LoRA adapters that Megatron-Bridge has trained: into PEFT's format, and merged into the weights of an export.

Its checkpoint holds the adapters alone, under ``KEY.adapter.linear_in.weight [L, r, in]`` (LoRA's A) and
``KEY.adapter.linear_out.weight [L, out, r]`` (its B); the weights are in the checkpoint that training started from. The
adapted weight is ``W + alpha / r · B·A``, in Megatron's layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import save_file

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
ADAPTED = ("decoder.layers.self_attention.linear_qkv", "decoder.layers.self_attention.linear_proj")
"""The layers whose adapters can be exported: those that the `torch` back end can train."""

TARGETS = r"model\.layers\.\d+\.self_attn\.(?:%s)"
"""Of PEFT, which would otherwise find the tower's projections under the same names."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a checkpoint.

    Attributes:
        rank: r.
        alpha: of the scale ``alpha / r``.
        base: the Megatron checkpoint that they adapt.
        pairs: A ``[L, r, in]`` and B ``[L, out, r]``, in fp32, by the key of the weight.
    """

    rank: int
    alpha: float
    base: Path | None
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    def merge(self, parameter: Parameter, rows: slice, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows of a parameter with its adapter added, in fp32; as they are where it has none."""
        if parameter.key not in self.pairs:
            return numbers
        a, b = (tensor[parameter.index[0]] for tensor in self.pairs[parameter.key])
        return torch.addmm(numbers.view(-1, a.shape[1]).float(), b[rows], a, alpha=self.alpha / self.rank)


def is_adapter_checkpoint(checkpoint: TorchDistCheckpoint) -> bool:
    """Whether a checkpoint holds adapters instead of weights."""
    return any(key.endswith((IN, OUT)) for key in checkpoint.tensors)


def read_adapters(checkpoint: TorchDistCheckpoint) -> Adapters:
    """All adapters of a checkpoint.

    Raises:
        FileNotFoundError: it has no ``run_config.yaml``.
        ValueError: adapters of layers that cannot be exported, or of another kind than LoRA.
    """
    file = checkpoint.folder / "run_config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{checkpoint.folder} has no run_config.yaml, which knows alpha; copy it again")
    config = yaml.safe_load(file.read_text())
    settings, base = config["peft"] or {}, config["checkpoint"].get("pretrained_checkpoint")
    if not str(settings.get("_target_")).endswith(".LoRA"):
        raise ValueError(f"{file} says {settings.get('_target_')}; only Megatron-Bridge's LoRA can be exported")
    unknown = sorted(checkpoint.tensors.keys() - {layer + part for layer in ADAPTED for part in (IN, OUT)})
    if unknown:
        raise ValueError(f"{checkpoint.folder} has adapters that cannot be exported: {listed(unknown)}")
    read = _read_all(checkpoint.tensors)
    found = [layer for layer in ADAPTED if layer + IN in read]
    pairs = {layer + ".weight": (read[layer + IN], read[layer + OUT]) for layer in found}
    return Adapters(settings["dim"], settings["alpha"], Path(base) if base else None, pairs)


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
    tensors: dict[str, torch.Tensor] = {}
    for parameter in parameters(shapes, config.num_key_value_heads):
        if parameter.key in adapters.pairs:
            a, b = (tensor[parameter.index[0]] for tensor in adapters.pairs[parameter.key])
            tensors |= _peft_tensors(parameter, a, b, [shapes[name][0] for name in parameter.hf])
    described = _peft_config(adapters, tensors)
    with open_output(
        Path(out), {"action": "adapters", "source": str(checkpoint.folder)}, overwrite=overwrite
    ) as journal:
        save_file(tensors, journal.output / "adapter_model.safetensors", metadata={"format": "pt"})
        described.save_pretrained(str(journal.output))
        journal.finish()
    return described.to_dict()


def _peft_tensors(parameter: Parameter, a: torch.Tensor, b: torch.Tensor, rows: list[int]) -> dict[str, torch.Tensor]:
    """A for each tensor of transformers, and B cut as the weight is: ``[out, r]`` is laid out as ``[out, in]`` is."""
    parts = [torch.empty(count, b.shape[1]) for count in rows]
    to_hf(parameter, b, parts, torch.empty(0))
    names = [f"base_model.model.{name.removesuffix('.weight')}.lora_" for name in parameter.hf]
    return {f"{name}A.weight": a.clone() for name in names} | {
        f"{name}B.weight": part for name, part in zip(names, parts, strict=True)
    }


def _peft_config(adapters: Adapters, tensors: Mapping[str, torch.Tensor]) -> "LoraConfig":
    from peft import LoraConfig  # takes seconds, which every export would wait for

    layers = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    return LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # pyright: ignore[reportArgumentType] - any number will do
        target_modules=TARGETS % "|".join(layers),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
