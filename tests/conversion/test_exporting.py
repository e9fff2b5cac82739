"""Streamed export: equal to AutoBridge's, from any layout, in every precision, readable by transformers alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from crashes import many_small_tasks, survives_kills, survives_kills_at_changes
from kills import fork
from rich.console import Console
from torch.distributed import checkpoint
from transformers import AutoTokenizer, GptOssForCausalLM

import gpt_oss_vision
from checkpoints import (
    OBLONG,
    SQUARE,
    change,
    check_memory,
    edit_config,
    files_of,
    load_hf,
    load_megatron,
    memory_taken,
    save_pair,
    save_tiny,
)
from gpt_oss_vision.bridge import hf
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.hf.tokenization_gpt_oss_vision import GPTOSSVisionTokenizer
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.ops.mxfp4 import dequantize, quantize
from gpt_oss_vision.conversion.dtypes import FLOATS, dtype_name
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.verify import verify
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config, write_checkpoint
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.train import train
from layouts import Layout
from tiny import tiny_batch, tiny_config, tiny_vision_config


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


def there_and_back(folder: Path, export_as: str | None = None, **fields: object) -> Path:
    """Save a checkpoint as `hf`, import it as `megatron`, export that as `back`."""
    save_pair(folder, **fields)
    export_checkpoint(folder / "megatron", folder / "back", dtype=export_as)
    return folder


CHECKPOINTS = {
    "oblong experts, fp32, CLIP": {
        **OBLONG,
        "vision_config": tiny_vision_config("clip_vision_model"),
        "tie_word_embeddings": False,
    },
    "square experts, bf16, SigLIP": {
        **SQUARE,
        "dtype": torch.bfloat16,
        "vision_config": tiny_vision_config("siglip_vision_model"),
    },
    "oblong experts, bf16, ViT": {**OBLONG, "dtype": torch.bfloat16},
    "oblong experts, fp16": {**OBLONG, "dtype": torch.float16},
    "square experts, fp32, no vision": {**SQUARE, "use_vision": False},
}


@pytest.mark.parametrize("fields", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_there_and_back_every_weight_has_the_same_bytes(fields: dict, tmp_path: Path):
    there_and_back(tmp_path, **fields)
    before, after = files_of(tmp_path / "hf"), files_of(tmp_path / "back")
    assert after.keys() == before.keys() | {"conversion.json"}
    assert [name for name in before if before[name] != after[name] and name != "config.json"] == []
    GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved")["config.json"] == after["config.json"]


@pytest.fixture(scope="module", params=["bf16", "fp16", "fp32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A type, and a folder with a checkpoint of one layer in that type, as `hf` and as `megatron`."""
    sizes = OBLONG | {"num_hidden_layers": 1, "use_vision": False}
    return request.param, save_pair(tmp_path_factory.mktemp("stored"), **sizes, dtype=FLOATS[request.param])


@pytest.mark.parametrize("asked", [None, "bf16", "fp16", "fp32", "mxfp4"])
def test_weights_are_rounded_on_request_only_and_with_a_warning(
    asked: str | None, stored: tuple[str, Path], tmp_path: Path
):
    """MXFP4 packs the experts, which is no rounding to a type, and the rest is in bf16."""
    before, folder = stored
    with (tmp_path / "log").open("w") as log:
        console = Console(file=log, width=200)
        export_checkpoint(folder / "megatron", tmp_path / "out", dtype=asked, console=console)
    new = "bf16" if asked == "mxfp4" else asked or before
    types = dtype_name(FLOATS[before]), dtype_name(FLOATS[new])
    said = re.findall(r"Warning: \d+ tensors are rounded from (\w+) to (\w+)\n", (tmp_path / "log").read_text())
    assert said == ([] if new in (before, "fp32") else [types])
    tensors, found = load_hf(folder / "hf"), load_hf(tmp_path / "out")
    for name in tensors.keys() & found.keys():
        dtype = torch.float32 if name.endswith("vision_bias") else FLOATS[new]
        assert torch.equal(found[name], tensors[name].to(dtype)), name


