"""A `Row` to tensors: tokens, labels, loss mask and pixels; and samples to padded batches, for both training loops.

Labels cover the assistant's text in a chat, and all of a plain text; they are the next token, but `<|return|>` where an
answer of an earlier turn has `<|end|>`. Shapes: b rows, s tokens, n images of c
channels, h x w pixels.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal, TypedDict

import numpy as np
import torch

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .rows import Row, render
from .tokens import ALL, Learned, loss_mask_of, short_ids, targets_of

IGNORE_INDEX = -100

LossWeights = Literal["token", "sample", "square_root"]
EXPONENTS: dict[LossWeights, float] = {"token": 0.0, "sample": 1.0, "square_root": 0.5}
"""A learned token of a sample with n learned tokens has the weight 1 / n^exponent."""


class Sample(TypedDict):
    """One row as tensors, not padded."""

    input_ids: torch.Tensor  # [s]
    labels: torch.Tensor  # [s], shifted: labels[t] is the token to predict at t, or IGNORE_INDEX
    loss_mask: torch.Tensor  # [s], the weight of each label, 0.0 where there is none; 1.0 unless `weighted`
    position_ids: torch.Tensor  # [s]
    pixel_values: torch.Tensor | None  # [n, c, h, w]
    source_ids: torch.Tensor  # [s], the number of its source, everywhere the same


class Batch(TypedDict):
    """A micro-batch of fixed length."""

    tokens: torch.Tensor  # [b, s]
    labels: torch.Tensor  # [b, s]
    loss_mask: torch.Tensor  # [b, s]
    position_ids: torch.Tensor  # [b, s]
    attention_mask: None
    pixel_values: torch.Tensor | None  # [n of all rows, c, h, w]; None when no row has an image
    source_ids: torch.Tensor  # [b, s]
    padding_mask: torch.Tensor  # [b, s] bool, true at padding


class PackedBatch(Batch):
    """One row of several samples, in Megatron's ``thd`` format."""

    cu_seqlens_q: torch.Tensor  # [samples + 1], 0 and the end of each sample
    cu_seqlens_kv: torch.Tensor
    cu_seqlens_q_padded: torch.Tensor  # [samples + 1], the same, but the last end is that of the row
    cu_seqlens_kv_padded: torch.Tensor
    max_seqlen_q: torch.Tensor  # of the padded ones
    max_seqlen_kv: torch.Tensor


def encode_row(row: Row, processor: GPTOSSVisionProcessor, learned_parts: Learned = ALL) -> Sample:
    """Tokens, shifted labels and pixels of one row."""
    return next(encode_rows([row], processor, learned_parts))


def encode_rows(
    rows: Sequence[Row], processor: GPTOSSVisionProcessor, learned_parts: Learned = ALL
) -> Iterator[Sample]:
    """As `encode_row`, of several. All texts come before the images, which displace them from the caches of the CPU."""
    # As the processor itself, which takes several times as long: it tokenises each placeholder.
    with_text = [row for row in rows if row.tokens is None]
    short, lengths = short_ids([render(row, processor) for row in with_text], with_text, processor)
    learned = loss_mask_of(short, processor, learned_parts, lengths)
    ends = np.cumsum(lengths)[:-1]
    texts = zip(
        *(np.split(each, ends) for each in (short, targets_of(short, processor, lengths), learned)), strict=True
    )
    pixels = _pixels_of(rows, processor)
    for row in rows:
        if row.tokens is not None:
            input_ids = torch.as_tensor(row.tokens, dtype=torch.long)
            yield _sample(input_ids, input_ids, torch.ones_like(input_ids, dtype=torch.bool), None)
            continue
        parts = next(texts)
        repeats = np.where(parts[0] == processor.image_token_id, processor.num_image_tokens, 1)
        images = [*islice(pixels, len(row.images))]
        yield _sample(*(torch.from_numpy(part.repeat(repeats)) for part in parts), _stacked(images))


def _sample(
    input_ids: torch.Tensor, targets: torch.Tensor, learned: torch.Tensor, pixels: torch.Tensor | None
) -> Sample:
    # The logits at t predict token t + 1, so the labels move one to the left; the last position predicts nothing.
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:-1] = torch.where(learned[1:], targets[1:], IGNORE_INDEX)
    return Sample(
        input_ids=input_ids,
        labels=labels,
        loss_mask=(labels != IGNORE_INDEX).float(),
        position_ids=torch.arange(len(input_ids)),
        pixel_values=pixels,
        source_ids=torch.zeros_like(input_ids),
    )


