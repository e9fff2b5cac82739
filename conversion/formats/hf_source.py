"""A Hugging Face checkpoint as a source of parameters: which tensors it must hold, whether it does, reading them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UserError
from ..engine.stream import Worker, room_for
from ..parameters import MXFP4_PARTS, MegatronParameter, parameters
from .hf_config import MODEL_TYPE, config_fields
from .safetensors_reader import Stored, listed, read_index

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

TEXT_MODEL_TYPE = "gpt_oss"
OF_THE_FILE = ("model_type", "architectures", "auto_map", "quantization_config")
"""Fields of a config that speak of how the checkpoint is stored."""

OF_DTYPE = ("dtype", "torch_dtype")
"""Fields of a config that name the type of its weights, the later name first."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_local_experts", "num_experts_per_tok", "vocab_size"),
)
"""Fields of a config that transformers takes at 0 or less, and divides by or builds nothing from."""


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
    tensors: dict[str, Stored]
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

    def stored(self, name: str) -> tuple[Stored, ...]:
        """What is stored of a tensor of the model: itself, its blocks and scales, or nothing."""
        if name in self.tensors:
            return (self.tensors[name],)
        return tuple(self.tensors[name + part] for part in MXFP4_PARTS if name + part in self.tensors)

    def nbytes(self, parameter: MegatronParameter) -> list[int]:
        """Bytes to read for a parameter, for each tensor that it is read from."""
        whole = [stored for name in parameter.hf for stored in self.stored(name)]
        return [stored.nbytes // (1 if parameter.expert is None else stored.shape[0]) for stored in whole]

    def read(self, worker: Worker, parameter: MegatronParameter) -> list[torch.Tensor]:
        """The tensors of a parameter, or its expert's parts of them, side by side in the inbox."""
        parts, at = [], 0
        for name in parameter.hf:
            for stored in self.stored(name):
                if parameter.expert is None:
                    parts.append(stored.read(worker, at=at).view(stored.shape))
                else:
                    parts.append(stored.read_part(worker, parameter.expert, at=at))
                at += room_for(parts[-1].nbytes)
        return parts


def open_source(folder: Path) -> Source:
    """Look at a checkpoint's config and headers, and compare them with the model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another architecture, damaged files, or tensors that are missing, foreign or of the wrong shape.
    """
    config = read_config(folder)
    tensors, shapes = read_index(folder), shapes_of(config)
    absent = frozenset(name for name in shapes if name.endswith(".vision_bias") and name not in tensors)
    is_stock = config_fields(folder)["model_type"] == TEXT_MODEL_TYPE
    source = Source(folder, config, tensors, absent if is_stock else frozenset())
    _check(source, shapes)
    return source


def read_config(folder: Path) -> "GPTOSSVisionConfig":
    """The config of a checkpoint, which remembers the folder as its ``name_or_path``.

    That of a stock gpt-oss becomes the config of a model without vision.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another architecture, or no model can be built from it.
    """
    fields = config_fields(folder)
    model_type = fields.get("model_type")
    if model_type not in (MODEL_TYPE, TEXT_MODEL_TYPE):
        raise UserError(f"{folder} is a checkpoint of {model_type!r}, not of {MODEL_TYPE!r} or {TEXT_MODEL_TYPE!r}")
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

    own = {name: value for name, value in fields.items() if name not in (*OF_THE_FILE, *OF_DTYPE)}
    own |= {"dtype": _dtype_in(folder, fields), "name_or_path": str(folder)}
    if model_type == TEXT_MODEL_TYPE:
        own["use_vision"] = False
    with buildable(folder / "config.json"):
        counts = {name: fields[name] for name in COUNTS if isinstance(fields.get(name), int)}
        if wrong := [f"{name} is {count}" for name, count in counts.items() if count < 1]:
            raise ValueError(f"{listed(wrong)}, not at least 1")
        return GPTOSSVisionConfig.from_dict(own)


def _dtype_in(folder: Path, fields: dict[str, Any]) -> str | None:
    """The type of weights that a config names, as torch spells it; None where it names none."""
    found = next((fields[name] for name in OF_DTYPE if fields.get(name) is not None), None)
    spelled = found.removeprefix("torch.") if isinstance(found, str) else found
    if spelled is None or spelled in [_type(dtype) for dtype in FLOATS]:
        return spelled
    raise UserError(
        f"{folder / 'config.json'} says that dtype is {found!r}; only {listed([*map(_type, FLOATS)])} are converted"
    )


@contextmanager
def buildable(file: Path) -> Iterator[None]:
    """Tell of whatever transformers raises while it builds something from a config: it checks little, and late.

    Raises:
        ValueError: naming the file and the cause.
    """
    try:
        yield
    except Exception as error:  # of a dozen types, for values that the user can mend
        cause = error.__cause__ or error
        said = f"{type(cause).__name__}: " * (not isinstance(cause, ValueError)) + " ".join(str(cause).split())
        raise UserError(f"{file} describes no model that can be built ({said}); mend it, or copy it again") from error


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
            f"{part} is {_spelled(tensor)}, not {list(wanted[part])} {' or '.join(map(_type, types))}"
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


def refuse_mismatch(folder: Path, titles: Mapping[str, list[str]]) -> None:
    """Refuse a checkpoint for what is wrong with its tensors: names under titles, if any.

    Raises:
        ValueError: listing them.
    """
    said = [f"{title}: {listed(names)}" for title, names in titles.items() if names]
    if said:
        raise UserError(f"{folder} does not match its config. {'; '.join(said)}.")


def _packed_shapes(name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Of blocks and scales: output rows first, 32 numbers in 16 bytes."""
    experts, inside, outside = shape
    blocks, scales = (name + part for part in MXFP4_PARTS)
    return {blocks: (experts, outside, inside // 32, 16), scales: (experts, outside, inside // 32)}


def _spelled(tensor: Stored) -> str:
    return f"{list(tensor.shape)} {_type(tensor.dtype)}"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
