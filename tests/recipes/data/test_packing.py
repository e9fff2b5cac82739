"""Packs hold every sample of an epoch once, within their limits, and follow from the data, the seed and the epoch."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data import packing
from gpt_oss_vision.recipes.data.dataset import ChatDataset
from gpt_oss_vision.recipes.data.order import Order
from gpt_oss_vision.recipes.data.packing import PackedEpochs, PackedOrder, best_fit_decreasing
from gpt_oss_vision.recipes.data.samples import IGNORE_INDEX, collate_pack, weighted

TOKENS_PER_IMAGE = 258


def packed(
    lengths: Any, images: Any, seq_length: int, images_per_pack: int | None = None, seed: int = 0, repeat: int = 1
) -> PackedOrder:
    order = Order((len(lengths),), (repeat * len(lengths),), seed=seed)
    lengths, images = np.array(lengths, dtype=np.int32), np.array(images, dtype=np.int32)
    return PackedOrder(order, lengths, images, seq_length=seq_length, images_per_pack=images_per_pack)


@st.composite
def data(draw: st.DrawFn) -> tuple[list[int], list[int], int, int | None]:
    """Lengths, images, the length of a pack, and its most images."""
    seq_length = draw(st.integers(1, 60))
    rows = draw(st.lists(st.tuples(st.integers(1, seq_length), st.integers(0, 4)), min_size=1, max_size=80))
    lengths, images = (list(column) for column in zip(*rows, strict=True))
    return lengths, images, seq_length, draw(st.none() | st.integers(max(*images, 1, 1), 9))


@given(data(), st.integers(0, 3), st.sampled_from([5, 16, 1000]), st.integers(1, 3))
def test_every_pack_is_within_its_limits_and_every_sample_of_the_epoch_is_in_one(
    data: tuple, epoch: int, window: int, repeat: int
):
    lengths, images, seq_length, images_per_pack = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW", window)
        order = packed(*data, repeat=repeat)
        packs = order.epoch(epoch)
    assert sorted(packs.samples) == sorted(order.order.epoch(epoch))
    assert packs.starts[-1] == len(packs.samples)
    for number in range(len(packs)):
        found = packs[number]
        assert len(found) >= 1
        assert packs.tokens[number] == sum(lengths[sample] for sample in found) <= seq_length
        assert packs.images[number] == sum(images[sample] for sample in found) <= (images_per_pack or 4 * 240)


def best_fit_of_a_textbook(lengths: list[int], images: list[int], seq_length: int, limit: int) -> list[int]:
    rooms: list[list[int]] = []
    found = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        fits = [n for n, (room, free) in enumerate(rooms) if room >= lengths[sample] and free >= images[sample]]
        if not fits:
            rooms.append([seq_length, limit])
        number = min(fits, key=lambda n: rooms[n][0]) if fits else len(rooms) - 1
        rooms[number] = [rooms[number][0] - lengths[sample], rooms[number][1] - images[sample]]
        found[sample] = number
    return found


@given(data())
def test_packs_without_a_limit_on_images_are_those_of_best_fit_decreasing(data: tuple):
    lengths, images, seq_length, _ = data
    found = best_fit_decreasing(np.array(lengths), np.array(images), seq_length, None)
    expected = best_fit_of_a_textbook(lengths, images, seq_length, 10**6)
    # Of packs with equal room, which one takes a sample decides nothing about the rooms that are left.
    assert sorted(np.bincount(found, lengths)) == sorted(np.bincount(expected, lengths))


@given(data())
def test_a_pack_is_opened_only_where_no_other_has_room(data: tuple):
    lengths, images, seq_length, limit = data
    found = best_fit_decreasing(np.array(lengths), np.array(images), seq_length, limit)
    limit = 10**6 if limit is None else limit
    room, free, opened = {}, {}, 0
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        pack, others = found[sample], [n for n in room if room[n] >= lengths[sample] and free[n] >= images[sample]]
        if pack == opened:
            assert not others
            room[pack], free[pack], opened = seq_length, limit, opened + 1
        else:
            assert room[pack] == min(room[n] for n in others)
        room[pack], free[pack] = room[pack] - lengths[sample], free[pack] - images[sample]


def llava_like(rows: int, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-normal lengths of text, with a median of 150 tokens and a long tail, and mostly one image."""
    random = np.random.default_rng(0)
    images = random.choice([0, 1, 2, 3], rows, p=[0.15, 0.75, 0.07, 0.03])
    text = random.lognormal(5.0, 0.9, rows).clip(8, seq_length - 3 * TOKENS_PER_IMAGE)
    return (text + TOKENS_PER_IMAGE * images).astype(np.int32), images.astype(np.int32)


