"""Megatron-Bridge's training loop in bf16 on digits: both back ends, killed and resumed."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from gpt_oss_vision.bridge.hf.modeling_gpt_oss_vision import GPTOSSVisionForCausalLM
from gpt_oss_vision.conversion.formats.torch_dist_reader import open_checkpoint
from gpt_oss_vision.conversion.importing import import_checkpoint
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.tiny import tiny_config, tiny_processor
from gpu.cases import KILLED, STEPS, Start, training
from gpu.ranks import has_cuda, on_ranks


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """The quickstart's, with heads of 64."""
    folder = tmp_path_factory.mktemp("start")
    processor = tiny_processor()
    config = GPTOSSVisionConfig.from_dict(tiny_config().to_dict() | {"head_dim": 64})
    torch.manual_seed(0)
    GPTOSSVisionForCausalLM(config).save_pretrained(folder / "hf_start")
    processor.save_pretrained(folder / "hf_start")
    import_checkpoint(folder / "hf_start", folder / "megatron_start")
    digits = write_digits(folder / "digits", 0)
    few = digits.train_path.with_name("few.jsonl")
    with digits.train_path.open() as rows:
        few.write_text("".join(islice(rows, 64)))
    return Start(folder, digits)


def losses(folder: Path) -> list[float]:
    lines = [line.split() for line in (folder / "losses").read_text().splitlines()]
    by_step = {int(step): float(loss) for step, loss in lines}  # of a step that ran twice, the later
    assert [*by_step] == list(range(STEPS))
    return [*by_step.values()]


@pytest.fixture(scope="module")
def unbroken(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that trains on a back end once, and returns the folder."""
    made: dict[str, Path] = {}

    def folder(backend: str) -> Path:
        if backend not in made:
            made[backend] = tmp_path_factory.mktemp(backend)
            on_ranks(1, training, start, made[backend], backend, fresh=True)
        return made[backend]

    return folder


def test_the_loss_falls(backend: str, unbroken):
    found = losses(unbroken(backend))
    assert found[-1] < found[0] - (0.5 if has_cuda() else 0.1)


@pytest.mark.skipif(not has_cuda(), reason="a CPU has one back end")
def test_both_back_ends_have_the_same_losses(unbroken):
    assert losses(unbroken("torch")) == pytest.approx(losses(unbroken("transformer_engine")), rel=0.02)


def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(backend: str, start: Start, unbroken, tmp_path: Path):
    with pytest.raises(RuntimeError):
        on_ranks(1, training, start, tmp_path, backend, KILLED, fresh=True)
    on_ranks(1, training, start, tmp_path, backend, fresh=True)
    # Sums of atomics on a GPU differ from run to run.
    assert losses(tmp_path) == pytest.approx(losses(unbroken(backend)), rel=0.02 if has_cuda() else 1e-6)


def test_the_vision_bias_is_saved_in_fp32(backend: str, unbroken):
    checkpoint = open_checkpoint(unbroken(backend) / "saved")
    keys = [name for name in checkpoint.tensors if name.endswith("router.vision_bias")]
    assert keys
    assert {checkpoint.tensors[name].dtype for name in keys} == {torch.float32}
    others = {checkpoint.tensors[name].dtype for name in checkpoint.tensors if name.endswith("linear_proj.weight")}
    assert others == {torch.bfloat16}
