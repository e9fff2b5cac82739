"""Looking at a checkpoint folder before anything is built from it."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

MODEL_TYPE = "gpt_oss_vision"  # the config class has it too, but a refusal should not wait for transformers


def check_checkpoint(folder: Path) -> None:
    """Whether a folder holds a whole GPT-OSS-Vision checkpoint; reads headers only.

    Raises:
        FileNotFoundError: no config, no weights, or a shard that the index names is not there.
        ValueError: the config is of another architecture, or a weight file is cut off or damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name the folder of a Hugging Face checkpoint")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(f"{folder} is a checkpoint of {model_type!r}, not of {MODEL_TYPE!r}")
    for file in weight_files(folder):
        check_safetensors(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        FileNotFoundError: when there is none, or one of them is missing.
    """
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index).get("weight_map", {}).values())) if index.is_file() else []
    files = [folder / name for name in names or ["model.safetensors"]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; copy the checkpoint again")
    return files


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: when it holds something else.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error


def check_safetensors(file: Path) -> None:
    """Whether a safetensors file is whole, as far as its header tells.

    Raises:
        ValueError: its header is damaged, or promises another length than the file has.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off or damaged ({error}); copy it again") from error
