"""Records of every shape: either all images of a record are in the sample, or it is refused."""

import base64
import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gpt_oss_vision.recipes.data.formats import parse_record
from gpt_oss_vision.recipes.data.pictures import Pictures, UnusableRow
from gpt_oss_vision.recipes.data.rows import check_text
from gpt_oss_vision.recipes.data.samples import encode_row
from records import CHAT, RECORDS, SHAREGPT, Conversation

CHATS = ("messages", "conversations", "conversation")
PART_KEYS = ("image", "path", "url", "base64", "source", "image_url", "file", "pic", "data", "Image", "images")
RECORD_KEYS = ("image", "images", "img", "Image", "imges", "image_path", "image_url", "picture", "pic", "photo", "file")
MISSPELT = ("mesages", "message", "conversatons", "txet", "test", "Messages", "textt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, colour in {"red": (200, 10, 10), "blue": (10, 10, 200)}.items():
        Image.new("RGB", (12, 9), colour).save(folder / f"{name}.png")
    return folder


def content_of(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


@st.composite
def media(draw: st.DrawFn, folder: Path) -> Any:
    """One image, in any way that a record may give it."""
    name = draw(st.sampled_from(["red.png", "blue.png"]))
    content = content_of(folder, name)
    text = base64.b64encode(content).decode()
    return draw(
        st.sampled_from(
            [
                name,
                str(folder / name),
                f"file://{folder}/{name}",
                f"data:image/png;base64,{text}",
                text,
                content,
                {"bytes": content, "path": None},
                {"bytes": None, "path": name},
                {"url": name},
                {"url": f"data:image/png;base64,{text}", "detail": "high"},
                {"type": "base64", "media_type": "image/png", "data": text},
            ]
        )
    )


@st.composite
def records(draw: st.DrawFn, folder: Path) -> tuple[dict[str, Any], int]:
    """A record, and how many images it has."""
    count = 0

    def image() -> Any:
        nonlocal count
        count += 1
        return draw(media(folder))

    def part() -> dict[str, Any]:
        kind = draw(st.sampled_from(["text", "image", "image_url", "input_image", "bare", "both", "Image", "picture"]))
        made: dict[str, Any] = {"type": "image" if kind in ("bare", "both") else kind}
        if kind == "text" or draw(st.integers(0, 7)) == 7:
            made["text"] = draw(st.sampled_from(["Hi", "<image>", "one <image> two"]))
        if kind not in ("text", "bare") or draw(st.integers(0, 5)) == 0:
            made[draw(st.sampled_from(PART_KEYS))] = image()
        if kind == "both":
            made[draw(st.sampled_from(PART_KEYS))] = draw(st.none() | st.just(draw(media(folder))))
            count_again(made)
        return made

    def count_again(made: dict[str, Any]) -> None:
        nonlocal count
        held = sum(value is not None for key, value in made.items() if key in PART_KEYS)
        count += held - 1

    def content() -> Any:
        if draw(st.booleans()):
            return draw(st.sampled_from(["Hi", "<image>", "<image> one <image>"]))
        return [part() for _ in range(draw(st.integers(1, 3)))]

    record: dict[str, Any] = {}
    shape = draw(st.sampled_from([*CHATS, "texts", "text"]) | st.sampled_from(MISSPELT))
    if shape == "texts":
        turn = {"user": draw(st.sampled_from(["Hi", "<image>"])), "assistant": "one"}
        if draw(st.integers(0, 3)) == 0:
            turn[draw(st.sampled_from(RECORD_KEYS))] = image()
        record[shape] = [turn]
    elif shape in CHATS or "ess" in shape or "conv" in shape.lower():
        keys = draw(st.sampled_from([CHAT, SHAREGPT]))
        user = {keys[0]: keys[2][0], keys[1]: content()}
        if draw(st.integers(0, 5)) == 0:
            user[draw(st.sampled_from(RECORD_KEYS))] = image()
        record[shape] = [user, {keys[0]: keys[2][1], keys[1]: "one"}]
    else:
        record[shape] = draw(st.sampled_from(["Hi", "<image> Hi", "<image><image>"]))
    if shape in MISSPELT and draw(st.booleans()):
        record["text"] = "Hi"
    any_keys = st.lists(st.sampled_from(RECORD_KEYS), max_size=2, unique=True)
    for key in draw(st.sampled_from([[], ["image"], ["images"]]) | any_keys):
        several = draw(st.integers(0, 2))
        record[key] = image() if several == 0 else [image() for _ in range(several)]
    return record, count


def test_no_record_of_any_shape_gives_a_sample_without_its_images(folder, processor):
    pictures = Pictures(folder)
    seen: dict[int, int] = {}

    @settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
    @given(records(folder))
    def check(made: tuple[dict[str, Any], int]) -> None:
        record, count = copy.deepcopy(made[0]), made[1]
        try:
            row = parse_record(record, pictures)
            check_text(row, processor)
        except UnusableRow:
            return
        assert len(row.images) == count
        seen[count] = seen.get(count, 0) + 1
        is_there = all(
            picture.path is None or os.path.isfile(picture.path) for picture in row.images
        )  # a missing one is named
        if is_there and seen[count] < 20:
            sample = encode_row(row, processor)
            pixels = sample["pixel_values"]
            assert (0 if pixels is None else len(pixels)) == count
            assert (sample["input_ids"] == processor.image_token_id).sum() == count * processor.num_image_tokens

    check()
    assert all(seen.get(count, 0) > 5 for count in (0, 1, 2)), seen


@pytest.mark.parametrize("shape", RECORDS, ids=lambda shape: shape.__name__)
def test_a_key_misspelt_anywhere_never_loses_an_image(folder, shape):
    """Each key of a record with an image, with one letter left out, doubled, or in capitals."""
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "red.png").write_bytes(content_of(folder, "red.png"))
    record = shape(Conversation(("red",), (("Hi", "one"),)), folder)
    text = json.dumps(record)
    assert len(parse_record(json.loads(text), Pictures(folder)).images) == 1
    for key in sorted(keys_of(record)):
        for other in {key[1:], key[:-1], key + key[-1], key.upper(), key.capitalize(), key[:1] + key[2:]} - {key}:
            try:
                row = parse_record(json.loads(text.replace(f'"{key}":', f'"{other}":')), Pictures(folder))
            except UnusableRow:
                continue
            assert len(row.images) == 1, (key, other)


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for held in value.values() for key in keys_of(held)}
    return {key for held in value for key in keys_of(held)} if isinstance(value, list) else set()


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one"}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"text": "A cat.", "file_name": "red.png"}, '"file_name" names media'),
        ({"text": "A cat.", "url": "http://example.org/a.jpg"}, '"url" names media'),
        ({"text": "A cat.", "image": "red.png", "pic": "blue.png"}, '"pic" names media'),
        ({"text": "A cat.", "pic": {"src": ["red.PNG"]}}, '"pic" names media'),
        ({"text": "A cat.", "b64": "/9j/4AAQ"}, '"b64" names media'),
        ({"text": "A cat.", "jpg": b"1"}, '"jpg" is not read'),
        ({"text": "A cat.", "image": "red.png", "mask": [b"1"]}, '"mask" is not read'),
        ({"texts": [{"user": "Hi", "assistant": "one", "image": "red.png"}]}, 'a turn of "texts" has "image"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image": "red.png"}]}, ANSWER]},
            "a ",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "red.png", "path": "blue.png"}]},
                    ANSWER,
                ]
            },
            'an image part has "image" and "path"',
        ),
    ],
)
def test_media_that_would_be_lost_are_named(folder, record, why):
    with pytest.raises(UnusableRow) as error:
        parse_record(record, Pictures(folder))
    assert why in str(error.value)


