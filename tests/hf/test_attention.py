"""`sink_sdpa` in transformers: the model's results are those of `eager` for every kind of input."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt_oss_vision.bridge import hf_attention
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf_attention import register_attention
from gpt_oss_vision.bridge.ops import attention as kernels
from tiny import tiny_batch, tiny_config, tiny_model, tiny_vision_config

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}

register_attention()


@pytest.fixture(autouse=True)
def always_fused(monkeypatch):
    """Use the fused kernel for short sequences too."""
    monkeypatch.setattr(kernels, "_SHORT", 0)


def both(tmp_path, config=None) -> tuple[GPTOSSVisionForCausalLM, GPTOSSVisionForCausalLM]:
    """One checkpoint, loaded with `eager` and with `sink_sdpa`."""
    tiny_model(config).save_pretrained(tmp_path)
    eager, fused = (
        GPTOSSVisionForCausalLM.from_pretrained(tmp_path, attn_implementation=name) for name in ("eager", "sink_sdpa")
    )
    assert (eager.config._attn_implementation, fused.config._attn_implementation) == ("eager", "sink_sdpa")
    return eager, fused


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return both(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def masks(monkeypatch) -> list[torch.Tensor | None]:
    """The mask of each call of the fused kernel."""
    seen = []
    kernel = hf_attention.fused_sink_attention

    def spy(*tensors, mask, **options):
        seen.append(mask)
        return kernel(*tensors, mask=mask, **options)

    monkeypatch.setattr(hf_attention, "fused_sink_attention", spy)
    return seen


def padded(config, side: str = "left", lengths: tuple[int, ...] = (9, 40, 26)) -> dict[str, torch.Tensor]:
    """Rows with no, one and two images, cut to `lengths` and padded to 40."""
    batch = tiny_batch(config)
    input_ids = torch.full((3, 40), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(40 - length, 40) if side == "left" else slice(0, length)
        input_ids[row, place] = batch["input_ids"][row, :length]
        attention_mask[row, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": batch["pixel_values"]}


def batches(config) -> dict[str, dict[str, torch.Tensor]]:
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    text = tiny_batch(config, images_per_row=(0, 0))
    return {
        "text": text,
        "images": tiny_batch(config),
        "one token": tiny_batch(config, images_per_row=(0,), length=1),
        "padded on the left": padded(config, "left"),
        "padded on the right": padded(config, "right"),
        "a mask of the user": text
        | {"attention_mask": torch.where(causal, 0.0, -1e9)[None, None].expand(2, 1, -1, -1)},
    }


NO_MASK, PADDING, FULL = None, 2, 4
KINDS = {
    "text": NO_MASK,
    "images": NO_MASK,
    "one token": NO_MASK,
    "padded on the left": PADDING,
    "padded on the right": PADDING,
    "a mask of the user": FULL,
}


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    outputs = model(**batch, labels=batch["input_ids"])
    outputs.logits.square().mean().backward()
    return outputs.logits, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_are_those_of_eager(models, masks, name: str):
    eager, fused = models
    batch = batches(eager.config)[name]
    expected, expected_gradients = loss_and_gradients(eager.train(), batch)
    found, gradients = loss_and_gradients(fused.train(), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in gradients.items():
        error = (gradient - expected_gradients[parameter]).norm()
        assert error <= 1e-4 * expected_gradients[parameter].norm() + 1e-7, parameter
    # The kernel ran in every layer, and no (q, k) mask was built where a padding mask is enough.
    assert [mask if mask is None else mask.ndim for mask in masks] == [KINDS[name]] * eager.config.num_hidden_layers


def test_packed_sequences_get_a_mask_of_their_own():
    config = tiny_config()
    config._attn_implementation = "sink_sdpa"
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    embeds = torch.zeros(1, 40, 1)
    mask = create_sliding_window_causal_mask(config, embeds, None, past_key_values=None, position_ids=positions)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    sequence = torch.arange(40) >= 15
    together = sequence[:, None] == sequence
    assert torch.equal(mask[0, 0], together & (distance >= 0) & (distance < config.sliding_window))


@pytest.mark.parametrize(
    "cache", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("feed", [tiny_batch, padded])
def test_generation_is_that_of_eager(models, masks, cache: dict, feed):
    eager, fused = (model.eval() for model in models)
    batch = feed(eager.config)
    expected = eager.generate(**batch, **GREEDY, **cache, max_new_tokens=16)
    found = fused.generate(**batch, **GREEDY, **cache, max_new_tokens=16)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(masks) == 16 * eager.config.num_hidden_layers


def test_beams_are_those_of_eager(models):
    eager, fused = (model.eval() for model in models)
    batch = padded(eager.config)
    expected = eager.generate(**batch, do_sample=False, num_beams=3, max_new_tokens=8)
    assert torch.equal(fused.generate(**batch, do_sample=False, num_beams=3, max_new_tokens=8), expected)


def test_past_the_real_window_and_a_block_results_are_those_of_eager(tmp_path, masks):
    eager, fused = both(tmp_path, tiny_config(sliding_window=128))
    batch = tiny_batch(eager.config, images_per_row=(2,), length=300)
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch).logits, eager(**batch).logits, rtol=1e-4, atol=1e-5)
    expected = eager.generate(**batch, **GREEDY, max_new_tokens=8)
    assert torch.equal(fused.generate(**batch, **GREEDY, max_new_tokens=8).sequences, expected.sequences)
    assert masks == [None] * len(masks)


def test_a_conversation_goes_on_from_its_cache(models):
    eager, fused = (model.eval() for model in models)
    batch = tiny_batch(eager.config, images_per_row=(1,))
    more = torch.arange(1, 13)[None]
    with torch.no_grad():
        logits = []
        for model in (eager, fused):
            cache = model(**batch, use_cache=True).past_key_values
            logits.append(model(more, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient(models):
    fused = models[1].train()
    batch = padded(fused.config)
    _, expected = loss_and_gradients(fused, batch)
    fused.gradient_checkpointing_enable()
    _, found = loss_and_gradients(fused, batch)
    fused.gradient_checkpointing_disable()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_autocast_trains(models):
    fused = models[1].train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = loss_and_gradients(fused, tiny_batch(fused.config))
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["model.layers.0.self_attn.sinks"].abs().max() > 0


@pytest.mark.parametrize("tower", ["vit", "clip_vision_model", "siglip_vision_model"])
def test_a_tower_runs_on_transformers_own_kernel(tmp_path, tower: str):
    eager, fused = both(tmp_path, tiny_config(vision_config=tiny_vision_config(tower)))
    pixel_values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model.get_image_features(pixel_values).pooler_output for model in (fused, eager))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_can_be_chosen_later(models):
    model = tiny_model()
    model.set_attn_implementation("sink_sdpa")
    batch = tiny_batch(model.config)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, models[1].eval()(**batch).logits)


# What is refused


def test_before_register_it_is_refused_with_advice(monkeypatch):
    monkeypatch.delitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sink_sdpa")
    with pytest.raises(ValueError, match=r"call gpt_oss_vision\.register\(\)\.$"):
        GPTOSSVisionForCausalLM._from_config(tiny_config(), attn_implementation="sink_sdpa")


def test_dropout_is_refused():
    model = GPTOSSVisionForCausalLM._from_config(tiny_config(attention_dropout=0.1), attn_implementation="sink_sdpa")
    batch = tiny_batch(model.config)
    model.eval()(**batch)
    with pytest.raises(
        ValueError, match=r"^\"sink_sdpa\" has no dropout; use \"eager\" or attention_dropout=0, not 0\.1"
    ):
        model.train()(**batch)


def test_attention_weights_are_refused(models):
    with pytest.raises(ValueError, match=r'use "eager" for output_attentions=True\.$'):
        models[1](**tiny_batch(models[1].config), output_attentions=True)


def test_causal_attention_without_sinks_is_refused():
    layer = torch.nn.Linear(1, 1)
    query = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"is for attention with sinks; Linear has none\.$"):
        hf_attention.sink_sdpa_attention(layer, query, query, query, None, scaling=1.0)
