"""Adapters that are trained with Megatron-Bridge's LoRA: exported for PEFT, or merged, they give the same logits."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from crashes import many_small_tasks, survives_kills
from peft import PeftModel
from rich.console import Console

import gpt_oss_vision
from checkpoints import load_hf, load_megatron
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.bridge.mcore import cpu, upstream
from gpt_oss_vision.bridge.weight_map import PARAM_GROUPS, group_of
from gpt_oss_vision.conversion.exporting import export_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.conversion.lora import export_adapters
from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config, write_checkpoint
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.peft import GPTOSSVisionLoRA
from gpt_oss_vision.recipes.training.train import train
from tiny import tiny_batch

ATTENTION = ["linear_qkv", "linear_proj"]
EXPERTS = ["linear_fc1", "linear_fc2"]
LAST = "iter_0000003"


@dataclass(frozen=True)
class Kind:
    """The settings of a LoRA. On two ranks, attention is sharded, and each has half of the experts, or half of each."""

    targets: list[str]
    ranks: int = 1
    splits_experts: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def lora(self):
        """LoRA with these settings: Megatron-Bridge's, or ours where they name full weights."""
        from megatron.bridge.peft.lora import LoRA

        lora = GPTOSSVisionLoRA if "full_weights" in self.options else LoRA
        return lora(target_modules=self.targets, dim=4, alpha=12, **self.options)


KINDS = {
    "attention, TP2": Kind(ATTENTION, ranks=2),
    "everything": Kind(ATTENTION + EXPERTS),
    "everything, TP2 and EP2": Kind(ATTENTION + EXPERTS, ranks=2),
    "experts of a lower rank": Kind(ATTENTION + EXPERTS, options={"normalize_moe_lora": True}),
    "one for each expert": Kind(EXPERTS, options={"share_expert_adapters": False}),
}

FULL = {"full_weights": ["vision_projection", "vision_bias"]}
WITH_FULL_WEIGHTS = {
    "everything": Kind(ATTENTION + EXPERTS, options=FULL),
    "everything, TP2 and EP2": Kind(ATTENTION + EXPERTS, ranks=2, options=FULL | {"share_expert_adapters": False}),
}


