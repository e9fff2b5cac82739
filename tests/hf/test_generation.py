"""Generation: the output does not depend on the cache, on padding or on the other rows of a batch."""

import pytest
import torch
from torch.nn import functional as F
from transformers.generation import CompileConfig

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from tiny import tiny_batch, tiny_config, tiny_model

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def config() -> GPTOSSVisionConfig:
    return tiny_config()


@pytest.fixture(scope="module")
def model(config) -> GPTOSSVisionForCausalLM:
    return tiny_model(config)


def row(batch: dict[str, torch.Tensor], index: int, images_per_row: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One row of a batch, with its images."""
    alone = {"input_ids": batch["input_ids"][index : index + 1]}
    if images_per_row[index]:
        alone["pixel_values"] = batch["pixel_values"].split(images_per_row)[index]
    return alone


@pytest.mark.parametrize("cache", [None, "static"])
def test_with_and_without_a_cache_the_output_is_the_same(model, config, cache):
    batch = tiny_batch(config)
    cached = model.generate(**batch, **GREEDY, max_new_tokens=24, cache_implementation=cache, disable_compile=True)
    without = model.generate(**batch, **GREEDY, max_new_tokens=24, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    for ours, theirs in zip(cached.logits, without.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_past_the_real_window_the_cache_changes_nothing():
    config = tiny_config(sliding_window=128)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(2,), length=120)
    cached = model.generate(**batch, **GREEDY, max_new_tokens=40)
    without = model.generate(**batch, **GREEDY, max_new_tokens=40, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)


@pytest.mark.slow
def test_past_the_original_context_the_cache_and_padding_change_nothing():
    """The context is YaRN's 4,096 positions; the window is gpt-oss's own."""
    rope = tiny_config().rope_parameters | {"original_max_position_embeddings": 4096}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}  # one layer of each kind
    config = tiny_config(**sizes, sliding_window=128, max_position_embeddings=32_768, rope_parameters=rope)
    model, batch = tiny_model(config), tiny_batch(config, images_per_row=(2,), length=4100)
    alone = model.generate(**batch, **GREEDY, max_new_tokens=2)
    without = model.generate(**batch, **GREEDY, max_new_tokens=2, use_cache=False)
    assert torch.equal(alone.sequences, without.sequences)
    input_ids = F.pad(batch["input_ids"], (30, 0), value=config.pad_token_id)
    padded = {"input_ids": input_ids, "attention_mask": (torch.arange(4130) >= 30).long()[None]}
    found = model.generate(**padded, pixel_values=batch["pixel_values"], **GREEDY, max_new_tokens=2)
    assert torch.equal(found.sequences[:, 30:], alone.sequences)
    for ours, theirs in zip(found.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_row_in_a_left_padded_batch_is_the_row_alone(model, config):
    images_per_row, lengths = (0, 1, 2), (9, 40, 26)
    batch = tiny_batch(config, images_per_row)
    input_ids = torch.full((3, 40), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, length in enumerate(lengths):
        input_ids[index, -length:] = batch["input_ids"][index, :length]
        attention_mask[index, -length:] = 1
    padded = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": batch["pixel_values"]}
    together = model.generate(**padded, **GREEDY, max_new_tokens=16)
    for index, length in enumerate(lengths):
        alone = row(batch, index, images_per_row)
        alone["input_ids"] = alone["input_ids"][:, :length]
        alone = model.generate(**alone, **GREEDY, max_new_tokens=16)
        assert torch.equal(together.sequences[index, 40:], alone.sequences[0, length:])
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[index], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_keep_each_row_s_own_images(model, config, beams):
    images_per_row = (2, 0, 1)
    batch = tiny_batch(config, images_per_row)
    together = model.generate(**batch, do_sample=False, num_beams=beams, max_new_tokens=8)
    for index in range(3):
        alone = model.generate(**row(batch, index, images_per_row), do_sample=False, num_beams=beams, max_new_tokens=8)
        assert torch.equal(together[index], alone[0])


def test_a_conversation_goes_on_from_its_cache(model, config):
    batch = tiny_batch(config, images_per_row=(1,))
    first = model.generate(**batch, **GREEDY, max_new_tokens=6)
    question = tiny_batch(config, images_per_row=(1,), length=20, seed=1)
    input_ids = torch.cat((first.sequences, question["input_ids"]), dim=1)
    # With the cache only the new image is needed; without it, both.
    cached = model.generate(
        input_ids=input_ids,
        pixel_values=question["pixel_values"],
        past_key_values=first.past_key_values,
        **GREEDY,
        max_new_tokens=6,
    )
    pixel_values = torch.cat((batch["pixel_values"], question["pixel_values"]))
    scratch = model.generate(input_ids=input_ids, pixel_values=pixel_values, **GREEDY, max_new_tokens=6)
    assert torch.equal(cached.sequences, scratch.sequences)


@pytest.mark.parametrize("images_per_question", [(0, 0), (1, 0)])
def test_a_continued_conversation_may_come_with_all_its_images(model, config, images_per_question):
    """As the processor returns them for a whole chat."""
    batch = tiny_batch(config, images_per_row=(1, 2))
    first = model.generate(**batch, **GREEDY, max_new_tokens=6)
    question = tiny_batch(config, images_per_question, length=20, seed=1)
    old, new = batch["pixel_values"], question.get("pixel_values", batch["pixel_values"][:0])
    chat = {
        "input_ids": torch.cat((first.sequences, question["input_ids"]), dim=1),
        "pixel_values": torch.cat((old[:1], new, old[1:])),
    }
    scratch = model.generate(**chat, **GREEDY, max_new_tokens=6)
    cached = model.generate(**chat, past_key_values=first.past_key_values, **GREEDY, max_new_tokens=6)
    assert torch.equal(cached.sequences, scratch.sequences)


def test_a_prompt_with_images_is_not_read_in_chunks(model, config):
    with pytest.raises(ValueError, match="prefill_chunk_size=16 splits the prompt"):
        model.generate(**tiny_batch(config), prefill_chunk_size=16, max_new_tokens=2)


def test_an_assistant_model_gets_the_images():
    config = tiny_config(sliding_window=128)
    model, assistant = tiny_model(config), tiny_model(config, seed=1)
    batch = tiny_batch(config, images_per_row=(2,))
    alone = model.generate(**batch, **GREEDY, max_new_tokens=12)
    seen = []
    assistant.model.vision_adapter.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments))
    assisted = model.generate(**batch, **GREEDY, max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(assisted.sequences, alone.sequences)
    assert len(seen) == 1 and torch.equal(seen[0], batch["pixel_values"])


def test_embeddings_of_a_prompt_generate_as_the_prompt(model, config):
    batch = tiny_batch(config)
    from_ids = model.generate(**batch, **GREEDY, max_new_tokens=6)
    inputs_embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    from_embeds = model.generate(inputs_embeds=inputs_embeds, **batch, **GREEDY, max_new_tokens=6)
    assert torch.equal(from_embeds.sequences, from_ids.sequences[:, 40:])


@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_image_features_in_embeddings_generate_as_pixels(model, config, arguments):
    batch = tiny_batch(config)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :5] = 0
    is_visual = batch["input_ids"] == config.image_token_id
    from_pixels = model.generate(**batch, do_sample=False, max_new_tokens=6, **arguments)
    features = model.get_image_features(batch.pop("pixel_values")).pooler_output
    inputs_embeds = model.get_input_embeddings()(batch.pop("input_ids")).masked_scatter(is_visual[..., None], features)
    given = {"inputs_embeds": inputs_embeds, "is_visual": is_visual}
    from_features = model.generate(**given, **batch, do_sample=False, max_new_tokens=6, **arguments)
    assert torch.equal(from_features, from_pixels[:, 40:])


@pytest.mark.parametrize("per_modality", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
)
def test_a_model_trained_with_the_load_balancing_loss_generates_as_without_it(
    model, config, tmp_path, arguments, per_modality
):
    trained = tiny_model(tiny_config(output_router_logits=True, router_aux_loss_per_modality=per_modality))
    trained.save_pretrained(tmp_path)
    loaded = GPTOSSVisionForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.output_router_logits
    batch = tiny_batch(config)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :5] = 0
    given = batch | {"do_sample": False, "max_new_tokens": 6} | arguments
    assert torch.equal(loaded.generate(**given), model.generate(**given))
    assert torch.equal(loaded.generate(**given, output_router_logits=True), model.generate(**given))


def test_prompts_with_image_features_are_not_read_in_chunks(model, config):
    batch = tiny_batch(config)
    embedded = {"inputs_embeds": torch.ones(3, 40, config.hidden_size), "is_visual": batch["input_ids"] == 250}
    with pytest.raises(ValueError, match="prefill_chunk_size=16 splits the prompt"):
        model.generate(**embedded, prefill_chunk_size=16, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from a module that torch's compiler imports
def test_compiled_steps_without_a_graph_break_give_the_same_output():
    config = tiny_config(num_hidden_layers=2)  # one of each kind; compiling takes seconds for each layer
    model, batch = tiny_model(config), tiny_batch(config)
    compiling = CompileConfig(fullgraph=True, dynamic=False)
    compiling._compile_all_devices = True
    compiled = model.generate(
        **batch, **GREEDY, max_new_tokens=4, cache_implementation="static", compile_config=compiling
    )
    assert hasattr(model, "_compiled_call")
    torch.compiler.reset()
    assert torch.equal(compiled.sequences, model.generate(**batch, **GREEDY, max_new_tokens=4).sequences)


@pytest.mark.parametrize("arguments", [{}, {"suppress_tokens": [3]}, {"num_beams": 2}, {"use_cache": False}])
def test_a_placeholder_is_never_generated(config, arguments):
    model = tiny_model(config)
    input_ids = tiny_batch(config, images_per_row=(0,))["input_ids"]
    with torch.no_grad():  # make it the likeliest token by far
        last = model.model(input_ids).last_hidden_state[0, -1]
        model.lm_head.weight[config.image_token_id] = 100 * last
        assert model(input_ids).logits[0, -1].argmax() == config.image_token_id
    sequences = model.generate(input_ids, do_sample=False, max_new_tokens=5, **arguments)
    assert not (sequences == config.image_token_id).any()
    assert 3 not in sequences[0, 40:] or "suppress_tokens" not in arguments


def test_placeholders_without_images_are_refused_in_generation(model, config):
    input_ids = tiny_batch(config, images_per_row=(1,))["input_ids"]
    with pytest.raises(ValueError, match=r"^0 images need 0 placeholder tokens; the prompt has 6$"):
        model.generate(input_ids, max_new_tokens=2)
