"""Failures of an import: each is explained in a sentence, damages nothing, and the next call continues."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from crashes import many_small_tasks, survives_kills, survives_kills_at_changes
from rich.console import Console

import gpt_oss_vision
from checkpoints import OBLONG, change, edit_config, files_of, save_tiny
from gpt_oss_vision.conversion.engine.files import File
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.terminal import Progress


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source") / "hf", **OBLONG, dtype=torch.bfloat16, packed=True)


def undisturbed(hf: Path, out: Path) -> dict[str, bytes]:
    """The files of an import without a failure; they are removed again."""
    import_checkpoint(hf, out)
    files = files_of(out)
    shutil.rmtree(out)
    return files


def test_killed_at_any_record_it_is_continued_to_the_same_bytes(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    many_small_tasks(monkeypatch)
    assert survives_kills(lambda: import_checkpoint(hf, tmp_path / "out"), tmp_path / "out") > 10


def test_killed_at_any_change_to_files_it_is_continued_to_the_same_bytes(hf: Path, tmp_path: Path):
    assert survives_kills_at_changes(lambda: import_checkpoint(hf, tmp_path / "out"), tmp_path / "out") > 40


BROKEN = {
    "a file that is cut off": (lambda hf: os.truncate(hf / "model.safetensors", 10_000), "cut off or damaged"),
    "a length that was hit": (lambda hf: flip(hf / "model.safetensors", 3), "cut off or damaged"),
    "a header that was hit": (lambda hf: flip(hf / "model.safetensors", 9), "cut off or damaged"),
    "a name that was hit": (
        lambda hf: flip(hf / "model.safetensors", (hf / "model.safetensors").read_bytes().index(b"sinks")),
        r"missing in the checkpoint: model\.layers\.\d\.self_attn\.sinks; .* nothing reads: model\.layers",
    ),
    "an index that names a missing tensor": (
        lambda hf: (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "disagree about a",
    ),
    "a tensor of the wrong shape": (
        lambda hf: change(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        r"model\.norm\.weight is \[63\] float32, not \[64\]",
    ),
    "a tensor of the wrong type": (
        lambda hf: change(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)})),
        r"model\.norm\.weight is \[64\] int64, not \[64\] bfloat16 or float16 or float32",
    ),
    "blocks without scales": (
        lambda hf: change(hf, lambda tensors: tensors.pop("model.layers.0.mlp.experts.down_proj_scales")),
        r"missing in the checkpoint: model\.layers\.0\.mlp\.experts\.down_proj_scales",
    ),
    "a foreign architecture": (
        lambda hf: (hf / "config.json").write_text('{"model_type": "gpt2"}'),
        "is a checkpoint of 'gpt2', not of 'gpt_oss_vision' or 'gpt_oss'",
    ),
    "a config that is no JSON": (lambda hf: (hf / "config.json").write_text("{"), "is not JSON"),
    "no config": (lambda hf: (hf / "config.json").unlink(), r"holds no config\.json"),
    "no weights": (lambda hf: (hf / "model.safetensors").unlink(), r"lacks model\.safetensors"),
    "a rotation that Megatron lacks": (
        lambda hf: edit_config(hf, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        "Megatron-Core has no rotary embedding like",
    ),
    "embeddings that are the head": (lambda hf: edit_config(hf, tie_word_embeddings=True), "tie_word_embeddings"),
    "no biases": (lambda hf: edit_config(hf, attention_bias=False), r"config\.json says attention_bias=false"),
    "no folder": (shutil.rmtree, r"hf is not a folder; name the folder of a Hugging Face checkpoint"),
    **{
        f"a config that is {text}": (
            lambda hf, text=text: (hf / "config.json").write_text(text),
            r"config\.json holds \w+ in place of an object",
        )
        for text in ("[]", "null", '"x"', "3")
    },
    "a config that is too deep": (lambda hf: (hf / "config.json").write_text("[" * 10**6), "is not JSON"),
    **{
        f"an index that is {text}": (
            lambda hf, text=text: (hf / "model.safetensors.index.json").write_text(text),
            r"index\.json (holds \w+ in place of an object|has no weight_map)",
        )
        for text in ("[]", "null", "{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}')
    },
    **{
        f"dtype {dtype!r}": (
            lambda hf, dtype=dtype: edit_config(hf, dtype=dtype),
            r"config\.json says dtype .*; only bfloat16, float16, float32 can be converted",
        )
        for dtype in ("foo", "auto", 5, "float8_e4m3fn", "int64", [])
    },
    **{
        f"{name} {value!r}": (
            lambda hf, name=name, value=value: edit_config(hf, **{name: value}),
            rf"config\.json describes a model that cannot be built \(.*{said}.*\); correct it, or copy it again$",
        )
        for name, value, said in (
            ("hidden_size", "abc", "'hidden_size' expected int, got str"),
            ("hidden_size", None, "'hidden_size' expected int, got None"),
            ("hidden_size", 64.5, "'hidden_size' expected int, got float"),
            ("hidden_size", -64, "hidden_size is -64, not at least 1"),
            ("head_dim", None, "'head_dim' expected int, got None"),
            ("num_attention_heads", 0, "num_attention_heads is 0, not at least 1"),
            ("num_key_value_heads", 0, "num_key_value_heads is 0, not at least 1"),
            ("num_experts_per_tok", 0, "num_experts_per_tok is 0, not at least 1"),
            ("rope_parameters", "x", "'rope_parameters' with value 'x'"),
            ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "Missing required keys .*factor"),
            ("layer_types", ["full_attention"], "layer_types has 1 entries for num_hidden_layers"),
            ("layer_types", ["round_attention"] * 4, "`layer_types` entries must be in"),
            ("vision_config", "vit", "'vision_config' with value 'vit'"),
            ("vision_config", {"model_type": []}, "unhashable"),
            ("vision_config", {"model_type": "vit", "hidden_size": -4}, "hidden|negative|cond"),
            ("pad_token_id", 999_999, "Padding_idx"),
        )
    },
}


def flip(file: Path, byte: int) -> None:
    """Flip a bit."""
    data = bytearray(file.read_bytes())
    data[byte] ^= 0x04
    file.write_bytes(data)


@pytest.mark.parametrize(("spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_broken_input_is_refused_in_one_sentence_and_leaves_nothing(spoil, sentence: str, hf: Path, tmp_path: Path):
    """A dry run ends right after the checks, so it shows that they come before anything is written."""
    shutil.copytree(hf, tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as failure:
        import_checkpoint(tmp_path / "hf", tmp_path / "out", dry_run=True)
    assert "\n" not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == []


def test_a_write_that_fails_half_way_is_continued_from_what_is_on_the_disk(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    many_small_tasks(monkeypatch)
    out = tmp_path / "out"
    expected = undisturbed(hf, out)
    original, left = File.write, iter(range(300))

    def write(*args: object) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args)

    monkeypatch.setattr(File, "write", write)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(hf, out)
    monkeypatch.setattr(File, "write", original)
    journal = (tmp_path / "out.partial" / "journal").read_bytes()
    assert journal.count(b"\n") > 20
    log = tmp_path / "log"
    with log.open("w") as file:
        import_checkpoint(hf, out, console=Console(file=file, width=200))
    assert "were done before" in log.read_text()
    assert files_of(out) == expected


def test_two_at_once_do_not_harm_each_other(hf: Path, tmp_path: Path):
    """The second is refused while the first runs; the first completes with the right bytes."""
    out = tmp_path / "out"
    expected = undisturbed(hf, out)
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(Progress):
        def advance(self, amount: int = 1, words: str = "") -> None:
            begun.set()
            go_on.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_oss_vision.conversion.engine.job.Progress", Waiting)
        first = threading.Thread(target=import_checkpoint, args=(hf, out))
        first.start()
        begun.wait()
        for overwrite in (False, True):
            with pytest.raises(BlockingIOError, match="is being written by another process"):
                import_checkpoint(hf, out, overwrite=overwrite)
        go_on.set()
        first.join()
    assert files_of(out) == expected


def test_a_source_that_changed_is_not_continued(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(hf, tmp_path / "hf")
    monkeypatch.setattr(File, "write", lambda *_: (_ for _ in ()).throw(OSError("the disk fails")))
    with pytest.raises(OSError, match="the disk fails"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
    monkeypatch.undo()
    os.utime(tmp_path / "hf" / "model.safetensors", (1, 1))
    with pytest.raises(FileExistsError, match="begun with another source"):
        import_checkpoint(tmp_path / "hf", tmp_path / "out")
