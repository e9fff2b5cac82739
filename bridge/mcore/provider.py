"""The Megatron-Bridge provider: a `TransformerConfig` made from a GPT-OSS-Vision config, which builds the model."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.utils import log_single_rank

from ...errors import UserError
from ..config_map import PER_MODALITY, load_balancing_fields, megatron_fields
from ..hf.configuration_gpt_oss_vision import TOWERS, GPTOSSVisionConfig, tower_config, tower_tokens
from ..weight_map import PARAM_GROUPS
from . import upstream
from .backend import Backend, is_planned, resolve_backend, transformer_engine_problem
from .derived import derive, without_kernels
from .flops import decoder_flops
from .layer_spec import block_spec
from .model import MCoreGPTOSSVisionModel
from .param_groups import freeze
from .unsupported import check_supported

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GPTOSSVisionProvider(GPTModelProvider):
    """Megatron-Bridge provider of GPT-OSS-Vision.

    Usually made by ``AutoBridge.from_hf_pretrained(path).to_megatron_provider()`` or `provider_from_config`; the
    architecture is read from the transformers config. Set parallel sizes and precision, then call ``finalize()``.
    """

    backend: Backend = "auto"
    """The kernels of the layers; ``auto`` is ``transformer_engine`` where it can run, else ``torch``."""

    use_vision: bool = True
    vision_config: dict[str, Any] = field(default_factory=dict)
    """The tower's transformers config as a plain dict, which ``run_config.yaml`` can hold."""
    vision_pool_token: bool = True
    image_token_id: int = 200013
    vision_recompute: bool = False
    """Whether the tower's activations are recomputed in the backward pass."""
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False
    freeze_vision_bias: bool = False
    """Which groups of parameters (`weight_map.PARAM_GROUPS`) are frozen: no gradients, no optimizer states."""

    # Fixed by gpt-oss, hence not arguments; `finalize()` refuses other values.
    normalization: str = field(default="RMSNorm", init=False)
    softmax_type: str = field(default="learnable", init=False)
    gated_linear_unit: bool = field(default=True, init=False)
    glu_linear_offset: float = field(default=1.0, init=False)
    activation_func: Any = field(default_factory=lambda: quick_gelu, init=False)  # a class attribute would be bound
    moe_router_score_function: str = field(default="softmax", init=False)
    moe_router_pre_softmax: bool = field(default=False, init=False)
    bias_dropout_fusion: bool = field(default=False, init=False)
    scatter_embedding_sequence_parallel: bool = field(default=False, init=False)

    expert_tensor_parallel_size: int | None = None
    """None is 1."""
    moe_router_load_balancing_type: Any = "none"
    """As in Megatron-Core, or ``modality_aux_loss``: text and visual tokens are balanced separately (`router.py`)."""
    moe_token_dispatcher_type: Any = "alltoall"
    hidden_dropout: float = 0.0
    # Megatron's default, a mean over ranks and microbatches of their means, gives tokens of short answers a larger
    # weight, which depends on the layout. Megatron-Bridge's vision recipes set this too.
    calculate_per_token_loss: bool = True

    # None is derived by `finalize()`; see `DERIVED`.
    transformer_impl: Any = None
    moe_grouped_gemm: Any = None
    moe_permute_fusion: Any = None
    moe_router_fusion: Any = None
    bias_activation_fusion: Any = None
    masked_softmax_fusion: Any = None
    persist_layer_norm: Any = None
    gradient_accumulation_fusion: Any = None
    apply_rope_fusion: Any = None
    cross_entropy_loss_fusion: Any = None
    sequence_parallel: Any = None
    cp_comm_type: Any = None
    batch_p2p_comm: Any = None
    derived: dict[str, Any] = field(default_factory=dict)
    """The values that `finalize()` has derived; a field that still has its value here is derived anew."""

    def finalize(self) -> None:
        """Check layout and settings against the model, and derive the fields that are None. May be called again.

        Raises:
            UserError: when the layout or a setting cannot work for this model, with the numbers.
        """
        # `backend` itself is not changed: a checkpoint with "auto" may be resumed on another machine.
        backend = resolve_backend(self)
        if self.expert_tensor_parallel_size is None:  # Megatron-Core would take the size of tensor parallelism
            self.expert_tensor_parallel_size = 1
        check_layout(self)
        check_supported(self, backend)
        derive(self, backend)
        if self.ffn_hidden_size not in (None, self.moe_ffn_hidden_size):
            raise UserError(f"ffn_hidden_size={self.ffn_hidden_size} has no effect; set moe_ffn_hidden_size.")
        # Megatron-Core requires the dense FFN size although every layer is a mixture of experts.
        self.ffn_hidden_size = self.moe_ffn_hidden_size
        with upstream.allow_biased_experts(self), without_kernels(self) if is_planned() else nullcontext():
            super().finalize()

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> MCoreGPTOSSVisionModel:
        """Build this rank's part of the model; a flag that is None is set from the pipeline rank."""
        groups, vp_size = self._pg_collection, self.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(groups.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(groups.pp)
        backend = resolve_backend(self)
        problem = transformer_engine_problem(self.expert_tensor_parallel_size or 1)
        reason = f": Transformer Engine cannot run, {problem}" if self.backend == "auto" and problem else ""
        log_single_rank(logger, logging.INFO, f"GPT-OSS-Vision runs on the `{backend}` back end{reason}.")
        model = MCoreGPTOSSVisionModel(
            self,
            transformer_layer_spec=block_spec(self, backend, vp_stage, groups),
            vocab_size=self.vocab_size,
            max_sequence_length=self.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
            parallel_output=self.parallel_output,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_base=self.rotary_base,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        freeze(model, self.frozen_groups)
        return model

    def _get_num_floating_point_operations_with_runtime_stats(
        self, *, batch_size: int, seqlen_sum: int | None, seqlen_squared_sum: int | None, **cross_attention: Any
    ) -> float:
        """Operations of a step on text; Megatron-Bridge's loop calls this method of a provider."""
        tokens = batch_size * self.seq_length if seqlen_sum is None else seqlen_sum
        flops = decoder_flops(self, tokens, seqlen_squared_sum)
        return flops.training(weight_gradients=not self.freeze_language_model)

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens per image: the tower's tokens, and the pool token if there is one."""
        return tower_tokens(tower_config(self.vision_config)) + int(self.vision_pool_token)

    @property
    def frozen_groups(self) -> list[str]:
        """The groups whose ``freeze_*`` is set."""
        return [group for group in PARAM_GROUPS if getattr(self, f"freeze_{group}")]


def check_layout(provider: GPTOSSVisionProvider) -> None:
    """Refuse a parallel layout that this model does not support.

    Raises:
        UserError: with the two sizes that don't divide, or the field to change.
    """
    tp, ep = provider.tensor_model_parallel_size, provider.expert_model_parallel_size
    cp = provider.context_parallel_size
    etp = provider.expert_tensor_parallel_size
    for size, name, count, what in (
        (tp, "tensor_model_parallel_size", provider.num_query_groups, "key/value groups"),
        (tp * cp, "tensor_model_parallel_size · context_parallel_size", provider.num_query_groups, "key/value groups"),
        (tp, "tensor_model_parallel_size", provider.vocab_size, "vocabulary entries"),
        (ep, "expert_model_parallel_size", provider.num_moe_experts, "experts"),
        (etp, "expert_tensor_parallel_size", provider.moe_ffn_hidden_size, "columns of the expert FFN"),
    ):
        if count % size:
            raise UserError(f"{name}={size} does not divide the {count} {what} of this model.")
    kind = provider.vision_config.get("model_type")
    if provider.use_vision and kind not in TOWERS:
        raise UserError(f"vision_config.model_type={kind!r} is not supported; it is one of {', '.join(TOWERS)}.")
    check_pipeline(provider)
    check_balance(provider)
    if len(provider.frozen_groups) == len(PARAM_GROUPS):
        raise UserError(f"All {len(PARAM_GROUPS)} groups of parameters are frozen, so there is nothing to train.")
    if provider.attention_dropout:
        raise UserError(f"attention_dropout={provider.attention_dropout} is not supported; gpt-oss has 0.")


BALANCES = ("none", "aux_loss", PER_MODALITY, "seq_aux_loss", "global_aux_loss", "sinkhorn")


def check_balance(provider: GPTOSSVisionProvider) -> None:
    """Refuse router losses that would have no effect or another weight than the one set.

    Raises:
        UserError: with the field to change.
    """
    coefficient, kind = provider.moe_aux_loss_coeff, provider.moe_router_load_balancing_type
    unknown = [name for name in (kind if isinstance(kind, list) else [kind]) if name not in BALANCES]
    if unknown or (isinstance(kind, list) and PER_MODALITY in kind):
        # Megatron-Core would train without a balancing loss and without a message.
        raise UserError(
            f"moe_router_load_balancing_type={kind!r} is not supported; it is one of {', '.join(BALANCES)}, and "
            f"{PER_MODALITY} is not combined with others."
        )
    if kind == "none" and coefficient:
        raise UserError(
            f"moe_aux_loss_coeff={coefficient} has no effect with moe_router_load_balancing_type='none'; "
            f"set that to 'aux_loss' or {PER_MODALITY!r}, or the coefficient to 0."
        )
    if kind == PER_MODALITY and not coefficient:
        raise UserError(f"moe_router_load_balancing_type={kind!r} needs moe_aux_loss_coeff above 0, got {coefficient}.")
    losses = {"moe_z_loss_coeff": provider.moe_z_loss_coeff, "moe_aux_loss_coeff": coefficient}
    for name, value in losses.items():
        if value and provider.calculate_per_token_loss:
            # Megatron-Core 0.19.2 multiplies by all tokens, then divides by those that are predicted.
            raise UserError(
                f"{name}={value} would be multiplied by the tokens of a batch over those that are predicted; "
                "set calculate_per_token_loss=False."
            )


def check_pipeline(provider: GPTOSSVisionProvider) -> None:
    """Refuse a number of pipeline stages that does not divide the layers, unless an uneven pipeline is configured.

    Raises:
        UserError: with both numbers.
    """
    uneven = (
        provider.num_layers_in_first_pipeline_stage,
        provider.num_layers_in_last_pipeline_stage,
        provider.pipeline_model_parallel_layout,
        provider.account_for_embedding_in_pipeline_split or None,
        provider.account_for_loss_in_pipeline_split or None,
    )
    stages = provider.pipeline_model_parallel_size * (provider.virtual_pipeline_model_parallel_size or 1)
    if provider.num_layers % stages and all(setting is None for setting in uneven):
        raise UserError(f"{stages} pipeline stages do not divide the {provider.num_layers} layers of this model.")


def provider_from_config(config: GPTOSSVisionConfig, **overrides: Any) -> GPTOSSVisionProvider:
    """The provider of a transformers config, not finalized.

    Args:
        config: every number of the architecture is read from it.
        **overrides: provider fields that are set last, for example ``tensor_model_parallel_size=2``.

    Raises:
        UserError: for a rotary embedding that Megatron-Core does not have.
    """
    fields = megatron_fields(config) | load_balancing_fields(config)
    return GPTOSSVisionProvider(**fields | _precision_fields(config.dtype or torch.float32) | overrides)


def _precision_fields(dtype: torch.dtype | str) -> dict[str, Any]:
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return {"params_dtype": dtype, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
