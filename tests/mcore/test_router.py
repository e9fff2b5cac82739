"""The router's losses and counts follow from transformers' logits at every layout, and its dtype can be set."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func

from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import (
    GPTOSSVisionForCausalLM,
    load_balancing_loss_per_modality,
)
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.provider import provider_from_config
from gpt_oss_vision.bridge.mcore.router_statistics import entropy, overlap, pop_expert_counts
from layouts import Layout
from tiny import tiny_batch, tiny_config, tiny_model

CONFIG = tiny_config()
EXPERTS, TOP_K, LAYERS = CONFIG.num_local_experts, CONFIG.num_experts_per_tok, CONFIG.num_hidden_layers
COEFFICIENT = 0.3


@pytest.fixture(scope="module")
def reference() -> GPTOSSVisionForCausalLM:
    return tiny_model(CONFIG)


def batch(images: tuple[int, ...] = (0, 1, 2)) -> dict[str, torch.Tensor]:
    return tiny_batch(CONFIG, images, length=40)


def reference_logits(model: GPTOSSVisionForCausalLM, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Router logits ``[t, experts]`` per layer; the tokens are those of ``[b, s]``, flattened."""
    logits: list[torch.Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda module, args, out: logits.append(out[0]))
        for layer in model.model.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return logits


def balance(logits: torch.Tensor, is_visual: torch.Tensor, per_modality: bool) -> torch.Tensor:
    """A layer's loss by transformers, which sums over the `TOP_K` choices; Megatron takes their mean."""
    if per_modality:
        return load_balancing_loss_per_modality((logits,), TOP_K, is_visual, torch.ones_like(is_visual)) / TOP_K
    return load_balancing_loss_func((logits,), EXPERTS, TOP_K) / TOP_K


def build(path: Path, layout: Layout) -> list[torch.nn.Module]:
    from megatron.bridge import AutoBridge

    torch.distributed.init_process_group("gloo")
    provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
    layout.apply(provider)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    return provider.provide_distributed_model(wrap_with_ddp=False)


