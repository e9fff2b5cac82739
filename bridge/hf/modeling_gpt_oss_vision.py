# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""
The GPT-OSS-Vision model, written as its differences to transformers' gpt-oss: image features at placeholder tokens,
layers without rotation, and a router bias for visual tokens.

Shapes: b rows, s positions, t = b * s tokens, h hidden size, e experts, k chosen experts, n images, p tokens per image.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.integrations import Mxfp4GptOssExperts, mxfp4
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssExperts,
    GptOssForCausalLM,
    GptOssModel,
    GptOssPreTrainedModel,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
    GptOssTopKRouter,
    load_balancing_loss_func,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.import_utils import is_tracing, torch_compilable_check
from transformers.utils.quantization_config import QuantizationMethod

from .configuration_gpt_oss_vision import GPTOSSVisionConfig, build_tower

logger = logging.get_logger(__name__)

# Name parts of the weights that gpt-oss does not have. A checkpoint has all weights of a kind, or none.
ADDED_WEIGHTS = ("vision_adapter", "vision_bias")


class GPTOSSVisionAdapter(nn.Module):
    """Images to tokens of the decoder: tower, optional pool token, norm, projection."""

    def __init__(self, config: GPTOSSVisionConfig):
        super().__init__()
        vision = config.vision_config
        self.vit = build_tower(vision)
        self.pool_token = nn.Parameter(torch.zeros(1, 1, vision.hidden_size)) if config.vision_pool_token else None
        self.norm = nn.LayerNorm(vision.hidden_size)
        self.proj = nn.Linear(vision.hidden_size, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`): Any float type; the tower casts.

        Returns:
            [`BaseModelOutputWithPooling`]: the tower's own output, with the projected features `(n, p, h)`, ordered
            pool token, CLS, patches row by row, as `pooler_output`.
        """
        outputs = self.vit(pixel_values, **kwargs)
        features = outputs.last_hidden_state
        if self.pool_token is not None:
            features = torch.cat((self.pool_token.expand(len(features), -1, -1), features), dim=1)
        outputs.pooler_output = self.proj(self.norm(features))
        return outputs


class GPTOSSVisionTopKRouter(GptOssTopKRouter):
    """gpt-oss's router, with a learned bias per expert that is added to the logits of visual tokens only."""

    def __init__(self, config: GPTOSSVisionConfig):
        super().__init__(config)
        # In bf16 the small updates of a bias would be rounded away.
        self.vision_bias = nn.Parameter(torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(
        self, hidden_states: torch.Tensor, is_visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(t, h)`).
            is_visual (`torch.BoolTensor` of shape `(t,)`).

        Returns:
            Logits `(t, e)` with the bias included, weights `(t, k)` and indices `(t, k)` of the chosen experts.
        """
        router_logits = F.linear(hidden_states, self.weight, self.bias)
        # No `if is_visual.any()`: it synchronizes with the GPU, and leaves the bias without a gradient on text.
        # Cast back to the type of the logits, so that a bias of zero is gpt-oss bit for bit in bf16 too.
        router_logits = (router_logits + is_visual[:, None] * self.vision_bias).to(router_logits.dtype)
        top_logits, router_indices = torch.topk(router_logits, self.top_k, dim=-1)
        return router_logits, F.softmax(top_logits, dim=-1, dtype=top_logits.dtype), router_indices


def dequantized_experts_forward(
    self: GptOssExperts, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """
    gpt-oss's experts with weights quantised by torchao: its kernels have no batched experts, so the chosen ones are
    dequantised one at a time.

    Args:
        hidden_states (`torch.Tensor` of shape `(t, h)`).
        router_indices (`torch.LongTensor` of shape `(t, k)`).
        routing_weights (`torch.Tensor` of shape `(t, k)`).
    """
    output = torch.zeros_like(hidden_states)
    for expert in router_indices.unique().tolist():
        token, choice = torch.where(router_indices == expert)
        gate_up = hidden_states[token] @ self.gate_up_proj[expert].dequantize().to(hidden_states.dtype)
        gated = self._apply_gate(gate_up + self.gate_up_proj_bias[expert])
        down = gated @ self.down_proj[expert].dequantize().to(gated.dtype) + self.down_proj_bias[expert]
        output.index_add_(0, token, (down * routing_weights[token, choice, None]).to(output.dtype))
    return output


ALL_EXPERTS_FUNCTIONS.register("dequantized", dequantized_experts_forward)


class GPTOSSVisionMLP(nn.Module):
    """Router and experts. Not a `GptOssMLP`: hub kernels replace that class's forward, and would drop the bias."""

    def __init__(self, config: GPTOSSVisionConfig):
        super().__init__()
        self.router = GPTOSSVisionTopKRouter(config)
        self.experts = GptOssExperts(config)
        self.experts.limit = config.swiglu_limit  # gpt-oss's class keeps a constant

    def forward(self, hidden_states: torch.Tensor, is_visual: torch.Tensor) -> torch.Tensor:
        """From `(b, s, h)` and `(b, s)` to `(b, s, h)`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits, router_scores, router_indices = self.router(tokens, is_visual.reshape(-1))
        if isinstance(self.experts, Mxfp4GptOssExperts):
            # Packed experts: the kernels compute the routing from the logits, with indices of their own.
            with torch.accelerator.device_index(router_logits.device.index):  # Triton launches on the current device
                routing, *places = mxfp4.triton_kernels_hub.routing.routing(router_logits, self.router.top_k)
            return self.experts(tokens, routing, *places).reshape(hidden_states.shape)
        return self.experts(tokens, router_indices, router_scores).reshape(hidden_states.shape)


class GPTOSSVisionDecoderLayer(GptOssDecoderLayer):
    """gpt-oss's layer with the visual mask as an argument, and without rotation in NoPE layers."""

    def __init__(self, config: GPTOSSVisionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp = GPTOSSVisionMLP(config)
        self.skips_rotation = bool(config.nope_layers[layer_idx])

    def forward(
        self,
        hidden_states: torch.Tensor,
        is_visual: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """From `(b, s, h)`, the visual mask `(b, s)` and cos, sin `(b, s, head_dim / 2)` to `(b, s, h)`."""
        if self.skips_rotation:
            cos, sin = position_embeddings
            position_embeddings = torch.ones_like(cos), torch.zeros_like(sin)
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), position_embeddings=position_embeddings, **kwargs
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), is_visual)


