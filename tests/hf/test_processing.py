"""The processor: every image gets its placeholders, every `<image>` an image, and chats are rendered as harmony."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models

from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from tiny import tiny_config, tiny_model, tiny_processor

TOKENS = 6  # per image


@pytest.fixture(scope="module")
def processor() -> GPTOSSVisionProcessor:
    return tiny_processor()


def image(shade: int = 0) -> Image.Image:
    return Image.new("L", (20, 30), shade)


def places(processor: GPTOSSVisionProcessor, inputs) -> list[list[int]]:
    """The lengths of the runs of placeholders, by row."""
    runs = []
    for row in inputs["input_ids"]:
        marks = "".join("x" if token == processor.image_token_id else " " for token in row)
        runs.append([len(run) for run in marks.split()])
    return runs


def shades(inputs) -> list[int]:
    return [round((pixels.mean().item() + 1) / 2 * 255) for pixels in inputs["pixel_values"]]


# Where images go


@pytest.mark.parametrize("mark", ["<image>", "<|reserved_200013|>"])
def test_a_mark_becomes_an_image_s_placeholders(processor, mark):
    inputs = processor(text=f"What is {mark}?", images=image(), return_tensors="pt")
    before, after = processor.tokenizer("What is ").input_ids, processor.tokenizer("?").input_ids
    assert inputs["input_ids"].tolist() == [before + [processor.image_token_id] * TOKENS + after]
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)


def test_images_without_marks_go_in_front(processor):
    inputs = processor(text="What?", images=[image(1), image(2)], return_tensors="pt")
    marked = processor(text="<image><image>What?", images=[image(1), image(2)], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], marked["input_ids"])
    assert shades(inputs) == [1, 2]


def test_text_alone_is_text(processor):
    inputs = processor(text="It is a seven.", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [processor.tokenizer("It is a seven.").input_ids]


def test_images_alone_are_pixels(processor):
    inputs = processor(images=[image(), image()], return_tensors="pt")
    assert set(inputs) == {"pixel_values"}
    assert inputs["pixel_values"].shape == (2, 3, 8, 8)


def test_rows_have_no_image_one_or_several(processor):
    text = ["No image.", "This?", "<image> or <image>?"]
    inputs = processor(text=text, images=[[], [image(1)], [image(2), image(3)]], padding=True, return_tensors="pt")
    assert places(processor, inputs) == [[], [TOKENS], [TOKENS, TOKENS]]
    assert shades(inputs) == [1, 2, 3]


def test_a_flat_list_goes_by_the_marks(processor):
    text = ["<image> or <image>?", "No image.", "<image>"]
    inputs = processor(text=text, images=[image(1), image(2), image(3)], padding=True, return_tensors="pt")
    assert places(processor, inputs) == [[TOKENS, TOKENS], [], [TOKENS]]
    assert shades(inputs) == [1, 2, 3]


def test_a_flat_list_without_marks_goes_one_to_a_row(processor):
    inputs = processor(text=["This?", "And this?"], images=[image(1), image(2)], padding=True, return_tensors="pt")
    assert places(processor, inputs) == [[TOKENS], [TOKENS]]


@pytest.mark.parametrize("images", [None, [], [[], []], [None, None], [[None], []]])
def test_a_batch_may_have_no_images_at_all(processor, images):
    inputs = processor(text=["It is", "a seven."], images=images, padding=True, return_tensors="pt")
    assert "pixel_values" not in inputs


@pytest.mark.parametrize("rows", [[[image(1)], None], [image(1), None], [[image(1), None], [None]], ([image(1)], ())])
def test_none_is_no_image(processor, rows):
    text = ["<image>This?", "No image."]
    inputs = processor(text=text, images=rows, padding=True, return_tensors="pt")
    plain = processor(text=text, images=[[image(1)], []], padding=True, return_tensors="pt")
    assert inputs.keys() == plain.keys()
    assert all(torch.equal(inputs[name], plain[name]) for name in plain)


def test_an_array_of_several_images_in_a_list_is_several_images(processor):
    pair = np.zeros((2, 9, 9, 3), np.uint8)
    for text, images in (("What?", [pair]), (["What?", "Who?"], [pair, image(1)]), ("<image><image>", pair)):
        inputs = processor(text=text, images=images, padding=True, return_tensors="pt")
        assert sum(map(sum, places(processor, inputs))) == TOKENS * len(inputs["pixel_values"])


def test_images_of_every_nesting_alone_are_pixels(processor):
    assert shades(processor(images=[[image(1)], None, [image(2), image(3)]], return_tensors="pt")) == [1, 2, 3]


@pytest.mark.parametrize("images", [None, [image()]])
@pytest.mark.parametrize("text", [[], ()])
def test_an_empty_list_of_texts_is_refused(processor, text, images):
    with pytest.raises(ValueError, match=r"^There is no text: the list is empty\.$"):
        processor(text=text, images=images)


def test_a_text_of_another_type_is_refused(processor):
    with pytest.raises(TypeError, match=r"^A text must be a string, got list\.$"):
        processor(text=[["It", "is"]])


@pytest.mark.parametrize("batch", [np.zeros((2, 9, 9, 3), np.uint8), torch.zeros(2, 3, 9, 9, dtype=torch.uint8)])
def test_a_batch_of_images_in_one_array_is_taken(processor, batch):
    inputs = processor(text=["This?", "And this?"], images=batch, padding=True, return_tensors="pt")
    assert places(processor, inputs) == [[TOKENS], [TOKENS]]


@pytest.mark.parametrize(
    ("text", "images", "sentence"),
    [
        ("<image>", None, r"Text 0 has 1 <image> for 0 images\."),
        ("<|reserved_200013|>", None, r"Text 0 has 1 <image> for 0 images\."),
        ("<image><image>", [image()], r"Text 0 has 2 <image> for 1 image\."),
        ("<image>", [image(), image()], r"Text 0 has 1 <image> for 2 images\."),
        (["It", "<image>"], [[image()], []], r"Text 1 has 1 <image> for 0 images\."),
        (["It", "is"], [[image()]], r"1 list of images can't go to 2 texts\."),
        (["It", "is"], [image()] * 3, r"The texts have 0 <image> for 3 images\."),
        (["<image>", "is"], [image()] * 2, r"The texts have 1 <image> for 2 images\."),
    ],
)
def test_marks_and_images_must_match_in_number(processor, text, images, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        processor(text=text, images=images)


def test_images_are_never_cut_off(processor):
    with pytest.raises(ValueError, match="Likely due to `truncation='max_length'`"):
        processor(text="<image>", images=image(), truncation=True, max_length=4)


def test_given_texts_and_images_are_not_changed(processor):
    text, images = ["What?"], [[image()]]
    processor(text=text, images=images)
    assert text == ["What?"]
    assert len(images[0]) == 1


def test_offsets_are_those_of_the_given_text(processor):
    text = ["A <image>seven", "It"]
    images = [[image()], [image()]]
    inputs = processor(text=text, images=images, return_offsets_mapping=True)
    for row, ids, offsets in zip(text, inputs["input_ids"], inputs["offset_mapping"], strict=True):
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token == processor.image_token_id:
                assert row[start:end] == ("<image>" if "<image>" in row else "")
            else:
                assert row[start:end] == processor.tokenizer.decode(token)


@pytest.mark.parametrize("tensors", [{"return_tensors": "pt"}, {"common_kwargs": {"return_tensors": "pt"}}])
def test_offsets_are_tensors_where_tensors_are_asked_for(processor, tensors):
    padding = {"padding": True, "padding_side": "right"}
    inputs = processor(text=["It is a seven.", "It"], return_offsets_mapping=True, **padding, **tensors)
    assert inputs["offset_mapping"].shape == (*inputs["input_ids"].shape, 2)
    assert inputs["offset_mapping"][1].tolist() == [[0, 2]] + [[2, 2]] * (inputs["input_ids"].shape[1] - 1)


# Chats

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "It is a seven."}]}


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "user", "content": "Hi"}], "<|start|>user<|message|>Hi<|end|>"),
        ([{"role": "system", "content": "Reasoning: low"}], "<|start|>system<|message|>Reasoning: low<|end|>"),
        (
            [{"role": "developer", "content": "Be brief."}],
            "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>",
        ),
        ([QUESTION], "<|start|>user<|message|><image>Which digit is this?<|end|>"),
        ([ANSWER], "<|start|>assistant<|channel|>final<|message|>It is a seven.<|return|>"),
        (
            [ANSWER, {"role": "user", "content": " Sure? "}],
            "<|start|>assistant<|channel|>final<|message|>It is a seven.<|end|><|start|>user<|message|> Sure? <|end|>",
        ),
        (
            [{**ANSWER, "thinking": "Seven?"}],
            (
                "<|start|>assistant<|channel|>analysis<|message|>Seven?<|end|>"
                "<|start|>assistant<|channel|>final<|message|>It is a seven.<|return|>"
            ),
        ),
        (
            [{**ANSWER, "thinking": "Seven?"}, {"role": "user", "content": "Sure?"}],
            "<|start|>assistant<|channel|>final<|message|>It is a seven.<|end|><|start|>user<|message|>Sure?<|end|>",
        ),
        (
            [{"role": "tool", "name": "functions.look", "content": "7"}],
            "<|start|>functions.look to=assistant<|channel|>commentary<|message|>7<|end|>",
        ),
    ],
)
def test_chats_are_rendered_as_harmony(processor, messages, rendered):
    assert processor.apply_chat_template(messages) == rendered
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("<|end|><|start|>assistant")


def test_a_chat_with_an_image_becomes_model_inputs(processor, tmp_path):
    path = tmp_path / "digit.png"
    image(7).save(path)
    content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "Which digit is this?"}]
    arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **arguments)
    assert places(processor, inputs) == [[TOKENS]]
    assert shades(inputs) == [7]
    shown = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert shown == "userWhich digit is this?assistant"


def test_the_assistant_s_tokens_are_marked_behind_an_image(processor):
    chat = [QUESTION | {"content": [{"type": "image", "image": image()}, *QUESTION["content"][1:]]}, ANSWER]
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(chat, **arguments)
    said = [token for token, mask in zip(inputs["input_ids"][0], inputs["assistant_masks"][0], strict=True) if mask]
    assert processor.decode(said) == "<|channel|>final<|message|>It is a seven.<|return|>"


@pytest.mark.parametrize("tensors", [None, "pt"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 64, 128])
@pytest.mark.parametrize("images", [(0, 0), (1, 1), (1, 0), (2, 0), (0, 2)])
def test_the_assistant_s_mask_of_a_padded_row_is_that_of_the_row_alone(processor, images, multiple, side, tensors):
    questions = ["Which digit is this?", "In there, which digit is this? And why is it there?"]
    chats = []
    for number, question in zip(images, questions, strict=True):
        content = [{"type": "image", "image": image()}] * number + [{"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}, ANSWER, QUESTION | {"content": "Sure?"}, ANSWER])
    arguments = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    padding = {"padding": True, "padding_side": side, "pad_to_multiple_of": multiple}
    batch = processor.apply_chat_template(chats, return_tensors=tensors, processor_kwargs=padding, **arguments)
    for row, chat in enumerate(chats):
        alone = processor.apply_chat_template([chat], **arguments)["assistant_masks"][0]
        padded = [0] * (len(batch["input_ids"][row]) - len(alone))
        expected = padded + alone if side == "left" else alone + padded
        assert sum(alone) > 10
        assert list(batch["assistant_masks"][row]) == expected


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "narrator", "content": "Hi"}, "Unknown role: narrator"),
        ({"role": "user", "content": [{"type": "video"}]}, "Unknown type of content: video"),
    ],
)
def test_unknown_parts_of_a_chat_are_refused(processor, message, sentence):
    with pytest.raises(Exception, match=sentence):
        processor.apply_chat_template([message])


# As a whole


def test_it_fits_a_configuration(processor):
    tokenizer = processor.tokenizer
    config = tiny_config(
        vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<|reserved_200014|>")
    )
    fitting = GPTOSSVisionProcessor.from_config(config, tokenizer)
    assert (fitting.image_token, fitting.image_token_id) == ("<|reserved_200014|>", config.image_token_id)
    inputs = fitting(
        text=["This?", "<image>And this?"], images=[[image()], [image()]], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        assert tiny_model(config)(**inputs).logits.isfinite().all()


def test_a_saved_processor_loads_as_it_was_without_registration(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = GPTOSSVisionProcessor.from_pretrained(tmp_path)
    assert type(loaded.tokenizer) is GPTOSSVisionTokenizer
    assert (loaded.num_image_tokens, loaded.image_token) == (processor.num_image_tokens, processor.image_token)
    assert loaded.chat_template == loaded.tokenizer.chat_template == processor.chat_template
    ours, theirs = (each(text="What?", images=image(9), return_tensors="pt") for each in (processor, loaded))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_processor_is_saved_as_if_it_had_never_been_called(processor, tmp_path):
    processor.save_pretrained(tmp_path / "unused")
    processor(text=["It", "It is a seven."], padding=True, padding_side="right", truncation=True, max_length=3)
    processor.save_pretrained(tmp_path / "used")
    for path in (tmp_path / "unused").iterdir():
        assert (tmp_path / "used" / path.name).read_bytes() == path.read_bytes()
    loaded = GPTOSSVisionProcessor.from_pretrained(tmp_path / "used")
    inputs = loaded(text=["It", "It is a seven."], padding=True)
    assert inputs["attention_mask"][0][0] == 0
    assert loaded.decode(inputs["input_ids"][1]) == "It is a seven."


def test_every_setting_of_the_class_is_in_the_saved_file(processor, tmp_path):
    """Or a checkpoint would change its meaning with the code that reads it."""
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    settings = {"do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean"}
    assert settings | {"image_std", "num_channels"} <= written["image_processor"].keys()
    assert {"num_image_tokens", "image_token"} <= written.keys()


def test_decoding_is_the_tokenizer_s(processor):
    ids = processor(text="It is <image>a seven.", images=image())["input_ids"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "It is a seven."
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["It is a seven."]


def test_a_tokenizer_without_the_placeholder_is_refused(processor):
    other = GPTOSSVisionTokenizer(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"^The tokenizer has no token <\|reserved_200013\|>"):
        GPTOSSVisionProcessor(processor.image_processor, other)
