"""Folders that `energon prepare` has made, and Megatron's `.bin` and `.idx`, both written by their own writers."""

from gpt_oss_vision.bridge import mcore  # noqa: F401 - first: it makes Megatron-Bridge importable without TE

# isort: split
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from PIL import Image

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.findings import examine
from gpt_oss_vision.recipes.data.lock import lock_of, read_lock, write_lock
from gpt_oss_vision.recipes.data.samples import encode_row
from gpt_oss_vision.recipes.data.sources.base import Joined
from gpt_oss_vision.recipes.data.sources.opening import open_source
from records import CONVERSATIONS, Conversation, assert_same, llava, ours, png, samples_of, write_lines

SEQ_LENGTH = 128
CHATML = "megatron.bridge.data.energon.task_encoder_utils"
ONE_IMAGE = [Conversation((), (("Hi", "one"),)), *CONVERSATIONS[2:]] * 2


def image(folder: Path) -> dict[str, Any]:
    return {"png": png(folder, "red")}


def chats(folder: Path) -> list[dict[str, Any]]:
    made = []
    for one in ONE_IMAGE:
        record = llava(one, folder)
        made.append({"json": record["conversations"]} | ({"png": png(folder, one.images[0])} if one.images else {}))
    return made


QUESTION = {"question": "What is it?", "answers": ["a dog", "a cat"], "weights": [0.2, 0.8]}
CHOICES = {"question": "What is it?", "choices": ["a dog", "a cat"], "right": 1}
# Samples, type of sample, field map.
FOLDERS: dict[str, tuple[Callable[[Path], Sequence[dict[str, Any]]], str, dict[str, str] | None]] = {
    "captions": (
        lambda folder: [image(folder) | {"txt": "It is a cat."}] * 2,
        "CaptioningSample",
        {"image": "png", "caption": "txt"},
    ),
    "questions": (
        lambda folder: [image(folder) | {"json": QUESTION}] * 2,
        "VQASample",
        {
            "image": "jpg,png",
            "context": "json[question]",
            "answers": "json[answers]",
            "answer_weights": "json[weights]",
        },
    ),
    "choices": (
        lambda folder: [image(folder) | {"json": CHOICES}] * 2,
        "MultiChoiceVQASample",
        {
            "image": "png",
            "context": "json[question]",
            "choices": "json[choices]",
            "correct_choice_idx": "json[right]",
        },
    ),
    "ocr": (
        lambda folder: [image(folder) | {"txt": "It is a cat."}] * 2,
        "OCRSample",
        {"image": "png", "text": "txt"},
    ),
    "texts": (lambda folder: [{"txt": "It is a cat."}] * 2, "TextSample", {"text": "txt"}),
    "unmapped": (lambda folder: [image(folder) | {"txt": "It is a cat."}] * 2, "TextSample", {"text": "txt"}),
    "beside": (
        lambda folder: [image(folder) | {"jpg": b"1", "md": "It is a cat.", "txt": "Who?"}] * 2,
        "CaptioningSample",
        {"image": "png", "caption": "md"},
    ),
    "interleaved": (
        lambda folder: [{"json": ["It is a cat.", " A dog."]}] * 2,
        "InterleavedSample",
        {"sequence": "json"},
    ),
    "crude": (
        lambda folder: [
            {"json": ours(one, folder)} | {f"{name}.png": png(folder, name) for name in one.images}
            for one in CONVERSATIONS
        ],
        "CrudeWebdataset",
        None,
    ),
    "chats": (chats, "CrudeWebdataset", None),
    "classes": (lambda folder: [image(folder) | {"cls": "3"}] * 2, "ImageSample", {"image": "png"}),
    "code": (lambda folder: [{"txt": "It is a cat."}] * 2, "TextSample", None),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two shards each, one for the split train and one for val, prepared by Energon's own command."""
    root = tmp_path_factory.mktemp("energon")
    for name, colour in {"red": (200, 10, 10), "blue": (10, 10, 200)}.items():
        Image.new("RGB", (12, 9), colour).save(root / f"{name}.png")
    calls = []
    for name, (samples, kind, field_map) in FOLDERS.items():
        (root / name / "shards").mkdir(parents=True)
        for shard in range(2):
            with webdataset.TarWriter(str(root / name / "shards" / f"{shard}.tar")) as writer:
                for number, sample in enumerate(samples(root)):
                    writer.write({"__key__": f"{shard}{number:03}"} | sample)
        fields = ["--field-map", json.dumps(field_map)] if field_map else []
        options = ["--non-interactive", "--no-progress", "--num-workers", "1", "--sample-type", kind, *fields]
        splits = ["--split-parts", "train:shards/0.tar", "--split-parts", "val:shards/1.tar"]
        calls.append([str(root / name), *options, *splits])
    code = """
import json, sys
from megatron.energon.tools.prepare import command
for call in json.loads(sys.argv[1]):
    command.main(call, standalone_mode=False)
"""
    subprocess.run([sys.executable, "-c", code, json.dumps(calls)], check=True, stdout=subprocess.DEVNULL)
    chatml = {"__module__": CHATML, "__class__": "ChatMLWebdataset"}
    # Of a sample with and one without an image, the latter lacks the member.
    config = chatml | {"field_map": {"conversation": "json", "imgs": "png"}}
    (root / "chats" / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))
    return root


