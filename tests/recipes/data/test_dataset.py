"""Chat data: tokens that are learned, rows that are refused, and the same samples on every rank and in every run."""

import copy
import json
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.dataset import ChatDataset, ShuffledEpochs
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.findings import KINDS, Findings, examine
from gpt_oss_vision.recipes.data.formats import parse_record
from gpt_oss_vision.recipes.data.order import Order
from gpt_oss_vision.recipes.data.pictures import Picture, Pictures, UnusableRow, resolve_image
from gpt_oss_vision.recipes.data.rows import Row, Skipped, render
from gpt_oss_vision.recipes.data.samples import IGNORE_INDEX, collate, encode_row
from gpt_oss_vision.recipes.data.sources.opening import open_source
from gpt_oss_vision.recipes.data.tokens import Channels, Learned, count_tokens, loss_mask_of, short_ids
from records import write_lines

SEQ_LENGTH = 64


def picture(path: str) -> dict[str, str]:
    return {"type": "image", "path": path}


def chat(*turns: Any, **more: Any) -> dict[str, Any]:
    """Turns alternate between user and assistant; `more` are further keys of the last message."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": turn if isinstance(turn, list) else str(turn)}
        for i, turn in enumerate(turns)
    ]
    messages[-1] |= more
    return {"messages": messages}


def write(folder: Path, *rows: Any) -> Path:
    """Write rows: objects as JSON, strings as they are."""
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parse(row: dict[str, Any], folder: Path) -> Row:
    return parse_record(row, Pictures(folder))


def unusable(path: Path, processor: GPTOSSVisionProcessor, seq_length: int, **options: Any) -> list[Skipped]:
    source = open_source(path)
    return examine(source, processor, **options).limited_to(seq_length, source).skipped


def encode(row: dict[str, Any], folder: Path, processor: GPTOSSVisionProcessor) -> Any:
    return encode_row(parse(row, folder), processor)


def learned_text(sample: Any, processor: GPTOSSVisionProcessor) -> str:
    return processor.tokenizer.decode(sample["labels"][sample["loss_mask"].bool()])


def answers(dataset: ChatDataset) -> list[str]:
    texts = [learned_text(dataset[i], dataset.processor) for i in range(len(dataset))]
    return [text.removeprefix("<|channel|>final<|message|>").removesuffix("<|return|>") for text in texts]


def reason(row: Any, folder: Path, processor: GPTOSSVisionProcessor, seq_length: int = SEQ_LENGTH) -> str:
    """The reason for which the check refuses one row."""
    [skipped] = unusable(write(folder, row), processor, seq_length)
    return skipped.reason


# --- what is learned


def test_the_answer_with_its_header_and_its_end_is_learned_and_nothing_else(folder, processor):
    sample = encode(chat([picture("red.png"), {"type": "text", "text": "What is it?"}], "a cat"), folder, processor)
    assert learned_text(sample, processor) == "<|channel|>final<|message|>a cat<|return|>"


def test_every_assistant_turn_is_learned(folder, processor):
    sample = encode(chat("one?", "two", "three?", "four"), folder, processor)
    assert learned_text(sample, processor) == (
        "<|channel|>final<|message|>two<|return|><|channel|>final<|message|>four<|return|>"
    )


def test_an_answer_of_an_earlier_turn_is_learned_to_stop(folder, processor):
    """Its input has the chat format's `<|end|>`, at which generation does not stop."""
    sample = encode(chat("one?", "two", "three?", "four", thinking="one"), folder, processor)
    end, stop = processor.tokenizer.convert_tokens_to_ids(["<|end|>", "<|return|>"])
    ends = (sample["input_ids"] == end).nonzero()[:, 0].tolist()
    labels = [int(sample["labels"][place - 1]) for place in ends]
    assert [label for label in labels if label != IGNORE_INDEX] == [stop, end]  # the answer, and the thought


