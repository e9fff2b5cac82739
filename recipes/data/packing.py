"""Packing: which samples share a row of a batch; epochs of packs, functions of the seed and the epoch alone.

The check of the rows counts tokens exactly, as an image costs a fixed number of them, so the packs of an epoch are
known before a sample is read. An epoch's samples are cut into windows of `WINDOW`, and each window is packed by itself,
best fit decreasing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch.utils.data import Dataset

from ...errors import UserError
from .dataset import ChatDataset
from .order import Order
from .samples import Sample

WINDOW = 2**14
"""Samples that are packed together."""

GROUP = 64
"""Neighbouring packs with similar numbers of images. Those of one microbatch are neighbours, one per rank."""


@dataclass(frozen=True, slots=True)
class Packs:
    """The packs of an epoch, in their order.

    Attributes:
        samples: of all packs, one pack after the other.
        starts: where each pack starts in `samples`, and the end, ``[packs + 1]``.
        tokens: of each pack.
        images: of each pack.
    """

    samples: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, pack: int) -> np.ndarray:
        """The samples of a pack."""
        return self.samples[self.starts[pack] : self.starts[pack + 1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackStatistics:
    """The packs of the first epoch in numbers.

    Attributes:
        packs: number of packs.
        samples: number of samples.
        efficiency: share of the positions that have a token.
        images_per_pack: mean number of images.
        most_images: of a pack.
    """

    packs: int
    samples: int
    efficiency: float
    images_per_pack: float
    most_images: int

    def __str__(self) -> str:
        return (
            f"{self.packs:,} an epoch, {self.samples / self.packs:.1f} samples each, {self.efficiency:.1%} full; "
            f"{self.images_per_pack:.1f} images each, at most {self.most_images}"
        )


class PackedOrder:
    """Epochs of packs of at most `seq_length` tokens and `images_per_pack` images; no sample is split.

    Every sample of an epoch of `order` is in one pack of that epoch. Epochs differ in their number of packs, so the
    packs of a run are numbered through all epochs (`locate`).

    Args:
        order: of the samples.
        lengths: tokens of each sample.
        image_counts: images of each sample.
        seq_length: tokens of a pack.
        images_per_pack: None for any number.

    Raises:
        UserError: a sample has more images than a pack may have.
    """

    def __init__(
        self,
        order: Order,
        lengths: np.ndarray,
        image_counts: np.ndarray,
        *,
        seq_length: int,
        images_per_pack: int | None = None,
    ) -> None:
        assert not len(lengths) or lengths.max() <= seq_length, "the check of the rows leaves longer ones out"
        self.order, self.lengths, self.image_counts = order, lengths, image_counts
        self.seq_length, self.images_per_pack = seq_length, images_per_pack
        if images_per_pack is not None and (many := int((image_counts > images_per_pack).sum())):
            raise UserError(
                f"{many:,} rows have more images than dataset.images_per_pack={images_per_pack}, up to "
                f"{image_counts.max()}; set it to that number, or take these rows out"
            )
        self._ends: list[int] = []
        self._last: tuple[int, Packs] | None = None

    def epoch(self, number: int) -> Packs:
        """The packs of an epoch. The last one that was made is kept."""
        if self._last is None or self._last[0] != number:
            self._last = number, self._pack(number)
        return self._last[1]

    def locate(self, place: int) -> tuple[int, int]:
        """Epoch and number in it of a pack that is counted from the start of the run."""
        epoch = 0
        while place >= self.packs_before(epoch + 1):
            epoch += 1
        return epoch, place - self.packs_before(epoch)

    def packs_before(self, epochs: float | Fraction) -> float | Fraction:
        """Packs of the first epochs; of a fraction of an epoch, that fraction of its packs."""
        whole = int(epochs)
        while len(self._ends) < whole:
            self._ends.append((self._ends or [0])[-1] + len(self.epoch(len(self._ends))))
        before = self._ends[whole - 1] if whole else 0
        return before + (epochs - whole) * len(self.epoch(whole)) if epochs > whole else before

    def statistics(self) -> PackStatistics:
        """Of the first epoch."""
        packs = self.epoch(0)
        return PackStatistics(
            packs=len(packs),
            samples=len(packs.samples),
            efficiency=float(packs.tokens.sum() / (len(packs) * self.seq_length)),
            images_per_pack=float(packs.images.mean()),
            most_images=int(packs.images.max()),
        )

    def _pack(self, number: int) -> Packs:
        samples = self.order.epoch(number)
        random = np.random.default_rng((self.order.seed, number, 0, 2))
        windows = np.array_split(samples, -(-len(samples) // WINDOW)) if len(samples) else []
        packs = [pack for window in windows for pack in self._pack_window(window, random)]
        samples = np.concatenate([np.empty(0, samples.dtype), *packs])
        starts = np.cumsum([0, *(len(pack) for pack in packs)])
        return Packs(
            samples,
            starts,
            tokens=np.add.reduceat(self.lengths[samples], starts[:-1], dtype=np.int64),
            images=np.add.reduceat(self.image_counts[samples], starts[:-1], dtype=np.int64),
        )

    def _pack_window(self, samples: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
        """The packs of a window: random groups of packs with similar numbers of images."""
        images = self.image_counts[samples]
        pack_of = best_fit_decreasing(self.lengths[samples], images, self.seq_length, self.images_per_pack)
        packs = np.split(samples[np.argsort(pack_of, kind="stable")], np.cumsum(np.bincount(pack_of))[:-1])
        shuffled = random.permutation(len(packs))
        by_images = shuffled[np.argsort(np.bincount(pack_of, weights=images)[shuffled], kind="stable")]
        groups = [by_images[start : start + GROUP] for start in range(0, len(packs), GROUP)]
        return (packs[pack] for group in random.permutation(len(groups)) for pack in groups[group])


def best_fit_decreasing(
    lengths: np.ndarray, images: np.ndarray, seq_length: int, images_per_pack: int | None
) -> np.ndarray:
    """The number of the pack of each sample, counted from 0.

    The longest sample comes first; each goes into the fullest pack in which there is room for its tokens and images, or
    into a new one. The packs that are open are bits of an integer at their room in tokens, one integer for each number
    of images that some sample needs, so that the fullest pack is the lowest bit from a length up.
    """
    needs = [0] if images_per_pack is None else np.unique(images).tolist()
    # For a number of free images, the largest of the needs that it meets, as an index; -1 where it meets none.
    meets = (np.searchsorted(needs, np.arange((images_per_pack or 0) + 1), side="right") - 1).tolist()
    need_of = [0] * len(images) if images_per_pack is None else np.searchsorted(needs, images).tolist()
    costs = [0] * len(images) if images_per_pack is None else images.tolist()
    tokens, least = lengths.tolist(), int(lengths.min(initial=seq_length))
    is_open = [0] * len(needs)
    at_room: list[dict[int, list[int]]] = [{} for _ in needs]
    free: list[int] = []
    pack_of = np.empty(len(tokens), dtype=np.int64)
    for sample in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length, first = tokens[sample], need_of[sample]
        found = is_open[first]
        for kind in range(first + 1, len(needs)):
            found |= is_open[kind]
        found >>= length
        if found:
            room = length + (found & -found).bit_length() - 1
            kind = next(kind for kind in range(first, len(needs)) if is_open[kind] >> room & 1)
            packs = at_room[kind][room]
            pack = packs.pop()
            if not packs:
                is_open[kind] ^= 1 << room
        else:
            room, pack = seq_length, len(free)
            free.append(images_per_pack or 0)
        pack_of[sample] = pack
        room, free[pack] = room - length, free[pack] - costs[sample]
        kind = meets[free[pack]]
        if room >= least and kind >= 0:
            at_room[kind].setdefault(room, []).append(pack)
            is_open[kind] |= 1 << room
    return pack_of


class PackedEpochs(Dataset[list[Sample]]):
    """The packs of a dataset, each a list of samples, for more than `num_packs`.

    Pack i depends on i alone, as the samples of `ShuffledEpochs` do. The length is `num_packs` and one more: Megatron's
    sampler refuses to start when nothing is left.
    """

    def __init__(self, dataset: ChatDataset, order: PackedOrder, num_packs: int) -> None:
        self.dataset = dataset
        self.order = order
        self._length = num_packs + 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> list[Sample]:
        if not 0 <= index < self._length:
            raise IndexError(f"pack {index} of {self._length}")
        epoch, pack = self.order.locate(index)
        return self.dataset.__getitems__(self.order.epoch(epoch)[pack].tolist())
