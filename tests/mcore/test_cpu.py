"""Megatron without CUDA: every redirection still has its target, is still needed, and is undone."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt_oss_vision.bridge.mcore import cpu, upstream
from gpt_oss_vision.bridge.mcore.cpu import ranks, stand_ins

without_cuda = pytest.mark.skipif(cpu.cuda_is_real(), reason="has a CUDA device")


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, name, _ in cpu.redirections()])
def test_what_is_redirected_still_exists(owner: object, name: str):
    assert hasattr(owner, name), f"{owner}.{name} has moved"


def test_the_store_of_env_rendezvous_is_still_made_under_this_name():
    from gpt_oss_vision.bridge.mcore.cpu import ranks

    assert hasattr(importlib.import_module("torch.distributed.rendezvous"), ranks.STORE_FACTORY)


@without_cuda
def test_inside_the_runtime_there_is_a_device_and_outside_there_is_none():
    before = [getattr(owner, name) for owner, name, _ in cpu.redirections()]
    with cpu.runtime(), cpu.runtime():
        assert torch.cuda.is_available()
        assert torch.ones(2, device="cuda").cuda().to("cuda:0").device == cpu.CPU
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.nn.Linear(2, 2).cuda().weight.device == cpu.CPU
    assert not torch.cuda.is_available()
    assert torch.ones(2).type() == "torch.FloatTensor"
    assert before == [getattr(owner, name) for owner, name, _ in cpu.redirections()]


@without_cuda
def test_the_runtime_is_undone_after_a_failure_too():
    with pytest.raises(ZeroDivisionError), cpu.runtime():
        _ = 1 / 0
    assert not torch.cuda.is_available()


def test_a_stand_in_is_gone_after_the_import_and_refuses_to_be_built():
    with pytest.raises(ImportError):
        importlib.import_module("nvidia_resiliency_ext")
    from megatron.bridge.training.pretrain import CallWrapper

    with pytest.raises(ImportError, match="needs the package `nvidia_resiliency_ext`"):
        CallWrapper()


def test_transformer_engine_is_given_the_cudnn_of_torch(monkeypatch):
    monkeypatch.delenv("CUDNN_HOME", raising=False)
    monkeypatch.delenv("CUDNN_PATH", raising=False)
    stand_ins._let_transformer_engine_use_the_cudnn_of_torch()
    assert list(Path(os.environ["CUDNN_PATH"]).glob("lib/libcudnn.so*"))
    monkeypatch.setenv("CUDNN_PATH", "/mine")
    stand_ins._let_transformer_engine_use_the_cudnn_of_torch()
    assert os.environ["CUDNN_PATH"] == "/mine"


def test_a_hidden_package_cannot_be_imported_and_is_the_same_afterwards():
    import xml.dom.minidom as before

    with stand_ins.hidden_packages(["xml"]):
        for name in ("xml", "xml.dom.minidom"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
    assert importlib.import_module("xml.dom.minidom") is before


@pytest.mark.parametrize(("version", "hidden"), [("0.4.1", ("nvidia_resiliency_ext",)), ("0.6.0", ()), ("0.10.0", ())])
def test_a_resiliency_extension_that_megatron_refuses_counts_as_missing(
    version: str, hidden: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / f"nvidia_resiliency_ext-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stand_ins._too_old() == hidden


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("transformer_engine", "megatron.bridge.peft.lora_layers"),
        ("nvidia_resiliency_ext", "megatron.bridge.training.pretrain"),
    ],
)
def test_megatron_bridge_still_imports_optional_packages_unconditionally(package: str, module: str):
    """When this fails for both, `import_megatron_bridge` can be removed."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    unconditional = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.parse(Path(spec.origin).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert any(name.partition(".")[0] == package for name in unconditional)


def test_results_come_in_the_order_of_the_ranks():
    assert cpu.run_ranks(3, rank_and_size) == [(0, 3), (1, 3), (2, 3)]


def test_an_exception_of_a_rank_is_raised_in_the_caller():
    with pytest.raises(ZeroDivisionError, match="only rank 0 works") as failure:
        cpu.run_ranks(2, only_the_first_works)
    (note,) = failure.value.__notes__
    assert note.startswith("On rank 1 of 2:\nTraceback")


def test_concurrent_calls_do_not_interfere():
    expected = [[2 * number] * 2 for number in range(5)]
    assert cpu.run_ranks(3, sums_of_pairs, range(5), timeout=120) == [expected] * 3


def test_a_process_group_may_be_made_again_by_the_same_ranks():
    assert cpu.run_ranks(2, sums_of, range(10), timeout=60) == [[2 * number for number in range(10)]] * 2


def test_a_rank_that_dies_is_named():
    with pytest.raises(RuntimeError, match="Rank 0 of 1 ended with exit code 7"):
        cpu.run_ranks(1, dies)


def test_a_rank_that_exits_with_status_zero_is_no_failure():
    assert cpu.run_ranks(1, sys.exit, 0) == [None]
    assert cpu.run_ranks(1, sys.exit) == [None]
    with pytest.raises(RuntimeError, match=r"The rank called sys\.exit\(3\)"):
        cpu.run_ranks(1, sys.exit, 3)


def test_a_process_with_a_cuda_device_forks_no_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "cuda_is_real", lambda: True)
    with pytest.raises(RuntimeError, match="set CUDA_VISIBLE_DEVICES='' before torch is imported"):
        cpu.run_ranks(1, rank_and_size)


def test_a_rank_that_hangs_is_given_up():
    with pytest.raises(RuntimeError, match=r"Ranks \[0\] of 1 did not finish"):
        cpu.run_ranks(1, hangs, timeout=0.5)