def train_lora(start: Path, out: Path, kind: Kind) -> None:
    settings = Settings(steps=3, batch_size=8, tensor_parallel=kind.ranks)
    config = training_config(start, write_digits(start / "digits", 0), settings)
    sizes = (1, kind.ranks) if kind.splits_experts else (kind.ranks, 1)
    config.model.expert_model_parallel_size, config.model.expert_tensor_parallel_size = sizes
    config.peft = kind.lora()
    config.optimizer.lr = config.optimizer.min_lr = 0.03  # large, so that three steps change the logits
    config.checkpoint.pretrained_checkpoint, config.checkpoint.save = str(start / "megatron"), str(out)
    train(config)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt_oss_vision.register()
    folder = tmp_path_factory.mktemp("start")
    write_digits(folder / "digits", 0)
    write_checkpoint(folder / "hf_start", Settings())
    import_checkpoint(folder / "hf_start", folder / "megatron")
    return folder


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(scope="module")
def adapter(kind: Kind, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of adapters."""
    out = tmp_path_factory.mktemp("adapter") / "megatron"
    cpu.run_ranks(kind.ranks, train_lora, start, out, kind)
    return out


def test_an_adapter_by_peft_and_merged_weights_give_the_same_logits(adapter: Path, start: Path, tmp_path: Path):
    export_adapters(adapter, tmp_path / "adapter")
    export_checkpoint(adapter, tmp_path / "merged", dtype="fp32")
    base = GPTOSSVisionForCausalLM.from_pretrained(start / "hf_start").eval()
    batch = tiny_batch(base.config)
    with torch.no_grad():
        before = base(**batch).logits
        merged = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "merged").eval()(**batch).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**batch).logits
    scale = before.abs().max()
    assert (adapted - before).abs().max() > 1e-2 * scale  # the adapter does something
    assert (adapted - merged).abs().max() < 1e-5 * scale


def megatron_logits(start: Path, adapter: Path, kind: Kind, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of the Megatron model with the adapters in place, not merged."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.utils import load_peft_adapter_checkpoint

    torch.distributed.init_process_group("gloo")
    provider = AutoBridge.from_hf_pretrained(start / "hf_start").to_megatron_provider()
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    lora = kind.lora()
    model = lora(provider.provide_distributed_model(wrap_with_ddp=False), training=False)
    lora.set_params_to_save(model)
    load_peft_adapter_checkpoint(model, adapter / "iter_0000003", lora)
    with torch.no_grad():
        return model[0].eval()(batch["input_ids"], None, None, pixel_values=batch.get("pixel_values"))


def test_merged_weights_give_the_logits_of_megatrons_adapters(adapter: Path, kind: Kind, start: Path, tmp_path: Path):
    export_checkpoint(adapter, tmp_path / "merged", dtype="fp32")
    merged = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = tiny_batch(merged.config)
    (expected,) = cpu.run_ranks(1, megatron_logits, start, adapter, kind, batch)
    with torch.no_grad():
        assert (merged(**batch).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_base_in_half_precision_is_merged_in_full(adapter: Path, start: Path, tmp_path: Path):
    import_checkpoint(start / "hf_start", tmp_path / "base", dtype="bf16")
    export_checkpoint(adapter, tmp_path / "half", base=tmp_path / "base")
    export_checkpoint(adapter, tmp_path / "full", base=tmp_path / "base", dtype="fp32")
    half, full = load_hf(tmp_path / "half"), load_hf(tmp_path / "full")
    assert all(torch.equal(half[name], full[name].to(half[name].dtype)) for name in full)


def test_a_moved_base_must_be_named(adapter: Path, start: Path, tmp_path: Path):
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    file = moved / "iter_0000003" / "run_config.yaml"
    file.write_text(file.read_text().replace(str(start / "megatron"), "/nowhere"))
    with pytest.raises(FileNotFoundError, match="weights in /nowhere, which is not there; name it with --base"):
        export_checkpoint(moved, tmp_path / "out")
    export_checkpoint(moved, tmp_path / "out", base=start / "megatron")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt_oss_vision"


@pytest.fixture(scope="module", params=WITH_FULL_WEIGHTS.values(), ids=WITH_FULL_WEIGHTS)
def with_full_weights(request: pytest.FixtureRequest, start: Path, tmp_path_factory) -> tuple[Kind, Path]:
    """A checkpoint of adapters and full weights."""
    out = tmp_path_factory.mktemp("full") / "megatron"
    cpu.run_ranks(request.param.ranks, train_lora, start, out, request.param)
    return request.param, out


def test_full_weights_beside_adapters_are_merged_too(with_full_weights: tuple[Kind, Path], start: Path, tmp_path: Path):
    kind, adapter = with_full_weights
    export_checkpoint(adapter, tmp_path / "merged", dtype="fp32")
    merged, before = load_hf(tmp_path / "merged"), load_hf(start / "hf_start")
    groups = {group: [name for name in before if group_of(name) == group] for group in PARAM_GROUPS}
    for name in groups["vision_projection"] + groups["vision_bias"][:-1]:
        assert not torch.equal(merged[name], before[name]), name
    assert all(torch.equal(merged[name], before[name]) for name in groups["vision_model"])
    model = GPTOSSVisionForCausalLM.from_pretrained(tmp_path / "merged").eval()
    batch = tiny_batch(model.config)
    (expected,) = cpu.run_ranks(1, megatron_logits, start, adapter, kind, batch)
    with torch.no_grad():
        assert (model(**batch).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_for_peft_has_no_place_for_full_weights(with_full_weights: tuple[Kind, Path], tmp_path: Path):
    with pytest.raises(UserError, match="holds full weights of vision_projection and vision_bias beside its adapters"):
        export_adapters(with_full_weights[1], tmp_path / "out")


def test_full_weights_that_are_lost_or_not_named_are_refused(with_full_weights: tuple[Kind, Path], tmp_path: Path):
    adapter = with_full_weights[1]
    key = "vision_adapter.pool_token"
    lost = edited(adapter, tmp_path / "lost", lambda tensors: tensors.pop(key))
    with pytest.raises(UserError, match=rf"lacks full weights: {key}; copy it again"):
        export_checkpoint(lost, tmp_path / "out")
    unnamed = with_settings(adapter, tmp_path / "unnamed", lambda config: config["peft"].pop("full_weights"))
    with pytest.raises(UserError, match=rf"has adapters that cannot be exported: .*{key}"):
        export_checkpoint(unnamed, tmp_path / "out")
    wrong = with_settings(adapter, tmp_path / "wrong", lambda config: config["peft"].update(full_weights=["tower"]))
    with pytest.raises(UserError, match=r"has \['tower'\] for peft.full_weights"):
        export_checkpoint(wrong, tmp_path / "out")


def test_a_checkpoint_without_adapters_is_refused(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="holds no adapters; export it without --adapter"):
        export_adapters(start / "megatron", tmp_path / "out")


def without_the_work_around_for_classes(start: Path, out: Path) -> None:
    import megatron.bridge.peft.utils

    megatron.bridge.peft.utils.HAVE_TE = True
    train_lora(start, out, Kind(ATTENTION))


@pytest.mark.upstream
def test_megatron_bridge_still_takes_transformer_engine_for_present(start: Path, tmp_path: Path):
    """When this fails, the line about ``HAVE_TE`` in `upstream.apply` can be removed."""
    if upstream.HAVE_TE:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(TypeError, match="isinstance"):
        cpu.run_ranks(1, without_the_work_around_for_classes, start, tmp_path / "out")


def without_the_work_around_for_experts(start: Path, out: Path) -> None:
    import megatron.bridge.peft.lora

    megatron.bridge.peft.lora.get_adapter_attributes_from_linear = upstream.adapter_attributes
    train_lora(start, out, Kind(EXPERTS))


@pytest.mark.upstream
def test_megatron_bridge_still_refuses_to_adapt_experts_that_are_not_its_own(start: Path, tmp_path: Path):
    """When this fails, `upstream._adapter_attributes_with_our_experts` can be removed."""
    with pytest.raises(NotImplementedError, match="Layer type is unrecognized for LoRA"):
        cpu.run_ranks(1, without_the_work_around_for_experts, start, tmp_path / "out")


def test_adapters_of_split_experts_are_refused(start: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="LoRA on the experts needs expert_tensor_parallel_size=1, got 2"):
        cpu.run_ranks(2, train_lora, start, tmp_path / "out", Kind(EXPERTS, ranks=2, splits_experts=True))


@pytest.fixture(scope="module")
def everything(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of adapters on attention and experts."""
    out = tmp_path_factory.mktemp("everything") / "megatron"
    cpu.run_ranks(1, train_lora, start, out, KINDS["everything"])
    return out


def edited(adapter: Path, copy: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint of adapters with other tensors, written by torch."""
    from torch.distributed import checkpoint

    tensors = load_megatron(shutil.copytree(adapter, copy), LAST)
    edit(tensors)
    for file in (copy / LAST / ".metadata", *copy.glob(f"{LAST}/*.distcp")):
        file.unlink()
    checkpoint.save(tensors, checkpoint_id=copy / LAST, no_dist=True)
    return copy


def export_both_ways(adapter: Path, out: Path) -> Iterator[Callable[[], object]]:
    yield lambda: export_adapters(adapter, out)
    yield lambda: export_checkpoint(adapter, out)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda config: config["peft"].update(experts_shared_outer_loras=True),
            "says experts_shared_outer_loras; only adapters that share all or nothing are exported",
        ),
        (lambda config: config["peft"].pop("alpha"), "has None for peft.alpha, not a number"),
        (lambda config: config["peft"].update(alpha="12"), "has '12' for peft.alpha, not a number"),
        (lambda config: config["peft"].update(alpha=float("nan")), "has nan for peft.alpha, not a number"),
        (lambda config: config.pop("peft"), "says None; only Megatron-Bridge's LoRA"),
        (lambda config: config.update(peft=None), "has None for peft, not its fields"),
        (lambda config: config.update(peft="lora"), "has 'lora' for peft, not its fields"),
        (lambda config: config.update(checkpoint=None), "has None for checkpoint, not its fields"),
    ],
    ids=["one half shared", "no alpha", "a word", "NaN", "no peft", "peft null", "peft a word", "checkpoint null"],
)
def test_settings_that_cannot_be_used_are_named(edit, said: str, everything: Path, tmp_path: Path):
    broken = with_settings(everything, tmp_path / "broken", edit)
    for export in export_both_ways(broken, tmp_path / "out"):
        with pytest.raises(ValueError, match=rf"run_config\.yaml {said}"):
            export()


@pytest.mark.parametrize(
    "edit",
    [lambda config: config.pop("checkpoint"), lambda config: config["checkpoint"].update(pretrained_checkpoint=None)],
    ids=["no settings", "null"],
)
def test_a_base_must_be_named_for_a_merge_only(edit, everything: Path, start: Path, tmp_path: Path):
    unnamed = with_settings(everything, tmp_path / "unnamed", edit)
    with pytest.raises(FileNotFoundError, match="does not say which weights these are for; name them with --base"):
        export_checkpoint(unnamed, tmp_path / "out")
    export_checkpoint(unnamed, tmp_path / "out", base=start / "megatron")
    export_adapters(unnamed, tmp_path / "adapter")


def with_settings(adapter: Path, copy: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint of adapters with another ``run_config.yaml``."""
    file = shutil.copytree(adapter, copy) / LAST / "run_config.yaml"
    config = yaml.safe_load(file.read_text())
    edit(config)
    file.write_text(yaml.safe_dump(config))
    return copy


QKV = "decoder.layers.self_attention.linear_qkv.adapter"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda tensors: tensors.pop(f"{QKV}.linear_in.weight"),
            rf"lacks halves of adapters: {QKV}\.linear_in\.weight;",
        ),
        (
            lambda tensors: tensors.pop(f"{QKV}.linear_out.weight"),
            rf"lacks halves of adapters: {QKV}\.linear_out\.weight;",
        ),
        (
            lambda tensors: tensors.update(
                {name: tensor.repeat(2, 1, 1) for name, tensor in tensors.items() if QKV in name}
            ),
            rf"does not fit its model: {QKV}\.linear_in\.weight is \[8, 4, \d+\], not \[4, 4, \d+\], {QKV}\.linear_out",
        ),
        (
            lambda tensors: tensors.update(
                {f"{QKV}.linear_in.weight": tensors[f"{QKV}.linear_in.weight"][..., 1:].clone()}
            ),
            rf"does not fit its model: {QKV}\.linear_in\.weight is",
        ),
    ],
    ids=["no A", "no B", "more layers", "another width"],
)
def test_adapters_that_do_not_fit_are_listed_and_nothing_is_left(edit, said: str, everything: Path, tmp_path: Path):
    broken = edited(everything, tmp_path / "broken", edit)
    for export in export_both_ways(broken, tmp_path / "out"):
        with pytest.raises(ValueError, match=said):
            export()
    assert not list(tmp_path.glob("out*"))


