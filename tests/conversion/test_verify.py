"""Comparing two checkpoints: nothing that differs is missed, and what may differ is held to its bound."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt_oss_vision
from checkpoints import OBLONG, SQUARE, change, save_tiny
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.verify import agreement, verify


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` in bf16, `megatron` made from it, and `packed` made from that."""
    folder = tmp_path_factory.mktemp("pair")
    save_tiny(folder / "hf", **OBLONG, dtype=torch.bfloat16)
    import_checkpoint(folder / "hf", folder / "megatron")
    export_checkpoint(folder / "megatron", folder / "packed", dtype="mxfp4")
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "MXFP4"])
def test_what_was_imported_agrees(packed: bool, tmp_path: Path):
    save_tiny(tmp_path / "hf", **SQUARE, dtype=torch.bfloat16, packed=packed)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    report = verify(tmp_path / "hf", tmp_path / "megatron")
    assert report["agrees"] and not report["worst"]
    assert not any("different" in entry for entry in report["tensors"].values())


TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.bias",
    "model.layers.2.self_attn.o_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj_bias",
    "model.layers.3.mlp.router.vision_bias",
    "model.vision_adapter.proj.weight",
)


@pytest.mark.parametrize("name", TENSORS)
def test_one_flipped_bit_is_found(name: str, pair: Path, tmp_path: Path):
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1).view(torch.uint8)[-2] ^= 1

    save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16)
    report = verify(change(tmp_path / "hf", flip), pair / "megatron")
    off = {key: entry for key, entry in report["tensors"].items() if not entry["agrees"]}
    assert not report["agrees"] and len(off) == 1
    ((key, entry),) = off.items()
    assert name in entry["hf"] and entry["different"] == 1 and entry["largest_difference"] > 0
    assert key in report["worst"]


def test_mxfp4_of_other_numbers_is_within_its_bound(pair: Path):
    report = verify(pair / "packed", pair / "megatron")
    assert report["agrees"]
    packed = [entry for entry in report["tensors"].values() if "share_of_bound" in entry]
    assert len(packed) == 4 * 4 * 2
    assert all(0 < entry["share_of_bound"] <= 1 and entry["different"] for entry in packed)


def test_it_says_how_far_two_checkpoints_agree(pair: Path):
    exact, packed = verify(pair / "hf", pair / "megatron"), verify(pair / "packed", pair / "megatron")
    count = len(exact["tensors"])
    assert agreement(exact) == f"{count} tensors bit for bit"
    assert agreement(packed) == f"{count - 32} tensors bit for bit, 32 within the bound of MXFP4"
    assert agreement(exact | {"logits": {"largest_difference": 1.23e-6}}).endswith(", logits to 1.2e-06")


def test_mxfp4_beyond_its_bound_is_found(pair: Path, tmp_path: Path):
    def scale_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] += 1

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16, packed=True), scale_up)
    report = verify(hf, pair / "megatron")
    assert [key for key, entry in report["tensors"].items() if not entry["agrees"]] == [
        "decoder.layers.1.mlp.experts.linear_fc2.weight2"
    ]


def test_a_scale_does_not_widen_its_own_bound(pair: Path, tmp_path: Path):
    """All numbers zero, under a scale so large that zero would be within the rounding of anything packed by it."""

    def erase(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_blocks"].zero_()
        tensors["model.layers.1.mlp.experts.down_proj_scales"].fill_(131)

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16, packed=True), erase)
    report = verify(hf, pair / "megatron")
    assert not report["agrees"]
    assert [key for key, entry in report["tensors"].items() if not entry["agrees"]] == [
        f"decoder.layers.1.mlp.experts.linear_fc2.weight{expert}" for expert in range(4)
    ]


def test_a_wider_type_is_rounded_and_that_is_reported(pair: Path, tmp_path: Path):
    save_tiny(tmp_path / "hf", **OBLONG)
    report = verify(tmp_path / "hf", pair / "megatron")
    assert report["agrees"]
    assert report["tensors"]["embedding.word_embeddings.weight"]["rounded"] > 0


def test_another_shape_is_refused(pair: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"tensors of another shape: .*linear_fc1"):
        verify(save_tiny(tmp_path / "hf", **SQUARE), pair / "megatron")


def test_the_logits_of_equal_checkpoints_agree(pair: Path):
    report = verify(pair / "hf", pair / "megatron", logits=True)
    assert report["agrees"] and report["logits"]["agrees"]
    assert report["logits"]["largest_difference"] < 1e-5 * report["logits"]["largest_logit"]


def test_the_command_exits_with_1_and_names_the_worst(pair: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 4] += 100

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16), spoil)
    words = ["--hf", str(hf), "--megatron", str(pair / "megatron"), "--report", str(tmp_path / "report.json")]
    command = [sys.executable, "-m", "gpt_oss_vision.cli", "convert", "verify", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "tensors differ; output_layer.weight the most: 1 of " in done.stderr
    assert not json.loads((tmp_path / "report.json").read_text())["agrees"]