def _pixels_of(rows: Sequence[Row], processor: GPTOSSVisionProcessor) -> Iterator[np.ndarray]:
    """The pixels of all images of some rows, by one call of the image processor, whose checks take 0.1 ms."""
    images = (picture.decoded() for row in rows for picture in row.images)
    return iter(processor.image_processor(images)["pixel_values"])


def _stacked(images: Sequence[np.ndarray]) -> torch.Tensor | None:
    """The images of a sample as one tensor; one image is not copied."""
    if not images:
        return None
    return torch.from_numpy(images[0][None] if len(images) == 1 else np.stack(images))


def collate(samples: Sequence[Sample], seq_length: int, pad_token_id: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Pad samples on the right to `seq_length` and join their images, in row order, to one `pixel_values` of `dtype`.

    The length is fixed because pipeline stages agree on shapes before the run. Attention is causal and padding comes
    last, so no attention mask is needed. When no row has an image, `pixel_values` is None.

    Raises:
        UserError: a sample is longer than `seq_length`. Nothing is cut: an image that loses tokens is no image.
    """
    longest = max(len(sample["input_ids"]) for sample in samples)
    if longest > seq_length:
        raise UserError(f"A sample of {longest} tokens doesn't fit a batch of {seq_length}, and rows are never cut.")
    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]

    def padded(rows: list[torch.Tensor], value: float) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, seq_length - len(row)), value=value) for row in rows])

    labels = padded([sample["labels"] for sample in samples], IGNORE_INDEX)
    return Batch(
        tokens=padded([sample["input_ids"] for sample in samples], pad_token_id),
        labels=labels,
        loss_mask=padded([sample["loss_mask"] for sample in samples], 0.0),
        position_ids=torch.arange(seq_length).repeat(len(samples), 1),
        attention_mask=None,
        pixel_values=torch.cat(images).to(dtype) if images else None,
        source_ids=padded([sample["source_ids"] for sample in samples], 0),
        padding_mask=torch.arange(seq_length) >= torch.tensor([[len(sample["input_ids"])] for sample in samples]),
    )


def weighted(sample: Sample, loss_weights: LossWeights) -> Sample:
    """The sample with the weights of its labels in `loss_mask`: 1, 1 / n or 1 / √n for n labels."""
    labels = max(1, int((sample["labels"] != IGNORE_INDEX).sum()))
    return Sample({**sample, "loss_mask": sample["loss_mask"] / labels ** EXPONENTS[loss_weights]})


def collate_pack(samples: Sequence[Sample], seq_length: int, pad_token_id: int) -> PackedBatch:
    """Join samples to one row, and pad it on the right as `collate` does. The padding is behind the last sample's end.

    The last label of a sample is none, so no label crosses into the next one.

    Raises:
        UserError: the samples are longer than `seq_length` together.
    """

    def joined(field: str) -> torch.Tensor:
        return torch.cat([sample[field] for sample in samples])

    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    row = Sample(
        input_ids=joined("input_ids"),
        labels=joined("labels"),
        loss_mask=joined("loss_mask"),
        position_ids=joined("position_ids"),
        pixel_values=torch.cat(images) if images else None,
        source_ids=joined("source_ids"),
    )
    batch = collate([row], seq_length, pad_token_id)
    ends = torch.tensor([0, *(len(sample["input_ids"]) for sample in samples)]).cumsum(0).int()
    ends_padded = ends.clone()
    ends_padded[-1] = seq_length
    lengths = ends_padded.diff()
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()]).unsqueeze(0)
    return PackedBatch(
        **batch,
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=ends_padded,
        cu_seqlens_kv_padded=ends_padded,
        max_seqlen_q=lengths.max(),
        max_seqlen_kv=lengths.max(),
    )


def collate_for_trainer(samples: Sequence[Sample], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch for transformers' `Trainer`, as long as its longest sample: padded on the right, labels not shifted.

    The model shifts them itself. There are `pixel_values` when a row has an image.
    """
    length = max(len(sample["input_ids"]) for sample in samples)
    batch = collate([_completed(sample) for sample in samples], length, pad_token_id)
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, 1:] = batch["labels"][:, :-1]
    inputs = {"input_ids": batch["tokens"], "attention_mask": (~batch["padding_mask"]).long(), "labels": labels}
    return inputs if batch["pixel_values"] is None else inputs | {"pixel_values": batch["pixel_values"]}


def _completed(sample: Sample) -> Sample:
    """A sample of which `Trainer` may have removed what is no argument of the model."""
    ids, labels = sample["input_ids"], sample["labels"]
    return Sample({**sample, "loss_mask": (labels != IGNORE_INDEX).float(), "source_ids": torch.zeros_like(ids)})
