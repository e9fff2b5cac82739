"""A Hugging Face checkpoint as a source of parameters: which tensors it must hold, whether it does, reading them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...bridge.weight_map import group_of
from ...errors import UserError
from ..engine.stream import Worker
from ..messages import refuse_mismatch
from ..parameters import MXFP4_PARTS, MegatronParameter, parameters
from .hf_config import FLOATS, TEXT_MODEL_TYPE, buildable, config_fields, dtype_name, read_config
from .safetensors import TensorInfo, read_index

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig


@dataclass(frozen=True)
class Source:
    """A checked checkpoint.

    Attributes:
        folder: where it is.
        config: of the model; without vision, where the checkpoint is a stock gpt-oss.
        tensors: what is stored, by name.
        missing: names that a stock gpt-oss does not have; they count as zeros.
    """

    folder: Path
    config: "GPTOSSVisionConfig"
    tensors: dict[str, TensorInfo]
    missing: frozenset[str]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not packed: what the config says, else the type of most of their numbers.

        Not the widest: our bf16 checkpoints have vision biases in fp32.
        """
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        numbers: Counter[torch.dtype] = Counter()
        for stored in self.tensors.values():
            if stored.dtype in FLOATS:
                numbers[stored.dtype] += stored.nbytes // stored.dtype.itemsize
        return numbers.most_common(1)[0][0]

    @cached_property
    def parameters(self) -> list[MegatronParameter]:
        """Of the Megatron model."""
        return parameters(shapes_of(self.config), self.config.num_key_value_heads)

    def stored(self, name: str) -> tuple[TensorInfo, ...]:
        """What is stored of a tensor of the model: itself, its blocks and scales, or nothing."""
        if name in self.tensors:
            return (self.tensors[name],)
        return tuple(self.tensors[name + part] for part in MXFP4_PARTS if name + part in self.tensors)

    def nbytes(self, parameter: MegatronParameter) -> list[int]:
        """Bytes to read for a parameter, for each tensor that it is read from."""
        whole = [stored for name in parameter.hf for stored in self.stored(name)]
        return [stored.nbytes // (1 if parameter.expert is None else stored.shape[0]) for stored in whole]

    def is_packed(self, parameter: MegatronParameter) -> bool:
        """Whether it is stored as MXFP4, in blocks and scales."""
        return len(self.stored(parameter.hf[0])) == len(MXFP4_PARTS)

    def read(self, worker: Worker, parameter: MegatronParameter) -> list[torch.Tensor]:
        """The tensors of a parameter; of one expert, where they hold all."""
        stored = [tensor for name in parameter.hf for tensor in self.stored(name)]
        return [tensor.read(worker, parameter.expert) for tensor in stored]

    def read_rows(self, worker: Worker, parameter: MegatronParameter, rows: slice) -> torch.Tensor:
        """Elements of some rows of a parameter that is one tensor, flat; zeros where a stock gpt-oss has none."""
        width = prod(parameter.shape[1:])
        first, count = rows.start * width, (rows.stop - rows.start) * width
        stored = self.stored(parameter.hf[0])
        return stored[0].read_flat(worker, first, count) if stored else torch.zeros(count)


def open_source(folder: Path) -> Source:
    """Look at a checkpoint's config and headers, and compare them with the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another architecture, damaged files, or tensors that are missing, foreign or of the wrong shape.
    """
    config = read_config(folder)
    tensors, shapes = read_index(folder), shapes_of(config)
    absent = frozenset(name for name in shapes if group_of(name) == "vision_bias" and name not in tensors)
    is_stock = config_fields(folder)["model_type"] == TEXT_MODEL_TYPE
    source = Source(folder, config, tensors, absent if is_stock else frozenset())
    _check(source, shapes)
    return source


def shapes_of(config: "GPTOSSVisionConfig") -> dict[str, tuple[int, ...]]:
    """Every tensor of the transformers model with its shape, unquantised.

    Raises:
        ValueError: its embeddings are its head too, it has no biases, or it describes no model that can be built.
    """
    file = Path(config.name_or_path or "") / "config.json"
    if config.tie_word_embeddings:
        raise UserError(
            f"{file} says tie_word_embeddings; embeddings that are the head too are not converted; untie them first"
        )
    if not config.attention_bias:
        raise UserError(f"{file} says attention_bias=false, which Megatron cannot express beside experts with biases")
    from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM

    with buildable(file), torch.device("meta"):
        model = GPTOSSVisionForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check(source: Source, shapes: dict[str, tuple[int, ...]]) -> None:
    """Whether every tensor of the model is stored in its shape, and nothing else."""
    missing, wrong, used = [], [], set()
    for name, shape in shapes.items():
        is_packed = name not in source.tensors and bool(source.stored(name)) and len(shape) == 3
        wanted = _packed_shapes(name, shape) if is_packed else {name: tuple(shape)}
        types = (torch.uint8,) if is_packed else FLOATS
        found = {part: source.tensors[part] for part in wanted if part in source.tensors}
        missing += [part for part in wanted if part not in found and name not in source.missing]
        wrong += [
            f"{part} is {_spelled(tensor)}, not {list(wanted[part])} {' or '.join(map(dtype_name, types))}"
            for part, tensor in found.items()
            if tensor.shape != wanted[part] or tensor.dtype not in types
        ]
        used |= found.keys()
    titles = {
        "tensors missing in the checkpoint": missing,
        "tensors of another shape or type": wrong,
        "tensors of the checkpoint that nothing reads": sorted(source.tensors.keys() - used),
    }
    refuse_mismatch(source.folder, titles)


def _packed_shapes(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Of blocks and scales: output rows first, 32 numbers in 16 bytes."""
    experts, inside, outside = shape
    blocks, scales = (name + part for part in MXFP4_PARTS)
    return {blocks: (experts, outside, inside // 32, 16), scales: (experts, outside, inside // 32)}


def _spelled(tensor: TensorInfo) -> str:
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"
