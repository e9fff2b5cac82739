"""The Megatron model is the transformers model: logits, loss and every gradient, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge import hf, megatron
from gpt_oss_vision.bridge.megatron import cpu
from layouts import Layout, StepResult, megatron_step, reference_step, with_labels
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

CONFIGS = {
    "vit": {},
    "square experts": {"hidden_size": 32, "intermediate_size": 32},
    "siglip, no pool token": {"vision_config": tiny_vision_config("siglip_vision_model"), "vision_pool_token": False},
    "clip, no NoPE": {"vision_config": tiny_vision_config("clip_vision_model"), "use_nope": False},
}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(ep=2),
    Layout(dp=2),
    Layout(pp=4),
    Layout(ep=4),
    Layout(etp=2),
    Layout(tp=2, etp=2),
    Layout(cp=2),
    Layout(tp=2, ep=2),
    Layout(tp=2, dp=2),
    Layout(pp=2, ep=2),
    Layout(pp=2, cp=2),
    Layout(cp=2, ep=2),
    Layout(cp=2, dp=2),
    Layout(ep=2, etp=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, vpp=2, ep=2),
    Layout(tp=2, pp=2, ep=2),
    Layout(tp=2, pp=2, ep=2, etp=2, dp=2),
    Layout(pp=2, extra={"num_layers_in_first_pipeline_stage": 1}),
    Layout(ep=2, extra={"moe_token_dispatcher_type": "allgather"}),
    Layout(tp=2, extra=RECOMPUTE),
    Layout(tp=2, extra={"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """Saves a config's model once; gives its folder, its microbatches and the step by transformers."""
    hf.register_auto_classes()
    megatron.register()
    made = {}

    def make(name: str) -> tuple[Path, list, StepResult]:
        if name not in made:
            config = tiny_config(**CONFIGS[name])
            model = tiny_model(config)
            folder = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder)
            microbatches = [
                with_labels(tiny_batch(config, images, length=40, seed=seed), config.image_token_id)
                for seed, images in enumerate([(0, 1, 2), (0, 0, 0), (2, 0, 0), (1, 1, 1)])
            ]
            made[name] = folder, microbatches, reference_step(model, microbatches)
        return made[name]

    return make


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_equals_that_of_transformers(layout: Layout, checkpoint):
    compare("vit", layout, checkpoint)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "vit"])
def test_a_step_equals_that_of_transformers_for_other_towers_and_shapes(name: str, checkpoint):
    compare(name, Layout(), checkpoint)


def compare(name: str, layout: Layout, checkpoint) -> None:
    path, microbatches, expected = checkpoint(name)
    results = cpu.run_ranks(layout.world_size, megatron_step, path, layout, microbatches)
    (found,) = [result for result in results if result is not None]
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert set(found.gradients) == set(expected.gradients)
    # A key bias of the tower shifts all scores of a query alike: its gradient is zero but for rounding.
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    errors = {
        key: relative_error(found.gradients[key], gradient, floor) for key, gradient in expected.gradients.items()
    }
    assert {key: error for key, error in errors.items() if not error <= 1e-4} == {}  # a NaN is listed too


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference in units of the largest expected value, or of ``floor`` where that is larger."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), floor)
