"""Every field of the transformers config sets Megatron's, and settings that cannot work are refused in a sentence."""

from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest
import torch

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.mcore import backend, cpu
from gpt_oss_vision.bridge.mcore.derived import DERIVED, derive
from gpt_oss_vision.bridge.mcore.provider import GPTOSSVisionProvider, provider_from_config
from gpt_oss_vision.bridge.mcore.unsupported import FIXED
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


def finalize(provider: GPTOSSVisionProvider) -> GPTOSSVisionProvider:
    with cpu.runtime():
        provider.finalize()
    return provider


def finalized(**overrides: object) -> GPTOSSVisionProvider:
    return finalize(provider_from_config(tiny_config(), **overrides))


def for_engine(provider: GPTOSSVisionProvider) -> GPTOSSVisionProvider:
    """A copy with the fields that are derived for Transformer Engine; `finalize()` needs the package (tests/te)."""
    provider = deepcopy(provider)
    derive(provider, backend.ENGINE)
    return provider


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"tensor_model_parallel_size": 4}, "tensor_model_parallel_size=4 does not divide the 2 key/value groups"),
        ({"expert_model_parallel_size": 3}, "expert_model_parallel_size=3 does not divide the 4 experts"),
        ({"context_parallel_size": 4}, "context_parallel_size=4 does not divide the 2 key/value groups"),
        (
            {"context_parallel_size": 2, "cp_comm_type": "p2p"},
            "cp_comm_type='p2p' .* only 'a2a': it would lose the sinks",
        ),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, "sequence_parallel=False .* only True"),
        ({"transformer_impl": "transformer_engine"}, "transformer_impl='transformer_engine' .* only 'local'"),
        ({"cross_entropy_loss_fusion": True}, "cross_entropy_loss_fusion=True .* rounds the gradient"),
        ({"gradient_accumulation_fusion": True}, "gradient_accumulation_fusion=True .* APEX"),
        ({"batch_p2p_comm": True}, "batch_p2p_comm=True .* gloo"),
        ({"ffn_hidden_size": 7}, "ffn_hidden_size=7 has no effect; set moe_ffn_hidden_size"),
        ({"vision_config": {}}, "vision_config.model_type=None is not supported"),
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


def test_attention_without_biases_is_refused():
    with pytest.raises(ValueError, match="attention_bias=False cannot be expressed in Megatron"):
        provider_from_config(tiny_config(attention_bias=False))


def test_the_tokens_per_image_follow_the_pool_token():
    provider = provider_from_config(tiny_config(), vision_pool_token=False)
    assert provider.num_image_tokens == tiny_config(vision_pool_token=False).num_image_tokens
    with pytest.raises(AttributeError):
        provider.num_image_tokens = 7  # pyright: ignore[reportAttributeAccessIssue]


# --- back ends ---------------------------------------------------------------------------------------------------


def test_transformer_engine_is_refused_where_it_cannot_run():
    with pytest.raises(ValueError, match="cannot run: it needs a CUDA device"):
        finalized(backend="transformer_engine")


