"""The commands `recipes` and `train` before any training: what they print, and how fast."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml

import gpt_oss_vision
from gpt_oss_vision.recipes.catalog import RECIPES

SECONDS = 0.5


def answer(*arguments: str) -> tuple[int, str, str, float]:
    """Exit code, output, errors and CPU seconds of the command in a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-X", "importtime", "-m", "gpt_oss_vision.cli", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert not {" torch", " transformers", " megatron"} & {
        line.rpartition("|")[2].rstrip() for line in done.stderr.splitlines()
    }
    return done.returncode, done.stdout, errors, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_list_has_every_recipe_within_half_a_second():
    code, said, _, seconds = answer("recipes")
    assert code == 0 and seconds < SECONDS
    lines = said.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [recipe.name for recipe in RECIPES]
    assert all(recipe.purpose in line for recipe, line in zip(RECIPES, lines, strict=True))


def test_every_number_of_a_recipe_has_its_source_within_half_a_second():
    code, said, _, seconds = answer("recipes", "gpt_oss_vision_20b_sft", "--why")
    assert code == 0 and seconds < SECONDS
    assert "  optimizer.lr=1e-05\n    LLaVA-NeXT and LLaVA-OneVision, training scripts; " in said
    assert "8e-5 (InternVL)" in said


WRONG = {
    ("recipes", "--why"): "--why goes with the name of a recipe",
    ("recipes", "gpt_oss_vision_20b_sft", "--why", "optimizer.lr=1"): "it takes no settings",
    (
        "train",
        "gpt_oss_vision_20b_stf",
    ): "There is no recipe gpt_oss_vision_20b_stf; near it are gpt_oss_vision_20b_sft",
    ("train", "gpt_oss_vision_20b_sft", "optimizer.lt=1"): "optimizer.lt is no setting; the nearest is optimizer.lr",
    ("train", "gpt_oss_vision_20b_sft", "train.train_iters=abc"): "train.train_iters=abc: ",
    ("train", "gpt_oss_vision_20b_sft", "gpus=16"): "gpus=16 is for --dry-run; a run has the ranks that start it",
    ("train", "gpt_oss_vision_20b_sft", "--lr", "1e-5"): "--lr 1e-5: a setting is written with `=`",
    ("recipes", "gpt_oss_vision_20b_sft", "lr=1"): "lr is no setting; the nearest is optimizer.lr",
    ("recipes", "nothing"): "There is no recipe nothing",
}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    WRONG.items(),
    ids=lambda arguments: " ".join(arguments) if isinstance(arguments, tuple) else "",
)
def test_a_wrong_line_is_answered_within_half_a_second(arguments: tuple[str, ...], sentence: str):
    code, _, errors, seconds = answer(*arguments)
    assert code == 2 and seconds < SECONDS
    assert sentence in errors and errors.count("\n") == 0


