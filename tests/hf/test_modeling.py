"""The model against the fp64 oracle and against gpt-oss, its gradients, and its refusals."""

import copy
import math

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding, load_balancing_loss_func

import oracle
from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf_attention import register_attention
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

TOWERS = ["vit", "clip_vision_model", "siglip_vision_model"]
VARIANTS = {
    **{tower: {"vision_config": tiny_vision_config(tower)} for tower in TOWERS},
    "no pool token": {"vision_pool_token": False},
    "grey images": {"vision_num_channels": 1},
    "NoPE on a sliding layer": {"nope_stride": 3},
    "NoPE everywhere": {"nope_stride": 1},
    "no NoPE": {"use_nope": False},
    "plain rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "one expert": {"num_experts_per_tok": 1},
    "no groups": {"num_key_value_heads": 4},
    "square": {"intermediate_size": 32},
    "another clamp": {"swiglu_limit": 3.0},
}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def is_idle(name: str) -> bool:
    """A tower's key bias changes no output: it adds the same to all scores of a query, without a sink or rotation."""
    return ".vit." in name and name.endswith("k_proj.bias")


def text_fields(config: GPTOSSVisionConfig) -> dict:
    names = GptOssConfig(num_hidden_layers=1).to_dict().keys() - {"model_type", "transformers_version", "id2label"}
    return {name: getattr(config, name) for name in names if name not in ("label2id", "architectures")}


def gpt_oss_of(model: GPTOSSVisionForCausalLM) -> GptOssForCausalLM:
    """The stock model with the same text weights."""
    twin = GptOssForCausalLM(GptOssConfig(**copy.deepcopy(text_fields(model.config)))).to(model.dtype).eval()
    result = twin.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    return twin


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_oracle(variant):
    config = tiny_config(**VARIANTS[variant])
    model, batch = tiny_model(config), tiny_batch(config)
    reference = oracle.forward(model.state_dict(), config.to_dict(), **batch)
    with torch.no_grad():
        assert relative_error(model(**batch).logits, reference) < 1e-5
        model.set_experts_implementation("eager")  # grouped matrix products do not support fp64
        assert relative_error(model.double()(**batch).logits, reference) < 3e-6


def test_logits_equal_the_oracle_past_the_real_window():
    config = tiny_config(sliding_window=128)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(2, 0), length=300)
    reference = oracle.forward(model.state_dict(), config.to_dict(), **batch)
    with torch.no_grad():
        assert relative_error(model(**batch).logits, reference) < 1e-5


def test_every_parameter_matters_to_the_oracle():
    """Otherwise the comparison above would not detect that the model ignores the parameter."""
    config = tiny_config()
    weights, batch = tiny_model(config).state_dict(), tiny_batch(config)
    reference = oracle.forward(weights, config.to_dict(), **batch)
    for name, weight in weights.items():
        changed = oracle.forward(weights | {name: torch.zeros_like(weight)}, config.to_dict(), **batch)
        assert is_idle(name) or relative_error(changed, reference) > 1e-4, name


def test_yarn_equals_the_oracle_past_the_original_context():
    config = GPTOSSVisionConfig(num_hidden_layers=1)
    positions = torch.tensor([0, 1, 127, 128, 4095, 4096, 10_000, 131_071])
    cos, sin = GptOssRotaryEmbedding(config)(torch.zeros(1), positions[None])
    expected_cos, expected_sin = oracle.rotation(config.to_dict(), 131_072)
    concentration = 0.1 * math.log(32) + 1
    assert expected_cos[0, 0].item() == pytest.approx(concentration)
    # An angle of 131,071 has an error of 0.008 in fp32, so the comparison is at the accuracy of the angle.
    tolerance = 1e-6 + positions[:, None] * 1e-7
    assert ((cos[0].double() - expected_cos[positions]).abs() < tolerance).all()
    assert ((sin[0].double() - expected_sin[positions]).abs() < tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_vision", [False, True])
def test_on_text_the_model_is_gpt_oss_bit_for_bit(dtype, use_vision):
    config = tiny_config(use_vision=use_vision, use_nope=False)
    model = tiny_model(config).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.vision_bias.zero_()
    input_ids = tiny_batch(config, images_per_row=(0, 0))["input_ids"]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :5] = 0
    with torch.no_grad():
        ours = model(input_ids, attention_mask=attention_mask, labels=input_ids)
        stock = gpt_oss_of(model)(input_ids, attention_mask=attention_mask, labels=input_ids)
    assert torch.equal(ours.logits, stock.logits)
    assert torch.equal(ours.loss, stock.loss)