def test_the_start_of_a_message_is_learned_where_generation_goes_on(folder, processor):
    row = chat("one?", "two", "three?", "", "four", "", "five")
    row["messages"][3] |= {"content": "a cat", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row["messages"][4] = {"role": "assistant", "content": "four"}
    row["messages"][5] = {"role": "assistant", "content": "cat"}
    del row["messages"][6:]
    assert learned_text(encode(row, folder, processor), processor) == (
        "<|channel|>final<|message|>two<|return|>"
        "<|channel|>commentary<|message|>a cat<|end|><|start|>assistant"
        " to=functions.look<|channel|>commentary json<|message|>{}<|call|>"
        "<|channel|>final<|message|>four<|return|><|channel|>final<|message|>cat<|return|>"
    )


def test_the_turn_between_a_thought_and_its_answer_is_learned(folder, processor):
    sample = encode(chat("two?", "four", thinking="one"), folder, processor)
    assert learned_text(sample, processor) == (
        "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>final<|message|>four<|return|>"
    )


THOUGHT = "<|channel|>analysis<|message|>one<|end|>"
CALL = ' to=functions.look<|channel|>commentary json<|message|>{"at": "cat"}<|call|>'
ANSWERS = "<|channel|>final<|message|>two<|return|>", "<|channel|>final<|message|>four<|return|>"


@pytest.mark.parametrize(
    ("turns", "channels", "expected"),
    [
        ("all", "all", ANSWERS[0] + CALL + THOUGHT + "<|start|>assistant" + ANSWERS[1]),
        ("last", "all", THOUGHT + "<|start|>assistant" + ANSWERS[1]),
        ("all", "final", "".join(ANSWERS)),
        ("last", "final", ANSWERS[1]),
        ("all", "final_and_thinking", ANSWERS[0] + THOUGHT + "<|start|>assistant" + ANSWERS[1]),
        ("last", "final_and_thinking", THOUGHT + "<|start|>assistant" + ANSWERS[1]),
    ],
)
def test_the_parts_that_are_learned_are_chosen(folder, processor, turns, channels, expected):
    row = chat("one?", "two", "three?", "", "", "four", thinking="one")
    row["messages"][3] |= {"tool_calls": [{"function": {"name": "look", "arguments": {"at": "cat"}}}]}
    row["messages"][4] = {"role": "tool", "content": "a cat"}
    parts = Learned(turns, channels)
    sample = encode_row(parse(row, folder), processor, parts)
    assert learned_text(sample, processor) == expected
    (folder / "tools.jsonl").write_text(json.dumps(row))
    found = examine(open_source(folder / "tools.jsonl"), processor, learned_parts=parts)
    assert found.learned.tolist() == [int(sample["loss_mask"].sum())]


def test_a_chat_that_ends_with_the_user_has_a_last_turn(folder, processor):
    row = chat("one?", "two", "three?")
    sample = encode_row(parse(row, folder), processor, Learned("last", "all"))
    assert learned_text(sample, processor) == ANSWERS[0]


@pytest.mark.parametrize("more", [{}, {"thinking": "a picture"}])
def test_the_mask_is_that_of_the_chat_templates_generation_blocks(folder, processor, more):
    row = chat([{"type": "text", "text": "Hi"}, picture("red.png")], "one", [picture("blue.png")], "two", **more)
    messages = parse(row, folder).chat()
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    expected = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert loss_mask_of(inputs["input_ids"][0].numpy(), processor).tolist() == expected.tolist()


words = st.sampled_from(
    ["<|start|>", "<|channel|>", "<|end|>", "assistant", "assist", "final", "analysis", "user", " a", "<image>"]
)


@given(st.lists(st.lists(words, min_size=1, max_size=8).map("".join), min_size=1, max_size=5))
@pytest.mark.parametrize(
    "parts", [Learned(turns, channels) for turns in ("all", "last") for channels in get_args(Channels)]
)
def test_tokens_of_rows_together_are_those_of_each_alone(processor, parts, texts):
    images = [(Picture("one.png"),) * text.count("<image>") for text in texts]
    rows = [Row(text=text, images=held) for text, held in zip(texts, images, strict=True)]
    alone = [count_tokens([row], [row.text], processor, parts)[0] for row in rows]
    assert count_tokens(rows, texts, processor, parts) == alone
    ids, lengths = short_ids(texts, rows, processor)
    masks = [loss_mask_of(each, processor, parts) for each in np.split(ids, np.cumsum(lengths)[:-1])]
    assert loss_mask_of(ids, processor, parts, lengths).tolist() == np.concatenate(masks).tolist()


texts = st.lists(
    st.one_of(st.just({"type": "image"}), st.builds(lambda text: {"type": "text", "text": text}, st.text("ab <\n")))
)
roles = st.sampled_from(["system", "developer", "user", "assistant"])


@given(st.lists(st.builds(lambda role, content: {"role": role, "content": content}, roles, texts), min_size=1))
def test_a_chat_is_rendered_as_by_the_chat_template(processor, messages):
    by_template = processor.apply_chat_template(messages, tokenize=False)
    assert render(Row(messages=messages), processor) == by_template


def test_a_row_becomes_the_processor_s_output_for_its_messages(folder, processor):
    row = chat([picture("red.png"), {"type": "text", "text": "What is it?"}], "a cat")
    inputs = processor.apply_chat_template(
        parse(row, folder).chat(), tokenize=True, return_dict=True, return_tensors="pt"
    )
    sample = encode(row, folder, processor)
    assert torch.equal(sample["input_ids"], inputs["input_ids"][0])
    assert torch.equal(sample["pixel_values"], inputs["pixel_values"])


def test_labels_are_the_tokens_one_to_the_right(folder, processor):
    sample = encode(chat([picture("red.png")], "a cat"), folder, processor)
    places = sample["loss_mask"].nonzero()[:, 0]
    assert len(places) > 3
    assert torch.equal(sample["labels"][places], sample["input_ids"][places + 1])
    assert (sample["labels"][sample["loss_mask"] == 0] == IGNORE_INDEX).all()


def test_a_plain_text_is_learned_from_its_second_token_to_its_last(folder, processor):
    sample = encode({"text": "It is a cat. It is a dog."}, folder, processor)
    assert torch.equal(sample["labels"][:-1], sample["input_ids"][1:])
    assert sample["loss_mask"].tolist() == [1.0] * (len(sample["input_ids"]) - 1) + [0.0]


def test_a_plain_text_with_an_image_is_learned_whole_and_the_image_is_not(folder, processor):
    sample = encode({"text": "It is a cat.", "image": "red.png"}, folder, processor)
    assert learned_text(sample, processor) == "It is a cat."
    assert (sample["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens


def test_a_plain_text_that_is_a_chat_in_harmony_is_learned_as_one(folder, processor):
    text = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>one<|return|>"
    sample = encode({"text": text}, folder, processor)
    assert learned_text(sample, processor) == "<|channel|>final<|message|>one<|return|>"


def test_an_image_in_an_answer_is_not_learned_and_the_words_around_it_are(folder, processor):
    answer = [{"type": "text", "text": "a cat"}, picture("red.png"), {"type": "text", "text": "a dog"}]
    sample = encode(chat("Hi", answer), folder, processor)
    assert learned_text(sample, processor) == "<|channel|>final<|message|>a cata dog<|return|>"


def test_images_come_in_the_order_of_their_tokens(folder, processor):
    sample = encode(chat([picture("blue.png"), picture("red.png")], "two"), folder, processor)
    red, blue = sample["pixel_values"][:, 0].mean((1, 2)), sample["pixel_values"][:, 2].mean((1, 2))
    assert red[0] < blue[0]
    assert red[1] > blue[1]


# --- batches


def test_a_mixed_batch_keeps_every_image_in_row_order(folder, processor):
    rows = [
        chat([picture("red.png")], "one"),
        chat("no image?", "one"),
        chat([picture("blue.png"), picture("red.png")], "two"),
    ]
    samples = [encode(row, folder, processor) for row in rows]
    batch = collate(samples, SEQ_LENGTH, processor.tokenizer.pad_token_id)
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))
    placeholders = (batch["tokens"] == processor.image_token_id).sum(1) // processor.num_image_tokens
    assert placeholders.tolist() == [1, 0, 2]


def test_a_batch_without_images_has_no_pixels(folder, processor):
    batch = collate([encode(chat("Hi", "one"), folder, processor)], SEQ_LENGTH, 0)
    assert batch["pixel_values"] is None


def test_padding_stands_last_and_is_not_learned(folder, processor):
    sample = encode(chat("Hi", "one"), folder, processor)
    length, pad = len(sample["input_ids"]), processor.tokenizer.pad_token_id
    batch = collate([sample], SEQ_LENGTH, pad)
    assert torch.equal(batch["tokens"][0, :length], sample["input_ids"])
    assert (batch["tokens"][0, length:] == pad).all()
    assert (batch["labels"][0, length:] == IGNORE_INDEX).all()
    assert batch["loss_mask"][0, length:].sum() == 0
    assert batch["padding_mask"][0].tolist() == [False] * length + [True] * (SEQ_LENGTH - length)
    assert torch.equal(batch["position_ids"][0], torch.arange(SEQ_LENGTH))


def test_pixels_have_the_dtype_asked_for(folder, processor):
    batch = collate([encode(chat([picture("red.png")], "one"), folder, processor)], SEQ_LENGTH, 0, torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16


def test_a_sample_too_long_for_the_batch_is_an_error_and_never_cut(folder, processor):
    sample = encode(chat([picture("red.png")], "one"), folder, processor)
    with pytest.raises(ValueError, match=f"{len(sample['input_ids'])} tokens doesn't fit a batch of 8"):
        collate([sample], 8, 0)


# --- rows that can't be used


def test_a_bad_row_is_skipped_and_named_and_the_others_stay(folder, processor):
    path = write(folder, chat("Hi", "one"), "", chat([picture("gone.png")], "two"), "{not json", chat("Hi", "three"))
    dataset = ChatDataset(path, processor, SEQ_LENGTH, max_skipped=0.5)
    assert [skipped.line for skipped in dataset.skipped] == [3, 4]
    assert "gone.png is missing" in dataset.skipped[0].reason
    assert answers(dataset) == ["one", "three"]


def test_too_many_bad_rows_stop_with_the_first_few_by_line(folder, processor):
    path = write(folder, *[chat("Hi", "one")] * 90, *[chat([picture("gone.png")], "one")] * 10)
    with pytest.raises(
        ValueError, match=r"10 of 100 rows can't be used \(10.0%\): line 91: .*; and 5 more.*At most 1.0%"
    ):
        ChatDataset(path, processor, SEQ_LENGTH)


def test_a_file_without_any_usable_row_is_an_error_whatever_max_skipped_is(folder, processor):
    with pytest.raises(ValueError, match="1 of 1 rows"):
        ChatDataset(write(folder, "{}"), processor, SEQ_LENGTH, max_skipped=1.0)


def test_an_empty_file_is_an_error(folder, processor):
    with pytest.raises(ValueError, match="has no rows"):
        ChatDataset(write(folder, ""), processor, SEQ_LENGTH)


TOOL = {"name": "look", "description": "Look at it.", "parameters": {"type": "object", "properties": {}}}
SYSTEM = {"role": "system", "content": "Be kind."}


def words_of(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def with_tools(tools: Any) -> dict[str, Any]:
    return {"messages": [SYSTEM, *chat("Hi", "one")["messages"]], "tools": tools}


def called(*calls: dict[str, Any]) -> dict[str, Any]:
    return chat("Hi", "", tool_calls=[*calls])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{not json", "malformed JSON"),
        ('{"a":' * 100_000, "malformed JSON"),
        ('{"text": "A cat.", "text": "A dog."}', 'the key "text" is there twice'),
        ('{"messages": [{"role": "user", "role": "user", "content": "Hi"}]}', 'the key "role" is there twice'),
        ("7", "neither an object"),
        ({"prompt": "Hi"}, "neither an object"),
        ({"text": 7}, '"text" is no text'),
        ({"text": "Hi", "image": 7}, "neither a path, an address nor bytes but 7"),
        ({"text": "Hi", "images": [None]}, '"images" holds null'),
        ({"text": "Hi", "image": "red.png", "images": ["blue.png"]}, 'images in "image" and in "images"'),
        ({"text": "A cat.", "image": "red.png", "Images": "blue.png"}, '"Images" is not read'),
        ({"text": "A cat.", "video": "cat.mp4"}, '"video" is not read'),
        ({"text": "A cat.", "audio_path": "cat.wav"}, '"audio_path" is not read'),
        ({"text": "A cat.", "mesages": []}, '"mesages" is not read; is "messages" meant?'),
        (chat("Hi", "one") | {"imges": []}, '"imges" is not read; is "image" meant?'),
        (chat("Hi", "one") | {"conversations": []}, 'several chats, in "messages" and "conversations"'),
        (chat("Hi", "one") | {"system": 7}, '"system" is no text'),
        (chat("Hi", "one") | {"tools": "{"}, '"tools": malformed JSON'),
        (chat("Hi", "one") | {"tools": [{"name": "look"}]}, '"tools" without a system message'),
        ({"texts": [{"user": "Hi"}]}, 'a turn of "texts" without "assistant"'),
        ({"text": "   "}, "an empty text"),
        ({"text": " <image>\n", "image": "red.png"}, "an empty text"),
        ({"text": "\ud800"}, "surrogates"),
        ({"text": "<|start|>user<|message|>Hi<|end|>"}, "no assistant"),
        ({"text": "<|start|>user<|message|>Hi<|end|><|start|>assistant"}, "the last of the assistant has no text"),
        ({"text": "<|start|>assistant<|channel|>final<|message|> <|return|>"}, "the last of the assistant has no text"),
        ({"text": "<image> and <image>", "image": "red.png"}, "2 times <image>, with 1 images"),
        ({"text": "<image>"}, "an empty text"),
        ({"text": "A cat: <image>"}, "1 times <image>, with 0 images"),
        ({"messages": []}, "not a list of objects"),
        ({"messages": ["Hi"]}, "not a list of objects"),
        (chat("Hi"), "no assistant message"),
        (chat("Hi", ""), "assistant message without text"),
        (chat("Hi", " \n"), "assistant message without text"),
        (chat("Hi", [picture("red.png")]), "assistant message without text"),
        (chat("Hi", "one", tool_calls=[{}]), "a call of a tool without a name"),
        (chat("Hi", "one", tool_calls=7), "tool_calls are a list"),
        (chat("Hi", "one", weight=0), "has weight, and only content, name, role"),
        (chat("Hi", "one", thinking=7), "must be texts"),
        (chat("Hi", "one", role="judge"), "unknown role 'judge'"),
        (chat("Hi", "one", role=["user"]), "unknown role ['user']"),
        (chat([{"type": "video", "path": "a.mp4"}], "one"), "neither a text part"),
        (chat([{"type": "image", "file": "red.png"}], "one"), "neither a text part"),
        (chat([{"type": "image"}], "one"), "1 places for images (0 times <image>, 1 parts), and 0 images"),
        (chat("<image> <image>", "one") | {"images": ["red.png"]}, "2 places for images (2 times <image>, 0 parts)"),
        (
            chat([picture("red.png")], "one") | {"images": ["red.png"]},
            '1 images in parts of messages, and 1 in "images"',
        ),
        (chat([{"type": "image", "url": "https://example.org/a.png"}], "one"), "is on a network"),
        (chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}], "one"), "not in base64"),
        (chat([picture("D:\\cats\\a.png")], "one"), "on a drive of Windows"),
        (chat("Hi <|end|>", "one"), "control token <|end|>"),
        (chat([words_of("Hi <|en"), words_of("d|>")], "one"), "control token <|end|>"),
        (with_tools([TOOL | {"description": "a <|end|>"}]), "control token <|end|>"),
        # What would be lost: arguments, definitions, texts, answers.
        (called({"name": "look", "args": {"at": "cat"}}), "a call of a tool has args, and only"),
        (called({"function": {"name": "look", "input": {}, "kind": 7}}), "a call of a tool has kind"),
        (called({"name": "look", "arguments": "{}", "parameters": "{}"}), "has arguments and parameters"),
        (called({"name": "look"}, {"name": "see"}), "a message calls 2 tools"),
        (with_tools([TOOL | {"input_schema": {"type": "object"}}]), "a tool has input_schema, and only"),
        (with_tools([TOOL | {"parameters": {"at": "string"}}]), 'neither "properties" nor "type"'),
        (with_tools([TOOL | {"parameters": {"properties": ["at"]}}]), '"properties" that are no object'),
        (
            with_tools([TOOL | {"parameters": {"properties": {"at": "string"}}}]),
            'the property "at", which is no object',
        ),
        (with_tools([{"description": "a"}]), "a tool without a name"),
        (chat("Hi", "one", role="function_call", tool_calls=[{"name": "look"}]), "a function_call with tool_calls"),
        (chat("Hi", "one", value="two"), "a message has content and value"),
        (chat("Hi", "one", thinking="two", reasoning_content="three"), "a message has thinking and reasoning_content"),
        (chat([picture("red.png") | {"text": "a cat"}], "one"), 'a part of image has "text", which is not read'),
        (chat([{"type": "image", "text": "a cat"}], "one") | {"images": ["red.png"]}, 'a part of image has "text"'),
        (chat([words_of("Hi") | {"content": "two"}], "one"), 'a part of text has "content"'),
        (
            chat([{"type": "image", "index": 1}, {"type": "image", "index": 0}], "one")
            | {"images": ["a.png", "b.png"]},
            "image parts with the indices [1, 0]",
        ),
        (chat("Hi", "one") | {"chosen": "two", "rejected": "three"}, '"chosen", "rejected" is not read: rows of pref'),
        (chat("Hi", "one") | {"kto_tag": False}, '"kto_tag" is not read: rows of preferences'),
        (chat("Hi", "one") | {"label": False}, '"label" is not read: rows of preferences'),
        (
            chat("Hi", "one") | {"system_prompt": "Be kind."},
            '"system_prompt" is not read, and its text is not in the row',
        ),
        (chat("Hi", "one") | {"instruction": "Be kind."}, '"instruction" is not read'),
        ({"text": "Is it red?", "image": "red.png", "label": "yes"}, '"label" is not read, and its text is not'),
        ({"text": "Is it red?", "answers": {"text": ["yes", "no"]}}, '"answers" is not read'),
        ({"texts": [{"user": "Hi", "assistant": "one", "system": "Be kind."}]}, 'a turn of "texts" has "system"'),
        (
            {"messages": [SYSTEM, *chat("Hi", "one")["messages"]], "system": "Be brief."},
            'a system message, and "system"',
        ),
        ({"text": "A cat.", "page": "https://x.org/a.jpg?width=300"}, '"page" names media'),
        ({"text": "A cat.", "file": "cat.JFIF"}, '"file" names media'),
        (chat("Hi <image>", "one"), "control token <image>"),
        (chat("Hi", "one <|reserved_200013|>"), "control token <|reserved_200013|>"),
        (chat("Hi", "one", thinking="<|call|>"), "control token <|call|>"),
    ],
)
def test_what_cannot_be_learned_is_named(folder, processor, row, why):
    assert why in reason(row, folder, processor)


