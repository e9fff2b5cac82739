"""The tiny model's checkpoint, for the tests that build it in Megatron."""

from pathlib import Path

import pytest

from tiny import tiny_config, tiny_model


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny_model()` in Hugging Face format; its classes are registered with AutoBridge."""
    from gpt_oss_vision.bridge import hf, mcore

    hf.register_auto_classes()
    mcore.register()
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(tiny_config()).save_pretrained(folder)
    return folder
