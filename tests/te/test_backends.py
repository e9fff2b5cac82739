"""Both back ends side by side: equal parameters, equal checkpoints, and every supported setting builds.

Transformer Engine's own modules are built on the CPU; nothing is computed by them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from features import Row, rows
from torch.distributed.checkpoint import FileSystemReader

from checkpoints import save_tiny
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.backend import ENGINE, HAVE_TE, TORCH
from gpt_oss_vision.conversion.importing import import_checkpoint
from layouts import Layout, build, fork_checkpoint_queue

BACKENDS = (TORCH, ENGINE)
HALF = {"bf16": True, "params_dtype": torch.bfloat16}
MARKS = {"tensor_model_parallel": False, "partition_dim": -1, "sequence_parallel": False, "allreduce": True}
"""Attributes of parameters that Megatron reads, and their value where there is none."""
NORM = "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
"""The parameter whose name differs: Transformer Engine fuses the norm into the projection."""


def layout_of(backend: str, **sizes: int) -> Layout:
    return Layout(**sizes, extra={"backend": backend})


def built(path: Path, layout: Layout, **options: Any) -> torch.nn.Module:
    """The model of a checkpoint, wrapped for data parallelism."""
    from megatron.bridge import AutoBridge

    torch.distributed.init_process_group("gloo")
    (model,) = build(AutoBridge.from_hf_pretrained(path), layout, **options)
    return model


def on_ranks(layout: Layout, function: Callable, *args: Any) -> list:
    return cpu.run_ranks(layout.world_size, function, layout, *args)


def test_the_real_package_is_tested():
    import transformer_engine.pytorch as te

    assert HAVE_TE
    assert te.GroupedLinear.__module__.startswith("transformer_engine.pytorch")


def module_names(layout: Layout, path: Path) -> set[str]:
    return {type(module).__name__ for module in built(path, layout).modules()}


@pytest.mark.parametrize("row", rows(transformer_engine="built"))
def test_a_supported_setting_is_built(row: Row, path: Path):
    layout = Layout(dp=2, extra=row.model | {"backend": ENGINE}, ddp=row.ddp)
    for names in on_ranks(layout, module_names, path):
        assert {"TESinkAttention", "TEColumnParallelGroupedLinear"} <= names


# --- parameters --------------------------------------------------------------------------------------------------


def described(layout: Layout, path: Path, precision: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype, marks, mean and standard deviation of every initial parameter of this rank, by name."""
    layout = replace(layout, extra=layout.extra | precision)
    return {
        name.replace(*NORM): {
            "shape": tuple(parameter.shape),
            "dtype": parameter.dtype,
            **{mark: getattr(parameter, mark, default) for mark, default in MARKS.items()},
            "mean": float(parameter.detach().double().mean()),
            "std": float(parameter.detach().double().std(correction=0)),
        }
        for name, parameter in built(path, layout, load_weights=False).named_parameters()
    }


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose smallest random parameter, the sinks of one rank, has enough elements for statistics."""
    return save_tiny(tmp_path_factory.mktemp("wide"), hidden_size=64, num_attention_heads=64, num_hidden_layers=2)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2}, {"pp": 2}, {"cp": 2}], ids=str)
@pytest.mark.parametrize("precision", [{}, HALF], ids=["fp32", "bf16"])
def test_parameters_are_equal_on_both_back_ends(sizes: dict[str, int], precision: dict[str, Any], wide: Path):
    ours, theirs = (on_ranks(layout_of(backend, **sizes), described, wide, precision) for backend in BACKENDS)
    for rank, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for name, parameter in mine.items():
            columns = {"shape", "dtype", *MARKS} - (
                {"partition_dim"} if not parameter["tensor_model_parallel"] else set()
            )
            for column in columns:
                assert parameter[column] == other[name][column], (rank, name, column)
            for column in ("mean", "std"):
                assert parameter[column] == pytest.approx(other[name][column], rel=0.3, abs=0.02), (rank, name, column)


def test_ranks_have_different_initial_experts_and_shards(wide: Path):
    for backend in BACKENDS:
        first, second = on_ranks(layout_of(backend, tp=2, ep=2), described, wide, {})
        for name, parameter in first.items():
            is_sharded = parameter["tensor_model_parallel"] or ".experts." in name
            if is_sharded and parameter["std"] and not name.endswith("bias"):
                assert parameter["mean"] != second[name]["mean"], name


def sink_gradient(layout: Layout, path: Path) -> list[float]:
    """The gradient that Megatron accumulates when Transformer Engine's backward returns ones for the sinks."""
    named = built(path, layout).named_parameters()
    sinks = next(parameter for name, parameter in named if name.endswith("softmax_offset"))
    return torch.autograd.grad(sinks.sum(), sinks)[0].tolist()


