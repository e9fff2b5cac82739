"""Tiny checkpoints of every kind for the tests of conversion, and readers that use only safetensors and torch."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_oss_vision.bridge.ops.mxfp4 import quantize
from gpt_oss_vision.conversion.engine.stream import PADDING, Task, Worker
from gpt_oss_vision.conversion.importing import import_checkpoint
from tiny import tiny_config, tiny_model, tiny_processor

SQUARE = {"hidden_size": 64, "intermediate_size": 64}
OBLONG = {"hidden_size": 64, "intermediate_size": 96}


def save_tiny(
    folder: Path, *, dtype: torch.dtype = torch.float32, packed: bool = False, shards: str = "5GB", **overrides: object
) -> Path:
    """Save a tiny checkpoint with its processor; `packed` puts the experts into MXFP4, `shards` limits a shard."""
    processor = tiny_processor()
    fields = {"vocab_size": len(processor.tokenizer), "image_token_id": processor.image_token_id}
    model = tiny_model(tiny_config(**fields | overrides))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if name.endswith("vision_bias") else parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=shards)
    processor.save_pretrained(folder)
    if packed:
        change(folder, pack)
    return folder


def save_pair(folder: Path, **choices: Any) -> Path:
    """Save a tiny checkpoint as `hf` in a folder, and its import as `megatron`; `choices` are those of `save_tiny`."""
    import_checkpoint(save_tiny(folder / "hf", **choices), folder / "megatron")
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object] | None = None, /, **fields: object) -> Path:
    """Edit the config of a checkpoint in place: with a function, or with new values of some fields."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    if edit:
        edit(config)
    file.write_text(json.dumps(config))
    return folder


def change(folder: Path, edit) -> Path:
    """Edit the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pack(tensors: dict[str, torch.Tensor]) -> None:
    """Put the experts' weights into MXFP4 in gpt-oss's layout, `[experts, out, in]`."""
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        values = tensors.pop(name).mT.contiguous()
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize(values)


def load_hf(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_megatron(folder: Path, iteration: str = "iter_0000000") -> dict[str, torch.Tensor]:
    """Every tensor of one iteration in a Megatron checkpoint, read by torch."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = checkpoint.FileSystemReader(folder / iteration).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, checkpoint_id=folder / iteration, no_dist=True)
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def at_most_open(descriptors: int) -> Iterator[None]:
    """Run with a soft limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    try:
        yield
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (descriptors, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def memory_taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that gets an entry per task from now on: the memory that the task declares, and its peak."""
    taken: list[tuple[int, int]] = []
    init = Task.__init__

    def counting(task: Task, name: str, files: tuple[str, ...], run: Any, memory: int, nbytes: int) -> None:
        def counted(worker: Worker) -> Any:
            worker.peak = 0
            result = run(worker)
            taken.append((memory, worker.peak))
            return result

        init(task, name, files, counted, memory, nbytes)

    monkeypatch.setattr(Task, "__init__", counting)
    return taken


def check_memory(stated: int, taken: list[tuple[int, int]], jobs: int = 4) -> None:
    """Assert that no task takes more than it declares, nor the largest much less, and the total covers all jobs."""
    assert all(peak <= memory + PADDING for memory, peak in taken)
    largest = max(memory for memory, _ in taken)
    assert stated >= jobs * (largest + PADDING)
    assert max(peak for _, peak in taken) >= 0.9 * largest
