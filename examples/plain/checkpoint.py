"""Loading a checkpoint into model.py: `load(folder)`; names agree, so what is left to do is to unpack MXFP4.

uv run python examples/plain/checkpoint.py FOLDER  # prints what the folder holds
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from model import Config, GPTOSSVision


def load(folder: str | Path) -> GPTOSSVision:
    """The model of a checkpoint of GPT-OSS-Vision, or of a stock gpt-oss, in the stored types."""
    with torch.device("meta"):  # shapes without memory
        model = GPTOSSVision(read_config(folder))
    model.load_state_dict(read_weights(folder), strict=True, assign=True)
    return model


def read_config(folder: str | Path) -> Config:
    """The fields of config.json; raises ValueError where they ask for what model.py doesn't have."""
    raw = json.loads((Path(folder) / "config.json").read_text())
    vision = {f"vision_{name}": value for name, value in raw.get("vision_config", {}).items()}
    rope = raw.get("rope_parameters") or {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}
    raw = {"use_vision": raw["model_type"] == "gpt_oss_vision", **raw, **rope, **vision}
    windows = ["sliding_attention", "full_attention"] * raw["num_hidden_layers"]
    needed = {"rope_type": "yarn", "truncate": False, "layer_types": windows[: raw["num_hidden_layers"]]}
    if raw["use_vision"]:
        needed |= {"vision_pool_token": True, "vision_model_type": "vit", "vision_layer_norm_eps": 1e-12}
        needed |= {"vision_intermediate_size": 4 * raw["vision_hidden_size"]}
    for name, value in needed.items():
        if raw.get(name) != value:
            raise ValueError(f"model.py has {name} = {value} only; this checkpoint has {raw.get(name)}")
    return Config(**{field.name: raw[field.name] for field in fields(Config) if field.name in raw})


def read_weights(folder: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with a prefix: mapped from the files, or unpacked to bf16 where they are MXFP4."""
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    for name in [name.removesuffix("_blocks") for name in weights if name.endswith("_blocks")]:
        weights[name] = unpack_mxfp4(weights.pop(f"{name}_blocks"), weights.pop(f"{name}_scales"))
    for bias in [name for name in weights if name.endswith("router.bias")]:  # a stock gpt-oss has no vision bias
        weights.setdefault(bias.replace("bias", "vision_bias"), torch.zeros(len(weights[bias])))
    return weights


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Bytes of two values (e, rows, groups, 16) and exponents (e, rows, groups) to bf16 (e, 32 * groups, rows)."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16)
    values = torch.cat((positive, -positive))
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # (256, 2), the low half first
    powers = torch.tensor([2.0 ** (scale - 127) for scale in range(256)]).bfloat16()
    e, rows, groups, _ = blocks.shape
    unpacked = torch.empty(e, 32 * groups, rows, dtype=torch.bfloat16)
    for expert in range(e):
        bytes_of_two, power = pairs[blocks[expert].int()], powers[scales[expert].int()]
        unpacked[expert] = (bytes_of_two.flatten(2) * power[..., None]).flatten(1).T
    return unpacked


if __name__ == "__main__":
    print(load(sys.argv[1]))
