"""The estimate of memory beside what torch's allocator gives out at most, in the training steps of the tiny recipes.

Kernels and libraries of CUDA take memory of their own; the bytes of tensors are the same on a CPU. Not counted by the
estimate, and under 10 % here: the probabilities that attention keeps on a CPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from allocated import Allocated

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.catalog import find, load

pytestmark = pytest.mark.slow


def estimated_and_allocated(config: Any, folder: Path, weights: Path | None) -> tuple[float, int]:
    """Bytes of two training steps: estimated, and at most allocated by torch at one time."""
    from gpt_oss_vision.recipes.training.plan import estimate
    from gpt_oss_vision.recipes.training.run import Hardware, Stage, complete
    from gpt_oss_vision.recipes.training.train import Callback, train

    class Start(Callback):
        def on_train_start(self, context: Any) -> None:
            allocated.most = 0  # what building the model takes at most is no part of the estimate
            self.estimate = estimate(context.state.cfg, 1).total

    torch.distributed.init_process_group("gloo")
    config.train.train_iters, config.validation.eval_iters, config.checkpoint.save_interval = 2, 0, None
    stage = Stage(name="", config=config, given=frozenset(), needs_weights=False, hardware=Hardware(ranks=1))
    complete(config, stage, folder, folder / "digits", weights)
    config.checkpoint.save = config.checkpoint.load = None
    start = Start()
    with Allocated() as allocated:
        train(config, callbacks=[start])
    return start.estimate, allocated.most


@pytest.mark.parametrize("task", ["align", "sft", "lora", "long_context"])
def test_the_estimate_is_within_a_tenth_of_the_peak(task: str, start: Path, tmp_path: Path):
    weights = start / "megatron_start" if task == "lora" else None
    config = load(find(f"gpt_oss_vision_tiny_{task}"))
    # A fork of a process that has trained a tokenizer cannot train another.
    config.dataset.path, config.dataset.processor_path = str(start / "digits/train.jsonl"), str(start / "hf_start")
    ((estimated, allocated),) = cpu.run_ranks(1, estimated_and_allocated, config, tmp_path, weights)
    print(f"{task}: {estimated / 2**20:.2f} MiB estimated, {allocated / 2**20:.2f} MiB at most allocated")
    assert estimated == pytest.approx(allocated, rel=0.1)
