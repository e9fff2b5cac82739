"""The order of samples: shuffled epochs of one source or of a mixture, functions of the seed and the epoch alone."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


class Order:
    """Epochs of a mixture of sources, whose samples are numbered one source after the other.

    Each source is read as an endless sequence of its own epochs, each in another order; an epoch of the mixture takes
    the next `per_epoch` samples of each. They are interleaved so that the first n samples of an epoch hold of each
    source its share of n, to less than one sample and its share of as many samples as there are sources.

    Attributes:
        rows: usable rows of each source.
        per_epoch: samples of each source in an epoch of the mixture; may be more or fewer than its rows.
        seed: of all orders.
    """

    def __init__(self, rows: Sequence[int], per_epoch: Sequence[int] | None = None, *, seed: int) -> None:
        self.rows = tuple(rows)
        self.per_epoch = self.rows if per_epoch is None else tuple(per_epoch)
        self.seed = seed
        self._starts = np.cumsum((0, *self.rows))

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.per_epoch)

    def epoch(self, number: int) -> np.ndarray:
        """The samples of an epoch, ``[len(self)]``, in their order."""
        samples = np.empty(len(self), dtype=np.int64)
        sources = self.sources(number)
        for source, count in enumerate(self.per_epoch):
            samples[sources == source] = self._of_source(source, number * count, (number + 1) * count)
        return samples

    def sources(self, number: int) -> np.ndarray:
        """The source of each sample of an epoch, ``[len(self)]``."""
        if len(self.rows) == 1:
            return np.zeros(len(self), dtype=np.int32)
        # The j-th sample of n has a random time within the j-th of n equal parts of the epoch.
        random = np.random.default_rng((self.seed, number, 0, 1))
        times = [(np.arange(count) + random.random(count)) / max(count, 1) for count in self.per_epoch]
        source = np.repeat(np.arange(len(self.rows), dtype=np.int32), self.per_epoch)
        return source[np.argsort(np.concatenate(times), kind="stable")]

    def read_before(self, place: int) -> list[int]:
        """How many samples of each source stand before a place, counted over all epochs."""
        epoch, position = divmod(place, len(self))
        here = np.bincount(self.sources(epoch)[:position], minlength=len(self.rows))
        return [epoch * count + int(read) for count, read in zip(self.per_epoch, here, strict=True)]

    def _of_source(self, source: int, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` of the endless sequence of a source."""
        rows = self.rows[source]
        if first == last:
            return np.empty(0, dtype=np.int64)
        bounds = [first, *range((first // rows + 1) * rows, last, rows), last]
        pieces = []
        for start, end in pairwise(bounds):
            # A seed that ends with zeros is the one without them: the first source has the order that it has alone.
            permutation = np.random.default_rng((self.seed, start // rows, source)).permutation(rows)
            pieces.append(permutation[start % rows :][: end - start])
        return np.concatenate(pieces) + self._starts[source]