def test_without_vision_the_placeholder_is_an_ordinary_token():
    config = tiny_config(use_vision=False, use_nope=False)
    model = tiny_model(config)
    input_ids = tiny_batch(config, images_per_row=(1,))["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, gpt_oss_of(model)(input_ids).logits)


def test_embeddings_in_place_of_ids_give_the_same_logits():
    config = tiny_config()
    model, batch = tiny_model(config), tiny_batch(config)
    with torch.no_grad():
        inputs_embeds = model.get_input_embeddings()(batch["input_ids"])
        from_embeds = model(inputs_embeds=inputs_embeds, pixel_values=batch["pixel_values"]).logits
        assert torch.equal(from_embeds, model(**batch).logits)


def with_features(model: GPTOSSVisionForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with image features in `inputs_embeds`, in place of ids and pixels."""
    is_visual = batch["input_ids"] == model.config.image_token_id
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    inputs_embeds = model.get_input_embeddings()(batch["input_ids"])
    return {"inputs_embeds": inputs_embeds.masked_scatter(is_visual[..., None], features), "is_visual": is_visual}


def test_features_in_embeddings_give_the_same_logits_where_is_visual_names_them():
    config = tiny_config(router_aux_loss_coef=0.5, router_aux_loss_per_modality=True)
    model, batch = tiny_model(config), tiny_batch(config)
    with torch.no_grad():
        embedded, labels = with_features(model, batch), {"labels": batch["input_ids"], "output_router_logits": True}
        expected, found = model(**batch, **labels), model(**embedded, **labels)
        unnamed = model(inputs_embeds=embedded["inputs_embeds"], **labels)
    for name in ("logits", "loss", "aux_loss"):
        assert torch.equal(found[name], expected[name]), name
        assert not torch.equal(unnamed[name], expected[name]), name


@pytest.mark.parametrize(
    "inputs", [{"input_ids": torch.ones(1, 4, dtype=torch.long)}, {"inputs_embeds": torch.ones(1, 5, 32)}]
)
def test_is_visual_must_fit_embeddings(inputs):
    with pytest.raises(ValueError, match=r"^is_visual \(1, 4\) must be \(b, s\) of inputs_embeds, got "):
        tiny_model()(**inputs, is_visual=torch.zeros(1, 4, dtype=torch.bool))


@pytest.mark.parametrize("attention", ["eager", "sink_sdpa"])
def test_samples_packed_into_one_row_are_samples_apart(attention):
    register_attention()
    config = tiny_config()
    model = tiny_model(config)
    model.set_attn_implementation(attention)
    samples = [tiny_batch(config, images_per_row=(images,), length=20, seed=images) for images in (1, 0, 2)]
    packed = {
        "input_ids": torch.cat([sample["input_ids"] for sample in samples], dim=1),
        "position_ids": torch.arange(20).repeat(3)[None],
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample]),
    }
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits.split(20, dim=1)
        for ours, sample in zip(together, samples, strict=True):
            torch.testing.assert_close(ours, model(**sample).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_of_the_row_alone(side):
    config = tiny_config()
    model, row = tiny_model(config), tiny_batch(config, images_per_row=(1,), length=30)
    padding = torch.zeros(1, 10, dtype=torch.long)
    parts = {"input_ids": (padding + config.pad_token_id, row["input_ids"])}
    parts["attention_mask"] = (padding, torch.ones_like(row["input_ids"]))
    order = slice(None) if side == "left" else slice(None, None, -1)
    padded = {name: torch.cat(both[order], dim=1) for name, both in parts.items()}
    with torch.no_grad():
        found = model(**padded, pixel_values=row["pixel_values"]).logits
        expected = model(**row).logits
    torch.testing.assert_close(found[:, 10:] if side == "left" else found[:, :30], expected, rtol=1e-4, atol=1e-5)


def test_image_features_have_a_token_for_each_placeholder():
    config = tiny_config()
    outputs = tiny_model(config).get_image_features(torch.zeros(2, 3, 8, 8))
    assert outputs.pooler_output.shape == (2, config.num_image_tokens, config.hidden_size)
    assert outputs.last_hidden_state.shape == (2, config.num_image_tokens - 1, config.vision_embed_dim)


@pytest.mark.parametrize("mode", [False, True])
def test_the_tower_does_not_run_on_text_at_inference(mode):
    config = tiny_config()
    model = tiny_model(config).train(mode)
    model.model.vision_adapter.forward = None  # calling it would fail
    with torch.no_grad():
        model(**tiny_batch(config, images_per_row=(0,)))


def test_optional_outputs_are_recorded():
    config = tiny_config()
    model, batch = tiny_model(config), tiny_batch(config)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert len(outputs.attentions) == len(outputs.router_logits) == config.num_hidden_layers
    assert outputs.router_logits[0].shape == (batch["input_ids"].numel(), config.num_local_experts)
    assert isinstance(model(**batch, return_dict=False), tuple)


def test_recorded_router_logits_include_the_vision_bias():
    config = tiny_config()
    model, batch = tiny_model(config), tiny_batch(config)
    biased = model(**batch, output_router_logits=True).router_logits[0]
    bias = model.model.layers[0].mlp.router.vision_bias
    with torch.no_grad():
        saved = bias.clone()
        bias.zero_()
    plain = model(**batch, output_router_logits=True).router_logits[0]
    is_visual = batch["input_ids"].flatten() == config.image_token_id
    torch.testing.assert_close(biased - plain, is_visual[:, None] * saved)


def test_the_load_balancing_loss_is_added_with_its_coefficient():
    config = tiny_config(router_aux_loss_coef=0.5)
    model, batch = tiny_model(config), tiny_batch(config)
    plain = model(**batch, labels=batch["input_ids"])
    balanced = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    probabilities = torch.cat(balanced.router_logits).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(config.num_experts_per_tok).indices, 1.0)
    expected = config.num_local_experts * (chosen.mean(0) * probabilities.mean(0)).sum()
    assert plain.aux_loss is None
    torch.testing.assert_close(balanced.aux_loss, expected)
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * expected)


@pytest.mark.parametrize("images_per_row", [(0, 1, 2), (0, 0), (1,)])
def test_the_load_balancing_loss_may_be_taken_per_modality(images_per_row):
    config = tiny_config(router_aux_loss_coef=0.5, router_aux_loss_per_modality=True)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :5] = 0
    plain = model(**batch, labels=batch["input_ids"])
    balanced = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    probabilities = torch.cat([logits[batch["attention_mask"].flatten() == 1] for logits in balanced.router_logits])
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(config.num_experts_per_tok).indices, 1.0)
    probabilities = probabilities.softmax(-1)
    is_visual = (batch["input_ids"] == config.image_token_id)[batch["attention_mask"] == 1].repeat(4)
    expected = 0.0
    for modality in (is_visual, ~is_visual):
        if modality.any():
            balance = (chosen[modality].mean(0) * probabilities[modality].mean(0)).sum()
            expected += modality.float().mean() * config.num_local_experts * balance
    torch.testing.assert_close(balanced.aux_loss, expected)
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * expected)
    assert isinstance(model(**batch, output_router_logits=True, return_dict=False), tuple)


def test_each_modality_s_imbalance_reaches_its_routers():
    """The gradient comes from the loss per modality, without one from gpt-oss's own balancing loss."""
    config = tiny_config(router_aux_loss_coef=0.5, router_aux_loss_per_modality=True)
    model, batch = tiny_model(config).train(), tiny_batch(config)
    bias = model.model.layers[0].mlp.router.vision_bias
    both = model(**batch, labels=batch["input_ids"], output_router_logits=True)
    (of_both,) = torch.autograd.grad(both.loss, bias, retain_graph=True)
    (of_balance,) = torch.autograd.grad(both.aux_loss, bias)
    (of_text,) = torch.autograd.grad(model(**batch, labels=batch["input_ids"]).loss, bias)
    assert of_balance.abs().max() > 0
    torch.testing.assert_close(of_both, of_text + 0.5 * of_balance)


@pytest.mark.parametrize("per_modality", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_loss_of_a_step_does_not_depend_on_its_split(per_modality, as_tensor):
    """With `num_items_in_batch`, as `Trainer` gives it. The rows are equal, so that all batches have one balance."""
    config = tiny_config(router_aux_loss_coef=0.5, router_aux_loss_per_modality=per_modality, output_router_logits=True)
    model, row = tiny_model(config), tiny_batch(config, images_per_row=(1,))
    whole = {name: torch.cat([value] * 4) for name, value in row.items()}
    items = torch.tensor(4 * 39) if as_tensor else 4 * 39
    with torch.no_grad():
        at_once = model(**whole, labels=whole["input_ids"], num_items_in_batch=items)
        part = model(**row, labels=row["input_ids"], num_items_in_batch=items)
        torch.testing.assert_close(4 * part.loss, at_once.loss)
        torch.testing.assert_close(part.aux_loss, at_once.aux_loss)
        torch.testing.assert_close(model(**whole, labels=whole["input_ids"]).loss, at_once.loss)


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_the_load_balancing_loss_of_a_batch_is_weighted_by_its_share_of_the_labels(given):
    config = tiny_config(router_aux_loss_coef=0.5)
    model, batch = tiny_model(config), tiny_batch(config)
    labels = batch["input_ids"].clone()
    labels[:, :31] = -100
    shifted = {"shift_labels": labels[:, 1:].contiguous()} if given == "shift_labels" else {}
    if shifted:
        shifted["shift_labels"] = torch.nn.functional.pad(shifted["shift_labels"], (0, 1), value=-100)
    with torch.no_grad():
        plain = model(**batch, labels=labels, num_items_in_batch=100, **shifted)
        balanced = model(**batch, labels=labels, num_items_in_batch=100, output_router_logits=True, **shifted)
    torch.testing.assert_close(balanced.loss, plain.loss + 0.5 * balanced.aux_loss * 3 * 9 / 100)


@pytest.mark.parametrize("per_modality", [False, True])
def test_the_load_balancing_loss_of_a_cached_step_is_of_its_own_tokens(per_modality):
    config = tiny_config(router_aux_loss_coef=0.5, router_aux_loss_per_modality=per_modality)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(0, 0))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :35] = 0
    with torch.no_grad():
        first = model(batch["input_ids"][:, :30], attention_mask=mask[:, :30])
        cached = {"attention_mask": mask, "past_key_values": first.past_key_values, "output_router_logits": True}
        second = model(batch["input_ids"][:, 30:], labels=batch["input_ids"][:, 30:], **cached)
    sizes = config.num_local_experts, config.num_experts_per_tok
    expected = load_balancing_loss_func(second.router_logits, *sizes, mask[:, 30:])
    torch.testing.assert_close(second.aux_loss, expected)


def test_without_a_mask_of_padding_there_is_no_load_balancing_loss():
    config = tiny_config(router_aux_loss_coef=0.5, output_router_logits=True)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(0, 0))
    prepared = dict.fromkeys(config.layer_types, torch.zeros(2, 1, 40, 40))
    with torch.no_grad():
        assert model(**batch, attention_mask=prepared).aux_loss is None
        with pytest.raises(ValueError, match=r"^The load-balancing loss needs an attention_mask \(b, s\)"):
            model(**batch, attention_mask=prepared, labels=batch["input_ids"])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("tower", TOWERS)
