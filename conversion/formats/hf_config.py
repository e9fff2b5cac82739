"""Looking at a checkpoint folder before anything is built from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...errors import UserError
from ..messages import listed

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

MODEL_TYPE = "gpt_oss_vision"  # the config class has it too, but a refusal should not wait for transformers
INDEX = "model.safetensors.index.json"


def check_checkpoint(folder: Path) -> None:
    """Whether a folder holds a whole GPT-OSS-Vision checkpoint; reads headers only.

    Raises:
        FileNotFoundError: no folder, no config, no weights, or a shard that the index names is not there.
        ValueError: the config is of another architecture, or a weight file is cut off or damaged.
    """
    model_type = config_fields(folder).get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError(f"{folder} is a checkpoint of {model_type!r}, not of {MODEL_TYPE!r}")
    for file in weight_files(folder):
        check_safetensors(file)


def config_fields(folder: Path, kind: str = "Hugging Face") -> dict[str, Any]:
    """What the config of a checkpoint says.

    Args:
        folder: where it should be.
        kind: of checkpoint, for a refusal.

    Raises:
        FileNotFoundError: there is no such folder, or no config in it.
        ValueError: the config is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name that of a {kind} checkpoint")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name the folder of a {kind} checkpoint")
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        FileNotFoundError: when there is none, or one of them is missing.
        ValueError: the index is damaged.
    """
    names = sorted(set(weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint again")
    return [folder / name for name in names] or [_only_file(folder)]


def weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor, by the index of a checkpoint; empty where it has none.

    Raises:
        ValueError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return {}
    found = read_json(index).get("weight_map")
    if not found or not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map that gives a file for each tensor; copy it again")
    return found


def _only_file(folder: Path) -> Path:
    file = folder / "model.safetensors"
    if file.is_file():
        return file
    if any(folder.glob("model-*-of-*.safetensors")):
        raise FileNotFoundError(f"{folder} holds shards without {INDEX}, which says what is in them; copy that too")
    if pickled := sorted(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} has its weights in {pickled[0].name}; save them as safetensors first")
    raise FileNotFoundError(f"{folder} lacks {file.name}; copy the checkpoint again")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: when it holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__} where an object {{…}} belongs; copy it again")
    return found


def check_safetensors(file: Path) -> None:
    """Whether a safetensors file is whole, as far as its header tells.

    Raises:
        PermissionError: it may not be read.
        ValueError: its header is damaged, or promises another length than the file has.
    """
    file.open("rb").close()  # safetensors would say of a file that it may not read that it is not there
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is cut off or damaged ({error}); copy it again") from error


TEXT_MODEL_TYPE = "gpt_oss"
STORAGE_FIELDS = ("model_type", "architectures", "auto_map", "quantization_config")
"""Fields of a config that speak of how the checkpoint is stored."""

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields of a config that name the type of its weights, the later name first."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_local_experts", "num_experts_per_tok", "vocab_size"),
)
"""Fields of a config that transformers takes at 0 or less, and divides by or builds nothing from."""


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

    own = {name: value for name, value in fields.items() if name not in (*STORAGE_FIELDS, *DTYPE_FIELDS)}
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
    found = next((fields[name] for name in DTYPE_FIELDS if fields.get(name) is not None), None)
    spelled = found.removeprefix("torch.") if isinstance(found, str) else found
    if spelled is None or spelled in [dtype_name(dtype) for dtype in FLOATS]:
        return spelled
    converted = listed([*map(dtype_name, FLOATS)])
    raise UserError(f"{folder / 'config.json'} says that dtype is {found!r}; only {converted} are converted")


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


def dtype_name(dtype: torch.dtype) -> str:
    """A type as configs and reports spell it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
