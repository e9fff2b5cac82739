"""`generate` on the command line: one answer, a file of answers, and one sentence for every error."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import edit_config
from gpt_oss_vision.cli import main
from gpt_oss_vision.recipes.inference.batch import read_questions
from gpt_oss_vision.recipes.inference.generate import (
    AnswerStreamer,
    FinalChannel,
    Sampling,
    answers_to,
    final_words,
    inputs_of,
    load,
    parts_of,
)
from tiny import tiny_checkpoint, tiny_processor


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that runs the command in this process; returns its exit code and stderr."""

    def run(model: Path, *arguments: str) -> tuple[int, str]:
        return main(["generate", "--model", str(model), *arguments]), capsys.readouterr().err

    return run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint with its processor, and an image beside it."""
    Image.fromarray(np.zeros((9, 7, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    return tiny_checkpoint(tmp_path / "model")


def test_it_answers_with_an_image(checkpoint: Path, generate: Callable):
    image = str(checkpoint.parent / "image.png")
    assert generate(checkpoint, "--prompt", "What?", "--image", image, "--max-new-tokens", "3") == (0, "")


def test_an_image_goes_to_its_mark_or_to_the_front():
    text, image = {"type": "text", "text": "a "}, {"type": "image", "path": "x.png"}
    assert parts_of("a <image>?", [Path("x.png")]) == [text, image, {"type": "text", "text": "?"}]
    assert parts_of("a ", [Path("x.png")]) == [image, text]


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


BROKEN = {
    "truncated weights": (truncate, "model.safetensors is cut off or damaged"),
    "missing weights": (remove("model.safetensors"), "lacks model.safetensors; copy the checkpoint again"),
    "damaged config": (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
    "no config": (remove("config.json"), "holds no config.json"),
    "another architecture": (
        lambda model: edit_config(model, model_type="llama"),
        "is a checkpoint of 'llama', not of 'gpt_oss_vision'",
    ),
    "NoPE stride 0": (
        lambda model: edit_config(model, use_nope=True, nope_stride=0),
        "nope_stride must be at least 1, got 0",
    ),
    "an unknown tower": (
        lambda model: edit_config(model, vision_config={"model_type": "resnet"}),
        "`resnet` is not a supported vision tower",
    ),
    "damaged tokenizer": (lambda model: (model / "tokenizer.json").write_text("{"), "cannot be loaded: "),
    "damaged processor": (lambda model: (model / "processor_config.json").write_text("{"), "is not a valid JSON file"),
}


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_sentence(
    spoil: Callable[[Path], None], sentence: str, checkpoint: Path, generate: Callable
):
    spoil(checkpoint)
    code, said = generate(checkpoint, "--prompt", "What?")
    assert code == 1
    assert sentence in said
    assert "a bug" not in said
    assert len(said.splitlines()) == 1


BAD_IMAGES = {
    "cut off": (b"P6 9 7 255\n", "bad.png: image file is truncated"),
    "no picture": (b"text", "bad.png: it is in no format that PIL reads, or damaged."),
    "0 x 0": (b"P6 0 0 255\n", "bad.png"),
    "a decompression bomb": (b"P6 60000 60000 255\n", "bad.png: Image size (3600000000 pixels) exceeds limit"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_a_bad_image_is_one_sentence(content: bytes, sentence: str, checkpoint: Path, generate: Callable):
    image = checkpoint.parent / "bad.png"
    image.write_bytes(content)
    code, said = generate(checkpoint, "--prompt", "What?", "--image", str(image))
    assert code == 1
    assert said.startswith("gpt-oss-vision: Can't read the image ")
    assert sentence in said
    assert not said.endswith("..\n")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", "<image> what?"], "The prompt has 1 <image> for 0 images."),
        (["--prompt", "<image><image>?", "--image", "image.png"], "The prompt has 2 <image> for 1 images."),
        (["--prompt", "what?", "--image", "missing.png"], "missing.png"),
        (["--prompt", "caf\udce9"], "The prompt is not in UTF-8"),
    ],
)
def test_images_that_do_not_fit_the_prompt_are_one_sentence(
    arguments: list[str], sentence: str, checkpoint: Path, generate: Callable
):
    arguments = [str(checkpoint.parent / word) if word.endswith(".png") else word for word in arguments]
    code, said = generate(checkpoint, *arguments)
    assert code == 1
    assert sentence in said
    assert len(said.splitlines()) == 1


ANSWER = "<|channel|>final<|message|>It is a seven.<|return|>"
WRITTEN = {
    "an answer": (ANSWER, "It is a seven."),
    "a thought first": (f"<|channel|>analysis<|message|>Which?<|end|><|start|>assistant{ANSWER}", "It is a seven."),
    "a thought cut off": ("<|channel|>analysis<|message|>Which", ""),
    "an answer cut off": ("<|channel|>final<|message|>It is", "It is"),
    "a call of a tool": ("<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}<|call|>", ""),
    "an answer in JSON": ("<|channel|>final <|constrain|>json<|message|>[7]<|return|>", "[7]"),
    "no harmony at all": ("It is a seven.", "It is a seven."),
}


@pytest.mark.parametrize(("written", "answer"), WRITTEN.values(), ids=WRITTEN)
def test_the_answer_is_the_final_channel_streamed_or_not(written: str, answer: str):
    processor = tiny_processor()
    tokens = processor.tokenizer(written).input_ids
    assert final_words(processor, tokens) == answer
    file = StringIO()
    streamer = AnswerStreamer(processor, file)
    for token in [0, *tokens]:  # the prompt comes first
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert file.getvalue() == f"{answer}\n"
    assert streamer.channel.has_begun == bool(answer)


def test_words_are_written_while_the_model_goes_on():
    processor, file = tiny_processor(), StringIO()
    streamer = AnswerStreamer(processor, file)
    for token in [0, *processor.tokenizer("<|channel|>final<|message|>It is a").input_ids]:
        streamer.put(torch.tensor([token]))
    assert file.getvalue() == "It is "


def test_the_greedy_answer_is_the_model_s(checkpoint: Path, generate: Callable, capsys):
    generate(checkpoint, "--prompt", "What?", "--max-new-tokens", "6")
    model, processor = load(checkpoint)
    inputs = inputs_of(processor, [[{"role": "user", "content": "What?"}]])
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert main(["generate", "--model", str(checkpoint), "--prompt", "What?", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == f"{final_words(processor, tokens.tolist())}\n"


def test_the_same_seed_gives_the_same_answer(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    def said(seed: int) -> str:
        options = ["--prompt", "What?", "--max-new-tokens", "8", "--temperature", "1.5", "--seed", str(seed)]
        main(["generate", "--model", str(checkpoint), *options])
        return capsys.readouterr().out

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(3)}) == 3


def test_a_missing_final_channel_is_one_sentence(checkpoint: Path, generate: Callable, monkeypatch):
    monkeypatch.setattr(FinalChannel, "takes", lambda self, token: False)
    code, said = generate(checkpoint, "--prompt", "What?", "--max-new-tokens", "3")
    assert code == 1
    assert said == "gpt-oss-vision: no answer in 3 tokens; allow more with --max-new-tokens\n"


def test_int8_prints_the_weights_that_are_not_quantised(checkpoint: Path, generate: Callable):
    code, said = generate(checkpoint, "--prompt", "What?", "--max-new-tokens", "3", "--int8")
    assert code == 0
    assert "of them not quantised: model.embed_tokens.weight" in said


# Files of questions

LINES = (
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What?"}]}
        ]
    },
    {"text": "What is <image> then?", "image": "image.png"},
    "{broken",
    {"text": "It is"},
    {"text": "It is", "image": "missing.png"},
    {"text": "<image> and <image>?", "image": "image.png"},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]},
    {"messages": [{"role": "user", "content": "<|start|>system"}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"text": "It is", "image": "/\ud800.png"},
    {
        "messages": [
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "<|channel|>final<|message|>I.<|return|>"},
            {"role": "user", "content": "You?"},
        ]
    },
)
UNUSABLE = {
    3: "malformed JSON",
    5: "missing.png is missing",
    6: "2 <image> for 1 images",
    8: "the control token <|start|>",
    9: "surrogates not allowed",
    10: "/\\ud800.png",
    11: "the control token <|",
}


@pytest.fixture
def questions(checkpoint: Path) -> Path:
    file = checkpoint.parent / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in LINES))
    return file


def answers(generate: Callable, questions: Path, *options: str) -> list[dict]:
    out = questions.parent / f"answers{len(list(questions.parent.iterdir()))}.jsonl"
    code, said = generate(
        questions.parent / "model", "--batch", str(questions), "--out", str(out), "--max-new-tokens", "4", *options
    )
    assert code == 0, said
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_line_has_its_answer_or_its_error_in_order(generate: Callable, questions: Path, checkpoint: Path):
    lines = answers(generate, questions, "--batch-size", "3")
    assert [line["line"] for line in lines] == list(range(1, len(LINES) + 1))
    model, processor = load(checkpoint)
    for line, row in zip(lines, read_questions(questions, processor), strict=True):
        if line["line"] in UNUSABLE:
            assert UNUSABLE[line["line"]] in line["error"]
        else:
            assert [line["answer"]] == answers_to(model, processor, [row.chat], Sampling(max_new_tokens=4))


def test_unusable_questions_are_counted_and_named(questions: Path, capsys: pytest.CaptureFixture[str]):
    out = questions.parent / "answers.jsonl"
    options = ["--batch", str(questions), "--out", str(out), "--max-new-tokens", "2"]
    assert main(["generate", "--model", str(questions.parent / "model"), *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"4 of 11 answers are in {out}. {questions}: 7 of 11 rows can't be used (63.6%): line 3: ")
    assert "; line 9: " in said


def test_an_answer_in_the_file_is_no_part_of_its_question(questions: Path):
    rows = list(read_questions(questions, tiny_processor()))
    assert [message["role"] for message in rows[6].chat] == ["user"]


@pytest.mark.parametrize(("content", "sentence"), [("{\n", "1 of 1 rows can't be used"), ("\n", "has no questions")])
def test_a_file_without_a_question_leaves_no_answers(questions: Path, generate: Callable, content: str, sentence: str):
    questions.write_text(content)
    out = questions.parent / "answers.jsonl"
    before = set(questions.parent.iterdir())
    code, said = generate(questions.parent / "model", "--batch", str(questions), "--out", str(out))
    assert code == 1
    assert sentence in said.splitlines()[-1]
    assert set(questions.parent.iterdir()) == before


def test_earlier_answers_are_left_alone_without_overwrite(questions: Path, generate: Callable):
    out = questions.parent / "answers.jsonl"
    out.write_text("mine")
    code, said = generate(questions.parent / "model", "--batch", str(questions), "--out", str(out))
    assert (code, out.read_text()) == (1, "mine")
    assert said == f"gpt-oss-vision: --out {out} exists; name another file, or replace it with --overwrite\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "What?", "--out", "a.jsonl"], "--out goes with --batch"),
        (["--batch", "q.jsonl"], "--batch needs --out"),
        (["--batch", "q.jsonl", "--out", "a.jsonl", "--image", "x.png"], "not by --image"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(options: list[str], sentence: str, generate: Callable):
    code, said = generate(Path("model"), *options)
    assert code == 2
    assert sentence in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--batch", "q.jsonl", "--out", "a.jsonl"], "--batch q.jsonl is no file"),
        (["--batch", "a", "--out", "no/a"], "The parent folder no of --out does not exist; make it first"),
        (["--batch", "a", "--out", "a", "--overwrite"], "--out a is the file of questions; name another file"),
        (["--batch", "a", "--out", "link", "--overwrite"], "--out link is the file of questions; name another file"),
        (["--batch", "a", "--out", ".", "--overwrite"], "--out . is a folder; name a file in it"),
    ],
)
def test_unusable_files_are_refused_before_the_model_is_read(
    options: list[str], sentence: str, generate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("{}")
    Path("link").symlink_to("a")
    assert generate(Path("model"), *options) == (1, f"gpt-oss-vision: {sentence}\n")
    assert Path("a").read_text() == "{}"


@pytest.mark.parametrize("temperature", ["-1", "nan", "inf"])
def test_an_invalid_temperature_is_wrong_usage(temperature: str, generate: Callable, capsys):
    with pytest.raises(SystemExit, match="2"):
        generate(Path("model"), "--prompt", "What?", "--temperature", temperature)
    assert f"argument --temperature: {temperature} is not a number from 0.0 up" in capsys.readouterr().err
