"""The image processor: every kind of image becomes the pixels that a viewer would show, or a clear error."""

import base64
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, PILImageResampling

from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from tiny import tiny_config, tiny_vision_config

SIDE = 8


@pytest.fixture
def processor() -> GPTOSSVisionImageProcessor:
    return GPTOSSVisionImageProcessor(size={"height": SIDE, "width": SIDE})


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """Smooth colours that differ in every corner."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack((x, y, 255 - x), axis=-1).astype(np.uint8))


def pixels(processor: GPTOSSVisionImageProcessor, images) -> torch.Tensor:
    return processor(images, return_tensors="pt").pixel_values


def cubic_weights(given: int, wanted: int) -> np.ndarray:
    """Rows of weights by which `wanted` pixels are made of `given`: Keys' cubic (a = -0.5), wider where it shrinks."""
    scale = max(given / wanted, 1.0)
    centres = (np.arange(wanted) + 0.5) * given / wanted
    distance = np.abs(np.arange(given) + 0.5 - centres[:, None]) / scale
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (1, 300), (7, 9), (SIDE, SIDE)])
def test_images_are_resized_by_the_antialiased_cubic_filter(width, height, channels):
    image = picture(width, height).convert({1: "L", 3: "RGB"}[channels])
    values = np.asarray(image, dtype=np.float64).reshape(height, width, channels)
    expected = np.einsum("hy,wx,yxc->chw", cubic_weights(height, SIDE), cubic_weights(width, SIDE + 2), values)
    settings = {"size": {"height": SIDE, "width": SIDE + 2}, "do_rescale": False, "do_normalize": False}
    ours = pixels(GPTOSSVisionImageProcessor(**settings, num_channels=channels), image)[0].double().numpy()
    assert np.abs(ours - expected.clip(0, 255)).max() <= 1
    by_pil = np.asarray(image.resize((SIDE + 2, SIDE), Image.Resampling.BICUBIC)).reshape(SIDE, SIDE + 2, channels)
    assert np.abs(ours - by_pil.transpose(2, 0, 1)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_rescaled_and_normalised_as_by_transformers(channels):
    settings = {"image_mean": [0.48, 0.45, 0.4][:channels], "image_std": [0.26, 0.25, 0.27][:channels]}
    settings |= {"do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    image = picture().convert({1: "L", 3: "RGB"}[channels])
    ours = pixels(GPTOSSVisionImageProcessor(**settings, num_channels=channels), image)
    torch.testing.assert_close(ours, pixels(PilBackend(**settings), image), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [{"shortest_edge": 8}, {"height": 8, "width": 5}])
@pytest.mark.parametrize("resample", [0, PILImageResampling.LANCZOS])
def test_other_sizes_and_filters_are_those_of_transformers(size, resample):
    plain = PilBackend(do_resize=True, do_rescale=False, do_normalize=False)
    ours = GPTOSSVisionImageProcessor(do_rescale=False, do_normalize=False)
    given = {"size": size, "resample": resample, "return_tensors": "pt"}
    assert torch.equal(ours(picture(), **given).pixel_values, plain(picture(), **given).pixel_values)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 300), (500, 3), (SIDE, SIDE)])
def test_any_size_is_taken(processor, width, height):
    assert pixels(processor, picture(width, height)).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_any_mode_is_taken(processor, mode):
    image = picture().convert("L").convert(mode) if mode.startswith("I") else picture().convert(mode)
    values = pixels(processor, image)
    assert values.shape == (1, 3, SIDE, SIDE)
    assert values.isfinite().all()


@pytest.mark.parametrize("kind", ["I;16", "I", "array", "png"])
def test_sixteen_bits_keep_their_range(processor, kind):
    grey = np.asarray(picture().convert("L"))
    wide = grey.astype(np.uint16) * 257
    image = Image.fromarray(wide)
    if kind == "I":
        image = Image.fromarray(wide.astype(np.int32))
    elif kind == "array":
        image = wide
    elif kind == "png":
        file = BytesIO()
        image.save(file, "png")
        image = Image.open(file)
    torch.testing.assert_close(pixels(processor, image), pixels(processor, Image.fromarray(grey)))


