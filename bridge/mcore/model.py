"""GPT-OSS-Vision on Megatron-Core: a GPTModel with image tokens in place of placeholder tokens.

Shapes: b rows, s positions, h hidden size, n images of the microbatch, p placeholder tokens per image.
"""

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from ...errors import UserError
from .batch_statistics import BatchStatistics, after_image, sample_lengths
from .context_parallel import slice_for_context_parallel
from .packing import check_packing, padding_of
from .vision import VisionStage


class MCoreGPTOSSVisionModel(GPTModel):
    """Megatron-Core's `GPTModel` with a vision stage on the first pipeline stage.

    The decoder has GPTModel's parameter names; the added ones are ``vision_adapter.*`` and ``vision_bias``. Takes
    GPTModel's arguments; the config is a `GPTOSSVisionProvider`.
    """

    def __init__(self, config, *args, **kwargs):
        # Image tokens are merged into the embeddings of the whole sequence; only the result is scattered.
        super().__init__(config, *args, scatter_embedding_sequence_parallel=False, **kwargs)
        # Megatron-Core reduces the gradients of experts over a group of their own only where it differs from the dense
        # one. The optimizer's states depend on it, so a run could not continue with another expert parallelism.
        for name, parameter in self.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False
        has_vision = self.pre_process and config.use_vision
        self.vision_adapter = VisionStage(config, self.pg_collection) if has_vision else None
        self.batch_statistics = BatchStatistics()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *args,
        pixel_values: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        source_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `GPTModel.forward`, with images.

        Args:
            input_ids: ``[b, s]`` token ids, on every pipeline stage: the visual mask is computed from them.
            pixel_values: ``[n, channels, height, width]``, the images of all rows in the order of their
                placeholders; None or n = 0 without images. Read on the first stage only.
            labels, loss_mask: ``[b, s]``, of the whole sequence also under context parallelism.
            packed_seq_params: boundaries of the samples when ``input_ids`` is one row of several samples.
            source_ids: ``[b, s]`` int64, of the data, where losses are counted by source.
            padding_mask: ``[b, s]`` bool, true at padding, which the routers' losses and counts leave out.

        Returns:
            Loss per token ``[b, s / cp]`` with labels, else logits ``[b, s / cp, vocab / tp]``; on stages that are not
            the last, hidden states ``[s / cp / tp, b, h]``. Under context parallelism, with labels and a loss mask,
            the loss and this rank's pieces of the mask, as Megatron-Bridge's ``vlm_step`` expects.

        Raises:
            UserError: when images and placeholders, or a padding mask and the ids, don't match; for packed samples that
                would not be exact (`check_packing`).
        """
        if packed_seq_params is not None:
            check_packing(input_ids, packed_seq_params, self.pg_collection.cp.size(), self.config.transformer_impl)
        is_visual = self.visual_mask(input_ids)
        if self.pre_process and decoder_input is None:
            decoder_input = self.embed(input_ids, position_ids, is_visual, pixel_values)
        cp_group = self.pg_collection.cp
        if labels is not None:
            labels = slice_for_context_parallel(labels, 1, cp_group)
        if loss_mask is not None:
            loss_mask = slice_for_context_parallel(loss_mask, 1, cp_group)
        output = super().forward(
            *(input_ids, position_ids, attention_mask, decoder_input, labels, *args),
            padding_mask=self.local_masks(is_visual, packed_seq_params, padding_mask),
            loss_mask=loss_mask,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        is_loss = self.post_process and labels is not None and loss_mask is not None
        if is_loss and self.training:
            lengths = sample_lengths(is_visual, packed_seq_params, padding_mask)
            self._count_losses(output, loss_mask, after_image(is_visual, packed_seq_params), lengths, source_ids)
        return (output, loss_mask) if is_loss and cp_group.size() > 1 else output

    def _count_losses(
        self,
        losses: torch.Tensor,
        loss_mask: torch.Tensor,
        is_after_image: torch.Tensor,
        lengths: torch.Tensor,
        source_ids: torch.Tensor | None,
    ) -> None:
        """Add a microbatch to the statistics; losses and mask are this rank's, ``[b, s / cp]``, the others whole."""
        cp_group = self.pg_collection.cp
        is_after_image = slice_for_context_parallel(is_after_image, 1, cp_group)
        if source_ids is not None:
            source_ids = slice_for_context_parallel(source_ids, 1, cp_group)
        self.batch_statistics.add_losses(losses, loss_mask, is_after_image, lengths, source_ids)

    def visual_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[b, s]`` bool, true at placeholder tokens."""
        if not self.config.use_vision:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == self.config.image_token_id

    def embed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        is_visual: torch.Tensor,
        pixel_values: torch.Tensor | None,
    ) -> torch.Tensor:
        """Token embeddings with image tokens merged in, this rank's shard of the sequence: ``[s / cp / tp, b, h]``."""
        embeddings = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if self.vision_adapter is not None:
            embeddings = self.merge(embeddings, is_visual, pixel_values)
        elif pixel_values is not None and len(pixel_values):
            raise UserError(f"{len(pixel_values)} images were given to a model that has use_vision=False.")
        if self.config.recompute_granularity is not None and torch.is_grad_enabled() and not embeddings.requires_grad:
            # Everything before the decoder is frozen. Megatron's activation checkpointing computes gradients only for
            # blocks whose input requires one.
            embeddings.requires_grad_()
        embeddings = slice_for_context_parallel(embeddings, 0, self.pg_collection.cp)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        return embeddings

    def merge(
        self, embeddings: torch.Tensor, is_visual: torch.Tensor, pixel_values: torch.Tensor | None
    ) -> torch.Tensor:
        """Replace the placeholders of ``[s, b, h]`` embeddings by image tokens."""
        images = 0 if pixel_values is None else len(pixel_values)
        if self.training:
            self.batch_statistics.images += images
        features = self.vision_adapter(pixel_values)
        check_placeholders(is_visual, images, features.shape[1])
        image_tokens = features.flatten(0, 1).to(embeddings.dtype)
        if images == 0:
            return embeddings + image_tokens.sum()
        # Images are counted row by row. Unlike `masked_scatter`, whose backward reads the number of placeholders, this
        # never synchronizes with the GPU.
        nth = is_visual.flatten().cumsum(0).view_as(is_visual) - 1
        placed = image_tokens.index_select(0, nth.mT.flatten().clamp(0, len(image_tokens) - 1)).view_as(embeddings)
        return torch.where(is_visual.mT.unsqueeze(-1), placed, embeddings).contiguous()

    def local_masks(
        self, is_visual: torch.Tensor, packed: PackedSeqParams | None, is_padding: torch.Tensor | None
    ) -> torch.Tensor:
        """This rank's shard of what the routers read: sliced for context, then for sequence parallelism.

        It is the visual mask ``[b, s]``; of packed samples, and where padding is given, ``[2b, s]``: the visual mask,
        and the mask of padding.

        Megatron-Core 0.19.2 scatters ``padding_mask`` on the first pipeline stage only, and only when it embeds the
        tokens itself; here every stage slices it.
        """
        if is_padding is not None and is_padding.shape != is_visual.shape:
            raise UserError(
                f"padding_mask {list(is_padding.shape)} is not of the shape of input_ids {list(is_visual.shape)}."
            )
        if packed is not None:
            behind = padding_of(packed, is_visual.shape[1])
            is_padding = behind if is_padding is None else behind | is_padding.bool()
        masks = is_visual if is_padding is None else torch.cat([is_visual, is_padding.bool()])
        masks = slice_for_context_parallel(masks, 1, self.pg_collection.cp)
        if not self.config.sequence_parallel:
            return masks
        group = self.pg_collection.tp
        return masks.chunk(group.size(), dim=1)[group.rank()].contiguous()


def check_placeholders(is_visual: torch.Tensor, images: int, tokens_per_image: int) -> None:
    """Check that the number of placeholder tokens is that of the image tokens.

    On a GPU the check runs on the device, without a synchronization per microbatch; the data loaders of `recipes` have
    checked each row before.

    Raises:
        UserError: when they differ. On a GPU the kernel aborts instead.
    """
    needed, found = images * tokens_per_image, is_visual.sum()
    sentence = f"{images} image{' needs' if images == 1 else 's need'} {needed} placeholder tokens; the batch has"
    if found.is_cuda:
        torch.ops.aten._assert_async.msg(found == needed, f"{sentence} another number.")
    elif found != needed:
        raise UserError(f"{sentence} {int(found)}.")
