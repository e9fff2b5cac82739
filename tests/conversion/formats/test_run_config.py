"""A config that contradicts `run_config.yaml` in a field that no tensor shape depends on is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import OBLONG, edit_config, save_pair
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.verify import verify


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, and `megatron` made from it."""
    return save_pair(tmp_path_factory.mktemp("pair"), **OBLONG)


def with_other(hf: Path, copy: Path, path: str, value: Any) -> Path:
    """A copy of a checkpoint whose config has another value."""
    *parents, name = path.split(".")

    def edit(fields: dict[str, Any]) -> None:
        for parent in parents:
            fields = fields[parent]
        assert fields[name] != value
        fields[name] = value

    return edit_config(shutil.copytree(hf, copy), edit)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("rms_norm_eps", 1e-6, "layernorm_epsilon is 1e-05, not 1e-06"),
        ("rope_parameters.rope_theta", 10000.0, "rotary_base is 150000.0, not 10000.0"),
        ("rope_parameters.factor", 4.0, "yarn_rotary_scaling_factor is 8.0, not 4.0"),
        ("nope_stride", 4, r"no_rope_freq is \[0, 1, 0, 1\], not \[0, 0, 0, 1\]"),
        ("sliding_window", 4, r"window_size is \[7, 0\], not \[3, 0\]"),
        ("layer_types", ["full_attention"] * 4, r"window_attn_skip_freq is \[1, 0, 1, 0\], not \[0, 0, 0, 0\]"),
        ("num_experts_per_tok", 1, "moe_router_topk is 2, not 1"),
        ("swiglu_limit", 5.0, r"activation_func_clamp_value is 7\.0, not 5\.0"),
        ("image_token_id", 3, "image_token_id is 314, not 3"),
        ("vision_config.layer_norm_eps", 1e-6, "vision_config.layer_norm_eps is 1e-12, not 1e-06"),
    ],
)
def test_numbers_that_make_another_model_are_refused(path: str, value: Any, said: str, pair: Path, tmp_path: Path):
    other = with_other(pair / "hf", tmp_path / "hf", path, value)
    for convert in (
        lambda: export_checkpoint(pair / "megatron", tmp_path / "out", hf=other),
        lambda: verify(other, pair / "megatron"),
    ):
        with pytest.raises(
            ValueError, match=rf"run_config\.yaml does not match the config: {said}; name one that does with --hf$"
        ):
            convert()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attention_dropout", 0.1),
        ("initializer_range", 0.1),
        ("max_position_embeddings", 99),
        ("vision_config.initializer_range", 0.1),
    ],
)
def test_fields_that_only_training_uses_may_differ(path: str, value: Any, pair: Path, tmp_path: Path):
    other = with_other(pair / "hf", tmp_path / "hf", path, value)
    export_checkpoint(pair / "megatron", tmp_path / "out", hf=other)
    assert verify(other, pair / "megatron")["agrees"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *(
            (content, "is damaged")
            for content in (b"model: [", b"\xff\xfe", b"just words", b"a: 2026-99-99", b"[" * 9999)
        ),
        (b"model:", "has None for model, not its fields"),
        (b"model: x", "has 'x' for model, not its fields"),
        (b"model: {vision_config: vit}", "has 'vit' for vision_config, not its fields"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_a_damaged_file_is_refused_with_advice(content: bytes, said: str, pair: Path, tmp_path: Path):
    broken = shutil.copytree(pair / "megatron", tmp_path / "broken")
    (broken / "iter_0000000" / "run_config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"run_config\.yaml {said}; copy it again"):
        export_checkpoint(broken, tmp_path / "out")


def test_a_checkpoint_without_the_file_is_exported(pair: Path, tmp_path: Path):
    bare = shutil.copytree(pair / "megatron", tmp_path / "bare")
    (bare / "iter_0000000" / "run_config.yaml").unlink()
    export_checkpoint(bare, tmp_path / "out")
