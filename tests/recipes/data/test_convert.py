"""Rows that are converted to shards give the same samples, also after an interruption."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data import convert as conversion
from gpt_oss_vision.recipes.data.convert import convert
from gpt_oss_vision.recipes.data.samples import encode_row
from gpt_oss_vision.recipes.data.sources.opening import open_source
from records import assert_same, samples_of


@pytest.fixture
def rows(folder: Path) -> Path:
    """A chat with two images, a chat with a thought, a text with an image, a text, and a row that cannot be read."""
    answer = {"from": "gpt", "value": "two"}
    records = [
        {
            "conversations": [{"from": "human", "value": "<image> and <image>?"}, answer],
            "images": ["red.png", "blue.png"],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one", "thinking": "a cat"}]},
        {"text": "A cat: <image>", "image": "red.png"},
        {"text": "It is a cat."},
        {"text": "A dog.", "image": "gone.png"},
    ]
    (folder / "rows.json").write_text(json.dumps(records))
    return folder / "rows.json"


@pytest.mark.parametrize(("to", "read"), [("webdataset", ""), ("webdataset", "*.tar"), ("jsonl", "*/rows.jsonl")])
def test_converted_rows_give_the_same_samples(rows, processor, tmp_path, to, read):
    out = tmp_path / "out"
    said = convert([open_source(rows)], out, to, rows_per_shard=2, max_skipped=0.2)
    assert said.startswith(f"4 rows are in {out}, in 3 shards. {rows}: 1 of 5 rows can't be used (20.0%): line 1: ")
    given = open_source(rows)
    assert_same(samples_of(out / read, processor), [encode_row(given.row(index), processor) for index in range(4)])


def test_too_many_rows_that_cannot_be_read_are_an_error(rows, tmp_path):
    with pytest.raises(UserError, match=r"1 of 5 rows .*gone.png.* At most 1.0% may be left out"):
        convert([open_source(rows)], tmp_path / "out", "jsonl")


def test_no_row_that_can_be_read_is_an_error_whatever_may_be_left_out(folder, tmp_path):
    (folder / "rows.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"1 of 1 rows can't be used .* So nothing was converted\."):
        convert([open_source(folder / "rows.jsonl")], tmp_path / "out", "jsonl", max_skipped=1.0)


@pytest.mark.parametrize("to", ["webdataset", "jsonl"])
def test_a_conversion_that_was_killed_goes_on(folder, tmp_path, monkeypatch, to):
    path, out = folder / "rows.jsonl", tmp_path / "out"
    path.write_text("\n".join(json.dumps({"text": f"A cat {i}.", "image": "red.png"}) for i in range(40)))
    whole = tmp_path / "whole"
    convert([open_source(path)], whole, to, rows_per_shard=4)
    child = os.fork()
    if not child:
        read = conversion._record
        monkeypatch.setattr(conversion, "_record", lambda *arguments: time.sleep(0.02) or read(*arguments))
        convert([open_source(path)], out, to, rows_per_shard=4)
        os._exit(0)
    while not (out / ".00002.skipped.json").exists():
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    first = next(file for file in sorted(out.iterdir()) if not file.name.startswith("."))
    written = first.stat().st_mtime_ns
    convert([open_source(path)], out, to, rows_per_shard=4)
    assert first.stat().st_mtime_ns == written
    mine, expected = (
        {file.relative_to(top): file.read_bytes() for file in top.rglob("*") if file.is_file()} for top in (out, whole)
    )
    assert mine == expected


def test_a_folder_of_something_else_is_not_touched(rows, folder, tmp_path):
    with pytest.raises(UserError, match="is not empty, and was not made by `data convert`"):
        convert([open_source(rows)], folder, "jsonl")
    convert([open_source(rows)], tmp_path / "out", "jsonl", max_skipped=0.2)
    with pytest.raises(UserError, match="holds a conversion of other data or with other options"):
        convert([open_source(rows)], tmp_path / "out", "webdataset", max_skipped=0.2)


def texts(folder: Path, **image: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"A cat {i}."} | image) for i in range(4)))
    return path


def test_a_second_conversion_into_a_folder_is_refused_while_the_first_runs(folder, tmp_path, monkeypatch):
    path, out, record = texts(folder), tmp_path / "out", conversion._record
    refused = []

    def second(*arguments: object) -> object:
        monkeypatch.setattr(conversion, "_record", record)
        with pytest.raises(UserError, match=f"another `data convert` writes into --out {out}"):
            convert([open_source(path)], out, "jsonl")
        refused.append(True)
        return record(*arguments)

    monkeypatch.setattr(conversion, "_record", second)
    convert([open_source(path)], out, "jsonl")
    assert refused
    assert len((out / "00000" / "rows.jsonl").read_text().splitlines()) == 4


def test_a_conversion_is_not_continued_with_another_folder_of_images(folder, tmp_path):
    path = texts(folder, image="red.png")
    convert([open_source(path)], tmp_path / "out", "jsonl")
    convert([open_source(path, image_folder=folder)], tmp_path / "out", "jsonl")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="holds a conversion of other data or with other options"):
        convert([open_source(path, image_folder=other)], tmp_path / "out", "jsonl")


@pytest.mark.parametrize("to", ["webdataset", "jsonl"])
def test_rows_whose_images_were_added_are_converted_by_the_same_command(rows, folder, processor, tmp_path, to):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"gone\.png"):
        convert([open_source(rows)], out, to, rows_per_shard=2)
    (folder / "gone.png").write_bytes((folder / "red.png").read_bytes())
    said = convert([open_source(rows)], out, to, rows_per_shard=2)
    assert said == f"5 rows are in {out}, in 3 shards."
    assert len(samples_of(out / ("" if to == "webdataset" else "*/rows.jsonl"), processor)) == 5


@pytest.mark.parametrize("kind", ["MPO", "JPEG2000", "ICO", "TGA", "DIB", "PCX"])
def test_images_of_rare_formats_are_read_from_the_tar_files(folder, processor, tmp_path, kind):
    image = Image.new("RGB", (16, 16), "red")
    image.save(folder / "image.png", kind, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {}))
    path = texts(folder, image="image.png")
    convert([open_source(path)], tmp_path / "out", "webdataset")
    assert len(samples_of(tmp_path / "out", processor)) == 4


def test_images_of_formats_that_tar_files_are_not_read_with_are_named(folder, tmp_path):
    Image.new("RGB", (16, 16), "red").save(folder / "image.png", "SGI")
    path = texts(folder, image="image.png")
    with pytest.raises(UserError, match=r"image image\.png is of the format sgi, which is not read from tar files"):
        convert([open_source(path)], tmp_path / "out", "webdataset")
    assert convert([open_source(path)], tmp_path / "other", "jsonl").startswith("4 rows")