class GPTOSSVisionPreTrainedModel(GptOssPreTrainedModel):
    """Weight initialisation, saving and loading, as in transformers' models."""

    config: GPTOSSVisionConfig
    input_modalities = ("image", "text")
    _no_split_modules: ClassVar[list[str]] = ["GPTOSSVisionDecoderLayer", "GPTOSSVisionAdapter"]
    # gpt-oss's list has "norm", which would match the LayerNorms of a tower too; those don't mix types.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "post_attention_layernorm",
        "input_layernorm",
        r"(?<!vision_adapter\.)(?<!\w)norm",
    ]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vision_bias"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers searches the file of the class for the experts' decorator; our experts are in gpt-oss's file.
        return GptOssPreTrainedModel._can_set_experts_implementation()

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """As in transformers; a name alone applies to the decoder, since the tower has no experts."""
        by_config = experts_implementation if isinstance(experts_implementation, dict) else {"": experts_implementation}
        super().set_experts_implementation(by_config)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        quantization = getattr(self.config, "quantization_config", None)
        if requested_experts is None and getattr(quantization, "quant_method", None) == QuantizationMethod.TORCHAO:
            requested_experts = "dequantized"
        return super().get_correct_experts_implementation(requested_experts)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # transformers treats every name that contains "sdpa" as its own.
        if requested_attention != "sink_sdpa":
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        if requested_attention not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(
                'attn_implementation="sink_sdpa" is part of gpt_oss_vision: call gpt_oss_vision.register().'
            )
        return requested_attention

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        raise ValueError(
            'attn_implementation="sdpa" would drop the attention sinks, and with them the meaning of the weights; '
            'use "eager", "sink_sdpa", "flex_attention" or a flash kernel with sinks.'
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """
        As in transformers, but missing or unexpected weights are an error, not a warning. All weights of a kind that
        this model adds to gpt-oss may be missing; they are then initialised, with a warning.

        With `output_loading_info`, or a `state_dict` in place of a checkpoint, nothing is checked.

        Raises:
            ValueError: when weights are missing or unexpected; the message lists them.
            OSError: when a file is damaged; the message names it.
        """
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            file = _damaged_file(pretrained_model_name_or_path)
            raise OSError(f"{file} is truncated or damaged ({error}); download or copy it again.") from error
        if output_loading_info:
            return model, report
        if kwargs.get("state_dict") is None:
            model._check_fit(pretrained_model_name_or_path, report)
        return model

    def _check_fit(self, checkpoint: Any, report: dict[str, Any]) -> None:
        """Raises when a checkpoint fits neither this model nor gpt-oss; warns of weights that were initialised."""
        missing, foreign = set(report["missing_keys"]), set(report["unexpected_keys"])
        for kind in ADDED_WEIGHTS:
            added = {name for name, _ in self.named_parameters() if kind in name.split(".")}
            if added and added <= missing:
                missing -= added
                logger.warning(
                    f"{checkpoint} has no {kind}: its {len(added)} weights are new, and still to be trained."
                )
        stand_in = next((name for name in foreign if re.search(r"\bpatch_embed\.", name)), None)
        if stand_in is not None:
            raise ValueError(
                f"{checkpoint} has no vision tower, only the convolution {stand_in} that the original code put in its "
                f"place when building the ViT failed; take the text weights and another tower."
            )
        if self.base_model is self:
            foreign = {name for name in foreign if not name.startswith("lm_head.")}
        if not self.config.use_vision:
            foreign = {name for name in foreign if "vision_adapter" not in name.split(".")}
        if missing or foreign:
            raise ValueError(
                f"{checkpoint} doesn't fit the model of its config: it lacks {_listed(missing)}, and has "
                f"{_listed(foreign)} that the model doesn't have; output_loading_info=True loads it anyway."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GPTOSSVisionTopKRouter):
            init.zeros_(module.vision_bias)
        elif isinstance(module, GPTOSSVisionAdapter) and module.pool_token is not None:
            init.normal_(module.pool_token, mean=0.0, std=self.config.initializer_range)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but a ViT is saved under its current names, not those of transformers 4."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


def _damaged_file(checkpoint: Any) -> str:
    for file in sorted(Path(checkpoint).rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return str(file)
    return f"A file of {checkpoint}"


def _listed(names: set[str]) -> str:
    """A list of names, with one entry for names that differ only in their layer number."""
    by_pattern: dict[str, list[str]] = {}
    for name in sorted(names):
        by_pattern.setdefault(re.sub(r"layers\.\d+\.", "layers.*.", name), []).append(name)
    named = [pattern if len(same) > 1 else same[0] for pattern, same in by_pattern.items()]
    if not names:
        return "nothing"
    return f"{len(names)} {'weight' if len(names) == 1 else 'weights'} ({', '.join(named)})"


class GPTOSSVisionModel(GPTOSSVisionPreTrainedModel, GptOssModel):
    """The decoder with its vision adapter, without a language-model head."""

    def __init__(self, config: GPTOSSVisionConfig):
        # Fields may have been set after the config was built, as in the model card.
        config.validate_text_shape()
        config.validate_vision()
        # GptOssModel would build its own layers first, experts and all.
        GPTOSSVisionPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([GPTOSSVisionDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = GptOssRotaryEmbedding(config=config)
        self.vision_adapter = GPTOSSVisionAdapter(config) if config.use_vision else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`).

        Returns:
            [`BaseModelOutputWithPooling`]: `pooler_output` is the decoder's input, `(n, p, h)`; `last_hidden_state` is
            the tower's, `(n, patches [+ 1], vision_embed_dim)`. With `pooler_output` in `inputs_embeds`, `is_visual`
            must name its positions: the routers treat them apart.

        Raises:
            ValueError: when the model was built without vision, or images don't have the tower's shape.
        """
        if self.vision_adapter is None:
            raise ValueError("This model was built with use_vision=False and takes no images.")
        expected = self.config.image_shape
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"pixel_values must be (n, *{expected}), got {tuple(pixel_values.shape)}.")
        return self.vision_adapter(pixel_values, **kwargs)

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.FloatTensor | None
    ) -> torch.BoolTensor:
        """
        The visual mask `(b, s)`: positions of `image_token_id`, or, given embeddings only, those equal to its
        embedding. In a model without vision, all False.
        """
        if self.vision_adapter is None:
            positions = input_ids if input_ids is not None else inputs_embeds[..., 0]
            return torch.zeros_like(positions, dtype=torch.bool)
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)

    def _merge_images(
        self, inputs_embeds: torch.Tensor, is_visual: torch.Tensor, pixel_values: torch.Tensor | None
    ) -> torch.Tensor:
        """Replaces the placeholders of `(b, s, h)` by image features `(n, p, h)`, in order."""
        if self.vision_adapter is None and pixel_values is None:
            return inputs_embeds
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, return_dict=True).pooler_output
            return inputs_embeds.masked_scatter(is_visual[..., None], features.to(inputs_embeds))
        if not (self.training and torch.is_grad_enabled()):
            return inputs_embeds
        # Every rank must run the adapter in every step, or the reduction of its gradients never ends.
        blank = inputs_embeds.new_zeros(1, *self.config.image_shape)
        features = self.get_image_features(blank, return_dict=True).pooler_output
        return inputs_embeds + 0.0 * features.mean().to(inputs_embeds)  # a sum could overflow in fp16

    def _check_placeholders(self, is_visual: torch.Tensor, num_images: int) -> None:
        if num_images == 0 and is_tracing():
            return  # a compiled step of generation has no placeholders, and can't count them
        needed = num_images * self.config.num_image_tokens
        torch_compilable_check(
            is_visual.sum() == needed,
            lambda: (
                f"{num_images} image{' needs' if num_images == 1 else 's need'} {needed} placeholder tokens; "
                f"the prompt has {int(is_visual.sum())}"
            ),
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        is_visual: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`, *optional*):
                The batch's images, in the order of their placeholders. In cached generation, at the first step only.
            is_visual (`torch.BoolTensor` of shape `(b, s)`, *optional*):
                With `inputs_embeds` that hold image features already: their positions.

        Raises:
            ValueError: when the numbers of images and placeholders don't match; the message has both.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if is_visual is None:
            is_visual = self.get_placeholder_mask(input_ids, inputs_embeds)
        elif inputs_embeds is None or is_visual.shape != inputs_embeds.shape[:2]:
            given = "input_ids" if inputs_embeds is None else f"inputs_embeds {tuple(inputs_embeds.shape)}"
            raise ValueError(f"is_visual {tuple(is_visual.shape)} must be (b, s) of inputs_embeds, got {given}.")
        if self.vision_adapter is not None and (input_ids is not None or pixel_values is not None):
            self._check_placeholders(is_visual, 0 if pixel_values is None else len(pixel_values))
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = self._merge_images(inputs_embeds, is_visual, pixel_values)
        if attention_mask is None and position_ids is not None and past_key_values is None:
            # Positions that restart mark packed samples, which gpt-oss's own masks ignore.
            attention_mask = create_masks_for_generate(self.config, inputs_embeds, None, None, position_ids)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_visual=is_visual,  # passed on to every layer
            **kwargs,
        )


def load_balancing_loss_per_modality(
    router_logits: tuple[torch.Tensor, ...], top_k: int, is_visual: torch.Tensor, is_token: torch.Tensor
) -> torch.Tensor:
    """
    The load-balancing loss of Switch Transformer (equations 4 to 6 of arXiv 2101.03961, over all layers together as in
    transformers), computed separately for visual and text tokens, each weighted by its share of the tokens. With one
    modality it is transformers' own.

    Args:
        router_logits (`tuple[torch.Tensor]` of shape `(t, e)`): One a layer.
        top_k (`int`): Experts chosen for a token.
        is_visual (`torch.BoolTensor` of shape `(t,)`).
        is_token (`torch.BoolTensor` of shape `(t,)`): False for padding.
    """
    logits = torch.cat([layer.to(router_logits[0].device) for layer in router_logits])
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0)
    loss = logits.new_zeros(())
    for modality in (is_visual & is_token, ~is_visual & is_token):
        weight = modality.to(logits).repeat(len(router_logits)) / modality.sum().clamp(min=1) / len(router_logits)
        share = modality.sum() / is_token.sum()
        loss = loss + share * logits.shape[1] * ((weight @ chosen) * (weight @ probabilities)).sum()
    return loss


def _share_of_step(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor | float:
    """
    The batch's part of the labels of an optimizer step, for whose mean the losses of its batches are added up: with
    gradient accumulation, or several ranks. 1 where the loss is the mean of its own batch.
    """
    if num_items_in_batch is None:
        return 1.0
    labels = labels[:, 1:] if shift_labels is None else shift_labels
    return (labels != ignore_index).sum() / torch.as_tensor(num_items_in_batch, device=labels.device)


class GPTOSSVisionForCausalLM(GPTOSSVisionPreTrainedModel, GptOssForCausalLM, GenerationMixin):
    """The model with its language-model head: text and images in, text out."""

    def __init__(self, config: GPTOSSVisionConfig):
        GPTOSSVisionPreTrainedModel.__init__(self, config)
        self.model = GPTOSSVisionModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """See [`GPTOSSVisionModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        is_visual: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """
        As [`GptOssForCausalLM.forward`], but the load-balancing loss is of these tokens alone where there is a cache,
        and is weighted by this batch's share of `num_items_in_batch`, as the loss itself is.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, channels, height, width)`, *optional*):
                The batch's images, in the order of their placeholders. In cached generation, at the first step only.
            is_visual (`torch.BoolTensor` of shape `(b, s)`, *optional*):
                With `inputs_embeds` that hold image features already: their positions.

        Raises:
            ValueError: when the numbers of images and placeholders don't match; the message has both.
        """
        output_router_logits = (
            self.config.output_router_logits if output_router_logits is None else output_router_logits
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            is_visual=is_visual,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            places = self.model.get_placeholder_mask(input_ids, inputs_embeds) if is_visual is None else is_visual
            aux_loss = self._load_balancing_loss(outputs.router_logits, places, attention_mask)
            loss = None if loss is None else self._add_load_balancing_loss(loss, aux_loss, labels, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _add_load_balancing_loss(
        self, loss: torch.Tensor, aux_loss: torch.Tensor | None, labels: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if aux_loss is None:
            raise ValueError("The load-balancing loss needs an attention_mask (b, s), to leave out padding.")
        share = _share_of_step(labels.to(loss.device), **kwargs)
        return loss + self.router_aux_loss_coef * share * aux_loss.to(loss.device)

    def _load_balancing_loss(
        self, router_logits: tuple[torch.Tensor, ...], is_visual: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """
        The loss of the tokens `(b, s)` that are not padding; a mask `(b, past + s)` has columns for cached tokens too.
        None for masks of other shapes, such as generation's: padding can't be read from them.
        """
        if attention_mask is not None:
            if isinstance(attention_mask, dict) or attention_mask.ndim != 2:
                return None
            attention_mask = attention_mask[:, -is_visual.shape[1] :]
        if not self.config.router_aux_loss_per_modality:
            return load_balancing_loss_func(router_logits, self.num_experts, self.num_experts_per_tok, attention_mask)
        is_token = torch.ones_like(is_visual) if attention_mask is None else attention_mask.bool()
        return load_balancing_loss_per_modality(
            router_logits, self.num_experts_per_tok, is_visual.flatten(), is_token.flatten()
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        is_visual: torch.BoolTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        Passes images in the first step only, the cache has them afterwards; without a cache in every step. Router
        logits are not recorded: `output_router_logits` of a config is for training.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        inputs["output_router_logits"] = False
        if is_visual is not None and inputs.get("inputs_embeds") is not None:
            inputs["is_visual"] = is_visual[:, -inputs["inputs_embeds"].shape[1] :]
        # In assisted decoding, transformers marks no step of the assistant as the first.
        in_cache = past_key_values is not None and past_key_values.get_seq_length() > 0
        if is_first_iteration or not in_cache or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
            if in_cache and pixel_values is not None and inputs.get("input_ids") is not None:
                inputs["pixel_values"] = self._images_not_in_cache(pixel_values, input_ids, inputs["input_ids"])
        return inputs

    def _images_not_in_cache(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, new_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """The images of the last tokens `(b, s')` of chats `(b, s)`; returns all where only those were given."""
        in_chat, new = ((ids == self.config.image_token_id).sum(1) for ids in (input_ids, new_ids))
        in_chat, new = ((count // self.config.num_image_tokens).tolist() for count in (in_chat, new))
        if sum(in_chat) != len(pixel_values):
            return pixel_values
        rows = zip(pixel_values.split(in_chat), new, strict=True)
        return torch.cat([images[len(images) - count :] for images, count in rows]) if any(new) else None

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Beams and samples: repeats a row with all of its images; transformers would repeat each image."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            inputs_embeds = model_kwargs.get("inputs_embeds")
            is_visual = self.model.get_placeholder_mask(None if inputs_embeds is not None else input_ids, inputs_embeds)
            self.model._check_placeholders(is_visual, len(pixel_values))
            images_per_row = (is_visual.sum(1) // self.config.num_image_tokens).tolist()
            rows = [images.repeat(expand_size, 1, 1, 1) for images in pixel_values.split(images_per_row)]
            pixel_values = torch.cat(rows)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | ({} if pixel_values is None else {"pixel_values": pixel_values})

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Suppresses the placeholder token, which must not be generated without an image."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        has_images = any(model_kwargs.get(name) is not None for name in ("pixel_values", "is_visual"))
        if generation_config.prefill_chunk_size is not None and has_images:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} splits the prompt, and may split the "
                "placeholders of an image; leave it out for prompts with images."
            )
        if self.config.use_vision:
            suppressed = set(generation_config.suppress_tokens or ()) | {self.config.image_token_id}
            generation_config.suppress_tokens = sorted(suppressed)
        return generation_config, model_kwargs


GPTOSSVisionModel.register_for_auto_class("AutoModel")
GPTOSSVisionForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "GPTOSSVisionAdapter",
    "GPTOSSVisionForCausalLM",
    "GPTOSSVisionModel",
    "GPTOSSVisionPreTrainedModel",
    "GPTOSSVisionTopKRouter",
]