def test_keys_without_a_value_count_as_absent(folder, processor):
    none = dict.fromkeys(("image", "images", "video"))
    described = {"images": [], "source": "web", "image_id": "7", "conversation_id": "c", "num": 3}
    rows = ({"text": "A cat."} | none, chat("Hi", "one") | none, chat("Hi", "one") | described)
    path = write(folder, chat("Hi", "one", thinking=None, tool_calls=None), *rows)
    assert unusable(path, processor, SEQ_LENGTH) == []


@pytest.mark.parametrize(
    "row",
    [
        {"text": "The film is good. good", "label": "good", "answer": ["good", "fine"]},
        chat("Hi", "one") | {"prompt": " Hi", "prompt_id": "7", "response": "one", "label": 3, "instruction": ""},
        chat("Hi", "one") | {"image": "", "images": [], "system": ""},
        chat("Hi", "one") | {"image": [], "system": " "},
        chat([{"type": "image", "index": 0, "text": ""}, words_of("Hi") | {"index": 1}], "one")
        | {"images": ["red.png"]},
        chat([picture("red.png") | {"detail": "high", "id": "a"}], "one", content="one", value="one"),
    ],
)
def test_keys_whose_texts_are_in_the_row_or_empty_are_no_reason(folder, processor, row):
    assert unusable(write(folder, row), processor, SEQ_LENGTH) == []
    assert "<|start|>system" not in processor.tokenizer.decode(encode(row, folder, processor)["input_ids"])