def test_every_experts_implementation_gives_the_same_logits(tmp_path, implementation, tower):
    """The implementation is chosen on loading, or later."""
    config = tiny_config(vision_config=tiny_vision_config(tower))
    model, batch = tiny_model(config), tiny_batch(config)
    model.save_pretrained(tmp_path)
    loaded = GPTOSSVisionForCausalLM.from_pretrained(tmp_path, experts_implementation=implementation)
    reference = oracle.forward(model.state_dict(), config.to_dict(), **batch)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for chosen in (loaded, model):
            assert chosen.config._experts_implementation == implementation
            assert relative_error(chosen(**batch).logits, reference) < 1e-5


# Gradients


def gradients(model: GPTOSSVisionForCausalLM, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tower", TOWERS)
def test_every_parameter_takes_part_in_a_step_with_images(tower):
    config = tiny_config(vision_config=tiny_vision_config(tower))
    for name, gradient in gradients(tiny_model(config).train(), tiny_batch(config)).items():
        assert is_idle(name) or gradient.abs().max() > 0, name


@pytest.mark.parametrize("tower", TOWERS)
def test_on_text_vision_parameters_get_a_gradient_of_zero(tower):
    config = tiny_config(vision_config=tiny_vision_config(tower))
    model, batch = tiny_model(config).train(), tiny_batch(config, images_per_row=(0, 0))
    for name, gradient in gradients(model, batch).items():
        only_images = "vision" in name
        assert is_idle(name) or (gradient.abs().max() == 0) == only_images, name


def test_on_text_training_mode_does_not_change_the_logits():
    config = tiny_config()
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(0, 0))
    assert torch.equal(model.train()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    config = tiny_config()
    model, batch = tiny_model(config).train(), tiny_batch(config)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_modality_stays_with_its_microbatch():
    """As in a pipeline schedule: both forward passes come first, and the backward passes recompute them."""
    config = tiny_config()
    model = tiny_model(config).train()
    batches = [tiny_batch(config, images_per_row=(1,)), tiny_batch(config, images_per_row=(0,), seed=1)]
    apart = [gradients(model, batch) for batch in batches]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, apart[0][name] + apart[1][name], msg=name)


