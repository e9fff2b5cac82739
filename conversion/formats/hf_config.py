"""Looking at a checkpoint folder before anything is built from it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ...errors import UserError

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
