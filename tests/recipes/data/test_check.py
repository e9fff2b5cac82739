"""The check of data: what it prints and writes, in any number of processes; and locks that training takes up."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disks import Disk
from PIL import Image

from gpt_oss_vision.bridge.hf.image_processing_gpt_oss_vision import GPTOSSVisionImageProcessor
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.cli import main
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.check import Check, check_source, histogram, together
from gpt_oss_vision.recipes.data.findings import KINDS, Findings, examine
from gpt_oss_vision.recipes.data.lock import lock_of, processor_hash, read_lock, write_lock
from gpt_oss_vision.recipes.data.sources.opening import open_source
from gpt_oss_vision.recipes.data.tiny import tiny_processor
from records import write_lines


@pytest.fixture
def rows(folder: Path) -> Path:
    """Eight chats, each second one with an image, one that is repeated, and three rows that cannot be used."""
    chats = [
        {"conversations": [{"from": "human", "value": f"{'<image>' * (i % 2)}What?"}, {"from": "gpt", "value": f"{i}"}]}
        | ({"image": "red.png"} if i % 2 else {})
        for i in range(8)
    ]
    bad = [{"text": "A cat.", "video": "a.mp4"}, {"text": "A cat.", "image": "gone.png"}, {"text": " "}]
    (folder / "rows.json").write_text(json.dumps([*chats, chats[0], *bad], indent=1))
    return folder / "rows.json"


def lock(path: Path, processor: GPTOSSVisionProcessor, **options: Any) -> Findings:
    source = open_source(path)
    found = examine(source, processor, **options)
    write_lock(lock_of(path), source, found, processor, decode_images=options.get("decode_images", False))
    return found


def read(path: Path, processor: GPTOSSVisionProcessor, **options: Any) -> Findings | None:
    return read_lock(lock_of(path), open_source(path), processor, **({"decode_images": False} | options))


def test_the_numbers_of_a_check(rows, processor):
    source = open_source(rows)
    check = Check(source=source, found=examine(source, processor).limited_to(64, source), seq_length=64)
    found = check.as_json()
    assert (found["rows"], found["usable"], found["repeated"], found["images"]) == (12, 9, 1, 4)
    assert (found["format"], found["rows_by_format"]) == ("JSON: 9 LLaVA", {"LLaVA": 9})
    assert [(row["file"], row["line"]) for row in found["skipped"]] == [(str(rows), line) for line in (114, 118, 122)]
    assert [row["reason"].split()[0] for row in found["skipped"]] == ['"video"', "image", "an"]
    assert found["images_per_row"] == {"0": 5, "1": 4}
    assert sum(count for _, _, count in found["tokens_per_row"]) == 9
    assert found["image_modes"] == {"RGB": 1} and found["image_sides"] == {"16": 1}  # one file, shared by four rows
    assert found["tokens"] == examine(source, processor).lengths.sum()
    assert found["packs"]["samples"] == 9


def test_lines_for_a_terminal_name_the_rows_that_cannot_be_used(rows, processor):
    source = open_source(rows)
    check = Check(
        source=source, found=examine(source, processor).limited_to(64, source), seq_length=64, rows_per_step=4
    )
    lines = "\n".join(f"{name} {value}" for name, value in check.lines())
    assert "JSON: 9 LLaVA" in lines
    assert "12, of which 3 cannot be used; 1 are repeated" in lines
    assert 'line 114: "video" is not read' in lines
    assert "3 an epoch of 4 rows" in lines


def test_several_processes_find_what_one_finds(folder, processor):
    lines = [json.dumps({"text": f"A cat {i}."} if i % 7 else {"text": ""}) for i in range(5000)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    source = open_source(folder / "texts.jsonl")
    alone = examine(source, processor)
    together = check_source(source, processor, processes=2)
    assert (together.skipped, together.shapes) == (alone.skipped, alone.shapes)
    assert all((getattr(together, name) == getattr(alone, name)).all() for name in KINDS)


def test_the_numbers_of_several_sources_are_added(rows, processor):
    source = open_source(rows)
    check = Check(source=source, found=examine(source, processor).limited_to(64, source), seq_length=64)
    both = together([check, check])
    assert (both["rows"], both["usable"], both["images"], len(both["skipped"])) == (24, 18, 8, 6)
    assert both["format"] == "JSON: 9 LLaVA" and len(both["sources"]) == 2


def test_histograms_have_every_length_in_one_bar():
    lengths = np.array([1, 2, 3, 4, 5, 8, 9, 100])
    assert histogram(lengths)[:4] == [(1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2)]
    assert sum(count for _, _, count in histogram(lengths)) == len(lengths)
    assert histogram(np.array([], dtype=int)) == []


def test_the_keys_that_are_not_read_are_counted_over_usable_rows(folder, processor):
    rows = [{"text": f"A cat {i}.", "id": i} | ({"label": i} if i < 3 else {}) for i in range(12)]
    write_lines(folder / "rows.jsonl", [*rows, {"text": " ", "id": 1}])
    source = open_source(folder / "rows.jsonl")
    check = Check(source=source, found=check_source(source, processor), seq_length=64)
    assert dict(check.lines())["not read"] == "12 rows have `id`, 3 `label`"
    assert check.as_json()["left_out"] == {"id": 12, "label": 3}
    held = lock(folder / "rows.jsonl", processor), read(folder / "rows.jsonl", processor)
    assert held[0].left_out == held[1].left_out == {"id": 12, "label": 3}


def test_images_of_rows_that_are_skipped_are_not_counted(folder, processor):
    rows = [{"text": "A cat.", "images": ["red.png", "gone.png"]}, {"text": "A cat.", "image": "blue.png"}]
    write_lines(folder / "rows.jsonl", rows)
    assert dict(examine(open_source(folder / "rows.jsonl"), processor).modes) == {"RGB": 1}
    write_lines(folder / "rows.jsonl", [*rows, {"text": "A cat.", "image": "red.png"}])
    assert dict(examine(open_source(folder / "rows.jsonl"), processor).modes) == {"RGB": 2}


def test_names_that_cannot_be_printed_are_named(folder, processor):
    names = ["half \ud800 gone.png", "\x1b[2J gone.png", f"{'a' * 4000}.png"]
    write_lines(folder / "rows.jsonl", [{"text": "A cat.", "image": name} for name in names])
    source = open_source(folder / "rows.jsonl")
    found = check_source(source, processor)
    check = Check(source=source, found=found, seq_length=64)
    assert "\\ud800 gone.png is broken" in found.skipped[0].reason and "\u241b[2J" in found.skipped[1].reason
    assert max(len(row.reason) for row in found.skipped) <= 401
    for sentence in dict(check.lines())["skipped"], json.dumps(check.as_json()):
        assert b"\x1b" not in sentence.encode()


def test_an_image_whose_name_is_no_unicode_is_used(folder, processor):
    name = "\udce9.png"  # of a file system in Latin-1
    (folder / name).write_bytes((folder / "red.png").read_bytes())
    write_lines(folder / "rows.jsonl", [{"text": "A cat.", "image": name}])
    assert not examine(open_source(folder / "rows.jsonl"), processor).skipped


def test_rows_of_which_none_can_be_used_are_refused_whatever_may_be_skipped(folder, processor):
    write_lines(folder / "rows.jsonl", [{"text": " "}] * 5)
    found = examine(open_source(folder / "rows.jsonl"), processor)
    with pytest.raises(UserError, match=r"5 of 5 rows can't be used .*an empty text\. No row can be used\.$"):
        found.refuse_too_many("rows.jsonl", 1.0)


# --- locks


def test_a_lock_holds_what_was_found(rows, processor):
    written = lock(rows, processor)
    held = read(rows, processor)
    assert held is not None
    assert (held.skipped, held.shapes, held.modes, held.sides) == (
        *(written.skipped, written.shapes, written.modes, written.sides),
    )
    assert all((getattr(held, name) == getattr(written, name)).all() for name in KINDS)


def test_without_a_lock_nothing_is_held(rows, processor):
    assert read(rows, processor) is None


def test_a_file_that_was_only_copied_keeps_its_lock(rows, processor):
    lock(rows, processor)
    os.utime(rows, (time.time() + 100,) * 2)
    assert read(rows, processor) is not None


def test_a_lock_of_images_in_another_folder_is_refused(rows, processor, tmp_path):
    lock(rows, processor)
    same = open_source(rows, image_folder=f"{rows.parent}/../{rows.parent.name}")
    assert read_lock(lock_of(rows), same, processor, decode_images=False) is not None
    other = open_source(rows, image_folder=tmp_path / "other")
    with pytest.raises(UserError, match=r"images were looked up in \., and now in other"):
        read_lock(lock_of(rows), other, processor, decode_images=False)


def test_a_lock_of_other_hosts_is_refused(rows, processor):
    source = open_source(rows, allowed_hosts=frozenset({"b.org", "a.org"}))
    write_lock(lock_of(rows), source, examine(source, processor), processor, decode_images=False)
    assert read_lock(lock_of(rows), source, processor, decode_images=False) is not None
    with pytest.raises(UserError, match=r"the allowed hosts were a\.org, b\.org, and are none now"):
        read(rows, processor)


@pytest.mark.parametrize("change", ["longer", "same size", "processor", "decoded", "damaged", "version"])
def test_a_lock_that_does_not_fit_is_refused(rows, processor, change):
    lock(rows, processor)
    options, content = {}, rows.read_text()
    if change == "longer":
        rows.write_text(content + " ")
    elif change == "same size":
        rows.write_text(content.replace("What?", "Whit?"))
        os.utime(rows, (time.time() + 100,) * 2)
    elif change == "processor":
        processor.num_image_tokens += 1
    elif change == "decoded":
        options = {"decode_images": True}
    elif change == "damaged":
        lock_of(rows).write_bytes(lock_of(rows).read_bytes()[:100])
    else:
        whole = lock_of(rows).read_bytes()
        lock_of(rows).write_bytes(whole.replace(b'\\"version\\": 3', b'\\"version\\": 9'))
    why = {
        "longer": r"rows.json has [\d,]+ bytes and had",
        "same size": "the content of .*rows.json has changed",
        "processor": "the processor is another",
        "decoded": "the images were not decoded",
        "damaged": "damaged, or no lock",
        "version": "it has version 9",
    }
    try:
        with pytest.raises(UserError, match=rf"{why[change]}.*data check` again, or remove .*rows.json.lock"):
            read(rows, processor, **options)
    finally:
        if change == "processor":
            processor.num_image_tokens -= 1


def test_a_processor_has_the_same_hash_before_and_after_it_was_saved(processor, tmp_path):
    fresh = GPTOSSVisionProcessor(
        GPTOSSVisionImageProcessor(**processor.image_processor.to_dict() | {"auto_map": None}),
        processor.tokenizer,
        num_image_tokens=processor.num_image_tokens,
    )
    fresh.image_processor.__dict__.pop("auto_map", None)
    before = processor_hash(fresh)
    fresh.save_pretrained(tmp_path)
    assert processor_hash(fresh) == processor_hash(GPTOSSVisionProcessor.from_pretrained(tmp_path)) == before


def test_the_lock_of_a_pattern_is_in_the_folder_in_front_of_it(folder):
    assert lock_of(folder / "a.jsonl") == folder / "a.jsonl.lock"
    assert lock_of(f"{folder}/") == Path(f"{folder}.lock")
    assert lock_of(folder / "*" / "b?.jsonl").parent == folder
    assert lock_of(folder / "b?.jsonl") != lock_of(folder / "b*.jsonl")


@pytest.mark.parametrize("name", [".", "a.jsonl", "*.jsonl", "*/b?.jsonl", "sub/../a.jsonl"])
def test_the_lock_of_a_relative_path_is_that_of_the_absolute_one(folder, monkeypatch, name):
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    assert lock_of(name) == lock_of(folder / name)
    assert not lock_of(name).name.startswith(".")


# --- the command


@pytest.fixture
def texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    (folder / "d").mkdir()
    return write_lines(folder / "d" / "a.jsonl", [{"text": f"A cat {i}."} for i in range(3)])


def test_a_pattern_is_checked_again_beside_its_lock(texts):
    assert main(["data", "check", "d/*"]) == main(["data", "check", "d/*"]) == 0


def test_hosts_are_given_to_the_check_and_are_in_the_lock(texts, processor):
    assert main(["data", "check", str(texts), "--allowed-hosts", "b.org", "a.org"]) == 0
    source = open_source(texts, allowed_hosts=frozenset({"a.org", "b.org"}))
    assert read_lock(lock_of(texts), source, tiny_processor(), decode_images=False) is not None
    assert main(["data", "show", str(texts), "--text", "--allowed-hosts", "a.org", "b.org"]) == 0
    options = ["--to", "jsonl", "-o", "out", "--allowed-hosts", "a.org"]
    assert main(["data", "convert", str(texts), *options]) == 0


@pytest.mark.parametrize("what", ["a source", "the place of a lock"])
def test_all_that_a_check_needs_is_looked_at_before_rows_are_checked(texts, capfd, what):
    second = "missing.jsonl"
    if what != "a source":
        second = str(write_lines(texts.parent / "b.jsonl", [{"text": "A cat."}]))
        lock_of(second).mkdir()
    assert main(["data", "check", str(texts), second, "--json", "found.json"]) == 1
    said = capfd.readouterr()
    assert "JSON lines" not in said.out
    assert ("missing.jsonl" if what == "a source" else "b.jsonl.lock cannot be written (it is a folder)") in said.err
    assert not lock_of(texts).exists() and not Path("found.json").exists()


def test_a_source_without_a_row_that_can_be_used_fails_whatever_may_be_skipped(texts):
    empty = write_lines(texts.parent / "b.jsonl", [{"text": " "}])
    assert main(["data", "check", str(texts), str(empty), "--max-skipped", "1"]) == 1


@pytest.mark.parametrize(
    ("action", "option"),
    [
        *((action, "--image-folder") for action in ("check", "show", "convert")),
        *((action, "--processor") for action in ("check", "show")),
    ],
)
def test_an_option_that_names_no_folder_is_refused(texts, capfd, action, option):
    options = ["--to", "jsonl", "-o", "out"] if action == "convert" else []
    assert main(["data", action, str(texts), option, "/nowhere", *options]) == 1
    assert f"{option} /nowhere is no folder" in capfd.readouterr().err


def test_an_image_that_rows_share_is_read_once(folder, processor, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *arguments: opened.append(arguments) or real(*arguments))
    rows = [{"text": f"A cat {i}.", "image": name} for i in range(5) for name in ("red.png", "gone.png")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = examine(open_source(folder / "rows.jsonl"), processor)
    assert len(opened) == 2
    assert len(found.skipped) == 5


@pytest.mark.parametrize("on_disk", ["tmpfs"], indirect=True)
def test_a_full_disk_leaves_the_lock_that_was_there(rows, processor, tmp_path, on_disk: Disk):
    disk = tmp_path / "disk"
    disk.mkdir()
    source = open_source(rows)
    found = Findings.of_rows(range(500_000))  # 10 MB

    def run() -> None:
        lock = disk / "rows.lock"
        write_lock(lock, source, examine(source, processor), processor, decode_images=False)
        before = lock.read_bytes()
        with pytest.raises(OSError, match=f"No space left on the disk of {lock}"):
            write_lock(lock, source, found, processor, decode_images=False)
        assert lock.read_bytes() == before
        assert list(disk.iterdir()) == [lock]

    on_disk(disk, 2**20, run)
