"""Comparing two checkpoints: every difference is found, and permitted differences are within their bounds."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gpt_oss_vision
from checkpoints import OBLONG, SQUARE, change, edit_config, save_pair, save_tiny
from gpt_oss_vision import cli
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.verify import agreement, verify


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` in bf16, `megatron` made from it, and `packed` made from that."""
    folder = save_pair(tmp_path_factory.mktemp("pair"), **OBLONG, dtype=torch.bfloat16)
    export_checkpoint(folder / "megatron", folder / "packed", dtype="mxfp4")
    return folder


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "MXFP4"])
def test_what_was_imported_agrees(packed: bool, tmp_path: Path):
    save_pair(tmp_path, **SQUARE, dtype=torch.bfloat16, packed=packed)
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


def test_the_agreement_of_two_checkpoints_is_described(pair: Path):
    exact, packed = verify(pair / "hf", pair / "megatron"), verify(pair / "packed", pair / "megatron")
    count = len(exact["tensors"])
    assert agreement(exact) == f"{count} tensors bit for bit"
    assert agreement(packed) == f"{count - 32} tensors bit for bit, 32 within the rounding error of MXFP4"
    logits = {"largest_difference": 1.23e-6, "largest_logit": 4.0, "agrees": True}
    assert agreement(exact | {"logits": logits}).endswith(", logits to 1.2e-06")


def test_mxfp4_beyond_its_bound_is_found(pair: Path, tmp_path: Path):
    def scale_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] += 1

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16, packed=True), scale_up)
    report = verify(hf, pair / "megatron")
    assert [key for key, entry in report["tensors"].items() if not entry["agrees"]] == [
        "decoder.layers.1.mlp.experts.linear_fc2.weight2"
    ]


def test_a_scale_does_not_widen_its_own_bound(pair: Path, tmp_path: Path):
    """All values are zero, with a scale so large that zero is within its rounding error of every original value."""

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


def test_q_k_and_v_are_compared_each_in_its_own_type(tmp_path: Path):
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    def change_k(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][:3, 0] *= 1.001

    hf = change(save_tiny(tmp_path / "hf", **OBLONG), mix)
    import_checkpoint(hf, tmp_path / "megatron", dtype="fp32")
    report = verify(hf, tmp_path / "megatron")
    assert agreement(report) == f"{len(report['tensors'])} tensors bit for bit"
    report = verify(change(hf, change_k), tmp_path / "megatron")
    assert "linear_qkv.weight the most: 3 of " in report["worst"]


def export_bf16(folder: Path) -> None:
    """Import fp16 as `megatron`, and export that to `hf` in bf16."""
    save_tiny(folder / "start", **OBLONG, dtype=torch.float16)
    import_checkpoint(folder / "start", folder / "megatron")
    export_checkpoint(folder / "megatron", folder / "hf", dtype="bf16")


def import_as(source: torch.dtype, dtype: str, **choices: bool) -> Callable[[Path], None]:
    """A function that saves `hf` in the dtype `source` and imports it in `dtype`."""

    def run(folder: Path) -> None:
        save_tiny(folder / "hf", **OBLONG, dtype=source, **choices)
        import_checkpoint(folder / "hf", folder / "megatron", dtype=dtype)

    return run