@pytest.mark.parametrize("sizes", [SQUARE, OBLONG], ids=["square", "oblong"])
def test_mxfp4_becomes_bf16_and_mxfp4_again_with_the_same_bytes(sizes: dict, tmp_path: Path):
    there_and_back(tmp_path, "mxfp4", **sizes, dtype=torch.bfloat16, packed=True)
    before, after = load_hf(tmp_path / "hf"), load_hf(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_mxfp4_with_other_scales_than_the_rule_gives_keeps_its_values(tmp_path: Path):
    def use_small_values_only(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_blocks")]:
            tensors[name] &= 0xBB  # values up to 1.5 only, so the rule would choose smaller scales

    change(save_tiny(tmp_path / "hf", **OBLONG, dtype=torch.bfloat16, packed=True), use_small_values_only)
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", dtype="mxfp4")
    before, after = load_hf(tmp_path / "hf"), load_hf(tmp_path / "back")
    names = [name.removesuffix("_blocks") for name in before if name.endswith("_blocks")]
    for name in names:
        assert not torch.equal(before[name + "_scales"], after[name + "_scales"])
        values = [dequantize(some[name + "_blocks"], some[name + "_scales"]) for some in (before, after)]
        assert torch.equal(*values), name


def test_bf16_becomes_the_mxfp4_of_the_rule_and_the_rest_stays(tmp_path: Path):
    there_and_back(tmp_path, "mxfp4", **OBLONG, dtype=torch.bfloat16)
    expected, found = load_hf(tmp_path / "hf"), load_hf(tmp_path / "back")
    for name, weight in expected.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            assert found[name + "_blocks"].shape == (*weight.mT.shape[:-1], weight.shape[1] // 32, 16)
            blocks, scales = quantize(weight.mT.contiguous())
            assert torch.equal(found.pop(name + "_blocks"), blocks) and torch.equal(found.pop(name + "_scales"), scales)
        else:
            assert torch.equal(found.pop(name), weight), name
    assert not found
    quantization = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "mxfp4"
    assert {"model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"} <= set(
        quantization["modules_to_not_convert"]
    )


# --- from training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """Settings of a training run on the quickstart's data."""

    layout: Layout
    precision: str = "fp32"
    distributed_optimizer: bool = True


TRAININGS = {
    "TP2·EP2, bf16": Training(Layout(tp=2, ep=2), "bf16"),
    "PP2": Training(Layout(pp=2)),
    "PP2·VPP2": Training(Layout(pp=2, vpp=2)),
    "PP2, 3 layers and 1": Training(
        Layout(pp=2, extra={"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1})
    ),
    "TP2·ETP2": Training(Layout(tp=2, etp=2)),
    "one rank, plain optimizer": Training(Layout(), distributed_optimizer=False),
}


def train_as(training: Training, start: Path, out: Path) -> None:
    config = training_config(start, write_digits(start / "digits", 0), Settings(steps=1, batch_size=4))
    training.layout.apply(config.model)
    config.train.micro_batch_size = 2
    config.mixed_precision = "bf16_mixed" if training.precision == "bf16" else None
    config.ddp.use_distributed_optimizer = training.distributed_optimizer
    config.optimizer.use_distributed_optimizer = training.distributed_optimizer
    config.checkpoint.pretrained_checkpoint, config.checkpoint.save = str(start / "megatron"), str(out)
    train(config)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, and the quickstart's checkpoint as `hf_start` and `megatron`."""
    folder = tmp_path_factory.mktemp("start")
    write_digits(folder / "digits", 0)
    write_checkpoint(folder / "hf_start", Settings())
    import_checkpoint(folder / "hf_start", folder / "megatron")
    return folder


def export_by_bridge(like: Path, megatron: Path, hf: Path) -> None:
    """Megatron to Hugging Face through Megatron-Bridge; `like` gives config, tokenizer and processor."""
    from megatron.bridge import AutoBridge

    AutoBridge.from_hf_pretrained(like).export_ckpt(megatron, hf, strict=True)


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_a_checkpoint_of_any_layout_is_exported_as_by_autobridge(training: Training, start: Path, tmp_path: Path):
    saved = tmp_path / "megatron"
    cpu.run_ranks(training.layout.world_size, train_as, training, start, saved)
    export_checkpoint(saved, tmp_path / "ours")
    cpu.run_ranks(1, export_by_bridge, start / "hf_start", saved, tmp_path / "theirs")
    ours, theirs, before = (load_hf(folder) for folder in (tmp_path / "ours", tmp_path / "theirs", start / "hf_start"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert any(not torch.equal(tensor.float(), before[name]) for name, tensor in ours.items())  # it has been trained
    assert verify(tmp_path / "ours", saved)["agrees"]


# --- for readers without this package ----------------------------------------------------------------------------

READ = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["gpt_oss_vision"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trusted, tokens, logits = sys.argv[1:]
options = {"trust_remote_code": True} if trusted == "trusted" else {}
assert AutoTokenizer.from_pretrained(folder, **options)("some text").input_ids
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
assert not any(report.values()), report
model.config.dtype = None
with torch.no_grad():
    torch.save(model.eval().float()(torch.load(tokens, weights_only=True)).logits, logits)
"""


def logits_elsewhere(folder: Path, tokens: torch.Tensor, tmp_path: Path, *, trusted: bool) -> torch.Tensor:
    """The fp32 logits of a checkpoint, computed in a fresh process."""
    torch.save(tokens, tmp_path / "tokens.pt")
    words = [str(folder), "trusted" if trusted else "", str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", READ, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt", weights_only=True)


@pytest.mark.parametrize("text_only", [False, True], ids=["with vision", "text only"])
def test_transformers_alone_reads_mxfp4_as_the_quantised_model(text_only: bool, tmp_path: Path):
    save_pair(tmp_path, **OBLONG, dtype=torch.bfloat16, use_nope=False)
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", dtype="mxfp4", text_only=text_only)
    reference = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = tiny_batch(reference.config, images_per_row=(0, 0))["input_ids"]
    with torch.no_grad():
        unquantised = reference(tokens).logits
        for name, weight in reference.named_parameters():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                weight.copy_(dequantize(*quantize(weight.mT.contiguous())).mT)
        expected = reference(tokens).logits
    found = logits_elsewhere(tmp_path / "out", tokens, tmp_path, trusted=not text_only)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - unquantised).abs().max() > 1e-3 * expected.abs().max()


ROTATIONS = {
    "yarn": tiny_config().rope_parameters | {"factor": 4.0, "rope_theta": 1e4},
    "default": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("rope", ROTATIONS.values(), ids=ROTATIONS)
def test_text_only_is_a_stock_gpt_oss_with_every_key_in_place(rope: dict, tmp_path: Path):
    """Read by transformers 4 too, which knows the rotation by the names in gpt-oss's own config alone (4.57.1)."""
    there_and_back(tmp_path, use_nope=False, rope_parameters=rope)
    export_checkpoint(tmp_path / "megatron", tmp_path / "text", text_only=True)
    whole = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = tiny_batch(whole.config, images_per_row=(0,))["input_ids"]
    for read in (lambda config: None, lambda config: config.pop("rope_parameters")):
        edit_config(tmp_path / "text", read)
        stock, report = GptOssForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            assert torch.equal(stock.eval()(tokens).logits, whole.eval()(tokens).logits)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert config["model_type"] == "gpt_oss" and config["architectures"] == ["GptOssForCausalLM"]
    assert not any("vision" in name or "image" in name or name == "auto_map" for name in config)
    assert config["rope_theta"] == rope["rope_theta"] and "rope_theta" not in config["rope_scaling"]
    tokenizer = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("text_only", [False, True], ids=["with vision", "text only"])
def test_further_chat_templates_come_along(text_only: bool, tmp_path: Path):
    hf = save_tiny(tmp_path / "hf", **OBLONG, use_nope=False)
    tokenizer = GPTOSSVisionTokenizer.from_pretrained(hf)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "rag": "{{ documents }}"}
    tokenizer.save_pretrained(hf)
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out", text_only=text_only)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_text_only_is_refused_if_gpt_oss_cannot_express_the_model(tmp_path: Path):
    import_checkpoint(save_tiny(tmp_path / "hf", use_nope=True, nope_stride=2), tmp_path / "megatron")
    with pytest.raises(ValueError, match="Layers 1, 3 have no rotation"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "text", text_only=True)
    assert not list(tmp_path.glob("text*"))


# --- files, errors and interruptions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported checkpoint in bf16, with `hf` beside it."""
    return save_pair(tmp_path_factory.mktemp("source"), **OBLONG, dtype=torch.bfloat16) / "megatron"


def test_large_files_are_sharded_as_save_pretrained_shards(megatron: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gpt_oss_vision.conversion.exporting.SHARD_BYTES", 100_000)
    export_checkpoint(megatron, tmp_path / "ours")
    GPTOSSVisionForCausalLM.from_pretrained(megatron.parent / "hf").save_pretrained(
        tmp_path / "theirs", max_shard_size=100_000
    )
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs")
    shards = [name for name in theirs if "safetensors" in name]
    assert len(shards) > 3
    assert [name for name in shards if ours.get(name) != theirs[name]] == []


def test_a_parameter_larger_than_a_step_is_written_in_steps(megatron: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_reader.STEP", 1000)
    export_checkpoint(megatron, tmp_path / "out", dtype="fp32")
    found = load_hf(tmp_path / "out")
    for name, tensor in load_hf(megatron.parent / "hf").items():
        assert torch.equal(found[name], tensor.float()), name


def test_import_export_and_verify_give_a_parameter_the_same_hash(megatron: Path, tmp_path: Path):
    export_checkpoint(megatron, tmp_path / "out", dtype="mxfp4")
    imported, exported = (
        json.loads((folder / "conversion.json").read_text())["tensors"] for folder in (megatron, tmp_path / "out")
    )
    verified = verify(tmp_path / "out", megatron)["tensors"]
    assert imported.keys() == exported.keys() == verified.keys()
    for name, entry in imported.items():
        assert entry["xxh3_128"] == exported[name]["xxh3_128"] == verified[name]["xxh3_128"]


def test_a_dry_run_writes_nothing_and_reports_sizes(megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = export_checkpoint(megatron, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    taken = memory_taken(monkeypatch)
    export_checkpoint(megatron, tmp_path / "out")
    assert plan["bytes_written"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    check_memory(plan["peak_memory"], taken)
    assert plan["free"] > plan["bytes_written"]


def changed(megatron: Path, folder: Path, edit) -> Path:
    """A copy of a checkpoint with other tensors, written by torch."""
    tensors = load_megatron(megatron)
    edit(tensors)
    checkpoint.save(tensors, checkpoint_id=folder, no_dist=True)
    shutil.copytree(megatron / "iter_0000000" / "tokenizer", folder / "tokenizer")
    return folder


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_left(megatron: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.novelty.weight"] = torch.ones(2)
        del tensors["vision_adapter.proj.bias"]
        tensors["output_layer.weight"] = tensors["output_layer.weight"][:-1].clone()
        tensors["decoder.final_layernorm.weight"] = torch.ones(64, dtype=torch.uint8)

    broken = changed(megatron, tmp_path / "broken", spoil)
    with pytest.raises(ValueError, match="does not match its config") as failure:
        export_checkpoint(broken, tmp_path / "out")
    assert "missing in the checkpoint: vision_adapter.proj.bias" in str(failure.value)
    assert "nothing reads: decoder.layers.novelty.weight" in str(failure.value)
    floats = "bfloat16 or float16 or float32"
    assert f"decoder.final_layernorm.weight is [64] uint8, not [64] {floats}" in str(failure.value)
    assert re.search(rf"output_layer.weight is \[\d+, 64\] bfloat16, not \[\d+, 64\] {floats}", str(failure.value))
    assert not list(tmp_path.glob("out*"))


def test_a_nan_is_reported_in_bf16_and_refused_in_mxfp4(megatron: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"][1, 2, 3, 4] = torch.nan

    broken = changed(megatron, tmp_path / "broken", spoil)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.linear_fc1\.weight2: .* NaN.* --dtype bf16"):
        export_checkpoint(broken, tmp_path / "packed", dtype="mxfp4")
    assert not list(tmp_path.glob("packed*"))
    report = export_checkpoint(broken, tmp_path / "out")
    assert (
        report["not_finite"] == 1 and report["tensors"]["decoder.layers.1.mlp.experts.linear_fc1.weight2"]["nan"] == 1
    )


def test_a_checkpoint_that_keeps_no_config_needs_one_from_hf(megatron: Path, tmp_path: Path):
    bare = shutil.copytree(megatron, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    with pytest.raises(FileNotFoundError, match="name the Hugging Face checkpoint it came from with --hf"):
        export_checkpoint(bare, tmp_path / "out")
    export_checkpoint(bare, tmp_path / "out", hf=megatron.parent / "hf")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_output_that_exists_is_replaced_only_when_asked(megatron: Path, tmp_path: Path):
    out = tmp_path / "out"
    export_checkpoint(megatron, out)
    (out / "mine").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_checkpoint(megatron, out)
    assert (out / "mine").exists()
    export_checkpoint(megatron, out, overwrite=True)
    assert not (out / "mine").exists() and (out / "model.safetensors").exists()


def test_killed_at_any_record_it_is_continued_to_the_same_bytes(megatron: Path, tmp_path: Path, monkeypatch):
    many_small_tasks(monkeypatch)
    assert survives_kills(partial(export_checkpoint, megatron, tmp_path / "out", dtype="mxfp4"), tmp_path / "out") > 10


def test_killed_at_any_change_to_files_it_is_continued_to_the_same_bytes(megatron: Path, tmp_path: Path):
    assert survives_kills_at_changes(partial(export_checkpoint, megatron, tmp_path / "out"), tmp_path / "out") > 40


def test_two_at_once_do_not_harm_each_other(megatron: Path, tmp_path: Path):
    export_checkpoint(megatron, tmp_path / "alone")
    out = tmp_path / "out"
    codes = [os.waitpid(child, 0)[1] for child in [fork(partial(export_checkpoint, megatron, out)) for _ in range(3)]]
    assert 0 in codes
    assert files_of(out) == files_of(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_contradictory_generation_settings_are_kept_as_they_are(megatron: Path, tmp_path: Path):
    """Fine-tuned checkpoints have such settings; transformers reads them, but refuses to write them."""
    copy = shutil.copytree(megatron, tmp_path / "copy")
    settings = copy / "iter_0000000" / "tokenizer" / "generation_config.json"
    settings.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    export_checkpoint(copy, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == settings.read_bytes()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("text_only", [False, True], ids=["with vision", "text only"])
def test_a_damaged_file_is_named_before_anything_is_written(name: str, text_only: bool, megatron: Path, tmp_path: Path):
    copy = shutil.copytree(megatron, tmp_path / "copy")
    (copy / "iter_0000000" / "tokenizer" / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is not JSON"):
        export_checkpoint(copy, tmp_path / "out", text_only=text_only)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("code", [None, "old"])
def test_all_code_is_that_of_this_package(code: str | None, megatron: Path, tmp_path: Path):
    """Whatever the checkpoint has that the model came from: code of one version that names code of another can fail."""
    copy = shutil.copytree(megatron, tmp_path / "copy")
    kept = copy / "iter_0000000" / "tokenizer"
    for path in [*kept.glob("*.py")]:
        path.unlink()
    if code:
        (kept / "tokenization_gpt_oss_vision.py").write_text(code)
    export_checkpoint(copy, tmp_path / "out")
    package = Path(hf.__file__).parent
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.py")}
    assert written == {path.name: path.read_bytes() for path in package.glob("*_gpt_oss_vision.py")}


def test_a_base_without_adapters_is_refused(megatron: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="holds weights, no adapters; call without --base"):
        export_checkpoint(megatron, tmp_path / "out", base=megatron)
