# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The processor: text with `<image>` marks and images in, token ids with placeholders and pixels out."""

import re
from typing import Any

from transformers import BatchFeature, PreTrainedConfig
from transformers.image_utils import ImageInput, is_valid_image
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from .tokenization_gpt_oss_vision import CHAT_TEMPLATE, IMAGE_TOKEN, GPTOSSVisionTokenizer

IMAGE_MARK = "<image>"


class GPTOSSVisionProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, with their defaults."""

    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012 - as in transformers


class GPTOSSVisionProcessor(ProcessorMixin):
    r"""
    Wraps a [`GPTOSSVisionImageProcessor`] and a tokenizer. Each image stands at a mark in the text: `<image>`, or the
    placeholder token itself. Every mark becomes `num_image_tokens` placeholders and takes one image, so text alone
    can't smuggle visual tokens in: a mark without an image, typed by whomever, is an error.

    Images go to the rows of a batch
    - by nesting, one list per row, or
    - flat, by the marks of the rows, or one image to each row where no row has any mark.

    The images of a row that has no marks are put in front of its text.

    Args:
        image_processor ([`GPTOSSVisionImageProcessor`]): Makes pixels.
        tokenizer ([`GPTOSSVisionTokenizer`]): gpt-oss's tokenizer, or one trained like it.
        chat_template (`str`, *optional*): Defaults to harmony with images.
        num_image_tokens (`int`, *optional*, defaults to 258): Must be the model's `config.num_image_tokens`.
        image_token (`str`, *optional*, defaults to `"<|reserved_200013|>"`): The token of `config.image_token_id`.

    Raises:
        ValueError: when images and marks don't match; the sentence names both numbers.

    Example:

    ```python
    >>> processor = GPTOSSVisionProcessor.from_config(config, tokenizer)
    >>> inputs = processor(text="What is <image>?", images="cat.png", return_tensors="pt")
    >>> output = model.generate(**inputs)
    >>> processor.decode(output[0], skip_special_tokens=True)
    ```"""

    valid_processor_kwargs = GPTOSSVisionProcessorKwargs

    def __init__(
        self,
        image_processor: GPTOSSVisionImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        num_image_tokens: int = 258,
        image_token: str = IMAGE_TOKEN,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        # Saving sets it anyway; here, so that a processor is the same before it was saved and after.
        self.auto_map = {"AutoProcessor": f"{__name__.rsplit('.', 1)[-1]}.{type(self).__name__}"}
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"The tokenizer has no token {image_token} to hold the places of images.")

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> "GPTOSSVisionProcessor":
        """The processor that fits a [`GPTOSSVisionConfig`]: its tower, its tokens per image, its placeholder."""
        return cls(
            GPTOSSVisionImageProcessor.from_config(config),
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            **kwargs,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list[Any]:
        # Our own classes, not what the Auto classes know: this must work in a process that has registered nothing.
        kwargs.pop("trust_remote_code", None)
        kwargs.pop("_from_auto", None)
        return [
            GPTOSSVisionImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            GPTOSSVisionTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[GPTOSSVisionProcessorKwargs],
    ) -> BatchFeature:
        """
        Returns `input_ids` and `attention_mask`, `(b, s)`, and where there are images `pixel_values (n, c, h, w)`, in
        the order of their marks. Character offsets, if asked for, are those of the text as given, each placeholder
        having those of its mark.
        """
        outputs = super().__call__(images=images, text=text, **kwargs)
        if "offset_mapping" in outputs and "pixel_values" in outputs:
            given = [text] if isinstance(text, str) else text
            rows = zip(given, outputs["input_ids"], outputs["offset_mapping"], strict=True)
            offsets = {"offset_mapping": [self._offsets_as_given(*row) for row in rows]}
            tensor_type = kwargs.get("return_tensors", kwargs.get("text_kwargs", {}).get("return_tensors"))
            outputs.update(BatchFeature(offsets, tensor_type=tensor_type))
        return outputs

    def prepare_inputs_layout(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """Opens the images, gives them to the rows of `text`, and marks their places where the text doesn't."""
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        if text is not None:
            rows = self._images_by_row(images, text)
            text = [self._marked(row, index, len(rows[index])) for index, row in enumerate(text)]
            images = [image for row in rows for image in row] or None
        return images, text, videos, audio

    def _images_by_row(self, images: Any, text: list[str]) -> list[list[Any]]:
        if images is None:
            return [[] for _ in text]
        if is_valid_image(images):
            images = list(images) if getattr(images, "ndim", 3) == 4 else [images]
        if images and all(isinstance(row, (list, tuple)) for row in images):
            if len(images) != len(text):
                raise ValueError(f"{_count(len(images), 'list')} of images can't go to {_count(len(text), 'text')}.")
            return [list(row) for row in images]
        marks = [len(self._mark.findall(row)) for row in text]
        if len(text) == 1:
            return [list(images)]
        if not any(marks) and len(images) in (0, len(text)):
            return [[image] for image in images] or [[] for _ in text]
        if sum(marks) != len(images):
            raise ValueError(f"The texts have {sum(marks)} {IMAGE_MARK} for {_count(len(images), 'image')}.")
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in marks]

    def _marked(self, row: str, index: int, num_images: int) -> str:
        marks = len(self._mark.findall(row))
        if marks not in (0, num_images) or (marks and not num_images):
            raise ValueError(f"Text {index} has {marks} {IMAGE_MARK} for {_count(num_images, 'image')}.")
        return self._mark.sub(self.image_token, row) if marks else self.image_token * num_images + row

    @property
    def _mark(self) -> re.Pattern[str]:
        return re.compile(f"{re.escape(IMAGE_MARK)}|{re.escape(self.image_token)}")

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int) -> str:
        """What stands in the text for one image."""
        return self.image_token * self.num_image_tokens

    def _offsets_as_given(self, row: str, input_ids: Any, offsets: Any) -> list[tuple[int, int]]:
        """Offsets `(s, 2)` in a row whose marks were expanded, to offsets in the row as it was given."""
        spans = [match.span() for match in self._mark.finditer(row)]
        given, placeholders, shift = [], 0, 0
        for token, (start, end) in zip(input_ids, offsets, strict=True):
            if token == self.image_token_id:
                image = placeholders // self.num_image_tokens
                given.append(spans[image] if spans else (0, 0))
                placeholders += 1
                shift = given[-1][1] - int(end)
            else:
                is_padding = start == end == 0
                given.append((0, 0) if is_padding else (int(start) + shift, int(end) + shift))
        return given

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **_: Any) -> MultiModalData:
        # Asked by vLLM. Every image is resized to one square, so its size doesn't matter.
        num_images = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * num_images, num_image_patches=[1] * num_images)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


GPTOSSVisionProcessor.register_for_auto_class()

__all__ = ["GPTOSSVisionProcessor"]