def test_keys_that_describe_images_are_no_media(folder):
    fine_vision = {
        "images": ["red.png"],
        "texts": [{"user": "Hi", "assistant": "one"}],
        "source": "chartqa.png",
        "image_correspondence_ratings": [5],
        "image_correspondence_min": 5,
        "visual_dependency_ratings": [5],
        "url": "http://example.org/a.jpg",
        "file_name": "a.jpg",
    }
    assert len(parse_record(fine_vision, Pictures(folder)).images) == 1
    for described in ({"id": "coco/0007.jpg"}, {"image_id": "7.jpg"}, {"url": "http://example.org/"}, {"n": 7}):
        assert parse_record({"messages": [USER, ANSWER]} | described, Pictures(folder)).images == ()


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_a_chat_may_be_a_text_of_json(folder, name):
    """As in columns of Parquet whose rows differ in their keys."""
    messages = [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "A cat."}]
    given = {name: json.dumps(messages), "images": ["red.png"]}
    assert parse_record(given, Pictures(folder)) == parse_record(given | {name: messages}, Pictures(folder))


@pytest.mark.parametrize(
    ("text", "why"),
    [("[{", "malformed JSON"), ('[{"role": "user", "role": "user"}]', "twice"), ('"Hi"', "is not a list")],
)
def test_a_chat_as_a_text_that_is_no_chat_is_refused(folder, text, why):
    with pytest.raises(UnusableRow, match=f'"messages".*{why}'):
        parse_record({"messages": text}, Pictures(folder))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_an_image_may_be_bare_base64(folder, kind):
    content = io.BytesIO()
    Image.effect_noise((40, 30), 50).save(content, kind)
    text = base64.b64encode(content.getvalue()).decode()
    row = parse_record({"text": "A cat.", "image": text}, Pictures(folder))
    assert [picture.read() for picture in row.images] == [content.getvalue()]
    row = parse_record({"text": "A cat.", "image": "/9j/red.jpg"}, Pictures(folder))
    assert row.images[0].path == "/9j/red.jpg"
