"""The same conversations in every format give the same samples, token by token; what is not data is refused."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import zstandard
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.findings import examine
from gpt_oss_vision.recipes.data.sources import json_files
from gpt_oss_vision.recipes.data.sources.opening import open_source
from records import (
    CONVERSATIONS,
    RECORDS,
    assert_same,
    bare,
    cauldron,
    in_parts,
    llama_factory,
    llava,
    ours,
    png,
    records,
    samples_of,
    write_lines,
)

SEQ_LENGTH = 96


@pytest.fixture
def folder(folder: Path) -> Path:
    """A folder with `red.png` and `blue.png`, and once more in a folder `deep`."""
    (folder / "deep").mkdir()
    for name in ("red.png", "blue.png"):
        (folder / "deep" / name).write_bytes((folder / name).read_bytes())
    return folder


@pytest.fixture
def expected(folder: Path, processor: GPTOSSVisionProcessor) -> list[Any]:
    samples = samples_of(write_lines(folder / "expected.jsonl", records(ours, folder)), processor)
    assert [0 if sample["pixel_values"] is None else len(sample["pixel_values"]) for sample in samples] == [2, 0, 1]
    return samples


# --- JSON


@pytest.mark.parametrize("shape", RECORDS, ids=lambda shape: shape.__name__)
def test_records_of_every_shape_give_the_same_samples(folder, processor, expected, shape):
    assert_same(samples_of(write_lines(folder / "data.jsonl", records(shape, folder)), processor), expected)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


LAYOUTS: dict[str, Callable[[list[Any]], bytes]] = {
    "lines": lambda rows: lines(rows).encode(),
    "array": lambda rows: json.dumps(rows).encode(),
    "pretty array": lambda rows: json.dumps(rows, indent=2).encode(),
    "array of lines": lambda rows: ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode(),
    "pretty, one after the other": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "blank lines": lambda rows: ("\n\n" + lines(rows).replace("\n", "\n \n")).encode(),
    "CRLF": lambda rows: lines(rows).replace("\n", "\r\n").encode(),
    "byte order mark": lambda rows: lines(rows).encode("utf-8-sig"),
    "byte order mark and array": lambda rows: json.dumps(rows, indent=1).encode("utf-8-sig"),
    "UTF-16": lambda rows: lines(rows).encode("utf-16"),
    "UTF-16, big endian, array": lambda rows: b"\xfe\xff" + json.dumps(rows).encode("utf-16-be"),
    "gzip": lambda rows: gzip.compress(lines(rows).encode()),
    "gzip of an array": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "zstandard": lambda rows: zstandard.compress(lines(rows).encode()),
    "zstandard in frames": lambda rows: b"".join(zstandard.compress(lines([row]).encode()) for row in rows),
    "gzip in members": lambda rows: b"".join(gzip.compress(lines([row]).encode()) for row in rows),
    "gzip of UTF-16": lambda rows: gzip.compress(lines(rows).encode("utf-16")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_in_every_layout_gives_the_same_samples_whatever_the_file_is_called(folder, processor, expected, layout):
    (folder / "data").write_bytes(LAYOUTS[layout](records(llava, folder)))
    assert_same(samples_of(folder / "data", processor), expected)


def test_records_whose_images_stand_within_the_text_agree(folder, processor):
    places = "one <image>two<image> three"
    files = ["red.png", "blue.png"]
    answer = {"role": "assistant", "content": "four"}

    def parts(image: Callable[[str], dict[str, Any]]) -> list[Any]:
        return [
            {"type": "text", "text": "one "},
            image("red.png"),
            {"type": "text", "text": "two"},
            image("blue.png"),
            {"type": "text", "text": " three"},
        ]

    rows = [
        {"messages": [{"role": "user", "content": parts(lambda name: {"type": "image", "path": name})}, answer]},
        {"messages": [{"role": "user", "content": parts(lambda _: {"type": "image"})}, answer], "images": files},
        {"messages": [{"role": "user", "content": places}, answer], "images": files},
        {
            "conversations": [{"from": "human", "value": places}, {"from": "gpt", "value": "four"}],
            "image": files,
        },
        {"texts": [{"user": places, "assistant": "four"}], "images": files},
    ]
    samples = samples_of(write_lines(folder / "data.jsonl", rows), processor)
    assert_same(samples[1:], samples[:1] * 4)


# --- tables


def with_bytes(shape: Callable[..., dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Records whose images, in "images", are bytes."""
    rows = records(shape, folder)
    for row, one in zip(rows, CONVERSATIONS, strict=True):
        row["images"] = [png(folder, name) for name in one.images]
    return rows


