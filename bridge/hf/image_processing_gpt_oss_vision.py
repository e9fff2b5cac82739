# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The image processor: images of any kind to normalised arrays of the tower's size."""

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import PreTrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    is_valid_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_gpt_oss_vision import TOWERS

PIL_MODES = {1: "L", 3: "RGB"}
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class GPTOSSVisionImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, *optional*, defaults to 3):
        Channels of the tower: 3 for RGB, 1 for grey.
    """

    num_channels: int


class GPTOSSVisionImageProcessor(PilBackend):
    r"""
    Resizes to the tower's size (bicubic), rescales to 0…1 and normalises.

    Takes paths, URLs, base64 strings, PIL images, NumPy arrays and tensors, one or lists of them, of any size and mode:
    EXIF rotation is applied, the first frame of an animation is used, transparency is composited on white, and 16-bit
    grey is scaled to 8 bits. Float arrays are not converted; set `do_rescale=False` if they are 0…1 already.

    Args:
        size (`dict`, *optional*, defaults to `{"height": 224, "width": 224}`): The tower's image size.
        num_channels (`int`, *optional*, defaults to 3): 3 for an RGB tower, 1 for grey.
        image_mean, image_std (`float` or `list[float]`, *optional*, defaults to 0.5): For normalisation.

    Raises:
        ValueError: when an image can't be read or has no pixels; the message names it.

    Example:

    ```python
    >>> image_processor = GPTOSSVisionImageProcessor.from_config(config)
    >>> image_processor(["cat.png", "dog.jpg"], return_tensors="pt").pixel_values.shape
    torch.Size([2, 3, 224, 224])
    ```"""

    valid_kwargs = GPTOSSVisionImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers copies it into each instance
    num_channels = 3
    image_mean = IMAGENET_STANDARD_MEAN[0]  # one number for every channel, so that it also fits grey
    image_std = IMAGENET_STANDARD_STD[0]
    do_resize = True
    do_rescale = True
    do_normalize = True

    @classmethod
    def from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> "GPTOSSVisionImageProcessor":
        """The processor of the tower of a [`GPTOSSVisionConfig`]; `kwargs` override its values."""
        tower, (channels, height, width) = TOWERS[config.vision_config.model_type], config.image_shape
        fields = {"size": {"height": height, "width": width}, "num_channels": channels}
        if channels == 3:
            fields |= {"image_mean": tower.image_mean, "image_std": tower.image_std}
        return cls(**(fields | kwargs))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens paths, URLs and base64 strings, keeping the nesting; images are returned unchanged."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return _open(os.fspath(image_url_or_urls))
        if is_valid_image(image_url_or_urls):
            is_plane = getattr(image_url_or_urls, "ndim", 3) == 2
            return image_url_or_urls[None] if is_plane else image_url_or_urls
        raise TypeError(
            f"An image must be a path, a URL, a base64 string, a PIL image, an array or a tensor, "
            f"got {type(image_url_or_urls).__name__}."
        )

    def process_image(self, image: ImageInput, num_channels: int = 3, **kwargs: Any) -> np.ndarray:
        """One image of any kind to an array `(num_channels, height, width)`, 8-bit unless given as floats."""
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {', '.join(map(str, PIL_MODES))}, got {num_channels}.")
        if not isinstance(image, Image.Image):
            array = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
            if array.size == 0:
                raise ValueError(f"The image has no pixels: its shape is {array.shape}.")
            if array.dtype not in (np.uint8, np.uint16):
                array = super().process_image(array, **kwargs)
                if len(array) not in (1, num_channels):
                    raise ValueError(f"The image has {len(array)} channels; the tower sees {num_channels}.")
                return np.repeat(array, num_channels, axis=0) if len(array) == 1 else array
            image = _to_pil(array, **kwargs)
        if 0 in image.size:
            raise ValueError(f"The image has no pixels: it is {image.width} x {image.height}.")
        array = np.asarray(_to_mode(image, PIL_MODES[num_channels]))
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _open(source: str) -> Image.Image:
    """The image of a path, URL or base64 string, decoded, so that a truncated file is reported by name."""
    if source.startswith(("http://", "https://")):
        return load_image(source)
    name = source if len(source) < 200 else f"{source[:40]}…"
    try:
        content = Path(source).read_bytes() if os.path.exists(source) else _decode_base64(source)
        image = Image.open(BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"Can't read the image {name}: it is in no format that PIL reads, or damaged.") from error
        raise ValueError(f"Can't read the image {name}: {str(error).rstrip('.')}.") from error
    return image


def _decode_base64(source: str) -> bytes:
    data = source.split(",", 1)[1] if source.startswith("data:image/") else source
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise FileNotFoundError("there is no such file") from None


def _to_pil(array: np.ndarray, input_data_format: Any = None, **kwargs: Any) -> Image.Image:
    """An integer array `(h, w)`, `(h, w, c)` or `(c, h, w)`, with 1, 3 or 4 channels, as an image."""
    if array.ndim == 3:
        channels_first = array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4)
        if input_data_format is not None:
            channels_first = str(getattr(input_data_format, "value", input_data_format)) == "channels_first"
        array = array.transpose(1, 2, 0) if channels_first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as a viewer shows it, in RGB or grey."""
    if getattr(image, "is_animated", False):
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        # PIL's own conversion clips values above 255.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("An image of floats has no fixed range; convert it to 8 bits first.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


GPTOSSVisionImageProcessor.register_for_auto_class()

__all__ = ["GPTOSSVisionImageProcessor"]