def test_a_rank_can_train_after_its_parent_has_compiled_and_trained():
    """Needs the backward pass of tests/conftest.py before any test; see there."""
    with FakeTensorMode():
        torch.ones(2)
    one_backward_pass()
    cpu.run_ranks(1, one_backward_pass)


def test_workers_of_a_rank_do_not_outlive_it(tmp_path: Path):
    with pytest.raises(RuntimeError, match="did not finish"):
        cpu.run_ranks(1, starts_a_worker_and_hangs, tmp_path / "pid", timeout=3)
    pid = (tmp_path / "pid").read_text()
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "zombie" in status.read_text()


def one_backward_pass() -> None:
    torch.ones((), requires_grad=True).backward()


def starts_a_worker_and_hangs(file: Path) -> None:
    import subprocess

    worker = subprocess.Popen(["sleep", "60"])
    file.write_text(str(worker.pid))
    worker.wait()


def rank_and_size() -> tuple[int, int]:
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def sums_of_pairs(numbers: range) -> list[list[int]]:
    return [cpu.run_ranks(2, sum_of, number, timeout=60) for number in numbers]


def sums_of(numbers: range) -> list[int]:
    sums = []
    for number in numbers:
        sums.append(sum_of(number))
        torch.distributed.destroy_process_group()
    return sums


def sum_of(number: int) -> int:
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(number)
    torch.distributed.all_reduce(total)
    return int(total)


def only_the_first_works() -> None:
    import os

    if os.environ["RANK"] != "0":
        raise ZeroDivisionError("only rank 0 works")


def dies() -> None:
    import os

    os._exit(7)


def hangs() -> None:
    import time

    time.sleep(60)


# --- work-arounds: each still needed ------------------------------------------------------------------------------


@pytest.mark.upstream
@without_cuda
def test_megatron_cores_own_sink_still_needs_a_cuda_device():
    """When this fails, `SinkAttention` is no longer needed for the CPU, only for speed."""
    source = importlib.import_module("inspect").getsource(
        importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention.__init__
    )
    assert "device=torch.cuda.current_device()" in source


@pytest.mark.upstream
def test_megatron_cores_torch_norm_still_refuses_sequence_parallelism():
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from gpt_oss_vision.bridge.mcore.provider import provider_from_config
    from tiny import tiny_config

    config = provider_from_config(tiny_config(), sequence_parallel=True)
    config.persist_layer_norm = False
    with pytest.raises(AssertionError, match="sequence parallel not supported"):
        WrappedTorchNorm(config, 8)


@pytest.mark.upstream
def test_megatron_core_still_comes_without_the_makefile_of_its_helper():
    assert not upstream._helpers_can_be_compiled()


@pytest.mark.upstream
@without_cuda
def test_gloo_still_gathers_equal_pieces_only():
    with pytest.raises(RuntimeError, match="invalid tensor size"):
        cpu.run_ranks(2, gather_unequal_pieces)


def gather_unequal_pieces() -> None:
    torch.distributed.init_process_group("gloo")
    pieces = [torch.zeros(1), torch.zeros(2)]
    original_of(torch.distributed.all_gather)(pieces, torch.ones(1 + torch.distributed.get_rank()))


def original_of(wrapped):
    """The function that a redirection of `cpu.runtime` replaces."""
    return next(cell.cell_contents for cell in wrapped.__closure__ if callable(cell.cell_contents))


@without_cuda
def test_unequal_pieces_are_gathered_and_scattered():
    expected = [(0, [1.0, 2.0, 2.0], [1.0]), (1, [1.0, 2.0, 2.0], [3.0, 3.0])]
    assert cpu.run_ranks(2, exchange_unequal_pieces) == expected


def exchange_unequal_pieces() -> tuple[int, list[float], list[float]]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    pieces = [torch.zeros(1), torch.zeros(2)]
    torch.distributed.all_gather(pieces, torch.full((1 + rank,), 1.0 + rank))
    mine = torch.zeros(1 + rank)
    torch.distributed.reduce_scatter(mine, [torch.full((1,), 0.5), torch.full((2,), 1.0 + rank)])
    return rank, torch.cat(pieces).tolist(), mine.tolist()


@pytest.mark.upstream
@without_cuda
def test_gloo_still_needs_split_sizes_as_ints():
    with pytest.raises(TypeError):
        cpu.run_ranks(1, all_to_all_with_tensors)


def all_to_all_with_tensors() -> None:
    torch.distributed.init_process_group("gloo")
    sizes = torch.tensor([2])
    original_of(torch.distributed.all_to_all_single)(torch.empty(2), torch.ones(2), sizes, sizes)


@pytest.mark.upstream
def test_megatron_core_still_refuses_biased_experts_with_expert_tensor_parallelism():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gpt_oss_vision.bridge.mcore.provider import provider_from_config
    from tiny import tiny_config

    config = provider_from_config(tiny_config(), expert_tensor_parallel_size=2, ffn_hidden_size=48)
    with cpu.runtime(), pytest.raises(AssertionError, match="Bias in Moe is only supported when ETP==1"):
        TransformerConfig.__post_init__(config)


def test_private_names_of_upstream_are_where_we_touch_them():
    import inspect

    from megatron.bridge.models import model_provider
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    assert hasattr(upstream.bridge_initialize, "compile_helpers")
    assert hasattr(MegatronModelBridge, "_megatron_global_param_names_all_pp_ranks")
    assert upstream.KEEP_IN_FP32 in inspect.getsource(model_provider)
