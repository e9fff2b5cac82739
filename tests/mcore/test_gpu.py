"""One rank in bf16 against transformers in bf16: on a CPU, and on a GPU with each back end (`just test-gpu`)."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge import hf, mcore
from gpt_oss_vision.bridge.mcore import cpu
from tiny import tiny_batch, tiny_config, tiny_model

# Heads have gpt-oss's size, for which the fused kernels are made.
CONFIG = tiny_config(head_dim=64, hidden_size=128, intermediate_size=192)
needs_engine = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="Transformer Engine is not installed")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf.register_auto_classes()
    mcore.register()
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model(CONFIG)
    # The tiny model's experts reach their clamps, so rounding changes the routing: the cosine between transformers'
    # own bf16 and fp32 logits is then 0.998. With smaller weights the experts behave like trained ones.
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data *= 0.3
    model.bfloat16().save_pretrained(folder)
    return folder


def both_logits(path: Path, backend: str, device: str, communication: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one batch, ``[b, s, vocab]`` each: transformers' (eager) and Megatron's."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    from gpt_oss_vision import GPTOSSVisionForCausalLM

    batch = {name: tensor.to(device) for name, tensor in tiny_batch(CONFIG, (0, 1, 2), length=64).items()}
    theirs = GPTOSSVisionForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    with torch.no_grad(), temporary_distributed_context(backend=communication):
        provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
        provider.backend = backend
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        model.eval()
        ours = model(batch["input_ids"], None, None, pixel_values=batch["pixel_values"])
        return theirs(**batch).logits.float().cpu(), ours.float().cpu()


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


def test_in_bf16_on_a_cpu_the_logits_are_those_of_transformers(path: Path):
    ((theirs, ours),) = cpu.run_ranks(1, both_logits, path, "torch", "cpu", "gloo")
    assert cosine(theirs, ours) >= 0.9999


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", pytest.param("transformer_engine", marks=needs_engine)])
def test_in_bf16_on_a_gpu_the_logits_are_those_of_transformers(backend: str, path: Path):
    theirs, ours = both_logits(path, backend, "cuda", "nccl")
    assert cosine(theirs, ours) >= 0.9999


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", pytest.param("transformer_engine", marks=needs_engine)])
def test_a_training_step_on_a_gpu_has_a_finite_gradient_for_every_parameter(backend: str, path: Path):
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    batch = {name: tensor.cuda() for name, tensor in tiny_batch(CONFIG, (0, 1, 2), length=64).items()}
    with temporary_distributed_context(backend="nccl"):
        provider = AutoBridge.from_hf_pretrained(path).to_megatron_provider()
        provider.backend = backend
        provider.gradient_accumulation_fusion = False
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        loss = model(batch["input_ids"], None, None, labels=batch["input_ids"], pixel_values=batch["pixel_values"])
        loss.mean().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
