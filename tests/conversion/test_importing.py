"""Streamed import: bit for bit the checkpoint that AutoBridge and Megatron save, and loaded in the same ways."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

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
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.ops.mxfp4 import dequantize
from gpt_oss_vision.conversion.dtypes import FLOATS, dtype_name
from gpt_oss_vision.conversion.importing import import_checkpoint
from layouts import Layout, fork_checkpoint_queue
from tiny import tiny_vision_config

CHECKPOINTS = {
    "oblong experts, fp32, CLIP, many shards": {
        **OBLONG,
        "shards": "50KB",
        "vision_config": tiny_vision_config("clip_vision_model"),
    },
    "square experts, bf16, SigLIP": {
        **SQUARE,
        "dtype": torch.bfloat16,
        "vision_config": tiny_vision_config("siglip_vision_model"),
    },
    "oblong experts, MXFP4": {**OBLONG, "dtype": torch.bfloat16, "packed": True},
    "square experts, fp16": {**SQUARE, "dtype": torch.float16},
    "square experts, MXFP4, no vision": {**SQUARE, "dtype": torch.bfloat16, "packed": True, "use_vision": False},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    gpt_oss_vision.register()


def import_by_bridge(hf: Path, out: Path) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    fork_checkpoint_queue()
    with temporary_distributed_context(backend="gloo"):
        AutoBridge.import_ckpt(hf, out)


@pytest.mark.parametrize("fields", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_it_writes_the_tensors_that_autobridge_writes(fields: dict, tmp_path: Path):
    hf = save_tiny(tmp_path / "hf", **fields)
    import_checkpoint(hf, tmp_path / "ours")
    cpu.run_ranks(1, import_by_bridge, hf, tmp_path / "theirs")
    ours, theirs = load_megatron(tmp_path / "ours"), load_megatron(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint, `hf`, imported by us as `ours` and by AutoBridge as `theirs`."""
    folder = tmp_path_factory.mktemp("both")
    save_tiny(folder / "hf")
    import_checkpoint(folder / "hf", folder / "ours")
    cpu.run_ranks(1, import_by_bridge, folder / "hf", folder / "theirs")
    return folder


def test_it_writes_the_files_that_autobridge_writes(both: Path):
    """Except for the data files, which are numbered in another way."""
    ours, theirs = files_of(both / "ours"), files_of(both / "theirs")
    assert {name for name in theirs if not name.endswith(".distcp")} <= ours.keys()
    for name in ("latest_checkpointed_iteration.txt", "iter_0000000/metadata.json", "latest_train_state.pt"):
        assert ours[name] == theirs[name]


def test_it_writes_the_configuration_that_autobridge_writes(both: Path):
    """Except for the path, `save`, and for `use_cpu_initialization`, the place where new weights are initialised."""
    differing = {"save", "use_cpu_initialization"}

    def lines(name: str) -> list[str]:
        text = (both / name / "iter_0000000" / "run_config.yaml").read_text()
        return [line for line in text.splitlines() if line.split(":")[0].strip() not in differing]

    assert lines("ours") == lines("theirs")


def test_it_holds_the_objects_that_megatron_keeps(both: Path):
    """Those of Transformer Engine among them, which the `torch` back end writes too."""
    from torch.distributed.checkpoint import FileSystemReader

    ours, theirs = (
        FileSystemReader(both / name / "iter_0000000").read_metadata().state_dict_metadata.keys()
        for name in ("ours", "theirs")
    )
    assert ours == theirs
    assert {name.split("._extra_state")[0] for name in ours if "_extra_state" in name} > {
        "decoder.final_layernorm",
        "decoder.layers.pre_mlp_layernorm",
        "decoder.layers.self_attention.core_attention",
        "decoder.layers.mlp.experts.experts.linear_fc1",
        "decoder.layers.mlp.experts.experts.linear_fc2",
    }


