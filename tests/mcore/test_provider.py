"""Every field of the transformers config sets Megatron's, and settings that cannot work are refused in a sentence."""

import pytest
import torch

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.provider import (
    GPTOSSVisionProvider,
    provider_from_config,
    resolve_backend,
)
from tiny import tiny_config


def test_all_fields_of_gpt_oss_120b_are_converted():
    provider = provider_from_config(GPTOSSVisionConfig(use_nope=True))
    assert (provider.num_layers, provider.num_moe_experts, provider.moe_router_topk) == (36, 128, 4)
    assert (provider.hidden_size, provider.moe_ffn_hidden_size, provider.vocab_size) == (2880, 2880, 201088)
    assert (provider.num_attention_heads, provider.num_query_groups, provider.kv_channels) == (64, 8, 64)
    assert provider.window_size == (127, 0), "Megatron counts the positions before the query"
    assert provider.window_attn_skip_freq == [1, 0] * 18
    assert provider.no_rope_freq == [0, 0, 0, 1] * 9
    assert provider.position_embedding_type == "yarn"
    assert provider.yarn_correction_range_round_to_int is False
    assert (provider.yarn_rotary_scaling_factor, provider.yarn_original_max_position_embeddings) == (32.0, 4096)
    assert (provider.rotary_base, provider.yarn_beta_fast, provider.yarn_beta_slow) == (150000.0, 32.0, 1.0)
    assert (provider.softmax_type, provider.activation_func_clamp_value, provider.glu_linear_offset) == (
        "learnable",
        7.0,
        1.0,
    )
    assert (provider.image_token_id, provider.num_image_tokens) == (200013, 258)
    assert provider.moe_router_load_balancing_type == "none"


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"swiglu_limit": 5.0}, "activation_func_clamp_value", 5.0),
        ({"sliding_window": 3}, "window_size", (2, 0)),
        ({"layer_types": ["full_attention"] * 4}, "window_attn_skip_freq", [0, 0, 0, 0]),
        ({"rms_norm_eps": 1e-3}, "layernorm_epsilon", 1e-3),
        ({"router_aux_loss_coef": 0.01}, "moe_aux_loss_coeff", 0.01),
        ({"router_aux_loss_coef": 0.01}, "moe_router_load_balancing_type", "aux_loss"),
        ({"dtype": torch.bfloat16}, "params_dtype", torch.bfloat16),
        ({"vision_pool_token": False}, "num_image_tokens", 5),
        ({"use_vision": False}, "vision_config", {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "position_embedding_type", "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 99.0}}, "rotary_base", 99.0),
    ],
)
def test_a_changed_field_changes_megatrons(change: dict, field: str, value: object):
    assert getattr(provider_from_config(tiny_config(**change)), field) == value


def finalized(**overrides: object) -> GPTOSSVisionProvider:
    provider = provider_from_config(tiny_config(), **overrides)
    with cpu.runtime():
        provider.finalize()
    return provider


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size=4 does not divide the 2 key/value groups"),
        ({"expert_model_parallel_size": 3}, "expert_model_parallel_size=3 does not divide the 4 experts"),
        ({"context_parallel_size": 4}, "context_parallel_size=4 does not divide the 2 key/value groups"),
        ({"context_parallel_size": 2, "cp_comm_type": "p2p"}, "cp_comm_type='p2p' would lose the sinks"),
        ({"pipeline_model_parallel_size": 3}, "3 pipeline stages do not divide the 4 layers"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"backend": "flash"}, "backend='flash' is unknown"),
    ],
)
def test_what_cannot_work_is_refused_with_the_numbers(overrides: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        finalized(**overrides)


def test_a_rotary_embedding_that_megatron_cannot_express_is_refused():
    rope = {"rope_type": "linear", "rope_theta": 99.0, "factor": 2.0}
    with pytest.raises(ValueError, match="Megatron-Core has no rotary embedding like"):
        provider_from_config(tiny_config(rope_parameters=rope))


def test_auto_stays_auto_so_that_a_checkpoint_may_move_to_another_machine():
    provider = finalized()
    assert provider.backend == "auto"
    assert provider.transformer_impl == {"torch": "local"}.get(resolve_backend("auto"), "transformer_engine")


@pytest.mark.skipif(cpu.cuda_is_real(), reason="has a CUDA device")
def test_transformer_engine_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="needs a CUDA device"):
        finalized(backend="transformer_engine")


def test_sequence_parallelism_goes_with_tensor_parallelism():
    assert finalized(tensor_model_parallel_size=2).sequence_parallel is True
    assert finalized().sequence_parallel is False
