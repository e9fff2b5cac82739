"""Reading `torch_dist`: any region from any grid of chunks; unknown content is refused, and no pickled code runs."""

import os
import pickle
import re
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from gpt_oss_vision.conversion.engine.stream import PADDING, Files, InMemoryJournal, Task, Worker, stream
from gpt_oss_vision.conversion.formats.torch_dist_reader import (
    Chunk,
    ReadItem,
    ShardedTensor,
    memory_of,
    open_checkpoint,
    read_metadata,
    read_region,
    whole,
)
from gpt_oss_vision.terminal import Progress

TENSORS = {
    "weight": torch.arange(6 * 5 * 7, dtype=torch.float32).view(6, 5, 7),
    "bias": torch.linspace(-1, 1, 33).bfloat16(),
}


def save(folder: Path, **extra: torch.Tensor) -> Path:
    dcp.save(TENSORS | extra, checkpoint_id=folder, no_dist=True)
    return folder


def read(tensor: ShardedTensor, region: tuple[slice, ...]) -> torch.Tensor:
    found = []
    task = Task("region", (), lambda worker: found.append(read_region(worker, tensor, region).clone()), 0, 0)
    stream([task], InMemoryJournal(), {}, jobs=1, progress=Progress("", 0))  # pyright: ignore[reportArgumentType]
    return found[0]


def random_grid(shape: tuple[int, ...], generator: torch.Generator, offsets: tuple[int, ...] = ()) -> list:
    """Cut a block in two along random axes, recursively; offsets and sizes of the parts, in no order."""
    offsets = offsets or (0,) * len(shape)
    axis = int(torch.randint(len(shape), (), generator=generator))
    if shape[axis] < 2 or torch.rand((), generator=generator) < 0.3:
        return [(offsets, shape)]
    cut = int(torch.randint(1, shape[axis], (), generator=generator))
    before, after = [(*shape[:axis], size, *shape[axis + 1 :]) for size in (cut, shape[axis] - cut)]
    moved = (*offsets[:axis], offsets[axis] + cut, *offsets[axis + 1 :])
    return random_grid(after, generator, moved) + random_grid(before, generator, offsets)


def on_grid(grid: list, shape: tuple[int, ...]) -> ShardedTensor:
    chunks = [Chunk(offsets, sizes, Path(str(i)), 0, 0) for i, (offsets, sizes) in enumerate(grid)]
    return ShardedTensor("tensor", torch.float32, shape, chunks)


@pytest.mark.parametrize("seed", range(40))
def test_any_region_comes_out_of_any_grid(seed: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(torch.randint(1, 9, (1 + seed % 4,), generator=generator).tolist())
    tensor = torch.rand(shape, generator=generator)
    stored = on_grid(random_grid(shape, generator), shape)
    edges = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in shape]
    region = tuple(
        slice(a, max(b, a + 1)) if a < size else slice(0, size) for (a, b), size in zip(edges, shape, strict=True)
    )

    def read_part(worker: Worker, part: ReadItem, dtype: torch.dtype) -> torch.Tensor:
        block = tensor[tuple(slice(a, a + n) for a, n in zip(part.chunk.offsets, part.chunk.sizes, strict=True))]
        return worker.take((part.count,), dtype).copy_(block.flatten()[part.start : part.start + part.count])

    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_reader._read_part", read_part)
    worker = Worker(Files(Progress("", 0)))
    assert torch.equal(read_region(worker, stored, region), tensor[region])
    assert worker.peak <= memory_of(stored, region) + PADDING


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ([((0, 0), (2, 4)), ((3, 0), (1, 4))], "hold 12 of the 16 elements"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([((0, 0), (2, 4)), ((0, 0), (2, 4))], "overlap"),  # the expected number of elements
    ],
    ids=["gap", "overlap", "gap and overlap"],
)
def test_chunks_that_do_not_tile_are_refused(grid: list, problem: str):
    with pytest.raises(ValueError, match=problem):
        on_grid(grid, (4, 4)).read_plan(whole((4, 4)))


def test_it_reads_what_torch_writes(tmp_path: Path):
    stored = open_checkpoint(save(tmp_path)).tensors
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(read(stored[name], whole(tensor.shape)), tensor)
    assert torch.equal(read(stored["weight"], (slice(1, 4), slice(2, 3), slice(0, 6))), TENSORS["weight"][1:4, 2:3, :6])


def test_optimizer_states_are_not_weights(tmp_path: Path):
    states = ("optimizer.state.exp_avg.weight", "chained_1.optimizer.distributed.x", "rng_state", "a._extra_state/s")
    save(tmp_path, **dict.fromkeys(states, torch.ones(2)))
    assert open_checkpoint(tmp_path).tensors.keys() == TENSORS.keys()


def rewrite_metadata(folder: Path, edit) -> None:
    file = folder / ".metadata"
    metadata = dcp.FileSystemReader(folder).read_metadata()
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def plant(metadata: Metadata) -> None:
    metadata.planner_data = Evil()


def test_metadata_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rewrite_metadata(save(tmp_path / "checkpoint"), plant)
    with pytest.raises(ValueError, match=r"posix\.system, which no checkpoint needs"):
        open_checkpoint(tmp_path / "checkpoint")
    assert not (tmp_path / "executed").exists()


