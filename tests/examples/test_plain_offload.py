"""examples/plain/offload.py: the whole model's logits bit for bit, within the memory of two and a half layers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import offload
from gpt_oss_vision.bridge.ops import mxfp4
from tiny import tiny_batch, tiny_config, tiny_model

SCRIPT = Path(__file__).parents[2] / "examples/plain/offload.py"


def pack_experts(folder: Path) -> None:
    """Store the experts of a checkpoint in MXFP4, as gpt-oss does."""
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        packed = mxfp4.quantize(weights.pop(name).transpose(1, 2).contiguous())
        weights |= {name + part: tensor.contiguous() for part, tensor in zip(mxfp4.MXFP4_PARTS, packed, strict=True)}
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("packed", [False, True])
def test_it_equals_the_whole_model_bit_for_bit(packed, tmp_path):
    config = tiny_config(num_hidden_layers=11, intermediate_size=64)  # two digits in the numbers of layers
    tiny_model(config).bfloat16().save_pretrained(tmp_path)
    if packed:
        pack_experts(tmp_path)
    batch, one_by_one = tiny_batch(config), offload.load(tmp_path)
    with torch.no_grad():
        expected = checkpoint.load(tmp_path)(**batch)
        assert torch.equal(one_by_one(**batch), expected)
        cache = {}
        steps = [one_by_one(batch["input_ids"][:, :39], batch["pixel_values"], cache=cache)]
        steps.append(one_by_one(batch["input_ids"][:, 39:], cache=cache))
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=0.05, atol=0.05)
    assert {parameter.device.type for parameter in one_by_one.parameters()} == {"meta"}


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=True).stdout


def test_two_and_a_half_layers_of_anonymous_memory_are_enough(tmp_path):
    """The tiny checkpoint shows what the process needs without weights."""
    folders = [tmp_path / "tiny", tmp_path / "large"]
    layer = 0
    for folder, size in zip(folders, (64, 512), strict=True):
        config = tiny_config(hidden_size=size, intermediate_size=size, num_local_experts=16, num_hidden_layers=4)
        model = tiny_model(config).bfloat16()
        model.save_pretrained(folder)
        pack_experts(folder)
        layer = sum(2 * parameter.numel() for parameter in model.model.layers[0].parameters())
    peaks = []
    for folder in folders:
        last = run(str(folder), "3", "1", "4").splitlines()[-1]
        peaks.append(float(re.fullmatch(r"[\d.]+ s, at most ([\d.]+) GiB of anonymous memory", last)[1]) * 2**30)
    assert layer > 24e6
    assert 0.5 * layer < peaks[1] - peaks[0] < 2.5 * layer
