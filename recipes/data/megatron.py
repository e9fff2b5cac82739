"""Chat data as Megatron-Bridge's training loop takes it: a dataset provider whose fields survive `run_config.yaml`."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from megatron.bridge.data import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.utils.visual_inputs import GenericVisualInputs
from megatron.bridge.utils.common_utils import get_rank_safe

from ...bridge.hf.processing_gpt_oss_vision import GPTOSSVisionProcessor
from ...errors import UserError
from .dataset import ChatDataset, Findings, ShuffledEpochs, examine
from .digits import write_digits
from .order import Order
from .rows import describe_skipped
from .samples import Sample, collate
from .sources.base import Source
from .sources.opening import open_source
from .tiny import write_processor

logger = logging.getLogger(__name__)

PIECES, PIECE_SIZE = 64, 2**16
"""Of a fingerprint."""

PROCESSOR = "a folder with tokenizer and image processor with data.processor_path=DIR"


class ChatBatches(ShuffledEpochs):
    """Shuffled epochs of a chat file, with the `collate_fn` that Megatron-Bridge's loaders look for on a dataset."""

    def __init__(self, dataset: ChatDataset, order: Order, num_samples: int) -> None:
        super().__init__(dataset, order, num_samples)
        self.seq_length = dataset.seq_length
        self.pad_token_id = dataset.processor.tokenizer.pad_token_id

    def collate_fn(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A micro-batch for `megatron.bridge.training.vlm_step`, which unpacks `visual_inputs` on the device."""
        batch: dict[str, Any] = dict(collate(samples, self.seq_length, self.pad_token_id))
        batch["visual_inputs"] = GenericVisualInputs(pixel_values=batch.pop("pixel_values"))
        return batch


@dataclass(kw_only=True)
class ChatDatasetProvider(DatasetProvider):
    """JSONL chat files (see `rows.py`) for training, validation and test.

    Rows that can't be used are found before the first step, each rank checking its share, and left out on all ranks;
    rank 0 logs them. More than `max_skipped` (a fraction) stop the run. `decode_images` checks pixels and not only
    headers, which takes as long as decoding every image once.

    Every epoch has its own order, by `seed`; all samples are the same in every parallel layout and after a resume.
    Batches are `seq_length` long, which must be the model's. `processor_path` is a folder or a name on the Hub. In a
    recipe `path` and `processor_path` are None: only the user knows them.
    """

    path: str | None = None
    processor_path: str | None = None
    seq_length: int
    valid_path: str | None = None
    test_path: str | None = None
    fingerprint: str | None = None
    """Of the training data: that of another run cannot continue a checkpoint. Set by the command `train`."""
    seed: int = 1234
    max_skipped: float = 0.01
    decode_images: bool = False
    dataloader_type: Literal["single"] | None = "single"

    def finalize(self) -> None:
        """Refuse a dataset without data or processor, and the loaders that would change what is trained on.

        Raises:
            UserError: a path is not set, or `dataloader_type` is not "single".
        """
        super().finalize()
        self._check_paths()
        if self.dataloader_type != "single":
            # 'cyclic' orders by a seed of its own and by the number of data-parallel ranks; 'batch' cuts a global batch
            # into micro-batches and gives each of them the images of all.
            raise UserError(
                f"dataloader_type={self.dataloader_type!r}: chat data is shuffled by its dataset and read with 'single'"
            )

    def _check_paths(self) -> None:
        for field, what in (("path", "the data with data.path=FILE"), ("processor_path", PROCESSOR)):
            if getattr(self, field) is None:
                raise UserError(f"dataset.{field} is not set; name {what}")

    def build_datasets(
        self, context: DatasetBuildContext
    ) -> tuple[ChatBatches | None, ChatBatches | None, ChatBatches | None]:
        """The three datasets, None for those without a path. Called on every rank: the ranks share the check."""
        processor = self.processor()
        return (
            self._split(self.path, context.train_samples, processor),
            self._split(self.valid_path, context.valid_samples, processor),
            self._split(self.test_path, context.test_samples, processor),
        )

    def prepare(self) -> None:
        """Make the files that are read, where the provider makes any. Called on every rank."""
        self.finalize()

    def processor(self) -> GPTOSSVisionProcessor:
        """The processor of all rows."""
        self._check_paths()
        return GPTOSSVisionProcessor.from_pretrained(self.processor_path)

    def fingerprint_of_data(self) -> str:
        """A hash of the training file: of its size and of 64 pieces of 64 KiB, spread over it evenly."""
        digest = xxhash.xxh3_128()
        with Path(str(self.path)).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for piece in range(PIECES):
                file.seek(max(0, size - PIECE_SIZE) * piece // (PIECES - 1))
                digest.update(file.read(PIECE_SIZE))
        return digest.hexdigest()

    def count(self) -> tuple[int, int]:
        """Usable and skipped rows of the training data. Called on every rank: the ranks share the check.

        Raises:
            UserError: the data cannot be used, or too many rows cannot.
        """
        dataset = self._open(str(self.path), self.processor())
        return len(dataset), len(dataset.skipped)

    def count_with_images(self) -> tuple[int, int, int]:
        """Usable rows, skipped rows, and images of the training data; by this process alone, which parses all rows."""
        dataset = self._open(str(self.path), self.processor())
        return len(dataset), len(dataset.skipped), int(dataset.image_counts.sum())

    def _split(self, path: str | None, num_samples: int, processor: GPTOSSVisionProcessor) -> ChatBatches | None:
        if path is None or num_samples == 0:
            return None
        dataset = self._open(path, processor)
        if dataset.skipped and _rank() == 0:
            rows = len(dataset) + len(dataset.skipped)
            logger.warning("Skipped: %s", describe_skipped(path, dataset.skipped, rows))
        return ChatBatches(dataset, Order((len(dataset),), seed=self.seed), num_samples)

    def _open(self, path: str, processor: GPTOSSVisionProcessor) -> ChatDataset:
        source, found = _examine_together(
            lambda: open_source(path), processor, self.seq_length, decode_images=self.decode_images
        )
        return ChatDataset(source, processor, self.seq_length, max_skipped=self.max_skipped, findings=found)


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
        if self.path is None:
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

    def build_datasets(
        self, context: DatasetBuildContext
    ) -> tuple[ChatBatches | None, ChatBatches | None, ChatBatches | None]:
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


def _examine_together(
    open_rows: Callable[[], Source], processor: GPTOSSVisionProcessor, seq_length: int, *, decode_images: bool
) -> tuple[Source, Findings]:
    """Open a source, and `examine` all of its rows, on every rank; each checks its share of the rows."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1:
        source = open_rows()
        return source, examine(source, processor, seq_length, decode_images=decode_images)
    source, mine = None, None
    try:
        source = open_rows()
        mine = examine(source, processor, seq_length, decode_images=decode_images, shard=_rank(), shards=ranks)
    except Exception as error:  # noqa: BLE001 - raised below on all ranks; alone, it would leave the others waiting
        kind = next((kind for kind in (OSError, UserError, MemoryError) if isinstance(error, kind)), RuntimeError)
        mine = kind(f"{type(error).__name__}: {error}" if kind is RuntimeError else str(error))
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, mine)
    for rank, found in enumerate(everyone):
        if isinstance(found, Exception):
            raise type(found)(f"Rank {rank} can't check the dataset: {found}")
    assert source is not None
    merged = Findings.of_rows(len(source))
    merged.merge(everyone)
    return source, merged


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
