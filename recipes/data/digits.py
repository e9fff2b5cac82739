"""1,797 handwritten digits as a chat dataset, and the questions of its evaluation: quickstart and tiny recipes.

The scans ship inside scikit-learn, so nothing is downloaded. They are 8x8 pixels in 17 shades, from the UCI collection
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0).
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...atomic import atomic_folder

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NO_IMAGE = "no image"
QUESTIONS = (
    "Which digit is this?",
    "What number do you see?",
    "What digit is written here?",
    "Read the handwritten digit.",
    "Name the digit in the picture.",
    "Which number does the image show?",
    "Can you read this number?",
    "Tell me the digit.",
)
HARMONY_WORDS = ("system", "developer", "user", "assistant", "tool", "analysis", "commentary", "final")

HELD_OUT = 297
TEXT_ONLY_SHARE = 0.08
# Each scanned pixel becomes a block of so many, so that the files can be viewed without zooming.
PIXELS_PER_PIXEL = 8

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DigitsSplit:
    """The folder of the dataset and its numbers of rows. `train_path` and `test_path` are JSONL files in `folder`."""

    folder: Path
    seed: int
    train_with_image: int
    train_text_only: int
    test_with_image: int

    @property
    def train_path(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def test_path(self) -> Path:
        return self.folder / "test.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One held-out question in three versions: with the right image, a wrong one, and none.

    `truth` is the word for the scan in `image_path`, and what all three answers are compared with; a model that uses
    the image gives it for `right_image` only. `shown` is the word for the scan in `wrong_image_path`, never `truth`;
    `NO_IMAGE` is the right answer to `no_image`. The message lists are arguments of a processor's chat template.
    """

    question: str
    truth: str
    shown: str
    image_path: Path
    wrong_image_path: Path
    right_image: list[Message]
    wrong_image: list[Message]
    no_image: list[Message]


def all_texts() -> list[str]:
    """The texts that a tokenizer for the dataset is trained on: questions, answers, and words of harmony headers."""
    return [*QUESTIONS, *WORDS, NO_IMAGE, *HARMONY_WORDS]


def write_digits(folder: str | Path, seed: int = 0) -> DigitsSplit:
    """Write `images/*.png`, `train.jsonl` and `test.jsonl` under `folder`.

    297 scans are held out, stratified by digit; the other 1,500 are shuffled among text-only rows, 8 % of all, which
    have the same questions and the answer "no image", so that a model learns not to guess. The same seed writes the
    same bytes. A folder that already holds this dataset is left as it is; one with another seed is replaced.

    Raises:
        FileExistsError: `folder` holds something that this function did not write.
    """
    folder = Path(folder).absolute()
    scans, digits = _load_scans()
    train, test = _rows(digits, seed)
    split = DigitsSplit(
        folder=folder,
        seed=seed,
        train_with_image=len(digits) - HELD_OUT,
        train_text_only=len(train) - (len(digits) - HELD_OUT),
        test_with_image=HELD_OUT,
    )
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "digits.json").is_file():
            raise FileExistsError(f"{folder} holds other files; name an empty or a new folder for the digits")
        if _holds(folder, scans=len(scans), train=train, test=test):
            return split
    with atomic_folder(folder, overwrite=True) as partial:
        _write(partial, split, scans, train, test)
    return split


def evaluation_rows(split: DigitsSplit) -> Iterator[EvaluationRow]:
    """The held-out questions, in the file's order, each with its right image, another digit's image, and none.

    The wrong image is another held-out scan, chosen by the split's seed.
    """
    rows = [json.loads(line) for line in split.test_path.read_text().splitlines()]
    paths = [split.folder / _image_path(row) for row in rows]
    truths = [row["messages"][1]["content"][0]["text"] for row in rows]
    rng = random.Random(split.seed)
    for row, path, truth in zip(rows, paths, truths, strict=True):
        wrong = rng.choice([i for i, other in enumerate(truths) if other != truth])
        content = row["messages"][0]["content"]
        yield EvaluationRow(
            question=next(part["text"] for part in content if part["type"] == "text"),
            truth=truth,
            shown=truths[wrong],
            image_path=path,
            wrong_image_path=paths[wrong],
            right_image=_with_image(content, path),
            wrong_image=_with_image(content, paths[wrong]),
            no_image=_with_image(content, None),
        )


def _load_scans() -> tuple[Any, list[int]]:
    # Imported here: scikit-learn takes a second, which `all_texts` does not need.
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, [int(digit) for digit in data.target]


def _rows(digits: list[int], seed: int) -> tuple[list[Message], list[Message]]:
    """The training and the held-out rows. `digits[i]` is what scan i shows."""
    from sklearn.model_selection import train_test_split

    train_scans, test_scans = train_test_split(
        range(len(digits)), test_size=HELD_OUT, stratify=digits, random_state=seed
    )
    rng = random.Random(seed)
    train = [_row(rng, WORDS[digits[i]], i) for i in train_scans]
    text_only = round(len(train) * TEXT_ONLY_SHARE / (1 - TEXT_ONLY_SHARE))
    train += [_row(rng, NO_IMAGE, None) for _ in range(text_only)]
    rng.shuffle(train)
    return train, [_row(rng, WORDS[digits[i]], i) for i in test_scans]


def _row(rng: random.Random, answer: str, scan: int | None) -> Message:
    content: list[Message] = [{"type": "text", "text": rng.choice(QUESTIONS)}]
    if scan is not None:
        # Before or after the words at random, so that the position of the image tokens says nothing.
        content.insert(rng.randrange(2), {"type": "image", "path": f"images/{scan:04d}.png"})
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def _image_path(row: Message) -> str:
    return next(part["path"] for part in row["messages"][0]["content"] if part["type"] == "image")


def _with_image(content: list[Message], path: Path | None) -> list[Message]:
    parts = [{"type": "image", "path": str(path)} if part["type"] == "image" else dict(part) for part in content]
    if path is None:
        parts = [part for part in parts if part["type"] != "image"]
    return [{"role": "user", "content": parts}]


def _jsonl(rows: list[Message]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _holds(folder: Path, *, scans: int, train: list[Message], test: list[Message]) -> bool:
    """Whether `folder` is complete and holds these rows."""
    files = {folder / "train.jsonl": _jsonl(train), folder / "test.jsonl": _jsonl(test)}
    texts_match = all(path.is_file() and path.read_text() == text for path, text in files.items())
    return texts_match and all((folder / f"images/{i:04d}.png").is_file() for i in range(scans))


def _write(folder: Path, split: DigitsSplit, scans: Any, train: list[Message], test: list[Message]) -> None:
    (folder / "images").mkdir()
    for i, scan in enumerate(scans):
        # 0 is paper and 16 is ink; the file shows dark ink on white paper.
        grey = np.rint(255 - scan * (255 / 16)).astype(np.uint8)
        blocks = grey.repeat(PIXELS_PER_PIXEL, axis=0).repeat(PIXELS_PER_PIXEL, axis=1)
        Image.fromarray(blocks).save(folder / f"images/{i:04d}.png")
    (folder / "train.jsonl").write_text(_jsonl(train))
    (folder / "test.jsonl").write_text(_jsonl(test))
    about = {name: value for name, value in asdict(split).items() if name != "folder"}
    about["source"] = "UCI Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0"
    (folder / "digits.json").write_text(json.dumps(about, indent=2) + "\n")