def question(text: str, answer: str) -> dict[str, Any]:
    content = [{"type": "image", "path": "red.png"}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


CAPTION = {"text": "It is a cat.", "image": "red.png"}
LETTERED = "What is it?\nA. a dog\nB. a cat\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("captions", [CAPTION] * 2),
        ("ocr", [CAPTION] * 2),
        ("questions", [question("What is it?", "a cat")] * 2),
        ("choices", [question(LETTERED, "B")] * 2),
        ("texts", [{"text": "It is a cat."}] * 2),
        ("interleaved", [{"text": "It is a cat. A dog."}] * 2),
    ],
)
def test_samples_of_energon_s_types_are_those_of_our_rows(prepared, processor, name, rows):
    write_lines(prepared / "data.jsonl", rows)
    assert open_source(prepared / name).kind == f"Energon ({FOLDERS[name][1]})"
    assert_same(samples_of(prepared / name, processor), samples_of(prepared / "data.jsonl", processor))


def test_crude_samples_are_read_as_those_of_a_tar(prepared, processor):
    write_lines(prepared / "data.jsonl", [ours(one, prepared) for one in CONVERSATIONS])
    assert_same(samples_of(prepared / "crude", processor), samples_of(prepared / "data.jsonl", processor))


def test_chats_of_megatron_bridge_are_read(prepared, processor):
    write_lines(prepared / "data.jsonl", [ours(one, prepared) for one in ONE_IMAGE if one.images])
    source = open_source(prepared / "chats")
    found = examine(source, processor)
    # Megatron-Bridge's own reader needs the member of each field too.
    assert [skipped.row for skipped in found.skipped] == [0, 2]
    samples = [encode_row(source.row(int(index)), processor) for index in found.usable]
    assert_same(samples, samples_of(prepared / "data.jsonl", processor))


def test_a_split_is_named_behind_the_folder_and_places_name_tar_and_key(prepared):
    assert open_source(prepared / "texts").place(1) == (str(prepared / "texts" / "shards" / "0.tar"), "0001")
    assert open_source(prepared / "texts" / "val").place(1) == (str(prepared / "texts" / "shards" / "1.tar"), "1001")
    with pytest.raises(UserError, match=r"has no files in a split test; name one as FOLDER/SPLIT, of train, val"):
        open_source(prepared / "texts" / "test")


def test_a_shard_of_a_prepared_folder_is_read_as_a_tar(prepared):
    assert open_source(prepared / "texts" / "shards" / "0.tar").kind == "WebDataset"
    assert len(open_source(prepared / "texts" / "shards" / "*.tar")) == 4


def test_a_shard_that_changes_during_the_run_is_named(prepared):
    source = open_source(prepared / "ocr")
    assert source.row(0).text == "It is a cat."
    os.utime(prepared / "ocr" / "shards" / "0.tar", ns=(1, 1))
    with pytest.raises(UserError, match=r"0.tar has changed since it was opened"):
        source.row(0)


def test_samples_that_the_split_excludes_are_left_out(prepared):
    path = prepared / "captions" / ".nv-meta" / "split.yaml"
    before = path.read_text()
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"exclude": ["shards/0.tar/0000"]}))
    try:
        source = open_source(prepared / "captions")
        assert [source.place(index)[1] for index in range(len(source))] == ["0001"]
    finally:
        path.write_text(before)


def test_loader_workers_read_what_one_process_reads(prepared, processor):
    dataset = ChatDataset(prepared / "crude", processor, SEQ_LENGTH)
    dataset[0]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    assert_same(list(loader), list(dataset))


def test_a_sample_whose_images_the_field_map_leaves_out_is_refused(prepared, processor):
    for skipped in examine(open_source(prepared / "unmapped"), processor).skipped:
        assert "png is not in the field_map" in skipped.reason
        break
    else:
        pytest.fail("no row was refused")


def test_members_that_the_field_map_leaves_out_are_named(prepared):
    row = open_source(prepared / "beside").row(0)
    assert row.text.endswith("It is a cat.") and len(row.images) == 1
    assert sorted(row.left_out) == ["jpg", "txt"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("code", "has a sample_loader, which is code and is not run; write a field_map in its place"),
        ("classes", "has samples of type ImageSample; CaptioningSample, OCRSample"),
    ],
)
def test_samples_that_are_made_by_code_or_have_no_text_are_refused(prepared, name, why):
    with pytest.raises(UserError, match=why):
        open_source(prepared / name)


