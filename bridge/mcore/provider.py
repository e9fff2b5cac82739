"""The Megatron-Bridge provider: a `TransformerConfig` made from a GPT-OSS-Vision config, which builds the model."""

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils import fusions
from megatron.core.activations import quick_gelu
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.utils import log_single_rank

from ...errors import UserError
from ..config_map import PER_MODALITY, load_balancing_fields, megatron_fields
from ..hf.configuration_gpt_oss_vision import TOWERS, GPTOSSVisionConfig
from ..weight_map import PARAM_GROUPS
from . import cpu, upstream
from .flops import decoder_flops
from .layer_spec import block_spec
from .model import MCoreGPTOSSVisionModel
from .packing import CUDNN_WITH_SINKS, check_cudnn
from .param_groups import freeze
from .unsupported import ENGINE, TORCH, check_supported

logger = logging.getLogger(__name__)

Backend = Literal["auto", "transformer_engine", "torch"]


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
    num_image_tokens: int = 258
    """Placeholder tokens per image; follows from the tower."""
    vision_recompute: bool = False
    """Whether the tower's activations are recomputed in the backward pass."""
    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False
    freeze_vision_bias: bool = False
    """Which groups of parameters (`weight_map.PARAM_GROUPS`) are frozen: no gradients, no optimizer states."""

    # Fixed by gpt-oss, hence not arguments.
    normalization: str = field(default="RMSNorm", init=False)
    softmax_type: str = field(default="learnable", init=False)
    gated_linear_unit: bool = field(default=True, init=False)
    glu_linear_offset: float = field(default=1.0, init=False)
    activation_func: Any = field(default=quick_gelu, init=False)
    moe_router_score_function: str = field(default="softmax", init=False)
    moe_router_pre_softmax: bool = field(default=False, init=False)
    hidden_dropout: float = field(default=0.0, init=False)
    bias_dropout_fusion: bool = field(default=False, init=False)
    scatter_embedding_sequence_parallel: bool = field(default=False, init=False)

    # Megatron-Core's default would be the size of tensor parallelism.
    expert_tensor_parallel_size: int | None = 1
    moe_router_load_balancing_type: Any = "none"
    """As in Megatron-Core, or ``modality_aux_loss``: text and visual tokens are balanced separately (`router.py`)."""
    moe_token_dispatcher_type: Any = "alltoall"
    # Megatron's default, a mean over ranks and microbatches of their means, gives tokens of short answers a larger
    # weight, which depends on the layout. Megatron-Bridge's vision recipes set this too.
    calculate_per_token_loss: bool = True

    def finalize(self) -> None:
        """Resolve the back end, check layout and settings against the model, derive Megatron's fields.

        Raises:
            UserError: when the layout or a setting cannot work for this model, with the numbers.
        """
        # `backend` itself is not changed: a checkpoint with "auto" may be resumed on another machine.
        backend = resolve_backend(self.backend)
        for name, values in BACKEND_SETTINGS.items():
            setattr(self, name, values[(TORCH, ENGINE).index(backend)])
        # Megatron-Core requires the dense FFN size although every layer is a mixture of experts.
        self.ffn_hidden_size = self.moe_ffn_hidden_size
        check_layout(self)
        check_supported(self, backend)
        # Megatron-Core requires it to train a mixture of experts with tensor parallelism.
        self.sequence_parallel = self.tensor_model_parallel_size > 1
        if self.context_parallel_size > 1:
            self.cp_comm_type = "a2a"
        cpu.adapt_model_for_cpu(self)
        with upstream.allow_biased_experts(self):
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
        backend = resolve_backend(self.backend)
        log_single_rank(logger, logging.INFO, f"GPT-OSS-Vision runs on the `{backend}` back end.")
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
    def frozen_groups(self) -> list[str]:
        """The groups whose ``freeze_*`` is set."""
        return [group for group in PARAM_GROUPS if getattr(self, f"freeze_{group}")]


# Field: its value with `torch`, which uses only modules that run on every device, and with `transformer_engine`.
BACKEND_SETTINGS: dict[str, tuple[Any, Any]] = {
    "transformer_impl": ("local", "transformer_engine"),
    "moe_grouped_gemm": (False, True),
    "moe_permute_fusion": (False, True),
    "moe_router_fusion": (False, False),
    "bias_activation_fusion": (False, True),
    "masked_softmax_fusion": (False, True),
    "persist_layer_norm": (False, True),
    "gradient_accumulation_fusion": (False, fusions.can_enable_gradient_accumulation_fusion()),
    # Megatron-Core's fused rotation omits YaRN's factor (Megatron-LM issue 2038).
    "apply_rope_fusion": (False, False),
    # Megatron-Core's fusion rounds the gradient of the logits to bf16, in fp32 runs too.
    "cross_entropy_loss_fusion": (False, True),
}


def resolve_backend(backend: Backend) -> str:
    """The back end to use.

    Raises:
        UserError: when ``transformer_engine`` cannot run here, or the name is unknown.
    """
    has_cuda, has_package = cpu.cuda_is_real(), find_spec("transformer_engine") is not None
    if backend == "auto":
        return "transformer_engine" if has_cuda and has_package else "torch"
    if backend not in (TORCH, ENGINE):
        raise UserError(f"backend={backend!r} is unknown; choose 'auto', 'transformer_engine' or 'torch'.")
    if backend == "transformer_engine" and not (has_cuda and has_package):
        missing = "a CUDA device" if not has_cuda else "the package (pip install 'gpt-oss-vision[te]')"
        raise UserError(f"backend='transformer_engine' needs {missing}; backend='torch' runs everywhere.")
    return backend


def check_layout(provider: GPTOSSVisionProvider) -> None:
    """Refuse a parallel layout that this model does not support.

    Raises:
        UserError: with the two sizes that don't divide, or the field to change.
    """
    tp, ep = provider.tensor_model_parallel_size, provider.expert_model_parallel_size
    cp = provider.context_parallel_size
    etp = provider.expert_tensor_parallel_size or 1
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
    if resolve_backend(provider.backend) == ENGINE:
        check_cudnn(CUDNN_WITH_SINKS, "learnable sinks")
        if etp > 1:
            raise UserError(
                f"expert_tensor_parallel_size={etp} needs backend='torch'; with Transformer Engine each rank would add "
                "the experts' whole biases."
            )
    if cp > 1 and provider.cp_comm_type not in (None, "a2a"):
        raise UserError(
            f"cp_comm_type={provider.cp_comm_type!r} would lose the sinks; use 'a2a', which is exact and our default."
        )


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
