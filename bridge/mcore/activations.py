"""Activations that a rank holds for the backward pass, about: of the decoder, with recomputation, and of the tower."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod

from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from ..hf.configuration_gpt_oss_vision import image_shape, tower_config, tower_tokens
from .backend import ENGINE


@dataclass(frozen=True, slots=True)
class Kept:
    """Values of ``params_dtype`` that a part of the model holds, per token or per image of one microbatch.

    Attributes:
        between: from the forward to the backward pass.
        within: beside these, while the part itself is computed or recomputed.
        after: of all these, from the backward to the next forward pass.
    """

    between: float
    within: float = 0.0
    after: float = 0.0


def activations_of_stage(
    provider, stage: int, *, micro_batch_size: int, microbatches: int, images: int | None, trained: set[str]
) -> float:
    """Bytes of activations on a rank of a pipeline stage, at most at one time.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``.
        micro_batch_size: rows of a microbatch.
        microbatches: of a step on a data-parallel rank.
        images: of a microbatch; None for rows full of images.
        trained: the groups of parameters that have gradients; ``adapter`` stands for adapters on the decoder.
    """
    ranks = provider.tensor_model_parallel_size * provider.context_parallel_size
    tokens = micro_batch_size * provider.seq_length / ranks
    chunks = [_chunk(provider, layers, trained) for layers in layers_of_chunks(provider, stage)]
    mean, within = sum(chunk.between for chunk in chunks) / len(chunks), max(chunk.within for chunk in chunks)
    held = chunks_in_flight(provider, stage, microbatches) * mean
    if stage == provider.pipeline_model_parallel_size - 1:
        within = max(within, _logits(provider))  # nothing is recomputed yet while they are held
    values = tokens * (held + within)
    if stage == 0 and provider.use_vision:
        if images is None:
            images = micro_batch_size * images_of_full_row(provider)
        tower = tower_activations(provider, trained)
        # A rank without images runs the tower on a blank one.
        share = max(-(-images // ranks), 1)
        between = microbatches_in_first_chunk(provider, microbatches) * share * tower.between
        # The tower runs before the decoder in the forward pass, and after it in the backward pass.
        beside_tower = tokens * (held - chunks[0].between + chunks[0].after)
        values = max(values, beside_tower + share * tower.within) + between
    return values * provider.params_dtype.itemsize


def images_of_full_row(provider) -> int:
    """The most images of a row."""
    return provider.seq_length // provider.num_image_tokens


def layers_of_chunks(provider, stage: int) -> list[int]:
    """Layers of each model chunk of a pipeline stage; one chunk without interleaving."""
    if provider.pipeline_model_parallel_layout is not None:
        # Megatron-Core 0.19.2 ignores the stage here and counts the layers of the calling rank.
        chunks = provider.pipeline_model_parallel_layout.layout[stage]
        return [chunk.count(LayerType.decoder) for chunk in chunks]
    chunks = range(provider.virtual_pipeline_model_parallel_size or 1)
    interleaved = provider.virtual_pipeline_model_parallel_size is not None
    return [get_num_layers_to_build(provider, chunk if interleaved else None, stage) for chunk in chunks]


def chunks_in_flight(provider, stage: int, microbatches: int) -> int:
    """Forward passes of model chunks whose backward pass is outstanding, at most, on a rank of a pipeline stage.

    One more than the warm-up of Megatron-Core's 1F1B schedules (``get_pp_rank_microbatches``): with and without
    interleaving, where a chunk is the whole stage.
    """
    pp, vpp = provider.pipeline_model_parallel_size, provider.virtual_pipeline_model_parallel_size
    if vpp is None:
        return min(pp - stage, microbatches)
    group = provider.microbatch_group_size_per_vp_stage or pp
    return min(2 * (pp - stage - 1) + (vpp - 1) * group + 1, microbatches * vpp)


def microbatches_in_first_chunk(provider, microbatches: int) -> int:
    """Microbatches whose backward pass is outstanding, at most, in the first model chunk of the first stage.

    With interleaving they are more than their share of `chunks_in_flight`, as the first chunk comes last in the
    backward pass; counted along Megatron-Core's table of the schedule.
    """
    ahead, vpp = chunks_in_flight(provider, 0, microbatches), provider.virtual_pipeline_model_parallel_size
    if vpp is None:
        return ahead
    group = provider.microbatch_group_size_per_vp_stage or provider.pipeline_model_parallel_size
    chunks = [chunk for _, chunk in get_schedule_table(microbatches, vpp, group)]
    entered = [*accumulate(chunk == 0 for chunk in chunks)]
    left = [
        *accumulate((chunk == vpp - 1 for chunk in chunks), initial=0)
    ]  # the backward pass counts chunks from the end
    return max(entered[min(done + ahead, len(chunks)) - 1] - left[done] for done in range(len(chunks)))


def _logits(provider) -> float:
    """Per token: the logits of one microbatch, and their fp32 copy in the loss."""
    copies = 2 if provider.cross_entropy_loss_fusion else 1  # Megatron-Core's fused loss makes a second one
    return provider.vocab_size * (1 + copies * 4 / provider.params_dtype.itemsize)


def _chunk(provider, layers: int, trained: set[str]) -> Kept:
    """The layers of a model chunk, per token, as `recompute_granularity` has them.

    What is recomputed leaves its input and the input's gradient behind: Megatron-Core's token dispatcher keeps the
    routing weights of the last forward pass as its attribute, and with them the graph of the recomputed layer.
    """
    layer = _layer(provider, trained)
    whole, hidden, granularity = layer.between + layer.within, provider.hidden_size, provider.recompute_granularity
    if not layers or granularity is None:
        return Kept(layers * layer.between)
    if granularity == "selective":
        inputs = layers * hidden if "moe" in provider.recompute_modules else 0
        return Kept(layers * layer.between, layer.within + inputs, 2 * inputs)
    number = min(provider.recompute_num_layers, layers)
    if provider.recompute_method == "uniform":  # the input of each group of layers
        inputs = -(-layers // number) * hidden
        return Kept(inputs, number * whole + inputs, 2 * inputs)
    # The first layers; when they are recomputed, those after them have been released.
    inputs, others = number * hidden, (layers - number) * whole
    return Kept(inputs + others, max(whole + inputs - others, 0), 2 * inputs)


def _layer(provider, trained: set[str]) -> Kept:
    """One layer, per token; with selective recomputation without what the modules of `recompute_modules` compute again.

    The input of a product with a frozen weight is not kept. Recomputing ``core_attn`` frees nothing of this: queries,
    keys and values stay as its inputs, and the context as the input of the output projection. Neither do ``mlp`` and
    ``shared_experts``, which gpt-oss does not have.
    """
    learns = bool(trained & {"language_model", "adapter"})
    hidden, head, ffn = provider.hidden_size, provider.kv_channels, provider.moe_ffn_hidden_size
    # q, k, v and the context.
    attention = (2 * provider.num_attention_heads + 2 * provider.num_query_groups) * head
    if provider.transformer_impl == ENGINE:
        norm = hidden
        # Input, gate and up, both again clamped, their product, which includes the routing weight.
        expert = learns * hidden + 5 * ffn
    else:
        # In fp32: the input and, to train the weight, the input divided by its root mean square.
        norm = (1 + learns) * hidden * 4 / provider.params_dtype.itemsize
        # Gate and up, four factors and products of them, and the output, which the routing weight multiplies; to train
        # the weights, the input before and after sorting, and the product.
        expert = hidden + 6 * ffn + learns * (2 * hidden + ffn)
    # Two norms, the inputs of qkv and of the router, and the chosen experts.
    experts = provider.moe_router_topk * expert
    whole = 2 * norm + learns * 2 * hidden + attention + experts
    if provider.recompute_granularity != "selective":
        return Kept(whole)
    freed = 0.0
    modules = {*provider.recompute_modules}
    if "moe" in modules:
        freed = experts + learns * hidden - hidden  # the input of the router is kept in any case
    elif "moe_act" in modules:
        freed = provider.moe_router_topk * 3 * ffn  # both halves clamped, and their product
    if "layernorm" in modules and "moe" not in modules:
        freed += learns * hidden  # the norm before the router; that before qkv is a part of Transformer Engine's linear
    return Kept(whole - freed, freed)


def tower_activations(provider, trained: set[str]) -> Kept:
    """Tower, norm and projection, per image.

    A frozen tower keeps nothing but what the norm and the projection need. With `vision_recompute` the pixels are kept,
    and all of a microbatch is computed again at once.
    """
    vision = tower_config(provider.vision_config)
    width, tokens, pixels = vision.hidden_size, tower_tokens(vision), prod(image_shape(vision))
    # In the MLP the input and the output of the activation, and of the approximate GELU the sigmoid between them.
    factors = 3 if vision.hidden_act == "quick_gelu" else 2
    # The inputs of two norms, their outputs, q, k, v and the context.
    layer = tokens * (8 * width + factors * vision.intermediate_size)
    tower_learns, projection_learns = (f"vision_{part}" in trained for part in ("model", "projection"))
    # The input and output of the norm.
    ends = (tower_learns or projection_learns) * 2 * provider.num_image_tokens * width
    if not tower_learns:
        return Kept(pixels, layer + ends) if provider.vision_recompute else Kept(ends, layer)
    # Pixels, all layers, the last norm.
    whole = pixels + vision.num_hidden_layers * layer + tokens * width + ends
    return Kept(pixels, whole) if provider.vision_recompute else Kept(whole)