def test_with_context_parallelism_each_rank_has_its_share_of_the_sink_gradient(path: Path):
    """Transformer Engine 2.12 returns the whole gradient on every rank, and data parallelism sums over them."""
    assert on_ranks(layout_of(ENGINE, cp=2), sink_gradient, path) == [[0.5] * 4] * 2
    assert on_ranks(layout_of(ENGINE), sink_gradient, path) == [[1.0] * 4]


# --- checkpoints -------------------------------------------------------------------------------------------------


def save(layout: Layout, path: Path, folder: Path) -> list[str]:
    """Save the model of a Hugging Face checkpoint; the keys of its sharded state dict."""
    from megatron.bridge.training.model_load_save import save_megatron_model

    fork_checkpoint_queue()
    model = built(path, layout)
    save_megatron_model([model], folder)
    return sorted(entry.key for entry in model.module.sharded_state_dict().values())


def loaded(layout: Layout, path: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of this rank after loading a checkpoint at Megatron-Bridge's default strictness."""
    from megatron.bridge.training.checkpointing import _load_model_weights_from_checkpoint

    model = built(path, layout, load_weights=False)
    _load_model_weights_from_checkpoint(str(folder / "iter_0000000"), [model])
    return parameters(model)


def from_hugging_face(layout: Layout, path: Path) -> dict[str, torch.Tensor]:
    return parameters(built(path, layout))


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(*NORM): parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the same weights, by what wrote them."""
    folder = tmp_path_factory.mktemp("saved")
    for backend in BACKENDS:
        on_ranks(layout_of(backend, tp=2, ep=2), save, path, folder / backend)
    import_checkpoint(path, folder / "converter")
    return {writer: folder / writer for writer in (*BACKENDS, "converter")}


def test_the_keys_of_checkpoints_are_equal(saved: dict[str, Path]):
    torch_keys, engine_keys, converter_keys = (keys_of(folder) for folder in saved.values())
    assert torch_keys == engine_keys
    assert converter_keys == engine_keys


def keys_of(folder: Path) -> set[str]:
    metadata = FileSystemReader(folder / "iter_0000000").read_metadata()
    return {*metadata.state_dict_metadata} - {"rng_state/shard_0.0_1.1"}


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("writer", [*BACKENDS, "converter"])
def test_each_back_end_loads_every_checkpoint_bit_for_bit(
    writer: str, backend: str, sizes: dict[str, int], saved: dict[str, Path], path: Path
):
    layout = layout_of(backend, **sizes)
    expected = on_ranks(layout_of(TORCH, **sizes), from_hugging_face, path)
    for mine, theirs in zip(on_ranks(layout, loaded, path, saved[writer]), expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def buffer_order(layout: Layout, path: Path) -> list[str]:
    model = built(path, layout)
    names = {parameter: name.replace(*NORM) for name, parameter in model.named_parameters()}
    return [names[parameter] for buffer in model.buffers for parameter in buffer.params]


def test_the_gradient_buffers_of_both_back_ends_are_in_another_order(path: Path):
    """Optimizer states are addressed by offset. When this fails, `checkpoints.py` can allow those of the other."""
    mine, theirs = (on_ranks(layout_of(backend, ep=2), buffer_order, path)[0] for backend in BACKENDS)
    assert {*mine} == {*theirs}
    assert mine != theirs
