"""A tower is a row of `TOWERS`: one that is registered there alone works in transformers and in Megatron."""

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import TOWERS, Tower, build_tower, tower_config, tower_tokens
from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.mcore import cpu
from layouts import Layout, megatron_logits
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

DINOV2 = Tower(
    config=Dinov2Config,
    model="Dinov2Model",
    linears=("query", "key", "value", "dense", "fc1", "fc2"),
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)


@pytest.mark.usefixtures("path")  # which registers the model
def test_a_tower_that_is_registered_in_the_table_alone_works_on_both_sides(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(TOWERS, "dinov2", DINOV2)
    config = tiny_config(vision_config=tiny_vision_config("dinov2", mlp_ratio=2), num_hidden_layers=2)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    batch = tiny_batch(config)
    with torch.no_grad():
        expected = model(**batch).logits
        blind = model(**batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}).logits
    (found,) = cpu.run_ranks(1, megatron_logits_of, tmp_path, batch)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (blind - expected).norm() > 1e-2 * expected.norm()
    assert list(GPTOSSVisionImageProcessor.from_config(config).image_mean) == DINOV2.image_mean


def megatron_logits_of(path: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return megatron_logits(path, Layout(), batch, training=False)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_row_describes_its_tower(kind: str):
    """Names of linear layers, tokens per image, also if images are not square, and no parameter without a gradient."""
    fields = (
        tiny_vision_config(kind, image_size=[8, 16], patch_size=[4, 8]) if kind == "vit" else tiny_vision_config(kind)
    )
    config = tower_config(fields)
    tower = build_tower(config).train()
    names = {name.rpartition(".")[2] for name, module in tower.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == set(TOWERS[kind].linears)
    height, width = fields["image_size"] if kind == "vit" else (8, 8)
    output = tower(torch.randn(2, 3, height, width)).last_hidden_state
    assert output.shape == (2, tower_tokens(config), 16)
    output.square().sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == []
