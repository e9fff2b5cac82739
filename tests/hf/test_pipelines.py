"""Pipelines and Auto classes: strings, chats with images, batches; in fresh processes, also without this package."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import pipeline

from fresh import Finished, run_fresh
from gpt_oss_vision.bridge.hf import register_auto_classes
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from tiny import tiny_checkpoint

GREEDY = {"do_sample": False, "max_new_tokens": 4}
SHADES = (20, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint, `model`, and two images."""
    folder = tmp_path_factory.mktemp("folder")
    tiny_checkpoint(folder / "model")
    for shade in SHADES:
        Image.new("L", (12, 9), shade).save(folder / f"{shade}.png")
    register_auto_classes()
    return folder


def question(image: Path | None, text: str) -> list[dict]:
    parts = [{"type": "image", "path": str(image)}] if image else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def by_hand(folder: Path, chat: list[dict]) -> str:
    """The answer to a chat through processor and model, as pipelines decode it for a tokenizer that can parse it."""
    processor = GPTOSSVisionProcessor.from_pretrained(folder / "model")
    model = GPTOSSVisionForCausalLM.from_pretrained(folder / "model")
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **arguments)
    output = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output)


@pytest.fixture(scope="module")
def image_text(folder):
    return pipeline("image-text-to-text", model=str(folder / "model"))


@pytest.fixture(scope="module")
def text_only(folder):
    return pipeline("text-generation", model=str(folder / "model"))


def test_image_text_to_text_takes_a_chat_with_an_image(image_text, folder):
    chat = question(folder / "20.png", "Which digit?")
    (answered,) = image_text(text=chat, generate_kwargs=GREEDY, return_full_text=False)
    assert answered["generated_text"] == by_hand(folder, chat)


def test_image_text_to_text_takes_chats_in_a_batch(image_text, folder):
    chats = [question(folder / "20.png", "Which digit is this?"), question(folder / "200.png", "Who?")]
    together = image_text(text=chats, generate_kwargs=GREEDY, return_full_text=False, batch_size=2)
    assert [answered[0]["generated_text"] for answered in together] == [by_hand(folder, chat) for chat in chats]


def test_image_text_to_text_takes_chats_with_and_without_images(image_text, folder):
    # One after the other: with a batch_size, transformers' pipelines refuse rows of different kinds, for any model.
    chats = [question(folder / "20.png", "Which digit?"), question(None, "Who?")]
    together = image_text(text=chats, generate_kwargs=GREEDY, return_full_text=False)
    assert [answered[0]["generated_text"] for answered in together] == [by_hand(folder, chat) for chat in chats]


def test_image_text_to_text_takes_strings_and_images(image_text, folder):
    images = [Image.open(folder / f"{shade}.png") for shade in SHADES]
    text = ["What is <image>?", "<image> What is it?"]
    answered = image_text(images=images, text=text, generate_kwargs=GREEDY, return_full_text=False)
    processor = GPTOSSVisionProcessor.from_pretrained(folder / "model")
    for row, image, said in zip(text, images, answered, strict=True):
        inputs = processor(text=row, images=image, return_tensors="pt")
        output = image_text.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        assert said["generated_text"] == processor.decode(output)


def test_any_to_any_takes_a_chat_with_an_image(folder):
    chat = question(folder / "20.png", "Which digit?")
    ask = pipeline("any-to-any", model=str(folder / "model"))
    (answered,) = ask(text=chat, generate_kwargs=GREEDY, return_full_text=False)
    assert answered["generated_text"] == by_hand(folder, chat)


def test_text_generation_takes_strings_and_batches(text_only):
    alone = [text_only(text, **GREEDY)[0]["generated_text"] for text in ("It is", "Which digit is this?")]
    assert alone[0].startswith("It is")
    together = text_only(["It is", "Which digit is this?"], batch_size=2, **GREEDY)
    assert [answered[0]["generated_text"] for answered in together] == alone


def test_text_generation_takes_a_chat(text_only, folder):
    chat = [{"role": "user", "content": "Who?"}]
    (answered,) = text_only(chat, **GREEDY)
    assert answered["generated_text"][:-1] == chat
    assert answered["generated_text"][-1] == text_only.tokenizer.parse_response(by_hand(folder, chat))


def test_a_chat_is_continued_by_the_parsed_message(image_text, folder):
    written = "<|channel|>analysis<|message|>A curl.<|end|><|start|>assistant<|channel|>final<|message|>three<|return|>"
    ids, lengths = image_text.tokenizer(written).input_ids, []

    def only_written(_, input_ids):
        lengths.append(len(input_ids))
        return [ids[lengths[-1] - lengths[0]]]

    arguments = GREEDY | {"max_new_tokens": len(ids), "prefix_allowed_tokens_fn": only_written}
    (answered,) = image_text(text=question(folder / "20.png", "Which digit?"), generate_kwargs=arguments)
    assert answered["generated_text"][-1] == {"role": "assistant", "thinking": "A curl.", "content": "three"}


FRESH = """
import json, sys, warnings
warnings.simplefilter("ignore")
folder, is_ours = sys.argv[1], sys.argv[2] == "ours"
if is_ours:
    from gpt_oss_vision.bridge.hf import register_auto_classes
    register_auto_classes()
else:
    sys.modules["gpt_oss_vision"] = None  # importing it fails
import transformers
from transformers import pipeline
trust = {} if is_ours else {"trust_remote_code": True}
names = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "Processor", "ImageProcessor", "Tokenizer")
found = {name: getattr(transformers, "Auto" + name).from_pretrained(folder, **trust) for name in names}
chat = json.loads(sys.argv[3])
greedy = {"do_sample": False, "max_new_tokens": 4}
image_text = pipeline("image-text-to-text", model=folder, **trust)
seen = image_text(text=chat, generate_kwargs=greedy, return_full_text=False)[0]["generated_text"]
written = pipeline("text-generation", model=folder, **trust)("It is", **greedy)[0]["generated_text"]
classes = {name: type(value).__name__ for name, value in found.items()}
print(json.dumps({"classes": classes, "seen": seen, "written": written}))
"""
CLASSES = {
    "Config": "GPTOSSVisionConfig",
    "Model": "GPTOSSVisionModel",
    "ModelForCausalLM": "GPTOSSVisionForCausalLM",
    "ModelForImageTextToText": "GPTOSSVisionForCausalLM",
    "Processor": "GPTOSSVisionProcessor",
    "ImageProcessor": "GPTOSSVisionImageProcessor",
    "Tokenizer": "GPTOSSVisionTokenizer",
}


WHOSE = ("ours", "the checkpoint's")


@pytest.fixture(scope="module")
def fresh(folder) -> dict[str, Finished]:
    """The results of the script above in two fresh processes: with our classes, and with the checkpoint's."""
    chat = json.dumps(question(folder / "20.png", "Which digit?"))
    return run_fresh(folder, {whose: [FRESH, str(folder / "model"), whose, chat] for whose in WHOSE})


@pytest.mark.slow
@pytest.mark.parametrize("whose", WHOSE)
def test_in_a_fresh_process_everything_is_found(whose, folder, text_only, fresh):
    assert fresh[whose].returncode == 0, fresh[whose].stderr
    answer = by_hand(folder, question(folder / "20.png", "Which digit?"))
    expected = {"seen": answer, "written": text_only("It is", **GREEDY)[0]["generated_text"]}
    assert json.loads(fresh[whose].stdout) == {"classes": CLASSES} | expected