@pytest.mark.parametrize(
    ("installed", "importable", "cudnn", "etp", "problem"),
    [
        (False, False, 91800, 1, "the package is missing"),
        (True, False, 91800, 1, "is installed and cannot be imported"),
        (True, True, 91800, 2, "expert_tensor_parallel_size=2 each rank would add"),
        (True, True, 91300, 1, r"needs cuDNN 9\.13\.1 for learnable sinks, this is 9\.13\.0"),
        (True, True, None, 1, r"this is 0\.0\.0"),
        (True, True, 91800, 1, ""),
    ],
)
def test_auto_takes_transformer_engine_only_where_it_can_run(
    installed: bool, importable: bool, cudnn: int | None, etp: int, problem: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu, "cuda_is_real", lambda: True)
    monkeypatch.setattr(backend, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(backend, "HAVE_TE", importable)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    auto = provider_from_config(tiny_config(), expert_tensor_parallel_size=etp)
    assert backend.resolve_backend(auto) == ("torch" if problem else "transformer_engine")
    if problem:
        with pytest.raises(ValueError, match=problem):
            backend.resolve_backend(
                provider_from_config(tiny_config(), backend="transformer_engine", expert_tensor_parallel_size=etp)
            )


def test_settings_of_one_back_end_are_derived_anew_on_the_other():
    provider = finalized(bf16=True, params_dtype=torch.bfloat16)
    assert provider.backend == "auto"
    assert (provider.transformer_impl, provider.moe_grouped_gemm) == ("local", False)
    again = for_engine(provider)
    assert (again.transformer_impl, again.moe_grouped_gemm) == ("transformer_engine", True)
    assert (again.bias_activation_fusion, again.cross_entropy_loss_fusion) == (True, True)
    assert finalize(again).derived == provider.derived
    assert {name: getattr(again, name) for name in again.derived} == again.derived


def test_kernels_of_transformer_engine_can_be_switched_off():
    off = {rule.field: False for rule in DERIVED if rule.may_be_off}
    provider = for_engine(provider_from_config(tiny_config(), **off))
    assert {name: getattr(provider, name) for name in off} == off


@pytest.mark.parametrize(
    ("overrides", "fused"),
    [
        ({}, False),
        ({"bf16": True, "params_dtype": torch.bfloat16}, True),
        ({"bf16": True, "params_dtype": torch.bfloat16, "deterministic_mode": True}, False),
    ],
)
def test_cross_entropy_is_fused_in_half_precision_alone(overrides: dict, fused: bool):
    assert for_engine(provider_from_config(tiny_config(), **overrides)).cross_entropy_loss_fusion is fused


def test_gradient_accumulation_is_fused_with_apex_alone(monkeypatch: pytest.MonkeyPatch):
    provider = provider_from_config(tiny_config())
    assert for_engine(provider).gradient_accumulation_fusion is False
    monkeypatch.setattr("gpt_oss_vision.bridge.mcore.derived.find_spec", lambda name: name)
    assert for_engine(provider).gradient_accumulation_fusion is True


# --- what is set is kept or refused ------------------------------------------------------------------------------


def test_sequence_parallelism_goes_with_tensor_parallelism():
    provider = finalized(tensor_model_parallel_size=2)
    assert provider.sequence_parallel is True
    provider.tensor_model_parallel_size = 1
    assert finalize(provider).sequence_parallel is False


def test_the_experts_are_not_sharded_unless_asked_for():
    """Megatron-Core would take None for the size of tensor parallelism."""
    assert finalized(tensor_model_parallel_size=2, expert_tensor_parallel_size=None).expert_tensor_parallel_size == 1


FIELDS = {each.name: each for each in fields(GPTOSSVisionProvider)}
# Megatron-Core's finalize() computes a list per layer, or of modules, from a number or None.
COMPUTED = {"recompute_modules", "cuda_graph_modules", "offload_modules", "no_rope_freq"}


def another(value: Any) -> Any:
    """A value of the same type, if the type is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else 1


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_set_is_kept_or_refused(name: str):
    provider = provider_from_config(tiny_config())
    value = another(getattr(provider, name))
    setattr(provider, name, value)
    try:
        finalize(provider)
    except Exception:  # noqa: BLE001 - refused: by us, or by one of Megatron-Core's many checks
        return
    assert name in COMPUTED or getattr(provider, name) == value


@pytest.mark.parametrize(
    "name",
    [*FIXED, *(name for name, each in FIELDS.items() if not each.init)],
)
def test_a_field_that_changes_the_model_is_refused(name: str):
    provider = provider_from_config(tiny_config())
    setattr(provider, name, another(getattr(provider, name)))
    with cpu.runtime(), pytest.raises(ValueError, match=f"{name}=.* is not supported: it would change the model"):
        provider.finalize()
