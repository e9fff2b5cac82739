"""Router, merge of images, and visual mask never wait for the GPU; forked ranks are refused where there is one."""

import pytest

from gpu.cases import forked_ranks, steps_without_waiting
from gpu.conftest import Reference
from gpu.ranks import has_cuda, on_ranks
from gpu.test_model import HALF
from layouts import Layout


def test_parts_of_the_model_never_wait_for_the_gpu(backend: str, reference: Reference):
    layout = Layout(extra={"backend": backend} | HALF)
    (ran,) = on_ranks(1, steps_without_waiting, reference.path, layout, reference.steps[0][0])
    assert ran == ["mask", "merge", "router", "backward"]


@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")
def test_forked_ranks_are_refused_on_a_gpu():
    assert on_ranks(1, forked_ranks) == [
        "Forked ranks run on the CPU: set CUDA_VISIBLE_DEVICES='' before torch is imported."
    ]
