"""Router, merge of images, and visual mask never wait for the GPU; forked ranks are refused where there is one."""

from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge.mcore import cpu
from gpu.conftest import Reference
from gpu.ranks import has_cuda, on_ranks
from gpu.test_model import HALF
from layouts import Layout, Microbatch, build, on_device, start_communication


def steps_without_waiting(path: Path, layout: Layout, batch: Microbatch) -> list[str]:
    """Run the model once, then its parts with an error for each synchronization; the names of the parts that ran."""
    from megatron.bridge import AutoBridge
    from megatron.core.utils import unwrap_model

    start_communication()
    (wrapped,) = build(AutoBridge.from_hf_pretrained(path), layout)
    batch = on_device(batch)
    wrapped(batch["input_ids"], None, None, labels=batch["labels"], pixel_values=batch["pixel_values"])
    model = unwrap_model(wrapped)
    pixels, ran = batch["pixel_values"].to(model.embedding.word_embeddings.weight.dtype), []
    torch.cuda.synchronize()
    if cpu.cuda_is_real():
        torch.cuda.set_sync_debug_mode("error")
    try:
        is_visual = model.visual_mask(batch["input_ids"])
        ran.append("mask")
        hidden = model.embed(batch["input_ids"], None, is_visual, pixels)
        ran.append("merge")
        weights, _ = model.decoder.layers[0].mlp.router(hidden, padding_mask=is_visual.mT.contiguous())
        ran.append("router")
        (hidden.sum() + weights.sum()).backward()
        ran.append("backward")
    finally:
        if cpu.cuda_is_real():
            torch.cuda.set_sync_debug_mode("default")
    return ran


def test_parts_of_the_model_never_wait_for_the_gpu(backend: str, reference: Reference):
    layout = Layout(extra={"backend": backend} | HALF)
    (ran,) = on_ranks(1, steps_without_waiting, reference.path, layout, reference.steps[0][0])
    assert ran == ["mask", "merge", "router", "backward"]


def forked_ranks() -> str:
    with pytest.raises(RuntimeError) as caught:
        cpu.run_ranks(1, print)
    return str(caught.value)


@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_forked_ranks_are_refused_on_a_gpu():
    assert on_ranks(1, forked_ranks) == [
        "Forked ranks run on the CPU: set CUDA_VISIBLE_DEVICES='' before torch is imported."
    ]
