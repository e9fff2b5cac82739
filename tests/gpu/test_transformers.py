"""The transformers model on a GPU: generation with padding as on a CPU, attention kernels, `device_map`."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpu.cases import generate
from gpu.conftest import Reference
from gpu.ranks import has_cuda, on_ranks
from layouts import Microbatch

DEVICE = "cuda" if has_cuda() else "cpu"


def on_the_device(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (found,) = on_ranks(1, generate, *args)
    return found


@pytest.fixture(scope="module")
def padded(reference: Reference) -> Microbatch:
    """Rows with images, the first padded on the left."""
    batch = {name: reference.steps[0][0][name] for name in ("input_ids", "pixel_values")}
    mask = torch.ones_like(batch["input_ids"])
    ids = F.pad(batch["input_ids"][:1], (30, 0), value=reference.config.pad_token_id)[:, : mask.shape[1]]
    mask[0, :30] = 0
    return batch | {"input_ids": torch.cat([ids, batch["input_ids"][1:]]), "attention_mask": mask}


@pytest.mark.parametrize("attention", ["eager", "sink_sdpa"])
def test_in_fp32_a_padded_batch_generates_what_it_does_on_a_cpu(attention: str, padded, reference: Reference):
    expected, logits = generate(reference.path, padded, "cpu", torch.float32, "eager")
    tokens, found = on_the_device(reference.path, padded, DEVICE, torch.float32, attention)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sink_sdpa"])
def test_in_bf16_logits_are_as_near_to_fp32_as_on_a_cpu(attention: str, padded, reference: Reference):
    _, expected = generate(reference.path, padded, "cpu", torch.float32, "eager")
    _, theirs = generate(reference.path, padded, "cpu", torch.bfloat16, "eager")
    _, found = on_the_device(reference.path, padded, DEVICE, torch.bfloat16, attention)
    assert (found - expected).norm() < 2 * (theirs - expected).norm() + 0.01 * expected.norm()