def test_initialisation_is_gpt_oss_s_with_a_vision_bias_of_zero():
    model = GPTOSSVisionForCausalLM(tiny_config(hidden_size=64, initializer_range=0.02))
    for layer in model.model.layers:
        assert layer.mlp.router.vision_bias.dtype == torch.float32
        assert not layer.mlp.router.vision_bias.any()
        assert 0 < layer.mlp.experts.gate_up_proj.std() < 0.03
    assert 0 < model.model.vision_adapter.pool_token.std() < 0.1


# What is refused


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (1, "^1 image needs 6 placeholder tokens; the prompt has 12$"),
        (3, "^3 images need 18 placeholder tokens; the prompt has 12$"),
        (0, "^0 images need 0 placeholder tokens; the prompt has 12$"),
    ],
)
def test_images_and_placeholders_must_match_in_number(images, sentence):
    config = tiny_config()
    input_ids = tiny_batch(config, images_per_row=(2,))["input_ids"]
    pixel_values = torch.zeros(images, 3, 8, 8) if images else None
    with pytest.raises(ValueError, match=sentence):
        tiny_model(config)(input_ids, pixel_values=pixel_values)


def test_images_without_any_placeholder_are_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match=r"^1 image needs 6 placeholder tokens; the prompt has 0$"):
        tiny_model(config)(torch.ones(1, 4, dtype=torch.long), pixel_values=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("tower", TOWERS)
def test_images_of_another_size_are_refused(tower):
    config = tiny_config(vision_config=tiny_vision_config(tower))
    with pytest.raises(ValueError, match=r"^pixel_values must be \(n, \*\(3, 8, 8\)\), got \(1, 3, 12, 8\)\.$"):
        tiny_model(config).get_image_features(torch.zeros(1, 3, 12, 8))


def test_images_are_refused_by_a_model_without_vision():
    model = tiny_model(tiny_config(use_vision=False))
    with pytest.raises(ValueError, match="use_vision=False"):
        model(torch.ones(1, 4, dtype=torch.long), pixel_values=torch.zeros(1, 3, 8, 8))


def test_a_contradiction_set_after_the_config_was_built_is_refused():
    config = tiny_config()
    config.nope_stride = 0
    with pytest.raises(ValueError, match=r"^nope_stride must be at least 1, got 0\.$"):
        GPTOSSVisionForCausalLM(config)


def test_attention_that_transformers_has_for_gpt_oss_is_offered():
    assert (
        GPTOSSVisionForCausalLM._compatible_flash_implementations == GptOssForCausalLM._compatible_flash_implementations
    )
    assert GPTOSSVisionForCausalLM._supports_flex_attn
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"


def test_sdpa_is_refused_with_the_reason():
    model = tiny_model()
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="would drop the attention sinks"):
        GPTOSSVisionForCausalLM._from_config(tiny_config(), attn_implementation="sdpa")
    with pytest.raises(ValueError, match="would drop the attention sinks"):
        model.set_attn_implementation("sdpa")
