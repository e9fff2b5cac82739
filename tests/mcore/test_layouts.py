"""The Megatron model equals the transformers model at every parallel layout: logits, all gradients, five steps."""

from functools import partial
from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge import hf, mcore
from gpt_oss_vision.bridge.mcore import cpu
from layouts import Layout, Microbatch, Run, megatron_logits, megatron_run, reference_run, with_labels
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

STEPS = 5
# Images per row of the four microbatches of a step. The second and the fourth have none, so that under data parallelism
# whole ranks have none, and under pipelining text and images take turns. The last step has none at all.
MIXED = [(0, 1, 2), (0, 0, 0), (2, 0, 1), (0, 0, 0)]
IMAGES = [*(STEPS - 1) * [MIXED], 4 * [(0, 0, 0)]]

# Four key/value groups, which TP4, and TP2 with CP2, divide.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS = {
    "vit": HEADS,
    "square experts": {"hidden_size": 32, "intermediate_size": 32},
    "siglip, no pool token": {"vision_config": tiny_vision_config("siglip_vision_model"), "vision_pool_token": False},
    "clip, no NoPE": {"vision_config": tiny_vision_config("clip_vision_model"), "use_nope": False},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe", "core_attn"]}
PLAIN_DDP = {"use_distributed_optimizer": False}
OVERLAPPED = {"overlap_grad_reduce": True}
LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=4),
    Layout(pp=2),
    Layout(pp=4),
    Layout(ep=2),
    Layout(ep=4),
    Layout(etp=2),
    Layout(cp=2),
    Layout(cp=4),
    Layout(dp=2),
    Layout(dp=2, ddp=PLAIN_DDP),
    Layout(dp=2, ddp=OVERLAPPED),
    Layout(dp=4, ddp=OVERLAPPED | PLAIN_DDP),
    Layout(tp=2, pp=2, dp=2, ddp=OVERLAPPED | {"overlap_param_gather": True}),
    Layout(tp=2, pp=2),
    Layout(tp=2, ep=2),
    Layout(tp=2, etp=2),
    Layout(tp=2, cp=2),
    Layout(tp=2, dp=2),
    Layout(pp=2, ep=2),
    Layout(pp=2, cp=2),
    Layout(pp=2, dp=2),
    Layout(cp=2, ep=2),
    Layout(tp=2, ep=4),
    Layout(tp=2, cp=2, ep=4),
    Layout(cp=2, dp=2),
    Layout(ep=2, etp=2),
    Layout(pp=2, vpp=2),
    Layout(pp=2, vpp=2, ep=2),
    Layout(pp=2, vpp=2, tp=2, dp=2),
    Layout(tp=2, pp=2, ep=2),
    Layout(tp=2, pp=2, cp=2),
    Layout(tp=2, pp=2, ep=2, etp=2, dp=2),
    Layout(pp=2, extra={"num_layers_in_first_pipeline_stage": 1}),
    Layout(pp=2, tp=2, extra={"num_layers_in_last_pipeline_stage": 1}),
    Layout(pp=2, dp=2, extra={"pipeline_model_parallel_layout": "Et|tttL"}),
    Layout(pp=2, vpp=2, ep=2, extra={"pipeline_model_parallel_layout": "E|tt|t|tL"}),
    Layout(ep=2, extra={"moe_token_dispatcher_type": "allgather"}),
    Layout(tp=2, extra=FULL),
    Layout(pp=2, vpp=2, extra=FULL),
    Layout(pp=2, ep=2, extra=SELECTIVE),
    Layout(cp=2, tp=2, extra=SELECTIVE),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """A function that saves a config's model once; returns its folder, the steps' microbatches, transformers' run."""
    hf.register_auto_classes()
    mcore.register()
    made = {}

    def make(name: str) -> tuple[Path, list[list[Microbatch]], Run]:
        if name not in made:
            config = tiny_config(**CONFIGS[name])
            model = tiny_model(config)
            folder = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder)
            steps = [
                [
                    with_labels(tiny_batch(config, images, length=40, seed=10 * step + place), config.image_token_id)
                    for place, images in enumerate(microbatches)
                ]
                for step, microbatches in enumerate(IMAGES)
            ]
            made[name] = folder, steps, reference_run(model, steps)
        return made[name]

    return make


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_five_steps_equal_those_of_transformers(layout: Layout, checkpoint):
    compare("vit", layout, checkpoint)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "vit"])
def test_five_steps_equal_those_of_transformers_for_other_towers_and_shapes(name: str, checkpoint):
    compare(name, Layout(), checkpoint)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_without_sequence_parallelism_tensor_parallelism_infers_and_megatron_core_refuses_to_train(
    training: bool, checkpoint
):
    path, ((batch, *_), *_), expected = checkpoint("vit")
    call = partial(cpu.run_ranks, 2, partial(megatron_logits, training=training, sequence_parallel=False))
    if training:
        with pytest.raises(ValueError, match="MoE and tensor parallelism"):
            call(path, Layout(tp=2), batch)
        return
    for logits in call(path, Layout(tp=2), batch):
        assert relative_error(logits, expected.logits[0]) < 1e-5


def compare(name: str, layout: Layout, checkpoint) -> None:
    path, steps, expected = checkpoint(name)
    results = cpu.run_ranks(layout.world_size, megatron_run, path, layout, steps)
    (found,) = [result for result in results if result is not None]
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert relative_error(ours, theirs) < 1e-5
    assert set(found.gradients) == set(expected.gradients)
    # A key bias of the tower shifts all scores of a query alike: its gradient is zero except for rounding.
    floor = 1e-4 * max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    errors = {
        key: relative_error(found.gradients[key], gradient, floor) for key, gradient in expected.gradients.items()
    }
    assert {key: error for key, error in errors.items() if not error <= 1e-4} == {}  # a NaN is listed too
    # fp32 has seven digits; on these batches rounding changes no router's choice of experts.
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest difference in units of the largest expected value, or of ``floor`` where that is larger."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), floor)