@pytest.mark.parametrize(("seq_length", "images_per_pack"), [(4096, None), (8192, None), (8192, 32)])
def test_packs_of_rows_like_llavas_are_more_than_97_percent_full(seq_length: int, images_per_pack: int | None):
    found = packed(*llava_like(40_000, seq_length), seq_length, images_per_pack).statistics()
    assert found.efficiency > 0.97
    assert found.samples == 40_000


def test_the_packs_of_an_epoch_in_a_sentence():
    found = packed([6, 3, 5, 2, 4], [1, 0, 2, 0, 0], seq_length=10).statistics()
    assert str(found) == "2 an epoch, 2.5 samples each, 100.0% full; 1.5 images each, at most 2"


def test_neighbouring_packs_have_similar_numbers_of_images():
    lengths, images = llava_like(16_000, 8192)
    ordered = packed(lengths, images, 8192).epoch(0).images
    ranks = ordered[: len(ordered) // 8 * 8].reshape(-1, 8)
    shuffled = np.random.default_rng(0).permutation(ordered)[: ranks.size].reshape(-1, 8)
    assert np.ptp(ranks, axis=1).mean() < np.ptp(shuffled, axis=1).mean() / 3
    assert (np.diff(ordered) < 0).any()  # not one ramp through the epoch


def test_epochs_and_seeds_have_other_packs():
    lengths, images = llava_like(2000, 4096)
    order = packed(lengths, images, 4096)
    first = order.epoch(0)
    assert (order.epoch(1).samples != first.samples).any()
    assert (packed(lengths, images, 4096, seed=1).epoch(0).samples != first.samples).any()
    assert (order.epoch(0).samples == first.samples).all()


@given(data(), st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_a_place_has_the_same_pack_whichever_place_was_read_before(data: tuple, places: list[int]):
    fresh, used = packed(*data), packed(*data)
    for place in places:
        epoch, number = used.locate(place)
        assert packed(*data).locate(place) == (epoch, number)
        assert used.epoch(epoch)[number].tolist() == fresh.epoch(epoch)[number].tolist()


@given(data())
def test_places_count_the_packs_of_all_epochs(data: tuple):
    order = packed(*data)
    counts = [len(packed(*data).epoch(number)) for number in range(4)]
    expected = [(epoch, number) for epoch, count in enumerate(counts) for number in range(count)]
    assert [order.locate(place) for place in range(len(expected))] == expected
    assert [order.packs_before(epochs) for epochs in (0, 1, 3)] == [0, counts[0], sum(counts[:3])]
    assert order.packs_before(2.5) == sum(counts[:2]) + counts[2] / 2


def test_a_sample_with_more_images_than_a_pack_may_have_is_refused():
    said = r"2 rows have more images than dataset.images_per_pack=2, up to 4; set it to that number"
    with pytest.raises(UserError, match=said):
        packed([5, 5, 5], [3, 4, 2], 8, images_per_pack=2)


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(folder: Path, processor) -> ChatDataset:
    """Rows of every kind, with no image, one and two; some have a mark for it in the text."""
    rows: list[dict[str, Any]] = [
        {"text": "What is it? <image> It is a cat.", "image": "blue.png"},
        {"text": "It is a cat. It is a dog."},
        {"text": "It is a cat.", "image": "red.png"},
    ]
    for count in range(3):
        content = [{"type": "image", "path": "red.png"}] * count + [{"type": "text", "text": f"What is {count}?"}]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "It is a cat." * count or "a"},
        ]
        rows.append({"messages": messages})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ChatDataset(folder / "rows.jsonl", processor, seq_length=64)