def test_a_wrong_line_is_answered_by_one_rank(monkeypatch: pytest.MonkeyPatch):
    for rank, expected in (("0", 1), ("3", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "4")
        code, _, errors, _ = answer("train", "gpt_oss_vision_20b_sft", "lr=1")
        assert (code, errors.count("is no setting")) == (2, expected)


@pytest.fixture(scope="module")
def _warm() -> None:
    gpt_oss_vision.register()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("name", ["gpt_oss_vision_20b_sft", "gpt_oss_vision_20b_lora", "gpt_oss_vision_tiny_align"])
def test_a_recipe_is_shown_as_settings_that_give_it_again(name: str, tmp_path: Path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    assert forked.run("recipes", name, "optimizer.lr=2e-5", "train.tokens=1B", output=first) == 0
    settings = yaml.safe_load(first.read_text())
    assert settings["optimizer"]["lr"] == 2e-5
    assert "lr: 2.0e-05  # in the recipe " in first.read_text()
    assert forked.run("recipes", name, f"@{first}", output=second) == 0
    assert second.read_text() == first.read_text()


DEFAULTS_OF_CLASSES = ("optimizer.adam_beta2=0.999", "ddp.overlap_grad_reduce=false", "train.manual_gc=false")
"""Which differ from the recipe's."""


@pytest.mark.usefixtures("_warm")
def test_settings_that_are_defaults_of_their_classes_come_back_too(tmp_path: Path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    others = ("model.num_moe_experts=4", "model.use_vision=false", "time=4h", "mixed_precision=null")
    assert forked.run("recipes", "gpt_oss_vision_tiny_pretrain", *DEFAULTS_OF_CLASSES, *others, output=first) == 0
    settings = yaml.safe_load(first.read_text())
    assert settings["optimizer"]["adam_beta2"] == 0.999 and settings["model"]["num_moe_experts"] == 4
    assert (settings["ddp"]["overlap_grad_reduce"], settings["train"]["manual_gc"]) == (False, False)
    assert (settings["model"]["use_vision"], settings["time"]) == (False, "4h")
    assert forked.run("recipes", "gpt_oss_vision_tiny_pretrain", f"@{first}", output=second) == 0
    assert second.read_text() == first.read_text()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (("train.epochs=2",), "train.epochs=2 is a number of steps only with the data"),
        (("ddp.grad_reduce_in_fp32=false",), "it becomes True; set mixed_precision.grad_reduce_in_fp32"),
        (("model.fp8=e4m3",), "model.fp8=e4m3 has no effect, as it becomes None; set mixed_precision.fp8"),
        (("model.bf16=false",), "model.bf16=False has no effect, as it becomes True; set mixed_precision.bf16"),
        (("ddp.average_in_collective=true",), "contradicts model.calculate_per_token_loss=true"),
        (("optimizer.min_lr=1",), "optimizer.min_lr=1, at which the schedule ends, is above optimizer.lr=1e-05"),
        (("optimizer.optimizer=sgd",), "optimizer.optimizer=sgd needs ddp.use_distributed_optimizer=false"),
    ],
)
def test_a_setting_that_would_have_no_effect_is_refused(settings: tuple[str, ...], sentence: str, tmp_path: Path):
    output = tmp_path / "output"
    assert forked.run("recipes", "gpt_oss_vision_20b_sft", *settings, output=output) in (1, 2)
    assert sentence in output.read_text()


@pytest.mark.usefixtures("_warm")
def test_another_learning_rate_ends_at_the_share_of_the_recipe(tmp_path: Path):
    output = tmp_path / "output"
    assert forked.run("recipes", "gpt_oss_vision_tiny_sft", "optimizer.lr=0.006", output=output) == 0
    assert "min_lr: 6.0e-05  # in the recipe 3.0e-05" in output.read_text()


@pytest.mark.usefixtures("_warm")
def test_a_recipe_says_what_it_costs(tmp_path: Path):
    output = tmp_path / "output"
    assert forked.run("recipes", "gpt_oss_vision_20b_sft", output=output) == 0
    said = output.read_text()
    assert "ranks         8 H100 SXM 80 GB; 21.22B parameters in all" in said
    assert "GPU-hours     22.3 per billion tokens, 164 in all (at 300 TFLOP/s per GPU, without the tower)" in said
    assert "an image is 258 of them" in said


CHECKED = '{"text": "Cats sleep most of the day."}\n' * 98


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize(("bad", "options", "code"), [(0, (), 0), (2, (), 1), (2, ("--max-skipped", "0.1"), 0)])
def test_data_that_cannot_be_used_fails_a_check(bad: int, options: tuple[str, ...], code: int, tmp_path: Path):
    rows, output, numbers = tmp_path / "rows.jsonl", tmp_path / "output", tmp_path / "numbers.json"
    rows.write_text(CHECKED + "{\n" * bad)
    line = ("data", "check", str(rows), "--recipe", "gpt_oss_vision_tiny_sft", "--json", str(numbers), *options)
    assert forked.run(*line, output=output) == code
    said, found = output.read_text(), json.loads(numbers.read_text())
    assert (found["rows"], found["usable"], len(found["skipped"])) == (98 + bad, 98, bad)
    assert "format        JSON lines: 98 text" in said
    assert "2 an epoch of 64 rows" in said
    assert (tmp_path / "rows.jsonl.lock").exists()


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [("", "rows.jsonl is empty"), ('[{"text": "a"}, {"te', "is malformed JSON, or cut off"), (None, "No such file")],
)
def test_a_file_that_cannot_be_checked_is_named(content: str | None, sentence: str, tmp_path: Path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "output"
    if content is not None:
        rows.write_text(content)
    assert forked.run("data", "check", str(rows), output=output) == 1
    assert sentence in output.read_text()
    assert not (tmp_path / "rows.jsonl.lock").exists()