def weights_at(path: Path, hf: Path, layout: Layout) -> dict[str, torch.Tensor]:
    """The weights of a model that is loaded at a layout, under transformers' names."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    bridge = AutoBridge.from_hf_pretrained(hf)
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }
    parallel_state.initialize_model_parallel(**sizes)
    model = bridge.load_megatron_model(path, mp_overrides={**sizes, "sequence_parallel": layout.tp > 1})
    return {name: weight.clone() for name, weight in bridge.export_hf_weights(model, show_progress=False)}


KINDS = {
    f"{shape}, {kind}": sizes | fields
    for shape, sizes in {"square": SQUARE, "oblong": OBLONG}.items()
    for kind, fields in {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "MXFP4": {"dtype": torch.bfloat16, "packed": True},
    }.items()
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, and `megatron` made from it."""
    return save_pair(tmp_path_factory.mktemp("pair"), **request.param)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, ep=2), Layout(pp=2), Layout(ep=2, etp=2)], ids=str)
def test_a_model_at_any_layout_loads_it(layout: Layout, pair: Path):
    expected = load_hf(pair / "hf")
    for name in [name for name in expected if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        expected[whole] = dequantize(expected.pop(name), expected.pop(whole + "_scales")).mT
    for found in cpu.run_ranks(layout.world_size, weights_at, pair / "megatron", pair / "hf", layout):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("asked_by", ["--dtype", "config.json"])
def test_any_other_precision_can_be_asked_for(half: str, asked_by: str, both: Path, tmp_path: Path):
    hf, dtype = shutil.copytree(both / "hf", tmp_path / "hf"), half
    if asked_by == "config.json":
        edit_config(hf, dtype=dtype_name(FLOATS[half]))
        dtype = None
    with (tmp_path / "log").open("w") as log:
        import_checkpoint(hf, tmp_path / "half", dtype=dtype, console=Console(file=log, width=200))
    rounded = rf"Warning: \d+ tensors are rounded from float32 to {dtype_name(FLOATS[half])}\n"
    assert re.match(rounded, (tmp_path / "log").read_text())
    for name, tensor in load_megatron(both / "ours").items():
        dtype = torch.float32 if name.endswith("vision_bias") else FLOATS[half]
        assert torch.equal(load_megatron(tmp_path / "half")[name], tensor.to(dtype)), name


def test_a_tensor_larger_than_a_step_is_written_in_steps(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_reader.STEP", 4096)
    monkeypatch.setattr("gpt_oss_vision.conversion.formats.torch_dist_writer.BATCH_BYTES", 0)
    import_checkpoint(both / "hf", tmp_path / "steps")
    import_checkpoint(both / "hf", tmp_path / "half", dtype="bf16")
    reports = [json.loads((path / "conversion.json").read_text()) for path in (tmp_path / "steps", both / "ours")]
    assert reports[0]["tensors"] == reports[1]["tensors"]
    expected = load_megatron(both / "ours")
    for name, tensor in load_megatron(tmp_path / "steps").items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(
        load_megatron(tmp_path / "half")["output_layer.weight"], expected["output_layer.weight"].bfloat16()
    )


def test_a_stock_gpt_oss_becomes_a_model_without_vision(tmp_path: Path):
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    GptOssForCausalLM(GptOssConfig(**fields, num_experts_per_tok=2)).save_pretrained(tmp_path / "hf")
    report = import_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert report["added"] == [f"model.layers.{layer}.mlp.router.vision_bias" for layer in range(2)]
    tensors = load_megatron(tmp_path / "out")
    assert not tensors["decoder.layers.mlp.router.vision_bias"].any()
    assert not any(name.startswith("vision_adapter") for name in tensors)
    expected = load_hf(tmp_path / "hf")["model.embed_tokens.weight"]
    assert torch.equal(tensors["embedding.word_embeddings.weight"], expected)


def test_numbers_that_are_not_finite_are_imported_reported_and_warned_of(tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"][3, :2] = torch.nan
        tensors["model.layers.2.mlp.experts.gate_up_proj"][1, 5, 7] = -torch.inf

    hf = change(save_tiny(tmp_path / "hf"), spoil)
    with open(tmp_path / "log", "w") as log:
        report = import_checkpoint(hf, tmp_path / "out", console=Console(file=log, width=200))
    assert report["not_finite"] == 3
    assert report["tensors"]["decoder.layers.1.self_attention.linear_qkv.weight"]["nan"] == 2
    assert report["tensors"]["decoder.layers.2.mlp.experts.linear_fc1.weight1"]["inf"] == 1
    assert "linear_fc1.weight1 holds 0 NaN and 1 infinite values" in (tmp_path / "log").read_text()


def test_of_many_tensors_that_are_not_finite_the_first_are_named(tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[0] = 1e6  # finite until it is rounded to fp16

    hf = change(save_tiny(tmp_path / "hf"), spoil)
    with open(tmp_path / "log", "w") as log:
        report = import_checkpoint(hf, tmp_path / "out", dtype="fp16", console=Console(file=log))
    warnings = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("Warning")]
    rounded, *bad, rest = warnings
    assert rounded.endswith("tensors are rounded from float32 to float16")
    assert len(bad) == 10
    assert all(line.endswith("infinite values (float16 ends at 65504)") for line in bad)
    count = sum("inf" in entry for entry in report["tensors"].values())
    assert rest == f"Warning: {count - 10} more tensors do too; conversion.json lists them"


def test_folders_beside_the_weights_are_left_and_links_to_nowhere_refused(both: Path, tmp_path: Path):
    hf = shutil.copytree(both / "hf", tmp_path / "hf")
    (hf / "extra.json").mkdir()
    import_checkpoint(hf, tmp_path / "out")
    assert not (tmp_path / "out" / "iter_0000000" / "tokenizer" / "extra.json").exists()
    (hf / "vocab.json").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json is a link to a file that is not there"):
        import_checkpoint(hf, tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


def test_the_hash_is_that_of_the_tensors_bytes(both: Path):
    import xxhash

    entry = json.loads((both / "ours" / "conversion.json").read_text())["tensors"]
    expected = load_megatron(both / "ours")["decoder.layers.mlp.experts.experts.linear_fc1.weight"][2, 3]
    found = entry["decoder.layers.2.mlp.experts.linear_fc1.weight3"]
    assert found["xxh3_128"] == xxhash.xxh3_128(expected.contiguous().numpy()).hexdigest()
    assert found["hf"] == ["model.layers.2.mlp.experts.gate_up_proj"]


def test_a_dry_run_writes_nothing_and_reports_sizes(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plan = import_checkpoint(both / "hf", tmp_path / "out", dry_run=True)
    written = files_of(both / "ours")
    assert plan["bytes_written"] == sum(len(data) for name, data in written.items() if name.endswith(".distcp"))
    assert list(tmp_path.iterdir()) == []
    taken = memory_taken(monkeypatch)
    import_checkpoint(both / "hf", tmp_path / "out")
    check_memory(plan["peak_memory"], taken)
    assert plan["free"] > plan["bytes_written"]


def losses(out: Path, start: Path, checkpoint: Path) -> list[float]:
    """The losses of two training steps at TP2·EP2 from an imported checkpoint, on the last rank."""
    from gpt_oss_vision.recipes.data.digits import write_digits
    from gpt_oss_vision.recipes.quickstart.run import fine_tune
    from gpt_oss_vision.recipes.quickstart.settings import Settings

    out.mkdir()
    (out / "hf_start").symlink_to(start)
    (out / "megatron_start").symlink_to(checkpoint)
    settings = Settings(steps=2, batch_size=8, tensor_parallel=2, expert_parallel=2)
    digits = write_digits(out / "digits", settings.seed)
    return cpu.run_ranks(settings.ranks, fine_tune, out, digits, settings, Console(quiet=True))[-1]


def test_training_at_tp2_ep2_begins_from_it_as_from_autobridges(tmp_path: Path):
    from gpt_oss_vision.recipes.quickstart.run import write_checkpoint
    from gpt_oss_vision.recipes.quickstart.settings import Settings

    write_checkpoint(tmp_path / "hf", Settings())
    import_checkpoint(tmp_path / "hf", tmp_path / "ours")
    cpu.run_ranks(1, import_by_bridge, tmp_path / "hf", tmp_path / "theirs")
    ours, theirs = (losses(tmp_path / f"from {name}", tmp_path / "hf", tmp_path / name) for name in ("ours", "theirs"))
    assert len(ours) == 2
    assert ours == theirs
