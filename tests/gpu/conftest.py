"""What a GPU is to show, and on CPUs with shorter rows: `pytest tests/gpu` uses forked ranks, with `--cuda` the GPU.

On a CPU there is only the back end `torch`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge import hf, mcore
from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpu.ranks import end_pools, has_cuda
from layouts import Microbatch, Run, reference_run, with_labels
from tiny import tiny_batch, tiny_config, tiny_model

# Rows are longer than the window, and divisible by twice the context-parallel ranks.
LENGTH, WINDOW = (320, 128) if has_cuda() else (48, 16)
# Heads have gpt-oss's size, for which the fused kernels are made; other sizes are multiples of 16, which FP8 needs.
CONFIG = tiny_config(
    head_dim=64,
    hidden_size=128,
    intermediate_size=192,
    num_local_experts=8,
    num_experts_per_tok=4,
    sliding_window=WINDOW,
    max_position_embeddings=512,
)
IMAGES = [(0, 1), (0, 0), (2, 0)]  # per row of the microbatches of a step
STEPS = 3


@dataclass(frozen=True)
class Reference:
    """A checkpoint in fp32, microbatches, and what transformers computes from them on a CPU."""

    path: Path
    config: GPTOSSVisionConfig
    steps: list[list[Microbatch]]
    fp32: Run
    bf16: Run


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """`CONFIG`'s model, `STEPS` steps by transformers in fp32, and one in bf16."""
    hf.register_auto_classes()
    mcore.register()
    path = tmp_path_factory.mktemp("reference")
    tiny_model(CONFIG).save_pretrained(path)
    steps = [
        [
            with_labels(tiny_batch(CONFIG, images, LENGTH, seed=10 * step + place), CONFIG.image_token_id)
            for place, images in enumerate(IMAGES)
        ]
        for step in range(STEPS)
    ]
    half = tiny_model(CONFIG).to(torch.bfloat16)
    bf16 = reference_run(half, [[_half(batch) for batch in steps[0]]])
    return Reference(path, CONFIG, steps, reference_run(tiny_model(CONFIG), steps), bf16)


def _half(batch: Microbatch) -> Microbatch:
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.fixture(params=["torch", "transformer_engine"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "transformer_engine" and not has_cuda():
        pytest.skip("Transformer Engine's kernels need a CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact fp32 on a GPU, where cuBLAS may take TF32; several ranks communicate alike on a CPU and on a GPU."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("RANKS_SHARE_A_GPU", "1")


@pytest.fixture(autouse=True, scope="session")
def ranks() -> Iterator[None]:
    """End the ranks that are kept."""
    yield
    end_pools()
