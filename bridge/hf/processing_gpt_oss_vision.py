# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The processor: text with `<image>` tags and images to token ids with placeholders and pixels."""

import re
from typing import Any

from transformers import BatchFeature, PreTrainedConfig
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor, flat
from .tokenization_gpt_oss_vision import CHAT_TEMPLATE, IMAGE_TOKEN, GPTOSSVisionTokenizer

IMAGE_TAG = "<image>"


class GPTOSSVisionProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of a call, with their defaults."""

    _defaults = {"text_kwargs": {"padding": False}}  # noqa: RUF012 - as in transformers


class _ProcessorMixinBefore510(ProcessorMixin):
    """
    For transformers < 5.10, and to be removed with them: their `__call__` gives text and images to the tokenizer and
    the image processor as they are. This one takes the steps of later versions, those that this processor needs.
    """

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any):
        if images is None and text is None and videos is None and audio is None:
            raise ValueError(f"You need to provide at least one input to call {type(self).__name__}")
        images, text, videos, audio = self.prepare_inputs_layout(images, text, videos, audio, **kwargs)
        merged = self._merge_kwargs(self.valid_processor_kwargs, self.tokenizer.init_kwargs, **kwargs)
        data, text_kwargs = {}, merged["text_kwargs"]
        if images is not None:
            data |= self.image_processor(images, **merged["images_kwargs"])
        if text is not None:
            with_token_types = text_kwargs.pop("return_mm_token_type_ids", False)
            text = [row.replace(self.image_token, self.replace_image_token(data, 0)) for row in text]
            text_inputs = self.tokenizer(text, **text_kwargs)
            self._check_special_mm_tokens(text, text_inputs, modalities=["image"])
            if with_token_types:
                self.image_ids = [self.image_token_id]
                text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
            data = {**text_inputs, **data}
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    def prepare_inputs_layout(
        self, images: Any, text: Any, videos: Any, audio: Any, **_: Any
    ) -> tuple[Any, Any, Any, Any]:
        text = [text] if isinstance(text, str) else text
        return None if images is None else self.image_processor.fetch_images(images), text, videos, audio


_Base = ProcessorMixin if hasattr(ProcessorMixin, "prepare_inputs_layout") else _ProcessorMixinBefore510


class GPTOSSVisionProcessor(_Base):
    r"""
    Wraps a [`GPTOSSVisionImageProcessor`] and a tokenizer. The place of an image is a tag in the text: `<image>` or
    the placeholder token. Every tag takes one image and becomes `num_image_tokens` placeholders; a tag without an
    image is an error, so that text alone never makes visual tokens.

    Images are assigned to the rows of a batch
    - by nesting, one list per row, or `None` for a row without images, or
    - in a flat list, by the tags of the rows, or one image per row where no row has a tag.

    The images of a row without tags are put in front of its text.

    Args:
        image_processor ([`GPTOSSVisionImageProcessor`]): Makes pixels.
        tokenizer ([`GPTOSSVisionTokenizer`]): gpt-oss's tokenizer, or one trained like it.
        chat_template (`str`, *optional*): Defaults to harmony with images.
        num_image_tokens (`int`, *optional*, defaults to 258): Must be the model's `config.num_image_tokens`.
        image_token (`str`, *optional*, defaults to `"<|reserved_200013|>"`): The token of `config.image_token_id`.

    Raises:
        ValueError: when images and tags don't match; the message has both numbers.

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
        # Saving sets it; set here too, so that a processor is equal before and after saving.
        self.auto_map = {"AutoProcessor": f"{__name__.rsplit('.', 1)[-1]}.{type(self).__name__}"}
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"The tokenizer has no token {image_token} for images.")

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, **kwargs: Any
    ) -> "GPTOSSVisionProcessor":
        """The processor of a [`GPTOSSVisionConfig`]: its tower, its tokens per image, its placeholder."""
        return cls(
            GPTOSSVisionImageProcessor.from_config(config),
            tokenizer,
            num_image_tokens=config.num_image_tokens,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            **kwargs,
        )

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> list[Any]:
        # Our own classes, not the Auto classes: this must work in a process where nothing is registered.
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
        the order of their tags. Character offsets, if requested, refer to the text as given; those of a placeholder are
        those of its tag. They ascend: padding on the left is at the start of the text, padding on the right at its end.

        Raises:
            ValueError: when images and tags don't match, there is no text, or an image can't be read.
            TypeError: when a text is no string, or an image nothing that can be one.
        """
        text = text if text is None or isinstance(text, str) else list(text)
        outputs = super().__call__(images=images, text=text, **kwargs)
        if "offset_mapping" in outputs:
            given = [text] if isinstance(text, str) else text
            rows = zip(given, outputs["input_ids"], outputs["offset_mapping"], strict=True)
            offsets = {"offset_mapping": [self._offsets_as_given(*row) for row in rows]}
            given_as = [kwargs, *(kwargs.get(name, {}) for name in ("text_kwargs", "common_kwargs"))]
            tensor_type = next((each["return_tensors"] for each in given_as if "return_tensors" in each), None)
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
        """Opens the images, assigns them to the rows of `text`, and inserts missing tags."""
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        if text is None:
            images = None if images is None else flat(images)
        else:
            _check_text(text)
            rows = self._images_by_row(images, text)
            text = [self._tagged(row, index, len(rows[index])) for index, row in enumerate(text)]
            images = [image for row in rows for image in row] or None
        return images, text, videos, audio

    def _images_by_row(self, images: Any, text: list[str]) -> list[list[Any]]:
        if images is None:
            return [[] for _ in text]
        images = images if isinstance(images, list) else [images]
        if any(isinstance(row, list) for row in images):
            if len(images) != len(text):
                raise ValueError(f"{_count(len(images), 'list')} of images can't go to {_count(len(text), 'text')}.")
            return [flat(row) for row in images]
        tags = [len(self._tag.findall(row)) for row in text]
        if len(text) == 1:
            return [list(images)]
        if not any(tags) and len(images) in (0, len(text)):
            return [[image] for image in images] or [[] for _ in text]
        if sum(tags) != len(images):
            raise ValueError(f"The texts have {sum(tags)} {IMAGE_TAG} for {_count(len(images), 'image')}.")
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in tags]

    def _tagged(self, row: str, index: int, num_images: int) -> str:
        tags = len(self._tag.findall(row))
        if tags not in (0, num_images) or (tags and not num_images):
            raise ValueError(f"Text {index} has {tags} {IMAGE_TAG} for {_count(num_images, 'image')}.")
        return self._tag.sub(self.image_token, row) if tags else self.image_token * num_images + row

    @property
    def _tag(self) -> re.Pattern[str]:
        return re.compile(f"{re.escape(IMAGE_TAG)}|{re.escape(self.image_token)}")

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int) -> str:
        """The text of one image: its placeholders."""
        return self.image_token * self.num_image_tokens

    def _offsets_as_given(self, row: str, input_ids: Any, offsets: Any) -> list[tuple[int, int]]:
        """
        Maps offsets `(s, 2)` in a row with expanded tags to offsets in the row as given. transformers uses offsets for
        `return_assistant_tokens_mask`, with character positions of the unexpanded chat, and bisects them; it gives all
        padding (0, 0).
        """
        spans = [match.span() for match in self._tag.finditer(row)]
        given, placeholders, shift = [], 0, 0
        padding = (0, 0)
        for token, (start, end) in zip(input_ids, offsets, strict=True):
            if start == end == 0:
                given.append(padding)
                continue
            padding = (len(row), len(row))
            if token == self.image_token_id:
                image = placeholders // self.num_image_tokens
                given.append(spans[image] if spans else (0, 0))
                placeholders += 1
                shift = given[-1][1] - int(end)
            else:
                given.append((int(start) + shift, int(end) + shift))
        return given

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **_: Any) -> MultiModalData:
        # Called by vLLM. Every image is resized to the tower's size, so its own size doesn't matter.
        num_images = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * num_images, num_image_patches=[1] * num_images)


def _check_text(text: list[Any]) -> None:
    if not text:
        raise ValueError("There is no text: the list is empty.")
    for row in text:
        if not isinstance(row, str):
            raise TypeError(f"A text must be a string, got {type(row).__name__}.")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


GPTOSSVisionProcessor.register_for_auto_class()

__all__ = ["GPTOSSVisionProcessor"]
