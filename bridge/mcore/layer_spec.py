"""The modules of a decoder layer on each of the two back ends."""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import get_pg_rank

from .attention import SinkAttention
from .experts import GroupedExperts
from .norm import RMSNorm, RMSNormWithExtraState
from .router import VisionBiasedTopKRouter


class TorchSpecProvider(LocalSpecProvider):
    """Megatron-Core's linears and embeddings with our norm, sink attention and grouped experts; runs on any device."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False):
        """An RMSNorm that allows sequence parallelism."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention with learnable sinks and a window."""
        return SinkAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        """Experts under Transformer Engine's names."""
        return GroupedExperts


def block_spec(
    config: TransformerConfig, backend: str, vp_stage: int | None, pg_collection: ProcessGroupCollection
) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec of this pipeline stage's layers.

    Args:
        config: the finalized provider.
        backend: ``"torch"`` or ``"transformer_engine"``.
        vp_stage: the virtual pipeline stage, None without interleaving.
        pg_collection: the process groups, for the pipeline rank.
    """
    if backend == "transformer_engine":
        return transformer_engine_layer_spec(config)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=get_pg_rank(pg_collection.pp))
    return TransformerBlockSubmodules(layer_specs=[torch_layer_spec(config)] * layers, layer_norm=RMSNormWithExtraState)


def torch_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer of the `torch` back end."""
    backend = TorchSpecProvider()
    norm = backend.layer_norm(rms_norm=True)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNormWithExtraState,
            mlp=_with_vision_bias(get_moe_module_spec_for_backend(backend, num_experts=config.num_moe_experts)),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses this norm into the projection; its checkpoint key is used here too.
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
    )


def transformer_engine_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer of the `transformer_engine` back end: Megatron-Core's own, with our router and sinks."""
    from .te_attention import TESinkAttention  # needs Transformer Engine

    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=True)
    spec.submodules.self_attention.submodules.core_attention = TESinkAttention
    spec.submodules.mlp = _with_vision_bias(spec.submodules.mlp)
    return spec


def _with_vision_bias(moe: partial) -> partial:
    """The MoE builder with our router."""
    moe.keywords["submodules"].router = VisionBiasedTopKRouter
    return moe
