"""Packed samples on a GPU, as in tests/mcore/test_packing.py on a CPU."""

import pytest

from gpu.conftest import Reference
from gpu.ranks import has_cuda, on_ranks
from gpu.test_model import HALF
from layouts import Layout
from mcore.test_packing import compare


@pytest.mark.skipif(not has_cuda(), reason="tests/mcore/test_packing.py is this test on a CPU")
def test_packed_samples_do_not_attend_to_each_other(backend: str, reference: Reference):
    if backend == "torch":
        on_ranks(1, compare, reference.path, Layout(extra={"backend": backend}), 1e-3)
    on_ranks(1, compare, reference.path, Layout(extra={"backend": backend} | HALF), 0.2)
