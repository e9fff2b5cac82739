# Copyright 2026 the authors of gpt-oss-vision. SPDX-License-Identifier: Apache-2.0
"""The image processor: images of any kind to normalised arrays of the tower's size."""

import base64
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_valid_image,
    load_image,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_gpt_oss_vision import TOWERS

PIL_MODES = {1: "L", 3: "RGB"}
INTERPOLATION = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
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
    EXIF rotation is applied, the first frame of an animation is used, transparency is composited on white. Of arrays
    and tensors, 16 bits without a sign are scaled to 8, a boolean is black or white, other integers are 0…255. Floats
    are not converted; set `do_rescale=False` if they are 0…1 already. `None` in a list is no image. Paths, and what an
    iterator yields, are opened one after the other, so that one image is in memory at its full size.

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
        """
        Opens paths, URLs and base64 strings, keeping the nesting; images are returned unchanged. An array of several
        images becomes a list, as does `None` in a list, an empty one.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [[] if image is None else self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, (str, os.PathLike)):
            return _open(os.fspath(image_url_or_urls))
        if is_valid_image(image_url_or_urls):
            return _separate(image_url_or_urls)
        raise TypeError(
            f"An image must be a path, a URL, a base64 string, a PIL image, an array or a tensor, "
            f"got {type(image_url_or_urls).__name__}."
        )

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> Iterator[np.ndarray]:
        # One after the other: what is decoded is resized while it is in the caches, and only one is in memory.
        given = images if isinstance(images, Iterator) else flat(images)
        fetched = (image for each in given for image in flat(self.fetch_images([each])))
        return (self.process_image(image, **kwargs) for image in fetched)

    def process_image(self, image: ImageInput, num_channels: int = 3, **kwargs: Any) -> np.ndarray:
        """One image of any kind to an array `(num_channels, height, width)`, 8-bit unless given as floats."""
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {', '.join(map(str, PIL_MODES))}, got {num_channels}.")
        if not isinstance(image, Image.Image):
            array = _to_array(image)
            if array.dtype != np.uint8:
                array = super().process_image(array, **kwargs)
                if len(array) not in (1, num_channels):
                    raise ValueError(f"The image has {len(array)} channels; the tower sees {num_channels}.")
                return np.repeat(array, num_channels, axis=0) if len(array) == 1 else array
            array = np.require(_channels_last(array, **kwargs), requirements=["C", "W"])
            if array.shape[2:] == (3,) and num_channels == 3:
                return array.transpose(2, 0, 1)
            image = Image.fromarray(array)
        if 0 in image.size:
            raise ValueError(f"The image has no pixels: it is {image.width} x {image.height}.")
        image = _to_mode(image, PIL_MODES[num_channels])
        array = np.array(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> np.ndarray:
        """
        As transformers' torchvision backend does, with antialiasing: 8 bits are resized by torch's own kernel, several
        times as fast as by PIL. The pixels of a photograph differ from PIL's by 1 of 255 in less than 1 % of them.
        """
        if image.dtype != np.uint8 or not size.height or resample not in INTERPOLATION:
            return np.ascontiguousarray(super().resize(image, size, resample, **kwargs))
        pixels = torch.from_numpy(image)[None]
        resized = interpolate(pixels, (size.height, size.width), mode=INTERPOLATION[resample], antialias=True)
        return resized[0].contiguous().numpy()

    def rescale(self, image: np.ndarray, scale: float, **kwargs: Any) -> np.ndarray:
        """As in transformers, but in fp32 throughout."""
        return np.multiply(image, np.float32(scale), dtype=np.float32)

    def normalize(self, image: np.ndarray, mean: Any, std: Any, **kwargs: Any) -> np.ndarray:
        """As in transformers, but in fp32 throughout."""
        mean, std = (np.asarray(value, dtype=np.float32).reshape(-1, 1, 1) for value in (mean, std))
        image = np.subtract(image, mean, dtype=np.float32)
        image /= std
        return image


def flat(images: Any) -> list[Any]:
    """The images of a nested list, or the only one, as a list."""
    return [image for nested in images for image in flat(nested)] if isinstance(images, (list, tuple)) else [images]


def _separate(image: Any) -> Any:
    """An array `(n, …)` of images as a list of them, `(h, w)` as `(1, h, w)`, other images unchanged."""
    if isinstance(image, Image.Image):
        return image
    shape = tuple(image.shape)
    if len(shape) not in (2, 3, 4) or (len(shape) > 2 and not {shape[-3], shape[-1]} & {1, 2, 3, 4}):
        raise ValueError(f"An array must be (h, w), (h, w, c) or (c, h, w), with up to 4 channels, got {shape}.")
    return list(image) if len(shape) == 4 else image[None] if len(shape) == 2 else image


def _open(source: str) -> Image.Image:
    """The image of a path, URL or base64 string, decoded, so that a truncated file is reported by name."""
    if source.startswith(("http://", "https://")):
        return load_image(source)
    name, is_file = source if len(source) < 200 else f"{source[:40]}…", os.path.exists(source)
    try:
        content = Path(source).read_bytes() if is_file else _decode_base64(source)
        image = Image.open(BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            is_named = is_file or source.startswith("data:")
            reason = "it is in no format that PIL reads, or damaged" if is_named else "there is no such file"
        raise ValueError(f"Can't read the image {name}: {reason}.") from error
    return image


def _decode_base64(source: str) -> bytes:
    """The bytes of base64, in lines or not, in either alphabet, alone or behind `data:image/png;base64,`."""
    is_data_url = source.startswith("data:")
    data = "".join((source.partition(",")[2] if is_data_url else source).split())
    try:
        return base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)
    except ValueError:
        if is_data_url:
            raise ValueError("what follows the comma is not base64") from None
        raise FileNotFoundError("there is no such file") from None


def _to_array(image: Any) -> np.ndarray:
    """An array, or a tensor on any device, as an array of 8 bits; floats stay floats."""
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        # NumPy doesn't have all of the small types.
        image = image.float() if image.is_floating_point() and image.element_size() < 4 else image
    array = np.asarray(image)
    if array.size == 0:
        raise ValueError(f"The image has no pixels: its shape is {array.shape}.")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _to_8_bits(array)
    if array.dtype.kind in "iu" and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"An image of {array.dtype} has values of 0 to 255, got {array.min()} to {array.max()}.")
    return array.astype(np.uint8) if array.dtype.kind in "iu" else array


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    """Values of 16 bits in 8."""
    return (array.clip(0, 65535) / 257).round().astype(np.uint8)


def _channels_last(array: np.ndarray, input_data_format: Any = None, **kwargs: Any) -> np.ndarray:
    """An array `(h, w)`, `(h, w, c)` or `(c, h, w)`, with 1, 3 or 4 channels, as PIL takes it; one channel as none."""
    if array.ndim == 3:
        channels_first = array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4)
        if input_data_format is not None:
            channels_first = str(getattr(input_data_format, "value", input_data_format)) == "channels_first"
        array = array.transpose(1, 2, 0) if channels_first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image as a viewer shows it, in RGB or grey."""
    if getattr(image, "is_animated", False):
        image.seek(0)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # otherwise it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BIT_MODES:
        # PIL's own conversion clips values above 255.
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.mode == "F":
        raise ValueError("An image of floats has no fixed range; convert it to 8 bits first.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


GPTOSSVisionImageProcessor.register_for_auto_class()

__all__ = ["GPTOSSVisionImageProcessor"]
