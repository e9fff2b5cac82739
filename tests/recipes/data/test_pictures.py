"""Images on hosts, in parts of files and as bytes; images that are too large or broken."""

import base64
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.findings import examine
from gpt_oss_vision.recipes.data.pictures import Picture, Pictures, UnusableRow
from gpt_oss_vision.recipes.data.sources.opening import open_source
from records import write_lines


@pytest.fixture
def server(folder: Path) -> Iterator[ThreadingHTTPServer]:
    """A server with `red.png`; /to/HOST redirects to it on HOST, /cut ends early, /back redirects forever."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith(("/to/", "/back")):
                self.send_response(302)
                host = self.path.removeprefix("/to/")
                place = "/back" if self.path == "/back" else f"http://{host}:{self.server.server_port}/red.png"
                self.send_header("Location", place)
                self.end_headers()
                return
            content = (folder / "red.png").read_bytes()
            self.server.read.append(self.headers["Host"].partition(":")[0])
            self.send_response(200 if self.path != "/gone.png" else 404)
            self.send_header("Content-Length", str(len(content) + (self.path == "/cut.png")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.read = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def find(folder: Path, name: object, *hosts: str) -> Picture:
    return Pictures(folder, frozenset(hosts)).find(name)


def test_an_image_on_an_allowed_host_is_fetched_and_on_another_refused(folder, address, server):
    assert find(folder, f"{address}/red.png", "127.0.0.1").read() == (folder / "red.png").read_bytes()
    with pytest.raises(UnusableRow, match=r"data.allowed_hosts=\[127.0.0.1\]"):
        find(folder, f"{address}/red.png", "example.org")
    assert server.read == ["127.0.0.1"]


def test_a_redirect_is_followed_to_an_allowed_host_and_to_no_other(folder, address, server):
    picture = find(folder, f"{address}/to/localhost", "127.0.0.1")
    with pytest.raises(OSError, match=r"redirected to http://localhost:.*/red.png, whose host is not allowed"):
        picture.read()
    assert server.read == []
    picture = find(folder, f"{address}/to/localhost", "127.0.0.1", "localhost")
    assert picture.read() == (folder / "red.png").read_bytes()
    assert server.read == ["localhost"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/cut.png", "IncompleteRead"),
        ("/gone.png", "HTTP Error 404"),
        ("/back", "infinite loop"),
        ("/to/localhost", "redirected to"),
    ],
)
def test_an_image_that_cannot_be_fetched_is_named(folder, processor, address, path, why):
    write_lines(folder / "data.jsonl", [{"text": "A cat.", "image": address + path}])
    source = open_source(folder / "data.jsonl", allowed_hosts=frozenset({"127.0.0.1"}))
    [skipped] = examine(source, processor).skipped
    assert path in skipped.reason
    assert why in skipped.reason


def test_a_part_of_a_file_is_read_alone(folder):
    content = (folder / "red.png").read_bytes()
    (folder / "data").write_bytes(b"before" + content + b"after")
    picture = Picture("red.png", path=str(folder / "data"), start=6, size=len(content))
    assert picture.read() == content
    assert picture.source().size == (12, 9)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_an_image_of_a_hundred_megapixels_is_refused_by_its_header(folder, processor, side):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (folder / "bomb.png").write_bytes(bomb)
    write_lines(folder / "data.jsonl", [{"text": "A cat.", "image": "bomb.png"}])
    [skipped] = examine(open_source(folder / "data.jsonl"), processor).skipped
    assert "image bomb.png is broken" in skipped.reason
    assert "decompression bomb" in skipped.reason


def jpeg(folder: Path, name: str, mode: str = "RGB", size: tuple[int, int] = (61, 47), **options: object) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, {"L": 1, "RGB": 3, "CMYK": 4}[mode]), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / name, "JPEG", **options)


JPEGS = {
    "colour, 4:4:4": {"subsampling": 0, "quality": 95},
    "colour, 4:2:2": {"subsampling": 1},
    "colour, 4:2:0": {"subsampling": 2, "quality": 30},
    "progressive": {"progressive": True},
    "optimised, with restarts": {"optimize": True, "restart_marker_rows": 1},
    "one pixel": {"size": (1, 1)},
    "three pixels wide": {"size": (3, 40)},
    "grey": {"mode": "L"},
    "four inks": {"mode": "CMYK"},
    "turned": {"turned": 6},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("place", ["file.jpg", "file", "part", "bytes"])
def test_a_jpeg_has_the_pixels_of_pil(folder, processor, kind, place):
    options = dict(JPEGS[kind])
    if orientation := options.pop("turned", None):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    jpeg(folder, "file.jpg", **options)
    content = (folder / "file.jpg").read_bytes()
    (folder / "file").write_bytes(content)
    (folder / "data").write_bytes(b"before" + content + b"after")
    picture = {
        "file.jpg": Picture("a", path=str(folder / "file.jpg")),
        "file": Picture("a", path=str(folder / "file")),
        "part": Picture("a", path=str(folder / "data"), start=6, size=len(content)),
        "bytes": Picture("a", content=content),
    }[place]
    found, by_pil = picture.decoded(), Image.open(folder / "file.jpg")
    assert isinstance(found, np.ndarray) == (place != "file" and kind not in ("grey", "four inks", "turned"))
    pixels = [processor.image_processor(image)["pixel_values"][0] for image in (found, by_pil)]
    np.testing.assert_array_equal(*pixels)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://[bad/a.png", r"image http://\[bad/a.png is no address \(Invalid IPv6 URL\)"),
        ("file://[x", r"image file://\[x is no address"),
        ("http:///a.png", "is an address without a host"),
    ],
)
def test_an_address_that_is_malformed_is_named(folder, processor, address, why):
    write_lines(folder / "data.jsonl", [{"text": "A cat.", "image": address}, {"text": "A cat."}])
    [skipped] = examine(open_source(folder / "data.jsonl"), processor).skipped
    assert re.search(why, skipped.reason) and "allowed_hosts" not in skipped.reason


def test_an_object_with_bytes_in_base64_is_these_bytes_and_not_its_path(folder):
    content = (folder / "blue.png").read_bytes()
    picture = find(folder, {"bytes": base64.b64encode(content).decode(), "path": "red.png"})
    assert (picture.name, picture.read()) == ("red.png", content)
    assert find(folder, {"bytes": None, "path": "red.png"}).read() == (folder / "red.png").read_bytes()
    for wrong in ([137, 80], "no base64!", 7):
        with pytest.raises(UnusableRow, match=r"neither bytes nor base64|not in base64"):
            find(folder, {"bytes": wrong, "path": "red.png"})


def test_a_long_text_that_is_no_image_has_a_short_reason(folder):
    with pytest.raises(UnusableRow) as found:
        find(folder, base64.b64encode(b"BM" + bytes(9000)).decode())
    assert "12,004 characters" in str(found.value) and len(str(found.value)) < 200


def test_an_image_on_a_host_is_fetched_once(folder, address, server):
    assert find(folder, f"{address}/red.png", "127.0.0.1").decoded().size == (12, 9)
    assert server.read == ["127.0.0.1"]


def test_a_jpeg_that_is_cut_off_is_named(folder, processor):
    jpeg(folder, "cut.jpg", size=(500, 400))
    content = (folder / "cut.jpg").read_bytes()
    write_lines(folder / "data.jsonl", [{"text": "A cat.", "image": "cut.jpg"}])
    dataset = ChatDataset(folder / "data.jsonl", processor, seq_length=64)
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"line 1.*Can't read the image .*cut\.jpg: image file is truncated"):
        dataset[0]
