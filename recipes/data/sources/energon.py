"""Folders that `energon prepare` has indexed, read with Energon's own classes, by index instead of as a stream."""

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ....errors import UserError
from ..formats import CHATS, parse_record
from ..json_values import parse_json
from ..pictures import Picture, Pictures, UnusableRow
from ..rows import Row
from .archives import is_document, is_image, parse_sample, refuse_unread
from .base import Source, UnchangedFile

if TYPE_CHECKING:
    from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

META = ".nv-meta"
BRIDGE = "megatron.bridge.data.energon.task_encoder_utils"
MODULES = ("megatron.energon", BRIDGE)
"""Whose classes a `dataset.yaml` may name; others would be code of the user."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class EnergonFolder(Source):
    """One split of a folder prepared for Energon.

    Raises:
        UserError: the split does not exist, or the samples are made by code or of a type that is not read.
    """

    def __init__(self, folder: Path, split: str, pictures: Pictures) -> None:
        from megatron.energon import WorkerConfig
        from megatron.energon.dataset_config import get_dataset_from_config

        self.folder = folder
        self.pictures = pictures
        if BRIDGE in _modules(folder):
            from ....bridge import mcore as mcore  # it makes Megatron-Bridge importable without Transformer Engine
        if split not in (splits := _splits(folder)):
            raise UserError(
                f"{folder} has no files in a split {split}; name one as FOLDER/SPLIT, of {', '.join(splits) or 'none'}"
            )
        self._factory: Any = get_dataset_from_config(
            folder, split_part=split, training=False, worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0)
        )
        self._factory._decoder = _decode  # raw bytes in place of tensors; a parameter that ChatMLWebdataset drops
        self.sample_type = self._factory.__sample_type__.__name__
        if self.sample_type not in RECORDS and self.sample_type != "CrudeSample":
            raise UserError(f"{folder} has samples of type {self.sample_type}; {', '.join(RECORDS)} are read")
        self.kind = f"Energon ({self.sample_type})"
        shards = tuple(folder / shard.name for shard in self._factory.shards)
        _check_shards(shards)
        self._shards = {str(shard): UnchangedFile(shard) for shard in shards}
        meta = ("dataset.yaml", "split.yaml", "split.json")
        self.files = (*shards, *(folder / META / name for name in meta if (folder / META / name).is_file()))
        self._reader: tuple[int, ShardInfosITarReader] | None = None
        self._places = self._not_excluded()

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int, *, for_training: bool = True) -> Row:
        """Read the members of one sample and parse its texts."""
        raw = self._read(int(self._places[index]), lambda _: True)
        self._shards[str(self.folder / raw["__shard__"])].check()
        parts = {name: part for name, part in raw.items() if not name.startswith("__")}
        if self.sample_type == "CrudeSample":
            decoded = {name: _picture(name, part) if is_image(name) else part for name, part in parts.items()}
            names = {name: f"{raw['__key__']}.{name}" for name in parts}
            return parse_sample(decoded, names, self.pictures, for_training=for_training)
        refuse_unread({name: name for name in parts if self._is_mapped(name) and not is_document(name)})
        try:
            sample = self._factory.load_sample({name: raw[name] for name in raw if self._is_mapped(name)})
        except (KeyError, IndexError, ValueError) as error:
            raise UnusableRow(f"its field_map does not fit ({error})") from error
        row = parse_record(RECORDS[self.sample_type](sample), self.pictures, for_training=for_training)
        if not row.images and (lost := [name for name in parts if is_image(name)]):
            raise UnusableRow(f"{', '.join(lost)} is not in the field_map, so the row would have no image")
        unmapped = (name for name in parts if not self._is_mapped(name))
        return replace(row, left_out=(*row.left_out, *unmapped))

    def place(self, index: int) -> tuple[str, int | str]:
        """Its tar file and key."""
        raw = self._read(int(self._places[index]), lambda _: False)
        return str(self.folder / raw["__shard__"]), raw["__key__"]

    def _is_mapped(self, name: str) -> bool:
        return name.startswith("__") or self._factory.part_filter(name)

    def _read(self, place: int, part_filter: Callable[[str], bool]) -> dict[str, Any]:
        from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

        if self._reader is None or self._reader[0] != os.getpid():
            # One for each process: forked loader workers would share the positions of its open files.
            reader = ShardInfosITarReader(
                self._factory.path, self._factory.shards, sample_filter=self._factory.sample_filter
            )
            self._reader = os.getpid(), reader
        reader = self._reader[1]
        reader.part_filter = part_filter
        try:
            return reader[place]
        except (tarfile.ReadError, ValueError) as error:
            raise UnusableRow(f"sample {place} is damaged, or its file has changed since `energon prepare`") from error

    def _not_excluded(self) -> np.ndarray:
        count = len(self._factory)
        if not self._factory.sample_excludes:
            return np.arange(count)
        return np.array([place for place in range(count) if self._read(place, lambda _: False) is not None], dtype=int)


def split_of(path: Path) -> tuple[Path, str] | None:
    """The prepared folder and its split, where a path is FOLDER, for its split train, or FOLDER/SPLIT."""
    if (path / META).is_dir():
        return path, "train"
    return (path.parent, path.name) if not path.is_file() and (path.parent / META).is_dir() else None


def _splits(folder: Path) -> list[str]:
    """The splits that have files."""
    for name in ("split.yaml", "split.json"):
        if (folder / META / name).is_file():
            found = (yaml.safe_load((folder / META / name).read_text()) or {}).get("split_parts") or {}
            return [split for split, files in found.items() if files]
    raise UserError(f"{folder / META} has no split.yaml; run `energon prepare {folder}`")


def _modules(folder: Path) -> list[str]:
    """The modules that describe the samples. What would import code of the user is refused before Energon does so.

    Raises:
        UserError: there is such, or no description of the samples.
    """
    path = folder / META / "dataset.yaml"
    if not path.is_file():
        raise UserError(f"{path} is missing; `energon prepare` writes it when it is given a sample type")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict):
        raise UserError(f"{path} describes no samples")
    if "sample_loader" in config or isinstance(config.get("part_filter"), str):
        raise UserError(f"{path} has a sample_loader, which is code and is not run; write a field_map in its place")
    modules = [str(held.get("__module__")) for held in (config, *config.values()) if _names_module(held)]
    if other := [module for module in modules if module not in MODULES]:
        raise UserError(f"{path} names classes of {', '.join(other)}, which is code and is not run")
    return modules


def _names_module(value: Any) -> bool:
    return isinstance(value, dict) and "__module__" in value


def _check_shards(files: tuple[Path, ...]) -> None:
    """Refuse archives that are compressed, or have no index.

    Raises:
        UserError: there are some.
    """
    for file in files:
        if file.suffix == ".tgz":
            raise UserError(f"{file} is compressed, so its samples cannot be read by index; decompress it with gunzip")
        if not file.with_suffix(".tar.idx").is_file():
            raise UserError(f"{file} has no index; run `energon prepare {file.parent}`")


def _decode(sample: dict[str, Any]) -> dict[str, Any]:
    """The members of a sample: texts decoded, images as they are."""
    return {name: part if name.startswith("__") else _decoded(name, part) for name, part in sample.items()}


def _decoded(name: str, part: bytes) -> Any:
    if is_image(name):
        return _picture(name, part)
    if name.rpartition(".")[2].lower() == "json":
        return parse_json(part)
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        raise UnusableRow(f"the member {name} is not in UTF-8 ({error})") from error


def _picture(name: str, content: bytes) -> Picture:
    return Picture(name, content=content)


def _captioning(sample: Any) -> dict[str, Any]:
    return {"text": sample.caption, "images": [sample.image]}


def _ocr(sample: Any) -> dict[str, Any]:
    return {"text": sample.text, "images": [sample.image]}


def _text(sample: Any) -> dict[str, Any]:
    return {"text": sample.text}


def _interleaved(sample: Any) -> dict[str, Any]:
    parts = sample.sequence
    if not isinstance(parts, list):
        raise UnusableRow("its sequence is no list")
    images = [part for part in parts if not isinstance(part, str)]
    return {"text": "".join(part if isinstance(part, str) else "<image>" for part in parts), "images": images}


def _vqa(sample: Any) -> dict[str, Any]:
    """A question, and of several answers the first of the greatest weight."""
    answers = [sample.answers] if isinstance(sample.answers, str) else sample.answers
    if not isinstance(answers, list) or not answers:
        raise UnusableRow("no answer")
    weights = [float(weight) for weight in sample.answer_weights] if sample.answer_weights else [1.0] * len(answers)
    if len(weights) != len(answers):
        raise UnusableRow(f"{len(answers)} answers and {len(weights)} weights")
    return _question(sample, sample.context, answers[weights.index(max(weights))])


def _multiple_choice(sample: Any) -> dict[str, Any]:
    """A question with lettered choices, worded as in the multimodal example of Megatron-LM, and the right letter."""
    choices, right = sample.choices, int(sample.correct_choice_idx)
    if not isinstance(choices, list) or not 0 <= right < len(choices) <= len(LETTERS):
        raise UnusableRow("no choices, or none that is right")
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    question = f"{sample.context}\n{listed}Answer with the option's letter from the given choices directly."
    return _question(sample, question, LETTERS[right])


def _question(sample: Any, question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [sample.image]}


def _chatml(sample: Any) -> dict[str, Any]:
    """The record of Megatron-Bridge's sample: a conversation, alone or in an object, and its images beside it."""
    conversation = sample.conversation
    conversation = parse_json(conversation) if isinstance(conversation, str) else conversation
    record = conversation if isinstance(conversation, dict) else {"messages": conversation}
    if not any(key in record for key in CHATS):
        raise UnusableRow("its conversation has no messages")
    beside = {"images": sample.imgs, "video": sample.videos, "audio": sample.audio, "tools": sample.tools}
    beside = {key: value for key, value in beside.items() if value is not None}
    if both := sorted(key for key in beside if record.get(key)):
        raise UnusableRow(f"{' and '.join(map(json.dumps, both))} in the conversation and beside it")
    return record | beside


RECORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "CaptioningSample": _captioning,
    "OCRSample": _ocr,
    "TextSample": _text,
    "InterleavedSample": _interleaved,
    "VQASample": _vqa,
    "MultiChoiceVQASample": _multiple_choice,
    "ChatMLSample": _chatml,
}
"""Records by type of sample."""
