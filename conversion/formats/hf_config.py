"""The config of a Hugging Face checkpoint and the list of its weight files, checked before a model is built."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ...errors import UserError
from ..dtypes import FLOATS, dtype_name
from ..messages import listed

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

MODEL_TYPE = "gpt_oss_vision"  # not from the config class: a refusal should not wait for the import of transformers
TEXT_MODEL_TYPE = "gpt_oss"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTERS = "adapter_config.json"

COPIED_JSON = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json"),
)
"""JSON files that conversions copy."""

STORAGE_FIELDS = ("model_type", "architectures", "auto_map", "quantization_config")
"""Fields of a config that describe the checkpoint's files, not the model."""

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields of a config that name the type of the weights, the newer name first."""

COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_local_experts", "num_experts_per_tok", "vocab_size"),
)
"""Sizes in a config that must be at least 1; transformers does not check them."""


def check_checkpoint(folder: Path) -> None:
    """Refuse a folder that does not hold a complete GPT-OSS-Vision checkpoint; only headers are read.

    Raises:
        FileNotFoundError: the folder, its config, its weights or a shard that the index names does not exist.
        ValueError: the config is of another architecture, or a weight file is cut off or damaged.
    """
    model_type = config_fields(folder).get("model_type")
    if model_type != MODEL_TYPE:
        raise UserError(f"{folder} is a checkpoint of {model_type!r}, not of {MODEL_TYPE!r}")
    for file in weight_files(folder):
        check_safetensors(file)


def config_fields(folder: Path, kind: str = "Hugging Face") -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json.

    Args:
        folder: of the checkpoint.
        kind: name of its format, for the error message.

    Raises:
        FileNotFoundError: the folder does not exist, or has no config.json.
        ValueError: the config is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the folder of a {kind} checkpoint")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name the folder of a {kind} checkpoint")
    return read_json(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads for a checkpoint: one, or those that its index names.

    Raises:
        FileNotFoundError: there is none, or one of them is missing.
        ValueError: the index is damaged, or there are two models in the folder.
    """
    if name := config_fields(folder).get("transformers_weights"):
        raise UserError(f"{folder}/config.json says transformers_weights={name}; only {ONE_FILE} or {INDEX} is read")
    files = sorted(set(indexed_files(folder).values()))
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint again")
    return files or [_only_file(folder)]


def indexed_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor from a checkpoint's index.

    Empty if it has no index, or one that a later `save_pretrained` of a single file has left without its shards.

    Raises:
        ValueError: the index is damaged, or there are both a single file and shards. transformers loads the single
            file, also where `save_pretrained` has written the shards later.
    """
    index, single = folder / INDEX, folder / ONE_FILE
    if not index.is_file():
        return {}
    found = read_json(index).get("weight_map")
    if not found or not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map that gives a file for each tensor; copy it again")
    outside = [name for name in found.values() if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(f"{index} names {outside[0]} in place of a file in the folder; copy the checkpoint again")
    files = {tensor: folder / name for tensor, name in found.items()}
    shards = sorted({file for file in files.values() if file != single and file.is_file()})
    if single.is_file() and shards:
        shard = shards[0].relative_to(folder)
        raise UserError(f"{folder} holds two models, {ONE_FILE} and {shard} with its index; move one of them away")
    return {} if single.is_file() and single not in files.values() else files


def _only_file(folder: Path) -> Path:
    file = folder / ONE_FILE
    if file.is_file():
        return file
    if any(folder.glob("model-*-of-*.safetensors")):
        raise FileNotFoundError(f"{folder} holds shards without {INDEX}, which says what is in them; copy that too")
    if pickled := sorted(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} has its weights in {pickled[0].name}; save them as safetensors first")
    raise FileNotFoundError(f"{folder} lacks {file.name}; copy the checkpoint again")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: the file is not JSON, or holds another type than an object.
    """
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__} in place of an object {{...}}; copy it again")
    return found


def check_json_files(folder: Path) -> None:
    """Refuse a folder in which one of `COPIED_JSON` is damaged: it would be copied, and fail where the copy is used.

    Raises:
        ValueError: a file is not JSON.
    """
    for name in COPIED_JSON:
        if (folder / name).is_file():
            read_json(folder / name)


def check_safetensors(file: Path) -> None:
    """Refuse a safetensors file whose length does not match its header.

    Raises:
        PermissionError: it cannot be read.
        ValueError: its header is damaged, or the file has another length than the header gives.
    """
    file.open("rb").close()  # safetensors reports a file without read permission as missing
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{file} is cut off or damaged ({error}); copy it again") from error


def read_config(folder: Path) -> "GPTOSSVisionConfig":
    """Read the config of a checkpoint; its ``name_or_path`` is the folder.

    A stock gpt-oss gives the config of a model without vision.

    Raises:
        FileNotFoundError: the folder or its config.json does not exist.
        ValueError: it is of another architecture, or no model can be built from it.
    """
    fields = config_fields(folder)
    model_type = fields.get("model_type")
    if model_type not in (MODEL_TYPE, TEXT_MODEL_TYPE):
        raise UserError(f"{folder} is a checkpoint of {model_type!r}, not of {MODEL_TYPE!r} or {TEXT_MODEL_TYPE!r}")
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

    _check_rotary(folder / "config.json", fields)
    own = {name: value for name, value in fields.items() if name not in (*STORAGE_FIELDS, *DTYPE_FIELDS)}
    own |= {"dtype": _dtype_in(folder, fields), "name_or_path": str(folder)}
    if model_type == TEXT_MODEL_TYPE:
        own["use_vision"] = False
    with buildable(folder / "config.json"):
        counts = {name: fields[name] for name in COUNTS if isinstance(fields.get(name), int)}
        if wrong := [f"{name} is {count}" for name, count in counts.items() if count < 1]:
            raise ValueError(f"{listed(wrong)}, not at least 1")
        return GPTOSSVisionConfig.from_dict(own)


def _check_rotary(file: Path, fields: dict[str, Any]) -> None:
    """Refuse two sets of rotary parameters that differ: some programs read one, others the other."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if not isinstance(new, dict) or not isinstance(old, dict):
        return
    old = {"rope_theta": fields.get("rope_theta")} | old
    if differing := [name for name in sorted(new.keys() & old.keys()) if new[name] != old[name]]:
        name = differing[0]
        raise UserError(
            f"{file} has rope_parameters with {name}={new[name]!r} and rope_scaling with {old[name]!r}; correct one"
        )


def _dtype_in(folder: Path, fields: dict[str, Any]) -> str | None:
    """Return the name of the weights' type in a config, or None."""
    found = next((fields[name] for name in DTYPE_FIELDS if fields.get(name) is not None), None)
    spelled = found.removeprefix("torch.") if isinstance(found, str) else found
    names = [dtype_name(dtype) for dtype in FLOATS.values()]
    if spelled is None or spelled in names:
        return spelled
    raise UserError(f"{folder / 'config.json'} says dtype {found!r}; only {listed(names)} can be converted")


@contextmanager
def buildable(file: Path) -> Iterator[None]:
    """Turn what transformers raises while it builds from a config into a `UserError`: it checks few values, and late.

    Raises:
        ValueError: naming the file and the cause.
    """
    try:
        yield
    except Exception as error:  # any of a dozen types, for values that the user can correct
        cause = error.__cause__ or error
        kind = "" if isinstance(cause, ValueError) else f"{type(cause).__name__}: "
        said = kind + " ".join(str(cause).split())
        raise UserError(
            f"{file} describes a model that cannot be built ({said}); correct it, or copy it again"
        ) from error
