"""Samples packed into one row give the results of separate samples: the loss of each token and every gradient."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_oss_vision.bridge.mcore import cpu, packing
from gpt_oss_vision.bridge.mcore.router_statistics import pop_expert_counts
from layouts import IGNORED, Layout, build, start_communication, with_labels
from tiny import tiny_batch, tiny_config

CONFIG = tiny_config()
# Lengths above YaRN's 32 positions, below the window of 8, and between; with two images, none and one.
SAMPLES = ((40, 2), (6, 0), (18, 1))
PADDED_TO = 8


def samples() -> list[dict[str, torch.Tensor]]:
    return [
        with_labels(tiny_batch(CONFIG, (images,), length=length, seed=length), CONFIG.image_token_id)
        for length, images in SAMPLES
    ]


def padded(tensor: torch.Tensor, value: int, multiple: int = PADDED_TO) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % multiple), value=value)


def pack(apart: list[dict[str, torch.Tensor]], device: str = "cpu", multiple: int = PADDED_TO) -> dict[str, Any]:
    """One row, each sample padded to a multiple, in the fields that Megatron-Bridge's steps fill."""
    from megatron.core.packed_seq_params import PackedSeqParams

    rows = [padded(sample["input_ids"], 1, multiple) for sample in apart]
    real = torch.tensor([sample["input_ids"].shape[1] for sample in apart])
    physical = torch.tensor([row.shape[1] for row in rows])
    starts, ends = (torch.cat([torch.zeros(1), counts.cumsum(0)]).int() for counts in (real, physical))
    starts, ends = starts.to(device), ends.to(device)
    longest = int(physical.max())
    return {
        "input_ids": torch.cat(rows, dim=1),
        "labels": torch.cat([padded(sample["labels"], IGNORED, multiple) for sample in apart], dim=1),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in apart if "pixel_values" in sample]),
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    }


def losses_and_gradients(model: torch.nn.Module, batches: list[dict[str, Any]]) -> tuple[torch.Tensor, dict]:
    """The losses of the tokens that are predicted, and the gradients, summed over the ranks that share them."""
    from megatron.core.distributed import finalize_model_grads

    model.zero_grad_buffer()
    losses = []
    for batch in batches:
        batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        per_token = model(position_ids=None, attention_mask=None, **batch)
        losses.append(per_token[batch["labels"] != IGNORED])
        losses[-1].sum().backward()
    finalize_model_grads([model])
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    return torch.cat(losses).detach(), gradients


def compare(path: Path, layout: Layout, tolerance: float = 1e-4) -> None:
    from megatron.bridge import AutoBridge

    start_communication()
    (model,) = build(AutoBridge.from_hf_pretrained(path), layout)
    apart = [
        sample | {key: padded(sample[key], IGNORED if key == "labels" else 1) for key in ("input_ids", "labels")}
        for sample in samples()
    ]
    expected, gradients = losses_and_gradients(model, apart)
    found, packed_gradients = losses_and_gradients(model, [pack(samples(), "cuda")])
    torch.testing.assert_close(found, expected, rtol=tolerance / 10, atol=tolerance / 10)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A bias of all keys has no effect in a softmax without a sink: its gradient is rounding only.
        is_rounding = "vision_adapter.vit" in name and name.endswith("k_proj.bias")
        scale = max(float(gradient.abs().max()), (1e-2 if is_rounding else 1e-4) * largest)
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WHOLE = {"use_distributed_optimizer": False}  # so that every rank has every gradient
LAYOUTS = [
    Layout(ddp=WHOLE),
    Layout(tp=2, ddp=WHOLE),
    Layout(ep=2, ddp=WHOLE),
    Layout(tp=2, ep=2, extra=FULL, ddp=WHOLE),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_samples_do_not_attend_to_each_other(layout: Layout, path: Path):
    cpu.run_ranks(layout.world_size, compare, path, layout)


def balanced(path: Path, layout: Layout, multiples: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
    """For packs with samples padded to each multiple: losses, gradients and counts of the routers."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    start_communication()
    (model,) = build(AutoBridge.from_hf_pretrained(path), layout)
    model.train()
    found = []
    for multiple in multiples:
        model.zero_grad_buffer()
        get_moe_metrics_tracker().clear()
        (0.0 * model(position_ids=None, attention_mask=None, **pack(samples(), multiple=multiple)).sum()).backward()
        finalize_model_grads([model])
        losses = get_moe_metrics_tracker().metrics["load_balancing_loss"].values.clone()
        torch.distributed.all_reduce(losses)
        routers = [layer.mlp.router for layer in model.module.decoder.layers]
        gradients = torch.stack([router.weight.main_grad.clone() for router in routers])
        found.append((losses, gradients, pop_expert_counts([model], len(routers), CONFIG.num_local_experts)))
    return found


@pytest.mark.parametrize("kind", ["aux_loss", "modality_aux_loss"])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}], ids=str)
def test_the_routers_leave_padding_out(sizes: dict, kind: str, path: Path):
    extra = {"moe_aux_loss_coeff": 0.3, "calculate_per_token_loss": False, "moe_router_load_balancing_type": kind}
    layout = Layout(**sizes, extra=extra, ddp=WHOLE)
    # The samples are 64 tokens together, so a row without padding suits both ranks.
    without, between = cpu.run_ranks(layout.world_size, balanced, path, layout, (1, PADDED_TO))[0]
    torch.testing.assert_close(between[0], without[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(between[1], without[1], rtol=0, atol=1e-5 * float(without[1].abs().max()))
    assert between[2].tolist() == without[2].tolist()
    tokens = sum(length for length, _ in SAMPLES)
    assert (between[2].sum((1, 2)) == tokens * CONFIG.num_experts_per_tok).all()


def run_packed(path: Path, layout: Layout, changes: dict[str, Any]) -> None:
    from megatron.bridge import AutoBridge

    torch.distributed.init_process_group("gloo")
    (model,) = build(AutoBridge.from_hf_pretrained(path), layout)
    model(position_ids=None, attention_mask=None, **pack(samples()) | changes)


def test_packing_with_context_parallelism_is_refused(path: Path):
    with pytest.raises(ValueError, match="do not support context_parallel_size=2"):
        cpu.run_ranks(2, run_packed, path, Layout(cp=2), {})


def test_packing_of_two_rows_is_refused(path: Path):
    with pytest.raises(ValueError, match="got 2 rows"):
        cpu.run_ranks(1, run_packed, path, Layout(), {"input_ids": torch.ones(2, 8, dtype=torch.long)})


@pytest.mark.parametrize(
    ("version", "problem"),
    [(91701, r"needs cuDNN 9\.18\.0 for .*, this is 9\.17\.1"), (None, "this is 0"), (91800, "")],
)
def test_a_cudnn_that_would_drop_the_sinks_is_refused(version: int | None, problem: str, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    row = pack(samples())
    with pytest.raises(ValueError, match=problem) if problem else nullcontext():
        packing.check_packing(row["input_ids"], row["packed_seq_params"], 1, "transformer_engine")


def test_a_cudnn_that_torch_refuses_is_a_sentence(monkeypatch):
    def version() -> int:
        raise RuntimeError("compiled against (9, 19, 0) but found (9, 14, 0)")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    row = pack(samples())
    with pytest.raises(ValueError, match=r"torch cannot use the cuDNN that was found \(compiled against"):
        packing.check_packing(row["input_ids"], row["packed_seq_params"], 1, "transformer_engine")
