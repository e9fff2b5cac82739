"""The recipes: each builds offline, finalizes at its size, fits its GPU, and is what the catalogue says."""

import copy
import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import gpt_oss_vision
from gpt_oss_vision.errors import UsageError
from gpt_oss_vision.recipes import catalog
from gpt_oss_vision.recipes.catalog import GPUS, RECIPES, Recipe
from gpt_oss_vision.recipes.sources import PLUMBING, ROWS, why

BY_NAME = {recipe.name: recipe for recipe in RECIPES}


@pytest.fixture(scope="module", params=RECIPES, ids=BY_NAME)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.fixture(scope="module")
def made(recipe: Recipe):
    """The configuration of a recipe as its function returns it."""
    gpt_oss_vision.register()
    return catalog.load(recipe)


@pytest.fixture
def config(made):
    return copy.deepcopy(made)


def finalized(recipe: Recipe, config, folder: Path, monkeypatch: pytest.MonkeyPatch, engine: bool = False):
    """The configuration as Megatron-Bridge's loop finalizes it, with the paths of a user, at the recipe's own size.

    Without a CUDA device the layers are those of `torch`, with `engine` those of Transformer Engine.
    """
    from megatron.bridge.training.config import runtime_config_update

    from gpt_oss_vision.bridge.mcore.backend import planned_for_gpu

    (folder / "weights").mkdir(exist_ok=True)
    if recipe.size != "tiny":
        config.dataset.path, config.dataset.processor_path = str(folder / "rows.jsonl"), str(folder)
    else:
        config.dataset.folder = str(folder / "digits")
    config.checkpoint.save = config.checkpoint.load = str(folder / "run")
    config.checkpoint.pretrained_checkpoint = str(folder / "weights")
    monkeypatch.setenv("WORLD_SIZE", str(recipe.gpus))
    for name in config.env_vars:
        monkeypatch.setenv(name, "")  # so that the variable is removed after the test
        monkeypatch.delenv(name)
    with planned_for_gpu() if engine else nullcontext():
        runtime_config_update(config)
    assert config.model.transformer_impl == ("transformer_engine" if engine else "local")
    return config


def test_there_are_recipes_of_every_task_for_every_size():
    assert len(RECIPES) >= 14
    tasks = {size: {recipe.task for recipe in RECIPES if recipe.size == size} for size in ("20b", "120b", "tiny")}
    assert set(map(frozenset, tasks.values())) == {frozenset({"pretrain", "align", "sft", "lora", "long_context"})}


def test_a_configuration_holds_no_path(made):
    assert made.dataset.path is made.dataset.processor_path is made.dataset.valid_path is made.logger.tensorboard_dir
    checkpoint = made.checkpoint
    assert checkpoint.save is checkpoint.load is checkpoint.pretrained_checkpoint is made.logger.tensorboard_dir is None


