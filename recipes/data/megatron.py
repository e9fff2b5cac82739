"""Chat data as Megatron-Bridge's training loop takes it: a dataset provider whose fields survive `run_config.yaml`."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from megatron.bridge.data import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from megatron.bridge.utils.common_utils import get_rank_safe

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from ...terminal import say
from .dataset import ChatDataset, ShuffledEpochs
from .digits import write_digits
from .findings import Findings, examine
from .lock import lock_of, read_lock
from .mixture import Part, parse_parts, per_epoch
from .order import Order
from .packing import PackedEpochs, PackedOrder, PackStatistics
from .rows import describe_skipped
from .samples import Batch, LossWeights, Sample, collate, collate_pack, weighted
from .sources.base import Source
from .sources.opening import open_source
from .tiny import write_processor
from .tokens import Channels, Learned

PIECES, PIECE_SIZE = 64, 2**16
"""Of a fingerprint."""

PROCESSOR = "a folder with tokenizer and image processor with data.processor_path=DIR"


class ChatBatches(ShuffledEpochs):
    """Shuffled epochs of a chat file, with the `collate_fn` that Megatron-Bridge's loaders look for on a dataset."""

    def __init__(
        self, dataset: ChatDataset, order: Order, num_samples: int, loss_weights: LossWeights = "token"
    ) -> None:
        super().__init__(dataset, order, num_samples)
        self.loss_weights: LossWeights = loss_weights

    def collate_fn(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A micro-batch for `megatron.bridge.training.vlm_step`, which unpacks `visual_inputs` on the device."""
        rows = [weighted(sample, self.loss_weights) for sample in samples]
        batch = collate(rows, self.dataset.seq_length, self.dataset.processor.tokenizer.pad_token_id)
        return _for_step(batch, len(self.dataset.samples_of))

    def most_images(self) -> int:
        """Of a row."""
        return int(self.dataset.image_counts.max())


class PackedBatches(PackedEpochs):
    """Epochs of packs of a chat file, with the `collate_fn` that Megatron-Bridge's loaders look for on a dataset."""

    def __init__(
        self, dataset: ChatDataset, order: PackedOrder, num_packs: int, loss_weights: LossWeights = "token"
    ) -> None:
        super().__init__(dataset, order, num_packs)
        self.loss_weights: LossWeights = loss_weights

    def collate_fn(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """A micro-batch of one pack."""
        (pack,) = packs
        rows = [weighted(sample, self.loss_weights) for sample in pack]
        batch = collate_pack(rows, self.dataset.seq_length, self.dataset.processor.tokenizer.pad_token_id)
        return _for_step(batch, len(self.dataset.samples_of))

    def most_images(self) -> int:
        """Of a pack of the first epoch."""
        return self.order.statistics().most_images


Batches = ChatBatches | PackedBatches


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Training data in numbers.

    Attributes:
        rows: samples of an epoch.
        skipped: rows that cannot be used.
        images: of an epoch.
        most_images: of a row of a batch, which is a sample or a pack.
        packs: of an epoch; None without packing.
        of_sources: samples of an epoch by the name of their source.
    """

    rows: int
    skipped: int
    images: int
    most_images: int
    packs: PackStatistics | None
    of_sources: dict[str, int]

    @property
    def images_per_row(self) -> float:
        """The mean of the rows of batches."""
        return self.images / (self.rows if self.packs is None else self.packs.packs)


@dataclass
class VisualInputs(GenericVisualInputs):
    """What Megatron-Bridge's step passes on to the model beside the tokens: pixels, and about each token two facts."""

    source_ids: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None


def _for_step(batch: Batch, sources: int) -> dict[str, Any]:
    inputs: dict[str, Any] = dict(batch)
    inputs["visual_inputs"] = VisualInputs(
        pixel_values=inputs.pop("pixel_values"),
        source_ids=inputs.pop("source_ids") if sources > 1 else None,
        padding_mask=inputs.pop("padding_mask"),
    )
    inputs.pop("source_ids", None)
    return inputs


@dataclass(kw_only=True)
class ChatDatasetProvider(DatasetProvider):
    """JSONL chat files (see `rows.py`) for training, validation and test.

    Rows that can't be used are found before the first step, each rank checking its share, and left out on all ranks;
    rank 0 prints the first of them. More than `max_skipped` (a fraction) stop the run. `decode_images` checks pixels
    and not only headers, which takes as long as decoding every image once.

    Every epoch has its own order, by `seed`; all samples are the same in every parallel layout and after a resume.
    Batches are `seq_length` long, which must be the model's. `processor_path` is a folder or a name on the Hub. In a
    recipe `path` and `processor_path` are None: only the user knows them.

    The training data are `path`, one source, or `sources`, a mixture (`mixture.py`). `image_folder` is where relative
    paths of images start, unless a source has its own; None is the folder of each file. Images are fetched from
    `allowed_hosts` alone.
    """

    path: str | None = None
    sources: list[Any] | None = None
    image_folder: str | None = None
    allowed_hosts: list[str] = field(default_factory=list)
    processor_path: str | None = None
    seq_length: int
    valid_path: str | None = None
    test_path: str | None = None
    fingerprint: str | None = None
    """Of the training data: that of another run cannot continue a checkpoint. Set by the command `train`."""
    usable_rows: list[str] | None = None
    """Of each source of the training data (`ChatDataset.usable_rows`), once they are built."""
    seed: int = 1234
    max_skipped: float = 0.01
    decode_images: bool = False
    packing: bool = False
    """Whether a row of a batch is a pack: as many samples as fit (`packing.py`)."""
    images_per_pack: int | None = None
    """The most images of a pack; None is any number."""
    loss_weights: LossWeights = "token"
    """Whether the loss is a mean over learned tokens, over samples, or with the weight √n of a sample of n tokens."""
    learned_turns: Literal["all", "last"] = "all"
    learned_channels: Channels = "all"
    """Which parts of chats are learned (`samples.Learned`)."""
    dataloader_type: Literal["single"] | None = "single"
    most_images = None  # of a row or a pack of the training data, once they are built; no field
    rows_before = None  # `usable_rows` of the checkpoint from which a run is continued; no field

    def finalize(self) -> None:
        """Refuse a dataset without data or processor, and the loaders that would change what is trained on.

        Raises:
            UserError: a path is not set, the seed is below 0, or `dataloader_type` is not "single".
        """
        super().finalize()
        self._check_paths()
        if self.seed < 0:
            raise UserError(f"dataset.seed={self.seed} is below 0")
        if self.dataloader_type != "single":
            # 'cyclic' orders by a seed of its own and by the number of data-parallel ranks; 'batch' cuts a global batch
            # into micro-batches and gives each of them the images of all.
            raise UserError(
                f"dataloader_type={self.dataloader_type!r}: chat data is shuffled by its dataset and read with 'single'"
            )
        if self.images_per_pack is not None and (not self.packing or self.images_per_pack < 1):
            raise UserError(
                f"dataset.images_per_pack={self.images_per_pack} has no effect without dataset.packing=true"
                if not self.packing
                else f"dataset.images_per_pack={self.images_per_pack} is below 1"
            )

    def _check_paths(self) -> None:
        if self.path is not None and self.sources is not None:
            raise UserError("dataset.path and dataset.sources are both set; put the path into the sources")
        if self.path is None and self.sources is None:
            raise UserError("dataset.path is not set; name the data with data.path=FILE")
        if self.processor_path is None:
            raise UserError(f"dataset.processor_path is not set; name {PROCESSOR}")

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Batches | None, Batches | None, Batches | None]:
        """The three datasets, None for those without a path. Called on every rank: the ranks share the check."""
        processor = self.processor()
        training = self._split(self.parts(), context.train_samples, processor)
        self.most_images = None if training is None else training.most_images()
        if training is not None:
            self._refuse_other_rows(training.dataset)
            self.usable_rows = training.dataset.usable_rows()
        return (
            training,
            self._split(self._part_of(self.valid_path), context.valid_samples, processor),
            self._split(self._part_of(self.test_path), context.test_samples, processor),
        )

    def parts(self) -> list[Part]:
        """The sources of the training data."""
        self._check_paths()
        return self._part_of(self.path) if self.sources is None else parse_parts(self.sources)

    def _part_of(self, path: str | None) -> list[Part]:
        return [] if path is None else [Part(path=path)]

    def prepare(self) -> None:
        """Make the files that are read, where the provider makes any. Called on every rank."""
        self.finalize()

    def processor(self) -> GPTOSSVisionProcessor:
        """The processor of all rows."""
        self._check_paths()
        assert self.processor_path is not None
        if os.path.isabs(self.processor_path) and not os.path.isdir(self.processor_path):
            raise UserError(f"dataset.processor_path={self.processor_path} is no folder; name {PROCESSOR}")
        return GPTOSSVisionProcessor.from_pretrained(self.processor_path)

    def fingerprint_of_data(self) -> str:
        """A hash of each source of the training data, joined by spaces."""
        return " ".join(fingerprint(self._source(part).files) for part in self.parts())

    def training_data(self) -> ChatDataset:
        """The training data, not shuffled. Called on every rank: the ranks share the check."""
        dataset = self._open(self.parts(), self.processor())
        self._refuse_other_rows(dataset)
        return dataset

    def _refuse_other_rows(self, dataset: ChatDataset) -> None:
        """Refuse to continue a run with other usable rows: the order of all samples would be another.

        Raises:
            UserError: with the source, and how many rows were usable.
        """
        for part, saved, found in zip(self.parts(), self.rows_before or [], dataset.usable_rows(), strict=False):
            if saved != found:
                before, now = (int(each.split()[0]) for each in (saved, found))
                are = f"{now:,} are" if before != now else "as many are, but others or of other lengths"
                raise UserError(
                    f"{before:,} rows of {part.title} were usable when the checkpoint was saved, and now {are}: the "
                    "run would go on in another order of samples; make the same rows usable (images, "
                    "dataset.image_folder, dataset.allowed_hosts, dataset.decode_images, FILE.lock), or start another "
                    "run from its weights with weights=DIR and another out=DIR"
                )

    def count_with_images(self) -> Counts:
        """Count the training data, by this process alone, which parses all."""
        dataset = self.training_data()
        order = self._order(self.parts(), dataset)
        images = [dataset.image_counts[dataset.source_of == source].mean() for source in range(len(order.rows))]
        in_epoch = sum(mean * samples for mean, samples in zip(images, order.per_epoch, strict=True))
        packs = self._packed(order, dataset).statistics() if self.packing else None
        return Counts(
            rows=len(order),
            skipped=len(dataset.skipped),
            images=round(in_epoch),
            most_images=int(dataset.image_counts.max()) if packs is None else packs.most_images,
            packs=packs,
            of_sources={part.title: count for part, count in zip(self.parts(), order.per_epoch, strict=True)},
        )

    def count_held_out(self) -> dict[str, int]:
        """Samples of the validation and the test data, where there are any; by this process alone."""
        parts = {"validation": self._part_of(self.valid_path), "test": self._part_of(self.test_path)}
        return {name: len(self._open(found, self.processor())) for name, found in parts.items() if found}

    def batch_rows(self, epochs: float) -> int:
        """Samples, or packs, in some epochs of the training data, rounded up.

        Called on every rank: the ranks share the check.

        Raises:
            UserError: the data cannot be used, or too many rows cannot.
        """
        dataset = self.training_data()
        order = self._order(self.parts(), dataset)
        exact = Fraction(str(epochs))
        return math.ceil(self._packed(order, dataset).packs_before(exact) if self.packing else exact * len(order))

    def describe_change(self, saved: Mapping[str, Any], place: int) -> list[str]:
        """What other sources, weights or repeats mean for a run that is continued, a sentence for each source.

        Args:
            saved: the dataset in the configuration of the checkpoint; its sources are the first ones of this dataset.
            place: samples, or packs, that were consumed.
        """
        before = parse_parts(saved.get("sources") or [saved["path"]])
        parts, dataset = self.parts(), self.training_data()
        then = self._read_before(before, dataset, place)
        now = self._read_before(parts, dataset, place)
        sentences = []
        for number, part in enumerate(parts):
            if number >= len(before):
                sentences.append(f"{part.title} is new, and begins with its sample {now[number]:,}")
            elif now[number] < then[number]:
                sentences.append(f"the last {then[number] - now[number]:,} samples of {part.title} are read again")
            elif now[number] > then[number]:
                sentences.append(f"the next {now[number] - then[number]:,} samples of {part.title} are left out")
        return sentences

    def _read_before(self, parts: list[Part], dataset: ChatDataset, place: int) -> list[int]:
        """How many samples of each of the first sources stand before a place."""
        order = self._order(parts, dataset)
        if not self.packing:
            return order.read_before(place)
        packed = self._packed(order, dataset)
        epoch, pack = packed.locate(place)
        packs = packed.epoch(epoch)
        here = np.bincount(dataset.source_of[packs.samples[: packs.starts[pack]]], minlength=len(parts))
        return [epoch * count + int(read) for count, read in zip(order.per_epoch, here, strict=True)]

    def _split(self, parts: list[Part], num_samples: int, processor: GPTOSSVisionProcessor) -> Batches | None:
        if not parts or num_samples == 0:
            return None
        dataset = self._open(parts, processor)
        if dataset.skipped and _rank() == 0:
            rows = len(dataset) + len(dataset.skipped)
            say(f"Skipped: {describe_skipped(dataset.source.title, dataset.skipped, rows)}")
        order = self._order(parts, dataset)
        if self.packing:
            return PackedBatches(dataset, self._packed(order, dataset), num_samples, self.loss_weights)
        return ChatBatches(dataset, order, num_samples, self.loss_weights)

    def _order(self, parts: list[Part], dataset: ChatDataset) -> Order:
        """The order of the first sources of the dataset."""
        rows = dataset.samples_of[: len(parts)]
        return Order(rows, per_epoch(parts, rows), seed=self.seed)

    def _packed(self, order: Order, dataset: ChatDataset) -> PackedOrder:
        limits = {"seq_length": self.seq_length, "images_per_pack": self.images_per_pack}
        return PackedOrder(order, dataset.lengths, dataset.image_counts, **limits)

    def _open(self, parts: list[Part], processor: GPTOSSVisionProcessor) -> ChatDataset:
        sources, found = _together(lambda: self._examine(parts, processor))
        options = {"max_skipped": self.max_skipped, "learned_parts": self._learned_parts}
        return ChatDataset(sources, processor, self.seq_length, findings=found, **options)

    @property
    def _learned_parts(self) -> Learned:
        return Learned(self.learned_turns, self.learned_channels)

    def _examine(self, parts: list[Part], processor: GPTOSSVisionProcessor) -> tuple[list[Source], list[Findings]]:
        """The sources, and what was found in each: all of it where it has a lock, else in this rank's share of rows."""
        options = {"decode_images": self.decode_images, "learned_parts": self._learned_parts}
        sources, found = [self._source(part) for part in parts], []
        for part, source in zip(parts, sources, strict=True):
            locked = read_lock(lock_of(part.path), source, processor, **options)
            share = range(_rank(), len(source), _ranks())
            found.append(examine(source, processor, numbers=share, **options) if locked is None else locked)
        return sources, found

    def _source(self, part: Part) -> Source:
        return open_source(
            part.path,
            image_folder=part.image_folder or self.image_folder,
            allowed_hosts=frozenset(self.allowed_hosts),
            seq_length=self.seq_length,
        )


@dataclass(kw_only=True)
class DigitsDatasetProvider(ChatDatasetProvider):
    """The handwritten digits and the processor of the tiny model, both written into a folder before they are read.

    `folder` is a folder of their own, or None in a recipe. Of the other paths, those that are None become files in it:
    `path` the training rows, with them `valid_path` the rows that are held out, and `processor_path` the processor,
    with the config of the tiny model. Which rows are held out depends on `seed`, as the order of the others does.
    """

    folder: str | None = None

    def finalize(self) -> None:
        """Set the paths that are None.

        Raises:
            UserError: `folder` is not set and needed, or as of `ChatDatasetProvider.finalize`.
        """
        if self.path is None and self.sources is None:
            self.path, self.valid_path = self._within("train.jsonl"), self.valid_path or self._within("test.jsonl")
        if self.processor_path is None:
            self.processor_path = self._within("processor")
        super().finalize()

    def prepare(self) -> None:
        """Write what is read and not there yet. Called on every rank: rank 0 writes, the others wait.

        Raises:
            UserError: as of `finalize`.
            OSError: on every rank, when rank 0 cannot write.
        """
        self.finalize()
        on_rank_0(self._write)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Batches | None, Batches | None, Batches | None]:
        """Write the files, then as `ChatDatasetProvider.build_datasets`."""
        self.prepare()
        return super().build_datasets(context)

    def _within(self, name: str) -> str:
        if self.folder is None:
            raise UserError("dataset.folder is not set; name a folder for the digits with data.folder=DIR")
        return str(Path(self.folder, name))

    def _write(self) -> None:
        if self.folder is None:
            return
        if any(
            path and Path(path).parent == Path(self.folder) for path in (self.path, self.valid_path, self.test_path)
        ):
            write_digits(self.folder, self.seed)
        if self.processor_path == self._within("processor"):
            write_processor(Path(self.folder, "processor"))