@pytest.mark.parametrize(
    "convert",
    [import_as(torch.float16, "bf16"), import_as(torch.bfloat16, "fp16"), export_bf16],
    ids=["fp16 to bf16", "bf16 to fp16", "export of fp16 as bf16"],
)
def test_fp16_and_bf16_agree_after_rounding_and_a_changed_number_is_found(
    convert: Callable[[Path], None], tmp_path: Path
):
    names = ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.experts.down_proj", "lm_head.weight"]

    def change_some(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors[name].view(-1)[0] = tensors[name].float().view(-1)[0] * 1.02

    convert(tmp_path)
    report = verify(tmp_path / "hf", tmp_path / "megatron")
    assert report["agrees"], report["worst"]
    assert "after rounding to the narrower type" in agreement(report)
    assert report["tensors"]["output_layer.weight"]["rounded"] > 0
    report = verify(change(tmp_path / "hf", change_some), tmp_path / "megatron")
    off = [entry for entry in report["tensors"].values() if not entry["agrees"]]
    assert len(off) == 3 and all(entry["different"] == 1 for entry in off)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("scale", [60, 150, 255])
def test_mxfp4_that_the_number_type_cannot_hold_agrees_with_its_import(dtype: str, scale: int, tmp_path: Path):
    def rescale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.gate_up_proj_scales"][2].fill_(scale)

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16, packed=True), rescale)
    import_checkpoint(hf, tmp_path / "megatron", dtype=dtype)
    report = verify(hf, tmp_path / "megatron")
    assert report["agrees"], report["worst"]
    entry = report["tensors"]["decoder.layers.1.mlp.experts.linear_fc1.weight2"]
    assert ("rounded" in entry) == (dtype == "fp16")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.0, -0.0, "1 of 4096 values, in their bits, not their values (others: none)"),
        (1.0, torch.nan, "1 of 4096 values, with NaN or infinity (others: none)"),
        (torch.inf, 1.0, "1 of 4096 values, with NaN or infinity (others: none)"),
        (torch.inf, -torch.inf, "1 of 4096 values, with NaN or infinity (others: none)"),
        (-torch.nan, -torch.nan, ""),
        (1.0, 1.5, "1 of 4096 values, by up to 0.5 (others: none)"),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_special_values_are_described_in_words_and_valid_json(
    before: float, after: float, said: str, dtype: str, tmp_path: Path
):
    def put(number: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = number

        return edit

    hf = change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16), put(before))
    import_checkpoint(hf, tmp_path / "megatron", dtype=dtype)
    report = verify(change(hf, put(after)), tmp_path / "megatron", report=tmp_path / "report.json")
    assert report["worst"].endswith(said) and report["agrees"] == (not said)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report, allow_nan=False))
    assert not any("rounded" in entry for entry in report["tensors"].values())


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_number_that_cannot_be_packed_is_beyond_every_bound(number: float, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.experts.down_proj"][2, 5, 1] = number

    hf = save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16)
    save_tiny(tmp_path / "packed", **OBLONG, dtype=torch.bfloat16, packed=True)
    import_checkpoint(change(hf, spoil), tmp_path / "megatron")
    report = verify(tmp_path / "packed", tmp_path / "megatron")
    assert "linear_fc2.weight2 the most" in report["worst"] and "with NaN or infinity" in report["worst"]
    assert report["tensors"]["decoder.layers.1.mlp.experts.linear_fc2.weight2"]["share_of_bound"] is None
    json.dumps(report, allow_nan=False)


def test_another_shape_is_refused(pair: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"tensors of another shape or type: .*linear_fc1"):
        verify(save_tiny(tmp_path / "hf", **SQUARE), pair / "megatron")


def test_the_logits_of_equal_checkpoints_agree(pair: Path):
    report = verify(pair / "hf", pair / "megatron", logits=True)
    assert report["agrees"] and report["logits"]["agrees"]
    assert report["logits"]["largest_difference"] < 1e-5 * report["logits"]["largest_logit"]


def test_logits_after_packing_are_reported_and_not_judged(pair: Path):
    report = verify(pair / "packed", pair / "megatron", logits=True)
    assert report["agrees"] and report["logits"]["agrees"] is None
    assert re.search(r", logits differ by up to \S+ of \S+ after packing \(not judged\)$", agreement(report))


# --- without vision ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `seeing`, a Megatron checkpoint with vision, its text part as `hf`, and the import of `hf`."""
    folder = tmp_path_factory.mktemp("text")
    save_tiny(folder / "start", **OBLONG, dtype=torch.bfloat16, use_nope=False)
    import_checkpoint(folder / "start", folder / "seeing")
    export_checkpoint(folder / "seeing", folder / "hf", text_only=True)
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder


def test_an_import_of_a_stock_gpt_oss_agrees(text: Path):
    report = verify(text / "hf", text / "megatron")
    assert report["agrees"] and not report["left_out"]
    assert agreement(report) == f"{len(report['tensors'])} tensors bit for bit"
    assert report["tensors"]["decoder.layers.0.mlp.router.vision_bias"]["hf"] == []


def test_a_stock_gpt_oss_is_compared_with_the_text_part_of_a_model_with_vision(text: Path):
    report = verify(text / "hf", text / "seeing", logits=True)
    assert report["agrees"] and report["logits"]["agrees"], report
    assert {"decoder.layers.mlp.router.vision_bias", "vision_adapter.proj.weight"} <= {*report["left_out"]}
    assert not any("vision" in name for name in report["tensors"])
    count = len(report["left_out"])
    assert f" tensors bit for bit, {count} vision tensors of Megatron's not compared, logits to " in agreement(report)