def test_it_is_finalized_at_its_own_number_of_ranks(
    recipe: Recipe, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finalized(recipe, config, tmp_path, monkeypatch)
    model, train = config.model, config.train
    assert (
        model.tensor_model_parallel_size
        * model.context_parallel_size
        * model.pipeline_model_parallel_size
        * (config.data_parallel_size)
        == recipe.gpus
    )
    assert train.global_batch_size % (train.micro_batch_size * config.data_parallel_size) == 0
    ranks_of_experts = model.expert_model_parallel_size * model.pipeline_model_parallel_size
    assert recipe.gpus % ranks_of_experts == 0
    assert config.dataset.seq_length == model.seq_length
    assert config.scheduler.lr_decay_steps == train.train_iters * train.global_batch_size
    assert 0 < config.scheduler.lr_warmup_steps <= 0.1 * config.scheduler.lr_decay_steps
    assert config.scheduler.start_weight_decay == config.scheduler.end_weight_decay == config.optimizer.weight_decay
    assert model.params_dtype == (torch.float32 if recipe.size == "tiny" else torch.bfloat16)


def estimate(recipe: Recipe, config):
    from gpt_oss_vision.bridge.mcore.memory import memory_per_rank

    return memory_per_rank(
        config.model,
        world_size=recipe.gpus,
        micro_batch_size=config.train.micro_batch_size,
        microbatches=config.train.global_batch_size // config.train.micro_batch_size // config.data_parallel_size,
        peft=config.peft,
    )


def test_the_catalogue_has_the_estimate_and_it_fits(
    recipe: Recipe, config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    finalized(recipe, config, tmp_path, monkeypatch, engine=recipe.gpu is not None)
    tokens = config.train.global_batch_size * config.model.seq_length
    memory = estimate(recipe, config).total / 2**30
    if recipe.gpu is not None:
        assert memory < GPUS[recipe.gpu].usable_gib
    assert recipe.tokens_per_step == tokens
    assert recipe.context_parallel_size == config.model.context_parallel_size
    assert recipe.memory_gib == pytest.approx(memory, abs=0.05 if memory > 1 else 5e-4)


def test_a_configuration_file_gives_the_same_configuration(recipe: Recipe, config, tmp_path: Path):
    from megatron.bridge.training.config import ConfigContainer

    config.to_yaml(str(tmp_path / "config.yaml"))
    again = ConfigContainer.from_yaml(str(tmp_path / "config.yaml"))
    again.to_yaml(str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    for each in dataclasses.fields(config):
        assert plain(getattr(again, each.name)) == plain(getattr(config, each.name)), each.name


def plain(section: object) -> object:
    """A section of a configuration with lists in place of tuples, which YAML does not have."""
    if not dataclasses.is_dataclass(section):
        return section
    values = {each.name: getattr(section, each.name) for each in dataclasses.fields(section)}
    return type(section), {name: [*value] if isinstance(value, tuple) else value for name, value in values.items()}


def differences_from_defaults(config) -> dict[str, object]:
    """Every field of a configuration that has not the default of its class, by its key, apart from the architecture."""
    from gpt_oss_vision.bridge.config_map import megatron_fields
    from gpt_oss_vision.bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

    found = {}
    for each in dataclasses.fields(config):
        section = getattr(config, each.name)
        if not dataclasses.is_dataclass(section):
            found |= {} if section == default_of(each) else {each.name: section}
            continue
        try:
            defaults = vars(type(section)())  # which some classes change when they are made
        except TypeError:  # it has fields without a default
            defaults = {inner.name: default_of(inner) for inner in dataclasses.fields(section)}
        for inner in dataclasses.fields(section):
            value = getattr(section, inner.name)
            if inner.init and inner.name not in ("derived", "canonical_mapping") and value != defaults[inner.name]:
                found[f"{each.name}.{inner.name}"] = value
    architecture = {f"model.{name}" for name in megatron_fields(GPTOSSVisionConfig())} - {
        "model.seq_length",
        "model.init_method_std",
    }
    return {key: value for key, value in found.items() if key not in architecture}


def default_of(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


ALWAYS_STATED = ("peft.dim", "peft.alpha", "peft.share_expert_adapters", "peft.full_weights")
"""Stated even where it is the default of the class."""


def test_every_field_that_a_recipe_sets_has_a_source_with_its_value(recipe: Recipe, made):
    rows = why(recipe)
    assert len({row.field for row in rows}) == len(rows), "one row for a field"
    stated = {row.field: row.value for row in rows}
    found = differences_from_defaults(made)
    assert sorted(found.keys() - stated.keys() - PLUMBING.keys()) == []
    for key, value in stated.items():
        section, name = key.split(".")
        assert getattr(getattr(made, section), name) == value, key
    assert sorted(stated.keys() - found.keys() - {*ALWAYS_STATED}) == []


def test_every_row_of_the_sources_belongs_to_a_recipe():
    used = {id(row) for recipe in RECIPES for row in why(recipe)}
    assert [row.field for row in ROWS if id(row) not in used] == []


def test_plumbing_is_set_by_a_recipe():
    from gpt_oss_vision.recipes import catalog

    gpt_oss_vision.register()
    found = {key for recipe in RECIPES for key in differences_from_defaults(catalog.load(recipe))}
    assert sorted(PLUMBING.keys() - found) == []


# --- the catalogue -----------------------------------------------------------------------------------------------


def test_names_are_those_of_megatron_bridge():
    from megatron.bridge.recipes.utils.naming import recipe_function_name

    for recipe in RECIPES:
        if recipe.gpu is not None:
            *_, variant = recipe.name.partition("_bf16")
            name = recipe_function_name(
                model_recipe_name=f"gpt_oss_vision_{recipe.size}",
                task=recipe.task,
                num_gpus=recipe.gpus,
                gpu=recipe.gpu,
                precision="bf16",
                config_variant=variant.removeprefix("_") or None,
            )
            assert recipe.function == name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt_oss_vision_20b_sft", "gpt_oss_vision_20b_sft_8gpu_h100_bf16"),
        ("gpt_oss_vision_20b_sft_16gpu_h100_bf16", "gpt_oss_vision_20b_sft_16gpu_h100_bf16"),
        ("gpt_oss_vision_20b_sft_16gpu_h100_bf16_config", "gpt_oss_vision_20b_sft_16gpu_h100_bf16"),
        ("gpt_oss_vision_20b_long_context", "gpt_oss_vision_20b_long_context_16gpu_h100_bf16"),
        ("gpt_oss_vision_tiny_sft", "gpt_oss_vision_tiny_sft_1cpu_fp32"),
    ],
)
def test_a_recipe_is_found_by_its_name_or_its_stem(name: str, found: str):
    assert catalog.find(name).name == found


@pytest.mark.parametrize("name", ["gpt_oss_vision_20b_stf", "gpt_oss_20b_sft", "20b_sft"])
def test_an_unknown_name_is_refused_with_the_nearest(name: str):
    with pytest.raises(UsageError, match=rf"no recipe {name}; near it are .*gpt_oss_vision_20b_sft"):
        catalog.find(name)


def test_the_page_has_the_catalogue():
    page = Path(gpt_oss_vision.__file__).with_name("docs") / "recipes.md"
    rows = [line for line in page.read_text().splitlines() if "GiB" not in line and line.startswith("| `")]
    assert [row for row in rows if row.count("|") == 5][: len(RECIPES)] == [
        f"| `{recipe.name.removeprefix('gpt_oss_vision_')}` | {recipe.memory_gib:g} | {recipe.tokens_per_step:,} | "
        f"{recipe.purpose} |"
        for recipe in RECIPES
    ]


def test_the_catalogue_is_read_without_other_packages():
    script = """
import sys
before = {*sys.modules}
from gpt_oss_vision.recipes import catalog
names = {name.partition(".")[0] for name in {*sys.modules} - before}
print({*names} - {*sys.stdlib_module_names} - {"gpt_oss_vision"})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


RUN_BY_NAME = """
import sys, warnings
warnings.simplefilter("ignore")
import gpt_oss_vision
gpt_oss_vision.register()
import megatron.bridge.recipes as recipes

assert not [name for name in sys.modules if name.startswith("gpt_oss_vision.recipes.") and "catalog" not in name]
config = getattr(recipes, sys.argv[1])()
print(type(config).__name__, config.model.num_layers, config.train.global_batch_size)
for name in sys.argv[2:]:
    assert callable(getattr(recipes, name, None)), name
"""


def test_a_runner_of_megatron_bridge_finds_them_by_name():
    """As its `run_recipe.py` looks for a recipe: an attribute of `megatron.bridge.recipes`."""
    names = [recipe.function for recipe in RECIPES if recipe.gpu]
    done = subprocess.run([sys.executable, "-c", RUN_BY_NAME, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "ConfigContainer 24 512"