@pytest.mark.parametrize(
    "tool",
    [
        TOOL | {"parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
        TOOL | {"parameters": '{"properties": {"at": {"type": "string"}}}', "strict": True},
        {"type": "function", "function": TOOL | {"parameters": {"properties": {"at": {"type": "string"}}}}},
    ],
)
def test_definitions_of_tools_keep_their_parameters(folder, processor, tool):
    sample = encode(with_tools([tool]), folder, processor)
    expected = "// Look at it.\ntype look = (_: {\nat?: string,\n}) => any;"
    assert expected in processor.tokenizer.decode(sample["input_ids"])


@pytest.mark.parametrize("name", ["arguments", "parameters"])
def test_a_call_keeps_its_arguments_under_either_name(folder, processor, name):
    row = called({"name": "look", name: {"at": "cat"}})
    assert '<|message|>{"at": "cat"}<|call|>' in learned_text(encode(row, folder, processor), processor)


CALLS = [{"id": "1", "function": {"name": "look"}}, {"id": "2", "function": {"name": "hear"}}]


def with_results(*results: dict[str, Any]) -> dict[str, Any]:
    calls = [{"role": "assistant", "tool_calls": [call]} for call in CALLS]
    given = [{"role": "tool", "content": f"result {number}"} | each for number, each in enumerate(results)]
    [user, answer] = chat("Hi", "one")["messages"]
    return {"messages": [user, *calls, *given, answer]}


def test_a_result_is_of_the_call_that_its_id_names(folder, processor):
    sample = encode(with_results({"tool_call_id": "1"}, {"tool_call_id": "2"}), folder, processor)
    text = processor.tokenizer.decode(sample["input_ids"])
    for number, name in enumerate(("look", "hear")):
        assert f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>result {number}<|end|>" in text


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (with_results({}, {}), "a tool message that could be the result of hear or look"),
        (with_results({"tool_call_id": "1", "name": "hear"}), "has the name 'hear', and its call that of \"look\""),
        (
            {"messages": [{"role": "tool", "content": "one"}, *chat("Hi", "one")["messages"]]},
            "without a call before it",
        ),
    ],
)
def test_a_result_of_an_unknown_call_is_refused(folder, processor, row, why):
    assert why in reason(row, folder, processor)