def test_a_palette_shows_its_colours(processor):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert pixels(processor, image)[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_transparency_is_laid_on_white(processor, mode):
    image = Image.new("LA" if mode == "LA" else "RGBA", (4, 4), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    if mode == "palette":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([0, 0, 0])
        image.info["transparency"] = 0
    assert (pixels(processor, image) == 1).all()


def test_exif_rotation_is_applied(processor):
    image, file = picture(), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    image.save(file, "png", exif=exif)
    turned = image.rotate(-90, expand=True)
    torch.testing.assert_close(pixels(processor, Image.open(file)), pixels(processor, turned))


def test_of_an_animation_the_first_frame_is_taken(processor):
    file = BytesIO()
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(file, "gif", save_all=True, append_images=[second])
    animation = Image.open(file)
    animation.seek(1)
    assert pixels(processor, animation)[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("layout", ["hwc", "chw", "tensor", "hw", "hw1", "1hw", "hwa"])
def test_arrays_are_pictures_too(processor, layout):
    image = picture()
    array = np.asarray(image)
    grey = np.asarray(image.convert("L"))
    given, same_as = {
        "hwc": (array, image),
        "chw": (array.transpose(2, 0, 1), image),
        "tensor": (torch.from_numpy(array.transpose(2, 0, 1).copy()), image),
        "hw": (grey, image.convert("L")),
        "hw1": (grey[..., None], image.convert("L")),
        "1hw": (grey[None], image.convert("L")),
        "hwa": (np.asarray(image.convert("RGBA")), image),
    }[layout]
    assert torch.equal(pixels(processor, given), pixels(processor, same_as))


GREYS = np.asarray(picture().convert("L"))
INTEGERS = [np.uint8, np.int16, np.int32, np.int64, np.uint32, np.uint64]
TENSORS = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint32]
HALVES = [torch.bfloat16, torch.float16]


def kinds(array: np.ndarray) -> dict[str, object]:
    """An image of 8 bits, `(h, w)` or `(h, w, c)`, in every type that represents it exactly."""
    wide = array.astype(np.uint16) * 257
    return {
        "pillow": Image.fromarray(array),
        **{f"array of {np.dtype(dtype)}": array.astype(dtype) for dtype in INTEGERS},
        "array of uint16": wide,
        "array of uint16, other byte order": wide.astype(">u2"),
        **{str(dtype): torch.tensor(array).to(dtype) for dtype in TENSORS},
        "torch.uint16": torch.tensor(wide),
        "not writeable": np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),
        "turned twice": np.rot90(np.rot90(array, 2), 2),
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("colours", [GREYS, np.asarray(picture()), np.asarray(picture().convert("RGBA"))])
def test_an_image_has_equal_pixels_in_every_type(colours, channels):
    processor = GPTOSSVisionImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=channels)
    given = kinds(colours)
    values = pixels(processor, list(given.values()))
    assert [kind for kind, value in zip(given, values, strict=True) if not torch.equal(value, values[0])] == []


@pytest.mark.parametrize("dtype", [bool, torch.bool])
@pytest.mark.parametrize("shape", [(16, 24), (16, 24, 3)])
def test_a_boolean_is_black_or_white(processor, shape, dtype):
    array = np.resize(GREYS, shape) > 127
    given = torch.from_numpy(array) if dtype is torch.bool else array
    assert torch.equal(pixels(processor, given), pixels(processor, array.astype(np.uint8) * 255))
    if array.ndim == 2:
        assert torch.equal(pixels(processor, given), pixels(processor, Image.fromarray(array)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_tensor_of_floats_is_read_in_every_type(processor, dtype, needs_gradient):
    array = (np.asarray(picture(), dtype=np.float32) / 255).transpose(2, 0, 1)
    tensor = torch.from_numpy(array).to(dtype)
    expected = processor(tensor.float().numpy(), do_rescale=False, return_tensors="pt").pixel_values
    found = processor(tensor.requires_grad_(needs_gradient), do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint32])
def test_integers_outside_of_8_bits_are_refused(processor, dtype):
    with pytest.raises(ValueError, match=rf"^An image of {np.dtype(dtype)} has values of 0 to 255, got 0 to 256\.$"):
        processor(np.arange(257, dtype=dtype)[None])


@pytest.mark.parametrize("shape", [(5,), (5, 9, 9), (2, 5, 9, 9), (1, 2, 3, 9, 9)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_array_that_is_no_image_is_refused_with_its_shape(processor, dtype, shape):
    with pytest.raises(ValueError, match=rf"^An array must be .*, got {re.escape(str(shape))}\.$"):
        processor(np.zeros(shape, dtype))


def test_lists_of_every_nesting_are_flattened(processor):
    first, second, third = (picture(side, side) for side in (9, 10, 11))
    both = np.stack([np.asarray(first.resize((9, 9))), np.asarray(second.resize((9, 9)))])
    expected = pixels(processor, [first, second.resize((9, 9)), third])
    for nested in (
        [both, third],
        [[both], None, [third]],
        ([first], (Image.fromarray(both[1]), third)),
        [[[both]], third],
    ):
        assert torch.equal(pixels(processor, nested), expected)


@pytest.mark.parametrize("kind", ["iterator", "paths"])
def test_images_are_opened_one_after_the_other(processor, tmp_path, monkeypatch, kind):
    given = [np.random.default_rng(side).integers(0, 255, (side, side, 3), dtype=np.uint8) for side in (9, 10, 11)]
    expected = pixels(processor, given)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, array in zip(paths, given, strict=True):
        Image.fromarray(array).save(path)
    events = []
    process = processor.process_image

    def opened():
        for number, path in enumerate(paths):
            events.append(f"open {number}")
            yield np.asarray(Image.open(path))

    def open_path(name):
        events.append(f"open {Path(name).stem}")
        return Image.open(name)

    monkeypatch.setattr("gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision._open", open_path)
    monkeypatch.setattr(
        processor, "process_image", lambda *args, **kwargs: events.append("process") or process(*args, **kwargs)
    )
    assert torch.equal(pixels(processor, opened() if kind == "iterator" else paths), expected)
    assert events == [event for number in range(3) for event in (f"open {number}", "process")]


def test_floats_are_taken_as_they_are(processor):
    array = np.asarray(picture(SIDE, SIDE), dtype=np.float32).transpose(2, 0, 1) / 255
    torch.testing.assert_close(
        processor(array, do_rescale=False, do_resize=False, return_tensors="pt").pixel_values[0],
        torch.from_numpy((array - 0.5) / 0.5),
    )


@pytest.mark.parametrize("given", ["RGB", "L", "RGBA", "array"])
def test_a_grey_tower_gets_one_channel(given):
    processor = GPTOSSVisionImageProcessor(size={"height": SIDE, "width": SIDE}, num_channels=1)
    image = np.asarray(picture()) if given == "array" else picture().convert(given)
    values = pixels(processor, image)
    assert values.shape == (1, 1, SIDE, SIDE)
    expected = picture().convert("L")
    torch.testing.assert_close(values, pixels(processor, expected))


def test_paths_base64_and_lists_are_opened(processor, tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    lines = base64.encodebytes(path.read_bytes()).decode()
    windows = lines.replace("\n", "\r\n")
    safe = base64.urlsafe_b64encode(path.read_bytes()).decode()
    texts = [encoded, lines, windows, safe]
    assert "\n" in lines.strip() and safe != encoded
    given = [path, str(path), *texts, *(f"data:image/png;base64,{text}" for text in texts), picture()]
    values = pixels(processor, given)
    assert values.shape == (len(given), 3, SIDE, SIDE)
    assert all(torch.equal(value, values[-1]) for value in values)


def test_it_fits_the_tower_of_a_configuration():
    clip = tiny_config(vision_config=tiny_vision_config("clip_vision_model", image_size=12, num_channels=3))
    processor = GPTOSSVisionImageProcessor.from_config(clip)
    assert pixels(processor, picture()).shape == (1, 3, 12, 12)
    assert list(processor.image_mean) == OPENAI_CLIP_MEAN
    grey = GPTOSSVisionImageProcessor.from_config(tiny_config(vision_num_channels=1))
    assert pixels(grey, picture()).shape == (1, 1, 8, 8)


def test_a_saved_processor_loads_as_it_was(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    loaded = GPTOSSVisionImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert torch.equal(pixels(loaded, picture()), pixels(processor, picture()))


def broken(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.png"
    picture(200, 200).save(path)
    content = path.read_bytes()
    path.write_bytes({"cut off": content[: len(content) // 2], "text": b"not a picture", "empty": b""}[kind])
    return path


@pytest.mark.parametrize("kind", ["cut off", "text", "empty"])
def test_a_broken_file_is_named(processor, tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(ValueError, match=rf"^Can't read the image .*{kind}\.png: .+\.$"):
        processor(path)


def test_a_folder_is_named(processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cats").mkdir()  # also valid base64
    with pytest.raises(ValueError, match=r"^Can't read the image cats: .*Is a directory"):
        processor("cats")


def test_a_missing_file_is_named(processor):
    with pytest.raises(ValueError, match=r"^Can't read the image cat\.png: there is no such file\.$"):
        processor("cat.png")


@pytest.mark.parametrize("name", ["cats", "my_cats/dog.one", "some words", "iVBORw0KGgoAAAANSUhEUgAA" * 20, ""])
def test_what_is_neither_a_file_nor_an_image_is_a_missing_file(processor, name):
    with pytest.raises(ValueError, match=r"^Can't read the image .*: there is no such file\.$"):
        processor(name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("%89PNG", "what follows the comma is not base64"),
        ("aGVsbG8=", "it is in no format that PIL reads, or damaged"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), ".*"),
    ],
)
def test_a_data_url_is_never_called_a_missing_file(processor, content, reason):
    with pytest.raises(ValueError, match=rf"^Can't read the image data:image/png;base64,.*: {reason}\.$") as failure:
        processor(f"data:image/png;base64,{content}")
    assert "no such file" not in str(failure.value)


def test_a_decompression_bomb_is_refused(processor, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    picture(100, 100).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^Can't read the image .*bomb\.png: .*decompression bomb"):
        processor(path)


@pytest.mark.parametrize("image", [Image.new("RGB", (0, 0)), Image.new("L", (0, 5)), np.zeros((0, 4, 3), np.uint8)])
def test_an_image_without_pixels_is_refused(processor, image):
    with pytest.raises(ValueError, match="The image has no pixels: "):
        processor(image)


def test_a_float_image_is_refused(processor):
    with pytest.raises(ValueError, match="has no fixed range"):
        processor(Image.new("F", (4, 4)))


def test_floats_with_other_channels_are_refused(processor):
    with pytest.raises(ValueError, match=r"^The image has 4 channels; the tower sees 3\.$"):
        processor(np.zeros((4, 9, 9), np.float32), input_data_format="channels_first")


def test_an_object_of_another_type_is_refused(processor):
    with pytest.raises(TypeError, match="An image must be a path"):
        processor(3)
