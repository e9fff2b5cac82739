"""A few rows of the validation data with the answers of the model that is being trained, by greedy decoding."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ..data.pictures import Picture, UnusableRow
from ..data.rows import Row, check_text
from ..data.sources.opening import open_source
from ..data.tokens import count_tokens
from ..inference.generate import final_words, inputs_of

ROWS, NEW_TOKENS, PIXELS = 6, 16, 192


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the report shows of a row.

    Attributes:
        images: as data URLs.
        question: the last message before the answer.
        truth: the answer in the data.
        said: the model's, of at most `NEW_TOKENS` tokens.
    """

    images: tuple[str, ...]
    question: str
    truth: str
    said: str

    @property
    def is_right(self) -> bool:
        """Whether both answers are the same words."""
        return self.said == self.truth


@torch.no_grad()
def answers(model: torch.nn.Module, processor: GPTOSSVisionProcessor, path: Path, seq_length: int) -> list[Answer]:
    """Let the model answer `ROWS` rows of a source, spread evenly over it.

    Args:
        model: Megatron's, whole on this rank.
        processor: of the data.
        path: as of `open_source`; rows that cannot be used, or are no chats, are left out.
        seq_length: longest row that is usable.
    """
    was_training = model.training
    model.eval()
    try:
        return [_answered(model, processor, row) for row in _rows(path, processor, seq_length)]
    finally:
        model.train(was_training)


def _rows(path: Path, processor: GPTOSSVisionProcessor, seq_length: int) -> Iterator[Row]:
    source = open_source(path)
    for index in sorted({part * len(source) // ROWS for part in range(ROWS)} if len(source) else ()):
        try:
            row = source.row(index)
            [(tokens, _)] = count_tokens([row], [check_text(row, processor)], processor)
            for picture in row.images:
                picture.check(processor, decode=True)
        except UnusableRow:
            continue
        if tokens <= seq_length and row.messages is not None and row.messages[-1]["role"] == "assistant":
            yield row


def _answered(model: torch.nn.Module, processor: GPTOSSVisionProcessor, row: Row) -> Answer:
    assert row.messages is not None
    question = row.question()
    return Answer(
        images=tuple(_data_url(image) for image in question.images),
        question=_text(question.messages[-1]) if question.messages else "",
        truth=_text(row.messages[-1]),
        said=final_words(processor, _generated(model, processor, question.chat())),
    )


def _generated(model: torch.nn.Module, processor: GPTOSSVisionProcessor, chat: list[dict[str, Any]]) -> list[int]:
    inputs = inputs_of(processor, [chat])
    device = next(model.parameters()).device
    tokens, pixels = inputs["input_ids"].to(device), inputs.get("pixel_values")
    ends, found = processor.tokenizer.generation_config().eos_token_id, []
    for _ in range(NEW_TOKENS):
        logits = model(tokens, None, None, pixel_values=None if pixels is None else pixels.to(device))
        found.append(int(logits[0, -1].argmax()))
        if found[-1] in ends:
            break
        tokens = torch.cat([tokens, tokens.new_tensor([found[-1:]])], dim=1)
    return found


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()


def _data_url(image: Picture) -> str:
    """A picture of at most `PIXELS` pixels a side."""
    with Image.open(io.BytesIO(image.read())) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB")
    picture.thumbnail((PIXELS, PIXELS))
    file = io.BytesIO()
    if max(picture.size) < PIXELS:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=85)
    kind = "png" if file.getvalue().startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
