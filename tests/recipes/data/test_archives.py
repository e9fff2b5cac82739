"""WebDataset: samples of tar files without an index, and every reason to refuse one."""

import io
import json
import multiprocessing
import os
import tarfile
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.findings import examine
from gpt_oss_vision.recipes.data.sources import archives
from gpt_oss_vision.recipes.data.sources.opening import open_source
from gpt_oss_vision.recipes.data.sources.tar_headers import headers, members
from records import (
    CONVERSATIONS,
    assert_same,
    cauldron,
    llama_factory,
    llava,
    ours,
    png,
    records,
    samples_of,
    write_lines,
)

SEQ_LENGTH = 96


def write_tar(path: Path, *samples: dict[str, Any]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:06}"} | sample)
    return path


def write_members(path: Path, *members: tuple[str, bytes]) -> Path:
    """A tar whose members stand in the order given."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def reason(path: Path, processor: Any) -> str:
    [skipped] = examine(open_source(path), processor).skipped
    return skipped.reason


# --- samples


@pytest.mark.parametrize("shape", [ours, llava, llama_factory, cauldron], ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("naming", ["own names", "no names"])
def test_records_and_images_in_a_tar_give_the_same_samples(folder, processor, shape, naming):
    expected = samples_of(write_lines(folder / "data.jsonl", records(shape, folder)), processor)
    rows = [without_names(row) for row in records(shape, folder)] if naming == "no names" else records(shape, folder)
    samples = []
    for row, one in zip(rows, CONVERSATIONS, strict=True):
        text = json.dumps(row)
        for number, name in enumerate(one.images):
            text = text.replace(f"{name}.png", f"{number}.png")
        samples.append({"json": text, **{f"{number}.png": png(folder, name) for number, name in enumerate(one.images)}})
    path = write_tar(folder / "data.tar", *samples)
    for name in ("red.png", "blue.png"):
        (folder / name).unlink()
    assert open_source(path).kind == "WebDataset"
    assert_same(samples_of(path, processor), expected)


def without_names(row: dict[str, Any]) -> dict[str, Any]:
    """A record that leaves the names of its images to the archive."""
    row = {key: value for key, value in row.items() if key not in ("image", "images")}
    for message in row.get("messages", []):
        if isinstance(message["content"], list):
            for part in message["content"]:
                part.pop("path", None)
    return row


@pytest.mark.parametrize(
    "name", ["{key}.left.png", "left.png", "LEFT.PNG"], ids=["name of the member", "extension", "in capitals"]
)
def test_a_record_may_name_an_image_by_its_member_or_its_extension(folder, processor, name):
    key = "a/b/0007"
    record = {"text": "<image> is a cat.", "image": name.format(key=key)}
    extension = "LEFT.PNG" if name.isupper() else "left.png"
    path = write_members(
        folder / "data.tar", (f"{key}.{extension}", png(folder, "red")), (f"{key}.json", json.dumps(record).encode())
    )
    write_lines(folder / "data.jsonl", [{"text": "<image> is a cat.", "image": "red.png"}])
    assert_same(samples_of(path, processor), samples_of(folder / "data.jsonl", processor))
    assert open_source(path).place(0) == (str(path), key)


def test_captions_in_txt_and_in_json_give_the_same_samples(folder, processor):
    image = {"png": png(folder, "red")}
    path = write_tar(
        folder / "data.tar",
        image | {"txt": "It is a cat."},
        image | {"json": {"caption": "It is a cat.", "url": "http://example.org/a.jpg", "width": 12}},
        image | {"json": {"caption": "A dog.", "status": "success"}, "txt": "It is a cat."},
        image | {"json": {"text": "It is a cat."}},
    )
    write_lines(folder / "data.jsonl", [{"text": "It is a cat.", "image": "red.png"}] * 4)
    assert_same(samples_of(path, processor), samples_of(folder / "data.jsonl", processor))


def test_a_second_json_is_named_as_not_read(folder):
    path = write_tar(folder / "data.tar", {"json": {"text": "A cat.", "id": 7}, "meta.json": {"text": "A dog."}})
    row = open_source(path).row(0)
    assert row.text == "A cat." and row.left_out == ("id", "000000.meta.json")


def test_a_text_that_is_part_of_what_is_read_may_stand_beside_it(folder, processor):
    record = ours(CONVERSATIONS[1], folder)
    answer = CONVERSATIONS[1].turns[-1][-1]
    path = write_tar(
        folder / "data.tar",
        {"json": record},
        {"json": record, "txt": f"{answer}\n"},
        {"json": record, "txt": ""},
        {"txt": "A cat: a dog.", "caption": "A cat", "a.txt": "a dog."},
    )
    samples = samples_of(path, processor)
    assert_same(samples[:3], samples[:1] * 3)
    assert open_source(path).row(3).text == "A cat: a dog."


def test_a_tenth_image_comes_after_the_ninth(folder, processor):
    order = [number % 3 == 0 for number in range(12)]
    images = {f"{number}.png": png(folder, "red" if red else "blue") for number, red in enumerate(order)}
    path = write_tar(folder / "data.tar", images | {"txt": "It is a cat."})
    [sample] = samples_of(path, processor)
    assert (sample["pixel_values"][:, 0].mean((1, 2)) > sample["pixel_values"][:, 2].mean((1, 2))).tolist() == order


def test_samples_are_those_of_webdataset(folder):
    members = [
        ("README", b"no extension"),
        ("__meta__/notes.txt", b"about the archive"),
        ("./a/x.y/one.txt", b"1"),
        ("./a/x.y/one.cls", b"1"),
        ("b/one.seg.txt", b"3"),
        ("b/one.txt", b"3"),
        (".hidden.txt", b"0"),
        ("long/" * 40 + "two.txt", b"4"),
        ("b/two.TXT", b"5"),
        ("é.txt", b"6"),
    ]
    path = write_members(folder / "data.tar", *members)
    with path.open("rb") as file:
        contents = (content | {"__url__": ""} for content in tar_file_iterator(file))
        expected = [(sample["__key__"], sample["txt"].decode()) for sample in group_by_keys(contents)]
    source = open_source(path)
    assert [(source.place(index)[1], source.row(index).text) for index in range(len(source))] == expected
    assert len(expected) == 5


def test_shards_follow_each_other_by_pattern_and_as_a_folder(folder):
    (folder / "shards").mkdir()
    for number in range(3):
        write_tar(folder / "shards" / f"{number:03}.tar", {"txt": f"{number}"}, {"txt": f"{number}"})
    for path in ("shards", "shards/*.tar", "shards/{000..002}.tar"):
        source = open_source(folder / path)
        assert [source.row(index).text for index in range(len(source))] == list("001122")
    assert source.place(3) == (str(folder / "shards" / "001.tar"), "000001")


def test_loader_workers_read_what_one_process_reads(folder, processor):
    samples = [{"txt": f"one {number}", "png": png(folder, "red")} for number in range(9)]
    dataset = ChatDataset(write_tar(folder / "data.tar", *samples), processor, SEQ_LENGTH)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert_same(list(loader), list(dataset))


def test_of_a_tar_only_places_are_held_in_memory(folder):
    count = 20_000
    with tarfile.open(folder / "data.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"{number}.txt"))
    tracemalloc.start()
    source = open_source(folder / "data.tar")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert held < 32 * count
    assert peak < 100 * count


# --- the index


names = st.text("ab/é.", min_size=1, max_size=9).map(lambda name: name.strip("/") or "a")
long_names = st.integers(90, 300).map(lambda length: "x" * (length // 2) + "/" + "y" * (length // 2))


@given(
    contents=st.lists(st.tuples(names | long_names, st.binary(max_size=700)), min_size=1, max_size=6),
    others=st.lists(st.sampled_from([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]), max_size=2),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    time=st.sampled_from([0, 1.5, 2**32]),
    headers_of_all=st.sampled_from([{}, {"comment": "made by hand"}]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_members_are_found_where_tarfile_finds_them(tmp_path, contents, others, form, time, headers_of_all):
    assume(form != tarfile.USTAR_FORMAT or all(len(name.encode()) < 100 for name, _ in contents))
    with tarfile.open(tmp_path / "a.tar", "w", format=form, pax_headers=headers_of_all) as archive:
        for number, (name, content) in enumerate(contents):
            for kind in others if number == 1 else ():
                other = tarfile.TarInfo(f"other/{number}")
                other.type, other.linkname = kind, "z" * (20 if form == tarfile.USTAR_FORMAT else 120)
                archive.addfile(other)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), time
            archive.addfile(member, io.BytesIO(content))
    with (tmp_path / "a.tar").open("rb") as file:
        found = [tuple(header) for header in headers(file)]
        expected = [(member.name, member.isdir(), member.offset, end) for member, end in members(file, 0)]
    assert found == expected


def test_a_tar_is_scanned_once_and_again_when_it_has_changed(folder, monkeypatch):
    path = write_tar(folder / "data.tar", *[{"txt": "one"}] * 3)
    expected = open_source(path)
    scan, scans = archives._scan, []
    monkeypatch.setattr(archives, "_scan", lambda file, path: scans.append(path) or scan(file, path))
    again = open_source(path)
    assert scans == [] and [again.place(row) for row in range(3)] == [expected.place(row) for row in range(3)]
    write_tar(path, *[{"txt": "one"}] * 4)
    assert len(open_source(path)) == 4 and scans == [path]
    os.utime(path, ns=(1, 1))
    assert len(open_source(path)) == 4 and scans == [path] * 2


def test_of_processes_that_open_a_tar_at_once_one_scans_it(folder, caches):
    path = write_tar(folder / "data.tar", *[{"txt": "one"}] * 3)
    start = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(4, start) as pool:
        assert list(pool.map(rows_and_scans, [path] * 4)) != []
    assert (caches / "scans").read_text() == "1"


def rows_and_scans(path: Path) -> int:
    scan = archives._scan

    def counted(file, path):
        with Path(os.environ["XDG_CACHE_HOME"], "scans").open("a") as scans:
            scans.write("1")
        time.sleep(0.3)
        return scan(file, path)

    archives._scan = counted
    return len(open_source(path))


@pytest.mark.parametrize("why", ["no folder can be made", "the disk is full"])
def test_an_index_that_cannot_be_kept_is_said_and_the_tar_is_read(folder, caches, monkeypatch, caplog, why):
    path = write_tar(folder / "data.tar", *[{"txt": "one"}] * 3)
    if why == "no folder can be made":
        (caches / "gpt-oss-vision").write_text("in the way")
    else:
        monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(open_source(path)) == 3
    assert "is scanned at each start, as its index cannot be kept" in caplog.text
    assert not list((caches / "gpt-oss-vision").rglob("*.npy"))


# --- what is refused


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({"txt": "Hi", "mp4": b"1"}, "000000.mp4 is not read"),
        ({"txt": "Hi", "wav": b"1"}, "000000.wav is not read"),
        ({"txt": "Hi", "jpgs": b"1"}, "000000.jpgs is not read"),
        ({"txt": "Hi", "0.pyd": [1]}, "000000.0.pyd is not read"),
        ({"txt": "Hi", "npy": b"1"}, "000000.npy is not read"),
        ({"json": {"a": 1}, "png": b"1"}, 'neither a json with "messages", "text" or "caption", nor a txt'),
        ({"png": b"1"}, "nor a txt"),
        ({"json": "[1]", "png": b"1"}, "the json is no object"),
        ({"json": "{", "png": b"1"}, "malformed JSON"),
        ({"json": {"text": "A cat.", "image": "1.png"}, "0.png": b"1"}, "000000.0.png is not among the images"),
        ({"json": {"text": "A cat.", "image": "0.png"}, "0.png": b"1", "1.png": b"2"}, "1.png is not among the images"),
        ({"json": {"text": "A cat.", "image": "0.png"}}, "image 0.png is missing"),
        ({"json": {"text": "<image> and <image>"}, "0.png": b"1"}, "2 times <image>, with 1 images"),
        ({"txt": "A cat.", "png": b"no image"}, "image 000000.png is broken"),
        ({"json": {"text": "A cat.", "video": "a.mp4"}, "png": b"1"}, '"video" is not read'),
        ({"txt": b"\xff\xfe\xfd"}, "the txt is not in UTF-8"),
        ({"txt": "Who?", "answer.txt": "A cat."}, "000000.answer.txt is not read, as the text is in 000000.txt"),
        ({"txt": "Who?", "caption": "A cat."}, "000000.caption is not read, as the text is in 000000.txt"),
        ({"json": ours(CONVERSATIONS[1], Path()), "txt": "A dog."}, "000000.txt is not read, as the text is in"),
        ({"json": {"text": "A cat."}, "text": "A dog."}, "000000.text is not read, as the text is in 000000.json"),
        ({"txt": "Hi", "md": "# A cat"}, "000000.md is not read"),
        ({"txt": "Hi", "html": "<p>A cat</p>"}, "000000.html is not read"),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(folder, processor, sample, why):
    path = write_tar(folder / "data.tar", sample)
    assert why in reason(path, processor)


def test_a_member_that_is_a_link_or_there_twice_is_named(folder, processor):
    with tarfile.open(folder / "data.tar", "w") as archive:
        archive.add(folder / "red.png", "1.png")
        link = tarfile.TarInfo("1.0.png")
        link.type, link.linkname = tarfile.LNKTYPE, "1.png"
        archive.addfile(link)
    assert "1.0.png is a link" in reason(folder / "data.tar", processor)
    write_members(folder / "data.tar", ("1.txt", b"Hi"), ("1.TXT", b"Ha"))
    assert "1.TXT is there twice" in reason(folder / "data.tar", processor)


def test_members_of_a_sample_that_stand_apart_are_refused(folder):
    path = write_members(folder / "data.tar", ("1.png", b"1"), ("2.png", b"2"), ("1.txt", b"Hi"), ("2.txt", b"Ha"))
    with pytest.raises(UserError, match=r"data.tar has members of sample 1 in several places"):
        open_source(path)


def test_a_tar_that_is_cut_off_anywhere_is_named_with_its_last_whole_sample(folder):
    path = write_tar(folder / "data.tar", *[{"txt": "It is a cat.", "cls": "1"}] * 3)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    end = members[-1].offset_data + 512
    for size in (*range(700, end, 300), end, end + 511, *(member.offset for member in members[1:])):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"data.tar is cut off or damaged behind byte") as error:
            open_source(path)
        passed = sum(member.offset_data + 512 <= size for member in members if member.name.endswith("txt"))
        named = str(error.value).partition("its last whole sample is ")[2]
        assert int(named or -1) in (passed - 2, passed - 1)
        assert named or "it has no whole sample" in str(error.value)
    path.write_bytes(whole[: end + 512])
    assert len(open_source(path)) == 3


def test_a_tar_whose_header_is_damaged_is_named(folder):
    path = write_tar(folder / "data.tar", *[{"txt": "It is a cat."}] * 3)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    content[second : second + 6] = b"damage"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged behind byte {second:,} .*; it has no whole sample"):
        open_source(path)


def test_tars_that_were_joined_by_cat_are_refused_and_not_read_in_part(folder):
    path = write_tar(folder / "data.tar", {"txt": "Hi"})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="joined by cat"):
        open_source(path)


def test_a_tar_without_members_has_no_rows(folder, processor):
    tarfile.open(folder / "data.tar", "w").close()
    with pytest.raises(UserError, match="has no rows"):
        ChatDataset(folder / "data.tar", processor, SEQ_LENGTH)


def test_a_tar_that_changes_during_the_run_is_named(folder):
    path = write_tar(folder / "data.tar", {"txt": "Hi"})
    source = open_source(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="has changed since it was opened"):
        source.row(0)