def balanced_step(path: Path, layout: Layout, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """Loss of each layer, gradients of the routers' weights by layer, counts: each summed over the ranks."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    model = build(path, layout)

    def step(data: Any, chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        optional = {name: inputs.get(name) for name in ("pixel_values", "padding_mask")}
        output = chunk(next(data)["input_ids"], None, None, **optional)
        # Nothing but the loss of the routers has a gradient.
        return output, lambda logits: (0.0 * logits.sum(), {})

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([inputs]),
        model=model,
        num_microbatches=1,
        micro_batch_size=len(inputs["input_ids"]),
        seq_length=inputs["input_ids"].shape[1],
        forward_only=False,
    )
    losses, gradients = torch.zeros(LAYERS), torch.zeros(LAYERS, EXPERTS, CONFIG.hidden_size)
    losses += get_moe_metrics_tracker().metrics["load_balancing_loss"].values
    for layer in model[0].decoder.layers:
        gradients[layer.layer_number - 1] = layer.mlp.router.weight.grad
    for tensor in (losses, gradients):
        torch.distributed.all_reduce(tensor)
    # The schedule multiplies the part of each context-parallel rank by cp, because data parallelism takes the mean.
    gradients /= parallel_state.get_context_parallel_world_size()
    return losses, gradients, pop_expert_counts(model, LAYERS, EXPERTS)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
AUX = {"moe_aux_loss_coeff": COEFFICIENT, "calculate_per_token_loss": False}
LAYOUTS = [{}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"tp": 2, "ep": 2, "extra": FULL}]


@pytest.mark.parametrize("kind", ["aux_loss", "modality_aux_loss"])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: str(Layout(**sizes)))
def test_loss_gradient_and_counts_are_those_of_transformers(
    sizes: dict, kind: str, path: Path, reference: GPTOSSVisionForCausalLM
):
    inputs = batch()
    layout = Layout(**sizes | {"extra": sizes.get("extra", {}) | AUX | {"moe_router_load_balancing_type": kind}})
    losses, gradients, counts = cpu.run_ranks(layout.world_size, balanced_step, path, layout, inputs)[0]

    is_visual = (inputs["input_ids"] == CONFIG.image_token_id).flatten()
    logits = reference_logits(reference, inputs)
    expected = [balance(layer, is_visual, kind == "modality_aux_loss") for layer in logits]
    reference.zero_grad()
    (COEFFICIENT * sum(expected)).backward()
    assert losses.tolist() == pytest.approx([float(loss.detach()) for loss in expected], rel=1e-5)
    for index, layer in enumerate(reference.model.layers):
        wanted = layer.mlp.router.weight.grad
        torch.testing.assert_close(gradients[index], wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        chosen = torch.nn.functional.one_hot(logits[index].topk(TOP_K).indices, EXPERTS).sum(1)
        assert counts[index].tolist() == [chosen[~is_visual].sum(0).tolist(), chosen[is_visual].sum(0).tolist()]


@pytest.mark.parametrize("kind", ["aux_loss", "modality_aux_loss"])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"cp": 2}], ids=lambda sizes: str(Layout(**sizes)))
def test_padding_is_left_out_of_losses_and_counts(
    sizes: dict, kind: str, path: Path, reference: GPTOSSVisionForCausalLM
):
    """`padding_mask`, as verl passes it."""
    inputs = batch()
    is_padding = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    is_padding[0, 30:], is_padding[1, 36:] = True, True
    layout = Layout(**sizes | {"extra": AUX | {"moe_router_load_balancing_type": kind}})
    given = inputs | {"padding_mask": is_padding}
    losses, _, counts = cpu.run_ranks(layout.world_size, balanced_step, path, layout, given)[0]
    is_token = ~is_padding.flatten()
    is_visual = (inputs["input_ids"] == CONFIG.image_token_id).flatten()[is_token]
    logits = [layer[is_token] for layer in reference_logits(reference, inputs)]
    expected = [float(balance(layer, is_visual, kind == "modality_aux_loss").detach()) for layer in logits]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    for index, layer in enumerate(logits):
        chosen = torch.nn.functional.one_hot(layer.topk(TOP_K).indices, EXPERTS).sum(1)
        assert counts[index].tolist() == [chosen[~is_visual].sum(0).tolist(), chosen[is_visual].sum(0).tolist()]


def logits_with(path: Path, given: dict[str, torch.Tensor]) -> torch.Tensor:
    (model,) = build(path, Layout())
    return model(batch()["input_ids"], None, None, pixel_values=batch()["pixel_values"], **given).detach()


def test_a_padding_mask_changes_no_logits_and_must_fit_the_ids(path: Path):
    (plain,) = cpu.run_ranks(1, logits_with, path, {})
    is_padding = torch.zeros(3, 40, dtype=torch.bool)
    is_padding[:, 30:] = True
    (masked,) = cpu.run_ranks(1, logits_with, path, {"padding_mask": is_padding})
    assert torch.equal(masked, plain)
    with pytest.raises(Exception, match=r"padding_mask \[3, 20\] is not of the shape of input_ids \[3, 40\]"):
        cpu.run_ranks(1, logits_with, path, {"padding_mask": is_padding[:, :20]})


def recorded_and_replayed(path: Path, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Experts chosen by a model, logits when another one replays them, and when it chooses itself."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    (model,) = build(path, Layout(extra={"moe_enable_routing_replay": True}))

    def logits() -> torch.Tensor:
        return model(inputs["input_ids"], None, None, pixel_values=inputs["pixel_values"]).detach()

    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    first = logits()
    chosen = RouterReplay.get_recorded_data()
    for parameter in (layer.mlp.router.vision_bias for layer in model.decoder.layers):
        parameter.data.neg_()  # the experts of images would now be others
    RouterReplay.set_replay_data(chosen)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    replayed = logits()
    RouterReplay.clear_global_router_replay_action()
    return torch.stack(chosen), first, replayed, logits()


def test_router_replay_keeps_the_choice_with_the_vision_bias(path: Path, reference: GPTOSSVisionForCausalLM):
    """What is recorded are the experts chosen with the bias; replayed, they are taken whatever the bias is by then."""
    inputs = batch()
    ((chosen, first, replayed, own),) = cpu.run_ranks(1, recorded_and_replayed, path, inputs)
    of_transformers = torch.stack([layer.topk(TOP_K).indices for layer in reference_logits(reference, inputs)])
    by_row = of_transformers.view(LAYERS, 3, 40, TOP_K).transpose(1, 2).flatten(1, 2)  # Megatron's tokens are [s, b]
    assert torch.equal(chosen.sort(-1).values, by_row.sort(-1).values)
    assert not torch.equal(replayed, own)
    assert (replayed - first).abs().max() < (own - first).abs().max()


def test_the_balance_per_modality_of_text_alone_is_the_plain_one(path: Path, reference: GPTOSSVisionForCausalLM):
    inputs = batch((0, 0, 0))
    extra = AUX | {"moe_router_load_balancing_type": "modality_aux_loss"}
    ((losses, gradients, _),) = cpu.run_ranks(1, balanced_step, path, Layout(extra=extra), inputs)
    no_image = torch.zeros(inputs["input_ids"].numel(), dtype=torch.bool)
    expected = [float(balance(layer, no_image, False).detach()) for layer in reference_logits(reference, inputs)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    assert gradients.isfinite().all()


def test_entropy_and_overlap_of_counts():
    counts = torch.tensor([[[2, 2, 0, 0], [0, 0, 5, 0]], [[1, 1, 1, 1], [3, 1, 0, 0]]])
    assert entropy(counts)[:, 0].tolist() == pytest.approx([math.log(2), math.log(4)])
    assert overlap(counts).tolist() == pytest.approx([0.0, 0.5])


def router_logits(path: Path, router_dtype: str | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Logits of the first router in a bf16 model, the same logits in fp64, and the dtype of the vision bias."""
    (model,) = build(
        path, Layout(extra={"moe_router_dtype": router_dtype, "bf16": True, "params_dtype": torch.bfloat16})
    )
    router, kept = model.module.decoder.layers[0].mlp.router, []
    router.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    route = router.routing
    router.routing = lambda logits, **masks: kept.append(logits) or route(logits, **masks)
    model(batch()["input_ids"], None, None, pixel_values=batch()["pixel_values"])
    hidden_states, logits = kept
    exact = hidden_states.double() @ router.weight.double().T + router.bias.double()
    return logits.detach(), exact.detach(), str(router.vision_bias.dtype)


@pytest.mark.parametrize(("router_dtype", "expected"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_router_logits_of_a_bf16_model_may_be_fp32(router_dtype: str | None, expected: torch.dtype, path: Path):
    ((logits, exact, bias_dtype),) = cpu.run_ranks(1, router_logits, path, router_dtype)
    assert logits.dtype == expected
    assert bias_dtype == "torch.float32"
    error = float((logits - exact).abs().max() / exact.abs().max())
    assert error < 1e-5 if expected == torch.float32 else 1e-4 < error < 1e-2


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss"},
            "moe_aux_loss_coeff=0.01 would be",
        ),
        ({"moe_z_loss_coeff": 0.001}, "moe_z_loss_coeff=0.001 would be multiplied"),
        ({"moe_router_load_balancing_type": "modality_aux"}, "'modality_aux' is not supported; it is one of none, aux"),
        ({"moe_router_load_balancing_type": ["modality_aux_loss"], "moe_aux_loss_coeff": [0.01]}, "is not combined"),
        ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff=0.01 has no effect"),
        ({"moe_router_load_balancing_type": "modality_aux_loss"}, "needs moe_aux_loss_coeff above 0, got 0"),
    ],
)
def test_a_loss_of_the_router_with_another_weight_than_given_is_refused(fields: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence), cpu.runtime():
        provider_from_config(CONFIG, **fields).finalize()


@pytest.mark.parametrize(("per_modality", "kind"), [(False, "aux_loss"), (True, "modality_aux_loss")])
def test_a_balancing_loss_in_the_config_is_set_in_megatron(per_modality: bool, kind: str):
    config = tiny_config(router_aux_loss_coef=0.01, router_aux_loss_per_modality=per_modality)
    provider = provider_from_config(config)
    with cpu.runtime():
        provider.finalize()
    assert (provider.moe_router_load_balancing_type, provider.moe_aux_loss_coeff) == (kind, 0.01)