def test_the_report_describes_the_merged_weights(everything: Path, start: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QKV}.linear_out.weight"][1, 3, 0] = torch.nan

    broken = edited(everything, tmp_path / "broken", spoil)
    report = export_checkpoint(broken, tmp_path / "out")
    base = export_checkpoint(start / "megatron", tmp_path / "base")
    assert (report["source"], report["adapters"]) == (base["source"], str(broken / LAST))
    assert report["bytes_read"] > base["bytes_read"]
    differing = [
        name for name, entry in report["tensors"].items() if entry["xxh3_128"] != base["tensors"][name]["xxh3_128"]
    ]
    adapted = ("linear_qkv.weight", "linear_proj.weight", "experts.linear_fc1.weight", "experts.linear_fc2.weight")
    assert differing == [name for name in base["tensors"] if name.rstrip("0123456789").endswith(adapted)]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    inside = base["tensors"][name]["shape"][1]
    assert report["not_finite"] == report["tensors"][name]["nan"] == inside


def test_adapters_that_are_not_finite_are_warned_of(everything: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QKV}.linear_in.weight"][1, 0, 0] = torch.nan

    broken, log = edited(everything, tmp_path / "broken", spoil), tmp_path / "log"
    with log.open("w") as file:
        report = export_adapters(broken, tmp_path / "out", console=Console(file=file, width=200))
    assert report["not_finite"] > 0
    assert log.read_text().count("Warning: ") == report["not_finite"]  # of q, k and v, which share it
    assert "q_proj.lora_A.weight holds 1 NaN and 0 infinite values" in log.read_text()


