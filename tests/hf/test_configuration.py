"""The configuration: its derived fields, the forms that it accepts, and the messages of its refusals."""

import json

import pytest
from transformers import CLIPVisionConfig, GptOssConfig, LlamaConfig

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from tiny import tiny_config, tiny_vision_config


def test_defaults_are_gpt_oss_120b_with_a_vit_large():
    config, text = GPTOSSVisionConfig(), GptOssConfig()
    ours = config.to_dict()
    changed = {name for name, value in text.to_dict().items() if ours[name] != value}
    assert changed == {"model_type", "router_aux_loss_coef"}
    assert config.router_aux_loss_coef == 0.0
    assert config.vision_config.model_type == "vit"
    assert (config.vision_embed_dim, config.vision_num_layers, config.vision_config.intermediate_size) == (
        1024,
        24,
        4096,
    )


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ({}, 258),
        ({"vision_pool_token": False}, 257),
        ({"vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}}, 578),
        ({"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}}, 197),
    ],
)
def test_tokens_per_image_follow_from_the_tower(overrides, tokens):
    assert GPTOSSVisionConfig(**overrides).num_image_tokens == tokens


def test_nope_layers_follow_a_change_of_use_nope():
    config = GPTOSSVisionConfig(num_hidden_layers=8)
    assert config.nope_layers == [0] * 8
    config.use_nope = True
    assert config.nope_layers == [0, 0, 0, 1, 0, 0, 0, 1]
    config.nope_stride = 3
    assert config.nope_layers == [0, 0, 1, 0, 0, 1, 0, 0]


def test_flat_vision_arguments_are_views_of_the_vision_config():
    config = tiny_config()
    assert config.vision_config.hidden_size == config.vision_embed_dim == 16
    config.vision_image_size = 16
    assert config.vision_config.image_size == 16
    assert config.num_image_tokens == 16 + 2


def test_a_given_vision_config_is_not_changed():
    given = CLIPVisionConfig(image_size=28, patch_size=14)
    config = GPTOSSVisionConfig(vision_config=given)
    config.vision_image_size = 56
    assert given.image_size == 28


def test_both_names_of_the_rotary_parameters_mean_the_same():
    yarn = {"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    yarn["original_max_position_embeddings"] = 2048
    new = GPTOSSVisionConfig(rope_parameters=yarn | {"rope_theta": 10000.0})
    old = GPTOSSVisionConfig(rope_scaling=dict(yarn), rope_theta=10000.0)
    assert new.rope_parameters == old.rope_parameters
    assert new.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("tower", ["vit", "clip_vision_model", "siglip_vision_model"])
def test_a_saved_configuration_loads_as_it_was(tmp_path, tower):
    config = tiny_config(vision_config=tiny_vision_config(tower))
    config.save_pretrained(tmp_path)
    loaded = GPTOSSVisionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert type(loaded.vision_config) is type(config.vision_config)


def test_a_configuration_of_the_original_code_loads(tmp_path):
    original = {"model_type": "gpt_oss_vision", "use_nope": True, "nope_layers": [1], "vision_embed_dim": 768}
    original |= {"vision_num_heads": 12, "vision_num_layers": 12, "router_aux_loss_coef": 0.9, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(original))
    config = GPTOSSVisionConfig.from_pretrained(tmp_path)
    assert config.nope_layers == [0, 0, 0, 1]
    assert (config.vision_embed_dim, config.router_aux_loss_coef, config.use_vision) == (768, 0.9, True)


def test_a_stock_gpt_oss_configuration_loads(tmp_path):
    GptOssConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    config = GPTOSSVisionConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.num_image_tokens) == (2, 258)


def test_another_architecture_is_refused_by_name(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="This is a checkpoint of `llama`; GPT-OSS-Vision loads gpt_oss_vision and gpt"
    ):
        GPTOSSVisionConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"nope_stride": 0}, r"nope_stride must be at least 1, got 0\."),
        ({"nope_stride": -4}, r"nope_stride must be at least 1, got -4\."),
        ({"image_token_id": 256}, r"image_token_id \(256\) is outside the vocabulary of 256 tokens\."),
        ({"image_token_id": -1}, r"image_token_id \(-1\) is outside the vocabulary of 256 tokens\."),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)\.",
        ),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok \(5\) is more than num_local_experts \(4\)\."),
        ({"layer_types": ["full_attention"]}, r"layer_types has 1 entries for num_hidden_layers \(4\)\."),
        ({"vision_image_size": 10}, r"vision_image_size \(10\) must be a multiple of vision_patch_size \(4\)\."),
        (
            {"vision_config": {"model_type": "swin"}},
            r"`swin` is not a supported vision tower; use one of vit, clip_vision_model, siglip_vision_model\.",
        ),
    ],
)
def test_contradictions_are_refused_in_one_sentence_with_both_numbers(overrides, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        tiny_config(**overrides)


def test_without_vision_the_placeholder_may_lie_outside_the_vocabulary():
    assert tiny_config(use_vision=False, image_token_id=200013).image_token_id == 200013
