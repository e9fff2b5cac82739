"""Fields that a source reads from its config, and from its tensors if the config lacks them."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from checkpoints import OBLONG, edit_config, save_tiny
from gpt_oss_vision.conversion.formats.hf_config import read_config
from gpt_oss_vision.conversion.formats.hf_source import open_source

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "MXFP4"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_without_a_dtype_in_the_config_the_most_common_stored_one_is_used(
    dtype: torch.dtype, packed: bool, tmp_path: Path
):
    """The vision biases are in fp32 in every case."""
    folder = save_tiny(tmp_path, **OBLONG, dtype=dtype, packed=packed)
    assert open_source(edit_config(folder, lambda fields: fields.pop("dtype"))).dtype == dtype
    assert open_source(edit_config(folder, dtype=None)).dtype == dtype


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("spelled", ["float16", "torch.float16"])
def test_a_dtype_counts_in_every_spelling(field: str, spelled: str, tmp_path: Path):
    def spell(fields: dict) -> None:
        fields.pop("dtype")
        fields[field] = spelled

    assert open_source(edit_config(save_tiny(tmp_path, **OBLONG), spell)).dtype == torch.float16


@pytest.mark.parametrize(("model_type", "use_vision"), [("gpt_oss_vision", True), ("gpt_oss", False)])
def test_the_model_type_of_a_config_decides_whether_it_has_vision(model_type: str, use_vision: bool, tmp_path: Path):
    edit_config(save_tiny(tmp_path, **OBLONG), model_type=model_type)
    assert read_config(tmp_path).use_vision is use_vision


def test_a_config_of_another_architecture_is_refused(tmp_path: Path):
    edit_config(save_tiny(tmp_path, **OBLONG), model_type="llama")
    with pytest.raises(ValueError, match="is a checkpoint of 'llama', not of 'gpt_oss_vision' or 'gpt_oss'"):
        read_config(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_missing():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to other users
        file = save_tiny(Path(folder), **OBLONG) / "model.safetensors"
        Path(folder).chmod(0o755)
        file.chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read everything
        try:
            with pytest.raises(PermissionError) as failure:
                open_source(Path(folder))
        finally:
            os.seteuid(user)
    assert failure.value.filename == str(file)
