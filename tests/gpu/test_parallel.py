"""Two ranks against transformers; on one GPU they communicate through host memory."""

from dataclasses import replace

import pytest

from gpu.cases import initial_means
from gpu.conftest import Reference
from gpu.ranks import has_cuda, on_ranks
from gpu.test_model import HALF, check_bf16, check_fp32, run
from layouts import Layout, Run

LAYOUTS = [Layout(tp=2), Layout(ep=2), Layout(pp=2), Layout(cp=2), Layout(dp=2), Layout(tp=2, ep=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_ranks_compute_what_one_does(layout: Layout, backend: str, reference: Reference):
    if layout.dp > 1 or layout.ep > layout.tp:
        reference = doubled(reference)
    if backend == "torch" or layout.cp == 1:  # Transformer Engine has context parallelism in half precision only
        check_fp32(run(layout, reference, backend, steps=2), reference.fp32)
    if has_cuda():
        check_bf16(run(layout, reference, backend, **HALF), reference)


def doubled(reference: Reference) -> Reference:
    """Each microbatch twice, one for each of two data-parallel ranks: the same mean loss and gradients."""

    def twice(run: Run) -> Run:
        return replace(run, logits=[out for out in run.logits for _ in range(2)])

    steps = [[batch for batch in microbatches for _ in range(2)] for microbatches in reference.steps]
    return replace(reference, steps=steps, fp32=twice(reference.fp32), bf16=twice(reference.bf16))


def test_ranks_start_with_different_experts(backend: str, reference: Reference):
    first, second = on_ranks(2, initial_means, Layout(ep=2, extra={"backend": backend}), reference.path)
    experts = [name for name in first if ".experts." in name and ".weight" in name]
    assert experts
    assert all(first[name] != second[name] for name in experts)
    assert all(first[name] == second[name] for name in first if ".experts." not in name)
