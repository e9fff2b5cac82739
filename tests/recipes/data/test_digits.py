"""The digits dataset: same bytes for a seed, a stratified test set, and questions with a right, wrong or no image."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import IMAGE_TOKEN
from gpt_oss_vision.recipes.data.digits import (
    NO_IMAGE,
    QUESTIONS,
    WORDS,
    DigitsSplit,
    all_texts,
    evaluation_rows,
    write_digits,
)
from gpt_oss_vision.recipes.data.tiny import tiny_config, tiny_processor


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> DigitsSplit:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", seed=3)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(row: dict, kind: str) -> list[dict]:
    return [part for part in row["messages"][0]["content"] if part["type"] == kind]


def answer(row: dict) -> str:
    return row["messages"][1]["content"][0]["text"]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_counts_are_the_files_counts(split):
    train, test = rows_of(split.train_path), rows_of(split.test_path)
    assert len(test) == split.test_with_image == 297
    assert sum(bool(parts(row, "image")) for row in train) == split.train_with_image == 1500
    assert len(train) - 1500 == split.train_text_only
    assert 0.07 < split.train_text_only / len(train) < 0.09


def test_no_scan_is_in_both_files_and_none_is_lost(split):
    train, test = (
        [parts(row, "image")[0]["path"] for row in rows_of(path) if parts(row, "image")]
        for path in (split.train_path, split.test_path)
    )
    assert len({*train, *test}) == len(train) + len(test) == 1797
    assert all((split.folder / path).is_file() for path in train + test)


def test_every_digit_is_held_out_in_its_share(split):
    everything = Counter(WORDS[digit] for digit in load_digits().target)
    held_out = Counter(answer(row) for row in rows_of(split.test_path))
    assert all(abs(held_out[word] - everything[word] * 297 / 1797) <= 1 for word in WORDS)


def test_each_answer_is_the_word_for_the_scan(split):
    data = load_digits()
    for row in rows_of(split.test_path):
        scan = int(Path(parts(row, "image")[0]["path"]).stem)
        assert answer(row) == WORDS[data.target[scan]]


def test_a_row_without_an_image_is_answered_no_image(split):
    answers = {answer(row) for row in rows_of(split.train_path) if not parts(row, "image")}
    assert answers == {NO_IMAGE}


def test_the_image_stands_before_and_after_every_wording(split):
    seen = {
        (parts(row, "text")[0]["text"], row["messages"][0]["content"][0]["type"])
        for row in rows_of(split.train_path)
        if parts(row, "image")
    }
    assert seen == {(question, kind) for question in QUESTIONS for kind in ("image", "text")}


def test_the_files_hold_the_scans_without_loss(split):
    scans = load_digits().images
    for i in (0, 900, 1796):
        pixels = np.asarray(Image.open(split.folder / f"images/{i:04d}.png"))
        assert np.array_equal(np.rint((255.0 - pixels[::8, ::8]) * 16 / 255), scans[i])


def test_the_same_seed_writes_the_same_bytes(split, tmp_path):
    write_digits(tmp_path / "again", seed=3)
    assert tree(tmp_path / "again") == tree(split.folder)


def test_another_seed_holds_out_other_scans(split, tmp_path):
    other = write_digits(tmp_path / "other", seed=4)
    assert rows_of(other.test_path) != rows_of(split.test_path)


def test_a_complete_folder_is_left_alone(tmp_path):
    first = write_digits(tmp_path / "digits", seed=3)
    before = first.train_path.stat().st_mtime_ns, first.train_path.stat().st_ino
    assert write_digits(tmp_path / "digits", seed=3) == first
    assert (first.train_path.stat().st_mtime_ns, first.train_path.stat().st_ino) == before


def test_a_lost_image_is_written_again(tmp_path):
    folder = write_digits(tmp_path / "digits", seed=3).folder
    (folder / "images/0007.png").unlink()
    write_digits(folder, seed=3)
    assert (folder / "images/0007.png").is_file()


def test_another_seed_replaces_the_folder_and_leaves_nothing_beside_it(split, tmp_path):
    write_digits(tmp_path / "digits", seed=4)
    write_digits(tmp_path / "digits", seed=3)
    assert tree(tmp_path / "digits") == tree(split.folder)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds other files"):
        write_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_wrong_image_shows_another_digit_than_the_one_asked_for(split):
    by_path = {path.name: word for path, word in ((row.image_path, row.truth) for row in evaluation_rows(split))}
    for row in evaluation_rows(split):
        assert row.shown == by_path[row.wrong_image_path.name] != row.truth


def test_the_three_ways_of_asking_differ_in_the_image_only(split):
    for row in evaluation_rows(split):
        images = [
            [p["path"] for p in m[0]["content"] if p["type"] == "image"] for m in (row.right_image, row.wrong_image)
        ]
        assert images == [[str(row.image_path)], [str(row.wrong_image_path)]]
        assert row.no_image == [{"role": "user", "content": [{"type": "text", "text": row.question}]}]
        kinds = [[part["type"] for part in m[0]["content"]] for m in (row.right_image, row.wrong_image)]
        assert kinds[0] == kinds[1]


def test_evaluation_is_the_same_every_time(split):
    assert list(evaluation_rows(split)) == list(evaluation_rows(split))


def test_all_texts_covers_the_dataset(split):
    texts = set(all_texts())
    for path in (split.train_path, split.test_path):
        for row in rows_of(path):
            assert {parts(row, "text")[0]["text"], answer(row)} <= texts


def test_the_config_of_the_tiny_model_is_that_of_its_tokenizer():
    config, tokenizer = tiny_config(), tiny_processor().tokenizer
    assert config.vocab_size == len(tokenizer)
    assert config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
