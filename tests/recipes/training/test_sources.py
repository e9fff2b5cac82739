"""Losses by source of the data, in every layout that has its own way of computing losses."""

from gpt_oss_vision.bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable

# isort: split

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.quickstart.run import training_config
from gpt_oss_vision.recipes.quickstart.settings import Settings
from gpt_oss_vision.recipes.training.metrics import Metrics
from gpt_oss_vision.recipes.training.train import train


@pytest.fixture(scope="module")
def sources(start: Path) -> list[dict[str, Any]]:
    """Chats that all begin with an image, and chats without any; a quarter of the samples are of the second kind."""
    digits = write_digits(start / "digits", Settings().seed)
    with digits.train_path.open() as lines:
        rows = [json.loads(line) for line in islice(lines, 60)]
    parts = [part for row in rows for part in row["messages"][0]["content"] if part["type"] == "image"]
    chats = {
        "seen": [[part, {"type": "text", "text": "Which digit is this?"}] for part in parts[:12]],
        "unseen": [[{"type": "text", "text": "Which digit is this?"}]] * 5,
    }
    for name, contents in chats.items():
        lines = [
            json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "three"}]})
            for content in contents
        ]
        (digits.folder / f"{name}.jsonl").write_text("\n".join(lines))
    weights = {"seen": 3, "unseen": 1}
    return [
        {"path": str(digits.folder / f"{name}.jsonl"), "weight": weight, "name": name}
        for name, weight in weights.items()
    ]


def run(out: Path, log: Path, sources: list[dict[str, Any]], sizes: dict[str, int], packing: bool) -> None:
    settings = Settings(steps=2, seq_length=64, batch_size=8, **sizes)
    config = training_config(out, write_digits(out / "digits", settings.seed), settings)
    config.dataset.path, config.dataset.sources, config.dataset.packing = None, sources, packing
    config.train.micro_batch_size = 1
    config.logger.log_interval, config.checkpoint.save = 1, None
    log.mkdir(exist_ok=True)
    train(config, log=log)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel": 2}, {"pipeline_parallel": 2, "expert_parallel": 2}])
def test_the_loss_of_a_source_is_that_of_its_tokens(out: Path, tmp_path: Path, sources, sizes: dict, packing: bool):
    cpu.run_ranks(Settings(**sizes).ranks, run, out, tmp_path / "log", sources, sizes, packing)
    metrics = Metrics(tmp_path / "log")
    metrics.update()
    assert metrics.sources() == ["seen", "unseen"]
    for step in (1, 2):
        values = metrics.steps[step]
        # One source has an image before every learned token, and the other none.
        assert values["loss_source_seen"] == pytest.approx(values["loss_after_image"], rel=1e-9)
        assert values["loss_source_unseen"] == pytest.approx(values["loss_without_image"], rel=1e-9)
        mean = (3 * values["loss_source_seen"] + values["loss_source_unseen"]) / 4
        if not packing:  # a step has 6 samples of one source and 2 of the other, with as many learned tokens each
            assert values["loss"] == pytest.approx(mean, rel=1e-5)
