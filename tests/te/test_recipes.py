"""The recipes for GPUs on the back end transformer_engine: each is finalized with its fields and checks."""

import pytest

import gpt_oss_vision
from gpt_oss_vision.bridge.mcore.backend import ENGINE
from gpt_oss_vision.recipes import catalog
from gpt_oss_vision.recipes.catalog import RECIPES, Recipe


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.gpu], ids=lambda recipe: recipe.name)
def test_a_recipe_is_finalized_on_transformer_engine(recipe: Recipe):
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    gpt_oss_vision.register()
    config = catalog.load(recipe)
    config.model.backend = ENGINE
    get_mixed_precision_config(config.mixed_precision).setup(config.model, config.optimizer, config.ddp)
    config.model.finalize()
    assert config.model.transformer_impl == ENGINE
    assert config.model.moe_grouped_gemm
    assert config.model.cross_entropy_loss_fusion == ("long_context" not in recipe.name)