def test_the_lengths_and_images_of_the_plan_are_those_of_the_samples(chats: ChatDataset):
    samples = [chats[row] for row in range(len(chats))]
    assert chats.lengths.tolist() == [len(sample["input_ids"]) for sample in samples]
    images = [0 if sample["pixel_values"] is None else len(sample["pixel_values"]) for sample in samples]
    assert chats.image_counts.tolist() == images == [1, 0, 1, 0, 1, 2]


def test_a_pack_is_its_samples_one_after_the_other(chats: ChatDataset):
    samples = [chats[row] for row in (5, 1, 0)]
    ends = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)]).tolist()
    length = ends[-1] + 7
    batch = collate_pack(samples, length, pad_token_id=9)
    assert batch["cu_seqlens_q"].tolist() == batch["cu_seqlens_kv"].tolist() == ends
    assert batch["cu_seqlens_q_padded"].tolist() == batch["cu_seqlens_kv_padded"].tolist() == [*ends[:-1], length]
    assert batch["cu_seqlens_q"].dtype == torch.int32
    assert (
        int(batch["max_seqlen_q"])
        == int(batch["max_seqlen_kv"])
        == max(b - a for a, b in pairwise([*ends[:-1], length]))
    )
    for sample, (start, end) in zip(samples, pairwise(ends), strict=True):
        row = slice(start, end)
        assert batch["tokens"][0, row].tolist() == sample["input_ids"].tolist()
        assert batch["labels"][0, row].tolist() == sample["labels"].tolist()
        assert batch["loss_mask"][0, row].tolist() == sample["loss_mask"].tolist()
        assert batch["position_ids"][0, row].tolist() == list(range(end - start))
        assert batch["labels"][0, end - 1] == IGNORE_INDEX  # not the first token of the next sample
    assert batch["tokens"][0, ends[-1] :].tolist() == [9] * 7
    assert batch["loss_mask"][0, ends[-1] :].tolist() == [0.0] * 7
    assert batch["pixel_values"] is not None
    torch.testing.assert_close(
        batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]])
    )


def test_a_pack_without_images_has_no_pixels_and_a_full_one_no_padding(chats: ChatDataset):
    batch = collate_pack([chats[1]], len(chats[1]["input_ids"]), pad_token_id=9)
    assert batch["pixel_values"] is None
    assert batch["cu_seqlens_q"].tolist() == batch["cu_seqlens_q_padded"].tolist() == [0, chats.lengths[1]]


def test_a_pack_longer_than_a_row_is_refused(chats: ChatDataset):
    with pytest.raises(UserError, match="doesn't fit a batch of 8"):
        collate_pack([chats[0], chats[1]], 8, pad_token_id=9)


@pytest.mark.parametrize(("loss_weights", "exponent"), [("token", 0.0), ("sample", 1.0), ("square_root", 0.5)])
def test_the_weight_of_a_label_follows_from_the_labels_of_its_sample(loss_weights: Any, exponent: float, chats):
    sample = chats[4]
    labels = int(sample["loss_mask"].sum())
    found = weighted(sample, loss_weights)["loss_mask"]
    assert labels > 1
    assert found[found > 0].tolist() == pytest.approx([labels**-exponent] * labels, rel=1e-6)
    assert ((found > 0) == (sample["labels"] != IGNORE_INDEX)).all()


def test_packs_are_read_by_their_place_and_end_behind_the_run(chats: ChatDataset):
    order = PackedOrder(Order((6,), seed=1), chats.lengths, chats.image_counts, seq_length=64)
    packs = PackedEpochs(chats, order, num_packs=9)
    assert len(packs) == 10
    epoch, number = order.locate(8)
    expected = [chats[int(row)]["input_ids"].tolist() for row in order.epoch(epoch)[number]]
    assert [sample["input_ids"].tolist() for sample in packs[8]] == expected
    with pytest.raises(IndexError, match="pack 10 of 10"):
        packs[10]
