"""Images as rows name them: files, parts of files, bytes, and addresses on hosts that the user allows."""

import base64
import binascii
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from http.client import HTTPException
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import torch
import xxhash
from PIL import ExifTags, Image
from torchvision.io import ImageReadMode, decode_jpeg

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError

# What Pillow raises for a file that is missing, cut off, too large or no image: it has no base class for them.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
SECONDS = 30
"""How long a host may take to answer."""

BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How files of JPEG, PNG, GIF and WebP begin in base64."""
LONGEST_NAME = 255
"""Bytes of the name of a file; images in base64 are longer, and "/9j/" may begin a path too."""
LONGEST_PATH = 4096
"""Characters of a path; longer texts are images in base64 of another format."""
SCHEMES = ("data:", "http:", "https:", "file:")


class UnusableRow(UserError):
    """Why one row can't be used, without its file and line."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that is not read yet: a file or a part of one, bytes, or an address.

    Attributes:
        name: for messages.
        path: the file that holds it; None for bytes and addresses.
        start: byte of the file where it begins.
        size: number of bytes; None for all that follow.
        content: the bytes.
        address: where it is fetched from at every access.
        hosts: to which that host may redirect.
    """

    name: str
    path: str | None = None
    start: int = 0
    size: int | None = None
    content: bytes | None = field(default=None, repr=False)
    address: str | None = None
    hosts: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def identity(self) -> str:
        """Of two pictures that are the same image in the same place, the same text."""
        place = self.path or self.address or xxhash.xxh3_128_hexdigest(self.content or b"")
        return f"{place} {self.start} {self.size}"

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            OSError: they cannot be read.
        """
        if self.content is not None:
            return self.content
        if self.address is not None:
            return _fetch(self.address, self.hosts)
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(-1 if self.size is None else self.size)

    def source(self) -> str | Image.Image:
        """What the processor opens: the path of a file, or the decoded image."""
        if self.path is not None and self.size is None:
            return self.path
        return _loaded(self.read())

    def decoded(self) -> np.ndarray | str | Image.Image:
        """As `source`; of most JPEG files the pixels, ``[height, width, 3]``, which torchvision decodes faster."""
        file = self.path if self.size is None else None
        if file is not None and not file.lower().endswith((".jpg", ".jpeg")):
            return file
        content = self.read()
        pixels = _pixels_of_jpeg(content)
        return (file or _loaded(content)) if pixels is None else pixels

    def check(self, processor: GPTOSSVisionProcessor, decode: bool) -> tuple[int, int, str]:
        """Read the header, or with `decode` all of it; return width, height and mode.

        Raises:
            UnusableRow: it is missing or broken.
        """
        try:
            with self._opened() as image:
                found = image.width, image.height, image.mode
                if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or math.inf):
                    # Of such an image Pillow only warns; from twice as many pixels on it is its error.
                    raise OSError(f"{image.width} x {image.height} pixels, more than {limit:,}: a decompression bomb?")
                # The processor's own steps: it refuses more than PIL, such as floats without a range.
                processor.image_processor(image) if decode else image.verify()
        except FileNotFoundError as error:
            raise UnusableRow(f"image {self.name} is missing") from error
        except UNREADABLE as error:
            raise UnusableRow(f"image {self.name} is broken ({error})") from error
        return found

    def _opened(self) -> Image.Image:
        return Image.open(self.path if self.path is not None and self.size is None else BytesIO(self.read()))


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the images of a row are looked up.

    Attributes:
        folder: that relative paths start from, and must stay inside.
        hosts: from which images may be fetched.
        members: images that are stored with the row, by name.
    """

    folder: Path
    hosts: frozenset[str] = frozenset()
    members: Mapping[str, Picture] = field(default_factory=dict)

    def find(self, value: Any) -> Picture:
        """The image that a row gives as a path, an address, bytes, or a mapping that holds one of them.

        Raises:
            UnusableRow: it is none of them, leaves the folder, or is on a host that is not allowed.
        """
        match value:
            case Picture():
                return value
            case str() if value in self.members:
                return self.members[value]
            case str() if value.startswith(BASE64) and len(value) > LONGEST_NAME:
                return from_base64(value)
            case str() if len(value) > LONGEST_PATH and not value.lower().startswith(SCHEMES):
                raise UnusableRow(
                    f"a text of {len(value):,} characters is no path, and no image in base64 that is known"
                )
            case str():
                return self._named(value)
            case bytes() | bytearray():
                return Picture(f"of {len(value):,} bytes", content=bytes(value))
            case {"bytes": bytes() | bytearray() as content, **rest}:
                return Picture(str(rest.get("path") or f"of {len(content):,} bytes"), content=bytes(content))
            case {"bytes": str() as text, **rest}:  # as of a table that was written as JSON
                picture = from_base64(text)
                return replace(picture, name=str(rest.get("path") or picture.name))
            case {"bytes": held} if held is not None:
                raise UnusableRow(f'the "bytes" of an image are neither bytes nor base64 but {held!r:.40}')
            case {"path": str(name)} | {"url": str(name)}:
                return self.find(name)
        raise UnusableRow(f"an image is neither a path, an address nor bytes but {value!r:.40}")

    def _named(self, name: str) -> Picture:
        scheme = name.partition(":")[0].lower()
        if scheme == "data":
            return from_base64(name.partition(",")[2])
        if scheme in ("http", "https"):
            return self._on_host(name)
        if scheme == "file":
            return self._named(unquote(_split(name).path))
        return Picture(name, path=resolve_image(name, self.folder))

    def _on_host(self, address: str) -> Picture:
        host = _split(address).hostname
        if not host:
            raise UnusableRow(f"image {address:.80} is an address without a host")
        if host not in self.hosts:
            raise UnusableRow(
                f"image {address:.80} is on a network; download it, or allow the host by data.allowed_hosts=[{host}]"
            )
        return Picture(address, address=address, hosts=self.hosts)


def _split(address: str) -> SplitResult:
    """The parts of an address.

    Raises:
        UnusableRow: it is malformed.
    """
    try:
        return urlsplit(address)
    except ValueError as error:
        raise UnusableRow(f"image {address:.80} is no address ({error})") from error


def _loaded(content: bytes) -> Image.Image:
    """An image file, decoded by PIL."""
    image = Image.open(BytesIO(content))
    image.load()
    return image


def _pixels_of_jpeg(content: bytes) -> np.ndarray | None:
    """What PIL decodes, bit by bit; None for other files, and those that PIL converts, turns or refuses."""
    try:
        with Image.open(BytesIO(content), formats=("JPEG",)) as image:
            if image.mode != "RGB" or image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                return None
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    except (*UNREADABLE, RuntimeError):
        return None
    return pixels.permute(1, 2, 0).numpy()


class _Redirects(HTTPRedirectHandler):
    """Redirects to allowed hosts."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self._hosts = hosts

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Follow a redirect.

        Raises:
            OSError: it leads to a host that is not allowed.
        """
        if not (host := urlsplit(newurl).hostname):
            raise OSError(f"redirected to {newurl:.80}, an address without a host")
        if host not in self._hosts:
            raise OSError(
                f"redirected to {newurl:.80}, whose host is not allowed; data.allowed_hosts=[{host}] allows it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(address: str, hosts: frozenset[str]) -> bytes:
    try:
        with build_opener(_Redirects(hosts)).open(address, timeout=SECONDS) as answer:
            return answer.read()
    except HTTPException as error:  # such as an answer that ends early; it is no OSError
        raise OSError(f"{type(error).__name__}: {error}") from error


def from_base64(text: str) -> Picture:
    """An image in base64.

    Raises:
        UnusableRow: it is not base64.
    """
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnusableRow(f"an image is not in base64 ({error})") from error
    return Picture(f"of {len(content):,} bytes", content=content)


def resolve_image(name: str, folder: Path) -> str:
    """The absolute path of an image. A relative one must stay inside `folder`, with `..` and symbolic links followed.

    Backslashes separate folders where there is no slash, as in paths that were written on Windows.

    Raises:
        UnusableRow: it leaves the folder. A file elsewhere can be named by its absolute path.
    """
    if "\\" in name and "/" not in name:
        windows = PureWindowsPath(name)
        if windows.drive:
            raise UnusableRow(f"image {name:.80} is on a drive of Windows")
        name = windows.as_posix()
    if os.path.isabs(name):
        return name
    try:
        directory, file = os.path.split(name)
        root, inside = _resolved(os.fspath(folder)), _resolved(os.path.join(folder, directory))
        path = os.path.join(inside, file)
        if file in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise UnusableRow(f"image {name!r:.80} is no path ({error})") from error
    if path != root and not path.startswith(root.rstrip("/") + "/"):
        raise UnusableRow(f"image {name} leaves the data folder; a file elsewhere needs its absolute path")
    return path


@lru_cache(maxsize=4096)
def _resolved(folder: str) -> str:
    """A folder without links; the images of a source are in few folders."""
    return os.path.realpath(folder)