def as_images(shape: Callable[..., dict[str, Any]], folder: Path) -> Dataset:
    """A dataset with a feature List(Image), as `datasets` makes it."""
    rows = records(shape, folder)
    for row, one in zip(rows, CONVERSATIONS, strict=True):
        row["images"] = [str(folder / f"{name}.png") for name in one.images]
    dataset = Dataset.from_list(rows)
    return dataset.cast_column("images", List(Image()))


@pytest.mark.parametrize("shape", [llama_factory, bare, cauldron], ids=lambda shape: shape.__name__)
def test_a_folder_of_datasets_gives_the_same_samples(folder, processor, expected, shape):
    if shape is bare:
        rows = [as_part_lists(row) for row in records(bare, folder)]
        dataset = Dataset.from_list(rows).cast_column("images", List(Value("string")))
        dataset = dataset.map(lambda row: {"images": [str(folder / name) for name in row["images"]]})
        dataset = dataset.cast_column("images", List(Image()))
    else:
        dataset = as_images(shape, folder)
    dataset.save_to_disk(folder / "saved")
    assert open_source(folder / "saved").kind == "datasets folder"
    for name in ("red.png", "blue.png"):
        (folder / name).unlink()
    assert_same(samples_of(folder / "saved", processor), expected)


def as_part_lists(row: dict[str, Any]) -> dict[str, Any]:
    """A table needs one type for a column: contents are all lists of parts."""
    for message in row["messages"]:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return row


def test_an_image_column_of_one_image_is_read(folder, processor):
    rows = [{"text": "It is a cat.", "image": str(folder / "red.png")}]
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(folder / "saved")
    write_lines(folder / "data.jsonl", [{"text": "It is a cat.", "image": "red.png"}])
    assert_same(samples_of(folder / "saved", processor), samples_of(folder / "data.jsonl", processor))


@pytest.mark.parametrize("shape", [llama_factory, cauldron], ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("kind", ["Image", "binary", "struct"])
def test_parquet_gives_the_same_samples(folder, processor, expected, shape, kind):
    if kind == "Image":
        dataset = as_images(shape, folder)
    else:
        rows = with_bytes(shape, folder)
        if kind == "struct":
            for row in rows:
                row["images"] = [{"bytes": content, "path": None} for content in row["images"]]
        dataset = Dataset.from_list(rows)
    dataset.to_parquet(folder / "data.parquet")
    assert open_source(folder / "data.parquet").kind == "Parquet"
    assert_same(samples_of(folder / "data.parquet", processor), expected)


def test_images_within_the_messages_of_a_table_are_read(folder, processor, expected):
    rows = [
        as_part_lists(
            in_parts(one, lambda name: {"type": "image", "image": {"bytes": png(folder, name), "path": name}})
        )
        for one in CONVERSATIONS
    ]
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    assert_same(samples_of(folder / "data.parquet", processor), expected)


def test_what_only_other_rows_of_a_table_have_is_absent(folder, processor):
    call = {"function": {"name": "look", "arguments": {"where": "left", "far": None}}}
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [user, answer | {"thinking": "two"}]},
        {"messages": [user, answer], "video": None},
    ]
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    del call["function"]["arguments"]["far"]
    write_lines(folder / "data.jsonl", rows)
    assert_same(samples_of(folder / "data.parquet", processor), samples_of(folder / "data.jsonl", processor))


def test_nothing_of_a_table_is_decoded_before_it_is_needed(folder):
    Dataset.from_list([{"text": "Hi", "image": b"no image"}]).to_parquet(folder / "data.parquet")
    [picture] = open_source(folder / "data.parquet").row(0).images
    assert picture.read() == b"no image"


def test_a_table_without_images_has_rows_of_text(folder, processor):
    Dataset.from_list([{"text": "It is a cat.", "score": 0.5}]).to_parquet(folder / "data.parquet")
    assert open_source(folder / "data.parquet").row(0).text == "It is a cat."


@pytest.mark.parametrize(
    ("column", "value"), [("jpg", b"\xff\xd8\xff"), ("video", "a.mp4"), ("frames", [b"1", b"2"]), ("scan", "a.png")]
)
def test_a_column_of_other_media_is_refused_by_name(folder, processor, column, value):
    Dataset.from_list([{"text": "It is a cat.", column: value}]).to_parquet(folder / "data.parquet")
    [skipped] = examine(open_source(folder / "data.parquet"), processor).skipped
    assert f'"{column}"' in skipped.reason
    assert skipped.line == "row 0"