def test_a_token_that_users_added_and_that_controls_nothing_may_be_written(folder, processor):
    processor = copy.deepcopy(processor)
    processor.tokenizer.add_tokens(["<cat>"])
    assert unusable(write(folder, chat("Hi <cat>", "one")), processor, SEQ_LENGTH) == []


def test_a_file_that_is_no_image_is_named(folder, processor):
    (folder / "notes.png").write_text("not a picture")
    assert "notes.png is broken" in reason(chat([picture("notes.png")], "one"), folder, processor)


def test_a_png_cut_off_is_found_without_decoding(folder, processor):
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:-20])
    assert "cut.png is broken" in reason(chat([picture("cut.png")], "one"), folder, processor)


def test_a_jpeg_cut_off_is_found_by_decoding(folder, processor):
    Image.effect_noise((300, 300), 90).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:5000])
    path = write(folder, chat([picture("cut.jpg")], "one"), chat([picture("whole.jpg")], "one"))
    assert unusable(path, processor, SEQ_LENGTH) == []
    [skipped] = unusable(path, processor, SEQ_LENGTH, decode_images=True)
    assert skipped.line == 1
    assert "cut.jpg is broken" in skipped.reason


def test_an_image_that_is_removed_after_the_check_stops_the_run_and_is_named(folder, processor):
    dataset = ChatDataset(write(folder, chat([picture("red.png")], "one")), processor, SEQ_LENGTH)
    (folder / "red.png").unlink()
    with pytest.raises(UserError, match=r"data.jsonl, line 1, .*red.png"):
        dataset[0]


