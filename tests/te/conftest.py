"""Transformer Engine on a CPU: its modules are built, its kernels are not called. `just test-te` installs it."""

import os
import warnings
from collections.abc import Iterator

import pytest

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # as Megatron's users set it; Transformer Engine warns without it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # First: without a CUDA device, `import_megatron_bridge` would hide Transformer Engine from Megatron.
    import megatron.core  # noqa: F401

from gpt_oss_vision.bridge.mcore import backend, provider
from mcore.conftest import path  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def engine_runs() -> Iterator[None]:
    """Let the back end `transformer_engine` be chosen without a CUDA device."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (backend, provider):
            patch.setattr(module, "transformer_engine_problem", lambda size: None)
        yield