def on_rank_0[T](call: Callable[[], T]) -> T:
    """Call on rank 0, and return the result or raise the error on all ranks; they wait for it.

    In a process without communication only rank 0, by the environment, calls, and the others return None.
    """
    result: Any = None
    error: Exception | None = None
    if get_rank_safe() == 0:
        try:
            result = call()
        except Exception as found:  # noqa: BLE001 - raised below on all ranks; alone, it would leave the others waiting
            error = found
    shared = [result, error]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of some files: of the size of each and of 64 pieces of 64 KiB, spread over it evenly."""
    digest = xxhash.xxh3_128()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for piece in range(PIECES):
                file.seek(max(0, size - PIECE_SIZE) * piece // (PIECES - 1))
                digest.update(file.read(PIECE_SIZE))
    return digest.hexdigest()


def _together(
    examine_share: Callable[[], tuple[list[Source], list[Findings]]],
) -> tuple[list[Source], list[Findings]]:
    """Sources, and what all ranks have found in them, on every rank.

    Raises:
        UserError | OSError | MemoryError: on every rank, when one rank cannot check its share.
    """
    if _ranks() == 1:
        return examine_share()
    sources: list[Source] = []
    mine: list[Findings] = []
    failure: Exception | None = None
    try:
        sources, mine = examine_share()
    except Exception as error:  # noqa: BLE001 - raised below on all ranks; alone, it would leave the others waiting
        kind = next((kind for kind in (OSError, UserError, MemoryError) if isinstance(error, kind)), RuntimeError)
        failure = kind(f"{type(error).__name__}: {error}" if kind is RuntimeError else str(error))
    # A share of the rows has as many rows between two of its own as there are ranks; what comes from a lock is whole.
    shares = [None if each.numbers.step == 1 else each for each in mine]
    everyone: list[Any] = [None] * _ranks()
    torch.distributed.all_gather_object(everyone, failure or shares)
    for rank, found in enumerate(everyone):
        if isinstance(found, Exception):
            raise type(found)(f"Rank {rank} can't check the dataset: {found}")
    for number, share in enumerate(shares):
        if share is not None:
            mine[number] = Findings.of_rows(range(len(sources[number])))
            mine[number].merge([found[number] for found in everyone])
    return sources, mine


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
