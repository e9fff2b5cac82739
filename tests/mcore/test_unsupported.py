"""The table of features in docs/parallelism.md, row by row: "works" must train, and "refused" must raise."""

import re
from pathlib import Path

import pytest
import torch
from features import PAGE, ROWS, Row, rows

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.bridge.mcore.provider import provider_from_config
from gpt_oss_vision.bridge.mcore.unsupported import FIXED, UNSUPPORTED, check_supported
from gpt_oss_vision.bridge.weight_map import PARAM_GROUPS
from layouts import Layout, Microbatch, Run, megatron_run, reference_run, with_labels
from tiny import tiny_batch, tiny_config, tiny_model

CONFIG = tiny_config()
# Both microbatches of the first data-parallel rank have images; those of the second are text.
IMAGES = [(1, 1), (0, 0), (2, 0), (0, 0)]


@pytest.fixture(scope="module")
def reference() -> tuple[list[list[Microbatch]], Run]:
    """The microbatches of two steps, and transformers' run on them."""
    steps = [
        [
            with_labels(tiny_batch(CONFIG, images, length=24, seed=10 * step + place), CONFIG.image_token_id)
            for place, images in enumerate(IMAGES)
        ]
        for step in range(2)
    ]
    return steps, reference_run(tiny_model(CONFIG), steps)


def test_every_cell_of_the_table_has_one_of_three_words():
    assert len(ROWS) > 20
    assert {row.torch for row in ROWS} == {"works", "refused"}
    assert {row.transformer_engine for row in ROWS} == {"built", "refused"}


@pytest.mark.parametrize("row", rows(torch="works"))
def test_what_works_trains_to_the_losses_of_transformers(row: Row, path: Path, reference):
    steps, expected = reference
    layout = Layout(dp=2, extra=row.model, ddp=row.ddp)
    (found,) = [run for run in cpu.run_ranks(layout.world_size, megatron_run, path, layout, steps) if run is not None]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)


def refused(row: Row, backend: str) -> str:
    provider = provider_from_config(CONFIG, **row.model)
    with pytest.raises(ValueError, match="is not supported") as caught:
        check_supported(provider, backend)
    return str(caught.value)


@pytest.mark.parametrize("row", rows(torch="refused"))
def test_what_is_refused_is_refused_when_finalized(row: Row):
    provider = provider_from_config(CONFIG, backend="torch", **row.model)
    with cpu.runtime(), pytest.raises(ValueError, match="is not supported") as caught:
        provider.finalize()
    sentence = str(caught.value)
    assert sentence == refused(row, "torch")
    assert set(row.model) & set(re.findall(r"\w+", sentence))


@pytest.mark.parametrize("row", rows(transformer_engine="refused"))
def test_what_is_refused_on_transformer_engine_has_its_reason(row: Row):
    assert set(row.model) & set(re.findall(r"\w+", refused(row, "transformer_engine")))


def fused_gradient() -> torch.Tensor:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    torch.distributed.init_process_group("gloo")
    logits = torch.randn(8, 1, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    fused_vocab_parallel_cross_entropy(logits, torch.arange(8)[:, None], torch.distributed.group.WORLD).sum().backward()
    return logits.grad


@pytest.mark.upstream
def test_megatron_cores_fused_cross_entropy_still_rounds_its_gradient():
    """When this fails, the `torch` back end can support it."""
    (gradient,) = cpu.run_ranks(1, fused_gradient)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, gradient.bfloat16().float())


def test_every_refusal_is_on_the_page():
    on_page = {name for row in ROWS if "refused" in (row.torch, row.transformer_engine) for name in row.model}
    assert {setting.field for setting in UNSUPPORTED} <= on_page
    assert {*FIXED} <= {*re.findall(r"`(\w+)`", PAGE.read_text())}


def test_a_model_with_nothing_to_train_is_refused():
    provider = provider_from_config(CONFIG, **{f"freeze_{group}": True for group in PARAM_GROUPS})
    with cpu.runtime(), pytest.raises(ValueError, match="All 4 groups of parameters are frozen"):
        provider.finalize()


@pytest.mark.parametrize("group", PARAM_GROUPS)
def test_every_group_is_on_the_page(group: str):
    assert f"`{group}`" in PAGE.read_text()
    assert f"model.freeze_{group}=True" in PAGE.read_text()