def test_no_module_of_a_dataset_yaml_is_imported(prepared, tmp_path):
    (tmp_path / "data").mkdir()
    for name in (".nv-meta", "shards"):
        (tmp_path / "data" / name).symlink_to(prepared / "texts" / name)
    config = {"__module__": "os", "__class__": "abort"}
    (tmp_path / "data" / ".nv-meta").unlink()
    (tmp_path / "data" / ".nv-meta").mkdir()
    (tmp_path / "data" / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="names classes of os, which is code and is not run"):
        open_source(tmp_path / "data")


# --- tokens of Megatron


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Documents of 10, 1, 4 and 7 tokens; the last is of two sequences."""
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for start, lengths in ((0, [10]), (100, [1]), (200, [4]), (300, [3, 4])):
        builder.add_document(np.arange(start, start + sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "data.idx"))
    return tmp_path / "data"


PIECES = [
    [0, 1, 2, 3],
    [3, 4, 5, 6],
    [6, 7, 8, 9],
    [200, 201, 202, 203],
    [300, 301, 302, 303],
    [303, 304, 305, 306],
]


@pytest.mark.parametrize("name", ["data", "data.bin", "data.idx", "", "*.idx", "*.bin", "data.*"])
def test_documents_are_cut_into_pieces_that_share_one_token(tokens, name):
    source = open_source(tokens.parent / name, seq_length=4)
    assert source.kind == "Megatron bin/idx"
    assert [source.row(index).tokens.tolist() for index in range(len(source))] == PIECES
    assert source.place(5) == (f"{tokens}.bin", "document 3, token 3")


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_tokens_that_change_during_the_run_are_named(tokens, ending):
    source = open_source(tokens, seq_length=4)
    os.utime(f"{tokens}{ending}", ns=(1, 1))
    with pytest.raises(UserError, match=rf"data\{ending} has changed since it was opened"):
        source.row(0)


def test_each_token_but_the_first_of_a_document_is_learned_once(tokens, processor):
    for seq_length in (2, 3, 5, 9, 10, 64):
        samples = ChatDataset(open_source(tokens, seq_length=seq_length), processor, seq_length)
        learned = [label for sample in samples for label in sample["labels"].tolist() if label != -100]
        assert sorted(learned) == [*range(1, 10), *range(201, 204), *range(301, 307)]
        assert max(len(sample["input_ids"]) for sample in samples) <= seq_length


@pytest.mark.parametrize(("name", "why"), [("data.bin", "needs 44"), ("data.idx", "cut off or damaged")])
def test_tokens_that_are_cut_off_are_named(tokens, name, why):
    path = tokens.parent / name
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{name} .*{why}"):
        open_source(tokens, seq_length=4)


def test_tokens_need_the_length_of_a_row(tokens):
    with pytest.raises(UserError, match="holds tokens, which are cut into rows for training alone"):
        open_source(tokens)


def test_a_piece_of_one_token_is_refused(tokens):
    with pytest.raises(UserError, match="a piece needs 2 tokens to learn one, and seq_length is 1"):
        open_source(tokens, seq_length=1)


def test_a_lock_of_tokens_that_were_cut_for_another_length_is_refused(tokens, processor):
    source = open_source(tokens, seq_length=9)
    path = lock_of(tokens)
    write_lock(path, source, examine(source, processor), processor, decode_images=False)
    assert read_lock(path, Joined([source]), processor, decode_images=False) is not None
    other = open_source(tokens, seq_length=8)
    assert len(other) == len(source)
    with pytest.raises(UserError, match="its tokens were cut for seq_length 9, and it is 8 now"):
        read_lock(path, other, processor, decode_images=False)


def test_tokens_outside_the_vocabulary_cannot_be_used(tmp_path, processor):
    size = len(processor.tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for start in (0, size - 3, size - 4):
        builder.add_document(np.arange(start, start + 4), [4])
    builder.finalize(str(tmp_path / "data.idx"))
    found = examine(open_source(tmp_path / "data", seq_length=8), processor)
    assert [row.reason for row in found.skipped] == [f"token {size} is outside the vocabulary of {size}"]
    assert found.lengths.tolist() == [4, 0, 4]


def test_a_placeholder_among_tokens_cannot_be_used(tmp_path, processor):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    for token in (3, processor.image_token_id):
        builder.add_document(np.array([1, 2, token]), [3])
    builder.finalize(str(tmp_path / "data.idx"))
    found = examine(open_source(tmp_path / "data", seq_length=8), processor)
    assert [row.reason for row in found.skipped] == [
        f"token {processor.image_token_id} is the place of an image, and there is none"
    ]
    assert found.lengths.tolist() == [3, 0]