def test_a_dry_run_writes_nothing_and_counts_the_adapters(everything: Path, start: Path, tmp_path: Path):
    alone = export_adapters(everything, tmp_path / "out", dry_run=True)
    merged = export_checkpoint(everything, tmp_path / "out", dry_run=True)
    base = export_checkpoint(start / "megatron", tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    saved = load_megatron(everything, LAST)  # with states of the optimizer
    adapters = sum(tensor.nbytes for name, tensor in saved.items() if name.startswith("decoder."))
    assert alone["bytes_read"] == adapters and alone["peak_memory"] > 2 * adapters
    assert merged["bytes_read"] == base["bytes_read"] + adapters
    assert merged["peak_memory"] > base["peak_memory"] + adapters
    export_adapters(everything, tmp_path / "out")
    assert alone["bytes_written"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_an_export_for_peft_that_is_killed_is_continued_to_the_same_bytes(
    everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    many_small_tasks(monkeypatch)
    import peft  # noqa: F401 - once, and not in every fork

    assert survives_kills(lambda: export_adapters(everything, tmp_path / "out"), tmp_path / "out") > 5


def test_an_export_does_not_replace_the_checkpoint_that_its_config_is_from(
    everything: Path, start: Path, tmp_path: Path
):
    hf = tmp_path / "hf"
    export_checkpoint(start / "megatron", hf)
    for export in (export_adapters, export_checkpoint):
        with pytest.raises(FileExistsError, match="is what is converted"):
            export(everything, hf, hf=hf, overwrite=True)
    assert (hf / "model.safetensors").is_file()
