"""The dry run: what a run would do, by the checks of the run itself, and what it is refused for."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest

import gpt_oss_vision
from gpt_oss_vision.bridge.mcore import cpu
from gpt_oss_vision.recipes.data.digits import write_digits
from gpt_oss_vision.recipes.data.tiny import write_processor

TINY, LARGE = "gpt_oss_vision_tiny_sft", "gpt_oss_vision_20b_pretrain"


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    gpt_oss_vision.register()
    from gpt_oss_vision.recipes import pretrain, tiny  # noqa: F401 - so that forks need not import them
    from gpt_oss_vision.recipes.training import run  # noqa: F401


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "digits"
    cpu.run_ranks(1, write_few, folder)
    return folder


def write_few(folder: Path) -> None:
    """Four rows, one of which has no image, and one more with an image that is missing."""
    rows = [json.loads(line) for line in write_digits(folder, 0).train_path.read_text().splitlines()]
    without = next(row for row in rows if len(row["messages"][0]["content"]) == 1)
    with_image = [row for row in rows if len(row["messages"][0]["content"]) == 2][:3]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [without, *with_image]))
    missing = json.dumps(with_image[0]).replace("images/", "images/no")
    (folder / "broken.jsonl").write_text((folder / "few.jsonl").read_text() + missing + "\n")
    write_processor(folder / "processor")


@pytest.fixture
def dry_run(digits: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[int, str]]]:
    """A function that runs `train --dry-run`; its exit code and what it prints."""

    def call(name: str, *settings: str) -> tuple[int, str]:
        output = tmp_path / "output"
        shared = (f"data.processor_path={digits}/processor", f"data.path={digits}/few.jsonl", f"out={tmp_path}/run")
        named = [setting.partition("=")[0] for setting in settings]
        shared = tuple(setting for setting in shared if setting.partition("=")[0] not in named)
        code = forked.run("train", name, "--dry-run", *shared, *settings, output=output)
        return code, output.read_text()

    yield call
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts(dry_run):
    code, said = dry_run(TINY, "train.train_iters=10", "train.global_batch_size=16")
    assert code == 0
    assert "steps         10 of 16 rows, 512 tokens; an image is 6 of them" in said
    assert "data          4 rows with 3 images, 0 rows are skipped; 40.00 epochs" in said
    assert "image tokens  72 per step, 14.1% of all" in said
    assert "checkpoints   1 of 0.01 GiB" in said


def test_a_dry_run_counts_the_operations_of_the_tower(dry_run):
    """As the line of progress does: three images in four rows."""
    from gpt_oss_vision.bridge.mcore.flops import decoder_flops, image_flops
    from gpt_oss_vision.recipes import catalog

    code, said = dry_run(TINY, "train.train_iters=10", "train.global_batch_size=16")
    assert code == 0
    model = catalog.load(catalog.find(TINY)).model
    image = image_flops(model).training()
    flops = (decoder_flops(model, 512).training() + 16 * 3 / 4 * image) / 512
    assert f"images        0.8 in a row, at most 1; the tower takes {image:.3g} FLOPs for one\n" in said
    assert f"operations    {flops:.3g} FLOPs per token, {flops * 5120:.3g} for 5,120 tokens" in said


def cost_of(name: str, **settings: object):
    from gpt_oss_vision.recipes import catalog
    from gpt_oss_vision.recipes.training.plan import Hardware, cost_without_data

    recipe = catalog.find(name)
    config = catalog.load(recipe)
    for key, value in settings.items():
        section, _, field = key.partition("__")
        setattr(getattr(config, section), field, value)
    return cost_without_data(config, Hardware(ranks=recipe.gpus, gpu="H100", memory=73.0, tflops=300.0))


def test_without_data_rows_full_of_images_are_assumed_for_memory_and_text_for_operations():
    cost = cost_of(LARGE)
    lines = dict(cost.lines())
    assert lines["images"].startswith("memory is for 31 in every row, as many as fit; the tower takes ")
    assert "FLOPs per token of text" in lines["operations"]
    assert "without the tower" in lines["GPU-hours"]
    text = cost_of(LARGE, model__use_vision=False)
    assert text.flops_per_token == cost.flops_per_token
    assert "images" not in dict(text.lines())


def test_a_limit_of_images_in_a_pack_limits_the_memory():
    packed = {"dataset__packing": True, "dataset__images_per_pack": 4, "model__vision_recompute": False}
    few, many = cost_of(LARGE, **packed), cost_of(LARGE, **packed | {"dataset__images_per_pack": None})
    assert (few.most_images, many.most_images) == (4, 31)
    assert few.memory.total < many.memory.total


def test_settings_that_the_memory_does_not_count_are_named():
    assert cost_of(LARGE).uncounted == []
    cost = cost_of(LARGE, model__fine_grained_activation_offloading=True, model__offload_modules=["moe_act"])
    assert dict(cost.lines())["not counted"] == (
        "the estimate of memory does not count model.fine_grained_activation_offloading=True"
    )


LENGTHS = {"train.tokens=2000": 4, "train.epochs=6.1": 2, "train.train_iters=7": 7}


@pytest.mark.parametrize(("length", "steps"), LENGTHS.items(), ids=LENGTHS)
def test_the_length_of_a_run_may_be_given_in_tokens_or_epochs(length: str, steps: int, dry_run):
    code, said = dry_run(TINY, length, "train.global_batch_size=16")
    assert code == 0
    assert f"steps         {steps} of 16 rows" in said


PACKED = (TINY, "data.packing=true", "train.micro_batch_size=1", "train.global_batch_size=2", "data.seq_length=64")


def test_a_dry_run_counts_packs(dry_run):
    code, said = dry_run(*PACKED, "train.epochs=3")
    assert code == 0
    assert "steps         3 of 2 rows, 128 tokens; an image is 6 of them" in said
    assert "data          4 rows with 3 images, 0 rows are skipped; 3.00 epochs" in said
    assert "packs         2 an epoch, 2.0 samples each, " in said
    assert "image tokens  18 per step" in said


def test_a_dry_run_counts_the_rows_of_each_source_in_an_epoch(dry_run, digits: Path):
    (digits / "text.jsonl").write_text('{"text": "one two"}\n' * 7)
    code, said = dry_run(
        TINY, "data.path=null", f"data.sources=[{digits}/few.jsonl,{{path: {digits}/text.jsonl, repeat: 0.5}}]"
    )
    assert code == 0, said
    assert "data          8 rows with 3 images" in said
    assert "an epoch      4 rows of few.jsonl, 4 rows of text.jsonl" in said


REFUSED = {
    "a seed of the data": ((TINY, "data.seed=-1"), "dataset.seed=-1 is below 0"),
    "packs of more than a row": ((TINY, "data.packing=true"), "dataset.packing needs train.micro_batch_size=1"),
    "a row with more images than a pack": ((*PACKED, "data.images_per_pack=0"), "images_per_pack=0 is below 1"),
    "data that is not there": ((TINY, "data.path=none.jsonl"), "No such file or directory: none.jsonl"),
    "rows that cannot be used": ((TINY, "data.path=DIGITS/broken.jsonl"), "1 of 5 rows can't be used"),
    "a layout": ((TINY, "model.tensor_model_parallel_size=4", "gpus=4"), "does not divide the 2 key/value groups"),
    "a batch": (
        (TINY, "train.global_batch_size=30"),
        "train.global_batch_size=30 is no multiple of the 16 rows of a microbatch",
    ),
    "a number of ranks": ((TINY, "model.pipeline_model_parallel_size=2", "gpus=3"), "3 ranks are no multiple of the 2"),
    "a processor of another model": ((LARGE,), "the model reads 258 tokens 200013; take the processor of the weights"),
    "weights that are not there": ((TINY, "weights=nowhere"), "nowhere is no Megatron checkpoint"),
    "no weights": (("gpt_oss_vision_20b_sft",), "sft starts from weights: name a Megatron checkpoint with weights=DIR"),
    "architecture beside weights": (
        (TINY, "weights=nowhere", "model.hidden_size=32"),
        "model.hidden_size cannot be set, as the architecture comes from the weights",
    ),
    "two lengths of a row": (
        (TINY, "model.seq_length=64", "data.seq_length=128"),
        "model.seq_length=64 and dataset.seq_length=128 differ",
    ),
    "a row longer than YaRN reaches": (
        (TINY, "data.seq_length=1024"),
        "longer than the 512 positions that YaRN covers",
    ),
    "two weight decays": (
        (TINY, "optimizer.weight_decay=0.1", "scheduler.end_weight_decay=0.2"),
        "optimizer.weight_decay=0.1 has no effect",
    ),
    "a stage that the run does not have": ((TINY, "align.optimizer.lr=1"), "this run has no stage align"),
    "a tracker that is not installed": (
        (TINY, "logger.mlflow_experiment=x", "logger.mlflow_run_name=y"),
        "logger.mlflow_experiment needs the package mlflow, which is not installed",
    ),
    "validation data that are not there": (
        (TINY, "data.valid_path=/none.jsonl"),
        "No such file or directory: /none.jsonl",
    ),
    "a processor that is not there": ((TINY, "data.processor_path=/none"), "dataset.processor_path=/none is no folder"),
    "a file in place of the folder": ((TINY, "out=DIGITS/few.jsonl/run"), "few.jsonl is a file"),
    "too little disk": ((TINY, "train.train_iters=1000000", "checkpoint.most_recent_k=-1"), "do not fit the"),
}


@pytest.mark.parametrize(("line", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_run_would_fail_for_fails_the_dry_run(line: tuple[str, ...], said: str, dry_run, digits: Path):
    name, *settings = line
    code, printed = dry_run(name, *(setting.replace("DIGITS", str(digits)) for setting in settings))
    assert code in (1, 2)
    assert said in printed


def test_a_text_that_becomes_an_object_has_its_effect(dry_run):
    layout = "model.pipeline_model_parallel_layout='Et|tttL'"
    code, said = dry_run(TINY, layout, "model.pipeline_model_parallel_size=2", "gpus=2", "train.micro_batch_size=16")
    assert code == 0, said


def test_later_stages_have_the_processor_of_the_weights(start: Path, dry_run, digits: Path):
    stages = "gpt_oss_vision_tiny_align,gpt_oss_vision_tiny_sft"
    line = ("data.processor_path=null", f"weights={start}/megatron_start", "train.train_iters=3")
    code, said = dry_run(stages, *line)
    assert code == 0, said
    assert said.count("data          4 rows with 3 images") == 2
    assert f"starts        from {start}/megatron_start" in said
    assert "/run/align/checkpoints" in said


def test_the_checkpoints_of_all_stages_share_the_disk(monkeypatch: pytest.MonkeyPatch, dry_run):
    from gpt_oss_vision.recipes.training import plan

    free = 3 * 2**20  # one stage has 2.0 MiB of weights and states
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    stages = "gpt_oss_vision_tiny_pretrain,gpt_oss_vision_tiny_sft"
    code, said = dry_run(stages, "train.train_iters=3")
    assert code == 1
    assert "1 checkpoints of 0.0 GiB and 1 checkpoints of 0.0 GiB do not fit the 0.0 GiB that are free" in said


def test_weights_and_biases_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    from gpt_oss_vision.errors import UserError
    from gpt_oss_vision.recipes import catalog
    from gpt_oss_vision.recipes.training.plan import Hardware, cost_without_data

    config = catalog.load(catalog.find(TINY))
    config.logger.wandb_project = "x"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"logger.wandb_project needs the package wandb, which is not installed"):
        cost_without_data(config, Hardware(ranks=1))


def test_a_gpu_without_enough_memory_is_refused(digits: Path, tmp_path: Path):
    from gpt_oss_vision.recipes import catalog
    from gpt_oss_vision.recipes.training.plan import Hardware, cost_without_data

    config = catalog.load(catalog.find(LARGE))
    (sentence,) = cost_without_data(config, Hardware(ranks=16, gpu="H100", memory=40.0)).problems()
    assert "(parameters 4.47, gradients 8.94, " in sentence and "an H100 gives 40 GiB: use more expert" in sentence
    assert not cost_without_data(config, Hardware(ranks=16, gpu="H100", memory=80.0)).problems()
