"""A Hugging Face checkpoint to convert: its tensors compared with those of its model, and read."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...bridge.ops.mxfp4 import MXFP4_PARTS
from ...bridge.weight_map import group_of
from ...errors import UserError
from ..dtypes import FLOAT_NAMES, FLOATS, dtype_name, most_common
from ..engine.stream import Worker
from ..messages import refuse_mismatch
from ..parameters import MegatronParameter, packed_shapes, parameters
from .hf_config import TEXT_MODEL_TYPE, buildable, config_fields, read_config
from .safetensors import TensorInfo, read_index

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig


@dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors match its config.

    Attributes:
        folder: of the checkpoint.
        config: of the model; of a model without vision if the checkpoint is a stock gpt-oss.
        tensors: the stored tensors, by name.
        missing: tensors of the model that a stock gpt-oss does not have; they are taken as zeros.
    """

    folder: Path
    config: "GPTOSSVisionConfig"
    tensors: dict[str, TensorInfo]
    missing: frozenset[str]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the weights that are not packed: that of the config, else that of most elements.

        Not the widest: our bf16 checkpoints have vision biases in fp32.
        """
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        floats = [stored for stored in self.tensors.values() if stored.dtype in FLOATS.values()]
        return most_common((stored.dtype, stored.nbytes // stored.dtype.itemsize) for stored in floats)

    @cached_property
    def parameters(self) -> list[MegatronParameter]:
        """The parameters of the Megatron model."""
        return parameters(shapes_of(self.config), self.config.num_key_value_heads)

    def stored(self, name: str) -> tuple[TensorInfo, ...]:
        """Return the stored tensors of one tensor of the model: itself, its blocks and scales, or none."""
        if name in self.tensors:
            return (self.tensors[name],)
        return tuple(self.tensors[name + part] for part in MXFP4_PARTS if name + part in self.tensors)

    def nbytes(self, parameter: MegatronParameter) -> list[int]:
        """Return the bytes to read for a parameter, one number for each stored tensor."""
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
    """Read a checkpoint's config and headers, and refuse it where its tensors are not those of the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another architecture, damaged files, or tensors that are missing, unknown or of another shape.
    """
    config = read_config(folder)
    tensors, shapes = read_index(folder), shapes_of(config)
    absent = frozenset(name for name in shapes if group_of(name) == "vision_bias" and name not in tensors)
    is_stock = config_fields(folder)["model_type"] == TEXT_MODEL_TYPE
    source = Source(folder, config, tensors, absent if is_stock else frozenset())
    _check(source, shapes)
    return source


def shapes_of(config: "GPTOSSVisionConfig") -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the transformers model, unquantised.

    Raises:
        ValueError: the embeddings are tied, attention has no biases, or the model cannot be built.
    """
    file = Path(config.name_or_path or "") / "config.json"
    if config.tie_word_embeddings:
        raise UserError(f"{file} says tie_word_embeddings; tied embeddings cannot be converted; untie them first")
    if not config.attention_bias:
        raise UserError(f"{file} says attention_bias=false, which Megatron cannot express beside experts with biases")
    from ...bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM

    with buildable(file), torch.device("meta"):
        model = GPTOSSVisionForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check(source: Source, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint that does not hold every tensor of the model in its shape, and no other."""
    missing, wrong, used = [], [], set()
    for name, shape in shapes.items():
        is_packed = name not in source.tensors and bool(source.stored(name)) and len(shape) == 3
        wanted = packed_shapes(name, shape) if is_packed else {name: tuple(shape)}
        types, names = ((torch.uint8,), "uint8") if is_packed else (FLOATS.values(), FLOAT_NAMES)
        found = {part: source.tensors[part] for part in wanted if part in source.tensors}
        missing += [part for part in wanted if part not in found and name not in source.missing]
        wrong += [
            f"{part} is {_spelled(tensor)}, not {list(wanted[part])} {names}"
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


def _spelled(tensor: TensorInfo) -> str:
    return f"{list(tensor.shape)} {dtype_name(tensor.dtype)}"