def test_a_folder_of_shards_and_a_pattern_are_all_their_rows_in_the_order_of_their_names(folder, processor, expected):
    dataset = as_images(llama_factory, folder)
    (folder / "shards").mkdir()
    for number in range(3):
        dataset.select([number]).to_parquet(folder / "shards" / f"{number:02}.parquet")
    (folder / "shards" / "README.md").write_text("Shards.")
    assert_same(samples_of(folder / "shards", processor), expected)
    assert_same(samples_of(folder / "shards" / "*.parquet", processor), expected)
    assert_same(samples_of(folder / "shards" / "{00..02}.parquet", processor), expected)
    with pytest.raises(UserError, match=r"no file matches .*03.parquet"):
        open_source(folder / "shards" / "{00..03}.parquet")


def test_of_several_splits_one_must_be_named(folder, processor, expected):
    dataset = as_images(llama_factory, folder)
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(folder / "saved")
    with pytest.raises(UserError, match="has the splits test, train; name one of them"):
        open_source(folder / "saved")
    assert_same(samples_of(folder / "saved" / "train", processor), expected)
    assert len(open_source(folder / "saved" / "test")) == 1


@pytest.mark.slow
def test_several_processes_may_open_a_parquet_at_once(folder, caches):
    as_images(llama_factory, folder).to_parquet(folder / "data.parquet")
    # Forks of one process: each import of transformers takes seconds.
    code = """
import os, sys
from gpt_oss_vision.recipes.data.sources.opening import open_source
import datasets
children = []
for child in range(4):
    if not (process := os.fork()):
        source = open_source(sys.argv[1])
        os._exit(0 if [len(source.row(i).images) for i in range(len(source))] == [2, 0, 1] else 1)
    children.append(process)
print([os.waitpid(process, 0)[1] for process in children])
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(caches / "shared")}
    command = [sys.executable, "-c", code, str(folder / "data.parquet")]
    assert subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout == "[0, 0, 0, 0]\n"


def test_a_parquet_that_has_changed_is_read_anew(folder, processor):
    for text in ("It is a cat.", "It is a dog."):
        Dataset.from_list([{"text": text}]).to_parquet(folder / "data.parquet")
        assert open_source(folder / "data.parquet").row(0).text == text


@pytest.mark.parametrize("first", [2**23, 2**24 + 7, 100])
def test_records_over_several_lines_may_be_longer_than_the_window(folder, processor, first):
    rows = [{"text": "A cat.", "note": "a" * first}, {"text": "A dog.", "note": "b"}]
    (folder / "data.json").write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    source = open_source(folder / "data.json")
    assert (source.kind, len(source)) == ("JSON", 2)
    write_lines(folder / "data.jsonl", rows)
    source = open_source(folder / "data.jsonl")
    assert (source.kind, len(source)) == ("JSON lines", 2)


def test_a_record_over_several_lines_may_be_cut_by_the_window_anywhere(folder, monkeypatch):
    record = {"text": "A cat \u00e9\ud83d\ude00.", "n": [True, None, -1.5e-7, float("-inf")], "deep": {"a": "b"}}
    path = folder / "data.json"
    path.write_text(json.dumps(record, indent=1) * 2)
    for window in range(2, path.stat().st_size // 2):
        monkeypatch.setattr(json_files, "WINDOW", window)
        assert len(open_source(path)) == 2, window


# --- folders and files of other kinds


def write_tar(path: Path, *samples: dict[str, Any]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("data.jsonl", b"", "is empty"),
        ("data.csv", b"text,image\nHi,red.png\n", "of no kind that is read: JSON"),
        ("red.png", None, "of no kind that is read: JSON"),
        ("tokens.bin", b"7\0\0\0" * 9, "of no kind that is read: JSON"),
        ("data.zip", b"PK\x03\x04rest", "is a zip file"),
        ("data.json.bz2", b"BZh9rest", "is compressed by bzip2"),
        ("data.arrow", b"ARROW1\0\0", "is a single Arrow file"),
        ("blend.yaml", b"__module__: megatron.energon\n__class__: MetadatasetV2\n", "in data.sources"),
    ],
)
def test_a_file_that_is_not_read_is_named(folder, name, content, why):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} .*{why}"):
        open_source(folder / name)


def test_a_tar_that_is_compressed_is_refused_with_what_to_do(folder):
    path = write_tar(folder / "data.tar", {"__key__": "0", "txt": "Hi"})
    (folder / "data.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="decompress it, as by gunzip"):
        open_source(folder / "data.tar.gz")


def test_a_folder_without_data_and_one_of_several_kinds_are_refused(folder):
    with pytest.raises(UserError, match=r"has no data, but blue.png, deep, red.png; what is read: JSON"):
        open_source(folder)
    write_lines(folder / "a.jsonl", records(ours, folder))
    assert len(open_source(folder)) == 3
    write_tar(folder / "b.tar", {"__key__": "0", "txt": "Hi"})
    with pytest.raises(UserError, match=r"files of several kinds, such as .*; name one kind"):
        open_source(folder)


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"gone.jsonl"):
        open_source(folder / "gone.jsonl")
    with pytest.raises(UserError, match="no file matches"):
        open_source(folder / "gone*.jsonl")


# --- broken data


def test_an_array_that_is_cut_off_is_named_with_its_line(folder):
    (folder / "data.json").write_text(json.dumps(records(ours, folder), indent=1)[:-40])
    with pytest.raises(UserError, match=r"data.json is malformed JSON, or cut off, behind line \d+"):
        open_source(folder / "data.json")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_compressed_file_that_is_cut_off_is_named(folder, compress):
    content = compress(lines([{"text": os.urandom(999).hex()} for _ in range(99)]).encode())
    (folder / "data.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is cut off or damaged"):
        open_source(folder / "data.jsonl.gz")


def test_a_line_that_is_not_in_utf_8_is_skipped_and_named(folder, processor):
    good = json.dumps({"text": "It is a cat."}).encode()
    (folder / "data.jsonl").write_bytes(good + b"\n" + good.replace(b"cat", b"\xe9\xe9") + b"\n" + good + b"\n")
    found = examine(open_source(folder / "data.jsonl"), processor)
    assert [(skipped.line, skipped.reason[:14]) for skipped in found.skipped] == [(2, "malformed JSON")]


def test_a_parquet_that_is_cut_off_is_named(folder):
    path = folder / "data.parquet"
    Dataset.from_list([{"text": "It is a cat."}] * 1000).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"data.parquet is cut off or damaged"):
        open_source(path)


def test_a_parquet_that_is_damaged_within_is_named(folder):
    path = folder / "data.parquet"
    Dataset.from_list([{"text": f"{i} cats." * 20} for i in range(5000)]).to_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:3000] + b"\xff" * 6000 + content[9000:])
    with pytest.raises(UserError, match=r"data.parquet is cut off or damaged"):
        open_source(path)


def test_a_column_that_datasets_does_not_read_is_no_damage(folder):
    column = pyarrow.array([[("a", 1)]], type=pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["A cat."], "map": column}), folder / "data.parquet")
    with pytest.raises(UserError, match=r"data.parquet cannot be read by `datasets` \(Arrow type map"):
        open_source(folder / "data.parquet")


def test_a_parquet_without_rows_is_a_source_without_rows(folder, processor):
    Dataset.from_list([{"text": "A cat."}]).to_parquet(folder / "0.parquet")
    empty = pyarrow.table({"text": pyarrow.array([], type=pyarrow.string())})
    pyarrow.parquet.write_table(empty, folder / "1.parquet")
    assert len(open_source(folder / "1.parquet")) == 0
    assert len(samples_of(folder, processor)) == 1


@pytest.mark.parametrize("name", ["n[1].parquet", "n*.parquet", "n?.parquet"])
def test_a_parquet_whose_name_looks_like_a_pattern_is_read_itself(folder, name):
    Dataset.from_list([{"text": "A dog."}]).to_parquet(folder / "n1.parquet")
    Dataset.from_list([{"text": "A cat."}]).to_parquet(folder / name)
    assert open_source(folder / name).row(0).text == "A cat."


@pytest.mark.parametrize("kind", ["jsonl", "tar", "parquet", "saved"])
def test_a_file_that_changes_during_the_run_is_named(folder, processor, kind):
    def write(word: str) -> Path:
        if kind == "tar":
            return write_tar(folder / "data.tar", {"__key__": "0", "txt": f"It is a {word}."})
        if kind == "parquet":
            datasets.Dataset.from_list([{"text": f"It is a {word}."}]).to_parquet(folder / "data.parquet")
            return folder / "data.parquet"
        if kind == "saved":
            datasets.Dataset.from_list([{"text": f"It is a {word}."}]).save_to_disk(folder / "saved")
            return folder / "saved"
        return write_lines(folder / "data.jsonl", [{"text": f"It is a {word}."}])

    dataset = ChatDataset(write("cat"), processor, SEQ_LENGTH)
    dataset[0]
    path = write("dog")
    # In case that both were written within one tick of the clock.
    os.utime(path / "state.json" if kind == "saved" else path, ns=(1, 1))
    with pytest.raises(UserError, match="has changed since it was opened"):
        dataset[0]


def test_a_feature_of_video_is_refused_by_name(folder, processor):
    features = Features({"text": Value("string"), "video": {"bytes": Value("binary"), "path": Value("string")}})
    rows = [{"text": "It is a cat.", "video": {"bytes": b"1", "path": "a.mp4"}}]
    Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    [skipped] = examine(open_source(folder / "saved"), processor).skipped
    assert '"video" is not read' in skipped.reason