def test_an_image_of_absurd_size_is_refused_by_its_header(folder, processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "decompression bomb" in reason(chat([picture("red.png")], "one"), folder, processor)


@pytest.mark.parametrize(
    "row",
    [
        chat([picture("red.png"), {"type": "text", "text": "What is it?"}, picture("blue.png")], "It is a cat. " * 9),
        {"text": "A dog: <image> It is a dog." + " Dogs." * 12, "image": "red.png"},
        {"text": "It is a cat. " * 9, "image": "red.png"},
        {"text": "It is a cat. " * 9},
    ],
)
def test_a_row_is_used_if_and_only_if_its_tokens_fit(folder, processor, row):
    length = len(encode(row, folder, processor)["input_ids"])
    path = write(folder, row)
    assert unusable(path, processor, length) == []
    [skipped] = unusable(path, processor, length - 1)
    assert f"{length} tokens" in skipped.reason


# --- paths


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png"])
def test_a_path_that_climbs_out_of_the_data_folder_is_refused(tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    with pytest.raises(UnusableRow, match="leaves the data folder"):
        resolve_image(name, tmp_path / "data")


def test_a_link_that_points_out_of_the_data_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path)
    with pytest.raises(UnusableRow, match="leaves the data folder"):
        resolve_image("images/secret.png", tmp_path / "data")


def test_links_and_climbs_that_stay_inside_are_followed(folder):
    (folder / "link.png").symlink_to("red.png")
    assert (
        resolve_image("link.png", folder)
        == resolve_image("deep/../red.png", folder)
        == str(folder.resolve() / "red.png")
    )


def test_an_absolute_path_may_lead_anywhere(folder, processor, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    row = chat([picture(str(folder / "red.png"))], "one")
    assert unusable(write(elsewhere, row), processor, SEQ_LENGTH) == []


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused(folder, processor, name):
    assert "image" in reason(chat([picture(name)], "one"), folder, processor)


def test_images_are_found_from_any_working_directory(folder, processor, monkeypatch):
    monkeypatch.chdir(os.sep)
    assert encode(chat([picture("red.png")], "one"), folder, processor)["pixel_values"].shape[0] == 1


# --- the same samples on every rank and in every run


@pytest.mark.parametrize("shards", [2, 5])
def test_ranks_together_find_what_one_finds_alone(folder, processor, shards):
    path = write(folder, *[chat("Hi", "one"), "{", "", chat([picture("gone.png")], "one")] * 5)
    source = open_source(path)
    alone, merged = examine(source, processor), Findings.of_rows(range(15))
    merged.merge([examine(source, processor, numbers=range(shard, 15, shards)) for shard in range(shards)])
    assert merged.skipped == alone.skipped and len(alone.skipped) == 10
    assert merged.shapes == alone.shapes
    for name in KINDS:
        assert getattr(merged, name).tolist() == getattr(alone, name).tolist()


def test_a_dataset_takes_over_what_the_ranks_have_found(folder, processor):
    path = write(folder, *[chat("Hi", word) for word in ("one", "two", "three")])
    found = [examine(open_source(path), processor, numbers=range(rank, 3, 2)) for rank in range(2)]
    found[1].lengths[0] = 0
    found[1].skipped.append(Skipped(1, str(path), 2, "on a disk that only rank 1 lacks"))
    merged = Findings.of_rows(range(3))
    merged.merge(found)
    dataset = ChatDataset(path, processor, SEQ_LENGTH, findings=[merged], max_skipped=0.5)
    assert answers(dataset) == ["one", "three"]


@pytest.fixture
def words(folder, processor) -> ChatDataset:
    return ChatDataset(write(folder, *[chat("Hi", f"one {i}") for i in range(7)]), processor, SEQ_LENGTH)


def epochs(dataset: ChatDataset, num_samples: int, seed: int) -> ShuffledEpochs:
    return ShuffledEpochs(dataset, Order((len(dataset),), seed=seed), num_samples)


def order(samples: ShuffledEpochs) -> list[str]:
    return [str(samples[i]["input_ids"].tolist()) for i in range(len(samples))]


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(words):
    read = order(epochs(words, 20, seed=1))
    first, second, third = (read[i : i + 7] for i in (0, 7, 14))
    assert sorted(first) == sorted(second) == sorted(third) == sorted(str(s["input_ids"].tolist()) for s in words)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3


def test_the_seed_alone_decides_the_order(words):
    assert order(epochs(words, 14, seed=1)) == order(epochs(words, 14, seed=1))
    assert order(epochs(words, 14, seed=1)) != order(epochs(words, 14, seed=2))


def test_a_sample_does_not_depend_on_earlier_reads(words):
    straight = order(epochs(words, 20, seed=1))
    resumed = epochs(words, 20, seed=1)
    assert [str(resumed[i]["input_ids"].tolist()) for i in (15, 3, 15, 8)] == [straight[i] for i in (15, 3, 15, 8)]


@pytest.mark.parametrize("num_samples", [0, 6, 7, 20])
def test_there_are_always_more_samples_than_a_run_consumes(words, num_samples):
    length = len(epochs(words, num_samples, seed=1))
    assert length > num_samples
    assert length % 7 == 0


def test_a_sample_past_the_end_is_an_index_error(words):
    with pytest.raises(IndexError):
        epochs(words, 6, seed=1)[7]


def test_loader_workers_deliver_what_the_dataset_holds(words):
    loader = torch.utils.data.DataLoader(words, batch_size=None, num_workers=2)
    assert [s["input_ids"].tolist() for s in loader] == [s["input_ids"].tolist() for s in words]


def test_the_digits_are_all_usable(tmp_path, processor):
    split = write_digits(tmp_path / "digits", seed=0)
    dataset = ChatDataset(split.train_path, processor, SEQ_LENGTH, max_skipped=0.0)
    assert len(dataset) == split.train_with_image + split.train_text_only


def test_several_samples_are_those_that_come_one_by_one(folder, processor):
    rows = [{"text": f"A cat {number}.", "images": ["red.png"] * (number % 3)} for number in range(7)]
    rows.append({"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]})
    write_lines(folder / "data.jsonl", rows)
    dataset = ChatDataset(folder / "data.jsonl", processor, seq_length=200)
    order = [7, 3, 3, 0, 5]
    for sample, index in zip(dataset.__getitems__(order), order, strict=True):
        alone = dataset[index]
        assert sample.keys() == alone.keys()
        for name, value in alone.items():
            assert (value is None and sample[name] is None) or torch.equal(sample[name], value), name
    (folder / "red.png").unlink()
    with pytest.raises(UserError, match=r"line 6, had passed the check and can't be used now .*red\.png"):
        dataset.__getitems__([0, 3, 5])