def test_the_logits_of_a_packed_text_part_agree_with_its_import(text: Path, tmp_path: Path):
    export_checkpoint(text / "seeing", tmp_path / "hf", dtype="mxfp4", text_only=True)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    report = verify(tmp_path / "hf", tmp_path / "megatron", logits=True)
    assert report["agrees"] and report["logits"]["agrees"], report["logits"]
    assert verify(tmp_path / "hf", text / "seeing")["agrees"]


def test_the_text_part_must_agree_in_values_and_config(text: Path, tmp_path: Path):
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 4] += 1

    hf = change(shutil.copytree(text / "hf", tmp_path / "hf"), flip)
    assert "output_layer.weight the most: 1 of " in verify(hf, text / "seeing")["worst"]
    edit_config(hf, lambda fields: fields["rope_parameters"].update(rope_theta=7.0))
    with pytest.raises(ValueError, match=r"rope_parameters with rope_theta=7\.0 and rope_scaling with 150000\.0; "):
        verify(hf, text / "seeing")
    edit_config(hf, rope_theta=7.0)
    with pytest.raises(ValueError, match=r"rotary_base is 150000\.0, not 7\.0; "):
        verify(hf, text / "seeing")


# --- the report's file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("none/report.json", FileNotFoundError, "The parent folder .*none of --report does not exist; make it first$"),
        ("", IsADirectoryError, "is a folder; name a file in it$"),
        ("/proc/report.json", OSError, r"cannot be written \(.*\); name a file elsewhere$"),
        ("mine.json", FileExistsError, "exists; name another file, or replace it with --overwrite$"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_comparing(
    name: str, error: type[Exception], said: str, tmp_path: Path
):
    (tmp_path / "mine.json").write_text("my notes")
    with pytest.raises(error, match=said):
        verify(tmp_path / "no checkpoint", tmp_path / "none either", report=tmp_path / name)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("mine.json", "my notes")]


def test_an_earlier_report_is_replaced_by_way_of_its_link(pair: Path, tmp_path: Path):
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "report.json")
    report = verify(pair / "hf", pair / "megatron", report=tmp_path / "link.json", overwrite=True)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "link.json").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "report.json"]


def test_when_the_logits_fail_the_report_of_the_tensors_is_there(pair: Path, tmp_path: Path):
    broken = shutil.copytree(pair / "megatron", tmp_path / "megatron")
    (broken / "iter_0000000" / "run_config.yaml").unlink()  # Megatron-Bridge builds the model from it
    with pytest.raises((OSError, RuntimeError, ValueError)):
        verify(pair / "hf", broken, logits=True, report=tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["agrees"] and report["tensors"] and "logits" not in report


def spoiled(folder: Path) -> Path:
    """The checkpoint of `pair` with one changed value."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][3, 4] += 100

    return change(save_tiny(folder, **OBLONG, dtype=torch.bfloat16), spoil)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is always full")
def test_a_difference_is_an_error_message_too_if_the_report_cannot_be_written(pair: Path, tmp_path: Path):
    hf = spoiled(tmp_path / "hf")
    said = (
        "^1 of .* tensors differ; output_layer.weight the most: 1 of .*; but the report was not written: No space left"
    )
    with pytest.raises(OSError, match=said):
        verify(hf, pair / "megatron", report="/dev/full")
    with pytest.raises(OSError, match=r"agree: .* tensors bit for bit; but the report was not written: No space left"):
        verify(pair / "hf", pair / "megatron", report="/dev/full")


def test_the_command_exits_with_1_and_names_the_worst(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["convert", "verify", "--megatron", str(pair / "megatron"), "--hf", str(spoiled(tmp_path / "hf"))]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(words) == 1
    assert [*Path().iterdir()] == []  # no report unless one is asked for
    assert cli.main([*words, "--report", "report.json"]) == 1
    assert not json.loads(Path("report.json").read_text())["agrees"]
    said = capsys.readouterr().err.splitlines()
    without, with_report = [line for line in said if line.startswith("gpt-oss-vision: ")]
    assert "tensors differ; output_layer.weight the most: 1 of " in without and without.endswith(
        "--report FILE lists all"
    )
    assert with_report.endswith("report.json has all")
