"""The quickstart as a new user runs it: in a process of its own, with its defaults."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gpt_oss_vision.errors import UserError
from gpt_oss_vision.recipes.data.digits import NO_IMAGE, WORDS
from gpt_oss_vision.recipes.quickstart.settings import Settings


def command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "gpt_oss_vision.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    done = command("quickstart", "--out", str(folder), timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Training: 300 of 300" in done.stdout
    assert f"Checkpoints, pictures and report.json are in {folder}" in done.stdout
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_the_model_answers_from_the_image(report: dict):
    assert report["accuracy_right_image"] >= 0.90
    assert report["accuracy_wrong_image"] <= 0.25
    assert report["accuracy_no_image"] <= 0.25


@pytest.mark.slow
def test_the_exported_model_is_the_trained_one(report: dict):
    assert report["max_logit_difference"] <= 1e-4


@pytest.mark.slow
def test_it_learned_within_the_memory_of_a_laptop(report: dict):
    assert report["loss_last"] < report["loss_first"] / 10
    assert 0 < report["peak_rss_gib"] < 6
    assert report["seconds"] > 0
    assert {"torch", "transformers", "megatron-core", "megatron-bridge"} <= report["versions"].keys()


@pytest.mark.slow
def test_all_outputs_are_written(out: Path):
    for picture in ("loss.png", "predictions.png", "experts.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 300
    assert (out / "hf" / "model.safetensors").is_file()
    assert (out / "hf" / "processor_config.json").is_file()
    assert (out / "megatron" / "latest_checkpointed_iteration.txt").read_text().strip() == "300"
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    assert {file.name for file in out.iterdir()} == {
        "digits",
        "experts.png",
        "hf",
        "hf_start",
        "log.txt",
        "loss.png",
        "megatron",
        "megatron_start",
        "predictions.png",
        "report.json",
        "tensorboard",
    }


@pytest.mark.slow
def test_the_command_generates_with_the_exported_model(out: Path):
    image = out / "digits" / "images" / "0003.png"
    question = ["--prompt", "Which digit is this?", "--image", str(image)]
    done = command("generate", "--model", str(out / "hf"), *question, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in (*WORDS, NO_IMAGE)


def test_who_may_read_the_first_config_may_read_the_weights(start: Path):
    modes = {file.stat().st_mode for file in (start / "hf_start").iterdir()}
    assert modes == {(start / "hf_start" / "config.json").stat().st_mode}


@pytest.mark.upstream
def test_safetensors_still_lets_only_the_owner_read(tmp_path: Path):
    """When this fails, `write_checkpoint` need not set the mode of the weights."""
    save_file({"a": torch.ones(1)}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_the_command_refuses_the_layouts_that_the_model_refuses(start: Path):
    from gpt_oss_vision.recipes.quickstart.run import provider_for

    for sizes in product((1, 2, 3, 4), (1, 2, 3, 4, 8), (1, 2, 3, 8, 16)):
        names = ("tensor_parallel", "pipeline_parallel", "expert_parallel")
        settings = Settings(**dict(zip(names, sizes, strict=True)))
        assert refusal(settings.check_layout) == refusal(provider_for(start / "hf_start", settings).finalize), sizes


def refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