JUNK = {
    "empty": b"",
    "junk": b"junk",
    "dict": pickle.dumps({"a": 1}),
    "None": pickle.dumps(None),
    "a frame without end": b"\x80\x04\x95" + b"\xff" * 8,
    "words without end": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes without end": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
}


@pytest.mark.parametrize("data", JUNK.values(), ids=JUNK)
def test_junk_in_place_of_metadata_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="was refused"):
        read_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("fields", [{"offset": b"0"}, {"offset": -1}, {"length": "9"}], ids=str)
def test_an_invalid_offset_or_length_is_refused(fields: dict, tmp_path: Path):
    def misplace(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            vars(info).update(fields)

    rewrite_metadata(save(tmp_path), misplace)
    with pytest.raises(ValueError, match=r"\.metadata does not say in numbers where \w+ is; copy it again"):
        open_checkpoint(tmp_path)


def test_files_outside_the_folder_are_refused(tmp_path: Path):
    def point_outside(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../" + info.relative_path

    rewrite_metadata(save(tmp_path), point_outside)
    with pytest.raises(ValueError, match="no plain file of the folder"):
        open_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path):
    save(tmp_path)
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks __0_0\.distcp"):
        open_checkpoint(tmp_path)


def test_a_file_that_is_cut_off_is_named_with_both_lengths(tmp_path: Path):
    file = save(tmp_path) / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"has {file.stat().st_size} of at least {file.stat().st_size + 10} bytes"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("where", "problem"), [("numbers", "other bytes .* than were written"), ("zip", "is damaged at byte")]
)
def test_a_flipped_bit_is_found(where: str, problem: str, tmp_path: Path):
    file = save(tmp_path) / "__0_0.distcp"
    data, numbers = bytearray(file.read_bytes()), TENSORS["weight"].numpy().tobytes()
    start = data.index(numbers)
    data[start + 40 if where == "numbers" else data.index(b"PK\x01\x02", start)] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=problem):
        tensor = open_checkpoint(tmp_path).tensors["weight"]
        read(tensor, whole(tensor.shape))


def test_a_shape_other_than_that_of_the_stored_tensor_is_found(tmp_path: Path):
    rewrite_metadata(save(tmp_path), swap_axes)
    with pytest.raises(ValueError, match=r"holds .* not"):
        tensor = open_checkpoint(tmp_path).tensors["weight"]
        read(tensor, whole(tensor.shape))


def flags_of_entries(data: bytearray) -> list[int]:
    """Offsets of the flags of a zip's entries, in its central directory and in each header; the method follows them."""
    table = [at.start() + 8 for at in re.finditer(b"PK\x01\x02", data)]
    return table + [at.start() + 6 for at in re.finditer(b"PK\x03\x04", data)]


@pytest.mark.parametrize(("shift", "bit"), [(0, 0x01), (0, 0x20), (0, 0x40), (2, 0x40)])
def test_a_zip_that_python_cannot_open_is_called_damaged(shift: int, bit: int, tmp_path: Path):
    file = save(tmp_path) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    for flags in flags_of_entries(data):
        data[flags + shift] |= bit
    file.write_bytes(data)
    tensor = open_checkpoint(tmp_path).tensors["weight"]
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged at byte"):
        read(tensor, whole(tensor.shape))


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_is_refused_or_harmless(name: str, seed: int, tmp_path: Path):
    file, random = save(tmp_path) / name, Random(seed)
    good = file.read_bytes()
    for _ in range(100):
        at = random.randrange(len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << random.randrange(8)]) + good[at + 1 :])
        with suppress(ValueError, OSError):
            for key, tensor in open_checkpoint(tmp_path).tensors.items():
                if key in TENSORS and tensor.shape == TENSORS[key].shape:  # a conversion compares names and shapes
                    assert torch.equal(read(tensor, whole(tensor.shape)), TENSORS[key])


def swap_axes(metadata: Metadata) -> None:
    """Give a tensor the shape ``[6, 7, 5]``: as many elements, but in other places."""
    stored = metadata.state_dict_metadata["weight"]
    stored.size = stored.chunks[0].sizes = torch.Size([6, 7, 5])


def test_the_root_leads_to_its_latest_iteration(tmp_path: Path):
    for step in (1, 12):
        save(tmp_path / f"iter_{step:07d}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    opened = open_checkpoint(tmp_path)
    assert opened.folder == tmp_path / "iter_0000012" and opened.root == tmp_path
    assert open_checkpoint(tmp_path / "iter_0000001").root == tmp_path


def test_a_root_that_names_a_missing_iteration_is_refused(tmp_path: Path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(FileNotFoundError, match=r"names iter_0000007, which has no \.metadata"):
        open_checkpoint(tmp_path)


def test_another_folder_and_another_format_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="name the folder of a Megatron checkpoint"):
        open_checkpoint(tmp_path)
    (save(tmp_path) / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(ValueError, match="saved as 'zarr'"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder; name the folder of a Megatron checkpoint"):
        open_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_a_damaged_format_is_refused(text: str, tmp_path: Path):
    (save(tmp_path) / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.json (holds|is not JSON).*; copy it again"):
        open_checkpoint(tmp_path)
